"""How the logits of new tokens are computed: by native code where there is some for this model, else by the model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from glmkit import hf
from glmkit.engine.cache import LanguageModel
from glmkit.engine.native import logits_by_model, runner_for

Forward = Callable[[Tensor, dict[str, Tensor], int], Tensor]
"""New tokens (B, T), what the layout says about them, and the number of last positions -> their logits (B, keep, V)."""


def forward_for(model: LanguageModel, cache: hf.Cache) -> Forward:
    """The fastest way to run a model over a cache that gives its logits.

    Args:
        model: The language model.
        cache: What it has read; every call appends to it.

    Returns:
        A function for one generation, to be called in inference mode: whether native code fits is looked up here, and
        not at every token.
    """
    runner = runner_for(model)
    if runner is None:
        return lambda ids, layout, keep: logits_by_model(
            model, ids, layout.get("attention_mask"), layout.get("position_ids"), cache, keep
        )
    return lambda ids, layout, keep: runner(ids, **layout, cache=cache, keep=keep)
