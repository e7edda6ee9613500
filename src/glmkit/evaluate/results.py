"""What an evaluation has measured: results.json, and intervals by bootstrap.

interval(figure)          value, low and high (95 %), n
resampled(figure)         the figure's value in each of 1,000 samples of its rows, drawn with replacement. The same
                          seed draws the same rows, so two models' values for the same items can be subtracted
Results                   the file results.json
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmkit.errors import DataError
from glmkit.evaluate.tasks import Figure
from glmkit.writing import write_text_atomic

RESULTS_FILE = "results.json"
SAMPLES = 1000
_SCHEMA = 1
_NUMBERS_AT_ONCE = 1 << 22  # of a table of draws, 32 MiB


@dataclass(frozen=True)
class Interval:
    """A figure's value and how far another sample of as many items might move it.

    Args:
        value: As it is shown: percent between 0 and 100. None if nothing was counted.
        low: Lower end of the interval of 95 %.
        high: Upper end.
        n: Rows that count in it.
        unit: As in `Figure`.
        better: As in `Figure`.
        groups: Value of each group, as it is shown; None without groups.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    unit: str = "percent"
    better: str = "more"
    groups: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Results:
    """What results.json holds.

    Args:
        task: Name of the task.
        figures: By name; the first is the main one.
        notes: Plain counts and facts of the task.
        model: Its "path", "family", "weights" (a hash, see `glmkit.evaluate.run.weights_hash`), "dtype", "device".
        adapter: Its folder.
        settings: How items were answered.
        seed: Of sampled answers.
        command: What was typed.
        versions: Of packages, by name.
        data: "path" and "sha256"; None if the caller had the items in memory.
        items: How many there are.
        rows_file: Name of the file beside results.json that has a row for each.
        processes: How many shared them.
        seconds: What the call took that wrote this, without loading.
        items_per_second: Of the items that this call answered.
    """

    task: str
    figures: Mapping[str, Interval]
    notes: Mapping[str, Any]
    model: Mapping[str, Any]
    adapter: Any
    settings: Mapping[str, Any]
    seed: int | None
    command: str
    versions: Mapping[str, str]
    data: Mapping[str, Any] | None
    items: int
    rows_file: str
    processes: int
    seconds: float
    items_per_second: float
    schema: int = field(default=_SCHEMA)


def write_results(folder: str | Path, results: Results) -> None:
    """Writes results.json.

    Args:
        folder: Where; it exists.
        results: What has been measured.
    """
    content = {"schema": results.schema, **dataclasses.asdict(results)}
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)
    write_text_atomic(Path(folder) / RESULTS_FILE, text + "\n")


def read_results(path: str | Path) -> Results:
    """Reads results.json.

    Args:
        path: The file, or its folder.

    Returns:
        What it holds.

    Raises:
        DataError: There is none, or it is not one of ours.
    """
    file = Path(path)
    file = file / RESULTS_FILE if file.is_dir() else file
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        schema = content["schema"]
        figures = {name: Interval(**figure) for name, figure in content.get("figures", {}).items()}
        if schema == _SCHEMA:
            return Results(**{**content, "figures": figures})
    except OSError:
        hint = "give the folder that `glm evaluate -o FOLDER` has written"
        raise DataError(f"there is no {file}", hint=hint) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{file} is not a results file of `glm evaluate`", hint="evaluate again") from None
    raise DataError(f"{file} has schema {schema!r}, expected {_SCHEMA}", hint="evaluate again")


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Reads the rows that belong to a results file.

    Args:
        path: results.json or its folder.

    Returns:
        A row for each item, in their order.

    Raises:
        DataError: There are none, or not as many as results.json says.
    """
    results = read_results(path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = folder / results.rows_file
    try:
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # splitlines would also cut at U+2028
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        raise DataError(f"{file} cannot be read", hint="evaluate again") from None
    if len(rows) != results.items:
        raise DataError(f"{file} has {len(rows)} rows, {RESULTS_FILE} says {results.items}", hint="evaluate again")
    return rows


def interval(figure: Figure, *, seed: int = 0, samples: int = SAMPLES) -> Interval:
    """Measures a figure.

    Args:
        figure: Its rows.
        seed: Of the draws.
        samples: How many.

    Returns:
        Its value and the middle 95 % of the values of samples drawn from its rows, those of a group from that group.
    """
    sums, weights, groups = _columns(figure)
    values = {name: _quotient(sums[rows].sum(), weights[rows].sum()) for name, rows in groups.items()}
    counted = [value for value in values.values() if not math.isnan(value)]
    shown = (
        None if figure.groups is None else {name: _shown(figure, v) for name, v in values.items() if not math.isnan(v)}
    )
    said = {"n": int((weights != 0).sum()), "unit": figure.unit, "better": figure.better}
    if not counted:
        return Interval(None, None, None, groups=shown, **said)  # type: ignore[arg-type]
    drawn = resampled(figure, seed=seed, samples=samples)
    value = _shown(figure, sum(counted) / len(counted))
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (value, value)
    return Interval(value, float(low), float(high), groups=shown, **said)  # type: ignore[arg-type]


def resampled(figure: Figure, *, seed: int = 0, samples: int = SAMPLES) -> NDArray[np.float64]:
    """Draws samples of a figure's rows, with replacement and as many as there are, within each group.

    Args:
        figure: Its rows.
        seed: The same seed draws the same rows of figures with as many rows and the same groups.
        samples: How many.

    Returns:
        (samples,), the figure's value in each, as it is shown; not a number where a sample counts nothing.
    """
    sums, weights, groups = _columns(figure)
    generator = np.random.default_rng(seed)
    values = np.full((len(groups), samples), np.nan)
    for number, rows in enumerate(groups.values()):
        at_once = max(1, _NUMBERS_AT_ONCE // len(rows))
        for start in range(0, samples, at_once):
            many = min(at_once, samples - start)
            drawn = rows[generator.integers(len(rows), size=(many, len(rows)))]
            total = weights[drawn].sum(axis=1)
            np.divide(sums[drawn].sum(axis=1), total, out=values[number, start : start + many], where=total != 0)
    counted = ~np.isnan(values)
    means = np.full(samples, np.nan)
    np.divide(np.where(counted, values, 0).sum(axis=0), counted.sum(axis=0), out=means, where=counted.any(axis=0))
    return np.asarray(np.exp(means) if figure.unit == "exp" else means * (100 if figure.unit == "percent" else 1))


def _columns(
    figure: Figure,
) -> tuple[NDArray[np.float64], NDArray[np.float64], dict[str, NDArray[np.int64]]]:
    """The numbers of a figure, and which rows each group has."""
    sums = np.asarray(figure.sums, dtype=np.float64)
    weights = np.ones_like(sums) if figure.weights is None else np.asarray(figure.weights, dtype=np.float64)
    names: Sequence[str] = [""] * len(sums) if figure.groups is None else figure.groups
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(name, []).append(row)
    return sums, weights, {name: np.asarray(rows, dtype=np.int64) for name, rows in groups.items()}


def _quotient(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _shown(figure: Figure, value: float) -> float:
    if figure.unit == "exp":
        return math.exp(value)
    return value * 100 if figure.unit == "percent" else value
