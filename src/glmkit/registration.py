"""Where models, tokenizers and what users expect as their methods come together, and are made known to transformers.

After `import glmkit` the Auto classes find our classes for official folders, with and without `trust_remote_code`, and
no python file of a checkpoint is run.
"""

from __future__ import annotations

from typing import Any

from glmkit import hf, tokenizers
from glmkit.chat import official
from glmkit.models.chatglm2 import (
    ChatGLM2ForCausalLM,
    ChatGLM2ForSequenceClassification,
    ChatGLM2PreTrainedModel,
)
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.quant.official import quantize_model
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer

_registered = False


def register() -> None:
    """Makes the classes known to transformers and joins the users' methods to them. Calling it again does nothing."""
    global _registered
    if _registered:
        return
    _join_methods()
    hf.AutoConfig.register("chatglm", ChatGLM2Config, exist_ok=True)
    for auto in (hf.AutoModel, hf.AutoModelForCausalLM, hf.AutoModelForSeq2SeqLM):
        auto.register(ChatGLM2Config, ChatGLM2ForCausalLM, exist_ok=True)
    hf.AutoModelForSequenceClassification.register(ChatGLM2Config, ChatGLM2ForSequenceClassification, exist_ok=True)
    tokenizers.register()
    _registered = True


def _join_methods() -> None:
    for name in official.MODEL_METHODS:
        setattr(ChatGLM2ForCausalLM, name, getattr(official, name))
    for name in official.TOKENIZER_METHODS:
        setattr(ChatGLMTokenizer, name, getattr(official, name))
    ChatGLM2PreTrainedModel.quantize = _quantize
    ChatGLM2PreTrainedModel.from_pretrained = classmethod(_from_pretrained)


def _quantize(self: Any, bits: int, *_: Any, **__: Any) -> Any:
    """`model.quantize(4)` or `(8)`: the official row-wise format. Further arguments of the official method are moot."""
    return quantize_model(self, bits)


def _from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    from glmkit.loading import from_pretrained

    return from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs)
