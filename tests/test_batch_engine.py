"""Continuous batching: what a request gets is what it gets alone, whatever runs beside it; nothing is lost or leaks."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import glmkit
from glmkit.engine import CancelToken, SamplingOptions, Step, scheduler, stream
from glmkit.engine.cache import BufferCache
from glmkit.engine.generation import EngineState
from glmkit.engine.scheduler import BatchEngine, Generation
from glmkit.errors import GenerationError, QueueFullError, UsageError
from glmkit.kernels.build import level
from tiny_families import write_chatglm, write_glm, write_glm4

GREEDY = SamplingOptions(temperature=0.0)
SAMPLED = SamplingOptions(temperature=1.0, top_p=0.9, seed=7)
MODELS = {"nano": None, "chatglm": write_chatglm, "glm4": write_glm4, "glm": write_glm}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    write = MODELS[request.param]
    name = "glm-nano" if write is None else write(tmp_path_factory.mktemp("models") / request.param)
    return glmkit.load(str(name), dtype="float32").model


@pytest.fixture(scope="module")
def nano() -> Any:
    return glmkit.load("glm-nano", dtype="float32").model


@pytest.fixture
def engine_of() -> Iterator[Callable[..., BatchEngine]]:
    made: list[BatchEngine] = []

    def make(model: Any, **options: Any) -> BatchEngine:
        made.append(BatchEngine(model, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def prompt_of(model: Any, length: int, seed: int) -> list[int]:
    """Random ids; with the marks that a model of both directions needs at the end."""
    config = model.config
    top = min(config.vocab_size - 20, 60)
    ids = [random.Random(seed * 1000 + place).randrange(5, top) for place in range(length)]
    ends = [getattr(config, name, None) for name in ("gmask_token_id", "bos_token_id")]
    if type(config).__name__ == "GLMConfig":
        ends = [config.mask_token_ids[0], config.sop_token_id]
    return ids if type(config).__name__ == "ChatGLM2Config" else [*ids, *(token for token in ends if token is not None)]


def alone(model: Any, prompt: list[int], options: SamplingOptions, tokens: int) -> list[int]:
    return [step.token_id for step in stream(model, prompt, options, stop_ids=(), max_new_tokens=tokens)]


def ask(engine: BatchEngine, prompt: list[int], tokens: int = 8, **more: Any) -> Generation:
    options = more.pop("options", GREEDY)
    return engine.stream(prompt, options, stop_ids=more.pop("stop_ids", ()), max_new_tokens=tokens, **more)


def ids_of(generation: Generation) -> list[int]:
    return [step.token_id for step in generation]


def settled(engine: BatchEngine) -> EngineState:
    for _ in range(500):
        state = engine.state()
        if not state.busy:
            return state
        time.sleep(0.01)
    raise AssertionError(f"still busy: {state}")


# --- the same answers ---


def test_rows_that_arrive_at_random_get_what_they_get_alone(model, engine_of):
    chance = random.Random(3)
    cases = []
    for number in range(12):
        prompt = prompt_of(model, chance.randrange(3, 60), number // 2)  # every second one has a neighbour's beginning
        options = GREEDY if number % 3 else SamplingOptions(temperature=1.2, top_k=20, seed=number)
        cases.append((prompt, options, chance.randrange(1, 14)))
    wanted = [alone(model, *case) for case in cases]
    engine = engine_of(model, max_running=5)
    running = []
    for prompt, options, tokens in cases:
        running.append(ask(engine, prompt, tokens, options=options))
        time.sleep(chance.random() * 0.01)
    assert [ids_of(generation) for generation in running] == wanted
    state = settled(engine)
    assert (state.started, state.finished, state.aborted, state.failed) == (12, 12, 0, 0)
    assert state.cache_tokens_used == 0


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@pytest.mark.parametrize("prompts", [12, pytest.param(64, marks=pytest.mark.slow)])
def test_native_rows_are_bit_for_bit_what_they_are_alone(engine_of, scheme, prompts):
    """Tokens and log-probabilities, in any company and order, greedy and with a seed, read before or not."""
    if level() == "torch":
        pytest.skip("there is no native code here")
    quantized = {} if scheme is None else {"quantize": scheme, "kernels": "native"}
    model = glmkit.load("glm-nano", dtype="float32", **quantized).model
    cases = []
    for number in range(prompts):
        options = GREEDY if number % 2 else SamplingOptions(temperature=1.3, top_p=0.95, seed=number)
        cases.append((prompt_of(model, 3 + number % 25, number // 3), options, 4 + number % 9))

    def said(steps: Iterator[Step]) -> list[tuple[int, float]]:
        return [(step.token_id, step.logprob) for step in steps]

    wanted = [said(stream(model, p, o, stop_ids=(), max_new_tokens=n)) for p, o, n in cases]
    for places in (2, 7, 32):
        engine = engine_of(model, max_running=places)
        order = random.Random(places).sample(range(prompts), prompts)
        running = {
            number: ask(engine, cases[number][0], cases[number][2], options=cases[number][1]) for number in order
        }
        for number in order:
            assert said(running[number]) == wanted[number], (places, number)


def test_a_prompt_in_many_parts_beside_running_rows(nano, engine_of, monkeypatch):
    monkeypatch.setattr("glmkit.engine.scheduler._PREFILL_TOKENS", (16, 16))
    long, short = prompt_of(nano, 300, 1), prompt_of(nano, 5, 2)
    wanted = alone(nano, long, GREEDY, 6), alone(nano, short, GREEDY, 40)
    engine = engine_of(nano)
    first = ask(engine, short, 40)
    steps = [next(first)]
    second = ask(engine, long, 6)
    assert [step.token_id for step in (*steps, *first)] == wanted[1]
    assert ids_of(second) == wanted[0]


def test_a_running_row_gets_tokens_while_a_long_prompt_is_read(nano, engine_of, monkeypatch):
    monkeypatch.setattr("glmkit.engine.scheduler._PREFILL_TOKENS", (16, 16))
    monkeypatch.setattr("glmkit.engine.scheduler._TURN_SECONDS", 0.0)
    engine = engine_of(nano)
    first = ask(engine, prompt_of(nano, 5, 2), 400)
    next(first)
    second = ask(engine, prompt_of(nano, 480, 1), 2)  # 30 parts
    next(second)
    assert len(first._steps) >= 25
    first.cancel()


def test_a_conversation_that_goes_on_is_not_read_again(nano, engine_of):
    engine = engine_of(nano)
    prompt = prompt_of(nano, 100, 1)
    answer = ids_of(ask(engine, prompt, 10))
    longer = [*prompt, *answer, *prompt_of(nano, 20, 2)]
    wanted = alone(nano, longer, GREEDY, 10)
    settled(engine)
    before = engine.state()
    generation = ask(engine, longer, 10)
    assert ids_of(generation) == wanted
    assert generation.cached_tokens == 109  # all but the last token given out
    assert engine.state().prompt_tokens - before.prompt_tokens == 21


def test_a_shared_beginning_is_copied_and_stays(nano, engine_of):
    engine = engine_of(nano)
    shared = prompt_of(nano, 80, 1)
    for seed in (2, 3, 4):
        prompt = [*shared, *prompt_of(nano, 30, seed)]
        generation = ask(engine, prompt, 6)
        assert ids_of(generation) == alone(nano, prompt, GREEDY, 6)
        assert generation.cached_tokens == (0 if seed == 2 else 80)
        settled(engine)


def test_requests_of_one_moment_read_their_shared_prompt_once(nano, engine_of):
    engine = engine_of(nano)
    prompt = prompt_of(nano, 200, 1)
    generations = [ask(engine, prompt, 5, options=SamplingOptions(temperature=1.0, seed=seed)) for seed in range(4)]
    wanted = [alone(nano, prompt, SamplingOptions(temperature=1.0, seed=seed), 5) for seed in range(4)]
    assert [ids_of(generation) for generation in generations] == wanted
    assert engine.state().prompt_tokens == 200 + 3


@pytest.mark.parametrize("other", [{"owner": "b"}, {"owner": ""}])
def test_what_one_owner_has_read_is_not_reused_for_another(nano, engine_of, other):
    engine = engine_of(nano)
    prompt = prompt_of(nano, 60, 1)
    ids_of(ask(engine, prompt, 2, owner="a"))
    settled(engine)
    generation = ask(engine, prompt, 2, **other)
    ids_of(generation)
    assert generation.cached_tokens == 0
    generation = ask(engine, prompt, 2, owner="a")
    ids_of(generation)
    assert generation.cached_tokens == 59


def test_log_probabilities(nano, engine_of):
    engine = engine_of(nano)
    prompt = prompt_of(nano, 9, 1)
    steps = list(ask(engine, prompt, 4, top_logprobs=3))
    wanted = list(stream(nano, prompt, GREEDY, stop_ids=(), max_new_tokens=4))
    for step, other in zip(steps, wanted):
        assert step.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert step.top_logprobs[0] == (step.token_id, pytest.approx(step.logprob, abs=1e-6))
        assert [logprob for _, logprob in step.top_logprobs] == sorted((p for _, p in step.top_logprobs), reverse=True)
        assert len(step.top_logprobs) == 3


def test_a_guide_limits_its_own_row_only(nano, engine_of):
    class Even:
        def __init__(self) -> None:
            self.pushed: list[int] = []

        def allowed(self) -> Tensor:
            return torch.arange(nano.config.vocab_size) % 2 == 0

        def push(self, token_id: int) -> None:
            self.pushed.append(token_id)

    engine, prompt, guide = engine_of(nano), prompt_of(nano, 9, 1), Even()
    guided, free = ask(engine, prompt, 8, guide=guide), ask(engine, prompt, 8)
    ids = ids_of(guided)
    assert all(token % 2 == 0 for token in ids)
    assert guide.pushed == ids
    assert ids_of(free) == alone(nano, prompt, GREEDY, 8)


# --- memory ---


def test_rows_start_over_when_memory_is_short_and_answer_the_same(nano, engine_of):
    config = nano.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    prompts = [prompt_of(nano, 200, seed) for seed in range(5)]
    wanted = [alone(nano, prompt, SAMPLED, 300) for prompt in prompts]
    engine = engine_of(nano, cache_bytes=1024 * token_bytes)  # each needs half of it in the end
    answers = [ids_of(generation) for generation in [ask(engine, p, 300, options=SAMPLED) for p in prompts]]
    assert answers == wanted
    state = settled(engine)
    assert state.finished == 5
    assert state.cache_tokens_used == 0
    assert state.cache_tokens_idle <= state.cache_tokens_total == 1024


def test_the_cache_stays_within_its_bounds(nano, engine_of):
    config = nano.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    engine = engine_of(nano, cache_bytes=1100 * token_bytes, max_running=8)
    generations = [ask(engine, prompt_of(nano, 100, seed), 60) for seed in range(12)]
    while (state := engine.state()).busy:
        assert state.cache_tokens_used + state.cache_tokens_idle <= state.cache_tokens_total
        time.sleep(0.002)
    assert all(len(ids_of(generation)) == 60 for generation in generations)


@pytest.mark.parametrize("kept", [609, 400], ids=["it goes on", "it turns off"])
def test_making_room_spares_what_the_request_goes_on_with(nano, engine_of, kept):
    config = nano.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    engine = engine_of(nano, cache_bytes=1024 * token_bytes)  # for one of the two, not for both
    prompt = prompt_of(nano, 600, 1)
    said = [*prompt, *ids_of(ask(engine, prompt, 10))]
    settled(engine)
    longer = [*said[:kept], *prompt_of(nano, 630 - kept, 2)]
    generation = ask(engine, longer, 10)
    assert ids_of(generation) == alone(nano, longer, GREEDY, 10)
    assert generation.cached_tokens == kept
    state = settled(engine)
    assert state.cache_tokens_idle <= state.cache_tokens_total


def test_a_request_that_has_to_wait_frees_nothing(nano, engine_of):
    config = nano.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    engine = engine_of(nano, cache_bytes=1024 * token_bytes)
    ids_of(ask(engine, prompt_of(nano, 100, 1), 2))
    settled(engine)
    running = ask(engine, prompt_of(nano, 500, 2), 200)
    next(running)
    waiting = ask(engine, prompt_of(nano, 600, 3), 2)
    next(running)
    next(running)
    state = engine.state()
    assert (state.running, state.waiting, state.cache_tokens_idle) == (1, 1, 101)
    running.cancel()
    assert len(ids_of(waiting)) == 2


def test_too_little_memory_for_one_context_is_refused(nano):
    with pytest.raises(UsageError, match="cache_bytes=1000: expected"):
        BatchEngine(nano, cache_bytes=1000)


# --- ends ---


def test_a_cancelled_request_leaves_at_once_and_touches_no_other(nano, engine_of):
    engine = engine_of(nano, max_running=2)
    prompt, other = prompt_of(nano, 5, 1), prompt_of(nano, 6, 2)
    running, neighbour, queued = ask(engine, prompt, 400), ask(engine, other, 60), ask(engine, prompt, 400)
    next(running)
    queued.cancel()
    assert [step.finish_reason for step in queued] == ["cancelled"]  # while both places are taken
    running.cancel()
    *_, last = running
    assert last.finish_reason == "cancelled"
    running.cancel()  # again, and after the end
    assert ids_of(neighbour) == alone(nano, other, GREEDY, 60)
    neighbour.cancel()
    state = settled(engine)
    assert (state.finished, state.aborted, state.cache_tokens_used) == (1, 2, 0)


def test_cancelling_while_a_prompt_is_read_takes_effect_before_its_next_part(nano, engine_of, monkeypatch):
    monkeypatch.setattr("glmkit.engine.scheduler._PREFILL_TOKENS", (16, 16))
    read: list[int] = []
    original = BatchEngine._read_part
    token = CancelToken()

    def counted(self: BatchEngine, row: Any) -> bool:
        done = original(self, row)
        read.append(row.read_tokens)
        if len(read) == 3:
            token.cancel()
        return done

    monkeypatch.setattr(BatchEngine, "_read_part", counted)
    engine = engine_of(nano)
    generation = ask(engine, prompt_of(nano, 400, 1), 4, cancel=token)
    assert [step.finish_reason for step in generation] == ["cancelled"]
    assert read == [16, 32, 48]


def test_a_thousand_cancels_leave_nothing(nano, engine_of):
    chance = random.Random(5)
    engine = engine_of(nano, max_running=4, max_waiting=40)
    threads = threading.active_count()
    kept: list[Generation] = []
    refused = 0
    for number in range(1000):
        try:
            generation = ask(engine, prompt_of(nano, chance.randrange(3, 40), number % 20), 30)
        except QueueFullError:
            refused += 1
            time.sleep(0.002)
            continue
        if chance.random() < 0.9:
            threading.Timer(
                chance.random() * 0.01, generation.cancel
            ).start() if number % 50 == 0 else generation.cancel()
        kept.append(generation)
    ends = [list(generation)[-1].finish_reason for generation in kept]
    state = settled(engine)
    assert len(ends) + refused == 1000
    assert set(ends) <= {"cancelled", "length", "stop"}
    assert state.started == state.finished + state.aborted == len(ends)
    assert (state.running, state.waiting, state.prefilling, state.cache_tokens_used) == (0, 0, 0, 0)
    assert threading.active_count() <= threads + 1


def test_a_full_queue_refuses_and_never_takes_more_than_its_places(nano, engine_of, monkeypatch):
    engine = engine_of(nano, max_running=1, max_waiting=3)
    busy = ask(engine, prompt_of(nano, 5, 1), 900)
    next(busy)
    taken: list[Generation] = []
    refused: list[str] = []

    def arrive() -> None:
        try:
            taken.append(ask(engine, prompt_of(nano, 5, 2), 1))
        except QueueFullError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=arrive) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (3, 47)
    with pytest.raises(QueueFullError):
        engine.check_room()
    busy.cancel()
    assert [len(ids_of(generation)) for generation in taken] == [1, 1, 1]
    engine.check_room(4)
    with pytest.raises(QueueFullError):
        engine.check_room(5)


def test_one_owner_with_many_requests_does_not_keep_another_waiting(nano, engine_of):
    """Whoever has no row gets one though all places are taken for long; whose place it was goes on later, the same."""
    engine = engine_of(nano, max_running=2)
    prompts = [prompt_of(nano, 5 + seed, seed) for seed in range(6)]
    many = [ask(engine, prompt, 150, options=SAMPLED, owner="many") for prompt in prompts]
    first = [next(generation).token_id for generation in many[:2]]
    assert ids_of(ask(engine, prompt_of(nano, 6, 99), 5, owner="one")) == alone(nano, prompt_of(nano, 6, 99), GREEDY, 5)
    assert engine.state().finished == 1
    wanted = [alone(nano, prompt, SAMPLED, 150) for prompt in prompts]
    assert [*first[:1], *ids_of(many[0])] == wanted[0]
    assert [*first[1:], *ids_of(many[1])] == wanted[1]
    assert [ids_of(generation) for generation in many[2:]] == wanted[2:]


def test_work_after_a_pause_begins_a_new_count_of_progress(engine_of):
    model = Counting()
    engine = engine_of(model)
    ids_of(ask(engine, [1], 2))
    time.sleep(0.3)
    model.gate.clear()
    ask(engine, [1], 2)
    assert time.monotonic() - engine.state().last_progress < 0.2
    model.gate.set()


# --- failures ---


class Counting:
    """A model whose every token is the next number; says what shall go wrong, by the last token it is given."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        self.config = SimpleNamespace(
            num_hidden_layers=1, vocab_size=100, num_key_value_heads=1, head_dim=1, max_position_embeddings=200
        )
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, input_ids: Tensor, *, past_key_values: Any, logits_to_keep: int, **_: Any) -> Any:
        self.gate.wait()
        if bool((input_ids == 66).any()):
            raise RuntimeError("boom")
        if bool((input_ids == 77).any()):
            raise MemoryError
        states = input_ids[:, None, :, None].float()
        past_key_values.update(states, states, 0)
        logits = torch.zeros(*input_ids.shape, 100).scatter(-1, (input_ids[..., None] + 1) % 100, 5.0)
        logits[input_ids == 88] = torch.nan
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


