"""Whatever can be converted, opened as one checkpoint: a folder, shards of ranks, or a bare file of weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from glmkit.checkpoint import Folder
from glmkit.errors import UsageError
from glmkit.export.state_file import StateFile
from glmkit.loading import choose_family, open_model, read_config, read_tokenizer
from glmkit.location import locate
from glmkit.models.checked_config import CheckedConfig
from glmkit.models.glm130b_config import GLM130BConfig
from glmkit.models.glm_config import GLMConfig
from glmkit.runtime.exported import refuse


def open_source(path: str | Path, *, like: str | Path | None = None, config: Mapping[str, Any] | None = None) -> Folder:
    """Opens what is to be converted.

    Args:
        path: A folder, a model name or hub id; or a file of weights (.pth, .bin, .safetensors, .npz, .ckpt).
        like: For a file: a folder whose config and tokenizer belong to it; None: the one that it lies in.
        config: Fields of config.json that shards do not have: {"num_attention_heads": 16}.

    Returns:
        The opened source, to be used as a context manager.

    Raises:
        UsageError: `like` for what is no file.
        CheckpointError: Everything that is wrong with it.
    """
    file = Path(path).expanduser()
    if file.is_file():
        refuse(file)
        return StateFile(file, locate(like) if like is not None else file.parent)
    if like is not None:
        raise UsageError(f"like={str(like)!r} is for a bare file of weights; {path} is a folder", hint="leave it out")
    return open_model(locate(path), config)


def read_source(
    folder: Folder, path: str | Path, family: str | None, *, tokenizer: bool = True
) -> tuple[CheckedConfig, Any]:
    """Reads what belongs to the weights.

    Args:
        folder: What `open_source` opened.
        path: What it was opened by, which may be the name of a model.
        family: What it is, if it does not say it itself.
        tokenizer: False: the tokenizer is read only if the network's input depends on it, as GLM's does.

    Returns:
        Its config, which knows what its tokenizer says; and the tokenizer, None if it has none.

    Raises:
        ConfigError: The config is refused.
        TokenizerError: The tokenizer is damaged.
    """
    row = choose_family(folder.path if isinstance(folder, StateFile) else path, family)
    config = read_config(folder, row, overrule=family is not None)
    needs = tokenizer or isinstance(config, (GLMConfig, GLM130BConfig))
    return config, read_tokenizer(folder, config) if needs else None


def read_one(folder: Folder, name: str) -> Tensor:
    """Reads one tensor.

    Args:
        folder: The opened source.
        name: The tensor's name.
    """
    [(_, tensor)] = folder.read([name])
    return tensor
