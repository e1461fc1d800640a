// Defines: adamw_of, adamw_block, update_sink, llmc_model_update, sum_squares, llmc_model_grad_square, model_round_from_master.
#include "adamw.h"

#include <math.h>

#include "gemm_kernel.h"
#include "parallel.h"

AdamW adamw_of(const llmc_adamw *how, int param) {
    // lr * (m / c1) / (sqrt(v / c2) + eps) = (lr sqrt(c2) / c1) * m / (sqrt(v) + eps sqrt(c2))
    float c1 = 1.0f - powf(how->beta1, (float)how->step), root2 = sqrtf(1.0f - powf(how->beta2, (float)how->step));
    return (AdamW){.beta1 = how->beta1, .beta2 = how->beta2, .scale = how->grad_scale, .rate = how->learning_rate * root2 / c1, .eps = how->eps * root2,
                   .decay = llmc_params[param].cols == DIM_ONE ? 0.0f : how->learning_rate * how->weight_decay, .seed = how->seed};
}

// n <= VL values: moments m and v change in memory, and the new weights are returned.
INLINE vf adamw_vector(const AdamW *r, vf g, vf w, float *m, float *v, int64_t n) {
    g *= r->scale;
    vf m1 = r->beta1 * vf_load_n(m, n) + (1.0f - r->beta1) * g;
    vf v1 = r->beta2 * vf_load_n(v, n) + (1.0f - r->beta2) * (g * g);
    vf_store_n(m, m1, n);
    vf_store_n(v, v1, n);
    return w - (r->rate * m1 * vf_reciprocal(vf_sqrt(v1) + r->eps) + r->decay * w);
}

enum { WEIGHTS_F32, WEIGHTS_BF16, WEIGHTS_MASTER };

INLINE void block_of(llmc_model *model, const AdamW *how, const float *g, int64_t ldg, int64_t first, int64_t ld, int64_t rows, int64_t cols, const int weights) {
    const AdamW r = *how; // a copy, which stores cannot change
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < cols; i += VL) {
            int64_t at = first + row * ld + i, own = at - model->lo, n = cols - i < VL ? cols - i : VL;
            vf grad = g ? vf_load_n(g + row * ldg + i, n) : vf_set(0);
            if (weights == WEIGHTS_F32) {
                float *p = (float *)model->params + at;
                vf_store_n(p, adamw_vector(&r, grad, vf_load_n(p, n), model->m + own, model->v + own, n), n);
                continue;
            }
            bf16 *p = (bf16 *)model->params + at;
            vf w = weights == WEIGHTS_MASTER ? vf_load_n(model->master + own, n) : vf_load_n_bf16(p, n);
            w = adamw_vector(&r, grad, w, model->m + own, model->v + own, n);
            if (weights == WEIGHTS_MASTER) vf_store_n(model->master + own, w, n);
            float next[VL];
            bf16 rounded[VL];
            vf_store(next, w);
            for (int j = 0; j < VL; j++) rounded[j] = bf16_stochastic(next[j], counter_random(r.seed, (uint64_t)(at + j)));
            memcpy(p, rounded, (size_t)n * sizeof *p);
        }
}

void adamw_block(llmc_model *model, const AdamW *how, const float *g, int64_t ldg, int64_t first, int64_t ld, int64_t rows, int64_t cols) {
    if (model->options.dtype == LLMC_DTYPE_F32) block_of(model, how, g, ldg, first, ld, rows, cols, WEIGHTS_F32);
    else if (model->master) block_of(model, how, g, ldg, first, ld, rows, cols, WEIGHTS_MASTER);
    else block_of(model, how, g, ldg, first, ld, rows, cols, WEIGHTS_BF16);
}

static void take(const TileSink *sink, const float *tile, int64_t ld, int64_t m0, int64_t n0, int64_t mr, int64_t nr) {
    const UpdateSink *u = (const UpdateSink *)sink;
    vf sum = vf_set(0);
    for (int64_t i = 0, rows; i < mr; i += rows, tile += rows * ld) {
        int32_t slot = u->tokens ? u->tokens->slot[m0 + i] : -1;
        rows = 1;
        if (slot >= 0) { // the gradient is not complete yet
            memcpy(u->tokens->grads + slot * u->cols + n0, tile, (size_t)nr * sizeof(float));
            continue;
        }
        while (i + rows < mr && (!u->tokens || u->tokens->slot[m0 + i + rows] < 0)) rows++;
        adamw_block(u->model, &u->how, tile, ld, u->first + (m0 + i) * u->cols + n0, u->cols, rows, nr);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = 0; j < nr; j += VL) {
                vf g = vf_load_n(tile + r * ld + j, nr - j < VL ? nr - j : VL);
                sum += g * g;
            }
    }
    u->squares[m0] += (double)vf_sum(sum);
}

