"""A bare file of weights, read as a checkpoint with the config of a folder, and written one tensor at a time.

    .safetensors   .pth .bin   what torch.save makes of a state dict    .npz   numpy's table    .ckpt   MindSpore's

Tensors may have their official names or MindFormers'; see `glmkit.export.mindspore`.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from glmkit.checkpoint import READ_CHUNK_BYTES, Folder, TensorInfo, open_folder, shown_path
from glmkit.errors import CheckpointError, OutputError, UsageError
from glmkit.export.mindspore import MindSporeFile, official_name, write_mindspore
from glmkit.pickles import printable
from glmkit.writing import ShapedTensor, save_tensors

SUFFIXES = (".safetensors", ".pth", ".bin", ".npz", ".ckpt")
"""Endings of the files that are read and written."""
_HEADER_BYTES = 10_000  # of a table of numpy's; what it takes itself
_ALIGNED_BYTES = 64  # where torch lets numbers begin
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


class _Table(Protocol):
    """What a file's reader gives: descriptions, and tensors one at a time."""

    tensors: dict[str, TensorInfo]

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]: ...

    def close(self) -> None: ...


# --- reading ---


class StateFile(Folder):
    """A bare file of weights as a checkpoint.

    Args:
        file: The file.
        like: The folder whose config.json and tokenizer belong to it.

    Attributes:
        left_out: Names of what training kept in the file beside the weights.

    Raises:
        UsageError: The file has another ending.
        CheckpointError: It is damaged, or there is no config.json.
    """

    def __init__(self, file: Path, like: Path) -> None:
        super().__init__(like)
        self.left_out: list[str] = []
        try:
            config = self.read_object("config.json")
            if config is None:
                raise CheckpointError(
                    shown_path(file),
                    ["a bare file of weights does not say what network it is, and there is no config.json beside it"],
                    hint="--like FOLDER (like=): a folder with the config.json and tokenizer that belong to it",
                )
            self.config = config
            self._table = _open_table(file)
        except BaseException:
            super().close()
            raise
        self._stored: dict[str, str] = {}
        for stored, info in self._table.tensors.items():
            name = official_name(stored)
            if name is None:
                self.left_out.append(stored)
            elif name in self._stored:
                self.close()
                twice = f"{printable(self._stored[name])} and {printable(stored)} are names of the same tensor"
                raise CheckpointError(shown_path(file), [twice])
            else:
                self._stored[name] = stored
                self.tensors[name] = TensorInfo(name, info.shape, info.dtype, info.file, info.offset_bytes, info.stride)

    def __enter__(self) -> StateFile:
        return self

    def close(self) -> None:
        self._table.close()
        super().close()

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Reads tensors one at a time; see `Folder.read`."""
        wanted = list(self.tensors if names is None else dict.fromkeys(names))
        unknown = [f"there is no tensor {printable(name)}" for name in wanted if name not in self._stored]
        if unknown:
            raise CheckpointError(shown_path(self.path), unknown)
        for name in wanted:
            [(_, tensor)] = self._table.read([self._stored[name]])
            yield name, tensor

    def read_part(self, name: str, dim: int, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """Reads some rows or columns of a tensor, which is in memory meanwhile; see `Folder.read_part`."""
        [(_, whole)] = self.read([name])
        return torch.cat([whole.narrow(dim, first, last - first) for first, last in ranges], dim)


def _open_table(file: Path) -> _Table:
    if file.suffix == ".npz":
        return _NumpyTable(file)
    if file.suffix == ".ckpt":
        return MindSporeFile(file)
    if file.suffix in SUFFIXES:
        return open_folder(file.parent, weights=(file.name,), config=None)
    raise UsageError(
        f"{shown_path(file)}: files of weights end in {', '.join(SUFFIXES)}", hint="give its folder instead"
    )


class _NumpyTable:
    """An .npz file; its objects, which numpy would unpickle, are refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._file = zipfile.ZipFile(path)
            for entry in self._file.infolist():
                self._describe(entry)
        except Exception as error:  # of many kinds: zipfile's, numpy's, and those of what numpy parses
            found = printable(str(error) or type(error).__name__)
            raise CheckpointError(
                shown_path(path), [f"is no table of numpy's: {found}"], hint="copy it again"
            ) from error

    def close(self) -> None:
        self._file.close()

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        for name in self.tensors if names is None else names:
            try:
                with self._file.open(f"{name}.npy") as member:
                    array = np.lib.format.read_array(member, allow_pickle=False)
            except Exception as error:  # as above; a check sum that differs is one
                raise CheckpointError(shown_path(self.path), [f"{name}: {printable(str(error))}"]) from error
            yield name, torch.from_numpy(np.asarray(array, order="C"))

    def _describe(self, entry: zipfile.ZipInfo) -> None:
        name = entry.filename.removesuffix(".npy")
        with self._file.open(entry) as member:
            version = np.lib.format.read_magic(member)
            _check_header_size(version, member.read(2 if version == (1, 0) else 4))
        with self._file.open(entry) as member:
            np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, kind = read(member)
            position = member.tell()
        if kind.hasobject or not name.isprintable() or name == entry.filename or kind.byteorder == ">":
            raise ValueError(f"{printable(entry.filename)} holds {kind}, expected plain numbers")
        dtype = torch.from_numpy(np.empty(0, kind)).dtype
        info = TensorInfo(name, tuple(map(int, shape)), dtype, self.path.name, 0)
        if entry.file_size - position != info.nbytes:
            raise ValueError(f"{printable(name)} has {entry.file_size - position} bytes, expected {info.nbytes}")
        if name in self.tensors:
            raise ValueError(f"{printable(name)} stands there twice")
        self.tensors[name] = info


