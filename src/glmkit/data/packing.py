"""Several records in one row, which do not see each other: masks and positions as if each were alone.

    row        a  a  a  a  b  b  b  b  b  c  c  pad         who sees whom (causal)      a model that reads prompts whole
    position   0  1  2  3  0  1  2  3  4  0  1  0           a ■ □ □ □                   ■ ■ ■ □
                                                              ■ ■ □ □                   ■ ■ ■ □
                                                              ■ ■ ■ □     nothing       ■ ■ ■ □   (3 columns in front
                                                              ■ ■ ■ ■                   ■ ■ ■ ■    of sop)
                                                            b         ■ □ …             and so on

A learned prefix stands in front of the row and is seen by all, which is what each record sees alone. Where labels are
shifted, the first token of a record is no target: the last of the one before it would predict it.

Letters: `B` rows, `T` columns.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from glmkit.data.examples import IGNORED, Example
from glmkit.models.prefix_lm import two_row_positions

_ROWS_TOGETHER = 64  # about so many rows are filled from one group: more fills better, fewer mixes more


def plan_rows(lengths: Sequence[int], room: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Decide which records share a row; a pure function, so a resumed run sees the same.

    Records are shuffled and cut into groups; in each, the longest goes first, into the first row with room for it. The
    rows are shuffled again.

    Args:
        lengths: Tokens of each record.
        room: Columns of a row; a longer record has a row of its own.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0; every epoch has its own rows.

    Returns:
        Numbers of records; each is in exactly one row.
    """
    shuffled = list(range(len(lengths)))
    generator = random.Random(f"rows {seed} {epoch}")
    generator.shuffle(shuffled)
    average = max(1, sum(lengths) // max(1, len(lengths)))
    group = max(1, _ROWS_TOGETHER * room // average)
    rows: list[list[int]] = []
    for start in range(0, len(shuffled), group):
        rows += _filled(
            sorted(shuffled[start : start + group], key=lambda number: (-lengths[number], number)), lengths, room
        )
    generator.shuffle(rows)
    return rows


def _filled(members: Sequence[int], lengths: Sequence[int], room: int) -> list[list[int]]:
    rows: list[list[int]] = []
    left: list[int] = []
    for number in members:
        length = lengths[number]
        place = next((place for place, columns in enumerate(left) if columns >= length), len(rows))
        if place == len(rows):
            rows.append([])
            left.append(room)
        rows[place].append(number)
        left[place] -= length
    return rows


def collate_packed(rows: Sequence[Sequence[Example]], pad_token_id: int) -> dict[str, Tensor]:
    """Join rows of examples of one model into a batch, padded on the right.

    Args:
        rows: B rows, each of at least one example.
        pad_token_id: What to fill with.

    Returns:
        What `label_loss` of the model takes, all of T columns: input_ids and labels (B, T) int64; attention_mask
        (B, 1, T, T) bool, True where a column is seen, but for ChatGLM-6B True where it is not; position_ids (B, T)
        int64, for models with a prompt that is read whole (B, 2, T).
    """
    width = max(sum(len(example.input_ids) for example in row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
    owner = torch.full((len(rows), width), -1)  # which record of the row a column belongs to
    whole = torch.zeros(len(rows), width, dtype=torch.bool)  # columns that all of their record see
    first = rows[0][0]
    two_rows = first.sep > 0
    positions = torch.zeros((len(rows), 2, width) if two_rows else (len(rows), width), dtype=torch.int64)
    for number, row in enumerate(rows):
        start = 0
        for place, example in enumerate(row):
            end = start + len(example.input_ids)
            input_ids[number, start:end] = example.input_ids
            labels[number, start:end] = example.labels
            if first.position_ids is None:  # labels are shifted
                labels[number, start] = IGNORED
            owner[number, start:end] = place
            whole[number, start : start + example.sep] = True
            positions[number, ..., start:end] = _positions(example)
            start = end
    columns = torch.arange(width)
    seen = (owner[:, :, None] == owner[:, None]) & ((columns <= columns[:, None]) | whole[:, None])
    blocks = two_rows and first.position_ids is None  # ChatGLM-6B's masks say what is blocked
    mask = (~seen if blocks else seen).unsqueeze(1)
    return {"input_ids": input_ids, "labels": labels, "attention_mask": mask, "position_ids": positions}


def _positions(example: Example) -> Tensor:
    """Positions of a record as if it were alone: (2, T), or (T) in causal models."""
    if example.position_ids is not None:
        return example.position_ids.long()
    columns = torch.arange(len(example.input_ids))
    if not example.sep:
        return columns
    # The mask token stands right in front of sop in every prompt of ChatGLM-6B.
    context = torch.tensor([example.sep])
    return two_row_positions(columns, context, context - 1, torch.tensor([0]))[0]
