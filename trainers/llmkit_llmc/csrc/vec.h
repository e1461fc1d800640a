// Defines: vf (a vector of VL floats) and what the kernels do with it: load, store, reduce, exp, sigmoid, transpose.
// GCC/Clang vector types only, so that one source serves AVX-512, AVX2, NEON and plain SSE.
#ifndef LLMC_VEC_H
#define LLMC_VEC_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
#define INLINE static inline __attribute__((always_inline))

INLINE vf vf_set(float x) { return x - (vf){0}; }
INLINE vf vf_load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
// The first n <= VL values; the others are 0. Neither reads nor writes beyond them.
#if VL == 16
#include <immintrin.h>
INLINE vf vf_load_n(const float *p, int64_t n) { return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
INLINE void vf_store_n(float *p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v); }
#else
INLINE vf vf_load_n(const float *p, int64_t n) {
    vf v = {0};
    memcpy(&v, p, (size_t)n * 4);
    return v;
}
INLINE void vf_store_n(float *p, vf v, int64_t n) { memcpy(p, &v, (size_t)n * 4); }
#endif

// How many values of the vector at `at` lie before `end`.
INLINE int64_t vf_left(int64_t end, int64_t at) { return end - at < 0 ? 0 : end - at < VL ? end - at : VL; }

INLINE vf vf_select(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
INLINE vf vf_max(vf a, vf b) { return vf_select(a > b, a, b); }
INLINE vf vf_min(vf a, vf b) { return vf_select(a < b, a, b); }

// Horizontal sum and maximum, as a tree: the order is fixed by VL alone.
INLINE float vf_sum(vf v) {
    float x[VL];
    memcpy(x, &v, sizeof x);
    for (int width = VL / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    return x[0];
}
INLINE float vf_highest(vf v) {
    float x[VL];
    memcpy(x, &v, sizeof x);
    for (int width = VL / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
    return x[0];
}

// e^x for x in [-87.3, 88.3], clamped outside (so e^-inf gives 1.2e-38, not 0). Relative error below 3e-7
// (tests/llmc measures it): x = n ln2 + r with |r| <= ln2/2, a degree-6 polynomial for e^r, and n added to the exponent.
INLINE vf vf_exp(vf x) {
    const float shift = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer that stands in the low mantissa bits
    x = vf_min(vf_max(x, vf_set(-87.3f)), vf_set(88.3f));
    vf shifted = x * 1.44269504f + shift;
    vf n = shifted - shift;
    vf r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = r * (1.0f / 720) + (1.0f / 120);
    p = p * r + (1.0f / 24);
    p = p * r + (1.0f / 6);
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vi exponent = (vi)shifted << 23; // the integer n, moved to the exponent field
    return (vf)((vi)p + exponent);
}
INLINE vf vf_sigmoid(vf x) { return 1.0f / (1.0f + vf_exp(-x)); }

// 1/x and sqrt(x) for x >= 0, to 2 units in the last place, without the slow divider: the processor's estimate of 14
// bits and one step of Newton. Elsewhere exactly rounded.
#if VL == 16
INLINE vf vf_reciprocal(vf x) {
    vf y = (vf)_mm512_rcp14_ps((__m512)x);
    return y + y * (1.0f - x * y);
}
INLINE vf vf_sqrt(vf x) {
    vf y = (vf)_mm512_rsqrt14_ps((__m512)vf_max(x, vf_set(1.17549435e-38f))); // the least normal number, so that 0 gives 0
    vf root = x * y;
    return root + 0.5f * y * (x - root * root);
}
#else
INLINE vf vf_reciprocal(vf x) { return 1.0f / x; }
INLINE vf vf_sqrt(vf x) {
    float lanes[VL];
    memcpy(lanes, &x, sizeof lanes);
    for (int i = 0; i < VL; i++) lanes[i] = sqrtf(lanes[i]);
    memcpy(&x, lanes, sizeof x);
    return x;
}
#endif

#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
#define VF_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define VF_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

// Transposes a VL x VL block held in VL registers: log2(VL) rounds of interleaving rows i and i + VL/2.
INLINE void vf_transpose(vf m[VL]) {
    vf t[VL];
#define LLMC_ROUND(from, to)                                                     \
    _Pragma("GCC unroll 16") for (int i = 0; i < VL / 2; i++) {                  \
        to[2 * i] = VF_LOW(from[i], from[i + VL / 2]);                           \
        to[2 * i + 1] = VF_HIGH(from[i], from[i + VL / 2]);                      \
    }
#if VL == 16
#define VF_LOW(a, b) VF_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define VF_HIGH(a, b) VF_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
    LLMC_ROUND(m, t) LLMC_ROUND(t, m) LLMC_ROUND(m, t) LLMC_ROUND(t, m)
#elif VL == 8
#define VF_LOW(a, b) VF_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define VF_HIGH(a, b) VF_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
    LLMC_ROUND(m, t) LLMC_ROUND(t, m) LLMC_ROUND(m, t)
    memcpy(m, t, sizeof t);
#else
#define VF_LOW(a, b) VF_SHUFFLE(a, b, 0, 4, 1, 5)
#define VF_HIGH(a, b) VF_SHUFFLE(a, b, 2, 6, 3, 7)
    LLMC_ROUND(m, t) LLMC_ROUND(t, m)
#endif
#undef LLMC_ROUND
}

#endif
