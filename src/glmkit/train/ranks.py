"""Several processes that torchrun has started: how they meet, what they tell each other, and data parallelism.

    torchrun --nproc_per_node 2 -m glmkit finetune RECIPE
        strategy_of   recipe and environment -> one, ddp, fsdp or deepspeed
        join          the processes meet; each gets a device
        Several       what every way of sharing has in common: sums, agreement, waiting
        DataParallel  torch's DistributedDataParallel: the whole model in each process

Tensors of the device travel over its own library (NCCL, HCCL, CNCL), everything on the CPU over gloo.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glmkit.devices import choose_device
from glmkit.errors import UsageError
from glmkit.parallel import backends_for, join_ranks
from glmkit.train.arguments import RunRecipe
from glmkit.train.parts import read_parts
from glmkit.train.processes import MakeOptimizer, learning
from glmkit.train.state import load_generators, save_generators, save_moments

_SEEDS_APART = 1_000_003


@dataclass(frozen=True)
class Place:
    """A process among others.

    Args:
        rank: Its number, from 0.
        world: How many there are.
        device: Where it computes.
    """

    rank: int
    world: int
    device: torch.device


def strategy_of(recipe: RunRecipe) -> str:
    """Decide how the work is shared.

    Args:
        recipe: Its `distributed` block.

    Returns:
        "one" (a process alone), "ddp", "fsdp" or "deepspeed".

    Raises:
        UsageError: If settings contradict each other, or ask for what cannot be done.
    """
    block, world = recipe.distributed, world_size()
    if block.tensor_parallel > 1:
        raise UsageError(
            f"distributed.tensor_parallel={block.tensor_parallel}: matrices are divided for inference only "
            "(torchrun -m glmkit.parallel); no method learns with divided matrices",
            hint="distributed.strategy=fsdp holds a part of every tensor per process, with the same memory",
        )
    if block.deepspeed is not None and block.strategy not in ("auto", "deepspeed"):
        raise UsageError(
            f"distributed.deepspeed={block.deepspeed} and distributed.strategy={block.strategy} contradict each other",
            hint="leave one of them out; distributed.deepspeed=null takes away what a recipe says",
        )
    if block.strategy == "deepspeed" and block.deepspeed is None:
        raise UsageError(
            "distributed.strategy=deepspeed needs distributed.deepspeed, the path of a deepspeed.json",
            hint="glm recipe copy deepspeed_zero2",
        )
    if block.cpu_offload and block.strategy != "fsdp":
        raise UsageError(
            f"distributed.cpu_offload is for strategy=fsdp, not {block.strategy}",
            hint="with DeepSpeed say zero_optimization.offload_optimizer in deepspeed.json",
        )
    strategy = ("ddp" if block.deepspeed is None else "deepspeed") if block.strategy == "auto" else block.strategy
    return "one" if strategy == "ddp" and world == 1 else strategy


def world_size() -> int:
    """Return how many processes torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Tell whether this process is the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def loading_device(recipe: RunRecipe, device: str) -> str | torch.device:
    """Decide where a process loads its model, before the work is shared.

    Args:
        recipe: Says how.
        device: The recipe's own choice, "auto" or a device.

    Returns:
        The device for `glmkit.load`: this process's own; the CPU if the model is cut into parts from there.
    """
    strategy = strategy_of(recipe)
    if strategy == "one":
        return device
    ranks = join_ranks(device)
    return ranks.device if strategy == "ddp" else "cpu"


@contextlib.contextmanager
def first_goes_first(recipe: RunRecipe, device: str) -> Iterator[None]:
    """Let process 0 do something alone; the others do it after, and find what it has left on the disk.

    Args:
        recipe: What runs.
        device: The recipe's own choice of a device.
    """
    alone = world_size() == 1 or strategy_of(recipe) == "one"
    if not alone:
        join_ranks(device)
    if not alone and not is_first():
        dist.all_reduce(torch.zeros(1))
    yield
    if not alone and is_first():
        dist.all_reduce(torch.zeros(1))


def join(recipe: RunRecipe) -> Place:
    """Meet the other processes.

    Args:
        recipe: What runs; an accelerator is used if there is one, unless it says cpu.

    Returns:
        The place of this process.
    """
    wanted = getattr(getattr(recipe, "model", None), "device", "auto")
    if "WORLD_SIZE" in os.environ:
        ranks = join_ranks(wanted)
        return Place(ranks.rank, ranks.degree, ranks.device)
    chosen = choose_device(wanted)  # alone, with a strategy that needs a group all the same
    if not dist.is_initialized():
        dist.init_process_group(backends_for(chosen), store=dist.HashStore(), rank=0, world_size=1)
    return Place(0, 1, chosen)


