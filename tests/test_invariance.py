"""S-30: what a request gets does not depend on whom it meets: tokens and log-probabilities bit for bit.

64 prompts are asked alone, then again and again in companies of 2 to 32 rows, in other orders, read before or not,
greedy and with seeds, and beside requests that are cancelled. The long form asks 1,000 times.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

import glmkit
from glmkit.engine.decode import Step, stream
from glmkit.engine.sampling import SamplingOptions
from glmkit.engine.scheduler import BatchEngine
from glmkit.kernels.build import level

PROMPTS = 64
Said = list[tuple[int, float]]


def said(steps: Iterator[Step]) -> Said:
    return [(step.token_id, step.logprob) for step in steps]


def cases_of(model: Any, shortest: int, longest: int) -> list[tuple[list[int], SamplingOptions, int]]:
    """Prompts of which every third begins as the one before it, half of them greedy."""
    chance = random.Random(longest)
    cases = []
    for number in range(PROMPTS):
        words = random.Random(number // 3)
        length = chance.randint(shortest, longest)
        prompt = [words.randrange(5, model.config.padded_vocab_size - 600) for _ in range(length)]
        greedy = SamplingOptions(temperature=0.0)
        options = greedy if number % 2 else SamplingOptions(temperature=1.3, top_p=0.95, seed=number)
        cases.append((prompt, options, chance.randint(2, 12)))
    return cases


def ask_in_company(model: Any, cases: list[Any], alone: list[Said], requests: int) -> tuple[int, int, int]:
    """Requests that were asked, that got the same tokens, and those with the same log-probabilities to the last bit."""
    chance = random.Random(requests)
    asked = tokens = bits = 0
    while asked < requests:
        engine = BatchEngine(model, max_running=chance.choice((2, 3, 5, 8, 13, 21, 32)), max_waiting=2 * PROMPTS)
        try:
            order = chance.sample(range(len(cases)), min(len(cases), requests - asked))
            running = {}
            for number in order:
                prompt, options, count = cases[number]
                owner = chance.choice(("", "one", f"new {asked} {number}"))  # the last has read nothing before
                running[number] = engine.stream(prompt, options, stop_ids=(), max_new_tokens=count, owner=owner)
                if chance.random() < 0.2:
                    stranger = engine.stream(prompt[::-1], options, stop_ids=(), max_new_tokens=50)
                    stranger.cancel()
                if chance.random() < 0.2:
                    time.sleep(chance.random() * 0.01)
            for number, generation in running.items():
                got = said(generation)
                tokens += [token for token, _ in got] == [token for token, _ in alone[number]]
                bits += got == alone[number]
            asked += len(order)
        finally:
            engine.close()
    return asked, tokens, bits


@pytest.mark.parametrize("requests", [PROMPTS, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("prompts", ["short", pytest.param("long", marks=pytest.mark.slow)])
def test_company_changes_nothing(requests: int, prompts: str) -> None:
    """A prompt of up to 31 tokens is one native step; of a longer one, read in parts, the tokens are the same."""
    if level() == "torch":
        pytest.skip("there is no native code here")
    model = glmkit.load("glm-nano", dtype="float32").model
    cases = cases_of(model, *((3, 31) if prompts == "short" else (32, 200)))
    alone = [said(stream(model, prompt, options, stop_ids=(), max_new_tokens=n)) for prompt, options, n in cases]
    asked, tokens, bits = ask_in_company(model, cases, alone, requests)
    print(f"\n{prompts}: {asked} asked, {tokens} with the same tokens, {bits} bit for bit")
    assert asked == tokens == requests
    if prompts == "short":
        assert bits == requests
