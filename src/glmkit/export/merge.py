"""Base and adapter as one plain checkpoint, which this toolkit and the official code load without knowing of adapters.

    LoRA      W + scale * B A, computed in float32 and rounded once to the dtype of the result
    P-Tuning  a prefix cannot become part of the weights: it goes along as transformer.prefix_encoder.*, with its length
              in config.json, as the official scripts save a whole model with its prefix

Tensors go from file to file one at a time. Before the new folder gets its name, a process of its own opens it again and
compares its logits with those of base and adapter.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmkit.adapters import Lora, Prefix, open_adapter, read_adapter
from glmkit.checkpoint import Folder, TensorInfo, shown_path
from glmkit.engine.probe import probe_logits
from glmkit.errors import CheckpointError, OutputError, UsageError
from glmkit.loading import choose_family, load, open_model, read_config, read_tokenizer
from glmkit.location import locate
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.checked_config import CheckedConfig
from glmkit.quant.linear import dequantize
from glmkit.registration import LANGUAGE_MODELS, register
from glmkit.weights import check_model, empty_model, own_names
from glmkit.writing import Shaped, save_tensors, write_folder, write_text_atomic

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CARRIED = ("generation_config.json", "LICENSE", "LICENSE.txt", "MODEL_LICENSE", "MODEL_LICENSE.txt", "NOTICE")
_CODE = ("modeling_chatglm.py", "configuration_chatglm.py", "tokenization_chatglm.py", "quantization.py",
         "modeling_glm.py", "configuration_glm.py", "tokenization_glm.py")  # fmt: skip
_EXACT_BYTES = 4 * 10**9  # up to here the probe computes in float32, so that only the rounding of the merge is seen
_ROUNDINGS = 16  # how many units of the result's rounding the logits may be away, relative to their size
_PROBE = """
import json, sys
from glmkit.export.merge import probe
probe(**json.load(sys.stdin))
"""


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
        overwrite: Whether an existing folder may be replaced.

    Returns:
        What was done.

    Raises:
        UsageError: A quantised base without `dequantize`, no such dtype, or a base that is no folder of its own.
        CheckpointError: Base or adapter is damaged, or they do not belong together.
        OutputError: The folder cannot be written, or the result is not what base and adapter are.
    """
    if dtype != "auto" and dtype not in _DTYPES:
        raise UsageError(f"dtype={dtype!r}", hint=f"auto, {', '.join(_DTYPES)}")
    register()
    row = choose_family(base, family)
    location, source = locate(base), Path(adapter).expanduser()
    with ExitStack() as opened:
        folder = opened.enter_context(open_model(location))
        if not folder.has("config.json"):
            raise UsageError(f"{shown_path(location)} holds shards", hint="first: glm convert SRC FOLDER --to folder")
        config = read_config(folder, row, overrule=family is not None)
        learnt, names, bits = _read_both(folder, opened.enter_context(open_adapter(source, adapter_config)), config)
        plan = _Plan(folder, learnt, names, bits, _DTYPES.get(dtype), dequantize)
        tokenizer = read_tokenizer(folder, config)
        with write_folder(dst, overwrite) as new:
            save_tensors(new, plan.tensors, fetch=plan.fetch)
            _write_config(new, folder, config, plan)
            for name in CARRIED:
                data = folder.read_bytes(name)
                if data is not None:
                    (new / name).write_bytes(data)
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
            difference = None
            if check:
                asked = {"adapter_config": dict(adapter_config or {}), "family": family}
                difference = _compare(location, source, new, plan, asked)
        notes = _notes(folder, plan, tokenizer)
    kind = "lora" if isinstance(learnt, Lora) else "p-tuning"
    dtypes = sorted({str(one.dtype).removeprefix("torch.") for one in plan.tensors.values()})
    return Merged(str(dst), kind, len(plan.layers), dtypes, difference, notes)


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
        result = tensor.to(dtype)
        made = name in self.layers or dtype != self.folder.tensors[name].dtype
        if made and not all(math.isfinite(end) for end in torch.aminmax(result)):  # without a copy, as isfinite needs
            raise OutputError(
                f"{name} has numbers that {str(dtype).removeprefix('torch.')} does not hold",
                hint="choose a wider dtype: --dtype bfloat16 or float32",
            )
        return result

    @staticmethod
    def _read(folder: Folder, name: str) -> Tensor:
        [(_, tensor)] = folder.read([name])
        return tensor


