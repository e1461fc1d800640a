// Defines: lk_open, lk_close, lk_forward: a whole step of the model in one parallel region.
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "engine.h"
#include "parallel.h"

#define SPINS 4000 // some microseconds; then the core goes to whoever wants it, maybe to the thread that is waited for

void *lk_zeroed(size_t bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 64, bytes ? (bytes + 63) / 64 * 64 : 64) != 0) return NULL;
    memset(p, 0, bytes);
    return p;
}

void lk_close(Run *r) {
    if (!r) return;
    free(r->x), free(r->x0), free(r->v0), free(r->skips), free(r->qkv), free(r->att), free(r->wide), free(r->packed), free(r->scratch), free(r);
}

// Scratch memory for steps of at most these sizes; NULL where there is no memory.
Run *lk_open(const Model *m, int64_t max_tokens, int64_t max_rows, int64_t max_context, int threads) {
    Run *r = lk_zeroed(sizeof *r);
    if (!r) return NULL;
    int64_t wide = m->ffn * (m->gated ? 2 : 1), deep = m->ffn > m->heads * m->head_dim ? m->ffn : m->heads * m->head_dim;
    deep = pad_k(deep > m->width ? deep : m->width, LK_BYTES); // no kind needs more
    r->model = m, r->wanted = threads;
    r->max_tokens = max_tokens, r->max_rows = max_rows, r->max_context = max_context;
    r->scratch_floats = (size_t)ceil_div(lk_attention_floats(m, max_context), 16) * 16;
    size_t f = sizeof(float), tokens = (size_t)max_tokens;
    r->x = lk_zeroed(tokens * (size_t)m->width * f);
    r->qkv = lk_zeroed(tokens * (size_t)((m->heads + 2 * m->kv_heads) * m->head_dim) * f);
    r->att = lk_zeroed(tokens * (size_t)(m->heads * m->head_dim) * f);
    r->wide = lk_zeroed(tokens * (size_t)wide * f);
    if (m->mixes) {
        r->x0 = lk_zeroed(tokens * (size_t)m->width * f);
        r->v0 = lk_zeroed(tokens * (size_t)(m->kv_heads * m->head_dim) * f);
        r->skips = lk_zeroed((size_t)(m->layers / 2) * tokens * (size_t)m->width * f);
    }
    r->packed = lk_zeroed((tokens > (size_t)max_rows ? tokens : (size_t)max_rows) * (size_t)deep * f);
    r->scratch = lk_zeroed(r->scratch_floats * (size_t)threads * f);
    if (m->mixes && !(r->x0 && r->v0 && r->skips)) return lk_close(r), NULL;
    if (r->x && r->qkv && r->att && r->wide && r->packed && r->scratch) return r;
    lk_close(r);
    return NULL;
}

static void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// All threads meet here. The last one clears the counter that the phase after the next one will use.
static void meet(Run *r, int counter) {
    int64_t phase = atomic_load_explicit(&r->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&r->waiting, 1, memory_order_acq_rel) == r->threads - 1) {
        atomic_store_explicit(&r->waiting, 0, memory_order_relaxed);
        atomic_store_explicit(&r->next[counter], 0, memory_order_relaxed);
        atomic_store_explicit(&r->phase, phase + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&r->phase, memory_order_acquire) == phase; spins++) {
        if (spins < SPINS) pause_cpu();
        else sched_yield();
    }
}

INLINE vf load_as(const void *p, int64_t i, int64_t n, int64_t dtype) {
    if (dtype == LK_BF16) return vf_load_n_bf16((const bf16 *)p + i, n);
    return vf_load_n((const float *)p + i, n);
}

static void embed(Run *r) {
    const Model *m = r->model;
    const Step *st = r->step;
    int64_t lo, hi, C = m->width;
    parallel_range(st->tokens, 1, &lo, &hi);
    for (int64_t t = lo; t < hi; t++) {
        for (int64_t c = 0; c < C; c += VL) {
            int64_t n = C - c < VL ? C - c : VL;
            vf v = load_as(m->embedding, st->ids[t] * C + c, n, m->embedding_dtype);
            if (m->positions) v += load_as(m->positions, st->pos[t] * C + c, n, m->embedding_dtype);
            vf_store_n(r->x + t * C + c, v, n);
        }
        if (m->mixes) lk_keep_embedding(r, t);
    }
}

static void forward(Run *r) {
    const Model *m = r->model;
    const Step *st = r->step;
    int thread = parallel_thread(), c = 0;
    int64_t M = st->tokens, C = m->width, attended = m->heads * m->head_dim, qkv = attended + 2 * m->kv_heads * m->head_dim;
    int64_t wide = m->ffn * (m->gated ? 2 : 1);
#define MEET (meet(r, c), c ^= 1)
#define INPUT(...) lk_prologue(r, &(Input){__VA_ARGS__}, M, thread), MEET
    embed(r);
    MEET;
    for (int64_t l = 0; l < m->layers; l++) {
        const Layer *layer = &m->layer[l];
        if (m->mixes) lk_mix(r, l), MEET;
        INPUT(layer->qkv.kind, IN_NORM, r->x, C, C, NULL, layer->norm1_w, layer->norm1_b);
        lk_product(r, &layer->qkv, M, r->qkv, qkv, 0, thread, c), MEET;
        lk_rotate(r, l, thread), MEET;
        lk_attention(r, l, thread, c), MEET;
        INPUT(layer->out.kind, IN_COPY, r->att, attended, attended, NULL, NULL, NULL);
        lk_product(r, &layer->out, M, r->x, C, 1, thread, c), MEET;
        INPUT(layer->up.kind, IN_NORM, r->x, C, C, NULL, layer->norm2_w, layer->norm2_b);
        lk_product(r, &layer->up, M, r->wide, wide, 0, thread, c), MEET;
        INPUT(layer->down.kind, IN_ACTIVATION, r->wide, wide, m->ffn, NULL, NULL, NULL);
        lk_product(r, &layer->down, M, r->x, C, 1, thread, c), MEET;
    }
    if (st->rows) {
        lk_prologue(r, &(Input){m->head.kind, IN_NORM, r->x, C, C, st->row, m->final_w, m->final_b}, st->rows, thread), MEET;
        lk_product(r, &m->head, st->rows, st->logits, m->vocab, 0, thread, c);
        if (m->softcap > 0) MEET, lk_softcap(r);
    }
}

// Runs a step. Returns 0, or -1 where it is larger than lk_open was told.
int lk_forward(Run *r, const Step *step) {
    if (step->tokens > r->max_tokens || step->rows > r->max_rows) return -1;
    r->step = step;
    atomic_store(&r->waiting, 0);
    atomic_store(&r->next[0], 0);
    atomic_store(&r->next[1], 0);
    LLMC_PARALLEL(r->wanted) {
        if (parallel_thread() == 0) r->threads = parallel_threads(); // the system may grant fewer than are wanted
        parallel_barrier();
        forward(r);
    }
    return 0;
}

// Copies the keys and values of a block, for a sequence that goes on from the middle of it.
void lk_copy_block(float *cache, int64_t layers, int64_t blocks, int64_t block_floats, int64_t from, int64_t to) {
    for (int64_t l = 0; l < layers; l++)
        memcpy(cache + (l * blocks + to) * block_floats, cache + (l * blocks + from) * block_floats, (size_t)block_floats * 4);
}
