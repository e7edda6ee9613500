"""Jupyter's messages over ZeroMQ's wire format, read as what they are here: bytes of a hostile process.

Code of the model shares its process with the kernel: it knows the signing key, owns the sockets, and can write any
bytes into them. ZeroMQ's own library would keep every part of a message that never ends, whatever the limits of its
socket, and Jupyter's client would unpack whatever is signed. Here a message has a largest size that is counted while it
arrives, an over-long one is read and forgotten, everything is JSON, and what does not fit is not a message.

Source: ZMTP 3.0 (rfc.zeromq.org/spec/23), Messaging in Jupyter 5.4 (jupyter-client.readthedocs.io).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from glmkit.errors import GlmkitError

MAX_MESSAGE_BYTES = 8 << 20
"""Largest message that is kept: a picture of 4 MB in base64 and what is written beside it."""

_MAX_PARTS = 16
_FRAME_BYTES = 64
_MAX_COMMAND_BYTES = 1 << 12
_MORE, _LONG, _COMMAND = 1, 2, 4
_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_DELIMITER = b"<IDS|MSG>"


class WireError(GlmkitError, ConnectionError):
    """The other end does not speak ZeroMQ, or no longer."""


@dataclass(frozen=True)
class Received:
    """A message of the kernel.

    Args:
        kind: Its type, for instance `stream`. An unknown one is to be ignored.
        request: The id of the request that it answers, "" for none.
        content: What it says; nothing about it has been checked but that it is a JSON object.
    """

    kind: str
    request: str
    content: Mapping[str, Any]


class Signer:
    """Writes and reads signed messages.

    Args:
        key: The key both ends know.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._session = secrets.token_hex(8)

    def write(self, kind: str, content: Mapping[str, Any]) -> tuple[str, list[bytes]]:
        """Writes a request.

        Returns:
            Its id, and its parts to be sent.
        """
        header = {
            "msg_id": secrets.token_hex(16),
            "session": self._session,
            "username": "glmkit",
            "date": datetime.now(timezone.utc).isoformat(),
            "msg_type": kind,
            "version": "5.4",
        }
        parts = [json.dumps(part).encode() for part in (header, {}, {}, content)]
        return header["msg_id"], [_DELIMITER, self._sign(parts), *parts]

    def read(self, parts: list[bytes]) -> Received | None:
        """Reads a message.

        Returns:
            The message; None for what is not one, for instance one with a wrong signature.
        """
        try:
            start = parts.index(_DELIMITER) + 1
            signature, *signed = parts[start : start + 5]
            if len(signed) != 4 or not hmac.compare_digest(signature, self._sign(signed)):
                return None
            header, parent, _, content = (json.loads(part) for part in signed)
            kind, request = header["msg_type"], parent.get("msg_id", "")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        if not (isinstance(kind, str) and isinstance(request, str) and isinstance(content, dict)):
            return None
        return Received(kind, request, content)

    def _sign(self, parts: list[bytes]) -> bytes:
        return hmac.new(self._key, b"".join(parts), hashlib.sha256).hexdigest().encode()


class Channel:
    """One connection to a socket of the kernel."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.received_bytes = 0
        """All that came in so far; a frame counts as at least 64 bytes, because it costs as much to read."""
        self.limit_bytes = 1 << 62
        """`received_bytes` at which the connection is given up, also in the middle of a message."""

    @classmethod
    async def connect(cls, path: str, socket_type: str) -> Channel:
        """Connects to a socket that the kernel has bound.

        Args:
            path: The unix socket.
            socket_type: `DEALER` for requests and replies, `SUB` for what the kernel publishes.

        Raises:
            OSError: Nobody listens there.
            WireError: Who listens does not speak ZeroMQ.
        """
        channel = cls(*await asyncio.open_unix_connection(path, limit=1 << 16))
        try:
            await channel._greet(socket_type.encode())
        except (asyncio.IncompleteReadError, OSError, WireError) as error:
            channel.close()
            raise WireError(f"the kernel's socket did not answer as ZeroMQ does: {error}") from None
        return channel

    async def _greet(self, socket_type: bytes) -> None:
        self._writer.write(_GREETING)
        ready = b"\x05READY"
        for name, value in ((b"Socket-Type", socket_type), (b"Identity", b"")):
            ready += bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value
        greeting = await self._reader.readexactly(64)
        if greeting[:1] + greeting[9:11] != b"\xff\x7f\x03" or not greeting[12:32].startswith(b"NULL\0"):
            raise WireError("another greeting than ZMTP 3 without encryption")
        self._writer.write(bytes([_COMMAND, len(ready)]) + ready)
        if socket_type == b"SUB":
            self._writer.write(b"\x00\x01\x01")  # a message of one byte: subscribe to everything
        await self._writer.drain()

    def send(self, parts: list[bytes]) -> None:
        """Sends a message. It never waits: what the kernel does not read stays in memory until this is closed.

        Args:
            parts: The message.
        """
        for number, part in enumerate(parts):
            more = _MORE if number < len(parts) - 1 else 0
            size = bytes([more | _LONG]) + len(part).to_bytes(8, "big")
            self._writer.write((size if len(part) > 255 else bytes([more, len(part)])) + part)

    async def receive(self) -> list[bytes] | None:
        """Waits for a message.

        Returns:
            Its parts; None for one that was too large and has been forgotten.

        Raises:
            WireError: The connection is gone, or what came is not ZeroMQ.
        """
        try:
            return await self._receive()
        except WireError:
            raise
        except (asyncio.IncompleteReadError, OSError) as error:
            raise WireError("the kernel has closed its socket") from error

    async def _receive(self) -> list[bytes] | None:
        parts: list[bytes] = []
        kept_bytes, fits = 0, True
        while True:
            flags = (await self._reader.readexactly(1))[0]
            if flags & ~(_MORE | _LONG | _COMMAND):
                raise WireError("the kernel sent a frame with unknown flags")
            size = int.from_bytes(await self._reader.readexactly(8 if flags & _LONG else 1), "big")
            self.received_bytes += size + _FRAME_BYTES
            if self.received_bytes > self.limit_bytes:
                raise WireError("the kernel sends without end")
            if flags & _COMMAND:
                if size > _MAX_COMMAND_BYTES:
                    raise WireError(f"the kernel sent a command of {size:,} bytes")
                await self._reader.readexactly(size)
                continue
            kept_bytes += size
            fits = fits and kept_bytes <= MAX_MESSAGE_BYTES and len(parts) < _MAX_PARTS
            if fits:
                parts.append(await self._reader.readexactly(size))
            else:
                parts.clear()
                await self._skip(size)
            if not flags & _MORE:
                return parts if fits else None

    async def _skip(self, size_bytes: int) -> None:
        while size_bytes:
            piece = await self._reader.read(min(size_bytes, 1 << 16))
            if not piece:
                raise asyncio.IncompleteReadError(b"", size_bytes)
            size_bytes -= len(piece)

    def close(self) -> None:
        """Closes the connection at once, whatever is still on its way."""
        self._writer.transport.abort()
