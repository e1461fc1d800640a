// Defines: the executable: llm.c's training program on the CPU.
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "comm.h"
#include "loader.h"
#include "options.h"
#include "rundir.h"
#include "tokenizer.h"

static volatile sig_atomic_t stop_requested; // the one global: a signal handler has nothing else to write to
static void request_stop(int signal_number) {
    if (stop_requested) _exit(128 + signal_number);
    stop_requested = signal_number;
}

typedef struct {
    Settings s;
    llmc_comm comm;
    llmc_model *model;
    llmc_config config;
    Loader train, val;
    llmc_state state; // step, rounding seed and outlier windows; the loader's part is filled in for saving
    Tokenizer tokenizer;
    int micro_steps, steps, schedule, first_step;
    double peak; // FLOP/s of this process's threads
} Run;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

#define SAY(run, ...) do { if ((run)->comm.rank == 0) { printf(__VA_ARGS__); fflush(stdout); } } while (0)

static int load_model(Run *r, int resume_step, llmc_error *err) {
    const Settings *s = &r->s;
    int dtype = s->dtype[0] ? strcmp(s->dtype, "bf16") == 0 : llmc_default_dtype();
    llmc_options options = {.dtype = dtype, .threads = s->threads, .recompute = s->recompute, .master = s->master && dtype, .rank = r->comm.rank, .ranks = r->comm.ranks};
    int32_t stored;
    if (resume_step >= 0) {
        char path[1024];
        rundir_model_path(path, sizeof path, s->out, resume_step);
        LLMC_TRY(llmc_model_config(path, &r->config, &stored, err));
        if (stored != dtype) LLMC_FAIL(err, "add --dtype as the run began", "the run in %s is %s, but %s was asked for", s->out, stored ? "bf16" : "fp32", dtype ? "bf16" : "fp32");
        return llmc_model_read(path, &options, &r->model, err);
    }
    if (access(s->model, F_OK) == 0 || strstr(s->model, ".bin")) {
        LLMC_TRY(llmc_model_config(s->model, &r->config, &stored, err));
        return llmc_model_read(s->model, &options, &r->model, err);
    }
    LLMC_TRY(llmc_config_from_descriptor(s->model, s->vocab, &r->config, err));
    LLMC_TRY(llmc_model_new(&r->config, &options, &r->model, err));
    llmc_model_init(r->model, (uint32_t)s->seed);
    return 0;
}

static int resume(Run *r, int step, llmc_error *err) {
    char path[1024];
    rundir_state_path(path, sizeof path, r->s.out, step, r->comm.rank);
    if (access(path, F_OK) != 0) LLMC_FAIL(err, "resume with as many processes as it was saved with", "process %d of %d has no state file %s", r->comm.rank, r->comm.ranks, path);
    LLMC_TRY(llmc_state_read(r->model, &r->state, path, err));
    int failed = loader_restore(&r->train, &r->state, err);
    free(r->state.shard_order);
    free(r->state.sample_order);
    r->state.shard_order = r->state.sample_order = NULL;
    return failed;
}

static int plan(Run *r, llmc_error *err) {
    Settings *s = &r->s;
    int64_t micro = (int64_t)s->batch * s->length * r->comm.ranks;
    if (s->length > r->config.max_t)
        LLMC_FAIL(err, "lower -t", "a sequence length of %d is beyond the %d positions of the model", s->length, r->config.max_t);
    if (s->total_batch < 0) s->total_batch = (int)micro;
    if (s->total_batch % micro)
        LLMC_FAIL(err, "use a multiple", "-d %d is not a multiple of %d sequences x %d tokens x %d processes = %lld", s->total_batch, s->batch, s->length, r->comm.ranks, (long long)micro);
    r->micro_steps = (int)(s->total_batch / micro);
    r->steps = s->steps >= 0 ? s->steps : (int)(r->train.tokens / s->total_batch);
    if (s->val_batches < 0) s->val_batches = (int)((r->val.tokens - 1) / micro);
    for (r->schedule = 0; r->schedule < SCHEDULES && strcmp(schedule_names[r->schedule], s->schedule) != 0;) r->schedule++;
    if (r->schedule == SCHEDULES) LLMC_FAIL(err, "use cosine, linear, constant or wsd", "there is no schedule '%s'", s->schedule);
    return 0;
}

