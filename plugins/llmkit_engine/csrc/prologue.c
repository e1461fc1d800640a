// Defines: lk_prologue: what comes before a product (a norm, an activation, or nothing), written in the order that products read.
//
// Rows are cut into blocks of at most TILE; block b is stored as (k, rows of b), so that a kernel reads its inputs front to back:
// floats, or what the weights' kind multiplies: pairs of bf16, or bytes with a scale for each GROUP of a row.
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
    if (kind == LK_ACT_RELU2) return vf_max(v, vf_set(0)) * vf_max(v, vf_set(0));
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

// Rows of a block on their way into a product: where they lie and, for a norm, their statistics.
typedef struct {
    const Model *model;
    const Input *in;
    const float *source[TILE];
    float mean[TILE], inverse[TILE];
} Rows;

// Columns [c, c + VL) of rows [first, first + lanes) with the norm or activation done; 0 beyond k, whatever is there.
INLINE void values_at(const Rows *rows, int64_t first, int64_t lanes, int64_t c, vf *values) {
    const Input *in = rows->in;
    int64_t n = vf_left(in->k, c);
    vf weight = in->weight ? vf_load_n(in->weight + c, n) : vf_set(1), bias = in->bias ? vf_load_n(in->bias + c, n) : vf_set(0);
    for (int64_t i = 0; i < lanes; i++) {
        const float *p = rows->source[first + i] + c;
        vf v = vf_load_n(p, n);
        if (in->op == IN_NORM) v = (v - rows->mean[first + i]) * rows->inverse[first + i] * weight + bias;
        else if (in->op == IN_ACTIVATION) {
            v = activate(v, rows->model->activation);
            if (rows->model->gated) v *= vf_load_n(p + in->k, n);
        }
        if (n < VL) {
            float lane[VL] = {0};
            vf_store_n(lane, v, n);
            v = vf_load(lane);
        }
        values[i] = v;
    }
}

// (k, mr) floats.
static void write_floats(const Rows *rows, int64_t mr, int64_t from, int64_t to, float *dest) {
    for (int64_t c = from; c < to; c += VL)
        for (int64_t base = 0; base < mr; base += VL) {
            int64_t lanes = vf_left(mr, base), stored = vf_left(to, c);
            vf block[VL];
            values_at(rows, base, lanes, c, block);
            if (mr == 1) {
                vf_store_n(dest + c, block[0], stored);
                continue;
            }
            for (int64_t i = lanes; i < VL; i++) block[i] = vf_set(0);
            vf_transpose(block);
            for (int64_t j = 0; j < stored; j++) vf_store_n(dest + (c + j) * mr + base, block[j], lanes);
        }
}

INLINE vu round_bf16(vf v) { return __builtin_convertvector(vf_round_bf16(v), vu); }

// (k / 2, mr) units of two rounded values, the first in the lower half.
static void write_pairs(const Rows *rows, int64_t mr, int64_t from, int64_t to, float *dest) {
    for (int64_t c = from; c < to; c += VL)
        for (int64_t base = 0; base < mr; base += VL) {
            int64_t lanes = vf_left(mr, base), stored = vf_left(to, c);
            vf block[VL];
            values_at(rows, base, lanes, c, block);
            if (mr == 1) {
                vf_store_n_bf16((bf16 *)(dest + c / 2), block[0], stored);
                continue;
            }
            for (int64_t i = lanes; i < VL; i++) block[i] = vf_set(0);
            vf_transpose(block);
            for (int64_t j = 0; j < stored; j += 2)
                vf_store_n(dest + (c + j) / 2 * mr + base, (vf)(round_bf16(block[j]) | round_bf16(block[j + 1]) << 16), lanes);
        }
}

// Rounds the GROUP values of one row to bytes: their scale, what their products begin at, since weights stand 128 too high,
// and units of 4, mr apart.
static void write_group(const vf *values, int64_t mr, float *scale, int32_t *start, int32_t *units) {
    const float shift = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer that stands in the low mantissa bits
    int32_t lane[GROUP], highest = 0, total = 0;
    vi high = {0};
    for (int j = 0; j < GROUP / VL; j++) { // as integers, whose order is that of the absolute values, with NaN above all
        vi bits = (vi)values[j] & 0x7fffffff, above = bits > high;
        high = (bits & above) | (high & ~above);
    }
    memcpy(lane, &high, sizeof high);
    for (int i = 0; i < VL; i++) highest = lane[i] > highest ? lane[i] : highest;
    float top;
    memcpy(&top, &highest, 4);
    *scale = top / 127;
    float inverse = top > 0 ? 127 / top : 0;
    for (int j = 0; j < GROUP / VL; j++) {
        vi n = (vi)(values[j] * inverse + shift);
        memcpy(lane + j * VL, &n, sizeof n);
    }
    int8_t bytes[GROUP];
    for (int i = 0; i < GROUP; i++) bytes[i] = (int8_t)lane[i];
    for (int i = 0; i < GROUP; i++) total += bytes[i];
    *start = -128 * total;
    for (int i = 0; i < GROUP / 4; i++) memcpy(units + i * mr, bytes + 4 * i, 4);
}

// For each group of k: (mr) scales, (mr) starts, (GROUP / 4, mr) units of four bytes.
static void write_bytes(const Rows *rows, int64_t mr, int64_t from, int64_t to, float *dest) {
    for (int64_t c = from; c < to; c += GROUP) {
        float *scale = dest + c / GROUP * mr * (2 + GROUP / 4);
        int32_t *start = (int32_t *)(void *)(scale + mr);
        vf values[GROUP / VL][TILE];
        for (int v = 0; v < GROUP / VL; v++) values_at(rows, 0, mr, c + v * VL, values[v]);
        for (int64_t i = 0; i < mr; i++) {
            vf row[GROUP / VL];
            for (int v = 0; v < GROUP / VL; v++) row[v] = values[v][i];
            write_group(row, mr, scale + i, start + i, start + mr + i);
        }
    }
}

void lk_prologue(Run *r, const Input *in, int64_t rows, int thread) {
    (void)thread;
    int64_t k = pad_k(in->k, in->kind), pieces = ceil_div(k, PIECE), lo, hi;
    parallel_range(tile_blocks(rows) * pieces, 1, &lo, &hi);
    for (int64_t item = lo; item < hi; item++) {
        int64_t block = item / pieces, from = item % pieces * PIECE, to = from + PIECE < k ? from + PIECE : k;
        int64_t m0 = tile_first(rows, block), mr = tile_first(rows, block + 1) - m0;
        float *dest = r->packed + m0 * input_units(in->k, in->kind);
        Rows these = {.model = r->model, .in = in};
        for (int64_t i = 0; i < mr; i++) {
            these.source[i] = in->source + (in->index ? in->index[m0 + i] : m0 + i) * in->ld;
            if (in->op == IN_NORM) statistics(these.source[i], in->k, r->model->norm, r->model->eps, &these.mean[i], &these.inverse[i]);
        }
        if (in->kind == LK_PAIRS) write_pairs(&these, mr, from, to, dest);
        else if (in->kind == LK_BYTES) write_bytes(&these, mr, from, to, dest);
        else write_floats(&these, mr, from, to, dest);
    }
}
