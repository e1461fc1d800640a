"""A sandbox of Linux namespaces made with system calls, for machines without bubblewrap.

Its text is given to `python -c` with what to show and what to run as arguments; it uses the standard library alone.
In new user, mount, process, network, IPC and host name namespaces it makes a root of read-only binds and one small
writable /tmp, leaves the old root, and runs the command there without any capability. See namespaces(7),
pivot_root(2), mount_setattr(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}  # the number of a system call that the C library has no function for
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1 | 2 | 4  # and no set-uid, no devices
NOBODY = 65534

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """A function of the C library. Raises OSError with its name where it fails."""
    converted = [a.encode() if isinstance(a, str) else ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if getattr(libc, name)(*converted) == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def read_only(path: str, flags: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, path, flags, attributes, 32)


def enter() -> None:
    """New namespaces, with this process's child as the first process in them: when it goes, all others go.

    Root needs no user namespace, and the command becomes another user by itself.
    """
    uid, gid, flags = (
        os.geteuid(),
        os.getegid(),
        CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS,
    )
    call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL))
    call("unshare", flags if uid == 0 else flags | CLONE_NEWUSER)
    if uid != 0:
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
        write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
        with contextlib.suppress(OSError):  # containers show /proc/sys read-only; further namespaces would gain nothing
            write("/proc/sys/user/max_user_namespaces", "0")
    wait_for_child()
    call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL))


def wait_for_child() -> None:
    """Fork; the child returns, and this process ends as it does."""
    child = os.fork()
    if not child:
        return
    while True:
        ended, status = os.wait()
        if ended == child:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def make_root(visible: list[str], folder_bytes: int) -> None:
    """A root with the paths in `visible`, read-only, a few devices, and a writable /tmp of `folder_bytes`."""
    call("mount", None, "/", None, MS_REC | MS_PRIVATE, None)
    call("mount", "tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    call("syscall", PIVOT_ROOT[os.uname().machine], "/tmp", "/tmp/old")
    os.chdir("/")
    os.mkdir("/tmp")  # first, because what is to be seen may lie in it
    call("mount", "tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={folder_bytes},mode=1777")
    for path in [*visible, "/dev/null", "/dev/zero", "/dev/urandom"]:
        source = f"/old{path}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.islink(source):
            os.symlink(os.readlink(source), path)
            continue
        if os.path.isdir(source):
            os.makedirs(path, exist_ok=True)
        else:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        call("mount", source, path, None, MS_BIND | MS_REC, None)
        if not path.startswith("/dev/"):
            read_only(path, AT_RECURSIVE)
    call("umount2", "/old", MNT_DETACH)
    os.rmdir("/old")
    read_only("/", 0)
    os.chdir("/tmp")


def main() -> None:
    """Arguments: the visible paths as JSON, the size of /tmp in bytes, and the command."""
    visible, folder_bytes, command = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    enter()
    make_root(visible, folder_bytes)
    wait_for_child()  # the first process keeps the signal of its parent's death, which a change of user would clear
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.execve(command[0], command, dict(os.environ))  # without a capability, where we are not root


if __name__ == "__main__":
    main()
