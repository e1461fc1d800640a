"""`python -m llmkit_llmc …`: compiles the executable if need be and becomes it. `--help` lists its options."""

from __future__ import annotations

import os
import sys

from llmkit_llmc.build import BuildError, build

#: what MPI's launchers set in each process that they start
LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE")


def main() -> None:
    """Replace this process by the executable, built with MPI where mpirun started it."""
    try:
        made = build(mpi=any(name in os.environ for name in LAUNCHED))
    except BuildError as error:
        sys.exit(f"llmc: {error}")
    for note in made.notes:
        print(f"llmc: {note}", file=sys.stderr)
    os.execv(made.executable, [str(made.executable), *sys.argv[1:]])


if __name__ == "__main__":
    main()
