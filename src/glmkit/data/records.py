"""Read data files: JSON Lines, JSON arrays, CSV and Parquet, in every format of `glmkit.data.formats`.

Every form becomes the same thing, a `Record`. A file with bad rows is refused whole, and the error counts them and
names the first; `convert` leaves them out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from glmkit.chat.messages import Message
from glmkit.data.formats import Columns, Dialogue, Format, formats, read_dialogue, recognise
from glmkit.data.rows import Unreadable, read_rows
from glmkit.errors import DataError, OutputError, UsageError
from glmkit.writing import write_text_atomic

_SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class Record:
    """One dialogue, or one plain text, to learn from or to be measured against.

    Attributes:
        messages: The dialogue in order; the last message is the assistant's. Empty for plain text.
        loss: For each message, whether an assistant message is to be learnt.
        where: File and line, for messages to the user.
        text: Plain text, which is learnt whole.
    """

    messages: tuple[Message, ...]
    loss: tuple[bool, ...]
    where: str
    text: str = ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last answer."""
        return self.messages[-1].content if self.messages else self.text


@dataclass(frozen=True)
class Converted:
    """What became of a file that was converted.

    Attributes:
        written: Dialogues written.
        problems: What was wrong with each row that was left out, with its place.
    """

    written: int
    problems: tuple[str, ...]

    def __str__(self) -> str:
        written = f"conversations written: {self.written}, rows left out: {len(self.problems)}"
        return f"{written}\n{_shown(self.problems)}" if self.problems else written


def read_records(
    path: str | Path,
    *,
    format: str = "auto",
    prompt_column: str = "content",
    response_column: str = "summary",
    history_column: str | None = None,
    limit: int | None = None,
) -> list[Record]:
    """Read a data file.

    Args:
        path: A file of JSON Lines, one JSON array, CSV (`.csv`) or Parquet.
        format: What its rows look like, see `glmkit.data.formats`; "auto" looks at the fields of the first row.
        prompt_column: Field with the user's text, of rows that have named columns.
        response_column: Field with the answer.
        history_column: Field with earlier [question, answer] pairs, if any.
        limit: Stop after this many records.

    Returns:
        The records in the order of the file.

    Raises:
        UsageError: There is no such format.
        DataError: The file is missing, is of no known form, or has bad rows; names the first of them and their number.
    """
    columns = Columns(prompt_column, response_column, history_column)
    records, problems = _read(Path(path), format, columns, limit)
    if problems:
        raise DataError(
            f"{len(problems)} of {len(problems) + len(records)} rows of {path} cannot be used:\n{_shown(problems)}",
            hint="correct these rows, or leave them out: glm data convert FORMAT OLD.json NEW.jsonl; another form is "
            "named by data.format= in a recipe, other fields by data.prompt_column= and data.response_column=",
        )
    if not records:
        raise DataError(f"{path} has no records", hint="docs/data.md shows the forms")
    return records


def convert(format: str, source: str | Path, target: str | Path, *, overwrite: bool = False) -> Converted:
    """Writes a data file again, as JSON Lines of ChatGLM3 conversations; bad rows are left out and counted.

    Args:
        format: What the rows look like; "auto" looks at the first.
        source: The file to read.
        target: The file to write; it appears when it is complete.
        overwrite: Replace an existing file.

    Returns:
        How many were written, and what was left out.

    Raises:
        UsageError: There is no such format.
        OutputError: The target exists, or cannot be written.
        DataError: Nothing is left, or the rows are plain text.
    """
    source, target = Path(source), Path(target)
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists", hint="choose another name, or --overwrite")
    records, problems = _read(source, format, Columns(), None)
    if not records:
        raise DataError(
            f"no row of {source} can be used:\n{_shown(problems)}" if problems else f"{source} is empty",
            hint="docs/data.md shows the forms",
        )
    if any(record.text for record in records):
        raise DataError(f"{source} holds plain text, which is no conversation", hint="train on it with format text")
    rows = [json.dumps(_conversation_row(record), ensure_ascii=False) for record in records]
    write_text_atomic(target, "".join(f"{row}\n" for row in rows))
    return Converted(len(records), tuple(problems))


def _read(path: Path, name: str, columns: Columns, limit: int | None) -> tuple[list[Record], list[str]]:
    """The records of a file, and what is wrong with the rows that give none."""
    rows = read_rows(path)
    begin: list[tuple[str, Any]] = []
    for row in rows:  # up to the first that shows the form
        begin.append(row)
        if not isinstance(row[1], Unreadable):
            break
    if not begin:
        raise DataError(f"{path} has no records", hint="docs/data.md shows the forms")
    form = _format(name, *begin[-1], columns)
    records: list[Record] = []
    problems: list[str] = []
    for where, row in chain(begin, rows):
        for place, dialogue in _dialogues(form, where, row):
            if limit is not None and len(records) >= limit:
                return records, problems
            if isinstance(dialogue, DataError):
                problems.append(f"{place}: {dialogue.message}")
            else:
                records.append(Record(dialogue.messages, dialogue.loss, place, dialogue.text))
    return records, problems


def _format(name: str, where: str, row: Any, columns: Columns) -> Format:
    known = formats(columns)
    if name != "auto":
        if name not in known:
            raise UsageError(f"there is no data format {name!r}; known are auto, {', '.join(known)}")
        return known[name]
    if isinstance(row, Unreadable):
        return known["columns"]  # no row can be read; the problems are the same whatever the form
    try:
        return known[recognise(row, columns)]
    except DataError as error:
        raise DataError(
            f"{where}: {error.message}",
            hint="a recipe can name the form with data.format=, and other fields with data.prompt_column= and "
            "data.response_column=",
        ) from None


def _dialogues(form: Format, where: str, row: Any) -> Iterator[tuple[str, Dialogue | DataError]]:
    """What a row holds, each with its place: a dialogue, or what is wrong with it."""
    if isinstance(row, Unreadable):
        yield where, DataError(row.reason)
        return
    try:
        parts = form.parts(row) if isinstance(row, dict) else [("", row)]
    except DataError as error:
        yield where, error
        return
    for place, part in parts:
        try:
            yield where + place, read_dialogue(form, part)
        except DataError as error:
            yield where + place, error


def _shown(problems: list[str] | tuple[str, ...]) -> str:
    more = [f"… and {len(problems) - _SHOWN_PROBLEMS} more"] if len(problems) > _SHOWN_PROBLEMS else []
    return "\n".join(f"  - {problem}" for problem in [*problems[:_SHOWN_PROBLEMS], *more])


def _conversation_row(record: Record) -> dict[str, Any]:
    """A record in ChatGLM3's form; `read_records` reads the same record from it."""
    row: dict[str, Any] = {}
    turns: list[dict[str, Any]] = []
    messages = list(zip(record.messages, record.loss))
    while messages:
        message, learn = messages.pop(0)
        if message.tools is not None:
            row["tools"] = message.tools
            if not message.content:
                continue
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.arguments is not None:
            if messages and messages[0][0].role == "observation":
                turn = {"role": "tool", "name": message.metadata, "parameters": message.arguments}
                turn["observation"] = messages.pop(0)[0].content
            else:  # a call at the end, which has no result
                turn["metadata"] = message.metadata
                turn["content"] = json.dumps(message.arguments, ensure_ascii=False)
        elif message.metadata:
            turn["metadata"] = message.metadata
        if message.role == "assistant" and not learn:
            turn["loss"] = False
        turns.append(turn)
    return {**row, "conversations": turns}
