"""The weights inside a checkpoint that DeepSpeed itself wrote (ZeRO 1, 2 or 3), without running anything in its files.

    FOLDER/latest                                            the tag, "global_step1000"
    FOLDER/TAG/mp_rank_00_model_states.pt                    ZeRO 1, 2: names, shapes, what does not learn
    FOLDER/TAG/zero_pp_rank_0_mp_rank_00_model_states.pt     ZeRO 3: the same, with process 0's pieces of the latter
    FOLDER/TAG/[bf16_]zero_pp_rank_0_mp_rank_00_optim_states.pt    process 0's pieces of the float32 weights

ZeRO 1 and 2 put the parameters of a group one behind the other and cut that into as many pieces as there are processes;
ZeRO 3 cuts every parameter, and fills the last piece up.

Source: what `zero_to_fp32.py`, which DeepSpeed puts beside every checkpoint, does; that script unpickles.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmkit.errors import CheckpointError
from glmkit.pickles import BinTensor, FileRefused, inspect_deepspeed_file, printable

_STATES = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_MODEL = re.compile(r"(zero_pp_rank_(\d+)_)?mp_rank_00_model_states\.pt")
_PREFIXES = ("module.", "model.")
_PARTS = {"single_partition_of_fp32_groups": 2, "fp32_flat_groups": 3}
_CURE = "give the whole folder that DeepSpeed wrote, with the files of all processes"

Fetch = Callable[[], Tensor]


def is_deepspeed(folder: Path) -> bool:
    """Whether a folder is a checkpoint of DeepSpeed, or one of its iterations.

    Args:
        folder: The folder.
    """
    return any(_STATES.fullmatch(path.name) for path in _iteration(folder).glob("*_optim_states.pt"))


class ZeroFiles:
    """The tensors of a checkpoint of DeepSpeed, whole and by name.

    Args:
        folder: It, or one of its iterations.

    Raises:
        CheckpointError: A file is missing, broken, or asks for more than tensors and plain values.

    Attributes:
        shapes: Name -> shape, of what learns and what does not.
    """

    def __init__(self, folder: Path) -> None:
        self._place = _iteration(folder)
        self._memory: dict[Path, mmap.mmap] = {}
        states, models = self._numbered(_STATES, 2), self._numbered(_MODEL, 2)
        if not models:
            raise CheckpointError(str(self._place), ["no …_model_states.pt"], hint=_CURE)
        found = [(path, self._open(path)) for path in states]
        optimizers = [content.get("optimizer_state_dict") or {} for _, content in found]
        key = next((key for key in _PARTS if all(key in optimizer for optimizer in optimizers)), None)
        if key is None:
            raise CheckpointError(
                str(self._place), ["the optimizer's files have no float32 weights of ZeRO 1, 2 or 3"], hint=_CURE
            )
        count = optimizers[0].get("partition_count", len(found))
        count = max(count) if isinstance(count, list) else count
        if count != len(found):
            raise CheckpointError(
                str(self._place), [f"{len(found)} files …_optim_states.pt, expected {count}"], hint=_CURE
            )
        self._world = len(found)
        self._flat = [(path, self._groups(path, o[key])) for (path, _), o in zip(found, optimizers)]
        self._models = [(path, self._open(path)) for path in models]
        self.stage = _PARTS[key]
        self._fetch: dict[str, Fetch] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        try:
            (self._third if self.stage == 3 else self._second)()
            self._unlearnt()
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise CheckpointError(str(self._place), [f"not as DeepSpeed writes it: {error}"], hint=_CURE) from error
        self._strip()

    def tensor(self, name: str) -> Tensor:
        """Read a tensor.

        Args:
            name: One of `shapes`.
        """
        return self._fetch[name]()

    def _numbered(self, pattern: re.Pattern[str], group: int) -> list[Path]:
        matches = [(pattern.fullmatch(path.name), path) for path in self._place.glob("*.pt")]
        return [path for _, path in sorted((int(match[group] or 0), path) for match, path in matches if match)]

    def _open(self, path: Path) -> dict[str, Any]:
        with open(path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._memory[path] = memory
        try:
            return inspect_deepspeed_file(lambda offset, length: _bytes(memory, offset, length), len(memory))
        except FileRefused as error:
            raise CheckpointError(str(self._place), [f"{path.name} {error.reason}"], hint=error.hint) from error

    def _groups(self, path: Path, value: Any) -> list[BinTensor]:
        groups = value if isinstance(value, list) else [value]
        if not all(isinstance(group, BinTensor) and len(group.shape) == 1 for group in groups):
            raise CheckpointError(
                str(self._place), [f"{path.name}: the float32 weights are no rows of numbers"], hint=_CURE
            )
        return groups

    def _read(self, path: Path, tensor: BinTensor) -> Tensor:
        count = math.prod(tensor.shape)
        if count == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride))
        flat = torch.frombuffer(self._memory[path], dtype=tensor.dtype, count=reach, offset=tensor.offset_bytes)
        return flat.as_strided(tensor.shape, tensor.stride)

    def _add(self, name: str, shape: tuple[int, ...], fetch: Fetch) -> None:
        self.shapes[name], self._fetch[name] = shape, fetch

    def _second(self) -> None:
        """ZeRO 1 and 2: the pieces of a group, one behind the other, are its parameters one behind the other."""
        shapes = self._models[0][1]["param_shapes"]
        for group, named in enumerate(shapes):
            paddings = self._paddings(group, len(named))
            start = 0
            for (name, shape), padding in zip(named.items(), paddings):
                count = math.prod(shape)
                self._add(name, shape, self._from_pieces(group, start, count, shape))
                start += count + padding
            held = sum(parts[group].shape[0] for _, parts in self._flat)
            unit = 2 * self._world  # what is behind the last parameter only fills up
            if math.ceil(start / unit) != math.ceil(held / unit):
                raise ValueError(f"group {group} has {held} numbers, its parameters {start}")

    def _paddings(self, group: int, count: int) -> list[int]:
        content = self._open(self._flat[0][0])["optimizer_state_dict"].get("param_alignment_paddings")
        return content[group] if isinstance(content, list) else [0] * count

    def _from_pieces(self, group: int, start: int, count: int, shape: tuple[int, ...]) -> Fetch:
        def fetch() -> Tensor:
            pieces, first = [], 0
            for path, parts in self._flat:
                size = parts[group].shape[0]
                low, high = max(start, first), min(start + count, first + size)
                if low < high:
                    pieces.append(self._read(path, parts[group])[low - first : high - first])
                first += size
            return torch.cat(pieces).view(shape) if pieces else torch.empty(shape)

        return fetch

    def _third(self) -> None:
        """ZeRO 3: every process has its piece of every parameter, in the same order."""
        start = 0
        for name, shape in {k: v for named in self._models[0][1]["param_shapes"] for k, v in named.items()}.items():
            piece = math.ceil(math.prod(shape) / self._world)
            self._add(name, shape, self._from_all(start, piece, shape))
            start += piece
        held = sum(group.shape[0] for group in self._flat[0][1])
        if held != start:
            raise ValueError(f"a process has {held} numbers, its parameters {start}")

    def _from_all(self, start: int, piece: int, shape: tuple[int, ...]) -> Fetch:
        def fetch() -> Tensor:
            pieces = []
            for path, groups in self._flat:
                first = 0
                for group in groups:
                    low, high = max(start, first), min(start + piece, first + group.shape[0])
                    if low < high:
                        pieces.append(self._read(path, group)[low - first : high - first])
                    first += group.shape[0]
            return torch.cat(pieces)[: math.prod(shape)].view(shape)

        return fetch

    def _unlearnt(self) -> None:
        """Frozen parameters, buffers, and names that share a tensor."""
        path, first = self._models[0]
        if self.stage < 3:  # the module is there as a whole, with what learns in the precision of the computation
            for name, tensor in first["module"].items():
                if isinstance(tensor, BinTensor) and name not in self.shapes:
                    self._add(name, tensor.shape, _later(self._read, path, tensor))
        else:
            for name, shape in (first.get("frozen_param_shapes") or {}).items():
                parts = [(path, model["frozen_param_fragments"][name]) for path, model in self._models]
                self._add(name, shape, self._joined(parts, shape))
            for name in first.get("buffer_names") or []:
                self._add(name, first["module"][name].shape, _later(self._read, path, first["module"][name]))
        shared: Any = first.get("shared_params") or {}
        for name, other in shared.items() if isinstance(shared, Mapping) else shared:
            if other in self._fetch:
                self._add(name, self.shapes[other], self._fetch[other])

    def _joined(self, parts: list[tuple[Path, BinTensor]], shape: tuple[int, ...]) -> Fetch:
        return lambda: torch.cat([self._read(path, part) for path, part in parts])[: math.prod(shape)].view(shape)

    def _strip(self) -> None:
        """Take a wrapper's name off if all names begin with it."""
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in self.shapes):
                self.shapes = {name.removeprefix(prefix): shape for name, shape in self.shapes.items()}
                self._fetch = {name.removeprefix(prefix): fetch for name, fetch in self._fetch.items()}


def _later(read: Callable[[Path, BinTensor], Tensor], path: Path, tensor: BinTensor) -> Fetch:
    return lambda: read(path, tensor)


def _bytes(memory: mmap.mmap, offset: int, length: int) -> bytes:
    if offset < 0 or offset + length > len(memory):
        raise FileRefused(f"ends at byte {len(memory)}: it is cut short")
    return memory[offset : offset + length]


def _iteration(folder: Path) -> Path:
    latest = folder / "latest"
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if tag in ("", ".", "..") or "/" in tag or "\\" in tag:
            raise CheckpointError(
                str(folder), [f"latest names {printable(tag)!r}, which is no folder here"], hint=_CURE
            )
        return folder / tag
    return folder
