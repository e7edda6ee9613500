"""Which files are seen inside the sandbox: interpreter, packages, system libraries, fonts, and four own folders.

Nothing of the machine is there unless it is listed here. The folders of programs, with shells and compilers, are not.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
_SYSTEM_DATA = (
    "/etc/ld.so.cache", "/etc/localtime", "/etc/fonts", "/usr/share/fontconfig", "/usr/share/fonts",
    "/usr/local/share/fonts", "/usr/share/zoneinfo", "/usr/share/matplotlib",
)  # fmt: skip
DEVICES = ("/dev/null", "/dev/full", "/dev/random", "/dev/urandom")  # /dev/zero, mapped shared, is uncounted memory

OWN_FOLDERS = {"data": "/mnt/data", "home": "/mnt/home", "tmp": "/tmp", "shm": "/dev/shm"}
"""Folders that can be written to: what they are for -> where they are seen at level FULL."""

_TEXTS = {
    "/etc/passwd": "root:x:0:0::/:/nologin\nuser:x:1000:1000::/mnt/home:/nologin\n",
    "/etc/group": "root:x:0:\nuser:x:1000:\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "/etc/hosts": "127.0.0.1 localhost\n",
}
_LINKS = {
    "/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
}  # fmt: skip
# What /proc says about the whole machine and no computation needs.
_HIDDEN_IN_PROC = (
    "acpi", "asound", "bus", "driver", "fs", "irq", "scsi", "sysvipc", "tty", "cmdline", "config.gz", "iomem",
    "ioports", "kallsyms", "kcore", "key-users", "keys", "kmsg", "kpagecount", "kpageflags", "latency_stats", "modules",
    "sched_debug", "slabinfo", "sysrq-trigger", "timer_list", "vmallocinfo",
)  # fmt: skip


@dataclass(frozen=True)
class ReadOnly:
    """What can be read inside, as paths of this machine.

    Args:
        runnable: Interpreter, packages and libraries.
        readable: Data: fonts, time zones.
    """

    runnable: tuple[str, ...]
    readable: tuple[str, ...]


def read_only() -> ReadOnly:
    """The files that the running interpreter needs to start again, with its installed packages."""
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix}
    wanted = [sys.executable, *_SYSTEM_LIBRARIES]
    wanted += [f"{prefix}/{part}" for prefix in prefixes for part in ("lib", "lib64")]
    wanted += [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    # Not the other entries of the path: what is being developed, and the folder in which the server was started.
    wanted += [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return ReadOnly(runnable=_present(wanted), readable=_present([*_SYSTEM_DATA, f"{sys.prefix}/pyvenv.cfg"]))


def _present(paths: list[str]) -> tuple[str, ...]:
    """The paths that exist, as they are called and as they are really, without those that lie in others."""
    both = {name for path in paths if os.path.exists(path) for name in (os.path.abspath(path), os.path.realpath(path))}
    kept: list[str] = []
    for path in sorted(both):
        if not any(path.startswith(parent + "/") for parent in kept):
            kept.append(path)
    return tuple(kept)


def as_json(files: ReadOnly, *, disk_bytes: int, file_count: int) -> dict[str, Any]:
    """What the launcher builds the new root from."""
    shown = [*files.runnable, *files.readable, *(device for device in DEVICES if os.path.exists(device))]
    return {
        "binds": [(os.path.realpath(path), path) for path in shown],
        "texts": _TEXTS,
        "links": _LINKS,
        "own": OWN_FOLDERS,
        "hidden_in_proc": _HIDDEN_IN_PROC,
        "disk_bytes": disk_bytes,
        "files": file_count + len(OWN_FOLDERS) + 1,
    }
