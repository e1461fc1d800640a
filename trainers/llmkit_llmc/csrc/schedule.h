// Defines: learning-rate schedules, and the window that finds outliers.
#ifndef LLMC_SCHEDULE_H
#define LLMC_SCHEDULE_H

#include <stdint.h>

enum { SCHEDULE_COSINE, SCHEDULE_LINEAR, SCHEDULE_CONSTANT, SCHEDULE_WSD, SCHEDULES };
extern const char *const schedule_names[SCHEDULES];

// Learning rate of step `step` (from 0) of `steps`; `last` is the final fraction of `peak`.
float schedule_rate(int kind, float peak, float last, int warmup, int steps, int step);

enum { OUTLIER_WINDOW = 128 };
typedef struct {
    double values[OUTLIER_WINDOW];
    int32_t count, next; // values there, and the one to replace next once all are there
} llmc_outliers;

// Adds a value and returns its z-score among the last 128, NaN until there are as many.
double llmc_outliers_add(llmc_outliers *window, double value);

#endif
