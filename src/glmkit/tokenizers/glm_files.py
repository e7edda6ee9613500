"""The files of a GLM tokenizer: finding them in a folder or on the hub, and refusing those of another checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glmkit.errors import TokenizerError
from glmkit.hf import cached_file
from glmkit.tokenizers.folder import CONFIG_FILE, check_link, read_config

ADDED_FILE = "added_tokens.json"


def find_file(folder: Path, names: Sequence[str]) -> Path:
    """Finds a vocabulary file under one of its names.

    Args:
        folder: The folder.
        names: Its official name, and others it is known by; `*` stands for anything.

    Returns:
        The file, or the path it should have.

    Raises:
        TokenizerError: It is a link out of the folder.
    """
    for name in names:
        found = sorted(folder.glob(name))
        if found:
            check_link(found[0])
            return found[0]
    return folder / names[0]


def fetch_folder(name: str, names: Sequence[Sequence[str]], hub: Mapping[str, Any]) -> Path:
    """Fetches the tokenizer's files of a hub id.

    Args:
        name: The hub id.
        names: Of each vocabulary file its names, the official one first.
        hub: Arguments for the hub.

    Returns:
        The folder in the hub's cache that has them.

    Raises:
        TokenizerError: A file of the vocabulary cannot be fetched.
    """
    for optional in (CONFIG_FILE, ADDED_FILE):
        with contextlib.suppress(OSError):
            cached_file(name, optional, **hub)
    try:
        return [Path(cached_file(name, official, **hub)) for official, *_ in names][-1].parent
    except OSError as error:
        files = " and ".join(official for official, *_ in names)
        raise TokenizerError(
            f"{name!r} is no folder, and {files} could not be fetched from the hub: {error}",
            hint="check the path or the hub id; with HF_HUB_OFFLINE=1 only what was downloaded before is found",
        ) from error


def refuse_other_numbers(path: Path, known: Mapping[str, int]) -> None:
    """Refuses an added_tokens.json that numbers control tokens otherwise.

    Args:
        path: The file, which may be absent.
        known: Token to id.

    Raises:
        TokenizerError: A token has another id there; all of them are named.
    """
    wrong = [
        f"{token} is {index!r:.40} and not {known[token]}"
        for token, index in read_config(path).items()
        if token in known and known[token] != index
    ]
    if wrong:
        raise TokenizerError(
            f"{path} numbers control tokens differently: {', '.join(wrong)}",
            hint="check that all files of the folder belong to one checkpoint",
        )
