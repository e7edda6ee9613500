"""Make token ids and labels of records, and batches of near-equal length of those.

The ids come from `glmkit.chat.templates`, the same functions that build a prompt for inference, so what is trained is
token for token what is asked later. Labels are the ids themselves where the model is to learn them and -100 elsewhere;
they are not shifted, but for GLM (2021), whose labels stand where they are predicted.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch

from glmkit.chat.templates import conversation_ids, text_ids
from glmkit.data.cutting import Cuts, Limits, fit, forget, official_ids
from glmkit.data.lengths import TruncationReport, measured
from glmkit.data.records import Record
from glmkit.data.seq2seq import Seq2SeqExample, Seq2SeqTask, encode_seq2seq
from glmkit.errors import DataError, TokenizerError, UsageError

IGNORED = -100
# How many batches are sorted by length together: more means less padding, fewer means more mixing.
_SORTED_TOGETHER = 64
_SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class Example:
    """One tokenised record.

    Attributes:
        input_ids: (T,) int32.
        labels: (T,) int32, -100 where nothing is learnt.
        label_tokens: How many positions are predicted: labels other than -100, where they are shifted from the second
            position on.
        where: Where the record came from.
        sep: Columns in front of `sop`, which are read in both directions; 0 in causal models.
        position_ids: (2, T) int32, for GLM (2021); None where they follow from the columns.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    label_tokens: int
    where: str
    sep: int = 0
    position_ids: torch.Tensor | None = None


