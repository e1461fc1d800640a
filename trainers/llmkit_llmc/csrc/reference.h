// Declares: each layer as its definition reads, in plain loops over float: what the fast ones are tested against.
// Shapes and arguments as in layers.h; gradients are written, not added, unless a comment says otherwise.
#ifndef LLMC_REFERENCE_H
#define LLMC_REFERENCE_H

#include <stdint.h>

void reference_matmul(float *c, const float *a, const float *b, int64_t m, int64_t n, int64_t k); // (m, n) = (m, k) (k, n)
void reference_encoder_forward(float *out, const int *inputs, const float *wte, const float *wpe, int64_t N, int64_t T, int64_t C);
void reference_encoder_backward(float *dwte, float *dwpe, const float *dout, const int *inputs, int64_t N, int64_t T, int64_t C); // adds
void reference_layernorm_forward(float *out, float *mean, float *rstd, const float *x, const float *weight, const float *bias, int64_t N, int64_t C);
void reference_layernorm_backward(float *dx, float *dweight, float *dbias, const float *dout, const float *x, const float *weight,
                                  const float *mean, const float *rstd, int64_t N, int64_t C);
void reference_gelu_forward(float *out, const float *x, int64_t n);
void reference_gelu_backward(float *dx, const float *dout, const float *x, int64_t n);
void reference_linear_forward(float *y, const float *x, const float *w, const float *bias, int64_t N, int64_t C, int64_t OC);
void reference_linear_backward(float *dx, float *dw, float *dbias, const float *dy, const float *x, const float *w, int64_t N, int64_t C, int64_t OC);
// att (B, NH, T, T) is scratch that the forward fills with probabilities and the backward reads.
void reference_attention_forward(float *out, float *att, const float *qkv, int64_t B, int64_t T, int64_t C, int64_t NH);
void reference_attention_backward(float *dqkv, const float *dout, const float *qkv, const float *att, int64_t B, int64_t T, int64_t C, int64_t NH);
void reference_classifier(float *losses, float *dx, float *dw, float *dlogits, const float *x, const float *w, const int *targets, float scale,
                          int64_t N, int64_t C, int64_t V); // dlogits (N, V) is scratch
void reference_adamw(float *p, float *m, float *v, const float *g, int64_t n, float rate, float b1, float b2, float eps, float decay, int step);

#endif
