"""docs/reliability.md is true: every case of the list has a row, and every test that a row names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
if not PAGE.is_file():
    pytest.skip("the documents are not part of an installed package", allow_module_level=True)
CASES = {"S": 35, "X": 53, "T": 46, "A": 47, "W": 76}
ENGINE = "test_batch_engine.py"


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| [SXTAW]-\d", line)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def numbers(text: str) -> set[str]:
    """`S-25, S-27` and `X-29 to X-31` as single numbers."""
    found = set(re.findall(r"\b[SXTAW]-\d\d\b", text))
    for letter, first, last in re.findall(r"\b([SXTAW])-(\d\d) to [SXTAW]-(\d\d)\b", text):
        found |= {f"{letter}-{number:02}" for number in range(int(first), int(last) + 1)}
    return found


@pytest.mark.parametrize("letter", CASES)
def test_every_case_has_a_row(letter: str) -> None:
    found = set().union(*(numbers(row[0]) for row in rows()))
    expected = {f"{letter}-{number:02}" for number in range(1, CASES[letter] + 1)}
    assert expected - found == set()
    assert {one for one in found if one.startswith(letter)} - expected == set()


def test_every_test_that_is_named_is_there() -> None:
    missing = []
    for row in rows():
        for part in row[-1].split(";"):
            files = re.findall(r"`(test_\w+\.py)`", part) or [ENGINE] * ("Engine:" in part)
            names = re.findall(r"`(?:…|test_)(\w+)`", part.replace(".py`", "`"))
            names = [name for name in names if f"test_{name}.py" not in part]
            for file in files:
                source = ROOT / "tests" / file
                if not source.is_file():
                    missing.append(file)
            paths = [ROOT / "tests" / file for file in files] or sorted((ROOT / "tests").glob("test_*.py"))
            text = "".join(path.read_text(encoding="utf-8") for path in paths if path.is_file())
            missing += [f"{files}: {name}" for name in names if not re.search(rf"def test_\w*{name}\b", text)]
    assert missing == []


def test_what_has_no_test_has_a_reason() -> None:
    rows_of_others = [row for row in rows() if not row[0].startswith("W-")]  # all of those are in hostile_cases.py
    without = [row for row in rows_of_others if not re.search("test_|both ways|Engine", row[-1])]
    assert all(len(row[1]) > 25 for row in without), without
    assert len(without) <= 3
