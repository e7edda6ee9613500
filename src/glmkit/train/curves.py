"""The curves of a run: as pictures for the report, and as a line of characters for a terminal."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Points = list[tuple[float, float]]
"""Step and value of each measurement."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 240, 70, 32, 12
_COLOURS = ("#3367b0", "#c2410c", "#15803d", "#7c3aed")
_BARS = "▁▂▃▄▅▆▇█"
_MOST_POINTS = 1500  # of a line in the report; more cannot be seen


@dataclass(frozen=True)
class Curve:
    """Some figures over the steps.

    Attributes:
        name: Name of its file, without an ending.
        unit: What the vertical axis counts.
        lines: What each line shows, and its points.
    """

    name: str
    unit: str
    lines: Mapping[str, Points]


def curves_of(metrics: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Choose what is drawn of a run.

    Args:
        metrics: Lines of metrics.jsonl.

    Returns:
        Loss, learning rate, speed and memory, as far as they were measured.
    """
    scores = sorted({key for line in metrics for key in line if key.startswith(("bleu", "rouge", "predict_"))})
    wanted = {
        "loss": ("nats per label token", {"loss": "training", "eval_loss": "validation"}, 1.0),
        "learning_rate": ("learning rate", {"learning_rate": "learning rate"}, 1.0),
        "throughput": ("tokens per second", {"tokens_per_second": "tokens per second"}, 1.0),
        "memory": ("GB", {"memory_bytes": "memory", "peak_memory_bytes": "peak memory"}, 1e-9),
        "scores": ("score", {name: name for name in scores}, 1.0),
    }
    found = []
    for name, (unit, keys, scale) in wanted.items():
        lines = {label: _points(metrics, key, scale) for key, label in keys.items()}
        lines = {label: points for label, points in lines.items() if points}
        if lines:
            found.append(Curve(name, unit, lines))
    return found


def draw_png(curve: Curve, path: Path) -> bool:
    """Draw a curve as a picture file.

    Args:
        curve: What to draw.
        path: The PNG to write.

    Returns:
        False if matplotlib is not installed and nothing was drawn.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (label, points) in enumerate(curve.lines.items()):
        style = "-" if number == 0 else "o-"
        axes.plot([x for x, _ in points], [y for _, y in points], style, label=label, linewidth=1, markersize=3)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(curve.unit)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def draw_svg(curve: Curve) -> str:
    """Draw a curve as SVG, which needs no package and stands inside a page.

    Args:
        curve: What to draw.

    Returns:
        An `<svg>` element.
    """
    every = [point for points in curve.lines.values() for point in points]
    first, last = min(x for x, _ in every), max(x for x, _ in every)
    low, high = min(y for _, y in every), max(y for _, y in every)
    high = high if high > low else low + (abs(low) or 1.0) * 0.1

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - first) / ((last - first) or 1)
        up = (y - low) / (high - low)
        return _LEFT + right * (_WIDTH - _LEFT - 10), _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(curve.name)}">']
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = low + share * (high - low)
        _, y = place(first, value)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for x, anchor in ((first, "start"), (last, "end")):
        parts.append(f'<text x="{place(x, low)[0]:.1f}" y="{_HEIGHT - 14}" text-anchor="{anchor}">step {x:g}</text>')
    for number, (label, points) in enumerate(curve.lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        shown = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in _thinned(points)))
        parts.append(f'<polyline points="{shown}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if len(points) == 1:
            x, y = place(*points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        middle = _LEFT + 100 + 130 * number
        parts.append(f'<text x="{middle}" y="{_HEIGHT - 14}" fill="{colour}">{html.escape(label)}</text>')
    return "".join([*parts, "</svg>"])


def sparkline(points: Points, width: int = 60) -> str:
    """Draw a curve in one line of characters.

    Args:
        points: The whole curve.
        width: Most characters.

    Returns:
        One block for each stretch of steps, as high as its mean.
    """
    if not points:
        return ""
    values = [y for _, y in points]
    cuts = [len(values) * number // min(width, len(values)) for number in range(min(width, len(values)) + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in means)


def _points(metrics: Sequence[Mapping[str, Any]], key: str, scale: float) -> Points:
    found = []
    for line in metrics:
        value = line.get(key)
        if isinstance(value, int | float) and math.isfinite(value) and "step" in line:
            found.append((float(line["step"]), value * scale))
    return found


def _thinned(points: Points) -> Points:
    every = math.ceil(len(points) / _MOST_POINTS)
    return points if every == 1 else [*points[::every], points[-1]]
