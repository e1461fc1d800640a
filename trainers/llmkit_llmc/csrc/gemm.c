// Defines: gemm and the memory it works in.
//
// The loops follow Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), with the roles set
// for training: A is the weight side. B (tokens) is packed once per chunk of NC columns and shared; each thread then
// takes blocks of rows of A, packs slivers of MR rows just before their use and keeps the sums of its block in
// its own cache until all of K is added. So weights are read once from memory per NC tokens and never copied whole.
#include "gemm.h"

#include <stdlib.h>

#include "gemm_pack.h"
#include "parallel.h"

#define KC 384     // steps per block: a sliver of A (MR*KC*4 = 21 KB) stays in the first-level cache
#define NC 512     // columns per chunk: KC*NC*4 = 786 KB of packed B stay in the second-level cache
#define SLIVERS 8  // slivers per block of rows: their sums (MR*NC*4*8 = 229 KB) stay there too

void *llmc_alloc(size_t bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 64, bytes ? (bytes + 63) / 64 * 64 : 64) != 0) return NULL;
    memset(p, 0, bytes);
    return p;
}
void llmc_release(void *p) { free(p); }

static int grow(float **p, size_t *have, size_t want, llmc_error *err) {
    if (*have >= want) return 0;
    free(*p);
    *p = llmc_alloc(want);
    *have = *p ? want : 0;
    if (!*p) LLMC_FAIL(err, "use a smaller batch or sequence length", "no memory for %zu bytes of scratch", want);
    return 0;
}

int workspace_reserve(Workspace *ws, size_t packed_bytes, size_t scratch_bytes, llmc_error *err) {
    LLMC_TRY(grow(&ws->packed, &ws->packed_bytes, packed_bytes, err));
    return grow(&ws->scratch, &ws->scratch_bytes, scratch_bytes, err);
}

void workspace_free(Workspace *ws) {
    free(ws->packed);
    free(ws->scratch);
    *ws = (Workspace){.threads = ws->threads};
}

int gemm_uses_pairs(void) { return LLMC_DPBF16; }

INLINE vf load_n(const char *p, int64_t n, const int is_bf16) {
    return is_bf16 ? vf_load_n_bf16((const bf16 *)p, n) : vf_load_n((const float *)p, n);
}

// Where a tile goes, in registers: the fields of a Gemm would be read again after every store.
typedef struct {
    char *out;            // the tile's first value in C
    const char *residual; // the same place in the residual, or NULL
    int64_t ld;           // bytes from one row in memory to the next
    int accumulate;
} Place;

// Writes n <= VL values of row `row`, from column `col` on, adding the residual and what C held unless `plain`.
INLINE void store_row(const Place p, vf v, int64_t row, int64_t col, int64_t n, const int is_bf16, const int plain) {
    int64_t at = row * p.ld + col * (is_bf16 ? 2 : 4);
    if (!plain && p.residual) v += load_n(p.residual + at, n, is_bf16);
    if (!plain && p.accumulate) v += load_n(p.out + at, n, is_bf16);
    if (is_bf16) vf_store_n_bf16((bf16 *)(p.out + at), v, n);
    else vf_store_n((float *)(p.out + at), v, n);
}

// A tile (mr, nr) to rows of C as they lie in memory.
INLINE void store_straight(const Place p, const float *tile, const int64_t mr, const int64_t nr, const int is_bf16, const int plain) {
    for (int64_t i = 0; i < mr; i++)
        for (int64_t c = 0; c < nr; c += VL) store_row(p, vf_load(tile + i * NR + c), i, c, nr - c < VL ? nr - c : VL, is_bf16, plain);
}

// A tile (mr, nr) to C where columns lie together; bias (mr) or NULL. With constant sizes the transposes stay in registers.
INLINE void store_transposed(const Place p, const float *tile, const char *bias, const int64_t mr, const int64_t nr, const int is_bf16, const int plain) {
    for (int64_t c = 0; c < mr; c += VL) {
        const int64_t n = mr - c < VL ? mr - c : VL;
        vf add = bias ? load_n(bias + c * (is_bf16 ? 2 : 4), n, is_bf16) : vf_set(0);
        for (int64_t r = 0; r < nr; r += VL) {
            const int64_t rows = nr - r < VL ? nr - r : VL;
            vf block[VL];
            _Pragma("GCC unroll 16") for (int i = 0; i < VL; i++) block[i] = i < n ? vf_load(tile + (c + i) * NR + r) : vf_set(0);
            vf_transpose(block);
            _Pragma("GCC unroll 16") for (int i = 0; i < VL; i++)
                if (i < rows) store_row(p, block[i] + add, r + i, c, n, is_bf16, plain);
        }
    }
}

