"""A checkpoint as a folder in one of our own formats, written while it is read: `glm quantize`.

    source --read one tensor--> search its scales --> shard of DST --> read again, compared --> DST gets its name

More than a shard is never in memory, so that a model can be quantised where it does not fit. With a calibration text
the whole model is loaded instead, because each layer then has to see what the quantised ones before it compute (GPTQ).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmkit.checkpoint import Folder, shown_path
from glmkit.data.calibration import calibration_batches
from glmkit.errors import CheckpointError, OutputError, UsageError
from glmkit.export.folders import complete_folder, completed_config
from glmkit.export.proof import check_written, compare, summed
from glmkit.loading import choose_family, load, open_model, read_config, read_tokenizer
from glmkit.location import locate
from glmkit.models.checked_config import CheckedConfig
from glmkit.quant.gptq import quantize_model_gptq
from glmkit.quant.linear import QuantizedLinear, dequantize
from glmkit.quant.schemes import FORMS, Form, Scheme, layers_of, scheme_of
from glmkit.registration import LANGUAGE_MODELS, register
from glmkit.weights import check_model, empty_model, own_names
from glmkit.writing import Shaped, save_tensors, write_folder

_SHARD_BYTES = 1 << 30  # what waits in memory for its turn
_ROWS = 1024  # compared at a time

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Quantized:
    """What was done.

    Args:
        path: The new folder.
        scheme: "int8" or "int4".
        output_layer: "int8" if the output layer is quantised too.
        layers: Number of quantised layers.
        bytes_before: Of the source's tensors.
        bytes_after: Of the new folder's.
        seconds: How long it took.
        weight_error: Distance of the quantised weights from the source's, relative to their norm.
        logits_error: The same of the logits of a fixed prompt.
        notes: What the user should know, in sentences.
    """

    path: str
    scheme: str
    output_layer: str | None
    layers: int
    bytes_before: int
    bytes_after: int
    seconds: float
    weight_error: float
    logits_error: float
    notes: list[str] = field(default_factory=list)


def quantize(
    source: str | Path,
    target: str | Path,
    scheme: str,
    *,
    output_layer: str | None = None,
    calibration: str | Path | None = None,
    family: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Writes a checkpoint in one of our formats; see `glmkit.quant.schemes`.

    Args:
        source: Folder, model name or hub id; the original model-parallel folders too.
        target: The folder to make; it appears only when it is complete and compared.
        scheme: "int8" or "int4".
        output_layer: "int8" to quantise the output layer too; None keeps it.
        calibration: A UTF-8 text like what the model will read. With it int4 weights are chosen so that the layers'
            products stay (GPTQ), which takes a loaded model and minutes; None: the scales are searched.
        family: What the source is, if its folder does not say it.
        overwrite: Whether an existing folder may be replaced.
        progress: Called with the number of quantised layers and that of all.

    Returns:
        What was done.

    Raises:
        UsageError: No such scheme, a source that is quantised already, or a layer that has no such form.
        CheckpointError: The source is damaged.
        OutputError: The folder cannot be written, or is not what was written.
    """
    if scheme not in FORMS:
        raise UsageError(
            f"scheme={scheme!r}: expected {' or '.join(FORMS)}", hint="int4 is the smaller, int8 the closer"
        )
    if output_layer not in (None, "int8"):
        raise UsageError(f"output_layer={output_layer!r}: expected None or 'int8'", hint="--output-layer keep or int8")
    if calibration is not None and scheme != "int4":
        raise UsageError(f"calibration is for int4: {scheme} loses nothing that it could win back", hint="leave it out")
    began = time.monotonic()
    register()
    location = locate(source)
    with open_model(location) as folder:
        config = read_config(folder, choose_family(source, family), overrule=family is not None)
        _refuse_quantised(folder, config)
        model = empty_model(LANGUAGE_MODELS[type(config)], config)
        check_model(folder, model)
        tokenizer = read_tokenizer(folder, config)
        batches = _batches(tokenizer, calibration, location)
        made_by: dict[str, Any] = {"how": "search"}
        if batches is not None:
            made_by = {"how": "gptq", "tokens": sum(ids.numel() for ids in batches)}
        chosen = Scheme(scheme, output_layer, made_by)
        plan = _Plan(folder, own_names(folder, model), layers_of(model, chosen), progress)
        _check_space(Path(target), plan.nbytes)
        with write_folder(target, overwrite) as new:
            if batches is not None:
                plan.calibrate(location, batches, family)
            sums: dict[str, int] = {}
            save_tensors(new, plan.tensors, fetch=summed(plan.fetch, sums), max_shard_bytes=_SHARD_BYTES)
            values = _config(folder, config, chosen)
            notes = complete_folder(new, folder, values, tokenizer, made_by=f"quantised to {scheme}")
            _check_written(new, sums)
            found = compare({"path": str(location), "family": family}, {"path": str(new)}, folder)
            if not math.isfinite(found.difference):
                raise OutputError(
                    "the quantised model gives no numbers: its logits are infinite or none",
                    hint="try int8, or quantise the checkpoint in another dtype",
                )
        notes = [*_about_size(folder.nbytes, plan.nbytes), *notes, *found.notes]
    return Quantized(
        path=str(target),
        scheme=scheme,
        output_layer=output_layer,
        layers=len(plan.forms),
        bytes_before=folder.nbytes,
        bytes_after=plan.nbytes,
        seconds=round(time.monotonic() - began, 1),
        weight_error=plan.weight_error,
        logits_error=found.difference,
        notes=notes,
    )


