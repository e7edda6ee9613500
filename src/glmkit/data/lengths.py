"""How long the records of a file are, what the limits did to them, and which limits would do less."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from glmkit.data.cutting import Cuts

_ROUNDED_TO = 8  # proposed lengths are multiples of this
_MOST_CUT = 0.01  # share of the records that a proposed length may cut
_BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class Spread:
    """Lengths of many texts in tokens: the median, the 95th percentile (nearest rank), and the longest."""

    p50: int = 0
    p95: int = 0
    max: int = 0

    @classmethod
    def of(cls, lengths: Iterable[int]) -> Spread:
        """Measure lengths; none give zeros."""
        ordered = sorted(lengths)
        if not ordered:
            return cls()
        return cls(ordered[(len(ordered) - 1) // 2], ordered[-(-len(ordered) * 95 // 100) - 1], ordered[-1])

    def __str__(self) -> str:
        return f"half have at most {self.p50} tokens, 95 % at most {self.p95}, the longest {self.max}"


@dataclass(frozen=True)
class TruncationReport:
    """What a split of the data is like, and what the limits did to it.

    Attributes:
        records: Records read.
        tokens: Tokens of all examples, after cutting.
        label_tokens: How many of them are learnt.
        prompts: Lengths of prompts with their template, before cutting.
        answers: Lengths of last answers without their end mark, before cutting.
        cut_history: Records that lost their oldest rounds.
        cut_prompts: Records whose user text was shortened.
        cut_answers: Records whose answer was cut, and which therefore teach no end (but with the preset "paper").
        skipped: Records that were left out because they are too long.
        proposed: The lengths that would cut less than one record in a hundred, by the names of the settings.
        duplicates: Records that the training data has too.
    """

    records: int = 0
    tokens: int = 0
    label_tokens: int = 0
    prompts: Spread = Spread()
    answers: Spread = Spread()
    cut_history: int = 0
    cut_prompts: int = 0
    cut_answers: int = 0
    skipped: int = 0
    proposed: tuple[tuple[str, int], ...] = ()
    duplicates: int = 0

    def __str__(self) -> str:
        return (
            f"{self.records} records, {self.cut_prompts} prompts cut, {self.cut_answers} answers cut, "
            f"{self.cut_history} histories cut, {self.skipped} left out"
        )

    def page(self, name: str) -> str:
        """Write everything, in a few lines.

        Args:
            name: What the split is called.
        """
        lines = [
            f"{name}: {self.records} records, {self.tokens:,} tokens, {self.label_tokens:,} of them learnt",
            f"  prompts: {self.prompts}",
            f"  answers: {self.answers}",
        ]
        count = self.cut_prompts + self.cut_answers + self.cut_history + self.skipped
        if count:
            where = [
                (self.cut_history, "lost their oldest rounds"),
                (self.cut_prompts, "had the user's text shortened"),
                (self.cut_answers, "had the answer cut"),
                (self.skipped, "are too long and left out"),
            ]
            shown = [f"{number} ({number / self.records:.1%}) {what}" for number, what in where if number]
            lines.append(f"  cut: {', '.join(shown)}")
            settings = " ".join(f"data.{key}={value}" for key, value in self.proposed)
            lines.append(f"  lengths that cut less than 1 %: {settings}")
        else:
            lines.append("  cut: nothing")
        if self.duplicates:
            lines.append(f"  {self.duplicates} of them stand in the training data too: they measure memory")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TruncationReport:
        """Read what `to_json` wrote."""
        report = cls(**values)
        prompts, answers = Spread(**values["prompts"]), Spread(**values["answers"])
        proposed = tuple((key, value) for key, value in values["proposed"])
        return replace(report, prompts=prompts, answers=answers, proposed=proposed)


def measured(
    cuts: Sequence[Cuts], *, records: int, skipped: int, tokens: Iterable[int], label_tokens: Iterable[int]
) -> TruncationReport:
    """Make the report of a split.

    Args:
        cuts: What was cut, of each record.
        records: How many were read.
        skipped: How many were left out.
        tokens: Length of each example.
        label_tokens: How many tokens of each are learnt.
    """
    prompts, answers = [one.prompt_tokens for one in cuts], [one.answer_tokens for one in cuts]
    done = [] if skipped else cuts  # what is left out is not cut
    return TruncationReport(
        records=records,
        tokens=int(sum(tokens)),
        label_tokens=int(sum(label_tokens)),
        prompts=Spread.of(prompts),
        answers=Spread.of(answers),
        cut_history=sum(one.rounds > 0 for one in done),
        cut_prompts=sum(one.characters > 0 for one in done),
        cut_answers=sum(one.answer > 0 for one in done),
        skipped=skipped,
        proposed=(
            ("max_source_length", _enough(prompts)),
            ("max_target_length", _enough(answers)),
            ("max_length", _enough([prompt + answer + 1 for prompt, answer in zip(prompts, answers)])),
        ),
    )


def _enough(lengths: Sequence[int]) -> int:
    """The shortest length, rounded up, that fewer than one in a hundred exceed."""
    ordered = sorted(lengths)
    if not ordered:
        return _ROUNDED_TO
    allowed = max(0, -(-len(ordered) * _MOST_CUT // 1) - 1)  # strictly fewer
    longest = ordered[-1 - int(allowed)]
    return -(-longest // _ROUNDED_TO) * _ROUNDED_TO


def histogram(lengths: Sequence[int] | np.ndarray[Any, Any], bars: int = 10) -> str:
    """Draw how many records have which length.

    Args:
        lengths: Tokens of each record.
        bars: Lines.

    Returns:
        A line for each range of lengths.
    """
    counts, edges = np.histogram(np.asarray(lengths), bins=bars)
    most = max(1, int(counts.max()))
    lines = []
    for number, (low, high, count) in enumerate(zip(edges[:-1], edges[1:], counts), start=1):
        first, last = int(np.ceil(low)), int(np.ceil(high)) - (number < bars)
        lines.append(f"{first:>7} – {last:>6} {'█' * round(_BAR * count / most):<{_BAR}} {count}")
    return "\n".join(lines)
