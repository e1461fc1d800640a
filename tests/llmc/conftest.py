"""Builds of the C library for the tests: for this machine, and for other instruction sets that it can run."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmkit_llmc.build import build
from llmkit_llmc.kernels import Kernels
from llmkit_llmc.library import Library

#: name -> flags that override -march=native. `pairs` runs the path of bf16 instructions, on plain code for them.
BUILDS = {
    "native": "",
    "pairs": "-DLLMC_EMULATE_DPBF16 -O2",
    "avx2": "-march=haswell -O2",
    "portable": "-march=x86-64 -O2",
}
_libraries: dict[str, Library] = {}


def library_for(name: str) -> Library:
    """The library built with the flags of `name`, once a session."""
    if name not in _libraries:
        before = os.environ.get("LLMC_CFLAGS", "")
        os.environ["LLMC_CFLAGS"] = f"{before} {BUILDS[name]}".strip()
        try:
            _libraries[name] = Library(build().library)
        finally:
            os.environ["LLMC_CFLAGS"] = before
    return _libraries[name]


@pytest.fixture(scope="session", autouse=True)
def _compiler() -> None:
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("there is no C compiler")


@pytest.fixture(scope="session")
def library(_private_cache: None) -> Library:
    """The library for this machine."""
    return library_for("native")


@pytest.fixture(params=list(BUILDS))
def kernels(request: pytest.FixtureRequest, _private_cache: None) -> Iterator[Kernels]:
    """The layers of each build in turn, on two threads."""
    if request.param in ("avx2", "portable") and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("an x86 instruction set")
    if "-fsanitize" in os.environ.get("LLMC_CFLAGS", "") and request.param != "native":
        pytest.skip("one build is enough under the sanitisers")
    made = Kernels(library_for(request.param), threads=2)
    yield made
    made.close()


@pytest.fixture(scope="session")
def executable(_private_cache: None) -> Path:
    """The program for this machine."""
    return build().executable
