"""C-Eval, CMMLU and MMLU: the data, which token is a letter, batches against one question at a time, the averages."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import glm130b_tiny
import glmkit
import tiny
import tiny_families
from glmkit.chat.messages import Message
from glmkit.chat.templates import conversation_ids
from glmkit.errors import DataError, GenerationError, UsageError
from glmkit.evaluate import choice
from glmkit.evaluate.asking import Asked, form_of, letter_ids, open_ids
from glmkit.evaluate.choice import make_ceval, make_cmmlu, make_mmlu
from glmkit.evaluate.choice_data import read_exam
from glmkit.evaluate.results import read_rows
from glmkit.evaluate.run import run
from glmkit.evaluate.scoring import Scored
from glmkit.evaluate.subjects import CEVAL, CMMLU, MMLU
from glmkit.evaluate.tasks import Settings
from glmkit.families import find_family
from glmkit.loading import Loaded
from glmkit.tokenizers.chatglm import ChatGLM1Tokenizer
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer
from glmkit.tokenizers.glm import GLMBertTokenizer
from glmkit.tokenizers.glm4 import ChatGLM4Tokenizer

LETTERS = "ABCD"
SUBJECTS = {"law": "Humanities", "logic": "Humanities", "college_physics": "STEM"}
TEXTS = [
    "hello world, how are you?",
    "今天天气很好。",
    "1 + 2",
    "I like tea",
    "tea and rice",
    "I like rice and tea, 你好",
]
LOADED = ("chatglm", "chatglm2", "chatglm3", "glm4", "glm", "glm130b")


class LetterTokenizer:
    """As much of GLM-130B's tokenizer as questions need, for the small model whose weights are stored."""

    generation = 0
    vocab_size = 88
    stop_ids = frozenset(glm130b_tiny.IDS["eos_token_id"])

    def encode_text(self, text: str) -> list[int]:
        return [1 + LETTERS.find(word) if word in LETTERS else 5 + sum(word.encode()) % 80 for word in text.split()]

    def get_command(self, name: str) -> int:
        return {"sop": 92, "[MASK]": 89, "[gMASK]": 90}[name]

    def fill_prompt(self, text: str) -> list[int]:
        text, mask = (text.removesuffix("[MASK]"), 89) if text.endswith("[MASK]") else (text, 90)
        return [*self.encode_text(text), mask]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """A random model of each family whose vocabulary has the letters."""
    folder = tmp_path_factory.mktemp("choice")
    more = ["A B C D 答案：A 答案是：B Answer: C 以下是关于中国考试的单项选择题，请选出其中的正确答案。问：答："] * 20
    more += list(LETTERS) * 100  # or some letters share a piece with the blank in front, and others do not
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "_CORPUS", tiny._CORPUS + more)
        patch.setattr(tiny_families, "_CORPUS", tiny_families._CORPUS + more)
        patch.setattr(tiny_families, "_WORDS", [*tiny_families._WORDS, *"a b c d answer : hello how are you".split()])
        words = tiny.train_tokenizer(folder / "tokenizer.model")
        tiny_families.write_chatglm(folder / "chatglm", max_sequence_length=1024)
        tiny.write_model(folder / "chatglm2", words, generation=2, rope_ratio_applies_to="position", seq_length=1024)
        tiny.write_model(folder / "chatglm3", words, generation=3, seq_length=1024)
        tiny_families.write_glm4(folder / "glm4", seq_length=2048)
        tiny_families.write_glm(folder / "glm", max_sequence_length=256)
    for name in LOADED[:-1]:
        found[name] = glmkit.load(folder / name, dtype="float32", device="cpu")
    network = glm130b_tiny.model()
    tokenizer: Any = LetterTokenizer()
    found["glm130b"] = Loaded(network, tokenizer, None, network.config, folder)
    for name in ("chatglm2", "chatglm3", "glm4"):  # louder, so that a difference in a position moves the letters
        with torch.no_grad():
            for parameter in found[name].model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8)
    return found


def rows_of(subject: str, count: int = 3) -> list[tuple[str, str, str]]:
    """Question, options joined by a bar, letter."""
    start = list(SUBJECTS).index(subject) if subject in SUBJECTS else 0
    texts = [" ".join(TEXTS[: 1 + (start + number) % len(TEXTS)]) for number in range(count)]
    return [(text, "tea|rice|1|2", LETTERS[(start + number) % 4]) for number, text in enumerate(texts)]


