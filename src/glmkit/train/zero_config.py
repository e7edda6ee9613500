"""A deepspeed.json of the user's own, made complete from the recipe; what contradicts the recipe is refused by name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glmkit.errors import UsageError
from glmkit.train.arguments import RunRecipe

Values = dict[str, Any]

# Keys that DeepSpeed reads; it says nothing about others, so a slip of the pen would have no effect.
_KNOWN = """
activation_checkpointing amp aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile
compression_training csv_monitor curriculum_learning data_efficiency data_types disable_allgather dump_state elasticity
eigenvalue flops_profiler fp16 fp32_allreduce gradient_accumulation_steps gradient_clipping gradient_predivide_factor
memory_breakdown nebula optimizer pipeline prescale_gradients progressive_layer_drop quantize_training scheduler
seq_parallel_communication_data_type sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard
timers torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism
use_node_local_storage wall_clock_breakdown wandb zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
zero_optimization
""".split()
_SIZES = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
_CURE = 'write "auto" there, and the recipe decides'


def read_config(file: Path, recipe: RunRecipe, world: int) -> Values:
    """Read a deepspeed.json and make it complete.

    Args:
        file: Its path; "auto" in it is filled from the recipe.
        recipe: What runs.
        world: Number of processes.

    Returns:
        The configuration for DeepSpeed; the sizes of ZeRO-3's buffers may still be "auto".

    Raises:
        UsageError: If it cannot be read, has unknown keys or values that contradict the recipe; all of them are named.
    """
    given = _read(file)
    wrong = _unknown(given)
    stage = stage_of(given)
    if stage not in (1, 2, 3):
        wrong.append(
            f"zero_optimization.stage is {stage!r}: expected 1, 2 or 3; without ZeRO use distributed.strategy=ddp"
        )
    if given.get("tensor_parallel") or given.get("pipeline"):
        wrong.append("tensor_parallel and pipeline divide the model in a way that no family here knows")
    config = dict(given)
    config["zero_optimization"] = dict(given.get("zero_optimization") or {})
    wrong += _batches(config, recipe, world)
    wrong += _agree(config, "gradient_clipping", recipe.train.max_grad_norm, "train.max_grad_norm")
    wrong += _precision(config, recipe)
    wrong += _optimizer(config, recipe)
    autos = [path for path in _autos(config) if path.rpartition(".")[2] not in _SIZES]
    wrong += [f'{path} is "auto", which is not known how to fill' for path in autos]
    if wrong:
        raise UsageError(f"{file} does not fit the recipe:\n" + "\n".join(f"  - {one}" for one in wrong), hint=_CURE)
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("steps_per_print", 1 << 60)  # the loop reports
    return config


def stage_of(config: Mapping[str, Any]) -> int:
    """Return the stage of ZeRO, 0 for none.

    Args:
        config: Content of a deepspeed.json.
    """
    block = config.get("zero_optimization")
    stage = block.get("stage", 0) if isinstance(block, Mapping) else 0
    return stage if isinstance(stage, int) else 0


def _read(file: Path) -> Values:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"distributed.deepspeed: {file} cannot be read: {error.strerror}", hint="the path of a deepspeed.json"
        ) from None
    except ValueError as error:
        raise UsageError(
            f"distributed.deepspeed: {file} is no JSON: {error}", hint="glm recipe copy deepspeed_zero2"
        ) from None
    if not isinstance(content, dict):
        raise UsageError(f"distributed.deepspeed: {file} holds no JSON object", hint="glm recipe copy deepspeed_zero2")
    return content


def _unknown(given: Values) -> list[str]:
    wrong = []
    for key in given:
        if key not in _KNOWN:
            close = difflib.get_close_matches(key, _KNOWN, n=1)
            wrong.append(f"{key} is no key of DeepSpeed" + (f"; did you mean {close[0]}?" if close else ""))
    return wrong


def _agree(config: Values, key: str, own: Any, setting: str) -> list[str]:
    """Fill a key from the recipe; a value that differs is returned as a sentence."""
    value = config.get(key, "auto")
    config[key] = own
    if value == "auto" or value == own:
        return []
    return [f"{key} is {value!r}, but {setting} is {own!r}"]


def _batches(config: Values, recipe: RunRecipe, world: int) -> list[str]:
    train = recipe.train
    micro, steps = train.per_device_train_batch_size, train.gradient_accumulation_steps
    if train.tokens_per_batch is not None:  # batches have any number of records; DeepSpeed only counts with it
        micro = 1
        config["train_micro_batch_size_per_gpu"] = "auto"
    wrong = _agree(config, "train_micro_batch_size_per_gpu", micro, "train.per_device_train_batch_size")
    wrong += _agree(config, "gradient_accumulation_steps", steps, "train.gradient_accumulation_steps")
    product = f"per_device_train_batch_size x gradient_accumulation_steps x {world} processes"
    return wrong + _agree(config, "train_batch_size", micro * steps * world, product)


def _precision(config: Values, recipe: RunRecipe) -> list[str]:
    wrong = []
    for key in ("bf16", "fp16"):
        block = config.get(key)
        if block is None and key == "bf16":
            block = config.pop("bfloat16", None)
        if not isinstance(block, Mapping):
            continue
        own = bool(getattr(recipe.train, key))
        enabled = block.get("enabled", "auto")
        if enabled not in ("auto", own):
            wrong.append(f"{key}.enabled is {enabled!r}, but train.{key} is {own!r}")
        if key == "fp16" and block.get("loss_scale", 0) not in (0, "auto"):
            wrong.append(f"fp16.loss_scale is {block['loss_scale']!r}, but the loop finds the scale itself")
        config[key] = {**block, "enabled": own}
        if key == "fp16":
            config[key] = {"enabled": own, "loss_scale": 1.0}
    return wrong


def _optimizer(config: Values, recipe: RunRecipe) -> list[str]:
    """The optimizer and the schedule are the loop's; blocks that say the same are taken out."""
    train, wrong = recipe.train, []
    block = config.pop("optimizer", None)
    if block is not None:
        kind, values = block.get("type"), block.get("params", {})
        if str(kind).lower() not in ("adam", "adamw"):
            wrong.append(f"optimizer.type is {kind!r}, but the loop's optimizer is AdamW")
        own = {
            "lr": train.learning_rate,
            "weight_decay": train.weight_decay,
            "eps": train.adam_epsilon,
            "betas": [train.adam_beta1, train.adam_beta2],
        }
        wrong += [
            f"optimizer.params.{key} is {values[key]!r}, but the recipe says {mine!r}"
            for key, mine in own.items()
            if values.get(key, "auto") not in ("auto", mine)
        ]
    block = config.pop("scheduler", None)
    if block is not None and any(value != "auto" for value in block.get("params", {}).values()):
        wrong.append("scheduler has values of its own, but the recipe's lr_scheduler_type decides; leave the block out")
    return wrong


def _autos(values: Any, path: str = "") -> Iterator[str]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _autos(value, f"{path}.{key}" if path else str(key))
    elif values == "auto":
        yield path
