"""Token ids on disk: made once, found again by what they were made of, and mapped into memory instead of read.

    data file, tokenizer, template, limits -> SHA-256 -> CACHE/KEY/ data-00000-of-00001.arrow … state.json glmkit.json

A folder is what `datasets.load_from_disk` reads, and glmkit.json beside it: the key, the hash of every Arrow file and
the report of the lengths. It is built under another name and renamed, so it is whole or not there; one that is damaged
is built again. Without the package datasets everything happens in memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from glmkit.chat.messages import Message
from glmkit.chat.templates import FORMATS, conversation_ids
from glmkit.checkpoint import READ_CHUNK_BYTES
from glmkit.data.cutting import Limits
from glmkit.data.examples import Example, Examples, fingerprint
from glmkit.data.lengths import TruncationReport
from glmkit.data.records import Record, read_records
from glmkit.data.tokenising import tokenise
from glmkit.errors import DataError, GlmkitError, MissingDependencyError
from glmkit.writing import write_folder

_VERSION = 1  # of how records become ids, where no probe shows it; raise it with every change
_MANIFEST = "glmkit.json"
_KEPT = 32  # folders in the cache; the ones that were not used for longest make room
_LIMITS = {"max_source_length": "source_tokens", "max_target_length": "target_tokens", "max_length": "total_tokens"}
_PROBE = (
    Message("user", "你好 1"),
    Message("assistant", "hello，2\n"),
    Message("user", "b"),
    Message("assistant", "c"),
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Reading:
    """Everything but the tokenizer that decides the ids made of a data file.

    Attributes:
        file: The data file.
        format: What a record looks like.
        prompt_column: Field with the user's text.
        response_column: Field with the answer.
        history_column: Field with earlier rounds.
        max_records: Use only the first.
        limits: Where to cut.
        preset: How to cut, see `make_example`.
        loss_on: What is learnt, see `make_example`.
        skip_overlength: Leave out what is too long.
    """

    file: str
    format: str = "auto"
    prompt_column: str = "content"
    response_column: str = "summary"
    history_column: str | None = None
    max_records: int | None = None
    limits: Limits = field(default_factory=Limits)
    preset: str = "whole"
    loss_on: str = "answers"
    skip_overlength: bool = False

    def records(self) -> list[Record]:
        """Read the file."""
        return read_records(
            self.file,
            format=self.format,
            prompt_column=self.prompt_column,
            response_column=self.response_column,
            history_column=self.history_column,
            limit=self.max_records,
        )


class StoredExamples(Examples):
    """Examples in Arrow files, which stay on disk; a row is copied when it is asked for.

    Args:
        folder: A folder that `store` wrote.
    """

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        tables = []
        for name in manifest["files"]:
            with pa.memory_map(os.fspath(folder / name)) as source:
                tables.append(pa.ipc.open_stream(source).read_all())
        table = pa.concat_tables(tables)
        self._fingerprint: str = manifest["fingerprint"]
        self._ids, self._labels = _Lists(table.column("input_ids")), _Lists(table.column("labels"))
        self._positions = _Lists(table.column("position_ids")) if "position_ids" in table.column_names else None
        self._where, self._sep = table.column("where"), table.column("sep").to_numpy()
        self.label_tokens = table.column("label_tokens").to_numpy().astype(np.int64)
        self.lengths = self._ids.lengths()

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        positions = None if self._positions is None else self._positions[number].view(2, -1)
        return Example(
            self._ids[number],
            self._labels[number],
            int(self.label_tokens[number]),
            self._where[number].as_py(),
            int(self._sep[number]),
            positions,
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 that was taken when they were made."""
        return self._fingerprint


class _Lists:
    """A column of lists of int32, in pieces."""

    def __init__(self, column: Any) -> None:
        self._pieces = [(piece.offsets.to_numpy(), piece.values.to_numpy()) for piece in column.chunks]
        self._ends = np.cumsum([len(offsets) - 1 for offsets, _ in self._pieces]).tolist()

    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """How long each list is."""
        return np.concatenate([np.diff(offsets) for offsets, _ in self._pieces]).astype(np.int64)

    def __getitem__(self, number: int) -> torch.Tensor:
        piece = bisect_right(self._ends, number)
        offsets, values = self._pieces[piece]
        place = number - (self._ends[piece - 1] if piece else 0)
        return torch.from_numpy(values[offsets[place] : offsets[place + 1]].copy())


