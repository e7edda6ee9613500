"""Filling the blanks of a text, for models that do this instead of chatting: GLM and GLM-130B.

    text      Beijing is the [MASK] of [MASK].

    GLM       [CLS] Beijing is the [MASK] of [MASK]. eos | sop the capital | sop China
              Every filling stays behind the text and its predecessors: what follows sees them there. Row 0 of the
              positions says which blank a filling belongs to, row 1 counts inside it.

    GLM-130B  Beijing is the [MASK] of [MASK]. eos | sop capital
              Beijing is the capital of [MASK]. eos | sop China
              Every filling is written into its place before the next one is made.

A text without a blank is gone on with. Source: generate_samples.py of GLM, generate.py of GLM-130B (behaviour, not
code). On purpose different: blanks of several kinds in one text are all filled, the user's own words are shown as they
were typed, and mask and start tokens that the model itself writes are left out.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from glmkit.chat.answers import AnswerStream, Decode, Filled, Reply, TokenUsage
from glmkit.chat.choices import Choices
from glmkit.chat.messages import Message
from glmkit.engine.decode import WAITING, CancelToken, Step, stream
from glmkit.engine.layout import InputLayout
from glmkit.engine.sampling import row_seed
from glmkit.errors import UsageError
from glmkit.runtime.blanks import BLANK, LONGEST_TOKENS, FilledText, own_text, room_tokens
from glmkit.runtime.text import StopText, TextStream


class FillingStream(AnswerStream):
    """A text whose blanks are being filled: its pieces are the user's own text and, as `Filled`, what the model wrote.

    Args:
        model: A blank-filling model.
        tokenizer: Its tokenizer.
        messages: What was said; the last message is the text, the ones before it mean nothing to the model.
        choices: How to fill; `max_new_tokens` and `stop` hold for each blank.
        cancel: Ends it before the next token.
        decode: What generates the tokens; None: the decode loop, for this answer alone.

    Raises:
        UsageError: The last message is no user's, there is a system message, or the text leaves no room.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        messages: Sequence[Message],
        choices: Choices,
        *,
        cancel: CancelToken | None = None,
        decode: Decode | None = None,
    ) -> None:
        self._model, self._tokenizer, self._choices, self._decode = model, tokenizer, choices, decode
        self._messages, self._cancel = tuple(messages), cancel or CancelToken()
        text = _text_of(messages)
        self._ids: list[int] = tokenizer.fill_prompt(text)
        masks, self._sop = frozenset(tokenizer.mask_token_ids), tokenizer.get_command("sop")
        self._no_text = masks | {self._sop}
        self._places = [place for place, token in enumerate(self._ids) if token in masks]
        self._own = own_text(text, _between(tokenizer, self._ids, self._places), len(self._places))
        self._filled = FilledText(goes_on=not BLANK.search(text))
        self._room = room_tokens(self._ids, self._sop, len(self._places), model.config.max_position_embeddings)
        prompt = [*self._ids, self._sop]
        # Two rows of positions: the model was trained with several fillings one behind the other.
        self._two_rows = self._layout(prompt).prompt(0, len(prompt))["position_ids"].ndim == 3
        self._spans: list[list[int]] = []  # ids of the fillings so far
        self._finish_reason = "cancelled"
        super().__init__()

    def _write(self) -> Generator[str, None, None]:
        reasons: list[str] = []
        for number in range(len(self._places)):
            yield from _some(self._filled.own(self._own[number]))
            reasons.append((yield from self._fill(number)))
            if reasons[-1] == "cancelled":
                break
        else:
            yield from _some(self._filled.own(self._own[-1]))
            self._finish_reason = "length" if "length" in reasons else "stop"
        self._end()

    def _fill(self, number: int) -> Generator[str, None, str]:
        """Fills one blank; returns why the filling ended."""
        decoded, stop = TextStream(self._tokenizer.decode_ids), StopText(self._choices.stop)
        self._spans.append([])
        self._filled.begin()
        reason = "cancelled"
        for step in self._timed(self._steps(number)):
            if step is WAITING:
                yield ""
                continue
            text = ""
            if step.is_text:
                self._spans[-1].append(step.token_id)
                if step.token_id not in self._no_text:
                    text = decoded.push(step.token_id)
            if step.finish_reason:
                reason = step.finish_reason
                text += decoded.finish()
            front, shown = self._filled.push(stop.push(text) + (stop.finish() if step.finish_reason else ""))
            yield from _some(front)
            yield from _some(Filled(shown))
            if stop.stopped:
                reason = "stop"
                break
        return reason

    def _steps(self, number: int) -> Iterator[Step]:
        options = self._choices.options
        if options.seed is not None:
            options = replace(options, seed=row_seed(options.seed, number))
        layout: InputLayout
        if self._two_rows:
            spans = [[self._sop, *span] for span in self._spans[:number]] + [[self._sop]]
            prompt = [*self._ids, *(token for span in spans for token in span)]
            positions = _span_positions(len(self._ids), list(zip(self._places, map(len, spans))))
            layout = _SpanLayout(self._layout(prompt), positions.to(self._model.device))
        else:
            prompt = list(self._ids)
            for earlier in reversed(range(number)):
                written = [token for token in self._spans[earlier] if token not in self._no_text]
                prompt[self._places[earlier] : self._places[earlier] + 1] = written
            prompt = [*prompt, self._sop]
            layout = self._layout(prompt)
        left = self._room - sum(map(len, self._spans))
        limits = {
            "stop_ids": self._tokenizer.stop_ids,
            "max_new_tokens": min(self._choices.max_new_tokens or LONGEST_TOKENS, left // (len(self._places) - number)),
            "cancel": self._cancel,
            "layout": layout,
        }
        if self._decode is not None:
            return self._decode(prompt, options, **limits)
        return stream(self._model, prompt, options, lookup_tokens=self._choices.lookup_tokens, **limits)

    def _layout(self, prompt: Sequence[int]) -> InputLayout:
        ids = torch.tensor([prompt], device=self._model.device)
        layout: InputLayout = self._model.input_layout(ids, ids.new_zeros(1))
        return layout

    def _end(self) -> str:
        filled = self._filled
        answered = (Message("assistant", filled.text),) if any(filled.fillings) else ()
        self._reply = Reply(
            text=filled.text,
            messages=(*self._messages, *answered),
            finish_reason=self._finish_reason,
            usage=TokenUsage(len(self._ids) + 1, len(self._seconds)),
            timings=self._timings(),
            fillings=tuple(filled.fillings),
        )
        return ""


class _SpanLayout:
    """A row with several fillings behind its text: the masks of one that has a single long filling, other positions.

    Args:
        base: The layout of the row; the context ends at the first sop.
        positions: (1, 2, T) of the prompt.
    """

    whole_prompt = True

    def __init__(self, base: InputLayout, positions: Tensor) -> None:
        self._base, self._positions = base, positions

    def prompt(self, start: int, end: int) -> dict[str, Tensor]:
        """Keyword arguments of the model for columns start to end of the prompt."""
        return {**self._base.prompt(start, end), "position_ids": self._positions[:, :, start:end]}

    def step(self, tokens: int = 1) -> dict[str, Tensor]:
        """Keyword arguments of the model for the next tokens."""
        further = torch.arange(1, tokens + 1, device=self._positions.device)
        added = self._positions[:, :, -1:] + further * further.new_tensor([[0], [1]])  # (1, 2, T)
        self._positions = torch.cat((self._positions, added), dim=-1)
        return {**self._base.step(tokens), "position_ids": added}

    def rewind(self, tokens: int) -> None:
        """Takes back the last tokens that `step` counted."""
        self._base.rewind(tokens)
        self._positions = self._positions[:, :, : self._positions.shape[-1] - tokens]

    def select(self, places: Sequence[int]) -> None:
        """There is one row, and it stays."""


def _span_positions(context: int, spans: Sequence[tuple[int, int]]) -> Tensor:
    """(1, 2, T) int64 of a context and of spans, given as (column of the blank, tokens with sop)."""
    first = [*range(context), *(place for place, count in spans for _ in range(count))]
    second = [*([0] * context), *(number for _, count in spans for number in range(1, count + 1))]
    return torch.tensor([[first, second]])


def _text_of(messages: Sequence[Message]) -> str:
    for message in messages:
        if message.role not in ("user", "assistant") or message.metadata:
            raise UsageError(
                "a model that fills blanks has no form for system messages and tools",
                hint="put everything into one text with [MASK] in it",
            )
    if not messages or messages[-1].role != "user":
        raise UsageError("there is no text to fill", hint="give a text with [MASK] in it")
    return messages[-1].content


def _between(tokenizer: Any, ids: Sequence[int], places: Sequence[int]) -> list[str]:
    """The text before, between and behind the blanks, decoded."""
    edges = [-1, *places, len(ids)]
    hidden = {*tokenizer.stop_ids, *tokenizer.prefix_ids}
    return [
        tokenizer.decode_ids([token for token in ids[start + 1 : end] if token not in hidden])
        for start, end in pairwise(edges)
    ]


def _some(text: str) -> list[str]:
    return [text] if text else []
