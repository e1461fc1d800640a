// Defines: what the tests look at that the interface does not show: the vector functions and bf16 rounding, on arrays.
#include "real.h"

void probe_exp(float *out, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) vf_store_n(out + i, vf_exp(vf_load_n(x + i, n - i < VL ? n - i : VL)), n - i < VL ? n - i : VL);
}
void probe_sigmoid(float *out, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) vf_store_n(out + i, vf_sigmoid(vf_load_n(x + i, n - i < VL ? n - i : VL)), n - i < VL ? n - i : VL);
}
void probe_round_bf16(bf16 *out, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) vf_store_n_bf16(out + i, vf_load_n(x + i, n - i < VL ? n - i : VL), n - i < VL ? n - i : VL);
}
void probe_stochastic_bf16(bf16 *out, const float *x, int64_t n, uint32_t seed) {
    for (int64_t i = 0; i < n; i++) out[i] = bf16_stochastic(x[i], counter_random(seed, (uint64_t)i));
}
