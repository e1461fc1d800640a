// Defines: model_loss, model_gradient: the GPT-2 graph forward and backward; compiled for float and for bf16.
#include <string.h>

#include "layers.h"
#include "model.h"
#include "step.h"

// One allocation. N = B*T tokens, L layers. Without training one slice serves all layers.
typedef struct {
    real *x;                 // (L+1, N, C) residual stream: before each layer, and after the last
    real *mid;               // (L, N, C) residual stream between attention and MLP
    real *ln1, *ln2;         // (L or 1, N, C)
    real *qkv, *att;         // (L, N, 3C), (L, N, C)
    real *fch, *gelu;        // (L, N, 4C), (L or 1, N, 4C)
    real *lnf;               // (N, C)
    float *lse;              // (L, B, NH, T)
    float *mean, *rstd;      // (2L+1, N): ln1 and ln2 of each layer, then lnf
    float *losses, *logits;  // (N), scratch of the classifier
    real *dx, *dc, *d4;      // (N, C), (N, C), (N, 4C): gradients on their way back
    int64_t ln_stride, gelu_stride; // values from one layer's slice to the next, 0 where recomputed
    int64_t chunk;
} Acts;

typedef struct {
    char *base; // NULL while only counting
    size_t used;
} Carver;

static void *carve(Carver *c, size_t bytes) {
    void *p = c->base ? c->base + c->used : NULL;
    c->used += (bytes + 63) / 64 * 64;
    return p;
}

// Lays the arrays out from `base` (may be NULL) and returns the bytes needed.
static size_t acts_layout(Acts *a, const llmc_model *model, int64_t B, int64_t T, int training, char *base) {
    const llmc_config *c = &model->config;
    int64_t L = c->layers, C = c->channels, N = B * T, kept = training ? L : 1;
    Carver at = {base, 0};
    int recompute = model->options.recompute;
    a->ln_stride = training && recompute < 2 ? N * C : 0;
    a->gelu_stride = training && recompute < 1 ? N * 4 * C : 0;
    a->chunk = model_chunk(model, N, training);
#define REALS(n) carve(&at, (size_t)(n) * sizeof(real))
#define FLOATS(n) carve(&at, (size_t)(n) * sizeof(float))
    a->x = REALS((kept + 1) * N * C);
    a->mid = REALS(kept * N * C);
    a->qkv = REALS(kept * N * 3 * C);
    a->att = REALS(kept * N * C);
    a->fch = REALS(kept * N * 4 * C);
    if (a->ln_stride) a->ln1 = REALS(L * N * C), a->ln2 = REALS(L * N * C);
    if (a->gelu_stride) a->gelu = REALS(L * N * 4 * C);
    a->lnf = REALS(N * C);
    a->lse = FLOATS(kept * N * c->heads);
    a->mean = FLOATS((2 * L + 1) * N);
    a->rstd = FLOATS((2 * L + 1) * N);
    a->losses = FLOATS(N);
    a->dc = REALS(training ? N * C : 0);
    // The logits live between the forward and the backward of the layers, and share memory with what lives only in those.
    size_t shared = at.used;
    a->logits = FLOATS(a->chunk * (classifier_row(c->vocab) + C));
    size_t end = at.used;
    at.used = shared;
    if (!a->ln_stride) a->ln1 = REALS(N * C), a->ln2 = REALS(N * C);
    if (!a->gelu_stride) a->gelu = REALS(N * 4 * C);
    a->dx = REALS(training ? N * C : 0);
    a->d4 = REALS(training ? N * 4 * C : 0);
    if (at.used < end) at.used = end;
    return at.used;
}

static const real *weight(const llmc_model *m, int param, int64_t layer) {
    return (const real *)m->params + m->offset[param] + layer * param_layer_size(&m->config, param);
}
// Where a gradient is stored, or NULL.
static float *gradient(const llmc_model *m, const Gradients *to, int param, int64_t layer) {
    return to->offset[param] < 0 ? NULL : to->values + to->offset[param] + layer * param_layer_size(&m->config, param);
}

static void norm(const llmc_model *m, const Acts *a, real *out, const real *x, int which, int weight_param, int64_t layer, int64_t N) {
    FN(layernorm_forward)(out, a->mean + which * N, a->rstd + which * N, x, weight(m, weight_param, layer), weight(m, weight_param + 1, layer),
                          N, m->config.channels, m->options.threads);
}

