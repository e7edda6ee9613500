"""What models are on this machine: where each lies, how large it is, whether all of it is there; and removing them.

Only names, sizes and the configs are looked at, so that listing and completion need neither torch nor the network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmkit.downloads import hub, modelscope
from glmkit.errors import OutputError
from glmkit.families import FAMILIES, Family, find_family
from glmkit.location import builtin, has_all_weights, holds_model
from glmkit.machine import free_memory_bytes

_CONFIG_BYTES = 2**20  # far above every real one
_SCHEME = re.compile(r"[A-Za-z0-9_.+-]{1,40}")  # a config comes from anywhere, and this is shown in a terminal
# What quantising leaves of plain weights, upper bounds over the families: embeddings and output layer stay as they are.
_SHARES = {None: 1.0, "int8": 0.57, "int4": 0.385}
_CONVERSATION_BYTES = 400 * 10**6
_NETWORKS = ("chatglm", "glm", "glm130b")


@dataclass(frozen=True)
class StoredModel:
    """A model on this machine, whole or in part.

    Args:
        name: What to call it in a command.
        place: "package", "folder" (under GLMKIT_MODELS), "hub" or "modelscope" (their caches).
        path: Its folder.
        family: Name of the released model that it is; None if that cannot be told from its name.
        quantised: "int8", "int4", another scheme, or None for plain weights.
        size_bytes: On disk, parts counted.
        complete: Whether all its weights are there.
        repository: `organisation/name` in a cache; None elsewhere.
        revision: The commit, or for ModelScope the branch; None outside a cache.
    """

    name: str
    place: str
    path: Path
    family: str | None
    quantised: str | None
    size_bytes: int
    complete: bool
    repository: str | None = None
    revision: str | None = None


def stored_models() -> list[StoredModel]:
    """Lists the models of this package, of GLMKIT_MODELS, of the hub's cache and of ModelScope's.

    Returns:
        In that order, by name; of a cache only models of these families, and what may be one.
    """
    return [*_in_package(), *_in_models_folder(), *_in_hub_cache(), *_in_modelscope_cache()]


def remove(models: Iterable[StoredModel]) -> int:
    """Removes models from the caches they lie in; files that another revision still uses stay.

    Args:
        models: From `stored_models`, of the places "hub" and "modelscope".

    Returns:
        The bytes that were freed.

    Raises:
        OutputError: One lies in a folder of the user's or in this package, or the disk refuses.
    """
    models = list(models)
    for model in models:
        if model.place not in ("hub", "modelscope"):
            if model.place == "package":
                raise OutputError(f"{model.path} comes with this package", hint="glm list shows what is")
            raise OutputError(
                f"{model.path} is a folder of yours, not of a cache", hint=f"remove it by hand: rm -r {model.path}"
            )
    entries = {entry: entry_bytes(entry) for entry in map(_entry, models)}
    try:
        for entry in entries:
            _remove_from_entry(entry, [model for model in models if _entry(model) == entry])
    except OSError as error:
        raise OutputError(f"cannot remove {error.filename}: {error.strerror}") from error
    return sum(size - entry_bytes(entry) for entry, size in entries.items())


def entry_bytes(folder: Path) -> int:
    """The size of all files below a folder, links not followed; 0 if it does not exist."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            if not os.path.islink(path):
                total += os.path.getsize(path)
    return total


def partial_files() -> list[Path]:
    """What interrupted downloads left in the caches; the next attempt goes on with them."""
    places = [hub.cache_folder().glob("models--*/blobs/*.incomplete")]
    places += [modelscope.cache_folder().glob(f"{name}/**/*.incomplete") for name in ("models", "hub/models")]
    return sorted(path for place in places for path in place if path.is_file())  # not whatever else lies below


def find_stored(name: str) -> list[StoredModel]:
    """Finds a model on this machine under any of its names.

    Args:
        name: A family name or alias, the id of a repository, or a name that `stored_models` gives.
    """
    family = find_family(name)
    return [
        model
        for model in stored_models()
        if name in (model.name, model.repository) or (family is not None and model.family == family.name)
    ]


