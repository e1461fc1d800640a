"""Fixtures of all tests: a cache of its own for each session, and the shared test data."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # many small models: threads would only wait for each other
settings.register_profile("llmkit", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("llmkit")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the hub; read when huggingface_hub is imported


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test may read or change the user's cache."""
    os.environ["LLMKIT_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real evaluation sets, text and tokenizers, kept outside the repository."""
    path = Path(os.environ.get("LLMKIT_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no test data in {path}: set LLMKIT_TEST_DATA")
    return path


@pytest.fixture(scope="session")
def smollm2_path(test_data: Path) -> Path:
    """A real chat model of 135 M parameters, made once from a package and kept in the user's cache."""
    if named := os.environ.get("LLMKIT_SMOLLM2"):
        return Path(named)
    tool = test_data.parent / "tools" / "make_smollm2.py"
    if not tool.is_file():
        pytest.skip(f"no SmolLM2-135M-Instruct: set LLMKIT_SMOLLM2 to its folder (there is no {tool} to make it)")
    folder = platformdirs.user_cache_path("llmkit-tests") / "smollm2"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock:  # the processes of pytest-xdist make it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            beside = folder.with_name(".tmp-smollm2")
            shutil.rmtree(beside, ignore_errors=True)
            subprocess.run([sys.executable, str(tool), str(beside)], check=True)
            beside.rename(folder)
    return folder


@pytest.fixture
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `llmkit` in a process of its own and check its exit code; stdout and stderr as text."""

    def run(*args: object, code: int = 0, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llmkit", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **kwargs)
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        if code:
            assert "Traceback" not in done.stderr
        return done

    return run
