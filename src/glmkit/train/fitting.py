"""Does a run fit into the memory that is free, and if not, what is the nearest that does?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from glmkit.errors import TrainingError
from glmkit.train.arguments import Recipe
from glmkit.train.plan import Plan, largest_batch, place_of, plan_training

MOST_SHARE = 0.95  # of the free memory that a run may need


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free here and now, for one process.

    Args:
        device: Where.

    Returns:
        Bytes; None if nobody can tell.
    """
    if device.type != "cpu":
        ask = getattr(getattr(torch, device.type, None), "mem_get_info", None)
        try:
            return int(ask(device)[0]) if ask is not None else None
        except (RuntimeError, AssertionError):
            return None
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip() if (group / "memory.max").is_file() else "max"
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError, KeyError):
        return None
    return free


def require_fit(
    recipe: Recipe, *, longest: tuple[int, int] | None = None, world: int = 1, local: int = 1, force: bool = False
) -> Plan:
    """Counts what a recipe needs on this machine, and refuses it if that is not there.

    Args:
        recipe: What to do.
        longest: Tokens and targets of the longest record.
        world: Number of processes.
        local: How many of them share this machine's memory, on a CPU.
        force: Do not refuse.

    Returns:
        The plan.

    Raises:
        TrainingError: It needs more than 95 % of what is free; names the nearest settings that fit.
    """
    plan = plan_training(recipe, longest=longest, world=world)
    device = place_of(recipe.model)
    free = free_bytes(device)
    if free is not None and device.type == "cpu":
        free //= local
    if not force:
        check_fits(plan, free, recipe, longest=longest, world=world)
    return plan


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
