"""Positions and masks of prompts that are read in both directions, against the rules said token by token."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

import pytest
import torch

from glmkit.errors import UsageError
from glmkit.models.layers import attend, attend_eagerly
from glmkit.models.prefix_lm import (
    PrefixLayout,
    attention_mask,
    blocked_so_far,
    context_length,
    mask_position,
    positions_so_far,
)

PAD, MASK, GMASK, SMASK, SOP = 3, 90, 91, 92, 94
CHATGLM: dict[str, Any] = {"mask_ids": ((GMASK,), (MASK,))}
FIRST_COMES: dict[str, Any] = {"mask_ids": ((MASK, SMASK, GMASK),), "counting_ids": (GMASK,)}
GLM: dict[str, Any] = {"mask_ids": ((MASK, GMASK, SMASK),), "blocked": False, "dtype": torch.int64}
FAMILIES = {
    "two rows, gMASK first": CHATGLM,
    "one row": {**CHATGLM, "counting_ids": (GMASK,)},
    "one row, the first mask": FIRST_COMES,
    "two rows, 1 = may be seen": GLM,
}


def a_row(source: random.Random, masks: Collection[int]) -> list[int]:
    """Text with one or two mask tokens in it, sop, perhaps the beginning of an answer."""
    text = [source.randrange(10, 80) for _ in range(source.randrange(1, 7))]
    for mask in masks:
        text.insert(source.randrange(len(text) + 1), mask)
    return [*text, SOP, *(source.randrange(10, 80) for _ in range(source.choice((0, 0, 1, 4))))]


def batch(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the left; the padding looks like commands, which must not matter."""
    width = max(map(len, rows))
    ids = [[SOP if column % 2 else GMASK for column in range(width - len(row))] + row for row in rows]
    return torch.tensor(ids), torch.tensor([width - len(row) for row in rows])


def alone(row: list[int], kind: dict[str, Any]) -> tuple[list[list[int]], list[list[bool]]]:
    """Positions and visibility of one row without padding, by their definition."""
    c = row.index(SOP)
    found = [[column for column, token in enumerate(row) if token in group] for group in kind["mask_ids"]]
    m = next(columns[0] for columns in found if columns)
    seen = [[column < c or column <= looker for column in range(len(row))] for looker in range(len(row))]
    if kind.get("counting_ids") is None:
        belongs = [column if column < c else m for column in range(len(row))]
        return [belongs, [0 if column < c else column - c + 1 for column in range(len(row))]], seen
    counts_on = row[m] in kind["counting_ids"]
    return [[column if column < c or counts_on else m for column in range(len(row))]], seen


def check(given: dict[str, torch.Tensor], rows: list[list[int]], columns: range, kind: dict[str, Any]) -> None:
    """What a layout says of some columns: every row as alone, behind its padding; padding at position 0, blind."""
    mask, positions = given["attention_mask"], given["position_ids"]
    assert mask.dtype == kind.get("dtype", torch.bool)
    seen = (mask == 0) if kind.get("blocked", True) else (mask == 1)
    assert seen.shape == (len(rows), 1, len(columns), columns.stop)
    for number, row in enumerate(rows):
        pads = columns.stop - len(row)
        expected_positions, expected_seen = alone(row, kind)
        own = positions[number] if positions.ndim == 3 else positions[number][None]
        for place, column in enumerate(columns):
            at = column - pads
            assert own[:, place].tolist() == [line[at] if at >= 0 else 0 for line in expected_positions]
            visible = expected_seen[at] if at >= 0 else [False] * len(row)
            assert seen[number, 0, place].tolist() == [False] * pads + visible


@pytest.mark.parametrize("kind", FAMILIES.values(), ids=FAMILIES)
def test_every_row_of_a_padded_batch_is_laid_out_as_alone(kind: dict[str, Any]) -> None:
    source = random.Random(0)
    known = [mask for group in kind["mask_ids"] for mask in group]
    for _ in range(60):
        rows = [a_row(source, source.sample(known, source.choice((1, 1, 2)))) for _ in range(source.randrange(1, 5))]
        ids, pads = batch(rows)
        layout = PrefixLayout(ids, pads, sop_id=SOP, **kind)
        width = ids.shape[1]
        check(layout.prompt(0, width), rows, range(width), kind)
        kept = sorted(source.sample(range(len(rows)), source.randrange(1, len(rows) + 1)))
        for step in range(4):
            if step == 2:
                layout.select(kept)
                rows = [rows[place] for place in kept]
            rows = [[*row, source.randrange(10, 80)] for row in rows]
            check(layout.step(), rows, range(width + step, width + step + 1), kind)


