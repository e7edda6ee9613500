"""What a torch `.bin` file holds, found out without running anything in it.

A `.bin` file is a zip archive with uncompressed entries: `NAME/data.pkl` (a pickle program that describes the tensors)
and `NAME/data/KEY` (the bytes of each storage). A pickle program may call any function, so it is never handed to an
unpickler. `pickletools.genops` only splits it into instructions; the small machine below knows the two dozen of them
that `torch.save` writes for a dictionary of tensors, builds plain values from them, and stops at anything else.

Sources: PKWARE's APPNOTE 4.3 (zip), CPython's `pickletools` (instructions), and what `torch.save` has written since
PyTorch 1.6 (calls and persistent ids).
"""

from __future__ import annotations

import itertools
import math
import pickletools
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

MAX_DIRECTORY_BYTES = 8 << 20
MAX_ENTRIES = 100_000
MAX_PICKLE_BYTES = 16 << 20
MAX_INSTRUCTIONS = 200_000  # torch writes about 30 per tensor
MAX_DIMENSIONS = 8

RESAVE_HINT = "re-save it with a current torch.save, or better convert it to safetensors, on a machine that trusts it"

ReadBytes = Callable[[int, int], bytes]  # (offset, length) -> exactly that many bytes, or FileRefused

_STORAGE_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_ORDERED_DICT = "collections.OrderedDict"
_REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
_ALLOWED = {*_STORAGE_DTYPES, _ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER}
# What else stands in a training checkpoint: arguments, random states, sets of names. It is recognised, never built.
_INERT = {
    *("argparse.Namespace", "collections.defaultdict", "collections.deque", "_codecs.encode", "torch.Size"),
    *("builtins.set", "builtins.list", "builtins.dict", "__builtin__.set", "__builtin__.list", "__builtin__.dict"),
    *("numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "torch.device"),
    *("torch.float16", "torch.bfloat16", "torch.float32", "torch.float64", "torch.half", "torch.float"),
}
# The same for the files of DeepSpeed's ZeRO: its own small classes, and tensors that carry attributes.
_SIZE, _REBUILD_FROM_TYPE = "torch.Size", "torch._tensor._rebuild_from_type_v2"
_DEEPSPEED = {
    *("deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    *("deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.utils.tensor_fragment.fragment_address"),
    *("torch.Tensor", _REBUILD_FROM_TYPE),
}
# How some versions of Python 3.11 write a member of an enumeration: its class and its name. Looked at, never called.
_GETATTR = {"__builtin__.getattr", "builtins.getattr"}


class FileRefused(Exception):
    """A weight file that is broken, hostile or in another format.

    Args:
        reason: What is wrong, as the end of a sentence that begins with the file's name.
        hint: The cure, if there is one for this case.
    """

    def __init__(self, reason: str, *, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@dataclass(frozen=True)
class BinTensor:
    """Where in a `.bin` file a tensor lies.

    Args:
        shape: The sizes of its dimensions.
        dtype: The type of its numbers.
        stride: Distance between neighbours of each dimension, in numbers.
        offset_bytes: Where its first number lies, from the start of the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    offset_bytes: int


def printable(text: str, limit_characters: int = 120) -> str:
    """Text from an untrusted file for use in a message: no control characters, not long."""
    cut = text if len(text) <= limit_characters else text[:limit_characters] + "…"
    return cut if cut.isprintable() else repr(cut)


def inspect_bin(read: ReadBytes, file_bytes: int) -> dict[str, BinTensor]:
    """Lists the tensors of a torch `.bin` file without running its pickle and without reading tensor data.

    Args:
        read: Reads (offset, length) from the file.
        file_bytes: The size of the file.

    Returns:
        Name -> where the tensor lies, in the order of the file.

    Raises:
        FileRefused: The file is no such archive, asks for anything but tensors, or describes data it does not have.
    """
    return _require_tensors(_described_value(read, file_bytes, more_than_tensors=False))


def inspect_training_file(read: ReadBytes, file_bytes: int) -> tuple[dict[str, BinTensor], dict[str, Any]]:
    """Lists the tensors of a training checkpoint, `{"module": {name: tensor}, "iteration": 1000, …}`.

    Nothing is run here either. What else such files hold (arguments, states of random generators and optimisers) is
    recognised by its name and left out; what is not recognised is refused.

    Args:
        read: Reads (offset, length) from the file.
        file_bytes: The size of the file.

    Returns:
        Name -> where the tensor lies, for the dictionary "module" in the order of the file; and the file's other
        entries that are plain values (numbers, text, None, and lists and dictionaries of them).

    Raises:
        FileRefused: The file is no such archive, or asks for anything but that.
    """
    value = _described_value(read, file_bytes, more_than_tensors=True)
    if not isinstance(value, dict) or not isinstance(value.get("module"), dict):
        found = ", ".join(printable(str(key)) for key in list(value)[:8]) if isinstance(value, dict) else _kind(value)
        raise FileRefused(f"has no dictionary 'module' of tensors; found: {found or 'nothing'}")
    others = {key: item for key, item in value.items() if key != "module" and isinstance(key, str) and _is_plain(item)}
    return _require_tensors(value["module"]), others


def inspect_deepspeed_file(read: ReadBytes, file_bytes: int) -> dict[str, Any]:
    """Lists what a file of a DeepSpeed checkpoint holds, `…_model_states.pt` or `…_optim_states.pt`.

    Nothing is run here either.

    Args:
        read: Reads (offset, length) from the file.
        file_bytes: The size of the file.

    Returns:
        Its dictionary: plain values, sizes as tuples, and where each tensor lies. Objects of DeepSpeed's own classes
        are recognised by their name and stand there as something of no use.

    Raises:
        FileRefused: The file is no such archive, or asks for anything but that.
    """
    value = _described_value(read, file_bytes, more_than_tensors=True, of_deepspeed=True)
    if not isinstance(value, dict):
        raise FileRefused(f"holds a {_kind(value)}, expected a dictionary")
    return value


def _described_value(read: ReadBytes, file_bytes: int, *, more_than_tensors: bool, of_deepspeed: bool = False) -> Any:
    _require_zip(read, file_bytes)
    entries = _data_entries(_zip_entries(read, file_bytes))
    if "byteorder" in entries:
        order = _entry_bytes(read, entries["byteorder"], limit_bytes=16)
        if order != b"little":
            raise FileRefused(f"has byte order {order!r}, only b'little' is supported", hint=RESAVE_HINT)
    if "data.pkl" not in entries:
        raise FileRefused("is a zip file without data.pkl, so not written by torch.save")
    machine = _Machine(entries, more_than_tensors=more_than_tensors, of_deepspeed=of_deepspeed)
    return machine.run(_entry_bytes(read, entries["data.pkl"], limit_bytes=MAX_PICKLE_BYTES))


def _require_tensors(value: Any) -> dict[str, BinTensor]:
    if not isinstance(value, dict):
        raise FileRefused(f"holds a {_kind(value)}, expected a dictionary of tensors")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, BinTensor):
            raise FileRefused(
                f"holds a {_kind(tensor)} under {printable(str(name))}, expected a dictionary of names to tensors",
                hint="a training checkpoint keeps more than weights; save the model's state_dict alone",
            )
    return value


# The zip directory ---------------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    name: str
    offset: int  # of the data, from the start of the file
    size: int
    crc: int


def _require_zip(read: ReadBytes, file_bytes: int) -> None:
    """Refuses what is no zip file, and says what it is instead if that is one of the usual mistakes."""
    head = read(0, min(file_bytes, 264))
    if head.startswith(b"PK\x03\x04"):
        return
    if not head:
        raise FileRefused("is empty")
    if head.startswith(b"version https://git-lfs"):
        raise FileRefused("is a git-lfs pointer, not the weights themselves", hint="git lfs pull")
    if head.startswith(b"\x80") or head[257:262] == b"ustar":
        raise FileRefused("is in torch's format from before 1.6, which cannot be read safely", hint=RESAVE_HINT)
    if head[8:9] == b"{":
        raise FileRefused("is a safetensors file under a .bin name", hint="rename it to .safetensors")
    raise FileRefused("is no file that torch.save writes")


def _zip_entries(read: ReadBytes, file_bytes: int) -> list[_Entry]:
    """Reads the central directory strictly: stored, unencrypted entries that neither overlap nor leave the file."""
    count, directory_bytes, directory = _locate_directory(read, file_bytes)
    if count > MAX_ENTRIES or directory_bytes > MAX_DIRECTORY_BYTES:
        raise FileRefused(f"has a zip directory of {count} entries in {directory_bytes} bytes, which is too many")
    if directory + directory_bytes > file_bytes:
        raise FileRefused("is cut short: its zip directory ends after the file")
    raw = read(directory, directory_bytes)
    entries: list[_Entry] = []
    position = 0
    for _ in range(count):
        if raw[position : position + 4] != b"PK\x01\x02" or position + 46 > len(raw):
            raise FileRefused("has a broken zip directory")
        flags, method, _, crc, stored, size, name_len, extra_len, comment_len = struct.unpack_from(
            "<HHLLLLHHH", raw, position + 8
        )
        (header,) = struct.unpack_from("<L", raw, position + 42)
        name_bytes = raw[position + 46 : position + 46 + name_len]
        extra = raw[position + 46 + name_len : position + 46 + name_len + extra_len]
        position += 46 + name_len + extra_len + comment_len
        name = name_bytes.decode("utf-8", errors="backslashreplace")
        shown = printable(name)
        size, stored, header = _zip64_values(extra, [size, stored, header])
        if flags & 1:
            raise FileRefused(f"has an encrypted entry, {shown}")
        if method != 0 or stored != size or flags & ~0x0808:
            raise FileRefused(f"has a compressed or unusual entry, {shown}; torch stores entries as they are")
        if header + 30 + name_len > directory:
            raise FileRefused(f"is cut short: entry {shown} lies outside the file")
        local = read(header, 30 + name_len)
        if local[:4] != b"PK\x03\x04" or local[30:] != name_bytes:
            raise FileRefused(f"has two different headers for entry {shown}")
        local_name_len, local_extra_len = struct.unpack_from("<HH", local, 26)
        start = header + 30 + local_name_len + local_extra_len
        if start + size > directory:
            raise FileRefused(f"is cut short: entry {shown} of {size} bytes ends after the file's data")
        entries.append(_Entry(name, start, size, crc))
    if position != len(raw):
        raise FileRefused("has a broken zip directory")
    in_order = sorted(entries, key=lambda entry: (entry.offset, entry.size))
    for one, following in itertools.pairwise(in_order):
        if one.offset + one.size > following.offset:
            raise FileRefused(f"has overlapping entries {printable(one.name)} and {printable(following.name)}")
    return entries


def _locate_directory(read: ReadBytes, file_bytes: int) -> tuple[int, int, int]:
    """Returns the number of entries, and the size and position of the central directory."""
    end = file_bytes - 22
    tail = read(end, 22) if end >= 0 else b""
    if not tail.startswith(b"PK\x05\x06") or tail[20:] != b"\0\0":
        raise FileRefused("is cut short or has bytes after its end: no zip directory where it should be")
    count, directory_bytes, directory = struct.unpack_from("<HLL", tail, 10)
    if count == 0xFFFF or directory_bytes == 0xFFFFFFFF or directory == 0xFFFFFFFF:
        locator = read(end - 20, 20) if end >= 20 else b""
        if locator[:4] != b"PK\x06\x07":
            raise FileRefused("has a broken zip directory")
        (end64,) = struct.unpack_from("<Q", locator, 8)
        record = read(end64, 56) if end64 + 56 <= file_bytes else b""
        if record[:4] != b"PK\x06\x06":
            raise FileRefused("has a broken zip directory")
        count, directory_bytes, directory = struct.unpack_from("<QQQ", record, 32)
    return count, directory_bytes, directory


def _zip64_values(extra: bytes, values: list[int]) -> list[int]:
    """Replaces those of (size, stored size, header offset) that are all ones by their 64-bit values."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            field = extra[position + 4 : position + 4 + length]
            wide = list(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            return [wide.pop(0) if value == 0xFFFFFFFF and wide else value for value in values]
        position += 4 + length
    return values


def _data_entries(entries: list[_Entry]) -> dict[str, _Entry]:
    """Takes the archive's common first folder off the names and refuses what torch.save does not write."""
    found: dict[str, _Entry] = {}
    prefix = entries[0].name.partition("/")[0] + "/" if entries else ""
    for entry in entries:
        name = entry.name.removeprefix(prefix)
        if name == "constants.pkl" or name.startswith("code/"):
            raise FileRefused("is a TorchScript program, not a file of weights", hint=RESAVE_HINT)
        known = name in {"data.pkl", "version", "byteorder"} or name.startswith(".")
        is_storage = name.startswith("data/") and "/" not in name[5:]
        if not entry.name.startswith(prefix) or ".." in name or not (known or is_storage):
            raise FileRefused(f"has an entry that torch.save does not write, {printable(entry.name)}")
        if name in found:
            raise FileRefused(f"has two entries with the name {printable(entry.name)}")
        found[name] = entry
    return found


def _entry_bytes(read: ReadBytes, entry: _Entry, limit_bytes: int) -> bytes:
    if entry.size > limit_bytes:
        raise FileRefused(f"has an entry {printable(entry.name)} of {entry.size} bytes, at most {limit_bytes} expected")
    data = read(entry.offset, entry.size)
    # A zero means that the writer left the check sum out, which torch offers as an option.
    if entry.crc and zlib.crc32(data) != entry.crc:
        raise FileRefused(f"is damaged: entry {printable(entry.name)} does not match its check sum")
    return data


# The pickle program --------------------------------------------------------------------------------------------------


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    dtype: torch.dtype
    elements: int
    offset: int  # of the data, from the start of the file


_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_BYTES = ("SHORT_BINBYTES", "BINBYTES")
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_FIXED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Unbuilt:
    """Stands for an object of a training checkpoint that is recognised by its name and never built."""


class _Machine:
    """Follows a pickle program with plain values only: no import, no call, no attribute.

    Args:
        entries: The archive's entries without the common prefix, to look storages up.
        more_than_tensors: Whether the harmless objects of training checkpoints may stand beside the tensors.
        of_deepspeed: Whether those of DeepSpeed may, too.
    """

    def __init__(
        self, entries: dict[str, _Entry], *, more_than_tensors: bool = False, of_deepspeed: bool = False
    ) -> None:
        self._entries = entries
        self._allowed = _ALLOWED | _INERT if more_than_tensors else _ALLOWED
        self._of_deepspeed = of_deepspeed
        if of_deepspeed:
            self._allowed = self._allowed | _DEEPSPEED | _GETATTR
        self._more_than_tensors = more_than_tensors
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """Returns the value that the program describes, or raises FileRefused."""
        try:
            for count, (instruction, argument, _) in enumerate(pickletools.genops(program)):
                if count > MAX_INSTRUCTIONS:
                    raise FileRefused(f"has a pickle of more than {MAX_INSTRUCTIONS} instructions")
                if instruction.name == "STOP":
                    break
                self._step(instruction.name, argument)
            return self._stack.pop()
        except (IndexError, KeyError, ValueError, TypeError) as error:
            raise FileRefused(f"has a broken pickle ({printable(str(error))})") from error

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "MARK":
            self._outer.append(stack)
            self._stack = []
        elif name == "TUPLE":
            items = self._pop_mark()
            self._stack.append(tuple(items))
        elif name in _FIXED_TUPLES:
            items = [stack.pop() for _ in range(_FIXED_TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._pop_mark()
            self._set_items(items)
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._pop_mark()
            if type(self._stack[-1]) is not _Unbuilt:
                self._expect(self._stack[-1], list, name).extend(items)
        elif name in ("GLOBAL", "INST"):
            stack.append(self._global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self._global(self._expect(module, str, name), self._expect(attribute, str, name)))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, self._expect(arguments, tuple, name)))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "BUILD":
            # A state_dict carries module versions as an attribute; nothing here needs them.
            state = stack.pop()
            if type(stack[-1]) is not _Unbuilt:
                self._expect(state, dict, name)
                self._expect(stack[-1], dict, name)
        elif self._more_than_tensors and name in _BYTES:
            stack.append(argument)
        elif self._more_than_tensors and name == "NEWOBJ":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, self._expect(arguments, tuple, name)))
        elif name not in ("PROTO", "FRAME"):
            raise FileRefused(f"has the pickle instruction {name}, which torch.save never writes for tensors")

    def _global(self, module: str, attribute: str) -> _Global:
        name = f"{module}.{attribute}"
        if name not in self._allowed:
            raise FileRefused(
                f"asks to run {printable(name)}; a file of weights may only hold tensors",
                hint="do not load this file with torch.load; get the weights as safetensors from a source you trust",
            )
        return _Global(name)

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _set_items(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is _Unbuilt:
            return
        target = self._expect(self._stack[-1], dict, "SETITEMS")
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(items[::2], items[1::2]):
            if not isinstance(key, (str, int)):
                raise ValueError(f"a {_kind(key)} as a key")
            if key in target:
                raise FileRefused(f"names {printable(str(key))} twice")
            target[key] = value

    @staticmethod
    def _expect(value: Any, kind: type, instruction: str) -> Any:
        if type(value) is not kind:
            raise ValueError(f"{instruction} on a {_kind(value)}")
        return value

    def _call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        name = self._expect(function, _Global, "REDUCE").name
        if self._of_deepspeed and name == _SIZE and len(arguments) == 1:
            return self._expect(arguments[0], tuple, name)
        if self._of_deepspeed and name == _REBUILD_FROM_TYPE and len(arguments) == 4:
            return self._call(arguments[0], self._expect(arguments[2], tuple, name))
        if name in _INERT or (name in _DEEPSPEED and name != _REBUILD_FROM_TYPE):
            return _Unbuilt()
        if name in _GETATTR:
            owner, member = arguments if len(arguments) == 2 else (None, None)
            if isinstance(owner, _Global) and owner.name.endswith("Enum") and isinstance(member, str):
                return _Unbuilt()
            raise FileRefused(f"asks to run {name} on something that is no enumeration")
        if name == _ORDERED_DICT and not arguments:
            return {}
        if name == _REBUILD_PARAMETER and len(arguments) == 3:
            return self._expect(arguments[0], BinTensor, name)
        if name == _REBUILD_TENSOR and len(arguments) in (6, 7):
            return _view(*arguments[:4])
        raise ValueError(f"{name} with {len(arguments)} arguments")

    def _storage(self, reference: Any) -> _Storage:
        """Looks up the storage that a persistent id names, and checks that the file has all of it."""
        if type(reference) is not tuple or len(reference) != 5 or reference[0] != "storage":
            raise ValueError("an unknown persistent id")
        _, kind, key, _, elements = reference
        dtype = _STORAGE_DTYPES.get(self._expect(kind, _Global, "storage").name)
        if dtype is None or not isinstance(key, str) or type(elements) is not int or elements < 0:
            raise ValueError("a malformed storage")
        entry = self._entries.get(f"data/{key}")
        if entry is None:
            raise FileRefused(f"has no data for storage {printable(key)}")
        if elements * dtype.itemsize > entry.size:
            raise FileRefused(
                f"promises {elements * dtype.itemsize} bytes in storage {printable(key)}, but has only {entry.size}"
            )
        return _Storage(dtype, elements, entry.offset)


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, text, None, or a list or dictionary of them."""
    seen: set[int] = set()  # a pickle can put a list into itself
    left = [value]
    while left:
        item = left.pop()
        if type(item) in (list, tuple, dict):
            if id(item) not in seen:
                seen.add(id(item))
                left += item.values() if type(item) is dict else item
        elif item is not None and type(item) not in (str, int, float, bool):
            return False
    return True


def _view(storage: Any, offset: Any, shape: Any, stride: Any) -> BinTensor:
    """Checks one tensor's place inside its storage."""
    if type(storage) is not _Storage or type(shape) is not tuple or type(stride) is not tuple:
        raise ValueError("a malformed tensor")
    if any(type(number) is not int or number < 0 for number in (offset, *shape, *stride)):
        raise ValueError("a tensor with a size that is no number")
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor with {len(shape)} sizes and {len(stride)} strides")
    elements = math.prod(shape)
    reach = 1 + sum((size - 1) * step for size, step in zip(shape, stride)) if elements else 0
    # More numbers than the storage has would mean that strides repeat them, which no saved weight needs.
    if offset + reach > storage.elements or max(elements, *shape, *stride, 0) > max(storage.elements, 1 << 40):
        raise FileRefused(
            f"has a tensor of shape {list(shape)} at {offset} that reaches outside its storage of {storage.elements}"
        )
    if elements > storage.elements:
        raise FileRefused(f"has a tensor of shape {list(shape)} in a storage of only {storage.elements} numbers")
    return BinTensor(shape, storage.dtype, stride, storage.offset + offset * storage.dtype.itemsize)


def _kind(value: Any) -> str:
    names = {_Global: "class", _Storage: "storage", BinTensor: "tensor", dict: "dictionary"}
    return names.get(type(value), type(value).__name__)
