// Declares: AdamW (Loshchilov and Hutter 2019) on blocks of values, after the backward or inside it.
//
// Two ways give the same bits. With stored gradients, the whole backward comes first and llmc_model_update goes through
// all values once. Inside the backward (llmc_model_step), no gradient of a weight matrix is stored: gemm hands each tile
// of dW, still in the cache, to an UpdateSink, which updates that tile of the weights and moments at once. Each
// weight is read by the backward (for dX) before its dW is multiplied out, so it still is the old one there.
// wte needs care: its gradient has a second part, which the encoder's backward finds last. That part touches only the rows of
// the batch's tokens, known from the start, so these rows' gradients are kept (TokenRows) and updated at the end.
#ifndef LLMC_ADAMW_H
#define LLMC_ADAMW_H

#include "model.h"

// The distinct tokens of a batch and what their rows of wte get as gradient.
typedef struct {
    int64_t count;
    int32_t *token; // (count) in the order of their first appearance
    int32_t *slot;  // (padded vocabulary) a token's place among them, or -1
    float *grads;   // (count, C)
} TokenRows;

// A step's formula as numbers: w -= rate * m / (sqrt(v) + eps) + decay * w.
typedef struct {
    float beta1, beta2, scale, rate, eps, decay;
    uint32_t seed;
} AdamW;

typedef struct {
    TileSink sink;
    llmc_model *model;
    AdamW how;
    int64_t first, cols;     // of the weight matrix: its place in the flat vector, values in a row
    const TokenRows *tokens; // rows whose gradient is kept instead, or NULL
    double *squares;         // (rows) sums of squares of gradients, each at the first row of the tiles it is of
} UpdateSink;

AdamW adamw_of(const llmc_adamw *how, int param); // decay is 0 for what has one dimension
UpdateSink update_sink(llmc_model *model, AdamW how, int64_t first, int64_t cols, const TokenRows *tokens, double *squares);

// Updates `rows` x `cols` values, the first at `first` of the flat vector and `ld` from one row to the next, by gradients
// g (rows, ldg), or by gradients of 0 where g is NULL.
void adamw_block(llmc_model *model, const AdamW *how, const float *g, int64_t ldg, int64_t first, int64_t ld, int64_t rows, int64_t cols);
// Sum of squares of n values: the same bits for any number of threads.
double sum_squares(const float *g, int64_t n, int threads);

#endif
