// Defines: layernorm_forward, layernorm_backward.
#include "layers.h"

#include <math.h>

#include "parallel.h"

void FN(layernorm_forward)(real *out, float *mean, float *rstd, const real *x, const real *weight, const real *bias, int64_t N, int64_t C, int threads) {
    LLMC_PARALLEL(threads) {
        int64_t lo, hi, full = C / VL * VL, rest = C - full;
        parallel_range(N, 1, &lo, &hi);
        for (int64_t n = lo; n < hi; n++) {
            const real *row = x + n * C; // (C)
            vf sum = real_load_n(row + full, rest);
            for (int64_t i = 0; i < full; i += VL) sum += real_load(row + i);
            float m = vf_sum(sum) / (float)C;
            // The variance in a second pass over a row that is in the cache: no cancellation.
            float d[VL] = {0}, variance = 0;
            for (int64_t i = 0; i < rest; i++) d[i] = real_get(row[full + i]) - m;
            vf squares = vf_load(d) * vf_load(d);
            for (int64_t i = 0; i < full; i += VL) {
                vf e = real_load(row + i) - m;
                squares += e * e;
            }
            variance = vf_sum(squares) / (float)C;
            float s = 1.0f / sqrtf(variance + 1e-5f);
            for (int64_t i = 0; i < full; i += VL)
                real_store(out + n * C + i, (real_load(row + i) - m) * s * real_load(weight + i) + real_load(bias + i));
            if (rest)
                real_store_n(out + n * C + full, (real_load_n(row + full, rest) - m) * s * real_load_n(weight + full, rest) +
                             real_load_n(bias + full, rest), rest);
            if (mean) mean[n] = m;
            if (rstd) rstd[n] = s;
        }
    }
}

// dx += rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = weight * dout, xhat = (x - mean) * rstd.
static void backward_rows(real *dx, const real *dout, const real *x, const real *weight, const float *mean, const float *rstd, int64_t N, int64_t C) {
    int64_t lo, hi, full = C / VL * VL, rest = C - full;
    parallel_range(N, 1, &lo, &hi);
    for (int64_t n = lo; n < hi; n++) {
        const real *dy = dout + n * C, *row = x + n * C; // (C)
        float m = mean[n], s = rstd[n];
        vf g = real_load_n(weight + full, rest) * real_load_n(dy + full, rest);
        vf sum = g, dot = g * (real_load_n(row + full, rest) - m) * s;
        for (int64_t i = 0; i < full; i += VL) {
            g = real_load(weight + i) * real_load(dy + i);
            sum += g;
            dot += g * (real_load(row + i) - m) * s;
        }
        float mean_g = vf_sum(sum) / (float)C, mean_gx = vf_sum(dot) / (float)C;
        for (int64_t i = 0; i < C; i += VL) {
            int64_t k = C - i < VL ? C - i : VL;
            vf xhat = (real_load_n(row + i, k) - m) * s;
            g = real_load_n(weight + i, k) * real_load_n(dy + i, k);
            real_store_n(dx + n * C + i, real_load_n(dx + n * C + i, k) + (g - mean_g - xhat * mean_gx) * s, k);
        }
    }
}

enum { COLUMNS = 8 };

// Each thread owns some columns and sums all rows of them.
static void backward_columns(float *dweight, float *dbias, const real *dout, const real *x, const float *mean, const float *rstd,
                             int64_t N, int64_t C, int accumulate) {
    int64_t lo, hi;
    parallel_range(C, VL, &lo, &hi);
    for (int64_t first = lo; first < hi; first += COLUMNS * VL) { // several vectors of a row at a time: rows are pages apart
        vf dw[COLUMNS], db[COLUMNS];
        for (int j = 0; j < COLUMNS; j++) {
            dw[j] = accumulate ? vf_load_n(dweight + first + j * VL, vf_left(hi, first + j * VL)) : vf_set(0);
            db[j] = accumulate ? vf_load_n(dbias + first + j * VL, vf_left(hi, first + j * VL)) : vf_set(0);
        }
        for (int64_t n = 0; n < N; n++)
            for (int j = 0; j < COLUMNS; j++) {
                int64_t at = n * C + first + j * VL, k = vf_left(hi, first + j * VL);
                vf dy = real_load_n(dout + at, k);
                db[j] += dy;
                dw[j] += dy * (real_load_n(x + at, k) - mean[n]) * rstd[n];
            }
        for (int j = 0; j < COLUMNS; j++) {
            vf_store_n(dweight + first + j * VL, dw[j], vf_left(hi, first + j * VL));
            vf_store_n(dbias + first + j * VL, db[j], vf_left(hi, first + j * VL));
        }
    }
}

void FN(layernorm_backward)(real *dx, float *dweight, float *dbias, const real *dout, const real *x, const real *weight,
                            const float *mean, const float *rstd, int64_t N, int64_t C, int accumulate, int threads) {
    LLMC_PARALLEL(threads) {
        backward_columns(dweight, dbias, dout, x, mean, rstd, N, C, accumulate);
        backward_rows(dx, dout, x, weight, mean, rstd, N, C);
    }
}
