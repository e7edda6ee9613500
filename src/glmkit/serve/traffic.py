"""The requests that are in flight: what is known about each, and how they are counted, shared out and ended."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from glmkit.serve.budgets import Budgets
from glmkit.serve.failures import APIError, retry_after


class Observer(Protocol):
    """What wants to know about requests: the metrics and the log."""

    def piece(self, seconds: float, first: bool) -> None:
        """Takes the seconds from a request's start to its first piece, or from one piece to the next."""

    def end(self, record: Record) -> None:
        """Takes a request that is over."""


@dataclass(eq=False)
class Record:
    """One request while it runs; never its text.

    Args:
        observers: Who is told.
    """

    observers: tuple[Observer, ...] = ()
    id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    owner: str = ""
    method: str = ""
    route: str = "refused"
    status: int = 0
    outcome: str = "answered"
    started: float = field(default_factory=time.monotonic)
    places: int = 0
    pieces: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    end_early: asyncio.Future[APIError] | None = None
    _last: float = 0.0

    def note_piece(self) -> None:
        """Says that a piece of the answer is there."""
        now = time.monotonic()
        for observer in self.observers:
            observer.piece(now - (self._last or self.started), self.pieces == 0)
        self._last = now
        self.pieces += 1

    def note_usage(self, prompt_tokens: int, generated_tokens: int) -> None:
        """Adds what was read and generated; for several answers it is called several times.

        Args:
            prompt_tokens: Tokens of the prompt.
            generated_tokens: Tokens of the answer.
        """
        self.prompt_tokens += prompt_tokens
        self.generated_tokens += generated_tokens

    @property
    def waits(self) -> bool:
        """Whether an answer was asked for and nothing of it is there yet."""
        return self.places > 0 and self.pieces == 0

    @property
    def seconds(self) -> float:
        """Time since it came."""
        return time.monotonic() - self.started

    def line(self) -> dict[str, object]:
        """What the log says about it: no text that a client chose, except the method."""
        return {
            "event": "request",
            "id": self.id,
            "method": self.method[:16],
            "route": self.route,
            "status": self.status,
            "outcome": self.outcome,
            "seconds": round(self.seconds, 4),
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "key": self.owner,
        }


class Traffic:
    """All requests of one application.

    Args:
        observers: Who is told about pieces and ends.
        max_buffered_bytes: Request bodies that may be in memory at once, all together.
        budgets: What each key may use in a minute; None: anything.
    """

    def __init__(
        self,
        observers: tuple[Observer, ...] = (),
        max_buffered_bytes: int = 128 * 2**20,
        budgets: Budgets | None = None,
    ) -> None:
        self.observers = observers
        self.budgets = budgets or Budgets()
        self.draining = False
        self._max_buffered_bytes = max_buffered_bytes
        self._buffered_bytes = 0
        self._records: set[Record] = set()

    @property
    def in_flight(self) -> int:
        """How many requests have come and are not over."""
        return len(self._records)

    @contextmanager
    def request(self, method: str) -> Iterator[Record]:
        """Counts a request as long as the block runs, and tells its end.

        Args:
            method: HTTP method.

        Yields:
            Its record.
        """
        record = Record(self.observers, method=method, end_early=asyncio.get_running_loop().create_future())
        self._records.add(record)
        try:
            yield record
        finally:
            self._records.discard(record)
            self.budgets.take_tokens(record.owner, record.prompt_tokens + record.generated_tokens)
            if record.end_early is not None:
                record.end_early.cancel()
            for observer in self.observers:
                observer.end(record)

    @contextmanager
    def buffer(self) -> Iterator[Buffer]:
        """Lends memory for one body as long as the block runs."""
        buffer = Buffer(self)
        try:
            yield buffer
        finally:
            self._buffered_bytes -= buffer.taken_bytes

    def take_bytes(self, number: int) -> None:
        """Takes memory for bodies.

        Args:
            number: Bytes.

        Raises:
            APIError: 503: the bodies of all requests together take too much.
        """
        if self._buffered_bytes + number > self._max_buffered_bytes:
            raise APIError(503, "too many large requests at once", code="overloaded", headers=retry_after(2))
        self._buffered_bytes += number

    def take_share(self, record: Record, places: int, most: int) -> None:
        """Gives a request places that its key may hold.

        Args:
            record: The request.
            places: How many answers it asks for.
            most: Places that all requests of one key may have together.

        Raises:
            APIError: 429: the key has too many.
        """
        held = sum(one.places for one in self._records if one.owner == record.owner and one is not record)
        if held + places > most:
            raise APIError(
                429,
                f"this key has {held} requests in flight; with {places} more it would have above {most}",
                code="key_limit",
                headers=retry_after(2),
            )
        record.places = places

    def end_all(self, error: APIError) -> None:
        """Ends every request that still runs.

        Args:
            error: What its client is told.
        """
        for record in self._records:
            if record.end_early is not None and not record.end_early.done():
                record.end_early.set_result(error)


class Buffer:
    """One request's body while it arrives, paid from what all may take."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._parts: list[bytes] = []
        self.taken_bytes = 0

    def add(self, part: bytes, most_bytes: int) -> None:
        """Appends a part.

        Args:
            part: What arrived.
            most_bytes: Longest body.

        Raises:
            APIError: 413 if the body is too long, 503 if all bodies together are.
        """
        if self.taken_bytes + len(part) > most_bytes:
            raise too_large(most_bytes)
        self._traffic.take_bytes(len(part))
        self.taken_bytes += len(part)
        self._parts.append(part)

    def whole(self) -> bytes:
        """The body."""
        return b"".join(self._parts)


def too_large(most_bytes: int) -> APIError:
    """The refusal of a body that is too long.

    Args:
        most_bytes: Longest body.
    """
    return APIError(413, f"the body is longer than {most_bytes} bytes, which is the limit", code="body_too_large")
