"""The files that code leaves in its working directory, read without being led astray.

The folder belongs to hostile code, which may go on changing it: a name can be a link, a pipe or a device, and can
become one at any moment. So nothing is opened by path: the folder is a handle that was opened before any such code ran,
and what is read is the handle that was checked.
"""

from __future__ import annotations

import contextlib
import os
import stat
import unicodedata
from dataclasses import dataclass

from glmkit.errors import UsageError

MAX_FILES = 1000
"""As many are listed."""

_ODD_LETTERS = '/\\"<>|:*?'


@dataclass(frozen=True)
class File:
    """A file that code has written into its working directory.

    Args:
        name: Its name; safe to show, no folder in it.
        size_bytes: Its size.
    """

    name: str
    size_bytes: int


def list_files(folder: int) -> list[File]:
    """The regular files in a folder, by name; links, pipes, devices, hidden files and odd names are left out.

    Args:
        folder: File descriptor of the folder.
    """
    found: list[File] = []
    with os.scandir(folder) as entries:
        for entry, _ in zip(entries, range(10 * MAX_FILES), strict=False):
            with contextlib.suppress(OSError):
                state = entry.stat(follow_symlinks=False)
                if _is_plain(state) and is_safe_name(entry.name) and len(found) < MAX_FILES:
                    found.append(File(entry.name, state.st_size))
    return sorted(found, key=lambda file: file.name)


def read_file(folder: int, name: str, max_bytes: int) -> bytes:
    """Reads a file.

    Args:
        folder: File descriptor of the folder.
        name: A name that `list_files` gives.
        max_bytes: Largest size.

    Raises:
        UsageError: There is no such regular file, or it is larger.
    """
    if not is_safe_name(name):
        raise UsageError("there is no such file", hint="only files that are listed can be read")
    try:
        # O_PATH opens nothing that could block or have an effect; the handle then means the same file for good.
        handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            state = os.fstat(handle)
            if not _is_plain(state) or state.st_size > max_bytes:
                raise UsageError(f"{name} is not a regular file of at most {max_bytes:,} bytes")
            with open(f"/proc/self/fd/{handle}", "rb") as file:
                return file.read(max_bytes)
        finally:
            os.close(handle)
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {os.strerror(error.errno or 0)}") from None


def is_safe_name(name: str) -> bool:
    """Whether a file name can be shown and be sent in a header.

    Args:
        name: As the folder lists it.

    Returns:
        False for hidden files and for names with control, formatting or unprintable characters, or with slashes.
    """
    return (
        0 < len(name.encode("utf-8", "surrogateescape")) <= 200
        and name[0] not in ".~- "
        and not any(letter in _ODD_LETTERS for letter in name)
        and not any(unicodedata.category(letter)[0] in "CZ" for letter in name.replace(" ", ""))
    )


def _is_plain(state: os.stat_result) -> bool:
    """A regular file with one name: a second name could be that of a file elsewhere."""
    return stat.S_ISREG(state.st_mode) and state.st_nlink == 1
