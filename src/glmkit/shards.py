"""The original model-parallel folders of GLM and GLM-130B, read as one checkpoint with whole tensors.

    FOLDER/latest                                  the name of the iteration, "49300"
    FOLDER/49300/mp_rank_00_model_states.pt        {"module": {name: what rank 0 holds}, "iteration": …}
    FOLDER/49300/mp_rank_01_model_states.pt        … one file for each rank
    FOLDER/config.json                             not in the releases; read if somebody has put one there

    open_model_parallel --> a Folder: names, shapes and reading as of any other checkpoint, one whole tensor at a time

The rows of quantised weights have a scale for each rank, so such a weight becomes whole only as float16 numbers.

Source: convert_tp.py and the quantisation of GLM-130B, change_mp.py of GLM.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from glmkit.checkpoint import MAX_SHARDS, Folder, TensorInfo, check_plain_name, open_folder, shown_path
from glmkit.errors import CheckpointError, UsageError
from glmkit.families import FAMILIES
from glmkit.models import glm130b_config, glm_config
from glmkit.models.partition import Partition, merge, ranges, whole_size
from glmkit.pickles import FileRefused, printable
from glmkit.quant.linear import dequantize

logger = logging.getLogger("glmkit")

TRACKERS = ("latest", "latest_checkpointed_iteration.txt")
"""Files that name the iteration: DeepSpeed's, and Megatron's, which GLM's code reads."""
_RANK_FILE = re.compile(r"mp_rank_(\d{2,3})_model_states\.pt")
_PREFIX = re.compile(r"^(module\.)+")
_SCALE = "_scale"
_MATRICES = ("embeddings.weight", "query_key_value.weight", "dense.weight", "_4h.weight", "_h.weight")


def rank_file(rank: int) -> str:
    """The name of a rank's file.

    Args:
        rank: From 0.
    """
    return f"mp_rank_{rank:02d}_model_states.pt"


