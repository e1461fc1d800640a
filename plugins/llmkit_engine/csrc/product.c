// Defines: lk_product: out (rows, n) = input (rows, k) W^T, for packed weights and the input that lk_prologue packed.
//
// One kernel serves decoding and prefill: it keeps a tile of rows x outputs in registers over all of k, reading weights as a
// stream and broadcasting inputs. Each weight is read from memory once for all rows of a step: a thread runs
// all blocks of rows over a panel while it is in its cache. Each sum runs over k in order, in one register, so
// it is the same for any number of rows. With few rows, several panels at once keep enough sums in flight.
#include <stdatomic.h>

#include "engine.h"

#define PANELS 4 // most panels in one tile
#define AHEAD 4096 // bytes before its use that a stream of weights is asked for; 2048 is a tenth slower with 4 rows

INLINE vf vf_load_int8(const int8_t *p) {
#if VL == 16 // what GCC 12 makes of the portable form takes ten times as long
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif VL == 8 && defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    typedef int8_t vb __attribute__((vector_size(VL)));
    vb b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
#endif
}

#define MOST (TILE > 6 ? TILE * NRV : 6 * NRV) // sums of one tile: TILE rows of a panel, or 3 rows of two
#define LK_EACH(i, j) _Pragma("GCC unroll 16") for (int i = 0; i < mr; i++) _Pragma("GCC unroll 8") for (int j = 0; j < width; j++)

INLINE vi vi_set(int32_t x) { return x - (vi){0}; }

// Adds up the units of `steps` steps: each has mr units of x, and one of w for each output.
INLINE void add_units(const int mr, const int width, const int kind, int64_t steps, const int32_t *restrict x, const char *restrict w,
                      int64_t stride, int64_t ahead, vf *acc, vi *sum) {
    for (int64_t s = 0; s < steps; s++, x += mr, w += NR * 4) {
        vi unit[PANELS * NRV];
        _Pragma("GCC unroll 8") for (int j = 0; j < width; j++) {
            const char *p = w + (j / NRV) * stride + (j % NRV) * VL * 4;
            memcpy(&unit[j], p, sizeof unit[j]);
            __builtin_prefetch(p + ahead);
        }
        _Pragma("GCC unroll 16") for (int i = 0; i < mr; i++) {
            vi v = vi_set(x[i]);
            VF_PIN(v);
            _Pragma("GCC unroll 8") for (int j = 0; j < width; j++)
                if (kind == LK_PAIRS) acc[i * width + j] = dpbf16(acc[i * width + j], (vf)v, (vf)unit[j]);
                else sum[i * width + j] = dpbusd(sum[i * width + j], unit[j], v);
        }
    }
}

// The sums of a group are whole numbers, so exact; they are scaled and added in floats, group after group.
INLINE void add_groups(const int mr, const int width, int64_t groups, const int32_t *restrict x, const char *restrict w, int64_t stride,
                       int64_t ahead, vf *acc) {
    for (int64_t g = 0; g < groups; g++, x += mr * (2 + GROUP / 4), w += GROUP * NR) {
        vi sum[MOST];
        LK_EACH(i, j) sum[i * width + j] = vi_set(x[mr + i]);
        add_units(mr, width, LK_BYTES, GROUP / 4, x + 2 * mr, w, stride, ahead, NULL, sum);
        _Pragma("GCC unroll 16") for (int i = 0; i < mr; i++) {
            vf scale = vf_set(((const float *)(const void *)x)[i]);
            _Pragma("GCC unroll 8") for (int j = 0; j < width; j++)
                acc[i * width + j] += __builtin_convertvector(sum[i * width + j], vf) * scale;
        }
    }
}

