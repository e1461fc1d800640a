// Defines: gelu_forward, gelu_backward, encoder_forward, encoder_backward, linear_forward, linear_backward.
#include "layers.h"

#include "parallel.h"

// gelu(x) = x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): the tanh form, written with one exponential.
INLINE vf gelu_argument(vf x) { return (x + x * x * x * 0.044715f) * (2 * 0.7978845608f); }

void FN(gelu_forward)(real *out, const real *x, int64_t n, int threads) {
    LLMC_PARALLEL(threads) {
        int64_t lo, hi;
        parallel_range(n, VL, &lo, &hi);
        for (int64_t i = lo; i < hi; i += VL) {
            int64_t k = hi - i < VL ? hi - i : VL;
            vf v = real_load_n(x + i, k);
            real_store_n(out + i, v * vf_sigmoid(gelu_argument(v)), k);
        }
    }
}

void FN(gelu_backward)(real *dx, const real *dout, const real *x, int64_t n, int threads) {
    LLMC_PARALLEL(threads) {
        int64_t lo, hi;
        parallel_range(n, VL, &lo, &hi);
        for (int64_t i = lo; i < hi; i += VL) {
            int64_t k = hi - i < VL ? hi - i : VL;
            vf v = real_load_n(x + i, k);
            vf s = vf_sigmoid(gelu_argument(v));
            vf slope = (1.0f + v * v * (3 * 0.044715f)) * (2 * 0.7978845608f); // of the argument
            real_store_n(dx + i, real_load_n(dout + i, k) * (s + v * s * (1.0f - s) * slope), k);
        }
    }
}

void FN(encoder_forward)(real *out, const int *inputs, const real *wte, const real *wpe, int64_t N, int64_t T, int64_t first, int64_t C, int threads) {
    LLMC_PARALLEL(threads) {
        int64_t lo, hi;
        parallel_range(N, 1, &lo, &hi);
        for (int64_t n = lo; n < hi; n++) {
            const real *token = wte + inputs[n] * C, *position = wpe + (n % T + first) * C; // (C)
            for (int64_t i = 0; i < C; i += VL) {
                int64_t k = C - i < VL ? C - i : VL;
                real_store_n(out + n * C + i, real_load_n(token + i, k) + real_load_n(position + i, k), k);
            }
        }
    }
}

// Each thread owns some columns and goes through all rows in order, so a token that occurs twice needs no atomics.
void FN(encoder_backward)(float *dwte, float *dwpe, const real *dout, const int *inputs, int64_t N, int64_t T, int64_t C, int threads) {
    LLMC_PARALLEL(threads) {
        int64_t lo, hi;
        parallel_range(C, VL, &lo, &hi);
        for (int64_t n = 0; n < N; n++) {
            float *token = dwte + inputs[n] * C, *position = dwpe + n % T * C; // (C)
            for (int64_t i = lo; i < hi; i += VL) {
                int64_t k = hi - i < VL ? hi - i : VL;
                vf d = real_load_n(dout + n * C + i, k);
                vf_store_n(token + i, vf_load_n(token + i, k) + d, k);
                vf_store_n(position + i, vf_load_n(position + i, k) + d, k);
            }
        }
    }
}

int FN(linear_forward)(real *y, const real *x, const real *w, const real *bias, const real *residual, int64_t N, int64_t C,
                       int64_t OC, Workspace *ws, llmc_error *err) {
    // Y^T (OC, N) = W (OC, C) X^T (C, N)
    Gemm g = {.m = OC, .n = N, .k = C, .a = matrix(w, C, REAL_DTYPE), .b = matrix_t(x, C, REAL_DTYPE),
              .c = matrix_t(y, OC, REAL_DTYPE), .bias = bias, .residual = residual};
    return gemm(&g, ws, err);
}

enum { COLUMNS = 8 };

int FN(linear_backward)(real *dx, float *dw, float *dbias, const real *dy, const real *x, const real *w, int64_t N, int64_t C,
                        int64_t OC, int accumulate, const TileSink *update, Workspace *ws, llmc_error *err) {
    if (dbias) {
        LLMC_PARALLEL(ws->threads) {
            int64_t lo, hi;
            parallel_range(OC, VL, &lo, &hi);
            for (int64_t first = lo; first < hi; first += COLUMNS * VL) { // several vectors of a row at a time: rows are pages apart
                vf sum[COLUMNS];
                for (int j = 0; j < COLUMNS; j++) sum[j] = accumulate ? vf_load_n(dbias + first + j * VL, vf_left(hi, first + j * VL)) : vf_set(0);
                for (int64_t n = 0; n < N; n++)
                    for (int j = 0; j < COLUMNS; j++) sum[j] += real_load_n(dy + n * OC + first + j * VL, vf_left(hi, first + j * VL));
                for (int j = 0; j < COLUMNS; j++) vf_store_n(dbias + first + j * VL, sum[j], vf_left(hi, first + j * VL));
            }
        }
    }
    if (dx) {
        // dX^T (C, N) = W^T (C, OC) dY^T (OC, N)
        Gemm input = {.m = C, .n = N, .k = OC, .a = matrix_t(w, C, REAL_DTYPE), .b = matrix_t(dy, OC, REAL_DTYPE),
                      .c = matrix_t(dx, C, REAL_DTYPE)};
        LLMC_TRY(gemm(&input, ws, err));
    }
    // dW (OC, C) = dY^T (OC, N) X (N, C)
    Gemm weight = {.m = OC, .n = C, .k = N, .a = matrix_t(dy, OC, REAL_DTYPE), .b = matrix(x, C, REAL_DTYPE),
                   .c = matrix(dw, C, LLMC_DTYPE_F32), .accumulate = accumulate, .sink = update};
    return gemm(&weight, ws, err);
}
