"""Tokenizers, one file per kind; which one a folder or hub id has; and their registration with transformers.

    files and config.json             class                                      file
    ice_text.model                    ChatGLM1Tokenizer (ChatGLM-6B)             chatglm.py
    ice_text.model, "glm-130b"        GLM130BTokenizer                           glm130b.py
    tokenizer.model, SentencePiece    ChatGLMTokenizer (ChatGLM2, ChatGLM3)      chatglm2.py
    tokenizer.model, tiktoken         ChatGLM4Tokenizer (GLM-4-9B)               glm4.py
    vocabulary of GLM (2021)          GLMChineseTokenizer and three others       glm.py

Official folders call the tokenizers of three generations ChatGLMTokenizer, so files decide, and names only where there
is no file to look at.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glmkit.errors import TokenizerError
from glmkit.hf import AutoTokenizer, PreTrainedConfig, cached_file
from glmkit.tokenizers.chatglm import ChatGLM1Tokenizer
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer
from glmkit.tokenizers.folder import (
    CONFIG_FILE,
    HUB_ARGUMENTS,
    MODEL_FILE,
    declared_class,
    model_config,
    saved_generation,
)
from glmkit.tokenizers.glm import (
    GLMBertTokenizer,
    GLMChineseTokenizer,
    GLMGPT2Tokenizer,
    GLMRobertaTokenizer,
    glm_tokenizer_class,
)
from glmkit.tokenizers.glm4 import ChatGLM4Tokenizer, is_rank_file
from glmkit.tokenizers.glm130b import GLM130BTokenizer
from glmkit.tokenizers.ice_text import MODEL_FILE as ICE_FILE

__all__ = [
    "ChatGLM1Tokenizer",
    "ChatGLM4Tokenizer",
    "ChatGLMTokenizer",
    "GLM130BTokenizer",
    "has_tokenizer",
    "load_tokenizer",
    "register",
    "tokenizer_class",
]

_GLM = (GLMBertTokenizer, GLMChineseTokenizer, GLMGPT2Tokenizer, GLMRobertaTokenizer)
_CHAT = (ChatGLM1Tokenizer, ChatGLMTokenizer, ChatGLM4Tokenizer)
_NAMES = {one.__name__ for one in (*_GLM, *_CHAT, GLM130BTokenizer)}
_FILES = (MODEL_FILE, ICE_FILE, "cog-pretrain.model", "vocab.json", "vocab.txt", "merges.txt")
_FOR_AUTO = ("_from_auto", "code_revision", "config", "tokenizer_type", "trust_remote_code", "use_fast")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's file of any family.

    Args:
        folder: The folder.
    """
    names = [*_FILES, *(name for one in _GLM for names in one.official_names for name in names)]
    return any(any(folder.glob(name)) for name in names)


def load_tokenizer(folder: Path | str, config: Any = None, **kwargs: Any) -> Any:
    """Loads a folder's tokenizer, of whatever family it is.

    Args:
        folder: The folder.
        config: The model's config, if it is known.
        **kwargs: Arguments of the tokenizer's class.

    Returns:
        The tokenizer.

    Raises:
        TokenizerError: There is none, or it cannot be told which it is.
    """
    chosen = tokenizer_class(Path(folder), config)
    if chosen in _CHAT and getattr(config, "generation", None) is not None:
        kwargs.setdefault("generation", config.generation)
    return chosen.from_pretrained(str(folder), **kwargs)


def tokenizer_class(folder: Path, config: Any = None) -> Any:
    """Tells which tokenizer a folder has.

    Args:
        folder: The folder.
        config: The model's config, if it is known; else its config.json is read.

    Returns:
        The class.

    Raises:
        TokenizerError: There is none, or the folder has several.
    """
    values = model_config(folder) if config is None else config.to_dict()
    kind, declared = values.get("model_type"), declared_class(folder)
    has_ice, has_model = (folder / ICE_FILE).is_file(), (folder / MODEL_FILE).is_file()
    if kind == "glm-130b" or (kind is None and declared == GLM130BTokenizer.__name__):
        return GLM130BTokenizer
    if kind != "chatglm" and not (has_ice or has_model):
        return glm_tokenizer_class(folder)
    first = "position_encoding_2d" in values or "inner_hidden_size" in values
    if has_ice and has_model and kind is None:
        raise TokenizerError(
            f"{folder} has {ICE_FILE} of ChatGLM-6B and {MODEL_FILE} of a later model, and no config.json",
            hint="take away the file that does not belong to the weights",
        )
    if first if kind == "chatglm" and has_ice == has_model else has_ice:
        return ChatGLM1Tokenizer
    return ChatGLM4Tokenizer if has_model and is_rank_file(folder / MODEL_FILE) else ChatGLMTokenizer


def register() -> None:
    """Makes `AutoTokenizer` take our classes, whatever a folder or hub id says and whether code is trusted or not.

    Before `AutoTokenizer` searches, config.json and tokenizer_config.json of the folder or hub id are looked at: what
    is ours by model_type or by the name of the class goes to our class at once. A class that the search finds by name
    wins over a checkpoint's Python file too, so ours are registered besides, each under a configuration that no model
    has; under the real one the file would still run with `trust_remote_code=True`.
    """
    for one in (*_GLM, ChatGLM4Tokenizer, ChatGLMTokenizer):
        nobody = type("_NoModelConfig", (PreTrainedConfig,), {"model_type": f"glmkit-{one.__name__}"})
        AutoTokenizer.register(nobody, tokenizer_class=one, exist_ok=True)
    search = AutoTokenizer.from_pretrained.__func__
    if hasattr(search, "__wrapped__") and search.__module__ == __name__:
        return

    @functools.wraps(search)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *inputs: Any, **kwargs: Any) -> Any:
        chosen = _our_class(pretrained_model_name_or_path, kwargs)
        if chosen is None:
            return search(cls, pretrained_model_name_or_path, *inputs, **kwargs)
        kept = {key: value for key, value in kwargs.items() if key not in _FOR_AUTO}
        return chosen.from_pretrained(pretrained_model_name_or_path, *inputs, **kept)

    from_pretrained.__module__ = __name__
    AutoTokenizer.from_pretrained = classmethod(from_pretrained)


def _our_class(name: str | os.PathLike[str], arguments: Mapping[str, Any]) -> Any | None:
    """Our class for a folder or hub id, or None if it is not one of our models."""
    config = arguments.get("config")
    if os.path.isfile(name):
        return None
    if os.path.isdir(name):
        folder = Path(name, arguments.get("subfolder") or "")
        return tokenizer_class(folder, config) if _is_ours(folder, config) else None
    hub = {key: arguments[key] for key in HUB_ARGUMENTS if key in arguments}
    described = _fetch(os.fspath(name), (CONFIG_FILE, "config.json"), hub)
    if described is None or not _is_ours(described, config):
        return None
    return tokenizer_class(_fetch(os.fspath(name), _FILES, hub) or described, config)


def _is_ours(folder: Path, config: Any) -> bool:
    values = model_config(folder) if config is None else config.to_dict()
    if declared_class(folder) in _NAMES or saved_generation(folder) is not None:
        return True
    is_glm_2021 = values.get("model_type") == "glm" and "block_position_encoding" in values
    return values.get("model_type") in ("chatglm", "glm-130b") or is_glm_2021


def _fetch(name: str, files: tuple[str, ...], hub: Mapping[str, Any]) -> Path | None:
    """The folder in the hub's cache, with those of the files that there are; None if there are none."""
    folder = None
    for file in files:
        with contextlib.suppress(OSError):
            folder = Path(cached_file(name, file, **hub)).parent
    return folder