@pytest.mark.parametrize("kind", FAMILIES.values(), ids=FAMILIES)
def test_what_was_said_of_a_prompt_goes_on_for_its_answer(kind: dict[str, Any]) -> None:
    """The same numbers from the positions and the mask of the prompt alone, which is what a tokenizer gives."""
    source = random.Random(1)
    known = [mask for group in kind["mask_ids"] for mask in group]
    for _ in range(40):
        rows = [a_row(source, source.sample(known, 1)) for _ in range(3)]
        ids, pads = batch(rows)
        longer = torch.cat((ids, torch.randint(10, 80, (3, 5))), dim=1)
        options = {key: value for key, value in kind.items() if key not in ("blocked", "dtype")}
        prompt, whole = (
            PrefixLayout(x, pads, sop_id=SOP, **options).prompt(0, x.shape[1]) for x in (ids, longer)
        )  # both in the words of ChatGLM-6B
        S = longer.shape[1]
        assert torch.equal(positions_so_far(prompt["position_ids"], S), whole["position_ids"])
        assert torch.equal(positions_so_far(prompt["position_ids"], ids.shape[1]), prompt["position_ids"])
        for start in (0, ids.shape[1] - 1, ids.shape[1], S - 1):
            expected = whole["attention_mask"][:, :, start:]
            assert torch.equal(blocked_so_far(prompt["attention_mask"], start, S), expected)
            assert torch.equal(blocked_so_far(whole["attention_mask"], start, S), expected)


def test_a_row_without_what_it_needs_is_named() -> None:
    good, bad = [10, GMASK, SOP, 11], [10, 12, SOP, 11]
    with pytest.raises(UsageError, match=r"row 1 of the input has no mask token: expected one of the ids 91, 90"):
        mask_position(torch.tensor([good, bad]), CHATGLM["mask_ids"])
    with pytest.raises(UsageError, match=r"row 2 of the input has no start of an answer \(id 94\)"):
        context_length(torch.tensor([good, good, [10, GMASK, 12, 11]]), SOP)
    ids, pads = torch.tensor([good, [SOP, GMASK, 10, 11]]), torch.tensor([0, 2])
    with pytest.raises(UsageError, match="row 1"):  # what it needs lies in its padding
        PrefixLayout(ids, pads, sop_id=SOP, **CHATGLM)


def test_the_first_sop_and_the_first_mask_count() -> None:
    ids = torch.tensor([[10, MASK, 11, MASK, GMASK, SOP, 12, GMASK, SOP]])
    assert context_length(ids, SOP).tolist() == [5]
    assert mask_position(ids, CHATGLM["mask_ids"]).tolist() == [4]
    assert mask_position(ids, ((MASK,), (GMASK,))).tolist() == [1]
    assert mask_position(ids, FIRST_COMES["mask_ids"]).tolist() == [1]


@pytest.mark.parametrize("eager", [False, True])
def test_a_row_that_sees_nothing_gets_the_mean_of_all_values(eager: bool) -> None:
    """As where blocked scores are one finite number; the others are what the softmax says, and no gradient is NaN."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    seen[1, :, :2] = False
    seen[1, :, :, :2] = False
    mask, silent = attention_mask(seen, torch.float64, eager)
    assert silent is not None
    assert silent[:, 0, :, 0].tolist() == [[False] * 5, [True, True, False, False, False]]
    out = (attend_eagerly if eager else attend)(q.masked_fill(silent, 0), k, v, mask)
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~seen, -1e4)  # the official way
    torch.testing.assert_close(out, (scores.softmax(-1) @ v).transpose(1, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(out[1, 0], v[1].mean(1), atol=1e-6, rtol=0)
    out.square().sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v))


def test_a_single_token_that_sees_everything_needs_no_mask() -> None:
    seen = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    assert attention_mask(seen, torch.float32, False) == (None, None)
    seen[0, ..., 0] = False
    mask, silent = attention_mask(seen, torch.float32, False)
    assert mask is not None
    assert mask.tolist() == seen.tolist()
    assert silent is None
