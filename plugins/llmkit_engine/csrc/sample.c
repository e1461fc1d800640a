// Defines: lk_statistics, lk_sample, lk_threads: from rows of logits to log-probabilities and tokens.
//
// lk_sample keeps to llmkit.engine.Sampling: temperature, top_k, top_p, min_p, in this order; at a tie low ids stay. The token is
// found by inverting the cumulative distribution in the order of the ids with one number in [0, 1). Instead of sorting
// a vocabulary, it narrows down the smallest weight that is kept by the bits of the floats, whose order is the order of the
// weights: 4 passes of 256 buckets, each over fewer candidates.
#include <math.h>
#include <stdlib.h>

#include "engine.h"
#include "parallel.h"

int lk_threads(void) { return parallel_default(); }

typedef struct {
    double uniform;
    float temperature, top_p, min_p;
    int32_t top_k;
} Draw;

static float highest(const float *x, int64_t n) {
    vf high = vf_set(-INFINITY);
    for (int64_t i = 0; i < n; i += VL) {
        int64_t count = n - i < VL ? n - i : VL;
        vf v = vf_load_n(x + i, count);
        if (count < VL) for (int64_t j = count; j < VL; j++) v[j] = -INFINITY;
        high = vf_max(high, v);
    }
    return vf_highest(high);
}

static int64_t first_of(const float *x, int64_t n, float value) {
    for (int64_t i = 0; i < n; i++)
        if (x[i] == value) return i;
    return 0; // NaN everywhere
}

// For each row of logits (rows, vocab): ln of the sum of exponentials, and the argmax (the lowest id at a tie).
void lk_statistics(const float *logits, int64_t rows, int64_t vocab, float *lse, int32_t *argmax, int threads) {
    LLMC_PARALLEL(threads) {
        int64_t lo, hi;
        parallel_range(rows, 1, &lo, &hi);
        for (int64_t r = lo; r < hi; r++) {
            const float *x = logits + r * vocab;
            float top = highest(x, vocab);
            argmax[r] = (int32_t)first_of(x, vocab, top);
            if (!lse) continue;
            double total = 0;
            for (int64_t i = 0; i < vocab; i += 4096) { // in float within pieces, in double over them
                vf sum = vf_set(0);
                int64_t end = i + 4096 < vocab ? i + 4096 : vocab;
                for (int64_t j = i; j < end; j += VL) {
                    int64_t count = end - j < VL ? end - j : VL;
                    vf e = vf_exp(vf_load_n(x + j, count) - top);
                    if (count < VL) for (int64_t k = count; k < VL; k++) e[k] = 0;
                    sum += e;
                }
                total += (double)vf_sum(sum);
            }
            lse[r] = (float)((double)top + log(total));
        }
    }
}

static uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }

// Zeroes all but the largest weights: the `count` largest, or the smallest set of largest ones that holds `mass`. Ties: low ids stay.
static void keep_largest(float *w, int64_t n, int64_t count, double mass) {
    uint32_t prefix = 0;
    double above_mass = 0;
    int64_t above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t counts[256] = {0};
        double masses[256] = {0};
        for (int64_t i = 0; i < n; i++) {
            uint32_t b = bits_of(w[i]);
            if (shift < 24 && b >> (shift + 8) != prefix) continue;
            counts[b >> shift & 255]++;
            masses[b >> shift & 255] += w[i];
        }
        int digit = 255;
        // The threshold lies in the first bucket, from the top, within which the count or the mass is reached.
        while (digit > 0 && above + counts[digit] < count && above_mass + masses[digit] < mass) above += counts[digit], above_mass += masses[digit], digit--;
        prefix = prefix << 8 | (uint32_t)digit;
    }
    float threshold;
    memcpy(&threshold, &prefix, 4);
    if (threshold == 0) return; // everything that has any weight stays
    int64_t tied = count - above;
    if (mass < INFINITY) {
        double need = ceil((mass - above_mass) / threshold);
        if (need < (double)tied) tied = need < 1 ? 1 : (int64_t)need;
    }
    for (int64_t i = 0; i < n; i++)
        if (w[i] < threshold || (w[i] == threshold && tied-- <= 0)) w[i] = 0;
}

static int64_t draw(float *w, const float *logits, int64_t n, const Draw *d) {
    float top = highest(logits, n);
    if (!(top > -INFINITY)) return first_of(logits, n, top); // nothing is allowed, or NaN
    double total = 0;
    for (int64_t i = 0; i < n; i += VL) {
        int64_t count = n - i < VL ? n - i : VL;
        vf l = vf_load_n(logits + i, count), z = (l - top) / d->temperature;
        vf_store_n(w + i, vf_select(z > -87.0f, vf_exp(z), vf_set(0)), count);
    }
    if (d->top_k > 0 && d->top_k < n) keep_largest(w, n, d->top_k, INFINITY);
    if (d->top_p < 1) {
        for (int64_t i = 0; i < n; i++) total += w[i];
        keep_largest(w, n, n, (double)d->top_p * total);
    }
    if (d->min_p > 0) {
        float floor = d->min_p * highest(w, n);
        for (int64_t i = 0; i < n; i++)
            if (w[i] < floor) w[i] = 0;
    }
    total = 0;
    for (int64_t i = 0; i < n; i++) total += w[i];
    double point = d->uniform * total, sum = 0;
    int64_t last = 0;
    for (int64_t i = 0; i < n; i++) {
        if (w[i] == 0) continue;
        sum += w[i], last = i;
        if (sum > point) return i;
    }
    return last; // rounding put the point at the very end
}

// A token for each row of logits (rows, vocab). Returns 0, or -1 without memory.
int lk_sample(const float *logits, int64_t rows, int64_t vocab, const Draw *draws, int32_t *tokens, int threads) {
    int failed = 0;
    LLMC_PARALLEL(threads) {
        float *w = malloc((size_t)vocab * sizeof(float));
        if (!w) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        int64_t lo, hi;
        parallel_range(rows, 1, &lo, &hi);
        for (int64_t r = lo; w && r < hi; r++) tokens[r] = (int32_t)draw(w, logits + r * vocab, vocab, &draws[r]);
        free(w);
    }
    return failed ? -1 : 0;
}
