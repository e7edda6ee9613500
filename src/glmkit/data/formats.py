"""What a row of a data file looks like: the formats that people have, each read into the messages of one dialogue.

    adgen          {"content": q, "summary": a}                     columns    the same with other names
    alpaca         {"instruction": …, "input": …, "output": a}      alpaca_text  the same, in ChatGLM-Tuning's words
    history        {"prompt": q, "response": a, "history": [[q, a], …]}
    conversations  {"conversations": [{"role": …, "content": …}, …], "tools": […]}           ChatGLM3
    sharegpt       {"conversations": [{"from": "human", "value": …}, …], "tools": "[…]"}
    messages       {"messages": [{"role": …, "content": …, "tool_calls": […]}, …]}           OpenAI
    toolalpaca     {"NLDocumentation": …, "Instances": […]}         text       {"text": …}

A call of a tool is kept as its name and arguments; how it is written is each model's (`glmkit.chat.tools`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glmkit.chat.messages import Message
from glmkit.data import toolalpaca
from glmkit.data.dialogues import Dialogue, Row, listed, read_conversation, read_openai, read_sharegpt
from glmkit.errors import DataError, UsageError


@dataclass(frozen=True)
class Columns:
    """The fields of the format `columns`.

    Attributes:
        prompt: Field with the user's text.
        response: Field with the answer.
        history: Field with earlier [question, answer] pairs, if any.
    """

    prompt: str = "content"
    response: str = "summary"
    history: str | None = None


@dataclass(frozen=True)
class Format:
    """How rows of one form are read.

    Attributes:
        fields: What a row of this form has.
        read: Makes a dialogue of a row.
        parts: The dialogues that a row holds, as what to add to its place in the file and a row for `read`.
    """

    fields: tuple[str, ...]
    read: Callable[[Row], Dialogue]
    parts: Callable[[Row], list[tuple[str, Any]]] = lambda row: [("", row)]


def formats(columns: Columns) -> Mapping[str, Format]:
    """All formats by name.

    Args:
        columns: The fields of `columns`.
    """
    named = tuple(name for name in (columns.prompt, columns.response, columns.history) if name)
    return {
        "columns": Format(named, lambda row: _columns(row, columns)),
        "adgen": Format(("content", "summary"), lambda row: _columns(row, Columns())),
        "alpaca": Format(("instruction", "output"), lambda row: _alpaca(row, _instruction)),
        "alpaca_text": Format(("instruction", "output"), lambda row: _alpaca(row, _instruction_text)),
        "history": Format(("prompt", "response"), lambda row: _columns(row, Columns("prompt", "response", "history"))),
        "conversations": Format(("conversations",), read_conversation),
        "sharegpt": Format(("conversations",), read_sharegpt),
        "messages": Format(("messages",), read_openai),
        "toolalpaca": Format(("NLDocumentation", "Instances"), _tool_alpaca, toolalpaca.instances),
        "text": Format(("text",), _text),
    }


def recognise(row: Any, columns: Columns) -> str:
    """Tells a format by a row's fields.

    Args:
        row: The first row of a file.
        columns: Fields that were asked for by name.

    Returns:
        The name of the format.

    Raises:
        DataError: It is none; the error says what was looked for.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be a JSON object, this is {type(row).__name__}")
    for key in ("conversations", "messages"):
        if key in row:
            turns = listed(row, key)
            says_from = bool(turns) and isinstance(turns[0], Mapping) and "from" in turns[0]
            return "sharegpt" if says_from else key
    known = formats(columns)
    for name in ("columns", "alpaca", "history", "toolalpaca", "text"):
        if all(field in row for field in known[name].fields):
            return name
    looked_for = "; ".join(dict.fromkeys(", ".join(map(repr, form.fields)) for form in known.values()))
    raise DataError(
        f"no known format has the fields {', '.join(map(repr, row)) or 'of an empty row'}; looked for {looked_for}"
    )


# --- questions and answers


def _columns(row: Row, columns: Columns) -> Dialogue:
    history = _pairs(row, columns.history) if columns.history else []
    return _rounds(history, _text_field(row, columns.prompt), _text_field(row, columns.response), columns.response)


def _alpaca(row: Row, question: Callable[[str, str], str]) -> Dialogue:
    extra = row.get("input") or ""
    if not isinstance(extra, str):
        raise DataError(f"field 'input' must be text, this is {type(extra).__name__}")
    asked = question(_text_field(row, "instruction"), extra)
    dialogue = _rounds(_pairs(row, "history"), asked, _text_field(row, "output"), "output")
    system = row.get("system") or ""
    if not system:
        return dialogue
    return Dialogue((Message("system", system), *dialogue.messages), (False, *dialogue.loss))


def _instruction(instruction: str, extra: str) -> str:
    return f"{instruction}\n{extra}" if extra else instruction


def _instruction_text(instruction: str, extra: str) -> str:
    """The words of ChatGLM-Tuning, up to where the answer begins."""
    middle = f"### Input:\n{extra}\n\n" if extra else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def _rounds(history: Sequence[tuple[str, str]], question: str, answer: str, field: str) -> Dialogue:
    if not answer.strip():
        raise DataError(f"field {field!r}, the answer to learn, is empty")
    turns = [*history, (question, answer)]
    messages = tuple(message for q, a in turns for message in (Message("user", q), Message("assistant", a)))
    return Dialogue(messages, (False, True) * len(turns))


def _text(row: Row) -> Dialogue:
    text = _text_field(row, "text")
    if not text.strip():
        raise DataError("field 'text' is empty")
    return Dialogue(text=text)


def _text_field(row: Row, name: str) -> str:
    if name not in row:
        raise DataError(f"no field {name!r}; the row has {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(row[name], str):
        raise DataError(f"field {name!r} must be text, this is {type(row[name]).__name__}")
    return str(row[name])


def _pairs(row: Row, name: str) -> list[tuple[str, str]]:
    """Earlier rounds; none if the field is missing or empty."""
    if not row.get(name):
        return []
    pairs = listed(row, name)
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"field {name!r} must be a list of [question, answer] pairs of text, one is {pair!r:.80}")
    return [(pair[0], pair[1]) for pair in pairs]


def _tool_alpaca(row: Row) -> Dialogue:
    return read_conversation(toolalpaca.conversation(row))


def read_dialogue(form: Format, row: Any) -> Dialogue:
    """Reads one row.

    Args:
        form: Its format.
        row: What the file holds.

    Returns:
        What it says.

    Raises:
        DataError: It is not of this format, or has nothing to learn.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be a JSON object, this is {type(row).__name__}")
    try:
        return form.read(row)
    except UsageError as error:
        raise DataError(error.message, hint=error.hint) from None
