"""Answers of a batch engine for asyncio code: what the API and the web app use, many at once, without a thread each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from glmkit.chat.answers import AnswerStream, Decode, Reply
from glmkit.chat.choices import choose, official_sampling
from glmkit.chat.completion import CompletionStream
from glmkit.chat.conversation import stream_reply
from glmkit.chat.messages import Message
from glmkit.chat.templates import answer_ids
from glmkit.chat.tools import documented_tools
from glmkit.engine.decode import CancelToken, Step
from glmkit.engine.generation import Guide
from glmkit.engine.scheduler import BatchEngine
from glmkit.errors import UsageError


@dataclass(frozen=True)
class Served:
    """A model that is being served.

    Args:
        loaded: What `glmkit.load` gave.
        engine: What runs it.
        name: What its users call it.
    """

    loaded: Any
    engine: BatchEngine
    name: str

    @property
    def model(self) -> Any:
        """The language model."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.loaded.tokenizer

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of its adapters."""
        adapters = getattr(self.model, "glm_adapters", None)
        return () if adapters is None else adapters.names

    @property
    def context_tokens(self) -> int:
        """What prompt and answer may have together."""
        tokens: int = self.model.config.max_position_embeddings
        return tokens

    def close(self) -> None:
        """Ends what is running."""
        self.engine.close()


def serve(loaded: Any, name: str, **engine: Any) -> Served:
    """Puts a batch engine behind a model.

    Args:
        loaded: What `glmkit.load` gave.
        name: What its users call it.
        **engine: Arguments of `BatchEngine`.

    Raises:
        UsageError: There is no tokenizer, or a number that makes no sense.
    """
    if loaded.tokenizer is None:
        raise UsageError("the folder has no tokenizer, and without one no text can be served")
    return Served(loaded, BatchEngine(loaded.model, **engine), name)


class Following:
    """An answer that is being written: `async for` its pieces of text, then read `reply`.

    Leaving its `async with` block ends an answer that is not finished, and frees its place at once.

    Args:
        stream: The answer, from a source that does not wait.
        there: Set when there may be something new.
        cancel: Ends it.
        engine: What runs it.
    """

    def __init__(self, stream: AnswerStream, there: asyncio.Event, cancel: CancelToken, engine: BatchEngine) -> None:
        self._stream, self._there, self._cancel, self._engine = stream, there, cancel, engine

    async def __aiter__(self) -> AsyncIterator[str]:
        while True:
            self._there.clear()  # before looking: what comes after the look sets it again
            piece = next(self._stream, None)
            if piece is None:
                return
            if piece:
                yield piece
            else:
                await self._there.wait()

    @property
    def reply(self) -> Reply:
        """The answer with everything about it; see `AnswerStream.reply`."""
        return self._stream.reply

    @property
    def steps(self) -> Sequence[Step]:
        """The engine's steps so far."""
        return self._stream.steps

    def cancel(self) -> None:
        """Ends the answer before its next token."""
        self._cancel.cancel()
        self._engine.wake()

    async def __aenter__(self) -> Following:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
        self._stream.close()


async def answer(
    served: Served,
    messages: Any,
    *,
    adapter: str | None = None,
    owner: str = "",
    tools: list[Any] | dict[str, Any] | None = None,
    cancel: CancelToken | None = None,
    top_logprobs: int = 0,
    guide: Guide | None = None,
    forced_call: str | None = None,
    **sampling: Any,
) -> Following:
    """Begins an answer.

    Args:
        served: The model.
        messages: The conversation, in any form that `glmkit.chat.messages.to_messages` takes.
        adapter: The adapter to answer with; None is the base.
        owner: Whose request it is: what was read for one owner is not reused for another.
        tools: Tools the model may call.
        cancel: Ends the answer before its next token.
        top_logprobs: So many of the most likely tokens come with each of `steps`.
        guide: Which tokens are allowed at each place.
        forced_call: Name of the tool that the answer must call; "" is any one of `tools`. None: the model decides.
        **sampling: Settings as in `stream_reply`.

    Returns:
        The answer to follow.

    Raises:
        UsageError: An unknown setting, messages of no known form, or a message longer than the context.
        QueueFullError: Too many requests wait.
    """
    if forced_call is not None:
        guide = _call_guide(served, tools, forced_call)
    options = {"adapter": adapter, "owner": owner, "top_logprobs": top_logprobs, "guide": guide}

    def begin(decode: Decode, token: CancelToken) -> AnswerStream:
        return stream_reply(
            served.model, served.tokenizer, messages, tools=tools, cancel=token, decode=decode, **sampling
        )

    return await _follow(served, begin, cancel, options)


