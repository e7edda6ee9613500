"""Checkpoints that survive a kill at any moment, a full disk and a flipped byte; no pickle anywhere.

    .step-8.tmp-…   all processes write here, every file is forced to disk, manifest.json (sizes, SHA-256) comes last
      -> step-8     one rename publishes it
      -> latest     points at it
      -> .trash-…   only then old ones are renamed, and deleted

Reading goes from the newest to the oldest, by number, and takes the first of this run whose manifest verifies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmkit.checkpoint import open_folder
from glmkit.errors import CheckpointError, OutputError, RunRefusedError, TrainingError
from glmkit.writing import make_folder_beside, put_in_place, sync_folder, write_text_atomic

if TYPE_CHECKING:
    from glmkit.train.processes import Processes

logger = logging.getLogger("glmkit")

_STEP = re.compile(r"step-(\d{1,15})")
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-[0-9a-f]{8}|\.trash-[0-9a-f]{8}")
_RUNS_CODE = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}
# The one exception: a P-Tuning prefix in the form of the official scripts, read by the gate, which runs nothing.
_OFFICIAL_PREFIX = "pytorch_model.bin"
_BLOCK_BYTES = 1 << 20
_MOST_JSON_BYTES = 256 << 20


# Holding a folder -----------------------------------------------------------------------------------------------------


@contextmanager
def lock_folder(output: Path, processes: Processes | None = None) -> Iterator[None]:
    """Hold an output folder for one run; the lock dies with the process.

    Args:
        output: The folder; made if missing, and proved to be writable.
        processes: The first of them holds it for all.

    Raises:
        TrainingError: If it cannot be written.
        RunRefusedError: If another run holds it.
    """
    with contextlib.ExitStack() as held:
        refusal: TrainingError | None = None
        if processes is None or processes.rank == 0:
            try:
                held.enter_context(_lock(output))
            except TrainingError as error:
                refusal = error
        if processes is not None:
            told = [refusal.message, refusal.hint, isinstance(refusal, RunRefusedError)] if refusal else None
            told = processes.share(told)
            if told and refusal is None:
                refusal = (RunRefusedError if told[2] else TrainingError)(told[0], hint=told[1])
        if refusal is not None:
            raise refusal
        yield


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    try:
        output.mkdir(parents=True, exist_ok=True)
        handle = open(output / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held open as long as the lock
    except OSError as error:
        raise _not_writable(output, error) from error
    with handle:
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            fcntl = None  # type: ignore[assignment]
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.seek(0)
                holder = handle.read(200).strip()
                raise RunRefusedError(
                    f"another run is writing to {output}" + (f": {holder}" if holder else ""),
                    hint="wait for it, or choose another folder with output.dir=",
                ) from None
        try:
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            handle.flush()
            # A .lock from before may be there and open; what counts is that new folders can be made and filled.
            write_text_atomic(output / ".writable", "yes\n")
            (output / ".writable").unlink()
        except (OSError, OutputError) as error:
            raise _not_writable(output, error) from error
        yield


def _not_writable(output: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"the output folder {output} cannot be written: {_reason(error)}",
        hint="choose another folder with output.dir=, or change its rights",
    )


def space_warning(output: Path, checkpoint_bytes: int, keep: int) -> str | None:
    """Say before training if the checkpoints will not fit.

    Args:
        output: Where they will be written.
        checkpoint_bytes: What one of them will have, about.
        keep: How many are kept; while one is written there is one more.

    Returns:
        A sentence, or None if there is room, or if nobody knows.
    """
    try:
        free = shutil.disk_usage(output).free
    except OSError:
        return None
    needed = checkpoint_bytes * (keep + 1)
    if needed <= free:
        return None
    return (
        f"{output} has {free / 1e9:.1f} GB free; {keep} checkpoints of about {checkpoint_bytes / 1e9:.1f} GB and the "
        f"next one need {needed / 1e9:.1f} GB: free space, lower train.save_total_limit, or choose another output.dir="
    )


# Writing --------------------------------------------------------------------------------------------------------------


def publish(
    target: Path,
    write: Callable[[Path], None],
    about: dict[str, Any] | None = None,
    *,
    processes: Processes | None = None,
) -> None:
    """Write a folder so that it is either there whole or not at all.

    All processes agree before it gets its name: if one of them cannot write its part, none publishes.

    Args:
        target: The folder to make; an existing one is replaced.
        write: Fills the folder it is given. With several processes each calls it, and it must have gathered what it
            needs from the others before it touches the disk, or nobody could tell a failure from a slow disk.
        about: Written into `manifest.json` together with size and SHA-256 of every file; None writes no manifest.
        processes: All of them call this and write into the same folder; the first one publishes it.

    Raises:
        OutputError: If it cannot be written, by this process or another one.
    """
    folder: Path | None = None
    try:
        problem: str | None = None
        if processes is None or processes.rank == 0:
            try:
                folder = make_folder_beside(target)
            except OutputError as error:
                problem = error.message
        shared: list[Any] = ["" if folder is None else str(folder), problem]
        name, problem = shared if processes is None else processes.share(shared)
        if problem is not None:
            raise OutputError(problem)
        failed = _attempt(lambda: write(Path(name)))
        agreed = failed is None if processes is None else processes.all_agree(failed is None)
        if not agreed and failed is None:
            raise OutputError("another process could not write its part, so none was published")
        if agreed:  # else all of them raise now, and none waits for another
            if folder is not None:
                finished = folder
                failed = _attempt(lambda: _finish(finished, target, about))
            problem = None if failed is None else _reason(failed)
            problem = problem if processes is None else processes.share(problem)
            if problem is not None and failed is None:
                raise OutputError(problem)
        if failed is not None:
            raise _as_output_error(failed) from failed
    finally:
        if folder is not None and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)


def save_checkpoint(
    output: Path,
    step: int,
    run_id: str,
    write: Callable[[Path], None],
    keep: int,
    *,
    protected: Collection[int] = (),
    processes: Processes | None = None,
) -> Path:
    """Publish `step-N`, point `latest` at it, and delete the oldest of this run beyond the limit.

    Args:
        output: The run's folder.
        step: Optimizer steps done.
        run_id: Marks the checkpoints of one run.
        write: Fills the folder it is given, see `publish`.
        keep: How many checkpoints to keep; the newest stays in any case.
        protected: Steps whose checkpoints are kept beyond the limit, for instance the best one.
        processes: All of them call this and write into the same folder; the first one publishes it.

    Returns:
        The checkpoint's folder.

    Raises:
        TrainingError: If it cannot be written; earlier checkpoints stay, and the message names the newest.
    """
    target = output / f"step-{step}"
    try:
        publish(target, write, {"step": step, "run_id": run_id}, processes=processes)
        first = processes is None or processes.rank == 0
        failed = _attempt(lambda: write_text_atomic(output / "latest", target.name + "\n")) if first else None
        problem = None if failed is None else _reason(failed)
        problem = problem if processes is None else processes.share(problem)
        if problem is not None:
            raise OutputError(f"the pointer `latest` could not be moved: {problem}")
    except OutputError as error:
        left = None
        with contextlib.suppress(OSError):
            left = next(_verified(output, run_id, []), None)
        goes_on = f"{left.name} is left, and whole" if left else "no earlier checkpoint is left"
        raise TrainingError(
            f"checkpoint {target} could not be written: {error.message}; {goes_on}",
            hint="free space or mend the disk, then go on with --resume",
        ) from error
    if first:
        _rotate(output, step, run_id, keep, protected)
    return target


def _attempt(work: Callable[[], None]) -> Exception | None:
    """Do something that may fail because of the disk, and return how: other processes wait to hear of it."""
    try:
        work()
    except Exception as error:  # libraries report a full disk in many ways: OSError, RuntimeError, their own
        return error
    return None


def _as_output_error(error: Exception) -> Exception:
    """Say of a failed write that it failed; a mistake in the code stays what it is."""
    if isinstance(error, AssertionError | AttributeError | LookupError | NameError | TypeError):
        return error
    return OutputError(_reason(error))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({Path(error.filename).name})" if isinstance(error.filename, str) else error.strerror
    return str(error) or type(error).__name__


def _finish(folder: Path, target: Path, about: dict[str, Any] | None) -> None:
    """Force a folder to disk, describe it, and give it its name."""
    sync_folder(folder)
    if about is not None:
        listed = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        write_text_atomic(folder / "manifest.json", json.dumps({**about, "files": listed}, indent=1))
    put_in_place(folder, target)


def _rotate(output: Path, step: int, run_id: str, keep: int, protected: Collection[int]) -> None:
    """Delete what lies beyond the limit: the oldest of this run, never the one just written or a protected one.

    A higher number than the newest was skipped as damaged when the run went on; it neither counts nor is deleted.
    """
    try:
        older = [
            path
            for number, path in _numbered(output)
            if number < step and number not in protected and _manifest(path).get("run_id") == run_id
        ]
        for path in older[max(1, keep) - 1 :]:
            _discard(path)
    except OSError as error:  # the new one is safe; a later save tries again
        logger.warning("old checkpoints in %s could not be deleted: %s", output, _reason(error))


def _discard(path: Path) -> None:
    """Delete by renaming first, so that a kill leaves no half folder under a name that counts."""
    trash = path.with_name(f".trash-{uuid.uuid4().hex[:8]}")
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


# Reading --------------------------------------------------------------------------------------------------------------


def checkpoints(output: Path) -> list[Path]:
    """List checkpoint folders, the highest step first (by number, not by name or time)."""
    return [path for _, path in _numbered(output)]


def newest_checkpoint(output: Path, run_id: str) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint of a run that verifies, and clean up what a killed run left.

    Args:
        output: The run's folder, held by `lock_folder`.
        run_id: Checkpoints of other runs are not taken.

    Returns:
        The folder or None, and one sentence for each checkpoint that was skipped.
    """
    sweep(output)
    skipped: list[str] = []
    return next(_verified(output, run_id, skipped), None), skipped


