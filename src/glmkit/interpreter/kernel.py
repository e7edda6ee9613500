"""A Jupyter kernel for one conversation, inside a sandbox.

    kernel = Kernel(measured.level, Limits())
    output = await kernel.run("x = 21")
    output = await kernel.run("x * 2")        # text "42": variables stay until the kernel is closed
    await kernel.close()                      # its processes and files are gone

The kernel starts with its first run. When it dies or has to be killed, the text of that run says so, and the next run
starts another one. Nothing that the kernel sends is trusted: see `wire` and `transcript`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

from glmkit.errors import GlmkitError, UsageError
from glmkit.interpreter.folder import File, list_files, read_file
from glmkit.interpreter.life import Life, Rules, Run, within
from glmkit.interpreter.sandbox import Level, Limits, Process
from glmkit.interpreter.transcript import Output

_MAX_CODE_CHARACTERS = 1 << 20

Admit = Callable[["Kernel"], Awaitable[None]]


class Kernel:
    """The code interpreter of one conversation.

    Args:
        level: The isolation, as `measure` found it.
        limits: What the sandbox allows.
        rules: What a run may.
        admit: Awaited before a process starts; it may refuse by raising a GlmkitError.
    """

    def __init__(self, level: Level, limits: Limits, rules: Rules | None = None, admit: Admit | None = None) -> None:
        self.level = level
        self.rules = rules or Rules()
        self.used_at = time.monotonic()
        self._limits = limits
        self._admit = admit
        self._ending: asyncio.Future[None] | None = None
        self._life: Life | None = None
        self._lost = False
        self._lock = asyncio.Lock()
        self._runs: list[Run] = []  # the one that runs, then those that wait

    @property
    def busy(self) -> bool:
        """Whether code runs or waits to run, or the kernel starts or ends."""
        return self._lock.locked()

    @property
    def alive(self) -> bool:
        """Whether there is a process."""
        return self._life is not None and not self._life.dead

    async def start(self) -> None:
        """Starts the kernel, so that the first run need not wait for it.

        Raises:
            InterpreterError: It does not start.
        """
        async with self._lock:
            await self._alive_life()

    async def run(self, code: str, seconds: float | None = None) -> Output:
        """Runs code; waits while other code of this conversation runs. Cancelling interrupts the code.

        Args:
            code: Python as Jupyter understands it.
            seconds: Time limit; that of the rules by default.

        Returns:
            What it gave. Errors, a time-out and the death of the kernel are said in its text.
        """
        run = Run()
        self._runs.append(run)
        task = asyncio.create_task(self._run(run, code, seconds or self.rules.run_seconds))
        task.add_done_callback(lambda _: self._runs.remove(run))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            run.stop("interrupted")
            raise

    async def interrupt(self) -> None:
        """Interrupts the code that runs, as Ctrl-C does; without code nothing happens."""
        if self._runs:
            self._runs[0].stop("interrupted")

    async def reset(self) -> None:
        """Forgets variables and files; the next run starts from nothing, and says nothing about it."""
        await self._end()
        self._lost = False

    async def close(self) -> None:
        """Kills the kernel and removes its files. A later run would start another one and say so."""
        await self._end()

    def files(self) -> list[File]:
        """The regular files in the working directory, by name; none while there is no process."""
        return list_files(self._life.data_fd) if self._life is not None and not self._life.dead else []

    def read_file(self, name: str, max_bytes: int = 16 << 20) -> bytes:
        """Reads a file of the working directory.

        Args:
            name: One of the names of `files`.
            max_bytes: Largest size.

        Raises:
            UsageError: There is no such regular file, or it is larger.
        """
        if self._life is None or self._life.dead:
            raise UsageError("this conversation has no files", hint="they are gone when its interpreter ends")
        return read_file(self._life.data_fd, name, max_bytes)

    async def _run(self, run: Run, code: str, seconds: float) -> Output:
        async with self._lock:
            begun = time.monotonic()
            if run.stopped or len(code) > _MAX_CODE_CHARACTERS:
                return Output("[the code did not run: too long, or no longer wanted]", (), True, 0.0)
            fresh = self._lost or (self._life is not None and self._life.dead)
            try:
                life = await self._alive_life()
                if run.stopped:
                    return Output("[the code did not run: no longer wanted]", (), True, 0.0)
                begun = time.monotonic()
                content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}}
                life.ask(run, "execute_request", {**content, "allow_stdin": False, "stop_on_error": False})
                note = await self._watch(life, run, seconds)
            except (GlmkitError, OSError) as error:
                note = f"the code interpreter cannot run: {getattr(error, 'message', error)}"
            except BaseException:
                self._kill()
                raise
            finally:
                self.used_at = time.monotonic()
            parts = (
                "[unsafe: this code interpreter is not isolated]" if self.level <= Level.WEAK else "",
                "[started afresh: earlier variables and files are gone]" if fresh else "",
                run.words.text(),
                note and f"[{note}]",
            )
            text = "\n".join(filter(None, parts))
            return Output(text, tuple(run.words.images), run.words.failed or bool(note), time.monotonic() - begun)

    async def _watch(self, life: Life, run: Run, seconds: float) -> str:
        """Waits for the end of a run and brings it about if need be; returns what there is to say about it."""
        if not await within(seconds, run.woken):
            run.stop("time")
        if run.replied and not run.over.is_set():
            await within(1.0, run.over)
        elif run.stopped and not run.over.is_set():
            life.interrupt()
            if not await within(self.rules.grace_seconds, run.over):
                self._kill()
        why = {
            "": "",
            "time": f"stopped after {seconds:g} s",
            "flood": f"stopped: it wrote more than {self.rules.flood_bytes >> 20} MB",
            "interrupted": "interrupted",
        }[run.stopped]
        if not life.dead:
            life.rest()
            return why
        why = why or await self._cause_of_death(life.process)
        self._kill()
        self._lost = False  # said here already
        return f"{why}; variables and files are lost"

    async def _cause_of_death(self, process: Process) -> str:
        with contextlib.suppress(TimeoutError):  # its sockets close a moment before the watchdog's last word
            await asyncio.to_thread(process.wait, 0.5)
        memory, disk = self._limits.memory_bytes >> 20, self._limits.disk_bytes >> 20
        causes = {
            "memory": f"killed: it took more than {memory:,} MB of memory",
            "disk": f"killed: its files took more than {disk:,} MB",
            "files": f"killed: it made more than {self._limits.files:,} files",
            "processes": f"killed: it started more than {self._limits.processes} processes",
        }
        why = process.reason
        return causes.get(why, f"killed: limit of {why}") if why else "the interpreter has died"

    async def _alive_life(self) -> Life:
        if self._life is not None and self._life.dead:
            self._kill()
        if self._life is None:
            if self._admit is not None:
                await self._admit(self)
            self._life = await Life.begin(self.level, self._limits, self.rules)
            self._lost = False
        return self._life

    def _kill(self) -> None:
        if self._life is not None:
            self._ending = self._life.close()
            self._life, self._lost = None, True

    async def _end(self) -> None:
        for run in self._runs:
            run.stop("interrupted")
        self._kill()
        async with self._lock:  # what was just starting, too
            self._kill()
            if self._ending is not None:
                await self._ending
