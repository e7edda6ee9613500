"""MindSpore's .ckpt file read and written without MindSpore, and the names that MindFormers gives to tensors.

    Checkpoint  { repeated Value value = 1 }            one for each tensor; several for a large one, which is cut
    Value       { string tag = 1; TensorProto tensor = 2 }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }

The file is protobuf messages one behind the other. They are walked by their lengths, which are compared with the file
before anything is read, and nothing in them is run.

    ChatGLM2, ChatGLM3   transformer.embedding.word_embeddings.weight    transformer.embedding.embedding_table
    ChatGLM-6B           transformer.word_embeddings.weight              transformer.word_embeddings.embedding_table
                         …_layernorm.weight, .bias                       …_layernorm.gamma, .beta

Source: checkpoint.proto of MindSpore and its save_checkpoint; convert_weight.py of MindFormers' glm and glm2.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from glmkit.checkpoint import MAX_TENSORS, READ_CHUNK_BYTES, TensorInfo
from glmkit.errors import CheckpointError, UsageError
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.chatglm_config import ChatGLMConfig
from glmkit.models.checked_config import CheckedConfig
from glmkit.pickles import MAX_DIMENSIONS, printable
from glmkit.writing import ShapedTensor

_TYPES = {
    "Float32": torch.float32,
    "Float16": torch.float16,
    "BFloat16": torch.bfloat16,
    "Float64": torch.float64,
    "Int8": torch.int8,
    "Int16": torch.int16,
    "Int32": torch.int32,
    "Int64": torch.int64,
    "UInt8": torch.uint8,
    "Bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_SLICE_BYTES = 512 << 20  # MindSpore cuts what is larger
_CHECK_SUM = b"crc_num"  # may stand at the end, before 10 bytes
_NORM = r"(input_layernorm|post_attention_layernorm|final_layernorm)"
# What a training checkpoint has beside the weights: Adam's moments, and counters.
_OF_TRAINING = re.compile(
    r"(adam_[mv]|moment[12]|accu_grads|moments)\.|(global_step|epoch_num|step_num|beta[12]_power|loss_scale|scale_sense"
    r"|current_iterator_step|last_overflow_iterator_step|learning_rate|momentum|cur_epoch_num|cur_step_num)$"
)


# --- names ---


def mindformers_name(name: str, config: CheckedConfig) -> str:
    """What MindFormers calls a tensor.

    Args:
        name: Its official name.
        config: Of the model.

    Raises:
        UsageError: MindFormers has no such model.
    """
    if isinstance(config, ChatGLM2Config):
        return name.replace("word_embeddings.weight", "embedding_table")
    if isinstance(config, ChatGLMConfig):
        name = name.replace("word_embeddings.weight", "word_embeddings.embedding_table")
        name = re.sub(rf"{_NORM}\.weight$", r"\1.gamma", name)
        return re.sub(rf"{_NORM}\.bias$", r"\1.beta", name)
    raise UsageError(
        f"MindFormers has no network of {type(config).__name__.removesuffix('Config')}",
        hint="it has those of ChatGLM-6B, ChatGLM2 and ChatGLM3",
    )


def official_name(name: str) -> str | None:
    """The official name of a tensor that MindFormers named, or that has its official name already.

    Args:
        name: Its name in the file.

    Returns:
        The name; None for what training keeps beside the weights.
    """
    if _OF_TRAINING.match(name):
        return None
    name = name.replace("word_embeddings.embedding_table", "word_embeddings.weight")
    name = name.replace("embedding_table", "word_embeddings.weight")
    name = re.sub(rf"{_NORM}\.gamma$", r"\1.weight", name)
    return re.sub(rf"{_NORM}\.beta$", r"\1.bias", name)


# --- reading ---


@dataclass(frozen=True)
class _Piece:
    """Some of a tensor's numbers: where in the file, and how many bytes."""

    offset: int
    length: int