def is_model_parallel(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is an original model-parallel checkpoint, or one iteration of it.

    Args:
        path: The folder.
    """
    folder = Path(path).expanduser()
    return (folder / rank_file(0)).is_file() or any((folder / tracker).is_file() for tracker in TRACKERS)


def open_model_parallel(
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    needs_config: bool = True,
    dequantize: bool = False,
) -> ModelParallelFolder:
    """Opens a model-parallel folder and compares the files of all ranks, without reading tensor data.

    Args:
        path: The folder with `latest`, or one iteration's folder.
        config: Fields that complete the folder's config.json, or stand for it where there is none; without num_layers
            the rest is read off the tensors.
        needs_config: Whether it is an error if the config can neither be found nor read off the tensors.
        dequantize: Whether quantised weights of a single rank become float16 numbers, as those of several always do.

    Returns:
        The folder, to be used as a context manager: it holds its files open.

    Raises:
        CheckpointError: Ranks are missing, their names, shapes or dtypes do not fit together (all of it is listed), or
            the number of heads cannot be known.
    """
    return ModelParallelFolder(Path(path).expanduser(), config, needs_config=needs_config, dequantize=dequantize)


class ModelParallelFolder(Folder):
    """A model-parallel checkpoint as one; made by `open_model_parallel`.

    Attributes:
        config: The content of config.json, or what the tensors say; empty if neither is known.
        tensors: Name -> description of every whole tensor, in the order of the first rank's file.
        training: What the first rank's file says beside its weights.
        degree: Number of ranks.
        ranks: The opened file of each rank; their tensors have the names of the file.
        iteration: The name of the iteration's folder.
        partition: How the tensors are divided.
        bits: 4 or 8 if the files hold quantised weights, else 0.
        whole_bits: The same for the whole tensors: 0 if they are put together from several quantised parts.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any] | None, *, needs_config: bool, dequantize: bool = False
    ) -> None:
        super().__init__(path)
        self.ranks: list[Folder] = []
        try:
            place = self._find_iteration()
            self.iteration = os.path.basename(os.path.abspath(place))  # also of "."
            self._open_ranks(place)
            self._raw = {_PREFIX.sub("", name): name for name in self.ranks[0].tensors}
            found = self.read_object("config.json") or self.ranks[0].read_object("config.json") or {}
            self.config = {**found, **(config or {})}
            self._shapes = {name: self.ranks[0].tensors[raw].shape for name, raw in self._raw.items()}
            problems = _strange_shapes(self._shapes)
            if problems:
                raise CheckpointError(shown_path(path), problems)
            self.bits = _bits(self._shapes, self.path)
            self._dequantizes = dequantize or self.degree > 1
            self.whole_bits = 0 if self._dequantizes else self.bits
            self.partition = _partition(self.config, self._shapes, self.bits, self.path)
            self.tensors = self._whole_tensors()
            if "num_layers" not in self.config:
                self.config = {**(self._config_from_tensors() or {}), **self.config}
                if needs_config and "num_layers" not in self.config:
                    raise CheckpointError(
                        shown_path(path),
                        ["the number of attention heads is not in the tensors, and there is no config.json"],
                        hint="glm convert A B --to official --heads N, load(..., config={'num_attention_heads': N});"
                        " or put a config.json beside `latest`",
                    )
            if self.config and self.partition.family == "glm":
                self.config.setdefault("gelu", "tanh")  # what the training code computes
            if self.config.get("quantization_bit") and not self.bits:
                logger.warning(
                    "%s: config.json says quantization_bit=%s, but the weights are not quantised; they are read as they"
                    " are",
                    shown_path(self.path),
                    printable(repr(self.config["quantization_bit"])),
                )
            # Whole weights of several quantised parts are not quantised, whatever the parts' config says.
            if self.config and (self.bits or self.config.get("quantization_bit")):
                self.config["quantization_bit"] = self.whole_bits
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ModelParallelFolder:
        return self

    @property
    def degree(self) -> int:
        return len(self.ranks)

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        super().close()

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Reads whole tensors, one at a time, each put together from all ranks.

        Args:
            names: Which tensors, in this order; None for all.

        Yields:
            Name and tensor (CPU); quantised weights as numbers where the folder dequantises them.

        Raises:
            CheckpointError: A name is unknown, the ranks' parts do not fit together, or a file was changed.
        """
        wanted = list(self.tensors) if names is None else list(dict.fromkeys(names))
        unknown = [f"there is no tensor {printable(name)}" for name in wanted if name not in self.tensors]
        if unknown:
            raise CheckpointError(shown_path(self.path), unknown)
        for name in wanted:
            rule = self.partition.rule(name)
            parts = [self._part(rank, name) for rank in range(self.degree)]
            try:
                yield name, merge(parts, rule, name)
            except CheckpointError as error:
                raise CheckpointError(shown_path(self.path), error.problems, hint=error.hint) from None

    def read_part(self, name: str, dim: int, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Reads some rows or columns of a whole tensor; the tensor is in memory meanwhile.

        Args:
            name: The tensor's name.
            dim: 0 for rows, 1 for columns of a matrix.
            ranges: Pairs (first, behind the last), in the order wanted.

        Returns:
            The rows or columns one behind the other (CPU).

        Raises:
            CheckpointError: As in `read`.
        """
        [(_, whole)] = self.read([name])
        return torch.cat([whole.narrow(dim, first, last - first) for first, last in ranges], dim)

    def read_rank(self, rank: int, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Reads what one rank holds as its file has it, quantised weights and their scales too.

        Args:
            rank: 0 to degree - 1.
            names: Which tensors; None for all of the rank's.

        Yields:
            Name (without `module.`) and tensor.
        """
        for name in self._raw if names is None else names:
            [(_, tensor)] = self.ranks[rank].read([self._raw[name]])
            yield name, tensor

    @property
    def rank_tensors(self) -> dict[str, TensorInfo]:
        """Name (without `module.`) -> description of what each rank's file has."""
        return {name: self.ranks[0].tensors[raw] for name, raw in self._raw.items()}

    def _part(self, rank: int, name: str) -> torch.Tensor:
        """A rank's part of a whole tensor; of several quantised ones, in the numbers that they stand for."""
        raw = self._raw[name]
        folder = self.ranks[rank]
        if not self._dequantizes or raw + _SCALE not in folder.tensors:
            return next(tensor for _, tensor in folder.read([raw]))
        both = dict(folder.read([raw, raw + _SCALE]))
        return dequantize(both[raw], both[raw + _SCALE], self.bits)

    def _find_iteration(self) -> Path:
        if (self.path / rank_file(0)).is_file() or not is_model_parallel(self.path):
            return self.path
        found = {}
        for tracker in TRACKERS:
            text = self.read_text(tracker, limit_bytes=1 << 10)
            if text is not None:
                found[tracker] = text.strip()
        problems = []
        for tracker, name in found.items():
            try:
                check_plain_name(name)
            except FileRefused as error:
                problems.append(f"{tracker} names the iteration {printable(repr(name))}, which {error.reason}")
        if len(set(found.values())) > 1:
            problems.append(
                f"{' and '.join(found)} name different iterations: {', '.join(map(printable, found.values()))}"
            )
        name = next(iter(found.values()))
        if not problems and not (self.path / name).is_dir():
            problems.append(f"{' and '.join(found)} name the iteration {printable(name)}, but there is no such folder")
        if problems:
            raise CheckpointError(shown_path(self.path), problems, hint="give the folder of the iteration itself")
        place = self.path / name
        if not place.resolve().is_relative_to(self.path.resolve()):
            raise CheckpointError(
                shown_path(self.path),
                [f"the iteration {printable(name)} is a link out of the folder"],
                hint="give the folder of the iteration itself",
            )
        return place

    def _open_ranks(self, place: Path) -> None:
        """Opens the file of every rank and compares names, shapes and dtypes."""
        try:
            found = sorted({int(match[1]) for name in os.listdir(place) if (match := _RANK_FILE.fullmatch(name))})
        except OSError as error:
            raise CheckpointError(shown_path(place), [f"the folder cannot be read: {error.strerror}"]) from error
        degree = found[-1] + 1 if found else 1
        if degree > MAX_SHARDS:
            raise CheckpointError(
                shown_path(self.path), [f"{rank_file(degree - 1)}: at most {MAX_SHARDS} ranks expected"]
            )
        problems = [f"{rank_file(rank)} is missing" for rank in range(degree) if rank not in found]
        for rank in found:
            try:
                self.ranks.append(open_folder(place, weights=(rank_file(rank),), config=None))
            except CheckpointError as error:
                problems += error.problems
        if not problems:
            self.training = dict(self.ranks[0].training)
            problems = _differences(self.ranks)
        if problems:
            hint = "all ranks' files of one iteration must be in one folder"
            raise CheckpointError(shown_path(self.path), problems, hint=hint)

    def _whole_tensors(self) -> dict[str, TensorInfo]:
        tensors, problems, own = {}, [], self.rank_tensors
        for name, info in own.items():
            owner = name.removesuffix(_SCALE)
            if self._dequantizes and name != owner and owner in self._raw:
                continue
            shape, dtype = list(info.shape), info.dtype
            scale = own.get(name + _SCALE) if self._dequantizes else None
            if scale is not None:
                shape[1], dtype = shape[1] * 8 // self.bits, scale.dtype
            rule = self.partition.rule(name)
            if rule.dim is not None and self.degree > 1:
                size = whole_size(shape[rule.dim], rule, self.degree)
                if size is None:
                    problems.append(f"tensor {name} of shape {list(info.shape)} is no part of {self.degree}")
                    continue
                shape[rule.dim] = size
            tensors[name] = TensorInfo(name, tuple(shape), dtype, info.file, info.offset_bytes)
        problems = problems or _missing_ranks(tensors, self.degree)
        if problems:
            raise CheckpointError(shown_path(self.path), problems, hint="are the files of all ranks there?")
        return tensors

    def _config_from_tensors(self) -> dict[str, Any] | None:
        """The config of a folder that has none, as far as its tensors tell; None if they do not tell the heads."""
        if self.partition.heads is None or self.partition.family not in ("glm", "glm-130b"):
            return None
        shapes = {name: info.shape for name, info in self.tensors.items()}
        read = {"glm": glm_config, "glm-130b": glm130b_config}[self.partition.family].config_from_tensors
        values: dict[str, Any] = read(shapes, num_attention_heads=self.partition.heads).to_diff_dict()
        return {**values, "model_type": self.partition.family}


class PartFolder:
    """What one rank holds of a checkpoint, to be read like a folder; the whole model is never in memory.

    Args:
        folder: An opened checkpoint. If it is a model-parallel one of just this number of ranks, the rank's own file is
            read, quantised weights as they are; else some rows or columns of each tensor.
        partition: How the tensors are divided.
        rank: 0 to degree - 1.
        degree: Number of ranks.

    Attributes:
        tensors: Name -> description of what the rank holds.
        bits: 4 or 8 if its weights are quantised, else 0.

    Raises:
        UsageError: A tensor cannot be divided so.
    """

    def __init__(self, folder: Folder, partition: Partition, rank: int, degree: int) -> None:
        self.path, self._folder, self._partition, self._rank, self._degree = (
            folder.path,
            folder,
            partition,
            rank,
            degree,
        )
        self.has, self.read_object = folder.has, folder.read_object
        self._own = folder if isinstance(folder, ModelParallelFolder) and folder.degree == degree else None
        whole = folder.whole_bits if isinstance(folder, ModelParallelFolder) else folder.config.get("quantization_bit")
        self.bits: int = self._own.bits if self._own is not None else whole or 0
        self.tensors = self._own.rank_tensors if self._own is not None else self._divided()

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Reads what the rank holds, one tensor at a time.

        Args:
            names: Which tensors, in this order; None for all.

        Yields:
            Name and the rank's part (CPU).

        Raises:
            CheckpointError: A file was changed after it was opened, or ranks' parts do not fit together.
            UsageError: A tensor cannot be divided so.
        """
        wanted = list(self.tensors) if names is None else list(names)
        if self._own is not None:
            yield from self._own.read_rank(self._rank, wanted)
            return
        for name in wanted:
            pieces = self._pieces(name)
            if pieces is None:
                yield from self._folder.read([name])
            else:
                yield name, self._folder.read_part(name, *pieces)

    def _divided(self) -> dict[str, TensorInfo]:
        found = {}
        for name, info in self._folder.tensors.items():
            pieces = self._pieces(name)
            if pieces is not None:
                shape = list(info.shape)
                shape[pieces[0]] = sum(last - first for first, last in pieces[1])
                info = TensorInfo(name, tuple(shape), info.dtype, info.file, info.offset_bytes)
            found[name] = info
        return found

    def _pieces(self, name: str) -> tuple[int, list[tuple[int, int]]] | None:
        """Dimension and places of what the rank holds; None if that is all of it."""
        rule, shape = self._partition.rule(name), self._folder.tensors[name].shape
        if (
            rule.dim is None or self._degree == 1 or len(shape) <= rule.dim
        ):  # the last is refused when shapes are compared
            return None
        return rule.dim, ranges(shape[rule.dim], rule, self._rank, self._degree, name)


def _differences(ranks: Sequence[Folder]) -> list[str]:
    """What does not fit between the ranks' files, in words."""
    problems = []
    first = ranks[0].tensors
    for number, rank in enumerate(ranks[1:], start=1):
        problems += [f"rank {number} has no tensor {printable(name)}" for name in first if name not in rank.tensors]
        problems += [f"rank 0 has no tensor {printable(name)}" for name in rank.tensors if name not in first]
        for name, info in rank.tensors.items():
            one = first.get(name)
            if one is not None and (one.shape, one.dtype) != (info.shape, info.dtype):
                problems.append(
                    f"tensor {printable(name)} is {one.dtype} {list(one.shape)} at rank 0,"
                    f" but {info.dtype} {list(info.shape)} at rank {number}"
                )
    told = [rank.training.get("mp_world_size") for rank in ranks]
    said = {number for number in told if type(number) is int} - {len(ranks)}
    problems += [f"the files say that there are {number} ranks, found {len(ranks)}" for number in said]
    return problems


def _strange_shapes(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Tensors that no model has: matrices that are none, empty ones, scales without a weight; in words."""
    problems = []
    for name, shape in shapes.items():
        if 0 in shape or not shape or (name.endswith(_MATRICES) and len(shape) != 2):
            problems.append(f"tensor {printable(name)} has the shape {list(shape)}")
        if name.endswith(_SCALE) and len(shapes.get(name.removesuffix(_SCALE), ())) != 2:
            problems.append(f"tensor {printable(name)} has no weight that it could scale")
    return problems


def _bits(shapes: Mapping[str, tuple[int, ...]], path: Path) -> int:
    """4 or 8 for quantised weights, told by how many columns a byte holds; 0 for others."""
    name = next((name for name in shapes if name.endswith("query_key_value.weight" + _SCALE)), None)
    if name is None:
        return 0
    norm = re.sub(r"[a-z_]*attention\.query_key_value\.weight_scale$", "input_layernorm.weight", name)
    hidden, columns = shapes.get(norm, (0,))[0], shapes[name.removesuffix(_SCALE)][1]
    if columns not in (hidden, hidden // 2):
        raise CheckpointError(
            shown_path(path),
            [f"{name}: its weight has {columns} columns for {hidden} channels"],
            hint="copy the files again",
        )
    return 8 if columns == hidden else 4


def _partition(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], bits: int, path: Path) -> Partition:
    """Which family the tensors belong to, and how many heads it has."""
    heads, groups = config.get("num_attention_heads"), config.get("multi_query_group_num")
    kind = config.get("model_type")
    if kind == "chatglm":
        return Partition("chatglm2" if groups else "chatglm", heads, groups)
    if kind is None and "transformer.position_embeddings.weight" in shapes:
        kind = "glm"
    first = "transformer.layers.0."
    widened, narrowed = (shapes.get(f"{first}mlp.{layer}.weight") for layer in ("dense_h_to_4h", "dense_4h_to_h"))
    if kind is None and widened and narrowed and widened[0] == 2 * narrowed[1] * (8 // (bits or 8)):
        kind = "glm-130b"
    if kind is None:
        raise CheckpointError(
            shown_path(path),
            ["its tensors are neither GLM's (position_embeddings) nor GLM-130B's (a gated dense_h_to_4h)"],
            hint="put the model's config.json beside `latest`",
        )
    try:
        return Partition(kind, heads or _known_heads(kind, shapes))
    except UsageError as error:
        raise CheckpointError(shown_path(path), [error.message], hint=error.hint) from error


def _known_heads(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The number of heads, from the rotary frequencies that a file has, or from the released models of these sizes."""
    hidden = next((shape[1] for name, shape in shapes.items() if name.endswith("word_embeddings.weight")), 0)
    frequencies = next((shape[0] for name, shape in shapes.items() if name.endswith("rotary_emb.inv_freq")), None)
    if frequencies and hidden % (2 * frequencies) == 0:
        return hidden // (2 * frequencies)
    if kind == "glm-130b":
        return 96 if hidden == 12_288 else None
    sizes = {"num_layers": _count_layers(shapes), "hidden_size": hidden}
    released = [row.sizes for row in FAMILIES if row.architecture == kind and sizes.items() <= row.sizes.items()]
    return released[0]["num_attention_heads"] if released else None


def _count_layers(names: Iterable[str]) -> int:
    return len({match[1] for name in names if (match := re.search(r"\.layers\.(\d+)\.", name))})


def _missing_ranks(tensors: Mapping[str, TensorInfo], degree: int) -> list[str]:
    """The last ranks' files may be missing unnoticed; then q, k and v together are not as wide as they must be."""
    for name, info in tensors.items():
        hidden = next((size for size in info.shape[1:]), 0)
        if name.endswith(".attention.query_key_value.weight") and info.dtype.is_floating_point and hidden:
            if info.shape[0] == 3 * hidden:
                return []
            needed = math.ceil(3 * hidden * degree / info.shape[0])
            return [f"{name} has {info.shape[0]} of {3 * hidden} rows: {degree} ranks' files were found, of {needed}"]
    return []
