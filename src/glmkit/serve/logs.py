"""The server's log: one JSON object a line on stderr, never the text of a request unless that was asked for.

A thread of its own writes, so that a reader who stopped reading, a full disk or a closed pipe costs lines, not answers.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import traceback
from collections.abc import Mapping
from datetime import datetime, timezone

from glmkit.serve.traffic import Record

_QUEUED_LINES = 2_000
_PROBES = frozenset({"/live", "/ready", "/health", "/metrics"})
_LOGGERS = ("uvicorn", "uvicorn.error", "asyncio", "fastapi")


class Journal:
    """Writes lines to a file descriptor.

    Args:
        descriptor: Where to; 2 is stderr.
    """

    def __init__(self, descriptor: int = 2) -> None:
        self.lost_lines = 0
        self._descriptor = descriptor
        self._lines: queue.Queue[bytes | None] = queue.Queue(_QUEUED_LINES)
        self._thread: threading.Thread | None = None

    def write(self, event: Mapping[str, object]) -> None:
        """Queues a line; it is lost if too many wait already.

        Args:
            event: What happened. All that is not ASCII is escaped, so no text can begin a line of its own.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_all, name="glmkit log", daemon=True)
            self._thread.start()
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        try:
            self._lines.put_nowait(json.dumps({"time": time, **event}, default=str).encode() + b"\n")
        except queue.Full:
            self.lost_lines += 1

    def close(self, seconds: float = 1.0) -> None:
        """Writes what is queued.

        Args:
            seconds: How long it may take.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            try:
                self._lines.put(None, timeout=seconds)
            except queue.Full:
                return
            thread.join(seconds)

    def piece(self, seconds: float, first: bool) -> None:
        """Pieces are not logged."""

    def end(self, record: Record) -> None:
        """Logs a request that is over; probes only if something is wrong.

        Args:
            record: The request.
        """
        if record.route not in _PROBES or record.status != 200:
            self.write(record.line())

    def take_loggers(self) -> None:
        """Takes over what libraries log at WARNING and above, without tracebacks, which may quote a request."""
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            logger.handlers = [_ToJournal(self)]
            logger.setLevel(logging.WARNING)
            logger.propagate = False

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except OSError:
                self.lost_lines += 1


def describe_error(error: BaseException) -> dict[str, object]:
    """What the log says about an exception: its kind and where it was, not its message, which may quote a prompt.

    Args:
        error: The exception.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return {"error": type(error).__name__, "at": [f"{at.filename}:{at.lineno} {at.name}" for at in frames]}


class _ToJournal(logging.Handler):
    def __init__(self, journal: Journal) -> None:
        super().__init__(logging.WARNING)
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        error = describe_error(record.exc_info[1]) if record.exc_info and record.exc_info[1] else {}
        # The message before its arguments are put in: a constant of the library, never a client's text.
        self._journal.write({"event": record.name, "level": record.levelname, "message": record.msg, **error})
