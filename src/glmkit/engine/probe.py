"""The logits of a fixed prompt: by them a folder that was written is compared with what it was written from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glmkit import hf
from glmkit.engine.layout import layout_for
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.glm_config import GLMConfig

_PROBE_TOKENS = 24


@torch.inference_mode()
def probe_logits(model: Any) -> Tensor:
    """Compute the logits of a fixed prompt, with the masks and positions of the decode loop.

    Args:
        model: A language model of any family.

    Returns:
        (T, V) float32 on the CPU.
    """
    ids = torch.tensor([probe_ids(model.config)], device=next(model.parameters()).device)
    given = layout_for(model, ids, ids.new_zeros(1)).prompt(0, ids.shape[1])
    logits: Tensor = model(input_ids=ids, **given).logits[0]
    return logits.float().cpu()


def probe_ids(config: Any) -> list[int]:
    """The ids of that prompt: words all over the vocabulary, and what an answer begins with.

    Args:
        config: A model's config, also transformers' own of its `glm` layout.
    """
    words = [5 + 31 * place**2 % max(1, min(config.vocab_size // 2, 20_000)) for place in range(_PROBE_TOKENS)]
    if isinstance(config, (ChatGLM2Config, hf.GlmConfig)):
        return words
    ends = [getattr(config, name, None) for name in ("gmask_token_id", "bos_token_id")]
    if isinstance(config, GLMConfig):
        ends = [*(config.mask_token_ids or ())[:1], config.sop_token_id]
    return [*words, *(token for token in ends if token is not None)]