def sweep(output: Path) -> None:
    """Delete what a killed run left half done; a folder that was moved aside and not replaced gets its name back.

    Args:
        output: The run's folder, held by `lock_folder`.
    """
    for path in sorted(output.iterdir()):
        found = _LEFTOVER.fullmatch(path.name)
        if found is None:
            continue
        with contextlib.suppress(OSError):
            if found["kind"] == "old" and not (output / found["name"]).exists():
                os.rename(path, output / found["name"])
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not JSON, no object, or far too large.
    """
    if path.stat().st_size > _MOST_JSON_BYTES:
        raise ValueError(f"{path.name} is too large")
    try:
        content = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content


def _numbered(output: Path) -> list[tuple[int, Path]]:
    found = [(int(match[1]), path) for path in output.glob("step-*") if (match := _STEP.fullmatch(path.name))]
    return sorted(((number, path) for number, path in found if path.is_dir()), reverse=True)


def _verified(output: Path, run_id: str, skipped: list[str]) -> Iterator[Path]:
    """Yield good checkpoints of a run, the newest first; a sentence for each other one goes to `skipped`."""
    for number, path in _numbered(output):
        try:
            problem = _problem(path, number, run_id)
        except OSError as error:
            problem = f"it cannot be read: {_reason(error)}"
        if problem is None:
            yield path
        else:
            skipped.append(f"{path.name}: {problem}")


def _manifest(path: Path) -> dict[str, Any]:
    try:
        return read_json(path / "manifest.json")
    except (OSError, ValueError):
        return {}


def _problem(path: Path, step: int, run_id: str) -> str | None:
    """Say why a checkpoint is not to be used, None if it is whole and ours."""
    present = sorted(file for file in path.rglob("*") if not file.is_dir() or file.is_symlink())
    for file in present:
        name = file.relative_to(path).as_posix()
        if file.is_symlink() or not file.is_file():
            return f"{name} is no regular file"
        if file.suffix.lower() in _RUNS_CODE and file.name != _OFFICIAL_PREFIX:
            return f"{name} is of a kind that can run code when it is read; no checkpoint of a run has such files"
    try:
        manifest = read_json(path / "manifest.json")
    except FileNotFoundError:
        return "it has no manifest.json"
    except ValueError as error:
        return f"its manifest cannot be used: {error}"
    files = manifest.get("files")
    if manifest.get("run_id") != run_id:
        return "it belongs to another run"
    if manifest.get("step") != step:
        return f"its manifest is that of step {manifest.get('step')}"
    if not isinstance(files, dict) or not all(isinstance(facts, dict) for facts in files.values()):
        return "its manifest cannot be used: it lists no files"
    names = {file.relative_to(path).as_posix() for file in present} - {"manifest.json"}
    for name in sorted(names ^ set(files)):
        return f"{name} is {'not in its manifest' if name in names else 'missing'}"
    for name, facts in files.items():
        size = (path / name).stat().st_size
        if size != facts.get("bytes"):
            return f"{name} has {size} bytes instead of {facts.get('bytes')}"
        if _sha256(path / name) != facts.get("sha256"):
            return f"{name} is damaged (SHA-256 differs)"
        if (path / name).name == _OFFICIAL_PREFIX:
            try:
                open_folder((path / name).parent, weights=(_OFFICIAL_PREFIX,), config=None).close()
            except CheckpointError as error:
                return f"{name} is refused: {error.problems[0]}"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
