"""Make token ids and labels of records, and batches of near-equal length of those.

The ids come from `glmkit.chat.templates`, the same functions that build a prompt for inference, so what is trained is
token for token what is asked later. Labels are the ids themselves where the model is to learn them and -100 elsewhere;
they are not shifted.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from glmkit.chat.messages import Message
from glmkit.chat.templates import answer_ids, conversation_ids, prompt_ids
from glmkit.data.records import Record
from glmkit.errors import DataError, TokenizerError, UsageError

IGNORED = -100
# How many batches are sorted by length together: more means less padding, fewer means more mixing.
_SORTED_TOGETHER = 64


@dataclass(frozen=True)
class Example:
    """One tokenised record.

    Attributes:
        input_ids: (T,) int32.
        labels: (T,) int32, -100 where nothing is learnt.
        label_tokens: How many positions are predicted: labels other than -100 from the second position on.
        where: Where the record came from.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    label_tokens: int
    where: str


@dataclass(frozen=True)
class Limits:
    """Where texts are cut. None means no limit of this kind.

    Attributes:
        source_tokens: Most tokens of the prompt of a single question, template included.
        target_tokens: Most tokens of its answer, the end mark not counted.
        total_tokens: Most tokens of a whole record.
    """

    source_tokens: int | None = None
    target_tokens: int | None = None
    total_tokens: int | None = None


@dataclass(frozen=True)
class TruncationReport:
    """What the limits did to a data file.

    Attributes:
        records: Records read.
        cut_prompts: Records whose user text was shortened.
        cut_answers: Records whose answer was cut, and which therefore teach no end.
        dropped: Records left without anything to learn.
    """

    records: int = 0
    cut_prompts: int = 0
    cut_answers: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        return (
            f"{self.records} records, {self.cut_prompts} prompts cut, {self.cut_answers} answers cut, "
            f"{self.dropped} dropped"
        )


def make_example(
    tokenizer: Any, record: Record, limits: Limits | None = None, *, loss_on: str = "answers"
) -> tuple[Example, bool, bool]:
    """Tokenise one record.

    A limit shortens the user's text and never the template around it, so the mark at which the answer begins stays.
    An answer that is cut loses its end mark too: the model must not learn to stop in the middle of a sentence.

    Args:
        tokenizer: The model's tokenizer.
        record: What to tokenise.
        limits: Where to cut; None cuts nowhere.
        loss_on: "answers" learns what the assistant says, "all" every token after the two prefix ids.

    Returns:
        The example, whether its prompt was cut, whether its answer was cut.

    Raises:
        DataError: If the template alone is longer than the limit of the source.
    """
    limits = limits or Limits()
    messages = record.messages
    cut_prompt = False
    end: int | None = limits.total_tokens
    if len(messages) - sum(message.role == "system" for message in messages) == 2:
        if limits.source_tokens is not None:
            shortened = _fit_prompt(tokenizer, messages[:-1], limits.source_tokens, record.where)
            cut_prompt = shortened != messages[:-1]
            messages = (*shortened, messages[-1])
        if limits.target_tokens is not None:
            start = len(prompt_ids(tokenizer, messages[:-1]))
            target_end = start + limits.target_tokens
            # The end mark is not counted, so an answer of exactly target_tokens keeps it.
            if start + len(answer_ids(tokenizer, messages[-1], last=True)) - 1 > target_end:
                end = target_end if end is None else min(end, target_end)
    ids, mask = conversation_ids(tokenizer, messages)
    mask = list(mask)
    for start, stop in _unlearnt_spans(tokenizer, record, messages):
        mask[start:stop] = [False] * (stop - start)
    cut_answer = end is not None and len(ids) > end
    if loss_on == "all":
        if tokenizer.generation == 1:
            raise UsageError(
                "loss_on: all: ChatGLM-6B reads a prompt in both directions, so each of its tokens is seen beforehand",
                hint="use loss_on: answers",
            )
        mask = [False, False] + [True] * (len(ids) - 2)
    input_ids = torch.tensor(ids[:end], dtype=torch.int32)
    labels = torch.where(torch.tensor(mask[:end], dtype=torch.bool), input_ids, IGNORED)
    label_tokens = int((labels[1:] != IGNORED).sum())
    return Example(input_ids, labels, label_tokens, record.where), cut_prompt, cut_answer


def make_examples(
    tokenizer: Any,
    records: Sequence[Record],
    limits: Limits | None = None,
    *,
    loss_on: str = "answers",
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Example], TruncationReport]:
    """Tokenise records, drop those with nothing to learn, and count what was cut.

    Args:
        tokenizer: The model's tokenizer.
        records: What to tokenise.
        limits: Where to cut.
        loss_on: See `make_example`.
        progress: Called with the number of records done.

    Returns:
        The examples and the report.

    Raises:
        DataError: If a record has no form in this model's template, or nothing is left to learn from.
    """
    examples: list[Example] = []
    cut_prompts = cut_answers = dropped = 0
    for number, record in enumerate(records, start=1):
        try:
            example, cut_prompt, cut_answer = make_example(tokenizer, record, limits, loss_on=loss_on)
        except (UsageError, TokenizerError) as error:
            raise DataError(f"{record.where}: {error.message}", hint=error.hint) from None
        cut_prompts += cut_prompt
        cut_answers += cut_answer
        if example.label_tokens:
            examples.append(example)
        else:
            dropped += 1
        if progress is not None:
            progress(number)
    report = TruncationReport(len(records), cut_prompts, cut_answers, dropped)
    if not examples:
        raise DataError(
            f"nothing is left to learn from: {report}", hint="raise the length limits or check 'loss' in the data"
        )
    return examples, report


