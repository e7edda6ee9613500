"""How far a download is, on standard error: one line that changes on a terminal, else a line now and then."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TextIO

_TERMINAL_SECONDS, _LOG_SECONDS = 0.2, 10.0


class Progress:
    """Counts bytes from several threads and says how far they are.

    Args:
        name: What is fetched.
        size_bytes: All of it.
        stream: Where to; HF_HUB_DISABLE_PROGRESS_BARS=1 silences it, as the hub's client.
    """

    def __init__(self, name: str, size_bytes: int, stream: TextIO | None = None) -> None:
        self._name, self._size = name, size_bytes
        self._stream = stream or sys.stderr
        self._silent = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
        self._terminal = self._stream.isatty()
        self._lock = threading.Lock()
        self._there = self._first = 0
        self._began = self._said = time.monotonic()

    def tell(self, count: int) -> None:
        """Takes the number of bytes that are there more; negative if some were thrown away."""
        with self._lock:
            self._there += count
            now = time.monotonic()
            if now - self._began < 0.5:
                self._first = self._there  # what was on disk before says nothing of the speed
            if now - self._said >= (_TERMINAL_SECONDS if self._terminal else _LOG_SECONDS):
                self._said = now
                self._show(now)

    def finish(self) -> None:
        """Ends the changing line."""
        if self._terminal and not self._silent:
            self._show(time.monotonic())
            self._stream.write("\n")

    def _show(self, now: float) -> None:
        if self._silent:
            return
        speed = max(self._there - self._first, 0) / max(now - self._began, 1e-3)
        seconds = (self._size - self._there) / speed if speed > 1e3 else 0.0
        left = f", {f'{seconds / 60:.0f} min' if seconds > 90 else f'{seconds:.0f} s'} left" if seconds else ""
        line = (
            f"{self._name}: {self._there / 1e9:.2f} of {self._size / 1e9:.2f} GB"
            f" ({self._there / max(self._size, 1):.0%}), {speed / 1e6:.1f} MB/s{left}"
        )
        self._stream.write(f"\r\x1b[K{line}" if self._terminal else f"{line}\n")
        self._stream.flush()
