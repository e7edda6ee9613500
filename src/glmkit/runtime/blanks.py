"""Filling the blanks of a text; `glmkit.chat.blanks` says how the fillings lie in the model's input.

    Beijing is the [MASK] of [MASK].  ->  "Beijing is the ", then what the model says, " of ", the next, "."

With two rows of positions every filling stays behind the text; with one it is written into its place before the next.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from glmkit.errors import ContextLengthError, UsageError
from glmkit.runtime.decoding import Limits, MakeLayout, stream
from glmkit.runtime.layout import Ints, Layout, PrefixLayout, SpanLayout
from glmkit.runtime.prompts import Blanks, Said
from glmkit.runtime.sampling import Sampling
from glmkit.runtime.text import StopText, TextStream

if TYPE_CHECKING:
    from glmkit.runtime.answering import Model

LONGEST_TOKENS = 512  # of one filling, as in GLM's script
BLANK = re.compile(r"\[[gs]?MASK\]")


class FilledText:
    """A text whose blanks are being filled: which blanks between words are shown.

    Args:
        goes_on: Whether the text had no blank, so that what the model writes follows its last word.
    """

    def __init__(self, goes_on: bool) -> None:
        self.text = ""
        self.fillings: list[str] = []
        self._goes_on = goes_on
        self._waiting = ""  # blanks that may be the last of a filling

    def own(self, text: str) -> str:
        """Takes a piece of the user's own text; returns what is shown, which is all of it."""
        self.text += text
        return text

    def begin(self) -> None:
        """Begins the next filling."""
        self.fillings.append("")
        self._waiting = ""

    def push(self, text: str) -> tuple[str, str]:
        """Takes a piece of the filling.

        Args:
            text: What the model wrote.

        Returns:
            A blank in front of it, or nothing; and what is shown of it.
        """
        waiting = self._waiting + text
        if not self.fillings[-1] and (not self.text or self.text[-1].isspace()):
            waiting = waiting.lstrip()
        shown = waiting.rstrip()
        self._waiting = waiting[len(shown) :]
        front = " " if shown and not self.fillings[-1] and self._goes_on and _are_words(self.text, shown) else ""
        self.fillings[-1] += shown
        self.text += front + shown
        return front, shown


def own_text(text: str, between: Sequence[str], blanks: int) -> list[str]:
    """What stands before, between and behind the blanks, as it was typed.

    Args:
        text: The user's text.
        between: The same, decoded from ids; used where blanks are spelt in a way that only the tokenizer knows.
        blanks: How many there are.
    """
    parts = BLANK.split(text) if BLANK.search(text) else [text, ""]
    return parts if len(parts) == blanks + 1 else list(between)


def room_tokens(ids: Sequence[int], sop_id: int, blanks: int, context_tokens: int) -> int:
    """Tokens that all fillings together may have.

    Args:
        ids: The text, without the start of a filling.
        sop_id: That start.
        blanks: How many there are.
        context_tokens: The model's context.

    Raises:
        UsageError: The text has the mark that starts a filling in it.
        ContextLengthError: It leaves no room.
    """
    if sop_id in ids:
        raise UsageError(f"the text has the mark that starts a filling (id {sop_id}) in it", hint="leave the mark out")
    room = context_tokens - len(ids) - blanks  # a start for each
    if room < blanks:
        raise ContextLengthError(
            f"the text has {len(ids):,} tokens; the model's context is {context_tokens:,} tokens, "
            "the fillings included",
            hint="shorten the text, or fill it in parts",
        )
    return room


def _are_words(before: str, after: str) -> bool:
    """Whether two texts would run into each other as one word, in scripts that have blanks between words."""
    return bool(re.fullmatch(r"[!-~]\w", before[-1:] + after[:1], re.ASCII))


def fill(
    model: Model, prompts: Blanks, messages: Sequence[Said], sampling: Sampling, limits: Limits, stop: Sequence[str]
) -> Iterator[str]:
    """Fills the blanks of the last message, one after the other; `model.last` has the whole.

    Args:
        model: The model.
        prompts: How its texts become ids.
        messages: The text to fill is the last one.
        sampling: How tokens are chosen.
        limits: `max_new_tokens` holds for each blank.
        stop: Texts that end a filling.

    Yields:
        Pieces of the text, the user's own among them.
    """
    sop: int = model.description.reply["sop_id"]
    ids, answer = prompts.ids(messages), model.last
    places = [place for place, token in enumerate(ids) if token in prompts.mask_ids]
    hidden = {*model.stop_ids, *model.description.prompt["before"]}
    edges = [-1, *places, len(ids)]
    between = [
        model.tokens.decode([token for token in ids[start + 1 : end] if token not in hidden])
        for start, end in pairwise(edges)
    ]
    own = own_text(messages[-1].content, between, len(places))
    room = room_tokens(ids, sop, len(places), limits.context_tokens)
    filled = FilledText(not BLANK.search(messages[-1].content))
    spans: list[list[int]] = []
    reasons = []
    for number in range(len(places)):
        yield filled.own(own[number])
        left = (room - sum(map(len, spans))) // (len(places) - number)
        prompt, layout = _input(model, ids, places, spans, sop, prompts.mask_ids)
        longest = replace(limits, max_new_tokens=min(limits.max_new_tokens or LONGEST_TOKENS, left))
        seeded = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + number)
        decoded, ending = TextStream(model.tokens.decode), StopText(stop)
        spans.append([])
        filled.begin()
        for token, reason in stream(model.session, layout, prompt, seeded, longest):
            text = ""
            if reason != "stop":
                spans[-1].append(token)
                answer.token_ids.append(token)
                text = "" if token in prompts.mask_ids or token == sop else decoded.push(token)
            text = ending.push(text + (decoded.finish() if reason else "")) + (ending.finish() if reason else "")
            front, shown = filled.push(text)
            answer.text = filled.text
            if shown:
                yield front + shown
            if reason or ending.stopped:
                reasons.append("stop" if ending.stopped else reason)
                break
    yield filled.own(own[-1])
    answer.text = filled.text
    answer.finish_reason = "length" if "length" in reasons else "stop"
    answer.messages = [Said("assistant", filled.text)] if any(filled.fillings) else []


def _input(
    model: Model, ids: list[int], places: list[int], spans: list[list[int]], sop: int, masks: frozenset[int]
) -> tuple[list[int], MakeLayout]:
    """The prompt of the next filling, and a function that makes its layout."""
    if model.description.layout["two_rows"]:
        begun = [[sop, *span] for span in spans] + [[sop]]
        prompt = [*ids, *(token for span in begun for token in span)]
        where = list(zip(places, map(len, begun)))

        def spanned(padded: Ints, pads: Ints) -> Layout:
            base = model.layout(padded, pads)
            assert isinstance(base, PrefixLayout)
            return SpanLayout(base, len(ids), where)

        return prompt, spanned
    prompt = list(ids)
    for place, span in reversed(list(zip(places, spans))):
        prompt[place : place + 1] = [token for token in span if token not in masks and token != sop]
    return [*prompt, sop], model.layout
