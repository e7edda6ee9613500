"""What an adapter's folder holds, whoever wrote it: kind, sizes and the place of every tensor are read from the folder.

    adapter_config.json, adapter_model.*       LoRA of PEFT; the names of the official code are the names here
    adapter_model.bin alone                    LoRA of ChatGLM-Tuning's trainer: no config, names of named_parameters()
    pytorch_model.bin or model.safetensors     P-Tuning v2 of the official scripts: transformer.prefix_encoder.*,
                                               alone or with the whole model (older scripts, ChatGLM3's finetune_hf.py)

Nothing in a folder is ever run: no pickle, and no pattern of an adapter_config.json either, because a pattern may be
written so that matching it never ends. Which layers have matrices is read from the names of the tensors.
"""

from __future__ import annotations

import copy
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glmkit.checkpoint import ADAPTER_WEIGHTS, MODEL_WEIGHTS, Folder, check_tensors, open_folder, shown_path
from glmkit.errors import CheckpointError, UsageError
from glmkit.models.checked_config import CheckedConfig
from glmkit.pickles import printable

logger = logging.getLogger("glmkit")

_PREFIX = re.compile(r"(?:\w+\.)*prefix_encoder\.(?P<leaf>.+)")
_LORA = re.compile(r"(?:base_model\.model\.)?(?P<module>.+?)\.lora_(?P<side>[AB])(?:\.(?P<name>[\w-]+))?\.weight")
_LAYER_NUMBER = re.compile(r"\.layers\.(\d+)\.")
_PLAIN_PATTERN = re.compile(r"\^?[\w.-]+")
_UNKNOWN_ALPHA = 32  # what ChatGLM-Tuning and the official LoRA examples use
# Initialisations that leave the base as it is. The others take something out of it, which only their program puts back.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# Fields of adapter_config.json that change what is computed, or what is learnt, beyond plain LoRA.
_BEYOND_LORA = (
    "use_dora", "modules_to_save", "lora_bias", "layer_replication", "use_qalora", "alora_invocation_tokens",
    "use_bdlora", "trainable_token_indices", "target_parameters", "enable_lora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip


@dataclass(frozen=True)
class LoraLayer:
    """The matrices beside one linear layer, by their names in the folder.

    Args:
        a: Name of A, (rank, in).
        b: Name of B, (out, rank).
        scale: What B A x is multiplied by.
    """

    a: str
    b: str
    scale: float


@dataclass(frozen=True)
class Lora:
    """A LoRA whose every tensor has its place.

    Args:
        folder: The opened folder.
        layers: Name of the model's layer -> its matrices.
    """

    folder: Folder
    layers: Mapping[str, LoraLayer]

    def read(self) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """Reads the matrices, one layer after the other.

        Yields:
            The layer's name, and what `matrices` gives for it.
        """
        for name in self.layers:
            yield name, *self.matrices(name)

    def matrices(self, layer: str) -> tuple[Tensor, Tensor, float]:
        """Reads the matrices of one layer.

        Args:
            layer: Its name.

        Returns:
            A (rank, in) and B (out, rank) in float32 on the CPU, and the scale of their product.
        """
        place = self.layers[layer]
        found = dict(self.folder.read([place.a, place.b]))
        return found[place.a].float(), found[place.b].float(), place.scale


@dataclass(frozen=True)
class Prefix:
    """A P-Tuning v2 prefix whose every tensor has its place.

    Args:
        folder: The opened folder.
        config: The base's config with the prefix's sizes in `pre_seq_len` and `prefix_projection`.
        names: Name in the folder -> name in a model that is made with that config.
    """

    folder: Folder
    config: CheckedConfig
    names: Mapping[str, str]

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Reads the tensors.

        Yields:
            The name in the model, and the tensor as it is stored, on the CPU.
        """
        for stored, tensor in self.folder.read(self.names):
            yield self.names[stored], tensor


def open_adapter(path: Path, config: Mapping[str, Any] | None = None) -> Folder:
    """Opens an adapter's folder through the gate; only config and weights are touched, never a trainer's own files.

    Args:
        path: The folder.
        config: Fields of adapter_config.json that overrule or complete the folder's, such as {"lora_alpha": 16}.

    Returns:
        The folder, to be used as a context manager: it holds its files open.

    Raises:
        UsageError: There is no such folder.
        CheckpointError: Everything that is wrong with it.
    """
    if not path.is_dir():
        raise UsageError(f"there is no adapter folder {str(path)!r}", hint="give the folder that holds the adapter")
    described, lora = (path / "adapter_config.json").is_file(), any((path / name).exists() for name in ADAPTER_WEIGHTS)
    if not described and not lora and not any((path / name).exists() for name in MODEL_WEIGHTS):
        inside = sorted(folder.name for folder in path.glob("*/") if _holds_weights(folder))
        hint = f"it has {', '.join(inside[:20])}: give one of these" if inside else None
        raise CheckpointError(shown_path(path), ["it holds neither an adapter nor a prefix"], hint=hint)
    if described or lora:
        folder = open_folder(path, config="adapter_config.json" if described else None, weights=ADAPTER_WEIGHTS)
    else:
        folder = open_folder(path, config="config.json" if (path / "config.json").exists() else None)
    folder.config = {**folder.config, **(config or {})}
    return folder


def _holds_weights(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in (*ADAPTER_WEIGHTS, *MODEL_WEIGHTS))


def read_adapter(adapter: Folder, model: nn.Module, base: Folder | None = None) -> Lora | Prefix:
    """Says what an opened folder holds, and checks that every tensor of it fits the model; nothing is allocated.

    Args:
        adapter: The opened folder.
        model: The base model, best on the meta device.
        base: The base's opened folder. A prefix that was saved together with the whole model is taken only if that
            model is this base, which is found out by reading both.

    Returns:
        The LoRA or the prefix.

    Raises:
        CheckpointError: A kind that is none of these, or tensors that are missing, fit nowhere or have another shape.
        ConfigError: The prefix's length is out of range.
    """
    if any(_LORA.fullmatch(name) for name in adapter.tensors) or "peft_type" in adapter.config:
        return _read_lora(adapter, model)
    if any(_PREFIX.fullmatch(name) for name in adapter.tensors):
        return _read_prefix(adapter, model, base)
    found = ", ".join(map(printable, list(adapter.tensors)[:3])) or "no tensors"
    whole = len(adapter.tensors) >= len(model.state_dict()) // 2
    raise CheckpointError(
        shown_path(adapter.path),
        ["it holds a whole model, no adapter" if whole else f"expected LoRA matrices or a prefix, found {found}"],
        hint="a whole model is loaded by itself: glmkit.load(THIS_FOLDER)" if whole else None,
    )


# --- LoRA ---


def _read_lora(adapter: Folder, model: nn.Module) -> Lora:
    config, modules = adapter.config, dict(model.named_modules())
    _refuse_other_kinds(adapter)
    start = f"{getattr(model, 'base_model_prefix', '')}."
    stored: dict[str, dict[str, str]] = {}  # layer -> side -> name in the folder
    for name in adapter.tensors:
        matched = _LORA.fullmatch(name)
        if matched:
            module = matched["module"]
            module = start + module if module not in modules and start + module in modules else module
            stored.setdefault(module, {})[matched["side"]] = name
    own = _adapted_layers(config, stored, modules)
    expected: dict[str, tuple[int, ...]] = {}
    layers, problems = {}, []
    for name in own:
        rank, alpha = _rank(adapter, stored.get(name, {})), _pattern(adapter, "alpha_pattern", name)
        wanted = _pattern(adapter, "rank_pattern", name) or config.get("r")
        if wanted is not None and rank != wanted and name in stored:
            problems.append(f"r is {wanted!r:.40}, but the matrices of {name} have rank [{rank}]")
        sides = {side: stored.get(name, {}).get(side, _peft_name(name, side)) for side in "AB"}
        rank = rank if name in stored else wanted if type(wanted) is int else 0
        expected[sides["A"]] = (rank, modules[name].in_features)
        expected[sides["B"]] = (modules[name].out_features, rank)
        alpha = config.get("lora_alpha") if alpha is None else alpha
        layers[name] = LoraLayer(sides["A"], sides["B"], _scale(adapter, alpha, rank))
    if problems:
        raise CheckpointError(shown_path(adapter.path), problems, hint="the files belong to different adapters")
    _check_adapter(adapter, expected, model)
    if not layers:
        raise CheckpointError(shown_path(adapter.path), ["it has no matrices"])
    if config.get("lora_alpha") is None:
        logger.warning(
            "%s does not say lora_alpha: %d is taken, as ChatGLM-Tuning does; another one is given as"
            ' adapter_config={"lora_alpha": 16}',
            shown_path(adapter.path),
            _UNKNOWN_ALPHA,
        )
    return Lora(adapter, layers)


def _refuse_other_kinds(adapter: Folder) -> None:
    config = adapter.config
    kind = config.get("peft_type", "LORA")
    problems = [f"peft_type is {kind!r:.40}, expected 'LORA'"] if kind != "LORA" else []
    problems += [
        f"{name} is {config[name]!r:.80}, which plain LoRA has not" for name in _BEYOND_LORA if config.get(name)
    ]
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r:.40}: learnt biases are not read, expected 'none'")
    start = config.get("init_lora_weights")
    if not isinstance(start, (bool, str, type(None))) or start not in _PLAIN_STARTS:
        problems.append(f"init_lora_weights is {start!r:.40}: it changed the base, too")
    if problems:
        hint = "merge it into its base with PEFT, which wrote it (merge_and_unload), and load the result"
        raise CheckpointError(shown_path(adapter.path), problems, hint=hint)


def _adapted_layers(config: Mapping[str, Any], stored: Mapping[str, Any], modules: dict[str, nn.Module]) -> list[str]:
    """The layers that must have matrices. Where a pattern stands in for names, the tensors say which it found."""
    linear = [name for name, module in modules.items() if hasattr(module, "in_features")]
    targets, excluded, numbers = (config.get(f) for f in ("target_modules", "exclude_modules", "layers_to_transform"))
    if targets is None:  # a folder without config: what one block has, all must have
        targets = sorted({name.rpartition(".")[2] for name in stored})
    if not isinstance(targets, (list, tuple)) or isinstance(excluded, str):
        return [name for name in linear if name in stored]
    numbers = numbers if isinstance(numbers, list) else [] if numbers is None else [numbers]

    def is_target(name: str) -> bool:
        number = _LAYER_NUMBER.search(name)
        named = _ends_with(name, targets) and not _ends_with(name, excluded or ())
        return named and (not numbers or (number is not None and int(number[1]) in numbers))

    return [name for name in linear if is_target(name)]


def _ends_with(name: str, ends: Iterable[Any]) -> bool:
    return any(isinstance(end, str) and f".{name}".endswith(f".{end}") for end in ends)


def _rank(adapter: Folder, sides: Mapping[str, str]) -> int:
    """The rank that the shapes say; 0 if there are none."""
    for side, place in (("A", 0), ("B", 1)):
        shape = adapter.tensors[sides[side]].shape if side in sides else ()
        if len(shape) == 2:
            return shape[place]
    return 0


def _scale(adapter: Folder, alpha: Any, rank: int) -> float:
    if alpha is None:
        alpha = _UNKNOWN_ALPHA
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= sys.float_info.max:
        problem = f"lora_alpha is {alpha!r:.40}, expected a number"
        raise CheckpointError(shown_path(adapter.path), [problem], hint="write it into adapter_config.json as a number")
    divisor = math.sqrt(rank) if adapter.config.get("use_rslora") else rank
    return alpha / divisor if divisor else 0.0


def _pattern(adapter: Folder, field: str, name: str) -> Any:
    """What rank_pattern or alpha_pattern says of a layer: the first key that is the end of its name, as in PEFT."""
    patterns = adapter.config.get(field) or {}
    problem = None if isinstance(patterns, dict) else f"{field} is {patterns!r:.80}, expected an object"
    for key, value in patterns.items() if problem is None else ():
        if not _PLAIN_PATTERN.fullmatch(key):
            problem = (
                f"{field} has the key {printable(key)[:80]!r}, expected names of layers: patterns are not followed"
            )
        elif name == key.removeprefix("^") or (not key.startswith("^") and name.endswith(f".{key}")):
            return value
    if problem is not None:
        hint = "write the names of the layers into adapter_config.json"
        raise CheckpointError(shown_path(adapter.path), [problem], hint=hint)
    return None


def _peft_name(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def _check_adapter(
    adapter: Folder, expected: Mapping[str, tuple[int, ...]], model: nn.Module, beside: frozenset[str] = frozenset()
) -> None:
    try:
        check_tensors(adapter, expected, ignore=lambda name: name in beside)
    except CheckpointError as error:
        hint = f"it was made for another model than this {type(model).__name__}, or a file of it is damaged"
        raise CheckpointError(error.folder, error.problems, hint=hint) from None


# --- P-Tuning v2 ---


def _read_prefix(adapter: Folder, model: nn.Module, base: Folder | None) -> Prefix:
    leaves = {matched["leaf"]: name for name in adapter.tensors for matched in [_PREFIX.fullmatch(name)] if matched}
    others = [name for name in adapter.tensors if name not in leaves.values()]
    table = adapter.tensors.get(leaves.get("embedding.weight", ""))
    if table is None or len(table.shape) != 2:
        found = "no prefix_encoder.embedding.weight" if table is None else f"a table of shape {list(table.shape)}"
        raise CheckpointError(shown_path(adapter.path), [f"expected a P-Tuning prefix, found {found}"])
    if not hasattr(model.config, "pre_seq_len"):
        kind = type(model.config).__name__.removesuffix("Config")
        raise CheckpointError(shown_path(adapter.path), [f"a P-Tuning prefix; models of {kind} have none"])
    config: CheckedConfig = copy.deepcopy(model.config)  # type: ignore[assignment]
    config.pre_seq_len = table.shape[0]
    config.prefix_projection = any(leaf.startswith("trans.") for leaf in leaves)
    config.check()
    with torch.device("meta"):
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in type(model)(config).state_dict().items()
            if _PREFIX.fullmatch(name)
        }
    own = {
        leaf: name for name in shapes for matched in [_PREFIX.fullmatch(name)] if matched for leaf in [matched["leaf"]]
    }
    expected = {leaves.get(leaf, name): shapes[name] for leaf, name in own.items()}
    if others:
        _compare_whole(adapter, others, base)
    _check_adapter(adapter, expected, model, beside=frozenset(others))
    return Prefix(adapter, config, {leaves[leaf]: name for leaf, name in own.items()})


def _compare_whole(adapter: Folder, others: list[str], base: Folder | None) -> None:
    """Takes the prefix of a whole model only if the rest of it is the base, number for number in the base's dtype."""
    hint = "a folder with the whole model is loaded by itself: glmkit.load(THIS_FOLDER)"
    common = [name for name in others if base is not None and name in base.tensors]
    if base is None or 2 * len(common) < len(base.tensors):
        listed = ", ".join(printable(name) for name in others[:3])
        problem = f"expected a P-Tuning prefix and nothing else, found also {listed}"
        raise CheckpointError(shown_path(adapter.path), [problem], hint=hint)
    different = [name for name in common if adapter.tensors[name].shape != base.tensors[name].shape]
    for name in common if not different else ():
        [(_, ours)], [(_, theirs)] = base.read([name]), adapter.read([name])
        if not torch.equal(theirs.to(ours.dtype), ours):
            different.append(name)
    if different:
        raise CheckpointError(
            shown_path(adapter.path),
            [
                f"it holds a whole model with its prefix, and that model is not this base: {len(different)} of"
                f" {len(common)} tensors differ, for instance {printable(different[0])}"
            ],
            hint=hint,
        )
    logger.info("%s holds the base too; its prefix is taken", shown_path(adapter.path))
