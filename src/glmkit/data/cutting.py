"""Where a record that is too long is cut: old rounds first, then the user's text, then the end of the answer.

    system   round 1   round 2   …   last question   mark of the answer   answer   end mark
             (1) whole rounds go     (2) shortened   stays                (3) cut  (3) goes with what is cut

What the official scripts do instead is in `official_ids`, for comparison with their figures: they cut the whole prompt
on the right, the mark of the answer with it, and put an end mark behind an answer that does not end there.

Source: ptuning/main.py of THUDM/ChatGLM-6B and THUDM/ChatGLM2-6B, finetune_chatmodel_demo of THUDM/ChatGLM3, tasks of
THUDM/GLM (behaviour, not code).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from glmkit.chat.messages import Message
from glmkit.chat.templates import answer_ids, conversation_ids, prompt_ids
from glmkit.data.records import Record
from glmkit.errors import DataError, UsageError


@dataclass(frozen=True)
class Limits:
    """Where texts are cut. None means no limit of this kind.

    Attributes:
        source_tokens: Most tokens of the prompt of the last answer, template and earlier rounds included.
        target_tokens: Most tokens of that answer, the end mark not counted.
        total_tokens: Most tokens of a whole record.
    """

    source_tokens: int | None = None
    target_tokens: int | None = None
    total_tokens: int | None = None


@dataclass(frozen=True)
class Cuts:
    """What the limits did to a record.

    Attributes:
        prompt_tokens: Tokens of the last answer's prompt before anything was cut.
        answer_tokens: Tokens of that answer before, the end mark not counted.
        rounds: Oldest rounds that were left out.
        characters: Characters that were taken from the end of the last question; with the official cutting, tokens
            from the end of the prompt.
        answer: Tokens that were cut from the end.
    """

    prompt_tokens: int
    answer_tokens: int
    rounds: int = 0
    characters: int = 0
    answer: int = 0

    def __bool__(self) -> bool:
        """Whether anything was cut."""
        return bool(self.rounds or self.characters or self.answer)


def fit(tokenizer: Any, record: Record, limits: Limits) -> tuple[Record, int | None, Cuts]:
    """Shorten a dialogue.

    A prompt gives way to its answer down to half of the whole record, then the answer is cut.

    Args:
        tokenizer: The model's tokenizer.
        record: A dialogue.
        limits: Where to cut.

    Returns:
        The dialogue that is left; how many of its ids are kept, None for all; and what was cut.

    Raises:
        DataError: The template alone is longer than the limit of the source.
    """

    def prompt_tokens(candidate: Record) -> int:
        return len(prompt_ids(tokenizer, candidate.messages[:-1]))

    prompt = prompt_tokens(record)
    answer = len(answer_ids(tokenizer, record.messages[-1], last=True)) - 1
    kept = answer if limits.target_tokens is None else min(answer, limits.target_tokens)
    shorter, rounds, characters, left = record, 0, 0, prompt
    room = _room(limits, kept)
    if room is not None and prompt > room:
        shorter, rounds = _without_old_rounds(record, lambda candidate: prompt_tokens(candidate) <= room)
        shorter, characters = _with_short_question(shorter, lambda candidate: prompt_tokens(candidate) <= room)
        left = prompt_tokens(shorter)
        if limits.source_tokens is not None and left > limits.source_tokens:
            raise DataError(
                f"{record.where}: the prompt needs {_bare(shorter, prompt_tokens)} tokens without any text of the "
                f"last question, the limit is {limits.source_tokens}",
                hint="raise data.max_source_length, or leave such records out: data.skip_overlength=true",
            )
    whole = left + answer + 1
    # The end mark is not counted, so an answer of exactly target_tokens keeps it.
    end = whole if kept == answer else left + kept
    end = end if limits.total_tokens is None else min(end, limits.total_tokens)
    cut = 0 if end == whole else left + answer - end
    return shorter, None if end == whole else end, Cuts(prompt, answer, rounds, characters, max(cut, end < whole))


def _room(limits: Limits, answer: int) -> int | None:
    """Tokens for the prompt of an answer of so many tokens; None for any number."""
    total = limits.total_tokens
    rooms = [limits.source_tokens, None if total is None else max(total - answer - 1, total // 2)]
    return min((room for room in rooms if room is not None), default=None)


def _without_old_rounds(record: Record, fits: Callable[[Record], bool]) -> tuple[Record, int]:
    """Leave out as few of the oldest rounds as it takes, at most all but the last; the system message stays."""
    messages = record.messages
    first = 1 if messages[0].role == "system" else 0
    starts = [number for number, message in enumerate(messages) if message.role == "user"]
    shorter, left_out = record, 0
    for number, start in enumerate(starts[1:], start=1):
        if fits(shorter):
            break
        kept = messages[:first] + messages[start:]
        shorter, left_out = replace(record, messages=kept, loss=record.loss[:first] + record.loss[start:]), number
    return shorter, left_out


def _with_short_question(record: Record, fits: Callable[[Record], bool]) -> tuple[Record, int]:
    """Shorten the last question, in whole characters; one that would not be enough alone stays as it is."""
    if fits(record) or not fits(_asking(record, 0)):
        return record, 0
    length = len(_question(record).content)
    kept, too_many = 0, length
    while kept + 1 < too_many:
        middle = (kept + too_many) // 2
        if fits(_asking(record, middle)):
            kept = middle
        else:
            too_many = middle
    return _asking(record, kept), length - kept


def _question(record: Record) -> Message:
    return record.messages[_place(record)]


def _place(record: Record) -> int:
    """Where the last question is; 0 if there is none."""
    return max((number for number, message in enumerate(record.messages) if message.role == "user"), default=0)


def _asking(record: Record, characters: int) -> Record:
    """The record with so many characters of the last question."""
    place = _place(record)
    if record.messages[place].role != "user":
        return record
    shorter = replace(record.messages[place], content=record.messages[place].content[:characters])
    return replace(record, messages=(*record.messages[:place], shorter, *record.messages[place + 1 :]))


def _bare(record: Record, prompt_tokens: Callable[[Record], int]) -> int:
    return prompt_tokens(_asking(record, 0))


def official_ids(tokenizer: Any, record: Record, limits: Limits) -> tuple[list[int], list[bool], Cuts]:
    """Cut a question and its answer as the official script of the tokenizer's generation does.

    generation 1    q (source - 1) [gMASK] sop | a (target - 2) eop      sop is learnt too
    generation 2    [gMASK] sop template (source in all) | a (target) </s>
    generation 3    [gMASK] sop q (source in all) | a (target) </s>      no template around the question
    conversations   everything, cut on the right at total_tokens

    Args:
        tokenizer: The model's tokenizer.
        record: A dialogue.
        limits: What the scripts call max_source_length, max_target_length and max_seq_length.

    Returns:
        The ids, which of them are learnt, and what was cut.

    Raises:
        UsageError: A length that the script needs is missing.
    """
    generation = tokenizer.generation
    pair = len(record.messages) == 2 and not record.messages[-1].metadata
    if generation == 4 or (generation == 3 and not pair):
        ids, learnt = conversation_ids(tokenizer, record.messages)
        asked = len(prompt_ids(tokenizer, record.messages[:-1]))
        forget(tokenizer, record, learnt)
        end = limits.total_tokens if limits.total_tokens is not None else len(ids)
        return ids[:end], learnt[:end], Cuts(asked, len(ids) - asked - 1, answer=max(0, len(ids) - end))
    if limits.source_tokens is None or limits.target_tokens is None:
        raise UsageError(
            "data.preset=paper cuts at data.max_source_length and data.max_target_length, and one of them is missing",
            hint="the official scripts have 64 and 64 (ChatGLM-6B) or 64 and 128 (ChatGLM2)",
        )
    answer = tokenizer.encode_text(record.messages[-1].content)
    if generation == 3:
        whole = [*tokenizer.prefix_ids, *tokenizer.encode_text(record.messages[-2].content)]
    else:
        whole = prompt_ids(tokenizer, record.messages[:-1])
    if generation == 1:  # what stands behind the text is put there after the cut
        text = whole[: len(whole) - len(tokenizer.prefix_ids)][: limits.source_tokens - 1]
        prompt, learnt_from = [*text, *tokenizer.prefix_ids], len(text) + 1
        target = answer[: max(0, limits.target_tokens - 2)]
    else:
        prompt = whole[: limits.source_tokens]
        learnt_from, target = len(prompt), answer[: limits.target_tokens]
    ids = [*prompt, *target, tokenizer.eos_token_id]
    cuts = Cuts(len(whole), len(answer), characters=len(whole) - len(prompt), answer=len(answer) - len(target))
    return ids, [number >= learnt_from and record.loss[-1] for number in range(len(ids))], cuts


def forget(tokenizer: Any, record: Record, learnt: list[bool]) -> None:
    """Take back what is to be learnt of assistant messages that the record marks as not to be learnt.

    Args:
        tokenizer: The model's tokenizer.
        record: A dialogue.
        learnt: For each of its ids whether it is learnt; changed in place.
    """
    for number, (message, learn) in enumerate(zip(record.messages, record.loss)):
        if message.role == "assistant" and not learn:
            start = len(prompt_ids(tokenizer, record.messages[:number]))
            # One more: the id behind an answer, </s> or the next role, is learnt as its end.
            stop = start + len(answer_ids(tokenizer, message, last=False)) + 1
            learnt[start:stop] = [False] * len(learnt[start:stop])
