// Defines: settings_parse, settings_help: llm.c's letters, a readable name for each, and what llm.c lacks.
#include "options.h"

#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEXT, INT, FLOAT, IGNORED };

typedef struct {
    const char *letter, *name;
    int type;
    size_t field;
    const char *initial, *help;
} Flag;

#define FIELD(name) offsetof(Settings, name)
static const Flag flags[] = {
    {"-i", "--train", TEXT, FIELD(train), "dev/data/tinyshakespeare/tiny_shakespeare_train.bin", "training shards: a path or a quoted pattern"},
    {"-j", "--val", TEXT, FIELD(val), "dev/data/tinyshakespeare/tiny_shakespeare_val.bin", "validation shards"},
    {"-e", "--model", TEXT, FIELD(model), "gpt2_124M_bf16.bin", "a model .bin, or dN, gpt2:dN, gpt3:cN for random values"},
    {"-o", "--out", TEXT, FIELD(out), "", "directory of main.log and checkpoints"},
    {"-n", "--checkpoint-every", INT, FIELD(checkpoint_every), "0", "save every N steps and at the end; 0 never"},
    {"-nk", "--keep-last", INT, FIELD(keep_last), "0", "checkpoints kept; 0 all"},
    {"-nm", "--keep-every", INT, FIELD(keep_every), "0", "never delete the checkpoints of multiples of N steps"},
    {"-y", "--resume", INT, FIELD(resume), "0", "1 goes on from the newest checkpoint in the output directory"},
    {"-b", "--batch-size", INT, FIELD(batch), "4", "sequences in a micro-batch of one process"},
    {"-t", "--sequence-length", INT, FIELD(length), "1024", "tokens in a sequence"},
    {"-d", "--total-batch-tokens", INT, FIELD(total_batch), "-1", "tokens in a step; -1 one micro-batch of each process"},
    {"-x", "--steps", INT, FIELD(steps), "-1", "optimiser steps; -1 one pass over the data"},
    {"-k", "--schedule", TEXT, FIELD(schedule), "cosine", "cosine, linear, constant or wsd"},
    {"-l", "--learning-rate", FLOAT, FIELD(learning_rate), "3e-4", "peak learning rate"},
    {"-u", "--warmup-steps", INT, FIELD(warmup), "0", "steps of linear warm-up"},
    {"-q", "--final-lr-fraction", FLOAT, FIELD(final_fraction), "1.0", "final learning rate, as a fraction of the peak"},
    {"-c", "--weight-decay", FLOAT, FIELD(weight_decay), "0.0", "decay of matrices and embeddings"},
    {"-sl", "--skip-loss", FLOAT, FIELD(skip_loss), "0", "skip an update whose loss has a z-score above this; 0 never"},
    {"-sg", "--skip-norm", FLOAT, FIELD(skip_norm), "0", "the same for the gradient norm"},
    {"-v", "--val-every", INT, FIELD(val_every), "20", "validate every N steps and at the end; 0 only at the end"},
    {"-m", "--val-batches", INT, FIELD(val_batches), "20", "batches in a validation; -1 all"},
    {"-s", "--sample-every", INT, FIELD(sample_every), "20", "sample every N steps and at the end; 0 never"},
    {"-g", "--sample-tokens", INT, FIELD(sample_tokens), "64", "tokens in a sample"},
    {"-h", "--hellaswag", INT, FIELD(hellaswag), "0", "1 evaluates HellaSwag with each validation"},
    {"-a", "--overfit", INT, FIELD(overfit), "0", "1 trains on the first batch only"},
    {"-w", "--master-weights", INT, FIELD(master), "1", "with bf16: 1 keeps float weights for the optimiser"},
    {"-z", "--zero", INT, FIELD(zero), "0", "accepted: several processes always share the optimiser state (ZeRO-1)"},
    {"-r", "--recompute", INT, FIELD(recompute), "1", "in the backward: 0 nothing, 1 GELU, 2 GELU and LayerNorm"},
    {"", "--hellaswag-file", TEXT, FIELD(hellaswag_file), "dev/data/hellaswag/hellaswag_val.bin", "eval .bin of -h"},
    {"", "--tokenizer", TEXT, FIELD(tokenizer), "gpt2_tokenizer.bin", "tokenizer .bin that samples are printed with"},
    {"", "--prompt", TEXT, FIELD(prompt), "", "token ids that a sample begins with, as 464,3290; none: end-of-text"},
    {"", "--temperature", FLOAT, FIELD(temperature), "1.0", "of samples; 0 takes the likeliest token"},
    {"", "--top-k", INT, FIELD(top_k), "0", "sample among the K likeliest tokens; 0 all"},
    {"", "--dtype", TEXT, FIELD(dtype), "", "fp32 or bf16; default: bf16 where the machine has instructions for it"},
    {"", "--vocab", INT, FIELD(vocab), "50257", "vocabulary of a model made from a name"},
    {"", "--seed", INT, FIELD(seed), "42", "of the random values of a new model"},
    {"", "--grad-clip", FLOAT, FIELD(grad_clip), "1.0", "largest gradient norm; 0 does not clip"},
    {"", "--threads", INT, FIELD(threads), "0", "threads of each process; 0 all"},
    {"-lg", "", IGNORED, 0, "", "GPU information"},
    {"-f", "", IGNORED, 0, "", "TF32"},
    {"-ge", "", IGNORED, 0, "", "GELU fusion"},
    {"-pn", "", IGNORED, 0, "", "processes: mpirun -np says how many"},
    {"-pr", "", IGNORED, 0, "", "rank: mpirun sets it"},
    {"-pg", "", IGNORED, 0, "", "GPUs per node"},
    {"-pi", "", IGNORED, 0, "", "NCCL initialisation"},
    {"-pm", "", IGNORED, 0, "", "NCCL initialisation"},
    {"-ps", "", IGNORED, 0, "", "server address for NCCL"},
    {"-pf", "", IGNORED, 0, "", "file system path for NCCL"},
    {"-pp", "", IGNORED, 0, "", "file system path for NCCL"},
};
enum { FLAGS = sizeof flags / sizeof *flags };

