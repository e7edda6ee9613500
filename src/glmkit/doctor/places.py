"""Checks of folders: what is kept, what is cached, what was left half."""

from __future__ import annotations

import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glmkit.doctor.finding import Finding, Repair, fail, gigabytes, ok, shown, warn
from glmkit.downloads import hub
from glmkit.errors import GlmkitError
from glmkit.families import find_family
from glmkit.inventory import partial_files

STALE_SECONDS = 86_400.0
"""What nobody has written to for so long is nobody's any more: a day, because converting a large model takes hours."""
_TEMPORARY = re.compile(r"\..+\.tmp-[0-9a-f]{8}")  # of `glmkit.writing`
_REPLACED = re.compile(r"\.(.+)\.old-[0-9a-f]{8}")  # what had the name while a new folder got it
_SIGNS = ("config.json", "latest", "latest_checkpointed_iteration.txt")
_NO_ROOM = 10**9


@dataclass(frozen=True)
class Places:
    """The folders of this user.

    Args:
        state: What glmkit remembers: conversations, typed lines.
        cache: What glmkit has built and can build again.
        hub: Models that the hub's client has fetched.
        remote_code: Code of checkpoints that transformers copied and ran with `trust_remote_code=True`.
        models: `GLMKIT_MODELS`; None where it is not set.
    """

    state: Path
    cache: Path
    hub: Path
    remote_code: Path
    models: Path | None


def places() -> Places:
    """Finds them, by the variables that each program reads."""
    from glmkit.chat.store import state_folder

    def folder(variable: str, otherwise: Path) -> Path:
        given = os.environ.get(variable)
        return Path(given).expanduser() if given else otherwise

    home = Path.home()
    cache = folder("XDG_CACHE_HOME", home / ".cache")
    hugging_face = folder("HF_HOME", cache / "huggingface")
    models = os.environ.get("GLMKIT_MODELS")
    return Places(
        state=state_folder(),
        cache=folder("GLMKIT_CACHE", cache / "glmkit"),
        hub=hub.cache_folder(),
        remote_code=folder("HF_MODULES_CACHE", hugging_face / "modules") / "transformers_modules",
        models=Path(models).expanduser() if models else None,
    )


def state() -> Finding:
    """Whether conversations can be kept, and read by their owner only."""
    folder = places().state / "conversations"
    problem = _problem(folder)
    if problem:
        return fail(f"{shown(folder)}: {problem}; conversations are not kept", "XDG_STATE_HOME=FOLDER names another")
    if not folder.is_dir():
        return ok(f"{shown(folder)}, which the first conversation makes")
    open_to_others = stat.S_IMODE(folder.stat().st_mode) & 0o077
    if open_to_others:
        closed = Repair(f"chmod 700 {folder}", lambda: folder.chmod(0o700))
        return warn(f"{shown(folder)}: others on this machine may look into it", "glm doctor --fix", closed)
    return ok(shown(folder))


def conversations() -> Finding:
    """Whether all conversations can be opened."""
    from glmkit.chat.store import ConversationStore

    store = ConversationStore()
    found = store.list()
    if found.damaged:
        (name, why), count = next(iter(found.damaged.items())), len(found.damaged) + len(found.entries)
        return warn(
            f"{len(found.damaged)} of {count} cannot be opened, such as {name}: {why}",
            f"look at the file, then rm {store.folder / name}",
        )
    return ok(f"{len(found.entries)}, all can be opened")


def cache() -> Finding:
    """Whether native kernels can be kept, and nobody else can put some there."""
    try:
        from glmkit.kernels.cache import cache_folder

        return ok(shown(cache_folder()))
    except GlmkitError as error:
        return warn(error.message, error.hint)


def models() -> Finding:
    """Whether `GLMKIT_MODELS` names a folder, and what lies in it."""
    folder = places().models
    if folder is None:
        return ok("GLMKIT_MODELS is not set: models are named by their folder, or come from a cache")
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "is not there"
        made = Repair(f"mkdir -p {folder}", lambda: folder.mkdir(parents=True, exist_ok=True))
        return fail(
            f"GLMKIT_MODELS={folder} {what}",
            f"mkdir -p {folder}, or name another",
            *([] if folder.exists() else [made]),
        )
    try:
        inside = [one for one in folder.iterdir() if one.is_dir()]
    except OSError as error:
        return fail(f"GLMKIT_MODELS={folder}: {error.strerror}", "name another, or ask its owner")
    nested = [below for one in inside for below in (_folders(one) if not _is_model(one) else ())]
    found = [one.name for one in (*inside, *nested) if _is_model(one)]
    if not found:
        return warn(
            f"GLMKIT_MODELS={folder}: no folder in it holds a model",
            "put folders there by their names, such as chatglm3-6b",
        )
    return ok(f"{shown(folder)}: {', '.join(sorted(found))}")


