// Defines: lk_pack, lk_packed_bytes, lk_panel, lk_kinds: weights in the order in which the products read them.
//
// A panel holds NR outputs over all k, so that a product streams it from front to back. fp32: (k, NR) floats. bf16: (k / 2, NR)
// units of 32 bits, the lower half the even k and the upper half the odd one; widening is then one shift or one mask.
// int8: (k, NR) bytes, with one scale for each output: max |w| / 127 (symmetric, no zero point).
// Two kinds are for processors with instructions that multiply narrow inputs too. Pairs: as bf16. Bytes: int8 + 128, in units
// of 4 consecutive k, (k / 4, NR, 4): the instruction's first factor has no sign, see product.c.
#include <math.h>
#include <stdlib.h>

#include "engine.h"
#include "parallel.h"

int64_t lk_panel(void) { return NR; }

// Whether pairs are worth it. Intel's cores run the instruction at less than a third of the rate of an fp32 multiply-add (measured
// on Emerald Rapids: a step of 64 rows takes 1.6 times as long); AMD's run both at one rate.
static int pairs_pay(void) {
#if LLMC_DPBF16 && defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_is("amd");
#else
    return 0;
#endif
}

// Which of the kinds that need instructions of their own this library has: 1 pairs, 2 bytes; and 4: pairs are faster than bf16.
int lk_kinds(void) { return LLMC_DPBF16 | LK_DPBUSD << 1 | pairs_pay() << 2; }

int64_t lk_packed_bytes(int64_t n, int64_t k, int64_t kind) { return ceil_div(n, NR) * panel_bytes(k, kind); }

static float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023, bits;
    if (exponent == 0) {
        float f = (float)mantissa * 0x1p-24f;
        return sign ? -f : f;
    }
    bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE float weight_at(const void *source, int64_t dtype, int64_t i) {
    if (dtype == LK_F32) return ((const float *)source)[i];
    if (dtype == LK_BF16) return bf16_to_float(((const bf16 *)source)[i]);
    return half_to_float(((const uint16_t *)source)[i]);
}

// One output's weights as floats: `stride` values apart in the source.
static void gather(float *dest, const void *source, int64_t dtype, int64_t first, int64_t stride, int64_t k) {
    if (dtype == LK_F32) for (int64_t i = 0; i < k; i++) dest[i] = weight_at(source, LK_F32, first + i * stride);
    else if (dtype == LK_BF16) for (int64_t i = 0; i < k; i++) dest[i] = weight_at(source, LK_BF16, first + i * stride);
    else for (int64_t i = 0; i < k; i++) dest[i] = weight_at(source, LK_F16, first + i * stride);
}

static void place(char *panel, int64_t lane, const float *row, int64_t k, int64_t kind, float *scale) {
    if (kind == LK_F32) {
        for (int64_t i = 0; i < k; i++) ((float *)panel)[i * NR + lane] = row[i];
    } else if (kind == LK_BF16 || kind == LK_PAIRS) {
        bf16 *dest = (bf16 *)panel + 2 * lane;
        for (int64_t i = 0; i < k; i++) dest[i / 2 * 2 * NR + i % 2] = bf16_from_float(row[i]);
    } else {
        float top = 0;
        for (int64_t i = 0; i < k; i++) top = fabsf(row[i]) > top ? fabsf(row[i]) : top;
        *scale = top / 127;
        float inverse = top > 0 ? 127 / top : 0;
        if (kind == LK_INT8) for (int64_t i = 0; i < k; i++) ((int8_t *)panel)[i * NR + lane] = (int8_t)lrintf(row[i] * inverse);
        else for (int64_t i = 0; i < k; i++) ((uint8_t *)panel)[(i / 4 * NR + lane) * 4 + i % 4] = (uint8_t)(lrintf(row[i] * inverse) + 128);
    }
}

// Puts `n` outputs of k inputs into a packed matrix, from its output `at` on. Output i of the source begins at value
// i * out_stride and its inputs are in_stride values apart. `dest` must be zero beforehand. Returns 0, or -1 without memory.
int lk_pack(void *dest, float *scale, int64_t kind, int64_t at, const void *source, int64_t dtype, int64_t n, int64_t k,
            int64_t out_stride, int64_t in_stride, int threads) {
    int64_t each = panel_bytes(k, kind), first = at / NR, panels = ceil_div(at + n, NR) - first;
    int failed = 0;
    LLMC_PARALLEL(threads) {
        float *rows = malloc((size_t)(k * NR) * sizeof(float));
        if (!rows) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        int64_t lo, hi;
        parallel_range(panels, 1, &lo, &hi);
        for (int64_t p = first + lo; rows && p < first + hi; p++) {
            int64_t from = p * NR < at ? at : p * NR, to = (p + 1) * NR < at + n ? (p + 1) * NR : at + n;
            for (int64_t j = from; j < to; j++) // gathered together, so that each cache line of a transposed source is used whole
                if (in_stride == 1) gather(rows + (j - from) * k, source, dtype, (j - at) * out_stride, 1, k);
            if (in_stride != 1)
                for (int64_t i = 0; i < k; i++)
                    for (int64_t j = from; j < to; j++) rows[(j - from) * k + i] = weight_at(source, dtype, (j - at) * out_stride + i * in_stride);
            for (int64_t j = from; j < to; j++)
                place((char *)dest + p * each, j % NR, rows + (j - from) * k, k, kind, scale ? scale + j : NULL);
        }
        free(rows);
    }
    return failed ? -1 : 0;
}
