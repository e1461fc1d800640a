// Defines: lk_rotate (rotary positions, keys and values into the cache), lk_attention (over the paged cache).
//
// A block of the cache holds KV_BLOCK tokens of one kv head: keys transposed, (hd, KV_BLOCK), so that scores of many keys are
// plain vector sums, and values as rows. Queries that share keys, the heads of a group and neighbouring tokens of a
// chunk, are computed together in tiles. A query first takes all its scores, then their maximum, then the weighted sum of
// values in the order of the positions: nothing depends on which other queries are in its tile.
#include <math.h>
#include <stdatomic.h>

#include "engine.h"
#include "parallel.h"

static void rotate(float *x, const float *cos, const float *sin, int64_t half) { // pairs (i, i + half), as transformers' Llama
    for (int64_t i = 0; i < half; i += VL) {
        int64_t n = half - i < VL ? half - i : VL;
        vf a = vf_load_n(x + i, n), b = vf_load_n(x + half + i, n), c = vf_load_n(cos + i, n), s = vf_load_n(sin + i, n);
        vf_store_n(x + i, a * c - b * s, n);
        vf_store_n(x + half + i, b * c + a * s, n);
    }
}

void lk_rotate(Run *r, int64_t layer, int thread) {
    (void)thread;
    const Model *m = r->model;
    const Step *st = r->step;
    int64_t hd = m->head_dim, group = m->heads / m->kv_heads, half = m->rotary_dim / 2, width = (m->heads + 2 * m->kv_heads) * hd, lo, hi;
    parallel_range(st->tokens * m->kv_heads, 1, &lo, &hi);
    for (int64_t item = lo; item < hi; item++) {
        int64_t t = item / m->kv_heads, head = item % m->kv_heads;
        float *row = r->qkv + t * width, *k = row + (m->heads + head) * hd;
        float *v = k + m->kv_heads * hd;
        if (m->mixes) {
            float *first = r->v0 + (t * m->kv_heads + head) * hd, part = m->layer[layer].value;
            if (layer == 0) memcpy(first, v, (size_t)hd * 4);
            else
                for (int64_t d = 0; d < hd; d++) v[d] += part * (first[d] - v[d]);
        }
        if (m->qk_norm) {
            for (int64_t g = 0; g < group; g++) lk_rms(row + (head * group + g) * hd, hd, m->eps);
            lk_rms(k, hd, m->eps);
        }
        if (half) {
            const float *cos = st->cos + st->pos[t] * half, *sin = st->sin + st->pos[t] * half;
            for (int64_t g = 0; g < group; g++) rotate(row + (head * group + g) * hd, cos, sin, half);
            rotate(k, cos, sin, half);
        }
        float *keys = kv_at(r, layer, st->slot[t] / KV_BLOCK, head) + st->slot[t] % KV_BLOCK;
        for (int64_t d = 0; d < hd; d++) keys[d * KV_BLOCK] = k[d];
        memcpy(kv_at(r, layer, st->slot[t] / KV_BLOCK, head) + hd * KV_BLOCK + st->slot[t] % KV_BLOCK * head_pad(hd), v, (size_t)hd * 4);
    }
}

// scores (nv columns of VL keys, each `out_step` apart; mr rows KV_BLOCK apart) = q (hd, mr) * keys (hd, KV_BLOCK)
INLINE void score_tile(const int mr, const int nv, int64_t hd, const float *restrict q, const float *const *keys, float *const *out) {
    vf acc[TILE * 4];
#define LK_EACH(i, j) _Pragma("GCC unroll 16") for (int i = 0; i < mr; i++) _Pragma("GCC unroll 4") for (int j = 0; j < nv; j++)
    LK_EACH(i, j) acc[i * nv + j] = vf_set(0);
    for (int64_t d = 0; d < hd; d++, q += mr) {
        vf k[4];
        _Pragma("GCC unroll 4") for (int j = 0; j < nv; j++) k[j] = vf_load(keys[j] + d * KV_BLOCK);
        _Pragma("GCC unroll 16") for (int i = 0; i < mr; i++) {
            vf x = vf_set(q[i]);
            VF_PIN(x);
            _Pragma("GCC unroll 4") for (int j = 0; j < nv; j++) acc[i * nv + j] += k[j] * x;
        }
    }
    LK_EACH(i, j) vf_store(out[j] + i * KV_BLOCK, acc[i * nv + j]);
}

