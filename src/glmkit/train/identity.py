"""What must be equal between a run and its continuation, and what may change with an effect that can be told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from glmkit.errors import RunRefusedError
from glmkit.train.arguments import RunRecipe

# Where a run goes and how often it reports, never what it computes. Paths are free because contents are compared.
_FREE = {("output", "dir"), ("output", "report_to"), ("model", "device"), ("model", "path"), ("data", "train_file")}
_FREE |= {("data", key) for key in ("eval_file", "max_eval_samples", "num_proc", "cache_dir")}
_FREE |= {("corpus", key) for key in ("eval_files", "eval_rows", "check_first", "examples")}
_FREE |= {("train", key) for key in ("logging_steps", "eval_steps", "eval_epochs", "save_steps", "save_total_limit")}
_FREE |= {("train", key) for key in ("predict_with_generate", "max_predict_samples", "probe_prompts")}
_FREE |= {("train", key) for key in ("per_device_eval_batch_size", "on_nonfinite_loss")}
# What the processes compute together is fixed by batches_per_step; how they share it is not.
_FREE |= {("distributed", key) for key in ("strategy", "deepspeed", "cpu_offload", "reshard_after_forward")}

_SCHEDULE = "the learning rate of every step from now on follows the new schedule"
_LENGTH = "the run ends at the new number of steps, and the learning rate falls towards it"
_OPTIMIZER = "holds from the next step on; the optimizer's moments stay"
_ROUNDING = "the same training, with other rounding: not bit-equal to the run as it was begun"
_JUDGEMENT = "counts validations from now on"
_EFFECTS = {
    **{("train", key): _SCHEDULE for key in ("learning_rate", "lr_scheduler_type", "lr_min_ratio", "lr_decay_steps")},
    ("train", "warmup_ratio"): _SCHEDULE,
    ("train", "warmup_steps"): _SCHEDULE,
    ("train", "max_steps"): _LENGTH,
    ("train", "num_train_epochs"): _LENGTH,
    **{("train", key): _OPTIMIZER for key in ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")},
    ("train", "max_grad_norm"): _OPTIMIZER,
    **{("train", key): _ROUNDING for key in ("bf16", "fp16", "gradient_checkpointing", "loss_chunk_tokens")},
    **{("train", key): _JUDGEMENT for key in ("metric_for_best_model", "load_best_model_at_end")},
    ("train", "early_stopping_patience"): _JUDGEMENT,
    ("method", "lora_dropout"): "holds from the next step on",
    ("model", "dtype"): _ROUNDING,
}

_SAMPLED_NUMBERS = 16  # of each parameter


def identity_of(recipe: RunRecipe, data: str, model: nn.Module) -> dict[str, Any]:
    """Describe a run so that its continuation can be compared with it.

    Args:
        recipe: All settings.
        data: Fingerprint of the data.
        model: As it was loaded, before a method changed it.

    Returns:
        What goes into run.json.
    """
    return {"recipe": recipe.model_dump(mode="json"), "data": data, "base": base_fingerprint(model)}


def base_fingerprint(model: nn.Module) -> dict[str, str]:
    """Tell base models apart, in milliseconds.

    Args:
        model: As it was loaded.

    Returns:
        SHA-256 of the config, and of names, shapes and first numbers of all parameters, rounded to bfloat16, so that
        the precision in which they were loaded does not matter.
    """
    config: dict[str, Any] = getattr(model, "config").to_dict() if hasattr(model, "config") else {}  # noqa: B009
    volatile = ("dtype", "torch_dtype", "transformers_version", "use_cache")
    kept = {key: value for key, value in config.items() if key not in volatile and not key.startswith("_")}
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        weights.update(f"{name} {list(parameter.shape)}\n".encode())
        if not parameter.is_meta:
            first = parameter.detach().reshape(-1)[:_SAMPLED_NUMBERS].to("cpu", torch.bfloat16)
            weights.update(first.view(torch.int16).numpy().tobytes())
    words = json.dumps(kept, sort_keys=True, default=str).encode()
    return {"config": hashlib.sha256(words).hexdigest(), "weights": weights.hexdigest()}


def compare(
    before: dict[str, Any], now: dict[str, Any], *, batches_per_step: int, allow_change: bool, folder: str
) -> list[str]:
    """Refuse a continuation that would not be one.

    Args:
        before: run.json, as the run was begun.
        now: What `identity_of` says now.
        batches_per_step: Batches of a step that the settings give with the processes there are now.
        allow_change: Whether changes whose effect is known are taken.
        folder: The run's folder, for the message.

    Returns:
        What changes, and its effect, a sentence each; empty if nothing does.

    Raises:
        RunRefusedError: If something else changed, or `allow_change` is not given. Lists all differences.
    """
    found = list(_differences(before, now, batches_per_step))
    refused = [text for text, effect in found if effect is None]
    if found and (refused or not allow_change):
        hint = "continue with the same settings, or choose another output.dir="
        if not refused:
            hint = "continue with the same settings, or add --allow-change"
        said = [f"{text} (with --allow-change: {effect})" if effect else text for text, effect in found]
        listed = "\n".join(f"  - {one}" for one in said)
        raise RunRefusedError(f"the run in {folder} was started differently:\n{listed}", hint=hint)
    return [f"{text}: {effect}" for text, effect in found]


def _differences(
    before: dict[str, Any], now: dict[str, Any], batches_per_step: int
) -> Iterator[tuple[str, str | None]]:
    """Yield each difference with the effect it may have, None if it is not to be allowed."""
    for block, values in now["recipe"].items():
        for key, value in (values or {}).items():
            # A key that is younger than the run had its default then, and has it now unless it was set.
            earlier = (before["recipe"].get(block) or {}).get(key, value)
            if earlier == value or (block, key) in _FREE:
                continue
            if key == "gradient_accumulation_steps" and batches_per_step == before.get("batches_per_step"):
                continue  # more processes with fewer batches each, or the other way round
            yield f"{block}.{key}: {earlier!r} then, {value!r} now", _EFFECTS.get((block, key))
    if before["data"] != now["data"]:
        yield "the training data, or how it becomes tokens, has changed", None
    base = before.get("base", now["base"])  # younger than the first runs
    if base["config"] != now["base"]["config"]:
        yield "the base model has another config", None
    elif base["weights"] != now["base"]["weights"]:
        yield "the base model has other weights", None
