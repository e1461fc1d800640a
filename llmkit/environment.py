"""Environment: a Python environment of its own, for what cannot share ours because of the versions that it pins.

A component names one in its class attribute `environment`; `llmkit plugins install NAME` makes it, `plugins uninstall`
removes it. It lives in the cache folder and counts as made only when a record of it was written as the last step, so
one that was interrupted is never taken for a whole one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llmkit.component import missing_modules
from llmkit.files import cache_dir, write_json

RECORD = "llmkit-environment.json"
TAIL = 12  # lines of an installer's messages that an error shows
NOT_FOUND = "the package index has no fitting package for this Python and machine"

Report = Callable[[str], None]


class InstallError(OSError):
    """An environment could not be made. The message says why and where the installer's messages are."""


@dataclass(frozen=True)
class Install:
    """Install packages; from `fallback_index` where the user's own indexes do not have them."""

    packages: tuple[str, ...]
    fallback_index: str | None = None


@dataclass(frozen=True)
class Remove:
    """Remove packages that others drag in, as far as they are there."""

    packages: tuple[str, ...]


@dataclass(frozen=True)
class Environment:
    """What an environment consists of.

    `plan` gives the steps for this machine, or raises ValueError where there are no packages for it; `module` must be
    importable in the end, and its `__version__` is what `plugins list` shows; `gigabytes` is what it takes on the disk.
    """

    name: str
    module: str
    plan: Callable[[], Sequence[Install | Remove]]
    gigabytes: Callable[[], float]

    @property
    def folder(self) -> Path:
        return cache_dir() / "environments" / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def log(self) -> Path:
        """The installers' messages."""
        return self.folder.with_name(f"{self.name}.log")

    @property
    def version(self) -> str | None:
        """The version of its module where it is whole, else None."""
        try:
            record = json.loads((self.folder / RECORD).read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return str(record["version"])

    def create(self, report: Report = lambda line: None) -> bool:
        """Make it; False where it is there already. `report` is called with what goes on.

        Uses uv where there is one, else venv and pip, with their own settings for indexes and proxies. On an error,
        and on Ctrl-C, nothing is left. Raises InstallError, and ValueError where no packages suit this machine.
        """
        plan = self.plan()
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self._lock(report) as lock:
            if self.version is not None:
                return False
            self._check_space()
            shutil.rmtree(self.folder, ignore_errors=True)  # what a killed installation left
            try:
                with self.log.open("w", encoding="utf-8") as log:
                    version = _Installer(self, log, lock, report).run(plan)
                report("writing to disk")
                os.sync()  # thousands of files: one call instead of a flush of each
                write_json(self.folder / RECORD, {"version": version, "python": sys.version.split()[0]})
            except BaseException as error:
                shutil.rmtree(self.folder, ignore_errors=True)
                if isinstance(error, OSError) and not isinstance(error, InstallError):
                    raise InstallError(f"the environment for {self.name} could not be made: {error}") from error
                raise
        return True

    def remove(self) -> bool:
        """Delete it, whole or half made; False where there was none."""
        if not self.folder.is_dir():
            return False
        with self._lock(lambda line: None):
            (self.folder / RECORD).unlink(missing_ok=True)  # first, so that a half-deleted one is not taken for whole
            shutil.rmtree(self.folder)
        return True

    @contextlib.contextmanager
    def _lock(self, report: Report) -> Iterator[int]:
        """One installation at a time. The installers inherit the lock: it outlives us if we are killed."""
        with self.folder.with_name(f".{self.name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report("waiting for another installation")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file.fileno()

    def _check_space(self) -> None:
        free, needed = shutil.disk_usage(self.folder.parent).free / 2**30, self.gigabytes()
        if free < needed:
            raise InstallError(
                f"the environment for {self.name} takes {needed:.1f} GiB, but the disk of {self.folder.parent} has "
                f"{free:.1f} GiB free: make room, or set LLMKIT_CACHE_DIR to a folder on another disk"
            )


class _Installer:
    """Runs uv or pip for one environment, and turns their failures into sentences."""

    def __init__(self, environment: Environment, log: IO[str], lock: int, report: Report) -> None:
        self.environment, self.log, self.lock, self.report = environment, log, lock, report
        self.uv = shutil.which("uv")

    def run(self, plan: Sequence[Install | Remove]) -> str:
        """All steps; the version of the environment's module, imported there."""
        folder, python = str(self.environment.folder), str(self.environment.python)
        if self.uv:
            tool = [self.uv, "pip"]
            target, agree = ["--python", python], []
            self._call([self.uv, "venv", "--python", sys.executable, folder])
        else:
            # Our own pip serves the new environment too; one in there would take seconds to unpack.
            ours = not missing_modules(["pip"])
            tool = [sys.executable, "-m", "pip", "--python", python] if ours else [python, "-m", "pip"]
            target, agree = [], ["--yes"]
            self._call([sys.executable, "-m", "venv", *(["--without-pip"] if ours else []), folder])
        for step in plan:
            if isinstance(step, Remove):
                self._call([*tool, "uninstall", *target, *agree, *step.packages])
                continue
            command = [*tool, "install", *target, *step.packages]
            try:
                self._call(command)
            except InstallError as error:
                if step.fallback_index is None or NOT_FOUND not in str(error):
                    raise
                self._call([*command, "--index-url", step.fallback_index])
        return self._version()

    def _version(self) -> str:
        """The version of the environment's module, which is imported for it, since it may be installed and broken."""
        module = self.environment.module
        self.report(f"importing {module}")
        code = (
            "import sys\n"
            f"try: import {module}\n"
            "except Exception as error: sys.exit(f'{type(error).__name__}: {error}')\n"
            f"print({module}.__version__)"
        )
        return self._call([str(self.environment.python), "-P", "-c", code])[-1].strip()

    def _call(self, command: list[str]) -> list[str]:
        """Run a command, its lines to the log and the report. Returns them; raises InstallError with the last ones."""
        print("$", *command, file=self.log, flush=True)
        lines: list[str] = []
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=(self.lock,),
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": ""},
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                self.log.write(line)
                self.log.flush()
                lines.append(line.rstrip())
                if words := line.strip():
                    self.report(words)
            code = process.wait()
        except BaseException:
            process.terminate()  # Ctrl-C reaches it too, but not a signal sent to us alone
            process.wait()
            raise
        if code:
            name = self.environment.name
            last = "\n".join(f"  {line}" for line in lines[-TAIL:])
            raise InstallError(
                f"the environment for {name} could not be made: {_reason(lines)} (whole log: {self.environment.log})\n"
                f"{last}"
            )
        return lines


def _reason(lines: list[str]) -> str:
    """What went wrong, in a few words, from an installer's messages."""
    text = "\n".join(lines)
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return "the disk is full; make room, or set LLMKIT_CACHE_DIR to a folder on another disk"
    if re.search(r"NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|dns error|Failed to fetch", text):
        return "the package index cannot be reached"
    if "ensurepip is not available" in text:
        return "this Python has neither pip nor ensurepip (Debian: apt install python3-venv), and there is no uv"
    if re.search(r"No matching distribution|was not found in the|there is no version of", text):
        return NOT_FOUND
    return "the installer failed"
