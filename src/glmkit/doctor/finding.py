"""What a check finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Repair:
    """Something that can be done without asking, because nothing of value is lost by it.

    Args:
        does: What it does, as a person would type it: "mkdir …", "rm …".
        run: Does it.
    """

    does: str
    run: Callable[[], None]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Args:
        status: "ok"; "warn": it works, but not as well as it could; "fail": something does not work.
        reason: What was found, one line.
        cure: What to do about it, best a command; None where there is nothing to do.
        repairs: What of the cure `glm doctor --fix` does.
    """

    status: Status
    reason: str
    cure: str | None = None
    repairs: tuple[Repair, ...] = ()


def ok(reason: str) -> Finding:
    """Nothing to improve."""
    return Finding("ok", reason)


def warn(reason: str, cure: str | None, *repairs: Repair) -> Finding:
    """It works, but not as well as it could."""
    return Finding("warn", reason, cure, repairs)


def fail(reason: str, cure: str | None, *repairs: Repair) -> Finding:
    """Something does not work."""
    return Finding("fail", reason, cure, repairs)


def gigabytes(size: int | None) -> str:
    """Bytes for people."""
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"


def shown(path: Path) -> str:
    """A path as people write it, with ~ for the home folder."""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except (ValueError, RuntimeError):
        return str(path)