// c (mr, np * NR) = sum over k of x (k, mr) * w (np panels, k, NR); see prologue.c and pack.c for how the two lie in memory
INLINE void tile(const int mr, const int np, const int kind, int64_t k, const float *restrict x, const char *restrict w, int64_t stride,
                 int64_t ahead, float *restrict c) {
    vf acc[MOST];
    const int width = np * NRV;
    LK_EACH(i, j) acc[i * width + j] = vf_set(0);
    if (kind == LK_PAIRS) {
        add_units(mr, width, kind, k / 2, (const int32_t *)(const void *)x, w, stride, ahead, acc, NULL);
    } else if (kind == LK_BYTES) {
        add_groups(mr, width, k / GROUP, (const int32_t *)(const void *)x, w, stride, ahead, acc);
    } else if (kind == LK_BF16) {
        const vi upper = (vi){0} + (int32_t)0xffff0000;
        for (int64_t s = 0; s < k / 2; s++, x += 2 * mr, w += NR * 4) {
            vi raw[PANELS * NRV];
            vf even[PANELS * NRV], odd[PANELS * NRV];
            _Pragma("GCC unroll 8") for (int j = 0; j < width; j++) {
                const char *p = w + (j / NRV) * stride + (j % NRV) * VL * 4;
                memcpy(&raw[j], p, sizeof raw[j]);
                __builtin_prefetch(p + ahead);
                even[j] = (vf)(raw[j] << 16);
            }
            _Pragma("GCC unroll 16") for (int i = 0; i < mr; i++) {
                vf v = vf_set(x[i]);
                VF_PIN(v);
                _Pragma("GCC unroll 8") for (int j = 0; j < width; j++) acc[i * width + j] += even[j] * v;
            }
            _Pragma("GCC unroll 8") for (int j = 0; j < width; j++) odd[j] = (vf)(raw[j] & upper);
            _Pragma("GCC unroll 16") for (int i = 0; i < mr; i++) {
                vf v = vf_set(x[mr + i]);
                VF_PIN(v);
                _Pragma("GCC unroll 8") for (int j = 0; j < width; j++) acc[i * width + j] += odd[j] * v;
            }
        }
    } else {
        const int size = kind == LK_INT8 ? 1 : 4;
        for (int64_t s = 0; s < k; s++, x += mr, w += NR * size) {
            vf row[PANELS * NRV];
            _Pragma("GCC unroll 8") for (int j = 0; j < width; j++) {
                const char *p = w + (j / NRV) * stride + (j % NRV) * VL * size;
                row[j] = kind == LK_INT8 ? vf_load_int8((const int8_t *)p) : vf_load((const float *)p);
                if (kind != LK_INT8 || j % NRV == 0) __builtin_prefetch(p + ahead);
            }
            _Pragma("GCC unroll 16") for (int i = 0; i < mr; i++) {
                vf v = vf_set(x[i]);
                VF_PIN(v);
                _Pragma("GCC unroll 8") for (int j = 0; j < width; j++) acc[i * width + j] += row[j] * v;
            }
        }
    }
    LK_EACH(i, j) vf_store(c + (i * width + j) * VL, acc[i * width + j]);
}

#define LK_CASE(mr, np) case (mr) * 8 + (np): tile(mr, np, LK_KIND, k, x, w, stride, ahead, c); return;
#if TILE == 12
#define LK_TALL LK_CASE(4, 1) LK_CASE(5, 1) LK_CASE(6, 1) LK_CASE(7, 1) LK_CASE(8, 1) LK_CASE(9, 1) LK_CASE(10, 1) LK_CASE(11, 1) LK_CASE(12, 1)
#elif TILE == 10
#define LK_TALL LK_CASE(4, 1) LK_CASE(5, 1) LK_CASE(6, 1) LK_CASE(7, 1) LK_CASE(8, 1) LK_CASE(9, 1) LK_CASE(10, 1)
#elif TILE == 5
#define LK_TALL LK_CASE(4, 1) LK_CASE(5, 1)
#else
#define LK_TALL LK_CASE(4, 1)
#endif
#define LK_TILES \
    switch (mr * 8 + np) { \
        LK_CASE(1, 1) LK_CASE(1, 2) LK_CASE(1, 3) LK_CASE(1, 4) LK_CASE(2, 1) LK_CASE(2, 2) LK_CASE(3, 1) LK_CASE(3, 2) LK_TALL \
    }

