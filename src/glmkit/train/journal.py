"""What a run says while it goes: lines of metrics that any program can follow, answers, a picture, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from glmkit.errors import MissingDependencyError
from glmkit.train.curves import curves_of, draw_png
from glmkit.writing import write_text_atomic

Figures = dict[str, float]
"""Figures of one step, or of several."""

MEASURED = ("tokens_per_second", "samples_per_second", "seconds", "peak_memory_bytes", "mfu")
"""Figures that depend on the machine and the moment; all others are equal in a run that was cut and resumed."""


_SECONDS_BETWEEN_PICTURES = 10.0


class Journal:
    """The lines of metrics.jsonl and samples.jsonl, and the steps since the last of them.

    Args:
        output: The run's folder.
        writes: Whether this process writes; others only remember.
        report_to: Trackers that get the metrics too.
        measure: Makes figures of the machine from the sums of some steps, for instance memory and MFU.

    Raises:
        MissingDependencyError: If a tracker is not installed.
    """

    def __init__(
        self,
        output: Path,
        *,
        writes: bool = True,
        report_to: Sequence[str] = (),
        measure: Callable[[Figures], Figures] | None = None,
    ) -> None:
        self._output, self._writes, self._measure = output, writes, measure
        self._file, self._samples = output / "metrics.jsonl", output / "samples.jsonl"
        self.lines: list[Figures] = []
        self.pending: list[Figures] = []
        self._tracker: Any = None
        self._drawn = time.monotonic()
        self._tracks = writes and "tensorboard" in report_to
        if self._tracks and find_spec("tensorboard") is None:
            raise MissingDependencyError("tensorboard", "track")

    def resume(self, step: int, pending: list[Figures]) -> None:
        """Go on behind a step; later lines, of steps that will be done again, are taken out.

        Args:
            step: Steps done.
            pending: Steps since the last line, as the checkpoint has them.
        """
        self.lines = [line for line in _read_lines(self._file) if line["step"] <= step]
        self.pending = pending
        if not self._writes:
            return
        _write_lines(self._file, self.lines)
        if self._samples.exists():
            _write_lines(self._samples, [line for line in _read_lines(self._samples) if line["step"] <= step])

    def add(self, figures: Figures) -> None:
        """Remember a step.

        Args:
            figures: step, epoch, loss, learning_rate, grad_norm, tokens, label_tokens, samples, seconds; a step that
                was left out has `skipped`. What is no number is not kept.
        """
        self.pending.append({name: value for name, value in figures.items() if math.isfinite(value)})

    def write(self, measured: Figures) -> None:
        """Join the steps since the last line into one.

        Args:
            measured: What was measured beside, for instance eval_loss.
        """
        line = _summary(self.pending)
        if self._measure is not None:
            line |= self._measure(_sums(self.pending))
        line |= measured
        self.pending = []
        self.lines.append(line)
        if self._writes:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self._tracks:
            self._track(line)

    def write_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Keep answers of the model.

        Args:
            step: Steps done.
            samples: Prompt and answer of each.
        """
        if self._writes and samples:
            with open(self._samples, "a", encoding="utf-8") as file:
                for prompt, answer in samples:
                    line = {"step": step, "prompt": prompt, "answer": answer}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def draw(self) -> None:
        """Draw the loss so far, if matplotlib is installed and the last picture is some seconds old."""
        if self._writes and time.monotonic() - self._drawn > _SECONDS_BETWEEN_PICTURES:
            self._drawn = time.monotonic()
            (self._output / "plots").mkdir(exist_ok=True)
            for curve in curves_of(self.lines)[:1]:
                draw_png(curve, self._output / "plots" / f"{curve.name}.png")

    def last(self, name: str) -> float | None:
        """Return the newest value of a figure, None if there is none.

        Args:
            name: For instance "eval_loss".
        """
        return next((line[name] for line in reversed(self.lines) if name in line), None)

    def close(self) -> None:
        """End what goes to trackers."""
        if self._tracker is not None:
            self._tracker.close()

    def _track(self, line: Figures) -> None:
        step = int(line["step"])
        if self._tracker is None:
            from torch.utils.tensorboard import SummaryWriter

            # What an earlier, cut run wrote of steps that are done again is hidden.
            self._tracker = SummaryWriter(str(self._output / "tensorboard"), purge_step=step)
        for name, value in line.items():
            if name != "step":
                self._tracker.add_scalar(name, value, step)
        self._tracker.flush()


def warning_signs(lines: Sequence[Figures]) -> list[str]:
    """Say what the curves show that people ask about.

    Args:
        lines: Lines of metrics.jsonl.

    Returns:
        A sentence each; none if all looks well or too little is known.
    """
    signs = []
    measured = [line["eval_loss"] for line in lines if "eval_loss" in line]
    if len(measured) >= 3 and measured[-1] > measured[-2] > measured[-3]:
        lowest = min(range(len(measured)), key=measured.__getitem__)
        step = [line["step"] for line in lines if "eval_loss" in line][lowest]
        signs.append(
            f"the validation loss has risen since step {step:.0f}: the records are being learnt by heart; "
            "load_best_model_at_end keeps the best, early_stopping_patience ends in time"
        )
    losses = [line["loss"] for line in lines if "loss" in line]
    if len(losses) >= 6:
        third = len(losses) // 3
        first, last = sum(losses[:third]) / third, sum(losses[-third:]) / third
        if last > 0.98 * first and first > 0.1:
            signs.append(
                f"the loss has not fallen ({first:.3f} at first, {last:.3f} at last): try another learning_rate"
            )
    skipped = sum(line.get("skipped_steps", 0) for line in lines)
    if lines and skipped > 0.1 * lines[-1]["step"]:
        signs.append(f"{skipped:.0f} steps were left out because of values that are no numbers; prefer bf16 to fp16")
    return signs


def _sums(steps: Sequence[Figures]) -> Figures:
    return {name: sum(one.get(name, 0.0) for one in steps) for name in ("tokens", "label_tokens", "samples", "seconds")}


def _summary(steps: Sequence[Figures]) -> Figures:
    """Join the figures of several steps into one line of metrics."""
    sums = _sums(steps)
    seconds = max(sums["seconds"], 1e-9)
    line = {"step": steps[-1]["step"], "epoch": steps[-1]["epoch"]}
    done = [one for one in steps if "loss" in one and not one.get("skipped")]
    if done:
        label_tokens = sum(one["label_tokens"] for one in done)
        line["loss"] = sum(one["loss"] * one["label_tokens"] for one in done) / label_tokens
        line["grad_norm"] = max(one["grad_norm"] for one in done)
    line["learning_rate"] = steps[-1]["learning_rate"]
    for name in ("skipped", "loss_scale"):
        if any(name in one for one in steps):
            count = sum(one.get(name, 0) for one in steps)
            line |= {"skipped_steps": count} if name == "skipped" else {name: steps[-1][name]}
    line["tokens_per_second"] = sums["tokens"] / seconds
    line["samples_per_second"] = sums["samples"] / seconds
    line["seconds"] = sums["seconds"]
    return line


def _read_lines(path: Path) -> list[Any]:
    """Read lines of JSON; a last one that a kill cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def _write_lines(path: Path, lines: Sequence[Any]) -> None:
    write_text_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
