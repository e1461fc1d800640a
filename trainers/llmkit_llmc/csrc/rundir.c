// Defines: the executable's output directory.
#define _POSIX_C_SOURCE 200809L
#include "rundir.h"

#include <dirent.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io.h"

enum { PATH = 1024 };

int rundir_make(const char *dir, llmc_error *err) {
    char path[PATH];
    if (strlen(dir) > PATH - 64) LLMC_FAIL(err, "use a shorter one", "the path %.60s... is too long", dir);
    snprintf(path, sizeof path, "%s", dir);
    for (char *p = path + 1;; p++) // each parent in turn
        if (*p == '/' || *p == 0) {
            char kept = *p;
            *p = 0;
            if (mkdir(path, 0777) != 0 && errno != EEXIST) LLMC_FAIL(err, "", "cannot make the directory %s: %s", path, strerror(errno));
            *p = kept;
            if (!kept) return 0;
        }
}

void rundir_model_path(char *path, int size, const char *dir, int step) { snprintf(path, (size_t)size, "%s/model_%08d.bin", dir, step); }
void rundir_state_path(char *path, int size, const char *dir, int step, int rank) {
    snprintf(path, (size_t)size, "%s/state_%08d_%05d.bin", dir, step, rank);
}
static void done_path(char *path, const char *dir, int step) { snprintf(path, PATH, "%s/DONE_%08d", dir, step); }

static int compare_ints(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

// Steps of the complete checkpoints, ascending; the caller frees them.
static int *complete(const char *dir, int *count) {
    int *steps = NULL, step, used;
    *count = 0;
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        if (sscanf(e->d_name, "DONE_%d%n", &step, &used) != 1 || e->d_name[used]) continue;
        int *more = realloc(steps, (size_t)(*count + 1) * sizeof *steps);
        if (!more) break;
        steps = more;
        steps[(*count)++] = step;
    }
    if (d) closedir(d);
    if (steps) qsort(steps, (size_t)*count, sizeof *steps, compare_ints);
    return steps;
}

int rundir_newest(const char *dir) {
    int count, *steps = complete(dir, &count), newest = count ? steps[count - 1] : -1;
    free(steps);
    return newest;
}

int rundir_save(const char *dir, int step, const llmc_comm *comm, llmc_model *model, const llmc_state *state, llmc_error *err) {
    char path[PATH];
    int failed = 0;
    if (comm->rank == 0) { // an interrupted save of the same step may have left a marker: it is not true any more
        done_path(path, dir, step);
        remove(path);
    }
    llmc_comm_barrier(comm);
    rundir_state_path(path, PATH, dir, step, comm->rank);
    failed = llmc_state_write(model, state, path, err);
    rundir_model_path(path, PATH, dir, step);
    if (!failed && comm->rank == 0) failed = llmc_model_write(model, path, err);
    if (llmc_comm_max(comm, failed != 0)) {
        if (!failed) llmc_set_error(err, __FILE__, __LINE__, "", "another process could not save its state");
        rundir_state_path(path, PATH, dir, step, comm->rank);
        remove(path);
        return -1;
    }
    if (comm->rank != 0) return 0;
    AtomicFile done;
    done_path(path, dir, step);
    LLMC_TRY(atomic_open(&done, path, err));
    return atomic_commit(&done, err);
}

void rundir_prune(const char *dir, int keep, int major, int ranks) {
    int count, *steps = complete(dir, &count);
    for (int i = 0; i < count - keep; i++) {
        if (major > 0 && steps[i] % major == 0) continue;
        char path[PATH];
        done_path(path, dir, steps[i]); // the marker first: a half-deleted checkpoint is not complete
        remove(path);
        rundir_model_path(path, PATH, dir, steps[i]);
        remove(path);
        for (int r = 0; r < ranks; r++) {
            rundir_state_path(path, PATH, dir, steps[i], r);
            remove(path);
        }
    }
    free(steps);
}

int rundir_log_begin(const char *dir, int step, llmc_error *err) {
    char path[PATH], line[256];
    snprintf(path, PATH, "%s/main.log", dir);
    FILE *old = step > 0 ? fopen(path, "r") : NULL;
    AtomicFile kept;
    int failed = atomic_open(&kept, path, err);
    while (!failed && old && fgets(line, sizeof line, old)) {
        int at;
        char kind[8] = "";
        // A training line counts steps from 0; the others say how many are done, and are written again when resuming
        // only if they come later.
        if (sscanf(line, "s:%d %3s", &at, kind) == 2 && (strcmp(kind, "trl") == 0 ? at < step : at <= step) && strchr(line, '\n'))
            failed = atomic_write(&kept, line, (int64_t)strlen(line), err);
    }
    if (old) fclose(old);
    return failed ? failed : atomic_commit(&kept, err);
}

void rundir_log(const char *dir, const char *format, ...) {
    char path[PATH];
    snprintf(path, PATH, "%s/main.log", dir);
    FILE *file = fopen(path, "a");
    if (!file) return;
    va_list args;
    va_start(args, format);
    vfprintf(file, format, args);
    va_end(args);
    fclose(file);
}
