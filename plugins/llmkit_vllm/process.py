"""VLLMProcess: a module run in vLLM's environment, with all the processes that it starts, its log and its end."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

LOG_LINES = 30  # of vLLM's log that an error shows
KILL_SECONDS = 10  # that vLLM has to end, beside those for its running requests
GONE_SECONDS = 2  # that killed processes may take to be gone
CACHE_GIB = 4  # memory for keys and values on a CPU, unless $VLLM_CPU_KVCACHE_SPACE says otherwise


class VLLMError(ChildProcessError):
    """vLLM could not be started, or ended by itself. The message has the end of its log."""


class VLLMProcess:
    """vLLM in a session of its own: Ctrl-C at the terminal reaches llmkit alone, which then ends it in order.

    It is killed, with all that it started, when this process ends, however it ends: its modules watch their stdin.
    """

    def __init__(
        self,
        python: Path,
        bridge: Path,
        command: Sequence[str],
        *,
        settings: Mapping[str, str] | None = None,
        verbose: bool = False,
        stdout: int | None = None,
    ) -> None:
        """Start `command`: a module of the bridge and its arguments. `settings` are environment variables.

        The log goes to a file that is deleted at the end, and with `verbose` to stderr too; where `stdout` is
        subprocess.PIPE, only what it writes on stderr is log.
        """
        self._lines: collections.deque[str] = collections.deque(maxlen=LOG_LINES)
        handle, name = tempfile.mkstemp(prefix="llmkit-vllm-", suffix=".log")
        self._file: IO[bytes] = os.fdopen(handle, "wb")
        self.log = Path(name)
        self._verbose, self._failed, self._closed = verbose, False, False
        try:
            self.process = subprocess.Popen(
                [str(python), "-m", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if stdout is not None else subprocess.STDOUT,
                start_new_session=True,
                env=_environment(python, bridge, settings or {}),
            )
        except OSError:
            self._file.close()
            self.log.unlink()
            raise
        stream = self.process.stderr if stdout is not None else self.process.stdout
        self._reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            self._file.write(line)
            self._file.flush()
            self._lines.append(line.decode("utf-8", "replace").rstrip())
            if self._verbose:
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def last_line(self) -> str:
        """The last line of the log without what stands in front of its message."""
        lines = [line for line in list(self._lines) if line.strip()]
        return re.sub(r"^(\(.*?\) )?([A-Z]+ [\d-]+ [\d:]+ \[.*?\] )?\s*", "", lines[-1]) if lines else ""

    def failure(self, what: str) -> VLLMError:
        """Kill what is left, keep the log, and make an error of its last lines. `what` is the sentence."""
        self._failed = True
        self.close()
        lines = "\n".join(f"  {line}" for line in self._lines)
        return VLLMError(f"{what} (whole log: {self.log}); its last lines:\n{lines}")

    def stop(self, drain_seconds: float = 0) -> None:
        """Let running requests finish, as long as vLLM was told to, then end all; kills what does not end in time."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(drain_seconds + KILL_SECONDS)
        self.close()

    def close(self) -> None:
        """Kill the whole group, also where its first process has ended already; the log stays after a failure only."""
        if self._closed:
            return
        self._closed = True  # the number of a group that is gone may come to belong to others
        self._kill()
        self._reader.join(timeout=KILL_SECONDS)
        if not self._reader.is_alive():
            self._file.close()
        if not self._failed:
            self.log.unlink(missing_ok=True)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        deadline = time.monotonic() + GONE_SECONDS  # those that the first process started are not ours to wait for
        while _group_lives(self.process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _environment(python: Path, bridge: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """The variables of vLLM's processes: ours without what would lead its Python to our packages."""
    ours = dict(os.environ)
    for name in ("PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"):
        ours.pop(name, None)
    search = [str(bridge)]
    if python == Path(sys.executable) and ours.get("PYTHONPATH"):
        search.append(ours["PYTHONPATH"])
    if ours.get("VLLM_PLUGINS"):  # the user's choice of plugins, which must not leave out ours
        ours["VLLM_PLUGINS"] += ",llmkit"
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # the checkpoint is a folder
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {
        **defaults,
        **ours,
        "PATH": os.pathsep.join([str(python.parent), ours.get("PATH", os.defpath)]),  # it calls ninja
        "PYTHONPATH": os.pathsep.join(search),
        "PYTHONSAFEPATH": "1",  # a folder called torch, where the user happens to stand, is not torch
        "PYTHONUNBUFFERED": "1",
        **settings,
    }
