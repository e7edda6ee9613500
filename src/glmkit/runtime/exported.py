"""Whether a folder or file is an exported model, what stands in it, what runs it: without torch, and without loading.

    openvino    openvino_model.xml     constants are listed in the graph, a line for each
    onnx        model.onnx             initializers of the graph, whose numbers may lie in another file
    gguf        NAME.gguf              a header with names, kinds and offsets

Sizes are read from these lists; no number of a weight is read.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from glmkit.errors import CheckpointError, UsageError
from glmkit.runtime.folder import FILE, FOLDER, read_description

FORMATS = {"openvino": "OpenVINO", "onnx": "ONNX", "gguf": "GGUF"}
"""What is recognised, and its name for people."""
_GRAPHS = {"openvino": "openvino_model.xml", "onnx": "model.onnx"}
_CHECKPOINT = ("*.safetensors", "pytorch_model*", "latest", "latest_checkpointed_iteration.txt")  # or it is none
_MAX_TENSORS = 1 << 20
_OPENVINO = re.compile(rb'<data element_type="([a-z0-9]+)" shape="[\d, ]*" offset="\d+" size="(\d+)"')
_KINDS = {"f": "float", "i": "int", "u": "uint", "bf": "bfloat", "boolean": "bool"}
_ONNX = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64",
         16: "bfloat16", 21: "uint4", 22: "int4"}  # fmt: skip
_GGUF = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K",
         12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 30: "BF16"}  # fmt: skip
_GGUF_BYTES = (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)  # of a value, by its kind; 8 is a text, 9 a list
_TEXT, _LIST = 8, 9


def recognise(path: str | Path) -> tuple[str, Path] | None:
    """Says whether something is an exported model, by its files' names alone.

    Args:
        path: A folder or file, or what may be the name of a model.

    Returns:
        The format, one of `FORMATS`, and the file with the graph or the weights; None for anything else, a checkpoint
        that has such files beside its weights among it.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return ("gguf", place) if place.suffix == ".gguf" else None
    if not str(path) or not place.is_dir():
        return None
    ours = (place / FOLDER / FILE).is_file()
    if not ours and any(next(place.glob(sign), None) is not None for sign in _CHECKPOINT):
        return None
    for name, file in _GRAPHS.items():
        if (place / file).is_file():
            return name, place / file
    files = sorted(place.glob("*.gguf"))
    return ("gguf", files[0]) if files else None


def refuse(path: str | Path) -> None:
    """Refuses an exported model where a checkpoint is expected.

    Args:
        path: A folder or file, or what may be the name of a model.

    Raises:
        UsageError: It is one; the hint says what runs it.
    """
    found = recognise(path)
    if found is not None:
        name = FORMATS[found[0]]
        raise UsageError(
            f"{path} is an exported model ({name}), not a checkpoint", hint=" or ".join(_uses(found[0], found[1]))
        )


def describe(path: str | Path) -> dict[str, Any] | None:
    """Describes an exported model.

    Args:
        path: A folder or file, or what may be the name of a model.

    Returns:
        Plain values ready for JSON: exported (its format), family (None if it does not say), source (the file),
        stored_bytes (everything in the folder), weights_bytes (kind of numbers -> bytes of constants, scales included),
        context_tokens, and uses: what can be done with it, one sentence or command each. None if it is none.

    Raises:
        CheckpointError: It is damaged.
    """
    found = recognise(path)
    if found is None:
        return None
    kind, file = found
    place = Path(path).expanduser()
    said: dict[str, Any] = {"family": None, "context_tokens": None}
    if (file.parent / FOLDER / FILE).is_file():
        ours = read_description(file.parent)
        said = {"family": ours.family, "context_tokens": ours.context_tokens}
    try:
        if kind == "gguf":
            said, weights = _read_gguf(file)
        else:
            weights = _openvino_weights(file) if kind == "openvino" else _onnx_weights(file)
    except (ValueError, struct.error, OSError) as error:
        raise CheckpointError(
            str(path), [f"{file.name} is no whole {FORMATS[kind]} file: {error}"], hint="export the model again"
        ) from error
    files = [place] if place.is_file() else [one for one in place.rglob("*") if one.is_file()]
    return {
        "schema": 1,
        "name": str(path),
        "exported": kind,
        "source": str(file),
        "stored_bytes": sum(one.stat().st_size for one in files),
        "weights_bytes": dict(weights.most_common()),
        **said,
        "uses": _uses(kind, file),
    }