class Examples(Sequence[Example]):
    """Examples in memory, with what is asked of all of them.

    Args:
        examples: The examples.
    """

    def __init__(self, examples: Iterable[Example]) -> None:
        self._examples = list(examples)
        self.lengths = np.array([len(example.input_ids) for example in self._examples], dtype=np.int64)
        self.label_tokens = np.array([example.label_tokens for example in self._examples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        return self._examples[index]

    def fingerprint(self) -> str:
        """Return a SHA-256 over all ids and labels, see `fingerprint`."""
        return fingerprint(self._examples)

    def digests(self) -> list[int]:
        """Return a number for each example that is equal for equal ids."""
        return [hash(example.input_ids.numpy().tobytes()) for example in self]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        """Return the examples as they are if they are of this class already.

        Args:
            examples: The examples.
        """
        return examples if isinstance(examples, Examples) else cls(examples)


def make_example(
    tokenizer: Any, record: Record, limits: Limits | None = None, *, loss_on: str = "answers", preset: str = "whole"
) -> tuple[Example, Cuts]:
    """Tokenise one record.

    A limit shortens history and the user's text and never the template around them, so the mark at which the answer
    begins stays. An answer that is cut loses its end mark too: the model must not learn to stop in the middle of a
    sentence.

    Args:
        tokenizer: The model's tokenizer.
        record: What to tokenise.
        limits: Where to cut; None cuts nowhere.
        loss_on: "answers" learns what the assistant says, "all" every token after the two prefix ids.
        preset: "whole", or "paper" to cut as the official scripts do.

    Returns:
        The example and what was cut.

    Raises:
        DataError: If the template alone is longer than the limit of the source.
        UsageError: If the record has no form for this model.
    """
    limits = limits or Limits()
    if loss_on == "all" and tokenizer.generation in (0, 1):
        raise UsageError(
            "loss_on: all: this model reads a prompt in both directions, so each of its tokens is seen beforehand",
            hint="use loss_on: answers",
        )
    if tokenizer.generation == 0:
        return _blank_example(tokenizer, record, limits, preset)
    if record.text:
        ids, learnt, cuts = _text_ids(tokenizer, record.text, limits)
    elif preset == "paper":
        ids, learnt, cuts = official_ids(tokenizer, record, limits)
    else:
        record, end, cuts = fit(tokenizer, record, limits)
        ids, learnt = conversation_ids(tokenizer, record.messages)
        forget(tokenizer, record, learnt)
        ids, learnt = ids[:end], learnt[:end]
    if loss_on == "all":
        learnt = [False, False] + [True] * (len(ids) - 2)
    input_ids = torch.tensor(ids, dtype=torch.int32)
    labels = torch.where(torch.tensor(learnt, dtype=torch.bool), input_ids, IGNORED)
    sep = ids.index(tokenizer.bos_token_id) if tokenizer.generation == 1 else 0
    return Example(input_ids, labels, int((labels[1:] != IGNORED).sum()), record.where, sep), cuts


def seq2seq_example(encoded: Seq2SeqExample, where: str) -> Example:
    """Make an example of an encoded record of GLM (2021).

    Args:
        encoded: The record with its target.
        where: Where it came from.
    """
    labels = encoded.labels.int()
    learnt = int((labels != IGNORED).sum())
    return Example(encoded.input_ids.int(), labels, learnt, where, encoded.sep, encoded.position_ids.int())


def _blank_example(tokenizer: Any, record: Record, limits: Limits, preset: str) -> tuple[Example, Cuts]:
    """Question and answer as the filling of one blank behind the question, see `glmkit.data.seq2seq`.

    The official script fills every source up to its limit, and the model reads the filling; here it is as long as it
    is, but for the preset "paper".
    """
    if record.text or [message.role for message in record.messages] not in (["user", "assistant"], ["assistant"]):
        raise UsageError("GLM fills one blank behind one text: it learns from a question and its answer, nothing else")
    source, target = "".join(message.content for message in record.messages[:-1]), record.answer
    prompt = len(tokenizer.encode_with_masks(source)) + 3  # [CLS], the blank and the end mark of the source
    answer = len(tokenizer.encode_with_masks(f" {target}"))
    if preset == "paper":
        columns, learnt = limits.source_tokens or prompt, limits.target_tokens or answer + 1
    else:
        kept = answer if limits.target_tokens is None else min(answer, limits.target_tokens)
        learnt = kept + (kept == answer)  # the end mark of a whole answer
        columns = min(prompt, limits.source_tokens or prompt)
        if limits.total_tokens is not None:
            columns = min(columns, max(limits.total_tokens - learnt, limits.total_tokens // 2))
            learnt = min(learnt, limits.total_tokens - columns)
    task = Seq2SeqTask("any", columns, learnt, 1, 0.0, 0, 0, 1, 1e-5)
    cuts = Cuts(prompt, answer, characters=max(0, prompt - columns), answer=max(0, answer + 1 - learnt))
    return seq2seq_example(encode_seq2seq(tokenizer, task, source, target), record.where), cuts


def _text_ids(tokenizer: Any, text: str, limits: Limits) -> tuple[list[int], list[bool], Cuts]:
    """Plain text behind the prefix ids, and its end mark if it is not cut; all of it is learnt."""
    whole, learnt = text_ids(tokenizer, text)
    cut, tokens = whole[: limits.total_tokens], sum(learnt) - 1
    return cut, learnt[: len(cut)], Cuts(len(whole) - tokens - 1, tokens, answer=len(whole) - len(cut))


def make_examples(
    tokenizer: Any,
    records: Sequence[Record],
    limits: Limits | None = None,
    *,
    loss_on: str = "answers",
    preset: str = "whole",
    skip_overlength: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[Examples, TruncationReport]:
    """Tokenise records and count what was cut.

    Args:
        tokenizer: The model's tokenizer.
        records: What to tokenise.
        limits: Where to cut.
        loss_on: See `make_example`.
        preset: See `make_example`.
        skip_overlength: Leave out records that are too long instead of cutting them.
        progress: Called with the number of records done.

    Returns:
        The examples and the report.

    Raises:
        DataError: If records have no form in this model's template or nothing to learn, or none is left.
    """
    made: list[Example] = []
    all_cuts: list[Cuts] = []
    problems: list[str] = []
    skipped = 0
    for number, record in enumerate(records, start=1):
        example, cuts, problem = try_example(
            tokenizer, record, limits, loss_on=loss_on, preset=preset, skip_overlength=skip_overlength
        )
        if problem is not None:
            problems.append(problem)
        if cuts is not None:
            all_cuts.append(cuts)
        if example is not None:
            made.append(example)
        skipped += example is None and problem is None
        if progress is not None:
            progress(number)
    return joined(made, all_cuts, problems, skipped, len(records))


def try_example(
    tokenizer: Any,
    record: Record,
    limits: Limits | None,
    *,
    loss_on: str = "answers",
    preset: str = "whole",
    skip_overlength: bool = False,
) -> tuple[Example | None, Cuts | None, str | None]:
    """Tokenise a record of many.

    Args:
        tokenizer: See `make_examples`, like the others.
        record: The record.
        limits: Where to cut.
        loss_on: What is learnt.
        preset: How to cut.
        skip_overlength: Leave it out instead of cutting it.

    Returns:
        The example, unless it is left out; what was cut; what is wrong with it, with its place.
    """
    try:
        example, cuts = make_example(tokenizer, record, limits, loss_on=loss_on, preset=preset)
    except DataError as error:
        return (None, None, None) if skip_overlength else (None, None, error.message)
    except (UsageError, TokenizerError) as error:
        return None, None, f"{record.where}: {error.message}"
    if skip_overlength and cuts:
        return None, cuts, None
    if not example.label_tokens or (record.messages and not record.answer.strip() and not record.messages[-1].metadata):
        return None, cuts, f"{record.where}: there is nothing to learn in it" + (", it was cut" if cuts else "")
    return example, cuts, None


def joined(
    examples: Iterable[Example], cuts: Sequence[Cuts], problems: Sequence[str], skipped: int, records: int
) -> tuple[Examples, TruncationReport]:
    """Join what was made of many records.

    Args:
        examples: The examples.
        cuts: What was cut, of each record that has a form.
        problems: What is wrong with records.
        skipped: Records that were left out.
        records: How many there are.

    Returns:
        The examples and the report.

    Raises:
        DataError: If there are problems, or no examples.
    """
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:_SHOWN_PROBLEMS])
        raise DataError(
            f"{len(problems)} of {records} records cannot be learnt:\n{shown}",
            hint="correct them or take them out; an answer needs text, and a limit must leave some of it",
        )
    kept = Examples(examples)
    report = measured(cuts, records=records, skipped=skipped, tokens=kept.lengths, label_tokens=kept.label_tokens)
    if not kept:
        raise DataError(f"nothing is left to learn from: {report}", hint="raise the length limits")
    return kept, report


def fingerprint(examples: Iterable[Example]) -> str:
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
        and without one attention takes its fast path; ChatGLM-6B finds mask and positions by its own ids. For GLM
        (2021) position_ids (B, 2, T) and attention_mask (B,), the columns that are read in both directions.

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
    batch = {"input_ids": input_ids, "labels": labels}
    if examples[0].position_ids is not None:
        positions = torch.zeros(len(examples), 2, shape[1], dtype=torch.int64)
        for row, (example, length) in enumerate(zip(examples, lengths)):
            assert example.position_ids is not None, "examples of different models"
            positions[row, :, :length] = example.position_ids
        batch |= {"position_ids": positions, "attention_mask": torch.tensor([example.sep for example in examples])}
    return batch


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