// out (mr rows, ld apart; nv vectors of columns) = sum over tokens of p (blocks, mr, KV_BLOCK) * values (KV_BLOCK, hp), times inverse
INLINE void value_tile(const int mr, const int nv, int64_t tokens, const float *restrict p, const float *const *values, int64_t hp,
                       int64_t column, const float *inverse, float *const *out, int64_t hd) {
    vf acc[TILE * 4];
    LK_EACH(i, j) acc[i * nv + j] = vf_set(0);
    for (int64_t t0 = 0; t0 < tokens; t0 += KV_BLOCK, values++, p += mr * KV_BLOCK) {
        int64_t n = tokens - t0 < KV_BLOCK ? tokens - t0 : KV_BLOCK;
        const float *v = *values + column;
        for (int64_t t = 0; t < n; t++, v += hp) {
            vf row[4];
            _Pragma("GCC unroll 4") for (int j = 0; j < nv; j++) row[j] = vf_load(v + j * VL);
            _Pragma("GCC unroll 16") for (int i = 0; i < mr; i++) {
                vf x = vf_set(p[i * KV_BLOCK + t]);
                VF_PIN(x);
                _Pragma("GCC unroll 4") for (int j = 0; j < nv; j++) acc[i * nv + j] += row[j] * x;
            }
        }
    }
    LK_EACH(i, j) {
        int64_t c = column + j * VL;
        if (c < hd) vf_store_n(out[i] + c, acc[i * nv + j] * inverse[i], hd - c < VL ? hd - c : VL);
    }
}
#undef LK_EACH

#define LK_CASE(mr) case mr: \
    if (nv == 4 && mr <= TILE * NRV / 4) score_tile(mr, (mr) <= TILE * NRV / 4 ? 4 : 1, hd, q, keys, out); \
    else if (nv >= 2) score_tile(mr, 2, hd, q, keys, out); \
    else score_tile(mr, 1, hd, q, keys, out); \
    return;
#define LK_VALUE(mr) case mr: \
    if (nv == 4) value_tile(mr, (mr) <= TILE * NRV / 4 ? 4 : 1, tokens, p, values, hp, column, inverse, out, hd); \
    else if (nv == 2) value_tile(mr, 2, tokens, p, values, hp, column, inverse, out, hd); \
    else value_tile(mr, 1, tokens, p, values, hp, column, inverse, out, hd); \
    return;
#if TILE == 12
#define LK_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12)
#elif TILE == 10
#define LK_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10)
#elif TILE == 5
#define LK_ROWS(X) X(1) X(2) X(3) X(4) X(5)
#else
#define LK_ROWS(X) X(1) X(2) X(3) X(4)
#endif

static void scores_of(int mr, int nv, int64_t hd, const float *q, const float *const *keys, float *const *out) {
    switch (mr) { LK_ROWS(LK_CASE) }
}
static void values_of(int mr, int nv, int64_t tokens, const float *p, const float *const *values, int64_t hp, int64_t column,
                      const float *inverse, float *const *out, int64_t hd) {
    switch (mr) { LK_ROWS(LK_VALUE) }
}
static int vectors_at_once(int mr, int64_t left) { return left >= 4 && mr <= TILE * NRV / 4 ? 4 : left >= 2 ? 2 : 1; }

// Turns the scores of row i, over keys [begin, length), into e^(score - maximum), 0 elsewhere; 1 / their sum.
static float soften(float *s, int64_t mr, int64_t begin, int64_t length, int64_t blocks) {
    vf high = vf_set(-INFINITY), sum = vf_set(0);
    int64_t step = mr * KV_BLOCK;
    for (int64_t t = 0; t < length; t += VL) {
        int64_t n = length - t < VL ? length - t : VL;
        float *p = s + t / KV_BLOCK * step + t % KV_BLOCK;
        vf v = vf_load(p);
        for (int64_t i = n; i < VL; i++) v[i] = -INFINITY;
        for (int64_t i = 0; i < VL && t + i < begin; i++) v[i] = -INFINITY;
        high = vf_max(high, v);
    }
    float top = vf_highest(high);
    for (int64_t t = 0; t < blocks * KV_BLOCK; t += VL) {
        int64_t n = length - t < VL ? length - t : VL;
        float *p = s + t / KV_BLOCK * step + t % KV_BLOCK;
        vf v = n > 0 ? vf_exp(vf_load(p) - top) : vf_set(0);
        for (int64_t i = n > 0 ? n : VL; i < VL; i++) v[i] = 0;
        for (int64_t i = 0; i < VL && t + i < begin; i++) v[i] = 0;
        sum += v;
        vf_store(p, v);
    }
    return 1.0f / vf_sum(sum);
}

