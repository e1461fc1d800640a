"""Compiles the engine's C sources for this machine on first use, into the user's cache.

Compiler, flags and environment variables are those of the trainer `llmc` (CC, LLMC_CFLAGS), whose vector headers the
sources include. The cache folder's name is a hash of everything that goes into the result, and a build is made beside
it and renamed, so that concurrent first uses are safe.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmkit.files import cache_dir, new_directory
from llmkit_llmc.build import SOURCES as SHARED
from llmkit_llmc.build import BuildError, Toolchain, find_compiler, processor, run, toolchain

SOURCES = Path(__file__).parent / "csrc"
HEADERS = ("gemm_kernel.h", "parallel.h", "real.h", "vec.h")  # of the trainer
LIBRARY = "libengine.so"


def no_compiler() -> str | None:
    """Why nothing can be compiled here, in a sentence, or None. Cheap: nothing is run."""
    try:
        find_compiler()
    except BuildError as error:
        return str(error)
    return None


def build() -> Path:
    """The shared library, compiled now or before. Raises BuildError."""
    environment = tuple(os.environ.get(name, "") for name in ("CC", "LLMC_CFLAGS", "LLMKIT_CACHE_DIR"))
    return _build(environment)


@functools.cache
def _build(environment: tuple[str, ...]) -> Path:
    del environment  # part of the cache's key only: toolchain() reads it
    tools = toolchain()
    folder = cache_dir() / "engine" / _key(tools)
    if not (folder / LIBRARY).is_file():
        try:
            with new_directory(folder) as beside:
                _compile(tools, beside)
        except FileExistsError:
            pass  # another process was faster
        except OSError as error:
            raise BuildError(f"the compiled engine cannot be kept in {folder}: {error}; set LLMKIT_CACHE_DIR") from None
    return folder / LIBRARY


def _key(tools: Toolchain) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for path in (*sorted(SOURCES.iterdir()), *(SHARED / name for name in HEADERS), Path(__file__)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    parts = (*tools.command, tools.version, *tools.flags, *tools.link, processor(), platform.platform())
    digest.update("\0".join(parts).encode())
    return digest.hexdigest()


def _compile(tools: Toolchain, folder: Path) -> None:
    """Compile every source and link the library into `folder`."""
    sources = sorted(SOURCES.glob("*.c"))

    def compile_one(source: Path) -> str:
        output = str(folder / f"{source.stem}.o")
        _checked(tools, [*tools.command, *tools.flags, f"-I{SHARED}", "-c", str(source), "-o", output])
        return output

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, sources))
    _checked(tools, [*tools.command, "-shared", "-o", str(folder / LIBRARY), *objects, *tools.link])
    for path in objects:
        Path(path).unlink()


def _checked(tools: Toolchain, command: list[str]) -> None:
    result = run(command)
    if result.returncode:
        lines = result.stderr.splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines[-3:]
        raise BuildError(
            f"{tools.command[0]} cannot compile the engine, which needs gcc 9 or clang 9, or newer; set CC to another "
            f"compiler, check LLMC_CFLAGS, or use --engine transformers. It said: {' / '.join(errors[:3])}"
        )
