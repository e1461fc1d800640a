// Defines: gemm_tile, gemm_tile_pairs.
#include "gemm_kernel.h"

#define LLMC_CASE(rows) case rows: tile_fixed(rows, PAIRS, steps, a, lda, b, ldb, c, ldc, accumulate); return;

#define PAIRS 0
void gemm_tile(int mr, int64_t steps, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int accumulate) {
    switch (mr) { LLMC_ROWS(LLMC_CASE) }
}
#undef PAIRS

#define PAIRS 1
void gemm_tile_pairs(int mr, int64_t steps, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int accumulate) {
#if LLMC_DPBF16
    switch (mr) { LLMC_ROWS(LLMC_CASE) }
#else
    (void)mr; (void)steps; (void)a; (void)lda; (void)b; (void)ldb; (void)c; (void)ldc; (void)accumulate;
#endif
}
