// Defines: classifier: logits, softmax, cross-entropy and their gradients, for a chunk of rows at a time.
#include "layers.h"

#include <math.h>

#include "parallel.h"

#define VOCAB_BLOCK 4096 // columns of logits per product of dX: bounds the packed copy of the logit gradients

// One row (V): its loss, and, if grad_scale is not 0, the row becomes grad_scale * (softmax - onehot(target)).
static float softmax_row(float *row, int64_t V, int target, float grad_scale) {
    int64_t full = V / VL * VL, rest = V - full;
    vf high = vf_set(row[0]);
    for (int64_t i = 0; i < full; i += VL) high = vf_max(high, vf_load(row + i));
    float top = vf_highest(high);
    for (int64_t i = full; i < V; i++) top = row[i] > top ? row[i] : top;
    float at_target = row[target];
    vf sum = vf_set(0);
    for (int64_t i = 0; i < full; i += VL) {
        vf e = vf_exp(vf_load(row + i) - top);
        sum += e;
        if (grad_scale != 0) vf_store(row + i, e);
    }
    if (rest) {
        float tail[VL] = {0}, e[VL];
        for (int64_t i = 0; i < rest; i++) tail[i] = row[full + i] - top;
        vf_store(e, vf_exp(vf_load(tail)));
        for (int64_t i = rest; i < VL; i++) e[i] = 0;
        sum += vf_load(e);
        if (grad_scale != 0) vf_store_n(row + full, vf_load(e), rest);
    }
    float total = vf_sum(sum);
    if (grad_scale != 0) {
        float factor = grad_scale / total;
        for (int64_t i = 0; i < full; i += VL) vf_store(row + i, vf_load(row + i) * factor);
        for (int64_t i = full; i < V; i++) row[i] *= factor;
        row[target] -= grad_scale;
    }
    return logf(total) + top - at_target;
}

static int backward_chunk(real *dx, float *dw, const real *x, const real *w, const float *dlogits, int64_t ld, int64_t n, int64_t C,
                          int64_t V, int accumulate, const TileSink *update, float *sums, Workspace *ws, llmc_error *err) {
    // dX^T (C, n) = W^T (C, V) dlogits^T (V, n), V in blocks whose products add up in float
    for (int64_t v0 = 0; v0 < V; v0 += VOCAB_BLOCK) {
        Gemm input = {.m = C, .n = n, .k = V - v0 < VOCAB_BLOCK ? V - v0 : VOCAB_BLOCK, .a = matrix_t(w + v0 * C, C, REAL_DTYPE),
                      .b = matrix_t(dlogits + v0, ld, LLMC_DTYPE_F32), .c = matrix_t(sums, C, LLMC_DTYPE_F32), .accumulate = v0 > 0};
        LLMC_TRY(gemm(&input, ws, err));
    }
    for (int64_t i = 0; i < n * C; i += VL) {
        int64_t k = n * C - i < VL ? n * C - i : VL;
        real_store_n(dx + i, vf_load_n(sums + i, k), k);
    }
    // dW (V, C) = dlogits^T (V, n) X (n, C), last: `update` may change W
    Gemm weight = {.m = V, .n = C, .k = n, .a = matrix_t(dlogits, ld, LLMC_DTYPE_F32), .b = matrix(x, C, REAL_DTYPE),
                   .c = matrix(dw, C, LLMC_DTYPE_F32), .accumulate = accumulate, .sink = update};
    return gemm(&weight, ws, err);
}

int FN(classifier)(float *losses, real *dx, float *dw, const real *x, const real *w, const int *targets, float scale, int64_t N, int64_t C,
                   int64_t V, int accumulate, const TileSink *update, float *logits, int64_t chunk, Workspace *ws, llmc_error *err) {
    int64_t ld = classifier_row(V);
    float *sums = logits + chunk * ld; // (chunk, C)
    for (int64_t n0 = 0; n0 < N; n0 += chunk) {
        int64_t n = N - n0 < chunk ? N - n0 : chunk;
        const real *rows = x + n0 * C; // (n, C)
        // logits^T (V, n) = W (V, C) X^T (C, n)
        Gemm forward = {.m = V, .n = n, .k = C, .a = matrix(w, C, REAL_DTYPE), .b = matrix_t(rows, C, REAL_DTYPE),
                        .c = matrix_t(logits, ld, LLMC_DTYPE_F32)};
        LLMC_TRY(gemm(&forward, ws, err));
        LLMC_PARALLEL(ws->threads) {
            int64_t lo, hi;
            parallel_range(n, 1, &lo, &hi);
            for (int64_t i = lo; i < hi; i++) losses[n0 + i] = softmax_row(logits + i * ld, V, targets[n0 + i], dx ? scale : 0.0f);
        }
        if (dx) LLMC_TRY(backward_chunk(dx + n0 * C, dw, rows, w, logits, ld, n, C, V, accumulate || n0 > 0, update, sums, ws, err));
    }
    return 0;
}
