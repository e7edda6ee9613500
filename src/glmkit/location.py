"""Where a model lies: from what the user typed to a folder on this machine, fetched first if the user said so."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from glmkit import downloads
from glmkit.downloads import DownloadError, hub, modelscope
from glmkit.errors import UsageError
from glmkit.families import FAMILIES, ORGANISATIONS, Family, find_family
from glmkit.runtime.exported import refuse

# A folder with one of these holds a model; the last two point to the shards of an original model-parallel checkpoint.
_SIGNS = ("config.json", "latest", "latest_checkpointed_iteration.txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_INDEX_CHARACTERS = 2**23  # what the loader reads of an index at most
_ON_THE_HUB = ("zai-org/", "THUDM/")  # ModelScope's organisation has no repositories there


def locate(
    name: str | os.PathLike[str],
    *,
    download: bool = False,
    revision: str | None = None,
    hub: Mapping[str, Any] | None = None,
) -> Path:
    """Finds the folder of a model.

    Looked up in this order: a folder of that path; the model that comes with this package; `GLMKIT_MODELS` (its
    folders `name`, `organisation/name` and `organisation--name`); the hub cache; ModelScope's cache; the source that
    `GLMKIT_SOURCE` names, else the hub. A bare family name is never fetched silently; an explicit `organisation/name`
    is an order to fetch.

    Args:
        name: A folder, a family name or alias, or a hub id.
        download: Whether a family name that is not on this machine may be fetched.
        revision: Branch, tag or commit on the hub.
        hub: Further arguments of the hub's client: cache_dir, token, local_files_only.

    Returns:
        The folder.

    Raises:
        UsageError: The name is unknown, or it would have to be fetched and `download` is False.
        DownloadError: Fetching failed.
    """
    text, hub = os.fspath(name), dict(hub or {})
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        return folder
    refuse(folder)  # a .gguf file
    family = find_family(text)
    if family is not None and builtin(family.name).is_dir():
        return builtin(family.name)
    for folder in _under_models_folder(text, family):
        return folder
    hub_id = repository(text)
    cached = _in_hub_cache(hub_id, family, revision, hub.get("cache_dir")) or _in_modelscope_cache(hub_id, revision)
    if cached is not None:
        return cached
    if "/" not in text and not download:
        assert family is not None
        raise UsageError(
            f"{family.name} is not on this machine; it would be fetched from {hub_id}, {family.bytes / 1e9:.1f} GB",
            hint=f"to fetch it: glm pull {family.name}, or --yes, in Python download=True; to use a folder: its path,"
            " or GLMKIT_MODELS=FOLDER",
        )
    if hub.get("local_files_only"):
        raise DownloadError(
            f"cannot fetch {hub_id}: it is not on this machine, and local_files_only forbids to fetch it",
            hint=f"glm pull {text}",
        )
    return downloads.fetch(downloads.prepare(hub_id, revision=revision, options=hub), options=hub)


def repository(name: str) -> str:
    """Says under which id a model is on the hub.

    Args:
        name: A family name, an alias, or a hub id.

    Returns:
        `organisation/name`.

    Raises:
        UsageError: The name is unknown, or the model is not on the hub.
    """
    family = find_family(name)
    if family is not None and not family.hub_id:
        raise UsageError(
            f"{family.name} is not on this machine, and it is not on the hub",
            hint="give the folder of its checkpoint, or GLMKIT_MODELS=FOLDER that has it",
        )
    if family is None and (name.count("/") != 1 or not _HUB_ID.fullmatch(name)):
        raise _unknown(name)
    return name if family is None or name.startswith(_ON_THE_HUB) else family.hub_id


def builtin(name: str) -> Path:
    """Says where a model that comes with this package would be.

    Args:
        name: Its canonical name.

    Returns:
        The folder, which is not there if no such model comes with the package.
    """
    return Path(str(files("glmkit"))) / "builtin" / name


def _under_models_folder(text: str, family: Family | None) -> list[Path]:
    root = os.environ.get("GLMKIT_MODELS")
    if not root:
        return []
    names = [text, text.replace("/", "--")]
    if family is not None:
        names += [family.name, *(f"{owner}{mark}{family.name}" for owner in ORGANISATIONS for mark in ("/", "--"))]
    return [Path(root) / name for name in names if holds_model(Path(root) / name)]


def holds_model(folder: Path) -> bool:
    """Says whether a folder holds a model, whole or not.

    Args:
        folder: It.
    """
    return any((folder / sign).is_file() for sign in _SIGNS)


def _in_hub_cache(hub_id: str, family: Family | None, revision: str | None, cache_dir: str | None) -> Path | None:
    """A complete earlier download, also one made under the organisation's other name."""
    from huggingface_hub import try_to_load_from_cache

    ids = [hub_id, *(f"{organisation}/{family.name}" for organisation in ORGANISATIONS if family is not None)]
    for candidate in dict.fromkeys(ids):
        config = try_to_load_from_cache(candidate, "config.json", revision=revision, cache_dir=cache_dir)
        if isinstance(config, str) and has_all_weights(Path(config).parent):
            return Path(config).parent
    if revision is None:  # a commit that was fetched by its number is what there is, if it is the only one
        snapshots = hub.cache_entry(hub_id, cache_dir) / "snapshots"
        whole = [path for path in snapshots.glob("*/") if (path / "config.json").is_file() and has_all_weights(path)]
        if len(whole) == 1 and not any((snapshots.parent / "refs").glob("*")):
            return whole[0]
    return None


def _in_modelscope_cache(hub_id: str, revision: str | None) -> Path | None:
    folder = modelscope.snapshot(downloads.repository_at("modelscope", hub_id), revision)
    return folder if (folder / "config.json").is_file() and has_all_weights(folder) else None


def has_all_weights(folder: Path) -> bool:
    """Says whether a download came to its end: an interrupted one is taken up again, not loaded.

    Args:
        folder: It, with or without a config.json.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return True
        index = folder / f"{single}.index.json"
        if index.is_file():
            try:
                with index.open(encoding="utf-8") as file:
                    shards = set(json.loads(file.read(_INDEX_CHARACTERS))["weight_map"].values())
            except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
                return True  # complete or not, it is broken, and the loader says how
            return all(os.path.exists(folder / str(shard)) for shard in shards)
    return False


def _unknown(text: str) -> UsageError:
    known = [name for row in FAMILIES for name in (row.name, *row.aliases)]
    close = difflib.get_close_matches(text.lower(), known, n=1)
    return UsageError(
        f"no folder and no model is called {text!r}",
        hint=f"did you mean {close[0]}?" if close else "known models: " + ", ".join(row.name for row in FAMILIES),
    )
