// Defines: MR, NR, gemm_tile, gemm_tile_pairs: the micro-kernels that all matrix products and attention run on.
//
// A micro-kernel computes c (mr, NR) [+]= sum over k of a(k, i) * b(k, j) with the whole tile of c in registers: each step
// loads one row of b (NRV vectors) and broadcasts mr values of a. The tile is as large as the registers allow, because
// MR*NRV multiply-adds share MR + NRV loads: 14 x 2 vectors on AVX-512 (28 accumulators, 2 of b, 1 broadcast of 32
// registers), 6 x 2 on AVX2, 12 x 2 on NEON, 4 x 2 with the 16 registers of SSE.
#ifndef LLMC_GEMM_KERNEL_H
#define LLMC_GEMM_KERNEL_H

#include "real.h"

#if VL == 16
#define MR 14
#elif VL == 8
#define MR 6
#elif defined(__aarch64__)
#define MR 12
#else
#define MR 4
#endif
#define MP ((MR + VL - 1) / VL * VL) // rows from one step of a packed sliver to the next: whole, aligned vectors
#define NRV 2
#define NR (NRV * VL)
_Static_assert(MR <= VL || MR % VL == 0, "packing transposes whole vectors of rows");

// Pairs of bf16: one 32-bit unit holds the values of two consecutive k, and one instruction multiplies and adds both.
#if defined(__AVX512BF16__)
#define LLMC_DPBF16 1
INLINE vf dpbf16(vf acc, vf a, vf b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
#elif defined(LLMC_EMULATE_DPBF16) // the same arithmetic in plain code, so that the tests can run this path anywhere
#define LLMC_DPBF16 1
INLINE vf dpbf16(vf acc, vf a, vf b) {
    vi high = (vi)vf_set(0) + (int32_t)0xffff0000;
    acc += (vf)((vi)a & high) * (vf)((vi)b & high);
    return acc + (vf)((vi)a << 16) * (vf)((vi)b << 16);
}
#else
#define LLMC_DPBF16 0
INLINE vf dpbf16(vf acc, vf a, vf b) { return acc + a * b; } // never called: see gemm_uses_pairs
#endif

// Keeps a broadcast in a register; without it GCC repeats the broadcast load for each of its NRV uses.
#if defined(__x86_64__) && VL == 16
#define VF_PIN(v) __asm__("" : "+v"(v))
#else
#define VF_PIN(v) ((void)0)
#endif

INLINE void tile_fixed(const int mr, const int pairs, int64_t steps, const float *restrict a, int64_t lda,
                       const float *restrict b, int64_t ldb, float *restrict c, int64_t ldc, int accumulate) {
    vf acc[MR][NRV];
#define LLMC_TILE(i, v) _Pragma("GCC unroll 16") for (int i = 0; i < mr; i++) _Pragma("GCC unroll 2") for (int v = 0; v < NRV; v++)
    LLMC_TILE(i, v) acc[i][v] = vf_set(0);
    for (int64_t k = 0; k < steps; k++, a += lda, b += ldb) {
        vf row[NRV];
        _Pragma("GCC unroll 2") for (int v = 0; v < NRV; v++) row[v] = vf_load(b + v * VL);
        __builtin_prefetch(b + 8 * ldb);
        if (NRV * VL * 4 > 64) __builtin_prefetch(b + 8 * ldb + 16);
        _Pragma("GCC unroll 16") for (int i = 0; i < mr; i++) {
            vf x = vf_set(a[i]);
            VF_PIN(x);
            _Pragma("GCC unroll 2") for (int v = 0; v < NRV; v++)
                acc[i][v] = pairs ? dpbf16(acc[i][v], x, row[v]) : acc[i][v] + x * row[v];
        }
    }
    if (accumulate) LLMC_TILE(i, v) acc[i][v] += vf_load(c + i * ldc + v * VL);
    LLMC_TILE(i, v) vf_store(c + i * ldc + v * VL, acc[i][v]);
#undef LLMC_TILE
}

// One instance for each number of rows, so that ragged edges cost only their own rows.
#if MR == 14
#define LLMC_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14)
#elif MR == 12
#define LLMC_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12)
#elif MR == 6
#define LLMC_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6)
#else
#define LLMC_ROWS(X) X(1) X(2) X(3) X(4)
#endif

// c (mr, NR) [+]= sum over k < steps of a[k*lda + i] * b[k*ldb + j]; float throughout.
void gemm_tile(int mr, int64_t steps, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int accumulate);
// The same over pairs of bf16: steps counts pairs, and a, b hold pairs in 32-bit units.
void gemm_tile_pairs(int mr, int64_t steps, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int accumulate);

#endif
