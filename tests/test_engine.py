"""The decode engine: equal to plain loops and to `generate`, batched equal to alone, and stoppable at any token."""

from __future__ import annotations

import dataclasses
import gc
import math
import threading
import types
import weakref

import pytest
import torch

from glmkit import hf
from glmkit.engine import (
    NO_TOKEN,
    CancelToken,
    SamplingOptions,
    decode,
    generate_batch,
    new_cache,
    row_seed,
    stream,
)
from glmkit.errors import GenerationError, UsageError
from glmkit.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM

GREEDY = SamplingOptions(temperature=0)
SEEDED = SamplingOptions(temperature=1.0, top_k=40, top_p=0.95, seed=7)
VOCABULARY, CONTEXT = 300, 256


@pytest.fixture(scope="module")
def model():
    """A small ChatGLM2 with weights large enough that its greedy answers are not one token for ever."""
    torch.manual_seed(0)
    config = ChatGLM2Config(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        kv_channels=16,
        multi_query_attention=True,
        multi_query_group_num=2,
        ffn_hidden_size=96,
        padded_vocab_size=VOCABULARY,
        seq_length=CONTEXT,
        add_qkv_bias=True,
    )
    model = ChatGLM2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model


def prompt(length, seed=0):
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def answer(model, ids, options=GREEDY, *, stop_ids=(), max_new_tokens=20, **more):
    steps = list(stream(model, ids, options, stop_ids=stop_ids, max_new_tokens=max_new_tokens, **more))
    assert all(step.finish_reason is None and step.usage is None for step in steps[:-1])
    assert steps[-1].finish_reason is not None
    return [step.token_id for step in steps if step.is_text]


@torch.no_grad()
def naive(model, ids, count):
    """Greedy without any cache: the whole text again for every token."""
    ids = list(ids)
    start = len(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[start:]


class Fake:
    """A model that says what a function of (row's ids so far) tells it, and remembers how it was called."""

    def __init__(self, logits, layers=1, seq_length=None):
        self.logits, self.device, self.calls = logits, torch.device("cpu"), []
        self.config = types.SimpleNamespace(num_hidden_layers=layers, vocab_size=16)
        if seq_length is not None:
            self.config.max_position_embeddings = seq_length

    def __call__(self, input_ids, *, attention_mask, position_ids, past_key_values, use_cache=True, logits_to_keep=0):
        assert torch.is_inference_mode_enabled()
        self.calls.append(types.SimpleNamespace(ids=input_ids.clone(), mask=attention_mask, positions=position_ids))
        # The ids themselves are the keys, so the fake sees through the cache what a real model would.
        keys, _ = past_key_values.update(input_ids[:, None, :, None].float(), input_ids[:, None, :, None].float(), 0)
        rows = [self.logits([int(token) for token in row]) for row in keys[:, 0, :, 0]]
        assert logits_to_keep == 1
        return types.SimpleNamespace(logits=torch.stack(rows)[:, None])


def says(*script):
    """Logits of a speaker who says `script`, counted from the last 1 in the text."""

    def logits(ids):
        out = torch.zeros(16)
        said = len(ids) - 1 - max(place for place, token in enumerate(ids) if token == 1)
        out[script[said % len(script)]] = 9.0
        return out

    return logits


# --- the stream ------------------------------------------------------------------------------------------------------


def test_greedy_equals_a_loop_without_cache_and_generate(model):
    for seed, length in ((1, 1), (2, 9), (3, 40)):
        ids = prompt(length, seed)
        got = answer(model, ids)
        assert got[:12] == naive(model, ids, 12)
        theirs = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=20, eos_token_id=VOCABULARY - 1)
        assert got == theirs[0, length:].tolist()
        assert len(set(got)) > 3, "a model that repeats itself would prove little"


@pytest.mark.parametrize("chunk", [1, 7, 20, 64])
def test_prompt_in_chunks_equals_the_whole(model, chunk):
    ids = prompt(40)
    whole = list(stream(model, ids, GREEDY, stop_ids=(), max_new_tokens=10))
    parts = list(stream(model, ids, GREEDY, stop_ids=(), max_new_tokens=10, prefill_chunk_tokens=chunk))
    assert [s.token_id for s in parts] == [s.token_id for s in whole]
    # float32 sums in another order
    assert [s.logprob for s in parts] == pytest.approx([s.logprob for s in whole], abs=1e-4)


