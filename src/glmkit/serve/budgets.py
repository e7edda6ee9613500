"""How much one key may ask for in a minute: so many requests, and so many tokens read and written."""

from __future__ import annotations

import time
from collections.abc import Callable

from glmkit.serve.failures import APIError, retry_after

_MINUTE_SECONDS = 60.0


class Budgets:
    """Every key has a minute's worth at the beginning, and gets it back evenly.

    Tokens are taken when an answer is over, also one that its client left, since nobody knows before how many it takes.
    So a key can owe some; it then waits until they are paid back. Where there are no keys, all share one budget.

    Args:
        requests_per_minute: Requests for answers of one key; None: any number.
        tokens_per_minute: Tokens of prompts and answers of one key; None: any number.
        clock: Seconds that only go forward.
    """

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests = _Budget(requests_per_minute, clock)
        self._tokens = _Budget(tokens_per_minute, clock)

    def take_request(self, owner: str) -> None:
        """Takes one request from a key's budget.

        Args:
            owner: The key, or "" where there are none.

        Raises:
            APIError: 429: the key has used up its requests or tokens; `Retry-After` says when it has some again.
        """
        for budget, what, code in ((self._requests, "requests", "rate_limit"), (self._tokens, "tokens", "token_limit")):
            seconds = budget.seconds_until_one(owner)
            if seconds > 0:
                raise APIError(
                    429,
                    f"this key has used its {budget.per_minute} {what} per minute",
                    code=code,
                    headers=retry_after(seconds),
                )
        self._requests.take(owner, 1)

    def take_tokens(self, owner: str, tokens: int) -> None:
        """Takes what a request cost, now that it is known.

        Args:
            owner: The key.
            tokens: Read and written.
        """
        self._tokens.take(owner, tokens)


class _Budget:
    """What each owner has left of one kind."""

    def __init__(self, per_minute: int | None, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}  # an owner's rest, and when it was that

    def seconds_until_one(self, owner: str) -> float:
        """How long until an owner has one again; 0: it has."""
        if self.per_minute is None:
            return 0.0
        return max(0.0, 1.0 - self._rest(owner)) * _MINUTE_SECONDS / self.per_minute

    def take(self, owner: str, number: int) -> None:
        if self.per_minute is not None:
            self._left[owner] = (self._rest(owner) - number, self._clock())

    def _rest(self, owner: str) -> float:
        assert self.per_minute is not None
        rest, then = self._left.get(owner, (float(self.per_minute), self._clock()))
        return min(float(self.per_minute), rest + (self._clock() - then) * self.per_minute / _MINUTE_SECONDS)
