"""POST /v1/chat/completions: a conversation in, an answer out, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from glmkit.chat.answers import Reply
from glmkit.chat.following import Following, answer
from glmkit.chat.messages import Message
from glmkit.errors import UsageError
from glmkit.serve.catalogue import Catalogue, Target
from glmkit.serve.choices import Choices, Envelope, EventStream, prompt_refusal, sampling_of, usage_of
from glmkit.serve.failures import refusal
from glmkit.serve.json_body import read_body
from glmkit.serve.logprobs import TokenLog, for_chat
from glmkit.serve.protection import admit
from glmkit.serve.shapes import REFUSED, Answer, ChatChoice, ChatCompletion, ChatRequest, TokenLogprob, Usage
from glmkit.serve.stored import Stored
from glmkit.serve.structured import SchemaGuide
from glmkit.serve.tool_calls import Offer, Outcome, outcome_of, read_offer, to_messages


@dataclass(frozen=True)
class Asked:
    """A request that has been read.

    Args:
        body: As it came.
        target: The model.
        owner: Whose request it is, for caches and stored completions.
        messages: The conversation.
        offer: Its tools.
        guides: One for each answer, if the answers have a form to keep.
    """

    body: ChatRequest
    target: Target
    owner: str
    messages: Sequence[Message]
    offer: Offer
    guides: Sequence[SchemaGuide | None]

    @property
    def count(self) -> int:
        """How many answers are wanted."""
        return self.body.n or 1


async def create_chat_completion(request: Request) -> Response:
    """Answers a conversation.

    Args:
        request: With a `ChatRequest` as its body.

    Raises:
        APIError: The body or the model it names does not fit.
        UsageError: The conversation has no form in this model, or does not fit into its context.
        QueueFullError: Too many requests wait.
    """
    body, headers = await read_body(request, ChatRequest, REFUSED)
    catalogue: Catalogue = request.app.state.catalogue
    stored: Stored | None = request.app.state.stored
    _check_together(body, stored)
    target = catalogue.find(body.model)
    record = admit(request, target.engine, body.n or 1)
    has_schema = body.response_format is not None and body.response_format.type != "text"
    threads = target.parts.schema_threads if has_schema else None
    asked = await asyncio.get_running_loop().run_in_executor(threads, _read, body, target, record.owner)
    choices = Choices(lambda number: _begin(asked, number), asked.count, record)
    writing = _Writing(asked, choices, stored if body.store else None)
    if body.stream:
        return await EventStream.begin(writing.events(choices), headers)
    async with choices:
        await choices.replies()
        return JSONResponse(await writing.whole(), headers=headers)


def _check_together(body: ChatRequest, stored: Stored | None) -> None:
    """What no field says alone."""
    if body.top_logprobs is not None and not body.logprobs:
        raise refusal("top_logprobs", "top_logprobs goes with logprobs: true")
    if body.stream_options is not None and not body.stream:
        raise refusal("stream_options", "stream_options goes with stream: true")
    if body.store and stored is None:
        raise refusal("store", "this server stores nothing; it was started without --store FOLDER")


def _read(body: ChatRequest, target: Target, owner: str) -> Asked:
    """The part of the work that takes time without waiting for anybody."""
    target.check_bias(body.logit_bias)
    offer = read_offer(body, target.generation)
    messages = to_messages(body.messages)
    for message in messages:
        target.check_length(message.content, "messages")
    guides: list[SchemaGuide | None] = [None] * (body.n or 1)
    wanted = body.response_format
    if wanted is not None and wanted.type != "text":
        if target.generation == 0:
            raise refusal("response_format", "this model fills blanks and writes no JSON")
        structures = target.parts.structures
        guides = [structures.guide(wanted, offers_tools=bool(offer.names)) for _ in guides]
    return Asked(body, target, owner, messages, offer, guides)


async def _begin(asked: Asked, number: int) -> Following:
    body, offer = asked.body, asked.offer
    try:
        return await answer(
            asked.target.served,
            asked.messages,
            adapter=asked.target.adapter,
            owner=asked.owner,
            tools=offer.tools,
            top_logprobs=body.top_logprobs or 0,
            guide=asked.guides[number] if offer.forced is None else None,
            forced_call=offer.forced,
            **sampling_of(body, number, body.max_completion_tokens or body.max_tokens),
        )
    except UsageError as error:
        raise prompt_refusal(error, "messages") from error


class _Writing:
    """Writes the answers of one request in OpenAI's form."""

    def __init__(self, asked: Asked, choices: Choices, stored: Stored | None) -> None:
        self._asked, self._choices, self._stored = asked, choices, stored
        id = f"chatcmpl-{secrets.token_hex(16)}"
        self._envelope = Envelope(id, "chat.completion.chunk", asked.target, asked.body.stream_options)
        top = asked.body.top_logprobs or 0
        self._logs = [TokenLog(asked.target, top) for _ in range(asked.count if asked.body.logprobs else 0)]
        self._tokens: list[list[TokenLogprob]] = [[] for _ in range(asked.count)]
        self._outcomes: dict[int, Outcome] = {}

    # --- whole ---

    async def whole(self) -> dict[str, Any]:
        """The response to a request without stream, once all answers are there; stores it if that was asked for."""
        asked = self._asked
        replies = [self._choices.reply(number) for number in range(asked.count)]
        for number in range(asked.count):
            self._take_tokens(number)
        completion = ChatCompletion(
            id=self._envelope.id,
            object="chat.completion",
            created=self._envelope.created,
            model=asked.target.name,
            choices=[self._choice(number, reply) for number, reply in enumerate(replies)],
            usage=self._usage(replies),
            system_fingerprint=asked.target.fingerprint,
            service_tier="default",
        )
        if asked.body.metadata is not None:
            completion.metadata = asked.body.metadata
        if replies[0].dropped_turns:
            completion.dropped_turns = replies[0].dropped_turns
        written = completion.model_dump(exclude_unset=True)
        if self._stored is not None:
            await asyncio.to_thread(self._stored.keep, asked.owner, written, replies[0].messages)
        return written

    def _choice(self, number: int, reply: Reply) -> ChatChoice:
        outcome = self._outcome(number, reply)
        text = reply.text + outcome.text
        message = Answer(role="assistant", content=text or (None if outcome.call else ""), refusal=None)
        if outcome.call is not None and self._asked.offer.old:
            message.function_call = outcome.call.function
        elif outcome.call is not None:
            message.tool_calls = [outcome.call]
        if outcome.malformed is not None:
            message.malformed_tool_call = outcome.malformed
        logprobs = for_chat(self._tokens[number]) if self._asked.body.logprobs else None
        return ChatChoice(index=number, message=message, logprobs=logprobs, finish_reason=outcome.finish_reason)

    def _outcome(self, number: int, reply: Reply) -> Outcome:
        if number not in self._outcomes:  # the call's id is made once
            self._outcomes[number] = outcome_of(reply, self._asked.offer)
        return self._outcomes[number]

    def _take_tokens(self, number: int) -> list[TokenLogprob]:
        if not self._asked.body.logprobs:
            return []
        fresh = self._logs[number].take(self._choices.followings[number].steps)
        self._tokens[number] += fresh
        return fresh

    # --- in events ---

    async def events(self, choices: Choices) -> AsyncGenerator[bytes, None]:
        """The response to a request with stream; its first event comes with the first piece of an answer."""
        asked = self._asked
        begun: set[int] = set()
        async with choices:
            async for number, text in choices.pieces():
                if number not in begun:
                    begun.add(number)
                    yield self._event(number, {"role": "assistant", "content": "", "refusal": None})
                if text is not None:
                    yield self._event(number, {"content": text}, fresh=self._take_tokens(number))
                    continue
                for event in self._last_events(number, choices.reply(number)):
                    yield event
            replies = [choices.reply(number) for number in range(asked.count)]
            if self._stored is not None:
                await self.whole()
        if self._envelope.with_usage:
            yield self._envelope.event([], self._usage(replies))
        yield b"data: [DONE]\n\n"

    def _last_events(self, number: int, reply: Reply) -> list[bytes]:
        outcome, fresh = self._outcome(number, reply), self._take_tokens(number)
        events = []
        if outcome.text:
            events.append(self._event(number, {"content": outcome.text}))
        if outcome.call is not None and self._asked.offer.old:
            events.append(self._event(number, {"function_call": outcome.call.function.model_dump()}))
        elif outcome.call is not None:
            call = {"index": 0, **outcome.call.model_dump()}
            events.append(self._event(number, {"tool_calls": [call]}))
        delta = {} if outcome.malformed is None else {"malformed_tool_call": outcome.malformed}
        return [*events, self._event(number, delta, outcome.finish_reason, fresh)]

    def _event(
        self, number: int, delta: dict[str, Any], finish_reason: str | None = None, fresh: Sequence[TokenLogprob] = ()
    ) -> bytes:
        logprobs = for_chat(fresh).model_dump() if fresh else None
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._envelope.event([choice])

    def _usage(self, replies: Sequence[Reply]) -> Usage:
        """What the request cost: all answers have one prompt."""
        prompt = max(reply.usage.prompt_tokens for reply in replies)
        return usage_of(prompt, max(reply.usage.cached_tokens for reply in replies), replies)
