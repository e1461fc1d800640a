// Defines: lk_prologue: what comes before a product (a norm, an activation, or nothing), written in the order that products read.
//
// Rows are cut into blocks of at most TILE; block b is stored as (k, rows of b), so that a kernel reads its inputs front to back.
// Work is divided into pieces of columns too, or a step with few rows would have one thread do it all; each piece takes the
// statistics of its rows again, which is cheap.
#include <math.h>

#include "engine.h"
#include "parallel.h"

#define PIECE 256 // columns: a multiple of every VL

INLINE vf tanh_of(vf x) { // 1 - 2 / (e^2x + 1), which is good to 1e-7 absolutely
    return 1.0f - 2.0f / (vf_exp(2.0f * x) + 1.0f);
}

INLINE vf activate(vf v, int64_t kind) {
    if (kind == LK_ACT_SILU) return v * vf_sigmoid(v);
    if (kind == LK_ACT_GELU_TANH) return 0.5f * v * (1.0f + tanh_of(0.7978845608f * (v + 0.044715f * v * v * v)));
    if (kind == LK_ACT_RELU) return vf_max(v, vf_set(0));
    float x[VL];
    vf_store(x, v);
    for (int i = 0; i < VL; i++) x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.7071067812f));
    return vf_load(x);
}

// Mean (0 for an RMS norm) and 1 / deviation of one row.
static void statistics(const float *x, int64_t k, int64_t norm, float eps, float *mean, float *inverse) {
    vf sum = vf_set(0), squares = vf_set(0);
    *mean = 0;
    if (norm == LK_NORM_LAYER) {
        for (int64_t i = 0; i < k; i += VL) sum += vf_load_n(x + i, k - i < VL ? k - i : VL);
        *mean = vf_sum(sum) / (float)k;
    }
    for (int64_t i = 0; i < k; i += VL) {
        int64_t n = k - i < VL ? k - i : VL;
        vf v = vf_load_n(x + i, n) - *mean;
        if (n < VL) { // lanes beyond the row hold -mean
            float lanes[VL] = {0};
            vf_store_n(lanes, v, n);
            v = vf_load(lanes);
        }
        squares += v * v;
    }
    *inverse = 1.0f / sqrtf(vf_sum(squares) / (float)k + eps);
}

static void piece(const Run *r, const Input *in, int64_t m0, int64_t mr, int64_t from, int64_t to, float *dest) {
    const Model *m = r->model;
    const float *source[TILE];
    float mean[TILE], inverse[TILE];
    for (int64_t i = 0; i < mr; i++) {
        source[i] = in->source + (in->index ? in->index[m0 + i] : m0 + i) * in->ld;
        if (in->op == IN_NORM) statistics(source[i], in->k, m->norm, m->eps, &mean[i], &inverse[i]);
    }
    for (int64_t c = from; c < to; c += VL) {
        int64_t n = in->k - c < VL ? in->k - c : VL, stored = to - c < VL ? to - c : VL;
        vf weight = in->weight ? vf_load_n(in->weight + c, n) : vf_set(1), bias = in->bias ? vf_load_n(in->bias + c, n) : vf_set(0);
        for (int64_t base = 0; base < mr; base += VL) {
            int64_t lanes = mr - base < VL ? mr - base : VL;
            vf block[VL];
            for (int64_t i = 0; i < lanes; i++) {
                const float *p = source[base + i] + c;
                vf v = vf_load_n(p, n);
                if (in->op == IN_NORM) v = (v - mean[base + i]) * inverse[base + i] * weight + bias;
                else if (in->op == IN_ACTIVATION) {
                    v = activate(v, m->activation);
                    if (m->gated) v *= vf_load_n(p + in->k, n);
                }
                block[i] = v;
            }
            if (mr == 1) {
                vf_store_n(dest + c, block[0], stored);
                continue;
            }
            for (int64_t i = lanes; i < VL; i++) block[i] = vf_set(0);
            vf_transpose(block);
            for (int64_t j = 0; j < stored; j++) vf_store_n(dest + (c + j) * mr + base, block[j], lanes);
        }
    }
    if (in->k % 2 && to > in->k) // the other half of the last pair: its weights are 0, but 0 * NaN is not
        for (int64_t i = 0; i < mr; i++) dest[in->k * mr + i] = 0;
}

void lk_prologue(Run *r, const Input *in, int64_t rows, int thread) {
    (void)thread;
    int64_t k = pad_k(in->k), pieces = ceil_div(k, PIECE), lo, hi;
    parallel_range(tile_blocks(rows) * pieces, 1, &lo, &hi);
    for (int64_t item = lo; item < hi; item++) {
        int64_t block = item / pieces, from = item % pieces * PIECE, to = from + PIECE < k ? from + PIECE : k;
        int64_t m0 = tile_first(rows, block), mr = tile_first(rows, block + 1) - m0;
        piece(r, in, m0, mr, from, to, r->packed + m0 * k);
    }
}
