"""One way to answer for every front end: messages in, an answer out, piece by piece or whole.

What happens between them: the oldest turns are left out where the context is too short, the rest becomes token ids, the
engine decodes, and what it writes is taken apart into text for people and calls of tools.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from glmkit.chat.answers import AnswerStream, Decode, Reply, Timings, TokenUsage
from glmkit.chat.blanks import FillingStream
from glmkit.chat.choices import Choices, choose, official_sampling
from glmkit.chat.context import fit_context, reserve_tokens
from glmkit.chat.messages import Message, to_messages
from glmkit.chat.prompt_cache import PromptCache
from glmkit.chat.reply import ReplyStream as MessageStream
from glmkit.chat.reply import parse_reply
from glmkit.chat.templates import chat_format
from glmkit.chat.tools import TOOLS_SENTENCE
from glmkit.engine.decode import WAITING, CancelToken, Step, stream
from glmkit.engine.sampling import SamplingOptions
from glmkit.runtime.replies import Delta
from glmkit.runtime.text import StopText

__all__ = ["AnswerStream", "Reply", "ReplyStream", "Timings", "TokenUsage", "reply_to", "stream_reply"]


class ReplyStream(AnswerStream):
    """A chat model's answer that is being written: iterate over its pieces of text, then read `reply`.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        messages: The whole conversation.
        prompt: Ids of what the model reads of it.
        choices: How to answer.
        cancel: Ends the answer before its next token.
        dropped_turns: How many turns are not in the prompt.
        reuse: Keys and values of the conversation so far.
        decode: What generates the tokens; None: the decode loop, for this answer alone.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        messages: Sequence[Message],
        prompt: Sequence[int],
        choices: Choices,
        *,
        cancel: CancelToken | None = None,
        dropped_turns: int = 0,
        reuse: PromptCache | None = None,
        decode: Decode | None = None,
    ) -> None:
        self._tokenizer, self._messages, self._format = tokenizer, tuple(messages), chat_format(tokenizer)
        self._prompt_tokens, self._dropped_turns = len(prompt), dropped_turns
        self._offers_tools = _offers_tools(messages)
        self._shown_message = -1  # the one that text was last shown of
        self._reuse = reuse
        self._stop = StopText(choices.stop)
        self._ids: list[int] = []  # of the answer, without the stop id
        self._text = ""
        self._finish_reason = "cancelled"
        limits: dict[str, Any] = {
            "stop_ids": tokenizer.stop_ids,
            "max_new_tokens": choices.max_new_tokens or model.config.max_position_embeddings,
            "cancel": cancel,
        }
        if decode is not None:
            self._steps = decode(prompt, choices.options, **limits)
        else:
            cache, new = (None, prompt) if reuse is None else reuse.begin(model, prompt)
            drafts: dict[str, Any] = {
                "lookup_tokens": choices.lookup_tokens,
                "lookup_ids": prompt[: len(prompt) - len(new)],
            }
            self._steps = stream(model, new, choices.options, cache=cache, **limits, **drafts)
        super().__init__()

    def _write(self) -> Generator[str, None, None]:
        parser = MessageStream(self._tokenizer)
        for step in self._kept_steps():
            if step is WAITING:
                yield ""
                continue
            deltas = parser.push(step.token_id) if step.is_text else []
            if step.finish_reason:
                self._finish_reason = step.finish_reason
                deltas += parser.finish()
            for delta in deltas:
                yield from self._show(self._stop.push(self._visible_piece(delta)))
            if self._stop.stopped:
                self._finish_reason = "stop"
                break
        yield from self._show(self._stop.finish())
        yield from self._show(self._end())

    def _kept_steps(self) -> Iterator[Step]:
        """The engine's steps; keeps their tokens."""
        for step in self._timed(self._steps):
            if step.is_text:
                self._ids.append(step.token_id)
                if self._reuse is not None:
                    self._reuse.ids.append(step.token_id)
            yield step

    def _show(self, text: str) -> Iterator[str]:
        self._text += text
        if text:
            yield text

    def _visible_piece(self, delta: Delta) -> str:
        """What people see of a piece while it arrives; what may be a call of a tool waits for the end."""
        if not self._is_text(delta.metadata):
            return ""
        if delta.number == self._shown_message:
            return delta.text
        self._shown_message = delta.number
        return ("\n" if self._text else "") + self._header_line(delta.metadata) + delta.text

    def _is_text(self, metadata: str) -> bool:
        return not metadata or metadata in self._format.text_tools or not self._offers_tools

    def _header_line(self, metadata: str) -> str:
        return f"{metadata}\n" if metadata and metadata not in self._format.text_tools else ""

    def _end(self) -> str:
        """Makes the reply.

        Returns:
            Text that only now is known to be text.
        """
        parsed = parse_reply(self._tokenizer, self._ids)
        cut = self._finish_reason == "cancelled"
        call = parsed.call if self._offers_tools and not self._stop.stopped else None
        answer, rest = parsed.messages, ""
        if self._stop.stopped:
            answer = [Message("assistant", self._text)]
        else:
            spoken = answer[:-1] if call is not None or (cut and not self._is_text(answer[-1].metadata)) else answer
            lines = [(self._header_line(message.metadata) + message.content).rstrip() for message in spoken]
            whole = "\n".join(line for line in lines if line)
            rest = whole[len(self._text) :] if whole.startswith(self._text) else ""
        text = self._text + rest
        self._reply = Reply(
            text=text,
            messages=(*self._messages, *(answer if text or call is not None else ())),
            finish_reason="tool_calls" if call is not None and not cut else self._finish_reason,
            usage=TokenUsage(self._prompt_tokens, len(self._seconds), self._cached_tokens()),
            timings=self._timings(),
            tool_call=call,
            malformed=parsed.problem if self._offers_tools and not cut else None,
            dropped_turns=self._dropped_turns,
        )
        return rest

    def _cached_tokens(self) -> int:
        usage = self.steps[-1].usage if self.steps else None
        return 0 if usage is None else usage.cached_tokens


