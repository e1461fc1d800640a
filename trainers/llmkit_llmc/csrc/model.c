// Defines: the public functions on a model: creation, initialisation, parameters as float, files, dispatch by dtype.
#include "model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "io.h"
#include "mt19937.h"
#include "parallel.h"
#include "real.h"
#include "step.h"

enum { MODEL_MAGIC = 20240326, VERSION_F32 = 3, VERSION_BF16 = 5 };

static size_t width(const llmc_model *m) { return m->options.dtype == LLMC_DTYPE_BF16 ? 2 : 4; }

int llmc_model_new(const llmc_config *config, const llmc_options *options, llmc_model **out, llmc_error *err) {
    LLMC_TRY(config_check(config, err));
    llmc_model *m = calloc(1, sizeof *m);
    if (!m) LLMC_FAIL(err, "", "no memory");
    m->config = *config;
    m->options = *options;
    if (m->options.ranks < 1) m->options.ranks = 1;
    if (m->options.threads < 1) m->options.threads = parallel_default();
    if (m->options.dtype != LLMC_DTYPE_BF16) m->options.dtype = LLMC_DTYPE_F32, m->options.master = 0;
    m->ws.threads = m->options.threads;
    m->count = param_offsets(config, m->offset);
    m->lo = m->count * m->options.rank / m->options.ranks;
    m->hi = m->count * (m->options.rank + 1) / m->options.ranks;
    m->params = llmc_alloc((size_t)m->count * width(m));
    if (!m->params) {
        long long count = (long long)m->count;
        free(m);
        LLMC_FAIL(err, "choose a smaller model", "no memory for %lld parameters", count);
    }
    *out = m;
    return 0;
}

void llmc_model_free(llmc_model *m) {
    if (!m) return;
    fused_step_free(m->step);
    workspace_free(&m->ws);
    llmc_release(m->memory);
    llmc_release(m->master);
    llmc_release(m->v);
    llmc_release(m->m);
    llmc_release(m->grads);
    llmc_release(m->params);
    free(m);
}

int model_memory(llmc_model *m, size_t bytes, llmc_error *err) {
    if (bytes <= m->memory_bytes) return 0;
    llmc_release(m->memory);
    m->memory = llmc_alloc(bytes);
    m->memory_bytes = m->memory ? bytes : 0;
    if (!m->memory) LLMC_FAIL(err, "use a smaller batch or sequence length", "no memory for %zu bytes of activations", bytes);
    return 0;
}

int model_optimizer_memory(llmc_model *m, llmc_error *err) {
    size_t bytes = (size_t)(m->hi - m->lo) * sizeof(float);
    if (!m->m) m->m = llmc_alloc(bytes);
    if (!m->v) m->v = llmc_alloc(bytes);
    if (m->options.master && !m->master) {
        m->master = llmc_alloc(bytes);
        if (m->master)
            for (int64_t i = 0; i < m->hi - m->lo; i++) m->master[i] = bf16_to_float(((const bf16 *)m->params)[m->lo + i]);
    }
    if (!m->m || !m->v || (m->options.master && !m->master)) LLMC_FAIL(err, "choose a smaller model", "no memory for the optimiser state");
    return 0;
}

static void set_range(llmc_model *m, int64_t at, const float *values, int64_t n) {
    if (m->options.dtype == LLMC_DTYPE_F32) memcpy((float *)m->params + at, values, (size_t)n * 4);
    else
        for (int64_t i = 0; i < n; i++) ((bf16 *)m->params)[at + i] = bf16_from_float(values[i]);
}

void llmc_model_get(const llmc_model *m, float *out) {
    if (m->options.dtype == LLMC_DTYPE_F32) memcpy(out, m->params, (size_t)m->count * 4);
    else
        for (int64_t i = 0; i < m->count; i++) out[i] = bf16_to_float(((const bf16 *)m->params)[i]);
}

void llmc_model_set(llmc_model *m, const float *values) { set_range(m, 0, values, m->count); }

