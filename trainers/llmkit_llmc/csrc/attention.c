// Defines: attention_forward, attention_backward.
//
// After FlashAttention (Dao et al. 2022): scores exist only as blocks of QB queries by KB keys, forward and backward, and
// the backward recomputes them from lse; with D = sum(dout * out) the softmax backward is linear in T.
// A block of scores is held transposed, (keys, queries), so that maxima and sums over keys are plain vector operations.
// One thread does one head of one sequence at a time; heads are independent.
#include "layers.h"

#include <math.h>

#include "gemm_kernel.h"
#include "parallel.h"

#define QB NR // queries in a block: the width of one micro-kernel tile
#define KB 64 // keys in a block; a multiple of NR
_Static_assert(KB % NR == 0, "a block of keys is a whole number of tiles");

// What one head works on, in float. Rows beyond T are zero. Tp = T rounded up to KB, hp = hs rounded up to NR.
typedef struct {
    int64_t T, Tp, hs, hp;
    float *q, *k, *v, *o;          // (Tp, hp)
    float *qt, *kt, *vt, *ot;      // (hs, Tp): the transposes
    float *st, *pt;                // (KB, QB): scores and probabilities, (keys, queries)
    float *s;                      // (QB, KB): a block transposed back
    float *dqt, *dkt, *dvt;        // (hs, Tp): gradients, transposed
    float *lse, *dot;              // (Tp)
    float *tile;                   // (hs, QB)
} Head;

static size_t head_floats(int64_t T, int64_t hs, int backward) {
    int64_t Tp = (T + KB - 1) / KB * KB, hp = (hs + NR - 1) / NR * NR;
    return (size_t)((backward ? 4 : 2) * Tp * hp + (backward ? 7 : 3) * hs * Tp + 3 * KB * QB + 2 * Tp + hs * QB + 64);
}

static Head head_layout(float *p, int64_t T, int64_t hs, int backward) {
    Head h = {.T = T, .Tp = (T + KB - 1) / KB * KB, .hs = hs, .hp = (hs + NR - 1) / NR * NR};
    int64_t rows = h.Tp * h.hp, columns = hs * h.Tp;
    h.v = p, p += rows;
    h.o = p, p += rows;
    if (backward) h.q = p, h.k = p + rows, p += 2 * rows;
    h.qt = p, h.kt = p + columns, h.ot = p + 2 * columns, p += 3 * columns;
    if (backward) h.vt = p, h.dqt = p + columns, h.dkt = p + 2 * columns, h.dvt = p + 3 * columns, p += 4 * columns;
    h.st = p, h.pt = p + KB * QB, h.s = p + 2 * KB * QB, p += 3 * KB * QB;
    h.lse = p, h.dot = p + h.Tp, p += 2 * h.Tp;
    h.tile = p;
    return h;
}

// dest (cols, ld_dest) <- transpose of src (rows, ld_src).
static void transpose(float *dest, int64_t ld_dest, const float *src, int64_t ld_src, int64_t rows, int64_t cols) {
    for (int64_t r = 0; r < rows; r += VL)
        for (int64_t c = 0; c < cols; c += VL) {
            int64_t nr = rows - r < VL ? rows - r : VL, nc = cols - c < VL ? cols - c : VL;
            vf block[VL];
            for (int i = 0; i < VL; i++) block[i] = i < nr ? vf_load_n(src + (r + i) * ld_src + c, nc) : vf_set(0);
            vf_transpose(block);
            for (int i = 0; i < nc; i++) vf_store_n(dest + (c + i) * ld_dest + r, block[i], nr);
        }
}

// dest (Tp, hp) <- scale * src (T rows of hs values, `stride` apart); the padding becomes 0.
static void gather(float *dest, const real *src, int64_t stride, float scale, const Head *h) {
    for (int64_t t = 0; t < h->Tp; t++)
        for (int64_t i = 0; i < h->hp; i += VL) {
            int64_t n = t >= h->T || i >= h->hs ? 0 : h->hs - i < VL ? h->hs - i : VL;
            vf_store(dest + t * h->hp + i, n ? real_load_n(src + t * stride + i, n) * scale : vf_set(0));
        }
}

// c (rows, QB or KB) [+]= a (steps, rows)^T b (steps, .): whole tiles of columns, any number of rows.
static void multiply(float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t rows, int64_t cols, int64_t steps, int accumulate) {
    for (int64_t j = 0; j < cols; j += NR)
        for (int64_t i = 0; i < rows; i += MR)
            gemm_tile((int)(rows - i < MR ? rows - i : MR), steps, a + i, lda, b + j, ldb, c + i * ldc + j, ldc, accumulate);
}