static int set_up(Run *r, llmc_error *err) {
    Settings *s = &r->s;
    int from = s->resume ? rundir_newest(s->out) : -1;
    LLMC_TRY(load_model(r, from, err));
    LLMC_TRY(loader_open(&r->train, s->train, s->batch, s->length, r->comm.rank, r->comm.ranks, !s->overfit, r->config.vocab, err));
    LLMC_TRY(loader_open(&r->val, s->val, s->batch, s->length, r->comm.rank, r->comm.ranks, 0, r->config.vocab, err));
    LLMC_TRY(plan(r, err));
    r->state.rng = 13371337u;
    if (from >= 0) LLMC_TRY(resume(r, from, err));
    r->first_step = r->state.step;
    if (s->out[0] && r->comm.rank == 0) {
        LLMC_TRY(rundir_make(s->out, err));
        LLMC_TRY(rundir_log_begin(s->out, r->state.step, err));
    }
    llmc_error ignored;
    if (tokenizer_open(&r->tokenizer, s->tokenizer, &ignored) != 0 && s->sample_every > 0) SAY(r, "no tokenizer (%s): samples are printed as numbers\n", ignored.text);
    if (s->hellaswag && access(s->hellaswag_file, F_OK) != 0) {
        SAY(r, "no HellaSwag file at %s: it is not evaluated (python -m llmkit_llmc.hellaswag writes one)\n", s->hellaswag_file);
        s->hellaswag = 0;
    }
    r->peak = llmc_machine_peak(s->threads, strcmp(s->dtype, "bf16") == 0 || (!s->dtype[0] && llmc_default_dtype()), 0.05);
    SAY(r, "%s | %lld parameters: %d layers, %d channels, %d heads, %d tokens | %d processes\n", llmc_build(), (long long)llmc_param_count(&r->config),
        r->config.layers, r->config.channels, r->config.heads, r->config.vocab, r->comm.ranks);
    SAY(r, "%d steps of %d tokens: %d x %d sequences of %d on each process%s\n", r->steps, s->total_batch, r->micro_steps, s->batch, s->length,
        from >= 0 ? ", resumed" : "");
    return 0;
}

static int validate(Run *r, llmc_error *err) {
    double sum = 0, mean;
    float *losses = malloc((size_t)r->s.batch * (size_t)r->s.length * sizeof *losses);
    int failed = losses ? loader_reset(&r->val, err) : llmc_set_error(err, __FILE__, __LINE__, "", "no memory to validate");
    for (int i = 0; !failed && i < r->s.val_batches; i++) {
        failed = loader_next(&r->val, err);
        if (!failed) failed = llmc_model_loss(r->model, r->val.inputs, r->val.targets, r->s.batch, r->s.length, losses, &mean, err);
        sum += mean;
    }
    free(losses);
    if (failed || r->s.val_batches == 0) return failed;
    double loss = llmc_comm_sum(&r->comm, sum / r->s.val_batches) / r->comm.ranks;
    SAY(r, "val loss %f\n", loss);
    if (r->comm.rank == 0 && r->s.out[0]) rundir_log(r->s.out, "s:%d tel:%.4f\n", r->state.step, loss);
    return 0;
}

static int hellaswag(Run *r, llmc_error *err) {
    int32_t correct, examples;
    LLMC_TRY(llmc_eval_run(r->s.hellaswag_file, r->model, r->s.batch, r->s.length, r->comm.rank, r->comm.ranks, &correct, &examples, err));
    double right = llmc_comm_sum(&r->comm, correct);
    SAY(r, "HellaSwag: %d/%d = %f\n", (int)right, examples, right / examples);
    if (r->comm.rank == 0 && r->s.out[0]) rundir_log(r->s.out, "s:%d eval:%.4f\n", r->state.step, right / examples);
    return 0;
}