static int forward(llmc_model *m, const Acts *a, const int *inputs, int64_t B, int64_t T, int training, llmc_error *err) {
    int64_t L = m->config.layers, C = m->config.channels, NH = m->config.heads, N = B * T;
    Workspace *ws = &m->ws;
    int threads = m->options.threads;
    FN(encoder_forward)(a->x, inputs, weight(m, P_WTE, 0), weight(m, P_WPE, 0), N, T, 0, C, threads);
    for (int64_t l = 0; l < L; l++) {
        int64_t keep = training ? l : 0;
        real *x = a->x + keep * N * C, *next = x + N * C, *mid = a->mid + keep * N * C;
        real *ln1 = a->ln1 + l * a->ln_stride, *ln2 = a->ln2 + l * a->ln_stride, *gelu = a->gelu + l * a->gelu_stride;
        real *qkv = a->qkv + keep * N * 3 * C, *att = a->att + keep * N * C, *fch = a->fch + keep * N * 4 * C;
        norm(m, a, ln1, x, (int)(2 * l), P_LN1W, l, N);
        LLMC_TRY(FN(linear_forward)(qkv, ln1, weight(m, P_QKVW, l), weight(m, P_QKVB, l), NULL, N, C, 3 * C, ws, err));
        LLMC_TRY(FN(attention_forward)(att, a->lse + keep * N * NH, qkv, B, T, C, NH, ws, err));
        LLMC_TRY(FN(linear_forward)(mid, att, weight(m, P_ATTPROJW, l), weight(m, P_ATTPROJB, l), x, N, C, C, ws, err));
        norm(m, a, ln2, mid, (int)(2 * l + 1), P_LN2W, l, N);
        LLMC_TRY(FN(linear_forward)(fch, ln2, weight(m, P_FCW, l), weight(m, P_FCB, l), NULL, N, C, 4 * C, ws, err));
        FN(gelu_forward)(gelu, fch, N * 4 * C, threads);
        LLMC_TRY(FN(linear_forward)(training ? next : x, gelu, weight(m, P_FCPROJW, l), weight(m, P_FCPROJB, l), mid, N, 4 * C, C, ws, err));
    }
    norm(m, a, a->lnf, a->x + (training ? L : 0) * N * C, (int)(2 * L), P_LNFW, 0, N);
    return 0;
}

static int prepare(llmc_model *m, Acts *a, const int *inputs, const int *targets, int64_t B, int64_t T, int training, llmc_error *err) {
    LLMC_TRY(model_check_tokens(m, inputs, B, T, err));
    LLMC_TRY(model_check_tokens(m, targets, B, T, err));
    LLMC_TRY(model_memory(m, acts_layout(a, m, B, T, training, NULL), err));
    acts_layout(a, m, B, T, training, m->memory);
    return 0;
}

int FN(model_loss)(llmc_model *m, const int *inputs, const int *targets, int64_t B, int64_t T, float *losses, llmc_error *err) {
    Acts a;
    LLMC_TRY(prepare(m, &a, inputs, targets, B, T, 0, err));
    LLMC_TRY(forward(m, &a, inputs, B, T, 0, err));
    return FN(classifier)(losses, NULL, NULL, a.lnf, weight(m, P_WTE, 0), targets, 0, B * T, m->config.channels, m->config.vocab, 0,
                          NULL, a.logits, a.chunk, &m->ws, err);
}

static void norm_backward(const llmc_model *m, const Acts *a, const Gradients *to, const real *dout, const real *x, int which, int weight_param,
                          int64_t layer, int64_t N, int accumulate) {
    FN(layernorm_backward)(a->dx, gradient(m, to, weight_param, layer), gradient(m, to, weight_param + 1, layer), dout, x, weight(m, weight_param, layer),
                           a->mean + which * N, a->rstd + which * N, N, m->config.channels, accumulate, m->options.threads);
}

// dx (N, cols of the weight) and the gradients of a weight and its bias, from dy (N, rows).
static int linear_back(llmc_model *m, const Gradients *to, real *dx, const real *dy, const real *x, int weight_param, int64_t layer, int64_t N,
                       int accumulate, llmc_error *err) {
    int64_t C = param_cols(&m->config, weight_param), OC = param_rows(&m->config, weight_param);
    UpdateSink sink;
    if (to->update) sink = step_sink(to->update, weight_param, layer);
    LLMC_TRY(FN(linear_backward)(dx, gradient(m, to, weight_param, layer), gradient(m, to, weight_param + 1, layer), dy, x, weight(m, weight_param, layer),
                                 N, C, OC, accumulate, to->update ? &sink.sink : NULL, &m->ws, err));
    if (to->update) step_taken(to->update, weight_param);
    return 0;
}

