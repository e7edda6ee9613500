"""One kernel process inside its sandbox, from its start to its end, and the requests it answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import sys
from dataclasses import dataclass
from importlib import resources
from typing import Any

from glmkit.errors import GlmkitError
from glmkit.interpreter.sandbox import Level, Limits, Process, Sandbox
from glmkit.interpreter.transcript import Transcript
from glmkit.interpreter.wire import Channel, Signer, WireError

_SOCKETS = {"shell": (1, "DEALER"), "published": (2, "SUB")}
_DRAIN_BYTES = 64 << 20
_IDLE_BYTES = 4 << 20
_SMALL_BYTES = 1 << 12


class InterpreterError(GlmkitError, RuntimeError):
    """The code interpreter cannot start."""


@dataclass(frozen=True)
class Rules:
    """How long and how much a run may.

    Args:
        run_seconds: After this a run is interrupted, and killed if it goes on.
        grace_seconds: How long an interrupted run may take to end.
        start_seconds: How long a kernel may take to start.
        idle_seconds: A kernel that has not been used so long is closed.
        flood_bytes: A run that sends more than this is interrupted.
    """

    run_seconds: float = 60.0
    grace_seconds: float = 3.0
    start_seconds: float = 30.0
    idle_seconds: float = 1800.0
    flood_bytes: int = 16 << 20


class Run:
    """A request that is being answered, and what came of it so far."""

    def __init__(self) -> None:
        self.request = ""
        self.words = Transcript()
        self.replied = False
        self.stopped = ""
        """Why somebody wants it to end: "time", "flood", "interrupted"; empty while nobody does."""
        self.woken = asyncio.Event()
        """It was answered or stopped, or is over."""
        self.over = asyncio.Event()
        """Everything has been published, or the kernel has died."""

    def stop(self, why: str) -> None:
        """Wants it to end."""
        self.stopped = self.stopped or why
        self.woken.set()

    def reply(self) -> None:
        """The kernel has answered; what it publishes may still be on its way."""
        self.replied = True
        self.woken.set()

    def end(self) -> None:
        """Nothing more will come."""
        self.over.set()
        self.woken.set()


class Life:
    """One kernel process and the connections to it."""

    def __init__(self, sandbox: Sandbox, process: Process, rules: Rules) -> None:
        self.process = process
        self.rules = rules
        self.run: Run | None = None
        self.dead = False
        self.data_fd = os.open(process.data, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._sandbox = sandbox
        self._channels: dict[str, Channel] = {}
        self._pumps: list[asyncio.Task[None]] = []
        self._flood_at = 0
        self._closed: asyncio.Future[None] | None = None

    @classmethod
    async def begin(cls, level: Level, limits: Limits, rules: Rules) -> Life:
        """Starts a kernel and waits until it answers.

        Raises:
            InterpreterError: It does not.
            SandboxError: The sandbox cannot be set up.
        """
        key = secrets.token_hex(32)
        sandbox = Sandbox(level, limits)
        home, data = str(sandbox.home_inside), str(sandbox.data_inside)
        setup = json.dumps({"data": data, "key": key}).encode()
        source = resources.files("glmkit.interpreter").joinpath("inside.py").read_text(encoding="utf-8")
        complaints, output = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            process = await asyncio.to_thread(
                sandbox.start, [sys.executable, "-I", "-c", source, home], files={"kernel.json": setup}, output=output
            )
            life = cls(sandbox, process, rules)
            try:
                await asyncio.wait_for(life._connect(key), rules.start_seconds)
            except BaseException as error:
                await life.close()
                if isinstance(error, (asyncio.TimeoutError, OSError)):
                    said = _last_line(complaints) or error or "no answer"
                    raise InterpreterError(f"the kernel did not start: {said}") from None
                raise
            return life
        except BaseException:
            await asyncio.to_thread(sandbox.close)
            raise
        finally:
            os.close(complaints)
            os.close(output)

    async def _connect(self, key: str) -> None:
        """Connects as soon as the kernel listens; no code of the model has run yet, so the sockets are the kernel's."""
        self._signer = Signer(key.encode())
        home = os.open(self.process.home, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # By the handle of the folder: the path of a socket has at most 107 bytes.
            paths = {name: f"/proc/self/fd/{home}/k-{number}" for name, (number, _) in _SOCKETS.items()}
            for name, (_, socket_type) in _SOCKETS.items():
                self._channels[name] = await self._open(paths[name], socket_type)
        finally:
            os.close(home)
        self._pumps = [asyncio.create_task(self._pump(name)) for name in self._channels]
        await self._answer()

    async def _open(self, path: str, socket_type: str) -> Channel:
        """A socket has its name before anybody listens at it: until then nothing is there, or it refuses."""
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return await Channel.connect(path, socket_type)
            if self.process.poll() is not None:
                raise WireError("it ended while it started")
            await asyncio.sleep(0.01)

    async def _answer(self) -> None:
        """Asks for the kernel's name until both the answer and what is published arrive."""
        while True:
            self.run = run = Run()
            self.ask(run, "kernel_info_request", {})
            answered = await within(1.0, run.over)
            if self.dead:
                raise WireError("it ended while it started")
            if answered:
                self.rest()
                return

    def ask(self, run: Run, kind: str, content: dict[str, Any]) -> None:
        """Sends a request; what answers it goes to `run`."""
        for channel in self._channels.values():
            channel.limit_bytes = channel.received_bytes + self.rules.flood_bytes + _DRAIN_BYTES
        self._flood_at = self._channels["published"].received_bytes + self.rules.flood_bytes
        run.request, parts = self._signer.write(kind, content)
        self.run = run
        self._channels["shell"].send(parts)

    def interrupt(self) -> None:
        """What Ctrl-C does. Goes past the kernel's control channel: that may be busy, or not what it was."""
        self.process.interrupt()

    def rest(self) -> None:
        """The run is over: what still arrives is forgotten, and if it does not end, so does the kernel."""
        self.run = None
        for channel in self._channels.values():
            channel.limit_bytes = channel.received_bytes + _IDLE_BYTES

    async def _pump(self, name: str) -> None:
        channel = self._channels[name]
        try:
            while True:
                self._hear(name, channel, await channel.receive())
        except WireError:
            self.dead = True
            if self.run is not None:
                self.run.end()  # who waits for it asks why, and closes this
            else:
                self.close()

    def _hear(self, name: str, channel: Channel, parts: list[bytes] | None) -> None:
        run = self.run
        if run is None:
            return
        if name == "published" and channel.received_bytes > self._flood_at:
            run.stop("flood")
        if parts is None:
            run.words.refuse("a value left out: too large")
            return
        if run.stopped and sum(map(len, parts)) > _SMALL_BYTES:
            return
        message = self._signer.read(parts)
        if message is None or message.request != run.request:
            return
        if name == "shell" and message.kind.endswith("_reply"):
            run.reply()
        elif message.kind == "status" and message.content.get("execution_state") == "idle":
            run.end()
        elif name == "published":
            run.words.take(message)

    def close(self) -> asyncio.Future[None]:
        """Kills the kernel with all it has started, and removes its files; the future is done when they are gone."""
        if self._closed is None:
            self.dead = True
            if self.run is not None:
                self.run.end()
            for pump in self._pumps:
                pump.cancel()
            for channel in self._channels.values():
                channel.close()
            os.close(self.data_fd)
            self._closed = asyncio.get_running_loop().run_in_executor(None, self._sandbox.close)
        return self._closed


def _last_line(pipe: int) -> str:
    with contextlib.suppress(BlockingIOError):
        return os.read(pipe, 1 << 16).decode(errors="replace").strip().rpartition("\n")[2]
    return ""


async def within(seconds: float, event: asyncio.Event) -> bool:
    """Waits for an event, but not for longer; whether it has come."""
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
    return event.is_set()
