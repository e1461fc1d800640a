// Defines: llmc_state_write, llmc_state_read.
#include "state.h"

#include <stdlib.h>
#include <string.h>

#include "io.h"
#include "model.h"

enum {
    STATE_MAGIC = 20240527,
    H_RANKS = 2, H_RANK = 3, H_MASTER = 4, H_SHUFFLE = 5, H_STEP = 10, H_RNG = 20, H_RNG_LAST = 22, H_SHARD = 30, H_SAMPLE = 32,
    H_OUTLIERS = 40, H_SIZES = 41, // ours: whether outlier windows follow, and max_t, vocab, layers, heads, channels
    WINDOW_BYTES = OUTLIER_WINDOW * 8 + 8,
};

static void put64(int32_t *header, int at, uint64_t value) { memcpy(header + at, &value, 8); }
static uint64_t get64(const int32_t *header, int at) {
    uint64_t value;
    memcpy(&value, header + at, 8);
    return value;
}

static void sizes_of(const llmc_model *m, int32_t *out) {
    const llmc_config *c = &m->config;
    int32_t sizes[5] = {c->max_t, c->vocab, c->layers, c->heads, c->channels};
    memcpy(out, sizes, sizeof sizes);
}

static int write_window(AtomicFile *f, const llmc_outliers *w, llmc_error *err) {
    LLMC_TRY(atomic_write(f, w->values, sizeof w->values, err));
    LLMC_TRY(atomic_write(f, &w->count, 4, err));
    return atomic_write(f, &w->next, 4, err);
}

int llmc_state_write(llmc_model *m, const llmc_state *s, const char *path, llmc_error *err) {
    LLMC_TRY(model_optimizer_memory(m, err)); // zeros, before the first update
    int32_t header[HEADER_INTS] = {STATE_MAGIC, 1};
    header[H_RANKS] = m->options.ranks;
    header[H_RANK] = m->options.rank;
    header[H_MASTER] = m->master != NULL;
    header[H_SHUFFLE] = s->shuffle;
    header[H_STEP] = s->step;
    put64(header, H_RNG, s->rng);
    put64(header, H_RNG_LAST, s->rng_last);
    put64(header, H_SHARD, s->shard);
    put64(header, H_SAMPLE, s->sample);
    header[H_OUTLIERS] = 1;
    sizes_of(m, header + H_SIZES);
    int64_t bytes = (m->hi - m->lo) * 4;
    AtomicFile f;
    LLMC_TRY(atomic_open(&f, path, err));
    LLMC_TRY(atomic_write(&f, header, sizeof header, err));
    LLMC_TRY(atomic_write(&f, m->m, bytes, err));
    LLMC_TRY(atomic_write(&f, m->v, bytes, err));
    if (m->master) LLMC_TRY(atomic_write(&f, m->master, bytes, err));
    if (s->shuffle) {
        LLMC_TRY(atomic_write(&f, &s->shards, 8, err));
        LLMC_TRY(atomic_write(&f, s->shard_order, (int64_t)s->shards * 4, err));
        LLMC_TRY(atomic_write(&f, &s->samples, 8, err));
        LLMC_TRY(atomic_write(&f, s->sample_order, (int64_t)s->samples * 4, err));
        LLMC_TRY(atomic_write(&f, &s->mt, sizeof s->mt, err));
    }
    LLMC_TRY(write_window(&f, &s->loss, err));
    LLMC_TRY(write_window(&f, &s->norm, err));
    return atomic_commit(&f, err);
}

static int check_header(const llmc_model *m, const int32_t *h, const char *path, llmc_error *err) {
    int32_t sizes[5], none[5] = {0};
    sizes_of(m, sizes);
    if (h[1] != 1) LLMC_FAIL(err, "", "%s is a state file of version %d, not 1", path, h[1]);
    if (h[H_RANKS] != m->options.ranks || h[H_RANK] != m->options.rank)
        LLMC_FAIL(err, "resume with as many processes as it was saved with", "%s belongs to process %d of %d, not to %d of %d", path, h[H_RANK],
                  h[H_RANKS], m->options.rank, m->options.ranks);
    if (h[H_MASTER] != m->options.master)
        LLMC_FAIL(err, "resume with the options that the run began with", "%s has %s master weights", path, h[H_MASTER] ? "float" : "no");
    if (memcmp(h + H_SIZES, none, sizeof none) != 0 && memcmp(h + H_SIZES, sizes, sizeof sizes) != 0)
        LLMC_FAIL(err, "check the path", "%s belongs to another model: %d layers, %d channels, %d tokens", path, h[H_SIZES + 2], h[H_SIZES + 4], h[H_SIZES + 1]);
    return 0;
}