// Writes a finished tile (mr, nr) to C at (m0, n0).
static void store_tile(const Gemm *g, const float *tile, int64_t m0, int64_t n0, int64_t mr, int64_t nr) {
    int is_bf16 = g->c.dtype == LLMC_DTYPE_BF16, plain = !g->residual && !g->accumulate, straight = g->c.row_stride != 1;
    int64_t width = is_bf16 ? 2 : 4, at = (m0 * g->c.row_stride + n0 * g->c.col_stride) * width;
    Place p = {.out = (char *)g->c.data + at, .residual = g->residual ? (const char *)g->residual + at : NULL, .accumulate = g->accumulate,
               .ld = (straight ? g->c.row_stride : g->c.col_stride) * width};
    const char *bias = g->bias ? (const char *)g->bias + m0 * width : NULL;
    if (straight) {
        if (is_bf16) store_straight(p, tile, mr, nr, 1, plain);
        else if (nr == NR && plain) store_straight(p, tile, mr, NR, 0, 1);
        else store_straight(p, tile, mr, nr, 0, plain);
    } else if (mr == MR && nr == NR && plain) {
        if (is_bf16) store_transposed(p, tile, bias, MR, NR, 1, 1);
        else store_transposed(p, tile, bias, MR, NR, 0, 1);
    } else {
        if (is_bf16) store_transposed(p, tile, bias, mr, nr, 1, plain);
        else store_transposed(p, tile, bias, mr, nr, 0, plain);
    }
}

typedef struct {
    int pairs, direct;          // bf16 pairs; whole tiles go straight from registers to C
    int64_t steps, kc, kblocks; // K in steps, cut into equal blocks of at most KC
    int64_t n0, nc, panels;     // this chunk of columns
    int64_t slivers, per_block; // rows in slivers of MR, and slivers in one block of work
} Plan;

static float *packed_panel(const Plan *p, const Workspace *ws, int64_t kb, int64_t panel) {
    int64_t kc = p->steps - kb * p->kc < p->kc ? p->steps - kb * p->kc : p->kc;
    return ws->packed + kb * p->kc * p->panels * NR + panel * kc * NR;
}

static void pack_b(const Gemm *g, const Plan *p, const Workspace *ws) {
    int64_t lo, hi;
    parallel_range(p->kblocks * p->panels, 1, &lo, &hi);
    for (int64_t item = lo; item < hi; item++) {
        int64_t kb = item / p->panels, panel = item % p->panels, k0 = kb * p->kc, n = p->n0 + panel * NR;
        int64_t kc = p->steps - k0 < p->kc ? p->steps - k0 : p->kc, width = g->b.dtype == LLMC_DTYPE_BF16 ? 2 : 4;
        int64_t count = p->n0 + p->nc - n < NR ? p->n0 + p->nc - n : NR;
        gemm_pack(packed_panel(p, ws, kb, panel), NR, count, k0, kc, (const char *)g->b.data + n * g->b.col_stride * width,
                  g->b.col_stride, g->b.row_stride, g->k, g->b.dtype == LLMC_DTYPE_BF16, p->pairs);
    }
}

// Packs the slivers [first, last) for block kb of K. Where lanes are contiguous, a few k at a time for all slivers: each k
// lies on another page, and a page is then visited once instead of once a sliver.
static void pack_block(const Gemm *g, const Plan *p, int64_t kb, int64_t first, int64_t last, float *slivers) {
    int64_t k0 = kb * p->kc, kc = p->steps - k0 < p->kc ? p->steps - k0 : p->kc, width = g->a.dtype == LLMC_DTYPE_BF16 ? 2 : 4;
    int64_t chunk = g->a.col_stride == 1 ? kc : 16;
    for (int64_t k = 0; k < kc; k += chunk)
        for (int64_t s = first; s < last; s++) {
            int64_t m = s * MR, mr = g->m - m < MR ? g->m - m : MR;
            gemm_pack(slivers + ((s - first) * KC + k) * MP, MP, mr, k0 + k, kc - k < chunk ? kc - k : chunk,
                      (const char *)g->a.data + m * g->a.row_stride * width, g->a.row_stride, g->a.col_stride, g->k, g->a.dtype == LLMC_DTYPE_BF16, p->pairs);
        }
}

// Asks for part `part` of `parts` of the source of a block, so that packing it later does not wait for memory.
static void prefetch_block(const Gemm *g, const Plan *p, int64_t kb, int64_t first, int64_t last, int64_t part, int64_t parts) {
    int64_t m0 = first * MR, m1 = last * MR < g->m ? last * MR : g->m, width = g->a.dtype == LLMC_DTYPE_BF16 ? 2 : 4;
    int64_t unit = p->pairs ? 2 : 1, k0 = kb * p->kc * unit, k1 = (kb + 1) * p->kc * unit < g->k ? (kb + 1) * p->kc * unit : g->k;
    int64_t rows = g->a.col_stride == 1 ? m1 - m0 : k1 - k0, stride = (g->a.col_stride == 1 ? g->a.row_stride : g->a.col_stride) * width;
    int64_t bytes = (g->a.col_stride == 1 ? k1 - k0 : m1 - m0) * width;
    const char *base = (const char *)g->a.data + (m0 * g->a.row_stride + k0 * g->a.col_stride) * width;
    for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; r++)
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(base + r * stride + i, 0, 2);
}

