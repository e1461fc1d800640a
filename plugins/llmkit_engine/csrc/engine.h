// Defines: the structures that Python fills in (see library.py, which mirrors them) and what the sources share.
//
// A step runs one ragged batch: M tokens of S sequences, each sequence a run of consecutive positions whose earlier keys and
// values lie in the paged cache. Every sum is taken in an order that only the position in its own row or sequence
// determines, so a token's result has the same bits whatever else is in the batch, however the prompt is cut into
// chunks, and with any number of threads.
#ifndef LK_ENGINE_H
#define LK_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "gemm_kernel.h" // vf and its operations, NR, NRV, dpbf16

#define KV_BLOCK 16 // tokens in a block of the cache; a whole number of vectors on every machine
_Static_assert(KV_BLOCK % VL == 0, "a block of keys is a whole number of vectors");

// Rows of a tile. The kernels hold TILE * NRV sums, NRV weights being widened and one broadcast value in registers.
#if VL == 16
#define TILE 12
#elif VL == 8
#define TILE 5
#elif defined(__aarch64__)
#define TILE 10
#else
#define TILE 4
#endif

enum { LK_F32 = 0, LK_BF16 = 1, LK_INT8 = 2, LK_F16 = 3, LK_PAIRS = 4, LK_BYTES = 5 }; // the last two: see pack.c
enum { LK_NORM_LAYER = 0, LK_NORM_RMS = 1 };
enum { LK_ACT_SILU = 0, LK_ACT_GELU_TANH = 1, LK_ACT_GELU = 2, LK_ACT_RELU = 3, LK_ACT_RELU2 = 4 };

// Packed weights (n outputs, k inputs): panels of NR outputs, see pack.c. `scale` (n) for int8 only; `bias` (n) or NULL.
typedef struct {
    int64_t n, k;
    int64_t kind;
    const void *data;
    const float *scale, *bias;
} Packed;

typedef struct {
    const float *norm1_w, *norm1_b, *norm2_w, *norm2_b; // (C); the biases may be NULL
    Packed qkv, out, up, down;                          // up: gate and up stacked where the block is gated
    float stream, embedded, skip, value;                // where the model mixes: see mix.c
} Layer;

typedef struct {
    int64_t layers, width, heads, kv_heads, head_dim, ffn, vocab, rotary_dim; // rotary_dim 0: no rotation
    int64_t norm, activation, gated, embedding_dtype, qk_norm, mixes, window; // window 0: attention reaches all tokens
    float eps, attention_scale, softcap; // softcap 0: none
    const Layer *layer;
    const float *final_w, *final_b;
    Packed head;
    const void *embedding;  // (V, C), where it lies in the file
    const void *positions;  // (T, C) in the same type, or NULL
} Model;

typedef struct {
    int64_t tokens, sequences, rows; // M, S, R
    const int32_t *ids, *pos, *slot; // (M): token, position, where in the cache it goes: block * KV_BLOCK + offset
    const int32_t *start;            // (S + 1): the tokens of sequence s are [start[s], start[s + 1])
    const int32_t *table;            // (S, table_stride): the blocks of each sequence in order
    int64_t table_stride;
    const int32_t *row;              // (R): the tokens whose logits are wanted
    float *logits;                   // (R, V)
    const float *cos, *sin;          // (positions, rotary_dim / 2)
    float *cache;                    // (layers, blocks, kv_heads, keys (hd, KV_BLOCK) then values (KV_BLOCK, hd padded))
    int64_t blocks;
} Step;

