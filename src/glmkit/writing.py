"""Writing folders and weights so that nothing is ever half there: written beside, forced to disk, renamed.

with write_folder(dst) as new:        appears under its name only when the block ends well
    save_tensors(new, tensors)        safetensors in shards with the official names
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from glmkit.checkpoint import DTYPE_NAMES, INDEX_SUFFIX, READ_CHUNK_BYTES, shown_path
from glmkit.errors import OutputError


class ShapedTensor(Protocol):
    """Anything with a shape and a dtype: a tensor, also one on the meta device, or a TensorInfo."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Shaped:
    """What a tensor of a new folder will be, before it is made.

    Args:
        shape: The sizes of its dimensions.
        dtype: The type of its numbers.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


@contextlib.contextmanager
def write_folder(dst: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Makes a folder that appears under its name only when it is complete.

    Args:
        dst: The folder to make; one that exists and is empty is taken as not existing.
        overwrite: Replace an existing folder, with everything in it.

    Yields:
        A new empty folder beside `dst`. When the block ends well its files are forced to disk and it is renamed to
        `dst`; when the block raises it is removed and `dst` stays as it was.

    Raises:
        OutputError: `dst` exists and is not to be replaced, or cannot be written.
    """
    target = Path(os.path.realpath(Path(dst).expanduser()))
    if target.exists() and not target.is_dir():
        raise OutputError(f"{shown_path(target)} is a file, expected a folder or nothing")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise OutputError(
            f"{shown_path(target)} exists and is not empty",
            hint="choose another name, or --overwrite (in Python overwrite=True)",
        )
    temporary = make_folder_beside(target)
    try:
        yield temporary
        try:
            sync_folder(temporary)
            put_in_place(temporary, target)
        except OSError as error:
            raise OutputError(f"cannot write {shown_path(target)}: {error.strerror}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def make_folder_beside(target: Path) -> Path:
    """Makes the empty folder `.NAME.tmp-12345678` in which something is built before it gets its name.

    Args:
        target: What it will be called; missing folders above it are made.

    Returns:
        The new folder.

    Raises:
        OutputError: It cannot be made.
    """
    temporary = target.parent / f".{target.name}.tmp-{secrets.token_hex(4)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise OutputError(f"cannot make a folder in {shown_path(target.parent)}: {error.strerror}") from error
    return temporary


def sync_folder(folder: Path) -> None:
    """Forces every file below a folder, and the folders themselves, to disk.

    Args:
        folder: The folder.

    Raises:
        OSError: The disk refuses.
    """
    for root, _, files in os.walk(folder):
        for file in files:
            _sync(Path(root) / file)
        _sync(Path(root))


def put_in_place(temporary: Path, target: Path) -> None:
    """Gives a finished folder its name, and forces that to disk; a folder that has the name is replaced.

    Args:
        temporary: The finished folder, beside the target and already on disk.
        target: Its name.

    Raises:
        OSError: The disk refuses; what had the name keeps it.
    """
    old: Path | None = None
    if target.is_dir() and any(target.iterdir()):
        # Two steps, because a rename cannot replace a full folder; if the second fails the first is undone.
        old = target.parent / f".{target.name}.old-{secrets.token_hex(4)}"
        os.rename(target, old)
    try:
        os.rename(temporary, target)
    except OSError:
        if old is not None:
            os.rename(old, target)
        raise
    _sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomic(path: str | os.PathLike[str], text: str, *, private: bool = False) -> None:
    """Writes a UTF-8 text file that is seen either not at all or whole.

    Args:
        path: The file; an existing one is replaced.
        text: Its content; half a pair of surrogates, which UTF-8 cannot hold, is written as an escape.
        private: Whether only its owner may read it.

    Raises:
        OutputError: The file cannot be written.
    """
    write_bytes_atomic(path, text.encode("utf-8", errors="backslashreplace"), private=private)


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes, *, private: bool = False) -> None:
    """Writes a file that is seen either not at all or whole.

    Args:
        path: The file; an existing one is replaced.
        data: Its content.
        private: Whether only its owner may read it.

    Raises:
        OutputError: The file cannot be written.
    """
    target = Path(path)
    temporary = target.parent / f".{target.name}.tmp-{secrets.token_hex(4)}"
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600 if private else 0o666)
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync(target.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"cannot write {shown_path(target)}: {error.strerror}") from error
        raise


def save_tensors(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, ShapedTensor],
    *,
    fetch: Callable[[str], torch.Tensor] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    file_name: str = "model.safetensors",
) -> list[Path]:
    """Writes tensors as safetensors, in shards with an index if they do not fit into one file.

    Args:
        folder: An existing folder, best the one that `write_folder` yields.
        tensors: Name -> tensor. With `fetch`, only their shapes and dtypes are used.
        fetch: Gives the tensor of a name when its turn comes, so that not all need to be in memory at once.
        max_shard_bytes: The most tensor data in one file; a larger tensor gets a file of its own.
        file_name: Name if it is one file; shards are called `model-00001-of-00002.safetensors` and so on.

    Returns:
        The weight files written.

    Raises:
        OutputError: A file cannot be written, a dtype is not supported, or `fetch` gave another tensor than promised.
    """
    shards: list[dict[str, ShapedTensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise OutputError(f"tensor {name} has dtype {tensor.dtype}, which is not written")
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= size
    stem, suffix = os.path.splitext(file_name)
    count = len(shards)
    files = [f"{stem}-{number:05d}-of-{count:05d}{suffix}" for number in range(1, count + 1)]
    paths = [Path(folder) / file for file in (files if count > 1 else [file_name])]
    for path, shard in zip(paths, shards):
        try:
            _write_shard(path, shard, fetch)
        except OSError as error:
            raise OutputError(f"cannot write {shown_path(path)}: {error.strerror}") from error
    if count > 1:
        total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text_atomic(Path(folder) / (file_name + INDEX_SUFFIX), json.dumps(index, indent=2) + "\n")
    return paths


def _write_shard(path: Path, tensors: Mapping[str, ShapedTensor], fetch: Callable[[str], torch.Tensor] | None) -> None:
    # Widest numbers first, so that every tensor is aligned to its own item size, which some readers need.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in ordered:
        end = position + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb", buffering=0) as file:
        _write_all(file, memoryview(struct.pack("<Q", len(raw)) + raw))
        for name, promised in ordered:
            tensor = promised if fetch is None else fetch(name)
            if not isinstance(tensor, torch.Tensor):
                raise OutputError(f"{name} is no tensor; give fetch= to get it")
            if tuple(tensor.shape) != tuple(promised.shape) or tensor.dtype != promised.dtype:
                raise OutputError(
                    f"tensor {name} is {tensor.dtype} {list(tensor.shape)}, "
                    f"promised was {promised.dtype} {list(promised.shape)}"
                )
            data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            _write_all(file, data.numpy().data)


def _write_all(file: io.FileIO, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += file.write(data[done : done + READ_CHUNK_BYTES])
