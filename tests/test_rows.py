"""Rows of different lengths that take a step together: each gets what it gets alone, by native code bit for bit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import glmkit
from glmkit.engine.cache import BufferCache, new_cache
from glmkit.engine.decode import stream
from glmkit.engine.forward import forward_for
from glmkit.engine.layout import InputLayout, layout_for
from glmkit.engine.native import why_not
from glmkit.engine.rows import rows_forward
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import UsageError
from glmkit.kernels.decoder import MOST_TOKENS
from test_adapters import write_lora, write_prefix
from test_lookup import _BLANKS, _lively
from test_lookup import FAMILIES as MODELS
from test_native import QUANTISED, prepared, tiny
from test_native import best as best
from test_native import one_thread as one_thread
from tiny_families import write_chatglm, write_glm, write_glm4

EXACT = 1e-5
LENGTHS = (3, 20, 7, 1, 12)


def _by_torch(model: Any) -> Any:
    model.glm_kernels = "torch"
    return model


def _eagerly(model: Any) -> Any:
    model.config._attn_implementation = "eager"
    return type(model)(model.config)


FAMILIES: dict[str, Any] = {
    **MODELS,
    "chatglm2, torch": lambda: _by_torch(MODELS["chatglm2"]()),
    "chatglm2, eager": lambda: _eagerly(MODELS["chatglm2"]()),
    "chatglm, prefix": lambda: MODELS["chatglm"](pre_seq_len=3),
    "chatglm, eager": lambda: _eagerly(MODELS["chatglm"]()),
    "glm, prefix": lambda: _with_prefix(MODELS["glm"]()),
}


def _with_prefix(model: Any) -> Any:
    model.glm.attach_prefix(4, False)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Any, bool]:
    """A model of each family, and whether it reads prompts in both directions.

    What torch computes is in float64: rounding cannot be taken for a column that is seen and should not be, or hide it.
    """
    torch.manual_seed(0)
    model = _lively(FAMILIES[request.param]())
    return model if why_not(model) is None else model.double(), request.param.split(",")[0] in _BLANKS


class Rows:
    """Prompts that were read, each into a cache of its own, and how they go on."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], room: int = 2) -> None:
        self.model, self.prompts = model, [list(prompt) for prompt in prompts]
        self.caches: list[BufferCache] = []
        self.layouts: list[InputLayout] = []
        self.first: list[Tensor] = []
        for prompt in self.prompts:
            ids = torch.tensor([prompt])
            self.caches.append(new_cache(model, 1, len(prompt) + room))
            self.layouts.append(layout_for(model, ids, ids.new_zeros(1)))
            with torch.inference_mode():
                given = self.layouts[-1].prompt(0, len(prompt))
                self.first.append(forward_for(model, self.caches[-1])(ids, given, 1)[:, -1])

    def alone(self, ids: Tensor) -> Tensor:
        """One token of each row, in a call of its own, as `stream` does it."""
        rows = zip(ids.split(1), self.layouts, self.caches)
        with torch.inference_mode():
            found = [forward_for(self.model, cache)(one, layout.step(1), 1)[:, -1] for one, layout, cache in rows]
        return torch.cat(found).float()


def prompts_for(lengths: Sequence[int], both_ways: bool = False) -> list[list[int]]:
    ends = [[110, 112], [111, 112]] if both_ways else [[]]
    return [
        torch.randint(5, 100, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        + ends[row % len(ends)]
        for row, length in enumerate(lengths)
    ]


def next_ids(rows: int, step: int) -> Tensor:
    return torch.randint(5, 100, (rows, 1), generator=torch.Generator().manual_seed(1000 + step))


def close(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).abs().max() / wanted.abs().max()) < EXACT


def same_results(model: Any) -> Callable[[Tensor, Tensor], bool]:
    """The same bits, where native code computes; where torch does, what float64 gives (eager softmax is float32)."""
    if why_not(model) is None:
        return torch.equal
    bound = 1e-4 if model.config._attn_implementation == "eager" else 3e-7 if model.dtype == torch.float64 else EXACT
    return lambda found, wanted: float((found - wanted).abs().max() / wanted.abs().max()) < bound


def filled(cache: BufferCache) -> list[Tensor]:
    return [buffer[:, :, : layer.filled_tokens] for layer in cache.layers for buffer in (layer.keys, layer.values)]


