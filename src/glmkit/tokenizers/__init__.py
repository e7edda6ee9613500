"""Tokenizers, one file per kind, and their registration with transformers."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from glmkit.hf import AutoTokenizer, PreTrainedConfig
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer
from glmkit.tokenizers.folder import model_type

__all__ = ["ChatGLMTokenizer", "register"]

_MODEL_TYPE = "chatglm"
_FOR_AUTO = ("_from_auto", "code_revision", "config", "tokenizer_type", "trust_remote_code", "use_fast")


class _NoModelConfig(PreTrainedConfig):
    """Stands for no model: the key under which the tokenizer class is registered."""

    model_type = "glmkit-tokenizer-by-name"


def register() -> None:
    """Makes `AutoTokenizer` take our class for ChatGLM, whatever a folder says and whether code is trusted or not.

    A hub id is recognised by the name `ChatGLMTokenizer` in its tokenizer_config.json. Registered under the real
    configuration class, the checkpoint's own Python file would still run with `trust_remote_code=True`; a class that is
    found by its name wins over it. A folder may leave that name out or have another one, and then no registration
    wins; so a folder whose config.json is ChatGLM's does not reach the search at all.
    """
    AutoTokenizer.register(_NoModelConfig, tokenizer_class=ChatGLMTokenizer, exist_ok=True)
    search = AutoTokenizer.from_pretrained.__func__
    if hasattr(search, "__wrapped__") and search.__module__ == __name__:
        return

    @functools.wraps(search)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *inputs: Any, **kwargs: Any) -> Any:
        if not _is_ours(pretrained_model_name_or_path, kwargs):
            return search(cls, pretrained_model_name_or_path, *inputs, **kwargs)
        kept = {key: value for key, value in kwargs.items() if key not in _FOR_AUTO}
        return ChatGLMTokenizer.from_pretrained(pretrained_model_name_or_path, *inputs, **kept)

    from_pretrained.__module__ = __name__
    AutoTokenizer.from_pretrained = classmethod(from_pretrained)


def _is_ours(name: str | os.PathLike[str], arguments: dict[str, Any]) -> bool:
    config = arguments.get("config")
    if config is not None:
        return getattr(config, "model_type", None) == _MODEL_TYPE
    return os.path.isdir(name) and model_type(Path(name, arguments.get("subfolder") or "")) == _MODEL_TYPE
