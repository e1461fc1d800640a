// Defines: the Mersenne Twister (Matsumoto and Nishimura 1998) and PyTorch's ways of drawing from it.
#include "mt19937.h"

#include <math.h>
#include <string.h>

enum { N = 624, M = 397 };

void mt_seed(Mt19937 *mt, uint32_t seed) {
    memset(mt, 0, sizeof *mt);
    mt->matrix[1] = 0x9908b0dfu;
    mt->state[0] = seed;
    for (uint32_t j = 1; j < N; j++) mt->state[j] = 1812433253u * (mt->state[j - 1] ^ (mt->state[j - 1] >> 30)) + j;
    mt->left = 1; // the first draw refills
}

static void refill(Mt19937 *mt) {
    uint32_t *s = mt->state;
    for (int j = 0; j < N; j++) {
        uint32_t y = (s[j] & 0x80000000u) | (s[(j + 1) % N] & 0x7fffffffu);
        s[j] = s[(j + M) % N] ^ (y >> 1) ^ mt->matrix[y & 1];
    }
    mt->left = N;
    mt->next = 0;
}

uint32_t mt_uint32(Mt19937 *mt) {
    if (--mt->left <= 0) refill(mt);
    uint32_t y = mt->state[mt->next++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

static float uniform(Mt19937 *mt) { return (float)(mt_uint32(mt) & 0xffffffu) * (1.0f / 16777216.0f); }
static double uniform_double(Mt19937 *mt) {
    uint64_t high = mt_uint32(mt), low = mt_uint32(mt);
    return (double)((high << 32 | low) & ((1ull << 53) - 1)) * (1.0 / 9007199254740992.0);
}

// 16 uniforms become 16 normals (Box-Muller); value i is paired with value i + 8.
static void normal_16(float *data, float std) {
    for (int i = 0; i < 8; i++) {
        float radius = sqrtf(-2.0f * logf(1.0f - data[i] + 1e-12f));
        float theta = (float)(2.0 * 3.14159265358979323846) * data[i + 8];
        data[i] = radius * cosf(theta) * std;
        data[i + 8] = radius * sinf(theta) * std;
    }
}

void mt_normal(Mt19937 *mt, float *data, int64_t n, float std) {
    if (n < 16) { // PyTorch draws short tensors in double precision, a pair at a time
        for (int64_t i = 0; i < n; i += 2) {
            double u1 = uniform_double(mt), u2 = uniform_double(mt);
            double radius = sqrt(-2.0 * log1p(-u2)), theta = 2.0 * 3.14159265358979323846 * u1;
            data[i] = (float)(radius * cos(theta) * std);
            if (i + 1 < n) data[i + 1] = (float)(radius * sin(theta) * std);
        }
        return;
    }
    for (int64_t i = 0; i < n; i++) data[i] = uniform(mt);
    for (int64_t i = 0; i + 16 <= n; i += 16) normal_16(data + i, std);
    if (n % 16 == 0) return;
    for (int i = 0; i < 16; i++) data[n - 16 + i] = uniform(mt); // the last 16 are drawn again
    normal_16(data + n - 16, std);
}

void mt_shuffle(Mt19937 *mt, int32_t *data, int64_t n) {
    for (int64_t i = n - 1; i > 0; i--) {
        int64_t j = (int64_t)(mt_uint32(mt) % (uint32_t)(i + 1));
        int32_t swap = data[i];
        data[i] = data[j];
        data[j] = swap;
    }
}
