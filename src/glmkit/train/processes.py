"""How many processes train one model together, and what each of them holds: the loop asks, and does not know.

One optimizer step sees a window of batches that is the same for every number of processes. Each process takes its
share of the window, and the gradients of all are joined before the step, so the curve does not depend on the number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from glmkit.train.arguments import RunRecipe
from glmkit.train.parts import read_parts
from glmkit.train.state import load_generators, save_generators, save_moments

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
"""Makes the optimizer of all parameters of a module that learn."""


class Processes(Protocol):
    """What the loop asks.

    Attributes:
        rank: Number of this process, from 0; process 0 writes what all have in common.
        world: How many there are.
        device: Where this process computes.
        whole: Whether each process holds the whole model, and can write text with it.
    """

    rank: int
    world: int
    device: torch.device
    whole: bool

    def describe(self) -> str:
        """Say in a few words what really runs."""

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Take the model that a method has prepared, wrap or shard it in place, and make its optimizer."""

    def loss(self, inputs: dict[str, Tensor], *, last: bool = True) -> tuple[Tensor, int]:
        """Return what the model's `label_loss` gives for inputs on any device: sum and number of targets.

        `last` is what `backward` will be told.
        """

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add gradients; with the last batch of a window those of all processes are joined (summed)."""

    def step(self, rate: float, max_norm: float, scale: float) -> float:
        """Divide gradients by `scale`, clip them, do an optimizer step and clear them.

        Args:
            rate: Learning rate.
            max_norm: Gradients of a larger norm are scaled down to it.
            scale: What the loss was multiplied by.

        Returns:
            The norm before clipping, over all processes. If it is not finite, no step was done.
        """

    def skip(self) -> None:
        """Clear gradients without a step."""

    def sums(self, *numbers: float) -> list[float]:
        """Sum numbers over all processes."""

    def all_agree(self, yes: bool) -> bool:
        """Tell whether every process says yes."""

    def wait(self) -> None:
        """Wait for all processes."""

    def share(self, value: Any) -> Any:
        """Give all processes what process 0 has: a value that JSON can hold."""

    def learnt(self) -> dict[str, Tensor] | None:
        """Gather what learns, by parameter name; whole on process 0. None: the model itself has it."""

    def write(self, folder: Path) -> None:
        """Write this process's part of a checkpoint: optimizer, random generators, and weights if they are sharded."""

    def read(self, folder: Path) -> None:
        """Read what `write` wrote, also with another number of processes."""


class OneProcess:
    """The whole model in this process.

    Args:
        device: Where it computes.
        model: A model that is measured only; one that learns comes with `prepare`.
    """

    rank, world, whole = 0, 1, True

    def __init__(self, device: torch.device, model: nn.Module | None = None) -> None:
        self.device = device
        self.model: Any = model
        self.optimizer: Any = None

    def describe(self) -> str:
        """Say in a few words what really runs."""
        return f"one process on {self.device}"

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Make the optimizer.

        Args:
            model: What the method has prepared, on the device.
            make_optimizer: Makes its optimizer.
        """
        self.model, self.optimizer = model, make_optimizer(model)

    def loss(self, inputs: dict[str, Tensor], *, last: bool = True) -> tuple[Tensor, int]:
        """Return the summed loss of a batch and its number of targets.

        Args:
            inputs: Keyword arguments of `label_loss`.
            last: Not looked at.
        """
        moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
        loss, targets = self.model.label_loss(**moved)
        return loss, targets

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add gradients.

        Args:
            loss: A part of the window's loss.
            last: Not looked at.
        """
        loss.backward()

    def step(self, rate: float, max_norm: float, scale: float) -> float:
        """See `Processes.step`."""
        parameters = learning(self.model)
        if scale != 1:
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], scale)
        norm = nn.utils.clip_grad_norm_(parameters, max_norm).item()
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.skip()
        return norm

    def skip(self) -> None:
        """Clear gradients without a step."""
        self.optimizer.zero_grad(set_to_none=True)

    def sums(self, *numbers: float) -> list[float]:
        """Return the numbers."""
        return list(numbers)

    def all_agree(self, yes: bool) -> bool:
        """Return what this process says."""
        return yes

    def wait(self) -> None:
        """Return at once."""

    def share(self, value: Any) -> Any:
        """Return the value."""
        return value

    def learnt(self) -> dict[str, Tensor] | None:
        """Return None: the model itself has it."""
        return None

    def write(self, folder: Path) -> None:
        """Write optimizer and random generators.

        Args:
            folder: An existing folder.
        """
        save_moments(folder, self.optimizer)
        save_generators(folder, self.device, self.rank)

    def read(self, folder: Path) -> None:
        """Read optimizer and random generators.

        Args:
            folder: Where `write` wrote them.
        """
        read_parts(folder, self.model, self.optimizer)
        load_generators(folder, self.device, self.rank)


def processes_for(recipe: RunRecipe, device: torch.device) -> Processes:
    """Choose how a run is shared: as the recipe says, over the processes that torchrun has started.

    Args:
        recipe: Its `distributed` block says how.
        device: Where the model lies; where several processes compute is decided by `join`.

    Returns:
        What the loop asks.

    Raises:
        UsageError: If the strategy cannot run so.
        MissingDependencyError: If DeepSpeed is asked for and not installed.
    """
    from glmkit.train.ranks import DataParallel, join, strategy_of

    strategy = strategy_of(recipe)
    if strategy == "one":
        return OneProcess(device)
    place = join(recipe)
    if strategy == "ddp":
        return DataParallel(recipe, place)
    if strategy == "fsdp":
        from glmkit.train.fsdp import FullySharded

        return FullySharded(recipe, place)
    from glmkit.train.zero import Zero

    return Zero(recipe, place)


def learning(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters that learn."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def own_share(batches: list[Any], rank: int, world: int) -> Iterable[tuple[Any, bool]]:
    """Yield a process's batches of a window, as many in every process.

    Args:
        batches: Those of the whole window.
        rank: Number of the process.
        world: How many there are.

    Yields:
        A batch and whether it counts: a process that has fewer than others repeats one that does not.
    """
    for first in range(0, len(batches), world):
        counts = first + rank < len(batches)
        yield batches[first + rank if counts else first], counts
