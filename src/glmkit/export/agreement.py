"""An exported graph says what its source says: asked of both, in processes of their own.

The source computes the next tokens of two rows, one of them padded, in float32 and without a cache; a large one holds
one block at a time. A process without torch feeds the graph with the same rows: the prompts in one piece, then token
after token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glmkit.engine.layout import layout_for
from glmkit.engine.probe import probe_ids
from glmkit.errors import OutputError
from glmkit.export.constants import Weights
from glmkit.export.graph import inputs_at, skeleton
from glmkit.fresh import in_new_process
from glmkit.loading import load

_WHOLE_BYTES = 4 * 10**9  # of a source that is loaded whole; a larger one computes block after block
_LIMIT = 1e-4  # for float weights, which are only added up in another order
_PADS, _STEPS = 5, 3


def disagreement(
    weights: Weights,
    folder: Path,
    graph: Mapping[str, str],
    *,
    adapter: str | Path | None = None,
    family: str | None = None,
    exact: bool = True,
) -> float | None:
    """Opens an exported folder in a new process without torch, and compares its logits with the source's.

    Args:
        weights: The opened source.
        folder: The exported folder.
        graph: `engine` and `file`, as runtime.json says it.
        adapter: What was exported with the source.
        family: What the source is, if its folder does not say it.
        exact: Whether the graph has the numbers of the source, so that it must agree.

    Returns:
        Distance of the logits, relative to their size; None for a large source with a prefix, where it was only seen
        that the graph runs and gives finite numbers.

    Raises:
        OutputError: The graph cannot be opened, or does not agree.
    """
    compared = True
    if weights.folder.nbytes <= _WHOLE_BYTES:
        model = load(weights.location, adapter, "float32", "cpu", kernels="torch", family=family).model
    elif weights.prefix_tokens:  # what computes block after block has none
        model, compared = skeleton(weights.config), False
    else:
        model = weights.model()
    prompt = probe_ids(weights.config)
    further = [token + 1 for token in prompt[:_STEPS]]
    ids = torch.tensor([[*prompt, *further], [*prompt[:1] * _PADS, *prompt[_PADS:], *further[::-1]]])
    pads = torch.tensor([0, _PADS])
    recorded = _steps(model, ids, pads, len(prompt))
    if compared:
        recorded["expected"] = _logits(model, ids, pads)[:, len(prompt) - 1 :].transpose(0, 1)
    del model
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "steps.npz"
        np.savez(path, **{name: tensor.numpy() for name, tensor in recorded.items()})  # type: ignore[arg-type]
        arguments = {"folder": str(folder), "graph": dict(graph), "steps": str(path)}
        found: float | None = in_new_process(
            "glmkit.runtime.proof:difference", arguments, forbidden=("torch", "transformers"), light=True
        )
    if exact and found is not None and not found <= _LIMIT:
        raise OutputError(
            f"what was written is not what the source is: its logits differ by {found:.2g} of their size, expected at"
            f" most {_LIMIT:.0e}",
            hint="nothing was kept",
        )
    return found


def _steps(model: object, ids: Tensor, pads: Tensor, prompt: int) -> dict[str, Tensor]:
    """What the graph is fed with: the prompts, then one column after the other."""
    recorded: dict[str, Tensor] = {}
    borders = [0, *range(prompt, ids.shape[1] + 1)]
    for step, (start, end) in enumerate(pairwise(borders)):
        fed = inputs_at(model, ids, pads, start, end)
        recorded |= {f"{name}.{step}": one for name, one in zip(("ids", "mask", "positions"), fed.values())}
    return recorded


@torch.inference_mode()
def _logits(model: object, ids: Tensor, pads: Tensor) -> Tensor:
    """Of the source for whole rows, (B, S, V)."""
    given = layout_for(model, ids, pads).prompt(0, ids.shape[1])
    logits: Tensor = model(input_ids=ids, **given).logits  # type: ignore[operator]
    return logits.float()
