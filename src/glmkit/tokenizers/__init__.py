"""Tokenizers, one file per kind, and their registration with transformers."""

from __future__ import annotations

from glmkit.hf import AutoTokenizer, PreTrainedConfig
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer

__all__ = ["ChatGLMTokenizer", "register"]


class _NoModelConfig(PreTrainedConfig):
    """Stands for no model: the key under which the tokenizer class is registered."""

    model_type = "glmkit-tokenizer-by-name"


def register() -> None:
    """Makes `AutoTokenizer` find our class by the name `ChatGLMTokenizer` in tokenizer_config.json.

    Registered under the real configuration class, the checkpoint's own Python file would still run with
    `trust_remote_code=True`; a class that is found by its name wins over it.
    """
    AutoTokenizer.register(_NoModelConfig, tokenizer_class=ChatGLMTokenizer, exist_ok=True)