def test_prompt_chunks_are_as_long_as_asked_and_unpadded_prompts_need_no_mask():
    fake = Fake(says(5, 6, 7))
    answer(fake, [1] * 10, prefill_chunk_tokens=4, max_new_tokens=3)
    assert [call.ids.shape[1] for call in fake.calls] == [4, 4, 2, 1, 1]
    assert all(call.mask is None and call.positions is None for call in fake.calls)


def test_sampling_with_a_seed_repeats_and_is_not_greedy(model):
    first, again = answer(model, prompt(9), SEEDED), answer(model, prompt(9), SEEDED)
    other = answer(model, prompt(9), dataclasses.replace(SEEDED, seed=8))
    assert first == again != other
    assert first != answer(model, prompt(9))


def test_repetition_penalty_and_bans_see_prompt_and_answer():
    logits = torch.zeros(16)
    logits[[3, 4, 5]] = torch.tensor([3.0, 2.9, 2.8])
    fake = Fake(lambda ids: logits)
    options = SamplingOptions(temperature=0, repetition_penalty=2.0)
    assert answer(fake, [4], options, max_new_tokens=3) == [3, 5, 3]
    options = SamplingOptions(temperature=0, banned_ids=((4, 3), (3, 3)))
    assert answer(fake, [4], options, max_new_tokens=4) == [4, 4, 4, 4]
    assert answer(fake, [9], options, max_new_tokens=4) == [3, 4, 4, 4]


def test_stop_id_is_a_step_that_is_not_text():
    steps = list(stream(Fake(says(5, 6, 2, 7)), [1], GREEDY, stop_ids={2}, max_new_tokens=9))
    assert [(s.token_id, s.finish_reason, s.is_text) for s in steps] == [
        (5, None, True),
        (6, None, True),
        (2, "stop", False),
    ]


def test_the_last_token_at_the_limit_is_text():
    steps = list(stream(Fake(says(5, 6, 2, 7)), [1], GREEDY, stop_ids={2}, max_new_tokens=2))
    assert [(s.token_id, s.finish_reason, s.is_text) for s in steps] == [(5, None, True), (6, "length", True)]
    steps = list(stream(Fake(says(5, 2)), [1], GREEDY, stop_ids={2}, max_new_tokens=2))
    assert steps[-1].finish_reason == "stop", "a stop id at the limit is a stop"


def test_usage_comes_with_the_last_step():
    steps = list(stream(Fake(says(5, 6, 2)), [3, 1], GREEDY, stop_ids={2}, max_new_tokens=9))
    usage = steps[-1].usage
    assert (usage.cached_tokens, usage.prompt_tokens, usage.completion_tokens) == (0, 2, 3)
    assert usage.prefill_seconds > 0
    assert usage.decode_seconds > 0


