"""The ADGEN metric: the stored figures to 4 decimals, its quirks, and agreement with the packages it replaces."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

jieba = pytest.importorskip("jieba")

from glmkit.errors import UsageError  # noqa: E402
from glmkit.evaluate import adgen  # noqa: E402
from glmkit.evaluate.adgen import METRICS, answer_text, score, score_pair  # noqa: E402
from glmkit.evaluate.rouge import bleu_4, longest_common_subsequence, rouge_l, rouge_n, words_of  # noqa: E402
from glmkit.tokenizers import ChatGLMTokenizer  # noqa: E402
from tiny import train_tokenizer  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _segment_once() -> Iterator[None]:
    """Cutting text into words is nearly all of the time, and the labels come again in every test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adgen, "_segment", functools.cache(adgen._segment))
        yield


def _adgen(shared: Path, name: str) -> dict:
    return json.loads((shared / "data" / "adgen" / name).read_text())


def _dev(shared: Path) -> list[dict]:
    return [json.loads(line) for line in (shared / "data" / "adgen" / "dev.json").open()]


def test_public_pairs_are_exact(shared: Path) -> None:
    stored = _adgen(shared, "adgen_metric_public.json")
    pairs = stored["pairs"]
    for pair in pairs:
        assert score_pair(pair["prediction"], pair["label"]) == pytest.approx(pair["scores"], abs=1e-9)
    means = score([pair["prediction"] for pair in pairs], [pair["label"] for pair in pairs])
    assert means.pop("empty") == 0
    assert means == pytest.approx(stored["mean"], abs=1e-9)


def test_edge_cases_are_exact_and_empty_texts_score_nothing(shared: Path) -> None:
    for case in _adgen(shared, "adgen_metric_edge_cases.json")["cases"]:
        found = score_pair(case["prediction"], case["label"])
        if "scores" in case and isinstance(case["scores"], dict):
            assert found == pytest.approx(case["scores"], abs=1e-9), case["name"]
        else:
            assert found is None, case["name"]


PREDICTORS = {
    "shift_by_one": lambda rows: [rows[(index + 1) % len(rows)]["summary"] for index in range(len(rows))],
    "drop_third_clause": lambda rows: [_drop_third_clause(row["summary"]) for row in rows],
    "content_as_prediction": lambda rows: [row["content"] for row in rows],
    "first_64_chars": lambda rows: [row["summary"][:64] for row in rows],
}


def _drop_third_clause(text: str) -> str:
    clauses = re.findall(r"[^，。！？；、]*[，。！？；、]|[^，。！？；、]+$", text)
    return "".join(clause for number, clause in enumerate(clauses, start=1) if number % 3)


@pytest.mark.parametrize("name", PREDICTORS)
def test_means_over_all_dev_records_are_exact(shared: Path, name: str) -> None:
    rows = _dev(shared)
    corpora = _adgen(shared, "adgen_metric_full_dev.json")["corpora"]
    stored = next(value for key, value in corpora.items() if key.startswith(name))
    means = score(PREDICTORS[name](rows), [row["summary"] for row in rows])
    assert {key: means[key] for key in METRICS} == pytest.approx(stored, abs=1e-4)


def test_identical_text_is_one_hundred_and_empty_is_counted() -> None:
    text = "这件上衣版型宽松，穿着很舒适。"
    assert score([text], [text]) == pytest.approx(dict.fromkeys(METRICS, 100) | {"empty": 0}, abs=1e-4)
    half = score([text, "  "], [text, text])
    assert half["empty"] == 1
    assert half["bleu-4"] == pytest.approx(50, abs=1e-4)
    assert score([""], [text]) == dict.fromkeys(METRICS, 0) | {"empty": 1}


def test_numbers_worked_out_by_hand() -> None:
    # Sets {a, b} and {a, c}: one of two in common, so F = 1/2; "a a" counts once.
    assert rouge_n("a a b".split(), "a c".split(), 1) == pytest.approx(0.5, abs=1e-7)
    # Common subsequence "a b d" of lengths 4 and 3: P = 3/4, R = 1.
    assert rouge_l("a b c d".split(), "a b d".split()) == pytest.approx(2 * 0.75 / 1.75, abs=1e-7)
    # Unigrams 2/2, bigrams 0/1 -> 1/2, none of order 3 and 4 -> 1/4 and 1/8; no brevity penalty at equal length.
    assert bleu_4("ab", "ba") == pytest.approx((1 * 1 / 2 * 1 / 4 * 1 / 8) ** 0.25)
    assert bleu_4("x", "ab") == 0


def test_sentences_of_blanks_count_as_an_empty_word() -> None:
    assert words_of("好\n  \n坏") == ["好", "", "坏"]
    assert words_of("   ") == []


def test_a_longest_common_subsequence_equals_the_plain_table() -> None:
    chance = random.Random(3)
    for _ in range(200):
        first = [chance.choice("abcd") for _ in range(chance.randint(0, 90))]
        second = [chance.choice("abcde") for _ in range(chance.randint(0, 90))]
        table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, x in enumerate(first):
            for j, y in enumerate(second):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert longest_common_subsequence(first, second) == table[-1][-1]


@pytest.mark.parametrize("generation", [2, 3])
def test_ids_of_the_padded_vocabulary_are_no_text(tmp_path: Path, generation: int) -> None:
    tokenizer = ChatGLMTokenizer(train_tokenizer(tmp_path / "tokenizer.model"), generation=generation)
    ids = tokenizer.encode_text("hello")
    assert answer_text(tokenizer, [*ids, tokenizer.vocab_size + 3]) == "hello"


def test_different_numbers_of_texts_are_refused() -> None:
    with pytest.raises(UsageError, match="2 predictions and 1 labels"):
        score(["a", "b"], ["a"])


def test_agrees_with_the_packages_on_random_texts() -> None:
    packaged = pytest.importorskip("rouge_chinese")
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    chance = random.Random(11)
    pieces = [*"这件上衣裤子的，。！？?、…”’“ \n.", "......", "……", "版型", "宽松", "abc", "，", " ", "BRAND", "<UNK>"]
    for _ in range(400):
        prediction, label = ("".join(chance.choices(pieces, k=chance.randint(1, 60))) for _ in range(2))
        ours = score_pair(prediction, label)
        words = [" ".join(jieba.cut(text)) for text in (prediction, label)]
        try:
            theirs = packaged.Rouge().get_scores(*words)[0]
        except ValueError:
            assert ours is None
            continue
        smoothing = bleu.SmoothingFunction().method3
        expected = {name: round(value["f"] * 100, 4) for name, value in theirs.items()}
        value = bleu.sentence_bleu([list(label)], list(prediction), smoothing_function=smoothing)
        expected["bleu-4"] = round(value * 100, 4)
        assert ours == pytest.approx(expected, abs=1.01e-4)