@pytest.mark.parametrize(("start", "message"), [(62, "boom"), (73, "MemoryError"), (84, "100 NaN")])
def test_only_the_request_that_fails_ends(engine_of, start, message):
    engine = engine_of(Counting())
    good, bad, other = ask(engine, [1], 30), ask(engine, [start], 30), ask(engine, [2], 30)
    with pytest.raises(GenerationError, match=message):
        ids_of(bad)
    assert ids_of(good) == list(range(2, 32))
    assert ids_of(other) == list(range(3, 33))
    state = settled(engine)
    assert (state.finished, state.failed, state.broken) == (2, 1, None)
    assert ids_of(ask(engine, [1], 3)) == [2, 3, 4]


@pytest.mark.parametrize("times", [1, 1000])
def test_a_machine_without_memory_ends_requests_and_not_the_engine(engine_of, monkeypatch, times):
    def resize(cache: BufferCache, capacity_tokens: int) -> None:
        nonlocal times
        times -= 1
        if times >= 0:
            raise MemoryError
        original(cache, capacity_tokens)

    original = BufferCache.resize
    monkeypatch.setattr(BufferCache, "resize", resize)
    monkeypatch.setattr(scheduler, "_FIRST_ROOM_TOKENS", 4)
    engine = engine_of(Counting())
    with pytest.raises(GenerationError, match="MemoryError"):
        ids_of(ask(engine, [1], 30))
    assert ids_of(ask(engine, list(range(1, 20)), 4)) == [20, 21, 22, 23]
    state = settled(engine)
    assert (state.finished, state.failed, state.broken) == (1, 1, None)