def test_the_context_shortens_the_answer(model):
    ids = prompt(CONTEXT - 3)
    steps = list(stream(model, ids, GREEDY, stop_ids=(), max_new_tokens=50))
    assert len(steps) == 3
    assert steps[-1].finish_reason == "length"
    cache = new_cache(model, 1, CONTEXT)
    assert len(answer(model, prompt(CONTEXT - 6), max_new_tokens=1, cache=cache)) == 1
    assert len(answer(model, prompt(2), max_new_tokens=50, cache=cache)) == 4, "what is in the cache counts"
    with pytest.raises(UsageError, match=f"{CONTEXT} tokens"):
        stream(model, prompt(CONTEXT), GREEDY, stop_ids=(), max_new_tokens=1)
    with pytest.raises(UsageError, match="context"):
        generate_batch(model, [prompt(3), prompt(999)], GREEDY, stop_ids=(), max_new_tokens=1, batch_size=2)


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        ([], {}, "empty"),
        ([1, 16], {}, "token id 16"),
        ([-1], {}, "token id -1"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([1], {"max_new_tokens": 1.5}, "max_new_tokens=1.5"),
        ([1], {"prefill_chunk_tokens": 0}, "prefill_chunk_tokens=0"),
        ([1], {"options": SamplingOptions(banned_ids=((99,),))}, "banned_ids=99"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_step(ids, arguments, message):
    fake = Fake(says(5))
    arguments = {"options": GREEDY, "stop_ids": (), "max_new_tokens": 5, **arguments}
    with pytest.raises(UsageError, match=message):
        stream(fake, ids, arguments.pop("options"), **arguments)
    assert not fake.calls


def test_a_cache_of_earlier_turns_is_continued(model):
    first, second = prompt(12, 1), prompt(8, 2)
    cache = new_cache(model, 1, 4)  # too small on purpose: it grows
    said = answer(model, first, max_new_tokens=6, cache=cache)
    assert cache.get_seq_length() == 12 + 5, "the last token given out is not in the cache"
    steps = list(stream(model, [said[-1], *second], GREEDY, stop_ids=(), max_new_tokens=6, cache=cache))
    assert [s.token_id for s in steps] == answer(model, [*first, *said, *second], max_new_tokens=6)
    assert steps[-1].usage.cached_tokens == 17
    cache.truncate(12)
    assert answer(model, second, max_new_tokens=6, cache=cache) == answer(model, [*first, *second], max_new_tokens=6)
    dynamic = hf.DynamicCache(config=model.config)
    assert answer(model, first, max_new_tokens=6, cache=dynamic) == said


def test_not_a_number_raises():
    def logits(ids):
        return torch.full((16,), math.nan) if len(ids) == 3 else torch.eye(16)[5]

    steps = stream(Fake(logits), [1], GREEDY, stop_ids=(), max_new_tokens=9)
    assert next(steps).token_id == 5
    assert next(steps).token_id == 5
    with pytest.raises(GenerationError, match="row 0 at step 2"):
        next(steps)


# --- models that read a prompt in both directions ---------------------------------------------------------------------


class BothWays(Fake):
    """A fake with a layout of its own, which counts calls and says which columns it was asked for."""

    def input_layout(self, ids, pads):
        return Layout(self, ids, pads)


class Layout:
    whole_prompt = True

    def __init__(self, model, ids, pads):
        self.ids, self.rows, self.columns = ids, pads.tolist(), ids.shape[1]

    def prompt(self, start, end):
        return {"attention_mask": torch.tensor(self.rows), "position_ids": torch.tensor([start, end])}

    def step(self, tokens=1):
        self.columns += tokens
        return {"attention_mask": torch.tensor(self.rows), "position_ids": torch.tensor([self.columns])}

    def select(self, places):
        self.rows = [self.rows[place] for place in places]


def test_a_model_with_its_own_layout_reads_prompts_whole():
    fake = BothWays(says(5, 6, 7))
    assert answer(fake, [1] * 10, max_new_tokens=3, prefill_chunk_tokens=4) == [5, 6, 7]
    assert [call.ids.shape[1] for call in fake.calls] == [10, 1, 1]
    assert [call.positions.tolist() for call in fake.calls] == [[0, 10], [11], [12]]
    cache = new_cache(fake, 1, 4)
    cache.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
    with pytest.raises(UsageError, match="both directions"):
        stream(fake, [1], GREEDY, stop_ids=(), max_new_tokens=1, cache=cache)


def test_a_layout_follows_the_rows_of_a_batch():
    def logits(ids):  # the number behind the mark 1 says how many tokens come
        out = torch.zeros(16)
        begin = ids.index(1)
        out[2 if len(ids) - 1 - begin >= ids[begin + 1] - 1 else 9] = 9.0
        return out

    fake = BothWays(logits)
    prompts = [[1, 3], [0, 1, 4], [0, 0, 1, 9], [1, 9]]
    answers = generate_batch(fake, prompts, GREEDY, stop_ids={2}, max_new_tokens=20, batch_size=4)
    assert [len(ids) for ids in answers] == [1, 2, 7, 7]
    assert fake.calls[0].mask.tolist() == [0, 1, 2, 2], "columns of padding: longest prompt first"
    assert fake.calls[-1].mask.tolist() == [0, 2]


def test_a_layout_can_be_given():
    fake = Fake(says(5, 6))
    layout = Layout(fake, torch.tensor([[1, 1]]), torch.tensor([7]))
    answer(fake, [1, 1], max_new_tokens=2, layout=layout)
    assert [call.mask.tolist() for call in fake.calls] == [[7], [7]]


# --- ending early ----------------------------------------------------------------------------------------------------


def test_cancel_from_another_thread_takes_effect_within_a_token():
    cancel, computing, cancelled = CancelToken(), threading.Event(), threading.Event()

    def logits(ids):
        if len(ids) == 4:  # the model works on the third token after the prompt
            computing.set()
            assert cancelled.wait(10)
        return torch.eye(16)[5]

    def press_key():
        assert computing.wait(10)
        cancel.cancel()
        cancelled.set()

    thread = threading.Thread(target=press_key)
    thread.start()
    fake = Fake(logits)
    steps = list(stream(fake, [1], GREEDY, stop_ids=(), max_new_tokens=99, cancel=cancel))
    thread.join()
    # the token that was being computed still comes, no further one is begun
    assert [s.finish_reason for s in steps] == [None] * 4 + ["cancelled"]
    assert len(fake.calls) == 4
    assert steps[-1].token_id == NO_TOKEN
    assert not steps[-1].is_text
    assert steps[-1].usage.completion_tokens == 4


def test_cancel_between_chunks_of_the_prompt():
    cancel = CancelToken()

    def logits(ids):
        if len(ids) == 4:
            cancel.cancel()
        return torch.eye(16)[5]

    fake = Fake(logits)
    steps = list(stream(fake, [1] * 10, GREEDY, stop_ids=(), max_new_tokens=9, cancel=cancel, prefill_chunk_tokens=2))
    assert len(fake.calls) == 2
    assert [s.finish_reason for s in steps] == ["cancelled"]
    assert steps[-1].usage.prompt_tokens == 4
    cancel.cancel()
    assert not next(iter(stream(fake, [1], GREEDY, stop_ids=(), max_new_tokens=9, cancel=cancel))).is_text
    assert len(fake.calls) == 2, "cancelled before it began"


def test_closing_the_generator_frees_the_cache_and_leaves_no_mode_behind(monkeypatch):
    caches = []

    def remember(*arguments):
        cache = new_cache(*arguments)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(decode, "new_cache", remember)
    steps = stream(Fake(says(5)), [1], GREEDY, stop_ids=(), max_new_tokens=9)
    next(steps)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    gc.disable()
    try:
        steps.close()
        del steps
        assert caches[0]() is None, "freed at once, not when the collector comes by"
    finally:
        gc.enable()


def test_streams_do_not_share_state(model):
    one, two = prompt(9, 1), prompt(5, 2)
    streams = [stream(model, ids, SEEDED, stop_ids=(), max_new_tokens=8) for ids in (one, two)]
    mixed = [[a.token_id, b.token_id] for a, b in zip(*streams)]
    assert [a for a, _ in mixed] == answer(model, one, SEEDED, max_new_tokens=8)
    assert [b for _, b in mixed] == answer(model, two, SEEDED, max_new_tokens=8)


# --- batches ---------------------------------------------------------------------------------------------------------


PROMPTS = [prompt(length, seed) for seed, length in enumerate((3, 30, 1, 17, 17, 8))]
STOP_IDS = frozenset(range(100, 120))  # many, so that rows end at different steps and leave the batch
KINDS = {"greedy": GREEDY, "seeded": SEEDED, "penalty": dataclasses.replace(GREEDY, repetition_penalty=1.5)}


@pytest.fixture(scope="module")
def alone(model):
    """The answers to PROMPTS, each from a stream of its own."""

    def ask(options, row):
        options = dataclasses.replace(options, seed=row_seed(options.seed or 0, row))
        return answer(model, PROMPTS[row], options, stop_ids=STOP_IDS, max_new_tokens=16)

    return {name: [ask(options, row) for row in range(len(PROMPTS))] for name, options in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 512), (4, 512), (8, 4)])