// a->dx holds the gradient of the layer's output, then that of its input.
static int backward_layer(llmc_model *m, const Acts *a, const Gradients *to, int64_t l, int64_t B, int64_t T, int add, llmc_error *err) {
    int64_t C = m->config.channels, NH = m->config.heads, N = B * T;
    real *x = a->x + l * N * C, *mid = a->mid + l * N * C;
    real *ln1 = a->ln1 + l * a->ln_stride, *ln2 = a->ln2 + l * a->ln_stride, *gelu = a->gelu + l * a->gelu_stride;
    real *qkv = a->qkv + l * N * 3 * C, *att = a->att + l * N * C, *fch = a->fch + l * N * 4 * C;
    if (m->options.recompute >= 1) FN(gelu_forward)(gelu, fch, N * 4 * C, m->options.threads);
    if (m->options.recompute >= 2) norm(m, a, ln2, mid, (int)(2 * l + 1), P_LN2W, l, N);
    LLMC_TRY(linear_back(m, to, a->d4, a->dx, gelu, P_FCPROJW, l, N, add, err));
    FN(gelu_backward)(a->d4, a->d4, fch, N * 4 * C, m->options.threads);
    LLMC_TRY(linear_back(m, to, a->dc, a->d4, ln2, P_FCW, l, N, add, err));
    norm_backward(m, a, to, a->dc, mid, (int)(2 * l + 1), P_LN2W, l, N, add);
    LLMC_TRY(linear_back(m, to, a->dc, a->dx, att, P_ATTPROJW, l, N, add, err));
    LLMC_TRY(FN(attention_backward)(a->d4, a->dc, qkv, att, a->lse + l * N * NH, B, T, C, NH, &m->ws, err)); // d4 is (N, 3C) here
    if (m->options.recompute >= 2) norm(m, a, ln1, x, (int)(2 * l), P_LN1W, l, N);
    LLMC_TRY(linear_back(m, to, a->dc, a->d4, ln1, P_QKVW, l, N, add, err));
    norm_backward(m, a, to, a->dc, x, (int)(2 * l), P_LN1W, l, N, add);
    return 0;
}

int FN(model_gradient)(llmc_model *m, const int *inputs, const int *targets, int64_t B, int64_t T, float scale, int accumulate, const Gradients *to,
                       double *mean, llmc_error *err) {
    Acts a;
    int64_t L = m->config.layers, C = m->config.channels, N = B * T;
    LLMC_TRY(prepare(m, &a, inputs, targets, B, T, 1, err));
    LLMC_TRY(forward(m, &a, inputs, B, T, 1, err));
    float *dwte = gradient(m, to, P_WTE, 0);
    UpdateSink sink;
    if (!dwte) sink = step_sink(to->update, P_WTE, 0);
    LLMC_TRY(FN(classifier)(a.losses, a.dc, dwte, a.lnf, weight(m, P_WTE, 0), targets, scale, N, C, m->config.vocab, accumulate, dwte ? NULL : &sink.sink,
                            a.logits, a.chunk, &m->ws, err));
    if (!dwte) step_taken(to->update, P_WTE);
    memset(a.dx, 0, (size_t)(N * C) * sizeof(real));
    norm_backward(m, &a, to, a.dc, a.x + L * N * C, (int)(2 * L), P_LNFW, 0, N, accumulate);
    for (int64_t l = L - 1; l >= 0; l--) LLMC_TRY(backward_layer(m, &a, to, l, B, T, accumulate, err));
    if (!accumulate) memset(gradient(m, to, P_WPE, 0), 0, (size_t)param_size(&m->config, P_WPE) * sizeof(float));
    if (dwte) FN(encoder_backward)(dwte, gradient(m, to, P_WPE, 0), a.dx, inputs, N, T, C, m->options.threads);
    else FN(encoder_backward)(to->update->rows.grads, gradient(m, to, P_WPE, 0), a.dx, to->update->slots, N, T, C, m->options.threads);
    double sum = 0;
    for (int64_t i = 0; i < N; i++) sum += a.losses[i];
    *mean = sum / (double)N;
    return 0;
}
