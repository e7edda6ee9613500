"""GSM8K: which number an answer comes to, what a model is shown, and what is counted."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import glmkit
import tiny
from glmkit.engine.decode import stream
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import DataError, UsageError
from glmkit.evaluate import gsm8k, tasks
from glmkit.evaluate.gsm8k import EXAMPLES, find_number, make_gsm8k, read_problems
from glmkit.evaluate.results import read_rows
from glmkit.evaluate.run import run
from glmkit.evaluate.tasks import Settings
from glmkit.loading import Loaded

PROBLEMS = [
    ("I like 1 tea and 2 rice. How many?", "1 + 2 = <<1+2=3>>3\n#### 3"),
    ("hello world, how are you?", "2 * 500 = <<2*500=1000>>1,000\n#### 1,000"),
    ("How much is it?", "It is less.\n#### -2.50"),
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("gsm8k")
    file = tiny.train_tokenizer(folder / "tokenizer.model")
    return glmkit.load(
        tiny.write_model(folder / "chatglm3", file, endless=True, seq_length=2048), dtype="float32", device="cpu"
    )


def write(folder: Path, rows: list[tuple[str, str]] = PROBLEMS, name: str = "test.jsonl") -> Path:
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize(
    ("text", "number", "marked"),
    [
        ("2 + 3 = 5\n#### 5", "5", True),
        ("#### $1,234.50", "1234.5", True),
        ("#### 3\n\nand then #### 4", "3", True),  # what follows is no longer this answer
        ("The answer is 12. That took 3 steps.", "12", False),
        ("The answer is 1. No, the answer is: $7", "7", False),
        ("5-3=2.", "2", False),  # a minus between numbers is no sign
        ("It is -7", "-7", False),
        ("<<3+4=7>>She has 8 left, not 9.", "9", False),
        ("so x=<<3+4=7>>", None, False),  # the calculator's marks are not the answer
        ("a total of 1,2,3", "3", False),
        ("50% of $.5", "0.5", False),
        ("所以答案是：18。一共用了 3 步", "18", False),
        ("model A1 says nothing", None, False),
        ("", None, False),
    ],
)
def test_the_number_of_an_answer(text: str, number: str | None, marked: bool) -> None:
    assert find_number(text) == (None if number is None else Decimal(number), marked)


def test_the_examples_are_right() -> None:
    """Every sum in them, and the number they end with is that of their last sum."""
    step = re.compile(r"(?<![\w.])(\d[\d .*+/-]*) = (\d+(?:\.\d+)?)")
    for question, answer in EXAMPLES:
        steps = step.findall(answer)
        assert steps, question
        for left, right in steps:
            assert eval(left) == float(right), (left, right)
        assert find_number(answer) == (Decimal(steps[-1][1]), True)


def test_what_a_model_is_shown(tmp_path: Path, loaded: Loaded) -> None:
    task = make_gsm8k(str(write(tmp_path)), Settings(shots=2))
    (_, first), *_ = task.items(loaded)
    roles = [(message.role, message.content) for message in first.messages()]
    assert roles == [
        ("user", f"Question: {EXAMPLES[0][0]}\nAnswer:"),
        ("assistant", EXAMPLES[0][1]),
        ("user", f"Question: {EXAMPLES[1][0]}\nAnswer:"),
        ("assistant", EXAMPLES[1][1]),
        ("user", f"Question: {PROBLEMS[0][0]}\nAnswer:"),
    ]
    assert first.text().endswith(f"{EXAMPLES[1][1]}\n\nQuestion: {PROBLEMS[0][0]}\nAnswer:")


def test_examples_of_the_train_file_are_taken_first(tmp_path: Path, loaded: Loaded) -> None:
    write(tmp_path, [("one", "1 + 1 = <<1+1=2>>2\n#### 2"), ("two", "#### 4")], "train.jsonl")
    task = make_gsm8k(str(write(tmp_path)), Settings())
    (_, asked), *_ = task.items(loaded)
    assert asked.examples == (("Question: one\nAnswer:", "1 + 1 = 2\n#### 2"), ("Question: two\nAnswer:", "#### 4"))
    assert task.notes([])["examples"] == "train.jsonl"
    with pytest.raises(DataError, match="shots=3, and there are 2"):
        make_gsm8k(str(tmp_path), Settings(shots=3)).items(loaded)


def test_rows_and_figures(tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three answers: right with the mark, right without it, none; a base model's next question is cut off."""
    said = ["1 + 2 = 3\n#### 3\n\nQuestion: more\nAnswer: #### 9", "It is 2 * 500 = 1000.", "I do not know"]
    given: dict[str, Any] = {}

    def generate(model: Any, prompts: Any, options: SamplingOptions, **how: Any) -> list[list[int]]:
        given.update(how, options=options, prompts=prompts)
        how["progress"](3, 3)
        return [tiny.say(loaded.tokenizer, text, end=None) for text in said]

    monkeypatch.setattr(tasks, "generate_batch", generate)
    task = make_gsm8k(str(write(tmp_path)), Settings(shots=0, seed=5, temperature=0.5, max_new_tokens=99))
    counted: list[int] = []
    rows = task.answer(loaded, task.items(loaded), 8, counted.append)
    assert [row["id"] for row in rows] == [8, 9, 10]
    assert [(row["label"], row["answer"], row["right"], row["marked"]) for row in rows] == [
        ("3", "3", 1, 1),
        ("1000", "1000", 1, 0),
        ("-2.5", None, 0, 0),
    ]
    assert rows[0]["predict"] == "1 + 2 = 3\n#### 3"
    assert counted == [3]
    assert given["max_new_tokens"] == 99
    assert given["options"].temperature == 0.5
    assert given["options"].seed not in (None, 5), "every unit draws its own numbers"
    main, marked = task.figures(rows)
    assert (sum(main.sums) / 3, sum(marked.sums) / 3) == (2 / 3, 1 / 3)
    assert task.notes(rows) == {
        "prompt": ["chat"],
        "shots": {"0": 3},
        "examples": "glmkit's own",
        "no_number": 1,
        "too_long": 0,
    }


