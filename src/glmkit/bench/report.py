"""From timings to figures: one record for each row of the table, as JSON lines and as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glmkit.bench.machine import Limits
from glmkit.bench.measure import Timing, paired_ratio

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One figure of one subject.

    Args:
        what: "decode" or "prefill".
        subject: Whose.
        layers: Blocks of the model that was measured.
        batch: Rows.
        context: Tokens in the cache before, or of the prompt.
        tokens: Tokens that each row got; of a prompt those that were read.
        seconds: Of one step, or of the whole prompt.
        mark: "~" if no repetition was clean.
        clean: Number of clean repetitions.
        tokens_per_second: Of all rows together.
        read_bytes: Weights and cache that a step reads; None for a prompt.
        read_share: read_bytes per second, as a share of what the machine can read.
        operations: Multiplications and additions of a step or prompt.
        matrix_share: Operations per second, as a share of the machine's best.
        ratio: How many times as fast as the baseline, round by round; None without one.
        ratio_mark: "~" if there was no round in which both were clean.
        whole_tokens_per_second: What the model with all its blocks would do, computed from two slices; None where all
            blocks were measured.
    """

    what: str
    subject: str
    layers: int
    batch: int
    context: int
    tokens: int
    seconds: float
    mark: str
    clean: int
    tokens_per_second: float
    read_bytes: int | None
    read_share: float | None
    operations: float
    matrix_share: float | None
    ratio: float | None = None
    ratio_mark: str = ""
    whole_tokens_per_second: float | None = None


def whole_seconds(slice_seconds: float, block_seconds: float, layers: int, whole: int) -> float:
    """What a whole model takes, from a slice of it and from its first block alone.

    What lies outside of the blocks, embedding, output layer and choice, is in both:
    outside = (layers * one - slice) / (layers - 1), and whole = (slice - outside) * whole / layers + outside.

    Args:
        slice_seconds: Of the slice.
        block_seconds: Of one block with the same output layer.
        layers: Blocks of the slice, 2 or more.
        whole: Blocks of the whole model.

    Returns:
        Its seconds.
    """
    outside = (layers * block_seconds - slice_seconds) / (layers - 1)
    outside = min(max(0.0, outside), block_seconds, slice_seconds)  # noise must not make anything negative
    return (slice_seconds - outside) * whole / layers + outside


def decode_row(
    subject: str, layers: int, batch: int, context: int, tokens: int, timing: Timing, *,
    read_bytes: int, operations: float, limits: Limits, peak: float,
) -> Row:  # fmt: skip
    """The figures of decoding.

    Args:
        subject: Whose.
        layers: Blocks of the model.
        batch: Rows.
        context: Tokens in the cache before.
        tokens: Steps of a repetition.
        timing: The repetitions.
        read_bytes: What one step reads.
        operations: What one step computes.
        limits: Of the machine.
        peak: Its best operations per second for this kind of weights; 0 if unknown.
    """
    seconds = timing.seconds / tokens
    return Row(
        "decode", subject, layers, batch, context, tokens, seconds, timing.mark, timing.clean, batch / seconds,
        read_bytes, share(read_bytes / seconds, limits.read_bytes), operations, share(operations / seconds, peak),
    )  # fmt: skip


def prefill_row(subject: str, layers: int, prompt: int, timing: Timing, *, operations: float, peak: float) -> Row:
    """The figures of reading a prompt; arguments as in `decode_row`."""
    seconds = timing.seconds
    return Row(
        "prefill", subject, layers, 1, prompt, prompt, seconds, timing.mark, timing.clean, prompt / seconds,
        None, None, operations, share(operations / seconds, peak),
    )  # fmt: skip


def compared(row: Row, ours: Timing, baseline: Timing) -> Row:
    """A row with its ratio to the baseline's repetitions."""
    ratio, mark = paired_ratio(ours, baseline)
    return Row(**asdict(row) | {"ratio": ratio, "ratio_mark": mark})


def share(value: float, limit: float) -> float | None:
    """A value as a share of a limit; None where the limit is not known."""
    return value / limit if limit else None


# --- writing ---


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; figures that other processes disturbed are marked with "~"."""
    scaled = any(row.whole_tokens_per_second is not None for row in rows)
    head = ["", "layers", "batch", "tokens", "tok/s", "all layers (scaled)", "GB/s", "of read", "TOP/s", "of peak", "x"]
    lines = [[head[0], *head[1:]]]
    for row in rows:
        lines.append(
            [
                f"{row.what}, {row.subject}",
                str(row.layers),
                str(row.batch),
                str(row.context),
                row.mark + number(row.tokens_per_second),
                "" if row.whole_tokens_per_second is None else row.mark + number(row.whole_tokens_per_second),
                "" if row.read_bytes is None else f"{row.read_bytes / row.seconds / 1e9:.1f}",
                percent(row.read_share),
                f"{row.operations / row.seconds / 1e12:.2f}",
                percent(row.matrix_share),
                "" if row.ratio is None else f"{row.ratio_mark}{row.ratio:.2f}",
            ]
        )
    if not scaled:
        lines = [line[:5] + line[6:] for line in lines]
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its head; text to the left, all else to the right."""
    widths = [max(4, *(len(line[place]) for line in lines)) for place in range(len(lines[0]))]

    def shown(line: Sequence[str]) -> str:
        cells = [cell.ljust(width) if not place else cell.rjust(width)
                 for place, (cell, width) in enumerate(zip(line, widths))]  # fmt: skip
        return f"| {' | '.join(cells)} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([shown(lines[0]), shown(rule), *map(shown, lines[1:])])


def number(value: float) -> str:
    """Three digits that say something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(value: float | None) -> str:
    """A share in whole percent; nothing for None."""
    return "" if value is None else f"{100 * value:.0f} %"


class Journal:
    """Records as JSON lines in a file, each written when it is known: a run that is killed leaves what it found.

    Args:
        path: The file, which is lengthened; None for none.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, record: dict[str, Any]) -> None:
        """Writes one record."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"schema": SCHEMA} | record, ensure_ascii=False) + "\n")
