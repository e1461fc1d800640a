// Defines: model_decode: the forward for a few tokens after a cached past; compiled for float and for bf16.
#include <math.h>
#include <string.h>

#include "layers.h"
#include "model.h"
#include "parallel.h"

// Causal attention of n new queries over `from` cached and the new keys. cache (max_t, 2C) of one layer: k, then v.
static void attend(real *out, const real *qkv, float *cache, int64_t from, int64_t n, int64_t C, int64_t NH, int threads) {
    int64_t hs = C / NH;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < 2 * C; j++) cache[(from + i) * 2 * C + j] = real_get(qkv[i * 3 * C + C + j]);
    LLMC_PARALLEL(threads) {
        int64_t lo, hi;
        parallel_range(NH, 1, &lo, &hi);
        for (int64_t h = lo; h < hi; h++)
            for (int64_t i = 0; i < n; i++) {
                const real *q = qkv + i * 3 * C + h * hs; // (hs)
                float top = -INFINITY, total = 0, sum[512] = {0}, scale = 1.0f / sqrtf((float)hs);
                for (int64_t t = 0; t <= from + i; t++) { // online softmax: the sums so far shrink when a higher score comes
                    const float *k = cache + t * 2 * C + h * hs, *v = k + C;
                    float score = 0;
                    for (int64_t d = 0; d < hs; d++) score += real_get(q[d]) * k[d];
                    score *= scale;
                    if (score > top) {
                        float shrink = expf(top - score);
                        total *= shrink;
                        for (int64_t d = 0; d < hs; d++) sum[d] *= shrink;
                        top = score;
                    }
                    float p = expf(score - top);
                    total += p;
                    for (int64_t d = 0; d < hs; d++) sum[d] += p * v[d];
                }
                for (int64_t d = 0; d < hs; d++) out[i * C + h * hs + d] = real_from(sum[d] / total);
            }
    }
}

int FN(model_decode)(llmc_model *m, const int *tokens, int64_t from, int64_t n, float *cache, float *logits, llmc_error *err) {
    int64_t L = m->config.layers, C = m->config.channels, NH = m->config.heads, V = m->config.vocab;
    int threads = m->options.threads;
    if (C / NH > 512) LLMC_FAIL(err, "use more heads", "heads of %lld channels cannot be sampled from", (long long)(C / NH));
    LLMC_TRY(model_memory(m, (size_t)(n * 11 * C) * sizeof(real), err));
    real *x = m->memory, *norm = x + n * C, *qkv = norm + n * C, *att = qkv + 3 * n * C, *wide = att + n * C; // (n, C) ... (n, 4C)
#define W(param) ((const real *)m->params + m->offset[param] + l * param_layer_size(&m->config, param))
    int64_t l = 0;
    FN(encoder_forward)(x, tokens, W(P_WTE), W(P_WPE), n, n, from, C, threads);
    for (; l < L; l++) {
        FN(layernorm_forward)(norm, NULL, NULL, x, W(P_LN1W), W(P_LN1B), n, C, threads);
        LLMC_TRY(FN(linear_forward)(qkv, norm, W(P_QKVW), W(P_QKVB), NULL, n, C, 3 * C, &m->ws, err));
        attend(att, qkv, cache + l * m->config.max_t * 2 * C, from, n, C, NH, threads);
        LLMC_TRY(FN(linear_forward)(x, att, W(P_ATTPROJW), W(P_ATTPROJB), x, n, C, C, &m->ws, err));
        FN(layernorm_forward)(norm, NULL, NULL, x, W(P_LN2W), W(P_LN2B), n, C, threads);
        LLMC_TRY(FN(linear_forward)(wide, norm, W(P_FCW), W(P_FCB), NULL, n, C, 4 * C, &m->ws, err));
        FN(gelu_forward)(wide, wide, n * 4 * C, threads);
        LLMC_TRY(FN(linear_forward)(x, wide, W(P_FCPROJW), W(P_FCPROJB), x, n, 4 * C, C, &m->ws, err));
    }
    l = 0;
    FN(layernorm_forward)(norm, NULL, NULL, x + (n - 1) * C, W(P_LNFW), W(P_LNFB), 1, C, threads);
    Gemm g = {.m = V, .n = 1, .k = C, .a = matrix(W(P_WTE), C, REAL_DTYPE), .b = matrix_t(norm, C, REAL_DTYPE), .c = matrix_t(logits, V, LLMC_DTYPE_F32)};
    return gemm(&g, &m->ws, err);
#undef W
}
