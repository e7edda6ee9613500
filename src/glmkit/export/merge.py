"""Base and adapter as one plain checkpoint, which this toolkit and the official code load without knowing of adapters.

    LoRA      W + scale * B A, computed in float32 and rounded once to the dtype of the result
    P-Tuning  a prefix cannot become part of the weights: it goes along as transformer.prefix_encoder.*, with its length
              in config.json, as the official scripts save a whole model with its prefix

Tensors go from file to file one at a time. Before the new folder gets its name, a process of its own opens it again and
compares its logits with those of base and adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmkit.adapters import Lora, Prefix, open_adapter, read_adapter
from glmkit.checkpoint import Folder, TensorInfo, shown_path
from glmkit.errors import CheckpointError, UsageError
from glmkit.export.folders import CARRIED, complete_folder, completed_config
from glmkit.export.numbers import chosen_dtype, dtype_names, rounded
from glmkit.export.proof import Comparison, compare, require
from glmkit.loading import choose_family, open_model, read_config, read_tokenizer
from glmkit.location import locate
from glmkit.models.checked_config import CheckedConfig
from glmkit.quant.linear import dequantize
from glmkit.registration import LANGUAGE_MODELS, register
from glmkit.weights import check_model, empty_model, own_names
from glmkit.writing import Shaped, save_tensors, write_folder


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Args:
        path: The new folder.
        kind: "lora" or "p-tuning".
        layers: Number of layers whose weight changed.
        dtypes: Names of the dtypes in it.
        difference: How far the logits are from those of base and adapter, relative to their size; None: not compared.
        notes: What the user should know, in sentences.
    """

    path: str
    kind: str
    layers: int
    dtypes: list[str]
    difference: float | None = None
    notes: list[str] = field(default_factory=list)


def merge(
    base: str | Path,
    adapter: str | Path,
    dst: str | Path,
    *,
    dtype: str = "auto",
    dequantize: bool = False,
    check: bool = True,
    adapter_config: Mapping[str, Any] | None = None,
    family: str | None = None,
    keep_code: bool = False,
    overwrite: bool = False,
) -> Merged:
    """Writes base and adapter as one plain checkpoint.

    Args:
        base: Folder, model name or hub id of the base.
        adapter: Folder of a LoRA or P-Tuning adapter, see `glmkit.adapters`.
        dst: The folder to make; it appears only when it is complete and compared.
        dtype: "auto" keeps each tensor's dtype; "float32", "bfloat16" or "float16" is that of all.
        dequantize: Whether a quantised base may be written in 16 bit. Nothing is ever quantised again.
        check: Whether to compare the result's logits with those of base and adapter. This loads one after the other.
        adapter_config: See `glmkit.load`.
        family: What the base is, if its folder does not say it.
        keep_code: Whether the base's python files go along, unchanged and never run.
        overwrite: Whether an existing folder may be replaced.

    Returns:
        What was done.

    Raises:
        UsageError: A quantised base without `dequantize`, no such dtype, or a base that is no folder of its own.
        CheckpointError: Base or adapter is damaged, or they do not belong together.
        OutputError: The folder cannot be written, or the result is not what base and adapter are.
    """
    wanted = chosen_dtype(dtype)
    register()
    row = choose_family(base, family)
    location, source = locate(base), Path(adapter).expanduser()
    with ExitStack() as opened:
        folder = opened.enter_context(open_model(location))
        if not folder.has("config.json"):
            raise UsageError(f"{shown_path(location)} holds shards", hint="first: glm convert SRC FOLDER --to official")
        config = read_config(folder, row, overrule=family is not None)
        learnt, names, bits = _read_both(folder, opened.enter_context(open_adapter(source, adapter_config)), config)
        plan = _Plan(folder, learnt, names, bits, wanted, dequantize)
        tokenizer = read_tokenizer(folder, config)
        with write_folder(dst, overwrite) as new:
            save_tensors(new, plan.tensors, fetch=plan.fetch)
            notes = _complete(new, folder, config, plan, tokenizer, keep_code)
            found = None
            if check:
                asked = {"adapter_config": dict(adapter_config or {}), "family": family}
                found = _compare(location, source, new, plan, asked)
        notes = [*_notes(plan), *notes, *(found.notes if found is not None else [])]
    kind = "lora" if isinstance(learnt, Lora) else "p-tuning"
    difference = None if found is None else found.difference
    return Merged(str(dst), kind, len(plan.layers), dtype_names(plan.tensors), difference, notes)


def _read_both(
    folder: Folder, extra: Folder, config: CheckedConfig
) -> tuple[Lora | Prefix, dict[str, str], dict[str, int]]:
    """The adapter, the model's name of every stored tensor of the base, and the bits of quantised ones; all whole."""
    model = empty_model(LANGUAGE_MODELS[type(config)], config)
    check_model(folder, model)
    learnt = read_adapter(extra, model, folder)
    tied = dict(getattr(model, "_tied_weights_keys", None) or {})
    shared = [name for name in (learnt.layers if isinstance(learnt, Lora) else ()) if f"{name}.weight" in tied]
    if shared:
        raise CheckpointError(
            shown_path(extra.path),
            [f"it changes {name}, whose weights are the embedding's, too" for name in shared],
            hint="use it beside its base: glmkit.load(BASE, adapter=THIS_FOLDER)",
        )
    names = own_names(folder, model)
    modules = {
        stored: model.get_submodule(own.removesuffix(".weight"))
        for stored, own in names.items()
        if own[-7:] == ".weight"
    }
    return learnt, names, {stored: one.bits for stored, one in modules.items() if hasattr(one, "bits")}