static int assign(Settings *s, const Flag *f, const char *value, llmc_error *err) {
    char *end = (char *)"";
    void *field = (char *)s + f->field;
    const char *name = f->name[0] ? f->name : f->letter;
    if (f->type == TEXT) *(const char **)field = value;
    if (f->type == INT) {
        long number = strtol(value, &end, 10);
        if (end == value || *end || number < INT_MIN || number > INT_MAX) LLMC_FAIL(err, "", "%s takes a whole number, not '%s'", name, value);
        *(int *)field = (int)number;
    }
    if (f->type == FLOAT) {
        float number = strtof(value, &end);
        if (end == value || *end || !isfinite(number)) LLMC_FAIL(err, "", "%s takes a number, not '%s'", name, value);
        *(float *)field = number;
    }
    return 0;
}

static int check(const Settings *s, llmc_error *err) {
    const struct { const char *name; int value, least; } bounds[] = {
        {"-b", s->batch, 1}, {"-t", s->length, 1}, {"-x", s->steps, -1}, {"-n", s->checkpoint_every, 0}, {"-nk", s->keep_last, 0}, {"-nm", s->keep_every, 0},
        {"-u", s->warmup, 0}, {"-v", s->val_every, 0}, {"-m", s->val_batches, -1}, {"-s", s->sample_every, 0}, {"-g", s->sample_tokens, 1},
        {"-r", s->recompute, 0}, {"--threads", s->threads, 0}, {"--vocab", s->vocab, 1}, {"--top-k", s->top_k, 0}, {"-z", s->zero, 0},
    };
    for (size_t i = 0; i < sizeof bounds / sizeof *bounds; i++)
        if (bounds[i].value < bounds[i].least) LLMC_FAIL(err, "", "%s is %d, but must be at least %d", bounds[i].name, bounds[i].value, bounds[i].least);
    if (s->recompute > 2) LLMC_FAIL(err, "", "-r is %d, but must be 0, 1 or 2", s->recompute);
    if (s->zero > 1) LLMC_FAIL(err, "use -z 1", "-z is %d, but only ZeRO stage 1 exists here", s->zero);
    if (s->learning_rate < 0 || s->final_fraction < 0 || s->weight_decay < 0 || s->temperature < 0 || s->grad_clip < 0)
        LLMC_FAIL(err, "", "-l, -q, -c, --temperature and --grad-clip cannot be negative");
    if (s->dtype[0] && strcmp(s->dtype, "fp32") != 0 && strcmp(s->dtype, "bf16") != 0) LLMC_FAIL(err, "", "--dtype is '%s', but must be fp32 or bf16", s->dtype);
    if (s->resume && !s->out[0]) LLMC_FAIL(err, "name the directory of the run with -o", "-y 1 has nothing to resume");
    return 0;
}

int settings_parse(Settings *s, int argc, char **argv, int notes, llmc_error *err) {
    for (int i = 0; i < FLAGS; i++)
        if (flags[i].type != IGNORED) LLMC_TRY(assign(s, &flags[i], flags[i].initial, err));
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0) return 1;
        const Flag *f = NULL;
        for (int j = 0; j < FLAGS; j++)
            if ((flags[j].letter[0] && strcmp(argv[i], flags[j].letter) == 0) || (flags[j].name[0] && strcmp(argv[i], flags[j].name) == 0)) f = &flags[j];
        if (!f) LLMC_FAIL(err, "--help lists the options", "there is no option %s", argv[i]);
        if (i + 1 == argc) LLMC_FAIL(err, "--help lists the options", "%s needs a value", argv[i]);
        if (f->type == IGNORED) {
            if (notes) fprintf(stderr, "llmc: %s (%s) means nothing on a CPU and is ignored\n", f->letter, f->help);
            i++;
        } else {
            LLMC_TRY(assign(s, f, argv[++i], err));
        }
    }
    return check(s, err);
}

void settings_help(const char *program) {
    printf("usage: %s [OPTION VALUE]...\n\nTrains GPT-2 or GPT-3 on the CPU; llm.c's options under its letters, and some more.\n\n", program);
    for (int i = 0; i < FLAGS; i++)
        if (flags[i].type != IGNORED)
            printf("  %-4s %-22s %s%s%s%s\n", flags[i].letter, flags[i].name, flags[i].help, flags[i].initial[0] ? " (" : "", flags[i].initial, flags[i].initial[0] ? ")" : "");
    printf("\nAccepted and ignored, since they mean nothing on a CPU: -lg -f -ge -pn -pr -pg -pi -pm -ps -pf -pp\n");
}
