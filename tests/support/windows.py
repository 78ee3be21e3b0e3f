"""What Python lacks on Windows, taken away from this process: modules, functions, and the renaming of open files.

`python -m support.windows modules` imports every module of rac so; `python -m support.windows ARGUMENTS` is `rac` so.
"""

from __future__ import annotations

import importlib
import mmap
import os
import pkgutil
import select
import signal
import sys
import types
from pathlib import Path

MODULES = ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "readline", "triton")
FUNCTIONS = (
    *("preadv", "pread", "pwritev", "pwrite", "readv", "writev", "sendfile", "posix_fadvise", "posix_fallocate"),
    *("sched_getaffinity", "sched_setaffinity", "register_at_fork", "fork", "forkpty", "killpg", "setsid", "getpgid"),
    *("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY", "O_SYNC", "O_TMPFILE", "O_DIRECT", "O_NOATIME"),
    *("sysconf", "sysconf_names", "statvfs", "getuid", "geteuid", "getgid", "uname", "mkfifo", "chown", "fchown"),
    *("fchmod", "getloadavg", "memfd_create", "copy_file_range", "splice", "confstr", "nice", "sync", "getpriority"),
)


def hide(*others: str) -> None:
    """Take them away, for good, once numpy and `others` are imported, which ask by sys.platform what there is."""
    import fcntl

    for name in ("subprocess", "concurrent.futures.process", "tempfile", "filelock", "numpy", *others):
        importlib.import_module(name)

    taken = types.ModuleType("msvcrt")
    taken.LK_NBLCK = 2

    def locking(fd: int, mode: int, size: int) -> None:
        assert (mode, size) == (2, 1)
        assert os.lseek(fd, 0, os.SEEK_CUR) > 1 << 40, "what is locked is a byte that others could want to read"
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    taken.locking = locking
    sys.modules["msvcrt"] = taken
    for name in MODULES:
        sys.modules[name] = None
    for name in FUNCTIONS:
        if hasattr(os, name):
            delattr(os, name)
    for name in ("poll", "epoll"):
        delattr(select, name)
    for name in (
        "SIGPIPE",
        "SIGHUP",
        "SIGKILL",
        "SIGALRM",
        "SIGUSR1",
        "SIGCHLD",
        "alarm",
        "setitimer",
        "pthread_sigmask",
    ):
        delattr(signal, name)
    for name in [n for n in dir(mmap) if n.startswith(("MAP_", "PROT_", "MADV_"))]:
        delattr(mmap, name)
    for name in ("replace", "rename", "unlink", "remove", "rmdir"):
        setattr(os, name, _closed_only(getattr(os, name)))


def _closed_only(function):
    """A function that changes names, for files that this process has not open, and has not mapped."""

    def changed(*paths, **how):
        held = {os.readlink(p) for p in Path("/proc/self/fd").iterdir() if os.path.lexists(p)}
        held |= {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        for path in paths if not how else ():
            if os.path.realpath(path) in held:
                raise PermissionError(13, "it is being used by another process", str(path))
        return function(*paths, **how)

    return changed


def modules() -> None:
    """Import every module of rac, but for those of packages that are not for Windows or not installed here."""
    import rac
    from rac.native.library import CPUS

    libraries = {f"rac.native._{cpu}" for cpu in CPUS}  # C kernels, which look like modules
    for info in pkgutil.walk_packages(rac.__path__, "rac.", onerror=lambda name: None):
        if info.name.endswith(".__main__") or info.name in libraries:
            continue
        try:
            importlib.import_module(info.name)
        except ImportError as e:
            if not any(name in str(e) for name in ("triton", "vllm", "diffusers")):
                raise
    print(len([m for m in sys.modules if m.startswith("rac.")]))


if __name__ == "__main__":
    if sys.argv[1:] == ["modules"]:
        hide("torch", "transformers.modeling_utils", "safetensors.torch")
        modules()
    else:
        hide()
        from rac.cli import main

        sys.exit(main())
