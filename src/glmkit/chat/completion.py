"""Going on with a text as it is, without roles: what base models do, and what an API calls a completion."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from glmkit.chat.answers import AnswerStream, Decode, Reply, TokenUsage
from glmkit.chat.choices import Choices
from glmkit.chat.messages import Message
from glmkit.chat.templates import chat_format
from glmkit.engine.decode import WAITING, CancelToken, stream
from glmkit.errors import ContextLengthError
from glmkit.runtime.text import TextStream


class CompletionStream(AnswerStream):
    """A text that is being gone on with.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompt: The text, or its ids.
        choices: How to go on.
        cancel: Ends it before the next token.
        decode: What generates the tokens; None: the decode loop, for this text alone.

    Raises:
        UsageError: The prompt leaves no room, or has ids that the model does not know.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompt: str | Sequence[int],
        choices: Choices,
        *,
        cancel: CancelToken | None = None,
        decode: Decode | None = None,
    ) -> None:
        self.prompt_ids = (
            chat_format(tokenizer).text_ids(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        )
        context = model.config.max_position_embeddings
        if len(self.prompt_ids) >= context:
            raise ContextLengthError(
                f"the prompt has {len(self.prompt_ids):,} tokens; the model's context is {context:,} tokens, "
                "the answer included",
                hint="shorten the prompt, or use a model with a longer context",
            )
        self._pieces_of = TextStream(tokenizer.decode_ids, choices.stop)
        self._unknown_from: int = tokenizer.vocab_size
        self._text, self._finish_reason = "", "cancelled"
        limits = {
            "stop_ids": tokenizer.stop_ids,
            "max_new_tokens": choices.max_new_tokens or context,
            "cancel": cancel,
        }
        if decode is not None:
            self._steps = decode(self.prompt_ids, choices.options, **limits)
        else:
            self._steps = stream(model, self.prompt_ids, choices.options, **limits)
        super().__init__()

    def _write(self) -> Generator[str, None, None]:
        for step in self._timed(self._steps):
            if step is WAITING:
                yield ""
                continue
            text = self._pieces_of.push(step.token_id) if step.is_text and step.token_id < self._unknown_from else ""
            if step.finish_reason:
                self._finish_reason = step.finish_reason
                text += self._pieces_of.finish()
            self._text += text
            if text:
                yield text
            if self._pieces_of.stopped is not None:
                self._finish_reason = "stop"
                break
        self._end()

    def _end(self) -> str:
        usage = self.steps[-1].usage if self.steps else None
        cached = 0 if usage is None else usage.cached_tokens
        self._reply = Reply(
            text=self._text,
            messages=(Message("assistant", self._text),),
            finish_reason=self._finish_reason,
            usage=TokenUsage(len(self.prompt_ids), len(self._seconds), cached),
            timings=self._timings(),
        )
        return ""