def _check_header_size(version: tuple[int, int], stored: bytes) -> None:
    """numpy reads a header before it looks at its size, and some kilobytes of a zip can say gigabytes."""
    if version not in ((1, 0), (2, 0), (3, 0)) or int.from_bytes(stored, "little") > _HEADER_BYTES:
        raise ValueError(f"a header of {int.from_bytes(stored, 'little')} bytes, version {version}")


# --- writing ---


def write_state(path: Path, tensors: Mapping[str, ShapedTensor], fetch: Callable[[str], Tensor]) -> None:
    """Writes a bare file of weights, one tensor at a time; its ending says which kind.

    Args:
        path: The file; the caller gives it its final name when it is complete.
        tensors: Name -> shape and dtype.
        fetch: Gives the tensor of a name.

    Raises:
        UsageError: There is no such kind, or it does not hold such numbers.
        OutputError: It cannot be written.
    """
    kinds = {one.dtype for one in tensors.values()}
    if path.suffix == ".npz" and torch.bfloat16 in kinds:
        raise UsageError("numpy has no bfloat16", hint="--dtype float16 or float32, or a .ckpt or .safetensors file")
    if path.suffix == ".safetensors":
        save_tensors(path.parent, tensors, fetch=fetch, max_shard_bytes=1 << 62, file_name=path.name)
        return
    writers = {".npz": _write_numpy, ".ckpt": write_mindspore, ".pth": _write_torch, ".bin": _write_torch}
    if path.suffix not in writers:
        raise UsageError(f"{path.name}: expected a name that ends in {', '.join(SUFFIXES)}")
    try:
        with open(path, "wb") as file:
            writers[path.suffix](file, tensors, fetch)
    except OSError as error:
        raise OutputError(
            f"cannot write {shown_path(path)}: {error.strerror}",
            hint="free space there, or choose a place that can be written to",
        ) from error


def _write_numpy(file: BinaryIO, tensors: Mapping[str, ShapedTensor], fetch: Callable[[str], Tensor]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in tensors:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, fetch(name).numpy(), allow_pickle=False)


@dataclass(frozen=True)
class _Storage:
    """Stands for the numbers of one tensor in the pickle of a torch file."""

    key: str
    kind: Any
    elements: int


@dataclass(frozen=True)
class _Described:
    """Stands for a tensor in it."""

    storage: _Storage
    shape: tuple[int, ...]


class _StatePickler(pickle.Pickler):
    """Writes the instructions that torch.save writes for a dictionary of tensors."""

    def persistent_id(self, item: Any) -> Any:
        if isinstance(item, _Storage):
            return ("storage", item.kind, item.key, "cpu", item.elements)
        return None

    def reducer_override(self, item: Any) -> Any:
        if not isinstance(item, _Described):
            return NotImplemented
        stride = torch.empty(item.shape, device="meta").stride()
        hooks: OrderedDict[str, Any] = OrderedDict()
        return torch._utils._rebuild_tensor_v2, (item.storage, 0, tuple(item.shape), stride, False, hooks)


def _write_torch(file: BinaryIO, tensors: Mapping[str, ShapedTensor], fetch: Callable[[str], Tensor]) -> None:
    """A torch file as torch.save makes it; which would need all tensors in memory at once."""
    described: OrderedDict[str, _Described] = OrderedDict()
    for key, (name, one) in enumerate(tensors.items()):
        shape = tuple(one.shape)
        elements = torch.Size(shape).numel()
        described[name] = _Described(_Storage(str(key), _STORAGES[one.dtype], elements), shape)
    program = io.BytesIO()
    _StatePickler(program, protocol=2).dump(described)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (("data.pkl", program.getvalue()), ("byteorder", b"little"), ("version", b"3\n")):
            with _entry(archive, f"archive/{name}", len(data)) as member:
                member.write(data)
        for name, stand_in in described.items():
            numbers = fetch(name).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            with _entry(archive, f"archive/data/{stand_in.storage.key}", len(numbers)) as member:
                for start in range(0, len(numbers), READ_CHUNK_BYTES):
                    member.write(numbers[start : start + READ_CHUNK_BYTES])


@contextlib.contextmanager
def _entry(archive: zipfile.ZipFile, name: str, size_bytes: int) -> Iterator[Any]:
    """A stored entry whose data begins where torch would let it begin."""
    info = zipfile.ZipInfo(name)
    info.file_size = size_bytes
    wide = size_bytes >= (1 << 31) - 1  # then zipfile puts 20 bytes of its own into the header
    assert archive.fp is not None
    begin = archive.fp.tell() + 30 + len(name.encode()) + (20 if wide else 0) + 4
    padding = -begin % _ALIGNED_BYTES
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=wide) as member:
        yield member


def sync_file(path: Path) -> None:
    """Forces a file to disk.

    Args:
        path: The file.
    """
    with open(path, "rb") as file:
        os.fsync(file.fileno())
