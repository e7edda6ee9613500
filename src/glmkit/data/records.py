"""Read data files: attribute lists with their copy (ADGEN), named columns, and ChatGLM3 conversations.

A file is JSON Lines (one object per line) or one JSON array. Every form becomes the same thing, a `Record`: the
messages of one dialogue that ends with an answer. A file with bad rows is refused whole, and the error counts them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmkit.chat.messages import Message
from glmkit.errors import DataError, UsageError

ROLES = ("system", "user", "assistant", "observation", "tool")
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Record:
    """One dialogue to learn from or to be measured against.

    Attributes:
        messages: The dialogue in order; the last message is the assistant's.
        loss: For each message, whether an assistant message is to be learnt.
        where: File and line (or item of the array), for messages to the user.
    """

    messages: tuple[Message, ...]
    loss: tuple[bool, ...]
    where: str

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last answer."""
        return self.messages[-1].content


def read_records(
    path: str | Path, *, prompt_column: str = "content", response_column: str = "summary", limit: int | None = None
) -> list[Record]:
    """Read a data file.

    Args:
        path: A `.json` or `.jsonl` file; what it holds decides, not its name.
        prompt_column: Field with the user's text in records without `conversations`.
        response_column: Field with the answer in records without `conversations`.
        limit: Stop after this many records.

    Returns:
        The records in the order of the file.

    Raises:
        DataError: If the file is missing, is not JSON, or has bad rows; names the first of them and their number.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no data file {path}", hint="check the path; it is relative to the current folder")
    records: list[Record] = []
    problems: list[str] = []
    for where, row in _rows(path):
        if limit is not None and len(records) >= limit:
            break
        try:
            if isinstance(row, _Unreadable):
                raise DataError(row.reason)
            records.append(_record(row, where, prompt_column, response_column))
        except (DataError, UsageError) as error:
            problems.append(f"{where}: {error.message}")
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:_SHOWN_PROBLEMS])
        raise DataError(
            f"{len(problems)} of {len(problems) + len(records)} rows of {path} cannot be used:\n{shown}",
            hint=f"a row needs the fields {prompt_column!r} and {response_column!r}, or 'conversations'; "
            "only a training recipe can name other fields, with data.prompt_column= and data.response_column=",
        )
    if not records:
        raise DataError(f"{path} has no records")
    return records


@dataclass(frozen=True)
class _Unreadable:
    reason: str


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (file:line, parsed row) for JSON Lines, (file item N, row) for an array."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}", hint="save the file as UTF-8") from None
    if text.lstrip()[:1] == "[":
        try:
            items = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            line = getattr(error, "lineno", 1)
            raise DataError(f"{path}:{line}: not valid JSON: {error}") from None
        yield from ((f"{path} item {number}", item) for number, item in enumerate(items, start=1))
        return
    # Only "\n" ends a line: text may hold U+2028 and its like, which str.splitlines would cut at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            yield f"{path}:{number}", _Unreadable(f"not valid JSON: {error}")


def _record(row: Any, where: str, prompt_column: str, response_column: str) -> Record:
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be a JSON object, this is {type(row).__name__}")
    if "conversations" in row:
        return _conversation(row, where)
    for column in (prompt_column, response_column):
        if column not in row:
            raise DataError(f"no field {column!r}; the row has {', '.join(map(repr, row)) or 'none'}")
        if not isinstance(row[column], str):
            raise DataError(f"field {column!r} must be text, this is {type(row[column]).__name__}")
    messages = (Message(role="user", content=row[prompt_column]), Message("assistant", row[response_column]))
    return Record(messages, (False, True), where)


def _conversation(row: Mapping[str, Any], where: str) -> Record:
    """Turn a ChatGLM3 record into messages; a `tool` turn is a call the model makes and the answer it gets."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise DataError("'conversations' must be a list of messages that is not empty")
    messages: list[Message] = []
    loss: list[bool] = []
    tools = row.get("tools")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or turn.get("role") not in ROLES:
            found = turn.get("role") if isinstance(turn, Mapping) else turn
            raise DataError(f"message {number} has the role {found!r}; expected one of {', '.join(ROLES)}")
        learn = turn.get("loss", True)
        if not isinstance(learn, bool):
            raise DataError(f"message {number}: 'loss' must be true or false, this is {learn!r}")
        made = _tool_turn(turn, number) if turn["role"] == "tool" else [_message(turn, number)]
        messages.extend(made)
        loss.extend(learn and message.role == "assistant" for message in made)
    if tools:
        if messages[0].role == "system":
            first = messages[0]
            messages[0] = Message("system", first.content, first.metadata, first.tools or tools)
        else:
            messages.insert(0, Message("system", "", "", tools))  # the template has the sentence that announces them
            loss.insert(0, False)
    if messages[-1].role != "assistant":
        raise DataError(f"the last message must be the assistant's, this one is of role {messages[-1].role!r}")
    return Record(tuple(messages), tuple(loss), where)


def _message(turn: Mapping[str, Any], number: int) -> Message:
    content = turn.get("content")
    metadata = turn.get("metadata") or ""
    if not isinstance(content, str) or not isinstance(metadata, str):
        raise DataError(f"message {number} ({turn['role']}) must have text in 'content' and, if any, in 'metadata'")
    return Message(turn["role"], content, metadata, turn.get("tools"))


def _tool_turn(turn: Mapping[str, Any], number: int) -> list[Message]:
    name, parameters = turn.get("name"), turn.get("parameters")
    if not isinstance(name, str) or not isinstance(parameters, Mapping) or "observation" not in turn:
        raise DataError(f"message {number} (tool) needs 'name' (text), 'parameters' (object) and 'observation'")
    observation = turn["observation"]
    if not isinstance(observation, str):
        observation = json.dumps(observation, ensure_ascii=False)
    arguments = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
    call = f"```python\ntool_call({arguments})\n```"
    return [Message("assistant", call, name), Message("observation", observation)]