void llmc_model_init(llmc_model *m, uint32_t seed) {
    const llmc_config *c = &m->config;
    Mt19937 mt;
    mt_seed(&mt, seed);
    memset(m->params, 0, (size_t)m->count * width(m));
    for (int64_t l = 0; l < c->layers; l++)
        for (int i = 0; i < PARAMS; i++) {
            const ParamSpec *spec = &llmc_params[i];
            if (l > 0 && !spec->stacked) continue; // one of a kind: drawn before the first layer
            int64_t n = param_layer_size(c, i), at = m->offset[i] + l * n;
            if (i == P_WTE) n = (int64_t)c->vocab * c->channels; // the padding stays 0
            float *values = spec->init == INIT_ZERO ? NULL : malloc((size_t)n * 4);
            if (!values) continue;
            if (spec->init == INIT_ONE)
                for (int64_t j = 0; j < n; j++) values[j] = 1.0f;
            else mt_normal(&mt, values, n, spec->init == INIT_RESIDUAL ? 0.02f / sqrtf(2.0f * (float)c->layers) : 0.02f);
            set_range(m, at, values, n);
            free(values);
        }
}

const float *llmc_model_gradients(const llmc_model *m) { return m->grads; }

int llmc_model_loss(llmc_model *m, const int32_t *inputs, const int32_t *targets, int64_t B, int64_t T, float *losses, double *mean, llmc_error *err) {
    LLMC_TRY((m->options.dtype == LLMC_DTYPE_BF16 ? model_loss_bf16 : model_loss_f32)(m, inputs, targets, B, T, losses, err));
    double sum = 0;
    for (int64_t i = 0; i < B * T; i++) sum += (double)losses[i];
    *mean = sum / (double)(B * T);
    return 0;
}

int64_t model_chunk(const llmc_model *m, int64_t N, int training) {
    int64_t rows = 512, all = rows + (training ? m->config.channels : 0); // 512: 103 MB of logits for GPT-2's vocabulary
    return N <= all ? N : rows;
}

int model_check_tokens(const llmc_model *model, const int *tokens, int64_t B, int64_t T, llmc_error *err) {
    if (B < 1 || T < 1 || T > model->config.max_t)
        LLMC_FAIL(err, "use a shorter sequence length, or a model with more positions", "a batch of %lld x %lld tokens does not fit a model of %d positions",
                  (long long)B, (long long)T, model->config.max_t);
    for (int64_t i = 0; i < B * T; i++)
        if (tokens[i] < 0 || tokens[i] >= model->config.vocab)
            LLMC_FAIL(err, "prepare the data with the tokenizer of this model", "token %d is outside the vocabulary of %d", tokens[i], model->config.vocab);
    return 0;
}

int model_backward(llmc_model *m, const int *inputs, const int *targets, int64_t B, int64_t T, float scale, int accumulate, const Gradients *to,
                   double *mean, llmc_error *err) {
    return (m->options.dtype == LLMC_DTYPE_BF16 ? model_gradient_bf16 : model_gradient_f32)(m, inputs, targets, B, T, scale, accumulate, to, mean, err);
}

int llmc_model_gradient(llmc_model *m, const int32_t *inputs, const int32_t *targets, int64_t B, int64_t T, float scale, int accumulate,
                        double *mean, llmc_error *err) {
    if (!m->grads) m->grads = llmc_alloc((size_t)m->count * 4);
    if (!m->grads) LLMC_FAIL(err, "choose a smaller model", "no memory for the gradients of %lld parameters", (long long)m->count);
    Gradients to = {.values = m->grads};
    memcpy(to.offset, m->offset, sizeof to.offset);
    return model_backward(m, inputs, targets, B, T, scale, accumulate, &to, mean, err);
}

int llmc_model_write(const llmc_model *m, const char *path, llmc_error *err) {
    const llmc_config *c = &m->config;
    int32_t header[HEADER_INTS] = {MODEL_MAGIC, m->options.dtype == LLMC_DTYPE_BF16 ? VERSION_BF16 : VERSION_F32, c->max_t, c->vocab,
                                   c->layers, c->heads, c->channels, c->padded_vocab};
    AtomicFile f;
    LLMC_TRY(atomic_open(&f, path, err));
    LLMC_TRY(atomic_write(&f, header, sizeof header, err));
    LLMC_TRY(atomic_write(&f, m->params, m->count * (int64_t)width(m), err));
    return atomic_commit(&f, err);
}

