"""The built-in model answers sensibly inside its little world, and the quickstart runs end to end."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

import glmkit
from glmkit import quickstart
from glmkit.chat.messages import to_messages
from glmkit.chat.templates import prompt_ids
from glmkit.engine.decode import generate_batch
from glmkit.engine.sampling import SamplingOptions
from glmkit.loading import Loaded
from glmkit.location import builtin

NANO = Path(__file__).parents[1] / "nano"


@pytest.fixture(scope="module")
def nano() -> Loaded:
    return glmkit.load("glm-nano")


@pytest.fixture(scope="module")
def corpus() -> Any:
    sys.path.insert(0, str(NANO))
    import corpus

    return corpus


def answers(nano: Loaded, conversations: list[list[dict[str, Any]]]) -> list[str]:
    prompts = [prompt_ids(nano.tokenizer, to_messages(messages)) for messages in conversations]
    ids = generate_batch(
        nano.model,
        prompts,
        SamplingOptions(temperature=0.0),
        stop_ids=nano.tokenizer.stop_ids,
        max_new_tokens=128,
        batch_size=32,
    )
    return [nano.tokenizer.decode(row) for row in ids]


@pytest.mark.parametrize(("kind", "least"), [("arithmetic", 0.25), ("fact", 0.6), ("greeting", 0.5)])
def test_greedy_answers_to_held_out_prompts(nano: Loaded, corpus: Any, kind: str, least: float) -> None:
    """The floors lie well under the figures of nano/REPORT.md, which stand for 400 prompts of each kind."""
    rng = random.Random(f"test {kind}")
    records = [corpus.make_record(kind, rng, heldout=True)["conversations"] for _ in range(48)]
    found = answers(nano, [record[:-1] for record in records])
    from world import talk

    right = sum(
        text.strip() in {record[-1]["content"]} | talk.accepted(record[-2]["content"])
        for text, record in zip(found, records)
    )
    assert right / len(records) >= least


def test_advertising_copy_mentions_what_was_asked_for(nano: Loaded, corpus: Any) -> None:
    from world import advert

    rng, asked = random.Random("test adgen"), []
    while len(asked) < 24:
        pairs = advert.sample_attributes(rng)
        if corpus.bucket_of(pairs) == corpus.HELDOUT_BUCKET:
            asked.append(pairs)
    found = answers(nano, [[{"role": "user", "content": advert.content_of(pairs)}] for pairs in asked])
    missing = sum(len(advert.missing(pairs, text)) for pairs, text in zip(asked, found))
    assert missing / sum(len(pairs) - 1 for pairs in asked) <= 0.2


def test_a_tool_is_called_and_its_result_used(nano: Loaded) -> None:
    from world import toolcalls

    rng = random.Random("test tool")
    calls = right = 0
    while calls < 12:
        dialogue = toolcalls.sample_dialogue(rng, True)
        wanted = next(message for message in dialogue if message.get("metadata"))
        place = dialogue.index(wanted)
        reply = nano.chat(dialogue[:place])
        calls += 1
        right += reply.tool_call is not None and reply.tool_call.name == wanted["metadata"]
    assert right >= 9


def test_size_and_licence_of_the_package_data() -> None:
    files = list(builtin("glm-nano").iterdir())
    assert sum(file.stat().st_size for file in files) <= 16e6
    assert {file.name for file in files} >= {"config.json", "model.safetensors", "tokenizer.model"}


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole tour with two steps of training and four records; the real one is the README's first command."""
    finetune, read = quickstart.finetune, quickstart.read_records
    monkeypatch.setattr(quickstart, "finetune", lambda name, changes: finetune(name, [*changes, "train.max_steps=2"]))
    monkeypatch.setattr(quickstart, "read_records", lambda path: read(path, limit=4))
    monkeypatch.chdir(tmp_path)
    assert quickstart.main("tour") == 0
    shown = capsys.readouterr().out
    assert "| rouge-l |" in shown
    assert "glm finetune" in shown
    for file in ("report.md", "lora/plots/loss.png", "lora/report.md", "lora/adapter/adapter_config.json"):
        assert (tmp_path / "tour" / file).stat().st_size > 0
    results = json.loads((tmp_path / "tour" / "after" / "predict_results.json").read_text())
    assert results["predict_samples"] == 4
    assert quickstart.main("tour") == 0  # a second tour leaves the first alone
    assert (tmp_path / "tour-2" / "report.md").exists()


@pytest.mark.parametrize(("kind", "least"), [("service", 0.2), ("code", 0.2)])
def test_calls_and_programs_for_held_out_prompts(nano: Loaded, corpus: Any, kind: str, least: float) -> None:
    """All five tools of `glmkit.tools.examples`, or the code interpreter; and the answer after the observation."""
    rng = random.Random(f"test {kind}")
    records = [corpus.make_record(kind, rng, heldout=True)["conversations"] for _ in range(40)]
    found = answers(nano, [record[:2] for record in records])
    right = 0
    for record, text in zip(records, found):
        header, _, content = text.partition("\n")
        right += (header.strip(), content.strip()) == (record[2].get("metadata", ""), record[2]["content"])
    assert right / len(records) >= least
    called = [record for record in records if len(record) > 3]
    found = answers(nano, [record[:4] for record in called])
    assert sum(text.strip() == record[4]["content"] for record, text in zip(called, found)) / len(called) >= least


@pytest.mark.parametrize(
    ("question", "program"),
    [
        ("画一个 y=x^2 的图", "plt.plot(x, "),
        ("Plot y = sin(x)", "plt.plot(x, "),  # which curve it is, it does not always copy
        ("画柱状图，数据是3、5、8", "values = [3, 5, 8]\nplt.bar("),
        ("计算1到100的和", "n = 100\n"),
        ("第10个斐波那契数是多少？", "for _ in range(10):"),
    ],
)
def test_what_the_page_shows_first(nano: Loaded, question: str, program: str) -> None:
    from glmkit.chat.tools import INTERPRETER_PROMPT

    reply = nano.chat([{"role": "system", "content": INTERPRETER_PROMPT}, {"role": "user", "content": question}])
    assert reply.messages[-1].metadata == "interpreter"
    assert program in reply.messages[-1].content


@pytest.mark.parametrize(
    ("question", "name", "arguments"),
    [
        ("北京今天天气怎么样？", "get_weather", {"city": "北京"}),
        ("What is the weather in Paris?", "get_weather", {"city": "Paris"}),
        ("东京现在几点？", "get_time", {"city": "东京"}),
        ("用计算器算一下125+37", "calculator", {"expression": "125+37"}),
    ],
)
def test_the_tools_of_the_package_are_called(nano: Loaded, question: str, name: str, arguments: dict[str, Any]) -> None:
    from glmkit.chat.tools import TOOLS_SENTENCE
    from glmkit.tools.examples import SAFE_TOOLS
    from glmkit.tools.registry import Registry

    system = {"role": "system", "content": TOOLS_SENTENCE, "tools": Registry(SAFE_TOOLS).schemas()}
    call = nano.chat([system, {"role": "user", "content": question}]).tool_call
    assert call is not None
    assert (call.name, call.arguments) == (name, arguments)
