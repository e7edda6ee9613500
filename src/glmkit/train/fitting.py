"""Does a run fit into the memory that is free, and if not, what is the nearest that does?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from glmkit.devices import FLOAT16_DEVICE, free_bytes
from glmkit.errors import TrainingError, UsageError
from glmkit.train.arguments import ModelBlock, Recipe
from glmkit.train.plan import Batch, Plan, Subject, largest_batch, place_of, plan_inference, plan_training, subject_of

MOST_SHARE = 0.95  # of the free memory that a run may need
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "mib": 2**20, "gib": 2**30, "g": 10**9}


def require_fit(
    recipe: Recipe, *, longest: tuple[int, int] | None = None, world: int = 1, local: int = 1, force: bool = False
) -> Plan | None:
    """Counts what a recipe needs on this machine, and refuses it if that is not there.

    A model so small that it fits many times over is not counted; counting takes seconds.

    Args:
        recipe: What to do.
        longest: Tokens and targets of the longest record.
        world: Number of processes.
        local: How many of them share this machine's memory, on a CPU.
        force: Do not refuse.

    Returns:
        The plan; None if there is room in any case.

    Raises:
        TrainingError: It needs more than 95 % of what is free; names the nearest settings that fit.
    """
    device = place_of(recipe.model)
    free = free_bytes(device)
    if free is not None and device.type == "cpu":
        free //= local
    subject = subject_of(recipe.base)
    if free is not None and _at_most(subject, largest_batch(recipe, longest)) < free / 2:
        return None
    plan = plan_training(recipe, subject=subject, longest=longest, world=world)
    if not force:
        check_fits(plan, free, recipe, longest=longest, world=world)
    return plan


def _at_most(subject: Subject, batch: Batch) -> float:
    """More than any method can need, from the sizes alone: 16 bytes a parameter, and wide margins for a step."""
    config: Any = subject.config
    layers, width, words = config.num_hidden_layers, config.hidden_size, config.vocab_size
    parameters = layers * 20 * width * width + 2 * words * width
    columns = batch.rows * batch.tokens
    seen = columns * batch.tokens * config.num_attention_heads  # scores, where they are kept
    return 16 * parameters + 4 * layers * (100 * columns * width + 8 * seen) + 24 * batch.targets * words


def check_fits(
    plan: Plan, free: int | None, recipe: Recipe, *, longest: tuple[int, int] | None = None, world: int = 1
) -> None:
    """Refuses a plan that needs too much.

    Args:
        plan: Of the recipe.
        free: Bytes that are free; None: nobody knows, and nothing is refused.
        recipe: What to do, for other settings of it.
        longest: As for `plan_training`.
        world: As for `plan_training`.

    Raises:
        TrainingError: It needs more than 95 % of what is free.
    """
    if free is None or plan.peak <= MOST_SHARE * free:
        return
    better = nearest(recipe, free, longest=longest, world=world)
    raise TrainingError(
        f"this needs {plan.peak / 1e9:.1f} GB of memory on each device, {free / 1e9:.1f} GB are free:\n{plan}",
        hint="nothing that is known makes it fit: use a smaller model, or more devices with distributed.strategy=fsdp"
        if better is None
        else f"{' '.join(better[0])} needs {better[1].peak / 1e9:.1f} GB; --force starts it all the same",
    )


def nearest(
    recipe: Recipe, free: int, *, longest: tuple[int, int] | None = None, world: int = 1
) -> tuple[list[str], Plan] | None:
    """Finds the settings nearest to a recipe's that fit: a single change if one is enough, else several.

    Args:
        recipe: What does not fit.
        free: Bytes that are free.
        longest: As for `plan_training`.
        world: As for `plan_training`.

    Returns:
        The changes, as a recipe takes them, and their plan; None if none of them is enough.
    """
    changes = list(_changes(recipe, longest))
    for tried in [[change] for change in changes] + [changes[: number + 1] for number in range(1, len(changes))]:
        settings = [setting for change in tried for setting in change]
        plan = plan_training(_changed(recipe, settings), longest=longest, world=world)
        if plan.peak <= MOST_SHARE * free:
            return settings, plan
    return None


def _changes(recipe: Recipe, longest: tuple[int, int] | None) -> Iterator[list[str]]:
    """Changes that save memory, the least harmful first; later ones may overrule earlier ones."""
    train, model = recipe.train, recipe.model
    if not train.gradient_checkpointing:
        yield ["train.gradient_checkpointing=true"]
    if train.loss_chunk_tokens is None and largest_batch(recipe, longest).targets > 1024:
        yield ["train.loss_chunk_tokens=1024"]
    rows = train.per_device_train_batch_size
    if rows > 1 and train.tokens_per_batch is None:
        steps = rows * train.gradient_accumulation_steps
        yield ["train.per_device_train_batch_size=1", f"train.gradient_accumulation_steps={steps}"]
    if recipe.method.name in ("full", "freeze"):
        yield ["method.name=lora"]
    elif model.quantize is None and model.init is None:
        yield ["model.quantize=official-int8"]
        yield ["model.quantize=official-int4"]
    length = recipe.data.max_length
    if length > 512 and (longest is None or longest[0] > 512):
        yield ["data.max_length=512"]


def _changed(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    values = recipe.model_dump()
    for setting in settings:
        key, _, value = setting.partition("=")
        block, _, name = key.partition(".")
        values[block][name] = {"true": True}.get(value, int(value) if value.isdigit() else value)
    return Recipe(**values)


# --- glm plan


def memory_bytes(text: str) -> int:
    """Reads an amount of memory.

    Args:
        text: A number with or without a unit: 24GB, 80 GiB, 500MB.

    Raises:
        UsageError: It is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise UsageError(f"{text!r} is no amount of memory", hint="24GB, 80GiB, 500MB")
    return int(float(found[1]) * _UNITS[found[2]])


def model_plans(name: str, *, tokens: int = 2048, rows: int = 1) -> dict[str, Plan]:
    """Plans a model to answer, and to be tuned with the official scripts' lengths, in three weight formats.

    A folder that is quantised has one format, its own, and not all of its parameters can be tuned.

    Args:
        name: A folder, or the name of a model that need not be on this machine.
        tokens: Context of an answer.
        rows: Answers at a time, and rows of a batch.

    Returns:
        What is done and in which format -> its plan.

    Raises:
        UsageError: No such model.
    """
    plans: dict[str, Plan] = {}
    formats = {"float16": None, "int8": "official-int8", "int4": "official-int4"}
    stored = subject_of(ModelBlock(path=name, dtype="float16", device=FLOAT16_DEVICE))
    if stored.scheme is not None or stored.bits:
        formats = {stored.scheme.name if stored.scheme is not None else f"official-int{stored.bits}": None}
    for method in ("answer", "ptuning_v2", "lora", "full"):
        for label, quantize in formats.items():
            if method == "full" and label != "float16":
                continue
            recipe = Recipe(
                model={"path": name, "quantize": quantize, "dtype": "float16", "device": FLOAT16_DEVICE},
                data={"train_file": "none", "max_source_length": 64, "max_target_length": 64},
                method={"name": "full" if method == "answer" else method},
                train={"per_device_train_batch_size": rows},
                output={"dir": "none"},
            )
            subject: Subject = subject_of(recipe.base)
            if method == "answer":
                plans[f"{method}, {label}"] = plan_inference(subject, tokens=tokens, rows=rows)
            else:
                plans[f"{method}, {label}"] = plan_training(recipe, subject=subject)
    return plans


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain values.

    Args:
        plan: The plan.
    """
    return {
        "what": plan.what,
        "parts_bytes": {name: size for name, size in plan.parts.items() if size},
        "peak_bytes": plan.peak,
        "host_bytes": plan.host,
        "disk_bytes": plan.disk,
    }