def write_jsonl(folder: Path) -> Path:
    """C-Eval as Tsinghua passes it on."""
    for subject, category in SUBJECTS.items():
        file = folder / "val" / category / f"{subject}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for number, (question, options, letter) in enumerate(rows_of(subject)):
            shown = [f"{name}. {option}" for name, option in zip(LETTERS, options.split("|"))]
            row = {
                "id": number,
                "inputs_pretokenized": "\n".join([question, *shown]),
                "choices_pretokenized": [f" {name}" for name in LETTERS],
                "label": LETTERS.index(letter),
                "targets_pretokenized": [letter],
            }
            lines.append(json.dumps(row, ensure_ascii=False))
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_csv(folder: Path, kind: str, splits: Sequence[str] = ("dev", "val", "test")) -> Path:
    """The three benchmarks' own files."""
    for split in splits:
        (folder / split).mkdir(parents=True, exist_ok=True)
        for subject in SUBJECTS:
            lines = {"ceval": ["id,question,A,B,C,D,answer"], "cmmlu": [",Question,A,B,C,D,Answer"], "mmlu": []}[kind]
            for number, (question, options, letter) in enumerate(rows_of(subject, 5 if split == "dev" else 3)):
                cells = [
                    f'"{split[:3]} {question}"' if split == "dev" else f'"{question}"',
                    *options.split("|"),
                    letter,
                ]
                lines.append(",".join(cells if kind == "mmlu" else [str(number), *cells]))
            name = f"{subject}.csv" if kind == "cmmlu" else f"{subject}_{split}.csv"
            (folder / split / name).write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return folder


def zipped(folder: Path) -> Path:
    target = folder.with_suffix(".zip")
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(folder.rglob("*.csv")):
            archive.write(file, f"data/{file.relative_to(folder)}")
            archive.write(file, f"__MACOSX/data/._{file.name}")
    return target


# --- data ---


def test_every_form_gives_the_same_questions(tmp_path: Path) -> None:
    wanted = [
        (subject, f"{question}\nA. tea\nB. rice\nC. 1\nD. 2", LETTERS.index(letter))
        for subject in sorted(SUBJECTS)
        for question, _, letter in rows_of(subject)
    ]
    forms = [write_jsonl(tmp_path / "tsinghua"), tmp_path / "tsinghua" / "val"]
    forms += [write_csv(tmp_path / kind, kind) for kind in ("ceval", "cmmlu", "mmlu")]
    forms.append(zipped(tmp_path / "mmlu"))
    for form in forms:
        exam = read_exam(form, "val")
        assert [(one.subject, one.text, one.answer) for one in exam.questions] == wanted, form
        assert set(exam.examples) == (set() if "tsinghua" in str(form) else set(SUBJECTS))
        assert all(len(examples) == 5 and "dev " in examples[0].text for examples in exam.examples.values())
    alone = read_exam(tmp_path / "tsinghua" / "val" / "STEM" / "college_physics.jsonl", "val").questions
    assert [(one.subject, one.text, one.answer) for one in alone] == wanted[:3]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "val/law.jsonl",
            '{"inputs_pretokenized": "q", "label": 0, "targets_pretokenized": [""]}',
            "only a placeholder",
        ),
        ("val/law.jsonl", '{"inputs_pretokenized": "q", "label": 4}', "law.jsonl:1 has the label 4"),
        ("val/law.jsonl", '{"inputs_pretokenized": "q", "label": true}', "label True"),
        ("val/law.jsonl", '{"question": "q"}', "law.jsonl:1 is no question"),
        ("val/law.jsonl", '{"inputs_pretokenized": "q", "label": 0, "choices_pretokenized": [" A", " B"]}', "options"),
        ("val/law.csv", "id,question,A,B,C,D\n0,q,1,2,3,4", "no column of answers"),
        ("val/law.csv", "q,1,2,3,4,E", "law.csv:1 has the answer 'E'"),
        ("val/law.csv", "q,1,2,3,4,AB", "the answer 'AB'"),
        ("val/law.csv", "q,1,2,3,4,A\nq,1,2,A", "law.csv:2 has 4 columns"),
        ("test/law.csv", "q,1,2,3,4,A", "has files of test only; expected questions of 'val'"),
        ("val/law.txt", "q", "no .csv or .jsonl files"),
    ],
)
def test_data_that_is_refused(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(said)):
        read_exam(tmp_path, "val")


