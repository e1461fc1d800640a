// Defines: llmc_model_generate, llmc_model_logits.
#include <math.h>
#include <stdlib.h>

#include "model.h"

static int decode(llmc_model *m, const int *tokens, int64_t from, int64_t n, float *cache, float *logits, llmc_error *err) {
    return (m->options.dtype == LLMC_DTYPE_BF16 ? model_decode_bf16 : model_decode_f32)(m, tokens, from, n, cache, logits, err);
}

static float *new_cache(const llmc_model *m) { // (L, max_t, 2C)
    return llmc_alloc((size_t)m->config.layers * (size_t)m->config.max_t * 2 * (size_t)m->config.channels * sizeof(float));
}

static int check(const llmc_model *m, const int32_t *tokens, int64_t count, int64_t total, llmc_error *err) {
    if (count < 1 || total > m->config.max_t || count > total)
        LLMC_FAIL(err, "ask for fewer tokens", "cannot continue %lld tokens to %lld in %d positions", (long long)count, (long long)total, m->config.max_t);
    for (int64_t i = 0; i < count; i++)
        if (tokens[i] < 0 || tokens[i] >= m->config.vocab)
            LLMC_FAIL(err, "use the tokenizer of this model", "token %d is outside the vocabulary of %d", tokens[i], m->config.vocab);
    return 0;
}

int llmc_model_logits(llmc_model *m, const int32_t *tokens, int64_t count, float *logits, llmc_error *err) {
    LLMC_TRY(check(m, tokens, count, count, err));
    float *cache = new_cache(m);
    if (!cache) LLMC_FAIL(err, "", "no memory for the key-value cache");
    int failed = decode(m, tokens, 0, count, cache, logits, err);
    llmc_release(cache);
    return failed;
}

static double uniform(uint64_t *rng) { // xorshift64*, 53 bits
    *rng ^= *rng >> 12;
    *rng ^= *rng << 25;
    *rng ^= *rng >> 27;
    return (double)((*rng * 0x2545f4914f6cdd1dull) >> 11) * (1.0 / 9007199254740992.0);
}

static int descending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

// One draw from softmax(logits / temperature) over the top_k highest logits. sorted (V) is scratch.
static int32_t draw(const float *logits, float *sorted, int32_t V, float temperature, int top_k, uint64_t *rng) {
    int32_t best = 0;
    for (int32_t i = 1; i < V; i++)
        if (logits[i] > logits[best]) best = i;
    if (temperature <= 0) return best;
    float least = -INFINITY;
    if (top_k > 0 && top_k < V) {
        for (int32_t i = 0; i < V; i++) sorted[i] = logits[i];
        qsort(sorted, (size_t)V, sizeof *sorted, descending);
        least = sorted[top_k - 1];
    }
    double total = 0;
    for (int32_t i = 0; i < V; i++)
        if (logits[i] >= least) total += exp((double)(logits[i] - logits[best]) / temperature);
    double coin = uniform(rng) * total, sum = 0;
    for (int32_t i = 0; i < V; i++) {
        if (logits[i] < least) continue;
        sum += exp((double)(logits[i] - logits[best]) / temperature);
        if (coin < sum) return i;
    }
    return best;
}

int llmc_model_generate(llmc_model *m, int32_t *tokens, int64_t count, int64_t total, float temperature, int top_k, uint64_t *rng, llmc_error *err) {
    LLMC_TRY(check(m, tokens, count, total, err));
    float *cache = new_cache(m), *logits = llmc_alloc(2 * (size_t)m->config.vocab * sizeof(float));
    int failed = cache && logits ? 0 : llmc_set_error(err, __FILE__, __LINE__, "", "no memory for the key-value cache");
    if (*rng == 0) *rng = 1; // 0 is the one state that xorshift never leaves
    for (int64_t from = 0; !failed && count < total; from = count - 1) {
        failed = decode(m, tokens + from, from, count - from, cache, logits, err);
        if (!failed) tokens[count++] = draw(logits, logits + m->config.vocab, m->config.vocab, temperature, top_k, rng);
    }
    llmc_release(cache);
    llmc_release(logits);
    return failed;
}
