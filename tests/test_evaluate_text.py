"""Perplexity, last words and cloze tasks: families against sums made by hand, one batch size against another."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import glm130b_tiny
import glmkit
import tiny
import tiny_families
from glmkit.data.cloze import cloze_parts
from glmkit.data.cloze_patterns import TASKS
from glmkit.data.cloze_records import read_cloze
from glmkit.errors import DataError, UsageError
from glmkit.evaluate.cloze import classify
from glmkit.evaluate.cloze_task import make_cloze
from glmkit.evaluate.perplexity import perplexity, windows
from glmkit.evaluate.results import interval
from glmkit.evaluate.scoring import Frame, Passage, frame_of, score_passages
from glmkit.evaluate.tasks import Settings
from glmkit.evaluate.text import joined, make_lambada, make_perplexity, split_ids
from glmkit.loading import Loaded
from glmkit.tokenizers.glm import GLMChineseTokenizer

FAMILIES = ("chatglm", "chatglm2", "chatglm3", "glm4", "glm", "glm130b")
TEXT = "i like tea and rice . beijing is the capital of china , hello world ! " * 2


class Numbers:
    """A tokenizer of GLM-130B whose words are ids."""

    generation = 0
    prefix_ids = ()
    stop_ids = frozenset({88, 93})

    def get_command(self, name: str) -> int:
        return {"[MASK]": 89, "[gMASK]": 90, "sop": 92, "eop": 93}[name]

    def encode_text(self, text: str) -> list[int]:
        return [int(word) if word.isdigit() else sum(word.encode()) % 80 for word in text.split()]

    def decode_ids(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    folder = tmp_path_factory.mktemp("models")
    vocabulary = tiny.train_tokenizer(folder / "tokenizer.model")
    written = {
        "chatglm": tiny_families.write_chatglm(folder / "chatglm"),
        "chatglm2": tiny.write_model(folder / "chatglm2", vocabulary, generation=2),
        "chatglm3": tiny.write_model(folder / "chatglm3", vocabulary),
        "glm4": tiny_families.write_glm4(folder / "glm4"),
        "glm": tiny_families.write_glm(folder / "glm"),
    }
    found = {name: glmkit.load(path, device="cpu") for name, path in written.items()}
    model = glm130b_tiny.model()
    return found | {"glm130b": Loaded(model, Numbers(), None, model.config, Path("none"))}


def by_hand(name: str, loaded: Loaded, known: list[int], scored: list[int], closed: bool = False) -> list[float]:
    """-log p of each scored token, one call of the model for each, with masks and positions written out here."""
    model, tokenizer = loaded.model, loaded.tokenizer
    found = []
    for place, token in enumerate(scored):
        behind = scored[:place]
        if name in ("chatglm2", "chatglm3", "glm4"):
            inputs: dict[str, Any] = {"input_ids": [*tokenizer.get_prefix_tokens(), *known, *behind]}
        elif name == "chatglm":  # the model works masks and positions out as the official one does
            inputs = {"input_ids": [*known, tokenizer.gmask_token_id, tokenizer.bos_token_id, *behind]}
        elif name == "glm130b":
            row, length = [*known, 90, 92, *behind], len(known) + 1
            blocked = torch.ones(len(row), len(row), dtype=torch.bool).triu(1)
            blocked[:, :length] = False
            inputs = {"input_ids": row, "attention_mask": blocked[None, None], "position_ids": list(range(len(row)))}
        else:
            start = [tokenizer.cls_token_id, *known, tokenizer.mask_token_ids[0]]
            blank, start = len(start) - 1, start + [tokenizer.eos_token_id] * closed
            row = [*start, tokenizer.sop_token_id, *behind]
            first = [*range(len(start)), *[blank] * (len(behind) + 1)]
            second = [*[0] * len(start), *range(1, len(behind) + 2)]
            inputs = {"input_ids": row, "position_ids": [first, second], "attention_mask": torch.tensor([len(start)])}
        made = {key: torch.tensor(value)[None] if isinstance(value, list) else value for key, value in inputs.items()}
        with torch.no_grad():
            logits = model(**made).logits[0, -1].double()
        found.append(float(logits.logsumexp(0) - logits[token]))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_made_by_hand(models: dict[str, Loaded], name: str) -> None:
    loaded = models[name]
    ids = loaded.tokenizer.encode_text(TEXT)
    passages = [
        Passage(ids[:5], ids[5:9]),
        Passage([], ids[:3]),
        Passage(ids[:5], ids[9:10]),
        Passage(ids[:5], ids[3:4]),
    ]
    for closed in (False, True):
        frame = frame_of(loaded.tokenizer, closed=closed)
        found = score_passages(loaded.model, frame, passages, batch_size=3)
        for one, passage in zip(found, passages):
            wanted = by_hand(name, loaded, list(passage.known), list(passage.scored), closed)
            assert [-log for log in one.log_probabilities] == pytest.approx(wanted, abs=2e-4)
            assert len(one.likeliest) == len(passage.scored)


def test_passages_of_one_row_share_it(models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch) -> None:
    model = models["chatglm3"].model
    calls: list[tuple[int, ...]] = []
    plain = model.transformer.forward
    monkeypatch.setattr(
        model.transformer,
        "forward",
        lambda *a, input_ids, **k: (calls.append(input_ids.shape), plain(input_ids, *a, **k))[1],
    )
    letters = [Passage([10, 11, 12], [letter]) for letter in (20, 21, 22, 23)]
    found = score_passages(model, Frame((5,)), letters)
    assert calls == [(1, 4)]
    assert len({one.log_probabilities[0] for one in found}) == 4
    assert len({tuple(one.likeliest) for one in found}) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_perplexity_of_a_file(models: dict[str, Loaded], name: str, tmp_path: Path) -> None:
    loaded = models[name]
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    ids = loaded.tokenizer.encode_text(TEXT)
    figures = []
    for batch_size in (1, 4):
        task = make_perplexity(file, Settings(window=20, stride=8, batch_size=batch_size))
        items = task.items(loaded)
        rows = task.answer(loaded, items, 0)
        assert [token for item in items for token in item.scored] == ids  # each once
        assert all(len(item.known) == 12 for item in items[1:])
        figures.append([interval(figure).value for figure in task.figures(rows)])
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    losses = [loss for item in items for loss in by_hand(name, loaded, item.known, item.scored)]
    assert figures[1][0] == pytest.approx(math.exp(sum(losses) / len(ids)), rel=1e-4)
    assert figures[1][1] == pytest.approx(sum(losses) / math.log(2) / len(TEXT), rel=1e-4)
    assert task.notes(rows) == {"windows": len(items), "tokens": len(ids)}
    frame = frame_of(loaded.tokenizer)
    value = perplexity(
        loaded.model, ids, window=20, stride=8, prefix=frame.before, between=frame.between, batch_size=2
    ).value
    assert value == pytest.approx(figures[1][0], rel=1e-5)


def test_windows_score_every_token_once() -> None:
    for tokens in (1, 5, 6, 7, 23):
        for stride in range(1, 7):
            parts = windows(tokens, 6, stride)
            assert [place for part in parts for place in range(part.scored, part.last)] == list(range(tokens))
            assert all(part.last - part.first <= 6 for part in parts)
            assert [part.first for part in parts] == [stride * number for number in range(len(parts))]
    assert windows(0, 6, 2) == []


def test_without_control_tokens_the_first_of_a_window_is_known(models: dict[str, Loaded]) -> None:
    model = models["chatglm2"].model
    ids = list(range(10, 23))
    found = perplexity(model, ids, window=4)
    total, targets = 0.0, 0
    for start in range(0, 13, 4):
        part = torch.tensor([ids[start : start + 4]])
        if part.shape[1] > 1:
            loss, count = model.label_loss(part, part)
            total, targets = total + loss.item(), targets + count
    assert found.tokens == targets == 9
    assert found.loss_sum == pytest.approx(total, rel=1e-5)


def test_perplexity_refuses_what_it_cannot_do(models: dict[str, Loaded], tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("")
    with pytest.raises(DataError, match="has no text"):
        make_perplexity(file, Settings()).items(models["chatglm3"])
    with pytest.raises(DataError, match="no data file"):
        make_perplexity(tmp_path / "none.txt", Settings()).items(models["chatglm3"])
    file.write_text(TEXT)
    with pytest.raises(DataError, match="a window of 63 tokens: expected 1 to 62"):
        make_perplexity(file, Settings(window=63)).items(models["glm"])
    with pytest.raises(UsageError, match="shots"):
        make_perplexity(file, Settings(shots=5))
    with pytest.raises(UsageError, match="no token to score"):
        score_passages(models["chatglm3"].model, Frame(), [Passage([], [5])])


@pytest.mark.parametrize("name", FAMILIES)
def test_last_words(models: dict[str, Loaded], name: str, tmp_path: Path) -> None:
    loaded, rows = models[name], []
    file = tmp_path / "lambada.jsonl"
    lines = [
        {"text": "i like tea and rice"},
        {"inputs_pretokenized": "the capital of ", "targets_pretokenized": ["china"]},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    task = make_lambada(file, Settings(batch_size=2))
    items = task.items(loaded)
    rows = task.answer(loaded, items, 0)
    assert [row["target"] for row in rows] == ["rice", "china"]
    assert [row["id"] for row in rows] == ["lambada.jsonl:1", "lambada.jsonl:2"]
    whole = loaded.tokenizer.encode_text("i like tea and rice")
    assert [*items[0].known, *items[0].scored] == whole
    for item, row in zip(items, rows):
        assert row["loss"] == pytest.approx(sum(by_hand(name, loaded, item.known, item.scored, True)), abs=1e-3)
    accuracy, word = (interval(figure).value for figure in task.figures(rows))
    assert word == pytest.approx(math.exp(sum(row["loss"] for row in rows) / 2))
    assert accuracy == 50 * sum(row["correct"] for row in rows)


def test_a_word_is_right_if_all_its_tokens_are_the_likeliest(models: dict[str, Loaded], tmp_path: Path) -> None:
    loaded = models["glm4"]
    known = loaded.tokenizer.encode_text("i like")
    best: list[int] = []
    for _ in range(2):
        best += score_passages(loaded.model, frame_of(loaded.tokenizer), [Passage([*known, *best], [0])])[0].likeliest
    scored = score_passages(
        loaded.model, frame_of(loaded.tokenizer), [Passage(known, best), Passage(known, [best[0], 7])]
    )
    assert scored[0].likeliest == best
    assert scored[1].likeliest == [best[0], best[1]] != [best[0], 7]


def test_a_long_passage_loses_its_beginning(models: dict[str, Loaded], tmp_path: Path) -> None:
    file = tmp_path / "passages.txt"
    file.write_text("tea and rice " * 40 + "world\n\nhello world\n")
    first, second = make_lambada(file, Settings()).items(models["glm"])
    assert len(first.known) + len(first.scored) == 64 - 4 + 1  # [CLS] [MASK] eos sop, and the last token is not read
    assert second.known == models["glm"].tokenizer.encode_text("hello")
    assert len(make_lambada(file, Settings(limit=1)).items(models["glm"])) == 1
    file.write_text("alone\n")
    with pytest.raises(DataError, match=r"passages.txt:1: 'alone' has no last word"):
        make_lambada(file, Settings()).items(models["glm"])


def test_texts_are_split_as_running_text(models: dict[str, Loaded]) -> None:
    tokenizer = models["chatglm3"].tokenizer
    for passage, rest in (("I like tea and", " rice"), ("你好，今天", "天气"), ("", "tea"), ("hello wor", "ld")):
        known, scored = split_ids(tokenizer, passage, rest)
        assert [*known, *scored] == tokenizer.encode_text(passage + rest)
        assert scored
    assert joined("Answer:", "A") == " A"
    assert joined("答案：", "A") == "A"
    assert joined("one ", "two") == "two"
    assert joined("one", "。") == "。"
    assert joined("", "A") == "A"


# Cloze tasks ----------------------------------------------------------------------------------------------------------


def cloze_file(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> Path:
    folder = folder / name
    folder.mkdir()
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_cloze_tasks_of_a_folder(models: dict[str, Loaded], tmp_path: Path) -> None:
    loaded = models["glm"]
    texts = ("tea", "rice", "i like tea", "i like rice", "china")
    rows = [
        {"premise": one, "question": "cause", "choice1": "tea", "choice2": "hello world", "label": number % 2}
        for number, one in enumerate(texts)
    ]
    task = make_cloze(cloze_file(tmp_path, "COPA", rows), Settings(batch_size=2, extra={"pattern": 1}))
    assert task.name == "cloze"
    items = task.items(loaded)
    found = task.answer(loaded, items, 0)
    wanted = classify(loaded.model, loaded.tokenizer, "copa", items, pattern_id=1, batch_size=5)
    assert [row["answer"] for row in found] == wanted
    assert [row["label"] for row in found] == [0, 1, 0, 1, 0]
    assert all(len(row["scores"]) == 2 and row["scores"][row["answer"]] == max(row["scores"]) for row in found)
    right = sum(answer == row["label"] for answer, row in zip(wanted, rows))
    assert interval(task.figures(found)[0]).value == pytest.approx(100 * right / 5)


def test_figures_of_judged_answers(tmp_path: Path) -> None:
    passage = {"text": "tea", "questions": [{"question": "tea", "answers": [{"text": "tea", "label": 1}]}]}
    task = make_cloze(cloze_file(tmp_path, "MultiRC", [{"passage": passage}]), Settings())
    judged = [("q1", 1, 1), ("q1", 0, 1), ("q2", 1, 1), ("q2", 0, 0), ("q3", 1, 0)]
    rows = [{"id": "a", "question": name, "label": label, "answer": answer} for name, label, answer in judged]
    accuracy, f1 = (interval(figure).value for figure in task.figures(rows))
    assert accuracy == pytest.approx(60)
    assert f1 == pytest.approx(100 * 2 * 2 / (3 + 3))
    assert task.notes(rows)["exact_match"] == pytest.approx(100 / 3, abs=1e-4)
    assert task.notes(rows)["chosen"] == {"0": 2, "1": 3}
    cb = make_cloze(cloze_file(tmp_path, "CB", []), Settings())
    rows = [{"label": label, "answer": answer} for label, answer in ((0, 0), (0, 1), (1, 1), (2, 2))]
    assert cb.notes(rows)["macro_f1"] == pytest.approx(100 * (2 / 3 + 2 / 3 + 1) / 3, abs=1e-3)


def test_cloze_tasks_say_what_is_wrong(models: dict[str, Loaded], tmp_path: Path) -> None:
    folder = cloze_file(tmp_path, "RTE", [{"premise": "tea", "hypothesis": "rice", "label": "entailment"}])
    with pytest.raises(DataError, match=r"as GLM \(2021\) does; this is ChatGLM2"):
        make_cloze(folder, Settings()).items(models["chatglm3"])
    with pytest.raises(UsageError, match="no pattern 9 of rte; expected one from 0 to 4"):
        make_cloze(folder, Settings(extra={"pattern": 9}))
    with pytest.raises(UsageError, match="does not know patern"):
        make_cloze(folder, Settings(extra={"patern": 1}))
    with pytest.raises(UsageError, match="not known which one this is"):
        make_cloze(tmp_path, Settings())
    with pytest.raises(DataError, match=r"expected one of dev_public.jsonl"):
        make_cloze(tmp_path, Settings(extra={"name": "rte"}))
    assert make_cloze(folder, Settings(extra={"name": "ax-b"})).task == "ax-b"


def test_files_of_fewclue_are_read(tmp_path: Path) -> None:
    rows = {
        "eprstmt": {"id": 1, "sentence": "很好用", "label": "Positive"},
        "ocnli": {"sentence1": "他在家", "sentence2": "他出门了", "label": "contradiction", "level": "easy"},
        "bustm": {"sentence1": "几点了", "sentence2": "现在几点", "label": "1"},
        "csl": {"abst": "本文讨论水稻", "keyword": ["水稻", "育种"], "label": "0"},
        "chid": {"content": "他#idiom#地走了", "candidates": [f"甲乙丙{n}" for n in range(7)], "answer": 3},
    }
    shown = {}
    for name, row in rows.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "dev_few_all.json").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
        task = make_cloze(folder, Settings())
        assert task.task == name
        [example] = read_cloze(task.path, name)
        first, second = cloze_parts(name, example)
        shown[name] = ("".join([*first, *second]), TASKS[name].labels.index(example.label))
    assert shown == {
        "eprstmt": ("很好用总之，感觉[MASK]。", 1),
        "ocnli": ("他在家？[MASK]，他出门了", 0),
        "bustm": ("几点了？你是说现在几点？[MASK]。", 1),
        "csl": ("摘要：本文讨论水稻关键词：水稻，育种，[MASK]准确。", 0),
        "chid": ("他[MASK]地走了", 3),
    }


def test_words_of_fewclue_are_single_tokens(shared: Path) -> None:
    tokenizer = GLMChineseTokenizer(shared / "tokenizers" / "cog-pretrain" / "cog-pretrain.model")
    for name in ("eprstmt", "ocnli", "bustm", "csl"):
        for pattern in TASKS[name].patterns:
            ids = [tokenizer.encode_with_masks(word) for word in (pattern.words or {}).values()]
            assert all(len(one) == 1 for one in ids)
            assert len({one[0] for one in ids}) == len(ids)
