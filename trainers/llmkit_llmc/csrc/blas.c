// Defines: gemm_blas: float products through a BLAS, where the build was asked for one (LLMC_BLAS).
#include "gemm.h"

#ifdef LLMC_BLAS
#include <string.h>

enum { ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112 }; // CBLAS's numbers; its header's name differs between libraries
void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda, const float *b, int ldb, float beta,
                 float *c, int ldc);

static int stride(const Matrix *x) { return (int)(x->col_stride == 1 ? x->row_stride : x->col_stride); }

void gemm_blas(const Gemm *g) {
    int swapped = g->c.col_stride != 1; // C^T = B^T A^T, then C is row-major
    const Matrix *a = swapped ? &g->b : &g->a, *b = swapped ? &g->a : &g->b;
    int m = (int)(swapped ? g->n : g->m), n = (int)(swapped ? g->m : g->n), ldc = stride(&g->c);
    int trans_a = (a->col_stride == 1) != swapped ? PLAIN : TRANSPOSED, trans_b = (b->col_stride == 1) != swapped ? PLAIN : TRANSPOSED;
    float *c = g->c.data;
    const float *bias = g->bias, *residual = g->residual;
    if (residual && residual != c)
        for (int64_t i = 0; i < m; i++) memcpy(c + i * ldc, residual + i * ldc, (size_t)n * sizeof *c);
    cblas_sgemm(ROW_MAJOR, trans_a, trans_b, m, n, (int)g->k, 1.0f, a->data, stride(a), b->data, stride(b), g->accumulate || residual ? 1.0f : 0.0f, c, ldc);
    if (bias) // only with C transposed: along its rows in memory
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++) c[i * ldc + j] += bias[j];
}
#endif
