"""`glm predict`: every form of a question, in order, the same however it is cut, and errors that name the row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from glmkit import cli
from glmkit.chat.messages import Message
from glmkit.chat.templates import answer_ids
from glmkit.errors import DataError, OutputError, UsageError
from glmkit.evaluate import tasks
from glmkit.evaluate.predict import predict, read_question
from glmkit.evaluate.run import BATCHES_PER_UNIT
from glmkit.evaluate.tasks import Settings
from glmkit.loading import Loaded, load
from tiny import train_tokenizer, write_model
from tiny_families import write_glm

TOOLS = [{"name": "weather", "description": "Tells the weather.", "parameters": {}}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predicting")
    return write_model(folder / "model", train_tokenizer(folder / "tokenizer.model"), endless=True)


@pytest.fixture(scope="module")
def loaded(model: Path) -> Loaded:
    return load(model)


def write(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_questions_of_every_form() -> None:
    user = Message("user", "q")
    earlier = (Message("user", "a"), Message("assistant", "b"), user)
    for row, expected in (
        ({"prompt": "q"}, (user,)),
        ({"prompt": "q", "history": [["a", "b"]]}, earlier),
        ({"content": "q"}, (user,)),
        ({"content": "q", "summary": "what it should be"}, (user,)),
        ({"instruction": "q"}, (user,)),
        ({"instruction": "q", "input": "x", "output": ""}, (Message("user", "q\nx"),)),
        ({"messages": [{"role": "user", "content": "q"}]}, (user,)),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, (user,)),
        ({"conversations": [{"from": "human", "value": "q"}]}, (user,)),
        (
            {"conversations": [{"role": "user", "content": "q"}], "tools": TOOLS},
            (Message("system", "", "", TOOLS), user),
        ),
    ):
        assert read_question(row, Settings()) == expected, row
    assert read_question({"frage": "q"}, Settings(columns={"prompt": "frage"})) == (user,)
    for wrong, message in (
        ("q", "a row must be a JSON object, this is str"),
        ({"text": "q"}, "is plain text, which asks nothing"),
        ({"question": "q"}, "no known format has the fields 'question'"),
        ({"prompt": 3}, "field 'prompt' must be text, this is int"),
    ):
        with pytest.raises(DataError, match=message):
            read_question(wrong, Settings())


def test_answers_stand_in_order_and_are_those_of_a_chat(model: Path, loaded: Loaded, tmp_path: Path) -> None:
    texts = ["上衣 显瘦", "tea", "hello world, how are you?", "棉", "I like tea and rice"]
    rows: list[Any] = [{"prompt": text, "id": number} for number, text in enumerate(texts)]
    rows[3] = {"messages": [{"role": "user", "content": texts[3]}], "id": 3}
    source = write(tmp_path / "in.jsonl", rows)
    found = predict(loaded, source, tmp_path / "out.jsonl", Settings(batch_size=2, max_new_tokens=5))
    assert (found.rows, found.answered, found.problems) == (5, 5, 0)
    answers = read(tmp_path / "out.jsonl")
    assert [{key: row[key] for key in row if key != "predict"} for row in answers] == rows
    for row, text in zip(answers, texts):
        assert row["predict"] == loaded.chat(text, temperature=0, max_new_tokens=5).text, text
    assert not (tmp_path / "out.jsonl.parts").exists()

    words = ["predict", "-m", str(model), "-i", str(source), "-o", str(tmp_path / "out.jsonl"), "--max-tokens", "5"]
    assert cli.run(words) != 0  # the output exists
    assert cli.run([*words, "--overwrite", "--limit", "2", "--batch-size", "2"]) == 0
    assert read(tmp_path / "out.jsonl") == answers[:2]


def test_a_cut_run_goes_on(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in.jsonl", [{"content": "tea " * (1 + number % 4)} for number in range(10)])
    how = Settings(batch_size=1, max_new_tokens=4, temperature=1.0, seed=1)
    predict(loaded, source, tmp_path / "whole.jsonl", how)
    real, calls = tasks.generate_batch, []

    def cut(*arguments: Any, **options: Any) -> Any:
        calls.append(len(arguments[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(tasks, "generate_batch", cut)
    target = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        predict(loaded, source, target, how)
    assert not target.exists()
    with pytest.raises(DataError, match="seed: 1 then, 2 now"):
        predict(loaded, source, target, Settings(batch_size=1, max_new_tokens=4, temperature=1.0, seed=2))
    found = predict(loaded, source, target, how)
    assert (found.rows, found.answered) == (10, 10 - 2 * BATCHES_PER_UNIT)
    assert calls == [4, 4, 2, 2]
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_rows_are_kept_whatever_they_hold(loaded: Loaded, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    half = write(tmp_path / "in.jsonl", [{"prompt": "tea", "note": "line\u2028 next\x85"}])
    half.write_text(half.read_text(encoding="utf-8") + '{"prompt": "tea", "note": "cut \\ud83d"}\n', encoding="utf-8")
    predict(loaded, half, tmp_path / "out.jsonl", Settings(max_new_tokens=2))
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["note"] for line in lines] == ["line\u2028 next\x85", "cut \ud83d"]
    parquet.write_table(Table.from_pylist([{"prompt": "tea", "when": datetime(2024, 1, 2)}]), tmp_path / "a.parquet")
    predict(loaded, tmp_path / "a.parquet", tmp_path / "a.jsonl", Settings(max_new_tokens=2))
    assert read(tmp_path / "a.jsonl")[0]["when"] == "2024-01-02 00:00:00"
    parquet.write_table(Table.from_pylist([{"prompt": "tea", "raw": b"a"}]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="a field holds bytes, which JSON has no form for"):
        predict(loaded, tmp_path / "b.parquet", tmp_path / "b.jsonl", Settings())


def test_calls_of_tools_and_rows_that_do_not_fit(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = answer_ids(loaded.tokenizer, Message("assistant", "", "weather", arguments={"city": "Oslo"}), last=False)
    monkeypatch.setattr(tasks, "generate_batch", lambda model, prompts, *_, **__: [call for _ in prompts])
    long = "tea " * loaded.config.max_position_embeddings
    source = write(tmp_path / "in.jsonl", [{"prompt": long}, {"prompt": "Rain in Oslo?"}])
    found = predict(loaded, source, tmp_path / "out.jsonl", Settings(max_new_tokens=40))
    assert (found.rows, found.problems) == (2, 1)
    first, second = read(tmp_path / "out.jsonl")
    assert first["predict"] is None
    assert "the model's context is" in first["problem"]
    assert second["call"] == {"name": "weather", "arguments": {"city": "Oslo"}}


def test_mistakes_are_named(loaded: Loaded, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    with pytest.raises(DataError, match="there is no data file"):
        predict(loaded, tmp_path / "none.jsonl", target, Settings())
    (tmp_path / "in.jsonl").write_text('{"prompt": "q"}\n{"prompt"\n{"role": "user"}\n')
    with pytest.raises(
        DataError, match=r"2 of 3 rows of .*cannot be asked:\n.*in\.jsonl:2: not valid JSON.*\n.*:3: no known"
    ):
        predict(loaded, tmp_path / "in.jsonl", target, Settings())
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no rows"):
        predict(loaded, tmp_path / "empty.jsonl", target, Settings())
    with pytest.raises(UsageError, match="the task predict has no setting shots"):
        predict(loaded, tmp_path / "in.jsonl", target, Settings(shots=2))
    target.write_text("")
    with pytest.raises(OutputError, match=r"out\.jsonl exists"):
        predict(loaded, tmp_path / "in.jsonl", target, Settings())
    blanks = load(write_glm(tmp_path / "glm"))
    with pytest.raises(UsageError, match="is no chat model"):
        predict(blanks, write(tmp_path / "ok.jsonl", [{"prompt": "q"}]), tmp_path / "other.jsonl", Settings())
