// Defines: LLMC_PARALLEL, parallel_thread, parallel_threads, parallel_barrier, parallel_range.
// OpenMP where the compiler has it, one thread otherwise. Work is always divided by *outputs*: no sum is ever split
// between threads, so that the result has the same bits whatever the number of threads.
#ifndef LLMC_PARALLEL_H
#define LLMC_PARALLEL_H

#include <stdint.h>

#ifdef _OPENMP
#include <omp.h>
#define LLMC_PRAGMA(x) _Pragma(#x)
#define LLMC_PARALLEL(threads) LLMC_PRAGMA(omp parallel num_threads(threads))
static inline int parallel_thread(void) { return omp_get_thread_num(); }
static inline int parallel_threads(void) { return omp_get_num_threads(); }
static inline int parallel_default(void) { return omp_get_max_threads(); }
#define parallel_barrier() LLMC_PRAGMA(omp barrier)
#else
#define LLMC_PARALLEL(threads) (void)(threads);
static inline int parallel_thread(void) { return 0; }
static inline int parallel_threads(void) { return 1; }
static inline int parallel_default(void) { return 1; }
#define parallel_barrier() ((void)0)
#endif

// The share [*lo, *hi) of n items that belongs to the calling thread; shares are multiples of `grain` but for the last.
static inline void parallel_range(int64_t n, int64_t grain, int64_t *lo, int64_t *hi) {
    int64_t units = (n + grain - 1) / grain, me = parallel_thread(), all = parallel_threads();
    *lo = units * me / all * grain;
    *hi = units * (me + 1) / all * grain;
    if (*lo > n) *lo = n;
    if (*hi > n) *hi = n;
}

#endif