def test_a_guide_that_fails_ends_its_own_request(engine_of):
    class Broken:
        def allowed(self) -> None:
            return None

        def push(self, token_id: int) -> None:
            if token_id == 5:
                raise ValueError("no such place")

    engine = engine_of(Counting())
    bad, good = ask(engine, [1], 30, guide=Broken()), ask(engine, [1], 30)
    with pytest.raises(GenerationError, match="no such place"):
        ids_of(bad)
    assert ids_of(good) == list(range(2, 32))


def test_sampled_rows_beside_a_failing_one_draw_the_same_numbers(nano, engine_of):
    """The group is drawn again row by row; that must not use up random numbers."""
    prompt = prompt_of(nano, 9, 1)

    class Fails:
        calls = 0

        def allowed(self) -> None:
            Fails.calls += 1
            if Fails.calls > 3:
                raise ValueError("too late")

        def push(self, token_id: int) -> None: ...

    engine = engine_of(nano)
    good, bad = ask(engine, prompt, 12, options=SAMPLED), ask(engine, prompt, 12, options=SAMPLED, guide=Fails())
    assert ids_of(good) == alone(nano, prompt, SAMPLED, 12)
    with pytest.raises(GenerationError, match="too late"):
        ids_of(bad)


def test_progress_is_seen_and_a_hang_too(engine_of):
    model = Counting()
    engine = engine_of(model)
    generation = ask(engine, [1], 50)
    next(generation)
    model.gate.clear()
    time.sleep(0.05)
    stuck = engine.state()
    time.sleep(0.05)
    assert stuck.busy
    assert engine.state().last_progress == stuck.last_progress
    model.gate.set()
    assert len(ids_of(generation)) == 49
    assert engine.state().last_progress > stuck.last_progress


