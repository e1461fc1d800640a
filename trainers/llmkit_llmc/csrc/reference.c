// Defines: the reference layers.
#include "reference.h"

#include <math.h>
#include <string.h>

void reference_matmul(float *c, const float *a, const float *b, int64_t m, int64_t n, int64_t k) {
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            float sum = 0;
            for (int64_t l = 0; l < k; l++) sum += a[i * k + l] * b[l * n + j];
            c[i * n + j] = sum;
        }
}

void reference_encoder_forward(float *out, const int *inputs, const float *wte, const float *wpe, int64_t N, int64_t T, int64_t C) {
    for (int64_t n = 0; n < N; n++)
        for (int64_t i = 0; i < C; i++) out[n * C + i] = wte[inputs[n] * C + i] + wpe[n % T * C + i];
}

void reference_encoder_backward(float *dwte, float *dwpe, const float *dout, const int *inputs, int64_t N, int64_t T, int64_t C) {
    for (int64_t n = 0; n < N; n++)
        for (int64_t i = 0; i < C; i++) {
            dwte[inputs[n] * C + i] += dout[n * C + i];
            dwpe[n % T * C + i] += dout[n * C + i];
        }
}

void reference_layernorm_forward(float *out, float *mean, float *rstd, const float *x, const float *weight, const float *bias, int64_t N, int64_t C) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * C;
        float m = 0, variance = 0;
        for (int64_t i = 0; i < C; i++) m += row[i] / (float)C;
        for (int64_t i = 0; i < C; i++) variance += (row[i] - m) * (row[i] - m) / (float)C;
        mean[n] = m;
        rstd[n] = 1.0f / sqrtf(variance + 1e-5f);
        for (int64_t i = 0; i < C; i++) out[n * C + i] = (row[i] - m) * rstd[n] * weight[i] + bias[i];
    }
}

void reference_layernorm_backward(float *dx, float *dweight, float *dbias, const float *dout, const float *x, const float *weight,
                                  const float *mean, const float *rstd, int64_t N, int64_t C) {
    memset(dweight, 0, (size_t)C * sizeof *dweight);
    memset(dbias, 0, (size_t)C * sizeof *dbias);
    for (int64_t n = 0; n < N; n++) {
        float mean_g = 0, mean_gx = 0; // of g = weight * dout, and of g times the normalised x
        for (int64_t i = 0; i < C; i++) {
            float xhat = (x[n * C + i] - mean[n]) * rstd[n], g = weight[i] * dout[n * C + i];
            mean_g += g / (float)C;
            mean_gx += g * xhat / (float)C;
            dweight[i] += dout[n * C + i] * xhat;
            dbias[i] += dout[n * C + i];
        }
        for (int64_t i = 0; i < C; i++) {
            float xhat = (x[n * C + i] - mean[n]) * rstd[n];
            dx[n * C + i] = (weight[i] * dout[n * C + i] - mean_g - xhat * mean_gx) * rstd[n];
        }
    }
}

static const float ROOT = 0.7978845608f; // sqrt(2 / pi)

