"""The rows of a data file, each with its place: JSON Lines, a JSON array, CSV, Parquet.

What a file holds decides, not its name; only CSV, which can look like anything, is known by its name.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmkit.errors import DataError, MissingDependencyError

_PARQUET_MARK = b"PAR1"
_BLANK = " \t\r\n"


@dataclass(frozen=True)
class Unreadable:
    """A row that is none.

    Attributes:
        reason: What is wrong with it.
    """

    reason: str


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Reads the rows of a file, one after the other.

    Args:
        path: The file.

    Yields:
        The place of a row, and what it holds: for CSV a mapping from the names in the first line to text, for Parquet
        a mapping to values, for JSON anything, and `Unreadable` for what cannot be read. Places are `file:line`; with
        the number of the item in a JSON array, and `file, row N` in Parquet.

    Raises:
        DataError: There is no such file, it is not UTF-8, or is no Parquet file inside.
        MissingDependencyError: pyarrow is needed and not installed.
    """
    if not path.is_file():
        raise DataError(f"there is no data file {path}", hint="check the path; it is relative to the current folder")
    with path.open("rb") as file:
        start = file.read(len(_PARQUET_MARK))
    if start == _PARQUET_MARK:
        return _parquet(path)
    if path.suffix.lower() == ".csv":
        return _csv(path)
    text = read_text(path)
    return _array(path, text) if text.lstrip(_BLANK)[:1] == "[" else _lines(path, text)


def read_text(path: Path) -> str:
    """Reads a text, with its line ends as they are and without a byte order mark.

    Args:
        path: The file.

    Raises:
        DataError: It is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}", hint="save the file as UTF-8") from None


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # Only "\n" ends a line: text may hold U+2028 and its like, which str.splitlines would cut at.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"{path}:{number}", Unreadable(f"not valid JSON: {error}")


def _array(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Items one by one, so that each has its line; behind one that cannot be read nothing can be found."""
    decoder = json.JSONDecoder()
    position = _skip_blank(text, text.index("[") + 1)
    line, counted = 1, 0
    number = 0
    closed = text[position : position + 1] == "]"
    while not closed:
        number += 1
        line += text.count("\n", counted, position)
        counted = position
        try:
            item, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield f"{path}:{getattr(error, 'lineno', line)}", Unreadable(f"not valid JSON: {error}")
            return
        yield f"{path}:{line}, item {number}", item
        position = _skip_blank(text, position)
        closed = text[position : position + 1] == "]"
        if not closed:
            if text[position : position + 1] != ",":
                line += text.count("\n", counted, position)
                yield f"{path}:{line}", Unreadable(f"not valid JSON: expected , or ] behind item {number}")
                return
            position = _skip_blank(text, position + 1)
    position = _skip_blank(text, position + 1)
    if position < len(text):
        line += text.count("\n", counted, position)
        yield f"{path}:{line}", Unreadable(f"not valid JSON: {text[position : position + 40]!r} behind the array's end")


def _skip_blank(text: str, position: int) -> int:
    while position < len(text) and text[position] in _BLANK:
        position += 1
    return position


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # a cell may hold a whole dialogue
    reader = csv.reader(_csv_lines(path), strict=True)
    names: list[str] = []
    while True:
        line = reader.line_num + 1  # at which the row begins; a quoted text may go over several
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield f"{path}:{line}", Unreadable(f"not valid CSV: {error}")
            return
        if cells is None:
            return
        if not cells:
            continue
        if not names:
            names = cells
            continue
        if len(cells) != len(names):
            reason = f"{len(cells)} cells, expected {len(names)}: {', '.join(names)}"
            yield f"{path}:{line}", Unreadable(reason)
        else:
            yield f"{path}:{line}", dict(zip(names, cells))


def _csv_lines(path: Path) -> Iterator[str]:
    """Lines with their ends, as csv wants them, cut at newlines only."""
    text = read_text(path)
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        yield text[start:end]
        start = end


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingDependencyError("pyarrow", "train") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", _without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no whole Parquet file: {error}", hint="copy it again") from None


def _without_nulls(value: Any) -> Any:
    """A value of Parquet without the fields that are null: an object there has all fields that any of its kind has."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
