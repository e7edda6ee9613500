"""How fast a run is, against what the machine can do: operations of a step, the machine's peak, and peak memory.

MFU (model FLOPs utilisation) is the share of the machine's peak that the operations a step *needs* would take. Needed
are, for each token that is not padding, in a matrix of N numbers 2 N operations forward, 2 N for the gradient of its
input and 2 N for its own; what is computed again to save memory does not count. The peak is not a data sheet's: it is
what one plain matrix product reaches here and now, on all threads, in the precision of the run.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from glmkit.devices import wait_for

_CPU_SIZE, _ACCELERATOR_SIZE = 768, 8192  # rows of the square matrices that are multiplied
_PRODUCTS = 6


@dataclass(frozen=True)
class Operations:
    """What a step costs, in floating-point operations.

    Attributes:
        per_token: Of the matrices in the blocks.
        per_label: Of the output layer, which sees positions with a target only.
        per_pair: Of attention, for each pair of a token and one that it sees.
    """

    per_token: float
    per_label: float
    per_pair: float

    @classmethod
    def of(cls, model: nn.Module, method: str) -> Operations:
        """Count the matrices of a prepared model.

        Args:
            model: What the method has prepared.
            method: Its name: with "full" all matrices have gradients of their own; with "freeze" the upper blocks, and
                those below them need no gradients at all; with the others gradients only pass through.

        Returns:
            The costs.
        """
        config: Any = getattr(model, "config", None)
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        head = _head(model)
        per_token = per_label = 0.0
        module: Any
        for module in model.modules():
            # An adapter's layer around another one tells the sizes of the other.
            if not hasattr(module, "in_features") or hasattr(module, "base_layer"):
                continue
            weight = getattr(module, "weight", None)
            numbers = module.in_features * module.out_features
            learns = isinstance(weight, torch.Tensor) and weight.requires_grad
            cost = (6 if learns else 2 if method == "freeze" else 4) * numbers
            if module is head:
                per_label += (6 if learns else 4) * numbers
            else:
                per_token += cost
        if per_label == 0 and head is not None and id(head.weight) in tables:  # the output layer is the table itself
            per_label = (6 if head.weight.requires_grad else 4) * head.weight.numel()
        layers = getattr(config, "num_hidden_layers", getattr(config, "num_layers", 0))
        return cls(per_token, per_label, 3 * 4.0 * layers * getattr(config, "hidden_size", 0))

    def of_step(self, tokens: float, labels: float, rows: float) -> float:
        """Return the operations of a step.

        Args:
            tokens: Tokens without padding.
            labels: Targets.
            rows: Records; each token is taken to see half of its record.
        """
        seen = tokens / max(rows, 1) / 2
        return self.per_token * tokens + self.per_label * labels + self.per_pair * tokens * seen


def _head(model: nn.Module) -> Any:
    get = getattr(model, "get_output_embeddings", None)
    found = get() if callable(get) else None
    if found is None:
        get = getattr(model, "get_input_embeddings", None)
        found = get() if callable(get) else None
    return found


@functools.cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure what a matrix product reaches.

    Args:
        device: Where.
        dtype: In which precision.

    Returns:
        Operations per second of the fastest of some products.
    """
    size = _CPU_SIZE if device.type == "cpu" else _ACCELERATOR_SIZE
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(_PRODUCTS):
            wait_for(device)
            started = time.perf_counter()
            torch.mm(matrix, matrix)
            wait_for(device)
            best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
