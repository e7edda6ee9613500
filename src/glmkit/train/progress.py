"""Show how a long piece of work goes: a bar on a terminal, otherwise a line now and then on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar or lines; use it as a context manager.

    Args:
        title: What is being done.
        total: How many units there are.
        done: How many are done already.
        enabled: False shows nothing.
    """

    def __init__(self, title: str, total: int, *, done: int = 0, enabled: bool = True) -> None:
        self._title, self._total, self._done = title, total, done
        self._enabled = enabled
        self._bar: Any = None
        self._task: Any = None
        self._started, self._start_done = time.monotonic(), done
        self._last_line = self._started

    def __enter__(self) -> Progress:
        if self._enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = RichProgress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._done, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, note: str = "", *, total: int | None = None) -> None:
        """Tell how far the work is.

        Args:
            done: Units done so far.
            note: A few words beside it, for instance the loss.
            total: How many units there are, if that was not known before.
        """
        self._done = done
        self._total = total or self._total
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self._total, note=note)
            return
        now = time.monotonic()
        if self._enabled and (now - self._last_line >= _SECONDS_BETWEEN_LINES or done == self._total):
            self._last_line = now
            rate = (done - self._start_done) / max(now - self._started, 1e-9)
            left = f", {(self._total - done) / rate:.0f} s left" if rate > 0 else ""
            print(f"{self._title}: {done}/{self._total} {note}{left}", file=sys.stderr, flush=True)
