"""The sandbox: correct code passes, code that cheats does not, and nothing gets out, by each method that works here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmkit import sandbox
from llmkit.sandbox import Limits, Method, Sandbox, methods, open_sandbox, unsafe_method

ROOT = Path(__file__).resolve().parents[1]
LIMITS = Limits(wall_seconds=20, cpu_seconds=1)


METHODS = [method for method in methods() if Sandbox(method, LIMITS).run("", "").passed]


def box_of(name: str) -> Sandbox:
    """The sandbox whose method's name begins so."""
    for method in (*METHODS, unsafe_method()):
        if method.name.startswith(name):
            return Sandbox(method, LIMITS)
    pytest.skip(f"{name} does not work on this machine")


@pytest.fixture(params=["bubblewrap", "namespaces"])
def box(request: pytest.FixtureRequest) -> Sandbox:
    return box_of(request.param)


@pytest.fixture(params=["bubblewrap", "namespaces", "none"])
def any_box(request: pytest.FixtureRequest) -> Sandbox:
    return box_of(request.param)


def test_code_passes_or_fails_its_tests(any_box: Sandbox) -> None:
    program = "import math, collections, re, itertools, hashlib, random\ndef f(x):\n    return math.isqrt(x)\n"
    assert any_box.run(program, "assert f(17) == 4").passed
    assert any_box.run(program, "assert f(17) == 5, 'not five'").reason == "AssertionError: not five"
    assert any_box.run("def f(:", "").reason.startswith("SyntaxError")
    assert any_box.run("f = 'ä\ud800'", "assert f[0] == 'ä'").passed  # what a model writes need not be valid text
    assert any_box.run("x = 1\n" * 40_000, "assert x == 1").passed  # more than a pipe holds
    assert any_box.run("import sys\nsys.stdin.read()", "").passed  # nothing to read, and no waiting for it


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import posix; posix._exit(0)",
        "import os, importlib; importlib.reload(os); os._exit(0)",
        "import atexit, os; atexit.register(os._exit, 0); exit()",
        "import builtins; builtins.exec = lambda *a: None",
        "import builtins; builtins.compile = lambda *a: 'pass'",
        "import builtins; builtins.AssertionError = ZeroDivisionError",
        "import os; os.write = os.read = lambda *a: b''",
        "print('PASSED' * 10)\nimport os\nfor fd in range(1, 10):\n    try:\n        os.write(fd, b'LT')\n"
        "    except OSError:\n        pass\nos._exit(0)",
        "import os\nif os.fork(): os._exit(0)",
        "import threading, os; threading.Timer(0.0, os._exit, [0]).start()",
        "",
    ],
)
def test_ending_early_or_silently_is_no_pass(any_box: Sandbox, program: str) -> None:
    tests = "import time\ntime.sleep(0.2)\nassert f() == 1"
    assert not any_box.run(f"{program}\ndef f():\n    return 0\n", tests).passed


def test_leaving_from_within_a_test_is_no_pass(any_box: Sandbox) -> None:
    assert not any_box.run("import os\ndef f():\n    os._exit(0)", "assert f() == 1").passed
    assert any_box.run("def f():\n    raise SystemExit(0)", "assert f() == 1").reason == "SystemExit: 0"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("x = bytearray(10 * 2**30)", "MemoryError"),
        ("while True: pass", "it ended before its tests did"),
        ("while True: print('x' * 1000)", "it ended before its tests did"),
        ("x = []\nwhile True: x.append(bytes(2**26))", "MemoryError"),
        ("f = open('big', 'wb')\nwhile True: f.write(b'x' * 2**20)", "OSError: [Errno 27]"),
        ("files = [open('/dev/null') for _ in range(1000)]", "OSError: [Errno 24]"),
    ],
)
def test_what_it_may_use_is_limited(any_box: Sandbox, program: str, reason: str) -> None:
    assert any_box.run(program, "").reason.startswith(reason)


def test_memory_in_use_is_limited(any_box: Sandbox) -> None:
    # 256 MiB: to fill a GiB takes half of the box's second of CPU, and all of it on a busy machine.
    small = Sandbox(any_box.method, replace(LIMITS, memory_bytes=2**28))
    assert small.run("x = []\nwhile True: x.append(bytearray(2**24))", "").reason.startswith("MemoryError")


def test_waiting_ends(any_box: Sandbox) -> None:
    short = Sandbox(any_box.method, Limits(wall_seconds=1.5))
    assert short.run("import time; time.sleep(1000)", "").reason == "it did not end within 1.5 seconds"
    assert short.run("", "import time; time.sleep(1000)").reason == "it did not end within 1.5 seconds"


def test_endless_output_on_the_way_out_ends(any_box: Sandbox) -> None:
    program = (
        "import os\nwhile True:\n    for fd in range(3, 10):\n"
        "        try: os.write(fd, b'x' * 4096)\n        except OSError: pass"
    )
    assert not any_box.run(program, "").passed


def inside(box: Sandbox, expression: str) -> None:
    """`expression` must be true inside."""
    outcome = box.run("import os, socket, subprocess, glob, pathlib, signal, time", f"assert {expression}")
    assert outcome.passed, (expression, outcome.reason)


def fails(box: Sandbox, statement: str, error: str = "OSError") -> None:
    """`statement` must raise an `error` inside."""
    program = (
        "import os, socket, subprocess, pathlib, shutil\n"
        f"def attempt():\n    try:\n        {statement}\n    except {error}:\n        return True\n    return False"
    )
    outcome = box.run(program, "assert attempt()")
    assert outcome.passed, (statement, outcome.reason)


