"""Lists of ids: their length, masks, positions and padding; and decoded text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from glmkit.errors import UsageError


def to_lists(value: Any) -> Any:
    """Turns tensors and arrays, also inside lists, into lists.

    Args:
        value: Ids in any form.

    Returns:
        The same as lists of integers.
    """
    if isinstance(value, (list, tuple)):
        return [to_lists(one) for one in value] if value and not isinstance(value[0], int) else list(value)
    return value.tolist() if hasattr(value, "tolist") else value


def tensor_type(value: Any) -> str | None:
    """Tells what ids are stored in.

    Args:
        value: Ids in any form.

    Returns:
        "pt" for tensors, "np" for arrays, None for lists.
    """
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    if not hasattr(value, "tolist"):
        return None
    return "pt" if type(value).__module__.startswith("torch") else "np"


def positions(mask: Any) -> Any:
    """Counts positions along a mask.

    Args:
        mask: A list of 0 and 1, or a list of such lists.

    Returns:
        0, 1, 2, ... where the mask is 1, and 0 where it is 0.
    """
    if mask and isinstance(mask[0], list):
        return [positions(row) for row in mask]
    counted, seen = [], 0
    for bit in mask:
        counted.append(seen if bit else 0)
        seen += bit
    return counted


def ones_like(ids: Any) -> Any:
    """Makes the mask of ids without padding.

    Args:
        ids: A list of ids, or a list of such lists.

    Returns:
        As many ones.
    """
    return [ones_like(row) for row in ids] if ids and isinstance(ids[0], list) else [1] * len(ids)


def pad_like(values: Any, ids: Any, left: bool) -> Any:
    """Fills values with zeros to the length of padded ids.

    Args:
        values: A list, or a list of lists.
        ids: Padded ids of the same nesting.
        left: Whether the zeros go in front.

    Returns:
        The filled values.
    """
    if ids and isinstance(ids[0], list):
        return [pad_like(row, target, left) for row, target in zip(values, ids)]
    zeros = [0] * (len(ids) - len(values))
    return zeros + values if left else values + zeros


def cut_pair(first: list[int], second: list[int] | None, limit: int, added: int, side: str) -> None:
    """Cuts a text, or two, in place: the longer of two gives way, token by token.

    Args:
        first: Ids of the first text.
        second: Ids of the second text, if there is one; of equally long ones it gives way.
        limit: Most ids.
        added: How many of them the control tokens take that are still to come.
        side: "left" cuts at the beginning, "right" at the end.

    Raises:
        UsageError: Not even the control tokens have room.
    """
    if limit < added:
        raise UsageError(f"max_length={limit} has no room for the control tokens around a text")
    for _ in range(len(first) + len(second or ()) + added - limit):
        longer = second if second is not None and len(second) >= len(first) else first
        del longer[0 if side == "left" else -1]


def prefix_places(ids: Sequence[int], sop: int, masks: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Makes the mask and the positions that ChatGLM-6B's tokenizer gives a row without padding.

    Args:
        ids: The row, T ids. All in front of the first `sop` is context; without one, everything is.
        sop: The id that begins an answer.
        masks: The ids of mask tokens; the first of them that the row has is where the answer belongs.

    Returns:
        Mask (1, T, T) bool, True = blocked, and positions (2, T): where a token belongs, and how far into the answer.
    """
    columns = np.arange(len(ids))
    context = ids.index(sop) if sop in ids else len(ids)
    seen = (columns[None] < context) | (columns[None] <= columns[:, None])
    blank = next((ids.index(mask) for mask in masks if mask in ids), columns)
    belongs = np.where(columns < context, columns, blank)
    return ~seen[None], np.stack((belongs, np.maximum(columns - context + 1, 0)))


_JOINED = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
           (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


def clean_up(text: str) -> str:
    """Joins marks to the word in front of them, as transformers' `clean_up_tokenization_spaces` does.

    Args:
        text: Decoded text.

    Returns:
        The text with fewer blanks.
    """
    for apart, joined in _JOINED:
        text = text.replace(apart, joined)
    return text