// Scores of keys [k0, k0 + KB) and queries [q0, q0 + QB): st (KB, QB), -inf where the key is later than the query.
static void scores(const Head *h, int64_t q0, int64_t k0) {
    multiply(h->st, QB, h->kt + k0, h->Tp, h->qt + q0, h->Tp, KB, QB, h->hs, 0);
    if (k0 + KB - 1 <= q0) return;
    for (int64_t j = 0; j < KB; j++)
        for (int64_t i = 0; i < QB && q0 + i < k0 + j; i++) h->st[j * QB + i] = -INFINITY;
}

static void forward_head(const Head *h, real *out, float *lse, int64_t C) {
    for (int64_t q0 = 0; q0 < h->T; q0 += QB) {
        vf top[NRV], total[NRV];
        for (int v = 0; v < NRV; v++) top[v] = vf_set(-INFINITY), total[v] = vf_set(0);
        for (int64_t k0 = 0; k0 <= q0 + QB - 1 && k0 < h->T; k0 += KB) {
            scores(h, q0, k0);
            for (int v = 0; v < NRV; v++) {
                vf high = top[v];
                for (int64_t j = 0; j < KB; j++) high = vf_max(high, vf_load(h->st + j * QB + v * VL));
                vf shrink = k0 ? vf_exp(top[v] - high) : vf_set(0), sum = vf_set(0);
                for (int64_t j = 0; j < KB; j++) {
                    vf s = vf_load(h->st + j * QB + v * VL);
                    vf p = vf_select(s > -INFINITY, vf_exp(s - high), vf_set(0));
                    sum += p;
                    vf_store(h->pt + j * QB + v * VL, p);
                }
                total[v] = total[v] * shrink + sum;
                top[v] = high;
                if (k0)
                    for (int64_t i = 0; i < h->hs; i++) vf_store(h->tile + i * QB + v * VL, vf_load(h->tile + i * QB + v * VL) * shrink);
            }
            // out^T (hs, QB) += V^T (hs, KB) P^T (KB, QB)
            multiply(h->tile, QB, h->v + k0 * h->hp, h->hp, h->pt, QB, h->hs, QB, KB, k0 > 0);
        }
        for (int v = 0; v < NRV; v++) {
            for (int64_t i = 0; i < h->hs; i++) vf_store(h->tile + i * QB + v * VL, vf_load(h->tile + i * QB + v * VL) / total[v]);
            float high[VL], sum[VL];
            vf_store(high, top[v]);
            vf_store(sum, total[v]);
            for (int64_t i = 0; i < VL && q0 + v * VL + i < h->T; i++) lse[q0 + v * VL + i] = high[i] + logf(sum[i]);
        }
        transpose(h->o, h->hp, h->tile, QB, h->hs, QB);
        for (int64_t i = 0; i < QB && q0 + i < h->T; i++)
            for (int64_t d = 0; d < h->hs; d += VL) {
                int64_t n = h->hs - d < VL ? h->hs - d : VL;
                real_store_n(out + (q0 + i) * C + d, vf_load_n(h->o + i * h->hp + d, n), n);
            }
    }
}

int FN(attention_forward)(real *out, float *lse, const real *qkv, int64_t B, int64_t T, int64_t C, int64_t NH, Workspace *ws, llmc_error *err) {
    int64_t hs = C / NH;
    size_t each = (head_floats(T, hs, 0) + 15) / 16 * 16;
    LLMC_TRY(workspace_reserve(ws, 0, each * sizeof(float) * (size_t)ws->threads, err));
    LLMC_PARALLEL(ws->threads) {
        Head h = head_layout(ws->scratch + each * (size_t)parallel_thread(), T, hs, 0);
        int64_t lo, hi;
        parallel_range(B * NH, 1, &lo, &hi);
        for (int64_t item = lo; item < hi; item++) {
            int64_t b = item / NH, head = item % NH;
            const real *x = qkv + b * T * 3 * C + head * hs; // (T, 3C), this head's columns
            gather(h.o, x, 3 * C, 1.0f / sqrtf((float)hs), &h); // the softmax scale goes into q
            transpose(h.qt, h.Tp, h.o, h.hp, h.Tp, hs);
            gather(h.o, x + C, 3 * C, 1.0f, &h);
            transpose(h.kt, h.Tp, h.o, h.hp, h.Tp, hs);
            gather(h.v, x + 2 * C, 3 * C, 1.0f, &h);
            forward_head(&h, out + b * T * C + head * hs, lse + item * T, C);
        }
    }
    return 0;
}

// st becomes P^T, and pt becomes dS^T = P^T * (dP^T - D), for one block.
static void probabilities_backward(const Head *h, int64_t q0, int64_t k0) {
    scores(h, q0, k0);
    multiply(h->pt, QB, h->vt + k0, h->Tp, h->ot + q0, h->Tp, KB, QB, h->hs, 0); // dP^T = V dO^T
    for (int v = 0; v < NRV; v++) {
        vf lse = vf_load(h->lse + q0 + v * VL), dot = vf_load(h->dot + q0 + v * VL);
        for (int64_t j = 0; j < KB; j++) {
            vf s = vf_load(h->st + j * QB + v * VL);
            vf p = vf_select(s > -INFINITY, vf_exp(s - lse), vf_set(0));
            vf_store(h->st + j * QB + v * VL, p);
            vf_store(h->pt + j * QB + v * VL, p * (vf_load(h->pt + j * QB + v * VL) - dot));
        }
    }
}

