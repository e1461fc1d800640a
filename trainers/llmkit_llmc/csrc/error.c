// Defines: llmc_set_error.
#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int llmc_set_error(llmc_error *err, const char *file, int line, const char *hint, const char *format, ...) {
    if (!err) return -1;
    va_list args;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    size_t used = strlen(err->text);
    if (hint[0] && used + 1 < sizeof err->text) snprintf(err->text + used, sizeof err->text - used, "; %s", hint);
    const char *slash = strrchr(file, '/');
    snprintf(err->where, sizeof err->where, "%s:%d", slash ? slash + 1 : file, line);
    return -1;
}
