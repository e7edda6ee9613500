"""How much memory a step needs, found out by doing it with tensors that have sizes and no numbers.

The model is made without memory (`torch.device("meta")`), prepared by its method, and then takes a real batch through
the real code, forward and backward, while every tensor that appears and goes is counted. So there is no second
description of the networks to keep true: what a layer keeps for its gradients is what its code keeps. A 6B model takes
a few seconds.

What no counting sees: the library's own buffers, and the gaps that an allocator leaves between tensors.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SMALL_BYTES = 32 * 2**20  # glibc may put smaller blocks into its heap, where gaps stay; larger ones are mapped alone

_ops = torch.ops.aten
_WRITES_BY_MASK = (_ops.index_put_.default, _ops.index_put.default, _ops._index_put_impl_.default)


@dataclass(frozen=True)
class Rehearsed:
    """Bytes that a step takes beside weights and optimizer.

    Attributes:
        activations: What stands when the network has run, before the output layer.
        head: The most that the output layer and the loss add to it.
        gradients: What is left behind: gradients of what learns.
        peak: The most at one moment, of all these together.
        small: The most of tensors under 32 MiB.
    """

    activations: int
    head: int
    gradients: int
    peak: int
    small: int = 0


class _Ledger(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and answers what code asks of numbers that are not there.

    Args:
        targets: How many positions have a target; what a mask chooses.
    """

    def __init__(self, targets: int) -> None:
        super().__init__()
        self.targets = targets
        self.live = self.peak = self.small = self.most_small = 0
        self._sizes: dict[int, int] = {}
        self._all: set[int] = set()  # results of "are all of them so?"

    def enter(self, tensor: Tensor, *, counts: bool = True) -> None:
        """Takes a tensor into account until its memory goes.

        Args:
            tensor: The tensor.
            counts: False for weights, which are counted elsewhere.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes() if counts else 0
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        if self._sizes[key] < SMALL_BYTES:
            self.small += self._sizes[key]
            self.most_small = max(self.most_small, self.small)
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        size = self._sizes.pop(key)
        self.live -= size
        self.small -= size if size < SMALL_BYTES else 0
        self._all.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is _ops._local_scalar_dense.default:
            return self._answer(args[0])
        if func is _ops.index.Tensor and _chooses(args[1]):
            rest = args[0].shape[args[1][0].ndim :]
            result = args[0].new_empty((self.targets, *rest))
        elif func in _WRITES_BY_MASK and _chooses(args[1]):
            result = args[0]
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.enter(leaf)
        if func in (_ops.all.default, _ops.all.dim):
            self._all.add(result.untyped_storage()._cdata)
        return result

    def _answer(self, tensor: Tensor) -> bool | int:
        """A good batch: all is as it must be, nothing is wrong, and the numbers are small."""
        if tensor.dtype == torch.bool:
            return tensor.untyped_storage()._cdata in self._all
        return 0


def _chooses(indices: Any) -> bool:
    """Whether rows are chosen by a mask, whose number depends on numbers."""
    return any(index is not None and index.dtype == torch.bool for index in indices)


def rehearse(
    model: nn.Module,
    step: Callable[[nn.Module], Tensor | None],
    *,
    targets: int,
    batches: int = 1,
    head: nn.Module | None = None,
    keeps_gradients: bool = True,
) -> Rehearsed:
    """Counts the memory of a step.

    Args:
        model: On the meta device, prepared. Its parameters are replaced by others without numbers.
        step: Runs a batch and returns its loss; or nothing, where nothing is learnt. Tensors that it makes have no
            numbers either.
        targets: Positions with a target.
        batches: 2 or more: gradients of a batch meet those of the one before.
        head: The network's last layer before the output layer.
        keeps_gradients: False: each gradient is given away as soon as it is there, to others or to the host.

    Returns:
        The bytes.
    """
    ledger = _Ledger(targets)
    reached = [0]
    with FakeTensorMode(allow_non_fake_inputs=True), _without_numbers(model, ledger), ledger:
        watch = None if head is None else head.register_forward_hook(lambda *_: reached.append(ledger.live))
        given_away = [] if keeps_gradients else [_give_away(one) for one in model.parameters() if one.requires_grad]
        most_forward = 0
        for _ in range(min(batches, 2)):
            loss = step(model)
            most_forward = max(most_forward, ledger.peak)
            if loss is not None:
                loss.backward()
            del loss
        if watch is not None:
            watch.remove()
        for hook in given_away:
            hook.remove()
        gradients = {parameter.grad for parameter in model.parameters() if parameter.grad is not None}
        kept = sum(gradient.untyped_storage().nbytes() for gradient in gradients)
        activations = reached[1] if len(reached) > 1 else 0
        peak, small = ledger.peak, ledger.most_small
        for parameter in model.parameters():
            parameter.grad = None
    return Rehearsed(activations, max(0, most_forward - activations), kept, peak, small)


def _give_away(parameter: nn.Parameter) -> Any:
    def clear(one: Tensor) -> None:
        one.grad = None

    return parameter.register_post_accumulate_grad_hook(clear)


@contextlib.contextmanager
def _without_numbers(model: nn.Module, ledger: _Ledger) -> Iterator[None]:
    """Replaces parameters and buffers on the meta device by such that claim to be on the CPU and have no memory."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old one too, so that its id stays its own
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for slots in tables:
            for name, old in slots.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    ledger.enter(new, counts=False)
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    made[id(old)] = (old, new)
                slots[name] = made[id(old)][1]
    yield
