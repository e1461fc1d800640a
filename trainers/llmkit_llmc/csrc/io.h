// Defines: AtomicFile (write beside, fsync, rename), read_exactly, file sizes: files of any length, 64-bit offsets.
#ifndef LLMC_IO_H
#define LLMC_IO_H

#include <stdint.h>
#include <stdio.h>

#include "error.h"

enum { HEADER_INTS = 256, HEADER_BYTES = 1024 };

typedef struct {
    FILE *file;
    char path[1024], beside[1040];
} AtomicFile;

int atomic_open(AtomicFile *f, const char *path, llmc_error *err);
int atomic_write(AtomicFile *f, const void *data, int64_t bytes, llmc_error *err);
int atomic_commit(AtomicFile *f, llmc_error *err); // the file appears, complete, under its name
void atomic_abandon(AtomicFile *f);                // nothing appears

FILE *open_for_reading(const char *path, int64_t *size, llmc_error *err); // NULL on failure
int read_exactly(FILE *file, const char *path, void *data, int64_t bytes, llmc_error *err);
int seek_to(FILE *file, const char *path, int64_t offset, llmc_error *err);
// Reads the 1024-byte header and checks its magic number.
int read_header(FILE *file, const char *path, int32_t *header, int32_t magic, const char *what, llmc_error *err);

#endif