def test_a_subject_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    for category in ("STEM", "Other"):
        (tmp_path / "val" / category).mkdir(parents=True)
        (tmp_path / "val" / category / "law.csv").write_text("q,1,2,3,4,A\n")
    with pytest.raises(DataError, match="law is there twice"):
        read_exam(tmp_path, "val")


def test_the_published_data(shared: Path) -> None:
    exam = read_exam(shared / "data" / "ceval", "val")
    assert (len(exam.questions), {one.subject for one in exam.questions}) == (1346, set(CEVAL))
    assert all(one.category == CEVAL[one.subject].category for one in exam.questions)
    exam = read_exam(shared / "data" / "mmlu" / "mmlu.zip", "test")
    assert (len(exam.questions), {one.subject for one in exam.questions}) == (14042, set(MMLU))
    assert {len(examples) for examples in exam.examples.values()} == {5}


def test_the_tables_are_whole() -> None:
    assert (len(CEVAL), len(CMMLU), len(MMLU)) == (52, 67, 57)
    assert sum("hard" in one.marks for one in CEVAL.values()) == 8
    assert sum("China specific" in one.marks for one in CMMLU.values()) == 15
    counts = [[one.category for one in MMLU.values()].count(name) for name in ("STEM", "Humanities", "Social Science")]
    assert counts == [18, 13, 12]


# --- letters ---


def test_which_token_is_a_letter(shared: Path) -> None:
    """With the official vocabularies: 316 is "▁A" and 30938 is "A", 167 and 135 those of ChatGLM-6B."""
    folder = shared / "tokenizers"
    words = folder / "chatglm2-chatglm3.tokenizer.model"
    two, three = (ChatGLMTokenizer(words, generation=generation) for generation in (2, 3))
    one = ChatGLM1Tokenizer(folder / "chatglm-6b.ice_text.model")
    four = ChatGLM4Tokenizer(folder / "glm4" / "tokenizer.model")
    bert = GLMBertTokenizer(folder / "glm-bert" / "bert-large-uncased-vocab.txt")
    chinese, english = Asked("问题\n答案："), Asked("question\nAnswer:", joint=" ")

    def letters(tokenizer: Any, form: Any, asked: Asked) -> list[int]:
        return letter_ids(tokenizer, form, asked, LETTERS)[1]

    for asked in (chinese, english):  # an answer of its own
        assert letters(two, "chat", asked) == letters(three, "chat", asked) == [316, 347, 319, 367]
        assert letters(one, "chat", asked) == [167, 333, 251, 416]
        assert letters(four, "chat", asked) == [32, 33, 34, 35]
    for tokenizer in (two, three):  # going on within a text
        assert letters(tokenizer, "text", chinese) == [30938, 30949, 30942, 30952]
        assert letters(tokenizer, "text", english) == [316, 347, 319, 367]
    assert letters(four, "text", english)[0] == 362
    assert letters(bert, "blank", english) == [1037, 1038, 1039, 1040]
    assert letter_ids(three, "chat", chinese, LETTERS)[0] == [
        *open_ids(three, "chat", chinese),
        *three.encode_text("\n"),
    ], "ChatGLM3 answers behind its header line"
    assert letter_ids(two, "chat", chinese, LETTERS)[0] == two("[Round 1]\n\n问：问题\n答案：\n\n答：")["input_ids"]
    with pytest.raises(DataError, match="not one token each"):
        letter_ids(two, "chat", chinese, ("A", "上衣材质棉"))
    with pytest.raises(DataError, match="mask token of its own"):
        letter_ids(bert, "blank", Asked("what is [MASK]?"), LETTERS)


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "chatglm3", "glm4"])
def test_a_letter_stands_where_training_has_it(families: dict[str, Loaded], name: str) -> None:
    """Prompt and letter are the ids of a conversation to learn from, but for the mark at its end."""
    tokenizer: Any = families[name].tokenizer
    asked = Asked("I like tea\nAnswer:", (("rice\nAnswer:", "C"),), "hello world", " ")
    prompt, letters = letter_ids(tokenizer, "chat", asked, LETTERS)
    for letter, token in zip(LETTERS, letters):
        learnt, _ = conversation_ids(tokenizer, [*asked.messages(), Message("assistant", letter)])
        assert [*prompt, token] == learnt[:-1]


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "chatglm3", "glm4"])
def test_a_text_goes_on_with_the_letter(families: dict[str, Loaded], name: str) -> None:
    """Prompt and letter are the ids of the whole text; ChatGLM-6B closes the text before its answer."""
    tokenizer: Any = families[name].tokenizer
    asked = Asked("I like tea\nAnswer:", (("rice\nAnswer:", "C"),), "hello world", " ")
    text = "hello world\n\nrice\nAnswer: C\n\nI like tea\nAnswer:"
    prompt, letters = letter_ids(tokenizer, "text", asked, LETTERS)
    for letter, token in zip(LETTERS, letters):
        if name == "chatglm":
            wanted = [*tokenizer.encode_text(text), tokenizer.gmask_token_id, tokenizer.bos_token_id]
            wanted += tokenizer.encode_text(letter)
        else:
            wanted = [*tokenizer.prefix_ids, *tokenizer.encode_text(f"{text} {letter}")]
        assert [*prompt, token] == wanted


