"""Runs a task: shares its items, writes rows as they come, goes on after a cut, and says what all of them mean.

    items        the same list in every process
    units        of batch_size x 4 items, by their numbers alone: unit k has the items from k x size on
    answers      unit k is answered by process k modulo their number, whole, with the same neighbours in its batches,
                 so its rows are the same whoever answers it
    parts        part-RANK.jsonl gets a line for each unit as soon as it is answered
    the end      process 0 joins the parts in the order of the items, measures, and writes results.json

`evaluation.json` says what the rows in a folder belong to; a call that would answer otherwise is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from glmkit.errors import DataError
from glmkit.evaluate.results import RESULTS_FILE, Results, interval, read_results, write_results
from glmkit.evaluate.tasks import Row, Task
from glmkit.loading import Loaded
from glmkit.parallel import Ranks
from glmkit.writing import write_text_atomic

BATCHES_PER_UNIT = 4  # long enough to sort by length, short enough to lose little when cut
_IDENTITY_FILE = "evaluation.json"
_PACKAGES = ("glmkit", "torch", "transformers", "tokenizers", "numpy", "jieba")
_HASHED_NUMBERS = 64  # of each tensor; a model that was trained or merged differs in the first ones too
_LONGEST_WAIT = timedelta(days=7)  # for the process that has the longest answers


@dataclass(frozen=True)
class Answers:
    """The rows of all items.

    Args:
        rows: In the order of the items.
        before: How many of them an earlier call had answered.
        seconds: What this call took.
    """

    rows: list[Row]
    before: int
    seconds: float


def run(
    task: Task,
    loaded: Loaded,
    folder: str | Path,
    *,
    settings: Mapping[str, Any],
    limit: int | None = None,
    identity: Mapping[str, Any] | None = None,
    data: str | Path | None = None,
    data_files: Sequence[str | Path] = (),
    ranks: Ranks | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Measures a model, or goes on where an earlier call with the same arguments was cut.

    Args:
        task: What is asked.
        loaded: The model.
        folder: Where rows and results are written.
        settings: How items are answered, as plain values; a call that goes on must have the same.
        limit: Only the first items; a task may have applied it already.
        identity: What else a call that goes on must have in common, such as dtype and adapter. Weights and items are
            compared in any case.
        data: Path of the data, whose hash is noted.
        data_files: Files that belong to it and stand elsewhere; they are hashed with it.
        ranks: The processes of this run; None: this one alone.
        progress: Called with how many items are done and how many this process will have seen at the end.

    Returns:
        What results.json says, in every process.

    Raises:
        DataError: The data cannot be used, or the folder holds answers of another model or to other items or settings.
    """
    folder, ranks = Path(folder), ranks or Ranks(0, 1, loaded.device)
    items = task.items(loaded)[:limit]
    if not items:
        raise DataError(f"{data or 'the data'} has no items for the task {task.name}", hint="check --data and --limit")
    weights = weights_hash(loaded.model)
    same = {**(identity or {}), "task": task.name, "weights": weights, **settings}
    found = answer_items(
        task, loaded, items, folder, rows_file=folder / task.rows_file, identity=same, ranks=ranks, progress=progress
    )
    group = _Group(ranks)
    if ranks.rank == 0:
        answered = len(items) - found.before
        seconds, pace = round(found.seconds, 3), round(answered / found.seconds, 3) if found.seconds else 0.0
        if not answered and (folder / RESULTS_FILE).exists():  # the earlier call's time is what the answers took
            earlier = read_results(folder)
            seconds, pace = earlier.seconds, earlier.items_per_second
        write_results(
            folder,
            Results(
                task=task.name,
                figures={figure.name: interval(figure) for figure in task.figures(found.rows)},
                notes=dict(task.notes(found.rows)),
                model=_model(loaded, weights),
                adapter=_plain(loaded.adapter),
                settings=json.loads(json.dumps({"batch_size": task.batch_size, **settings}, default=_plain)),
                seed=settings.get("seed"),
                command=_command(),
                versions=_versions(),
                data=None if data is None else {"path": str(data), "sha256": data_hash(data, *data_files)},
                items=len(items),
                rows_file=task.rows_file,
                processes=ranks.degree,
                seconds=seconds,
                items_per_second=pace,
            ),
        )
    group.wait()
    return read_results(folder)