def same(one: BufferCache, other: BufferCache) -> bool:
    return one.get_seq_length() == other.get_seq_length() and all(map(torch.equal, filled(one), filled(other)))


# --- every family ---


def test_rows_of_different_lengths_get_what_each_gets_alone(best: str, family: tuple[Any, bool]) -> None:
    """A row leaves and another comes in mid-run; caches grow, at other times each."""
    model, both_ways = family
    together, apart = (Rows(model, prompts_for(LENGTHS, both_ways)) for _ in range(2))
    later = prompts_for((5,), both_ways)
    run, is_same = rows_forward(model), same_results(model)
    if why_not(model) is None:
        run._model = None  # type: ignore[attr-defined]  # which native code must not need
    for step in range(6):
        if step == 3:
            for rows in (together, apart):
                joins = Rows(model, later)
                del rows.caches[1], rows.layouts[1]
                rows.caches += joins.caches
                rows.layouts += joins.layouts
        ids = next_ids(len(together.caches), step)
        found = run(ids, together.layouts, together.caches)
        assert found.dtype == torch.float32
        assert is_same(found, apart.alone(ids))
    for one, other in zip(together.caches, apart.caches):
        assert one.get_seq_length() == other.get_seq_length()
        assert {layer.filled_tokens for layer in one.layers} == {one.get_seq_length()}
        assert all(is_same(mine, theirs) for mine, theirs in zip(filled(one), filled(other)))


def test_greedy_answers_are_those_of_stream(best: str, family: tuple[Any, bool]) -> None:
    model, both_ways = family
    prompts = prompts_for(LENGTHS, both_ways)
    wanted = [
        [step.token_id for step in stream(model, ids, SamplingOptions(temperature=0.0), stop_ids=(), max_new_tokens=8)]
        for ids in prompts
    ]
    rows, run = Rows(model, prompts), rows_forward(model)
    token = torch.cat(rows.first).argmax(-1, keepdim=True)
    found = [token]
    for _ in range(7):
        found.append(token := run(token, rows.layouts, rows.caches).argmax(-1, keepdim=True))
    assert torch.cat(found, dim=1).tolist() == wanted
    assert len({token for answer in wanted for token in answer}) > 5


@pytest.mark.parametrize("count", [2, 1])
def test_rows_of_one_length_and_a_single_row_need_no_padding(best: str, family: tuple[Any, bool], count: int) -> None:
    model, both_ways = family
    tail = prompts_for((8,), both_ways)[0]
    together, apart = (Rows(model, [[6, *tail], [7, *tail]][:count]) for _ in range(2))
    masks: list[Tensor | None] = []
    ids, run = next_ids(count, 0), rows_forward(model)
    hook = model.register_forward_pre_hook(lambda _, __, given: masks.append(given["attention_mask"]), with_kwargs=True)
    try:
        found = run(ids, together.layouts, together.caches)
    finally:
        hook.remove()
    assert same_results(model)(found, apart.alone(ids))
    assert both_ways or masks in ([], [None])


def test_an_error_leaves_all_rows_as_they_were(best: str, family: tuple[Any, bool]) -> None:
    """In the middle of the network; then each row can be tried alone."""
    model, both_ways = family
    together, apart = (Rows(model, prompts_for(LENGTHS, both_ways)) for _ in range(2))
    before = [[part.clone() for part in filled(cache)] for cache in together.caches]
    block = next(module for name, module in model.named_modules() if name.endswith("layers.1"))

    def fail(*_: Any) -> None:
        raise RuntimeError("out of order")

    ids = next_ids(len(LENGTHS), 0)
    hook = block.register_forward_hook(fail)
    try:
        run = rows_forward(model)
        with pytest.raises(RuntimeError, match="out of order"):
            run(ids, together.layouts, together.caches)
    finally:
        hook.remove()
    for cache, parts in zip(together.caches, before):
        assert all(map(torch.equal, filled(cache), parts))
        assert {layer.filled_tokens for layer in cache.layers} == {parts[0].shape[2]}
    run = rows_forward(model)
    found = [
        run(ids[row : row + 1], together.layouts[row : row + 1], together.caches[row : row + 1])
        for row in range(len(LENGTHS))
    ]
    assert same_results(model)(torch.cat(found), apart.alone(ids))