static void prefetch(const TileSink *sink, int64_t m0, int64_t n0, int64_t mr, int64_t nr) {
    const UpdateSink *u = (const UpdateSink *)sink;
    const llmc_model *model = u->model;
    int64_t width = model->options.dtype == LLMC_DTYPE_BF16 ? 2 : 4;
    for (int64_t i = 0; i < mr; i++) {
        int64_t at = u->first + (m0 + i) * u->cols + n0, own = at - model->lo;
        for (int64_t j = 0; j < nr; j += 16) {
            __builtin_prefetch(model->m + own + j, 1);
            __builtin_prefetch(model->v + own + j, 1);
            __builtin_prefetch((const char *)model->params + (at + j) * width, 1);
            if (model->master) __builtin_prefetch(model->master + own + j, 1);
        }
    }
}

UpdateSink update_sink(llmc_model *model, AdamW how, int64_t first, int64_t cols, const TokenRows *tokens, double *squares) {
    return (UpdateSink){{take, prefetch}, model, how, first, cols, tokens, squares};
}

int llmc_model_update(llmc_model *model, const llmc_adamw *how, llmc_error *err) {
    if (!model->grads) LLMC_FAIL(err, "compute gradients first", "there are no gradients to update with");
    LLMC_TRY(model_optimizer_memory(model, err));
    LLMC_PARALLEL(model->options.threads) {
        int64_t lo, hi;
        parallel_range(model->hi - model->lo, 16, &lo, &hi);
        lo += model->lo, hi += model->lo;
        for (int i = 0; i < PARAMS; i++) {
            int64_t from = model->offset[i], to = from + param_size(&model->config, i);
            if (from < lo) from = lo;
            if (to > hi) to = hi;
            const AdamW one = adamw_of(how, i);
            if (from < to) adamw_block(model, &one, model->grads + from, 0, from, 0, 1, to - from);
        }
    }
    return 0;
}

enum { STRIPES = 256, BLOCK = 4096 };

// Blocks add up in float lanes, stripes of blocks in double, and stripes in order: the same sum for any number of threads.
double sum_squares(const float *g, int64_t n, int threads) {
    double stripe[STRIPES] = {0}, total = 0;
    int64_t blocks = (n + BLOCK - 1) / BLOCK;
    LLMC_PARALLEL(threads) {
        int64_t first, last;
        parallel_range(STRIPES, 1, &first, &last);
        for (int64_t s = first; s < last; s++)
            for (int64_t block = blocks * s / STRIPES; block < blocks * (s + 1) / STRIPES; block++) {
                int64_t from = block * BLOCK, to = from + BLOCK < n ? from + BLOCK : n;
                vf sum[4] = {{0}};
                int64_t i = from;
                for (; i + 4 * VL <= to; i += 4 * VL)
                    for (int j = 0; j < 4; j++) sum[j] += vf_load(g + i + j * VL) * vf_load(g + i + j * VL);
                for (; i < to; i += VL) {
                    vf x = vf_load_n(g + i, to - i < VL ? to - i : VL);
                    sum[0] += x * x;
                }
                stripe[s] += (double)vf_sum(sum[0] + sum[1] + (sum[2] + sum[3]));
            }
    }
    for (int s = 0; s < STRIPES; s++) total += stripe[s];
    return total;
}

double llmc_model_grad_square(const llmc_model *model, int64_t lo, int64_t hi) {
    return sum_squares(model->grads + lo, hi - lo, model->options.threads);
}

void model_round_from_master(llmc_model *model) {
    bf16 *p = (bf16 *)model->params + model->lo;
    for (int64_t i = 0; i < model->hi - model->lo; i++) p[i] = bf16_from_float(model->master[i]);
}