def answer_items(
    task: Task,
    loaded: Loaded,
    items: Sequence[Any],
    folder: Path,
    *,
    rows_file: Path,
    identity: Mapping[str, Any],
    ranks: Ranks,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Answers items that no earlier call has answered, and writes the rows of all.

    Args:
        task: Answers them.
        loaded: The model.
        items: All of them, the same in every process.
        folder: Where parts and what they belong to are noted.
        rows_file: The file that gets a line of JSON for each item when all are answered.
        identity: What the rows depend on besides the items, as plain values.
        ranks: The processes of this run.
        progress: Called with how many items are done and how many this process will have seen at the end.

    Returns:
        The rows, in every process.

    Raises:
        DataError: The folder holds answers that were made otherwise.
    """
    started = time.monotonic()
    size = task.batch_size * BATCHES_PER_UNIT
    group = _Group(ranks)
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        own = {**identity, "batch_size": task.batch_size, "records": items_hash(items)}
        _check_identity(folder, rows_file, own)
    group.wait()
    done = _earlier(folder, rows_file, size, len(items))
    before = sum(map(len, done.values()))
    group.wait()  # nobody writes before all have read
    missing = [first for first in range(0, len(items), size) if first not in done]
    mine = missing[ranks.rank :: ranks.degree]
    total = before + sum(min(size, len(items) - first) for first in mine)
    seen = before
    if mine:
        with open(folder / f"part-{ranks.rank}.jsonl", "a", encoding="utf-8") as lines:
            for first in mine:
                members = items[first : first + size]
                report = None if progress is None else _shifted(progress, seen, total)
                rows = task.answer(loaded, members, first, report)
                seen += len(members)
                lines.write(_line({"first": first, "rows": rows}))
                lines.flush()
    group.wait()
    done = _earlier(folder, rows_file, size, len(items))
    rows = [row for first in sorted(done) for row in done[first]]
    group.wait()  # nobody joins the parts before all have read them
    if ranks.rank == 0:
        text = "".join(map(_line, rows))
        write_text_atomic(rows_file, text)
        for part in _parts(folder):
            part.unlink()
    return Answers(rows, before, time.monotonic() - started)


def share(ranks: Ranks, value: str) -> str:
    """Gives all processes what process 0 has.

    Args:
        ranks: The processes.
        value: A text, such as the name of a folder.

    Returns:
        That of process 0.
    """
    if ranks.degree == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=dist.new_group(backend="gloo"), device=torch.device("cpu"))
    return values[0]


def _shifted(progress: Callable[[int, int], None], start: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(start + done, total)


class _Group:
    """How the processes wait for each other: over gloo, for as long as it takes."""

    def __init__(self, ranks: Ranks) -> None:
        self._group: Any = None
        if ranks.degree > 1:
            self._group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)

    def wait(self) -> None:
        """Waits for all processes."""
        if self._group is not None:
            dist.barrier(group=self._group)


# Files ---------------------------------------------------------------------------------------------------------------


def _line(row: Row) -> str:
    """A row as a line of JSON."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which a record may have and UTF-8 has not
        text = json.dumps(row)
    return text + "\n"


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.jsonl"))


def _earlier(folder: Path, rows_file: Path, size: int, items: int) -> dict[int, list[Row]]:
    """The whole units that are written, by the number of their first item."""
    found: dict[int, list[Row]] = {}
    rows = list(_rows(rows_file))
    if len(rows) > items:
        raise DataError(
            f"{rows_file} has {len(rows)} rows, and there are {items} items",
            hint="choose another output folder, or delete this file",
        )
    for first in range(0, items, size):
        if len(rows) >= min(first + size, items):
            found[first] = rows[first : first + size]
    for part in _parts(folder):
        for unit in _rows(part):
            first, own = unit.get("first", -1), unit.get("rows", [])
            if first not in range(0, items, size) or len(own) != min(size, items - first):
                raise DataError(f"{part} holds no unit of these items", hint="choose another output folder")
            found.setdefault(first, own)
    return found


def _rows(file: Path) -> Iterator[Row]:
    """The rows of a file; a last line that was cut is left out, and taken from the file so that lines can follow."""
    if not file.exists():
        return
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise DataError(
                f"{file}:{number} is no row of JSON", hint="choose another output folder, or delete this file"
            )
        yield row
    if whole < len(data):
        with open(file, "r+b") as stream:
            stream.truncate(whole)


def _check_identity(folder: Path, rows_file: Path, identity: Mapping[str, Any]) -> None:
    """Notes what the rows of a folder belong to, or compares it with what was noted."""
    file = folder / _IDENTITY_FILE
    now = json.loads(json.dumps(identity, default=_plain))
    if not rows_file.exists() and not _parts(folder):
        write_text_atomic(file, json.dumps(now, ensure_ascii=False, indent=1) + "\n")
        return
    try:
        before = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise DataError(
            f"{folder} holds predictions, and no {_IDENTITY_FILE} that says of which model",
            hint="choose another output folder",
        ) from None
    differences = [
        f"{key}: {before.get(key)!r} then, {now.get(key)!r} now"
        for key in dict.fromkeys([*now, *before])
        if before.get(key) != now.get(key)
    ]
    if differences:
        raise DataError(
            f"the predictions in {folder} were made differently ({_IDENTITY_FILE}):\n"
            + "\n".join(f"  - {one}" for one in differences),
            hint="choose another output folder",
        )


# What is noted -------------------------------------------------------------------------------------------------------


def items_hash(items: Sequence[Any]) -> str:
    """Stands for what is asked.

    Args:
        items: Plain values, and dataclasses of them.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, default=_plain).encode() + b"\n")
    return digest.hexdigest()[:16]


def weights_hash(model: Any) -> str:
    """Stands for config and weights: names, sizes, dtypes and the first numbers of all tensors, so no long reading.

    Args:
        model: The model, with its adapter if it has one.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        first = tensor.detach().reshape(-1)[:_HASHED_NUMBERS].cpu()
        digest.update(first.contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(model.config.to_json_string().encode())
    return digest.hexdigest()[:16]


def data_hash(path: str | Path, *others: str | Path) -> str:
    """Hashes a file, or the names and contents of all files of a folder.

    Args:
        path: File or folder.
        *others: Files whose contents count, too.

    Returns:
        SHA-256, 64 hexadecimal digits.

    Raises:
        DataError: It cannot be read.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    try:
        for file in [*files, *map(Path, others)]:
            if path.is_dir():
                digest.update(f"{file.relative_to(path).as_posix()}\n".encode())
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON has no form for."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool, list, tuple)):
        return value
    raise TypeError(f"{type(value).__name__} is no plain value")


def _model(loaded: Loaded, weights: str) -> dict[str, Any]:
    return {
        "path": str(loaded.path),
        "family": None if loaded.family is None else loaded.family.name,
        "weights": weights,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.device),
    }


def _command() -> str:
    """What was typed."""
    name = Path(sys.argv[0]).name
    return shlex.join([*(("python", "-m", "glmkit") if name == "__main__.py" else (name,)), *sys.argv[1:]])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
