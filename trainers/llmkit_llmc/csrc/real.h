// Defines: real (the type that weights and activations are stored in), its loads and stores, FN, and bf16 rounding.
// Every source that says `real` is compiled twice, with LLMC_BF16=0 (float) and LLMC_BF16=1 (bfloat16); FN(name) gives
// its functions the suffix _f32 or _bf16. Arithmetic is in float either way.
#ifndef LLMC_REAL_H
#define LLMC_REAL_H

#include "vec.h"

typedef uint16_t bf16;

INLINE float bf16_to_float(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
// Round to nearest, ties to even; NaN stays NaN.
INLINE bf16 bf16_from_float(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bf16)((bits >> 16) | 0x40);
    return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
// Rounds up with a probability equal to the fraction that is cut off; `random` is 16 random bits.
INLINE bf16 bf16_stochastic(float f, uint32_t random) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7f800000u) == 0x7f800000u) return bf16_from_float(f); // inf and NaN do not round
    return (bf16)((bits + (random & 0xffffu)) >> 16);
}
// 16 random bits for value `index` of update `seed`: a counter-based hash, so neither threads nor order matter.
INLINE uint32_t counter_random(uint32_t seed, uint64_t index) {
    uint32_t x = (uint32_t)index * 0x9e3779b1u ^ (uint32_t)(index >> 32) * 0x85ebca77u ^ seed;
    x ^= x >> 16; x *= 0x7feb352du;
    x ^= x >> 15; x *= 0x846ca68bu;
    return x >> 16;
}

typedef uint16_t vh __attribute__((vector_size(VL * 2)));
INLINE vf vf_load_bf16(const bf16 *p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}
// The first n <= VL values; the others are 0.
INLINE vf vf_load_n_bf16(const bf16 *p, int64_t n) {
#if VL == 16 && defined(__AVX512BW__) && defined(__AVX512VL__)
    vh h = (vh)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
#else
    vh h = {0};
    memcpy(&h, p, (size_t)n * 2);
#endif
    return (vf)(__builtin_convertvector(h, vu) << 16);
}
INLINE vh vf_round_bf16(vf v) {
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    vi nan = (vi)((bits & 0x7fffffffu) > 0x7f800000u);
    return __builtin_convertvector((vu)(((vi)rounded & ~nan) | ((vi)((bits >> 16) | 0x40) & nan)), vh);
}
INLINE void vf_store_bf16(bf16 *p, vf v) {
    vh h = vf_round_bf16(v);
    memcpy(p, &h, sizeof h);
}
INLINE void vf_store_n_bf16(bf16 *p, vf v, int64_t n) {
    vh h = vf_round_bf16(v);
#if VL == 16 && defined(__AVX512BW__) && defined(__AVX512VL__)
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)h);
#else
    memcpy(p, &h, (size_t)n * 2);
#endif
}

#ifdef LLMC_BF16
#if LLMC_BF16
typedef bf16 real;
#define FN(name) name##_bf16
#define REAL_DTYPE LLMC_DTYPE_BF16
INLINE float real_get(real x) { return bf16_to_float(x); }
INLINE real real_from(float x) { return bf16_from_float(x); }
INLINE vf real_load(const real *p) { return vf_load_bf16(p); }
INLINE void real_store(real *p, vf v) { vf_store_bf16(p, v); }
INLINE vf real_load_n(const real *p, int64_t n) { return vf_load_n_bf16(p, n); }
INLINE void real_store_n(real *p, vf v, int64_t n) { vf_store_n_bf16(p, v, n); }
#else
typedef float real;
#define FN(name) name##_f32
#define REAL_DTYPE LLMC_DTYPE_F32
INLINE float real_get(real x) { return x; }
INLINE real real_from(float x) { return x; }
INLINE vf real_load(const real *p) { return vf_load(p); }
INLINE void real_store(real *p, vf v) { vf_store(p, v); }
INLINE vf real_load_n(const real *p, int64_t n) { return vf_load_n(p, n); }
INLINE void real_store_n(real *p, vf v, int64_t n) { vf_store_n(p, v, n); }
#endif
#endif

#endif
