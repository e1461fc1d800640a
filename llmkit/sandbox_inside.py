"""What runs inside the sandbox: sets limits, runs a program, then its tests, and proves by a sentinel that they passed.

Its text is given to `python -c`, so that no file of llmkit need be visible there; it uses the standard library alone.

Standard input has length-prefixed frames: user and limits, the program, the tests, the sentinel; standard output gets
one byte for each step that is done, and the sentinel at last. The tests are read when the program has been loaded, and
the sentinel when the tests have passed, so that neither lies in memory before. What the generated code may replace in
`builtins` or `os` is bound before it runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
from typing import Any

LOADED, TESTED = b"L", b"T"


def limit(limits: dict[str, int], user: int | None) -> None:
    """Become `user`, where we are root, for whom there are no limits; then set those of this process and its children.

    They cannot be raised again.
    """
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # there may be no /proc
        file.write("1000")  # where memory is short, this process is the first to go
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def main(
    read: Any = os.read, write: Any = os.write, run: Any = exec, make: Any = compile, size_of: Any = len, int: Any = int
) -> None:
    control, channel = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)

    def exactly(size: int) -> bytes:
        data = b""
        while size_of(data) < size:
            data += read(control, size - size_of(data)) or b"\n" * size  # at the end nothing that follows is valid
        return data

    def receive() -> bytes:
        return exactly(int(exactly(8), 16))

    settings = json.loads(receive())
    limit(settings["limits"], settings["user"])
    program = receive()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    try:
        run(make(program, "<program>", "exec"), namespace)
        write(channel, LOADED)
        run(make(receive(), "<tests>", "exec"), namespace)
    except BaseException as error:  # SystemExit too: a program that ends itself has passed nothing
        write(channel, b"E" + f"{type(error).__name__}: {error}"[:200].encode("utf-8", "replace"))
        os._exit(1)
    write(channel, TESTED)
    write(channel, receive())
    os._exit(0)


if __name__ == "__main__":
    main()
