// Declares: FusedStep: what llmc_model_step keeps beside weights, moments and activations.
#ifndef LLMC_STEP_H
#define LLMC_STEP_H

#include "adamw.h"

// A backward that updates each weight matrix as soon as its gradient is multiplied out (adamw.h says how and why it is right).
typedef struct fused_step {
    llmc_model *model;
    const llmc_adamw *how;
    Gradients grads;      // of biases, norms and wpe, and of wte where the logits do not exist all at once
    int64_t stored;       // values in `grads`
    int64_t tokens_room;  // rows that fit into rows.grads
    TokenRows rows;       // of wte
    int32_t *slots;       // (N) for each position of the batch, its token's place in `rows`
    double *squares;      // scratch of one product
    double square;        // sum of squares of the gradients that were used up so far
} FusedStep;

// The sink for the gradient of a weight matrix; step_taken then adds its squares to the sum.
UpdateSink step_sink(FusedStep *step, int param, int64_t layer);
void step_taken(FusedStep *step, int param);
void fused_step_free(FusedStep *step);

#endif