// Asks for the lines of C that a tile will be written to, for writing.
static void prefetch_tile(const Gemm *g, int64_t m0, int64_t n0, int64_t mr, int64_t nr) {
    int transposed = g->c.col_stride != 1;
    int64_t rows = transposed ? nr : mr, width = g->c.dtype == LLMC_DTYPE_BF16 ? 2 : 4, bytes = (transposed ? mr : nr) * width;
    int64_t stride = (transposed ? g->c.col_stride : g->c.row_stride) * width;
    const char *base = (const char *)g->c.data + (m0 * g->c.row_stride + n0 * g->c.col_stride) * width;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(base + r * stride + i, 1);
}

static void run_block(const Gemm *g, const Plan *p, const Workspace *ws, int64_t block, float *slivers) {
    int64_t first = block * p->per_block, last = first + p->per_block < p->slivers ? first + p->per_block : p->slivers;
    float *sums = slivers + p->per_block * MP * KC; // (slivers of the block, panels, MR, NR)
    void (*multiply)(int, int64_t, const float *, int64_t, const float *, int64_t, float *, int64_t, int) = p->pairs ? gemm_tile_pairs : gemm_tile;
    for (int64_t kb = 0; kb < p->kblocks; kb++) {
        int64_t kc = p->steps - kb * p->kc < p->kc ? p->steps - kb * p->kc : p->kc;
        int final = kb == p->kblocks - 1;
        pack_block(g, p, kb, first, last, slivers);
        for (int64_t s = first; s < last; s++) {
            int64_t m = s * MR, mr = g->m - m < MR ? g->m - m : MR;
            const float *sliver = slivers + (s - first) * MP * KC;
            for (int64_t panel = 0; panel < p->panels; panel++) {
                int64_t index = (s - first) * p->panels + panel;
                float *tile = sums + index * MR * NR;
                int64_t n = p->n0 + panel * NR, nr = p->n0 + p->nc - n < NR ? p->n0 + p->nc - n : NR;
                const float *packed = packed_panel(p, ws, kb, panel);
                if (final && g->sink) g->sink->prefetch(g->sink, m, n, mr, nr);
                else if (final) prefetch_tile(g, m, n, mr, nr);
                else prefetch_block(g, p, kb + 1, first, last, index, (last - first) * p->panels);
                if (p->direct && nr == NR) {
                    multiply((int)mr, kc, sliver, MP, packed, NR, (float *)g->c.data + m * g->c.row_stride + n, g->c.row_stride, g->accumulate);
                } else {
                    multiply((int)mr, kc, sliver, MP, packed, NR, tile, NR, kb > 0);
                    if (final && g->sink) g->sink->take(g->sink, tile, NR, m, n, mr, nr);
                    else if (final) store_tile(g, tile, m, n, mr, nr);
                }
            }
        }
    }
}

int gemm(const Gemm *g, Workspace *ws, llmc_error *err) {
    if (g->m <= 0 || g->n <= 0) return 0;
#ifdef LLMC_BLAS
    if (g->a.dtype == LLMC_DTYPE_F32 && g->b.dtype == LLMC_DTYPE_F32 && g->c.dtype == LLMC_DTYPE_F32 && !g->sink) {
        gemm_blas(g);
        return 0;
    }
#endif
    Plan p = {.pairs = LLMC_DPBF16 && (g->a.dtype == LLMC_DTYPE_BF16 || g->b.dtype == LLMC_DTYPE_BF16)};
    p.steps = p.pairs ? (g->k + 1) / 2 : g->k;
    p.kblocks = (p.steps + KC - 1) / KC;
    p.kc = (p.steps + p.kblocks - 1) / p.kblocks;
    p.direct = !g->sink && p.kblocks == 1 && g->c.dtype == LLMC_DTYPE_F32 && g->c.col_stride == 1 && g->c.row_stride != 1 && !g->residual;
    p.slivers = (g->m + MR - 1) / MR;
    int64_t chunks = (g->n + NC - 1) / NC, nc = ((g->n + chunks - 1) / chunks + NR - 1) / NR * NR;
    // As many blocks for each thread, so that they end together, each of at most SLIVERS slivers.
    int64_t blocks = ws->threads * ((p.slivers + ws->threads * SLIVERS - 1) / (ws->threads * SLIVERS));
    p.per_block = (p.slivers + blocks - 1) / blocks;
    size_t own = (size_t)p.per_block * ((size_t)MP * KC + (size_t)MR * (size_t)nc) * sizeof(float); // slivers, and their sums
    own = (own + 63) / 64 * 64;
    LLMC_TRY(workspace_reserve(ws, (size_t)p.steps * (size_t)nc * sizeof(float), own * (size_t)ws->threads, err));
    for (p.n0 = 0; p.n0 < g->n; p.n0 += nc) {
        p.nc = g->n - p.n0 < nc ? g->n - p.n0 : nc;
        p.panels = (p.nc + NR - 1) / NR;
        int64_t next = 0;
        LLMC_PARALLEL(ws->threads) {
            pack_b(g, &p, ws);
            parallel_barrier();
            float *mine = ws->scratch + (size_t)parallel_thread() * own / sizeof(float);
            for (int64_t block; (block = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) * p.per_block < p.slivers;)
                run_block(g, &p, ws, block, mine);
        }
    }
    return 0;
}
