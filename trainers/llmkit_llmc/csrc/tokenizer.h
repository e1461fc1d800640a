// Defines: Tokenizer: the bytes of each token, to print samples.
#ifndef LLMC_TOKENIZER_H
#define LLMC_TOKENIZER_H

#include <stdint.h>

#include "error.h"

typedef struct {
    int count, end_of_text;
    unsigned char *bytes; // the file's body: for each token its length, then its bytes
    int64_t *start;       // (count) places of the lengths in `bytes`
} Tokenizer;

int tokenizer_open(Tokenizer *t, const char *path, llmc_error *err);
void tokenizer_close(Tokenizer *t);
void tokenizer_print(const Tokenizer *t, int token); // to stdout; without a file, the number

#endif
