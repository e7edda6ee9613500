"""Task files of GLM-130B's form: what they say, numbers of the official code, and every family. Texts are made up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import glm130b_tiny
import glmkit
import tiny
import tiny_families
from glmkit.engine.beams import BeamSearchStrategy, search
from glmkit.engine.decode import generate_batch
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import DataError, UsageError
from glmkit.evaluate.blank_text import Rendering, choice_scores, writing_prompt
from glmkit.evaluate.catalogue import is_task_file, make_task
from glmkit.evaluate.glm130b import WordStrategy
from glmkit.evaluate.matching import best, contains, cut_out, exact_match, f1, rouge, words
from glmkit.evaluate.results import interval
from glmkit.evaluate.run import run
from glmkit.evaluate.scoring import Passage, frame_of, score_passages
from glmkit.evaluate.task_file import make_task_file, read_task_file
from glmkit.evaluate.tasks import Settings, Task
from glmkit.loading import Loaded

FAMILIES = ("chatglm", "chatglm3", "glm4", "glm", "glm130b")
CHOICES = [[30], [76, 25, 32], [32, 63]]


class Numbers:
    """A tokenizer of GLM-130B whose words are ids."""

    generation = 0
    prefix_ids = ()
    stop_ids = frozenset({88, 93})
    mask_token_ids = (89, 90, 91)

    def __len__(self) -> int:
        return 96

    def get_command(self, name: str) -> int:
        return {"[MASK]": 89, "[gMASK]": 90, "sop": 92, "eop": 93}[name]

    def encode_text(self, text: str) -> list[int]:
        return [int(word) if word.isdigit() else sum(word.encode()) % 80 for word in text.split()]

    def encode(self, text: str) -> list[int]:
        return [{"[MASK]": 89, "[gMASK]": 90}.get(word) or self.encode_text(word)[0] for word in text.split()]

    def decode_ids(self, ids: Any) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    folder = tmp_path_factory.mktemp("models")
    written = {
        "chatglm": tiny_families.write_chatglm(folder / "chatglm"),
        "chatglm3": tiny.write_model(folder / "chatglm3", tiny.train_tokenizer(folder / "tokenizer.model")),
        "glm4": tiny_families.write_glm4(folder / "glm4"),
        "glm": tiny_families.write_glm(folder / "glm"),
    }
    found = {name: glmkit.load(path, device="cpu") for name, path in written.items()}
    model = glm130b_tiny.model()
    return found | {"glm130b": Loaded(model, Numbers(), None, model.config, Path("none"))}


def write(folder: Path, lines: Any, name: str = "data/val.jsonl", /, **fields: Any) -> Path:
    """A task file, as JSON, which is YAML too, and its data."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(lines, str):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
    file.write_text(lines, encoding="utf-8")
    said = {
        "name": "made up",
        "path": "data",
        **{key.replace("_pattern", "-pattern"): one for key, one in fields.items()},
    }
    (folder / "task.yaml").write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8")
    return folder / "task.yaml"


def answered(task: Task, loaded: Loaded) -> list[dict[str, Any]]:
    items = task.items(loaded)
    return task.answer(loaded, items, 0)


