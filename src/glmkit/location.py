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

from glmkit.errors import GlmkitError, UsageError
from glmkit.families import FAMILIES, ORGANISATIONS, Family, find_family
from glmkit.runtime.exported import refuse

# Files worth fetching. The tokenizer's code is read as text for signs of its generation; no python file is ever run.
_PATTERNS = [
    "*.json",
    "*.model",
    "*.jinja",
    "vocab.txt",
    "merges.txt",
    "tokenization_chatglm.py",
    "modeling_chatglm.py",
    "LICENSE*",
    "MODEL_LICENSE*",
]


# A folder with one of these holds a model; the last two point to the shards of an original model-parallel checkpoint.
_SIGNS = ("config.json", "latest", "latest_checkpointed_iteration.txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ON_THE_HUB = ("zai-org/", "THUDM/")  # ModelScope's organisation has no repositories there


class DownloadError(GlmkitError, OSError):
    """The hub could not be reached, or does not have what was asked for."""


def locate(
    name: str | os.PathLike[str],
    *,
    download: bool = False,
    revision: str | None = None,
    hub: Mapping[str, Any] | None = None,
) -> Path:
    """Finds the folder of a model.

    Looked up in this order: a folder of that path; the model that comes with this package; `GLMKIT_MODELS` (its
    folders `name`, `organisation/name` and `organisation--name`); the hub cache; the hub. A bare family name is never
    fetched silently; an explicit `organisation/name` is an order to fetch.

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
    if family is not None and not family.hub_id:
        raise UsageError(
            f"{family.name} is not on this machine, and it is not on the hub",
            hint="give the folder of its checkpoint, or GLMKIT_MODELS=FOLDER that has it",
        )
    if family is None and (text.count("/") != 1 or not _HUB_ID.fullmatch(text)):
        raise _unknown(text)
    hub_id = text if family is None or text.startswith(_ON_THE_HUB) else family.hub_id
    cached = _in_hub_cache(hub_id, family, revision, hub.get("cache_dir"))
    if cached is not None:
        return cached
    if "/" not in text and not download:
        assert family is not None
        raise UsageError(
            f"{family.name} is not on this machine; it would be fetched from {hub_id}, {family.bytes / 1e9:.1f} GB",
            hint=f"to fetch it: --yes, in Python download=True, or the hub id {hub_id}; to use a folder: its path, or"
            " GLMKIT_MODELS=FOLDER",
        )
    return _fetch(hub_id, revision, hub)


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
    return [Path(root) / name for name in names if any((Path(root) / name / sign).is_file() for sign in _SIGNS)]


def _in_hub_cache(hub_id: str, family: Family | None, revision: str | None, cache_dir: str | None) -> Path | None:
    """A complete earlier download, also one made under the organisation's other name."""
    from huggingface_hub import try_to_load_from_cache

    ids = [hub_id, *(f"{organisation}/{family.name}" for organisation in ORGANISATIONS if family is not None)]
    for candidate in dict.fromkeys(ids):
        config = try_to_load_from_cache(candidate, "config.json", revision=revision, cache_dir=cache_dir)
        if isinstance(config, str) and _has_all_weights(Path(config).parent):
            return Path(config).parent
    return None


def _has_all_weights(folder: Path) -> bool:
    """Whether a download came to its end: an interrupted one is taken up again, not loaded."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return True
        index = folder / f"{single}.index.json"
        if index.is_file():
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, AttributeError, TypeError):
                return True  # complete or not, it is broken, and the loader says how
            return all((folder / str(shard)).exists() for shard in shards)
    return False


def _fetch(hub_id: str, revision: str | None, hub: Mapping[str, Any]) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        if hub.get("local_files_only"):
            raise FileNotFoundError("it is not on this machine, and local_files_only forbids to fetch it")
        names = HfApi(token=hub.get("token")).list_repo_files(hub_id, revision=revision)
        weights = "*.safetensors" if any(name.endswith(".safetensors") for name in names) else "*.bin"
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*_PATTERNS, weights], **hub))
    except Exception as error:  # the client raises many kinds; each means that there is no model here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DownloadError(
            f"cannot fetch {hub_id}: {reason}",
            hint="check the name and the network; HF_ENDPOINT names a mirror, or give the path of a local folder",
        ) from error


def _unknown(text: str) -> UsageError:
    known = [name for row in FAMILIES for name in (row.name, *row.aliases)]
    close = difflib.get_close_matches(text.lower(), known, n=1)
    return UsageError(
        f"no folder and no model is called {text!r}",
        hint=f"did you mean {close[0]}?" if close else "known models: " + ", ".join(row.name for row in FAMILIES),
    )
