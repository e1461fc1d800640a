// Defines: LLMC_PARAMS, the table of parameters that everything derives from: the order in files and in memory, shapes,
// initialisation, weight decay, Hugging Face names, and the tests.
#ifndef LLMC_PARAMS_H
#define LLMC_PARAMS_H

#include <stdint.h>

#include "llmc.h"

enum { DIM_ONE, DIM_C, DIM_3C, DIM_4C, DIM_VOCAB, DIM_POSITIONS };      // sizes in terms of the configuration
enum { INIT_ZERO, INIT_ONE, INIT_NORMAL, INIT_RESIDUAL };               // N(0, 0.02), and 0.02 / sqrt(2 layers)

// symbol, llm.c name, Hugging Face name (after "transformer.", {} = layer), one per layer, rows, columns, initialisation.
// Weights are (out, in). A tensor with columns is two-dimensional and decays; Hugging Face transposes those of INIT_NORMAL
// and INIT_RESIDUAL within layers (its Conv1D stores (in, out)). The output layer is wte again.
#define LLMC_PARAMS(X)                                                                        \
    X(WTE, "wte", "wte.weight", 0, DIM_VOCAB, DIM_C, INIT_NORMAL)                             \
    X(WPE, "wpe", "wpe.weight", 0, DIM_POSITIONS, DIM_C, INIT_NORMAL)                         \
    X(LN1W, "ln1w", "h.{}.ln_1.weight", 1, DIM_C, DIM_ONE, INIT_ONE)                          \
    X(LN1B, "ln1b", "h.{}.ln_1.bias", 1, DIM_C, DIM_ONE, INIT_ZERO)                           \
    X(QKVW, "qkvw", "h.{}.attn.c_attn.weight", 1, DIM_3C, DIM_C, INIT_NORMAL)                 \
    X(QKVB, "qkvb", "h.{}.attn.c_attn.bias", 1, DIM_3C, DIM_ONE, INIT_ZERO)                   \
    X(ATTPROJW, "attprojw", "h.{}.attn.c_proj.weight", 1, DIM_C, DIM_C, INIT_RESIDUAL)        \
    X(ATTPROJB, "attprojb", "h.{}.attn.c_proj.bias", 1, DIM_C, DIM_ONE, INIT_ZERO)            \
    X(LN2W, "ln2w", "h.{}.ln_2.weight", 1, DIM_C, DIM_ONE, INIT_ONE)                          \
    X(LN2B, "ln2b", "h.{}.ln_2.bias", 1, DIM_C, DIM_ONE, INIT_ZERO)                           \
    X(FCW, "fcw", "h.{}.mlp.c_fc.weight", 1, DIM_4C, DIM_C, INIT_NORMAL)                      \
    X(FCB, "fcb", "h.{}.mlp.c_fc.bias", 1, DIM_4C, DIM_ONE, INIT_ZERO)                        \
    X(FCPROJW, "fcprojw", "h.{}.mlp.c_proj.weight", 1, DIM_C, DIM_4C, INIT_RESIDUAL)          \
    X(FCPROJB, "fcprojb", "h.{}.mlp.c_proj.bias", 1, DIM_C, DIM_ONE, INIT_ZERO)               \
    X(LNFW, "lnfw", "ln_f.weight", 0, DIM_C, DIM_ONE, INIT_ONE)                               \
    X(LNFB, "lnfb", "ln_f.bias", 0, DIM_C, DIM_ONE, INIT_ZERO)

#define LLMC_SYMBOL(symbol, ...) P_##symbol,
enum { LLMC_PARAMS(LLMC_SYMBOL) PARAMS };
#undef LLMC_SYMBOL

typedef struct {
    const char *name, *hf_name;
    int stacked, rows, cols, init;
} ParamSpec;

extern const ParamSpec llmc_params[PARAMS];

int64_t param_layers(const llmc_config *c, int param); // 1, or the number of layers
int64_t param_rows(const llmc_config *c, int param);
int64_t param_cols(const llmc_config *c, int param);
static inline int64_t param_layer_size(const llmc_config *c, int param) { return param_rows(c, param) * param_cols(c, param); }
static inline int64_t param_size(const llmc_config *c, int param) { return param_layers(c, param) * param_layer_size(c, param); }
// Fills offset (PARAMS) with the first value of each tensor and returns the number of values in all.
int64_t param_offsets(const llmc_config *c, int64_t *offset);
// Whether the sizes describe a model at all.
int config_check(const llmc_config *c, llmc_error *err);

#endif