def test_base_models_are_asked_in_text(families: dict[str, Loaded]) -> None:
    three = families["chatglm3"]
    base, chat = (replace(three, family=find_family(name)) for name in ("chatglm3-6b-base", "chatglm3-6b"))
    assert [form_of(one) for one in (three, base, chat, families["glm"])] == ["chat", "text", "chat", "blank"]
    assert [form_of(base, "chat"), form_of(chat, "text")] == ["chat", "text"]
    for loaded, wanted in ((chat, "prose"), (families["glm"], "chat")):
        with pytest.raises(UsageError, match=wanted):
            form_of(loaded, wanted)


# --- answers ---


def by_hand(loaded: Loaded, ids: Sequence[int], letters: Sequence[int]) -> list[float]:
    """The log-probabilities of letters behind a prompt that is alone, and all of its logits made."""
    model: Any = loaded.model
    given = {}
    if hasattr(model, "input_layout"):
        rows = torch.tensor([list(ids)])
        given = model.input_layout(rows, torch.zeros(1, dtype=torch.int64)).prompt(0, len(ids))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(ids)]), **given).logits[0, -1].float()
    return [float(logits.log_softmax(-1)[letter]) for letter in letters]


@pytest.mark.parametrize("name", LOADED)
def test_a_batch_gives_the_letters_of_one_question_at_a_time(
    tmp_path: Path, families: dict[str, Loaded], name: str
) -> None:
    """Rows of different lengths, padded on the left, against calls of the model without padding."""
    loaded = families[name]
    task = make_mmlu(str(write_csv(tmp_path, "mmlu")), Settings(batch_size=4, shots=0 if name == "glm" else 1))
    items = task.items(loaded)
    counted: list[int] = []
    rows = task.answer(loaded, items, 0, counted.append)
    lengths = set()
    for row, item in zip(rows, items):
        known = MMLU.get(item.question.subject)
        asked = Asked(
            f"{item.question.text}\nAnswer:",
            tuple((f"{one.text}\nAnswer:", LETTERS[one.answer]) for one in item.examples),
            "The following are multiple choice questions (with answers) about "
            f"{known.title if known else item.question.subject.replace('_', ' ')}.",
            " ",
        )
        ids, letters = letter_ids(loaded.tokenizer, form_of(loaded), asked, LETTERS)
        assert row["shots"] == len(asked.examples)
        lengths.add(len(ids))
        logs = by_hand(loaded, ids, letters)
        assert row["logprobs"] == pytest.approx(logs, abs=2e-4)
        assert row["answer"] == LETTERS[logs.index(max(logs))]
        assert row["right"] == (row["answer"] == LETTERS[item.question.answer])
    assert len(lengths) > 2, "nothing is padded"
    assert len({tuple(row["logprobs"]) for row in rows}) > 5
    assert counted[-1] == len(items)


def test_thoughts_first_then_a_letter(tmp_path: Path, families: dict[str, Loaded]) -> None:
    """The flow of the official script, written out: greedy tokens one by one, the text behind the question, the cue."""
    loaded = families["chatglm2"]
    model, tokenizer = loaded
    how = Settings(batch_size=4, method="chain-of-thought", max_new_tokens=5)
    task = make_ceval(str(write_jsonl(tmp_path)), how)
    items = task.items(loaded)
    rows = task.answer(loaded, items, 0)
    letters = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in LETTERS]
    if letters[0] == letters[1]:  # this small vocabulary may cut the blank off
        letters = [tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in LETTERS]
    for row, item in zip(rows, items):
        ids = list(tokenizer(f"[Round 1]\n\n问：{item.question.text}\n\n答：")["input_ids"])
        start = len(ids)
        for _ in range(5):
            with torch.no_grad():
                token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token in tokenizer.stop_ids:
                break
            ids.append(token)
        thoughts = tokenizer.decode([token for token in ids[start:] if token < tokenizer.vocab_size]).strip()
        assert row["thoughts"] == thoughts
        second = f"[Round 1]\n\n问：{item.question.text}{thoughts}\n综上所述，ABCD中正确的选项是：\n\n答："
        logs = by_hand(loaded, tokenizer(second)["input_ids"], letters)
        assert row["logprobs"] == pytest.approx(logs, abs=2e-4)
        assert row["answer"] == LETTERS[logs.index(max(logs))]
    assert len({row["thoughts"] for row in rows}) > 2