# --- adapters ---


@pytest.mark.parametrize("name", ["chatglm", "glm4", "glm"])
def test_adapters_and_the_base_beside_them(best: str, name: str, tmp_path: Path) -> None:
    write = {"chatglm": write_chatglm, "glm4": write_glm4, "glm": write_glm}[name]
    base = write(tmp_path / "base")
    paths = {"lora": write_lora(tmp_path / "lora", base), "prefix": write_prefix(tmp_path / "prefix", base, length=3)}
    loaded = glmkit.load(base, adapter=paths, dtype="float32")
    config = loaded.model.config
    ends = {
        "chatglm": lambda: [config.gmask_token_id, config.bos_token_id],
        "glm": lambda: [config.mask_token_ids[0], config.sop_token_id],
        "glm4": list,
    }[name]()
    prompts = [[token % 9 + 5 for token in prompt] + ends for prompt in prompts_for((4, 11, 2))]
    answers = []
    for adapter in ("lora", None, "prefix", "lora"):
        model = loaded.with_adapter(adapter)
        together, apart, run = Rows(model, prompts), Rows(model, prompts), rows_forward(model)
        for step in range(3):
            ids = next_ids(3, step) % 9 + 5
            found = run(ids, together.layouts, together.caches)
            assert close(found, apart.alone(ids))
        answers.append(found)
    assert close(answers[0], answers[3])
    assert not any(close(answers[one], answers[other]) for one, other in ((0, 1), (0, 2), (1, 2)))


# --- native code ---


