"""The one gate through which a checkpoint folder is opened.

    folder --open_folder--> config.json, index, headers of all shards    everything is checked, nothing allocated
           --check_tensors--> names and shapes against the model         still nothing allocated
           --Folder.read--> one tensor after the other

A folder may come from anywhere. So: plain names inside the folder only, regular files only, each opened once and used
through that handle; sizes are compared with the files before anything is allocated; no file is mapped (a mapped file
that somebody shortens kills the process) and nothing in a file is ever run.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import math
import os
import re
import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from glmkit.errors import CheckpointError
from glmkit.pickles import MAX_DIMENSIONS, FileRefused, inspect_bin, inspect_training_file, printable

logger = logging.getLogger("glmkit")

MODEL_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""File names of a model's weights, the preferred first. P-Tuning v2 checkpoints use them too."""
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""File names of a PEFT adapter's weights, the preferred first."""

MAX_CONFIG_BYTES = 2 << 20
MAX_INDEX_BYTES = 8 << 20
MAX_HEADER_BYTES = 12 << 20
MAX_JSON_VALUES = 300_000  # a value of two bytes in a file takes a hundred in memory
MAX_METADATA_CHARACTERS = 1 << 20
MAX_TENSORS = 20_000  # GLM-130B has 1,124, and in eight parts as many in each
MAX_SHARDS = 256  # all are held open, and a process usually may open 1024 files
MAX_CONFIG_DEPTH = 32
READ_CHUNK_BYTES = 32 << 20  # large enough for full speed, small enough that Ctrl-C is answered at once

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
INDEX_SUFFIX = ".index.json"
_VOCABULARY_TENSOR = re.compile(r"(word_embeddings|output_layer|lm_head)\.weight$")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file, described but not read.

    Args:
        name: Its official name.
        shape: The sizes of its dimensions.
        dtype: The type of its numbers.
        file: Base name of the file that holds it.
        offset_bytes: Where its first number lies, from the start of the file.
        stride: Distance between neighbours of each dimension, in numbers; None if the numbers lie in order.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    offset_bytes: int
    stride: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Size of the tensor in memory, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


# Opening -------------------------------------------------------------------------------------------------------------


def open_folder(
    path: str | os.PathLike[str],
    *,
    weights: Sequence[str] = MODEL_WEIGHTS,
    config: str | None = "config.json",
) -> Folder:
    """Opens a checkpoint folder and checks everything that can be checked without reading tensor data.

    Args:
        path: The folder. Use `weights=ADAPTER_WEIGHTS, config="adapter_config.json"` for a PEFT adapter.
        weights: File names to look for; the first that exists is taken. Empty: the weights are left alone.
        config: The JSON file to read into `Folder.config`; None for a folder that has none.

    Returns:
        The folder, to be used as a context manager: it holds its files open.

    Raises:
        CheckpointError: Something in it is missing, damaged, hostile or inconsistent. All of them are listed.
    """
    folder = Folder(Path(path).expanduser())
    try:
        problems = _Problems()
        if config is not None:
            with problems.collect(config):
                # A key that stands twice is no problem here: like every other reader of this file we take the last.
                data = _required_bytes(folder, config, MAX_CONFIG_BYTES)
                folder.config = _parse_object(data, MAX_CONFIG_DEPTH, unique_keys=False)
        if weights:
            _add_weights(folder, weights, problems)
        problems.raise_for(folder)
    except BaseException:
        folder.close()
        raise
    return folder


