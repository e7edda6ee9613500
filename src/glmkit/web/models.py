"""The models that the page offers: what each needs, which are in memory, and loading one while the others answer."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmkit.errors import GlmkitError, UsageError
from glmkit.machine import free_memory_bytes

if TYPE_CHECKING:
    from glmkit.chat.following import Served

_CONTEXT_TOKENS = 2048  # of the estimate: what a conversation usually takes
_ROOM = 1.15  # buffers and working memory beside weights and cache


@dataclass(frozen=True)
class Estimate:
    """What a model needs before it is loaded.

    Args:
        need_bytes: Weights as they are on disk, and the cache of one conversation; None if nobody can tell.
        free_bytes: Memory that this machine, or its container, has left; None if nobody can tell.
        problem: Why nobody can tell.
    """

    need_bytes: int | None
    free_bytes: int | None
    problem: str = ""

    @property
    def fits(self) -> bool:
        """Whether there is room, as far as anybody can tell."""
        return self.need_bytes is None or self.free_bytes is None or self.need_bytes <= self.free_bytes


@dataclass
class Loading:
    """A model that is being loaded.

    Args:
        name: Which.
        need_bytes: What it will take, to tell how far it is.
        base_bytes: Memory of this process before.
        problem: Why it failed; empty as long as it did not.
    """

    name: str
    need_bytes: int
    base_bytes: int
    started: float = field(default_factory=time.monotonic)
    problem: str = ""

    @property
    def percent(self) -> int:
        """How far it is, by the memory that was taken; never 100 before it is ready."""
        if not self.need_bytes:
            return 0
        return max(0, min(99, round(100 * (process_bytes() - self.base_bytes) / self.need_bytes)))


class Models:
    """Names of models, and those of them that are loaded.

    Args:
        names: What can be chosen; the first is that of new conversations.
        load: Loads one by name; runs in a thread.
        estimate: What one needs; None asks `glmkit.inspection`.
        limit_bytes: Free memory, for tests; None asks the system.
        folders: Where the models lie, by name; those that are not in it lie where their name says.
    """

    def __init__(
        self,
        names: Sequence[str],
        load: Callable[[str], Served],
        *,
        estimate: Callable[[str], int] | None = None,
        limit_bytes: int | None = None,
        folders: Mapping[str, str] | None = None,
    ) -> None:
        if not names:
            raise UsageError("no model is named", hint="glm web MODEL")
        self.names = list(dict.fromkeys(names))
        self._load, self._estimate, self._limit_bytes = load, estimate or needed_bytes, limit_bytes
        self._folders = dict(folders or {})
        self._served: dict[str, Served] = {}
        self._lock = asyncio.Lock()
        self.loading: Loading | None = None

    @classmethod
    def of(cls, served: Mapping[str, Served]) -> Models:
        """Models that are loaded already.

        Args:
            served: They by name.
        """
        models = cls(list(served), served.__getitem__)
        models._served.update(served)
        return models

    @property
    def first(self) -> str:
        """The model of new conversations."""
        return self.names[0]

    def is_loaded(self, name: str) -> bool:
        """Whether a model can answer at once.

        Args:
            name: Its name.
        """
        return name in self._served

    def get(self, name: str) -> Served:
        """A model that is loaded.

        Args:
            name: Its name.

        Raises:
            UsageError: It is not, or nobody offers it.
        """
        self._check(name)
        if name not in self._served:
            raise UsageError(f"{name} is not loaded", hint="choose it and press Load")
        return self._served[name]

    async def estimate(self, name: str) -> Estimate:
        """What a model would need, and what there is.

        Args:
            name: Its name.

        Raises:
            UsageError: Nobody offers it.
        """
        self._check(name)
        free = free_memory_bytes() if self._limit_bytes is None else self._limit_bytes
        try:
            return Estimate(await asyncio.to_thread(self._estimate, self._folders.get(name, name)), free)
        except GlmkitError as error:
            return Estimate(None, free, error.message)

    async def load(self, name: str, busy: Callable[[str], bool] = lambda name: False) -> Served:
        """Loads a model; if there is no room, loaded ones that nobody uses make it.

        Args:
            name: Its name.
            busy: Whether an answer of a loaded model is being written.

        Returns:
            The model; the one that is there if it is loaded already.

        Raises:
            UsageError: Nobody offers it, or it does not fit.
            GlmkitError: It cannot be loaded.
        """
        self._check(name)
        async with self._lock:
            if name in self._served:
                return self._served[name]
            estimate = await self.estimate(name)
            for other in [other for other in self._served if not estimate.fits and not busy(other)]:
                await asyncio.to_thread(self._served.pop(other).close)
                estimate = await self.estimate(name)
                if estimate.fits:
                    break
            if not estimate.fits:
                raise UsageError(
                    f"{name} needs {gigabytes(estimate.need_bytes)}, and {gigabytes(estimate.free_bytes)} are free",
                    hint="choose a smaller or quantised model",
                )
            self.loading = Loading(name, estimate.need_bytes or 0, process_bytes())
            try:
                self._served[name] = await asyncio.to_thread(self._load, name)
            finally:
                self.loading = None
            return self._served[name]

    def close(self) -> None:
        """Ends all models."""
        for served in self._served.values():
            served.close()
        self._served.clear()

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise UsageError(f"there is no model {name!r}", hint=f"there are {', '.join(map(label, self.names))}")


def label(name: str) -> str:
    """What people see of a model's name: of a folder its last part, for a page tells nobody where files lie.

    Args:
        name: A name, hub id or folder.
    """
    return Path(name).name if os.path.isabs(name) or os.path.isdir(name) else name


def adapter_names(served: Any) -> tuple[str, ...]:
    """The adapters of a loaded model.

    Args:
        served: The model.
    """
    adapters = getattr(served.loaded, "adapters", None)
    return () if adapters is None else tuple(adapters.names)


def needed_bytes(name: str) -> int:
    """What a model takes in memory as it is on disk, with the cache of one conversation.

    Args:
        name: A folder or name.

    Raises:
        GlmkitError: It cannot be read.
    """
    from glmkit.inspection import inspect

    described = inspect(name, context_tokens=None)
    cache = next(iter(described["memory_bytes"].values()))["kv_cache"]
    share = min(1.0, _CONTEXT_TOKENS / max(1, described["context_tokens"]))
    return int((described["stored_bytes"] + cache * share) * _ROOM)


def process_bytes() -> int:
    """Memory of this process."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gigabytes(count: int | None) -> str:
    """A number of bytes as people say it.

    Args:
        count: Bytes; None is unknown.
    """
    if count is None:
        return "?"
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
