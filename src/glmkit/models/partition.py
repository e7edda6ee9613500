"""How the tensors of every family are divided over the ranks of tensor parallelism: a table, a split and its inverse.

    whole tensor --split(rank, degree)--> what the rank holds --merge--> the whole tensor again, bit for bit

    query_key_value     rows      each rank gets whole heads. GLM and ChatGLM2 keep q, k and v in three blocks, each of
                                  which is divided; ChatGLM-6B and GLM-130B keep q, k, v of a head together
    dense               columns   the heads' outputs; the ranks' products are summed
    dense_h_to_4h       rows      a gated one is two blocks (gate and value), each of which is divided
    dense_4h_to_h       columns   summed too
    embedding, output   rows      vocabulary
    norms, positions    -         every rank has all of it

Biases and row scales go with the rows; a bias of a summed product belongs to all ranks and is added once.

Source: change_mp.py of GLM, convert_tp.py of GLM-130B. What differs: a head is never cut, and copies that differ
between ranks by more than rounding are an error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glmkit.errors import CheckpointError, UsageError

logger = logging.getLogger("glmkit")


@dataclass(frozen=True)
class Rule:
    """How one tensor is divided.

    Args:
        dim: The dimension that is divided, 0 (rows) or 1 (columns); None: every rank holds the whole tensor.
        units: Relative sizes of the blocks that are divided one by one, for instance (32, 2, 2) heads in q, k and v.
        whole: Whether `units` counts things that must not be cut. Then a block behind the first that has fewer of them
            than there are ranks is held in copies: its neighbours among the ranks hold the same one.
    """

    dim: int | None = None
    units: tuple[int, ...] = (1,)
    whole: bool = False


REPLICATED = Rule()
_ROWS, _HALVES, _COLUMNS = Rule(0), Rule(0, (1, 1)), Rule(1)
_WHOLE_ON_EVERY_RANK = (  # what a name of such a tensor has in it
    *("layernorm.", "position_embeddings.", "inv_freq"),
    *("pool_layer.", "multichoice_head.", "classifier_head.", "out_proj."),  # heads of fine-tuned models
)


@dataclass(frozen=True)
class Partition:
    """The rules of one model.

    Args:
        family: "glm", "glm-130b", "chatglm" or "chatglm2" (which ChatGLM3 and GLM-4-9B are too).
        heads: Attention heads, `H`; None if nobody knows, then any number of rows may be cut.
        groups: Key/value heads, `K`; None: as many as heads.
    """

    family: str
    heads: int | None = None
    groups: int | None = None
    modules: Mapping[str, Rule] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in (("heads", self.heads), ("key/value heads", self.groups)):
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"the number of {name} is {value!r:.80}: expected a whole number, 1 or more")
        if self.family == "chatglm2" and self.heads is None:
            raise UsageError("how ChatGLM2 is divided depends on its heads", hint="give its config.json")
        object.__setattr__(self, "modules", _modules(self.family, self.heads, self.groups or self.heads))

    def rule(self, name: str) -> Rule:
        """The rule of a tensor.

        Args:
            name: Its official name, with or without a prefix.

        Raises:
            CheckpointError: A name that this family does not have.
        """
        owner, _, leaf = name.rpartition(".")
        for module, rule in self.modules.items():
            if owner == module or owner.endswith(f".{module}"):
                # A summed product has one bias for all ranks; the scales of its rows are each rank's own.
                return rule if rule.dim == 0 or leaf == "weight" else REPLICATED
        if any(part in name for part in _WHOLE_ON_EVERY_RANK) or owner == "dense":
            return REPLICATED
        raise CheckpointError(
            self.family, [f"tensor {name}: it is not known how it is divided over ranks"], hint="load it on one device"
        )


def partition_of(config: Any) -> Partition:
    """The rules of the model that a config describes.

    Args:
        config: Of any family.

    Returns:
        Its rules.

    Raises:
        UsageError: It is of no family that is known here.
    """
    family = config.model_type
    if family == "chatglm" and hasattr(config, "multi_query_group_num"):
        family = "chatglm2"
    return Partition(family, config.num_attention_heads, config.num_key_value_heads)


def _modules(family: str, heads: int | None, groups: int | None) -> dict[str, Rule]:
    """The table: end of a module's name -> how its weight is divided."""
    h, k, whole = heads or 1, groups or 1, heads is not None
    of_heads, each_third, grouped = Rule(0, (h,), whole), Rule(0, (h, h, h), whole), Rule(0, (h, k, k), whole)
    summed_heads = Rule(1, (h,), whole)
    tables: dict[str, dict[str, Rule]] = {
        "glm": {
            "word_embeddings": _ROWS,
            "attention.query_key_value": each_third,
            "attention.dense": summed_heads,
            "mlp.dense_h_to_4h": _ROWS,
            "mlp.dense_4h_to_h": _COLUMNS,
        },
        "glm-130b": {
            "word_embeddings": _ROWS,
            "attention.query_key_value": of_heads,
            "attention.dense": summed_heads,
            "mlp.dense_h_to_4h": _HALVES,
            "mlp.dense_4h_to_h": _COLUMNS,
        },
        "chatglm": {
            "word_embeddings": _ROWS,
            "attention.query_key_value": of_heads,
            "attention.dense": summed_heads,
            "mlp.dense_h_to_4h": _ROWS,
            "mlp.dense_4h_to_h": _COLUMNS,
            "lm_head": _ROWS,
        },
        "chatglm2": {
            "word_embeddings": _ROWS,
            "self_attention.query_key_value": grouped,
            "self_attention.dense": summed_heads,
            "mlp.dense_h_to_4h": _HALVES,
            "mlp.dense_4h_to_h": _COLUMNS,
            "output_layer": _ROWS,
        },
    }
    if not isinstance(family, str) or family not in tables:
        raise UsageError(f"{family!r:.80}: it is not known how its tensors are divided", hint=", ".join(tables))
    return tables[family]


