"""Building: the cache, concurrent first uses, and machines without the right compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmkit_llmc import build as build_module
from llmkit_llmc.build import BuildError, build, find_compiler, toolchain
from llmkit_llmc.trainer import LlmcTrainer


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH that holds nothing but what the test puts there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CC", "LLMC_MPICC", "LLMC_CFLAGS", "LLMC_BLAS"):
        monkeypatch.delenv(name, raising=False)
    return folder


def compiler(folder: Path, refusing: str) -> None:
    """A `cc` that fails, with a compiler's message, where its arguments hold `refusing`."""
    real = shutil.which("gcc", path=os.defpath) or shutil.which("cc", path=os.defpath)
    refuse = f'case "$*" in *{refusing}*) echo "error: {refusing} is not known" >&2; exit 1;; esac'
    script = f'#!/bin/sh\n{refuse}\nPATH={os.defpath} exec {real} "$@"\n'
    (folder / "cc").write_text(script)
    (folder / "cc").chmod(0o755)


def test_without_a_compiler(only: Path) -> None:
    with pytest.raises(BuildError, match="there is no C compiler: install one"):
        find_compiler()
    assert "needs a C compiler" in (LlmcTrainer.unavailable() or "")


def test_without_mpi(only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(only / "python"))
    with pytest.raises(BuildError, match="there is no mpicc: several processes need MPI"):
        find_compiler(mpi=True)


def test_a_compiler_that_is_not_there(only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc-99 -m64")
    with pytest.raises(BuildError, match="CC=gcc-99 -m64 is not there"):
        find_compiler()


def test_a_compiler_without_openmp(only: Path) -> None:
    compiler(only, "-fopenmp")
    tools = toolchain()
    assert "-fopenmp" not in tools.flags
    assert "has no OpenMP, so training uses one thread" in tools.notes[0]


def test_a_compiler_that_does_not_know_the_processor(only: Path) -> None:
    compiler(only, "native")
    assert "does not know this processor" in toolchain().notes[0]


def test_an_old_compiler(only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(only, "-std=gnu11")
    with pytest.raises(BuildError, match=r"install gcc 9 or clang 9, or newer"):
        toolchain()
    compiler(only, "gemm.c")  # fails only in the middle
    monkeypatch.setenv("LLMKIT_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(
        BuildError, match=r"cannot compile llmc, which needs gcc 9 or clang 9.*It said: error: gemm.c is not known"
    ):
        build()
    assert not any((tmp_path / "cache" / "llmc").iterdir())  # nothing half-made


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMKIT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"cannot be kept in .*; set LLMKIT_CACHE_DIR"):
        build()


def test_concurrent_first_uses(tmp_path: Path) -> None:
    environment = {**os.environ, "LLMKIT_CACHE_DIR": str(tmp_path), "LLMC_CFLAGS": "-O0"}
    code = "from llmkit_llmc.library import load; print(load().description)"
    root = Path(build_module.__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "trainers")])

    def use(_: int) -> str:
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        ).stdout

    with ThreadPoolExecutor(2) as pool:
        answers = set(pool.map(use, range(2)))
    assert len(answers) == 1
    (folder,) = (tmp_path / "llmc").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["libllmc.so", "llmc"]


def test_the_key_follows_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    before = build_module.key_of(toolchain())
    monkeypatch.setenv("LLMC_CFLAGS", "-O1")
    assert build_module.key_of(toolchain()) != before


def test_the_module_becomes_the_executable(tmp_path: Path) -> None:
    root = Path(build_module.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "trainers")])}
    done = subprocess.run(
        [sys.executable, "-m", "llmkit_llmc", "--help"], env=environment, capture_output=True, text=True, check=True
    )
    assert "-sg" in done.stdout and "--skip-norm" in done.stdout and "Accepted and ignored" in done.stdout


def test_the_sanitizers_find_nothing(tmp_path: Path) -> None:
    """The layers, the model and the file formats again, built with AddressSanitizer and UndefinedBehaviorSanitizer."""
    if "-fsanitize" in os.environ.get("LLMC_CFLAGS", ""):
        pytest.skip("this is that run")
    cc = find_compiler()
    runtimes = [
        subprocess.run([*cc, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip("the compiler has no sanitizers")
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "LLMC_CFLAGS": "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g",
    }
    folder = Path(__file__).parent
    tests = [str(folder / name) for name in ("test_kernels.py", "test_model.py", "test_formats.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, "-k", "not twenty_steps"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