def test_closing_ends_everything(nano):
    engine = BatchEngine(nano, max_running=1)
    running, queued = ask(engine, prompt_of(nano, 5, 1), 900), ask(engine, prompt_of(nano, 5, 1), 900)
    next(running)
    engine.close()
    assert list(running)[-1].finish_reason == list(queued)[-1].finish_reason == "cancelled"
    with pytest.raises(GenerationError, match="being closed"):
        ask(engine, [5], 1)
    engine.close()


def test_draining_finishes_what_it_can(nano):
    engine = BatchEngine(nano)
    short, long = ask(engine, prompt_of(nano, 5, 1), 5), ask(engine, prompt_of(nano, 5, 2), 1000)
    threading.Thread(target=engine.drain, args=(0.3,)).start()
    assert list(short)[-1].finish_reason == "length"
    assert list(long)[-1].finish_reason in ("cancelled", "length")
    with pytest.raises(GenerationError):
        engine.check_room()


@pytest.mark.parametrize(
    ("prompt", "more", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([10**9], {}, "token id 1000000000"),
        ([5] * 1024, {}, "fewer than the model's context"),
        ([5], {"tokens": 0}, "max_new_tokens=0"),
        ([5], {"adapter": "ads"}, "no adapter 'ads'"),
    ],
)
def test_bad_requests_are_refused_before_they_are_queued(nano, engine_of, prompt, more, message):
    engine = engine_of(nano)
    with pytest.raises(UsageError, match=message):
        ask(engine, prompt, **more)
    assert engine.state().started == 0


