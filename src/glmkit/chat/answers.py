"""An answer, whole and while it is being written: what all front ends show, whichever kind of model writes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, runtime_checkable

from glmkit.chat.messages import Message
from glmkit.chat.tools import ToolCall
from glmkit.engine.decode import WAITING, Step
from glmkit.errors import UsageError


@runtime_checkable
class Closeable(Protocol):
    """Steps that can be ended early."""

    def close(self) -> None:
        """Ends them; after their end it is fine."""
        ...


Decode = Callable[..., Iterator[Step]]
"""What `glmkit.engine.stream` does, of a model that is known: prompt and options, stop_ids, max_new_tokens, cancel and
layout -> steps. One whose reader must not be held up gives WAITING where there is none yet."""


@dataclass(frozen=True)
class TokenUsage:
    """Tokens of one answer.

    Args:
        prompt_tokens: Tokens the model read.
        completion_tokens: Tokens it wrote, the one that ends the answer among them.
        cached_tokens: Those of the prompt that it had read before.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """How long one answer took, without the time its reader needed.

    Args:
        prefill_seconds: From the start to the first token.
        decode_seconds: All tokens after the first.
        tokens_per_second: Speed of writing, the first token aside: it came with the prompt.
    """

    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Reply:
    """An answer.

    Args:
        text: What people read: without role marks, header lines and tool calls.
        messages: The whole conversation with the answer, ready for the next question.
        finish_reason: "stop", "length" (the limit or the end of the context), "cancelled" or "tool_calls".
        usage: Tokens read and written.
        timings: Seconds and speed.
        tool_call: The tool the model wants called, if any.
        malformed: Why what looks like a tool call is none; it is in `text` then.
        dropped_turns: How many of the oldest turns the model did not see, because its context is too short for them.
        fillings: What each blank of the text got, from a model that fills blanks.
    """

    text: str
    messages: tuple[Message, ...]
    finish_reason: str
    usage: TokenUsage
    timings: Timings
    tool_call: ToolCall | None = None
    malformed: str | None = None
    dropped_turns: int = 0
    fillings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text


class Filled(str):
    """A piece of text that a model put into a blank, where all other pieces are the user's own text."""

    __slots__ = ()


class AnswerStream(ABC):
    """An answer that is being written: iterate over its pieces of text, then read `reply`.

    Closing it early, or leaving its `with` block, ends the answer where it is. A piece is empty only where the tokens
    come from a source that does not wait for them.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []  # of the engine, the last one with its usage
        self._seconds: list[float] = []  # for each token
        self._reply: Reply | None = None
        self._pieces: Generator[str, None, None] = self._write()

    @abstractmethod
    def _write(self) -> Generator[str, None, None]:
        """Gives out the pieces and sets `_reply` at the end."""

    @abstractmethod
    def _end(self) -> str:
        """Sets `_reply` from what is there; returns text that only now is known to be text."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the answer; what is there so far becomes the reply."""
        self._pieces.close()
        if self._reply is None:
            self._end()

    @property
    def reply(self) -> Reply:
        """The answer with everything about it.

        Raises:
            UsageError: It is still being written.
        """
        if self._reply is None:
            raise UsageError("the reply is still being written", hint="read it to its end, or close it, first")
        return self._reply

    def _timed(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The engine's steps; keeps how long each took, without the time that its reader needs.

        Whoever stops reading, at a stop text say, ends them: a batch engine would write on.
        """
        started = time.perf_counter()
        try:
            while (step := next(steps, None)) is not None:
                if step is WAITING:
                    yield step
                    continue
                self.steps.append(step)
                if step.finish_reason != "cancelled":
                    self._seconds.append(time.perf_counter() - started)
                yield step
                started = time.perf_counter()
        finally:
            if isinstance(steps, Closeable):
                steps.close()

    def _timings(self) -> Timings:
        count, decode_seconds = len(self._seconds), sum(self._seconds[1:])
        return Timings(
            prefill_seconds=self._seconds[0] if count else 0.0,
            decode_seconds=decode_seconds,
            tokens_per_second=(count - 1) / decode_seconds if decode_seconds else 0.0,
        )
