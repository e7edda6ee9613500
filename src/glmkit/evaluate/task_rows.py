"""The rows of data that a task file describes, as they are asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmkit.data.rows import Unreadable, read_rows, read_text
from glmkit.errors import DataError
from glmkit.evaluate.task_file import TaskFile
from glmkit.evaluate.text import place_in

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Item:
    """A row of data, as it is asked.

    Args:
        where: Place in the file.
        group: Group of the file.
        file: Its path below the data's folder.
        text: What the model gets, or ids.
        choices: Texts, or lists of ids (mul).
        label: Number of the right choice (mul).
        targets: Right answers (gen).
    """

    where: str
    group: str
    file: str
    text: str | list[int]
    choices: list[Any] = field(default_factory=list)
    label: int = -1
    targets: list[str] = field(default_factory=list)


def read_items(description: TaskFile, folder: Path, limit: int | None = None) -> Iterator[Item]:
    """Reads the rows of a task of type mul or gen.

    Args:
        description: The task file.
        folder: Of the data.
        limit: Only the first rows.

    Yields:
        The rows, group by group and file by file, files in the order of their names.

    Raises:
        DataError: A row that cannot be used; the message names file and line.
    """
    count = 0
    for group, file in data_files(description, folder):
        for where, row in _rows(file, description.rows):
            if count == limit:
                return
            if isinstance(row, Unreadable) or not isinstance(row, Mapping):
                kind = type(row).__name__
                reason = row.reason if isinstance(row, Unreadable) else f"a row must be an object, this is {kind}"
                raise DataError(f"{where}: {reason}")
            count += 1
            try:
                yield _item(description, place_in(file, where), group, file.relative_to(folder).as_posix(), row)
            except DataError as error:
                raise DataError(f"{where}: {error.message}", hint=error.hint) from None


def document_rows(description: TaskFile, file: Path) -> Iterator[tuple[str, str]]:
    """The texts of a file of rows, for a task of type lm.

    Args:
        description: The task file: `inputs` says how rows read; without it they have `text`.
        file: JSON Lines, JSON, CSV or Parquet.

    Yields:
        Place and text.

    Raises:
        DataError: A row that has no text; the message names file and line.
    """
    for where, row in _rows(file, description.rows):
        text = _filled(description.inputs or "text", row) if isinstance(row, Mapping) else None
        if not isinstance(text, str) or not isinstance(row, Mapping) or not (description.inputs or "text" in row):
            raise DataError(
                f"{where}: no text in the field 'text'", hint="say in the task file how rows read: `inputs:`"
            )
        yield place_in(file, where), text


def data_files(description: TaskFile, folder: Path) -> list[tuple[str, Path]]:
    """The files of a task with their groups.

    Args:
        description: The task file.
        folder: Of the data.

    Returns:
        Group and path, in the order of the groups and of the paths.

    Raises:
        DataError: A group has no file.
    """
    found: list[tuple[str, Path]] = []
    for group, pattern in description.file_pattern.items():
        files = sorted(file for file in folder.glob(pattern) if file.is_file())
        if not files:
            raise DataError(
                f"the task {description.name} finds no file {pattern} below {folder}",
                hint="give the folder that `path` of the task file is below: --data FOLDER",
            )
        found += [(group, file) for file in files]
    return found


def _rows(file: Path, inside: str | None) -> Iterator[tuple[str, Any]]:
    if inside is None:
        yield from read_rows(file)
        return
    try:
        content = json.loads(read_text(file))
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}") from None
    rows = content.get(inside) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise DataError(f"{file} has no list {inside!r}, where the task file says the rows are")
    for number, row in enumerate(rows, start=1):
        yield f"{file}, item {number}", row


def _item(said: TaskFile, where: str, group: str, file: str, row: Mapping[str, Any]) -> Item:
    text = _filled(said.inputs, row) if said.inputs is not None else _official(row, "inputs")
    if not isinstance(text, str) and not _are_ids(text):
        raise DataError(f"inputs are {text!r:.60}; expected a text")
    item = Item(where, group, file, text)
    if said.type == "gen":
        targets = _filled(said.targets, row) if said.targets is not None else _official(row, "targets")
        targets = targets if isinstance(targets, list) else [targets]
        return Item(where, group, file, text, targets=[str(target) for target in targets])
    choices = _choices(said, row)
    return Item(where, group, file, item.text, choices, _label(said, row, choices))


def _filled(template: str, row: Mapping[str, Any]) -> Any:
    """A template with its fields; the name of a field alone is what the field holds."""
    if template in row:
        return row[template]
    missing = [name for name in _FIELD.findall(template) or [template] if name not in row]
    if missing:
        raise DataError(f"no field {missing[0]!r}; the row has {', '.join(map(repr, row)) or 'none'}")
    return _FIELD.sub(lambda found: _as_text(row[found[1]]), template)


def _as_text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _official(row: Mapping[str, Any], name: str) -> Any:
    """What GLM-130B's rows call it: ids under the plain name, or a text."""
    for key in (name, f"{name}_pretokenized"):
        if key in row:
            return row[key]
    raise DataError(
        f"no field '{name}_pretokenized'; the row has {', '.join(map(repr, row)) or 'none'}",
        hint=f"say in the task file how rows read: `{name}:`",
    )


def _choices(said: TaskFile, row: Mapping[str, Any]) -> list[Any]:
    if isinstance(said.choices, tuple):
        found: Any = [_filled(choice, row) if "{" in choice else choice for choice in said.choices]
    else:
        found = _filled(said.choices, row) if said.choices is not None else _official(row, "choices")
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(one, str) or _are_ids(one) for one in found):
        raise DataError(f"choices are {found!r:.60}; expected a list of at least two texts")
    return found


def _label(said: TaskFile, row: Mapping[str, Any], choices: Sequence[Any]) -> int:
    """The number of the right choice: from `labels`, or from a number, the choice itself or its letter."""
    if said.label not in row:
        raise DataError(f"no field {said.label!r}; the row has {', '.join(map(repr, row)) or 'none'}")
    value = row[said.label]
    letters = [chr(ord("A") + place) for place in range(min(len(choices), 26))]
    if said.labels:
        if str(value) in said.labels:
            return said.labels.index(str(value))
    elif type(value) is int:
        if 0 <= value < len(choices):
            return value
    elif isinstance(value, str):
        for names in (choices, letters, [str(place) for place in range(len(choices))]):
            if value in names:
                return names.index(value)
    expected = said.labels or f"a number below {len(choices)}, a letter or one of the choices"
    raise DataError(f"{said.label} is {value!r:.60}; expected {expected}")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)
