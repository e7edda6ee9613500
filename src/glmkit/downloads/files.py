"""What a download is: the files of one commit, those of them that are needed, and how each is known to be whole."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from glmkit.errors import GlmkitError

if TYPE_CHECKING:
    import hashlib

# The tokenizer's and the model's code are read as text for signs of the generation; no python file is ever run.
_PATTERNS = (
    "*.json",
    "*.model",
    "*.jinja",
    "vocab.txt",
    "merges.txt",
    "tokenization_chatglm.py",
    "modeling_chatglm.py",
    "LICENSE*",
    "MODEL_LICENSE*",
)
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")
_READ_BYTES = 8 * 2**20
_KEPT_FREE_BYTES = 2**28  # a disk that is full to the last byte breaks what else runs on the machine


AGAIN = "the same command goes on where this one stopped"


class DownloadError(GlmkitError, OSError):
    """A model could not be fetched: no way to its source, not there, not allowed, no room, or damaged on the way."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository, as its listing describes it.

    Args:
        name: Its name; all files of a checkpoint lie in one folder.
        size_bytes: Its size.
        sha256: SHA-256 of its content in hexadecimal; None where only `git_sha1` is told.
        git_sha1: The id that git gives its content; None where `sha256` is told.
    """

    name: str
    size_bytes: int
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def digest(self) -> str:
        """What identifies its content, and names it in the hub's cache; "" if the listing does not tell it."""
        return self.sha256 or self.git_sha1 or ""


@dataclass(frozen=True)
class Plan:
    """What would be fetched, before anything is.

    Args:
        source: "hub" or "modelscope".
        repository: `organisation/name` there.
        revision: What was asked for: a branch, a tag or a commit.
        commit: The commit that it is; on ModelScope the revision again, whose files are pinned by their SHA-256.
        files: The needed files.
        folder: Where the model will lie.
        in_cache: Whether that is the source's cache, and not a folder of the user's.
        missing_bytes: What is not there yet, parts of files counted.
    """

    source: str
    repository: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]
    folder: Path
    in_cache: bool
    missing_bytes: int

    @property
    def size_bytes(self) -> int:
        """The size of all its files."""
        return sum(file.size_bytes for file in self.files)


def choose_needed(repository: str, files: Iterable[RemoteFile]) -> tuple[RemoteFile, ...]:
    """Picks from a repository what loading a model reads: one form of the weights, configs, tokenizer, licence.

    Args:
        repository: Its id, for the error.
        files: All of it. Files in folders within it are left out, and names that could mean anything else.

    Returns:
        The needed ones, small ones first.

    Raises:
        DownloadError: There are no weights.
    """
    here = [file for file in files if _FILE_NAME.fullmatch(file.name)]
    for weights in ("*.safetensors", "*.bin"):
        if any(fnmatchcase(file.name, weights) for file in here):
            break
    else:
        raise DownloadError(
            f"{repository} has no weights: neither .safetensors nor .bin files",
            hint="check the name; a data set, an adapter or a GGUF repository is no checkpoint",
        )
    patterns = (*_PATTERNS, weights)
    chosen = [file for file in here if any(fnmatchcase(file.name, pattern) for pattern in patterns)]
    return tuple(sorted(chosen, key=lambda file: (file.size_bytes, file.name)))


def bytes_to_fetch(file: RemoteFile, final: Path, part: Path) -> int:
    """How much of a file is in neither of its places: under its name, or growing."""
    there = next((path.stat().st_size for path in (final, part) if path.is_file()), 0)
    return max(file.size_bytes - there, 0)


def check_room(folder: Path, needed_bytes: int) -> None:
    """Sees to it that a download will fit before it begins.

    Args:
        folder: Where it goes; it need not exist yet.
        needed_bytes: What is still to be fetched.

    Raises:
        DownloadError: The disk has less room.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if needed_bytes and needed_bytes + _KEPT_FREE_BYTES > free_bytes:
        raise DownloadError(
            f"not enough room in {existing}: {needed_bytes / 1e9:.1f} GB are to be fetched, {free_bytes / 1e9:.1f} GB"
            " are free",
            hint="glm rm MODEL frees what is no longer used; --to, HF_HOME or MODELSCOPE_CACHE name another disk",
        )


def new_hash(file: RemoteFile) -> hashlib._Hash:
    """Begins the hash by which a file's content is known: SHA-256, or git's SHA-1 over a header and the content."""
    import hashlib

    if file.sha256:
        return hashlib.sha256()
    digest = hashlib.sha1(usedforsecurity=False)
    digest.update(f"blob {file.size_bytes}\0".encode())
    return digest


def hash_part(path: Path, file: RemoteFile) -> hashlib._Hash:
    """Hashes what is on disk of a file, all of it or a first part."""
    digest = new_hash(file)
    with open(path, "rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest


def is_whole(path: Path, file: RemoteFile) -> bool:
    """Whether a file on disk is the one that the listing describes, to the last bit."""
    try:
        if os.path.getsize(path) != file.size_bytes:
            return False
    except OSError:
        return False
    return not file.digest or hash_part(path, file).hexdigest() == file.digest


Tell = Callable[[int], None]
"""Takes how many bytes more are there; negative if some were thrown away."""