async def complete(
    served: Served,
    prompt: str | Sequence[int],
    *,
    adapter: str | None = None,
    owner: str = "",
    cancel: CancelToken | None = None,
    top_logprobs: int = 0,
    guide: Guide | None = None,
    **sampling: Any,
) -> Following:
    """Goes on with a text as it is; a text with blanks, for a model that fills them, gets them filled.

    Args:
        served: The model.
        prompt: The text, or its ids.
        adapter: As in `answer`, like all that follow.
        owner: Likewise.
        cancel: Likewise.
        top_logprobs: Likewise.
        guide: Likewise.
        **sampling: Likewise.

    Raises:
        UsageError: An unknown setting, or a prompt that the model has no room for.
        QueueFullError: Too many requests wait.
    """
    options = {"adapter": adapter, "owner": owner, "top_logprobs": top_logprobs, "guide": guide}

    def begin(decode: Decode, token: CancelToken) -> AnswerStream:
        if served.tokenizer.generation == 0:
            if not isinstance(prompt, str):
                raise UsageError("a model that fills blanks takes a text, and was given token ids")
            return stream_reply(served.model, served.tokenizer, prompt, cancel=token, decode=decode, **sampling)
        official = official_sampling(served.model, served.tokenizer)
        choices = choose(served.model, sampling=sampling, official=official)
        return CompletionStream(served.model, served.tokenizer, prompt, choices, cancel=token, decode=decode)

    return await _follow(served, begin, cancel, options)


async def _follow(
    served: Served,
    begin: Callable[[Decode, CancelToken], AnswerStream],
    cancel: CancelToken | None,
    options: dict[str, Any],
) -> Following:
    loop, there, token = asyncio.get_running_loop(), asyncio.Event(), cancel or CancelToken()

    def notify() -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            loop.call_soon_threadsafe(there.set)

    def decode(prompt_ids: Sequence[int], sampling: Any, **limits: Any) -> Iterator[Step]:
        generation = served.engine.stream(prompt_ids, sampling, **limits, **options)
        generation.do_not_wait(notify)
        return generation

    served.engine.check_room()
    try:
        stream = await asyncio.to_thread(begin, decode, token)  # long texts take their time to become ids
    except asyncio.CancelledError:
        token.cancel()  # the thread goes on, and what it queues is taken out again
        served.engine.wake()
        raise
    return Following(stream, there, token, served.engine)


class _OneOf:
    """Lets an answer begin with one of some sequences, and go on freely.

    Args:
        sequences: Their ids.
        vocabulary_size: `V`.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], vocabulary_size: int) -> None:
        self._left = [list(sequence) for sequence in sequences]
        self._size = vocabulary_size

    def allowed(self) -> Tensor | None:
        """(V,) bool; None behind the end of a sequence."""
        if not self._left:
            return None
        mask = torch.zeros(self._size, dtype=torch.bool)
        mask[[sequence[0] for sequence in self._left]] = True
        return mask

    def push(self, token_id: int) -> None:
        """Takes the next token."""
        self._left = [sequence[1:] for sequence in self._left if sequence[0] == token_id]
        if any(not sequence for sequence in self._left):
            self._left = []


def _call_guide(served: Served, tools: list[Any] | dict[str, Any] | None, name: str) -> Guide:
    offered = documented_tools(tools or [])
    known = list(offered) if isinstance(offered, Mapping) else [str(tool["name"]) for tool in offered]
    names = known if name == "" else [name]
    if not known or name not in ("", *known):
        raise UsageError(
            f"the answer shall call the tool {name!r}, which is not offered", hint=f"offered are: {', '.join(known)}"
        )
    if served.tokenizer.generation < 3:
        raise UsageError("this model knows no tools", hint="ChatGLM3 and GLM-4 do")
    headers = [answer_ids(served.tokenizer, Message("assistant", "", name), last=False) for name in names]
    return _OneOf(headers, served.model.config.vocab_size)
