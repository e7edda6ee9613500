"""A proxy between clients and a server that does to a connection what networks do: delay, reset, cut, close one half.

    async with FaultProxy(port) as proxy:
        proxy.port                                  # clients connect here
        proxy.next_fault = Fault("truncate", 300)   # of every connection from now on

A fault happens after so many bytes have passed in one direction; until then, and without one, bytes pass unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

Kind = Literal["none", "delay", "slow", "reset", "truncate", "half-close"]
KINDS: tuple[Kind, ...] = ("delay", "slow", "reset", "truncate", "half-close")
_PART_BYTES = 16384
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no seconds: closing sends a reset


@dataclass(frozen=True)
class Fault:
    """What goes wrong on one connection.

    Args:
        kind: "delay" holds everything up once; "slow" passes a byte a time; "reset" breaks both sides off; "truncate"
            closes both in the middle; "half-close" ends this direction only, and the other goes on.
        after_bytes: How many bytes pass before it happens.
        answer: Whether it happens to the answer; False: to the request.
        seconds: Of a delay, and of a slow part all together.
    """

    kind: Kind = "none"
    after_bytes: int = 0
    answer: bool = False
    seconds: float = 0.5


class FaultProxy:
    """Listens on a free port of the loopback address and passes connections on.

    Args:
        port: Of the server behind it.

    Attributes:
        port: Where it listens, inside the block.
        next_fault: What happens to the connections that come from now on.
        happened: How often each kind did happen.
    """

    def __init__(self, port: int) -> None:
        self._behind = port
        self.port = 0
        self.next_fault = Fault()
        self.happened: Counter[str] = Counter()
        self._pairs: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FaultProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=512)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for pair in tuple(self._pairs):
            pair.cancel()
        await asyncio.gather(*self._pairs, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pairs.add(task)
        try:
            await self._pass_on(reader, writer, self.next_fault)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._pairs.discard(task)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault) -> None:
        behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", self._behind)
        both = (writer, behind_writer)
        asked = asyncio.create_task(self._copy(reader, behind_writer, both, Fault() if fault.answer else fault))
        answered = asyncio.create_task(self._copy(behind_reader, writer, both, fault if fault.answer else Fault()))
        try:
            await asyncio.wait({asked, answered}, return_when=asyncio.ALL_COMPLETED)
        finally:
            for task in (asked, answered):
                task.cancel()
            behind_writer.close()

    async def _copy(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        both: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
        fault: Fault,
    ) -> None:
        left: int | None = None if fault.kind == "none" else fault.after_bytes
        with contextlib.suppress(OSError):
            while part := await source.read(_PART_BYTES):
                if left is None or len(part) < left:
                    target.write(part)
                    left = None if left is None else left - len(part)
                    await target.drain()
                    continue
                target.write(part[:left])
                rest, left = part[left:], None
                self.happened[fault.kind] += 1
                if not await self._do(fault, rest, target, both):
                    return
            if not target.is_closing():
                target.write_eof()
        # The other direction may go on; it ends by itself, or with the connection.

    @staticmethod
    async def _do(
        fault: Fault,
        rest: bytes,
        target: asyncio.StreamWriter,
        both: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> bool:
        """Whether bytes go on passing."""
        if fault.kind == "delay":
            await asyncio.sleep(fault.seconds)
            target.write(rest)
        elif fault.kind == "slow":
            for place in range(len(rest)):
                target.write(rest[place : place + 1])
                await target.drain()  # says when the other side is gone
                await asyncio.sleep(fault.seconds / len(rest))
        elif fault.kind == "half-close":
            target.write_eof()
            return False
        else:
            await target.drain()
            for writer in both:
                if fault.kind == "reset":
                    connection: socket.socket = writer.get_extra_info("socket")
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    writer.transport.abort()
                else:
                    writer.close()
            return False
        return True
