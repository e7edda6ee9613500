"""Looking at a run from a second terminal: its folder says all, from the first step on."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from glmkit.errors import UsageError
from glmkit.train.curves import curves_of, sparkline
from glmkit.train.run_folder import ENV_FILE, EXIT_FILE, read_lines, read_object


def watch(folder: str | Path, *, seconds: float = 2.0, once: bool = False, columns: int = 60) -> None:
    """Print how a run stands, again and again until it ends or Ctrl-C.

    Args:
        folder: The run's output folder.
        seconds: Between two looks.
        once: Print once.
        columns: Most characters of a curve.

    Raises:
        UsageError: If the folder is not that of a run.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise UsageError(f"{folder} holds no run", hint="give the recipe's output.dir")
    shown = 0
    while True:
        runs = _is_held(folder)
        lines = describe(folder, runs=runs, columns=columns)
        if shown and sys.stdout.isatty():
            print(f"\033[{shown}A\033[J", end="")  # over what was printed before
        print("\n".join(lines), flush=True)
        shown = len(lines)
        if once or not runs:
            return
        time.sleep(seconds)


def describe(folder: Path, *, runs: bool, columns: int = 60) -> list[str]:
    """Say how a run stands.

    Args:
        folder: Its output folder.
        runs: Whether a process holds it.
        columns: Most characters of a curve.

    Returns:
        The curve of each figure from the first step to the last, and how long the rest will take.
    """
    metrics = [line for line in read_lines(folder / "metrics.jsonl") if "step" in line]
    environment, ended = read_object(folder / ENV_FILE), read_object(folder / EXIT_FILE)
    step = int(metrics[-1]["step"]) if metrics else 0
    total = environment.get("total_steps")
    lines = [f"{folder}: step {step}" + (f" of {total}" if total else "") + _rest(metrics, total if runs else None)]
    for curve in curves_of(metrics):
        for label, points in curve.lines.items():
            lines.append(f"  {label:<18} {sparkline(points, columns)} {points[-1][1]:.4g} {curve.unit}")
    if not runs:
        how = ended.get("ended", "killed; --resume goes on")
        lines.append(f"it does not run: {how}" + (f" ({ended['cause']})" if ended.get("cause") else ""))
    return lines


def _rest(metrics: list[dict[str, Any]], total: int | None) -> str:
    """Estimate the time left from the seconds of the last lines."""
    recent = [line for line in metrics[-20:] if "seconds" in line]
    if total is None or len(recent) < 2:
        return ""
    steps = recent[-1]["step"] - recent[0]["step"]
    spent = sum(line["seconds"] for line in recent[1:])
    left = (total - recent[-1]["step"]) * spent / max(steps, 1)
    return f", about {left // 60:.0f} min {left % 60:02.0f} s left"


def _is_held(folder: Path) -> bool:
    """Say whether a process holds the run's lock; looking does not disturb it."""
    try:
        import fcntl
    except ImportError:
        return not (folder / EXIT_FILE).exists()
    with open(folder / ".lock", "a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
