"""Where the loop's batches come from: records that are all in memory, or a stream without an end.

A source hands out windows, one for each optimizer step, and every window carries the place behind it. The loop writes
the place of the last step into its checkpoints, and a source that starts there goes on with the window that is next.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from glmkit.data.blank_infilling import IGNORED, BlankMaker, Sample, collate
from glmkit.data.corpus import RowStream
from glmkit.data.examples import Example, fingerprint, plan_epoch
from glmkit.data.examples import collate as collate_examples
from glmkit.errors import DataError, UsageError
from glmkit.train.arguments import TrainBlock

Place = dict[str, Any]
"""A place in a source: small, and of what JSON can hold."""

_EMPTY_CALLS = 100  # so many batches without a sample, one after the other, are no accident


@dataclass(frozen=True)
class Batch:
    """What one call of the model sees.

    Attributes:
        inputs: Keyword arguments of the model's `label_loss`.
        label_tokens: How many positions are learnt.
        tokens: Tokens without padding.
        where: Where its rows come from.
    """

    inputs: dict[str, torch.Tensor]
    label_tokens: int
    tokens: int
    where: list[str]


@dataclass(frozen=True)
class Window:
    """What one optimizer step sees.

    Attributes:
        batches: Its batches.
        epoch: Pass over the data, from 0.
        place: The place behind it.
    """

    batches: list[Batch]
    epoch: int
    place: Place


class Source(Protocol):
    """What the loop asks of a source."""

    def fingerprint(self) -> str:
        """Return a text that is equal for equal data only."""

    def steps(self, epochs: int, batches: int) -> int:
        """Return the number of windows of at most so many batches in so many passes over the data."""

    def windows(self, place: Place, batches: int) -> Iterator[Window]:
        """Yield windows of at most so many batches from a place on, without an end; an empty place is the beginning."""


class Records:
    """Examples in memory, in an order that seed and epoch decide.

    Args:
        examples: All of them.
        pad_token_id: Fills short rows.
        block: Batch sizes and seed.
    """

    def __init__(self, examples: Sequence[Example], pad_token_id: int, block: TrainBlock) -> None:
        self._examples, self._pad, self._block = examples, pad_token_id, block
        self._lengths = [len(example.input_ids) for example in examples]

    def fingerprint(self) -> str:
        """Return a SHA-256 over all ids and labels."""
        return fingerprint(self._examples)

    def steps(self, epochs: int, batches: int) -> int:
        """Return the number of windows of so many passes.

        Args:
            epochs: Passes over the examples.
            batches: Most batches of a window.
        """
        return sum(len(self._plan(epoch, batches)) for epoch in range(epochs))

    def windows(self, place: Place, batches: int) -> Iterator[Window]:
        """Yield windows, pass after pass.

        Args:
            place: `windows`, how many were handed out before.
            batches: Most batches of a window.
        """
        number, epoch = 0, 0
        while True:
            for window in self._plan(epoch, batches):
                number += 1
                if number > place.get("windows", 0):
                    yield Window([self.batch(members) for members in window], epoch, {"windows": number})
            epoch += 1

    def batch(self, members: Sequence[int]) -> Batch:
        """Join examples.

        Args:
            members: Their numbers.
        """
        chosen = [self._examples[number] for number in members]
        return Batch(
            collate_examples(chosen, self._pad),
            label_tokens=sum(example.label_tokens for example in chosen),
            tokens=sum(self._lengths[number] for number in members),
            where=[example.where for example in chosen],
        )

    def _plan(self, epoch: int, accumulation: int) -> list[list[list[int]]]:
        block = self._block
        sizes = {"batch_size": block.per_device_train_batch_size}
        if block.tokens_per_batch is not None:
            sizes = {"tokens_per_batch": block.tokens_per_batch}
        return plan_epoch(self._lengths, seed=block.seed, epoch=epoch, accumulation=accumulation, **sizes)


class Blanks:
    """Rows of a corpus with blanks in them, without an end.

    Batch number n has rows of its own and a generator of its own, so a place is the number of the next batch.

    Args:
        rows: The rows.
        maker: Makes the blanks.
        batch_size: Rows of a batch.
        seed: Seed of the blanks.
    """

    def __init__(self, rows: RowStream, maker: BlankMaker, *, batch_size: int, seed: int = 0) -> None:
        self.rows, self.maker = rows, maker
        self._batch_size, self._seed = batch_size, seed

    def fingerprint(self) -> str:
        """Return what the corpus says of its files."""
        return self.rows.corpus.fingerprint()

    def steps(self, epochs: int, batches: int) -> int:
        """Refuse, because a stream has no end.

        Args:
            epochs: Not used.
            batches: Not used.

        Raises:
            UsageError: Always.
        """
        raise UsageError("train.max_steps is missing: a corpus is a stream without an end")

    def windows(self, place: Place, batches: int) -> Iterator[Window]:
        """Yield windows from a batch on.

        Args:
            place: `batches`, how many were drawn before, and `bad_lines`, how many lines were left out.
            batches: Batches of a window.

        Raises:
            DataError: If rows cannot be read, or nothing can be learnt from them.
        """
        number, bad = place.get("batches", 0), self.rows.corpus.bad
        bad.number = place.get("bad_lines", 0)
        while True:
            made: list[Batch] = []
            empty = 0
            while len(made) < batches:
                samples = self.samples(number)
                number += 1
                if samples:
                    made.append(batch_of(samples))
                elif (empty := empty + 1) == _EMPTY_CALLS:
                    raise DataError(
                        f"{empty} batches, one after the other, have no row in which the wanted blanks fit",
                        hint="use longer rows (corpus.seq_length) or other blanks",
                    )
            yield Window(made, 0, {"batches": number, "bad_lines": bad.number})

    def samples(self, number: int) -> list[Sample]:
        """Draw the samples of a batch.

        Args:
            number: Which batch.

        Returns:
            Those with something to learn; none if no blanks fit.
        """
        rows = [self.rows.row(number * self._batch_size + index) for index in range(self._batch_size)]
        generator = random.Random(f"blanks {self._seed} {number}")
        return [sample for sample in self.maker.make(rows, generator) if any(sample.loss_mask)]


def batch_of(samples: Sequence[Sample]) -> Batch:
    """Join samples with blanks.

    Args:
        samples: The samples.
    """
    inputs = collate(samples)
    return Batch(
        inputs,
        label_tokens=int((inputs["labels"] != IGNORED).sum()),
        tokens=sum(len(sample.input_ids) for sample in samples),
        where=[sample.where for sample in samples],
    )


def cached_ends(text_of: Callable[[int], str], marks: str) -> Callable[[int], bool]:
    """Make a function that says of an id whether a sentence ends with it.

    Args:
        text_of: Gives the text of an id.
        marks: A token with one of these characters ends a sentence.

    Returns:
        The function; it asks for the text of an id once.
    """
    known: dict[int, bool] = {}

    def ends(token: int) -> bool:
        if token not in known:
            known[token] = any(mark in text_of(token) for mark in marks)
        return known[token]

    return ends