static int read_order(FILE *file, const char *path, int64_t left, uint64_t *n, int32_t **order, llmc_error *err) {
    LLMC_TRY(read_exactly(file, path, n, 8, err));
    if (*n > (uint64_t)left / 4) LLMC_FAIL(err, "use an earlier checkpoint", "%s is damaged: a permutation of %llu", path, (unsigned long long)*n);
    *order = malloc((size_t)*n * 4 + 4);
    if (!*order) LLMC_FAIL(err, "", "no memory for a permutation of %llu", (unsigned long long)*n);
    LLMC_TRY(read_exactly(file, path, *order, (int64_t)*n * 4, err));
    for (uint64_t i = 0; i < *n; i++)
        if ((*order)[i] < 0 || (uint64_t)(*order)[i] >= *n) LLMC_FAIL(err, "use an earlier checkpoint", "%s is damaged: its permutation names %d", path, (*order)[i]);
    return 0;
}

static int read_window(FILE *file, const char *path, llmc_outliers *w, llmc_error *err) {
    LLMC_TRY(read_exactly(file, path, w->values, sizeof w->values, err));
    LLMC_TRY(read_exactly(file, path, &w->count, 4, err));
    LLMC_TRY(read_exactly(file, path, &w->next, 4, err));
    if (w->count < 0 || w->count > OUTLIER_WINDOW || w->next < 0 || w->next >= OUTLIER_WINDOW) LLMC_FAIL(err, "use an earlier checkpoint", "%s is damaged", path);
    return 0;
}

static int read_state(llmc_model *m, llmc_state *s, FILE *file, const char *path, int64_t size, llmc_error *err) {
    int32_t h[HEADER_INTS];
    LLMC_TRY(read_header(file, path, h, STATE_MAGIC, "a training state", err));
    LLMC_TRY(check_header(m, h, path, err));
    LLMC_TRY(model_optimizer_memory(m, err));
    int64_t bytes = (m->hi - m->lo) * 4, least = HEADER_BYTES + bytes * (m->master ? 3 : 2);
    if (size < least)
        LLMC_FAIL(err, "it is truncated, or of another model: use an earlier checkpoint", "%s has %lld bytes where the moments alone take %lld", path,
                  (long long)size, (long long)least);
    s->shuffle = h[H_SHUFFLE];
    s->step = h[H_STEP];
    s->rng = get64(h, H_RNG);
    s->rng_last = get64(h, H_RNG_LAST);
    s->shard = get64(h, H_SHARD);
    s->sample = get64(h, H_SAMPLE);
    LLMC_TRY(read_exactly(file, path, m->m, bytes, err));
    LLMC_TRY(read_exactly(file, path, m->v, bytes, err));
    if (m->master) LLMC_TRY(read_exactly(file, path, m->master, bytes, err));
    if (s->shuffle) {
        LLMC_TRY(read_order(file, path, size, &s->shards, &s->shard_order, err));
        LLMC_TRY(read_order(file, path, size, &s->samples, &s->sample_order, err));
        LLMC_TRY(read_exactly(file, path, &s->mt, sizeof s->mt, err));
        s->mt.matrix[0] = 0, s->mt.matrix[1] = 0x9908b0dfu;
        if (s->mt.left > 1 && s->mt.left + (int64_t)s->mt.next != 625) LLMC_FAIL(err, "use an earlier checkpoint", "%s is damaged: its generator stands at %u", path, s->mt.next);
    }
    if (!h[H_OUTLIERS]) return 0; // llm.c's own file
    LLMC_TRY(read_window(file, path, &s->loss, err));
    return read_window(file, path, &s->norm, err);
}

int llmc_state_read(llmc_model *m, llmc_state *s, const char *path, llmc_error *err) {
    int64_t size;
    FILE *file = open_for_reading(path, &size, err);
    if (!file) return -1;
    memset(s, 0, sizeof *s);
    int failed = read_state(m, s, file, path, size, err);
    fclose(file);
    if (failed) {
        free(s->shard_order);
        free(s->sample_order);
        s->shard_order = s->sample_order = NULL;
    }
    return failed;
}
