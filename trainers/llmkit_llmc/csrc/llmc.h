// Defines: the library's interface, for programs and for other languages (ctypes). Functions return 0 on success and -1
// on failure with *err filled; none prints, none exits, and there is no global state.
// Tokens are int32. N = B*T tokens; every pointer is to dense row-major memory of the caller.
#ifndef LLMC_H
#define LLMC_H

#include <stdint.h>

#include "error.h"

typedef struct {
    int32_t max_t, vocab, padded_vocab, layers, heads, channels;
} llmc_config;

typedef struct {
    const char *name, *hf_name; // of llm.c, and of Hugging Face after "transformer.", with {} for the layer
    int64_t offset, layers, rows, cols;
    int32_t stacked, decayed, hf_transposed;
} llmc_param;

typedef struct {
    int32_t dtype;     // 0 float, 1 bf16
    int32_t threads;   // 0 = all
    int32_t recompute; // in the backward: 0 nothing, 1 GELU, 2 GELU and LayerNorm
    int32_t master;    // keep float weights beside bf16 ones
    int32_t rank, ranks; // the share of the optimiser state that is kept here (ZeRO-1)
} llmc_options;

typedef struct {
    float learning_rate, beta1, beta2, eps, weight_decay, grad_scale;
    int32_t step;  // counts from 1
    uint32_t seed; // of stochastic rounding
} llmc_adamw;

typedef struct llmc_model llmc_model;

// What this build is: "avx512 bf16-instructions openmp mpi" or the like, and the default dtype of the machine.
const char *llmc_build(void);
int llmc_default_dtype(void);
// FLOP/s of multiply-adds in registers alone; threads 0 = all, dtype as below. Takes `seconds`.
double llmc_machine_peak(int threads, int dtype, double seconds);

int llmc_padded_vocab(int vocab); // rounded up to a multiple of 128
// "d12", "gpt2:d12", "gpt3:c768".
int llmc_config_from_descriptor(const char *text, int vocab, llmc_config *out, llmc_error *err);
int64_t llmc_param_count(const llmc_config *config);
int llmc_param_info(const llmc_config *config, int param, llmc_param *out); // -1 behind the last

int llmc_model_new(const llmc_config *config, const llmc_options *options, llmc_model **out, llmc_error *err);
void llmc_model_free(llmc_model *model);
void llmc_model_init(llmc_model *model, uint32_t seed); // GPT-2's initialisation, in PyTorch's order of drawing
int llmc_model_read(const char *path, const llmc_options *options, llmc_model **out, llmc_error *err); // a model .bin, either dtype
int llmc_model_write(const llmc_model *model, const char *path, llmc_error *err);
int llmc_model_config(const char *path, llmc_config *out, int32_t *dtype, llmc_error *err); // reads only the header

// All parameters (padded, table order) as float, whatever the model's dtype.
void llmc_model_get(const llmc_model *model, float *out);
void llmc_model_set(llmc_model *model, const float *values);
const float *llmc_model_gradients(const llmc_model *model); // (params), NULL before the first

// Losses of N tokens; their mean is left in *mean.
int llmc_model_loss(llmc_model *model, const int32_t *inputs, const int32_t *targets, int64_t B, int64_t T, float *losses, double *mean, llmc_error *err);
// The same, and the gradients of scale * sum(losses), written or added to those there are.
int llmc_model_gradient(llmc_model *model, const int32_t *inputs, const int32_t *targets, int64_t B, int64_t T, float scale, int accumulate,
                        double *mean, llmc_error *err);
double llmc_model_grad_square(const llmc_model *model, int64_t lo, int64_t hi); // sum of squares of gradients [lo, hi)
int llmc_model_update(llmc_model *model, const llmc_adamw *how, llmc_error *err);
// llmc_model_gradient and llmc_model_update in one, to the same bits, for a batch that is one micro-batch: weights are updated
// inside the backward and the gradients never stored, so they cannot be clipped by their norm. Their sum of squares is left
// in *grad_square. In one process only.
int llmc_model_step(llmc_model *model, const int32_t *inputs, const int32_t *targets, int64_t B, int64_t T, float scale, const llmc_adamw *how, double *mean,
                    double *grad_square, llmc_error *err);

// Continues `count` tokens with a KV cache until `total` of them (at most max_t) are there. temperature 0 = the likeliest;
// top_k 0 = all. Draws come from *rng (xorshift64*).
int llmc_model_generate(llmc_model *model, int32_t *tokens, int64_t count, int64_t total, float temperature, int top_k, uint64_t *rng, llmc_error *err);
// Logits (V) of the token after `tokens`; what generate samples from.
int llmc_model_logits(llmc_model *model, const int32_t *tokens, int64_t count, float *logits, llmc_error *err);

#endif