class Several:
    """What every way of sharing the work has in common.

    Args:
        recipe: What runs.
        place: This process among the others.
    """

    whole = True

    def __init__(self, recipe: RunRecipe, place: Place) -> None:
        self.recipe, self.rank, self.world, self.device = recipe, place.rank, place.world, place.device
        self.model: Any = None
        self.optimizer: Any = None

    def sums(self, *numbers: float) -> list[float]:
        """Sum numbers over all processes.

        Args:
            numbers: Those of this process.
        """
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(number) for number in total]

    def all_agree(self, yes: bool) -> bool:
        """Tell whether every process says yes.

        Args:
            yes: What this one says.
        """
        (no,) = self.sums(0.0 if yes else 1.0)
        return no == 0

    def wait(self) -> None:
        """Wait for all processes."""
        self.sums(0.0)

    def share(self, value: Any) -> Any:
        """Give all processes what process 0 has.

        Args:
            value: Of what JSON can hold.

        Returns:
            That of process 0.
        """
        data = torch.frombuffer(bytearray(json.dumps(value).encode() or b" "), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        dist.broadcast(length, 0)
        if self.rank != 0:
            data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0)
        return json.loads(data.numpy().tobytes())

    def step(self, rate: float, max_norm: float, scale: float) -> float:
        """See `Processes.step`."""
        parameters = learning(self.model)
        if scale != 1:
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], scale)
        norm = self.norm(nn.utils.clip_grad_norm_(parameters, max_norm))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.skip()
        return norm

    def norm(self, norm: Tensor) -> float:
        """Return the norm of all gradients as a number.

        Args:
            norm: What `clip_grad_norm_` gave.
        """
        return norm.item()

    def skip(self) -> None:
        """Clear gradients without a step."""
        self.optimizer.zero_grad(set_to_none=True)

    def learnt(self) -> dict[str, Tensor] | None:
        """Return None: the model itself has it."""
        return None

    def moved(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move a batch to this process's device.

        Args:
            inputs: Tensors anywhere.
        """
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}

    def seed_apart(self) -> None:
        """Let dropout differ between the processes; the weights were made with the same seed in all of them."""
        torch.manual_seed(self.recipe.train.seed + _SEEDS_APART * self.rank)

    def network(self) -> str:
        """Say over what gradients travel."""
        return dist.get_default_backend_for_device(self.device)


class LossOf(nn.Module):
    """A model whose call is its training loss, for wrappers that know `forward` only.

    Args:
        model: Has `label_loss`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Return the summed loss and the number of targets.

        Args:
            inputs: Keyword arguments of `label_loss`.
        """
        loss: tuple[Tensor, int] = self.model.label_loss(**inputs)  # type: ignore[operator]
        return loss


class DataParallel(Several):
    """The whole model in each process; gradients are summed once in a window (torch's DistributedDataParallel)."""

    def describe(self) -> str:
        """Say in a few words what really runs."""
        return f"{self.world} processes, DDP over {self.network()}, the whole model on {self.device.type} in each"

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Wrap the model and make its optimizer.

        Args:
            model: What the method has prepared, the same in all processes.
            make_optimizer: Makes its optimizer.
        """
        self.model = model.to(self.device)
        self.wrapped = nn.parallel.DistributedDataParallel(
            LossOf(model), broadcast_buffers=False, gradient_as_bucket_view=True
        )
        self.optimizer = make_optimizer(model)
        self.seed_apart()

    def loss(self, inputs: dict[str, Tensor], *, last: bool = True) -> tuple[Tensor, int]:
        """See `Processes.loss`."""
        self.wrapped.require_backward_grad_sync = last  # what its no_sync() sets
        found: tuple[Tensor, int] = self.wrapped(self.moved(inputs))
        return found

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add gradients.

        Args:
            loss: A part of the window's loss; gradients are averaged, and the sum is meant.
            last: Told to `loss` before.
        """
        (loss * self.world).backward()

    def write(self, folder: Path) -> None:
        """Write optimizer and random generators.

        Args:
            folder: An existing folder, the same for all.
        """
        if self.rank == 0:
            save_moments(folder, self.optimizer)
        save_generators(folder, self.device, self.rank)

    def read(self, folder: Path) -> None:
        """Read optimizer and random generators.

        Args:
            folder: Where any number of processes wrote them.
        """
        read_parts(folder, self.model, self.optimizer)
        load_generators(folder, self.device, self.rank)
