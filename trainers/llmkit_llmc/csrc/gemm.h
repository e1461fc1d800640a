// Defines: Matrix, Gemm, Workspace, gemm: C (M, N) = A (M, K) B (K, N) for matrices of any stride.
#ifndef LLMC_GEMM_H
#define LLMC_GEMM_H

#include <stddef.h>
#include <stdint.h>

#include "error.h"

enum { LLMC_DTYPE_F32 = 0, LLMC_DTYPE_BF16 = 1 };

// Element (i, j) is data[i * row_stride + j * col_stride]; one of the strides is 1.
typedef struct {
    void *data;
    int64_t row_stride, col_stride;
    int dtype;
} Matrix;

// Row-major (rows, cols) with `ld` values from one row to the next, and the same memory read as its transpose.
static inline Matrix matrix(const void *data, int64_t ld, int dtype) { return (Matrix){(void *)data, ld, 1, dtype}; }
static inline Matrix matrix_t(const void *data, int64_t ld, int dtype) { return (Matrix){(void *)data, 1, ld, dtype}; }

// Scratch memory of one model: it grows to the largest product and is then reused.
typedef struct llmc_workspace {
    int threads;
    float *packed; // B, packed into panels
    size_t packed_bytes;
    float *scratch; // per thread
    size_t scratch_bytes;
} Workspace;

// Takes the tiles of a product that is not stored, each on the thread that finished it, while the tile is in its cache.
// MR rows of C belong to one thread, and their tiles come from left to right.
typedef struct tile_sink {
    // tile holds C[m0 .. m0 + mr, n0 .. n0 + nr), `ld` values from one row to the next.
    void (*take)(const struct tile_sink *self, const float *tile, int64_t ld, int64_t m0, int64_t n0, int64_t mr, int64_t nr);
    // The tile will be taken soon: asks the memory for what take() will need.
    void (*prefetch)(const struct tile_sink *self, int64_t m0, int64_t n0, int64_t mr, int64_t nr);
} TileSink;

typedef struct {
    int64_t m, n, k;
    Matrix a;          // (m, k)
    Matrix b;          // (k, n)
    Matrix c;          // (m, n), the result
    const void *bias;  // (m) of c's type, added to every column, or NULL
    const void *residual; // (m, n) in c's type and layout, added, or NULL; may be c itself
    int accumulate;    // c += instead of c =
    const TileSink *sink; // takes the result instead of c, or NULL
} Gemm;

// Fast where m is the side of the weights and n or k the side of the tokens: A is packed in slivers just before use.
int gemm(const Gemm *g, Workspace *ws, llmc_error *err);
void gemm_blas(const Gemm *g); // the same by a BLAS, for float; only in builds with LLMC_BLAS
// Whether products of bf16 matrices run on the machine's own bf16 instructions.
int gemm_uses_pairs(void);

// Makes scratch memory at least this large; the contents are not kept.
int workspace_reserve(Workspace *ws, size_t packed_bytes, size_t scratch_bytes, llmc_error *err);
void workspace_free(Workspace *ws);
void *llmc_alloc(size_t bytes); // 64-byte aligned, zeroed; NULL when there is no memory
void llmc_release(void *p);

#endif