def _uses(kind: str, file: Path) -> list[str]:
    folder = file.parent
    if kind == "gguf":
        return [f"llama-cli -m {file}", f'llama_cpp.Llama("{file}")']
    uses = [f"glm run {folder}"] if (folder / FOLDER / FILE).is_file() else []
    if (folder / "openvino_tokenizer.xml").is_file():
        uses.append(f'openvino_genai.LLMPipeline("{folder}", "CPU")')
    package = "onnxruntime" if kind == "onnx" else "openvino"
    return uses or [f"{package}, with a loop and a tokenizer of your own: there is no {FOLDER}/{FILE}"]


# --- OpenVINO ---


def _openvino_weights(file: Path) -> Counter[str]:
    weights: Counter[str] = Counter()
    with open(file, "rb") as lines:
        if b"<" not in lines.read(64):
            raise ValueError("it is no XML")
        lines.seek(0)
        for line in iter(lambda: lines.readline(1 << 20), b""):
            for kind, size in _OPENVINO.findall(line):
                weights[_long_name(kind.decode())] += int(size)
    binary = file.with_suffix(".bin")
    if not binary.is_file():
        raise ValueError(f"there is no {binary.name} beside it")
    return weights


def _long_name(kind: str) -> str:
    letters = kind.rstrip("0123456789")
    return _KINDS.get(letters, letters) + kind[len(letters) :]


# --- ONNX ---


def _onnx_weights(file: Path) -> Counter[str]:
    kinds: dict[str, str] = {}
    sizes: dict[str, int] = {}
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        bits: dict[str, int] = {}
        for start, stop in _messages(data, 0, len(data), 7):
            for first, last in _messages(data, start, stop, 5):
                name, kind, numbers = _initializer(data, first, last)
                digits = 8 if kind == "bool" else int(re.sub(r"\D", "", kind))
                kinds[name], sizes[name] = kind, numbers * digits // 8
                if len(kinds) > _MAX_TENSORS:
                    raise ValueError(f"more than {_MAX_TENSORS} tensors")
            for first, last in _messages(data, start, stop, 1):
                bits |= _packed(data, first, last)
    if not kinds:
        raise ValueError("there is no tensor in its graph")
    weights: Counter[str] = Counter()
    for name, kind in kinds.items():
        weights[f"int{bits[name]}" if name in bits else kind] += sizes[name]
    return weights


def _initializer(data: mmap.mmap, start: int, stop: int) -> tuple[str, str, int]:
    """Name, kind and number of numbers of a TensorProto."""
    name, kind, dims = "", 0, []
    for field, first, last in _fields(data, start, stop):
        if field == 1 and last < 0:
            dims.append(first)
        elif field == 1:
            while first < last:
                number, first = _number(data, first, last)
                dims.append(number)
        elif field == 2:
            kind = first
        elif field == 8:
            name = data[first:last].decode()
    return name, _ONNX.get(kind, f"kind-{kind}"), prod(dims)


def _packed(data: mmap.mmap, start: int, stop: int) -> dict[str, int]:
    """The tensor that a MatMulNBits node unpacks, and its bits."""
    inputs, operator, bits = [], b"", 4
    for field, first, last in _fields(data, start, stop):
        if field == 1:
            inputs.append(data[first:last].decode())
        elif field == 4:
            operator = data[first:last]
        elif field == 5 and operator in (b"", b"MatMulNBits"):
            said = {inner: (begin, end) for inner, begin, end in _fields(data, first, last)}
            if 1 in said and 3 in said and data[slice(*said[1])] == b"bits":
                bits = said[3][0]
    return {inputs[1]: bits} if operator == b"MatMulNBits" and len(inputs) > 1 else {}


