// Defines: Loader.
#define _FILE_OFFSET_BITS 64
#include "loader.h"

#include <glob.h>
#include <stdlib.h>
#include <string.h>

#include "io.h"

enum { SHARD_MAGIC = 20240520, WIDE_MAGIC = 20240801 }; // uint16 tokens (GPT-2), uint32 tokens (Llama 3)

static int open_shard(Loader *l, int64_t index, int64_t *tokens, llmc_error *err) {
    if (l->file) fclose(l->file);
    int64_t size;
    l->path = l->paths[index];
    l->file = open_for_reading(l->path, &size, err);
    if (!l->file) return -1;
    int32_t h[HEADER_INTS];
    LLMC_TRY(read_exactly(l->file, l->path, h, HEADER_BYTES, err));
    int wide = h[0] == WIDE_MAGIC && h[1] == 7;
    if (!wide && !(h[0] == SHARD_MAGIC && h[1] == 1))
        LLMC_FAIL(err, "prepare it with llmkit data prepare", "%s is not a token shard (it begins with %d, version %d)", l->path, h[0], h[1]);
    l->width = wide ? 4 : 2;
    *tokens = (int64_t)(uint32_t)h[2];
    int64_t expected = HEADER_BYTES + *tokens * l->width;
    if (size != expected)
        LLMC_FAIL(err, size < expected ? "it is truncated: copy or prepare it again" : "prepare it again", "%s has %lld bytes where %lld tokens take %lld", l->path,
                  (long long)size, (long long)*tokens, (long long)expected);
    int64_t block = l->ranks * l->B * l->T;
    l->samples = (*tokens - 1) / block;
    if (l->samples < 1)
        LLMC_FAIL(err, "lower -b or -t, or merge shards", "%s has %lld tokens, fewer than one step of %d x %lld x %lld and one more", l->path, (long long)*tokens,
                  l->ranks, (long long)l->B, (long long)l->T);
    return 0;
}

static int32_t *identity(int64_t n) {
    int32_t *order = malloc((size_t)(n > 0 ? n : 1) * sizeof *order);
    for (int64_t i = 0; order && i < n; i++) order[i] = (int32_t)i;
    return order;
}

// Opens the shard at place l->shard and, if shuffling, draws the order of its blocks.
static int enter_shard(Loader *l, llmc_error *err) {
    int64_t tokens;
    LLMC_TRY(open_shard(l, l->shuffle ? l->shard_order[l->shard] : (int64_t)l->shard, &tokens, err));
    if (!l->shuffle) return 0;
    free(l->sample_order);
    l->sample_order = identity(l->samples);
    if (!l->sample_order) LLMC_FAIL(err, "", "no memory for a permutation of %lld blocks", (long long)l->samples);
    mt_shuffle(&l->mt, l->sample_order, l->samples);
    return 0;
}

int loader_reset(Loader *l, llmc_error *err) {
    l->shard = l->sample = 0;
    if (l->shuffle) mt_shuffle(&l->mt, l->shard_order, l->shards);
    return enter_shard(l, err);
}

int loader_open(Loader *l, const char *pattern, int64_t B, int64_t T, int rank, int ranks, int shuffle, int vocab, llmc_error *err) {
    *l = (Loader){.B = B, .T = T, .rank = rank, .ranks = ranks, .shuffle = shuffle, .vocab = vocab};
    glob_t found;
    if (glob(pattern, 0, NULL, &found) != 0) LLMC_FAIL(err, "quote the pattern, and check the path", "no file matches %s", pattern);
    l->shards = (int64_t)found.gl_pathc;
    l->paths = calloc(found.gl_pathc, sizeof *l->paths);
    for (size_t i = 0; l->paths && i < found.gl_pathc; i++) {
        l->paths[i] = malloc(strlen(found.gl_pathv[i]) + 1);
        if (l->paths[i]) strcpy(l->paths[i], found.gl_pathv[i]);
    }
    globfree(&found);
    l->shard_order = identity(l->shards);
    l->raw = malloc((size_t)(B * T + 1) * 4);
    l->inputs = malloc((size_t)(B * T) * 4);
    l->targets = malloc((size_t)(B * T) * 4);
    if (!l->paths || !l->paths[l->shards - 1] || !l->shard_order || !l->raw || !l->inputs || !l->targets) LLMC_FAIL(err, "", "no memory for batches");
    mt_seed(&l->mt, (uint32_t)(42 + rank));
    for (int64_t i = 0; i < l->shards; i++) { // every shard is looked at now: better than an error after days
        int64_t tokens;
        LLMC_TRY(open_shard(l, i, &tokens, err));
        l->tokens += tokens;
    }
    return loader_reset(l, err);
}

