// Defines: llmc_model_update (AdamW), llmc_model_grad_square, model_round_from_master.
#include <math.h>

#include "model.h"
#include "parallel.h"
#include "real.h"

// Loshchilov and Hutter 2019. Values [lo, hi) of the flat vector; m, v and master start at the model's share.
// Plain loops that the compiler vectorises: the speed is that of memory, 7 values moved per parameter.
static void adamw_range(llmc_model *model, const llmc_adamw *how, int64_t lo, int64_t hi, float decay) {
    float b1 = how->beta1, b2 = how->beta2, lr = how->learning_rate, eps = how->eps, scale = how->grad_scale;
    float correct1 = 1.0f / (1.0f - powf(b1, (float)how->step)), correct2 = 1.0f / (1.0f - powf(b2, (float)how->step));
    const float *restrict g = model->grads + lo;
    float *restrict m = model->m + (lo - model->lo), *restrict v = model->v + (lo - model->lo);
    int64_t n = hi - lo;
#define LLMC_STEP(weight)                                                          \
    float grad = g[i] * scale;                                                     \
    m[i] = b1 * m[i] + (1.0f - b1) * grad;                                         \
    v[i] = b2 * v[i] + (1.0f - b2) * grad * grad;                                  \
    float next = weight - lr * (m[i] * correct1 / (sqrtf(v[i] * correct2) + eps) + decay * weight)
    if (model->options.dtype == LLMC_DTYPE_F32) {
        float *restrict p = (float *)model->params + lo;
        for (int64_t i = 0; i < n; i++) {
            LLMC_STEP(p[i]);
            p[i] = next;
        }
        return;
    }
    bf16 *restrict p = (bf16 *)model->params + lo;
    if (model->master) {
        float *restrict w = model->master + (lo - model->lo);
        for (int64_t i = 0; i < n; i++) {
            LLMC_STEP(w[i]);
            w[i] = next;
            p[i] = bf16_stochastic(next, counter_random(how->seed, (uint64_t)(lo + i)));
        }
    } else {
        for (int64_t i = 0; i < n; i++) {
            float w = bf16_to_float(p[i]);
            LLMC_STEP(w);
            p[i] = bf16_stochastic(next, counter_random(how->seed, (uint64_t)(lo + i)));
        }
    }
#undef LLMC_STEP
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
            int decayed = llmc_params[i].cols != DIM_ONE;
            if (from < to) adamw_range(model, how, from, to, decayed ? how->weight_decay : 0.0f);
        }
    }
    return 0;
}

enum { STRIPES = 256, BLOCK = 4096 };

// Blocks add up in float lanes, stripes of blocks in double, and stripes in order: the same sum for any number of threads.
double llmc_model_grad_square(const llmc_model *model, int64_t lo, int64_t hi) {
    double stripe[STRIPES] = {0}, total = 0;
    const float *g = model->grads;
    int64_t blocks = (hi - lo + BLOCK - 1) / BLOCK;
    LLMC_PARALLEL(model->options.threads) {
        int64_t first, last;
        parallel_range(STRIPES, 1, &first, &last);
        for (int64_t s = first; s < last; s++)
            for (int64_t block = blocks * s / STRIPES; block < blocks * (s + 1) / STRIPES; block++) {
                int64_t from = lo + block * BLOCK, to = from + BLOCK < hi ? from + BLOCK : hi;
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

void model_round_from_master(llmc_model *model) {
    bf16 *p = (bf16 *)model->params + model->lo;
    for (int64_t i = 0; i < model->hi - model->lo; i++) p[i] = bf16_from_float(model->master[i]);
}
