"""A-28: what a key may ask for in a minute, and that one key's greed costs no other key anything."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

import glmkit
from glmkit.chat.following import serve
from glmkit.errors import UsageError
from glmkit.serve.app import create_app
from glmkit.serve.budgets import Budgets
from glmkit.serve.failures import APIError
from glmkit.serve.settings import ApiKey, Settings
from serving import KEY, OTHER_KEY, Lines, Listening

ASKED = {"messages": [{"role": "user", "content": "类型#裙*颜色#蓝色*风格#清新*材质#雪纺*裙长#长裙"}], "temperature": 0}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def refusal(budgets: Budgets, owner: str) -> tuple[str | None, str] | None:
    """The code and Retry-After of a refusal; None: the request was taken."""
    try:
        budgets.take_request(owner)
    except APIError as error:
        return (error.code, error.headers["Retry-After"]) if error.status == 429 else (str(error.status), "")
    return None


def test_requests_come_back_evenly_and_each_key_has_its_own() -> None:
    clock = Clock()
    budgets = Budgets(requests_per_minute=6, clock=clock)
    assert [refusal(budgets, "a") for _ in range(6)] == [None] * 6
    assert refusal(budgets, "a") == ("rate_limit", "10")
    assert refusal(budgets, "b") is None
    clock.now += 9.5
    assert refusal(budgets, "a") == ("rate_limit", "1")
    clock.now += 0.5
    assert refusal(budgets, "a") is None
    assert refusal(budgets, "a") == ("rate_limit", "10")
    clock.now += 3600  # an hour of rest is worth one minute, not sixty
    assert [refusal(budgets, "a") for _ in range(7)] == [None] * 6 + [("rate_limit", "10")]


def test_tokens_are_taken_afterwards_and_what_is_owed_is_paid_back() -> None:
    clock = Clock()
    budgets = Budgets(tokens_per_minute=60, clock=clock)
    assert refusal(budgets, "a") is None
    budgets.take_tokens("a", 90)  # 30 too many
    assert refusal(budgets, "a") == ("token_limit", "31")
    assert refusal(budgets, "b") is None
    clock.now += 31
    assert refusal(budgets, "a") is None
    budgets.take_tokens("a", 0)
    assert refusal(budgets, "a") is None


def test_without_budgets_nothing_is_counted() -> None:
    budgets = Budgets()
    for _ in range(1000):
        budgets.take_request("a")
        budgets.take_tokens("a", 10**9)
    assert refusal(budgets, "a") is None


@pytest.mark.parametrize("field", ["requests_per_minute", "tokens_per_minute"])
def test_a_budget_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(UsageError, match=f"{field} has to be above 0"):
        Settings(**{field: 0})


def test_an_answer_that_is_left_is_paid_for_and_other_keys_go_on() -> None:
    served = serve(glmkit.load("glm-nano"), "glm-nano", max_running=2, max_waiting=4)
    lines = Lines()
    settings = Settings(api_keys=tuple(ApiKey.of(key) for key in (KEY, OTHER_KEY)), tokens_per_minute=100)
    app = create_app(served, settings, lines.journal)

    async def scenario() -> None:
        async with Listening(app, settings) as server:
            greedy, other = (
                httpx.AsyncClient(base_url=server.url, trust_env=False, headers={"Authorization": f"Bearer {key}"})
                for key in (KEY, OTHER_KEY)
            )
            async with greedy, other:
                streamed = {**ASKED, "stream": True, "max_tokens": 300}
                async with greedy.stream("POST", "/v1/chat/completions", json=streamed) as answer:
                    async for line in answer.aiter_lines():
                        if '"content"' in line:
                            break  # and leaves
                while app.state.traffic.in_flight:
                    await asyncio.sleep(0.01)
                statuses = []
                for _ in range(6):
                    answer = await greedy.post("/v1/chat/completions", json={**ASKED, "max_tokens": 40})
                    statuses.append(answer.status_code)
                assert statuses[0] == 200
                assert statuses[-1] == 429
                assert answer.json()["error"]["code"] == "token_limit"
                assert 1 <= int(answer.headers["retry-after"]) <= 120
                calm = await other.post("/v1/chat/completions", json={**ASKED, "max_tokens": 5})
                assert calm.status_code == 200
                assert (await greedy.get("/v1/models")).status_code == 200  # costs nothing

    try:
        asyncio.run(scenario())
    finally:
        served.close()
    log = [json.loads(line) for line in lines.text().splitlines()]
    left = next(line for line in log if line["outcome"] == "aborted")
    assert left["prompt_tokens"] > 20
    assert 1 <= left["generated_tokens"] < 300