static void backward_head(const Head *h) {
    memset(h->dqt, 0, (size_t)(3 * h->hs * h->Tp) * sizeof(float));
    for (int64_t q0 = 0; q0 < h->T; q0 += QB)
        for (int64_t k0 = 0; k0 <= q0 + QB - 1 && k0 < h->T; k0 += KB) {
            probabilities_backward(h, q0, k0);
            // dQ^T (hs, QB) += K^T (hs, KB) dS^T (KB, QB)
            multiply(h->dqt + q0, h->Tp, h->k + k0 * h->hp, h->hp, h->pt, QB, h->hs, QB, KB, 1);
            // dV^T (hs, KB) += dO^T (hs, QB) P (QB, KB)
            transpose(h->s, KB, h->st, QB, KB, QB);
            multiply(h->dvt + k0, h->Tp, h->o + q0 * h->hp, h->hp, h->s, KB, h->hs, KB, QB, 1);
            // dK^T (hs, KB) += Q^T (hs, QB) dS (QB, KB)
            transpose(h->s, KB, h->pt, QB, KB, QB);
            multiply(h->dkt + k0, h->Tp, h->q + q0 * h->hp, h->hp, h->s, KB, h->hs, KB, QB, 1);
        }
}

// dest (T rows of hs values, `stride` apart) <- scale * transpose of src (hs, Tp); `rows` (Tp, hp) is scratch.
static void scatter(real *dest, int64_t stride, const float *src, float *rows, float scale, const Head *h) {
    transpose(rows, h->hp, src, h->Tp, h->hs, h->Tp);
    for (int64_t t = 0; t < h->T; t++)
        for (int64_t i = 0; i < h->hs; i += VL) {
            int64_t n = h->hs - i < VL ? h->hs - i : VL;
            real_store_n(dest + t * stride + i, vf_load_n(rows + t * h->hp + i, n) * scale, n);
        }
}

int FN(attention_backward)(real *dqkv, const real *dout, const real *qkv, const real *out, const float *lse, int64_t B, int64_t T,
                           int64_t C, int64_t NH, Workspace *ws, llmc_error *err) {
    int64_t hs = C / NH;
    float scale = 1.0f / sqrtf((float)hs);
    size_t each = (head_floats(T, hs, 1) + 15) / 16 * 16;
    LLMC_TRY(workspace_reserve(ws, 0, each * sizeof(float) * (size_t)ws->threads, err));
    LLMC_PARALLEL(ws->threads) {
        Head h = head_layout(ws->scratch + each * (size_t)parallel_thread(), T, hs, 1);
        int64_t lo, hi;
        parallel_range(B * NH, 1, &lo, &hi);
        for (int64_t item = lo; item < hi; item++) {
            int64_t b = item / NH, head = item % NH;
            const real *x = qkv + b * T * 3 * C + head * hs, *y = out + b * T * C + head * hs, *dy = dout + b * T * C + head * hs;
            real *dx = dqkv + b * T * 3 * C + head * hs;
            gather(h.o, dy, C, 1.0f, &h);
            gather(h.q, y, C, 1.0f, &h); // the output, for D; q itself comes next
            for (int64_t t = 0; t < h.Tp; t++) {
                vf sum = vf_set(0);
                for (int64_t i = 0; i < h.hp; i += VL) sum += vf_load(h.o + t * h.hp + i) * vf_load(h.q + t * h.hp + i);
                h.dot[t] = vf_sum(sum);
                h.lse[t] = t < T ? lse[item * T + t] : 0.0f;
            }
            gather(h.q, x, 3 * C, scale, &h);
            gather(h.k, x + C, 3 * C, 1.0f, &h);
            gather(h.v, x + 2 * C, 3 * C, 1.0f, &h);
            transpose(h.qt, h.Tp, h.q, h.hp, h.Tp, hs);
            transpose(h.kt, h.Tp, h.k, h.hp, h.Tp, hs);
            transpose(h.vt, h.Tp, h.v, h.hp, h.Tp, hs);
            transpose(h.ot, h.Tp, h.o, h.hp, h.Tp, hs);
            backward_head(&h);
            scatter(dx, 3 * C, h.dqt, h.o, scale, &h);
            scatter(dx + C, 3 * C, h.dkt, h.o, 1.0f, &h); // q carried the scale
            scatter(dx + 2 * C, 3 * C, h.dvt, h.o, 1.0f, &h);
        }
    }
    return 0;
}