# --- tensors ---


class _Plan:
    """Which tensors the new folder has, and how each is made when its turn comes.

    Args:
        folder: The base.
        learnt: The adapter.
        names: Stored name -> name in the model.
        bits: Stored names of quantised weights -> their bits.
        dtype: Of all tensors; None: each its own.
        dequantize: Whether a quantised base becomes a plain one.
    """

    def __init__(
        self,
        folder: Folder,
        learnt: Lora | Prefix,
        names: Mapping[str, str],
        bits: Mapping[str, int],
        dtype: torch.dtype | None,
        dequantize: bool,
    ) -> None:
        self.folder, self.learnt, self.bits_of = folder, learnt, bits
        self.bits = min(bits.values(), default=0)
        self.dequantizes = bool(bits and dequantize)
        if bits and not dequantize and (isinstance(learnt, Lora) or dtype is not None):
            raise UsageError(
                f"{shown_path(folder.path)} is quantised to {self.bits} bits, and changed weights would have to be"
                " quantised again, which loses more",
                hint="merge into the unquantised base, or write this one in 16 bit: --dequantize (dequantize=True)",
            )
        layers = learnt.layers if isinstance(learnt, Lora) else {}
        self.layers = {name: own for name, own in names.items() if own.removesuffix(".weight") in layers}
        self.prefix = {own: stored for stored, own in learnt.names.items()} if isinstance(learnt, Prefix) else {}
        self.tensors: dict[str, Shaped] = {}
        for name, info in folder.tensors.items():
            replaced = self.prefix and names.get(name, name) in self.prefix
            if not replaced and not (self.dequantizes and name.endswith(".weight_scale")):
                self.tensors[name] = self._shaped(name, info, dtype)
        if isinstance(learnt, Prefix):
            # The prefix keeps its numbers: they are large for float16.
            found = {own: learnt.folder.tensors[stored] for own, stored in self.prefix.items()}
            self.tensors |= {own: Shaped(info.shape, info.dtype) for own, info in found.items()}

    def _shaped(self, name: str, info: TensorInfo, dtype: torch.dtype | None) -> Shaped:
        scale = self.folder.tensors.get(f"{name}_scale") if self.dequantizes else None
        if scale is not None:
            return Shaped((info.shape[0], info.shape[1] * 8 // self.bits_of.get(name, self.bits)), dtype or scale.dtype)
        return Shaped(info.shape, dtype if dtype is not None and info.dtype.is_floating_point else info.dtype)

    def fetch(self, name: str) -> Tensor:
        """Makes a tensor of the new folder.

        Raises:
            OutputError: Its numbers do not fit into its dtype.
        """
        if name in self.prefix:
            return self._read(self.learnt.folder, self.prefix[name])
        dtype, tensor = self.tensors[name].dtype, self._read(self.folder, name)
        if self.dequantizes and f"{name}_scale" in self.folder.tensors:
            scales = self._read(self.folder, f"{name}_scale")
            tensor = dequantize(tensor, scales, self.bits_of.get(name, self.bits))
        if name in self.layers and isinstance(self.learnt, Lora):
            a, b, scale = self.learnt.matrices(self.layers[name].removesuffix(".weight"))
            tensor = tensor.float().addmm_(b, a, alpha=scale)
        made = name in self.layers or dtype != self.folder.tensors[name].dtype
        return rounded(name, tensor, dtype) if made else tensor

    @staticmethod
    def _read(folder: Folder, name: str) -> Tensor:
        [(_, tensor)] = folder.read([name])
        return tensor


# --- config ---


def _complete(
    new: Path, folder: Folder, config: CheckedConfig, plan: _Plan, tokenizer: Any, keep_code: bool
) -> list[str]:
    """The base's own config.json, with what changed, and everything else that stands beside weights."""
    values = completed_config(folder, config)
    if plan.dequantizes:
        values = {name: value for name, value in values.items() if not name.startswith("quantization_")}
    if isinstance(plan.learnt, Prefix):
        made = plan.learnt.config
        values |= {"pre_seq_len": made.pre_seq_len, "prefix_projection": made.prefix_projection}
    kinds = [one.dtype for one in plan.tensors.values() if one.dtype.is_floating_point]
    values["torch_dtype"] = str(max(set(kinds), key=kinds.count)).removeprefix("torch.")
    values.pop("dtype", None)
    done = "merged with an adapter"
    return complete_folder(new, folder, values, tokenizer, made_by=done, keep_code=keep_code)


def _notes(plan: _Plan) -> list[str]:
    notes = []
    if plan.prefix:
        notes.append(
            "a prefix cannot become part of the weights: it stands beside them as transformer.prefix_encoder.*,"
            " and pre_seq_len in config.json tells every loader of it"
        )
    if plan.dequantizes:
        notes.append(f"the {plan.bits}-bit weights were written in 16 bit; what quantising lost does not come back")
    return notes


def _compare(base: Path, adapter: Path, new: Path, plan: _Plan, asked: dict[str, Any]) -> Comparison:
    """Opens the new folder in a process of its own; says how far its logits are from those of base and adapter."""
    expected = {"path": str(base), "adapter": str(adapter)} | asked
    found = compare(expected, {"path": str(new)}, plan.folder)
    kinds = {one.dtype for name, one in plan.tensors.items() if one.dtype.is_floating_point and name not in plan.prefix}
    coarse = max(kinds, key=lambda kind: torch.finfo(kind).eps)
    require(found, plan.folder, rounded=coarse, what="what base and adapter are")
    return found


__all__ = ["CARRIED", "Merged", "completed_config", "merge"]
