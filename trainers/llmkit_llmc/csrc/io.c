// Defines: reading and atomic writing of files.
#define _FILE_OFFSET_BITS 64
#define _POSIX_C_SOURCE 200809L
#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int atomic_open(AtomicFile *f, const char *path, llmc_error *err) {
    f->file = NULL;
    if (strlen(path) >= sizeof f->path) LLMC_FAIL(err, "use a shorter one", "the path %.60s... is too long", path);
    snprintf(f->path, sizeof f->path, "%s", path);
    snprintf(f->beside, sizeof f->beside, "%s.partial", path);
    f->file = fopen(f->beside, "wb");
    if (!f->file) LLMC_FAIL(err, "check that the directory exists and may be written", "cannot write %s: %s", f->beside, strerror(errno));
    return 0;
}

void atomic_abandon(AtomicFile *f) {
    if (!f->file) return;
    fclose(f->file);
    f->file = NULL;
    remove(f->beside);
}

static int write_failed(AtomicFile *f, llmc_error *err) {
    int why = errno;
    atomic_abandon(f);
    LLMC_FAIL(err, why == ENOSPC ? "free some space; earlier checkpoints are intact" : "", "cannot write %s: %s", f->path, strerror(why));
}

int atomic_write(AtomicFile *f, const void *data, int64_t bytes, llmc_error *err) {
    if (bytes > 0 && fwrite(data, 1, (size_t)bytes, f->file) != (size_t)bytes) return write_failed(f, err);
    return 0;
}

int atomic_commit(AtomicFile *f, llmc_error *err) {
    if (fflush(f->file) != 0 || fsync(fileno(f->file)) != 0) return write_failed(f, err);
    int closed = fclose(f->file);
    f->file = NULL;
    if (closed != 0 || rename(f->beside, f->path) != 0) {
        int why = errno;
        remove(f->beside);
        LLMC_FAIL(err, "", "cannot write %s: %s", f->path, strerror(why));
    }
    char directory[1024]; // the new name is in the directory: that must reach the disk too
    snprintf(directory, sizeof directory, "%s", f->path);
    char *slash = strrchr(directory, '/');
    if (slash) slash[1] = 0;
    int fd = open(slash ? directory : ".", O_RDONLY);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
    return 0;
}

FILE *open_for_reading(const char *path, int64_t *size, llmc_error *err) {
    struct stat info;
    FILE *file = fopen(path, "rb");
    if (!file || fstat(fileno(file), &info) != 0 || !S_ISREG(info.st_mode)) {
        llmc_set_error(err, __FILE__, __LINE__, "", "cannot read %s: %s", path, file ? "it is not a file" : strerror(errno));
        if (file) fclose(file);
        return NULL;
    }
    *size = (int64_t)info.st_size;
    return file;
}

int read_exactly(FILE *file, const char *path, void *data, int64_t bytes, llmc_error *err) {
    if (bytes > 0 && fread(data, 1, (size_t)bytes, file) != (size_t)bytes)
        LLMC_FAIL(err, "the file is truncated: copy or prepare it again", "%s ended where %lld more bytes were expected", path, (long long)bytes);
    return 0;
}

int seek_to(FILE *file, const char *path, int64_t offset, llmc_error *err) {
    if (fseeko(file, (off_t)offset, SEEK_SET) != 0) LLMC_FAIL(err, "", "cannot seek to byte %lld of %s: %s", (long long)offset, path, strerror(errno));
    return 0;
}

int read_header(FILE *file, const char *path, int32_t *header, int32_t magic, const char *what, llmc_error *err) {
    LLMC_TRY(read_exactly(file, path, header, HEADER_BYTES, err));
    if (header[0] != magic) LLMC_FAIL(err, "check the path", "%s is not %s (it begins with %d, not %d)", path, what, header[0], magic);
    return 0;
}
