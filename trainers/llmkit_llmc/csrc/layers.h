// Declares the fast layers; compiled for float and for bf16 (see real.h). reference.c has each of them in plain loops.
// B batch, T time, C channels, NH heads, hs = C / NH head size, V vocabulary. All arrays are row-major and dense.
#ifndef LLMC_LAYERS_H
#define LLMC_LAYERS_H

#include "gemm.h"
#include "real.h"

// out (N, C) = wte[token] + wpe[position]; inputs (N) tokens, wte (V, C), wpe (T, C); position of row n is n % T + first.
void FN(encoder_forward)(real *out, const int *inputs, const real *wte, const real *wpe, int64_t N, int64_t T, int64_t first, int64_t C, int threads);
// Adds dout (N, C) to dwte (V, C) and, summed over the batch, to dwpe (T, C).
void FN(encoder_backward)(float *dwte, float *dwpe, const real *dout, const int *inputs, int64_t N, int64_t T, int64_t C, int threads);

// out (N, C), mean (N), rstd (N) from x (N, C), weight (C), bias (C).
void FN(layernorm_forward)(real *out, float *mean, float *rstd, const real *x, const real *weight, const real *bias, int64_t N, int64_t C, int threads);
// dx (N, C) += ...; dweight (C), dbias (C) = or += ... . dout (N, C), x (N, C).
void FN(layernorm_backward)(real *dx, float *dweight, float *dbias, const real *dout, const real *x, const real *weight,
                            const float *mean, const float *rstd, int64_t N, int64_t C, int accumulate, int threads);

// GELU, tanh form (Hendrycks and Gimpel 2016). n values.
void FN(gelu_forward)(real *out, const real *x, int64_t n, int threads);
void FN(gelu_backward)(real *dx, const real *dout, const real *x, int64_t n, int threads); // dx may be dout

// Y (N, OC) = X (N, C) W^T + bias [+ residual]; W (OC, C), bias (OC) or NULL, residual (N, OC) or NULL, may be Y.
int FN(linear_forward)(real *y, const real *x, const real *w, const real *bias, const real *residual, int64_t N, int64_t C,
                       int64_t OC, Workspace *ws, llmc_error *err);
// dX (N, C) = dY (N, OC) W, and then dW (OC, C) and dbias (OC) = or += ... . dx or dbias may be NULL. `update` takes the
// tiles of dW instead of dw, or is NULL; it may change W, which is not read any more.
int FN(linear_backward)(real *dx, float *dw, float *dbias, const real *dy, const real *x, const real *w, int64_t N, int64_t C,
                        int64_t OC, int accumulate, const TileSink *update, Workspace *ws, llmc_error *err);

// Causal attention. qkv (B, T, 3, NH, hs) -> out (B, T, NH, hs), and lse (B, NH, T): log of each softmax denominator.
int FN(attention_forward)(real *out, float *lse, const real *qkv, int64_t B, int64_t T, int64_t C, int64_t NH, Workspace *ws, llmc_error *err);
// dqkv (B, T, 3, NH, hs) from dout (B, T, NH, hs) and what the forward left.
int FN(attention_backward)(real *dqkv, const real *dout, const real *qkv, const real *out, const float *lse, int64_t B, int64_t T,
                           int64_t C, int64_t NH, Workspace *ws, llmc_error *err);

// Classifier and cross-entropy in one, for chunks of rows, so that (N, V) logits never exist. losses (N).
// With dx not NULL also the gradients of scale * sum(losses): dx (N, C) =, dw (V, C) = or +=. `logits` is scratch of
// chunk * (classifier_row(V) + C) floats. `update` takes the tiles of dW instead of dw, or is NULL; then N <= chunk.
static inline int64_t classifier_row(int64_t V) { return (V + 15) / 16 * 16; } // a row of logits starts on a cache line
int FN(classifier)(float *losses, real *dx, float *dw, const real *x, const real *w, const int *targets, float scale, int64_t N, int64_t C,
                   int64_t V, int accumulate, const TileSink *update, float *logits, int64_t chunk, Workspace *ws, llmc_error *err);

#endif