def _messages(data: mmap.mmap, start: int, stop: int, wanted: int) -> Iterator[tuple[int, int]]:
    for field, first, last in _fields(data, start, stop):
        if field == wanted and last >= 0:
            yield first, last


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a protobuf message: number, begin and end; of a plain number its value, and -1."""
    while start < stop:
        key, start = _number(data, start, stop)
        kind = key & 7
        if kind == 0:
            value, start = _number(data, start, stop)
            yield key >> 3, value, -1
            continue
        size = {1: 8, 5: 4}.get(kind, -1)
        if kind == 2:
            size, start = _number(data, start, stop)
        if not 0 <= size <= stop - start:
            raise ValueError(f"something else at byte {start}, or it is cut short")
        yield key >> 3, start, start + size
        start += size


def _number(data: mmap.mmap, start: int, stop: int) -> tuple[int, int]:
    value = 0
    for place in range(min(10, stop - start)):
        byte = data[start + place]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, start + place + 1
    raise ValueError(f"a number that does not end at byte {start}")


# --- GGUF ---


class _Header:
    """The beginning of a GGUF file, read value after value.

    Args:
        data: The file.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        """A number in the form of `struct`."""
        [value] = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def skip(self, size: int) -> None:
        if not 0 <= size <= len(self.data) - self.at:
            raise ValueError(f"{size} bytes at byte {self.at}, and the file ends before")
        self.at += size

    def text(self) -> str:
        size = self.take("Q")
        self.skip(size)
        return self.data[self.at - size : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A text or a number of 4 bytes; others are passed over."""
        if kind == _TEXT:
            return self.text()
        if kind == _LIST:
            inner, count = self.take("I"), self.take("Q")
            if inner == _TEXT and count <= len(self.data):
                for _ in range(count):
                    self.skip(self.take("Q"))
            else:
                self.skip(self._size(inner) * count)
            return None
        if kind == 4:
            return self.take("I")
        self.skip(self._size(kind))
        return None

    @staticmethod
    def _size(kind: int) -> int:
        if kind >= len(_GGUF_BYTES) or not _GGUF_BYTES[kind]:
            raise ValueError(f"a value of the unknown kind {kind}")
        return _GGUF_BYTES[kind]


def _read_gguf(file: Path) -> tuple[dict[str, Any], Counter[str]]:
    """What the header says of the model, and the bytes of each kind of numbers, padding included."""
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        header = _Header(data)
        header.skip(4)
        release, tensors, values = header.take("I"), header.take("Q"), header.take("Q")
        if release not in (2, 3) or max(tensors, values) > _MAX_TENSORS:
            raise ValueError(f"version {release} with {tensors} tensors")
        said = {}
        for _ in range(values):
            name = header.text()
            said[name] = header.value(header.take("I"))
        found = []
        for _ in range(tensors):
            header.text()
            header.skip(8 * header.take("I"))
            kind, offset = header.take("I"), header.take("Q")
            found.append((offset, _GGUF.get(kind, f"kind-{kind}")))
        alignment = said.get("general.alignment") or 32
        end = len(data) - (header.at + -header.at % alignment)
    found.sort()
    weights: Counter[str] = Counter()
    for (offset, kind), following in zip(found, [*(offset for offset, _ in found[1:]), end]):
        if following <= offset:
            raise ValueError("it is cut short")
        weights[kind] += following - offset
    family = said.get("general.name") or said.get("general.architecture")
    return {"family": family, "context_tokens": said.get(f"{said.get('general.architecture')}.context_length")}, weights