def test_a_row_is_the_same_in_any_company(model, alone, kind, batch_size, chunk):
    together = generate_batch(
        model,
        PROMPTS,
        KINDS[kind],
        stop_ids=STOP_IDS,
        max_new_tokens=16,
        batch_size=batch_size,
        prefill_chunk_tokens=chunk,
    )
    assert together == alone[kind]
    assert len({len(ids) for ids in together}) > 2, "rows end at different steps"
    assert not STOP_IDS & {token for ids in together for token in ids}


def test_padding_has_mask_zero_and_positions_count_tokens():
    fake = Fake(says(5, 6, 7))
    generate_batch(fake, [[1], [3, 3, 1]], GREEDY, stop_ids=(), max_new_tokens=3, batch_size=2)
    first, second, third = fake.calls
    assert first.ids.tolist() == [[3, 3, 1], [0, 0, 1]]
    assert first.mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert first.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert second.mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert second.positions.tolist() == [[3], [1]]
    assert third.positions.tolist() == [[4], [2]]


def test_finished_rows_are_dropped_when_half_are_done():
    def logits(ids):  # says its first id once for each count of it, then stops
        out = torch.zeros(16)
        begin = ids.index(1)
        out[2 if len(ids) - 1 - begin >= ids[begin + 1] - 1 else 9] = 9.0
        return out

    fake = Fake(logits)
    progress = []
    answers = generate_batch(
        fake,
        [[1, n] for n in (3, 4, 6, 9)],
        GREEDY,
        stop_ids={2},
        max_new_tokens=20,
        batch_size=4,
        progress=lambda done, total: progress.append((done, total)),
    )
    assert [len(ids) for ids in answers] == [1, 2, 4, 7]
    assert [call.ids.shape[0] for call in fake.calls] == [4, 4, 4, 2, 2, 1, 1, 1]
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_answers_come_in_input_order_and_respect_the_limit(model):
    prompts = [prompt(length, length) for length in (5, 40, 2, 21, 250)]
    answers = generate_batch(model, prompts, GREEDY, stop_ids=(), max_new_tokens=9, batch_size=2)
    assert [len(ids) for ids in answers] == [9, 9, 9, 9, CONTEXT - 250]
    assert answers[0] == answer(model, prompts[0], max_new_tokens=9)
    assert generate_batch(model, [], GREEDY, stop_ids=(), max_new_tokens=9, batch_size=2) == []