@pytest.fixture
def secret() -> Iterator[Path]:
    """A file in the home directory, as ~/.ssh/id_rsa would be."""
    folder = Path.home() / f".llmkit-sandbox-test-{os.getpid()}"
    folder.mkdir()
    (folder / "id_rsa").write_text("secret")
    yield folder / "id_rsa"
    (folder / "id_rsa").unlink()
    folder.rmdir()


def test_the_home_directory_is_not_there(box: Sandbox, secret: Path) -> None:
    fails(box, f"open({str(secret)!r})")
    fails(box, f"os.listdir({str(secret.parent)!r})")
    inside(box, "os.path.expanduser('~') == '/tmp' and not glob.glob('/home/*') and not glob.glob('/root/.s*')")
    fails(box, "open('/etc/shadow')")
    fails(box, "open('/etc/passwd')")


def test_nothing_outside_can_be_written(box: Sandbox, tmp_path: Path) -> None:
    for folder in (tmp_path, ROOT, Path("/usr"), Path("/"), Path("/etc"), Path(sys.base_prefix), Path("/dev")):
        fails(box, f"open({str(folder / 'llmkit-was-here')!r}, 'w')")
        assert not (folder / "llmkit-was-here").exists()
    fails(box, f"os.remove({os.path.realpath(sys.executable)!r})")
    fails(box, f"shutil.rmtree({str(ROOT)!r})")
    assert (ROOT / "pyproject.toml").is_file()
    fails(box, f"os.chmod({os.path.realpath(sys.executable)!r}, 0o777)")


def test_a_private_folder_can_be_written_and_is_gone_afterwards(box: Sandbox) -> None:
    assert box.run("open('note', 'w').write('x')", "assert open('/tmp/note').read() == 'x'").passed
    inside(box, "'note' not in os.listdir('/tmp')")
    assert not Path("/tmp/note").exists()
    many = "for i in range(10):\n    with open(f'f{i}', 'wb') as f: f.write(bytes(15 * 2**20))"
    assert "No space left" in box.run(many, "").reason


def test_there_is_no_network(box: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        fails(box, f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)")
    fails(box, "socket.create_connection(('1.1.1.1', 53), 2)")
    fails(box, "socket.getaddrinfo('example.org', 80)")
    abstract = f"\0llmkit-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(abstract)
        server.listen()
        fails(box, f"socket.socket(socket.AF_UNIX).connect({abstract!r})")


def test_no_other_process_is_seen_or_killed(box: Sandbox) -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        fails(box, f"os.kill({bystander.pid}, 9)")
        fails(box, f"os.kill({os.getpid()}, 9)")
        for program in ("os.kill(-1, 9)", "os.kill(os.getppid(), 9)", "os.killpg(0, 9)", "os.killpg(os.getppid(), 9)"):
            box.run(f"import os\n{program}", "")
        assert bystander.poll() is None
    finally:
        bystander.send_signal(signal.SIGKILL)
        bystander.wait()


def test_it_has_no_privilege(box: Sandbox) -> None:
    inside(box, "os.getuid() != 0 and os.geteuid() != 0 and os.getgroups() in ([], [65534])")
    fails(box, "os.setuid(0)")
    fails(box, "os.chroot('/tmp')")
    mount = "import ctypes\nlibc = ctypes.CDLL(None)"
    assert box.run(mount, "assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == -1").passed
    assert box.run(mount, "assert libc.mount(None, b'/', None, 4096 | 32, None) == -1").passed
    inside(box, "not any(name.startswith(('LLMKIT', 'HF_', 'SSH', 'USER')) for name in os.environ)")


def processes(marker: str) -> list[str]:
    """Running processes of this machine with `marker` in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_a_fork_bomb_is_small_and_goes_out(box: Sandbox) -> None:
    limited = (
        "import os, time\nn = 0\nfor _ in range(200):\n    try:\n        if not os.fork(): time.sleep(100)\n"
        "        n += 1\n    except BlockingIOError:\n        break\n"
    )
    assert box.run(limited, f"assert 0 < n < {LIMITS.processes}, n").passed
    assert not Sandbox(box.method, Limits(wall_seconds=3)).run("import os\nwhile True: os.fork()", "").passed
    forever = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert not Sandbox(box.method, Limits(wall_seconds=3)).run(forever, "").passed


def test_no_grandchild_stays(box: Sandbox) -> None:
    marker = f"llmkit-grandchild-{os.getpid()}"
    program = (
        "import os, subprocess, sys, time\n"
        "if not os.fork():\n"
        "    os.setsid()\n"
        "    if not os.fork():\n"
        f"        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(300)', '{marker}'])\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "time.sleep(0.3)\n"
    )
    assert box.run(program, "").passed
    for _ in range(100):  # the kernel ends them after the first process
        if not processes(marker):
            break
        time.sleep(0.05)
    assert not processes(marker)


def test_nothing_is_run_where_no_isolation_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "methods", lambda: [Method("broken", ("/no/such/program",))])
    sandbox._working_method.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"cannot be run safely .*broken: .*No such file.*--unsafe-execute"):
            open_sandbox()
        assert open_sandbox(unsafe=True).method.name == "none"
    finally:
        sandbox._working_method.cache_clear()


def test_unsafe_still_isolates_where_it_can() -> None:
    if not METHODS:
        pytest.skip("no isolation works on this machine")
    assert open_sandbox(unsafe=True).method == METHODS[0]
