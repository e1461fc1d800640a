// Defines: llmc_model_step: forward, backward and AdamW in one, without ever holding the gradients of the weight matrices.
#include "step.h"

#include <stdlib.h>
#include <string.h>

#include "parallel.h"

static int is_layer_matrix(int param) { return llmc_params[param].stacked && llmc_params[param].cols != DIM_ONE; }

void fused_step_free(FusedStep *s) {
    if (!s) return;
    llmc_release(s->grads.values);
    llmc_release(s->rows.grads);
    free(s->rows.token);
    free(s->rows.slot);
    free(s->slots);
    free(s->squares);
    free(s);
}

UpdateSink step_sink(FusedStep *s, int param, int64_t layer) {
    const llmc_config *c = &s->model->config;
    memset(s->squares, 0, (size_t)param_rows(c, param) * sizeof *s->squares);
    return update_sink(s->model, adamw_of(s->how, param), s->model->offset[param] + layer * param_layer_size(c, param), param_cols(c, param),
                       param == P_WTE ? &s->rows : NULL, s->squares);
}

void step_taken(FusedStep *s, int param) {
    for (int64_t i = 0; i < param_rows(&s->model->config, param); i++) s->square += s->squares[i];
}

// Memory for batches of N tokens; it is kept from step to step.
static int prepare(llmc_model *m, int64_t N, llmc_error *err) {
    const llmc_config *c = &m->config;
    int wte_stored = model_chunk(m, N, 1) < N;
    FusedStep *s = m->step;
    if (s && s->tokens_room >= N && (s->grads.offset[P_WTE] >= 0) == wte_stored) return 0;
    fused_step_free(s);
    s = m->step = calloc(1, sizeof *s);
    if (!s) LLMC_FAIL(err, "", "no memory");
    s->model = m;
    for (int i = 0; i < PARAMS; i++) {
        int stored = i == P_WTE ? wte_stored : !is_layer_matrix(i);
        s->grads.offset[i] = stored ? s->stored : -1;
        if (stored) s->stored += param_size(c, i);
    }
    s->grads.update = s;
    s->grads.values = llmc_alloc((size_t)s->stored * sizeof(float));
    int64_t rows = c->padded_vocab > 4 * (int64_t)c->channels ? c->padded_vocab : 4 * (int64_t)c->channels; // of the tallest matrix
    s->squares = malloc((size_t)rows * sizeof *s->squares);
    s->tokens_room = N;
    s->rows.grads = llmc_alloc(wte_stored ? 0 : (size_t)(N * c->channels) * sizeof(float));
    s->rows.token = malloc((size_t)N * sizeof *s->rows.token);
    s->rows.slot = malloc((size_t)c->padded_vocab * sizeof *s->rows.slot);
    s->slots = malloc((size_t)N * sizeof *s->slots);
    if (!s->grads.values || !s->squares || !s->rows.grads || !s->rows.token || !s->rows.slot || !s->slots) {
        fused_step_free(s);
        m->step = NULL;
        LLMC_FAIL(err, "use a smaller batch or model", "no memory for the step");
    }
    return 0;
}

static void find_tokens(FusedStep *s, const int *inputs, int64_t N) {
    TokenRows *rows = &s->rows;
    rows->count = 0;
    for (int64_t i = 0; i < s->model->config.padded_vocab; i++) rows->slot[i] = -1;
    for (int64_t n = 0; n < N; n++) {
        if (rows->slot[inputs[n]] < 0) {
            rows->token[rows->count] = inputs[n];
            rows->slot[inputs[n]] = (int32_t)rows->count++;
        }
        s->slots[n] = rows->slot[inputs[n]];
    }
}

// The tensors whose gradients were stored.
static void update_stored(FusedStep *s) {
    const llmc_config *c = &s->model->config;
    for (int i = 0; i < PARAMS; i++) {
        if (s->grads.offset[i] < 0) continue;
        int64_t lo, hi;
        const AdamW how = adamw_of(s->how, i);
        parallel_range(param_size(c, i), 16, &lo, &hi);
        adamw_block(s->model, &how, s->grads.values + s->grads.offset[i] + lo, 0, s->model->offset[i] + lo, 0, 1, hi - lo);
    }
}

// The rows of wte that the products did not update: the batch's tokens, and the padding, whose gradient is 0.
static void update_token_rows(FusedStep *s) {
    const llmc_config *c = &s->model->config;
    int64_t C = c->channels, wte = s->model->offset[P_WTE], lo, hi;
    const AdamW how = adamw_of(s->how, P_WTE);
    parallel_range(s->rows.count, 1, &lo, &hi);
    for (int64_t i = lo; i < hi; i++) adamw_block(s->model, &how, s->rows.grads + i * C, 0, wte + s->rows.token[i] * C, 0, 1, C);
    parallel_range(c->padded_vocab - c->vocab, 1, &lo, &hi);
    adamw_block(s->model, &how, NULL, 0, wte + (c->vocab + lo) * C, C, hi - lo, C);
}

int llmc_model_step(llmc_model *m, const int32_t *inputs, const int32_t *targets, int64_t B, int64_t T, float scale, const llmc_adamw *how, double *mean,
                    double *grad_square, llmc_error *err) {
    if (m->options.ranks > 1) LLMC_FAIL(err, "compute gradients, exchange them and update", "one of several processes cannot update before it has the others' gradients");
    LLMC_TRY(model_check_tokens(m, inputs, B, T, err));
    LLMC_TRY(model_check_tokens(m, targets, B, T, err)); // before anything is updated
    LLMC_TRY(model_optimizer_memory(m, err));
    LLMC_TRY(prepare(m, B * T, err));
    FusedStep *s = m->step;
    s->how = how;
    s->square = 0;
    find_tokens(s, inputs, B * T);
    LLMC_TRY(model_backward(m, inputs, targets, B, T, scale, 0, &s->grads, mean, err));
    *grad_square = s->square + sum_squares(s->grads.values, s->stored, m->options.threads);
    int fused_wte = s->grads.offset[P_WTE] < 0;
    if (fused_wte) *grad_square += sum_squares(s->rows.grads, s->rows.count * m->config.channels, m->options.threads);
    LLMC_PARALLEL(m->options.threads) {
        update_stored(s);
        if (fused_wte) update_token_rows(s);
    }
    return 0;
}