def test_a_cancelled_batch_returns_what_it_has():
    cancel = CancelToken()

    def logits(ids):
        if len(ids) == 3:
            cancel.cancel()
        return torch.eye(16)[5]

    fake = Fake(logits)
    prompts = [[1], [1], [1], [1]]
    answers = generate_batch(fake, prompts, GREEDY, stop_ids=(), max_new_tokens=50, batch_size=2, cancel=cancel)
    assert answers == [[5, 5, 5], [5, 5, 5], [], []]


def test_a_batch_names_the_row_of_bad_logits():
    def logits(ids):
        return torch.full((16,), math.nan) if 7 in ids else torch.eye(16)[5]

    with pytest.raises(GenerationError, match="row 2 at step 0"):
        generate_batch(Fake(logits), [[1], [1], [7], [1, 1]], GREEDY, stop_ids=(), max_new_tokens=5, batch_size=4)


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [1, 9, 64])
@torch.no_grad()
def test_cache_equals_the_dynamic_cache(model, capacity):
    ids = torch.tensor([prompt(20, 1), prompt(20, 2)])
    ours, theirs = new_cache(model, 2, capacity), hf.DynamicCache(config=model.config)
    for start, end in ((0, 8), (8, 9), (9, 17), (17, 20)):
        got = model(ids[:, start:end], past_key_values=ours).logits
        expected = model(ids[:, start:end], past_key_values=theirs).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # float32 noise of other strides
        assert ours.get_seq_length() == theirs.get_seq_length() == end
        assert ours.get_mask_sizes(3, 0) == theirs.get_mask_sizes(3, 0)
        assert ours.get_max_length() == theirs.get_max_length()
        assert ours.layers[1].capacity_tokens >= end
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, whole[:, 17:], rtol=0, atol=1e-4)


