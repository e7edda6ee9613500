"""DeepSpeed's ZeRO as the user's own deepspeed.json says; the loop, the optimizer and the schedule stay ours.

What differs from DeepSpeed alone: gradients are sums over the window's label tokens, whatever the number of batches;
the loss scale of float16 is the loop's; checkpoints are safetensors by parameter name, not pickles, so any number of
processes and any other strategy can read them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glmkit.errors import MissingDependencyError
from glmkit.train.arguments import RunRecipe
from glmkit.train.packaged import named_file
from glmkit.train.parts import PARTS, WEIGHTS, names_in_order, read_whole, write_steps
from glmkit.train.processes import MakeOptimizer
from glmkit.train.ranks import LossOf, Place, Several
from glmkit.train.state import load_generators, save_generators
from glmkit.train.zero_config import read_config, stage_of
from glmkit.writing import save_tensors


class Zero(Several):
    """Optimizer (stage 1), gradients (2) and parameters (3) in parts.

    Args:
        recipe: What runs; names the deepspeed.json.
        place: This process among the others.

    Raises:
        MissingDependencyError: If DeepSpeed is not installed.
        UsageError: If deepspeed.json is wrong, or contradicts the recipe.
    """

    def __init__(self, recipe: RunRecipe, place: Place) -> None:
        super().__init__(recipe, place)
        os.environ.setdefault("LOCAL_RANK", "0")
        os.environ.setdefault("DS_ACCELERATOR", place.device.type)
        try:
            with _quiet():
                import deepspeed
        except ImportError:
            raise MissingDependencyError("deepspeed", "deepspeed") from None
        self._deepspeed: Any = deepspeed
        # Sums in shared memory, for which a compiler would run at the first start; gloo does without.
        getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
        assert recipe.distributed.deepspeed is not None
        self._config = read_config(named_file(recipe.distributed.deepspeed), recipe, place.world)
        self.stage = stage_of(self._config)
        self.whole = self.stage < 3

    def describe(self) -> str:
        """Say in a few words what really runs."""
        config = self._config
        more = [f"model in {kind}" for kind in ("bf16", "fp16") if config.get(kind, {}).get("enabled")]
        zero = config["zero_optimization"]
        more += [
            f"{what} in {zero[f'offload_{what}']['device']}"
            for what in ("optimizer", "param")
            if f"offload_{what}" in zero
        ]
        name = f"DeepSpeed {self._deepspeed.__version__} ZeRO-{self.stage}"
        return "; ".join([f"{self.world} processes, {name} over {self.network()} on {self.device.type}", *more])

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Hand the model and its optimizer to DeepSpeed.

        Args:
            model: What the method has prepared, the same in all processes.
            make_optimizer: Makes its optimizer.
        """
        self.model = model
        self._fill_sizes(model)
        optimizer = make_optimizer(model)
        self._names = names_in_order(model, optimizer)
        with _quiet():
            self.engine, self.optimizer, _, _ = self._deepspeed.initialize(
                model=LossOf(model), optimizer=optimizer, config=self._config
            )
        self._parameters = dict(model.named_parameters())
        self.seed_apart()

    def _fill_sizes(self, model: nn.Module) -> None:
        """The sizes of ZeRO-3's buffers that are "auto" follow from the width of the model."""
        width = int(getattr(getattr(model, "config", None), "hidden_size", 1024))
        zero = self._config["zero_optimization"]
        sizes = {
            "reduce_bucket_size": width * width,
            "stage3_prefetch_bucket_size": int(0.9 * width * width),
            "stage3_param_persistence_threshold": 10 * width,
        }
        zero.update({key: size for key, size in sizes.items() if zero.get(key) == "auto"})

    def loss(self, inputs: dict[str, Tensor], *, last: bool = True) -> tuple[Tensor, int]:
        """See `Processes.loss`."""
        if torch.is_grad_enabled():
            self.engine.set_gradient_accumulation_boundary(last)
        found: tuple[Tensor, int] = self.engine(self.moved(inputs))
        return found

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add gradients.

        Args:
            loss: A part of the window's loss, scaled; gradients are averaged, and the sum is meant.
            last: Told to `loss` before.
        """
        self.optimizer.loss_scaler.cur_scale = 1.0  # the loop has scaled already
        self.engine.backward(loss * self.world, scale_wrt_gas=False)

    def step(self, rate: float, max_norm: float, scale: float) -> float:
        """See `Processes.step`."""
        self.optimizer.loss_scaler.cur_scale = scale  # by this it divides
        self.optimizer.clip_grad = max_norm
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        return norm if math.isfinite(norm) and norm >= 0 else math.nan

    def skip(self) -> None:
        """Clear gradients without a step: DeepSpeed does so itself when their norm is no number."""
        name, no_norm = "scaled_global_norm", torch.tensor(math.nan, device=self.device)
        unusable: Any = no_norm
        if self.stage == 3:
            name, unusable = "_get_norm_groups", [no_norm]
        setattr(self.optimizer, name, lambda *_, **__: unusable)
        try:
            self.engine.step()
        finally:
            delattr(self.optimizer, name)  # that of the class is seen again

    def learnt(self) -> dict[str, Tensor] | None:
        """Gather what learns in float32, tensor after tensor; process 0 gets it."""
        gathered: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if parameter.requires_grad or self.recipe.method.name in ("full", "freeze"):
                whole = self._whole(parameter)
                if self.rank == 0:
                    gathered[name] = whole.cpu()
        return gathered

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        if parameter.requires_grad:
            found: Tensor = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
            return found.view(getattr(parameter, "ds_shape", parameter.shape))
        if self.stage < 3:
            return parameter.detach()
        with self._deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def write(self, folder: Path) -> None:
        """Write this process's share of weights and moments, and its random generators.

        Args:
            folder: An existing folder, the same for all.
        """
        every = self.stage == 3 and self.recipe.method.name in ("full", "freeze")
        own: dict[str, Tensor] = {}
        self._link_moments()
        for number, (name, parameter) in enumerate(self._parameters.items()):
            found = {WEIGHTS: self._whole(parameter)} if every or parameter.requires_grad else {}
            for kind in self._moments() if parameter.requires_grad else ():
                moment = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, kind)
                found[kind] = moment.view(getattr(parameter, "ds_shape", parameter.shape))
            if number % self.world == self.rank:  # all help to gather, one writes
                own |= {f"{kind}.{name}": tensor.cpu() for kind, tensor in found.items()}
        (folder / PARTS).mkdir(exist_ok=True)
        save_tensors(folder / PARTS, own, file_name=f"part-{self.rank:05d}.safetensors")
        if self.rank == 0:
            steps = self._steps()
            write_steps(folder, {} if steps is None else {"step": dict.fromkeys(self._names, steps)})
        save_generators(folder, self.device, self.rank)

    def read(self, folder: Path) -> None:
        """Read weights, moments and random generators.

        Args:
            folder: Where any number of processes wrote them, with any strategy.
        """
        steps = 0.0
        self._make_moments()
        for kind, name, tensor in read_whole(folder, self._names):
            parameter = self._parameters[name]
            if tensor.ndim == 0 and kind == "step":
                steps = max(steps, tensor.item())
            elif kind == WEIGHTS:
                self._put_weight(parameter, tensor.to(self.device))
            else:
                self._deepspeed.utils.safe_set_full_optimizer_state(parameter, tensor.to(self.device), kind)
        for entry in self.optimizer.optimizer.state.values():
            entry["step"].fill_(steps)
        load_generators(folder, self.device, self.rank)

    def _put_weight(self, parameter: nn.Parameter, tensor: Tensor) -> None:
        if parameter.requires_grad:
            self._deepspeed.utils.safe_set_full_fp32_param(parameter, tensor)
        if self.stage < 3:
            parameter.data.copy_(tensor)
            return
        with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(tensor)

    def _flat(self) -> list[Tensor]:
        """This process's parts of the float32 weights, which the optimizer has as its parameters."""
        name = "single_partition_of_fp32_groups" if self.stage < 3 else "fp32_partitioned_groups_flat"
        found: list[Tensor] = getattr(self.optimizer, name)
        return found

    def _moments(self) -> list[str]:
        states = [self.optimizer.optimizer.state.get(flat, {}) for flat in self._flat()]
        return sorted({kind for state in states for kind, value in state.items() if value.ndim > 0})

    def _steps(self) -> float | None:
        steps = [float(state["step"]) for state in self.optimizer.optimizer.state.values() if "step" in state]
        return max(steps, default=None)

    def _make_moments(self) -> None:
        """AdamW makes its moments at its first step; here they are made before, to be read."""
        for flat in self._flat():
            self.optimizer.optimizer.state[flat] = {
                "step": torch.tensor(0.0, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        self._link_moments()

    def _link_moments(self) -> None:
        """DeepSpeed links its views of the moments after the first group's first step, when other groups have none."""
        if self.stage < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what DeepSpeed tells about itself on every process; warnings and errors stay."""
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        yield
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
