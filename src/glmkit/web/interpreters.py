"""Code interpreters of conversations: how far they are isolated, and one for each conversation that runs code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from glmkit.errors import GlmkitError, UsageError
from glmkit.tools.events import Output
from glmkit.web.texts import Language


class Kernel(Protocol):
    """What runs the code of one conversation; `glmkit.interpreter.kernel.Kernel` does."""

    async def run(self, code: str) -> Output: ...
    async def reset(self) -> None: ...
    async def interrupt(self) -> None: ...
    def files(self) -> Sequence[Any]: ...
    def read_file(self, name: str) -> bytes: ...


class Pool(Protocol):
    """Kernels by conversation; `glmkit.interpreter.kernels.Kernels` is one."""

    def of(self, conversation: str) -> Kernel: ...
    async def drop(self, conversation: str) -> None: ...
    async def close(self) -> None: ...


@dataclass(frozen=True)
class Isolation:
    """What was measured when the app started.

    Args:
        level: Its name: "full", "reduced", "weak" or "none".
        sentences: What people are told, in both languages.
        safe: Whether it reaches the minimum; if not, code runs only because somebody insisted at the start.
    """

    level: str
    sentences: dict[Language, str]
    safe: bool = True


class Interpreters:
    """The interpreters, or why there are none.

    Args:
        pool: Makes and keeps kernels; None: there are none.
        isolation: What was measured; None without a pool.
        reason: Why there are none.
    """

    def __init__(self, pool: Pool | None, isolation: Isolation | None = None, reason: str = "") -> None:
        self._pool, self.isolation, self.reason = pool, isolation, reason

    @property
    def available(self) -> bool:
        """Whether code can run."""
        return self._pool is not None

    def check(self) -> None:
        """Refuses where code cannot run.

        Raises:
            UsageError: It cannot; the message says why.
        """
        if self._pool is None:
            raise UsageError(f"the code interpreter is not available: {self.reason}")

    def of(self, talk_id: str) -> Kernel:
        """The interpreter of a conversation; it starts with its first code.

        Args:
            talk_id: The conversation.

        Raises:
            UsageError: There are none.
        """
        self.check()
        assert self._pool is not None
        return self._pool.of(talk_id)

    async def end(self, talk_id: str) -> None:
        """Ends the interpreter of a conversation, with its files; where there is none nothing happens.

        Args:
            talk_id: The conversation.
        """
        if self._pool is not None:
            await self._pool.drop(talk_id)

    async def close(self) -> None:
        """Ends all."""
        if self._pool is not None:
            await self._pool.close()


async def open_interpreters(minimum: str = "full", *, unsafe: bool = False) -> Interpreters:
    """Measures how far code is isolated here, and gets ready to run it.

    Args:
        minimum: The least isolation that will do: "full" or "reduced".
        unsafe: Run code also where there is next to none.

    Returns:
        The interpreters; without any, and the reason, where the machine does not reach the minimum.

    Raises:
        UsageError: There is no such minimum.
    """
    from glmkit.interpreter.sandbox import Level

    if minimum not in ("full", "reduced"):
        raise UsageError(f"there is no level {minimum!r}", hint="full or reduced")
    wanted = Level[minimum.upper()]
    try:
        from glmkit.interpreter.kernels import Kernels

        kernels = await Kernels.open(Level.WEAK if unsafe else wanted)
    except (GlmkitError, OSError) as error:  # OSError: a full /tmp, for instance
        return Interpreters(None, reason=getattr(error, "message", str(error)))
    measured = kernels.measured
    sentences: dict[Language, str] = {"zh": measured.sentence_zh, "en": measured.sentence_en}
    return Interpreters(kernels, Isolation(measured.level.name.lower(), sentences, measured.level >= wanted))
