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

// Writes a finished tile (mr, nr) to C at (m0, n0), adding the bias, the residual and what C held, as asked.
INLINE void store_tile(const Gemm *g, const float *tile, int64_t m0, int64_t n0, int64_t mr, int64_t nr, const int is_bf16) {
    const int width = is_bf16 ? 2 : 4;
#define LOAD(p, n) (is_bf16 ? vf_load_n_bf16((const bf16 *)(p), n) : vf_load_n((const float *)(p), n))
    int transposed = g->c.col_stride != 1;
    int64_t rows = transposed ? nr : mr, cols = transposed ? mr : nr; // of C as it lies in memory
    int64_t ld = transposed ? g->c.col_stride : g->c.row_stride, first = transposed ? n0 * ld + m0 : m0 * ld + n0;
    for (int64_t r0 = 0; r0 < rows; r0 += VL)
        for (int64_t c0 = 0; c0 < cols; c0 += VL) {
            int64_t nrows = rows - r0 < VL ? rows - r0 : VL, ncols = cols - c0 < VL ? cols - c0 : VL;
            vf block[VL];
            if (transposed) {
                for (int i = 0; i < VL; i++) block[i] = i < ncols ? vf_load(tile + (c0 + i) * NR + r0) : vf_set(0);
                vf_transpose(block);
            } else {
                for (int i = 0; i < nrows; i++) block[i] = vf_load(tile + (r0 + i) * NR + c0);
            }
            vf bias = transposed && g->bias ? LOAD((const char *)g->bias + (m0 + c0) * width, ncols) : vf_set(0);
            for (int i = 0; i < nrows; i++) {
                int64_t at = (first + (r0 + i) * ld + c0) * width;
                vf v = block[i] + bias;
                if (g->residual) v += LOAD((const char *)g->residual + at, ncols);
                if (g->accumulate) v += LOAD((const char *)g->c.data + at, ncols);
                char *out = (char *)g->c.data + at;
                if (is_bf16) vf_store_n_bf16((bf16 *)out, v, ncols);
                else vf_store_n((float *)out, v, ncols);
            }
        }
#undef LOAD
}

typedef struct {
    int pairs;
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

static void run_block(const Gemm *g, const Plan *p, const Workspace *ws, int64_t block, float *sliver) {
    float *sums = sliver + MR * KC + VL; // (slivers of the block, panels, MR, NR)
    int64_t first = block * p->per_block, last = first + p->per_block < p->slivers ? first + p->per_block : p->slivers;
    int64_t width = g->a.dtype == LLMC_DTYPE_BF16 ? 2 : 4;
    for (int64_t kb = 0; kb < p->kblocks; kb++) {
        int64_t k0 = kb * p->kc, kc = p->steps - k0 < p->kc ? p->steps - k0 : p->kc;
        for (int64_t s = first; s < last; s++) {
            int64_t m = s * MR, mr = g->m - m < MR ? g->m - m : MR;
            gemm_pack(sliver, MR, mr, k0, kc, (const char *)g->a.data + m * g->a.row_stride * width, g->a.row_stride,
                      g->a.col_stride, g->k, g->a.dtype == LLMC_DTYPE_BF16, p->pairs);
            for (int64_t panel = 0; panel < p->panels; panel++) {
                float *tile = sums + ((s - first) * p->panels + panel) * MR * NR;
                (p->pairs ? gemm_tile_pairs : gemm_tile)((int)mr, kc, sliver, MR, packed_panel(p, ws, kb, panel), NR, tile, NR, kb > 0);
                if (kb < p->kblocks - 1) continue;
                int64_t n = p->n0 + panel * NR, nr = p->n0 + p->nc - n < NR ? p->n0 + p->nc - n : NR;
                if (g->c.dtype == LLMC_DTYPE_BF16) store_tile(g, tile, m, n, mr, nr, 1);
                else store_tile(g, tile, m, n, mr, nr, 0);
            }
        }
    }
}

int gemm(const Gemm *g, Workspace *ws, llmc_error *err) {
    if (g->m <= 0 || g->n <= 0) return 0;
    Plan p = {.pairs = LLMC_DPBF16 && (g->a.dtype == LLMC_DTYPE_BF16 || g->b.dtype == LLMC_DTYPE_BF16)};
    p.steps = p.pairs ? (g->k + 1) / 2 : g->k;
    p.kblocks = (p.steps + KC - 1) / KC;
    p.kc = (p.steps + p.kblocks - 1) / p.kblocks;
    p.slivers = (g->m + MR - 1) / MR;
    int64_t chunks = (g->n + NC - 1) / NC, nc = ((g->n + chunks - 1) / chunks + NR - 1) / NR * NR;
    // As many blocks for each thread, so that they end together, each of at most SLIVERS slivers.
    int64_t blocks = ws->threads * ((p.slivers + ws->threads * SLIVERS - 1) / (ws->threads * SLIVERS));
    p.per_block = (p.slivers + blocks - 1) / blocks;
    size_t own = ((size_t)MR * KC + VL + (size_t)p.per_block * (size_t)(nc / NR) * MR * NR) * sizeof(float);
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
