"""Where the loop's batches come from: records that are all in memory, or a stream without an end.

A source hands out windows, one for each optimizer step, and every window carries the place behind it. The loop writes
the place of the last step into its checkpoints, and a source that starts there goes on with the window that is next.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from glmkit.data.blank_infilling import IGNORED, BlankMaker, Sample, collate
from glmkit.data.corpus import RowStream
from glmkit.data.cutting import Limits
from glmkit.data.examples import Example, Examples, plan_epoch
from glmkit.data.examples import collate as collate_examples
from glmkit.data.packing import collate_packed, plan_rows
from glmkit.data.prepared import Reading
from glmkit.errors import DataError, UsageError
from glmkit.train.blocks import DataBlock, Recipe, TrainBlock

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
    """Examples in an order that seed and epoch decide.

    Args:
        examples: All of them.
        pad_token_id: Fills short rows.
        block: Batch sizes and seed.
        pack_to: Columns of rows that several examples share; None: an example has a row of its own.
        mixed: General examples that are mixed in.
        mix_ratio: How many of those for each example; every pass takes the next ones.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        pad_token_id: int,
        block: TrainBlock,
        *,
        pack_to: int | None = None,
        mixed: Sequence[Example] = (),
        mix_ratio: float = 0.0,
    ) -> None:
        self._examples, self._mixed = Examples.of(examples), Examples.of(mixed)
        self._pad, self._block, self._pack_to = pad_token_id, block, pack_to
        self._mixed_in = round(len(self._examples) * mix_ratio) if self._mixed else 0
        self._lengths: list[int] = [*self._examples.lengths.tolist(), *self._mixed.lengths.tolist()]
        self._sizes: dict[tuple[int, int], int] = {}
        self._turn: tuple[int, list[int]] = (-1, [])

    def fingerprint(self) -> str:
        """Return a SHA-256 over all ids and labels, of what is mixed in too."""
        own = self._examples.fingerprint()
        return f"{own} {self._mixed.fingerprint()}" if self._mixed_in else own

    def steps(self, epochs: int, batches: int) -> int:
        """Return the number of windows of so many passes.

        Args:
            epochs: Passes over the examples.
            batches: Most batches of a window.
        """
        for epoch in range(epochs):
            if (epoch, batches) not in self._sizes:
                self._plan(epoch, batches)
        return sum(self._sizes[epoch, batches] for epoch in range(epochs))

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
                    yield Window([self._batch(rows) for rows in window], epoch, {"windows": number})
            epoch += 1

    def batch(self, members: Sequence[int]) -> Batch:
        """Join examples, a row for each.

        Args:
            members: Their numbers.
        """
        chosen = [self._example(number) for number in members]
        return _of(chosen, collate_examples(chosen, self._pad))

    def filled(self, epoch: int = 0) -> float:
        """Return the share of the columns of a pass that hold a token, not padding.

        Args:
            epoch: The pass.
        """
        columns = tokens = 0
        for window in self._plan(epoch, 1):
            for rows in window:
                lengths = [sum(self._lengths[number] for number in row) for row in rows]
                columns += max(lengths) * len(lengths)
                tokens += sum(lengths)
        return tokens / columns

    def _example(self, number: int) -> Example:
        own = len(self._examples)
        return self._examples[number] if number < own else self._mixed[number - own]

    def _batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        if self._pack_to is None:
            return self.batch([number for row in rows for number in row])
        chosen = [[self._example(number) for number in row] for row in rows]
        return _of([example for row in chosen for example in row], collate_packed(chosen, self._pad))

    def _plan(self, epoch: int, accumulation: int) -> list[list[list[list[int]]]]:
        """Windows of batches of rows of numbers."""
        block, members = self._block, self._members(epoch)
        lengths = [self._lengths[number] for number in members]
        if self._pack_to is None:
            sizes = {"batch_size": block.per_device_train_batch_size}
            if block.tokens_per_batch is not None:
                sizes = {"tokens_per_batch": block.tokens_per_batch}
            planned = plan_epoch(lengths, seed=block.seed, epoch=epoch, accumulation=accumulation, **sizes)
            plan = [[[[members[place]] for place in batch] for batch in window] for window in planned]
        else:
            packed = plan_rows(lengths, self._pack_to, seed=block.seed, epoch=epoch)
            rows = [[members[place] for place in row] for row in packed]
            size = block.per_device_train_batch_size
            if block.tokens_per_batch is not None:
                size = max(1, block.tokens_per_batch // self._pack_to)
            plan = _grouped(_grouped(rows, size), accumulation)
        self._sizes[epoch, accumulation] = len(plan)
        return plan

    def _members(self, epoch: int) -> list[int]:
        """All examples, and those that are mixed in: the next of endless passes, each in an order of its own."""
        own = len(self._examples)
        members = list(range(own))
        for number in range(epoch * self._mixed_in, (epoch + 1) * self._mixed_in):
            turn, place = divmod(number, len(self._mixed))
            members.append(own + self._mixed_order(turn)[place])
        return members

    def _mixed_order(self, turn: int) -> list[int]:
        if self._turn[0] != turn:
            order = list(range(len(self._mixed)))
            random.Random(f"mixed {self._block.seed} {turn}").shuffle(order)
            self._turn = (turn, order)
        return self._turn[1]


_T = TypeVar("_T")


def _grouped(items: Sequence[_T], size: int) -> list[list[_T]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _of(examples: Sequence[Example], inputs: dict[str, torch.Tensor]) -> Batch:
    return Batch(
        inputs,
        label_tokens=sum(example.label_tokens for example in examples),
        tokens=sum(len(example.input_ids) for example in examples),
        where=[example.where for example in examples],
    )


def reading_of(block: DataBlock, file: str, limit: int | None, context_tokens: int | None = None) -> Reading:
    """Say how a file of a recipe is read.

    Args:
        block: The recipe's `data` block.
        file: One of its files.
        limit: Use only so many records.
        context_tokens: Columns that the model has positions for, None if nobody knows.
    """
    return Reading(
        file,
        format=block.format,
        prompt_column=block.prompt_column,
        response_column=block.response_column,
        history_column=block.history_column,
        max_records=limit,
        limits=Limits(block.max_source_length, block.max_target_length, _columns(block, context_tokens)),
        preset=block.preset,
        loss_on=block.loss_on,
        skip_overlength=block.skip_overlength,
    )


def records_of(
    recipe: Recipe, examples: Examples, mixed: Examples, pad_token_id: int, context_tokens: int | None = None
) -> Records:
    """Make the source of a recipe's training windows: packed if it says so, with general records mixed in.

    Args:
        recipe: The recipe.
        examples: What is learnt.
        mixed: Examples of its mix_file; none if it has none.
        pad_token_id: Fills short rows.
        context_tokens: Columns that the model has positions for, None if nobody knows.
    """
    block = recipe.data
    pack_to = _columns(block, context_tokens) if block.packing else None
    return Records(examples, pad_token_id, recipe.train, pack_to=pack_to, mixed=mixed, mix_ratio=block.mix_ratio)


def _columns(block: DataBlock, context_tokens: int | None) -> int:
    return block.max_length if context_tokens is None else min(block.max_length, context_tokens)


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
        raise UsageError(
            "train.max_steps is missing: a corpus is a stream without an end", hint="for instance train.max_steps=1000"
        )

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
