"""Comparing evaluations: what is refused, what a paired difference is, and reports that stand alone."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import numpy as np
import pytest

from glmkit.errors import DataError, UsageError
from glmkit.evaluate import comparison
from glmkit.evaluate.comparison import compare, compared
from glmkit.evaluate.results import Results, interval, write_results
from glmkit.evaluate.tasks import Figure

ITEMS = 200


class Quiz:
    """A task whose rows say whether they are right, and a subject."""

    def figures(self, rows):
        right = [float(row["right"]) for row in rows]
        return [Figure("accuracy", right, groups=[row["subject"] for row in rows]), Figure("right", right)]


@pytest.fixture(autouse=True)
def quiz(monkeypatch):
    monkeypatch.setattr(comparison, "make_task", lambda name, data, how: Quiz())


def rows_of(right):
    return [
        {"label": f"item {number} <b>&", "answer": "|`", "right": bool(one), "subject": "ab"[number % 2]}
        for number, one in enumerate(right)
    ]


def write(folder, right, *, task="quiz", sha="1", settings=None, model="m"):
    folder.mkdir()
    rows = rows_of(right)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = {one.name: interval(one) for one in Quiz().figures(rows)}
    write_results(
        folder,
        Results(
            task=task, figures=figures, notes={}, model={"path": model, "weights": "0"}, adapter=None,
            settings=settings or {"shots": 5}, seed=None, command="glm evaluate", versions={},
            data={"path": "quiz.jsonl", "sha256": sha}, items=len(rows), rows_file="predictions.jsonl", processes=1,
            seconds=1.0, items_per_second=1.0,
        ),
    )  # fmt: skip
    return folder


@pytest.fixture
def answers():
    """Right answers of a model, and of one that also has 12 of 200 more and 2 fewer."""
    hard = np.random.default_rng(1).random(ITEMS) < 0.5
    first, second = hard.copy(), hard.copy()
    second[np.flatnonzero(~hard)[:12]] = True
    second[np.flatnonzero(hard)[:2]] = False
    return first, second


def test_a_paired_difference_is_narrower_than_the_intervals(tmp_path, answers):
    first, second = answers
    found = compared([write(tmp_path / "a", first), write(tmp_path / "b", second)])
    one = found.differences["right"][0]
    assert one.value == pytest.approx(100 * 10 / ITEMS)
    # Ten items more of 200: the variance of a mean of 14 numbers of size 1 among 200 gives +- 3.6 points.
    assert one.high - one.low == pytest.approx(2 * 1.96 * 100 * np.sqrt(14 / 200 - 0.05**2) / np.sqrt(200), rel=0.1)
    alone = found.results[0].figures["right"]
    assert alone.high - alone.low > 1.8 * (one.high - one.low)
    assert one.is_sure
    assert one.chance < 0.02


def test_a_model_does_not_differ_from_itself(tmp_path, answers):
    found = compared([write(tmp_path / "a", answers[0]), write(tmp_path / "b", answers[0])])
    one = found.differences["accuracy"][0]
    assert (one.value, one.low, one.high, one.chance, one.is_sure) == (0.0, 0.0, 0.0, 1.0, False)
    assert found.examples == [([], [])]


def test_examples_are_items_that_one_alone_has_right(tmp_path, answers):
    first, second = answers
    ((better, worse),) = compared([write(tmp_path / "a", first), write(tmp_path / "b", second)]).examples
    assert len(better) == 5
    assert all(not first[number] and second[number] for number, *_ in better)
    assert {number for number, *_ in worse} == set(np.flatnonzero(first & ~second).tolist())


@pytest.mark.parametrize(
    ("other", "message"),
    [({"task": "sums"}, "of sums: expected the same task"), ({"sha": "2"}, "measured with other data")],
)
def test_results_of_another_task_or_data_are_refused(tmp_path, answers, other, message):
    paths = [write(tmp_path / "a", answers[0]), write(tmp_path / "b", answers[1], **other)]
    with pytest.raises(UsageError, match=message):
        compare(paths, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_other_items_are_refused(tmp_path, answers):
    first = write(tmp_path / "a", answers[0])
    with pytest.raises(UsageError, match=r"200 items and .* has 100"):
        compare([first, write(tmp_path / "b", answers[1][:100])])
    other = write(tmp_path / "c", answers[1])
    file = other / "predictions.jsonl"
    file.write_text(file.read_text().replace("item 7 ", "item 8 "))
    with pytest.raises(UsageError, match=r"row 8 of .* is another item"):
        compare([first, other])


def test_windows_of_another_vocabulary_are_not_paired(tmp_path, answers):
    paths = [write(tmp_path / "a", answers[0]), write(tmp_path / "b", answers[1][:150])]
    for path, text_bytes in zip(paths, (66.0, 132.0)):
        window = {"tokens": 64, "bytes": text_bytes, "loss": 1.0}
        lines = [json.loads(line) | window for line in (path / "predictions.jsonl").open()]
        (path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    found = compared(paths)
    assert "cut into other windows" in found.unpaired
    assert (found.differences, found.examples) == ({}, [])


def test_one_folder_or_none_is_refused(tmp_path, answers):
    with pytest.raises(UsageError, match="1 results to compare"):
        compare([write(tmp_path / "a", answers[0])])
    with pytest.raises(DataError, match=r"there is no .*results\.json"):
        compare([tmp_path / "a", tmp_path])


class Checked(HTMLParser):
    """Elements that are open, and everything that would be loaded."""

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.seen = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_reports_are_whole_and_load_nothing(tmp_path, answers):
    paths = [
        write(tmp_path / "a", answers[0]),
        write(tmp_path / "b", answers[1], settings={"shots": 0}, model="<script>"),
        write(tmp_path / "c", answers[0]),
    ]
    text = compare(paths, tmp_path / "report")
    assert (tmp_path / "report" / "comparison.md").read_text() == text
    assert "| right | B - A | **+5** |" in text
    assert "| right | C - A | +0 |" in text
    assert "| shots | 5 | 0 | 5 |" in text
    parser = Checked()
    parser.feed((tmp_path / "report" / "comparison.html").read_text())
    assert parser.open == []
    assert parser.loaded == []
    assert "script" not in parser.seen
    assert parser.seen.count("svg") == 2 + 2 + 1  # figures, differences, groups


def test_rows_that_cannot_be_measured_again_still_have_their_values(tmp_path, answers, monkeypatch):
    def gone(name, data, how):
        raise DataError("there is no data file quiz.jsonl")

    monkeypatch.setattr(comparison, "make_task", gone)
    text = compare([write(tmp_path / "a", answers[0]), write(tmp_path / "b", answers[1])], tmp_path / "report")
    assert "No differences: the rows cannot be measured again here: there is no data file quiz.jsonl" in text
    assert "| accuracy (more is better) |" in text
    assert "No differences" in (tmp_path / "report" / "comparison.html").read_text()
