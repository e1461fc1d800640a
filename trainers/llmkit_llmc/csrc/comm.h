// Defines: llmc_comm: the processes of a run, over MPI; without MPI there is exactly one.
// Data parallel with ZeRO-1 (Rajbhandari et al. 2020): each process sums the gradients of its share, updates it and
// hands the new weights to the others, so replicas are copies and cannot drift apart.
#ifndef LLMC_COMM_H
#define LLMC_COMM_H

#include "llmc.h"

typedef struct {
    int rank, ranks;
} llmc_comm;

int llmc_comm_open(llmc_comm *comm, llmc_error *err); // starts MPI
void llmc_comm_close(void);
void llmc_comm_abort(void); // ends all processes at once, after one failed
// Replaces this process's share of the gradients by their sum over all processes, added in the order of ranks.
int llmc_comm_reduce_gradients(const llmc_comm *comm, llmc_model *model, llmc_error *err);
int llmc_comm_gather_params(const llmc_comm *comm, llmc_model *model, llmc_error *err);
double llmc_comm_sum(const llmc_comm *comm, double value); // in the order of ranks: the same bits everywhere
int llmc_comm_max(const llmc_comm *comm, int value);
void llmc_comm_barrier(const llmc_comm *comm);
void llmc_comm_broadcast(const llmc_comm *comm, void *data, int bytes); // from rank 0

#endif