def test_batched_answers_are_those_of_one_at_a_time(tmp_path: Path, loaded: Loaded) -> None:
    task = make_gsm8k(str(write(tmp_path)), Settings(shots=1, batch_size=3, max_new_tokens=6))
    items = task.items(loaded)
    rows = task.answer(loaded, items, 0)
    for row, (_, asked) in zip(rows, items):
        ids = gsm8k.open_ids(loaded.tokenizer, "chat", asked)
        steps = stream(loaded.model, ids, SamplingOptions(temperature=0), stop_ids=(), max_new_tokens=6)
        alone = loaded.tokenizer.decode(
            [step.token_id for step in steps if step.token_id < loaded.tokenizer.vocab_size]
        )
        assert row["predict"] == alone.strip()
    assert len({row["predict"] for row in rows}) > 1


def test_examples_are_left_out_where_the_context_is_short(tmp_path: Path, loaded: Loaded) -> None:
    task = make_gsm8k(str(write(tmp_path, PROBLEMS[:1])), Settings(max_new_tokens=4))
    items = task.items(loaded)
    lengths = [
        len(gsm8k.open_ids(loaded.tokenizer, "chat", gsm8k.Asked(asked.question, asked.examples[first:])))
        for _, asked in items
        for first in range(9)
    ]
    for room, shots in ((lengths[0] + 4, 8), (lengths[0] + 3, 7), (lengths[6] + 4, 2), (lengths[8] + 4, 0)):
        small = SimpleNamespace(
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            family=None,
            config=SimpleNamespace(max_position_embeddings=room),
        )
        assert task.answer(small, items, 0)[0]["shots"] == shots
    small.config.max_position_embeddings = lengths[8] + 3
    (row,) = task.answer(small, items, 0)
    assert (row["asked"], row["right"], row["answer"]) == (0, 0, None)


def test_through_the_runner(tmp_path: Path, loaded: Loaded) -> None:
    task = make_gsm8k(str(write(tmp_path)), Settings(shots=0, max_new_tokens=3))
    results = run(task, loaded, tmp_path / "out", settings={})
    rows = read_rows(tmp_path / "out")
    assert [row["label"] for row in rows] == ["3", "1000", "-2.5"]
    assert results.figures["accuracy"].value == pytest.approx(100 * sum(row["right"] for row in rows) / 3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"question": "q", "answer": "no number"}', "test.jsonl:1 has an answer without its number"),
        ('{"question": "q"}', "test.jsonl:1 is no problem"),
        ("[1", "test.jsonl:1"),
        ("", "has no problems"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "test.jsonl").write_text(content)
    with pytest.raises(DataError, match=re.escape(said)):
        read_problems(tmp_path / "test.jsonl")


def test_settings_that_are_refused() -> None:
    for how, said in (
        (Settings(stride=3), "stride"),
        (Settings(extra={"split": "x"}), "split"),
        (Settings(shots=-1), "-1"),
    ):
        with pytest.raises(UsageError, match=said):
            make_gsm8k("data", how)


def test_the_published_file(shared: Path) -> None:
    problems = read_problems(shared / "data" / "gsm8k" / "test.jsonl")
    assert len(problems) == 1319
    assert all(find_number(problem.answer) == (problem.number, True) for problem in problems)
    unmarked = [find_number(problem.answer.replace("#### ", ""))[0] for problem in problems]
    assert unmarked == [problem.number for problem in problems]
