"""One request of the batch engine: its row while it is being answered, and the stream of steps that its reader gets."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor

from glmkit.engine.cache import BufferCache
from glmkit.engine.decode import NO_TOKEN, WAITING, CancelToken, Step, Usage
from glmkit.engine.layout import InputLayout, layout_for
from glmkit.engine.prefixes import Reader, Reading
from glmkit.engine.sampling import SamplingOptions, row_generators
from glmkit.errors import GenerationError, GlmkitError


class Guide(Protocol):
    """Says which tokens may come next."""

    def allowed(self) -> Tensor | None:
        """(V,) bool on the CPU; None: every token."""
        ...

    def push(self, token_id: int) -> None:
        """Takes the token that came."""
        ...


@dataclass(frozen=True)
class EngineState:
    """What an engine is doing; counts are since it began.

    Args:
        running: Rows that get a token each turn.
        waiting: Requests without a place.
        prefilling: Rows whose prompt is being read.
        max_running: Most rows.
        max_waiting: Most requests without a place.
        cache_tokens_used: Tokens that the caches of all rows have room for.
        cache_tokens_idle: The same of caches that are kept for later; they go when room is needed.
        cache_tokens_total: Tokens that there is room for in all.
        prefix_hit_tokens: Tokens of prompts that were found in a cache.
        prompt_tokens: Tokens of prompts that were computed.
        generated_tokens: Tokens of answers.
        started: Requests that were taken.
        finished: Requests with a whole answer.
        aborted: Requests that were cancelled.
        failed: Requests that ended with an error.
        tokens_per_second: Tokens of answers, over the last 10 seconds.
        last_progress: When a call of the model last came back, as `time.monotonic` counts.
        busy: Whether there is anything to do.
        draining: Whether no more requests are taken.
        broken: Why the engine ended, if it did so by itself.
    """

    running: int
    waiting: int
    prefilling: int
    max_running: int
    max_waiting: int
    cache_tokens_used: int
    cache_tokens_idle: int
    cache_tokens_total: int
    prefix_hit_tokens: int
    prompt_tokens: int
    generated_tokens: int
    started: int
    finished: int
    aborted: int
    failed: int
    tokens_per_second: float
    last_progress: float
    busy: bool
    draining: bool
    broken: str | None


class Generation(Iterator[Step]):
    """The steps of one answer, as `glmkit.engine.stream` gives them; waits for each.

    Args:
        cancel: Ends it.
        wake: Tells the engine to look.
    """

    def __init__(self, cancel: CancelToken, wake: Callable[[], None]) -> None:
        self.cancel_token = cancel
        self.cached_tokens = 0
        self._wake = wake
        self._steps: deque[Step] = deque()
        self._error: Exception | None = None
        self._there = threading.Condition()
        self._ended = self._closed = False
        self._notify: Callable[[], None] | None = None

    @property
    def cancelled(self) -> bool:
        """Whether its end was asked for."""
        return self._closed or self.cancel_token.cancelled

    def cancel(self) -> None:
        """Asks for the end; asking twice, or after it, is fine."""
        self.cancel_token.cancel()
        self._wake()

    def close(self) -> None:
        """Asks for the end of this answer alone, where others have the same token."""
        if not self._ended:
            self._closed = True
            self._wake()

    def do_not_wait(self, notify: Callable[[], None]) -> None:
        """Gives WAITING from now on where there is no step yet.

        Args:
            notify: Called, from the engine's thread, whenever there is something to read.
        """
        with self._there:
            self._notify = notify

    def __next__(self) -> Step:
        with self._there:
            while not self._steps and self._error is None and not self._ended:
                if self._notify is not None:
                    return WAITING
                self._there.wait()
            if self._steps:
                step = self._steps.popleft()
                self._ended = step.finish_reason is not None
                return step
            if self._error is not None:
                error, self._error, self._ended = self._error, None, True
                raise error
        raise StopIteration

    def put(self, step: Step) -> None:
        """Gives the reader a step; the engine's side."""
        with self._there:
            self._steps.append(step)
        self._tell()

    def fail(self, error: Exception) -> None:
        """Ends the answer with an error; the engine's side."""
        if not isinstance(error, GlmkitError):
            cause = error
            error = GenerationError(f"the answer could not go on: {type(cause).__name__}: {cause}")
            error.__cause__ = cause
        with self._there:
            self._error = error
        self._tell()

    def _tell(self) -> None:
        with self._there:
            self._there.notify_all()
            notify = self._notify
        if notify is not None:
            notify()


