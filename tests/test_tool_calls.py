"""The share of well-formed tool calls, on replies whose judgement is known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glmkit.chat.messages import Message
from glmkit.chat.templates import answer_ids
from glmkit.data.records import Record
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import DataError
from glmkit.evaluate import tasks
from glmkit.evaluate.results import interval
from glmkit.evaluate.tool_calls import ToolCalls, judge, turns
from glmkit.loading import Loaded
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer
from tiny import train_tokenizer

TOOLS = [
    {"name": "weather", "description": "Tells the weather.", "parameters": {}},
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}},
]
DIALOGUE = (
    Message("system", "", tools=TOOLS),
    Message("user", "Rain in Oslo?"),
    Message("assistant", "I will look."),
    Message("assistant", "", "weather", arguments={"city": "Oslo"}),
    Message("observation", "rain"),
    Message("assistant", "It rains."),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(train_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer.model"), generation=3)


def figures_of(tokenizer: ChatGLMTokenizer, context: int, asked: list[Record], **how: Any) -> dict[str, Any]:
    """All counts and shares of a model whose replies `tasks.generate_batch` stands for."""
    config = SimpleNamespace(max_position_embeddings=context)
    loaded = Loaded(SimpleNamespace(config=config), tokenizer, None, config, Path())
    task = ToolCalls(lambda: asked, **how)
    rows = task.answer(loaded, task.items(loaded), 0, None)
    return {**task.notes(rows), **{one.name: interval(one, samples=1).value for one in task.figures(rows)}}


def records() -> list[Record]:
    return [Record(DIALOGUE, tuple(message.role == "assistant" for message in DIALOGUE), "a:1")]


def say(tokenizer: ChatGLMTokenizer, name: str = "", text: str = "", **arguments: Any) -> list[int]:
    message = Message("assistant", "", name, arguments=arguments) if arguments else Message("assistant", text, name)
    return answer_ids(tokenizer, message, last=False)


def test_every_run_of_the_assistant_is_a_turn(tokenizer: ChatGLMTokenizer) -> None:
    first, second = turns(tokenizer, records())
    assert (first.prompt, first.name, first.arguments) == (DIALOGUE[:2], "weather", {"city": "Oslo"})
    assert (second.prompt, second.name) == (DIALOGUE[:5], None)
    assert first.tools == {"weather", "add"}
    with pytest.raises(DataError, match="no dialogue of these records has tools"):
        turns(tokenizer, [Record(DIALOGUE[1:3], (False, True), "a:1")])


def test_replies_count_as_what_they_are(tokenizer: ChatGLMTokenizer) -> None:
    call, text = turns(tokenizer, records())
    thought = [*say(tokenizer, text="I will look."), tokenizer.get_command("<|assistant|>")]
    exact = say(tokenizer, "weather", city="Oslo")
    assert judge(tokenizer, call, exact) == ["called", "formed", "right", "exact"]
    assert judge(tokenizer, call, thought + exact) == ["called", "formed", "right", "exact"]
    assert judge(tokenizer, call, say(tokenizer, "weather", city="Bergen")) == ["called", "formed", "right"]
    assert judge(tokenizer, call, say(tokenizer, "add", a=1)) == ["called", "formed"]
    assert judge(tokenizer, call, say(tokenizer, "sing", a=1)) == ["called"]
    assert judge(tokenizer, call, say(tokenizer, "weather", text="tool_call(")) == ["called"]
    assert judge(tokenizer, call, say(tokenizer, text="No idea.")) == []
    assert judge(tokenizer, text, say(tokenizer, text="It rains.")) == []
    assert judge(tokenizer, text, exact) == ["false"]


def test_shares_are_of_the_turns_that_fit(
    tokenizer: ChatGLMTokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = Message("user", "very " * 400)
    asked = [*records(), *records(), Record((DIALOGUE[0], long, *DIALOGUE[2:4]), (False, False, True, True), "a:2")]
    replies = [
        say(tokenizer, "weather", city="Oslo"),
        say(tokenizer, "weather", city="Oslo"),
        say(tokenizer, "sing", a=1),
        say(tokenizer, text="It rains."),
    ]
    monkeypatch.setattr(tasks, "generate_batch", lambda model, prompts, *_, **__: replies[: len(prompts)])
    found = figures_of(tokenizer, 400, asked, max_new_tokens=40)
    assert found == {
        "call_turns": 2,
        "text_turns": 2,
        "too_long": 1,
        "called": 100.0,
        "formed": 50.0,
        "right": 50.0,
        "exact": 50.0,
        "false": 50.0,
    }


def test_replies_are_sampled_if_that_is_asked_for(tokenizer: ChatGLMTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SamplingOptions] = []

    def generate(model: Any, prompts: list[list[int]], options: SamplingOptions, **_: Any) -> list[list[int]]:
        asked.append(options)
        return [[] for _ in prompts]

    monkeypatch.setattr(tasks, "generate_batch", generate)
    figures_of(tokenizer, 4000, records())
    figures_of(tokenizer, 4000, records(), options=SamplingOptions(temperature=0.5, top_p=0.7, seed=3))
    assert [(options.temperature, options.top_p, options.seed) for options in asked] == [
        (0.0, 1.0, None),
        (0.5, 0.7, 3),
    ]
