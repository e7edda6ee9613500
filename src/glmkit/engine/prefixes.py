"""What was read before: caches that no answer uses any more, found again by the ids in them.

    new prompt   system prompt | question 1 | answer 1 | question 2
    idle         system prompt | question 1 | answer 1               a conversation that goes on: taken over whole
    idle         system prompt | other question | ...                shared beginning: copied, and the idle cache stays,
                                                                     where there is room for both

A cache is of use only to requests of the same owner and adapter: what one tenant has read, another cannot find.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glmkit.engine.cache import BufferCache

_FEWEST_TOKENS = 8  # of a beginning that is worth a copy: all prompts share the first marks
_MOST_CACHES = 64  # each is looked at for each new prompt


@dataclass(frozen=True)
class Reader:
    """Whose reading a cache holds.

    Args:
        owner: The tenant.
        adapter: The adapter; None is the base.
    """

    owner: str
    adapter: str | None


@dataclass(eq=False)
class Reading:
    """A cache and the ids that were read into it; the last ones perhaps not yet.

    Args:
        reader: Whose it is.
        ids: The ids.
        cache: Their keys and values, one row.
    """

    reader: Reader
    ids: Sequence[int]
    cache: BufferCache

    @property
    def tokens(self) -> int:
        """How many tokens are in the cache."""
        return min(self.cache.get_seq_length(), len(self.ids))


@dataclass(frozen=True)
class Beginning:
    """As much of a prompt as was read before.

    Args:
        reading: The cache that has it.
        tokens: How long it is.
        was_idle: Whether no request uses the cache.
    """

    reading: Reading
    tokens: int
    was_idle: bool

    @property
    def goes_on(self) -> bool:
        """Whether nothing is lost if the cache is taken over."""
        return self.was_idle and self.tokens >= self.reading.tokens - 1

    @property
    def idle_tokens(self) -> int:
        """Tokens that the cache has room for, where no request pays for them."""
        return self.reading.cache.capacity_tokens if self.was_idle else 0

    def take(self, capacity_tokens: int) -> BufferCache:
        """Takes an idle cache over; what else was in it is gone.

        Args:
            capacity_tokens: Room that it shall have.
        """
        self.reading.cache.truncate(self.tokens)
        self.reading.cache.resize(capacity_tokens)
        return self.reading.cache


class Prefixes:
    """Idle caches, the least recently used ones first."""

    def __init__(self) -> None:
        self._idle: list[Reading] = []

    @property
    def capacity_tokens(self) -> int:
        """Tokens that all idle caches have room for."""
        return sum(reading.cache.capacity_tokens for reading in self._idle)

    def keep(self, reading: Reading) -> None:
        """Takes over a cache that its request has done with.

        Args:
            reading: The cache; nobody else may write to it from now on.
        """
        if reading.tokens < _FEWEST_TOKENS:
            return
        reading.ids = tuple(reading.ids[: reading.tokens])
        reading.cache.resize(reading.tokens)
        self._idle.append(reading)
        if len(self._idle) > _MOST_CACHES:
            self.drop_oldest()

    def drop_oldest(self) -> bool:
        """Frees the cache that was not used for longest.

        Returns:
            Whether there was one.
        """
        if self._idle:
            del self._idle[0]
            return True
        return False

    def clear(self) -> None:
        """Frees all."""
        self._idle.clear()

    def find(self, reader: Reader, prompt: Sequence[int], busy: Sequence[Reading]) -> Beginning | None:
        """Finds the longest beginning of a prompt that was read already.

        Args:
            reader: Who asks.
            prompt: The prompt's ids; the last one is always left to be read, because its logits are wanted.
            busy: Caches of requests that run; theirs are copied, never taken.

        Returns:
            Where it is; None if it is not worth it. A cache that was idle is the caller's now: what makes room for the
            request must not free what the request is to go on with.
        """
        best, shared = None, _FEWEST_TOKENS - 1
        for reading in (*self._idle, *busy):
            if reading.reader == reader:
                tokens = min(common_tokens(reading.ids, prompt), reading.tokens, len(prompt) - 1)
                if tokens > shared:
                    best, shared = reading, tokens
        if best is None:
            return None
        was_idle = best in self._idle
        if was_idle:
            self._idle.remove(best)
        return Beginning(best, shared, was_idle)

    def copy(self, beginning: Beginning, capacity_tokens: int) -> BufferCache:
        """Copies a beginning that was found, and keeps an idle cache as it was.

        Args:
            beginning: What `find` gave.
            capacity_tokens: Room that the copy shall have.
        """
        if beginning.was_idle:
            self._idle.append(beginning.reading)
        return beginning.reading.cache.copy(beginning.tokens, capacity_tokens)


def common_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common beginning of two lists.

    Args:
        one: Ids.
        other: Ids.
    """
    low, high = 0, min(len(one), len(other))
    one, other = list(one[:high]), list(other[:high])
    while low < high:  # comparing slices is done in C
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