def test_thoughts_that_are_too_long_lose_their_beginning(tmp_path: Path, families: dict[str, Loaded]) -> None:
    """Question and cue stay whole, unlike in the official script; what is left is the end of the thoughts."""
    loaded = families["chatglm2"]
    task = make_ceval(str(write_jsonl(tmp_path)), Settings(method="chain-of-thought"))
    (item, *_) = task.items(loaded)
    thoughts = "hello world, " * 60 + "所以是 tea"
    whole = task._prompt(loaded, "chat", item, thoughts, None)
    bare = task._prompt(loaded, "chat", item, "", None)
    assert whole is not None
    assert bare is not None
    cut = task._prompt(loaded, "chat", item, thoughts, len(bare.ids) + 30)
    assert cut is not None
    assert len(bare.ids) < len(cut.ids) <= len(bare.ids) + 30 < len(whole.ids)
    text = loaded.tokenizer.decode_ids(cut.ids[len(loaded.tokenizer.prefix_ids) :])
    assert item.question.text in text
    assert text.endswith("所以是 tea\n综上所述，ABCD中正确的选项是：\n\n答：")
    assert task._prompt(loaded, "chat", item, thoughts, len(bare.ids) - 1) is None


def test_examples_are_left_out_where_the_context_is_short(tmp_path: Path, families: dict[str, Loaded]) -> None:
    loaded = families["chatglm3"]
    task = make_cmmlu(str(write_csv(tmp_path, "cmmlu")), Settings())
    items = task.items(loaded)
    (full,) = task.answer(loaded, items[:1], 0)
    assert full["shots"] == 5
    prompts = []
    for left in range(6):
        prompt = task._prompt(loaded, "chat", replace(items[0], examples=items[0].examples[left:]), None, None)
        assert prompt is not None
        prompts.append(prompt)
    sizes = [len(prompt.ids) for prompt in prompts]
    for room, shots in ((sizes[0], 5), (sizes[0] - 1, 4), (sizes[3], 2), (sizes[5], 0)):
        config = SimpleNamespace(max_position_embeddings=room)
        small: Any = SimpleNamespace(model=loaded.model, tokenizer=loaded.tokenizer, family=None, config=config)
        (row,) = task.answer(small, items[:1], 0)
        assert row["shots"] == shots
        left_over = prompts[5 - shots]  # the last examples, not the first
        assert row["logprobs"] == pytest.approx(by_hand(loaded, left_over.ids, left_over.letters), abs=2e-4)
    small.config.max_position_embeddings = sizes[5] - 1
    (row,) = task.answer(small, items[:1], 0)
    assert (row["answer"], row["right"], row["logprobs"]) == (None, 0, [])
    assert task.notes([full, row])["too_long"] == 1