def disk() -> Finding:
    """Whether there is room for a model, and for what is remembered."""
    there = places()
    big = find_family("chatglm3-6b")
    assert big is not None
    rooms = {
        name: _free(folder) for name, folder in (("hub", there.hub), ("state", there.state), ("cache", there.cache))
    }
    said = f"{gigabytes(rooms['hub'])} free for models in {shown(there.hub)}"
    tight = [name for name in ("state", "cache") if rooms[name] is not None and rooms[name] < _NO_ROOM]  # type: ignore[operator]
    if tight:
        folder = there.state if tight[0] == "state" else there.cache
        return warn(f"{gigabytes(rooms[tight[0]])} free in {shown(folder)}", "glm list shows what can be removed")
    if rooms["hub"] is not None and rooms["hub"] < big.bytes:
        return warn(
            f"{said}, and {big.name} has {gigabytes(big.bytes)}",
            "HF_HOME=FOLDER on a larger disk, or glm rm removes models from the cache",
        )
    return ok(said)


def downloads() -> Finding:
    """Whether downloads were left half."""
    parts = partial_files()
    if not parts:
        return ok("none was left half")
    size, old = sum(_size(part) for part in parts), [part for part in parts if _is_stale(part)]
    said = f"{len(parts)} left half, {gigabytes(size)}"
    if not old:
        return ok(f"{said}; the same glm pull goes on with them")
    return warn(
        f"{said}; {len(old)} were not written to for a day",
        "glm pull goes on with them, glm doctor --fix removes the old ones",
        *map(_removal, old),
    )


def leftovers() -> Finding:
    """Whether programs that were killed have left something behind: here, and where glmkit keeps things."""
    there = places()
    looked = [Path.cwd(), there.state, there.state / "conversations", there.cache / "kernels"]
    looked += [there.models] if there.models else []
    names = [Path(item.path) for folder in dict.fromkeys(looked) for item in _scan(folder)]
    replaced = [one for one in names if _REPLACED.fullmatch(one.name)]
    lost = [one for one in replaced if not _first_name(one).exists()]
    if lost:
        return warn(
            f"{lost[0]} is what was there before a replacement that was killed", f"mv {lost[0]} {_first_name(lost[0])}"
        )
    old = [one for one in names if (_TEMPORARY.fullmatch(one.name) or one in replaced) and _is_stale(one)]
    if old:
        said = ", ".join(shown(one) for one in old[:3]) + (" …" if len(old) > 3 else "")
        return warn(f"{len(old)} of killed programs: {said}", "glm doctor --fix removes them", *map(_removal, old))
    return ok("nothing was left behind")


def remote_code() -> Finding:
    """Whether code of checkpoints lies here that other programs ran, and would run again."""
    folder = places().remote_code
    found = sorted(folder.glob("**/modeling_chatglm*.py")) if folder.is_dir() else []
    if found:
        return warn(
            f"{shown(folder)} has code of {len({one.parent for one in found})} ChatGLM checkpoints, from"
            " trust_remote_code=True; glmkit never runs it, other programs would",
            f"rm -r {folder}",
        )
    return ok("no code of checkpoints is here")


# --- how it is found out ---


def _problem(folder: Path) -> str | None:
    """Why nothing can be written in a folder that is there or is to be made; None if it can."""
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        return f"{nearest} is no folder"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} cannot be written to"


def _free(folder: Path) -> int | None:
    """Free bytes of the disk that a folder is on, or will be."""
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        return shutil.disk_usage(nearest).free
    except OSError:
        return None


def _first_name(replaced: Path) -> Path:
    """What a folder was called before another got its name."""
    return replaced.with_name(_REPLACED.sub(r"\1", replaced.name))


def _is_model(folder: Path) -> bool:
    return any((folder / sign).is_file() for sign in _SIGNS)


def _folders(folder: Path) -> list[Path]:
    return [Path(item.path) for item in _scan(folder) if item.is_dir()]


def _scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            yield from found
    except OSError:
        return


def _below(path: Path) -> list[Path]:
    """A path and all that lies in it; links are not followed."""
    return [path, *(Path(root) / name for root, folders, files in os.walk(path) for name in (*folders, *files))]


def _is_stale(path: Path) -> bool:
    """Whether neither a path nor anything in it was written to for a day."""
    return time.time() - max(_changed(one) for one in _below(path)) > STALE_SECONDS


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return time.time()


def _size(path: Path) -> int:
    return sum(one.lstat().st_size for one in _below(path) if not one.is_dir())


def _removal(path: Path) -> Repair:
    def remove() -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    return Repair(f"rm -r {path}" if path.is_dir() and not path.is_symlink() else f"rm {path}", remove)
