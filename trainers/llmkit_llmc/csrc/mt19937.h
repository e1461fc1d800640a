// Defines: Mt19937: the Mersenne Twister as PyTorch's CPU generator uses it, so that a seed means the same in both.
#ifndef LLMC_MT19937_H
#define LLMC_MT19937_H

#include <stdint.h>

// Laid out as it is stored in state files (2520 bytes).
typedef struct {
    uint64_t seed;
    int32_t left;      // values until the next refill
    uint32_t next;     // index of the next value
    uint32_t state[624];
    uint32_t matrix[2]; // 0 and 0x9908b0df
} Mt19937;
_Static_assert(sizeof(Mt19937) == 2520, "state files store it as it lies in memory");

void mt_seed(Mt19937 *mt, uint32_t seed);
uint32_t mt_uint32(Mt19937 *mt);
// Fills data (n) like torch.Tensor.normal_(mean 0, std) does on the CPU.
void mt_normal(Mt19937 *mt, float *data, int64_t n, float std);
// Fisher-Yates from the end.
void mt_shuffle(Mt19937 *mt, int32_t *data, int64_t n);

#endif
