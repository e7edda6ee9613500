"""The folder in which built libraries are kept, and what is remembered of each.

    CACHE/kernels/glm-avx512-SOURCES-COMPILER.so        renamed to this name when it is complete
    CACHE/kernels/glm-avx512-SOURCES-COMPILER.json      its checksum, and what came out when it was tried
    CACHE/kernels/glm-avx512-SOURCES-COMPILER.lock      held by the process that builds it

A library is code that runs as this user. So the folder and its files must belong to the user, or to root, and nobody
else may write there; and a library is taken only if its checksum is the one that its builder wrote down.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from glmkit.errors import KernelsError

_ELSEWHERE = "GLMKIT_CACHE=FOLDER names another"


@dataclass(frozen=True)
class Record:
    """What is remembered of a library.

    Args:
        sha256: Its checksum.
        compiler: First line of the compiler's version.
        openmp: Whether it can use several threads.
        machine: Where it was tried; empty if nowhere yet.
        problem: What was wrong with it there, None if nothing.
    """

    sha256: str
    compiler: str
    openmp: bool
    machine: str = ""
    problem: str | None = None


def cache_folder() -> Path:
    """The folder for libraries, made if need be: in `GLMKIT_CACHE`, else in the user's cache.

    Raises:
        KernelsError: It cannot be made, or others could have put something there.
    """
    own, base = os.environ.get("GLMKIT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            root = Path(own).expanduser().absolute()
        else:
            root = (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "glmkit"
        folder = root / "kernels"
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        distrust = _distrust(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where the home folder is
        raise cannot_write(Path(own or base or "~/.cache"), error) from error
    if distrust:
        raise KernelsError(f"{folder} {distrust}", hint=_ELSEWHERE)
    return folder


def cannot_write(folder: Path, error: Exception) -> KernelsError:
    """The error for a folder that takes no files.

    Args:
        folder: The folder.
        error: What the system said.
    """
    return KernelsError(f"cannot write in {folder}: {getattr(error, 'strerror', None) or error}", hint=_ELSEWHERE)


def _distrust(path: Path) -> str | None:
    """Why others could have changed a file or folder; None if they could not."""
    info = path.stat()
    if info.st_uid not in (os.getuid(), 0):
        return f"belongs to user {info.st_uid}"
    if info.st_mode & 0o022:
        return f"may be written by others (mode {info.st_mode & 0o777:o})"
    return None


def read_record(library: Path) -> Record | None:
    """What is remembered of a library; None unless the file is there, whole, and nobody else's.

    Args:
        library: Where it lies.
    """
    beside = library.with_suffix(".json")
    try:
        record = Record(**json.loads(beside.read_text(encoding="utf-8")))
        trusted = _distrust(library) is None and _distrust(beside) is None
        return record if trusted and checksum(library) == record.sha256 else None
    except (OSError, ValueError, TypeError):
        return None


def remember(library: Path, record: Record) -> None:
    """Writes the record beside a library; where that is not allowed the library is tried again next time.

    Args:
        library: Where it lies.
        record: What to remember.
    """
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(prefix=".", suffix=".json", dir=library.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(record), file)
        os.chmod(name, 0o644)
        os.replace(name, library.with_suffix(".json"))


def checksum(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits.

    Args:
        path: The file.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def turn(library: Path, most_seconds: float) -> Iterator[None]:
    """Waits until no other process builds this library; goes on without where files cannot be locked.

    Args:
        library: Where it will lie.
        most_seconds: After these it goes on in any case: building twice is a waste and no more.
    """
    try:
        import fcntl

        file = library.with_suffix(".lock").open("w")
    except (ImportError, OSError):
        yield
        return
    until = time.monotonic() + most_seconds
    with file:
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        yield