class MindSporeFile:
    """A .ckpt file, held open; tensors are read when they are asked for.

    Args:
        path: The file.

    Attributes:
        tensors: Name -> description of every tensor, in the order of the file.

    Raises:
        CheckpointError: It is damaged, encrypted, or no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        try:
            self._file = io.FileIO(path, "rb")
        except OSError as error:
            raise CheckpointError(str(path), [f"cannot be read: {error.strerror}"]) from error
        try:
            self._walk(self._end())
            self._check()
        except (ValueError, OSError) as error:
            self._file.close()
            hint = "an encrypted file is decrypted by MindSpore itself; a cut one has to be fetched again"
            raise CheckpointError(str(path), [f"is no .ckpt file of MindSpore: {error}"], hint=hint) from error

    def close(self) -> None:
        self._file.close()

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Reads tensors one at a time, each into memory of its own.

        Args:
            names: Which; None for all.
        """
        for name in self.tensors if names is None else names:
            info = self.tensors[name]
            memory = torch.empty(info.nbytes, dtype=torch.uint8)
            view, done = memory.numpy().data, 0
            for piece in self._pieces[name]:
                end = done + piece.length
                position = piece.offset
                while done < end:
                    count = os.preadv(self._file.fileno(), [view[done : min(end, done + READ_CHUNK_BYTES)]], position)
                    if not count:
                        raise CheckpointError(str(self.path), [f"{name} is cut short"])
                    done, position = done + count, position + count
            yield name, memory.view(info.dtype).view(info.shape)

    def _end(self) -> int:
        size = os.fstat(self._file.fileno()).st_size
        tail = self._bytes(max(0, size - 17), min(17, size))
        return size - 17 if tail.startswith(_CHECK_SUM) else size

    def _walk(self, end: int) -> None:
        for field, start, stop in self._fields(0, end):
            if field != 1:
                raise ValueError(f"field {field} where tensors are expected")
            tag, parts = "", {}
            for inner, first, last in self._fields(start, stop):
                if inner == 1:
                    tag = self._text(first, last, 512)
                elif inner == 2:
                    parts = self._tensor(first, last)
                else:
                    raise ValueError(f"{printable(tag)} is no plain tensor")
            if not tag or "content" not in parts:
                raise ValueError("an entry without a name or a content")
            self._add(tag, parts)

    def _tensor(self, start: int, stop: int) -> dict[str, object]:
        dims: list[int] = []
        found: dict[str, object] = {"dims": dims}
        for field, first, last in self._fields(start, stop):
            if field == 1 and last < 0:  # one number by itself
                dims.append(first)
            elif field == 1:
                while first < last:
                    number, first = self._number(first, last)
                    dims.append(number)
            elif field == 2:
                found["type"] = self._text(first, last, 32)
            elif field == 3:
                found["content"] = _Piece(first, last - first)
            if len(dims) > MAX_DIMENSIONS:
                raise ValueError(f"a tensor of more than {MAX_DIMENSIONS} dimensions")
        return found

    def _add(self, tag: str, parts: dict[str, object]) -> None:
        kind = str(parts.get("type", "")).removeprefix("mindspore.").rstrip("_").lower()
        dtype = {name.lower(): one for name, one in _TYPES.items()}.get(kind)
        dims, piece = parts["dims"], parts["content"]
        assert isinstance(dims, list)
        assert isinstance(piece, _Piece)
        if dtype is None:
            raise ValueError(f"{printable(tag)} has the unknown type {printable(str(parts.get('type')))}")
        shape = () if dims == [0] else tuple(dims)  # so it writes a single number
        info = TensorInfo(tag, shape, dtype, self.path.name, piece.offset)
        known = self.tensors.setdefault(tag, info)
        if (known.shape, known.dtype) != (shape, dtype):
            raise ValueError(f"{printable(tag)} stands there twice, with different shapes")
        self._pieces.setdefault(tag, []).append(piece)
        if len(self._pieces) > MAX_TENSORS:
            raise ValueError(f"more than {MAX_TENSORS} tensors")

    def _check(self) -> None:
        if not self.tensors:
            raise ValueError("there is no tensor in it")
        for name, info in self.tensors.items():
            found = sum(piece.length for piece in self._pieces[name])
            if found != info.nbytes:
                raise ValueError(f"{printable(name)} of shape {list(info.shape)} has {found} bytes, not {info.nbytes}")

    def _fields(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The fields of a message: number, begin and end; of a plain number its value, and -1."""
        while start < stop:
            key, start = self._number(start, stop)
            value, start = self._number(start, stop)
            if key & 7 == 0:
                yield key >> 3, value, -1
            elif key & 7 == 2 and value <= stop - start:
                yield key >> 3, start, start + value
                start += value
            else:
                raise ValueError(f"something else at byte {start}, or it is cut short")

    def _number(self, start: int, stop: int) -> tuple[int, int]:
        value = 0
        for place, byte in enumerate(self._bytes(start, min(10, stop - start))):
            value |= (byte & 127) << 7 * place
            if byte < 128:
                if value >= 1 << 63:
                    raise ValueError(f"the number {value} at byte {start}")
                return value, start + place + 1
        raise ValueError(f"a number that does not end at byte {start}")

    def _text(self, start: int, stop: int, limit_bytes: int) -> str:
        if stop - start > limit_bytes:
            raise ValueError(f"a name of {stop - start} bytes")
        text = self._bytes(start, stop - start).decode("utf-8")
        if not text.isprintable():
            raise ValueError(f"the name {printable(text)}")
        return text

    def _bytes(self, offset: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, offset)


# --- writing ---


def write_mindspore(
    file: BinaryIO,
    tensors: Mapping[str, ShapedTensor],
    fetch: Callable[[str], Tensor],
    *,
    slice_bytes: int = _SLICE_BYTES,
) -> None:
    """Writes a .ckpt file, one tensor at a time.

    Args:
        file: Where to.
        tensors: Name -> shape and dtype.
        fetch: Gives the tensor of a name.
        slice_bytes: What is larger is cut, as MindSpore does it.
    """
    for name, promised in tensors.items():
        dims = b"".join(b"\x08" + _varint(size) for size in (promised.shape or (0,)))
        kind = _NAMES[promised.dtype].encode()
        described = dims + b"\x12" + _varint(len(kind)) + kind
        content = fetch(name).detach().cpu().contiguous().reshape(-1)
        count = max(1, math.ceil(content.numel() * content.element_size() / slice_bytes))
        for part in content.tensor_split(count):
            data = part.view(torch.uint8).numpy().data
            tensor = described + b"\x1a" + _varint(len(data))
            tag = b"\x0a" + _varint(len(name.encode())) + name.encode()
            value = tag + b"\x12" + _varint(len(tensor) + len(data)) + tensor
            file.write(b"\x0a" + _varint(len(value) + len(data)) + value)
            for start in range(0, len(data), READ_CHUNK_BYTES):
                file.write(data[start : start + READ_CHUNK_BYTES])


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])
