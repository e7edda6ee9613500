"""Checkpoints that survive a kill at any moment, a full disk and a flipped byte; no pickle anywhere.

A checkpoint is written beside its place, the manifest with sizes and SHA-256 comes last, every file is synced, one
rename publishes it, then the `latest` pointer moves, and only then are old ones deleted. Reading goes from the newest
to the oldest and takes the first whose manifest verifies.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glmkit.errors import OutputError, TrainingError
from glmkit.writing import write_folder, write_text_atomic

_STEP = re.compile(r"step-(\d+)")
_BLOCK_BYTES = 1 << 20


@contextmanager
def lock_folder(output: Path) -> Iterator[None]:
    """Hold an output folder for one run; the lock dies with the process.

    Args:
        output: The folder; made if missing.

    Raises:
        TrainingError: If it cannot be written or another run holds it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        handle = open(output / ".lock", "a+")  # noqa: SIM115 - held open as long as the lock
    except OSError as error:
        raise TrainingError(f"the output folder {output} cannot be written: {error}") from None
    with handle:
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            yield
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TrainingError(
                f"another run is writing to {output}", hint="wait for it, or choose another folder with output.dir="
            ) from None
        yield


def publish(target: Path, write: Callable[[Path], None], about: dict[str, Any] | None = None) -> None:
    """Write a folder so that it is either there whole or not at all.

    Args:
        target: The folder to make; an existing one is replaced.
        write: Fills the folder it is given.
        about: Written into `manifest.json` together with size and SHA-256 of every file; None writes no manifest.
    """
    with write_folder(target, overwrite=True) as folder:
        write(folder)
        if about is None:
            return
        listed = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        (folder / "manifest.json").write_text(json.dumps({**about, "files": listed}, indent=1))


def save_checkpoint(output: Path, step: int, run_id: str, write: Callable[[Path], None], keep: int) -> Path:
    """Publish `step-N`, point `latest` at it, and delete the oldest of this run beyond the limit.

    Args:
        output: The run's folder.
        step: Optimizer steps done.
        run_id: Marks the checkpoints of one run.
        write: Fills the folder it is given.
        keep: How many checkpoints to keep, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        TrainingError: If it cannot be written; earlier checkpoints stay.
    """
    target = output / f"step-{step}"
    try:
        publish(target, write, {"step": step, "run_id": run_id})
        write_text_atomic(output / "latest", target.name + "\n")
    except (OSError, OutputError) as error:
        raise TrainingError(
            f"checkpoint {target} could not be written: {error}", hint="free space or choose another output.dir"
        ) from error
    own = [path for path in checkpoints(output) if _manifest(path).get("run_id") == run_id]
    for old in own[keep:]:
        _discard(old)
    return target


def checkpoints(output: Path) -> list[Path]:
    """List checkpoint folders, the highest step first (by number, not by name or time)."""
    numbered = [
        (int(match[1]), path)
        for path in output.glob("step-*")
        if path.is_dir() and (match := _STEP.fullmatch(path.name))
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def newest_checkpoint(output: Path, run_id: str) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint of a run that verifies, and clean up what a killed run left.

    Args:
        output: The run's folder.
        run_id: Checkpoints of other runs are not taken.

    Returns:
        The folder or None, and one sentence for each checkpoint that was skipped.
    """
    for pattern in (".*.tmp-*", ".*.old-*", ".trash-*"):
        for leftover in output.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    skipped: list[str] = []
    for path in checkpoints(output):
        problem = _problem(path, run_id)
        if problem is None:
            return path, skipped
        skipped.append(f"{path.name}: {problem}")
    return None, skipped


def _manifest(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _problem(path: Path, run_id: str) -> str | None:
    manifest = _manifest(path)
    files = manifest.get("files")
    if not isinstance(files, dict):
        return "it has no readable manifest"
    if manifest.get("run_id") != run_id:
        return "it belongs to another run"
    for name, facts in files.items():
        file = path / name
        try:
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}"
            if _sha256(file) != facts["sha256"]:
                return f"{name} is damaged (SHA-256 differs)"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def _discard(path: Path) -> None:
    """Delete by renaming first, so that a kill leaves no half folder under a name that counts."""
    trash = path.with_name(f".trash-{uuid.uuid4().hex[:8]}")
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