static int sample(Run *r, llmc_error *err) {
    if (r->comm.rank != 0) return 0;
    int32_t *tokens = malloc((size_t)r->config.max_t * sizeof *tokens);
    if (!tokens) LLMC_FAIL(err, "", "no memory to sample");
    int64_t count = 0, total;
    for (const char *at = r->s.prompt; *at && count < r->config.max_t;) {
        char *end;
        tokens[count++] = (int32_t)strtol(at, &end, 10);
        at = *end == ',' ? end + 1 : end;
        if (end == at && *at) break; // not a number: the check in generate reports token 0 or the like
    }
    if (count == 0) tokens[count++] = r->tokenizer.end_of_text < r->config.vocab ? r->tokenizer.end_of_text : r->config.vocab - 1;
    total = count + r->s.sample_tokens < r->config.max_t ? count + r->s.sample_tokens : r->config.max_t;
    uint64_t rng = 1337;
    int failed = llmc_model_generate(r->model, tokens, count, total, r->s.temperature, r->s.top_k, &rng, err);
    if (!failed) {
        printf("generating:\n---\n");
        for (int64_t i = 0; i < total; i++) tokenizer_print(&r->tokenizer, tokens[i]);
        printf("\n---\n");
        fflush(stdout);
    }
    free(tokens);
    return failed;
}

static int save(Run *r, llmc_error *err) {
    loader_save(&r->train, &r->state);
    LLMC_TRY(rundir_save(r->s.out, r->state.step, &r->comm, r->model, &r->state, err));
    SAY(r, "saved step %d in %s\n", r->state.step, r->s.out);
    if (r->comm.rank == 0 && r->s.keep_last > 0) rundir_prune(r->s.out, r->s.keep_last, r->s.keep_every, r->comm.ranks);
    return 0;
}

static int gradients(Run *r, float scale, double *loss, llmc_error *err) {
    double sum = 0, mean;
    for (int i = 0; i < r->micro_steps; i++) {
        LLMC_TRY(loader_next(&r->train, err));
        LLMC_TRY(llmc_model_gradient(r->model, r->train.inputs, r->train.targets, r->s.batch, r->s.length, scale, i > 0, &mean, err));
        sum += mean;
    }
    *loss = llmc_comm_sum(&r->comm, sum / r->micro_steps) / r->comm.ranks;
    return llmc_comm_reduce_gradients(&r->comm, r->model, err);
}

// xorshift64*, as the seed of each update's rounding.
static uint32_t next_seed(uint64_t *rng) {
    *rng ^= *rng >> 12;
    *rng ^= *rng << 25;
    *rng ^= *rng >> 27;
    return (uint32_t)((*rng * 0x2545f4914f6cdd1dull) >> 32);
}

