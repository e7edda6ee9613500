"""The kernels of all conversations of a server: so many and no more, and none for longer than it is used.

kernels = await Kernels.open(Level.FULL)      # measures the isolation first; less than this, and it refuses
output = await kernels.of("conversation-1").run("print(1)")
await kernels.close()
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from importlib.util import find_spec

from glmkit.errors import MissingDependencyError, QueueFullError
from glmkit.interpreter.kernel import Kernel
from glmkit.interpreter.life import InterpreterError, Rules
from glmkit.interpreter.measure import Measured, measure
from glmkit.interpreter.sandbox import Level, Limits


class Kernels:
    """Kernels by conversation. A kernel costs nothing before its first run.

    Use `Kernels.open`, which measures.

    Args:
        measured: The isolation that was found.
        limits: What each sandbox allows.
        rules: What each run may.
        max_kernels: How many processes there may be; the one that has been idle longest makes room for another.
    """

    def __init__(
        self, measured: Measured, limits: Limits | None = None, rules: Rules | None = None, max_kernels: int = 8
    ) -> None:
        self.measured = measured
        self._limits = limits or Limits()
        self._rules = rules or Rules()
        self._max_kernels = max_kernels
        self._kernels: dict[str, Kernel] = {}
        self._started: set[Kernel] = set()
        self._sweeper: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        minimum: Level = Level.FULL,
        *,
        limits: Limits | None = None,
        rules: Rules | None = None,
        max_kernels: int = 8,
    ) -> Kernels:
        """Measures the isolation, and starts a kernel once to see that it can.

        Args:
            minimum: The least isolation that will do.
            limits: What each sandbox allows.
            rules: What each run may.
            max_kernels: How many processes there may be.

        Raises:
            MissingDependencyError: ipykernel is not installed.
            SandboxError: This machine does not reach `minimum`.
            InterpreterError: A kernel does not start here.
        """
        if find_spec("ipykernel") is None:
            raise MissingDependencyError("ipykernel", "interpreter")
        kernels = cls(await asyncio.to_thread(measure, minimum), limits, rules, max_kernels)
        trial = Kernel(kernels.measured.level, kernels._limits, kernels._rules)
        try:
            await trial.start()
        finally:
            await trial.close()
        return kernels

    def of(self, conversation: str) -> Kernel:
        """The kernel of a conversation; a new one if there is none.

        Args:
            conversation: Its id. Whoever knows it reaches its variables and files.
        """
        if conversation not in self._kernels:
            admit = partial(self._admit, conversation)
            self._kernels[conversation] = Kernel(self.measured.level, self._limits, self._rules, admit)
        return self._kernels[conversation]

    async def drop(self, conversation: str) -> None:
        """Ends the kernel of a conversation, if it has one; its variables and files are gone.

        Args:
            conversation: Its id.
        """
        kernel = self._kernels.pop(conversation, None)
        if kernel is not None:
            await kernel.close()
            self._started.discard(kernel)

    @property
    def running(self) -> int:
        """How many kernels have a process."""
        return sum(kernel.alive for kernel in self._started)

    async def close(self) -> None:
        """Ends all kernels."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        started, self._started = self._started, set()
        self._kernels.clear()
        await asyncio.gather(*(kernel.close() for kernel in started))

    async def _admit(self, conversation: str, kernel: Kernel) -> None:
        """Called by a kernel that is about to start a process; makes room for it.

        Somebody may hold a kernel that was dropped. It is that of its conversation again, or does not start: what runs
        is always what `of` gives and `drop` ends.

        Raises:
            InterpreterError: The conversation has another one now.
            QueueFullError: All others are at work.
        """
        if self._kernels.setdefault(conversation, kernel) is not kernel:
            raise InterpreterError("it was reset meanwhile", hint="run the code again")
        self._started = {other for other in self._started if other.alive or other.busy} - {kernel}
        if len(self._started) >= self._max_kernels:
            idle = [other for other in self._started if not other.busy]
            if not idle:
                raise QueueFullError(
                    f"all {self._max_kernels} code interpreters are at work", hint="try again when one has finished"
                )
            oldest = min(idle, key=lambda other: other.used_at)
            self._started.remove(oldest)
            self._started.add(kernel)
            await oldest.close()
        self._started.add(kernel)
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        """Ends kernels that nobody has used for a while; stops when there are none."""
        while self._started:
            await asyncio.sleep(min(30.0, self._rules.idle_seconds / 4))
            oldest_use = time.monotonic() - self._rules.idle_seconds
            for kernel in [one for one in self._started if not one.busy and one.used_at < oldest_use]:
                self._started.discard(kernel)
                await kernel.close()
            for name in [name for name, kernel in self._kernels.items() if kernel.used_at < oldest_use]:
                if not self._kernels[name].busy and not self._kernels[name].alive:
                    del self._kernels[name]
