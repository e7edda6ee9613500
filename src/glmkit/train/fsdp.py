"""Fully sharded data parallelism: each process holds some rows of every tensor (torch's `fully_shard`, FSDP2).

A block's parameters are gathered before it computes and given back after; gradients are summed and cut at once, so no
process ever holds the whole model, its gradients or its moments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glmkit import hf
from glmkit.train.arguments import RunRecipe
from glmkit.train.parts import read_parts, write_shards
from glmkit.train.processes import MakeOptimizer
from glmkit.train.ranks import LossOf, Place, Several
from glmkit.train.state import load_generators, save_generators


class FullySharded(Several):
    """A part of every tensor in each process.

    Args:
        recipe: What runs; its `distributed` block says what stays in memory.
        place: This process among the others.
    """

    whole = False

    def __init__(self, recipe: RunRecipe, place: Place) -> None:
        super().__init__(recipe, place)
        self._block = recipe.distributed
        train = recipe.train
        self._compute = torch.bfloat16 if train.bf16 else torch.float16 if train.fp16 else None

    def describe(self) -> str:
        """Say in a few words what really runs."""
        more = [f"blocks gathered in {str(self._compute).removeprefix('torch.')}"] if self._compute else []
        more += ["parameters and optimizer in the memory of the host"] if self._block.cpu_offload else []
        more += [] if self._block.reshard_after_forward else ["blocks stay gathered until the backward pass"]
        return "; ".join([f"{self.world} processes, FSDP2 over {self.network()} on {self.device.type}", *more])

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Cut every block and the rest into parts, and make the optimizer of the parts.

        Args:
            model: What the method has prepared, the same in all processes; best on the CPU, from where one block after
                the other goes to the device.
            make_optimizer: Makes its optimizer.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        whole_numbers = {parameter for parameter in model.parameters() if not parameter.is_floating_point()}
        for parameter in whole_numbers:  # official int8 and int4 weights are never cast: each process has all of them
            parameter.data = parameter.data.to(self.device)
        offload: Any = CPUOffloadPolicy() if self._block.cpu_offload else OffloadPolicy()
        options: dict[str, Any] = {"mesh": mesh, "offload_policy": offload, "ignored_params": whole_numbers}
        # Sums between the blocks stay float32 as in one process: only what a block gathers is shortened.
        policy = MixedPrecisionPolicy(self._compute, torch.float32, cast_forward_inputs=False)
        keep = self._block.reshard_after_forward
        for module in model.modules():
            if isinstance(module, hf.GradientCheckpointingLayer):
                fully_shard(module, mp_policy=policy, reshard_after_forward=keep, **options)
        self.wrapped: Any = LossOf(model)
        fully_shard(self.wrapped, **options)
        self.model, self.optimizer = model, make_optimizer(model)
        self.seed_apart()

    def loss(self, inputs: dict[str, Tensor], *, last: bool = True) -> tuple[Tensor, int]:
        """See `Processes.loss`."""
        found: tuple[Tensor, int] = self.wrapped(self.moved(inputs))
        if not torch.is_grad_enabled():  # no backward pass will give the parameters back
            for module in self.wrapped.modules():
                if hasattr(module, "reshard"):
                    module.reshard()
        return found

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add gradients; those of all processes are joined with every batch, because whole ones would fill the memory.

        Args:
            loss: A part of the window's loss; gradients are averaged, and the sum is meant.
            last: Not looked at.
        """
        (loss * self.world).backward()

    def norm(self, norm: Tensor) -> float:
        """Return the norm of all gradients as a number.

        Args:
            norm: That of the parts, as a DTensor.
        """
        return float(norm.full_tensor().item()) if hasattr(norm, "full_tensor") else norm.item()

    def learnt(self) -> dict[str, Tensor] | None:
        """Gather what learns, tensor after tensor; process 0 gets it."""
        gathered: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad or self.recipe.method.name in ("full", "freeze"):
                sharded: Any = parameter.detach()
                whole = sharded.full_tensor() if hasattr(sharded, "full_tensor") else sharded
                if self.rank == 0:
                    gathered[name] = whole.cpu()
        return gathered

    def write(self, folder: Path) -> None:
        """Write this process's rows of weights and moments, and its random generators.

        Args:
            folder: An existing folder, the same for all.
        """
        every = self.recipe.method.name in ("full", "freeze")  # others need the base model anyway
        write_shards(folder, self.model, self.optimizer, every_weight=every)
        save_generators(folder, self.device, self.rank)

    def read(self, folder: Path) -> None:
        """Read weights, moments and random generators.

        Args:
            folder: Where any number of processes wrote them.
        """
        read_parts(folder, self.model, self.optimizer)
        load_generators(folder, self.device, self.rank)
