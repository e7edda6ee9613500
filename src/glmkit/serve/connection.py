"""One connection: how long it may take to send a head, to read an answer, to do nothing, and how many there may be."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from glmkit.serve.settings import Settings

_PIPELINED_BYTES = 64 * 2**10  # of later requests that may wait while one is answered


def connection_class(settings: Settings, max_connections: int) -> type[Any]:
    """The protocol that uvicorn shall speak.

    Args:
        settings: Deadlines and limits.
        max_connections: Open connections; beyond it the longest idle one is closed.
    """
    return type("Connection", (_Connection,), {"settings": settings, "max_connections": max_connections})


class _Connection(H11Protocol):
    settings: Settings
    max_connections: int
    _head_deadline: asyncio.TimerHandle | None = None
    _write_deadline: asyncio.TimerHandle | None = None
    _waiting_bytes = 0
    _idle_since = 0.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._idle_since = time.monotonic()
        if len(self.connections) > self.max_connections:
            idle = [one for one in self.connections if not one.is_busy()]
            min(idle, key=lambda one: one._idle_since).transport.abort()
        self._start_head_deadline()

    def is_busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._head_deadline)
        self._stop(self._write_deadline)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.is_busy() and self.conn.their_state is h11.DONE:
            # A request after the one that is being answered. h11 keeps it; reading goes on, as only that shows that the
            # client has left.
            self._waiting_bytes += len(data)
            if self._waiting_bytes > _PIPELINED_BYTES:
                self.transport.abort()
                return
        elif not self.is_busy() and self._head_deadline is None:
            self._start_head_deadline()
        super().data_received(data)
        self._after_events()

    def on_response_complete(self) -> None:
        self._waiting_bytes = 0
        self._idle_since = time.monotonic()
        super().on_response_complete()
        self._after_events()

    def _after_events(self) -> None:
        if self.is_busy():
            self._stop(self._head_deadline)
            self._head_deadline = None
            if self.conn.their_state is h11.DONE and not self.transport.is_closing():
                self.flow.resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_deadline is None:
            self._write_deadline = self.loop.call_later(self.settings.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop(self._write_deadline)
        self._write_deadline = None

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # half an answer is out; there is no place for another one
            return
        if self.is_busy():  # its body is broken; whoever reads it is told that nothing more comes
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        error = {"message": msg, "type": "invalid_request_error", "param": None, "code": "bad_request"}
        body = json.dumps({"error": error}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _start_head_deadline(self) -> None:
        self._head_deadline = self.loop.call_later(self.settings.header_seconds, self.transport.abort)

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