def examples_of(
    reading: Reading,
    tokenizer: Any,
    *,
    cache_dir: str | Path | None = None,
    processes: int = 1,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Examples, TruncationReport]:
    """Give the examples of a data file: from the cache, from a folder that was prepared on purpose, or made now.

    Several processes may ask at once: one makes them, the others wait for it.

    Args:
        reading: What to read, and how; the file may be a folder that `prepare` wrote.
        tokenizer: The model's tokenizer.
        cache_dir: Where to look and to write; None: glmkit's folder in the user's cache.
        processes: How many make ids.
        progress: Called with the number of records done and of all.
        say: Called with what the user should know.

    Returns:
        The examples and the report of their lengths.

    Raises:
        DataError: The data cannot be used, or was prepared for another tokenizer.
    """
    if Path(reading.file).is_dir():
        return _prepared(reading, tokenizer, say)
    if find_spec("datasets") is None:
        say("token ids are not kept for the next start: the package datasets is not installed")
        return _made(reading, tokenizer, processes, progress)
    key = _key(reading, tokenizer)
    cache = Path(cache_dir).expanduser() if cache_dir is not None else cache_folder()
    entry = cache / key
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{key}.lock"):
            found = _load(entry, key)
            if found is not None:
                os.utime(entry)
                return found
            examples, report = _made(reading, tokenizer, processes, progress)
            store(entry, examples, report, {"key": key}, overwrite=True)
        _make_room(cache)
        return _load(entry, key) or (examples, report)
    except OSError as error:
        problem = error.strerror or str(error)
    except GlmkitError as error:
        if isinstance(error, DataError):
            raise
        problem = error.message
    say(f"token ids are not kept for the next start: {cache}: {problem}")
    return _made(reading, tokenizer, processes, progress)


