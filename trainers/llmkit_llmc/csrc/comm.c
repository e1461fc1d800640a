// Defines: the processes of a run.
#include "comm.h"

#include <stdlib.h>

#include "model.h"

#ifdef LLMC_MPI
#include <mpi.h>

enum { PIECE = 1 << 20 }; // values exchanged at a time: bounds the extra memory to 4 MB per process

int llmc_comm_open(llmc_comm *comm, llmc_error *err) {
    int started = 0;
    MPI_Initialized(&started);
    if (!started && MPI_Init(NULL, NULL) != MPI_SUCCESS) LLMC_FAIL(err, "start the program with mpirun", "MPI could not be started");
    MPI_Comm_rank(MPI_COMM_WORLD, &comm->rank);
    MPI_Comm_size(MPI_COMM_WORLD, &comm->ranks);
    return 0;
}

void llmc_comm_close(void) { MPI_Finalize(); }
void llmc_comm_abort(void) { MPI_Abort(MPI_COMM_WORLD, 1); }

static int64_t share_start(const llmc_model *m, int rank, int ranks) { return m->count * rank / ranks; }

static int64_t piece_of(int64_t share, int64_t at) { return share <= at ? 0 : share - at < PIECE ? share - at : PIECE; }

int llmc_comm_reduce_gradients(const llmc_comm *comm, llmc_model *m, llmc_error *err) {
    int n = comm->ranks;
    if (n == 1) return 0;
    int64_t longest = m->count / n + 1, mine = m->hi - m->lo;
    float *received = malloc((size_t)n * PIECE * sizeof(float)); // (ranks, PIECE)
    if (!received) LLMC_FAIL(err, "", "no memory to exchange gradients");
    for (int64_t at = 0; at < longest; at += PIECE) {
        int64_t here = piece_of(mine, at);
        for (int step = 0; step < n; step++) { // each peer in turn: its piece of its share goes out, ours comes in
            int dest = (comm->rank + step) % n, source = (comm->rank - step + n) % n;
            int64_t lo = share_start(m, dest, n), out = piece_of(share_start(m, dest + 1, n) - lo, at);
            MPI_Sendrecv(m->grads + lo + (out ? at : 0), (int)out, MPI_FLOAT, dest, 0, received + (int64_t)source * PIECE, (int)here,
                         MPI_FLOAT, source, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        }
        for (int64_t i = 0; i < here; i++) {
            float sum = received[i];
            for (int r = 1; r < n; r++) sum += received[(int64_t)r * PIECE + i];
            m->grads[m->lo + at + i] = sum;
        }
    }
    free(received);
    return 0;
}

int llmc_comm_gather_params(const llmc_comm *comm, llmc_model *m, llmc_error *err) {
    if (comm->ranks == 1) return 0;
    if (m->count / comm->ranks > 1 << 30) LLMC_FAIL(err, "use more processes", "a share of %lld values is too large for MPI", (long long)(m->hi - m->lo));
    MPI_Datatype type = m->options.dtype == LLMC_DTYPE_BF16 ? MPI_UINT16_T : MPI_FLOAT;
    size_t width = m->options.dtype == LLMC_DTYPE_BF16 ? 2 : 4;
    for (int r = 0; r < comm->ranks; r++) {
        int64_t lo = share_start(m, r, comm->ranks), hi = share_start(m, r + 1, comm->ranks);
        MPI_Bcast((char *)m->params + (size_t)lo * width, (int)(hi - lo), type, r, MPI_COMM_WORLD);
    }
    return 0;
}

double llmc_comm_sum(const llmc_comm *comm, double value) {
    if (comm->ranks == 1) return value;
    double *all = malloc((size_t)comm->ranks * sizeof *all), sum = 0;
    if (!all) llmc_comm_abort();
    MPI_Allgather(&value, 1, MPI_DOUBLE, all, 1, MPI_DOUBLE, MPI_COMM_WORLD);
    for (int r = 0; r < comm->ranks; r++) sum += all[r];
    free(all);
    return sum;
}

int llmc_comm_max(const llmc_comm *comm, int value) {
    int highest = value;
    if (comm->ranks > 1) MPI_Allreduce(&value, &highest, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
    return highest;
}

void llmc_comm_barrier(const llmc_comm *comm) {
    if (comm->ranks > 1) MPI_Barrier(MPI_COMM_WORLD);
}
void llmc_comm_broadcast(const llmc_comm *comm, void *data, int bytes) {
    if (comm->ranks > 1) MPI_Bcast(data, bytes, MPI_BYTE, 0, MPI_COMM_WORLD);
}

#else

int llmc_comm_open(llmc_comm *comm, llmc_error *err) {
    // A launcher's own variables tell that several processes were meant: each would silently train alone.
    const char *names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE"};
    for (int i = 0; i < 3; i++) {
        const char *size = getenv(names[i]);
        if (size && atoi(size) > 1)
            LLMC_FAIL(err, "install MPI's compiler (Debian: apt install mpich; or pip install mpich)", "this build has no MPI but was started as one of %s processes", size);
    }
    *comm = (llmc_comm){0, 1};
    return 0;
}
void llmc_comm_close(void) {}
void llmc_comm_abort(void) {}
int llmc_comm_reduce_gradients(const llmc_comm *comm, llmc_model *m, llmc_error *err) { (void)comm; (void)m; (void)err; return 0; }
int llmc_comm_gather_params(const llmc_comm *comm, llmc_model *m, llmc_error *err) { (void)comm; (void)m; (void)err; return 0; }
double llmc_comm_sum(const llmc_comm *comm, double value) { (void)comm; return value; }
int llmc_comm_max(const llmc_comm *comm, int value) { (void)comm; return value; }
void llmc_comm_barrier(const llmc_comm *comm) { (void)comm; }
void llmc_comm_broadcast(const llmc_comm *comm, void *data, int bytes) { (void)comm; (void)data; (void)bytes; }

#endif
