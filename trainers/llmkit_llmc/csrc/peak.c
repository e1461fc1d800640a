// Defines: llmc_machine_peak: what the processor's multiply-add units can do when nothing has to be loaded.
#define _POSIX_C_SOURCE 200809L
#include <time.h>

#include "gemm_kernel.h"
#include "llmc.h"
#include "parallel.h"

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

// As many independent chains as hide the latency of a multiply-add: 4-5 cycles, 2 a cycle.
enum { CHAINS = 12 };

static float spin(int64_t rounds, int pairs) {
    vf acc[CHAINS], x = vf_set(0.5f), y = vf_set(0.25f);
    _Pragma("GCC unroll 16") for (int i = 0; i < CHAINS; i++) acc[i] = vf_set((float)i);
#define LLMC_SPIN(op)                                                                                       \
    for (int64_t n = 0; n < rounds; n++) {                                                                  \
        __asm__ volatile("" : "+m"(rounds)); /* each round counts: no folding of rounds into each other */  \
        _Pragma("GCC unroll 16") for (int i = 0; i < CHAINS; i++) acc[i] = op;                              \
    }
    if (pairs) LLMC_SPIN(dpbf16(acc[i], x, y)) else LLMC_SPIN(acc[i] * x + y)
    vf sum = acc[0];
    _Pragma("GCC unroll 16") for (int i = 1; i < CHAINS; i++) sum += acc[i];
    return vf_sum(sum);
}

double llmc_machine_peak(int threads, int dtype, double seconds) {
    if (threads < 1) threads = parallel_default();
    int pairs = LLMC_DPBF16 && dtype == 1;
    double best = 0, began = now();
    volatile float sink = 0;
    int64_t rounds = 200000; // about a millisecond: long beside the clock, short beside a time slice
    do {
        double start = now();
        LLMC_PARALLEL(threads) {
            float value = spin(rounds, pairs);
            if (value == 0.123f) sink = value; // never: keeps the loop alive
        }
        double flops = 2.0 * VL * CHAINS * (pairs ? 2 : 1) * (double)rounds * threads, rate = flops / (now() - start);
        if (rate > best) best = rate;
    } while (now() - began < seconds);
    (void)sink;
    return best;
}
