// Defines: llmc_eval_run: multiple choice from an eval .bin.
#include <stdlib.h>
#include <string.h>

#include "io.h"
#include "loader.h"

enum { EVAL_MAGIC = 20240522, START = 65535, ENDINGS = 4 };

typedef struct {
    int label, context;                 // the right ending, and tokens of context
    int tokens[ENDINGS];                // of each ending
    const uint16_t *words[ENDINGS + 1]; // context, then endings
} Example;

// Parses the example at `at`; `left` words follow. Returns its length in words, or -1 with the error set.
static int64_t parse(const uint16_t *at, int64_t left, int64_t index, Example *e, const char *path, llmc_error *err) {
    int64_t length = left >= 6 ? at[1] / 2 : 0, used = 6;
    if (left < 6 || at[0] != START || at[1] % 2 || length > left || at[3] >= ENDINGS || at[4] != ENDINGS || at[5] < 1 || used + at[5] > length)
        LLMC_FAIL(err, "write it again with python -m llmkit_llmc.hellaswag", "%s is damaged at example %lld", path, (long long)index);
    e->label = at[3];
    e->context = at[5];
    e->words[0] = at + used;
    used += e->context;
    for (int i = 0; i < ENDINGS; i++) {
        if (used >= length || at[used] < 1 || used + 1 + at[used] > length) LLMC_FAIL(err, "write it again", "%s is damaged at example %lld", path, (long long)index);
        e->tokens[i] = at[used];
        e->words[i + 1] = at + used + 1;
        used += 1 + at[used];
    }
    return length;
}

// Mean loss of each ending of n examples: rows (n * ENDINGS, T), padded with token 0, whose losses are not looked at.
static int score(llmc_model *model, const Example *e, int n, int T, int32_t *inputs, int32_t *targets, float *losses, int32_t *correct, llmc_error *err) {
    memset(inputs, 0, (size_t)n * ENDINGS * (size_t)T * 4);
    memset(targets, 0, (size_t)n * ENDINGS * (size_t)T * 4);
    for (int i = 0; i < n * ENDINGS; i++) {
        const Example *x = &e[i / ENDINGS];
        int32_t *in = inputs + (int64_t)i * T, *out = targets + (int64_t)i * T;
        for (int t = 0; t < x->context; t++) in[t] = x->words[0][t];
        for (int t = 0; t < x->tokens[i % ENDINGS]; t++) {
            in[x->context + t] = x->words[i % ENDINGS + 1][t];
            out[x->context + t - 1] = x->words[i % ENDINGS + 1][t];
        }
    }
    double mean;
    LLMC_TRY(llmc_model_loss(model, inputs, targets, (int64_t)n * ENDINGS, T, losses, &mean, err));
    for (int i = 0; i < n; i++) {
        int best = 0;
        float lowest = 0;
        for (int c = 0; c < ENDINGS; c++) {
            const float *row = losses + ((int64_t)i * ENDINGS + c) * T + e[i].context - 1;
            float sum = 0;
            for (int t = 0; t < e[i].tokens[c]; t++) sum += row[t];
            sum /= (float)e[i].tokens[c];
            if (c == 0 || sum < lowest) lowest = sum, best = c;
        }
        *correct += best == e[i].label;
    }
    return 0;
}

static int run(const uint16_t *words, int64_t count, int32_t examples, const char *path, llmc_model *model, int rows, int T, int rank, int ranks,
               int32_t *correct, llmc_error *err) {
    int together = rows / ENDINGS > 0 ? rows / ENDINGS : 1, waiting = 0, longest = 0;
    size_t cells = (size_t)together * ENDINGS * (size_t)T;
    Example *batch = calloc((size_t)together, sizeof *batch);
    int32_t *inputs = malloc(cells * 4), *targets = malloc(cells * 4);
    float *losses = malloc(cells * 4);
    int64_t at = 0, lo = (int64_t)examples * rank / ranks, hi = (int64_t)examples * (rank + 1) / ranks;
    int failed = batch && inputs && targets && losses ? 0 : llmc_set_error(err, __FILE__, __LINE__, "", "no memory for the evaluation");
    for (int64_t i = 0; !failed && i < hi; i++) {
        Example *e = &batch[waiting];
        int64_t length = parse(words + at, count - at, i, e, path, err);
        failed = length < 0;
        at += length;
        if (failed || i < lo) continue;
        for (int c = 0; c < ENDINGS; c++) {
            int total = e->context + e->tokens[c];
            if (total > T) failed = llmc_set_error(err, __FILE__, __LINE__, "raise -t, or evaluate without it", "example %lld of %s has %d tokens, more than the sequence length of %d", (long long)i, path, total, T);
            if (total > longest) longest = total;
        }
        if (!failed && (++waiting == together || i == hi - 1)) {
            failed = score(model, batch, waiting, longest, inputs, targets, losses, correct, err);
            waiting = longest = 0;
        }
    }
    free(batch);
    free(inputs);
    free(targets);
    free(losses);
    return failed;
}

int llmc_eval_run(const char *path, llmc_model *model, int rows, int T, int rank, int ranks, int32_t *correct, int32_t *examples, llmc_error *err) {
    int64_t size;
    FILE *file = open_for_reading(path, &size, err);
    if (!file) return -1;
    int32_t h[HEADER_INTS];
    uint16_t *words = NULL;
    int failed = read_header(file, path, h, EVAL_MAGIC, "an eval file", err);
    if (!failed && (h[1] != 1 || h[2] < 1)) failed = llmc_set_error(err, __FILE__, __LINE__, "", "%s is an eval file of version %d with %d examples", path, h[1], h[2]);
    if (!failed && !(words = malloc((size_t)(size - HEADER_BYTES) + 2))) failed = llmc_set_error(err, __FILE__, __LINE__, "", "no memory for %s", path);
    if (!failed) failed = read_exactly(file, path, words, size - HEADER_BYTES, err);
    fclose(file);
    *correct = 0;
    *examples = h[2];
    if (!failed) failed = run(words, (size - HEADER_BYTES) / 2, h[2], path, model, rows, T, rank, ranks, correct, err);
    free(words);
    return failed;
}
