"""Answers for asyncio code: the text of a single answer, many at once, and nothing left when a reader goes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import glmkit
from glmkit.chat.choices import Choices
from glmkit.chat.completion import CompletionStream
from glmkit.chat.following import Following, Served, answer, complete, serve
from glmkit.chat.messages import Message
from glmkit.chat.templates import conversation_ids, prompt_ids
from glmkit.engine import CancelToken, SamplingOptions, scheduler
from glmkit.errors import GlmkitError, QueueFullError, UsageError
from tiny_families import write_chatglm, write_glm

WEATHER = {
    "name": "get_weather",
    "description": "Get the weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "city name"}},
        "required": ["city"],
    },
}


@pytest.fixture(scope="module")
def nano() -> Iterator[Served]:
    served = serve(glmkit.load("glm-nano", dtype="float32"), "glm-nano", max_running=6)
    yield served
    served.close()


async def text_of(following: Awaitable[Following]) -> tuple[str, Following]:
    async with await following as answering:
        return "".join([piece async for piece in answering]), answering


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def test_many_answers_at_once_are_those_of_one_at_a_time(nano):
    questions = ["你好", "3加4等于多少？", "类型#裙*颜色#蓝色", "What is 2 + 3?", "谢谢", "再见"] * 3

    async def all_of_them() -> list[tuple[str, Following]]:
        return await asyncio.gather(*(text_of(answer(nano, q, temperature=0, max_new_tokens=40)) for q in questions))

    for question, (text, answering) in zip(questions, run(all_of_them())):
        wanted = nano.loaded.chat(question, temperature=0, max_new_tokens=40)
        assert text == answering.reply.text == wanted.text
        assert answering.reply.finish_reason == wanted.finish_reason
        assert answering.reply.usage.prompt_tokens == wanted.usage.prompt_tokens
        assert len(answering.steps) == wanted.usage.completion_tokens


def test_settings_seed_and_stop_reach_the_engine(nano):
    settings: dict[str, Any] = {"temperature": 1.0, "seed": 4, "max_new_tokens": 30, "stop": ["，"]}
    text, answering = run(text_of(answer(nano, "类型#裙*颜色#蓝色", **settings)))
    assert text == nano.loaded.chat("类型#裙*颜色#蓝色", **settings).text
    assert "，" not in text
    assert answering.reply.finish_reason == "stop"


@pytest.mark.parametrize("ask", [answer, complete])
def test_a_stop_text_ends_the_row_too(nano, ask, monkeypatch):
    def slow(model: Any) -> Any:
        forward = original(model)

        def step(*arguments: Any) -> Any:
            time.sleep(0.02)
            return forward(*arguments)

        return step

    original = scheduler.rows_forward
    monkeypatch.setattr(scheduler, "rows_forward", slow)

    async def stop() -> None:
        settings: dict[str, Any] = {"seed": 4, "max_new_tokens": 900, "logit_bias": dict.fromkeys(stops, -100.0)}
        async with await ask(nano, "类型#裙*颜色#蓝色", stop=["，"], **settings) as answering:
            assert [piece async for piece in answering]
            assert answering.reply.finish_reason == "stop"
            for _ in range(50):
                if not nano.engine.state().busy:
                    return
                await asyncio.sleep(0.01)
            raise AssertionError("the row writes on")

    stops = nano.tokenizer.stop_ids
    run(stop())


def test_the_second_turn_is_in_the_format_of_training(nano):
    tools = [WEATHER]

    async def two_turns() -> tuple[list[Message], Following]:
        _, first = await text_of(
            answer(
                nano,
                "What is the weather like in Paris?",
                tools=tools,
                temperature=0,
                max_new_tokens=60,
                forced_call="",
            )
        )
        assert first.reply.finish_reason == "tool_calls"
        messages = [*first.reply.messages, Message("observation", '{"weather": "sunny", "temperature": 20}')]
        _, second = await text_of(answer(nano, messages, temperature=0, max_new_tokens=30))
        return messages, second

    messages, second = run(two_turns())
    tokenizer = nano.tokenizer
    asked = prompt_ids(tokenizer, messages)
    learnt, _ = conversation_ids(tokenizer, second.reply.messages)
    assert learnt[: len(asked)] == asked
    assert second.reply.usage.prompt_tokens == len(asked)
    called = messages[-2]
    ids = tokenizer.encode_text(f"{called.metadata}\n") + tokenizer.encode_text(called.content)
    place = next(i for i in range(len(asked)) if asked[i : i + len(ids)] == ids)
    assert asked[place - 1] == tokenizer.get_command("<|assistant|>")
    assert asked[place + len(ids)] == tokenizer.get_command("<|observation|>")


@pytest.mark.parametrize("name", ["get_weather", ""])
def test_a_forced_call_is_a_call_of_an_offered_tool(nano, name):
    _, answering = run(
        text_of(answer(nano, "你好", tools=[WEATHER], temperature=0, max_new_tokens=60, forced_call=name))
    )
    assert answering.reply.messages[-1].metadata == "get_weather"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"forced_call": "get_time", "tools": [WEATHER]}, "'get_time', which is not offered"),
        ({"forced_call": ""}, "not offered"),
        ({"temperatur": 1}, "did you mean temperature"),
        ({"adapter": "ads"}, "no adapter 'ads'"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_it_begins(nano, more, message):
    with pytest.raises(UsageError, match=message):
        run(answer(nano, "你好", **more))
    with pytest.raises(UsageError, match="has 4,007 tokens"):
        run(answer(nano, "裙 " * 2000))


def test_a_reader_that_leaves_frees_its_place(nano):
    async def leave() -> None:
        before = nano.engine.state()
        async with await answer(nano, "你好", max_new_tokens=900, temperature=1.5, top_k=0, top_p=1.0) as answering:
            async for _ in answering:
                break
        for _ in range(100):
            state = nano.engine.state()
            if not state.busy:
                break
            await asyncio.sleep(0.01)
        assert state.aborted + state.finished == before.aborted + before.finished + 1
        assert answering.reply.finish_reason in ("cancelled", "stop")

    run(leave())


def test_a_task_that_is_cancelled_while_it_queues_leaves_nothing(nano):
    async def cancelled() -> None:
        task = asyncio.create_task(answer(nano, "你好" * 200, max_new_tokens=500))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        until = time.monotonic() + 20  # the part of the prompt that is being read ends first
        while nano.engine.state().busy and time.monotonic() < until:
            await asyncio.sleep(0.05)
        assert not nano.engine.state().busy

    run(cancelled())


def test_a_full_queue_is_said_before_anything_is_tokenised():
    served = serve(glmkit.load("glm-nano"), "x", max_running=1, max_waiting=1)

    async def three() -> None:
        first = await answer(served, "你好", max_new_tokens=900, temperature=1.5)
        second = await answer(served, "你好", max_new_tokens=900)
        with pytest.raises(QueueFullError):
            await answer(served, "你好", no_such_setting=1)
        first.cancel()
        second.cancel()

    try:
        run(three())
    finally:
        served.close()


def test_an_engine_that_closes_ends_answers(nano):
    served = serve(glmkit.load("glm-nano"), "x")

    async def closed() -> None:
        answering = await answer(served, "你好", max_new_tokens=900, temperature=1.9, top_p=1.0, top_k=0)
        await asyncio.to_thread(served.close)
        assert len("".join([piece async for piece in answering])) == len(answering.reply.text)
        assert answering.reply.finish_reason in ("cancelled", "stop", "length")

    run(closed())


# --- completions ---


def test_a_text_is_gone_on_with(nano):
    choices = Choices(SamplingOptions(temperature=0.0), max_new_tokens=12)
    wanted = "".join(CompletionStream(nano.model, nano.tokenizer, "这条裙子", choices))
    text, answering = run(text_of(complete(nano, "这条裙子", temperature=0, max_new_tokens=12)))
    assert text == wanted == answering.reply.text
    ids = nano.tokenizer.prefix_ids + nano.tokenizer.encode_text("这条裙子")
    assert run(text_of(complete(nano, ids, temperature=0, max_new_tokens=12)))[0] == wanted
    assert answering.reply.usage.prompt_tokens == len(ids)


def test_completions_stop_and_are_cancelled(nano):
    text, answering = run(text_of(complete(nano, "这条裙子", temperature=0, max_new_tokens=30, stop=["，"])))
    assert "，" not in text
    token = CancelToken()
    token.cancel()
    text, answering = run(text_of(complete(nano, "这条裙子", cancel=token)))
    assert (text, answering.reply.finish_reason) == ("", "cancelled")
    with pytest.raises(UsageError, match="the model's context is 1,024"):
        run(complete(nano, [5] * 1024))


@pytest.mark.parametrize("write", [write_chatglm, write_glm])
def test_models_that_read_in_both_directions(write: Callable[..., Path], tmp_path):
    loaded = glmkit.load(str(write(tmp_path / "model")), dtype="float32")
    served = serve(loaded, "tiny")
    question = "i like [MASK] and rice" if write is write_glm else "你好"
    try:
        wanted = loaded.chat(question, temperature=0, max_new_tokens=6)
        text, answering = run(text_of(answer(served, question, temperature=0, max_new_tokens=6)))
        assert text == wanted.text
        assert answering.reply.fillings == wanted.fillings
        if write is write_glm:
            with pytest.raises(GlmkitError, match="takes a text"):
                run(complete(served, [1, 2]))
    finally:
        served.close()


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    loaded = glmkit.load("glm-nano")
    loaded = glmkit.loading.Loaded(loaded.model, None, None, loaded.config, tmp_path)
    with pytest.raises(UsageError, match="no tokenizer"):
        serve(loaded, "x")