static int read_config(FILE *file, const char *path, int64_t size, llmc_config *c, int32_t *dtype, llmc_error *err) {
    int32_t h[HEADER_INTS];
    LLMC_TRY(read_header(file, path, h, MODEL_MAGIC, "a model file", err));
    if (h[1] != VERSION_F32 && h[1] != VERSION_BF16)
        LLMC_FAIL(err, "write it again as version 3 (float) or 5 (bf16)", "%s is a model file of version %d", path, h[1]);
    *dtype = h[1] == VERSION_BF16 ? LLMC_DTYPE_BF16 : LLMC_DTYPE_F32;
    *c = (llmc_config){.max_t = h[2], .vocab = h[3], .layers = h[4], .heads = h[5], .channels = h[6], .padded_vocab = h[7]};
    LLMC_TRY(config_check(c, err));
    int64_t expected = HEADER_BYTES + param_offsets(c, NULL) * (*dtype == LLMC_DTYPE_BF16 ? 2 : 4);
    if (size != expected)
        LLMC_FAIL(err, "copy or write it again", "%s has %lld bytes; a model of its sizes has %lld", path, (long long)size, (long long)expected);
    return 0;
}

int llmc_model_config(const char *path, llmc_config *out, int32_t *dtype, llmc_error *err) {
    int64_t size;
    FILE *file = open_for_reading(path, &size, err);
    if (!file) return -1;
    int failed = read_config(file, path, size, out, dtype, err);
    fclose(file);
    return failed;
}

static int read_values(llmc_model *m, FILE *file, const char *path, int32_t dtype, llmc_error *err) {
    if (dtype == m->options.dtype) return read_exactly(file, path, m->params, m->count * (int64_t)width(m), err);
    enum { AT_ONCE = 4096 };
    for (int64_t at = 0; at < m->count; at += AT_ONCE) {
        int64_t n = m->count - at < AT_ONCE ? m->count - at : AT_ONCE;
        float values[AT_ONCE];
        bf16 halves[AT_ONCE];
        LLMC_TRY(read_exactly(file, path, dtype == LLMC_DTYPE_BF16 ? (void *)halves : (void *)values, n * (dtype == LLMC_DTYPE_BF16 ? 2 : 4), err));
        if (dtype == LLMC_DTYPE_BF16)
            for (int64_t i = 0; i < n; i++) values[i] = bf16_to_float(halves[i]);
        set_range(m, at, values, n);
    }
    return 0;
}

int llmc_model_read(const char *path, const llmc_options *options, llmc_model **out, llmc_error *err) {
    int64_t size;
    FILE *file = open_for_reading(path, &size, err);
    if (!file) return -1;
    llmc_config config;
    int32_t dtype;
    llmc_model *m = NULL;
    int failed = read_config(file, path, size, &config, &dtype, err);
    if (!failed) failed = llmc_model_new(&config, options, &m, err);
    if (!failed) failed = read_values(m, file, path, dtype, err);
    fclose(file);
    if (failed) llmc_model_free(m);
    else *out = m;
    return failed;
}

int llmc_default_dtype(void) { return gemm_uses_pairs() ? LLMC_DTYPE_BF16 : LLMC_DTYPE_F32; }

const char *llmc_build(void) {
    return
#if VL == 16
        "avx512"
#elif defined(__AVX2__)
        "avx2"
#elif defined(__aarch64__)
        "neon"
#else
        "portable"
#endif
#if defined(__AVX512BF16__)
        " bf16-instructions"
#elif defined(LLMC_EMULATE_DPBF16)
        " bf16-emulated"
#endif
#ifdef _OPENMP
        " openmp"
#endif
#ifdef LLMC_MPI
        " mpi"
#endif
        ;
}
