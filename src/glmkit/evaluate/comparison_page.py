"""A comparison as one HTML file: tables, and plots as inline SVG; nothing is loaded from anywhere."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glmkit.evaluate.comparison import Comparison, Difference

_WIDTH, _LEFT, _RIGHT, _LINE = 720, 220, 90, 26  # pixels; of a plot, of its names, of its numbers, of a line in it
_COLOURS = ("#3366cc", "#dc7c12", "#109618", "#990099", "#0099c6", "#dd4477")
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:.5rem 0}td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:left}"
    "pre{white-space:pre-wrap;background:#f6f6f6;padding:.6rem}"
    "svg{width:100%;height:auto;font:13px system-ui,sans-serif}"
    "@media(prefers-color-scheme:dark){body{background:#1b1b1b;color:#ddd}pre{background:#2a2a2a}svg{fill:#ddd}}"
)


def page(found: Comparison) -> str:
    """The report as HTML.

    Args:
        found: What has been compared.
    """
    title = f"{found.results[0].task}: {', '.join(found.names)}"
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1><p>{found.results[0].items} items</p>",
        _who(found),
        "<h2>Figures</h2><p>Dots are values, lines their intervals of 95 %.</p>",
    ]
    for name in found.results[0].figures:
        parts.append(_figure_plot(name, found))
    if found.unpaired:
        parts.append(f"<p>No differences: {html.escape(found.unpaired)}</p>")
    else:
        parts.append("<h2>Differences over the same items</h2><p>Where a line does not touch 0, the sign is sure.</p>")
        for name, each in found.differences.items():
            parts.append(_difference_plot(name, each, found.names))
        parts += [_groups(found), _examples(found)]
    parts.append("</body></html>\n")
    return "\n".join(part for part in parts if part)


def _who(found: Comparison) -> str:
    lines = [["", "model", "adapter", "weights", "folder", "command"]]
    for name, folder, one in zip(found.names, found.folders, found.results):
        lines.append([name, str(one.model.get("path", "")), str(one.adapter or "-"), str(one.model.get("weights", "")),
                      folder, one.command])  # fmt: skip
    text = _table(lines)
    if found.settings:
        rows = [[name, *map(_plain, each)] for name, each in found.settings.items()]
        text += f"<p>Settings that differ:</p>{_table([['setting', *found.names], *rows])}"
    return text


def _figure_plot(name: str, found: Comparison) -> str:
    intervals = [result.figures.get(name) for result in found.results]
    values = [(label, one) for label, one in zip(found.names, intervals) if one is not None and one.value is not None]
    unit = {"percent": " (%)", "exp": ""}.get(values[0][1].unit, "") if values else ""
    lines = [(label, one.value, one.low, one.high) for label, one in values]
    return _plot(f"{name}{unit}", lines, None)


def _difference_plot(name: str, each: Sequence[Difference | None], names: Sequence[str]) -> str:
    pairs = [(f"{label} - {names[0]}", one) for label, one in zip(names[1:], each) if one is not None]
    lines = [(pair, one.value, one.low, one.high) for pair, one in pairs]
    return _plot(name, lines, 0.0)


def _groups(found: Comparison) -> str:
    """Values of the main figure by group, a dot for each evaluation."""
    main = next(iter(found.results[0].figures), None)
    figures = [] if main is None else [one.figures[main] for one in found.results if main in one.figures]
    groups = figures[0].groups if figures else None
    if not groups or len(groups) < 2 or len(figures) < len(found.results):
        return ""
    parts = []
    height = _LINE * len(groups) + 10
    for line, group in enumerate(groups):
        y = _LINE * line + _LINE / 2
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 4:.0f}" text-anchor="end">{html.escape(str(group))}</text>')
        for place, one in enumerate(figures):
            value = (one.groups or {}).get(group)
            if value is not None:
                x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * min(max(value / 100, 0.0), 1.0)
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{_COLOURS[place % len(_COLOURS)]}"/>')
    key = " ".join(f'<span style="color:{_COLOURS[n % len(_COLOURS)]}">&#9679; {name}</span>'
                   for n, name in enumerate(found.names))  # fmt: skip
    label = html.escape(f"{main} by group")
    if figures[0].unit != "percent":
        return ""
    svg = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f"<h2>{label}</h2><p>0 to 100 %: {key}</p>{svg}"


def _examples(found: Comparison) -> str:
    from glmkit.evaluate.comparison import shortened

    parts = []
    for name, (better, worse) in zip(found.names[1:], found.examples):
        for winner, loser, items in ((name, found.names[0], better), (found.names[0], name, worse)):
            if items:
                parts.append(f"<h2>Items that {winner} does better than {loser}</h2>")
            for number, first, other in items:
                text = f"{found.names[0]} {shortened(first)}\n{name} {shortened(other)}"
                parts.append(f"<p>Item {number + 1}</p><pre>{html.escape(text)}</pre>")
    return "".join(parts)


def _plot(title: str, lines: Sequence[tuple[str, float | None, float | None, float | None]], mark: float | None) -> str:
    """Names, dots and intervals below each other; `mark` is a value that gets a line of its own."""
    whole = [(label, value, low, high) for label, value, low, high in lines if None not in (value, low, high)]
    numbers = [number for _, *three in whole for number in three if number is not None]
    if not numbers:
        return ""
    numbers += [] if mark is None else [mark]
    least, most = min(numbers), max(numbers)
    room = (most - least) * 0.05 or abs(most) * 0.05 or 1.0
    least, most = least - room, most + room

    def place(number: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (number - least) / (most - least)

    height = _LINE * len(whole) + 30
    label = html.escape(title)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">']
    parts.append(f'<text x="0" y="16" font-weight="bold">{label}</text>')
    if mark is not None:
        x = place(mark)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="20" y2="{height}" stroke="#999" stroke-dasharray="4"/>')
    for line, (name, value, low, high) in enumerate(whole):
        assert value is not None
        assert low is not None
        assert high is not None
        y, colour = 24 + _LINE * line + _LINE / 2, _COLOURS[line % len(_COLOURS)]
        parts.append(
            f'<text x="{_LEFT - 10}" y="{y + 4:.0f}" text-anchor="end">{html.escape(name)}</text>'
            f'<line x1="{place(low):.1f}" x2="{place(high):.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"'
            f' stroke-width="2"/><circle cx="{place(value):.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>'
            f'<text x="{_WIDTH - _RIGHT + 10}" y="{y + 4:.0f}">{value:.4g}</text>'
        )
    return "".join([*parts, "</svg>"])


def _plain(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = ([html.escape(cell) for cell in line] for line in lines)
    text = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in rest)
    return f"<table><tr>{text}</tr>{body}</table>"