def builders(kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((glm130b_tiny.FOLDER / "builders.json").read_text())[kind]
    return found


# Numbers of the official code ----------------------------------------------------------------------------------------


def test_choices_of_glm130b_score_as_in_the_official_code(models: dict[str, Loaded], tmp_path: Path) -> None:
    for number, case in enumerate(builders("multiple_choice")):
        rows = [{"inputs": case["text"], "choices": case["choices"], "label": 1}]
        rows.append({"inputs": case["text"][1:4], "choices": case["choices"][:2], "label": 0})  # padding for the first
        path = write(tmp_path / str(number), rows, type="mul", use_task_mask=case["use_task_mask"], max_seq_length=64)
        found = answered(make_task_file(path, Settings()), models["glm130b"])
        wanted = case["cond_log_prob"][0]
        assert found[0]["scores"] == pytest.approx(wanted, abs=2e-3)
        assert found[0]["answer"] == wanted.index(max(wanted))


def test_windows_of_glm130b_lose_as_in_the_official_code(models: dict[str, Loaded], tmp_path: Path) -> None:
    case = builders("language_model")[0]
    text = " ".join(map(str, case["raw_tokens"]))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text(text)
    path = tmp_path / "task.yaml"
    path.write_text(
        "name: made up\ntype: lm\npath: data\nuse_task_mask: true\nmax_seq_length: 20\ngeneration-length: 8\n"
        'file-pattern: "*.txt"\n'
    )
    task = make_task_file(path, Settings(batch_size=3))
    rows = answered(task, models["glm130b"])
    assert [row["loss"] for row in rows] == pytest.approx(case["summed_loss"], abs=6e-3)
    assert sum(row["words"] for row in rows) == pytest.approx(40)  # blanks divide 40 words
    word, token = task.figures(rows)
    assert (word.name, token.name) == ("PPL", "token_perplexity")
    assert interval(word).value == pytest.approx(math.exp(sum(case["summed_loss"]) / 40), rel=1e-3)
    # unidirectional: the first window is the same, later ones score their last 8 tokens and no token twice
    path.write_text(path.read_text() + "unidirectional: true\n")
    found = answered(make_task_file(path, Settings()), models["glm130b"])
    whole = builders("language_model")[1]["summed_loss"]
    assert found[0]["loss"] == pytest.approx(whole[0], abs=6e-3)
    assert [row["tokens"] for row in found] == [19, 8, 8, 5]
    assert found[1]["loss"] < whole[1]


def test_prompts_of_glm130b_are_the_official_rows(models: dict[str, Loaded]) -> None:
    for case in builders("generation"):
        how = Rendering(64, case["use_task_mask"], case["unidirectional"])
        assert writing_prompt(Numbers(), case["text"], how, max_new_tokens=5) == case["out"]["token"]
        layout = models["glm130b"].model.input_layout(torch.tensor([case["out"]["token"]]), torch.tensor([0]))
        made = layout.prompt(0, case["out"]["context_length"])
        assert made["position_ids"][0].tolist() == case["out"]["position_id"]
        assert (~made["attention_mask"])[0, 0].int().tolist() == case["out"]["attention_mask"]
    how = Rendering(32)
    assert writing_prompt(Numbers(), list(range(60)), how, max_new_tokens=10) == [*range(40, 60), 89, 92]
    how = Rendering(32, cut="middle")
    assert writing_prompt(Numbers(), list(range(60)), how, max_new_tokens=10) == [*range(10), *range(50, 60), 89, 92]


# Every family --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_choices_do_not_depend_on_batches_and_neighbours(models: dict[str, Loaded], name: str) -> None:
    loaded = models[name]
    texts = ["i like tea and", "the capital of china is [MASK] .", "hello", "hello world ,"]
    choices = [["tea", "rice"], ["hello world", "rice", "tea tea tea"], ["tea", "world"], ["i like", "rice"]]
    for mask in (False, True) if name != "glm" else (False,):
        how = Rendering(60, use_task_mask=mask)
        one = choice_scores(loaded.model, loaded.tokenizer, texts, choices, how, batch_size=1)
        many = choice_scores(loaded.model, loaded.tokenizer, texts, choices, how, batch_size=4)
        for row, other in zip(one, many):
            assert row == pytest.approx(other, abs=2e-3)
        alone = choice_scores(loaded.model, loaded.tokenizer, texts[1:2], [choices[1][2:]], how)
        assert alone[0][0] == pytest.approx(one[1][2], abs=2e-3)
        assert all(len(row) == len(several) and max(row) < 0 for row, several in zip(one, choices))


@pytest.mark.parametrize("name", ["chatglm", "glm", "glm130b"])
def test_a_blank_at_the_end_scores_as_going_on(models: dict[str, Loaded], name: str) -> None:
    """Rows with all choices in them, and the passages of `scoring.py`, are two ways to the same numbers."""
    loaded, tokenizer = models[name], models[name].tokenizer
    how = Rendering(60, use_task_mask=name != "glm")
    found = choice_scores(loaded.model, tokenizer, ["i like tea and"], [["hello world", "rice"]], how)[0]
    known = tokenizer.encode_text("i like tea and")
    passages = [Passage(known, tokenizer.encode_text(choice)) for choice in ("hello world", "rice")]
    scored = score_passages(loaded.model, frame_of(tokenizer, closed=True), passages)
    assert found == pytest.approx([sum(one.log_probabilities) for one in scored], abs=2e-3)


def test_glm_scores_choices_as_its_own_builder(models: dict[str, Loaded]) -> None:
    loaded, tokenizer = models["glm"], models["glm"].tokenizer
    text, choices = "the capital of [MASK] is beijing .", ["china", "tea and rice"]
    source = torch.tensor([tokenizer.fill_prompt(text)])
    inputs = {"input_ids": source, "attention_mask": torch.ones_like(source)}
    made = tokenizer.build_inputs_for_multiple_choice(inputs, [choices])
    with torch.no_grad():
        logits = loaded.model(made["input_ids"], made["position_ids"], made["attention_mask"]).logits[0]
    logs = logits.log_softmax(-1)
    start, wanted = inputs["input_ids"].shape[1], []
    for choice in choices:
        ids = tokenizer.encode_text(choice)
        wanted.append(float(sum(logs[start + place, token] for place, token in enumerate(ids))))
        start += len(ids)
    found = choice_scores(loaded.model, tokenizer, [text], [choices], Rendering(60))[0]
    assert found == pytest.approx(wanted, abs=1e-3)


def test_models_that_read_forwards_take_a_text_without_its_blank(models: dict[str, Loaded]) -> None:
    loaded, tokenizer = models["chatglm3"], models["chatglm3"].tokenizer
    how = Rendering(200)

    def log_probability(text: str, start: str) -> float:
        ids, known = tokenizer.encode_text(text), tokenizer.encode_text(start)
        assert ids[: len(known)] == known
        scored = score_passages(loaded.model, frame_of(tokenizer), [Passage(known, ids[len(known) :])])
        return sum(scored[0].log_probabilities)

    ends = [
        choice_scores(loaded.model, tokenizer, [text], [["tea", "rice"]], how)[0]
        for text in ("i like", "i like [MASK]")
    ]
    assert ends[0] == pytest.approx(ends[1], abs=1e-4)
    assert ends[0] == pytest.approx([log_probability(f"i like {one}", "i like") for one in ("tea", "rice")], abs=1e-4)
    within = choice_scores(loaded.model, tokenizer, ["i like [MASK] and rice"], [["tea", "hello"]], how)[0]
    wanted = [log_probability(f"i like {one} and rice", "i like") for one in ("tea", "hello")]
    assert within == pytest.approx(wanted, abs=1e-4)
    prompt = writing_prompt(tokenizer, "i like [MASK]", how, max_new_tokens=4)
    assert prompt == [*tokenizer.get_prefix_tokens(), *tokenizer.encode_text("i like")]
    with pytest.raises(DataError, match="only goes on at the end of a text"):
        writing_prompt(tokenizer, "i [MASK] tea", how, max_new_tokens=4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("strategy", ["BaseStrategy", "BeamSearchStrategy"])
def test_written_answers(models: dict[str, Loaded], name: str, strategy: str, tmp_path: Path) -> None:
    loaded = models[name]
    texts = ["i like tea and", "hello", "the capital of china"]
    rows = [{"inputs_pretokenized": text, "targets_pretokenized": ["tea"]} for text in texts]
    path = write(
        tmp_path, rows, type="gen", sampling_strategy=strategy, num_beams=2, max_gen_length=4, max_seq_length=60
    )
    task = make_task_file(path, Settings(batch_size=2))
    found = answered(task, loaded)
    stops = loaded.tokenizer.stop_ids
    for row, text in zip(found, texts):
        prompt = writing_prompt(loaded.tokenizer, text, Rendering(60), max_new_tokens=4)
        if strategy == "BaseStrategy":
            greedy = SamplingOptions(temperature=0.0)
            ids = generate_batch(loaded.model, [prompt], greedy, stop_ids=stops, max_new_tokens=4, batch_size=1)[0]
        else:
            beams = search(loaded.model, prompt, BeamSearchStrategy(2, end_ids=stops), max_new_tokens=4)
            ids = [token for token in beams[0].ids[len(prompt) :] if token not in stops]
        assert row["text"] == loaded.tokenizer.decode_ids(ids).strip()
        assert row["EM"] == best(
            "EM", row["answer"], [loaded.tokenizer.decode_ids(loaded.tokenizer.encode_text("tea"))]
        )
    assert [figure.name for figure in task.figures(found)] == ["EM", "F1"]
    assert task.notes(found) == {"empty": sum(not row["answer"] for row in found)}


def test_chat_is_asked_for(models: dict[str, Loaded], tmp_path: Path) -> None:
    path = write(tmp_path, [{"q": "tea?", "a": ["x", "y"]}], type="gen", ask="chat", inputs="{q}", targets="a")
    task = make_task_file(path, Settings(max_new_tokens=3))
    found = answered(task, models["chatglm3"])
    assert found[0]["targets"] == ["x", "y"]
    prompt = writing_prompt(models["chatglm3"].tokenizer, "tea?", Rendering(), max_new_tokens=3, chat=True)
    assert prompt[2] == models["chatglm3"].tokenizer.get_command("<|user|>")
    long = writing_prompt(models["chatglm3"].tokenizer, "tea " * 90 + "?", Rendering(50), max_new_tokens=3, chat=True)
    assert 35 < len(long) <= 45
    assert long[2] == prompt[2]
    with pytest.raises(DataError, match="trained to chat"):
        answered(task, models["glm130b"])


def test_words_of_lambada_begin_with_no_mark(models: dict[str, Loaded], tmp_path: Path) -> None:
    strategy = WordStrategy(1, [[5], [7, 9]], end_ids=[1], no_repeat_ngram_size=0)
    start = torch.tensor([[3, 3]])
    logits = torch.zeros(1, 12)
    logits[0, 5], logits[0, 7] = 9.0, 8.0
    tokens, _ = strategy.step(logits, start)
    assert tokens[0].tolist() == [3, 3, 7]  # 5 never comes
    logits[0, 9], logits[0, 4] = 10.0, 7.5
    assert strategy.step(logits, tokens)[0][0].tolist() == [3, 3, 7, 7]  # 7 9 is a mark
    strategy.finish(tokens)
    assert strategy.step(logits, torch.tensor([[3, 7]]))[0][0].tolist() == [3, 7, 9]  # 7 is of the prompt now
    rows = [{"inputs_pretokenized": "i like", "targets_pretokenized": ["tea"]}]
    module = "tasks.lambada.task.LAMBADA"
    beams = {"sampling_strategy": "BeamSearchStrategy", "num_beams": 3, "max_gen_length": 5, "use_task_mask": True}
    task = make_task_file(write(tmp_path, rows, type="gen", module=module, max_seq_length=64, **beams), Settings())
    found = answered(task, models["chatglm"])
    assert [figure.name for figure in task.figures(found)] == ["Accuracy"]
    assert " " not in found[0]["answer"]


# What files say ------------------------------------------------------------------------------------------------------


def test_rows_of_any_form(models: dict[str, Loaded], tmp_path: Path) -> None:
    big_bench = {"canary": "…", "examples": [{"input": "1 + 1 =", "target": "(A)"}, {"input": "2", "target": "(B)"}]}
    path = write(
        tmp_path,
        json.dumps(big_bench),
        "data/sums.json",
        type="gen",
        rows="examples",
        inputs="Q: {input}\nA:",
        targets="target",
        metrics=["EM"],
        answer=r"the answer is (.*?)\.",
    )
    items = make_task_file(path, Settings(limit=1)).items(models["chatglm3"])
    assert [(item.text, item.targets, item.where) for item in items] == [
        ("Q: 1 + 1 =\nA:", ["(A)"], "sums.json, item 1")
    ]

    clue = {"sentence1": "a", "sentence2": "b", "label": "1"}
    fields = {"inputs": "{sentence1}和{sentence2}：[MASK]", "choices": ["不同", "相同"], "labels": ["0", "1"]}
    items = make_task_file(write(tmp_path / "clue", [clue], type="mul", **fields), Settings()).items(models["chatglm3"])
    assert (items[0].text, items[0].choices, items[0].label) == ("a和b：[MASK]", ["不同", "相同"], 1)

    quiz = [{"q": "x", "options": ["1", "0"], "key": key} for key in ("B", "0", 1)]
    fields = {"inputs": "{q}", "choices": "options", "label": "key"}
    items = make_task_file(write(tmp_path / "quiz", quiz, type="mul", **fields), Settings()).items(models["chatglm3"])
    assert [item.label for item in items] == [1, 1, 1]  # a letter, a choice, a number


def test_groups_of_files(models: dict[str, Loaded], tmp_path: Path) -> None:
    row = {"inputs_pretokenized": "hello", "choices_pretokenized": ["tea", "rice"]}
    for name, count in (("stem/a.jsonl", 1), ("stem/b.jsonl", 3), ("other/c.jsonl", 2)):
        rows = [{**row, "label": number % 2} for number in range(count)]
        patterns = {"stem": "stem/*.jsonl", "rest": "other/*.jsonl"}
        path = write(tmp_path / "task", rows, f"data/{name}", type="mul", file_pattern=patterns)
    task = make_task(str(path), None, Settings())
    found = answered(task, models["glm"])
    assert [row["group"] for row in found] == ["stem"] * 4 + ["rest"] * 2
    right = [row["Accuracy"] for row in found]
    note = task.notes(found)["groups"]["stem"]
    assert note["Accuracy"]["average"] == pytest.approx(25 * sum(right[:4]))
    assert note["files"]["stem/b.jsonl"]["Accuracy"] == pytest.approx(100 * sum(right[1:4]) / 3, abs=1e-3)
    assert note["Accuracy"]["max"] == max(one["Accuracy"] for one in note["files"].values())
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(path.read_text())
    with pytest.raises(DataError, match="there is no folder"):
        make_task_file(elsewhere, Settings())
    assert len(make_task_file(elsewhere, Settings(extra={"data": str(path.parent)})).items(models["glm"])) == 6


def test_the_runner_writes_and_joins_units(models: dict[str, Loaded], tmp_path: Path) -> None:
    texts = ("tea", "i like tea", "hello world")
    row = {"choices_pretokenized": ["tea", "i like rice"], "label": 1}
    path = write(tmp_path, [{"inputs_pretokenized": text, **row} for text in texts * 8], type="mul")
    task = make_task(str(path), None, Settings(batch_size=1))
    whole = run(task, models["glm"], tmp_path / "whole", settings={})
    lines = (tmp_path / "whole" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 24
    cut = run(task, models["glm"], tmp_path / "cut", settings={}, limit=16)
    assert cut.items == 16
    assert whole.figures["Accuracy"].value == pytest.approx(
        100 * sum(json.loads(line)["answer"] for line in lines) / len(lines)
    )
    assert (tmp_path / "cut" / "predictions.jsonl").read_text().splitlines() == lines[:16]


def test_official_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "afqmc.yaml"
    path.write_text("name: 'AFQMC'\ntype: 'mul'\npath: 'CLUE/afqmc'\nmicro_batch_size: 16\n")
    said = read_task_file(path)
    assert (said.type, said.file_pattern, said.micro_batch_size) == ("mul", {"all": "**/*.json*"}, 16)
    path.write_text('name: "W"\ntype: "lm"\npath: "w"\nfile-pattern:\n  test: "**/wiki.test.tokens"\n'
                    "generation-length: 256\nuse_task_mask: true\n")  # fmt: skip
    said = read_task_file(path)
    assert (said.generation_length, said.use_task_mask) == (256, True)
    assert said.file_pattern == {"test": "**/wiki.test.tokens"}
    assert is_task_file(str(path))


def test_files_that_cannot_be_used_say_everything(tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(
        "name: x\ntype: mult\npath: data\nmax_seq_lenght: 5\nnum_beams: 0\nuse_task_mask: yes please\n"
        "module: tasks.pile.Pile\nfile-pattern: 3\n"
    )
    with pytest.raises(DataError) as caught:
        read_task_file(path)
    for part in ("max_seq_lenght is not known; did you mean max_seq_length?", "num_beams is 0; expected a whole",
                 "use_task_mask is 'yes please'; expected true or false", "file_pattern is 3"):  # fmt: skip
        assert part in caught.value.message
    path.write_text("name: x\ntype: lm\npath: d\nunidirectional: true\nmodule: a.Pile\nmetrics: [EM]\nanswer: '('\n")
    with pytest.raises(DataError) as caught:
        read_task_file(path)
    for part in ("Python code that is not run", "unidirectional needs use_task_mask", "type lm needs use_task_mask",
                 "metrics has 'EM'; type lm knows PPL", "answer is no regular expression"):  # fmt: skip
        assert part in caught.value.message
    path.write_text("- 1\n")
    with pytest.raises(DataError, match="no task file"):
        read_task_file(path)
    path.write_text("a: [\n")
    with pytest.raises(DataError, match="not valid YAML"):
        read_task_file(path)
    with pytest.raises(UsageError, match="shots"):
        make_task_file(path, Settings(shots=5))


@pytest.mark.parametrize(
    ("row", "fields", "said"),
    [
        ({"inputs_pretokenized": "a"}, {"type": "mul"}, "no field 'choices_pretokenized'"),
        ({"inputs_pretokenized": "a", "choices_pretokenized": ["b", "c"], "label": 2}, {"type": "mul"}, "label is 2"),
        ({"inputs_pretokenized": "a", "choices_pretokenized": ["b"], "label": 0}, {"type": "mul"}, "at least two"),
        ({"q": "a"}, {"type": "gen", "inputs": "{p}", "targets": "q"}, "no field 'p'; the row has 'q'"),
        ({"q": "a"}, {"type": "gen", "inputs": "{q}", "targets": "t"}, "no field 't'"),
        (5, {"type": "gen"}, "a row must be an object"),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    models: dict[str, Loaded], tmp_path: Path, row: Any, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=rf"val.jsonl:1: .*{said}"):
        make_task_file(write(tmp_path, [row], **fields), Settings()).items(models["glm"])


# Answers -------------------------------------------------------------------------------------------------------------


def test_answers_are_compared_as_words() -> None:
    assert words("The Eiffel-Tower, a  tower!") == ["eiffeltower", "tower"]
    assert words("他出生于 1911 年。") == ["他", "出", "生", "于", "1911", "年"]
    assert exact_match("A cat.", "the CAT") == 1
    assert f1("a red red cat", "red cat cat") == pytest.approx(2 * 2 / (3 + 3))
    assert f1("在北京大学", "北京") == pytest.approx(2 * 2 / (5 + 2))
    assert f1("", "x") == 0
    assert contains("it is new york, i think", "New York") == 1
    assert contains("it is york new", "new york") == 0
    assert rouge("a b c d", "x c d") == pytest.approx(2 * 2 / (3 + 3), abs=1e-6)  # "a" is an article
    assert best("F1", "cat", ["dog", "cat"]) == 1
    assert best("EM", "cat", []) == 0


def test_answers_are_cut_out() -> None:
    assert cut_out("\n yes \nno", stop=["\n"]) == "yes"
    assert cut_out("So the answer is (B). Yes, the answer is (C).", pattern=r"answer is (.*?)\.") == "(C)"
    assert cut_out("none", pattern="answer: (.*)") == "none"
    assert cut_out("door , and", first_word=True) == "door"
    assert cut_out("") == ""