@dataclass(eq=False)
class Row:
    """A request, and how far its answer is. Only the engine's thread touches what follows `generation`.

    Args:
        prompt: Ids of the prompt.
        options: How tokens are chosen.
        stop_ids: Ids that end the answer.
        limit: Most tokens of the answer.
        reader: Owner and adapter.
        model: The model, or its view with the adapter.
        layout: Masks and positions, if they are not the model's own.
        top_logprobs: Most likely tokens to be given with each step.
        guide: Which tokens may come.
        generation: What the reader has of it.
    """

    prompt: list[int]
    options: SamplingOptions
    stop_ids: frozenset[int]
    limit: int
    reader: Reader
    model: Any
    layout: InputLayout | None
    top_logprobs: int
    guide: Guide | None
    generation: Generation
    number: int = 0
    answer: list[int] = field(default_factory=list)
    cache: BufferCache | None = None
    logits: Tensor | None = None  # (1, V) for the next draw
    placed: InputLayout | None = None  # the layout in use
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.rules = replace(self.options, seed=None)
        self.generator: Random = row_generators(self.options, 1)[0]
        self.ids = list(self.prompt)  # prompt and answer
        self._columns = 0  # that the layout has counted

    @property
    def reading(self) -> Reading:
        """What its cache holds."""
        assert self.cache is not None
        return Reading(self.reader, self.ids, self.cache)

    @property
    def read_tokens(self) -> int:
        """How many ids the model has read."""
        return 0 if self.cache is None else self.cache.get_seq_length()

    @property
    def capacity_tokens(self) -> int:
        """Tokens that its cache has room for."""
        return 0 if self.cache is None else self.cache.capacity_tokens

    def begin(self, cache: BufferCache) -> None:
        """Gets a cache, which may have read a beginning of it already."""
        self.cache = cache
        if not self.answer:
            self.generation.cached_tokens = self.read_tokens

    def begin_layout(self) -> None:
        """Makes the layout at its first part; counts on to an answer that is read again."""
        if self.placed is None:
            ids = torch.tensor([self.prompt], dtype=torch.int64, device=self.model.device)
            self.placed = layout_for(self.model, ids, ids.new_zeros(1)) if self.layout is None else self.layout
            self._columns = len(self.prompt)
        if len(self.ids) > self._columns:
            self.placed.step(len(self.ids) - self._columns)
            self._columns = len(self.ids)

    def stepped(self, logits: Tensor, seconds: float) -> None:
        """Counts a step of the model: its logits, and how long it took."""
        self.logits = logits
        self.decode_seconds += seconds
        self._columns += 1

    def needs_room(self) -> bool:
        """Whether the next token would not fit into the cache."""
        return self.logits is None and self.read_tokens + 1 > self.capacity_tokens

    def resize(self, capacity_tokens: int) -> None:
        """Gives the cache another size."""
        assert self.cache is not None
        self.cache.resize(capacity_tokens)

    def forget(self) -> None:
        """Lets go of the cache; what was read must be read again."""
        self.cache = self.logits = None

    def take(self, token: int) -> None:
        """Counts a token that was drawn."""
        self.logits = None
        self.answer.append(token)
        self.ids.append(token)
        if self.guide is not None and token not in self.stop_ids:
            self.guide.push(token)

    def finish_reason(self, token: int) -> str | None:
        """Why the answer ends with a token; None if it goes on."""
        if token in self.stop_ids:
            return "stop"
        return "length" if len(self.answer) >= self.limit else None

    def step(self, token: int, logprob: float, finish: str | None, top: tuple[tuple[int, float], ...]) -> Step:
        """What the reader gets of a token."""
        usage = None
        if finish is not None:
            cached = self.generation.cached_tokens
            usage = Usage(
                cached, len(self.prompt) - cached, len(self.answer), self.prefill_seconds, self.decode_seconds
            )
        return Step(NO_TOKEN if finish == "cancelled" else token, logprob, finish, usage, top)
