"""Messages: what the parties of a conversation say, in one form for all models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glmkit.errors import UsageError

ROLES = ("system", "user", "assistant", "observation")


@dataclass(frozen=True)
class Message:
    """One message.

    Args:
        role: "system", "user", "assistant" or "observation" (what a tool answered).
        content: The text.
        metadata: The header line of an assistant message: the tool it calls, "interpreter", or nothing.
        tools: Tools the assistant may call, with a system message only: a list, or a mapping from names.
        arguments: Arguments of a call of the tool that `metadata` names, instead of content: each model's format
            writes them in its own way. A call that a model has written stays the text that it wrote.

    Raises:
        UsageError: No such role, content that is not text, or arguments without a tool or beside content.
    """

    role: str
    content: str
    metadata: str = ""
    tools: list[Any] | dict[str, Any] | None = None
    arguments: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UsageError(f"no role {self.role!r}; expected one of {', '.join(ROLES)}")
        for name in ("content", "metadata"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise UsageError(f"the {name} of a {self.role} message is {type(value).__name__}; expected text")
        if self.tools is not None and self.role != "system":
            raise UsageError(f"a {self.role} message has tools; only a system message can")
        if self.arguments is not None and (self.role != "assistant" or not self.metadata or self.content):
            raise UsageError("only an assistant message has arguments, with a tool's name as metadata and no content")


def to_messages(
    query_or_messages: str | Message | Mapping[str, Any] | Sequence[Any],
    history: Sequence[Any] | None = None,
    system: str | None = None,
) -> list[Message]:
    """Turns what people pass as a conversation into messages.

    Args:
        query_or_messages: A question, or messages: `Message` objects, mappings with role and content, or
            (question, answer) pairs.
        history: Earlier messages in any of these forms.
        system: Text of a system message in front of all.

    Returns:
        The messages in order.

    Raises:
        UsageError: Something is none of these forms, or there are two system messages.
    """
    start = [Message("system", system)] if system is not None else []
    if isinstance(query_or_messages, str):
        new = [Message("user", query_or_messages)]
    elif isinstance(query_or_messages, (Message, Mapping)):
        new = _turn(query_or_messages)
    else:
        new = _turns(query_or_messages)
    messages = start + _turns(history or []) + new
    if any(message.role == "system" for message in messages[1:]) and system is not None:
        raise UsageError("a system message is given twice: as system= and in the messages")
    return messages


def _turns(items: Any) -> list[Message]:
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise UsageError(f"messages are a {type(items).__name__}; expected a list of messages or of pairs")
    return [message for item in items for message in _turn(item)]


def _turn(item: Any) -> list[Message]:
    if isinstance(item, Message):
        return [item]
    if isinstance(item, Mapping):
        unknown = set(item) - {"role", "content", "metadata", "tools", "arguments"}
        if "role" not in item or unknown:
            found = ", ".join(map(str, item))
            raise UsageError(f"a message has the keys {found}; expected role, content, and perhaps metadata, tools")
        return [
            Message(
                item["role"],
                item.get("content", ""),
                item.get("metadata") or "",
                item.get("tools"),
                item.get("arguments"),
            )
        ]
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return [Message("user", item[0]), Message("assistant", item[1])]
    raise UsageError(
        f"a message is {item!r:.80}; expected a mapping with role and content, or a (question, answer) pair"
    )