void reference_gelu_forward(float *out, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = 0.5f * x[i] * (1.0f + tanhf(ROOT * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
}

void reference_gelu_backward(float *dx, const float *dout, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float t = tanhf(ROOT * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
        float slope = ROOT * (1.0f + 3 * 0.044715f * x[i] * x[i]);
        dx[i] = dout[i] * (0.5f * (1.0f + t) + 0.5f * x[i] * (1.0f - t * t) * slope);
    }
}

void reference_linear_forward(float *y, const float *x, const float *w, const float *bias, int64_t N, int64_t C, int64_t OC) {
    for (int64_t n = 0; n < N; n++)
        for (int64_t o = 0; o < OC; o++) {
            float sum = bias ? bias[o] : 0;
            for (int64_t i = 0; i < C; i++) sum += x[n * C + i] * w[o * C + i];
            y[n * OC + o] = sum;
        }
}

void reference_linear_backward(float *dx, float *dw, float *dbias, const float *dy, const float *x, const float *w, int64_t N, int64_t C, int64_t OC) {
    memset(dx, 0, (size_t)(N * C) * sizeof *dx);
    memset(dw, 0, (size_t)(OC * C) * sizeof *dw);
    memset(dbias, 0, (size_t)OC * sizeof *dbias);
    for (int64_t n = 0; n < N; n++)
        for (int64_t o = 0; o < OC; o++) {
            float d = dy[n * OC + o];
            dbias[o] += d;
            for (int64_t i = 0; i < C; i++) {
                dx[n * C + i] += d * w[o * C + i];
                dw[o * C + i] += d * x[n * C + i];
            }
        }
}

void reference_attention_forward(float *out, float *att, const float *qkv, int64_t B, int64_t T, int64_t C, int64_t NH) {
    int64_t hs = C / NH;
    float scale = 1.0f / sqrtf((float)hs);
    for (int64_t bh = 0; bh < B * NH; bh++) {
        const float *q = qkv + bh / NH * T * 3 * C + bh % NH * hs, *k = q + C, *v = q + 2 * C; // rows 3C apart
        float *o = out + bh / NH * T * C + bh % NH * hs;
        for (int64_t t = 0; t < T; t++) {
            float *p = att + (bh * T + t) * T, top = -INFINITY, total = 0; // (T) scores, then probabilities
            for (int64_t s = 0; s <= t; s++) {
                p[s] = 0;
                for (int64_t d = 0; d < hs; d++) p[s] += scale * q[t * 3 * C + d] * k[s * 3 * C + d];
                top = p[s] > top ? p[s] : top;
            }
            for (int64_t s = 0; s <= t; s++) total += p[s] = expf(p[s] - top);
            for (int64_t s = 0; s < T; s++) p[s] = s <= t ? p[s] / total : 0;
            for (int64_t d = 0; d < hs; d++) {
                o[t * C + d] = 0;
                for (int64_t s = 0; s <= t; s++) o[t * C + d] += p[s] * v[s * 3 * C + d];
            }
        }
    }
}

void reference_attention_backward(float *dqkv, const float *dout, const float *qkv, const float *att, int64_t B, int64_t T, int64_t C, int64_t NH) {
    int64_t hs = C / NH;
    float scale = 1.0f / sqrtf((float)hs);
    memset(dqkv, 0, (size_t)(B * T * 3 * C) * sizeof *dqkv);
    for (int64_t bh = 0; bh < B * NH; bh++) {
        int64_t at = bh / NH * T * 3 * C + bh % NH * hs;
        const float *q = qkv + at, *k = q + C, *v = q + 2 * C, *d_o = dout + bh / NH * T * C + bh % NH * hs;
        float *dq = dqkv + at, *dk = dq + C, *dv = dq + 2 * C;
        for (int64_t t = 0; t < T; t++) {
            const float *p = att + (bh * T + t) * T; // (T)
            float dot = 0;                           // sum of p * dp: what the softmax subtracts
            for (int64_t s = 0; s <= t; s++)
                for (int64_t d = 0; d < hs; d++) dot += p[s] * d_o[t * C + d] * v[s * 3 * C + d];
            for (int64_t s = 0; s <= t; s++) {
                float dp = 0;
                for (int64_t d = 0; d < hs; d++) {
                    dp += d_o[t * C + d] * v[s * 3 * C + d];
                    dv[s * 3 * C + d] += p[s] * d_o[t * C + d];
                }
                float ds = p[s] * (dp - dot) * scale;
                for (int64_t d = 0; d < hs; d++) {
                    dq[t * 3 * C + d] += ds * k[s * 3 * C + d];
                    dk[s * 3 * C + d] += ds * q[t * 3 * C + d];
                }
            }
        }
    }
}

void reference_classifier(float *losses, float *dx, float *dw, float *dlogits, const float *x, const float *w, const int *targets, float scale,
                          int64_t N, int64_t C, int64_t V) {
    reference_linear_forward(dlogits, x, w, NULL, N, C, V);
    memset(dx, 0, (size_t)(N * C) * sizeof *dx);
    memset(dw, 0, (size_t)(V * C) * sizeof *dw);
    for (int64_t n = 0; n < N; n++) {
        float *row = dlogits + n * V, top = -INFINITY, total = 0; // (V) logits, then their gradients
        for (int64_t i = 0; i < V; i++) top = row[i] > top ? row[i] : top;
        for (int64_t i = 0; i < V; i++) total += expf(row[i] - top);
        losses[n] = logf(total) + top - row[targets[n]];
        for (int64_t i = 0; i < V; i++) row[i] = scale * (expf(row[i] - top) / total - (i == targets[n] ? 1.0f : 0.0f));
        for (int64_t i = 0; i < V; i++)
            for (int64_t c = 0; c < C; c++) {
                dx[n * C + c] += row[i] * w[i * C + c];
                dw[i * C + c] += row[i] * x[n * C + c];
            }
    }
}

void reference_adamw(float *p, float *m, float *v, const float *g, int64_t n, float rate, float b1, float b2, float eps, float decay, int step) {
    for (int64_t i = 0; i < n; i++) {
        m[i] = b1 * m[i] + (1 - b1) * g[i];
        v[i] = b2 * v[i] + (1 - b2) * g[i] * g[i];
        float m_hat = m[i] / (1 - powf(b1, (float)step)), v_hat = v[i] / (1 - powf(b2, (float)step));
        p[i] -= rate * (m_hat / (sqrtf(v_hat) + eps) + decay * p[i]);
    }
}
