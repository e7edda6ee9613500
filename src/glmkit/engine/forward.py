"""How the logits of new tokens are computed: by native code where there is some for this model, else by the model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from glmkit import hf
from glmkit.engine.cache import LanguageModel
from glmkit.engine.native import runner_for

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

    def by_model(ids: Tensor, layout: dict[str, Tensor], keep: int) -> Tensor:
        output = model(
            input_ids=ids,
            attention_mask=layout.get("attention_mask"),
            position_ids=layout.get("position_ids"),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: Tensor = output.logits[:, -keep:]
        return logits

    if runner is None:
        return by_model
    return lambda ids, layout, keep: runner(ids, **layout, cache=cache, keep=keep)
