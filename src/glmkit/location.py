"""Where a model lies: from what the user typed to a folder on this machine, fetched first if the user said so."""

from __future__ import annotations

import difflib
import os
from importlib.resources import files
from pathlib import Path

from glmkit.errors import GlmkitError, UsageError
from glmkit.families import FAMILIES, ORGANISATIONS, Family, find_family

# Files worth fetching. The tokenizer's code is read as text for signs of its generation; no python file is ever run.
_PATTERNS = ["*.json", "*.model", "*.jinja", "tokenization_chatglm.py", "modeling_chatglm.py", "LICENSE*", "MODEL_LICENSE*"]


class DownloadError(GlmkitError, OSError):
    """The hub could not be reached, or does not have what was asked for."""


def locate(name: str | os.PathLike[str], *, download: bool = False, revision: str | None = None) -> Path:
    """Finds the folder of a model.

    Looked up in this order: a folder of that path; the model that comes with this package; `GLMKIT_MODELS` (its
    folders `name`, `organisation/name` and `organisation--name`); the hub cache; the hub. A bare family name is never
    fetched silently; an explicit `organisation/name` is an order to fetch.

    Args:
        name: A folder, a family name or alias, or a hub id.
        download: Whether a family name that is not on this machine may be fetched.
        revision: Branch, tag or commit on the hub.

    Raises:
        UsageError: The name is unknown, or it would have to be fetched and `download` is False.
        DownloadError: Fetching failed.
    """
    text = os.fspath(name)
    if Path(text).is_dir():
        return Path(text)
    family = find_family(text)
    if family is not None and not family.hub_id:
        return builtin(family.name)
    if family is None and text.count("/") != 1:
        raise _unknown(text)
    for folder in _under_models_folder(text, family):
        return folder
    hub_id = text if "/" in text else family.hub_id  # type: ignore[union-attr]
    cached = _in_hub_cache(hub_id, family, revision)
    if cached is not None:
        return cached
    if "/" not in text and not download:
        assert family is not None
        raise UsageError(
            f"{family.name} is not on this machine; it would be fetched from {hub_id}, {family.bytes / 1e9:.1f} GB",
            hint=f"to fetch it: --yes, or the hub id {hub_id}; to use a folder: its path, or GLMKIT_MODELS=FOLDER",
        )
    return _fetch(hub_id, revision)


def builtin(name: str) -> Path:
    """The folder of a model that comes with this package."""
    return Path(str(files("glmkit"))) / "builtin" / name


def _under_models_folder(text: str, family: Family | None) -> list[Path]:
    root = os.environ.get("GLMKIT_MODELS")
    if not root:
        return []
    names = [text, text.replace("/", "--")]
    if family is not None:
        names += [family.name, *(f"{organisation}/{family.name}" for organisation in ORGANISATIONS)]
    return [Path(root) / name for name in names if (Path(root) / name / "config.json").is_file()]


def _in_hub_cache(hub_id: str, family: Family | None, revision: str | None) -> Path | None:
    """A complete earlier download, also one made under the organisation's other name."""
    from huggingface_hub import try_to_load_from_cache

    ids = [hub_id, *(f"{organisation}/{family.name}" for organisation in ORGANISATIONS if family is not None)]
    for candidate in dict.fromkeys(ids):
        config = try_to_load_from_cache(candidate, "config.json", revision=revision)
        if isinstance(config, str):
            folder = Path(config).parent
            if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
                return folder
    return None


def _fetch(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        names = HfApi().list_repo_files(hub_id, revision=revision)
        weights = "*.safetensors" if any(name.endswith(".safetensors") for name in names) else "*.bin"
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*_PATTERNS, weights]))
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