def test_cache_returns_views_and_allocates_once(model):
    layer = new_cache(model, 1, 8).layers[0]
    keys = torch.arange(6.0).view(1, 1, 3, 2)
    seen, _ = layer.update(keys, keys)
    assert torch.equal(seen, keys)
    again, values = layer.update(keys[:, :, :2], -keys[:, :, :2])
    assert again.data_ptr() == seen.data_ptr() == layer.keys.data_ptr()
    assert again.shape == (1, 1, 5, 2)
    assert torch.equal(values[:, :, 3:], -keys[:, :, :2])
    layer.update(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    assert layer.capacity_tokens == 16, "nine tokens in room for eight: doubled"
    with pytest.raises(UsageError, match="2 rows"):
        new_cache(model, 2, 8).layers[0].update(keys, keys)


@torch.no_grad()
def test_cache_rows_can_be_selected_reordered_and_repeated(model):
    ids = torch.tensor([prompt(6, seed) for seed in range(3)])
    follow = torch.tensor([prompt(2, seed + 9) for seed in range(3)])
    order = [2, 0]
    expected = model(torch.cat((ids, follow), 1)[order], use_cache=False).logits[:, 6:]
    cache = new_cache(model, 3, 7)
    model(ids, past_key_values=cache)
    cache.select_rows(order)
    torch.testing.assert_close(model(follow[order], past_key_values=cache).logits, expected, rtol=0, atol=1e-4)
    cache.truncate(6)
    cache.reorder_cache(torch.tensor([1, 0]))
    got = model(follow[[0, 2]], past_key_values=cache).logits
    torch.testing.assert_close(got, expected.flip(0), rtol=0, atol=1e-4)
    cache.truncate(6)
    cache.batch_repeat_interleave(2)
    got = model(follow[[0, 0, 2, 2]], past_key_values=cache).logits
    torch.testing.assert_close(got, expected.flip(0).repeat_interleave(2, 0), rtol=0, atol=1e-4)
    with pytest.raises(UsageError, match="0 to 8"):
        cache.truncate(9)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_rows_that_share_their_beginning_are_reordered_where_they_are(model):
    layer, shared = new_cache(model, 3, 8).layers[0], torch.randn(1, 2, 2, 4)
    keys = torch.cat((shared.expand(3, -1, -1, -1), torch.randn(3, 2, 3, 4)), dim=2)
    layer.update(keys, -keys)
    place = layer.keys.data_ptr()
    layer.keys[:, :, 5:] = 7.0  # the room behind is not looked at
    for order in ([2, 2, 0], [1, 0, 2]):
        layer.batch_select_indices(torch.tensor(order), shared_tokens=2)
        keys = keys[order]
        assert torch.equal(layer.keys[:, :, :5], keys)
        assert torch.equal(layer.values[:, :, :5], -keys)
        assert layer.keys.data_ptr() == place
    layer.batch_select_indices(torch.tensor([2]), shared_tokens=2)
    assert torch.equal(layer.keys[:, :, :5], keys[2:])
    assert layer.keys.shape == (1, 2, 8, 4)


def test_truncate_mends_an_interrupted_step(model):
    cache = new_cache(model, 1, 8)
    one = torch.zeros(1, 1, 1, 2)
    for layer in cache.layers:
        layer.update(one, one)
    cache.layers[0].update(one, one)  # interrupted before the second layer
    cache.truncate(1)
    assert [layer.get_seq_length() for layer in cache.layers] == [1, 1]


def test_a_cache_made_in_inference_mode_works_outside_it_and_in_generate(model):
    cache = new_cache(model, 1, 8)
    ids = prompt(6)
    said = answer(model, ids, max_new_tokens=4, cache=cache)
    follow = torch.tensor([[*ids, *said]])
    options = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": VOCABULARY - 1}
    got = model.generate(follow, past_key_values=cache, **options)
    assert torch.equal(got, model.generate(follow, **options))
    with torch.no_grad():
        model(torch.tensor([[5]]), past_key_values=cache)


def test_beam_search_works_on_it(model):
    ids = torch.tensor([prompt(6)])
    options = {"do_sample": False, "num_beams": 3, "max_new_tokens": 6, "eos_token_id": VOCABULARY - 1}
    cache = new_cache(model, 3, 4)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options))