def _offers_tools(messages: Sequence[Message]) -> bool:
    return any(
        message.tools is not None
        or message.role == "observation"
        or (message.role == "system" and message.content.startswith(TOOLS_SENTENCE))
        for message in messages
    )


def stream_reply(
    model: Any,
    tokenizer: Any,
    messages: Any,
    *,
    history: Sequence[Any] | None = None,
    system: str | None = None,
    tools: list[Any] | dict[str, Any] | None = None,
    options: SamplingOptions | None = None,
    max_new_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    cancel: CancelToken | None = None,
    reuse: PromptCache | None = None,
    decode: Decode | None = None,
    **sampling: Any,
) -> AnswerStream:
    """Answers piece by piece.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        messages: A question; or messages: `Message` objects, mappings with role and content, (question, answer) pairs.
        history: Earlier messages in any of these forms.
        system: Text of a system message.
        tools: Tools the model may call (ChatGLM3, GLM-4): JSON-schema descriptions, with or without the OpenAI wrapper.
        options: How tokens are chosen; by default as the model's generation_config says, else as the official chat.
        max_new_tokens: Longest answer in tokens; by default what the context leaves.
        stop: A text or texts that end the answer and are not part of it.
        cancel: Ends the answer before its next token.
        reuse: Keys and values of the conversation so far; not used with a repetition penalty or banned tokens, which
            look at the whole conversation.
        decode: What generates the tokens, for instance a batch engine; None: the decode loop, for this answer alone.
        **sampling: Single settings: temperature, top_k, top_p, min_p, repetition_penalty, seed, do_sample, max_tokens,
            and lookup_tokens, which changes the speed only (see `glmkit.engine.decode.stream`).

    Returns:
        The answer to iterate over. From a model that fills blanks it is the last message with its blanks filled; what
        was said before has no meaning for it.

    Raises:
        UsageError: An unknown setting, messages of no known form, or a message longer than the context.
    """
    system = sampling.pop("system_prompt", system)
    official = official_sampling(model, tokenizer)
    choices = choose(model, options, max_new_tokens, stop, sampling, official=official)
    conversation = _with_tools(to_messages(messages, history, system), tools)
    if tokenizer.generation == 0:
        return FillingStream(model, tokenizer, conversation, choices, cancel=cancel, decode=decode)
    context = model.config.max_position_embeddings
    prompt, dropped = fit_context(tokenizer, conversation, context, reserve_tokens(context, choices.max_new_tokens))
    if choices.options.repetition_penalty != 1.0 or choices.options.banned_ids:
        reuse = None
    return ReplyStream(
        model,
        tokenizer,
        conversation,
        prompt,
        choices,
        cancel=cancel,
        dropped_turns=dropped,
        reuse=reuse,
        decode=decode,
    )


def reply_to(model: Any, tokenizer: Any, messages: Any, **options: Any) -> Reply:
    """Answers, and returns when the answer is whole.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        messages: See `stream_reply`.
        **options: See `stream_reply`.

    Returns:
        The answer.

    Raises:
        UsageError: See `stream_reply`.
    """
    replying = stream_reply(model, tokenizer, messages, **options)
    for _ in replying:
        pass
    return replying.reply


def _with_tools(messages: list[Message], tools: list[Any] | dict[str, Any] | None) -> list[Message]:
    if tools is None:
        return messages
    if messages and messages[0].role == "system":
        return [replace(messages[0], tools=tools), *messages[1:]]
    return [Message("system", "", tools=tools), *messages]