def estimate_memory(stored_bytes: int, scheme: str | None) -> int:
    """Estimates what a model's weights and a short conversation need; `glm inspect` computes it.

    Args:
        stored_bytes: Its plain weights, two bytes a number.
        scheme: "int8" or "int4" for a model that is quantised while it is loaded, None for one that is loaded as it is.

    Returns:
        Bytes, rather too many than too few.
    """
    return int(stored_bytes * _SHARES[scheme] + _CONVERSATION_BYTES)


def choose_scheme(stored_bytes: int, free_bytes: int | None) -> str | None:
    """Chooses the best format in which a model with plain weights fits into memory.

    Args:
        stored_bytes: Its weights, two bytes a number.
        free_bytes: Memory that is free; None, where nobody can tell, is taken for enough.

    Returns:
        "" for as it is, "int8", "int4", or None if none fits.
    """
    for scheme in (None, "int8", "int4"):
        if free_bytes is None or estimate_memory(stored_bytes, scheme) <= free_bytes:
            return scheme or ""
    return None


def next_step() -> tuple[str, str]:
    """What somebody who has not talked to a real model yet would best do on this machine.

    Returns:
        A command, and what it means in numbers of this machine.
    """
    free = free_memory_bytes()
    here = [model for model in stored_models() if model.place != "package" and model.complete and model.family]
    for model in here:
        row = find_family(model.family or "")
        if row is None or not row.chat or row.generation == 0:
            continue
        scheme = "" if model.quantised else choose_scheme(model.size_bytes, free)
        if scheme is not None:
            flag = f" --quantize {scheme}" if scheme else ""
            return f"glm chat {model.name}{flag}", f"it is on this machine, {model.size_bytes / 1e9:.1f} GB"
    row = find_family("chatglm3-6b")
    assert row is not None
    scheme = choose_scheme(row.bytes, free)
    if free is None:
        needs = f"{estimate_memory(row.bytes, None) / 1e9:.1f} GB of memory"
    elif scheme is None:
        row = find_family("chatglm-6b-int4") or row
        needs = f"{estimate_memory(row.bytes, None) / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free"
    else:
        form = f" as {scheme}" if scheme else ""
        needs = (
            f"{estimate_memory(row.bytes, scheme or None) / 1e9:.1f} GB of memory{form}, of {free / 1e9:.1f} GB free"
        )
    return f"glm pull {row.name}", f"fetch a real model: {row.bytes / 1e9:.1f} GB, needs {needs}"


# --- the places ---


def _in_package() -> Iterator[StoredModel]:
    for row in FAMILIES:
        if builtin(row.name).is_dir():
            yield _described(row.name, "package", builtin(row.name), row)


def _in_models_folder() -> Iterator[StoredModel]:
    root = Path(os.environ.get("GLMKIT_MODELS") or os.devnull)
    for path in _subfolders(root):
        inside = [path] if holds_model(path) else [child for child in _subfolders(path) if holds_model(child)]
        for folder in inside:
            name = folder.relative_to(root).as_posix()
            yield _described(name, "folder", folder, find_family(name.replace("--", "/")))


def _in_hub_cache() -> Iterator[StoredModel]:
    for entry in _subfolders(hub.cache_folder()):
        kind, _, rest = entry.name.partition("--")
        if kind != "models" or "--" not in rest:
            continue
        repository = rest.replace("--", "/", 1)
        yield from _of_entry(entry, "hub", repository, list(_subfolders(entry / "snapshots")))


def _in_modelscope_cache() -> Iterator[StoredModel]:
    cache = modelscope.cache_folder()
    for entry in _subfolders(cache / "models"):
        if "--" in entry.name:
            repository = entry.name.replace("--", "/", 1)
            yield from _of_entry(entry, "modelscope", repository, list(_subfolders(entry / "snapshots")))
    for old in (cache / "models", cache / "hub" / "models"):
        for owner in _subfolders(old):
            for entry in () if "--" in owner.name else _subfolders(owner):
                repository = f"{owner.name}/{entry.name.replace('___', '.')}"
                yield from _of_entry(entry, "modelscope", repository, [entry])


def _of_entry(entry: Path, place: str, repository: str, snapshots: list[Path]) -> Iterator[StoredModel]:
    """The revisions of one repository in a cache; one that has only parts of files yet has none."""
    family = find_family(repository)
    for folder in snapshots or [entry]:
        if family is None and _config(folder).get("model_type") not in _NETWORKS:
            continue
        revision = None if folder == entry else folder.name
        yield _described(family.name if family else repository, place, folder, family, repository, revision)


