"""`llmkit doctor`: what this machine can do, and how to get what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Literal

import click

from llmkit.cli.ui import emit, json_option

State = Literal["ok", "missing", "broken", "note"]
HUB = "https://huggingface.co"


@dataclass
class Finding:
    """One thing looked at: its state, what was found, and how to get it where it is missing."""

    topic: str
    state: State
    found: str
    advice: str = ""


@click.command("doctor")
@click.option("--offline", is_flag=True, help="Do not try to reach the hub.")
@json_option
def command(offline: bool, as_json: bool) -> None:
    """Say what this machine can do: compilers, PyTorch, GPU, vLLM, the hub, plugins."""
    findings = [*_machine(), *_compilers(), *_torch(), *_packages(), *_components(), *_data(), _hub(offline)]
    if as_json:
        emit({"findings": [asdict(finding) for finding in findings]})
        return
    marks = {"ok": "ok", "missing": "--", "broken": "!!", "note": "  "}
    width = max(len(finding.topic) for finding in findings)
    for finding in findings:
        print(f"{marks[finding.state]}  {finding.topic.ljust(width)}  {finding.found}")
        if finding.advice:
            print(f"    {' ' * width}  -> {finding.advice}")


def _machine() -> list[Finding]:
    from llmkit import __version__

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    features = _cpu_features()
    return [
        Finding("llmkit", "ok", f"{__version__}, Python {platform.python_version()} at {sys.prefix}"),
        Finding(
            "machine", "ok", f"{platform.system()} {platform.machine()}, {cores} cores, {memory:.0f} GiB of memory"
        ),
        Finding("CPU features", "note", ", ".join(features) or "none that matter here"),
    ]


def _cpu_features() -> list[str]:
    """Those that decide how fast arithmetic is, as Linux names them; nothing on other systems."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "").split()
    except OSError:
        return []
    return [name for name in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16") if name in flags]


def _compilers() -> list[Finding]:
    findings = []
    for topic, names, advice in (
        ("C compiler", (os.environ.get("CC"), "cc", "gcc", "clang"), "install gcc or clang (Debian: apt install gcc)"),
        ("CUDA compiler", ("nvcc",), "only needed to train in C on an NVIDIA GPU: install the CUDA toolkit"),
        ("MPI", ("mpicc",), "only needed for llmc on several processes (Debian: apt install libopenmpi-dev)"),
    ):
        path = next((found for name in names if name and (found := shutil.which(name))), None)
        if path is None:
            findings.append(Finding(topic, "missing", "not found", advice))
            continue
        done = subprocess.run([path, "--version"], capture_output=True, text=True)
        lines = done.stdout.strip().splitlines()
        line = next((line for line in lines if "release" in line), lines[0] if lines else "")
        findings.append(Finding(topic, "ok" if done.returncode == 0 else "broken", f"{line} ({path})"))
    return findings


def _torch() -> list[Finding]:
    from llmkit.component import install_hint, missing_modules

    if missing_modules(["torch"]):
        return [Finding("PyTorch", "missing", "not installed", install_hint(["torch"]))]
    try:
        import torch
    except Exception as error:
        return [Finding("PyTorch", "broken", f"{type(error).__name__}: {error}", "reinstall it")]
    findings = [Finding("PyTorch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        findings.append(Finding("GPU", "ok", ", ".join(names)))
    elif torch.backends.mps.is_available():
        findings.append(Finding("GPU", "ok", "Apple (mps)"))
    else:
        findings.append(Finding("GPU", "missing", "none that PyTorch can use: training and serving run on the CPU"))
    return findings


def _packages() -> list[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    from llmkit.component import install_hint, missing_modules

    findings = []
    for module, distribution, what in (
        ("transformers", "transformers", "engine `transformers`"),
        ("datasets", "datasets", "data from the hub"),
        ("pyarrow", "pyarrow", "parquet files"),
        ("zstandard", "zstandard", ".zst files"),
        ("matplotlib", "matplotlib", "pictures in reports"),
        ("lm_eval", "lm-eval", "lm-eval's tasks"),
    ):
        if missing_modules([module]):
            findings.append(Finding(module, "missing", f"not installed ({what})", install_hint([module])))
            continue
        try:
            found = version(distribution)
        except PackageNotFoundError:
            found = "installed"
        findings.append(Finding(module, "ok", f"{found} ({what})"))
    return findings


def _components() -> list[Finding]:
    from llmkit.plugins import get_plugins

    plugins = get_plugins()
    findings = []
    findings.append(Finding("evaluators", "ok", f"{len(plugins.names('evaluator'))} tasks (llmkit eval --list)"))
    for kind in ("trainer", "engine", "evaluator", "server"):
        for component in plugins.all(kind):
            reason = component.unavailable()
            if kind == "evaluator" and reason is None:
                continue  # there are many
            found = component.summary() if reason is None else reason
            if component.environment is not None and component.environment.version is not None:
                found += f" ({component.environment.name} {component.environment.version})"
            findings.append(Finding(f"{kind} {component.name}", "ok" if reason is None else "missing", found))
    findings += [
        Finding(f"plugin {plugin.name}", "broken", plugin.error or "", f"llmkit plugins uninstall {plugin.name}")
        for plugin in plugins.broken
    ]
    return findings


def _data() -> list[Finding]:
    from llmkit.checkpoint import latest_run
    from llmkit.files import cache_dir

    run = latest_run()
    vocabularies = os.environ.get("TIKTOKEN_CACHE_DIR")
    return [
        Finding("cache", "note", f"{cache_dir()} (set LLMKIT_CACHE_DIR to move it)"),
        Finding(
            "TIKTOKEN_CACHE_DIR", "note", vocabularies or "not set: gpt2's and GPT-4's vocabularies are downloaded"
        ),
        Finding("latest run", "note", str(run) if run else "none"),
    ]


def _hub(offline: bool) -> Finding:
    """Can the hub be reached? Looked at last, because it may take some seconds."""
    if offline or os.environ.get("HF_HUB_OFFLINE") == "1":
        return Finding("hub", "note", "not tried: offline was asked for")
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(HUB, method="HEAD"), timeout=5).close()
    except (urllib.error.URLError, OSError) as error:
        advice = "everything works without it from local files; set HF_HUB_OFFLINE=1 to save the waiting"
        return Finding("hub", "missing", f"cannot be reached: {getattr(error, 'reason', error)}", advice)
    return Finding("hub", "ok", HUB)
