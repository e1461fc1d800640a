// Defines: gemm_pack: copies a panel of a matrix into the order in which a micro-kernel reads it.
//
// A panel is `pitch` rows of A (or columns of B), called lanes, over all k: dest[step * pitch + lane]. The pitch is a whole
// number of vectors. A step is one k, or two where bf16 pairs are multiplied. Lanes beyond `count` become 0. Where k is
// contiguous in the source, VL x VL blocks are transposed in registers; where lanes are contiguous they are copied.
#ifndef LLMC_GEMM_PACK_H
#define LLMC_GEMM_PACK_H

#include "gemm_kernel.h"

// Unit `step` of a lane-contiguous source: n lanes of row k = step, or of rows 2 step and 2 step + 1 as pairs.
INLINE vf pack_lanes(const char *src, int64_t k_bytes, int64_t step, int64_t k_total, int64_t n, const int is_bf16, const int pairs) {
#define LLMC_ROW(k) (is_bf16 ? vf_load_n_bf16((const bf16 *)(src + (k) * k_bytes), n) : vf_load_n((const float *)(src + (k) * k_bytes), n))
    if (!pairs) return LLMC_ROW(step);
    vf low = LLMC_ROW(2 * step), high = 2 * step + 1 < k_total ? LLMC_ROW(2 * step + 1) : vf_set(0);
#undef LLMC_ROW
    vu l = __builtin_convertvector(vf_round_bf16(low), vu), h = __builtin_convertvector(vf_round_bf16(high), vu);
    return (vf)(l | h << 16);
}

// Units [step, step + n) of one lane of a k-contiguous source.
INLINE vf pack_steps(const char *lane, int64_t step, int64_t k_total, int64_t n, const int is_bf16, const int pairs) {
    if (!pairs) {
        return is_bf16 ? vf_load_n_bf16((const bf16 *)lane + step, n) : vf_load_n((const float *)lane + step, n);
    }
    bf16 unit[2 * VL] = {0};
    int64_t values = k_total - 2 * step < 2 * n ? k_total - 2 * step : 2 * n;
    if (is_bf16) {
        memcpy(unit, (const bf16 *)lane + 2 * step, (size_t)values * 2);
    } else {
        for (int64_t i = 0; i < values; i++) unit[i] = bf16_from_float(((const float *)lane)[2 * step + i]);
    }
    vf v;
    memcpy(&v, unit, sizeof v);
    return v;
}

INLINE void pack_fixed(float *dest, const int pitch, int64_t count, int64_t step0, int64_t steps, const char *src, int64_t lane_bytes,
                       int64_t k_bytes, int64_t k_total, const int is_bf16, const int pairs) {
    const int width = is_bf16 ? 2 : 4;
    if (k_bytes != width) { // lanes are contiguous
        for (int64_t s = 0; s < steps; s++)
            for (int lane = 0; lane < pitch; lane += VL) {
                int64_t have = count - lane < 0 ? 0 : count - lane < VL ? count - lane : VL;
                vf_store(dest + s * pitch + lane, pack_lanes(src + (int64_t)lane * width, k_bytes, step0 + s, k_total, have, is_bf16, pairs));
            }
        return;
    }
    for (int64_t s = 0; s < steps; s += VL) {
        int64_t n = steps - s < VL ? steps - s : VL;
        for (int lane = 0; lane < pitch; lane += VL) {
            int64_t have = count - lane < VL ? count - lane : VL;
            vf block[VL];
            for (int i = 0; i < VL; i++)
                block[i] = i < have ? pack_steps(src + (lane + i) * lane_bytes, step0 + s, k_total, n, is_bf16, pairs) : vf_set(0);
            vf_transpose(block);
            for (int i = 0; i < n; i++) vf_store(dest + (s + i) * pitch + lane, block[i]);
        }
    }
}

// dest (steps, pitch) <- lanes [0, count) and units [step0, step0 + steps) of a source of k_total values per lane.
INLINE void gemm_pack(float *dest, const int pitch, int64_t count, int64_t step0, int64_t steps, const void *src, int64_t lane_stride,
                      int64_t k_stride, int64_t k_total, int is_bf16, int pairs) {
    int64_t width = is_bf16 ? 2 : 4, lane_bytes = lane_stride * width, k_bytes = k_stride * width;
    if (!LLMC_DPBF16 || !pairs) {
        if (is_bf16) pack_fixed(dest, pitch, count, step0, steps, src, lane_bytes, k_bytes, k_total, 1, 0);
        else pack_fixed(dest, pitch, count, step0, steps, src, lane_bytes, k_bytes, k_total, 0, 0);
    } else {
        if (is_bf16) pack_fixed(dest, pitch, count, step0, steps, src, lane_bytes, k_bytes, k_total, 1, 1);
        else pack_fixed(dest, pitch, count, step0, steps, src, lane_bytes, k_bytes, k_total, 0, 1);
    }
}

#endif