@pytest.mark.parametrize("kind", ["float32", "bfloat16", *QUANTISED])
def test_more_rows_than_a_call_takes(best: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(kind)
    prompts = prompts_for([1 + 7 * row % 50 for row in range(65)])
    together, apart, run = Rows(model, prompts, room=1), Rows(model, prompts), rows_forward(model)
    run._model = None  # type: ignore[attr-defined]  # which native code must not need
    call, rows_of_calls = run._runner._call, []  # type: ignore[attr-defined]
    monkeypatch.setattr(run._runner, "_call", lambda *given: rows_of_calls.append(given[1].rows) or call(*given))  # type: ignore[attr-defined]
    for step in range(2):
        ids = next_ids(len(prompts), step)
        assert torch.equal(run(ids, together.layouts, together.caches), apart.alone(ids))
    assert rows_of_calls == 2 * ([22, 22, 21] if kind in QUANTISED else [65])
    assert all(map(same, together.caches, apart.caches))


def test_threads_change_no_bit(best: str) -> None:
    """On a model that is large enough for several; and rows long enough for several ranges of keys."""
    model = glmkit.load("glm-nano", dtype="float32").model
    prompts = prompts_for((600, 3, 511, 40))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(1)
        rows, run = Rows(model, prompts), rows_forward(model)
        torch.set_num_threads(threads)
        results.append(torch.stack([run(next_ids(4, step), rows.layouts, rows.caches) for step in range(3)]))
    torch.set_num_threads(1)
    apart = Rows(model, prompts)
    results.append(torch.stack([apart.alone(next_ids(4, step)) for step in range(3)]))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_row_that_is_longer_than_the_first_rotary_tables(best: str) -> None:
    model = tiny()
    together, apart, run = *(Rows(model, prompts_for((2046, 3))) for _ in range(2)), rows_forward(model)
    run._model = None  # type: ignore[attr-defined]
    for step in range(4):
        assert torch.equal(run(next_ids(2, step), together.layouts, together.caches), apart.alone(next_ids(2, step)))


def test_a_wrong_token_in_a_later_call_leaves_all_rows_as_they_were(best: str) -> None:
    model = tiny()
    prompts = prompts_for([5 + row % 3 for row in range(MOST_TOKENS + 5)])
    together, apart, run = Rows(model, prompts), Rows(model, prompts), rows_forward(model)
    ids = next_ids(len(prompts), 0)
    wrong = ids.clone()
    wrong[-1] = 100_000
    with pytest.raises(IndexError):
        run(wrong, together.layouts, together.caches)
    assert all(map(same, together.caches, apart.caches))
    assert torch.equal(run(ids, together.layouts, together.caches), apart.alone(ids))


def test_buffers_that_are_replaced_between_two_steps(best: str) -> None:
    """Resized to and fro, so that new buffers may lie where old ones were; and cut."""
    model = tiny()
    prompts = prompts_for((30, 4, 17))
    together, apart, run = Rows(model, prompts), Rows(model, prompts), rows_forward(model)
    for step in range(6):
        ids = next_ids(3, step)
        assert torch.equal(run(ids, together.layouts, together.caches), apart.alone(ids))
        for cache in together.caches[: step % 3 + 1]:
            room = cache.capacity_tokens
            cache.resize(cache.get_seq_length())
            cache.resize(room)
        for rows in (together, apart):
            rows.caches[2].truncate(10)
    assert all(map(same, together.caches, apart.caches))


def test_weights_that_move_are_noticed_by_a_function_that_was_kept(best: str) -> None:
    model = tiny().to(torch.bfloat16)
    prompts = prompts_for((6, 2))
    together, apart, run = Rows(model, prompts), Rows(model, prompts), rows_forward(model)
    assert torch.equal(run(next_ids(2, 0), together.layouts, together.caches), apart.alone(next_ids(2, 0)))
    model.float()
    with torch.no_grad():
        model.transformer.encoder.layers[0].mlp.dense_4h_to_h.weight.mul_(1.5)
    assert torch.equal(run(next_ids(2, 1), together.layouts, together.caches), apart.alone(next_ids(2, 1)))
    model.double()  # which native code does not take
    together, apart = (Rows(model, prompts) for _ in range(2))
    assert close(run(next_ids(2, 2), together.layouts, together.caches), apart.alone(next_ids(2, 2)))


def test_rows_whose_caches_are_of_another_dtype_are_left_to_the_model(best: str) -> None:
    model = tiny()
    together, apart = (Rows(model, prompts_for((6, 2))) for _ in range(2))
    for rows in (together, apart):
        layers = rows.caches[1].layers
        for layer in layers:
            layer.keys, layer.values, layer.dtype = layer.keys.bfloat16(), layer.values.bfloat16(), torch.bfloat16
    ids = next_ids(2, 0)
    found, wanted = rows_forward(model)(ids, together.layouts, together.caches), apart.alone(ids)
    assert close(found[:1], wanted[:1])
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 0.02


def test_a_function_that_is_kept_holds_no_cache(best: str) -> None:
    model = tiny()
    rows, run = Rows(model, prompts_for((6, 2))), rows_forward(model)
    run(next_ids(2, 0), rows.layouts, rows.caches)
    held = [weakref.ref(cache.layers[0].keys) for cache in rows.caches]
    del rows
    gc.collect()
    assert all(buffer() is None for buffer in held)


# --- what does not fit ---


def _bad_calls(rows: Rows) -> Iterator[tuple[Tensor, Sequence[InputLayout], Sequence[BufferCache], str]]:
    ids, wide = next_ids(2, 0), new_cache(rows.model, 2, 4)
    yield ids, rows.layouts, rows.caches[:1], "2 layouts and 1 caches"
    yield ids, rows.layouts[:1], rows.caches, "1 layouts and 2 caches"
    yield ids.expand(2, 2), rows.layouts, rows.caches, r"shape \[2, 2\]"
    yield ids[:0], [], [], "0 caches"
    yield ids, rows.layouts, [rows.caches[0]] * 2, "share a cache"
    yield ids, rows.layouts, [rows.caches[0], wide], "share a cache"


def test_calls_that_do_not_fit_change_nothing(best: str) -> None:
    model = tiny()
    rows, apart = (Rows(model, prompts_for((6, 2))) for _ in range(2))
    for run in (rows_forward(model), rows_forward(_by_torch(tiny()))):
        for ids, layouts, caches, problem in _bad_calls(rows):
            with pytest.raises(UsageError, match=problem):
                run(ids, layouts, caches)
    assert all(map(same, rows.caches, apart.caches))


def test_ids_of_other_integers(best: str) -> None:
    model = tiny()
    together, apart = (Rows(model, prompts_for((6, 2))) for _ in range(2))
    ids = next_ids(2, 0)
    assert torch.equal(rows_forward(model)(ids.int(), together.layouts, together.caches), apart.alone(ids))