def test_whoever_knows_the_answers_gets_all_of_them(
    tmp_path: Path, families: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Letters and labels belong together: knowing them gives 100 %, naming the next letter 0 %."""
    loaded = families["chatglm3"]
    task = make_ceval(str(write_csv(tmp_path, "ceval")), Settings(batch_size=2))
    items = task.items(loaded)
    for shift, share in ((0, 1.0), (1, 0.0)):

        def know(model: Any, frame: Any, passages: Sequence[Any], shift: int = shift, **_: Any) -> list[Scored]:
            found = []
            for number, _passage in enumerate(passages):
                right = (items[number // 4].question.answer + shift) % 4
                found.append(Scored([-0.5 if number % 4 == right else -2.0], [0]))
            return found

        monkeypatch.setattr(choice, "score_passages", know)
        rows = task.answer(loaded, items, 0)
        main = task.figures(rows)[0]
        assert main.name == "accuracy"
        assert sum(main.sums) / len(rows) == share
        assert task.notes(rows)["probability_of_a_letter"] == round(math.exp(-0.5) + 3 * math.exp(-2), 4)


def test_logits_that_are_no_numbers_are_refused(
    tmp_path: Path, families: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_ceval(str(write_csv(tmp_path, "ceval")), Settings())
    nothing = lambda model, frame, passages, **_: [Scored([math.nan], [0]) for _ in passages]  # noqa: E731
    monkeypatch.setattr(choice, "score_passages", nothing)
    with pytest.raises(GenerationError, match="not finite"):
        task.answer(families["chatglm3"], task.items(families["chatglm3"]), 0)


# --- what the answers say ---


def test_averages() -> None:
    """Computed by hand: 3 of 5 questions; the mean of subjects 1/3, 1 and 1; of categories 2/3 and 1/2; hard 1/3."""
    subjects = ["college_physics"] * 3 + ["law", "logic"]
    right = [1, 0, 0, 1, 1]
    rows = [
        {"subject": subject, "category": CEVAL[subject].category, "right": one} for subject, one in zip(subjects, right)
    ]
    figures = {figure.name: figure for figure in make_ceval("data", Settings()).figures(rows)}
    assert list(figures) == ["accuracy", "accuracy by subject", "accuracy by category", "accuracy (hard)"]

    def value(name: str) -> float:
        figure = figures[name]
        weights = figure.weights or [1.0] * len(rows)
        groups = figure.groups or [""] * len(rows)
        parts: dict[str, list[float]] = {}
        for total, weight, group in zip(figure.sums, weights, groups):
            part = parts.setdefault(group, [0.0, 0.0])
            part[0] += total
            part[1] += weight
        return sum(total / weight for total, weight in parts.values()) / len(parts)

    assert value("accuracy") == pytest.approx(3 / 5)
    assert value("accuracy by subject") == pytest.approx((1 / 3 + 1 + 1) / 3)
    assert value("accuracy by category") == pytest.approx((1 / 3 + 1) / 2)
    assert value("accuracy (hard)") == pytest.approx(1 / 3)


def test_through_the_runner(tmp_path: Path, families: dict[str, Loaded]) -> None:
    """Nine questions in units of eight, one process; the file says what the rows say."""
    data = write_csv(tmp_path / "data", "cmmlu")
    results = run(
        make_cmmlu(str(data), Settings(batch_size=1, shots=0)), families["chatglm2"], tmp_path / "out", settings={}
    )
    rows = read_rows(tmp_path / "out")
    assert len(rows) == results.items == 9
    assert results.figures["accuracy"].value == pytest.approx(100 * sum(row["right"] for row in rows) / 9)
    groups = results.figures["accuracy by subject"].groups
    assert groups is not None
    for subject in SUBJECTS:
        right = [row["right"] for row in rows if row["subject"] == subject]
        assert groups[subject] == pytest.approx(100 * sum(right) / 3)


# --- settings ---


def test_subjects_and_limit(tmp_path: Path, families: dict[str, Loaded]) -> None:
    data, loaded = str(write_jsonl(tmp_path)), families["chatglm3"]

    def asked(**how: Any) -> list[str]:
        return [
            f"{one.question.subject}/{one.question.number}" for one in make_ceval(data, Settings(**how)).items(loaded)
        ]

    assert asked(subjects=("law",)) == ["law/0", "law/1", "law/2"]
    assert asked(subjects=("law, logic",)) == [f"{name}/{number}" for name in ("law", "logic") for number in range(3)]
    assert asked(subjects=("humanities", "college physics"), limit=4) == [
        *(f"college_physics/{n}" for n in range(3)),
        "law/0",
    ]
    with pytest.raises(UsageError, match="college_physics"):
        asked(subjects=("colege_physics",))
    with pytest.raises(DataError, match="shots=1"):
        asked(shots=1)


def test_settings_that_are_refused(tmp_path: Path, families: dict[str, Loaded]) -> None:
    for how, said in (
        (Settings(method="guess"), "method='guess'"),
        (Settings(temperature=0.5), "temperature"),
        (Settings(method="chain-of-thought", shots=5), "shots"),
        (Settings(window=5), "window"),
        (Settings(extra={"spilt": "val"}), "spilt"),
        (Settings(extra={"split": "dev"}), "split='dev'"),
        (Settings(shots=-1), "shots=-1"),
    ):
        with pytest.raises(UsageError, match=said):
            make_ceval("data", how)
    data = str(write_jsonl(tmp_path))
    with pytest.raises(UsageError, match="asked as blank"):
        make_ceval(data, Settings(method="chain-of-thought")).items(families["glm"])
