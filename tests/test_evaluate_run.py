"""Evaluations: the same rows however the work is shared or cut, intervals that are right, and files that say it all."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glmkit import cli
from glmkit.data.records import read_records
from glmkit.engine.decode import generate_batch
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import DataError, UsageError
from glmkit.evaluate.adgen import Adgen, Asked, answer_text, make_adgen, score
from glmkit.evaluate.catalogue import TASKS, is_task, is_task_file, make_task
from glmkit.evaluate.comparison import compared
from glmkit.evaluate.results import Interval, interval, read_results, read_rows, resampled
from glmkit.evaluate.run import data_hash, items_hash, run
from glmkit.evaluate.tasks import Figure, Row, Settings
from glmkit.loading import Loaded, load
from glmkit.tokenizers.chatglm import ChatGLM1Tokenizer
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer
from tiny import train_tokenizer, write_model

SECONDS = 300  # for a busy machine


@dataclass(frozen=True)
class Sum:
    """An item of the task below."""

    left: int
    tags: frozenset[str] = frozenset()


class Sums:
    """A task that needs no model: 40 items in units of 16."""

    name, rows_file, batch_size = "sums", "predictions.jsonl", 4

    def __init__(self, items: int = 40, cut: Callable[[int], None] | None = None) -> None:
        self.asked: list[int] = []
        self._items, self._cut = items, cut

    def items(self, loaded: Loaded) -> Sequence[Sum]:
        return [Sum(number, frozenset({"b", "a"})) for number in range(self._items)]

    def answer(
        self, loaded: Loaded, items: Sequence[Sum], first: int, progress: Callable[[int], None] | None = None
    ) -> list[Row]:
        if self._cut is not None:
            self._cut(first)
        self.asked.append(first)
        if progress is not None:
            progress(len(items))
        return [{"left": item.left, "right": item.left % 4 == 0, "unit": first} for item in items]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        return [Figure("accuracy", [float(row["right"]) for row in rows])]

    def notes(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {"units": len({row["unit"] for row in rows})}


class Config:
    max_position_embeddings = 64

    def to_json_string(self) -> str:
        return "{}"


@pytest.fixture
def loaded() -> Loaded:
    torch.manual_seed(0)
    model: Any = torch.nn.Linear(3, 2)
    model.config, model.dtype, model.device = Config(), torch.float32, torch.device("cpu")
    return Loaded(model, None, None, model.config, Path("m"))


# --- cut and continued


def test_a_killed_run_goes_on_with_the_unit_that_was_not_written(tmp_path: Path, loaded: Loaded) -> None:
    whole = Sums()
    expected = run(whole, loaded, tmp_path / "whole", settings={"seed": 3})
    assert whole.asked == [0, 16, 32]
    assert (expected.figures["accuracy"].value, expected.notes, expected.items, expected.seed) == (
        25.0, {"units": 3}, 40, 3,
    )  # fmt: skip

    child = os.fork()
    if child == 0:
        kill = lambda first: os.kill(os.getpid(), signal.SIGKILL) if first == 32 else None  # noqa: E731
        run(Sums(cut=kill), loaded, tmp_path / "cut", settings={"seed": 3})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    part = tmp_path / "cut" / "part-0.jsonl"
    assert not (tmp_path / "cut" / "results.json").exists()
    text = part.read_text()
    part.write_text(text.splitlines()[0] + "\n" + text.splitlines()[1][:30])  # the disk had no more of the second unit
    part.rename(tmp_path / "cut" / "part-7.jsonl")  # of a run with more processes
    seen: list[tuple[int, int]] = []
    rest = Sums()
    found = run(rest, loaded, tmp_path / "cut", settings={"seed": 3}, progress=lambda *done: seen.append(done))
    assert rest.asked == [16, 32]
    assert seen == [(32, 40), (40, 40)]
    assert found.figures == expected.figures
    for name in ("predictions.jsonl", "evaluation.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(file.name for file in (tmp_path / "cut").iterdir()) == [
        "evaluation.json", "predictions.jsonl", "results.json",
    ]  # fmt: skip

    # Called once more nothing is asked, and the time stays what the answers took.
    again = Sums()
    assert run(again, loaded, tmp_path / "whole", settings={"seed": 3}).seconds == expected.seconds
    assert again.asked == []


def test_answers_of_something_else_are_refused(tmp_path: Path, loaded: Loaded) -> None:
    run(Sums(), loaded, tmp_path, settings={"seed": 3})
    with pytest.raises(DataError, match=r"made differently.*\n  - seed: 3 then, 4 now\n"):
        run(Sums(), loaded, tmp_path, settings={"seed": 4})
    with pytest.raises(DataError, match=r"\n  - records: '\w{16}' then, '\w{16}' now"):
        run(Sums(39), loaded, tmp_path, settings={"seed": 3})
    weights = loaded.model.weight.detach().clone()
    with torch.no_grad():
        loaded.model.weight[0, 0] += 1
    with pytest.raises(DataError, match=r"\n  - weights: '\w{16}' then, '\w{16}' now\n"):
        run(Sums(), loaded, tmp_path, settings={"seed": 3})
    with torch.no_grad():
        loaded.model.weight.copy_(weights)
    rows = tmp_path / "predictions.jsonl"
    rows.write_text(rows.read_text() + "{}\n")
    with pytest.raises(DataError, match="has 41 rows, and there are 40 items"):
        run(Sums(), loaded, tmp_path, settings={"seed": 3})
    rows.write_text("[1]\n")
    with pytest.raises(DataError, match=r"predictions\.jsonl:1 is no row of JSON"):
        run(Sums(), loaded, tmp_path, settings={"seed": 3})
    with pytest.raises(DataError, match="has no items for the task sums"):
        run(Sums(0), loaded, tmp_path / "none", settings={})


def test_items_are_hashed_by_what_they_say() -> None:
    assert items_hash([Sum(1, frozenset("ab"))]) == items_hash([Sum(1, frozenset("ba"))])
    assert items_hash([Sum(1)]) != items_hash([Sum(2)])
    with pytest.raises(TypeError, match="Tensor is no plain value"):
        items_hash([torch.zeros(1)])


# --- several processes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    return write_model(folder / "model", train_tokenizer(folder / "tokenizer.model"), generation=2, endless=True)


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_measure_what_one_does(
    torchrun: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jieba")
    monkeypatch.chdir(tmp_path)
    words = ["上衣", "显瘦", "棉", "rice", "tea"]
    asked = [" ".join(words[: 1 + number % 5]) * (1 + number % 3) for number in range(21)]
    rows = [{"content": text, "summary": f"{words[number % 5]} 显瘦"} for number, text in enumerate(asked)]
    Path("dev.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("task").mkdir()
    choices = [{"inputs_pretokenized": row["content"], "choices_pretokenized": words, "label": 1} for row in rows]
    Path("task", "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    Path("task.yaml").write_text("name: words\ntype: mul\npath: task\n")  # its data stands beside it
    Path("text.txt").write_text("rice and tea " * 60)
    sampled = ["--temperature", "1", "--seed", "5", "--max-tokens", "6", "--batch-size", "1", "-m", str(model)]

    def calls(folder: str) -> list[list[str]]:
        evaluated = ["evaluate", "adgen", "--data", "dev.json", "-o", f"{folder}/adgen", *sampled]
        rest = ["-m", str(model), "--batch-size", "1"]
        return [
            evaluated,
            ["predict", "-i", "dev.json", "-o", f"{folder}/out.jsonl", *sampled],
            ["evaluate", "task.yaml", "-o", f"{folder}/task", *rest],
            ["evaluate", "perplexity", "--data", "text.txt", "--window", "16", "-o", f"{folder}/text", *rest],
        ]

    Path("two").mkdir()
    Path("one").mkdir()
    Path("calls.json").write_text(json.dumps(calls("two")))
    script = str(Path(__file__).with_name("evaluation_ranks.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    starts = [[sys.executable, script, "calls.json"]]
    if torchrun:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        starts = [[*launch, "-m", "glmkit", *words] for words in calls("two")]
    said = ""
    for start in starts:
        done = subprocess.run(start, capture_output=True, text=True, timeout=SECONDS, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        said += done.stdout
    assert said.count("bleu-4") == 1  # one of them prints
    for words in calls("one"):
        assert cli.run(words) == 0
    capsys.readouterr()
    for name in ("adgen/generated_predictions.txt", "out.jsonl", "task/predictions.jsonl", "text/predictions.jsonl"):
        assert Path("two", name).read_bytes() == Path("one", name).read_bytes(), name
    one, two = read_results("one/adgen"), read_results("two/adgen")
    assert (one.processes, two.processes) == (1, 2)
    assert one.figures == two.figures
    assert one.data == two.data == {"path": "dev.json", "sha256": data_hash("dev.json")}
    assert one.model["weights"] == two.model["weights"]
    for name in ("task", "text"):
        assert read_results(f"one/{name}").figures == read_results(f"two/{name}").figures
    (pair,) = compared(["one/task", "two/task"]).differences["Accuracy"]
    assert pair is not None
    assert (pair.value, pair.low, pair.high) == (0, 0, 0)
    before = read_results("one/task").data
    with Path("task", "a.jsonl").open("a") as stream:
        stream.write(json.dumps(choices[0]) + "\n")
    assert data_hash("task.yaml", "task/a.jsonl") != (before or {})["sha256"]
    assert one.settings["seed"] == one.seed == 5
    assert len({row["predict"] for row in read_rows("two/adgen")}) > 15  # sampled, and not the same in each unit


# --- intervals


def test_an_interval_is_as_wide_as_it_must_be() -> None:
    right = [1.0] * 120 + [0.0] * 280
    found = interval(Figure("accuracy", right), samples=4000)
    assert (found.value, found.n, found.unit) == (30.0, 400, "percent")
    assert found.low is not None
    assert found.high is not None
    normal = 100 * 2 * 1.96 * math.sqrt(0.3 * 0.7 / 400)  # of a share, by the normal approximation
    assert found.high - found.low == pytest.approx(normal, rel=0.06)
    assert (found.low + found.high) / 2 == pytest.approx(30, abs=0.4)
    assert found == interval(Figure("accuracy", right), samples=4000)
    assert found != interval(Figure("accuracy", right), samples=4000, seed=1)


def test_groups_weights_and_powers() -> None:
    grouped = Figure("accuracy", [1, 1, 1, 0, 0], groups=["a", "a", "a", "b", "b"])
    found = interval(grouped)
    assert (found.value, found.groups) == (50.0, {"a": 100.0, "b": 0.0})
    assert (found.low, found.high) == (50.0, 50.0)  # rows of a group are drawn from that group
    texts = Figure("perplexity", [10 * math.log(3), 30 * math.log(5)], weights=[10, 30], unit="exp", better="less")
    measured = interval(texts)
    assert measured.value == pytest.approx(math.exp((10 * math.log(3) + 30 * math.log(5)) / 40))
    assert measured.low == pytest.approx(3)
    assert measured.high == pytest.approx(5)
    nothing = interval(Figure("false", [0.0, 0.0], weights=[0, 0]))
    assert (nothing.value, nothing.low, nothing.n) == (None, None, 0)
    rare = interval(Figure("false", [1.0, *[0.0] * 9], weights=[1, *[0] * 9]))
    assert (rare.value, rare.low, rare.high, rare.n) == (100.0, 100.0, 100.0, 1)


def test_the_same_seed_draws_the_same_rows() -> None:
    generator = np.random.default_rng(0)
    values = generator.random(50)
    first, second = (resampled(Figure("a", list(values + shift), unit="number")) for shift in (0, 0.25))
    assert np.allclose(second - first, 0.25)
    assert first.std() == pytest.approx(values.std() / math.sqrt(50), rel=0.1)


# --- what is written and read


def test_results_are_read_as_they_were_written(tmp_path: Path, loaded: Loaded) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text("a")
    written = run(Sums(), loaded, tmp_path / "out", settings={"window": 4}, data=tmp_path / "d")
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["schema"] == 1
    assert {"task", "figures", "notes", "model", "adapter", "settings", "seed", "command", "versions", "data"} < set(
        content
    )
    assert content["settings"] == {"batch_size": 4, "window": 4}
    assert content["versions"]["torch"] == torch.__version__
    assert read_results(tmp_path / "out" / "results.json") == written
    assert isinstance(written.figures["accuracy"], Interval)
    assert [row["left"] for row in read_rows(tmp_path / "out")] == list(range(40))
    odd = [{"text": "a\u2028b\x85c"}] * 40  # line ends to str.splitlines, not to JSON Lines
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in odd]
    (tmp_path / "out" / "predictions.jsonl").write_text("".join(lines))
    assert read_rows(tmp_path / "out") == odd
    before = data_hash(tmp_path / "d")
    (tmp_path / "d" / "a.txt").rename(tmp_path / "d" / "b.txt")
    assert data_hash(tmp_path / "d") != before

    with pytest.raises(DataError, match=r"there is no .*nowhere"):
        read_results(tmp_path / "nowhere")
    for text, problem in (
        ('{"schema": 9}', "has schema 9, expected 1"),
        ("[]", "is not a results file"),
        ("{", "is not"),
    ):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(DataError, match=problem):
            read_results(tmp_path)
    (tmp_path / "out" / "predictions.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"has 1 rows, results\.json says 40"):
        read_rows(tmp_path / "out")


def test_every_task_has_a_maker() -> None:
    for name, entry in TASKS.items():
        module, function = entry.make.split(":")
        assert callable(getattr(import_module(module), function)), name


def test_tasks_by_name_and_by_file(tmp_path: Path) -> None:
    described = tmp_path / "task.yaml"
    described.write_text("name: t\ntype: mul\npath: d\nfile-pattern: {all: '*.jsonl'}\n")
    (tmp_path / "recipe.yaml").write_text("model: {path: m}\nevaluate: {task: adgen}\n")
    (tmp_path / "broken.yaml").write_text("a: [")
    assert is_task("mmlu")
    assert is_task(str(described))
    assert [is_task_file(str(tmp_path / name)) for name in ("recipe.yaml", "broken.yaml", "none.yaml")] == [False] * 3
    with pytest.raises(UsageError, match="there is no task 'cevall'") as refused:
        make_task("cevall", "d", Settings())
    assert refused.value.hint == "did you mean ceval?"
    with pytest.raises(UsageError, match="--data is missing: a text file"):
        make_task("perplexity", None, Settings())
    with pytest.raises(DataError, match="there is no data file nowhere, expected records such as"):
        make_task("adgen", "nowhere", Settings())
    with pytest.raises(UsageError, match="the task adgen has no setting shots, and it is 5") as unknown:
        make_task("adgen", str(described), Settings(shots=5))
    assert "temperature" in (unknown.value.hint or "")


# --- the official cutting


def test_the_paper_preset_cuts_as_the_official_scripts_do(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("jieba")
    data = tmp_path / "dev.json"
    rows = [{"content": "上衣 显瘦 " * 9, "summary": "上衣 显瘦 " * 9}, {"content": "棉", "summary": "棉"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours = load(model)
    tokenizer: Any = ours.tokenizer
    how = Settings(batch_size=2, max_new_tokens=9, preset="paper", source_tokens=30)
    task = make_adgen(str(data), how)
    asked, short = task.items(ours)
    assert len(short.prompt) < 30
    assert short.max_new_tokens == asked.max_new_tokens  # the script pads both prompts to 30
    whole = make_adgen(str(data), replace(how, preset=None, source_tokens=None)).items(ours)[0]
    assert asked.prompt == whole.prompt[:30]
    assert asked.label == tokenizer.decode(tokenizer.encode_text(whole.label)[:7]).strip()
    assert asked.max_new_tokens == 30 + 9 + 1 - 30
    answers = task.answer(ours, [asked], 0)
    greedy = SamplingOptions(temperature=0.0)
    (ids,) = generate_batch(ours.model, [asked.prompt], greedy, stop_ids=(), max_new_tokens=10, batch_size=1)
    assert answers == [{"labels": asked.label, "predict": answer_text(tokenizer, ids)}]
    assert task.notes(answers) == {"empty": 0, "shortened": 1, "labels_cut": 1}
    with pytest.raises(UsageError, match="preset=papers, expected paper"):
        make_adgen(str(data), replace(how, preset="papers"))


def _asked_as_official(shared: Path, name: str) -> tuple[Adgen, list[Asked], dict[str, Any]]:
    if name == "chatglm6b":
        tokenizer: Any = ChatGLM1Tokenizer(shared / "tokenizers" / "chatglm-6b.ice_text.model")
    else:
        tokenizer = ChatGLMTokenizer(shared / "tokenizers" / "chatglm2-chatglm3.tokenizer.model", generation=2)
    stored = json.loads((shared / "data" / "adgen" / "adgen_metric_full_dev.json").read_text())
    records = read_records(shared / "data" / "adgen" / "dev.json")
    task = Adgen(lambda: records, SamplingOptions(temperature=0.0), paper=True)
    asked = task.items(Loaded(None, tokenizer, None, None, Path()))  # type: ignore[arg-type]
    return task, list(asked), stored["official_label_truncation_62_tokens"][name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chatglm6b", "chatglm2_3"])
def test_as_many_labels_are_cut_as_were_counted_and_score_what_was_measured(shared: Path, name: str) -> None:
    pytest.importorskip("jieba")
    task, asked, stored = _asked_as_official(shared, name)
    assert task.notes([])["labels_cut"] == stored["labels_truncated"]
    if name == "chatglm2_3":
        assert task.notes([])["shortened"] == 181  # prompts that lose the mark of the answer
    whole = [record.answer for record in read_records(shared / "data" / "adgen" / "dev.json")]
    found = score([item.label for item in asked], whole)
    found.pop("empty")
    assert found == pytest.approx(stored["truncated_label_as_prediction_vs_full_summary"], abs=1e-4)
