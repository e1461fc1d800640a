// Defines: Tokenizer.
#include "tokenizer.h"

#include <stdio.h>
#include <stdlib.h>

#include "io.h"

enum { TOKENIZER_MAGIC = 20240328, GPT2_END = 50256 };

static int read_body(Tokenizer *t, FILE *file, const char *path, int64_t size, llmc_error *err) {
    int32_t h[HEADER_INTS];
    LLMC_TRY(read_header(file, path, h, TOKENIZER_MAGIC, "a tokenizer file", err));
    if (h[1] != 1 && h[1] != 2) LLMC_FAIL(err, "", "%s is a tokenizer file of version %d", path, h[1]);
    t->count = h[2];
    t->end_of_text = h[1] == 2 ? h[3] : GPT2_END; // version 1 had only GPT-2's
    int64_t length = size - HEADER_BYTES, at = 0;
    if (t->count < 1 || t->count > length) LLMC_FAIL(err, "write it again", "%s is damaged: %d tokens", path, t->count);
    t->bytes = malloc((size_t)length);
    t->start = malloc((size_t)t->count * sizeof *t->start);
    if (!t->bytes || !t->start) LLMC_FAIL(err, "", "no memory for %s", path);
    LLMC_TRY(read_exactly(file, path, t->bytes, length, err));
    for (int i = 0; i < t->count; i++) {
        if (at >= length || at + 1 + t->bytes[at] > length) LLMC_FAIL(err, "write it again", "%s is truncated at token %d", path, i);
        t->start[i] = at;
        at += 1 + t->bytes[at];
    }
    return 0;
}

int tokenizer_open(Tokenizer *t, const char *path, llmc_error *err) {
    int64_t size;
    *t = (Tokenizer){.end_of_text = GPT2_END};
    FILE *file = open_for_reading(path, &size, err);
    if (!file) return -1;
    int failed = read_body(t, file, path, size, err);
    fclose(file);
    if (failed) tokenizer_close(t);
    return failed;
}

void tokenizer_close(Tokenizer *t) {
    free(t->bytes);
    free(t->start);
    *t = (Tokenizer){.end_of_text = GPT2_END};
}

void tokenizer_print(const Tokenizer *t, int token) {
    if (token < 0 || token >= t->count) {
        printf("%d ", token);
        return;
    }
    const unsigned char *entry = t->bytes + t->start[token];
    for (int i = 1; i <= entry[0]; i++)
        if (entry[i] >= 32 || entry[i] == '\n' || entry[i] == '\t') putchar(entry[i]); // control bytes could upset a terminal
}
