"""Rows of GLM-130B's evaluation: texts, choices and long documents as ids, positions, masks and targets.

    multiple choice   A [MASK] | sop c1[:-1] | sop c2[:-1] | ...    each choice sees A and itself, none sees another
    generation        A [MASK] | sop                                the model goes on from here
    language model    A [gMASK] | sop text[:-1]                     windows over a document; A was scored before

What stands in front of the first bar sees all of itself. With `unidirectional` the row is [gMASK] sop and then text,
and every token sees what is behind it only. `use_task_mask` chooses [gMASK], whose filling counts its positions on,
over [MASK], whose filling stands at the position of the mask.

Masks here say what is blocked, as the model takes them. Letters: `S` tokens of a row, `B` rows.

Source: evaluation/dataset.py and utils of GLM-130B (behaviour, not code).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glmkit.errors import DataError, UsageError

_MULTIPLE = 32  # rows of a batch are padded to a multiple of it


@dataclass(frozen=True)
class TaskIds:
    """Ids that builders write: of the config or tokenizer of the model."""

    mask: int = 150_000
    gmask: int = 150_001
    sop: int = 150_004
    eop: int = 150_005


@dataclass(frozen=True)
class Row:
    """One input of the model.

    Args:
        token_ids: S ids.
        position_ids: S positions.
        blocked: (S, S) bool, True where the row's token may not see the column's.
        context_length: Tokens of the prompt, sop among them (generation), or of all the row.
        target_position_ids: Positions of the tokens that are to be generated.
        target_ids: What stands at each position's right (language model), else empty.
        loss_mask: 1 where the target is scored.
        choices: Ids of each choice.
        choice_places: Positions in the row whose logits belong to each choice; a single one for all if every choice is
            one token.
    """

    token_ids: list[int]
    position_ids: list[int]
    blocked: Tensor
    context_length: int = 0
    target_position_ids: list[int] = field(default_factory=list)
    target_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    choices: list[list[int]] = field(default_factory=list)
    choice_places: list[list[int]] = field(default_factory=list)


def generation_row(
    text: Sequence[int],
    ids: TaskIds,
    *,
    max_gen_length: int = 128,
    max_seq_length: int = 2048,
    use_task_mask: bool = False,
    unidirectional: bool = False,
) -> Row:
    """A prompt to go on from.

    Args:
        text: Ids, with or without the mask; what is too long loses its beginning.
        ids: Ids of masks and sop.
        max_gen_length: Tokens to be generated, at most.
        max_seq_length: Longest row, prompt and answer together.
        use_task_mask: Whether the mask is [gMASK].
        unidirectional: Whether no token sees a later one; needs use_task_mask.

    Returns:
        Ids up to sop, and `target_position_ids` for all that may come.

    Raises:
        UsageError: `unidirectional` without `use_task_mask`.
        DataError: No room, or a mask in a unidirectional text.
    """
    text = _last(text, max_seq_length - max_gen_length - 2, max_seq_length)
    tokens, place = _context(text, ids, use_task_mask, unidirectional)
    if unidirectional:
        length = len(tokens)
        blocked = _blocked_future(length)
        following = list(range(length, length + max_gen_length))
        return Row(tokens, list(range(length)), blocked, length, following)
    division, length = len(tokens), len(tokens) + 1
    start = division if use_task_mask else place
    step = 1 if use_task_mask else 0
    return Row(
        token_ids=[*tokens, ids.sop],
        position_ids=[*range(division), start],
        blocked=_blocked_after(division, length),
        context_length=length,
        target_position_ids=[start + step * (1 + count) for count in range(max_gen_length)],
    )


def multiple_choice_row(
    text: Sequence[int],
    choices: Sequence[Sequence[int]],
    ids: TaskIds,
    *,
    single_token: bool = False,
    max_seq_length: int = 2048,
    use_task_mask: bool = False,
    unidirectional: bool = False,
) -> Row:
    """A text and all its choices in one row.

    Args:
        text: Ids, with or without the mask; what is too long loses its beginning.
        choices: Ids of each choice; an empty one becomes eop.
        ids: Ids of masks, sop and eop.
        single_token: Whether every choice of the whole task is one token: then one sop serves them all.
        max_seq_length: Longest row.
        use_task_mask: Whether the mask is [gMASK].
        unidirectional: Whether no token sees a later one; needs use_task_mask.

    Returns:
        The row with `choices` and `choice_places`; `score_choices` makes numbers of the model's logits.

    Raises:
        UsageError: `unidirectional` without `use_task_mask`.
        DataError: The choices alone are too long, or one has several tokens though `single_token` says otherwise.
    """
    filled = [list(choice) or [ids.eop] for choice in choices]
    if not filled or (single_token and any(len(choice) != 1 for choice in filled)):
        raise DataError(f"choices={filled}: expected {'one token each' if single_token else 'at least one choice'}")
    width = 1 if single_token else sum(map(len, filled))
    text = _last(text, max_seq_length - width - 2, max_seq_length)
    tokens, place = _context(text, ids, use_task_mask, unidirectional)
    first = ids.sop
    if unidirectional:  # the last token of the text starts every choice
        first = tokens.pop()
    division = len(tokens)
    positions = list(range(division))
    start = division if use_task_mask else place
    places = []
    for choice in [filled[0]] if single_token else filled:
        places.append(list(range(len(tokens), len(tokens) + len(choice))))
        tokens += [first, *choice[:-1]]
        positions += [start + (count if use_task_mask else 0) for count in range(len(choice))]
    length = len(tokens)
    blocked = torch.ones(length, length, dtype=torch.bool)
    blocked[:, :division] = False
    if unidirectional:
        blocked[:division, :division] = _blocked_future(division)
    for columns in places:
        inside = slice(columns[0], columns[-1] + 1)
        blocked[inside, inside] = _blocked_future(len(columns))
    return Row(tokens, positions, blocked, length, choices=filled, choice_places=places)


def language_model_windows(
    tokens: Sequence[int],
    ids: TaskIds,
    *,
    max_seq_length: int = 2048,
    generation_length: int = 256,
    unidirectional: bool = False,
) -> list[Row]:
    """Cuts a document into rows, every token of which is scored once, with as much in front of it as there is room.

    The first window scores all its tokens, each later one its last `generation_length`. With `unidirectional` every
    window scores all of its tokens, as the official code does, so tokens count several times.

    Args:
        tokens: Ids of the document, without control tokens.
        ids: Ids of [gMASK] and sop.
        max_seq_length: Tokens of a window.
        generation_length: How far a window is from the one before it.
        unidirectional: Whether no token sees a later one.

    Returns:
        Rows with `target_ids` and `loss_mask`; `blocked` as everywhere here.

    Raises:
        UsageError: A window would not move on.
    """
    inside = max_seq_length - 1
    if not 0 < generation_length <= inside:
        raise UsageError(f"generation_length={generation_length}: expected 1 to {inside}, max_seq_length - 1")
    count = max(0, math.ceil((len(tokens) - inside) / generation_length)) + 1
    rows = []
    for number in range(count):
        start = number * generation_length
        window = list(tokens[start : start + inside])
        known = 0 if number == 0 or unidirectional else inside - generation_length
        prompt, text = window[:known], window[known:]
        division, length = len(prompt) + 1, len(prompt) + len(text) + 1
        rows.append(
            Row(
                token_ids=[*prompt, ids.gmask, ids.sop, *text[:-1]][:length],
                position_ids=list(range(length)),
                blocked=_blocked_after(division, length),
                context_length=length,
                target_ids=[*prompt, ids.gmask, *text],
                loss_mask=[0] * division + [1] * len(text),
            )
        )
    return rows


def batch_rows(rows: Sequence[Row], *, multiple: int = _MULTIPLE) -> tuple[Tensor, Tensor, Tensor]:
    """Pads rows on the right.

    Args:
        rows: Rows of any lengths.
        multiple: The width becomes a multiple of it.

    Returns:
        ids (B, S) with 0 as padding, positions (B, S) with 0, and blocked (B, 1, S, S): padding sees nothing and is
        seen by nothing.
    """
    width = max(len(row.token_ids) for row in rows)
    width = -(-width // multiple) * multiple
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    positions = torch.zeros(len(rows), width, dtype=torch.int64)
    blocked = torch.ones(len(rows), 1, width, width, dtype=torch.bool)
    for number, row in enumerate(rows):
        length = len(row.token_ids)
        ids[number, :length] = torch.tensor(row.token_ids)
        positions[number, :length] = torch.tensor(row.position_ids)
        blocked[number, 0, :length, :length] = row.blocked
    return ids, positions, blocked


def score_choices(row: Row, logits: Tensor) -> list[float]:
    """Log-probability of each choice: the sum over its tokens, without end token and without regard to length.

    Args:
        row: A multiple choice row.
        logits: (S, V) of the row, padded or not.

    Returns:
        One number per choice.
    """
    logs = logits.float().log_softmax(-1)
    places = row.choice_places * len(row.choices) if len(row.choice_places) == 1 else row.choice_places
    return [
        float(logs[torch.tensor(columns), torch.tensor(choice)].sum()) for columns, choice in zip(places, row.choices)
    ]


def window_loss(row: Row, logits: Tensor) -> float:
    """Summed negative log-probability of the scored targets of a language model window.

    Perplexity is `exp(sum over windows / number of words of the original text)`.

    Args:
        row: A language model row.
        logits: (S, V) of the row, padded or not.
    """
    length = len(row.target_ids)
    logs = logits[:length].float().log_softmax(-1)
    chosen = logs[torch.arange(length), torch.tensor(row.target_ids)]
    return -float(chosen[torch.tensor(row.loss_mask, dtype=torch.bool)].sum())


def _last(text: Sequence[int], room: int, max_seq_length: int) -> list[int]:
    if room < 1:
        raise DataError(f"no room for a text in max_seq_length={max_seq_length} beside the answer")
    return list(text)[-room:]


def _context(text: Sequence[int], ids: TaskIds, use_task_mask: bool, unidirectional: bool) -> tuple[list[int], int]:
    """The part in front of sop (unidirectional: the whole prompt), and the place of its mask."""
    mask = ids.gmask if use_task_mask else ids.mask
    if not unidirectional:
        tokens = list(text) if mask in text else [*text, mask]
        return tokens, tokens.index(mask)
    if not use_task_mask:
        raise UsageError("unidirectional needs use_task_mask: only [gMASK] can stand in front of its text")
    if mask in text:
        raise DataError("a unidirectional text has no mask of its own, this one has [gMASK]")
    return [mask, ids.sop, *text], 0


def _blocked_future(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def _blocked_after(division: int, length: int) -> Tensor:
    """Everything sees the first `division` columns, and behind them only what came before."""
    blocked = _blocked_future(length)
    blocked[:, :division] = False
    return blocked
