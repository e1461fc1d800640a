// Defines: the model as the library's own sources see it.
#ifndef LLMC_MODEL_H
#define LLMC_MODEL_H

#include "gemm.h"
#include "params.h"

// Where a backward leaves gradients.
typedef struct {
    float *values;
    int64_t offset[PARAMS];    // of each tensor in `values`, or -1: its gradient is used up by `update` as it arises
    struct fused_step *update; // see step.h, or NULL
} Gradients;

struct llmc_model {
    llmc_config config;
    llmc_options options;
    int64_t offset[PARAMS], count; // of each tensor, and of all values
    void *params;                  // (count) of the dtype
    float *grads;                  // (count), NULL before the first gradient
    int64_t lo, hi;                // this process's share of the optimiser state
    float *m, *v, *master;         // (hi - lo) each; master is NULL without bf16 master weights
    Workspace ws;
    struct fused_step *step; // of llmc_model_step, NULL before the first
    void *memory; // activations
    size_t memory_bytes;
};

// The two builds of model_typed.c.
int model_loss_f32(llmc_model *model, const int *inputs, const int *targets, int64_t B, int64_t T, float *losses, llmc_error *err);
int model_loss_bf16(llmc_model *model, const int *inputs, const int *targets, int64_t B, int64_t T, float *losses, llmc_error *err);
int model_gradient_f32(llmc_model *model, const int *inputs, const int *targets, int64_t B, int64_t T, float scale, int accumulate, const Gradients *to,
                       double *mean, llmc_error *err);
int model_gradient_bf16(llmc_model *model, const int *inputs, const int *targets, int64_t B, int64_t T, float scale, int accumulate, const Gradients *to,
                       double *mean, llmc_error *err);
// Logits (V) after tokens [from, from + n) at their positions; keys and values (L, max_t, 2C) come from and go to `cache`.
int model_decode_f32(llmc_model *model, const int *tokens, int64_t from, int64_t n, float *cache, float *logits, llmc_error *err);
int model_decode_bf16(llmc_model *model, const int *tokens, int64_t from, int64_t n, float *cache, float *logits, llmc_error *err);

// Tokens whose logits exist at a time; when training all, where that takes less memory than storing the gradient of wte.
int64_t model_chunk(const llmc_model *model, int64_t N, int training);
int model_check_tokens(const llmc_model *model, const int *tokens, int64_t B, int64_t T, llmc_error *err);
int model_backward(llmc_model *model, const int *inputs, const int *targets, int64_t B, int64_t T, float scale, int accumulate, const Gradients *to,
                   double *mean, llmc_error *err); // model_gradient of the model's dtype
int model_memory(llmc_model *model, size_t bytes, llmc_error *err); // makes room for activations; contents are lost
int model_optimizer_memory(llmc_model *model, llmc_error *err);     // m, v, master: once
void model_round_from_master(llmc_model *model);                    // plain rounding of this share, after master was read

#endif
