"""Which paths code inside the sandbox may open, and how, as Landlock rules; no TCP, no signals out.

Landlock is asked with the rights that this kernel knows. What a kernel does not know it does not refuse; that is why
the level of a sandbox is measured and not concluded from the number here.

Source: Linux, Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

_CREATE_RULESET = 444  # the same number on all architectures
_VERSION = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
MAKE_SOCK, MAKE_SYM, REFER, TRUNCATE = 1 << 9, 1 << 12, 1 << 13, 1 << 14

_READ = READ_FILE | READ_DIR
_READ_AND_RUN = _READ | EXECUTE
# Not among these: running what was written, and making devices and FIFOs.
_OWN = _READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_SYM | REFER | TRUNCATE

# Version of the interface -> all rights on files that it knows.
_KNOWN_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_TCP_SINCE, _SCOPES_SINCE = 4, 6
_BIND_AND_CONNECT_TCP = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11


@dataclass(frozen=True)
class Ruleset:
    """What the launcher hands to the kernel.

    Args:
        files, network, scopes: Rights that are refused unless a rule allows them, as the kernel counts them.
        rules: (path, rights) for everything below that path.
    """

    files: int
    network: int
    scopes: int
    rules: tuple[tuple[str, int], ...]

    @property
    def scopes_signals(self) -> bool:
        """Whether processes outside cannot be signalled from inside."""
        return bool(self.scopes)

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"files": self.files, "network": self.network, "scopes": self.scopes, "rules": list(self.rules)}


def landlock_version() -> int:
    """The version of Landlock's interface in this kernel; 0 if there is none."""
    if not sys.platform.startswith("linux"):
        return 0
    version = int(ctypes.CDLL(None).syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION)))
    return max(version, 0)


def path_rules(
    *,
    listed: tuple[str, ...] = (),
    readable: tuple[str, ...],
    runnable: tuple[str, ...],
    own: tuple[str, ...],
    devices: tuple[str, ...],
) -> Ruleset:
    """Rules that leave nothing but the given paths.

    Args:
        listed: Folders whose names may be listed, and those below.
        readable: Files and folders to read.
        runnable: Files and folders to read and run: interpreter and libraries.
        own: Folders to do anything in but run files and make devices.
        devices: Device files to read and write.
    """
    version = landlock_version()
    known = _KNOWN_FILE_RIGHTS[min(max(version, 1), max(_KNOWN_FILE_RIGHTS))]
    rights = [(path, READ_DIR) for path in listed] + [(path, _READ) for path in readable]
    rights += [(path, _READ_AND_RUN) for path in runnable]
    rights += [(path, _OWN) for path in own] + [(path, READ_FILE | WRITE_FILE) for path in devices]
    return Ruleset(
        files=known,
        network=_BIND_AND_CONNECT_TCP if version >= _TCP_SINCE else 0,
        scopes=_ABSTRACT_SOCKETS_AND_SIGNALS if version >= _SCOPES_SINCE else 0,
        rules=tuple((path, wanted & known) for path, wanted in rights),
    )