#define LK_KIND LK_F32
static void tile_f32(int mr, int np, int64_t k, const float *x, const char *w, int64_t stride, int64_t ahead, float *c) { LK_TILES }
#undef LK_KIND
#define LK_KIND LK_BF16
static void tile_bf16(int mr, int np, int64_t k, const float *x, const char *w, int64_t stride, int64_t ahead, float *c) { LK_TILES }
#undef LK_KIND
#define LK_KIND LK_INT8
static void tile_int8(int mr, int np, int64_t k, const float *x, const char *w, int64_t stride, int64_t ahead, float *c) { LK_TILES }
#undef LK_KIND
#define LK_KIND LK_PAIRS
static void tile_pairs(int mr, int np, int64_t k, const float *x, const char *w, int64_t stride, int64_t ahead, float *c) { LK_TILES }
#undef LK_KIND
#define LK_KIND LK_BYTES
static void tile_bytes(int mr, int np, int64_t k, const float *x, const char *w, int64_t stride, int64_t ahead, float *c) { LK_TILES }
#undef LK_KIND

// Panels that one tile of `rows` rows takes.
static int64_t panels_at_once(int64_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

static void finish(const Packed *w, const float *sums, int64_t rows, int64_t n0, int64_t width, float *out, int64_t ld, int accumulate) {
    for (int64_t j = 0; j < width && n0 + j < w->n; j += VL) {
        int64_t n = n0 + j, count = w->n - n < VL ? w->n - n : VL;
        vf scale = w->scale ? vf_load_n(w->scale + n, count) : vf_set(1), bias = w->bias ? vf_load_n(w->bias + n, count) : vf_set(0);
        for (int64_t i = 0; i < rows; i++) {
            float *p = out + i * ld + n;
            vf v = vf_load(sums + i * width + j) * scale + bias;
            if (accumulate) v += vf_load_n(p, count);
            vf_store_n(p, v, count);
        }
    }
}

// The next panels for this thread: [*from, return value). Shares shrink towards the end, so that threads end together.
static int64_t take(_Atomic int64_t *next, int64_t total, int threads, int64_t *from) {
    int64_t at = atomic_load_explicit(next, memory_order_relaxed), want;
    do {
        if (at >= total) return *from = total;
        want = (total - at) / (2 * threads);
        want = want < 1 ? 1 : want;
    } while (!atomic_compare_exchange_weak_explicit(next, &at, at + want, memory_order_relaxed, memory_order_relaxed));
    *from = at;
    return at + want;
}

void lk_product(Run *r, const Packed *w, int64_t rows, float *out, int64_t ld, int accumulate, int thread, int counter) {
    (void)thread;
    static void (*const tiles[])(int, int, int64_t, const float *, const char *, int64_t, int64_t, float *) = {
        [LK_F32] = tile_f32, [LK_BF16] = tile_bf16, [LK_INT8] = tile_int8, [LK_PAIRS] = tile_pairs, [LK_BYTES] = tile_bytes};
    int64_t k = pad_k(w->k, w->kind), units = input_units(w->k, w->kind), panels = ceil_div(w->n, NR), blocks = tile_blocks(rows);
    int64_t stride = panel_bytes(w->k, w->kind);
    float sums[MOST * VL] __attribute__((aligned(64)));
    int64_t from, to, most = panels_at_once(ceil_div(rows, blocks));
    while ((to = take(&r->next[counter], panels, r->threads, &from)) > from)
        for (int64_t p = from, np; p < to; p += np) {
            np = to - p < most ? to - p : most;
            for (int64_t b = 0; b < blocks; b++) {
                int64_t m0 = tile_first(rows, b), mr = tile_first(rows, b + 1) - m0;
                const float *x = r->packed + m0 * units;
                const char *data = (const char *)w->data + p * stride;
                // The first block waits for memory; the second, while it computes, asks for the panels after these.
                int64_t ahead = b == 1 ? np * stride : AHEAD;
                tiles[w->kind]((int)mr, (int)np, k, x, data, stride, ahead, sums);
                finish(w, sums, mr, p * NR, np * NR, out + m0 * ld, ld, accumulate);
            }
        }
}
