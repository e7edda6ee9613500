"""Dialogues as data files hold them: ChatGLM3's conversations, from/value turns, and OpenAI's messages.

All become the messages that are said and which of them are learnt. A call of a tool is kept as its name and arguments,
followed by its result; how a call is written is each model's (`glmkit.chat.tools`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glmkit.chat.messages import ROLES, Message
from glmkit.chat.tools import GLM4_BUILT_IN, INTERPRETER, ToolCallError, parse_json_call, parse_tool_call
from glmkit.errors import DataError

Row = Mapping[str, Any]
_TEXT_TOOLS = frozenset({INTERPRETER, *GLM4_BUILT_IN})  # what follows their header line is text, not a call
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "observation",
    "tool": "observation",
    "function_call": "call",
}


@dataclass(frozen=True)
class Dialogue:
    """What one row says.

    Attributes:
        messages: The messages in order; the last is the assistant's. Empty for plain text.
        loss: For each message, whether it is learnt; only the assistant's are.
        text: Plain text, which is learnt whole.
    """

    messages: tuple[Message, ...] = ()
    loss: tuple[bool, ...] = ()
    text: str = ""


def listed(row: Row, name: str) -> list[Any]:
    """A field that is a list, or JSON text of one, as files of columns have it."""
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"field {name!r} is text that is no JSON: {value[:80]!r}") from None
    if not isinstance(value, list):
        raise DataError(f"field {name!r} must be a list, this is {type(value).__name__}")
    return value


class _Messages:
    """The messages of a dialogue while they are collected."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.loss: list[bool] = []

    def add(self, message: Message, learn: bool = True) -> None:
        """Takes a message; `learn` counts for the assistant's only."""
        learn = learn and message.role == "assistant"
        if learn and message.arguments is None and not message.content.strip():
            raise DataError(f"message {len(self.messages) + 1}, an answer to learn, is empty")
        self.messages.append(message)
        self.loss.append(learn)

    def dialogue(self, tools: Any) -> Dialogue:
        """Ends it; tools join the system message, as they do when the model is asked."""
        if tools:
            if self.messages and self.messages[0].role == "system":
                first = self.messages[0]
                self.messages[0] = Message("system", first.content, first.metadata, first.tools or tools)
            else:
                self.messages.insert(0, Message("system", "", "", tools))  # the templates have a sentence for it
                self.loss.insert(0, False)
        if not self.messages or self.messages[-1].role != "assistant":
            found = self.messages[-1].role if self.messages else "none"
            raise DataError(f"the last message must be the assistant's, this one is of role {found!r}")
        return Dialogue(tuple(self.messages), tuple(self.loss))


def _turns(row: Row, *names: str) -> list[tuple[int, Row]]:
    """The turns of a dialogue with their numbers, from 1."""
    name = next((name for name in names if name in row), names[0])
    turns = listed(row, name)
    if not turns:
        raise DataError(f"{name!r} must be a list of messages that is not empty")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise DataError(f"message {number} is {type(turn).__name__}, expected an object")
    return list(enumerate(turns, start=1))


def _tools(value: Any) -> Any:
    """Tools as a list or mapping, which some files hold as JSON text; None if there are none."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise DataError(f"'tools' is text that is no JSON: {value[:80]!r}") from None
    if value is not None and not isinstance(value, (list, dict)):
        raise DataError(f"'tools' must be a list or an object, this is {type(value).__name__}")
    return value or None


def _learn(turn: Row, number: int) -> bool:
    learn = turn.get("loss")
    if not isinstance(learn, (bool, type(None))):
        raise DataError(f"message {number}: 'loss' must be true or false, this is {learn!r}")
    return learn is not False


def read_conversation(row: Row) -> Dialogue:
    """ChatGLM3's form; a `tool` turn is a call that the model makes and the answer that it gets."""
    said = _Messages()
    for number, turn in _turns(row, "conversations"):
        role = turn.get("role")
        if role not in (*ROLES, "tool"):
            raise DataError(f"message {number} has the role {role!r}; expected one of {', '.join((*ROLES, 'tool'))}")
        learn = _learn(turn, number)
        if role == "tool":
            name, parameters = turn.get("name"), turn.get("parameters")
            if not isinstance(name, str) or not name or not isinstance(parameters, dict) or "observation" not in turn:
                raise DataError(f"message {number} (tool) needs 'name' (text), 'parameters' (object) and 'observation'")
            said.add(Message("assistant", "", name, arguments=parameters), learn)
            said.add(Message("observation", _observation(turn["observation"])))
            continue
        content, metadata = turn.get("content"), turn.get("metadata") or ""
        if not isinstance(content, str) or not isinstance(metadata, str):
            raise DataError(f"message {number} ({role}) must have text in 'content' and, if any, in 'metadata'")
        message = Message(role, content, metadata, _tools(turn.get("tools")))
        said.add(_read_call(message), learn)
    return said.dialogue(_tools(row.get("tools")))


def _read_call(message: Message) -> Message:
    """A call that stands there as ChatGLM3 or GLM-4 writes it, by its arguments, so that each can write its own."""
    if message.role != "assistant" or not message.metadata or message.metadata in _TEXT_TOOLS:
        return message
    for read in (parse_tool_call, parse_json_call):
        try:
            return Message("assistant", "", message.metadata, arguments=read(message.content))
        except ToolCallError:
            continue
    return message


