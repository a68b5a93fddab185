"""Python code that nobody has read, in a process of its own with bounds.

What is bounded, on Linux and macOS:

- wall-clock time: the whole process group is killed when it is over, and at the end in any case; CPU time besides;
- memory (address space), the size of a file, open files, by ``resource``; no core is dumped;
- processes and threads: none can be started. An audit hook refuses fork, exec and the rest, and RLIMIT_NPROC is 0; the
  system ignores that for root: where this runs as root, the code runs as nobody, if nobody can read Python's library;
- the network: a network namespace without any interface where the system permits one (Linux), and everywhere an audit
  hook that refuses what the module ``socket`` does;
- files: the hook refuses to change anything outside a temporary directory, which is removed afterwards. It may read
  what the user may;
- environment: empty; no file descriptors but its own; ``-I -S``, so no packages and nothing of the user's;
- output: goes nowhere, and what comes back is a few bytes, of which no more are read.

This keeps what a model writes from doing damage by accident, and from being paid for ending early: the tests must have
run to the end for the secret word to come back. It is no sandbox against an attacker. The hook is Python inside the
process it watches, the code can look for the secret word in its own memory, and a bug of CPython's leads around both.
Run models you do not trust in a container or a virtual machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from ..errors import UserError

LONGEST = 1 << 16  # characters of code and tests together: more than any answer, less than would take time to compile


@dataclass(frozen=True)
class Bounds:
    """What a program may use: ``seconds`` of wall clock, ``memory`` and ``file_size`` in bytes, ``files`` at once."""

    seconds: float = 5.0
    memory: int = 512 << 20
    file_size: int = 1 << 20
    files: int = 32


def require_bounds() -> None:
    """UserError where there are no such bounds."""
    if os.name != "posix":
        raise UserError(
            "the reward `code` needs the process limits of Linux or macOS, and this is neither; `arithmetic` works here"
        )


def passes(code: str, tests: str, bounds: Bounds = Bounds()) -> bool:
    """Whether ``code`` runs, and then every statement of ``tests`` in the same namespace, within the bounds.

    Anything else is False: an exception, an exit at whatever status, a bound reached, text that is not Python.

    Raises:
        UserError: on a system without such bounds.
    """
    require_bounds()
    if len(code) + len(tests) > LONGEST:
        return False
    word = secrets.token_hex(16).encode()
    task = {"word": word.decode(), "code": code, "tests": tests, **vars(bounds)}
    with tempfile.TemporaryDirectory(prefix="doge-code-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o777)  # noqa: S103 - it is nobody who works in it where this runs as root
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            close_fds=True,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + bounds.seconds
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(task).encode())
                process.stdin.close()
            return _said(process.stdout.fileno(), len(word), deadline) == word
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
            process.stdout.close()


def _said(pipe: int, length: int, deadline: float) -> bytes:
    """What comes out of a pipe before the deadline, but for what is beyond ``length`` and one byte."""
    said = b""
    while len(said) <= length and (left := deadline - time.monotonic()) > 0:
        if not select.select([pipe], [], [], left)[0]:
            break
        more = os.read(pipe, length + 1 - len(said))
        if not more:
            break
        said += more
    return said


# Runs before the code, in its process. Every bound is set before a letter of the code is compiled.
_GUARD = r"""
import json, os, sys
task = json.loads(sys.stdin.buffer.read())
import builtins, resource

report = os.dup(1)
nowhere = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(nowhere, fd)

def network_namespace():
    # CLONE_NEWNET alone is for root; with CLONE_NEWUSER for anybody, where the system lets them.
    NEWUSER, NEWNET = 0x10000000, 0x40000000
    flags = NEWNET if os.geteuid() == 0 else NEWUSER | NEWNET
    try:
        if hasattr(os, "unshare"):
            os.unshare(flags)
        elif sys.platform == "linux":
            import ctypes
            ctypes.CDLL(None).unshare(flags)
    except Exception:
        pass  # the hook is left

def become_nobody():
    nobody = 65534
    try:
        os.setegid(nobody)
        os.seteuid(nobody)
        with open(os.__file__), open(json.__file__):
            pass
    except OSError:
        os.seteuid(0)
        os.setegid(0)
        return
    os.seteuid(0)
    os.setgroups([])
    os.setgid(nobody)
    os.setuid(nobody)

network_namespace()
if os.geteuid() == 0:
    become_nobody()
seconds = int(task["seconds"]) + 1
for name, limit in (
    ("RLIMIT_CPU", seconds), ("RLIMIT_AS", task["memory"]), ("RLIMIT_FSIZE", task["file_size"]),
    ("RLIMIT_NOFILE", task["files"]), ("RLIMIT_CORE", 0), ("RLIMIT_NPROC", 0),
):
    try:
        resource.setrlimit(getattr(resource, name), (limit, limit))
    except (AttributeError, ValueError, OSError):
        pass  # macOS takes no RLIMIT_AS

# what the tests and many a program import anyway, while nothing is in the way
import collections, itertools, math, random, re, string  # noqa: F401

here = os.path.realpath(os.getcwd())
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED = (
    "socket.", "subprocess.", "ctypes.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill",
    "os.chdir", "os.fchdir", "os.chroot", "os.setxattr", "os.removexattr", "os.chflags", "pty.", "signal.pthread_kill",
    "_thread.start", "_posixsubprocess.", "mmap.", "syslog.", "fcntl.", "resource.", "code.__new__", "gc.get_",
    "sqlite3.",
)
UNWATCHED = {"_dbm", "_gdbm", "_posixshmem", "_multiprocessing"}  # they open files and tell no hook
PATHS = {
    "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "os.lchown": 1, "os.utime": 1, "os.mkfifo": 1, "os.mknod": 1,
}

def inside(path, real=os.path.realpath, join=os.path.join, fsdecode=os.fsdecode):
    if isinstance(path, int):
        return True  # a descriptor that was opened under the same rules
    path = real(join(here, fsdecode(path)))
    return path == here or path.startswith(here + "/") or path == "/dev/null"

def hook(event, args):
    if event.startswith(REFUSED):
        raise PermissionError(event + " is refused here")
    if event == "import" and args[0] in UNWATCHED:
        raise ImportError(args[0] + " is refused here")
    if event == "open":
        if isinstance(args[2], int) and args[2] & WRITES and not inside(args[0]):
            raise PermissionError("nothing can be written outside the working directory")
    elif event in PATHS:
        for path in args[: PATHS[event]]:
            if not inside(path):
                raise PermissionError("nothing can be changed outside the working directory")

def run(task, report):
    word, space = task.pop("word").encode(), {"__name__": "answer", "__builtins__": builtins}
    write, end = os.write, os._exit
    sys.addaudithook(hook)
    try:
        exec(compile(task["code"], "answer", "exec"), space)
        exec(compile(task["tests"], "tests", "exec"), space)
    except BaseException:
        end(1)
    write(report, word)
    end(0)

run(task, report)
"""