def _batches(tokenizer: Any, calibration: str | Path | None, location: Path) -> list[Tensor] | None:
    """Token ids of the calibration text, read before anything is written; None without one."""
    if calibration is None:
        return None
    if tokenizer is None:
        raise UsageError(f"{location} has no tokenizer, so no text can be read", hint="leave out the calibration")
    return calibration_batches(tokenizer, Path(calibration).expanduser())


def _refuse_quantised(folder: Folder, config: CheckedConfig) -> None:
    scheme = scheme_of(config)
    bits = getattr(config, "quantization_bit", 0) or getattr(folder, "bits", 0)
    if scheme is not None or bits:
        found = scheme.name if scheme is not None else f"the official int{bits} format"
        raise UsageError(
            f"{shown_path(folder.path)} is already quantised, to {found}; quantised again it would lose more",
            hint="quantise the checkpoint that it was made from",
        )


def _check_space(target: Path, needed: int) -> None:
    """Says before the work that the disk is too full for it."""
    place = next(parent for parent in target.expanduser().absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed + (64 << 20):
        raise OutputError(
            f"{shown_path(place)} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB will be written",
            hint="free space, or choose another disk",
        )


# --- tensors ---


class _Plan:
    """Which tensors the new folder has, and how each is made when its turn comes.

    Args:
        folder: The source.
        names: Stored name -> name in the model; the new folder has the model's.
        forms: Name of a layer -> its form.
        progress: See `quantize`.
    """

    def __init__(
        self, folder: Folder, names: Mapping[str, str], forms: Mapping[str, Form], progress: Progress | None
    ) -> None:
        self.folder, self.forms, self.progress = folder, forms, progress
        self.stored = {own: stored for stored, own in names.items()}
        self.tensors: dict[str, Shaped] = {}
        self._waiting: dict[str, Tensor] = {}  # made with another tensor, and not asked for yet
        self._layers: dict[str, QuantizedLinear] = {}  # made beforehand, by calibration
        self._error, self._norm, self._done = 0.0, 0.0, 0
        for own, stored in self.stored.items():
            info = folder.tensors[stored]
            form = self._form(own)
            if form is None:
                self.tensors[own] = Shaped(info.shape, info.dtype)
            else:
                weight, scale = form.shapes(info.shape)
                self.tensors[own] = Shaped(weight, torch.int8)
                self.tensors[f"{own}_scale"] = Shaped(scale, torch.float16)

    @property
    def nbytes(self) -> int:
        """Of all tensors of the new folder."""
        return sum(math.prod(one.shape) * one.dtype.itemsize for one in self.tensors.values())

    @property
    def weight_error(self) -> float:
        """Distance of what was made from the source, relative to its norm."""
        return math.sqrt(self._error / self._norm) if self._norm else 0.0

    def calibrate(self, location: Path, batches: list[Tensor], family: str | None) -> None:
        """Makes the blocks' layers beforehand, by what the model computes for some text."""
        loaded = load(location, kernels="torch", family=family)
        model = quantize_model_gptq(loaded.model, [ids.to(loaded.device) for ids in batches], progress=self.progress)
        self.progress = None
        self._layers = {
            name: module.cpu() for name, module in model.named_modules() if isinstance(module, QuantizedLinear)
        }

    def fetch(self, name: str) -> Tensor:
        """Makes a tensor of the new folder."""
        tensor = self._waiting.pop(name, None)
        if tensor is None:
            weight = name.removesuffix("_scale") if name not in self.stored else name
            form = self._form(weight)
            [(_, read)] = self.folder.read([self.stored[weight]])
            tensor = read if form is None else self._quantise(weight, read, form, name)
        return tensor

    def _quantise(self, name: str, weight: Tensor, form: Form, asked: str) -> Tensor:
        """Makes weight and scale; the one that was asked for is returned, the other waits."""
        layer = self._layers.pop(name.removesuffix(".weight"), None)
        try:
            made = layer.stored() if layer is not None else form.quantize(weight)
        except UsageError as error:
            raise CheckpointError(
                shown_path(self.folder.path), [f"{name}: {error.message}"], hint=error.hint
            ) from error
        for start in range(0, len(weight), _ROWS):
            exact = weight[start : start + _ROWS].float()
            found = dequantize(made[0][start : start + _ROWS], made[1][start : start + _ROWS], form.bits)
            self._error += float((found.float() - exact).square().sum())
            self._norm += float(exact.square().sum())
        self._done += 1
        if self.progress is not None:
            self.progress(self._done, len(self.forms))
        both = {name: made[0], f"{name}_scale": made[1]}
        tensor = both.pop(asked)
        self._waiting |= both
        return tensor

    def _form(self, name: str) -> Form | None:
        owner, _, leaf = name.rpartition(".")
        return self.forms.get(owner) if leaf == "weight" else None


# --- config and checks ---


def _config(folder: Folder, config: CheckedConfig, scheme: Scheme) -> dict[str, Any]:
    # The original shards have no config.json: theirs is what was found out, from the tokenizer too.
    known = completed_config(folder, config) if folder.has("config.json") else config.to_diff_dict()
    values = {key: value for key, value in known.items() if not key.startswith("quantization_")}
    return values | {"quantization_config": scheme.to_config()}


def _check_written(new: Path, sums: Mapping[str, int]) -> None:
    """Opens the new folder as loading does, and reads every tensor again."""
    with open_model(new) as written:
        config = read_config(written)
        check_model(written, empty_model(LANGUAGE_MODELS[type(config)], config))
        check_written(written, sums)


def _about_size(before: int, after: int) -> list[str]:
    if after < before:
        return []
    return [
        f"the quantised folder is not smaller: {after:,} bytes of tensors, the source has {before:,}; most of them"
        " stand outside the blocks' linears, or were stored in few bits already"
    ]