static int train_step(Run *r, llmc_error *err) {
    const Settings *s = &r->s;
    double began = now(), loss, square;
    int64_t count = llmc_param_count(&r->config), lo = count * r->comm.rank / r->comm.ranks, hi = count * (r->comm.rank + 1) / r->comm.ranks;
    float rate = schedule_rate(r->schedule, s->learning_rate, s->final_fraction, s->warmup, r->steps, r->state.step);
    float scale = 1.0f / ((float)s->batch * (float)s->length * (float)r->micro_steps * (float)r->comm.ranks);
    r->state.rng_last = r->state.rng;
    llmc_adamw how = {.learning_rate = rate, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = s->weight_decay, .step = r->state.step + 1,
                      .seed = next_seed(&r->state.rng), .grad_scale = 1.0f};
    // Inside the backward, where the update needs nothing but this batch's gradient.
    int fused = r->micro_steps == 1 && r->comm.ranks == 1 && s->grad_clip == 0 && s->skip_loss == 0 && s->skip_norm == 0;
    if (s->overfit) LLMC_TRY(loader_reset(&r->train, err));
    if (fused) {
        LLMC_TRY(loader_next(&r->train, err));
        LLMC_TRY(llmc_model_step(r->model, r->train.inputs, r->train.targets, s->batch, s->length, scale, &how, &loss, &square, err));
    } else {
        LLMC_TRY(gradients(r, scale, &loss, err));
        square = llmc_comm_sum(&r->comm, llmc_model_grad_square(r->model, lo, hi));
    }
    double norm = sqrt(square);
    if (!isfinite(loss) || !isfinite(norm))
        LLMC_FAIL(err, "try a lower learning rate -l or more warm-up -u", "the %s is %f at step %d", isfinite(loss) ? "gradient norm" : "loss", isfinite(loss) ? norm : loss, r->state.step);
    double z_loss = llmc_outliers_add(&r->state.loss, loss), z_norm = llmc_outliers_add(&r->state.norm, norm);
    int skip = (s->skip_loss != 0 && z_loss > s->skip_loss) || (s->skip_norm != 0 && z_norm > s->skip_norm); // NaN is not above
    if (skip) SAY(r, "skipping the update: z-scores %.2f (loss), %.2f (gradient norm)\n", z_loss, z_norm);
    else if (!fused) {
        if (s->grad_clip > 0 && norm > s->grad_clip) how.grad_scale = (float)(s->grad_clip / norm);
        LLMC_TRY(llmc_model_update(r->model, &how, err));
        LLMC_TRY(llmc_comm_gather_params(&r->comm, r->model, err));
    }
    double seconds = now() - began, tokens = (double)s->total_batch, work = 6.0 * (double)count + 6.0 * r->config.layers * r->config.channels * s->length;
    SAY(r, "step %4d/%d | loss %7.6f (%+.2fz)| norm %6.4f (%+.2fz)| lr %.2e | %.2f ms | %.1f%% MFU | %.0f tok/s\n", r->state.step + 1, r->steps, loss, z_loss, norm,
        z_norm, (double)rate, seconds * 1e3, 100 * work * tokens / seconds / (r->peak * r->comm.ranks), tokens / seconds);
    if (r->comm.rank == 0 && s->out[0]) rundir_log(s->out, "s:%d trl:%.4f lr:%.6f norm:%.2f\n", r->state.step, loss, (double)rate, norm);
    r->state.step++;
    return 0;
}

static int due(int step, int every, int last) { return last || (every > 0 && step % every == 0); }

static int train(Run *r, llmc_error *err) {
    const Settings *s = &r->s;
    for (;;) {
        int step = r->state.step, last = step >= r->steps, fresh = step > r->first_step, stop = llmc_comm_max(&r->comm, stop_requested);
        if (due(step, s->val_every, last) && (fresh || step == 0)) {
            LLMC_TRY(validate(r, err));
            if (s->hellaswag && step > 0) LLMC_TRY(hellaswag(r, err));
        }
        if (s->sample_every > 0 && step > 0 && fresh && due(step, s->sample_every, last)) LLMC_TRY(sample(r, err));
        if (s->checkpoint_every > 0 && s->out[0] && fresh && (stop || due(step, s->checkpoint_every, last))) LLMC_TRY(save(r, err));
        if (last || stop) return 0;
        LLMC_TRY(train_step(r, err));
    }
}

int main(int argc, char **argv) {
    Run r = {.model = NULL};
    llmc_error err = {.text = ""};
    int parsed = settings_parse(&r.s, argc, argv, 0, &err);
    if (parsed > 0) {
        settings_help(argv[0]);
        return 0;
    }
    if (parsed < 0) {
        fprintf(stderr, "llmc: %s\n", err.text);
        return 2;
    }
    signal(SIGINT, request_stop);
    signal(SIGTERM, request_stop);
    int failed = llmc_comm_open(&r.comm, &err);
    if (!failed && r.comm.rank == 0) failed = settings_parse(&r.s, argc, argv, 1, &err);
    if (!failed) failed = set_up(&r, &err);
    if (!failed) failed = train(&r, &err);
    if (failed) fprintf(stderr, "llmc: %s [%s]\n", err.text, err.where);
    if (failed && r.comm.ranks > 1) llmc_comm_abort();
    loader_close(&r.train);
    loader_close(&r.val);
    tokenizer_close(&r.tokenizer);
    llmc_model_free(r.model);
    llmc_comm_close();
    return failed ? 1 : stop_requested ? 128 + stop_requested : 0;
}
