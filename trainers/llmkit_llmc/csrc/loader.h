// Defines: Loader: batches from llm.c token shards, shuffled as llm.c does; and the HellaSwag examples.
#ifndef LLMC_LOADER_H
#define LLMC_LOADER_H

#include <stdio.h>

#include "comm.h"
#include "state.h"

typedef struct {
    int64_t B, T;
    int rank, ranks, shuffle, vocab;
    char **paths; // the shards, sorted
    int64_t shards;
    int64_t tokens;          // in all shards
    uint64_t shard, sample;  // place: in the (shuffled) order
    int64_t samples;         // blocks of ranks*B*T tokens in the current shard
    int32_t *shard_order, *sample_order;
    Mt19937 mt;
    FILE *file;
    const char *path;        // of the current shard
    int width;               // bytes of a token: 2 or 4
    void *raw;               // (B*T + 1) tokens as they lie in the file
    int32_t *inputs, *targets; // (B, T)
} Loader;

// Opens all files that match `pattern`. Tokens at or beyond `vocab` are an error when they are met.
int loader_open(Loader *l, const char *pattern, int64_t B, int64_t T, int rank, int ranks, int shuffle, int vocab, llmc_error *err);
void loader_close(Loader *l);
int loader_reset(Loader *l, llmc_error *err); // to the beginning; a shuffled loader draws its next permutation
int loader_next(Loader *l, llmc_error *err);  // fills inputs and targets
void loader_save(const Loader *l, llmc_state *state); // lends the permutations to `state`
int loader_restore(Loader *l, const llmc_state *state, llmc_error *err);

// Accuracy of a model on an eval .bin by lowest mean loss per ending (acc_norm): this process's share of the examples.
// At most `rows` sequences of at most T tokens go through the model at a time.
int llmc_eval_run(const char *path, llmc_model *model, int rows, int T, int rank, int ranks, int32_t *correct, int32_t *examples, llmc_error *err);

#endif
