"""Many answers at once: continuous batching of requests that come and go at any time.

One thread runs the model, and each turn of it is

    cancelled rows leave -> waiting requests enter, with what was read before -> a part of one prompt is read
        -> every running row gets one token, in one call of the model -> finished rows leave

so a stream waits for another request's prompt for a part of it at most. Every row has a cache of its own: rows of any
length run side by side without padding, a row leaves at once, and a conversation that goes on finds its cache again
(`engine/prefixes.py`). When memory is short idle caches go first, then the youngest row starts over later.

A row's tokens do not depend on the rows beside it, up to rounding in the model where native code does not run it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from glmkit.engine.cache import LanguageModel, new_cache
from glmkit.engine.decode import CancelToken, answer_limit, check_limits
from glmkit.engine.forward import forward_for
from glmkit.engine.generation import EngineState, Generation, Guide, Row
from glmkit.engine.layout import InputLayout, reads_whole_prompts
from glmkit.engine.prefixes import Prefixes, Reader, common_tokens
from glmkit.engine.rows import RowsForward, rows_forward
from glmkit.engine.sampling import Draw, SamplingOptions, sample
from glmkit.errors import GenerationError, QueueFullError, UsageError

__all__ = ["BatchEngine", "EngineState", "Generation", "Guide"]

_FIRST_ROOM_TOKENS = 256  # made for an answer when it begins; few are as long as they may be
_PREFILL_SECONDS = 0.25  # that running streams wait for a part of a prompt
_PREFILL_TOKENS = (16, 512)  # fewest and most of a part
_TURN_SECONDS = 0.05  # for further parts in the same turn: short prompts enter together
_SPEED_SECONDS = 10.0  # over which tokens per second are counted
_SMALL_BYTES = 1 << 30  # of a cache that needs no sparing
_SHARED_TOKENS = 32  # a prompt waits for another one that is being read if they share more


class BatchEngine:
    """Answers many requests with one model; used from any thread.

    Args:
        model: The language model; its adapters, if any, are chosen by each request.
        max_running: Most rows at once.
        max_waiting: Most requests that wait for a place; more are refused.
        cache_bytes: Memory for keys and values, of running rows and of what is kept for later. None: what all rows need
            together at a quarter of their longest, and at least one whole context; or all their longest within 1 GiB.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_running: int = 16,
        max_waiting: int = 64,
        cache_bytes: int | None = None,
    ) -> None:
        check_limits(model, SamplingOptions(), max_running=max_running)
        self._model: Any = model
        self._max_running, self._max_waiting = max_running, max_waiting
        self._total_tokens = _cache_tokens(model, max_running, cache_bytes)
        self._whole_prompts = reads_whole_prompts(model)
        self._prefixes = Prefixes()
        self._forwards: dict[str | None, RowsForward] = {}  # by adapter
        self._waiting: deque[Row] = deque()
        self._reading: list[Row] = []  # their prompts are being read, the oldest first
        self._running: list[Row] = []
        self._changed = threading.Condition()
        self._draining = self._closed = False
        self._broken: BaseException | None = None
        self._numbers = self._finished = self._aborted = self._failed = 0
        self._prompt_tokens = self._hit_tokens = self._generated_tokens = 0
        self._recent: deque[tuple[float, int]] = deque()
        self._prefill_speed = 0.0  # tokens per second
        self._last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="glmkit engine", daemon=True)
        self._thread.start()

    # --- for its users ---

    def stream(
        self,
        prompt_ids: Sequence[int],
        options: SamplingOptions,
        *,
        stop_ids: Collection[int],
        max_new_tokens: int,
        cancel: CancelToken | None = None,
        layout: InputLayout | None = None,
        adapter: str | None = None,
        owner: str = "",
        top_logprobs: int = 0,
        guide: Guide | None = None,
    ) -> Generation:
        """Queues a request.

        Args:
            prompt_ids: Ids of the whole prompt.
            options: How tokens are chosen; a seed gives the same answer whatever runs beside it.
            stop_ids: Ids that end the answer.
            max_new_tokens: Limit of the answer; less where the model's context leaves less room.
            cancel: Ends the answer early; looked at before each call of the model.
            layout: Masks and positions of one row; None: the model's own, or the causal one.
            adapter: The adapter to answer with; None is the base.
            owner: What was read for one owner is not reused for another.
            top_logprobs: So many of the most likely tokens come with each step.
            guide: Which tokens are allowed at each place; None: all.

        Returns:
            The answer, to be iterated over.

        Raises:
            UsageError: The prompt is empty, has ids the model does not know or leaves no room; no such adapter.
            QueueFullError: Too many requests wait already.
            GenerationError: The engine is closed, or it broke.
        """
        check_limits(self._model, options, max_new_tokens=max_new_tokens)
        limit = answer_limit(self._model, prompt_ids, max_new_tokens, 0)
        if len(prompt_ids) >= self._total_tokens:
            raise UsageError(
                f"the prompt has {len(prompt_ids)} tokens; the cache of this engine has room for {self._total_tokens}",
                hint="give the engine more cache_bytes",
            )
        row = Row(
            prompt=[int(token) for token in prompt_ids],
            options=options,
            stop_ids=frozenset(stop_ids),
            limit=min(limit, self._total_tokens - len(prompt_ids)),
            reader=Reader(owner, adapter),
            model=self._view(adapter),
            layout=layout,
            top_logprobs=top_logprobs,
            guide=guide,
            generation=Generation(cancel or CancelToken(), self.wake),
        )
        with self._changed:
            self._check_open()
            self._check_room(1)
            if not self._has_work():
                self._last_progress = time.monotonic()  # until now there was nothing to do
            row.number = self._numbers
            self._numbers += 1
            self._waiting.append(row)
            self._changed.notify_all()
        return row.generation

    def check_room(self, places: int = 1) -> None:
        """Refuses what would be refused later, before any work is done for it.

        Args:
            places: Answers that are wanted.

        Raises:
            QueueFullError: There is no room for so many.
            GenerationError: The engine is closed, or it broke.
        """
        with self._changed:
            self._check_open()
            self._check_room(places)

    def state(self) -> EngineState:
        """What the engine is doing, and has done since it began."""
        with self._changed:
            self._forget_old_figures(time.monotonic())
            return EngineState(
                running=len(self._running),
                waiting=len(self._waiting),
                prefilling=len(self._reading),
                max_running=self._max_running,
                max_waiting=self._max_waiting,
                cache_tokens_used=sum(row.capacity_tokens for row in self._admitted),
                cache_tokens_idle=self._prefixes.capacity_tokens,
                cache_tokens_total=self._total_tokens,
                prefix_hit_tokens=self._hit_tokens,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated_tokens,
                started=self._numbers,
                finished=self._finished,
                aborted=self._aborted,
                failed=self._failed,
                tokens_per_second=sum(tokens for _, tokens in self._recent) / _SPEED_SECONDS,
                last_progress=self._last_progress,
                busy=self._has_work(),
                draining=self._draining,
                broken=None if self._broken is None else f"{type(self._broken).__name__}: {self._broken}",
            )

    def wake(self) -> None:
        """Lets the engine see at once that a request was cancelled."""
        with self._changed:
            self._changed.notify_all()

    def drain(self, seconds: float) -> None:
        """Takes no more requests, waits for those that are there, and cancels what is left.

        Args:
            seconds: How long to wait.
        """
        end = time.monotonic() + seconds
        with self._changed:
            self._draining = True
            while self._has_work() and time.monotonic() < end and self._thread.is_alive():
                self._changed.wait(min(0.1, max(0.0, end - time.monotonic())))
        self.close()

    def close(self) -> None:
        """Cancels everything, ends the thread and frees all caches; closing twice is fine."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._prefixes.clear()

    def _view(self, adapter: str | None) -> Any:
        adapters = getattr(self._model, "glm_adapters", None)
        if adapters is not None:
            return adapters.view(adapter)
        if adapter is not None:
            raise UsageError(f"there is no adapter {adapter!r}", hint="this model was loaded without adapters")
        return self._model

    def _check_open(self) -> None:
        if self._broken is not None:
            raise GenerationError(f"the engine broke: {self._broken}", hint="start it again")
        if self._closed or self._draining:
            raise GenerationError("the engine takes no more requests: it is being closed")

    def _check_room(self, places: int) -> None:
        free = self._max_running - len(self._running) - len(self._reading)
        if len(self._waiting) + places > self._max_waiting + max(0, free):
            raise QueueFullError(
                f"{len(self._waiting)} requests wait already, at most {self._max_waiting} may",
                hint="try again in a few seconds",
            )

    def _has_work(self) -> bool:
        return bool(self._waiting or self._reading or self._running)

    # --- its thread ---

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._has_work() and not self._closed:
                        self._changed.wait()
                    if self._closed:
                        break
                    self._sweep()
                    self._admit()
                self._prefill()
                self._decode()
        except BaseException as error:
            self._broken = error
        finally:
            with self._changed:
                for row in (*self._waiting, *self._reading, *self._running):
                    if self._broken is None:
                        self._leave(row, aborted=True)
                    else:
                        self._fail(row, GenerationError(f"the engine broke: {self._broken}", hint="start it again"))
                self._changed.notify_all()

    def _sweep(self) -> None:
        """Takes out what was cancelled."""
        for row in [row for row in (*self._waiting, *self._admitted) if row.generation.cancelled]:
            self._leave(row, aborted=True)

    def _admit(self) -> None:
        """Lets waiting requests in, those first whose owner has the fewest rows."""
        self._make_place()
        while self._waiting and len(self._running) + len(self._reading) < self._max_running:
            owned = Counter(row.reader.owner for row in self._admitted)
            waiting = sorted(self._waiting, key=lambda row: (owned[row.reader.owner], not row.answer, row.number))
            row = next((row for row in waiting if not self._is_read_by_another(row)), None)
            if row is None:
                return
            try:
                if not self._give_cache(row):
                    return
            except Exception as error:  # the machine has no memory for what this engine may have
                self._fail(row, error)
                continue
            self._waiting.remove(row)
            self._reading.append(row)
            self._forwards.clear()  # a model may change between requests

    def _make_place(self) -> None:
        """Where all are taken, the youngest row of the owner with most of them leaves its own to an owner with none."""
        if len(self._running) + len(self._reading) < self._max_running:
            return
        owned = Counter(row.reader.owner for row in self._admitted)
        owner, rows = owned.most_common(1)[0]
        if rows > 1 and any(row.reader.owner not in owned for row in self._waiting):
            youngest = max((row for row in self._running if row.reader.owner == owner), key=_number, default=None)
            if youngest is not None:
                self._keep(youngest)
                self._start_over(youngest)

    @property
    def _admitted(self) -> tuple[Row, ...]:
        """Rows that hold a cache."""
        return (*self._running, *self._reading)

    def _is_read_by_another(self, row: Row) -> bool:
        """Whether most of a prompt is being read for another request: it will be copied then."""
        if not self._can_share(row):
            return False
        for other in self._reading:
            if other.reader == row.reader and self._can_share(other):
                shared = common_tokens(other.ids, row.ids)
                if shared > max(other.read_tokens, _SHARED_TOKENS):
                    return True
        return False

    def _can_share(self, row: Row) -> bool:
        return row.layout is None and not self._whole_prompts

    def _give_cache(self, row: Row) -> bool:
        room = min(len(row.prompt) + row.limit, len(row.ids) + _FIRST_ROOM_TOKENS)
        if not self._can_have(room):
            return False
        found = None
        if self._can_share(row):
            busy = [other.reading for other in self._admitted if self._can_share(other)]
            found = self._prefixes.find(row.reader, row.ids, busy)
        if found is not None and not found.goes_on and self._make_room(room + found.idle_tokens):
            row.begin(self._prefixes.copy(found, room))
        else:
            self._make_room(room)
            row.begin(new_cache(row.model, 1, room) if found is None else found.take(room))
        if not row.answer:
            self._hit_tokens += row.read_tokens
        return True

    def _can_have(self, tokens: int) -> bool:
        """Whether there is room for more tokens, once idle caches are freed."""
        used = sum(row.capacity_tokens for row in self._admitted)
        return used + tokens <= self._total_tokens

    def _make_room(self, tokens: int) -> bool:
        """Frees idle caches until there is room for more tokens; False, and nothing is freed, if that is not enough."""
        while self._can_have(tokens):
            if self._can_have(tokens + self._prefixes.capacity_tokens):
                return True
            self._prefixes.drop_oldest()
        return False

    # --- reading prompts ---

    def _prefill(self) -> None:
        end = time.perf_counter() + _TURN_SECONDS
        while self._reading:
            row = self._reading[0]
            try:
                done = self._read_part(row)
            except Exception as error:
                with self._changed:
                    self._fail(row, error)
                continue
            if done:
                with self._changed:
                    self._reading.remove(row)
                    self._running.append(row)
                self._draw([row])
            if time.perf_counter() >= end:
                return
            with self._changed:
                self._sweep()
                self._admit()

    def _read_part(self, row: Row) -> bool:
        """Reads the next part of a prompt; True when it is read to its end."""
        start, end = row.read_tokens, len(row.ids)
        row.begin_layout()
        assert row.placed is not None
        assert row.cache is not None
        if not row.placed.whole_prompt:
            end = min(end, start + self._part_tokens())
        started = time.perf_counter()
        ids = torch.tensor([row.ids[start:end]], dtype=torch.int64, device=self._model.device)
        with torch.inference_mode():
            logits = forward_for(row.model, row.cache)(ids, row.placed.prompt(start, end), 1)
        row.logits = logits[:, -1]
        seconds = time.perf_counter() - started
        with self._changed:
            self._last_progress = time.monotonic()
            if not row.answer:
                self._prompt_tokens += end - start
            row.prefill_seconds += seconds
            if end - start >= _PREFILL_TOKENS[0] and seconds:
                speed = (end - start) / seconds
                self._prefill_speed = speed if not self._prefill_speed else 0.7 * self._prefill_speed + 0.3 * speed
        return end == len(row.ids)

    def _part_tokens(self) -> int:
        fewest, most = _PREFILL_TOKENS
        seconds = _PREFILL_SECONDS if self._running else 4 * _PREFILL_SECONDS
        fitting = int(self._prefill_speed * seconds) // fewest * fewest or 2 * fewest
        return min(max(fitting, fewest), most)

    # --- answering ---

    def _decode(self) -> None:
        """One token for every running row."""
        self._grow()
        rows = [row for row in self._running if row.logits is None]
        if not rows:
            return
        rows.sort(key=lambda row: row.reader.adapter or "")
        for _, group in groupby(rows, key=lambda row: row.reader.adapter):
            self._step(list(group))
        with self._changed:
            self._last_progress = time.monotonic()
        self._draw([row for row in self._running if row.logits is not None])

    def _step(self, rows: list[Row]) -> None:
        """Runs the last token of some rows; if that fails, of each alone, so that only the cause of it ends."""
        ids = torch.tensor([[row.ids[-1]] for row in rows], dtype=torch.int64, device=self._model.device)
        started = time.perf_counter()
        try:
            logits = self._forward(rows[0])(
                ids, [row.placed for row in rows if row.placed], [row.cache for row in rows if row.cache]
            )
        except Exception as error:
            if len(rows) == 1:
                with self._changed:
                    self._fail(rows[0], error)
                return
            for row in rows:
                self._step([row])
            return
        seconds = time.perf_counter() - started
        for place, row in enumerate(rows):
            row.stepped(logits[place : place + 1], seconds)

    def _forward(self, row: Row) -> RowsForward:
        adapter = row.reader.adapter
        if adapter not in self._forwards:
            self._forwards[adapter] = rows_forward(row.model)
        return self._forwards[adapter]

    def _draw(self, rows: list[Row]) -> None:
        """Chooses the next token of rows whose logits are there, rows with the same rules together."""
        left = list(rows)
        while left:
            rules = left[0].rules
            group = [row for row in left if row.rules == rules]
            left = [row for row in left if row.rules != rules]
            try:
                self._draw_together(group, rules)
            except Exception as error:
                if len(group) == 1:
                    with self._changed:
                        self._fail(group[0], error)
                    continue
                for row in group:
                    self._draw([row])

    @torch.inference_mode()
    def _draw_together(self, rows: Sequence[Row], rules: SamplingOptions) -> None:
        logits = torch.cat([row.logits for row in rows if row.logits is not None])
        allowed = [None if row.guide is None else row.guide.allowed() for row in rows]
        states = [row.generator.getstate() for row in rows] if len(rows) > 1 and rules.do_sample else []
        try:
            drawn = sample(
                logits,
                rules,
                [row.generator for row in rows],
                [row.ids for row in rows],
                rows=[row.number for row in rows],
                answer_tokens=[len(row.answer) for row in rows],
                allowed=None if all(mask is None for mask in allowed) else allowed,
            )
        except BaseException:
            for row, state in zip(rows, states):  # each is drawn again alone, with the same numbers
                row.generator.setstate(state)
            raise
        self._take(rows, drawn, logits)

    def _take(self, rows: Sequence[Row], drawn: Draw, logits: Tensor) -> None:
        now = time.monotonic()
        best = max(row.top_logprobs for row in rows)
        likely = logits.float().log_softmax(-1).topk(best) if best else None
        for place, (row, token, logprob) in enumerate(zip(rows, drawn.token_ids, drawn.logprobs)):
            top: Iterable[tuple[int, float]] = ()
            if likely is not None and row.top_logprobs:
                top = zip(likely.indices[place].tolist(), likely.values[place].tolist())
            with self._changed:
                try:
                    row.take(token)
                except Exception as error:  # of its guide
                    self._fail(row, error)
                    continue
                finish = row.finish_reason(token)
                row.generation.put(row.step(token, logprob, finish, tuple(top)[: row.top_logprobs]))
                if finish is not None:
                    self._leave(row)
        with self._changed:
            self._generated_tokens += len(rows)
            self._recent.append((now, len(rows)))
            self._forget_old_figures(now)

    def _forget_old_figures(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - _SPEED_SECONDS:
            self._recent.popleft()

    # --- memory ---

    def _grow(self) -> None:
        """Makes room for the next token of each row; the youngest rows start over later if there is none."""
        for row in sorted(self._running, key=_number):
            while row in self._running and row.needs_room():
                wanted = min(len(row.prompt) + row.limit, 2 * row.capacity_tokens)
                least = row.read_tokens + 1
                with self._changed:
                    fits = next((size for size in (wanted, least) if self._make_room(size - row.capacity_tokens)), None)
                    if fits is None:
                        self._start_over(max(self._admitted, key=_number))
                        continue
                    try:
                        row.resize(fits)
                    except Exception as error:
                        self._fail(row, error)

    def _start_over(self, row: Row) -> None:
        (self._running if row in self._running else self._reading).remove(row)
        row.forget()
        self._waiting.appendleft(row)

    # --- leaving ---

    def _leave(self, row: Row, aborted: bool = False) -> None:
        """Takes a row out, and keeps what it has read."""
        self._take_out(row)
        if aborted:
            self._aborted += 1
            row.generation.put(row.step(-1, 0.0, "cancelled", ()))
        else:
            self._finished += 1
        self._keep(row)
        row.forget()
        self._changed.notify_all()

    def _keep(self, row: Row) -> None:
        """Keeps what a row has read; without memory for that it is forgotten."""
        if row.cache is not None and self._can_share(row) and not self._closed:
            with suppress(MemoryError, RuntimeError):  # torch says RuntimeError
                self._prefixes.keep(row.reading)

    def _fail(self, row: Row, error: Exception) -> None:
        self._take_out(row)
        self._failed += 1
        row.forget()
        row.generation.fail(error)
        self._changed.notify_all()

    def _take_out(self, row: Row) -> None:
        for rows in (self._waiting, self._reading, self._running):
            if row in rows:
                rows.remove(row)


def _number(row: Row) -> int:
    return row.number


def _cache_tokens(model: Any, max_running: int, cache_bytes: int | None) -> int:
    """For how many tokens there shall be room."""
    config = model.config
    context: int = getattr(config, "max_position_embeddings", None) or 8192
    number = torch.empty((), dtype=model.dtype).element_size()
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * number
    if cache_bytes is None:
        whole = max_running * context
        return max(context, whole // 4, min(whole, _SMALL_BYTES // token_bytes))
    if cache_bytes < token_bytes * context:
        raise UsageError(
            f"cache_bytes={cache_bytes}: expected {token_bytes * context} or more: "
            f"so much does one context of {context} tokens take",
            hint="load the model with a shorter context, or give more",
        )
    return cache_bytes // token_bytes
