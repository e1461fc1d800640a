// Defines: the executable's output directory: main.log and checkpoints (model, states, DONE marker written last).
#ifndef LLMC_RUNDIR_H
#define LLMC_RUNDIR_H

#include "comm.h"
#include "state.h"

int rundir_make(const char *dir, llmc_error *err);
int rundir_newest(const char *dir); // step of the newest complete checkpoint, -1 without one
void rundir_model_path(char *path, int size, const char *dir, int step);
void rundir_state_path(char *path, int size, const char *dir, int step, int rank);
// All processes together. A failure of any leaves the checkpoints before it as they were.
int rundir_save(const char *dir, int step, const llmc_comm *comm, llmc_model *model, const llmc_state *state, llmc_error *err);
// Deletes complete checkpoints but the newest `keep` and multiples of `major` (0 = none are major).
void rundir_prune(const char *dir, int keep, int major, int ranks);
// Empties main.log, or, to resume, drops what belongs to steps from `step` on.
int rundir_log_begin(const char *dir, int step, llmc_error *err);
void rundir_log(const char *dir, const char *format, ...);

#endif
