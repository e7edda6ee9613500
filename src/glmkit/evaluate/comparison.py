"""What several evaluations of the same items say of one another: a report as Markdown and as one HTML file with plots.

    results.json and rows of A, B, C ...    the same task over the same data, or the comparison is refused
        -> figures                          each with its interval, as results.json has it
        -> differences to A                 by bootstrap over the same draws of items for both: "paired", so what makes
                                            an item hard for all of them does not blur the difference
        -> items                            those that one answered well and the other did not

Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 16, for differences of paired samples.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from glmkit.errors import GlmkitError, UsageError
from glmkit.evaluate.catalogue import is_task_file, make_task
from glmkit.evaluate.comparison_page import page
from glmkit.evaluate.results import Interval, Results, interval, read_results, read_rows, resampled
from glmkit.evaluate.tasks import Figure, Row, Settings
from glmkit.writing import write_text_atomic

__all__ = ["Comparison", "Difference", "compare", "compared"]

MARKDOWN_FILE, PAGE_FILE = "comparison.md", "comparison.html"
_OTHER_WINDOWS = (
    "the text was cut into other windows, by another vocabulary, window or stride, so there are no items in common. "
    "Perplexities of a token say nothing about models with different vocabularies; bits_per_byte of the whole text does"
)
_EXAMPLES = 5  # items shown for each side of a pair
_SHOWN_CHARACTERS = 300  # of a field of an item


@dataclass(frozen=True)
class Difference:
    """How much more a figure is for another evaluation than for the first, over the same items.

    Args:
        value: As it is shown: percentage points for percent.
        low: Lower end of the interval of 95 %.
        high: Upper end.
        chance: How often a difference of the other sign, or none, comes out when items are drawn anew; twice that, so
            both signs count, and at most 1. Small values mean that the sign is sure.
    """

    value: float
    low: float
    high: float
    chance: float

    @property
    def is_sure(self) -> bool:
        """Whether 0 lies outside the interval."""
        return not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Comparison:
    """Several evaluations side by side.

    Args:
        names: A, B, C and so on.
        folders: Where each comes from.
        results: What each measured.
        differences: By figure, one for each evaluation but the first; None where rows cannot be drawn together.
        examples: For each evaluation but the first: items that it does better at the main figure, and items that the
            first does better, as (number, row of the first, row of the other).
        settings: Names of settings that are not the same, with their values.
        unpaired: Why there are no differences and examples; empty if there are.
    """

    names: tuple[str, ...]
    folders: tuple[str, ...]
    results: tuple[Results, ...]
    differences: dict[str, list[Difference | None]]
    examples: list[tuple[list[tuple[int, Row, Row]], list[tuple[int, Row, Row]]]]
    settings: dict[str, list[Any]]
    unpaired: str = ""


def compare(paths: Sequence[str | Path], output: str | Path | None = None) -> str:
    """Compares evaluations of the same items with the first of them.

    Args:
        paths: Two or more folders that `glm evaluate` has written, or their results.json.
        output: Folder for comparison.md and comparison.html; None writes nothing.

    Returns:
        The report as Markdown.

    Raises:
        UsageError: Fewer than two, or results that cannot be compared; the message says why.
        DataError: A folder has no results.
    """
    found = compared(paths)
    text = markdown(found)
    if output is not None:
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(folder / MARKDOWN_FILE, text)
        write_text_atomic(folder / PAGE_FILE, page(found))
    return text


def compared(paths: Sequence[str | Path]) -> Comparison:
    """What `compare` reports, as values.

    Args:
        paths: As in `compare`.

    Raises:
        UsageError: As in `compare`.
        DataError: Likewise.
    """
    if not 2 <= len(paths) <= len(string.ascii_uppercase):
        raise UsageError(
            f"{len(paths)} results to compare: expected two or more", hint="glm evaluate compare FOLDER FOLDER"
        )
    results = [read_results(path) for path in paths]
    rows = [read_rows(path) for path in paths]
    for path, other, own in zip(paths[1:], results[1:], rows[1:]):
        _check_same(paths[0], results[0], rows[0], path, other, own)
    names = tuple(string.ascii_uppercase[: len(paths)])
    folders = tuple(str(path) for path in paths)
    settings = _different(results)
    if any(_windows(own) != _windows(rows[0]) for own in rows[1:]):
        return Comparison(names, folders, tuple(results), {}, [], settings, _OTHER_WINDOWS)
    try:
        figures = [_figures(one, own) for one, own in zip(results, rows)]
    except (GlmkitError, LookupError, TypeError, ValueError) as error:
        why = f"the rows cannot be measured again here: {error}"
        return Comparison(names, folders, tuple(results), {}, [], settings, why)
    common = [name for name in figures[0] if all(name in other for other in figures)]
    differences = {name: [_difference(figures[0][name], other[name]) for other in figures[1:]] for name in common}
    main = common[0] if common else None
    examples = [
        ([], []) if main is None else _examples(figures[0][main], other[main], rows[0], own)
        for other, own in zip(figures[1:], rows[1:])
    ]
    return Comparison(names, folders, tuple(results), differences, examples, settings)


def _check_same(
    first_path: str | Path, first: Results, first_rows: list[Row], path: str | Path, other: Results, rows: list[Row]
) -> None:
    """Refuses what does not belong together."""
    if first.task != other.task:
        raise UsageError(
            f"{first_path} is of the task {first.task}, {path} of {other.task}: expected the same task",
            hint="compare results of one task at a time",
        )
    hashes = [None if one.data is None else one.data.get("sha256") for one in (first, other)]
    if hashes[0] != hashes[1]:
        raise UsageError(
            f"{path} was measured with other data than {first_path} (their sha256 differ): expected the same items",
            hint="evaluate one of the models again with the data of the other",
        )
    if _windows(first_rows) != _windows(rows):  # the same text, cut otherwise
        return
    if first.items != other.items:
        raise UsageError(
            f"{first_path} has {first.items} items and {path} has {other.items}: expected the same items",
            hint="evaluate again with the same limit",
        )
    keys = ("id", "label", "labels", "answer_key", "subject")
    for number, (row, own) in enumerate(zip(first_rows, rows)):
        if any(row.get(key) != own.get(key) for key in keys if key in row and key in own):
            raise UsageError(
                f"row {number + 1} of {path} is another item than that of {first_path}: expected the same items",
                hint="evaluate again with the same data and settings",
            )


def _windows(rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    """Which part of a text each window is; empty if items are no windows."""
    size = ("first_token", "tokens", "bytes", "words")
    return [tuple(row.get(name) for name in size) for row in rows if "tokens" in row and "loss" in row]


def _figures(results: Results, rows: Sequence[Row]) -> dict[str, Figure]:
    """The figures of a task by name, from its rows."""
    known = {one.name for one in fields(Settings)}
    settings = {name: value for name, value in results.settings.items() if name in known}
    if "subjects" in settings:
        settings["subjects"] = tuple(settings["subjects"])
    data = (results.data or {}).get("path")
    name = data if data is not None and is_task_file(data) else results.task
    task = make_task(name, data, Settings(**settings))
    return {figure.name: figure for figure in task.figures(rows)}


def _different(results: Sequence[Results]) -> dict[str, list[Any]]:
    names = list(dict.fromkeys(name for one in results for name in one.settings))
    values = {name: [one.settings.get(name) for one in results] for name in names if name != "batch_size"}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def _difference(first: Figure, other: Figure) -> Difference | None:
    if len(first.sums) != len(other.sums) or (first.groups or ()) != (other.groups or ()):
        return None
    drawn = resampled(other) - resampled(first)  # the same seed: the same items are drawn for both
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return None
    value = _value(other) - _value(first)
    low, high = np.percentile(drawn, [2.5, 97.5])
    chance = min(1.0, 2 * min(float((drawn <= 0).mean()), float((drawn >= 0).mean())))
    return Difference(value, float(low), float(high), chance)


def _value(figure: Figure) -> float:
    value = interval(figure, samples=1).value
    return float("nan") if value is None else value


def _examples(
    first: Figure, other: Figure, rows: Sequence[Row], others: Sequence[Row]
) -> tuple[list[tuple[int, Row, Row]], list[tuple[int, Row, Row]]]:
    """Items where the other is much better, and where the first is."""
    if len(first.sums) != len(other.sums) or len(first.sums) != len(rows):
        return [], []
    gain = np.asarray(other.sums, dtype=np.float64) - np.asarray(first.sums, dtype=np.float64)
    gain = gain if first.better == "more" else -gain
    order = np.argsort(-gain, kind="stable")
    best = [int(row) for row in order[:_EXAMPLES] if gain[row] > 0]
    worst = [int(row) for row in order[::-1][:_EXAMPLES] if gain[row] < 0]
    return [(row, rows[row], others[row]) for row in best], [(row, rows[row], others[row]) for row in worst]


# --- Markdown ---


def markdown(found: Comparison) -> str:
    """The report as Markdown.

    Args:
        found: What has been compared.
    """
    first = found.results[0]
    data = "" if first.data is None else f", {Path(str(first.data.get('path', ''))).name}"
    parts = [f"# {first.task}: {', '.join(found.names)}\n\n{first.items} items{data}.\n", _who(found), _values(found)]
    if found.unpaired:
        parts.append(f"No differences: {found.unpaired}\n")
    else:
        parts += [_differences(found), _groups(found), _shown_examples(found)]
    return "\n".join(part for part in parts if part)


def _who(found: Comparison) -> str:
    lines = [["", "model", "adapter", "weights", "seconds", "folder"]]
    for name, folder, one in zip(found.names, found.folders, found.results):
        path, weights = str(one.model.get("path", "")), str(one.model.get("weights", ""))[:16]
        lines.append([name, path, str(one.adapter or "-"), weights, f"{one.seconds:.0f}", folder])
    text = _table(lines)
    if found.settings:
        lines = [["setting", *found.names]]
        for name, each in found.settings.items():
            lines.append([name, *(json.dumps(value, ensure_ascii=False) for value in each)])
        text += f"\nSettings that differ:\n\n{_table(lines)}"
    return text


def _values(found: Comparison) -> str:
    lines = [["figure", *found.names]]
    for name, one in found.results[0].figures.items():
        cells = [shown(result.figures.get(name)) for result in found.results]
        lines.append([f"{name} ({one.better} is better)", *cells])
    return "With intervals of 95 %:\n\n" + _table(lines)


def _differences(found: Comparison) -> str:
    lines = [["figure", "", "difference", "95 %", "chance"]]
    for name, each in found.differences.items():
        for other, one in zip(found.names[1:], each):
            pair = f"{other} - {found.names[0]}"
            if one is None:
                lines.append([name, pair, "-", "-", "-"])
                continue
            mark = "**" if one.is_sure else ""
            lines.append([name, pair, f"{mark}{one.value:+.3g}{mark}", f"{one.low:+.3g} to {one.high:+.3g}",
                          f"{one.chance:.3f}"])  # fmt: skip
    return (
        'Differences over the same items, bold where 0 is outside the interval; "chance" is how often the sign would'
        f" be another one:\n\n{_table(lines)}"
    )


def _groups(found: Comparison) -> str:
    main = next(iter(found.results[0].figures), None)
    figures = [one.figures.get(main) for one in found.results] if main else []
    if not figures or any(one is None or not one.groups or len(one.groups) < 2 for one in figures):
        return ""
    lines = [["", *found.names]]
    for group in figures[0].groups:  # type: ignore[union-attr]
        lines.append([group, *(_number((one.groups or {}).get(group)) for one in figures if one is not None)])
    return f"{main} by group:\n\n{_table(lines)}"


def _shown_examples(found: Comparison) -> str:
    parts = []
    for name, (better, worse) in zip(found.names[1:], found.examples):
        for winner, loser, items in ((name, found.names[0], better), (found.names[0], name, worse)):
            if not items:
                continue
            parts.append(f"## Items that {winner} does better than {loser}\n")
            for number, first, other in items:
                parts.append(f"Item {number + 1}:\n\n```json")
                parts.append(f"{found.names[0]} {shortened(first)}\n{name} {shortened(other)}\n```\n")
    return "\n".join(parts)


def shown(one: Interval | None) -> str:
    """A value and its interval in a few characters.

    Args:
        one: What has been measured; None if it has not.
    """
    if one is None or one.value is None:
        return "-"
    return f"{_number(one.value)} ({_number(one.low)} to {_number(one.high)})"


def shortened(row: Row) -> str:
    """A row as a line of JSON, long texts cut.

    Args:
        row: Of an item.
    """
    cut = {
        key: f"{value[:_SHOWN_CHARACTERS]} …" if isinstance(value, str) and len(value) > _SHOWN_CHARACTERS else value
        for key, value in row.items()
    }
    return json.dumps(cut, ensure_ascii=False).replace("```", "'''")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    head, *rest = cells
    ruled = [head, ["---"] * len(head), *rest]
    return "".join(f"| {' | '.join(line)} |\n" for line in ruled)
