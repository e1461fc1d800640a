// Defines: llmc_state: everything beside the weights that a run needs to go on to the same bits, and its file.
#ifndef LLMC_STATE_H
#define LLMC_STATE_H

#include "llmc.h"
#include "mt19937.h"
#include "schedule.h"

typedef struct {
    int32_t step; // the next to run
    int32_t shuffle;
    uint64_t rng, rng_last;       // stochastic rounding: now, and before the last update
    uint64_t shard, sample;       // place in the data
    uint64_t shards, samples;     // lengths of:
    int32_t *shard_order, *sample_order; // permutations, if shuffle; owned by the caller
    Mt19937 mt;                   // if shuffle
    llmc_outliers loss, norm;
} llmc_state;

// Writes moments, master weights and *state. The file is llm.c's; what it lacks (outlier windows, the model's sizes)
// follows its end and fills unused header fields.
int llmc_state_write(llmc_model *model, const llmc_state *state, const char *path, llmc_error *err);
// Reads them back. The permutations are allocated: free() them. Fails for another model or number of processes.
int llmc_state_read(llmc_model *model, llmc_state *state, const char *path, llmc_error *err);

#endif
