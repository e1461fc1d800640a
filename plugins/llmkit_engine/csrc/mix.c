// Defines: what models of the speedrun do beside attention and the feed-forward layer: lk_keep_embedding and lk_mix (a block's
// input is mixed with the embedding, the second half of the blocks adds what the first half put out), lk_rms, lk_softcap.
#include <math.h>

#include "engine.h"
#include "parallel.h"

// Divides x (n) by its root mean square.
void lk_rms(float *x, int64_t n, float eps) {
    vf squares = vf_set(0);
    for (int64_t i = 0; i < n; i += VL) {
        vf v = vf_load_n(x + i, n - i < VL ? n - i : VL); // lanes beyond are 0
        squares += v * v;
    }
    float inverse = 1.0f / sqrtf(vf_sum(squares) / (float)n + eps);
    for (int64_t i = 0; i < n; i += VL) {
        int64_t left = n - i < VL ? n - i : VL;
        vf_store_n(x + i, vf_load_n(x + i, left) * inverse, left);
    }
}

// The embedding of a token is normed, and kept for all blocks.
void lk_keep_embedding(Run *r, int64_t token) {
    int64_t C = r->model->width;
    lk_rms(r->x + token * C, C, r->model->eps);
    memcpy(r->x0 + token * C, r->x + token * C, (size_t)C * 4);
}

// Before block l: x = stream * (x + skip * what block layers - 1 - l put out) + embedded * x0.
void lk_mix(Run *r, int64_t l) {
    const Model *m = r->model;
    const Layer *layer = &m->layer[l];
    int64_t C = m->width, half = m->layers / 2, lo, hi;
    size_t kept = (size_t)r->max_tokens * (size_t)C;
    parallel_range(r->step->tokens, 1, &lo, &hi);
    for (int64_t t = lo; t < hi; t++) {
        float *x = r->x + t * C;
        const float *x0 = r->x0 + t * C;
        if (l > 0 && l <= half) memcpy(r->skips + (size_t)(l - 1) * kept + t * C, x, (size_t)C * 4);
        const float *other = l >= m->layers - half ? r->skips + (size_t)(m->layers - 1 - l) * kept + t * C : NULL;
        for (int64_t c = 0; c < C; c += VL) {
            int64_t n = C - c < VL ? C - c : VL;
            vf v = vf_load_n(x + c, n);
            if (other) v += layer->skip * vf_load_n(other + c, n);
            vf_store_n(x + c, layer->stream * v + layer->embedded * vf_load_n(x0 + c, n), n);
        }
    }
}

// Squeezes logits into (-softcap, softcap): z = softcap * tanh(z / softcap).
void lk_softcap(Run *r) {
    int64_t lo, hi;
    float cap = r->model->softcap;
    parallel_range(r->step->rows * r->model->vocab, VL, &lo, &hi);
    for (int64_t i = lo; i < hi; i += VL) {
        int64_t n = hi - i < VL ? hi - i : VL;
        vf v = vf_load_n(r->step->logits + i, n);
        vf_store_n(r->step->logits + i, cap - 2.0f * cap / (vf_exp(v * (2.0f / cap)) + 1.0f), n);
    }
}