class Folder:
    """An open checkpoint folder; made by `open_folder`.

    Attributes:
        path: The folder.
        config: The content of its config file.
        tensors: Name -> description of every tensor, in the order of the files.
        training: What a training checkpoint (a .pt file) says beside its weights, such as the iteration.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.training: dict[str, Any] = {}
        self._files: dict[str, io.FileIO] = {}
        try:
            self._directory = _Directory(path)
        except (OSError, ValueError) as error:
            hint = "give the folder, not a file in it" if path.is_file() else None
            raise CheckpointError(shown_path(path), [f"the folder {_reason(error)}"], hint=hint) from error

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes all files; the descriptions stay."""
        for file in self._files.values():
            file.close()
        self._directory.close()

    @property
    def nbytes(self) -> int:
        """Size of all tensors in memory, in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    def has(self, name: str) -> bool:
        """Whether the folder has a file of this base name that the gate would open."""
        try:
            with self._directory.open(name):
                return True
        except (FileRefused, OSError):
            return False

    def read_bytes(self, name: str, limit_bytes: int = 1 << 20) -> bytes | None:
        """Reads a small file.

        Args:
            name: Its base name.
            limit_bytes: The most that is accepted.

        Returns:
            The content, or None if there is no such file.

        Raises:
            CheckpointError: The file is too large or no regular file inside the folder.
        """
        try:
            return _small_file(self._directory, name, limit_bytes)
        except FileNotFoundError:
            return None
        except (FileRefused, OSError) as error:
            raise self._error(name, error) from error

    def read_text(self, name: str, limit_bytes: int = 1 << 20) -> str | None:
        """Reads a small UTF-8 text file; like `read_bytes`."""
        data = self.read_bytes(name, limit_bytes)
        try:
            return None if data is None else data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(name, FileRefused(f"is not UTF-8 text ({error.reason})")) from error

    def read_object(self, name: str) -> dict[str, Any] | None:
        """Reads a small JSON file of the folder.

        Args:
            name: Its plain name.

        Returns:
            The object in it; None if there is no such file.

        Raises:
            CheckpointError: It cannot be read, or is no JSON object.
        """
        data = self.read_bytes(name)
        if data is None:
            return None
        try:
            return _parse_object(data, MAX_CONFIG_DEPTH, unique_keys=False)
        except FileRefused as error:
            raise self._error(name, error) from error

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Reads tensors one at a time, file by file and in the order of the file, each into memory of its own.

        Args:
            names: Which tensors; None for all.

        Yields:
            Name and tensor (CPU, contiguous, the dtype of the file).

        Raises:
            CheckpointError: A name is unknown, or a file was changed after it was opened.
        """
        wanted = list(self.tensors) if names is None else list(dict.fromkeys(names))
        unknown = [f"there is no tensor {printable(name)}" for name in wanted if name not in self.tensors]
        if unknown:
            raise CheckpointError(shown_path(self.path), unknown)
        position = {file: number for number, file in enumerate(self._files)}
        infos = [self.tensors[name] for name in wanted]
        # Pages of a large checkpoint would push out everything else, the model's own memory included; those of a small
        # one are worth keeping for the next start.
        drop_cache = self.nbytes > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
        for info in sorted(infos, key=lambda info: (position[info.file], info.offset_bytes)):
            try:
                tensor = _read_tensor(self._files[info.file], info, drop_cache=drop_cache)
            except (FileRefused, OSError, ValueError) as error:
                raise self._error(info.file, error) from error
            yield info.name, tensor

    def read_part(self, name: str, dim: int, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Reads some rows or columns of a tensor; never more than they and one block of the file are in memory.

        Args:
            name: The tensor's name.
            dim: 0 for rows, 1 for columns of a matrix.
            ranges: Pairs (first, behind the last), in the order wanted.

        Returns:
            The rows or columns one behind the other (CPU, contiguous, the dtype of the file).

        Raises:
            CheckpointError: The file was changed after it was opened.
        """
        info = self.tensors[name]
        if info.stride is not None and not _is_in_order(info.shape, info.stride):  # no file in use has such a tensor
            [(_, whole)] = self.read([name])
            return torch.cat([whole.narrow(dim, first, last - first) for first, last in ranges], dim)
        row_bytes = math.prod(info.shape[1:]) * info.dtype.itemsize

        def rows(first: int, last: int) -> torch.Tensor:
            offset = info.offset_bytes + first * row_bytes
            part = replace(info, shape=(last - first, *info.shape[1:]), stride=None, offset_bytes=offset)
            return _read_tensor(self._files[info.file], part, drop_cache=False)

        try:
            if dim == 0:
                parts = [rows(first, last) for first, last in ranges]
                return torch.cat(parts) if len(parts) > 1 else parts[0]
            at_once = max(1, READ_CHUNK_BYTES // max(1, row_bytes))
            result = torch.empty(info.shape[0], sum(last - first for first, last in ranges), dtype=info.dtype)
            for start in range(0, info.shape[0], at_once):
                block = rows(start, min(start + at_once, info.shape[0]))
                torch.cat([block[:, first:last] for first, last in ranges], 1, out=result[start : start + len(block)])
            return result
        except (FileRefused, OSError, ValueError) as error:
            raise self._error(info.file, error) from error

    def _error(self, name: str, error: Exception) -> CheckpointError:
        hint = error.hint if isinstance(error, FileRefused) else None
        return CheckpointError(shown_path(self.path), [f"{printable(name)} {_reason(error)}"], hint=hint)


class _Directory:
    """A folder opened once; files are opened by plain name relative to that handle."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    __del__ = close

    def names(self) -> list[str]:
        return os.listdir(self._fd)

    def open(self, name: str) -> io.FileIO:
        """Opens a regular file; raises FileNotFoundError, FileRefused or another OSError."""
        check_plain_name(name)
        if self._fd < 0:
            raise FileRefused("cannot be read: the folder has been closed")
        entry = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        if stat.S_ISLNK(entry.st_mode):
            return self._open_link(os.readlink(name, dir_fd=self._fd))
        return _open_regular(name, self._fd)

    def _open_link(self, target: str) -> io.FileIO:
        """Opens what a link points to: a file beside it, or a blob of the same Hugging Face cache entry."""
        head, name = os.path.split(target)
        check_plain_name(name)
        here = os.path.realpath(self._path)
        if head == "" or (os.path.isabs(head) and os.path.realpath(head) == here):
            return _open_regular(name, self._fd)
        if head == "../../blobs" and os.path.basename(os.path.dirname(here)) == "snapshots":
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            blobs = os.open(head, flags, dir_fd=self._fd)
            try:
                return _open_regular(name, blobs)
            finally:
                os.close(blobs)
        raise FileRefused(
            f"is a link out of the folder, to {printable(target)}", hint="put the file itself into the folder"
        )


def _open_regular(name: str, directory: int) -> io.FileIO:
    # Looked at before opening, because opening a device may do something and opening a pipe waits; and again after it,
    # because the name may have been given to another file meanwhile.
    if not stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
        raise FileRefused("is not a regular file")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = io.FileIO(os.open(name, flags, dir_fd=directory), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FileRefused("is not a regular file")
    return file


def check_plain_name(name: str) -> None:
    """Refuses a file name that could lead out of its folder, or fool a reader of messages.

    Args:
        name: A name from an index file, a link or a caller.

    Raises:
        FileRefused: It has a separator (also in disguise), a control character, or is longer than 255 bytes.
    """
    size = len(name.encode("utf-8", errors="surrogatepass"))
    if not name or name in (".", "..") or size > 255 or not name.isprintable() or set(name) & set("/\\%"):
        raise FileRefused("is not a plain file name inside the folder")


def _small_file(directory: _Directory, name: str, limit_bytes: int) -> bytes:
    with directory.open(name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit_bytes:
            raise FileRefused(f"has {size} bytes, at most {limit_bytes} expected")
        return _reader(file)(0, size)


def _required_bytes(folder: Folder, name: str, limit_bytes: int) -> bytes:
    try:
        return _small_file(folder._directory, name, limit_bytes)
    except FileNotFoundError as error:
        has_adapter = name == "config.json" and folder.has("adapter_config.json")
        hint = "this is a PEFT adapter: load its base model and give this folder as adapter=" if has_adapter else None
        raise FileRefused("is missing", hint=hint) from error


class _Problems:
    """Collects everything wrong with a folder, so that one error can tell it all."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.hint: str | None = None

    def add(self, problem: str) -> None:
        self.found.append(problem)

    @contextlib.contextmanager
    def collect(self, name: str) -> Iterator[None]:
        """Turns a failure inside the block into a problem of the file `name`."""
        try:
            yield
        except (FileRefused, OSError) as error:
            self.add(f"{printable(name)} {_reason(error)}")
            if isinstance(error, FileRefused):
                self.hint = self.hint or error.hint

    def raise_for(self, folder: Folder) -> None:
        if self.found:
            raise CheckpointError(shown_path(folder.path), self.found, hint=self.hint)


# Which tensors are where ---------------------------------------------------------------------------------------------


def _add_weights(folder: Folder, candidates: Sequence[str], problems: _Problems) -> None:
    """Chooses the weight file, inspects its shards and fills folder.tensors."""
    present = set(folder._directory.names())
    found = [name for name in candidates if name in present]
    if not found:
        problems.add(f"there are no weights: expected one of {', '.join(candidates)}")
        if any(re.search(r"-\d+-of-\d+\.(safetensors|bin)$", name) for name in present):
            problems.hint = problems.hint or "the shards are there, but the .index.json that belongs to them is missing"
        return
    chosen = found[0]
    if len(found) > 1:
        logger.info("%s: using %s and leaving %s", shown_path(folder.path), chosen, ", ".join(found[1:]))
    if not chosen.endswith(INDEX_SUFFIX):
        with problems.collect(chosen):
            for info in _inspect(folder, chosen):
                folder.tensors[info.name] = info
        return
    weight_map: dict[str, str] = {}
    with problems.collect(chosen):
        weight_map = _read_index(folder, chosen)
    places: dict[str, list[str]] = {}
    unread: set[str] = set()
    for shard in sorted(set(weight_map.values())):
        unread.add(shard)
        with problems.collect(shard):
            for info in _inspect(folder, shard):
                places.setdefault(info.name, []).append(shard)
                folder.tensors[info.name] = info
            unread.discard(shard)
    _compare_index(weight_map, places, unread, problems)


def _read_index(folder: Folder, name: str) -> dict[str, str]:
    """Reads tensor name -> shard. `metadata.total_size` is not looked at: in released checkpoints it is stale."""
    index = _parse_object(_required_bytes(folder, name, MAX_INDEX_BYTES), max_depth=8)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise FileRefused("has no weight_map object")
    if len(weight_map) > MAX_TENSORS:
        raise FileRefused(f"lists {len(weight_map)} tensors, at most {MAX_TENSORS} expected")
    suffix = os.path.splitext(name.removesuffix(INDEX_SUFFIX))[1]
    shards = set()
    for shard in weight_map.values():
        if not isinstance(shard, str):
            raise FileRefused(f"names a shard that is no text, {printable(repr(shard))}")
        shards.add(shard)
    if len(shards) > MAX_SHARDS or len({shard.casefold() for shard in shards}) != len(shards):
        raise FileRefused(f"names {len(shards)} shards, expected at most {MAX_SHARDS} that differ in more than case")
    for shard in sorted(shards):
        try:
            check_plain_name(shard)
        except FileRefused as error:
            raise FileRefused(f"names the shard {printable(repr(shard))}, which {error.reason}") from error
        if not shard.endswith(suffix):
            raise FileRefused(f"names the shard {shard!r}, expected a {suffix} file")
    return weight_map


def _compare_index(
    weight_map: Mapping[str, str], places: Mapping[str, list[str]], unread: set[str], problems: _Problems
) -> None:
    for name, shards in places.items():
        if len(shards) > 1:
            problems.add(f"tensor {printable(name)} stands in {len(shards)} shards: {', '.join(shards)}")
        elif name not in weight_map:
            problems.add(f"tensor {printable(name)} stands in {shards[0]}, but not in the index")
        elif weight_map[name] != shards[0]:
            problems.add(f"tensor {printable(name)} stands in {shards[0]}, but the index says {weight_map[name]}")
    for name, shard in weight_map.items():
        if name not in places and shard not in unread:
            problems.add(f"tensor {printable(name)} is promised by the index, but {shard} does not have it")


def _inspect(folder: Folder, name: str) -> list[TensorInfo]:
    """Opens a weight file, keeps it open in the folder, and lists its tensors."""
    try:
        file = folder._directory.open(name)
    except FileNotFoundError as error:
        raise FileRefused("is missing", hint="fetch the missing files again") from error
    folder._files[name] = file
    size = os.fstat(file.fileno()).st_size
    if name.endswith(".safetensors"):
        infos = _inspect_safetensors(name, file, size)
    else:
        if name.endswith(".pt"):
            views, folder.training = inspect_training_file(_reader(file), size)
        else:
            views = inspect_bin(_reader(file), size)
        infos = [
            TensorInfo(tensor, view.shape, view.dtype, name, view.offset_bytes, view.stride)
            for tensor, view in views.items()
        ]
    if len(infos) > MAX_TENSORS:
        raise FileRefused(f"has {len(infos)} tensors, at most {MAX_TENSORS} expected")
    for info in infos:
        if not info.name or len(info.name) > 512 or not info.name.isprintable():
            raise FileRefused(f"has a tensor with the name {printable(info.name)}")
    return infos


def _inspect_safetensors(name: str, file: io.FileIO, size: int) -> list[TensorInfo]:
    """Checks a safetensors header against the size of its file.

    Source: the format's description in the safetensors README. Its limit for the header is 100 MB; ours is lower.
    """
    read = _reader(file)
    if size < 8:
        raise FileRefused(f"has {size} bytes, which is no safetensors file")
    start = read(0, min(size, 64))
    if start.startswith(b"version https://git-lfs"):
        raise FileRefused("is a git-lfs pointer, not the weights themselves", hint="git lfs pull")
    if start.startswith((b"PK\x03\x04", b"\x80\x02")) and start[8:9] != b"{":
        raise FileRefused("is a torch file under a .safetensors name", hint="rename it to .bin")
    (header_bytes,) = struct.unpack("<Q", start[:8])
    if header_bytes > MAX_HEADER_BYTES:
        raise FileRefused(f"has a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} expected")
    if header_bytes + 8 > size:
        raise FileRefused(f"is cut short: the header alone has {header_bytes} bytes, the file {size}")
    raw = read(8, header_bytes)
    if raw.count(b'"dtype"') > MAX_TENSORS:  # before parsing, which would take the memory
        raise FileRefused(f"has more than {MAX_TENSORS} tensors")
    header = _parse_object(raw, max_depth=3)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileRefused("has __metadata__ that is not text")
    if sum(len(key) + len(value) for key, value in metadata.items()) > MAX_METADATA_CHARACTERS:
        raise FileRefused("has more than a megabyte of __metadata__")
    spans = []
    for tensor, entry in header.items():
        try:
            dtype, shape, begin, end = _header_entry(entry)
        except FileRefused as error:
            raise FileRefused(f"has a tensor {printable(tensor)} that {error.reason}") from error
        spans.append((begin, end, TensorInfo(tensor, shape, dtype, name, 8 + header_bytes + begin)))
    spans.sort(key=lambda span: span[:2])
    position = 0
    for begin, end, info in spans:
        if begin != position:
            raise FileRefused(f"has a hole or an overlap before tensor {printable(info.name)}")
        position = end
    expected = 8 + header_bytes + position
    if size != expected:
        what = "is cut short" if size < expected else "has bytes after its last tensor"
        raise FileRefused(f"{what}: {size} bytes, its header describes {expected}", hint="fetch the file again")
    return [info for _, _, info in spans]


def _header_entry(entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Checks one tensor's entry in a safetensors header; returns dtype, shape, begin and end."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileRefused("is not described by dtype, shape and data_offsets")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise FileRefused(f"has the unknown dtype {printable(repr(entry['dtype']))}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(number) is not int or number < 0 for number in numbers):
            raise FileRefused(f"has {printable(repr(numbers))} where numbers from 0 are expected")
    if len(shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) > 1 << 62:
        raise FileRefused(f"has the impossible shape {printable(repr(shape))}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise FileRefused(
            f"has shape {shape} of {entry['dtype']}, but data_offsets {printable(repr(offsets))}: sizes differ"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _parse_object(data: bytes, max_depth: int, *, unique_keys: bool = True) -> dict[str, Any]:
    """Parses a JSON object strictly: UTF-8, nested at most `max_depth` deep, and no key twice if that is asked for."""
    if data.startswith(b"version https://git-lfs"):
        raise FileRefused("is a git-lfs pointer, not the file itself", hint="git lfs pull")
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise FileRefused(f"has more than {MAX_JSON_VALUES} values")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique if unique_keys else None)
    except RecursionError as error:
        raise FileRefused("is nested too deep") from error
    except ValueError as error:
        raise FileRefused(f"is not JSON ({printable(str(error))})") from error
    if not isinstance(value, dict):
        raise FileRefused(f"is JSON of type {type(value).__name__}, expected an object")
    level: list[Any] = [value]
    for _ in range(max_depth):
        level = [
            child
            for container in level
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, (dict, list))
        ]
    if level:
        raise FileRefused("is nested too deep")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {printable(twice)} stands twice")
    return value


# Reading -------------------------------------------------------------------------------------------------------------


def _reader(file: io.FileIO) -> Callable[[int, int], bytes]:
    """Returns a function (offset, length) -> exactly that many bytes of the file."""

    def read(offset: int, length: int) -> bytes:
        data = bytearray(length)
        _fill(file, memoryview(data), offset)
        return bytes(data)

    return read


def _fill(file: io.FileIO, target: memoryview, offset: int) -> None:
    """Reads from `offset` until `target` is full."""
    done = 0
    while done < len(target):
        count = os.preadv(file.fileno(), [target[done : done + READ_CHUNK_BYTES]], offset + done)
        if count == 0:
            raise FileRefused(f"ends at byte {offset + done}: it is cut short, or was while it was being read")
        done += count


def _read_tensor(file: io.FileIO, info: TensorInfo, *, drop_cache: bool) -> torch.Tensor:
    """Reads one tensor straight into its own memory."""
    elements = math.prod(info.shape)
    in_order = elements == 0 or info.stride is None or _is_in_order(info.shape, info.stride)
    if info.stride is not None and not in_order:
        elements = 1 + sum((size - 1) * step for size, step in zip(info.shape, info.stride))
    length = elements * info.dtype.itemsize
    try:
        memory = torch.empty(length, dtype=torch.uint8)
    except RuntimeError as error:
        raise FileRefused(f"has a tensor {info.name} of {length} bytes, more than there is memory for") from error
    advise = getattr(os, "posix_fadvise", None)
    if advise is not None:
        advise(file.fileno(), info.offset_bytes, length, os.POSIX_FADV_SEQUENTIAL)
    _fill(file, memory.numpy().data, info.offset_bytes)
    if advise is not None and drop_cache:
        advise(file.fileno(), info.offset_bytes, length, os.POSIX_FADV_DONTNEED)
    numbers = memory.view(info.dtype)
    if info.stride is None or in_order:
        return numbers.view(info.shape)
    return numbers.as_strided(info.shape, info.stride).contiguous()


def _is_in_order(shape: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride)):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def check_tensors(
    folder: Folder,
    expected: Mapping[str, tuple[int, ...]],
    *,
    ignore: Callable[[str], bool] = lambda name: False,
) -> None:
    """Compares a folder's tensors with those a model needs, before either is allocated.

    Args:
        folder: The open folder.
        expected: Name -> shape of every tensor the model needs.
        ignore: Says of a name that it does not matter, in the folder or in the model.

    Raises:
        CheckpointError: Tensors are missing, unexpected or of another shape; all of them are listed.
    """
    problems = []
    for name, wanted in expected.items():
        if ignore(name):
            continue
        shape = tuple(wanted)
        info = folder.tensors.get(name)
        if info is None:
            problems.append(f"tensor {printable(name)} of shape {list(shape)} is missing")
        elif info.shape != shape:
            problems.append(_shape_problem(name, info.shape, shape))
    for name, info in folder.tensors.items():
        if name not in expected and not ignore(name):
            problems.append(f"tensor {printable(name)} of shape {list(info.shape)} is not part of this model")
    if problems:
        raise CheckpointError(
            shown_path(folder.path),
            problems,
            hint="config.json and the weights must come from the same checkpoint",
        )


def _shape_problem(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    if _VOCABULARY_TENSOR.search(name) and len(found) == len(wanted) and found[1:] == wanted[1:]:
        return f"{name} has a vocabulary of {found[0]} rows, config.json says {wanted[0]}"
    return f"tensor {printable(name)} has shape {list(found)}, expected {list(wanted)}"


def shown_path(path: Path) -> str:
    """A path for messages: no control characters, not too long."""
    return printable(str(path), limit_characters=1000)


def _reason(error: Exception) -> str:
    if isinstance(error, FileRefused):
        return error.reason
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "is a link to a link"
    return f"cannot be read: {error.strerror if isinstance(error, OSError) else error}"
