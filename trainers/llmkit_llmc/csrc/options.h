// Defines: Settings: what the command line of the executable says.
#ifndef LLMC_OPTIONS_H
#define LLMC_OPTIONS_H

#include "error.h"

typedef struct {
    const char *train, *val, *model, *out, *schedule, *tokenizer, *hellaswag_file, *prompt, *dtype;
    int checkpoint_every, keep_last, keep_every, resume;
    int batch, length, total_batch, steps;
    float learning_rate, final_fraction, weight_decay, skip_loss, skip_norm;
    int warmup, val_every, val_batches, sample_every, sample_tokens, hellaswag, overfit;
    int master, zero, recompute, threads, vocab, seed, top_k;
    float temperature, grad_clip;
} Settings;

// Fills `s` from the arguments and prints one line on stderr for each option that means nothing on a CPU, if `notes`.
// Returns 1 where only help was asked for.
int settings_parse(Settings *s, int argc, char **argv, int notes, llmc_error *err);
void settings_help(const char *program);

#endif
