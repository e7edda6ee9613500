"""What a run will need, before anything is loaded: memory of each device, disk, and what to change if it is too much.

    subject_of(block)    which network, in which numbers; from a folder's config or the table of families
    plan_training        weights, gradients, optimizer, activations, logits of one device: `glm plan RECIPE`
    plan_inference       weights, keys and values, activations: `glm plan MODEL`

Whether so much is there says `glmkit.train.fitting`. Activations and logits are not estimated by a formula:
`glmkit.train.rehearsal` takes the step without numbers. What several processes share is counted by the rules of their
engines (`glmkit.train.sharing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from glmkit import hf
from glmkit.devices import CPU, accelerator
from glmkit.errors import UsageError
from glmkit.inspection import released_config
from glmkit.loading import choose_dtype, choose_family, open_model, read_config
from glmkit.location import DownloadError, locate
from glmkit.models.architectures import config_class
from glmkit.models.checked_config import CheckedConfig
from glmkit.models.glm_config import GLMConfig
from glmkit.quant.official import quantize_model
from glmkit.quant.schemes import FORMS, Scheme, prepare_model, scheme_of
from glmkit.registration import LANGUAGE_MODELS
from glmkit.train.arguments import ModelBlock, Recipe
from glmkit.train.methods import make_method
from glmkit.train.rehearsal import rehearse
from glmkit.train.sharing import Sharing

_GAPS = 0.65  # of small tensors, that a CPU's allocator leaves beside them; measured were 0.5 to 1.0
_PREFILL_TOKENS = 512  # of a prompt per call of the model, see glmkit.engine.decode
_BITS = {"official-int8": 8, "official-int4": 4, "bnb-int8": 8, "bnb-nf4": 4}


@dataclass(frozen=True)
class Subject:
    """A model to plan for.

    Attributes:
        name: What to call it.
        config: Its sizes.
        dtype: Of its weights, before a method makes those that learn float32.
        bits: 8 or 4 if its matrices are quantised as officially or nearly so, else 0.
        scheme: Our own format of its matrices.
    """

    name: str
    config: CheckedConfig
    dtype: torch.dtype
    bits: int = 0
    scheme: Scheme | None = None


@dataclass(frozen=True)
class Plan:
    """What one device needs, in bytes.

    Attributes:
        what: What is planned, in one line.
        parts: Weights, gradients, optimizer, activations, logits, cache: the most of each.
        peak: The most at one moment. It is less than the sum of the parts where some go before others come.
        disk: What checkpoints take, with the one that is being written; 0 for inference.
        host: What lies in the memory of the host instead.
    """

    what: str
    parts: Mapping[str, int]
    peak: int
    disk: int = 0
    host: int = 0

    def __str__(self) -> str:
        rows = [*self.parts.items(), ("most at one moment", self.peak)]
        rows += [("on the host", self.host)] if self.host else []
        rows += [("disk for checkpoints", self.disk)] if self.disk else []
        lines = [f"  {name:<22}{size / 1e9:9.2f} GB" for name, size in rows if size]
        return "\n".join([self.what, *lines])


def subject_of(block: ModelBlock) -> Subject:
    """Finds out what a recipe's model is. Nothing is fetched, and no weight is read.

    Args:
        block: The recipe's `model` block.

    Returns:
        Its sizes and numbers; of a model that is not on this machine those of its release.

    Raises:
        UsageError: No such model, or no such dtype.
    """
    bits = _BITS.get(block.quantize or "", 0)
    own = Scheme(block.quantize) if block.quantize in FORMS else None
    if block.quantize and not bits and own is None:
        raise UsageError(f"model.quantize={block.quantize!r}: known are {', '.join([*FORMS, *_BITS])}")
    if block.init is not None:
        kind = config_class(block.init)
        values = {name: value for name, value in block.init.items() if name != "model_type"}
        return Subject("a new model", kind(**values), torch.float32, bits, own)
    assert block.path is not None
    family = choose_family(block.path, block.family)
    device = place_of(block)
    try:
        location = locate(block.path, hub={"local_files_only": True})
    except (UsageError, DownloadError):
        if family is None:
            raise
        config = released_config(family)
        stored = torch.bfloat16 if device.type == "cpu" else torch.float16
        dtype = stored if block.dtype == "auto" else _named(block.dtype)
    else:
        with open_model(location) as folder:
            config, dtype = read_config(folder, family), choose_dtype(block.dtype, folder, device)
    return Subject(block.path, config, dtype, getattr(config, "quantization_bit", 0) or bits, scheme_of(config) or own)


def place_of(block: ModelBlock) -> torch.device:
    """The kind of device that a recipe trains on, whether or not this machine has it.

    Args:
        block: The recipe's `model` block.
    """
    if block.device != "auto":
        return torch.device(block.device)
    return accelerator() or CPU


def _named(dtype: str) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise UsageError(f"model.dtype={dtype!r}: known are float32, bfloat16, float16")
    return found


# --- training


@dataclass(frozen=True)
class Batch:
    """The largest batch of a run.

    Attributes:
        rows: Its rows.
        tokens: Tokens of each, padding included.
        targets: Positions with a target, of all rows.
    """

    rows: int
    tokens: int
    targets: int


def largest_batch(recipe: Recipe, longest: tuple[int, int] | None = None) -> Batch:
    """Tells how large a batch can become.

    Args:
        recipe: Its lengths and batch sizes.
        longest: Tokens and targets of the longest record, if the data are known; else the limits decide.
    """
    data, train = recipe.data, recipe.train
    tokens = data.max_length
    if data.max_source_length is not None and data.max_target_length is not None and not data.packing:
        tokens = min(tokens, data.max_source_length + data.max_target_length + 1)
    targets = tokens if data.max_target_length is None or data.packing else min(tokens, data.max_target_length + 1)
    if longest is not None and not data.packing:
        tokens, targets = min(tokens, longest[0]), min(targets, longest[1])
    rows = train.per_device_train_batch_size
    if train.tokens_per_batch is not None:
        rows = max(1, train.tokens_per_batch // tokens)
    return Batch(rows, tokens, rows * (tokens if data.loss_on == "all" else targets))


def plan_training(
    recipe: Recipe, *, subject: Subject | None = None, longest: tuple[int, int] | None = None, world: int = 1
) -> Plan:
    """Counts what a device needs for a recipe.

    Args:
        recipe: What to do.
        subject: The model; None: as the recipe says.
        longest: Tokens and targets of the longest record, if they are known.
        world: Number of processes.

    Returns:
        The plan.
    """
    subject = subject or subject_of(recipe.base)
    batch, train = largest_batch(recipe, longest), recipe.train
    base = _network(subject)
    base.loss_chunk_tokens = train.loss_chunk_tokens
    with torch.device("meta"):
        model = make_method(recipe.method).prepare(base).train()
    if train.gradient_checkpointing:
        hf.checkpoint_activations(model)
    sharing = Sharing.of(recipe, world)
    held = sharing.held(model)
    sharing.narrow(model)
    rehearsed = rehearse(
        model,
        lambda network: _loss(network, recipe, subject.config, batch),
        targets=batch.targets,
        batches=train.gradient_accumulation_steps,
        head=_last_norm(base),
        keeps_gradients=sharing.gradients == 1,
    )
    step = max(rehearsed.peak, rehearsed.gradients) if sharing.gradients == 1 else rehearsed.peak + held.gradients
    parts = {
        "weights": held.weights,
        "weights gathered": held.gathered,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "activations": rehearsed.activations,
        "logits and loss": rehearsed.head,
        "cache of answers": _answers_bytes(recipe, subject, batch),
        "gaps": int(_GAPS * rehearsed.small) if place_of(recipe.model).type == "cpu" else 0,
    }
    standing = held.weights + held.gathered + held.optimizer + parts["gaps"]
    what = (
        f"{recipe.method.name} of {subject.name}, {held.learn:,} parameters learn; batches of {batch.rows} x "
        f"{batch.tokens} tokens, {batch.targets} with a target; {sharing.name}"
    )
    disk = 12 * held.learn * (train.save_total_limit + 1) + 4 * held.learn  # weights and two moments; the result
    return Plan(what, parts, standing + max(step, parts["cache of answers"]), disk, held.host)


def _network(subject: Subject) -> Any:
    """The model without memory."""
    with torch.device("meta"):
        model = LANGUAGE_MODELS[type(subject.config)](subject.config).to(subject.dtype)
        if subject.bits:
            quantize_model(model, subject.bits)
        if subject.scheme is not None:
            prepare_model(model, subject.scheme)
    return model


def _loss(network: nn.Module, recipe: Recipe, config: CheckedConfig, batch: Batch) -> Tensor:
    """A training step up to its loss, as the loop takes it."""
    inputs = {name: torch.zeros(batch.rows, batch.tokens, dtype=torch.int64) for name in ("input_ids", "labels")}
    if isinstance(config, GLMConfig):
        inputs["position_ids"] = torch.zeros(batch.rows, 2, batch.tokens, dtype=torch.int64)
        inputs["attention_mask"] = torch.zeros(batch.rows, dtype=torch.int64)
    kind = torch.float16 if recipe.train.fp16 else torch.bfloat16
    with torch.autocast("cpu", dtype=kind, enabled=recipe.train.fp16 or recipe.train.bf16):
        loss: Tensor = network.label_loss(**inputs)[0]  # type: ignore[operator]
    return loss


def _last_norm(model: nn.Module) -> nn.Module:
    """What runs before the output layer."""
    return next(module for name, module in model.named_modules() if name.endswith("final_layernorm"))


def _answers_bytes(recipe: Recipe, subject: Subject, batch: Batch) -> int:
    """Keys and values of the answers that are written at validations."""
    train = recipe.train
    if not train.predict_with_generate:
        return 0
    return cache_bytes(subject, batch.tokens, train.per_device_eval_batch_size or batch.rows)


# --- inference


def cache_bytes(subject: Subject, tokens: int, rows: int) -> int:
    """Keys and values of a context.

    Args:
        subject: The model.
        tokens: Tokens of each row.
        rows: Rows.
    """
    config: Any = subject.config
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return int(width * subject.dtype.itemsize * tokens * rows)


def plan_inference(subject: Subject, *, tokens: int, rows: int = 1) -> Plan:
    """Counts what answering needs.

    Args:
        subject: The model.
        tokens: Of prompt and answer together, for each row.
        rows: Answers at a time.

    Returns:
        The plan.
    """
    model = _network(subject).eval()
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    whole = getattr(subject.config, "generation", 0) in (0, 1)  # prompts that are read in both directions
    columns = tokens if whole else min(tokens, _PREFILL_TOKENS)
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}

    def answer(network: nn.Module) -> None:
        inputs = {"input_ids": torch.zeros(rows, columns, dtype=torch.int64)}
        if isinstance(subject.config, GLMConfig):
            inputs["position_ids"] = torch.zeros(rows, 2, columns, dtype=torch.int64)
            inputs["attention_mask"] = torch.zeros(rows, dtype=torch.int64)
        with torch.inference_mode(False), torch.no_grad():
            network(**inputs, use_cache=False, **last)

    rehearsed = rehearse(model, answer, targets=0)
    cache = cache_bytes(subject, tokens, rows)
    parts = {"weights": weights, "cache": cache, "activations and logits": rehearsed.peak}
    return Plan(f"{subject.name}: {rows} x {tokens} tokens", parts, weights + cache + rehearsed.peak)