def _described(
    name: str,
    place: str,
    folder: Path,
    family: Family | None,
    repository: str | None = None,
    revision: str | None = None,
) -> StoredModel:
    config = _config(folder)
    complete = holds_model(folder) and (has_all_weights(folder) or not (folder / "config.json").is_file())
    parts = entry_bytes(folder.parent.parent / "blobs") if place == "hub" and not complete and revision else 0
    return StoredModel(
        name=name,
        place=place,
        path=folder,
        family=family.name if family else None,
        quantised=_quantised(config),
        size_bytes=parts or sum(path.stat().st_size for path in folder.glob("**/*") if path.is_file()),
        complete=complete,
        repository=repository,
        revision=revision,
    )


def _quantised(config: dict[str, Any]) -> str | None:
    scheme, bits = config.get("quantization_config"), config.get("quantization_bit")
    if isinstance(scheme, dict):
        name = scheme.get("scheme") or scheme.get("quant_method")
        return name if isinstance(name, str) and _SCHEME.fullmatch(name) else "unknown"
    return f"int{bits}" if isinstance(bits, int) and 0 < bits <= 32 else None


def _config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder; empty if there is none, or none that can be read."""
    try:
        if not (folder / "config.json").is_file():  # a pipe would be waited for
            return {}
        with open(folder / "config.json", "rb") as file:
            found = json.loads(file.read(_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


# --- removing ---


def _entry(model: StoredModel) -> Path:
    """The folder in a cache that is the repository's, with all its revisions."""
    return model.path if model.revision is None else model.path.parent.parent


def _remove_from_entry(entry: Path, models: list[StoredModel]) -> None:
    """Removes revisions of one repository, and what belongs to none when the last is gone.

    Links that somebody put into a cache are removed as links; what they point to is not in the cache.
    """
    cache = hub.cache_folder() if models[0].place == "hub" else modelscope.cache_folder()
    above = [folder for folder in entry.parents if folder.is_relative_to(cache) and folder != cache]
    if link := next((folder for folder in above if folder.is_symlink()), None):
        raise OutputError(f"{entry} is reached through the link {link}", hint=f"remove it by hand: rm -r {entry}")
    if entry.is_symlink() or (entry / "snapshots").is_symlink():
        (entry if entry.is_symlink() else entry / "snapshots").unlink()
        return
    if models[0].place == "hub":
        _remove_from_hub_cache(entry, [model.revision for model in models if model.revision])
    else:
        for model in models:
            _remove_folder(model.path)
    if not _subfolders(entry / "snapshots"):
        _remove_folder(entry)


def _remove_from_hub_cache(entry: Path, commits: list[str]) -> None:
    """Removes commits with the files that only they use, which the client knows to tell.

    The client would also delete what a link leads to outside of the entry, and leaves an entry alone that it finds
    damaged: links of the first kind go before it looks, and commits that it has left go after it.
    """
    from huggingface_hub import scan_cache_dir

    entry = entry.resolve()
    snapshots = [entry / "snapshots" / commit for commit in commits]
    for snapshot in snapshots:
        _remove_foreign_links(snapshot, entry / "blobs")
    known = {
        revision.commit_hash
        for repository in scan_cache_dir(entry.parent).repos
        if repository.repo_path == entry
        for revision in repository.revisions
    }
    if known & set(commits):
        scan_cache_dir(entry.parent).delete_revisions(*(known & set(commits))).execute()
    for snapshot in snapshots:
        _remove_folder(snapshot)


def _remove_foreign_links(snapshot: Path, blobs: Path) -> None:
    """Removes what is a link in a snapshot, or is one itself, and leads to no file of the entry's own."""
    inside = [Path(root) / name for root, folders, names in os.walk(snapshot) for name in (*folders, *names)]
    for path in [snapshot] if snapshot.is_symlink() else inside:
        if path.is_symlink():
            target = Path(os.path.abspath(path.parent / os.readlink(path)))
            if target.parent != blobs or not target.is_file():
                path.unlink()


def _remove_folder(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
