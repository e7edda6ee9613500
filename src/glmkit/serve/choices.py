"""Several answers to one request: begun together, followed together, and ended together."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import StreamingResponse

from glmkit.chat.answers import Reply
from glmkit.chat.following import Following
from glmkit.engine.sampling import row_seed
from glmkit.errors import ContextLengthError, UsageError
from glmkit.serve.catalogue import Target
from glmkit.serve.failures import APIError, server_closing
from glmkit.serve.shapes import CachedTokens, Sampling, StreamOptions, Usage
from glmkit.serve.traffic import Record

_LOOK_SECONDS = 0.25  # how often a request is looked at whose answer is begun but has no text yet
_AHEAD = 64  # pieces that wait for a slow reader

Begin = Callable[[int], Awaitable[Following]]
"""Begins the answer of a number."""

_Queue = asyncio.Queue[tuple[int, str | Exception | None]]


class Choices:
    """The answers of one request.

    Args:
        begin: Begins one.
        count: How many.
        record: What is told that pieces are there.
    """

    def __init__(self, begin: Begin, count: int, record: Record) -> None:
        self._begin, self._count, self._record = begin, count, record
        self._stack = AsyncExitStack()
        self.followings: list[Following] = []
        self._noted: set[int] = set()

    async def __aenter__(self) -> Choices:
        try:
            for number in range(self._count):
                self.followings.append(await self._stack.enter_async_context(await self._begin(number)))
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._stack.aclose()
        for number in range(len(self.followings)):
            if number not in self._noted:  # its client left, or its time was over; it was computed all the same
                self._note_usage(number)

    async def pieces(self) -> AsyncIterator[tuple[int, str | None]]:
        """The answers' pieces as they come: (number, text), and (number, None) at the end of each."""
        queue: _Queue = asyncio.Queue(_AHEAD)
        tasks = [asyncio.create_task(self._follow(number, queue)) for number in range(self._count)]
        tasks.append(asyncio.create_task(self._note_beginning()))
        left = self._count
        try:
            while left:
                number, what = await queue.get()
                if isinstance(what, Exception):
                    raise what
                left -= what is None
                yield number, what
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def replies(self) -> list[Reply]:
        """Waits for all of them."""
        async for _ in self.pieces():
            pass
        return [self.reply(number) for number in range(self._count)]

    def reply(self, number: int) -> Reply:
        """An answer that is whole.

        Args:
            number: Which.

        Raises:
            APIError: 503: the server ended it.
        """
        reply = self.followings[number].reply
        if reply.finish_reason == "cancelled":
            raise server_closing()
        return reply

    async def _follow(self, number: int, queue: _Queue) -> None:
        try:
            async for text in self.followings[number]:
                self._record.note_piece()
                await queue.put((number, text))
            self._note_usage(number)
        except Exception as error:
            await queue.put((number, error))
            return
        if not self._record.pieces:
            self._record.note_piece()
        await queue.put((number, None))

    def _note_usage(self, number: int) -> None:
        usage = self.followings[number].reply.usage
        self._noted.add(number)
        self._record.note_usage(usage.prompt_tokens, usage.completion_tokens)

    async def _note_beginning(self) -> None:
        """Notes that an answer is begun that shows nothing yet: a call of a tool is shown when it is whole."""
        while not self._record.pieces:
            await asyncio.sleep(_LOOK_SECONDS)
            if not self._record.pieces and any(following.steps for following in self.followings):
                self._record.note_piece()


class EventStream(StreamingResponse):
    """Server-sent events; however it ends, the generator behind it is closed at once and not when memory is swept."""

    media_type = "text/event-stream"

    @classmethod
    async def begin(cls, events: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> EventStream:
        """Waits for the first event, so that what fails before it is an HTTP status and not an event.

        Args:
            events: The events.
            headers: More headers of the response.
        """
        return cls(_Begun(await anext(events), events), headers)

    def __init__(self, events: _Begun, headers: Mapping[str, str]) -> None:
        super().__init__(events, headers=headers)
        self._events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


class _Begun:
    """Events of which the first is there already."""

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        self._first: bytes | None = first
        self._events = events

    def __aiter__(self) -> _Begun:
        return self

    async def __anext__(self) -> bytes:
        if self._first is None:
            return await anext(self._events)
        first, self._first = self._first, None
        return first

    async def aclose(self) -> None:
        """Ends the answers behind it."""
        await self._events.aclose()


@dataclass(frozen=True)
class Envelope:
    """What stands around the answers of one request.

    Args:
        id: Of the response.
        kind: What its events are called.
        target: Who answers.
        options: What the client wants of a stream.
        created: When it began, in seconds since 1970.
    """

    id: str
    kind: str
    target: Target
    options: StreamOptions | None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def with_usage(self) -> bool:
        """Whether events tell what the request cost."""
        return self.options is not None and bool(self.options.include_usage)

    def event(self, choices: Sequence[Mapping[str, Any]], usage: Usage | None = None) -> bytes:
        """One server-sent event.

        Args:
            choices: What it says of the answers.
            usage: What the request cost.
        """
        chunk: dict[str, Any] = {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.target.name,
            "system_fingerprint": self.target.fingerprint,
            "choices": choices,
        }
        if self.with_usage:
            chunk["usage"] = None if usage is None else usage.model_dump()
        return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def prompt_refusal(error: UsageError, param: str) -> APIError:
    """What a client is told about a prompt that cannot be answered.

    Args:
        error: What the model's side said.
        param: The field that has the prompt.
    """
    too_long = isinstance(error, ContextLengthError)
    return APIError(400, str(error), param=param, code="context_length_exceeded" if too_long else None)


def sampling_of(body: Sampling, number: int, max_new_tokens: int | None) -> dict[str, Any]:
    """A request's settings, as `glmkit.chat.following.answer` takes them; None is the model's own.

    Args:
        body: The request.
        number: Which of its answers: each has a seed of its own.
        max_new_tokens: Its longest answer.
    """
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    return {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "repetition_penalty": body.repetition_penalty,
        "logit_bias": bias or None,
        "seed": None if body.seed is None else row_seed(body.seed % 2**63, number),
        "stop": [body.stop] if isinstance(body.stop, str) else list(body.stop or ()),
        "max_new_tokens": max_new_tokens,
    }


def usage_of(prompt_tokens: int, cached_tokens: int, replies: Sequence[Reply]) -> Usage:
    """What a request cost.

    Args:
        prompt_tokens: Of each of its prompts once.
        cached_tokens: Those of them that had been read before.
        replies: Its answers.
    """
    completion = sum(reply.usage.completion_tokens for reply in replies)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion,
        total_tokens=prompt_tokens + completion,
        prompt_tokens_details=CachedTokens(cached_tokens=cached_tokens),
    )