# --- config ---


def _write_config(new: Path, folder: Folder, config: CheckedConfig, plan: _Plan) -> None:
    """The base's own config.json, with what changed."""
    values = completed_config(folder, config)
    if plan.dequantizes:
        values = {name: value for name, value in values.items() if not name.startswith("quantization_")}
    if isinstance(plan.learnt, Prefix):
        made = plan.learnt.config
        values |= {"pre_seq_len": made.pre_seq_len, "prefix_projection": made.prefix_projection}
    kinds = [one.dtype for one in plan.tensors.values() if one.dtype.is_floating_point]
    values["torch_dtype"] = str(max(set(kinds), key=kinds.count)).removeprefix("torch.")
    values.pop("dtype", None)
    write_text_atomic(new / "config.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def completed_config(folder: Folder, config: CheckedConfig) -> dict[str, Any]:
    """The content of a folder's config.json, with what only its python files or its tokenizer said, and without them.

    Args:
        folder: The folder.
        config: Its config, as read.
    """
    values = {name: value for name, value in folder.config.items() if name != "auto_map"}
    values.setdefault("architectures", [config.first_architecture])
    if isinstance(config, ChatGLM2Config):
        said = {"generation": config.generation, "rope_ratio_applies_to": config.rope_ratio_applies_to}
        values |= {name: value for name, value in said.items() if value is not None}
    return values


def _notes(folder: Folder, plan: _Plan, tokenizer: Any) -> list[str]:
    notes = []
    if plan.prefix:
        notes.append(
            "a prefix cannot become part of the weights: it stands beside them as transformer.prefix_encoder.*,"
            " and pre_seq_len in config.json tells every loader of it"
        )
    if plan.dequantizes:
        notes.append(f"the {plan.bits}-bit weights were written in 16 bit; what quantising lost does not come back")
    code = [name for name in _CODE if folder.has(name)]
    if code:
        notes.append(
            f"left out: {', '.join(code)}; glmkit does not need them. The official code does: copy them from the base,"
            " and auto_map from its config.json and tokenizer_config.json"
        )
    if tokenizer is None:
        notes.append("the base has no tokenizer, so the new folder has none")
    return notes


# --- comparing ---


def _compare(base: Path, adapter: Path, new: Path, plan: _Plan, asked: dict[str, Any]) -> float:
    """Opens the new folder in a process of its own; returns how far its logits are from those of base and adapter."""
    exact = plan.folder.nbytes <= _EXACT_BYTES
    order = {"base": str(base), "adapter": str(adapter), "merged": str(new), "dtype": "float32" if exact else "auto"}
    done = subprocess.run(
        [sys.executable, "-c", _PROBE],
        input=json.dumps(order | asked),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise OutputError(f"the merged folder could not be opened again: {last[:500]}", hint="nothing was kept")
    difference = float(done.stdout.split()[-1])
    kinds = {one.dtype for name, one in plan.tensors.items() if one.dtype.is_floating_point and name not in plan.prefix}
    eps = max(torch.finfo(kind).eps for kind in kinds | ({torch.float32} if exact else {torch.bfloat16}))
    limit = max(1e-4, _ROUNDINGS * eps)
    if not difference <= limit:
        raise OutputError(
            f"the merged folder is not what base and adapter are: its logits differ by {difference:.2%} of their size,"
            f" expected at most {limit:.2%}",
            hint="nothing was kept; with --dtype float32 less is rounded",
        )
    return difference


def probe(base: str, adapter: str, merged: str, dtype: str, adapter_config: dict[str, Any], family: str | None) -> None:
    """Prints how far the logits of a merged folder are from those of base and adapter, relative to their size.

    Args:
        base: Folder of the base.
        adapter: Folder of the adapter.
        merged: The merged folder.
        dtype: To compute in.
        adapter_config: See `glmkit.load`.
        family: See `glmkit.load`.
    """
    asked: dict[str, Any] = {"adapter_config": adapter_config, "family": family, "kernels": "torch"}
    expected = probe_logits(load(base, adapter, dtype, **asked).model)
    found = probe_logits(load(merged, dtype=dtype, kernels="torch").model)
    print(float((found - expected).norm() / (expected - expected.mean()).norm()))