// Rows [j0, j0 + mr) of one sequence and kv head; row j is token j / group, head j % group of the group.
static void attend(Run *r, int64_t layer, int64_t s, int64_t head, int64_t j0, int mr, float *scratch) {
    const Model *m = r->model;
    const Step *st = r->step;
    int64_t hd = m->head_dim, hp = head_pad(hd), group = m->heads / m->kv_heads, width = (m->heads + 2 * m->kv_heads) * hd;
    const int32_t *table = st->table + s * st->table_stride;
    float *q = scratch, *p = q + hd * TILE, inverse[TILE], *out[TILE];
    int64_t begin[TILE], length[TILE], longest = 0, first = INT64_MAX;
    for (int i = 0; i < mr; i++) {
        int64_t t = st->start[s] + (j0 + i) / group, h = head * group + (j0 + i) % group;
        const float *x = r->qkv + t * width + h * hd;
        for (int64_t d = 0; d < hd; d++) q[d * mr + i] = x[d] * m->attention_scale;
        out[i] = r->att + (t * m->heads + h) * hd;
        length[i] = st->pos[t] + 1;
        begin[i] = m->window && length[i] > m->window ? length[i] - m->window : 0;
        longest = length[i] > longest ? length[i] : longest;
        first = begin[i] < first ? begin[i] : first;
    }
    // Positions count from the first block that a window reaches; what a row's own window leaves out adds zeros.
    first -= first % KV_BLOCK;
    table += first / KV_BLOCK, longest -= first;
    int64_t blocks = ceil_div(longest, KV_BLOCK), vectors = blocks * (KV_BLOCK / VL);
    const float **values = (const float **)(p + ceil_div(r->max_context, KV_BLOCK) * KV_BLOCK * TILE);
    for (int64_t b = 0; b < blocks; b++) values[b] = kv_at(r, layer, table[b], head) + hd * KV_BLOCK;
    for (int64_t v = 0; v < vectors;) {
        int nv = vectors_at_once(mr, vectors - v);
        const float *keys[4];
        float *scores[4];
        for (int j = 0; j < nv; j++) {
            int64_t b = (v + j) / (KV_BLOCK / VL), at = (v + j) % (KV_BLOCK / VL) * VL;
            keys[j] = values[b] - hd * KV_BLOCK + at;
            scores[j] = p + b * mr * KV_BLOCK + at;
        }
        scores_of(mr, nv, hd, q, keys, scores);
        v += nv;
    }
    for (int i = 0; i < mr; i++) inverse[i] = soften(p + i * KV_BLOCK, mr, begin[i] - first, length[i] - first, blocks);
    for (int64_t c = 0; c < hp;) {
        int nv = vectors_at_once(mr, (hp - c) / VL);
        values_of(mr, nv, longest, p, values, hp, c, inverse, out, hd);
        c += nv * VL;
    }
}

int64_t lk_attention_floats(const Model *m, int64_t context) {
    int64_t blocks = ceil_div(context, KV_BLOCK);
    return m->head_dim * TILE + blocks * KV_BLOCK * TILE + blocks * 2 + 64;
}

void lk_attention(Run *r, int64_t layer, int thread, int counter) {
    const Model *m = r->model;
    const Step *st = r->step;
    int64_t group = m->heads / m->kv_heads, item = 0;
    int64_t mine = atomic_fetch_add_explicit(&r->next[counter], 1, memory_order_relaxed);
    float *scratch = r->scratch + (size_t)thread * r->scratch_floats;
    // The last sequences first: prefill, the long items, stands behind the decoding ones.
    for (int64_t s = st->sequences - 1; s >= 0; s--) {
        int64_t rows = (st->start[s + 1] - st->start[s]) * group, tiles = tile_blocks(rows);
        if (item + tiles * m->kv_heads <= mine) {
            item += tiles * m->kv_heads;
            continue;
        }
        for (int64_t i = 0; i < tiles * m->kv_heads; i++, item++) {
            if (item != mine) continue;
            int64_t tile = tiles - 1 - i / m->kv_heads, j0 = tile_first(rows, tile);
            attend(r, layer, s, i % m->kv_heads, j0, (int)(tile_first(rows, tile + 1) - j0), scratch);
            mine = atomic_fetch_add_explicit(&r->next[counter], 1, memory_order_relaxed);
        }
    }
}