void loader_close(Loader *l) {
    if (l->file) fclose(l->file);
    for (int64_t i = 0; l->paths && i < l->shards; i++) free(l->paths[i]);
    free(l->paths);
    free(l->shard_order);
    free(l->sample_order);
    free(l->raw);
    free(l->inputs);
    free(l->targets);
    *l = (Loader){0};
}

int loader_next(Loader *l, llmc_error *err) {
    if (l->sample >= (uint64_t)l->samples) {
        if (l->shard + 1 == (uint64_t)l->shards) LLMC_TRY(loader_reset(l, err)); // a new epoch
        else {
            l->shard++;
            l->sample = 0;
            LLMC_TRY(enter_shard(l, err));
        }
    }
    int64_t n = l->B * l->T, block = l->shuffle ? l->sample_order[l->sample] : (int64_t)l->sample;
    int64_t first = (block * l->ranks + l->rank) * n;
    LLMC_TRY(seek_to(l->file, l->path, HEADER_BYTES + first * l->width, err));
    LLMC_TRY(read_exactly(l->file, l->path, l->raw, (n + 1) * l->width, err));
    for (int64_t i = 0; i <= n; i++) {
        uint32_t token = l->width == 4 ? ((uint32_t *)l->raw)[i] : ((uint16_t *)l->raw)[i];
        if (token >= (uint32_t)l->vocab)
            LLMC_FAIL(err, "prepare the data with the tokenizer of this model", "token %u at place %lld of %s is outside the vocabulary of %d", token,
                      (long long)(first + i), l->path, l->vocab);
        if (i < n) l->inputs[i] = (int32_t)token;
        if (i > 0) l->targets[i - 1] = (int32_t)token;
    }
    l->sample++;
    return 0;
}

void loader_save(const Loader *l, llmc_state *s) {
    s->shuffle = l->shuffle;
    s->shard = l->shard;
    s->sample = l->sample;
    s->shards = (uint64_t)l->shards;
    s->samples = (uint64_t)l->samples;
    s->shard_order = l->shard_order;
    s->sample_order = l->sample_order;
    s->mt = l->mt;
}

int loader_restore(Loader *l, const llmc_state *s, llmc_error *err) {
    if (s->shuffle != l->shuffle || s->shard >= (uint64_t)l->shards || (s->shuffle && s->shards != (uint64_t)l->shards))
        LLMC_FAIL(err, "resume with the data that the run began with", "the training state was saved with %llu shards, but there are %lld",
                  (unsigned long long)s->shards, (long long)l->shards);
    l->shard = s->shard;
    if (l->shuffle) memcpy(l->shard_order, s->shard_order, (size_t)l->shards * 4);
    LLMC_TRY(enter_shard(l, err));
    l->sample = s->sample;
    if (!l->shuffle) return 0;
    if (s->samples != (uint64_t)l->samples)
        LLMC_FAIL(err, "resume with the data, batch size and sequence length that the run began with",
                  "the training state was saved with %llu blocks in a shard that now has %lld", (unsigned long long)s->samples, (long long)l->samples);
    memcpy(l->sample_order, s->sample_order, (size_t)l->samples * 4);
    l->mt = s->mt;
    return 0;
}
