"""What happens in a turn with tools, for whoever shows it; and what runs code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from glmkit.chat.answers import Reply
from glmkit.chat.messages import Message

Reason = Literal["answered", "pending", "cancelled", "turns", "length", "time", "failed"]


@dataclass(frozen=True)
class Text:
    """A piece of what the model writes.

    Args:
        text: The piece.
        code: Whether it belongs to code that will be run; `CodeStarted` has that code whole.
    """

    text: str
    code: bool = False


@dataclass(frozen=True)
class CallStarted:
    """A tool is about to run.

    Args:
        name: The tool.
        arguments: What it is given.
        number: Which call of this turn it is, from 1; code counts too.
    """

    name: str
    arguments: dict[str, Any]
    number: int


@dataclass(frozen=True)
class CodeStarted:
    """Code is about to run.

    Args:
        code: The code.
        number: Which call of this turn it is, from 1; tools count too.
    """

    code: str
    number: int


@dataclass(frozen=True)
class CallEnded:
    """A tool or code has run.

    Args:
        name: The tool; "interpreter" or "python" for code.
        observation: What the model is told.
        seconds: How long it took.
        failed: Whether it failed; the observation says how.
        truncated: Whether the observation was cut.
        images: Pictures that code has drawn, PNG files.
    """

    name: str
    observation: str
    seconds: float
    failed: bool = False
    truncated: bool = False
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class CallPending:
    """The model calls a tool that the user has to answer for; the turn ends and waits for an observation.

    Args:
        name: The tool.
        arguments: What it is given.
    """

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """The turn is over; always the last event.

    Args:
        reply: The model's last answer; None if it failed before there was one.
        messages: The conversation to go on with, the system message with its tools among them.
        reason: "answered"; "pending": a call waits for an observation; "cancelled"; "turns": the most calls were made;
            "length": the answer was cut; "time": the turn took too long; "failed".
        problem: Why it failed, or why what looks like a call is none; empty if all went well.
    """

    reply: Reply | None
    messages: tuple[Message, ...]
    reason: Reason
    problem: str = ""


Event = Text | CallStarted | CodeStarted | CallEnded | CallPending | Ended


class Output(Protocol):
    """What code gave."""

    @property
    def text(self) -> str: ...
    @property
    def images(self) -> tuple[bytes, ...]: ...
    @property
    def failed(self) -> bool: ...
    @property
    def seconds(self) -> float: ...


class Interpreter(Protocol):
    """What runs code."""

    async def run(self, code: str) -> Output: ...