// Shared by the threads of a step.
typedef struct {
    const Model *model;
    const Step *step;
    int wanted, threads; // of the team: asked for, and in this step
    int64_t max_tokens, max_rows, max_context;
    float *x, *qkv, *att, *wide;     // (M, C), (M, (H + 2 KV) hd), (M, H hd), (M, F or 2F)
    float *x0, *v0, *skips;          // where the model mixes: (M, C), (M, KV hd), (layers / 2, M, C)
    float *packed;                   // the input of a product, see prologue.c
    float *scratch;                  // per thread
    size_t scratch_floats;
    _Atomic int64_t waiting, phase;  // the barrier
    _Atomic int64_t next[2];         // work counters of the current phase and the one after it
} Run;

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t head_pad(int64_t head_dim) { return ceil_div(head_dim, KV_BLOCK) * KV_BLOCK; }
// Floats of keys and values of one head in one block.
static inline int64_t kv_floats(int64_t head_dim) { return head_dim * KV_BLOCK + KV_BLOCK * head_pad(head_dim); }
static inline float *kv_at(const Run *r, int64_t layer, int64_t block, int64_t head) {
    int64_t each = kv_floats(r->model->head_dim);
    return r->step->cache + ((layer * r->step->blocks + block) * r->model->kv_heads + head) * each;
}
// Products of bytes: one instruction adds 4 products of bytes without a sign (u) and with one (s) to each 32-bit sum.
#if defined(__AVX512VNNI__) && VL == 16
#define LK_DPBUSD 1
INLINE vi dpbusd(vi sum, vi u, vi s) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s); }
#elif defined(__AVXVNNI__) && VL == 8
#define LK_DPBUSD 1
INLINE vi dpbusd(vi sum, vi u, vi s) { return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)u, (__m256i)s); }
#elif defined(LK_EMULATE_DPBUSD) // the same arithmetic in plain code, so that the tests can run this path anywhere
#define LK_DPBUSD 1
INLINE vi dpbusd(vi sum, vi u, vi s) {
    for (int at = 0; at < 32; at += 8) sum += (u >> at & 255) * (s << (24 - at) >> 24);
    return sum;
}
#else
#define LK_DPBUSD 0
INLINE vi dpbusd(vi sum, vi u, vi s) { return sum + u * s; } // never called: see lk_kinds
#endif

#define GROUP 32 // inputs of a row that share a scale, where products are of bytes
// A product's inputs are padded with zeros to a whole number of pairs or groups.
static inline int64_t pad_k(int64_t k, int64_t kind) { return kind == LK_BYTES ? ceil_div(k, GROUP) * GROUP : ceil_div(k, 2) * 2; }
static inline int64_t panel_bytes(int64_t k, int64_t kind) {
    int64_t each = kind == LK_F32 ? 4 : kind == LK_BF16 || kind == LK_PAIRS ? 2 : 1;
    return pad_k(k, kind) * NR * each;
}
// 32-bit units of one row of a product's input, see prologue.c
static inline int64_t input_units(int64_t k, int64_t kind) {
    int64_t padded = pad_k(k, kind);
    return kind == LK_BYTES ? padded / 4 + padded / GROUP * 2 : kind == LK_PAIRS ? padded / 2 : padded;
}

// A product's input: M rows, cut into blocks of at most TILE of about the same size.
static inline int64_t tile_blocks(int64_t rows) { return ceil_div(rows, TILE); }
static inline int64_t tile_first(int64_t rows, int64_t block) { return rows * block / tile_blocks(rows); }

enum { IN_COPY = 0, IN_NORM = 1, IN_ACTIVATION = 2 };
typedef struct {
    int64_t kind; // of the weights
    int op;
    const float *source;
    int64_t ld, k;
    const int32_t *index; // which rows, NULL for all in order
    const float *weight, *bias;
} Input;

void lk_prologue(Run *r, const Input *in, int64_t rows, int thread);
void lk_product(Run *r, const Packed *w, int64_t rows, float *out, int64_t ld, int accumulate, int thread, int counter);
void lk_keep_embedding(Run *r, int64_t token);
void lk_mix(Run *r, int64_t layer);
void lk_softcap(Run *r);
void lk_rms(float *x, int64_t n, float eps);
void lk_rotate(Run *r, int64_t layer, int thread);
void lk_attention(Run *r, int64_t layer, int thread, int counter);
int64_t lk_attention_floats(const Model *m, int64_t context);

#endif
