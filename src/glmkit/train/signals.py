"""Stopping a run from outside: the first signal asks, the second forces."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Remember the first SIGINT or SIGTERM while the context lasts; the second has its usual effect.

    Outside the main thread, where Python allows no handlers, nothing is remembered.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_back()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        # torchrun passes on what the terminal has sent to all processes already, and kills after 30 s by itself.
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