def _observation(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_sharegpt(row: Row) -> Dialogue:
    """Turns with from and value, of dialogues as tools for tuning write them."""
    said = _Messages()
    if row.get("system"):
        said.add(Message("system", row["system"]))
    for number, turn in _turns(row, "conversations", "messages"):
        speaker, value = turn.get("from"), turn.get("value")
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise DataError(f"message {number} is from {speaker!r}; expected one of {', '.join(_SHAREGPT_ROLES)}")
        if role == "call":
            said.add(_call(value, f"message {number} (function_call)"))
        elif role == "observation":
            said.add(Message("observation", _observation(value)))
        elif isinstance(value, str):
            said.add(Message(role, value))
        else:
            raise DataError(f"message {number} ({speaker}) must have text in 'value', this is {type(value).__name__}")
    return said.dialogue(_tools(row.get("tools")))


def _call(value: Any, place: str) -> Message:
    """A call given as {"name": …, "arguments": …}, or as JSON text of that, the arguments perhaps JSON text again.

    Some files say `parameters` for the arguments; a call without any may have null there.
    """
    value = _parsed(value, place)
    if isinstance(value, list):
        if len(value) != 1:
            raise DataError(
                f"{place} holds {len(value)} calls and one result; give each call its own turn and its own result"
            )
        value = value[0]
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"]:
        raise DataError(f"{place} needs 'name' (text) and 'arguments' (object), this is {value!r:.80}")
    arguments = _parsed(value.get("arguments", value.get("parameters")), place)
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise DataError(f"{place}: the arguments of {value['name']} must be an object, this is {arguments!r:.80}")
    return Message("assistant", "", value["name"], arguments=arguments)


def _parsed(value: Any, place: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else {}
    except (ValueError, RecursionError):
        raise DataError(f"{place} is text that is no JSON: {value[:80]!r}") from None


def read_openai(row: Row) -> Dialogue:
    """Messages as in the API. Calls made at once become calls one after the other, each with its result.

    Files for GLM-4's own script have the role observation, behind a call that is text; that text stays as it is.
    """
    said = _Messages()
    waiting: list[tuple[str | None, Message, bool]] = []  # calls without a result so far: id, call, whether learnt
    for number, turn in _turns(row, "messages", "conversations"):
        role = turn.get("role")
        place = f"message {number} ({role})"
        if role in ("tool", "function") or (role == "observation" and waiting):
            call = _answered(waiting, turn, place)
            said.add(call[1], call[2])
            said.add(Message("observation", _content(turn, place)))
            continue
        if waiting:
            raise DataError(f"{place} comes before the result of the call of {waiting[0][1].metadata}")
        if role == "user":
            said.add(Message("user", _content(turn, place)))
        elif role in ("system", "developer"):
            said.add(Message("system", _content(turn, place), tools=_tools(turn.get("tools"))))
        elif role == "observation":
            said.add(Message("observation", _content(turn, place)))
        elif role == "assistant":
            waiting = _assistant(said, turn, place)
        else:
            expected = "system, user, assistant, tool or observation"
            raise DataError(f"message {number} has the role {role!r}; expected {expected}")
    if len(waiting) > 1:
        raise DataError(f"the last message calls {len(waiting)} tools at once; GLM calls one and waits for its result")
    for _, message, learn in waiting:
        said.add(message, learn)
    return said.dialogue(_tools(row.get("tools") or row.get("functions")))


def _assistant(said: _Messages, turn: Row, place: str) -> list[tuple[str | None, Message, bool]]:
    """Adds what the assistant says; returns the calls that it makes."""
    weight = turn.get("weight")
    if weight not in (0, 1, None):
        raise DataError(f"{place}: 'weight' must be 0 or 1, this is {weight!r}")
    learn = weight != 0
    given = turn.get("tool_calls") or []
    if not isinstance(given, list) or not all(isinstance(call, Mapping) for call in given):
        raise DataError(f"{place}: 'tool_calls' must be a list of objects")
    calls = [(call.get("id"), _call(call.get("function"), place), learn) for call in given]
    if turn.get("function_call"):
        calls.append((None, _call(turn["function_call"], place), learn))
    content = _content(turn, place)
    if content.strip() or not calls:
        said.add(Message("assistant", content), learn)
    return calls


def _answered(
    waiting: list[tuple[str | None, Message, bool]], turn: Row, place: str
) -> tuple[str | None, Message, bool]:
    """Takes the call that a result belongs to: by its id, else the first."""
    wanted = turn.get("tool_call_id")
    for index, (call_id, _, _) in enumerate(waiting):
        if wanted is None or call_id is None or call_id == wanted:
            return waiting.pop(index)
    raise DataError(f"{place} is the result of no call before it{f', its id is {wanted!r}' if wanted else ''}")


def _content(turn: Row, place: str) -> str:
    """Text, nothing, or a list of parts that are text."""
    content = turn.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": "" if content is None else content}]
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"{place}: the content must be text, this is {part!r:.80}")
    return "".join(part["text"] for part in parts)
