"""POST /v1/completions: a text that the model goes on with as it is, or whose blanks it fills."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from glmkit.chat.answers import Reply
from glmkit.chat.following import Following, complete
from glmkit.errors import UsageError
from glmkit.serve.catalogue import Catalogue, Target
from glmkit.serve.choices import Choices, Envelope, EventStream, prompt_refusal, sampling_of, usage_of
from glmkit.serve.failures import refusal
from glmkit.serve.json_body import read_body
from glmkit.serve.logprobs import TokenLog, for_completion
from glmkit.serve.protection import admit
from glmkit.serve.shapes import (
    MAX_PROMPTS,
    REFUSED,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    TokenLogprob,
    Usage,
)

Prompt = str | list[int]
DEFAULT_TOKENS = 16  # of an answer, as in OpenAI's API


async def create_completion(request: Request) -> Response:
    """Goes on with one text or several.

    Args:
        request: With a `CompletionRequest` as its body.

    Raises:
        APIError: The body or the model it names does not fit.
        UsageError: The text does not fit into the context.
        QueueFullError: Too many requests wait.
    """
    body, headers = await read_body(request, CompletionRequest, REFUSED)
    catalogue: Catalogue = request.app.state.catalogue
    target = catalogue.find(body.model)
    prompts = _prompts(body, target)
    count = len(prompts) * (body.n or 1)
    record = admit(request, target.engine, count)

    async def begin(number: int) -> Following:
        return await _begin(body, target, prompts[number // (body.n or 1)], number, record.owner)

    choices = Choices(begin, count, record)
    writing = _Writing(body, target, prompts, choices)
    if body.stream:
        return await EventStream.begin(writing.events(choices), headers)
    async with choices:
        await choices.replies()
        return JSONResponse(writing.whole(), headers=headers)


def _prompts(body: CompletionRequest, target: Target) -> list[Prompt]:
    given: Any = body.prompt
    prompts: list[Prompt] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    for prompt in prompts:
        if isinstance(prompt, str):
            target.check_length(prompt, "prompt")
    if len(prompts) * (body.n or 1) > MAX_PROMPTS:
        raise refusal("prompt", f"all answers to all prompts together are more than {MAX_PROMPTS}")
    if body.echo and body.logprobs is not None:
        raise refusal("echo", "log-probabilities of the prompt are not given; leave echo or logprobs out")
    if body.stream_options is not None and not body.stream:
        raise refusal("stream_options", "stream_options goes with stream: true")
    target.check_bias(body.logit_bias)
    size = target.served.model.config.vocab_size
    if any(token >= size for prompt in prompts if not isinstance(prompt, str) for token in prompt):
        raise refusal("prompt", f"a token id is not below {size}, the size of the vocabulary")
    return prompts


async def _begin(body: CompletionRequest, target: Target, prompt: Prompt, number: int, owner: str) -> Following:
    try:
        return await complete(
            target.served,
            prompt,
            adapter=target.adapter,
            owner=owner,
            top_logprobs=body.logprobs or 0,
            **sampling_of(body, number, body.max_tokens or DEFAULT_TOKENS),
        )
    except UsageError as error:
        raise prompt_refusal(error, "prompt") from error


class _Writing:
    """Writes the answers of one request in OpenAI's form."""

    def __init__(self, body: CompletionRequest, target: Target, prompts: Sequence[Prompt], choices: Choices) -> None:
        self._body, self._target, self._prompts, self._choices = body, target, prompts, choices
        self._count = len(prompts) * (body.n or 1)
        id = f"cmpl-{secrets.token_hex(16)}"
        self._envelope = Envelope(id, "text_completion", target, body.stream_options)
        logs = 0 if body.logprobs is None else self._count
        self._logs = [TokenLog(target, body.logprobs or 0, raw=True) for _ in range(logs)]
        self._offsets = [0] * self._count

    def whole(self) -> dict[str, Any]:
        """The response to a request without stream, once all answers are there."""
        replies = [self._choices.reply(number) for number in range(self._count)]
        completion = Completion(
            id=self._envelope.id,
            object="text_completion",
            created=self._envelope.created,
            model=self._target.name,
            choices=[self._choice(number, reply) for number, reply in enumerate(replies)],
            usage=self._usage(replies),
            system_fingerprint=self._target.fingerprint,
        )
        return completion.model_dump()

    def _choice(self, number: int, reply: Reply) -> CompletionChoice:
        return CompletionChoice(
            index=number,
            text=self._echo(number) + reply.text,
            logprobs=self._logprobs(number),
            finish_reason="length" if reply.finish_reason == "length" else "stop",
        )

    async def events(self, choices: Choices) -> AsyncGenerator[bytes, None]:
        """The response to a request with stream."""
        echoed: set[int] = set()
        async with choices:
            async for number, text in choices.pieces():
                front = "" if number in echoed else self._echo(number)
                echoed.add(number)
                reason = choices.reply(number).finish_reason if text is None else None
                yield self._event(number, front + (text or ""), reason)
            replies = [choices.reply(number) for number in range(self._count)]
        if self._envelope.with_usage:
            yield self._envelope.event([], self._usage(replies))
        yield b"data: [DONE]\n\n"

    def _event(self, number: int, text: str, finish_reason: str | None) -> bytes:
        logprobs = self._logprobs(number)
        choice = {
            "index": number,
            "text": text,
            "logprobs": None if logprobs is None or not logprobs.tokens else logprobs.model_dump(),
            "finish_reason": finish_reason,
        }
        return self._envelope.event([choice])

    def _logprobs(self, number: int) -> CompletionLogprobs | None:
        """Those of the tokens that are new."""
        if self._body.logprobs is None:
            return None
        fresh: list[TokenLogprob] = self._logs[number].take(self._choices.followings[number].steps)
        told = for_completion(fresh, self._offsets[number])
        self._offsets[number] += sum(len(token.token) for token in fresh)
        return told

    def _echo(self, number: int) -> str:
        if not self._body.echo or self._target.generation == 0:  # a text with filled blanks holds its prompt anyway
            return ""
        prompt = self._prompts[number // (self._body.n or 1)]
        if isinstance(prompt, str):
            return prompt
        text: str = self._target.tokenizer.decode_ids(prompt)
        return text

    def _usage(self, replies: Sequence[Reply]) -> Usage:
        """What the request cost: each prompt counts once."""
        firsts = replies[:: self._body.n or 1]
        prompt = sum(reply.usage.prompt_tokens for reply in firsts)
        return usage_of(prompt, sum(reply.usage.cached_tokens for reply in firsts), replies)