def ranges(size: int, rule: Rule, rank: int, degree: int, name: str = "this tensor") -> list[tuple[int, int]]:
    """Which rows (or columns) of a whole tensor a rank holds, in the order in which it holds them.

    Args:
        size: Length of the divided dimension.
        rule: Its rule, with a dimension.
        rank: 0 to degree - 1.
        degree: Number of ranks.
        name: For messages.

    Returns:
        Pairs (first, behind the last).

    Raises:
        UsageError: It cannot be divided so.
    """
    if not 0 <= rank < degree:
        raise UsageError(f"rank {rank} of {degree}", hint="ranks are counted from 0")
    total = sum(rule.units)
    if size % total:
        raise UsageError(f"{name}: {size} rows or columns are no multiple of {total}, as config.json says")
    found, start = [], 0
    for index, units in enumerate(rule.units):
        length = size // total * units
        copies = _copies(units, degree, first=index == 0) if rule.whole else 1
        divisor = degree // copies if copies else 0
        if not divisor or length % divisor:
            what = f"{units} heads" if rule.whole else f"{length} rows or columns"
            raise UsageError(
                f"{name} cannot be divided over {degree} ranks: {what} are no multiple of {degree}",
                hint="choose a number of ranks that divides the heads, the inner size and the vocabulary",
            )
        piece = length // divisor
        begin = start + rank // copies * piece
        found.append((begin, begin + piece))
        start += length
    return found


def _copies(units: int, degree: int, *, first: bool) -> int:
    """How many ranks hold the same of a block's units; 0 if it cannot be divided."""
    if units % degree == 0:
        return 1
    return degree // units if not first and degree % units == 0 else 0


def split(tensor: Tensor, rule: Rule, rank: int, degree: int, name: str = "this tensor") -> Tensor:
    """What a rank holds of a whole tensor.

    Args:
        tensor: Any shape and dtype, also on the meta device.
        rule: How it is divided.
        rank: 0 to degree - 1.
        degree: Number of ranks.
        name: For messages.

    Returns:
        A tensor with memory of its own, or `tensor` itself if every rank holds all of it.

    Raises:
        UsageError: It cannot be divided so.
    """
    if rule.dim is None or degree == 1:
        return tensor
    pieces = [tensor.narrow(rule.dim, a, b - a) for a, b in ranges(tensor.shape[rule.dim], rule, rank, degree, name)]
    return torch.cat(pieces, rule.dim) if len(pieces) > 1 else pieces[0].clone(memory_format=torch.contiguous_format)


def merge(parts: Sequence[Tensor], rule: Rule, name: str = "this tensor") -> Tensor:
    """The whole tensor from what the ranks hold: the inverse of `split`.

    Args:
        parts: One tensor of each rank, in the order of the ranks.
        rule: How it was divided.
        name: For messages.

    Returns:
        The whole tensor.

    Raises:
        CheckpointError: Copies that must be equal are not, or the parts do not fit together.
    """
    degree = len(parts)
    if rule.dim is None:
        _check_equal(parts, name)
        return parts[0]
    if degree == 1:
        return parts[0]
    dim = rule.dim
    copies = _all_copies(rule, degree)
    local = [units * number for units, number in zip(rule.units, copies)]  # relative sizes of a rank's blocks
    size = parts[0].shape[dim]
    if any(part.shape != parts[0].shape for part in parts) or whole_size(size, rule, degree) is None:
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        raise CheckpointError("the ranks' files", [f"tensor {name}: the shapes {shapes} are no parts of one tensor"])
    pieces, start = [], 0
    for units, number in zip(local, copies):
        length = size * units // sum(local)
        of_ranks = [part.narrow(dim, start, length) for part in parts]
        for first in range(0, degree, number):
            _check_equal(of_ranks[first : first + number], name)
            pieces.append(of_ranks[first])
        start += length
    return torch.cat(pieces, dim)


def whole_size(size: int, rule: Rule, degree: int) -> int | None:
    """Length of the divided dimension of the whole tensor, from that of a rank's part.

    Args:
        size: Length of the part.
        rule: How the tensor is divided.
        degree: Number of ranks.

    Returns:
        The length, None if no such part exists.
    """
    local = [units * number for units, number in zip(rule.units, _all_copies(rule, degree))]
    if 0 in local or any(size * units % sum(local) for units in local):
        return None
    return size * degree * sum(rule.units) // sum(local)


def _all_copies(rule: Rule, degree: int) -> list[int]:
    return [_copies(units, degree, first=i == 0) if rule.whole else 1 for i, units in enumerate(rule.units)]


def _check_equal(copies: Sequence[Tensor], name: str) -> None:
    """Copies that rounding has driven apart are one tensor, the first rank's, as in the official conversion."""
    rounded = False
    for copy in copies[1:]:
        if torch.equal(copies[0], copy):
            continue
        one, other = copies[0].double(), copy.double()
        if one.shape == other.shape and float((one - other).abs().max()) <= 0.01 * float(one.abs().max()):
            rounded = True
            continue
        raise CheckpointError(
            "the ranks' files",
            [f"tensor {name}: all ranks must have the same, but theirs differ"],
            hint="the files must be of one checkpoint and one iteration",
        )
    if rounded:
        logger.warning("tensor %s differs a little between the ranks; the first rank's is taken", name)