def test_closing_an_answer_ends_it_alone(engine_of):
    model = Counting()
    engine, token = engine_of(model), CancelToken()
    model.gate.clear()
    one, other = (ask(engine, [1], 50, cancel=token) for _ in range(2))
    one.close()
    model.gate.set()
    assert [step.finish_reason for step in one][-1] == "cancelled"
    assert ids_of(other) == list(range(2, 52))
    assert not token.cancelled
    other.close()
    assert settled(engine).finished == 1


def test_stop_ids_and_usage(engine_of):
    engine = engine_of(Counting())
    steps = list(ask(engine, [1, 2, 3], 30, stop_ids={7}))
    assert [step.token_id for step in steps] == [4, 5, 6, 7]
    last: Step = steps[-1]
    assert last.finish_reason == "stop"
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.cached_tokens) == (3, 4, 0)


def test_a_reader_that_must_not_be_held_up(engine_of):
    model = Counting()
    engine = engine_of(model)
    model.gate.clear()
    told = threading.Event()
    generation = ask(engine, [1], 2)
    generation.do_not_wait(told.set)
    assert next(generation).finish_reason == "waiting"
    model.gate.set()
    found: list[int] = []
    while len(found) < 2:
        told.clear()
        step = next(generation)
        if step.finish_reason == "waiting":
            assert told.wait(10)
        else:
            found.append(step.token_id)
    assert found == [2, 3]


def test_models_are_the_ones_meant(tmp_path: Path) -> None:
    """The families' way of reading prompts is what these tests are about."""
    from glmkit.engine.layout import reads_whole_prompts

    assert reads_whole_prompts(glmkit.load(str(write_chatglm(tmp_path / "a"))).model)
    assert not reads_whole_prompts(glmkit.load("glm-nano").model)
