"""Timing that can be trusted on a machine that other processes use too, and the peak of memory.

Variants take turns (A B A B), so that a machine whose speed drifts changes all of them alike. A repetition counts only
if other processes used less than 4 % of the processors meanwhile:

    /proc/stat   |---- busy, all processes (also time the hypervisor took) ----|
    own          |---------- this process and its children ----------|  others  |   others / (cores * seconds) < 4 %
"""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MOST_OTHERS = 0.04  # of all processors; measured: below it, figures of one variant agree within 2 %
_PATIENCE = 3  # rounds begun at most, for each repetition that is wanted
_IDLE_FIELDS = (3, 4)  # of the first line of /proc/stat: idle, iowait; guest times are counted in user's already
_COUNTED_FIELDS = 8


@dataclass(frozen=True)
class Load:
    """What processors did until a moment.

    Args:
        wall: Seconds of a monotonic clock.
        busy: Seconds that all processors were busy, those included that a hypervisor took away.
        own: Seconds of them that this process and its finished children used.
    """

    wall: float
    busy: float
    own: float


@dataclass(frozen=True)
class Repetition:
    """One timed run.

    Args:
        seconds: How long it took.
        others: Share of all processors that other processes used meanwhile; 0 where that cannot be known.
    """

    seconds: float
    others: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether other processes left the machine alone."""
        return self.others < MOST_OTHERS


@dataclass
class Timing:
    """All repetitions of one variant, in the order of the rounds."""

    repetitions: list[Repetition] = field(default_factory=list)

    @property
    def clean(self) -> int:
        """Number of clean repetitions."""
        return sum(one.clean for one in self.repetitions)

    @property
    def seconds(self) -> float:
        """The median of the clean repetitions; if there is none, the shortest of all, which is the least wrong."""
        clean = [one.seconds for one in self.repetitions if one.clean]
        return statistics.median(clean) if clean else min(one.seconds for one in self.repetitions)

    @property
    def mark(self) -> str:
        """ "~" if no repetition was clean."""
        return "" if self.clean else "~"


def load_now(stat: str | None = None) -> Load | None:
    """Reads the counters.

    Args:
        stat: Text of /proc/stat; None: the machine's.

    Returns:
        The load so far; None where there is no /proc/stat.
    """
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall, own = time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime
    if stat is None:
        try:
            stat = Path("/proc/stat").read_text()
        except OSError:
            return None
    ticks = [int(number) for number in stat.split("\n", 1)[0].split()[1:]][:_COUNTED_FIELDS]
    busy = sum(ticks) - sum(ticks[place] for place in _IDLE_FIELDS)
    return Load(wall, busy / os.sysconf("SC_CLK_TCK"), own)


def share_of_others(before: Load | None, after: Load | None, cores: int) -> float:
    """What other processes used between two moments.

    Args:
        before: Load at the first.
        after: Load at the second.
        cores: Number of processors.

    Returns:
        Their share of all processors. The counters step by 10 ms, so two steps of each processor say nothing.
    """
    if before is None or after is None:
        return 0.0
    unsure = 2.0 * cores / os.sysconf("SC_CLK_TCK")
    others = (after.busy - before.busy) - (after.own - before.own) - unsure
    return max(0.0, others) / max(1e-9, cores * (after.wall - before.wall))


def timed(work: Callable[[], float | None]) -> Repetition:
    """Runs something once.

    Args:
        work: What to run. It may return seconds that it measured itself, which count instead of the whole.

    Returns:
        The repetition.
    """
    before, started = load_now(), time.perf_counter()
    own = work()
    seconds = time.perf_counter() - started
    others = share_of_others(before, load_now(), os.cpu_count() or 1)
    return Repetition(seconds if own is None else own, others)


def interleaved(
    variants: Mapping[str, Callable[[], float | None]],
    repeats: int,
    *,
    warm: bool = True,
    patience: int = _PATIENCE,
) -> dict[str, Timing]:
    """Times variants by turns until each has as many clean repetitions as wanted.

    Args:
        variants: Name -> what to run, see `timed`.
        repeats: Clean repetitions of each; at most `patience` times as many rounds are run.
        warm: Whether each runs once before, uncounted.
        patience: See repeats.

    Returns:
        Name -> its repetitions, one of each round, so that two variants can be compared round by round.
    """
    found = {name: Timing() for name in variants}
    if warm:
        for work in variants.values():
            work()
    for _ in range(repeats * patience):
        for name, work in variants.items():
            found[name].repetitions.append(timed(work))
        if all(timing.clean >= repeats for timing in found.values()):
            break
    return found


def paired_ratio(ours: Timing, theirs: Timing) -> tuple[float, str]:
    """How many times faster one variant was than another: the median over the rounds in which both were clean.

    Args:
        ours: Repetitions of the one.
        theirs: Of the other, from the same call of `interleaved`.

    Returns:
        The ratio of their seconds to ours, and "~" if there was no such round: then of the shortest ones.
    """
    pairs = list(zip(ours.repetitions, theirs.repetitions))
    both: Sequence[float] = [b.seconds / a.seconds for a, b in pairs if a.clean and b.clean]
    if both:
        return statistics.median(both), ""
    return min(b.seconds for _, b in pairs) / min(a.seconds for a, _ in pairs), "~"


# --- memory ---


class PeakMemory:
    """The most memory this process takes inside a `with` block (Linux; zeros elsewhere).

    Attributes:
        anonymous: Peak of anonymous memory in bytes, sampled every 2 ms: weights, caches, the heap.
        resident: Peak of all resident memory in bytes, kept by the kernel; it also counts mapped files.
        start: Anonymous bytes before the block.
    """

    def __init__(self) -> None:
        self.anonymous = self.resident = self.start = 0

    def __enter__(self) -> PeakMemory:
        self.start = self.anonymous = memory_bytes("RssAnon")
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's own peak begins again
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.resident = memory_bytes("VmHWM")

    @property
    def bytes(self) -> int:
        """Peak of anonymous memory above the start of the block."""
        return self.anonymous - self.start

    def _sample(self) -> None:
        while True:
            self.anonymous = max(self.anonymous, memory_bytes("RssAnon"))
            if self._stop.wait(0.002):
                return


def memory_bytes(name: str) -> int:
    """A line of /proc/self/status.

    Args:
        name: Such as "RssAnon", "VmRSS", "VmHWM".

    Returns:
        Its bytes; 0 where there is no such line.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
