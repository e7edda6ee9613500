"""Many prompts on a few places: each gets what it gets alone, bit for bit, whoever had the place before."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import glmkit
from glmkit.engine import places as module
from glmkit.engine.cache import new_cache
from glmkit.engine.decode import CancelToken, generate_batch, stream
from glmkit.engine.native import runner_for, why_not
from glmkit.engine.sampling import SamplingOptions, row_seed

KINDS = {
    "greedy": SamplingOptions(temperature=0.0),
    "seeded": SamplingOptions(temperature=0.9, top_p=0.8, seed=5),
    "penalty": SamplingOptions(temperature=0.0, repetition_penalty=1.3),
}
LIMIT = 12


@pytest.fixture(scope="module")
def model():
    model = glmkit.load("glm-nano", dtype="float32").model
    if why_not(model) is not None:
        pytest.skip(f"no native code here: {why_not(model)}")
    return model


@pytest.fixture(scope="module")
def prompts():
    source = random.Random(3)
    return [[source.randrange(300, 6000) for _ in range(length)] for length in (9, 40, 1, 33, 150, 17, 25)]


def alone(model, prompt, options, row, stops=()):
    own = dataclasses.replace(options, seed=row_seed(options.seed or 0, row))
    return [one.token_id for one in stream(model, prompt, own, stop_ids=stops, max_new_tokens=LIMIT) if one.is_text]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_given_alone(model, prompts, kind):
    options = KINDS[kind]
    wanted = [alone(model, prompt, options, row) for row, prompt in enumerate(prompts)]
    stops = {answer[place] for answer, place in zip(wanted, (1, 3, 5, 7))}  # rows end at different steps
    wanted = [alone(model, prompt, options, row, stops) for row, prompt in enumerate(prompts)]
    assert len({len(answer) for answer in wanted}) > 2
    for size in (1, 3, 64):
        done = []
        found = generate_batch(
            model, prompts, options, stop_ids=stops, max_new_tokens=LIMIT, batch_size=size,
            progress=lambda finished, total, done=done: done.append((finished, total)),
        )  # fmt: skip
        assert found == wanted
        assert done[-1] == (len(prompts), len(prompts))


def test_a_free_place_is_taken_at_once(model, prompts, monkeypatch):
    rows = []

    def recorded(model, exact):
        step = rows_forward(model, exact=exact)
        return lambda ids, layouts, caches: rows.append(len(caches)) or step(ids, layouts, caches)

    rows_forward = module.rows_forward
    monkeypatch.setattr(module, "rows_forward", recorded)
    options = KINDS["greedy"]
    first = alone(model, prompts[4], options, 4)  # the longest prompt, which begins
    stops = {first[2]}
    answers = generate_batch(model, prompts[2:], options, stop_ids=stops, max_new_tokens=LIMIT, batch_size=2)
    lengths = sorted(len(answer) for answer in answers)
    assert lengths[0] < LIMIT
    # Both places are busy until nothing waits; then only the last row goes on.
    assert rows == sorted(rows, reverse=True)
    assert rows.count(2) >= rows.count(1)


def test_a_cancel_ends_all(model, prompts):
    cancel = CancelToken()
    found = generate_batch(
        model, prompts, KINDS["greedy"], stop_ids=(), max_new_tokens=LIMIT, batch_size=2, cancel=cancel,
        progress=lambda finished, total: cancel.cancel(),
    )  # fmt: skip
    lengths = [len(answer) for answer in found]
    assert lengths[4] == LIMIT  # the longest prompts had the places
    assert sorted(lengths) == [0] * (len(prompts) - 2) + [LIMIT] * 2


def test_a_step_of_one_token_has_the_bits_of_several(model):
    """One token of three heads in a group is attended to in a way of its own; several tokens are not."""
    runner = runner_for(model)
    ids = torch.randint(300, 6000, (1, 90), generator=torch.Generator().manual_seed(1))
    together, single = new_cache(model, 1, 128), new_cache(model, 1, 128)
    runner(ids[:, :80], cache=together)
    runner(ids[:, :80], cache=single)
    wanted = runner(ids[:, 80:], cache=together, keep=10)[0]
    found = torch.cat([runner(ids[:, place : place + 1], cache=single)[0] for place in range(80, 90)])
    assert torch.equal(found, wanted)
    for ours, theirs in zip(single.layers, together.layers):
        assert torch.equal(ours.values[:, :, :90], theirs.values[:, :, :90])


def test_a_prompt_has_the_same_bits_in_every_chunk(model):
    ids = torch.randint(300, 6000, (1, 120), generator=torch.Generator().manual_seed(2))
    runner = runner_for(model)
    wanted = runner(ids, cache=new_cache(model, 1, 128))
    cache = new_cache(model, 1, 128)
    for start in range(0, 120, 7):
        found = runner(ids[:, start : start + 7], cache=cache)
    assert torch.equal(found, wanted)
