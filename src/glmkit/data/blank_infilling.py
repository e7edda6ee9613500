"""Blank infilling, the objective GLM is pre-trained with: spans of a text are cut out and written again behind it.

    row      ENC t1 t2 t3 t4 t5 t6            spans (t2 t3) and (t5)
    part A   ENC t1 [M] t4 [M] t6             every token sees all of part A
    part B   sop t5       sop t2 t3           every token sees part A and what stands before it in part B
    targets  t5  eop      t2  t3 eop          what each token of part B predicts
    row 0    0 1 2 3 4 5 | 4 4  2 2 2         first positions: in part B the place of the span's blank in part A
    row 1    0 0 0 0 0 0 | 1 2  1 2 3         second positions: the place inside the span

There are three kinds of spans. Short ones ("bert", blank [MASK]) cover 15 % of the row; whole sentences ("sentence",
blank [sMASK]) likewise; "gpt" cuts out one long span (blank [gMASK]), in the middle or up to the end of the row. One
call draws one kind for all of its rows.

Every random number comes from the generator that is given, in the order in which the official code draws them, so that
its samples can be computed again one for one. Only the noise on part B has a generator of its own, as it has there.

Source: Du et al., "GLM: General Language Model Pretraining with Autoregressive Blank Infilling", ACL 2022; THUDM/GLM
blocklm_utils.py (what it does, and its defaults).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from glmkit.data.corpus import Row
from glmkit.data.mixtures import Mixture

Kind = Literal["bert", "sentence", "gpt"]
Span = tuple[int, int]

IGNORED = -100
# Tokens that contain one of these end a sentence.
SENTENCE_MARKS = ".?!;:。？！；…\n"


@dataclass(frozen=True)
class BlankIds:
    """Ids of the control tokens that samples are built with.

    Attributes:
        eos: Ends a document.
        enc: Begins a document, [CLS].
        mask: Blank of a short span, [MASK].
        smask: Blank of a sentence, [sMASK].
        gmask: Blank of a long span, [gMASK].
        sop: Begins a span in part B.
        eop: Is predicted at the end of a span.
        dblock: Noise in place of a token; None if the tokenizer has none.
    """

    eos: int
    enc: int
    mask: int
    smask: int
    gmask: int
    sop: int
    eop: int
    dblock: int | None = None


@dataclass(frozen=True)
class Sample:
    """A row with blanks: part A and part B, see the drawing above; all lists have the same length T.

    Attributes:
        input_ids: What the model reads.
        targets: What each position predicts; in part A the ids of part A, which are not learnt.
        loss_mask: 1 where the target is learnt.
        positions: First row of positions.
        block_positions: Second row of positions.
        sep: Length of part A, the separator that the model takes as its mask.
        kind: Which spans were cut out.
        ends: Whether every span ends with a target `eop`; not so for spans that reach to the end of the row.
        where: Where the row comes from.
    """

    input_ids: list[int]
    targets: list[int]
    loss_mask: list[int]
    positions: list[int]
    block_positions: list[int]
    sep: int
    kind: Kind
    ends: bool = True
    where: str = ""


class BlankMaker:
    """Makes samples from rows.

    Args:
        ids: The control tokens.
        mixture: Which blanks to make, and how often.
        ends_sentence: Says of an id whether a sentence ends with it.
        max_length: Most tokens of a row, from which the length of shorter pieces is drawn.
    """

    def __init__(self, ids: BlankIds, mixture: Mixture, ends_sentence: Callable[[int], bool], max_length: int) -> None:
        self.ids, self.mixture, self.max_length = ids, mixture, max_length
        self.ends_sentence = ends_sentence
        mean = mixture.avg_block_length
        self._lengths = range(1, mixture.max_block_length)
        self._length_weights = [math.exp(-mean) * mean**length / math.factorial(length) for length in self._lengths]

    def make(self, rows: Sequence[Row], generator: random.Random, noise: random.Random | None = None) -> list[Sample]:
        """Make blanks of one kind in every row of a batch.

        Args:
            rows: The rows, each with `ENC` in front.
            generator: Source of all random numbers but those of the noise.
            noise: Decides which tokens of part B become [dBLOCK]; None takes `generator`.

        Returns:
            The samples. They are more than the rows if these were cut into pieces, and fewer if spans did not fit into
            the documents of a row; the list may be empty.
        """
        mixture = self.mixture
        noise = noise or generator
        if generator.random() < mixture.short_seq_prob:
            rows = self._shorten(rows, generator)
        single = generator.random() < mixture.single_span_prob
        drawn = 0.0 if single else generator.random()
        if single or drawn < mixture.bert_prob:
            samples = [self._short_spans(row, generator, noise, single) for row in rows]
        elif drawn < mixture.bert_prob + mixture.gap_sentence_prob:
            samples = [self._sentences(row, generator) for row in rows]
        else:
            lengths = [len(row.ids) for row in rows]
            longest = generator.randint(int(mixture.gpt_min_ratio * min(lengths)), max(lengths) - 2)
            samples = [self._long_span(row, min(longest, len(row.ids) - 2), generator) for row in rows]
        return [sample for sample in samples if sample is not None]

    # --- the three kinds ---

    def _short_spans(self, row: Row, generator: random.Random, noise: random.Random, single: bool) -> Sample | None:
        wanted = 1 if single else int(self.mixture.bert_ratio * len(row.ids))
        lengths: list[int] = []
        while sum(lengths) < wanted:
            lengths += generator.choices(self._lengths, weights=self._length_weights)
        spans = self._place(row.ids, lengths, generator)
        return None if spans is None else self._cut_out(row, spans, generator, "bert", noise)

    def _sentences(self, row: Row, generator: random.Random) -> Sample | None:
        sentences = self._sentence_spans(row.ids)
        generator.shuffle(sentences)
        wanted, chosen, covered = int(self.mixture.gap_sentence_ratio * len(row.ids)), [], 0
        for start, end in sentences:
            chosen.append((start, end))
            covered += end - start
            if covered >= wanted:
                break
        return self._cut_out(row, chosen, generator, "sentence") if chosen else None

    def _long_span(self, row: Row, length: int, generator: random.Random) -> Sample | None:
        several_documents = self.ids.eos in row.ids[:-1]
        # Nothing is drawn for a row of several documents: its long span always reaches to the end.
        if several_documents or generator.random() < self.mixture.gpt_infill_prob:
            return self._left_to_right(row, len(row.ids) - length)
        spans = self._place(row.ids, [length], generator)
        return None if spans is None else self._cut_out(row, spans, generator, "gpt")

    def _left_to_right(self, row: Row, division: int) -> Sample:
        """Cut out everything from `division` on; the row goes on behind it, so no end is learnt."""
        source, target = [*row.ids[:division], self._blank("gpt")], row.ids[division:]
        return Sample(
            input_ids=[*source, self.ids.sop, *target[:-1]],
            targets=[*source, *target],
            loss_mask=[0] * len(source) + row.loss_mask[division:],
            positions=[*range(len(source)), *[division] * len(target)],
            block_positions=[0] * len(source) + list(range(1, len(target) + 1)),
            sep=len(source),
            kind="gpt",
            ends=False,
            where=row.where,
        )

    # --- where spans lie ---

    def _sentence_spans(self, ids: Sequence[int]) -> list[Span]:
        """Find the sentences of a row; one that its document does not finish is none, unless the row ends there."""
        spans, start = [], 1 if ids[0] == self.ids.enc else 0
        for place, token in enumerate(ids):
            if token == self.ids.eos:
                start = place + 1
            elif self.ends_sentence(token):
                spans.append((start, place + 1))
                start = place + 1
        if start < len(ids):
            spans.append((start, len(ids)))
        return spans

    def _place(self, ids: Sequence[int], lengths: list[int], generator: random.Random) -> list[Span] | None:
        """Choose places for spans of these lengths, or None if they do not all fit."""
        generator.shuffle(lengths)
        generator.shuffle(lengths)  # twice, as in the official code: the numbers drawn later depend on it
        documents = sorted(self._documents(ids), key=lambda document: document[1])
        spans: list[Span] = []
        for number, (offset, size) in enumerate(documents):
            last = number == len(documents) - 1
            room = size if last else int(self.mixture.bert_ratio * size)
            taken: list[int] = []
            for length in lengths[len(spans) :]:
                # The last, longest document must also hold a token between any two spans.
                if sum(taken) + length + (len(taken) if last else 0) > room:
                    break
                taken.append(length)
            spans += _scatter(taken, offset, size, generator)
        return spans if len(spans) == len(lengths) else None

    def _documents(self, ids: Sequence[int]) -> list[Span]:
        """Return (first usable place, usable tokens) of every document, the last one first."""
        starts = [0, *(place + 1 for place, token in enumerate(ids) if token == self.ids.eos)]
        ends = [*(start - 1 for start in starts[1:]), len(ids)]
        found = []
        for start, end in reversed(list(zip(starts, ends))):
            first = start + 1 if start < len(ids) and ids[start] == self.ids.enc else start
            size = end - first
            # The last token of the row always stays, so that there is something behind every blank.
            found.append((first, size - 1 if end == len(ids) and size > 0 else size))
        return found

    # --- from spans to a sample ---

    def _blank(self, kind: Kind) -> int:
        if not self.mixture.task_mask:
            return self.ids.mask
        return {"bert": self.ids.mask, "sentence": self.ids.smask, "gpt": self.ids.gmask}[kind]

    def _cut_out(
        self, row: Row, spans: list[Span], generator: random.Random, kind: Kind, noise: random.Random | None = None
    ) -> Sample:
        """Lay out part A and part B; `noise` is given for short spans only."""
        order = list(spans)
        generator.shuffle(order)
        part_a: list[int] = []
        blanks: dict[int, int] = {}  # from the start of a span to its place in part A
        last = 0
        for start, end in sorted(spans):
            part_a += row.ids[last:start]
            blanks[start] = len(part_a)
            part_a.append(self._blank(kind))
            last = end
        part_a += row.ids[last:]
        part_b: list[int] = []
        targets: list[int] = []
        positions: list[int] = []
        block_positions: list[int] = []
        for start, end in order:
            part_b += [self.ids.sop, *self._with_noise(row.ids[start:end], noise)]
            targets += [*row.ids[start:end], self.ids.eop]
            positions += [blanks[start]] * (end - start + 1)
            block_positions += range(1, end - start + 2)
        seen = self._blur(part_a, len(row.ids), sorted(blanks.values()), generator) if noise else part_a
        return Sample(
            input_ids=seen + part_b,
            targets=part_a + targets,
            loss_mask=[0] * len(part_a) + [1] * len(part_b),
            positions=[*range(len(part_a)), *positions],
            block_positions=[0] * len(part_a) + block_positions,
            sep=len(part_a),
            kind=kind,
            where=row.where,
        )

    def _with_noise(self, span: list[int], noise: random.Random | None) -> list[int]:
        probability = self.mixture.block_mask_prob
        if noise is None or probability <= 0:
            return span
        assert self.ids.dblock is not None, "noise needs a token [dBLOCK]"
        return [self.ids.dblock if noise.random() < probability else token for token in span]

    def _blur(self, part_a: list[int], row_length: int, blanks: list[int], generator: random.Random) -> list[int]:
        """Replace tokens near blanks by [dBLOCK], if the mixture asks for it."""
        number, reach = int(self.mixture.context_mask_ratio * row_length), self.mixture.context_mask_range
        if self.mixture.context_mask_ratio <= 0:
            return part_a
        assert self.ids.dblock is not None, "noise needs a token [dBLOCK]"
        near = {place for blank in blanks for place in range(blank - reach, blank + reach + 1)}
        candidates = sorted((near & set(range(len(part_a)))) - set(blanks))
        chosen = set(generator.sample(candidates, min(number, len(candidates))))
        return [self.ids.dblock if place in chosen else token for place, token in enumerate(part_a)]

    def _shorten(self, rows: Sequence[Row], generator: random.Random) -> list[Row]:
        """Cut pieces out of rows, from the start of a sentence to the end of one where that leaves enough."""
        length = generator.randrange(32, self.max_length - 1)
        pieces = []
        for row in rows:
            ids, loss_mask = row.ids[1:], row.loss_mask[1:]
            for _ in range((self.max_length - 1) // length):
                start, end = 0, len(ids)
                if length < len(ids):
                    start = generator.randrange(len(ids) - length)
                    while start > 0 and not self._begins_sentence(ids, start):
                        start -= 1
                    end = start + length
                    while end > start and not (self.ends_sentence(ids[end - 1]) or ids[end] == self.ids.eos):
                        end -= 1
                    if end - start < length // 2:
                        end = start + length
                pieces.append(Row([self.ids.enc, *ids[start:end]], [0, *loss_mask[start:end]], row.where))
        return pieces

    def _begins_sentence(self, ids: Sequence[int], place: int) -> bool:
        before = ids[place - 1]
        return ids[place] != self.ids.eos and (before == self.ids.eos or self.ends_sentence(before))


def _scatter(lengths: Sequence[int], offset: int, size: int, generator: random.Random) -> list[Span]:
    """Place spans, in this order, into `size` tokens from `offset` on, so that no two of them touch."""
    free = size - sum(lengths) - len(lengths) + 1
    places = sorted(generator.randrange(free + 1) for _ in lengths)
    spans = []
    for place, length in zip(places, lengths):
        spans.append((offset + place, offset + place + length))
        offset += length + 1
    return spans


def reconstruct(sample: Sample) -> list[int]:
    """Put the spans of part B back into the blanks of part A.

    Args:
        sample: A sample.

    Returns:
        The ids of the row that it was made from.
    """
    spans: dict[int, list[int]] = {}
    for place in range(sample.sep, len(sample.targets)):
        spans.setdefault(sample.positions[place], []).append(sample.targets[place])
    ids: list[int] = []
    for place, token in enumerate(sample.targets[: sample.sep]):
        if place in spans:
            ids += spans[place][:-1] if sample.ends else spans[place]
        else:
            ids.append(token)
    return ids


def collate(samples: Sequence[Sample], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Join samples into a batch, padded on the right.

    Args:
        samples: B samples of at most T tokens.
        pad_id: Input id of padding; the official code has 0.

    Returns:
        What a GLM model takes: input_ids (B, T), labels (B, T) with -100 where nothing is learnt, the label standing at
        the position that predicts it; position_ids (B, 2, T); attention_mask (B,), the lengths of part A. All int64.
    """
    length = max(len(sample.input_ids) for sample in samples)
    inputs = torch.full((len(samples), length), pad_id, dtype=torch.int64)
    labels = torch.full((len(samples), length), IGNORED, dtype=torch.int64)
    positions = torch.zeros((len(samples), 2, length), dtype=torch.int64)
    for number, sample in enumerate(samples):
        size = len(sample.input_ids)
        inputs[number, :size] = torch.tensor(sample.input_ids)
        targets, learnt = torch.tensor(sample.targets), torch.tensor(sample.loss_mask, dtype=torch.bool)
        labels[number, :size] = torch.where(learnt, targets, IGNORED)
        positions[number, :, :size] = torch.tensor([sample.positions, sample.block_positions])
    separators = torch.tensor([sample.sep for sample in samples])
    return {"input_ids": inputs, "labels": labels, "position_ids": positions, "attention_mask": separators}
