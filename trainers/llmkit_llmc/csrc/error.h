// Defines: Error, LLMC_FAIL, LLMC_TRY. How the library reports what went wrong: it never prints and never exits.
#ifndef LLMC_ERROR_H
#define LLMC_ERROR_H

typedef struct llmc_error {
    char text[768]; // one sentence: what was wrong, and after it what to do
    char where[64]; // file:line that noticed it
} llmc_error;

#if defined(__GNUC__)
__attribute__((format(printf, 5, 6)))
#endif
int llmc_set_error(llmc_error *err, const char *file, int line, const char *hint, const char *format, ...);

// Records an error and returns -1 from the calling function. HINT says what the user can do about it ("" for nothing).
#define LLMC_FAIL(err, hint, ...) return llmc_set_error(err, __FILE__, __LINE__, hint, __VA_ARGS__)

// Calls a function that returns 0 on success; passes its failure on.
#define LLMC_TRY(call) do { if ((call) != 0) return -1; } while (0)

#endif