def prepare(
    reading: Reading,
    tokenizer: Any,
    folder: str | Path,
    *,
    shards: int = 1,
    processes: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TruncationReport:
    """Write the examples of a data file into a folder, for training and for `datasets.load_from_disk`.

    Args:
        reading: What to read, and how.
        tokenizer: The model's tokenizer.
        folder: The folder to write.
        shards: Arrow files to write, `data-00000-of-00008.arrow` and so on.
        processes: How many make ids.
        overwrite: Replace a folder that exists.
        progress: Called with the number of records done and of all.

    Returns:
        The report of the lengths.

    Raises:
        DataError: The data cannot be used.
        OutputError: The folder exists or cannot be written.
        MissingDependencyError: datasets is not installed.
    """
    if find_spec("datasets") is None:
        raise MissingDependencyError("datasets", "train")
    examples, report = _made(reading, tokenizer, processes, progress)
    settings = asdict(reading) | {"tokenizer": tokenizer_identity(tokenizer)}
    store(Path(folder), examples, report, {"prepared": settings}, shards=shards, overwrite=overwrite)
    return report


def store(
    folder: Path,
    examples: Examples,
    report: TruncationReport,
    about: dict[str, Any],
    *,
    shards: int = 1,
    overwrite: bool = False,
) -> None:
    """Write examples as Arrow files.

    Args:
        folder: The folder to make.
        examples: The examples.
        report: Their report.
        about: What else stands in the manifest.
        shards: Arrow files.
        overwrite: Replace a folder that exists.

    Raises:
        OutputError: The folder exists or cannot be written.
    """
    import datasets

    numbers = datasets.Sequence(datasets.Value("int32"))
    columns = {
        "input_ids": (numbers, [example.input_ids.numpy() for example in examples]),
        "labels": (numbers, [example.labels.numpy() for example in examples]),
        "label_tokens": (datasets.Value("int32"), examples.label_tokens.tolist()),
        "sep": (datasets.Value("int32"), [example.sep for example in examples]),
        "where": (datasets.Value("string"), [example.where for example in examples]),
    }
    positions = [example.position_ids for example in examples]
    if positions[0] is not None:
        columns["position_ids"] = (numbers, [one.flatten().numpy() for one in positions if one is not None])
    made = datasets.Dataset.from_dict(
        {name: values for name, (_, values) in columns.items()},
        features=datasets.Features({name: kind for name, (kind, _) in columns.items()}),
    )
    with write_folder(folder, overwrite) as building, _quiet(datasets):
        made.save_to_disk(building, num_shards=min(shards, len(examples)))
        manifest = {
            **about,
            "version": _VERSION,
            "fingerprint": fingerprint(examples),
            "files": {path.name: _sha256(path) for path in sorted(building.glob("*.arrow"))},
            "report": report.to_json(),
        }
        (building / _MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without the bars of datasets, whatever they were before."""
    shown = datasets.are_progress_bars_enabled() if hasattr(datasets, "are_progress_bars_enabled") else True
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def cache_folder() -> Path:
    """The folder in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root and Path(root).is_absolute() else Path.home() / ".cache") / "glmkit" / "examples"


def tokenizer_identity(tokenizer: Any) -> str:
    """A SHA-256 over a tokenizer's files and over what it makes of a dialogue.

    Args:
        tokenizer: A tokenizer of any family.
    """
    digest = hashlib.sha256(f"{type(tokenizer).__name__} {tokenizer.generation}".encode())
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(tokenizer.save_vocabulary(folder)):
            digest.update(_sha256(Path(path)).encode())
    if tokenizer.generation in FORMATS:
        digest.update(json.dumps(conversation_ids(tokenizer, _PROBE)).encode())
    digest.update(str(getattr(tokenizer, "tools_preamble", None)).encode())
    return digest.hexdigest()


def _key(reading: Reading, tokenizer: Any) -> str:
    path = Path(reading.file)
    content = _sha256(path) if path.is_file() else ""
    made_of = [_VERSION, asdict(reading), content, tokenizer_identity(tokenizer)]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(READ_CHUNK_BYTES):
            digest.update(chunk)
        return digest.hexdigest()


def _made(
    reading: Reading, tokenizer: Any, processes: int, progress: Progress | None
) -> tuple[Examples, TruncationReport]:
    records = reading.records()
    options = {"loss_on": reading.loss_on, "preset": reading.preset, "skip_overlength": reading.skip_overlength}
    return tokenise(tokenizer, records, reading.limits, processes=processes, progress=progress, **options)


def _load(folder: Path, key: str | None = None) -> tuple[Examples, TruncationReport] | None:
    """What a folder holds; None if it is not there, damaged, or of another key."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        whole = bool(manifest["files"]) and all(
            _sha256(folder / name) == one for name, one in manifest["files"].items()
        )
        if not whole or manifest["version"] != _VERSION or (key is not None and manifest["key"] != key):
            return None
        return StoredExamples(folder), TruncationReport.from_json(manifest["report"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _prepared(reading: Reading, tokenizer: Any, say: Callable[[str], None]) -> tuple[Examples, TruncationReport]:
    """Examples that `prepare` wrote; the limits are those of then, which is said where they differ from now."""
    folder = Path(reading.file)
    again = f"write it again: glm data prepare --model MODEL --data FILE --output {folder}"
    if not (folder / _MANIFEST).is_file():
        raise DataError(f"{folder} is a folder without {_MANIFEST}, so glm data prepare did not write it", hint=again)
    if find_spec("pyarrow") is None:
        raise MissingDependencyError("datasets", "train")
    found = _load(folder)
    if found is None:
        raise DataError(f"{folder} is damaged, or of another version of glmkit", hint=again)
    manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    if manifest.get("prepared", {}).get("tokenizer") != tokenizer_identity(tokenizer):
        raise DataError(f"{folder} was made for another tokenizer than this model's", hint=again)
    then, now = _cutting(manifest["prepared"]), _cutting(asdict(reading))
    other = ", ".join(f"data.{name}={then[name]} (now {now[name]})" for name in now if then.get(name) != now[name])
    if other:
        say(f"{folder} was made with {other}; it stays as it was made")
    examples, report = found
    if reading.max_records is not None and reading.max_records < len(examples):
        examples = Examples(examples[: reading.max_records])
    return examples, report


def _cutting(settings: dict[str, Any]) -> dict[str, Any]:
    """What decides how records are cut and learnt, of a `Reading` as a dictionary, by the names of a recipe."""
    limits = settings.get("limits") or {}
    named = {recipe: limits.get(own) for recipe, own in _LIMITS.items()}
    return named | {name: settings.get(name) for name in ("preset", "loss_on", "skip_overlength")}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes that ask for this lock; one that dies gives it back."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_room(cache: Path) -> None:
    entries = [path for path in cache.iterdir() if (path / _MANIFEST).is_file()]
    for old in sorted(entries, key=lambda path: path.stat().st_mtime, reverse=True)[_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)  # who has mapped it keeps it until the end
        old.with_name(f"{old.name}.lock").unlink(missing_ok=True)
