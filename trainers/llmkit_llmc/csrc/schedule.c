// Defines: schedule_rate, llmc_outliers_add.
#include "schedule.h"

#include <math.h>

const char *const schedule_names[SCHEDULES] = {"cosine", "linear", "constant", "wsd"};

float schedule_rate(int kind, float peak, float last, int warmup, int steps, int step) {
    if (kind != SCHEDULE_CONSTANT && step < warmup) return peak * (float)(step + 1) / (float)warmup;
    float low = peak * last, done = steps > warmup ? (float)(step - warmup) / (float)(steps - warmup) : 1.0f;
    if (kind == SCHEDULE_COSINE) return low + 0.5f * (1.0f + cosf(3.14159265f * done)) * (peak - low);
    if (kind == SCHEDULE_LINEAR) return peak - done * (peak - low);
    if (kind == SCHEDULE_WSD) { // warm-up, stable, decay: 1 - sqrt(x) over the last 20% (Hagele et al. 2024)
        int begin = (int)(0.8f * (float)steps);
        if (step >= begin && steps > begin) return low + (1.0f - sqrtf((float)(step - begin) / (float)(steps - begin))) * (peak - low);
    }
    return peak;
}

double llmc_outliers_add(llmc_outliers *w, double value) {
    if (w->count < OUTLIER_WINDOW) {
        w->values[w->count++] = value;
        return NAN;
    }
    w->values[w->next] = value;
    w->next = (w->next + 1) % OUTLIER_WINDOW;
    double mean = 0, square = 0; // from the whole window each time: running sums would drift
    for (int i = 0; i < OUTLIER_WINDOW; i++) mean += w->values[i] / OUTLIER_WINDOW;
    for (int i = 0; i < OUTLIER_WINDOW; i++) square += (w->values[i] - mean) * (w->values[i] - mean) / OUTLIER_WINDOW;
    return square > 0 ? (value - mean) / sqrt(square) : 0.0;
}
