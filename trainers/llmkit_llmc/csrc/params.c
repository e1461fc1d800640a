// Defines: the table of parameters, sizes derived from it, and the named model sizes.
#include "params.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LLMC_SPEC(symbol, name, hf_name, stacked, rows, cols, init) {name, hf_name, stacked, rows, cols, init},
const ParamSpec llmc_params[PARAMS] = {LLMC_PARAMS(LLMC_SPEC)};

static int64_t dim(const llmc_config *c, int code) {
    switch (code) {
    case DIM_C: return c->channels;
    case DIM_3C: return 3 * (int64_t)c->channels;
    case DIM_4C: return 4 * (int64_t)c->channels;
    case DIM_VOCAB: return c->padded_vocab;
    case DIM_POSITIONS: return c->max_t;
    default: return 1;
    }
}

int64_t param_layers(const llmc_config *c, int param) { return llmc_params[param].stacked ? c->layers : 1; }
int64_t param_rows(const llmc_config *c, int param) { return dim(c, llmc_params[param].rows); }
int64_t param_cols(const llmc_config *c, int param) { return dim(c, llmc_params[param].cols); }

int64_t param_offsets(const llmc_config *c, int64_t *offset) {
    int64_t total = 0;
    for (int i = 0; i < PARAMS; i++) {
        if (offset) offset[i] = total;
        total += param_size(c, i);
    }
    return total;
}

int64_t llmc_param_count(const llmc_config *c) { return param_offsets(c, NULL); }

int llmc_param_info(const llmc_config *c, int param, llmc_param *out) {
    if (param < 0 || param >= PARAMS) return -1;
    int64_t offset[PARAMS];
    param_offsets(c, offset);
    const ParamSpec *spec = &llmc_params[param];
    *out = (llmc_param){.name = spec->name, .hf_name = spec->hf_name, .offset = offset[param], .layers = param_layers(c, param),
                        .rows = param_rows(c, param), .cols = param_cols(c, param), .stacked = spec->stacked,
                        .decayed = spec->cols != DIM_ONE, .hf_transposed = spec->stacked && spec->cols != DIM_ONE};
    return 0;
}

int config_check(const llmc_config *c, llmc_error *err) {
    if (c->max_t < 1 || c->vocab < 1 || c->layers < 1 || c->heads < 1 || c->channels < 1)
        LLMC_FAIL(err, "every size must be at least 1", "a model of %d layers, %d heads, %d channels, %d positions and %d tokens cannot be",
                  c->layers, c->heads, c->channels, c->max_t, c->vocab);
    if (c->channels % c->heads != 0)
        LLMC_FAIL(err, "choose sizes that divide", "%d channels do not divide into %d heads", c->channels, c->heads);
    if (c->padded_vocab < c->vocab)
        LLMC_FAIL(err, "the file is damaged", "the padded vocabulary (%d) is smaller than the vocabulary (%d)", c->padded_vocab, c->vocab);
    if (c->max_t > 1 << 24 || c->vocab > 1 << 28 || c->padded_vocab > 1 << 28 || c->layers > 1 << 16 || c->channels > 1 << 20)
        LLMC_FAIL(err, "the file is damaged", "a model of %d layers, %d channels, %d positions and %d tokens is too large", c->layers,
                  c->channels, c->max_t, c->vocab);
    return 0;
}

typedef struct {
    int layers, channels, heads;
} Size;

static const Size gpt2_sizes[] = {{6, 384, 6},    {12, 768, 12},  {24, 1024, 16}, {36, 1280, 20},
                                  {48, 1600, 25}, {60, 1920, 30}, {72, 2880, 30}, {84, 3456, 36}};
static const Size gpt3_sizes[] = {{6, 384, 6},    {12, 768, 12},  {24, 1024, 16}, {24, 1536, 16},  {24, 2048, 16},
                                  {32, 2560, 32}, {32, 4096, 32}, {96, 12288, 96}};

// The 13B size of the GPT-3 paper (5140 channels, heads of 128) is left out: 128 does not divide 5140.
int llmc_config_from_descriptor(const char *text, int vocab, llmc_config *out, llmc_error *err) {
    int gpt3 = strncmp(text, "gpt3:c", 6) == 0;
    const char *digits = gpt3 || strncmp(text, "gpt2:d", 6) == 0 ? text + 6 : text + 1;
    char *end;
    long number = strtol(digits, &end, 10);
    if ((text[0] != 'd' && digits == text + 1) || end == digits || *end)
        LLMC_FAIL(err, "give a .bin file, or dN, gpt2:dN (layers) or gpt3:cN (channels)", "'%s' does not describe a model", text);
    const Size *sizes = gpt3 ? gpt3_sizes : gpt2_sizes;
    int n = (int)(gpt3 ? sizeof gpt3_sizes / sizeof *gpt3_sizes : sizeof gpt2_sizes / sizeof *gpt2_sizes);
    char known[128] = "";
    for (int i = 0; i < n; i++) {
        int key = gpt3 ? sizes[i].channels : sizes[i].layers;
        if (key == number) {
            *out = (llmc_config){.max_t = gpt3 ? 2048 : 1024, .vocab = vocab, .padded_vocab = llmc_padded_vocab(vocab),
                                 .layers = sizes[i].layers, .heads = sizes[i].heads, .channels = sizes[i].channels};
            return config_check(out, err);
        }
        snprintf(known + strlen(known), sizeof known - strlen(known), "%s%d", i ? ", " : "", key);
    }
    char hint[192];
    snprintf(hint, sizeof hint, "known %s are %s", gpt3 ? "widths" : "depths", known);
    LLMC_FAIL(err, hint, "there is no %s of %ld", gpt3 ? "GPT-3 width" : "GPT-2 depth", number);
}

int llmc_padded_vocab(int vocab) { return (vocab + 127) / 128 * 128; }