def fingerprint(examples: Sequence[Example]) -> str:
    """Return a SHA-256 over ids and labels in order: equal data, template, limits and tokenizer give equal values."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.input_ids.numpy().tobytes())
        digest.update(example.labels.numpy().tobytes())
    return digest.hexdigest()


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Join examples into a batch, padded on the right.

    Args:
        examples: The examples of one batch, B of them.
        pad_token_id: What to fill with.

    Returns:
        input_ids (B, T) int64 and labels (B, T) int64. No mask: in a causal model no token looks at what comes later,
        and without one attention takes its fast path.

    Raises:
        DataError: If the batch has no label.
    """
    if not any(example.label_tokens for example in examples):
        raise DataError(f"a batch has nothing to learn: {', '.join(example.where for example in examples[:3])}")
    lengths = [len(example.input_ids) for example in examples]
    shape = (len(examples), max(lengths))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, (example, length) in enumerate(zip(examples, lengths)):
        input_ids[row, :length] = example.input_ids
        labels[row, :length] = example.labels
    return {"input_ids": input_ids, "labels": labels}


def plan_epoch(
    lengths: Sequence[int],
    *,
    seed: int,
    epoch: int,
    accumulation: int = 1,
    batch_size: int | None = None,
    tokens_per_batch: int | None = None,
) -> list[list[list[int]]]:
    """Decide which examples every optimizer step of an epoch sees; a pure function, so a resumed run sees the same.

    Examples are shuffled, sorted by length within groups, cut into windows of one optimizer step, and the windows are
    shuffled again. A window is the same set of examples however it is divided into batches.

    Args:
        lengths: Tokens of each example.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0; every epoch has its own order.
        accumulation: Batches in a window.
        batch_size: Examples in a batch.
        tokens_per_batch: Most padded tokens in a batch, instead of `batch_size`.

    Returns:
        Windows of batches of example numbers; every example is in exactly one.
    """
    if (batch_size is None) == (tokens_per_batch is None):
        raise ValueError("name batch_size or tokens_per_batch")
    shuffled = list(range(len(lengths)))
    generator = random.Random(f"{seed}-{epoch}")
    generator.shuffle(shuffled)
    average = max(1, sum(lengths) // max(1, len(lengths)))
    per_batch = batch_size if batch_size is not None else max(1, (tokens_per_batch or 1) // average)
    group = per_batch * accumulation * _SORTED_TOGETHER
    windows: list[list[list[int]]] = []
    for start in range(0, len(shuffled), group):
        members = sorted(shuffled[start : start + group], key=lambda number: (lengths[number], number))
        batches = _cut(members, lengths, batch_size, tokens_per_batch)
        windows += [batches[first : first + accumulation] for first in range(0, len(batches), accumulation)]
    generator.shuffle(windows)
    return windows


def _cut(
    members: Sequence[int], lengths: Sequence[int], batch_size: int | None, tokens_per_batch: int | None
) -> list[list[int]]:
    """Cut numbers sorted by length into batches of a size or of a number of padded tokens."""
    batches: list[list[int]] = []
    for number in members:
        last = batches[-1] if batches else []
        full = (
            len(last) >= batch_size
            if batch_size is not None
            else (len(last) + 1) * lengths[number] > (tokens_per_batch or 0)
        )
        if not last or full:
            batches.append([number])
        else:
            last.append(number)
    return batches


def _fit_prompt(tokenizer: Any, prompt: tuple[Message, ...], limit: int, where: str) -> tuple[Message, ...]:
    """Shorten the user's text, in whole characters, until the prompt has at most `limit` tokens."""
    if len(prompt_ids(tokenizer, prompt)) <= limit:
        return prompt
    *before, user = prompt
    kept, too_many = 0, len(user.content)
    while kept + 1 < too_many:
        middle = (kept + too_many) // 2
        shortened = (*before, replace(user, content=user.content[:middle]))
        if len(prompt_ids(tokenizer, shortened)) <= limit:
            kept = middle
        else:
            too_many = middle
    fitted = (*before, replace(user, content=user.content[:kept]))
    needed = len(prompt_ids(tokenizer, fitted))
    if needed > limit:
        raise DataError(
            f"{where}: the prompt needs {needed} tokens without any text of the user, the limit is {limit}",
            hint="raise data.max_source_length",
        )
    return fitted


def _unlearnt_spans(tokenizer: Any, record: Record, messages: tuple[Message, ...]) -> list[tuple[int, int]]:
    """Find the ids of assistant messages that the record marks as not to be learnt."""
    spans = []
    for number, (message, learn) in enumerate(zip(messages, record.loss)):
        if message.role == "assistant" and not learn:
            start = len(prompt_ids(tokenizer, messages[:number]))
            # One more: the id behind an answer, </s> or the next role, is learnt as its end.
            spans.append((start, start + len(answer_ids(tokenizer, message, last=False)) + 1))
    return spans
