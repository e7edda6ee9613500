"""What a run says while it goes: lines of metrics in a file that any program can follow."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

Figures = dict[str, float]
"""Figures of one step, or of several."""


class Journal:
    """The lines of metrics.jsonl, and the steps since the last of them.

    Args:
        output: The run's folder.
        writes: Whether this process writes; others only remember.
    """

    def __init__(self, output: Path, *, writes: bool = True) -> None:
        self._file, self._writes = output / "metrics.jsonl", writes
        self.lines: list[Figures] = []
        self.pending: list[Figures] = []

    def resume(self, step: int, pending: list[Figures]) -> None:
        """Go on behind a step; later lines, of steps that will be done again, are taken out.

        Args:
            step: Steps done.
            pending: Steps since the last line, as the checkpoint has them.
        """
        self.lines = [line for line in _read_lines(self._file) if line["step"] <= step]
        self.pending = pending
        if self._writes:
            self._file.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, figures: Figures) -> None:
        """Remember a step.

        Args:
            figures: step, epoch, loss, learning_rate, grad_norm, tokens, label_tokens, seconds.
        """
        self.pending.append(figures)

    def write(self, measured: Figures) -> None:
        """Join the steps since the last line into one.

        Args:
            measured: What was measured beside, for instance eval_loss.
        """
        line = {**_summary(self.pending), **measured}
        self.pending = []
        self.lines.append(line)
        if self._writes:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def last(self, name: str) -> float | None:
        """Return the newest value of a figure, None if there is none.

        Args:
            name: For instance "eval_loss".
        """
        return next((line[name] for line in reversed(self.lines) if name in line), None)


def _summary(steps: Sequence[Figures]) -> Figures:
    """Join the figures of several steps into one line of metrics."""
    seconds = sum(one["seconds"] for one in steps)
    label_tokens = sum(one["label_tokens"] for one in steps)
    return {
        "step": steps[-1]["step"],
        "epoch": steps[-1]["epoch"],
        "loss": sum(one["loss"] * one["label_tokens"] for one in steps) / label_tokens,
        "learning_rate": steps[-1]["learning_rate"],
        "grad_norm": max(one["grad_norm"] for one in steps),
        "tokens_per_second": sum(one["tokens"] for one in steps) / max(seconds, 1e-9),
    }


def _read_lines(path: Path) -> list[Figures]:
    """Read metrics; a last line that a kill cut short is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines
