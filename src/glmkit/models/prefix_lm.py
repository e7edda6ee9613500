"""Prompts that are read in both directions: the positions and masks of GLM, GLM-130B and ChatGLM-6B, in plain torch.

A row is a text with a mask token in it, then `sop`, then the answer. Everything in front of sop, the context, sees all
of itself; sop and the answer see the context and what they have behind them.

    column     0    1    2      3      4     5    6          c = 4: the column of sop, the length of the context
    token      pad  a    [MASK] b      sop   y1   y2         m = 2: the column of the mask token
    row 0           0    1      2      1     1    1          two rows: where it belongs, and how far into the answer
    row 1           0    0      0      1     2    3
    one row         0    1      2      3     4    5          counting on ([gMASK] where there is one row)
    one row         0    1      2      1     1    1          staying at the mask ([MASK], [sMASK])

Positions start at the first column that is no padding, and nobody sees padding, so a row padded on the left gives what
it gives alone.

Letters: `B` rows, `T` new tokens, `S` all columns so far.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from glmkit.errors import UsageError


def context_length(ids: Tensor, sop_id: int) -> Tensor:
    """The column of the first sop of every row.

    Args:
        ids: (B, T) int64.
        sop_id: The id that starts an answer.

    Returns:
        (B,) int64.

    Raises:
        UsageError: A row has none; the message names it.
    """
    return _first(ids, {sop_id}, f"has no start of an answer (id {sop_id})")


def mask_position(ids: Tensor, preferred: Sequence[Collection[int]]) -> Tensor:
    """The column of the mask token that every row's answer belongs to.

    Args:
        ids: (B, T) int64.
        preferred: Groups of ids; the first column with an id of the first group that a row has.

    Returns:
        (B,) int64.

    Raises:
        UsageError: A row has none; the message names it.
    """
    found = torch.full((len(ids),), -1, device=ids.device)
    for group in reversed(preferred):
        found = torch.where(_is_any(ids, group).any(1), _is_any(ids, group).int().argmax(1), found)
    if bool((found < 0).any()):
        listed = ", ".join(str(token) for group in preferred for token in group)
        raise UsageError(
            f"row {int((found < 0).int().argmax())} of the input has no mask token: expected one of the ids {listed}",
            hint="the tokenizer adds it; an input made by hand needs it in front of the start of the answer",
        )
    return found


def _first(ids: Tensor, wanted: Collection[int], problem: str) -> Tensor:
    hits = _is_any(ids, wanted)
    if not bool(hits.any(1).all()):
        raise UsageError(
            f"row {int((~hits.any(1)).int().argmax())} of the input {problem}",
            hint="the tokenizer adds it; an input made by hand needs it at the end of the prompt",
        )
    return hits.int().argmax(1)


def _is_any(ids: Tensor, wanted: Collection[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(list(wanted), device=ids.device))


def two_row_positions(columns: Tensor, context: Tensor, mask: Tensor, pads: Tensor) -> Tensor:
    """Where tokens belong, and how far into the answer they are.

    Args:
        columns: Columns to make positions for, (T,) int64.
        context: Column of sop in every row, (B,).
        mask: Column of the mask token, (B,).
        pads: Columns of padding on the left, (B,).

    Returns:
        (B, 2, T) int64.
    """
    context = context[:, None]
    belongs = torch.where(columns < context, columns, mask[:, None]) - pads[:, None]
    inside = (columns - context + 1).clamp(min=0)
    return torch.stack((belongs.clamp(min=0), inside), dim=1)


def one_row_positions(columns: Tensor, context: Tensor, mask: Tensor, pads: Tensor, counts_on: Tensor) -> Tensor:
    """Positions of models with one row of them.

    Args:
        columns: (T,) int64.
        context: (B,).
        mask: (B,).
        pads: (B,).
        counts_on: (B,) bool, whether the answer's positions count on; else they all are the mask token's.

    Returns:
        (B, T) int64.
    """
    stays = (columns >= context[:, None]) & ~counts_on[:, None]
    return (torch.where(stays, mask[:, None], columns) - pads[:, None]).clamp(min=0)


def visible(rows: Tensor, columns: Tensor, context: Tensor, pads: Tensor) -> Tensor:
    """Who sees whom.

    Args:
        rows: Columns of the tokens that look, (T,) int64.
        columns: Columns that are looked at, (S,) int64.
        context: Column of sop in every row of the batch, (B,).
        pads: Columns of padding on the left, (B,).

    Returns:
        (B, 1, T, S) bool, True = may be seen. Rows of padding see nothing.
    """
    rows, columns = rows[:, None], columns[None]  # (T, 1), (1, S)
    context, pads = context[:, None, None], pads[:, None, None]
    seen = (columns < context) | (columns <= rows)
    return (seen & (columns >= pads) & (rows >= pads)).unsqueeze(1)


def positions_so_far(prompt: Tensor, end: int) -> Tensor:
    """Positions of a prompt, lengthened by those of its answer.

    Args:
        prompt: (B, 2, T), or (B, T) where there is one row of them.
        end: Columns wanted, `S`.

    Returns:
        (B, 2, S), of which row 0 stays where it is and row 1 counts on; or (B, S), which goes on as its last step went.
    """
    last = prompt[..., -1:]
    step = last.new_tensor([[0], [1]]) if prompt.ndim == 3 else (last > prompt[..., -2:-1]).long()
    further = torch.arange(1, end - prompt.shape[-1] + 1, device=prompt.device)
    return torch.cat((prompt, last + step * further), dim=-1)


def blocked_so_far(prompt: Tensor, start: int, end: int) -> Tensor:
    """A prompt's mask, lengthened by an answer that sees what the last token of the prompt sees, and itself so far.

    Args:
        prompt: (B, 1, T, T) bool, True = blocked.
        start: First column that looks.
        end: Column behind the last.

    Returns:
        (B, 1, end - start, end) bool, True = blocked.
    """
    prompt = prompt[..., :end, :end]
    T = prompt.shape[-1]
    answer = prompt[:, :, -1:].expand(-1, -1, end - max(start, T), -1)
    columns = torch.arange(end, device=prompt.device)
    behind = columns[T:] > columns[start:, None]  # (end - start, end - T)
    looked_at = torch.cat((prompt[:, :, start:], answer), dim=2)  # (B, 1, end - start, T)
    return torch.cat((looked_at, behind.expand(len(prompt), 1, -1, -1)), dim=-1)


def attention_mask(seen: Tensor, dtype: torch.dtype, eager: bool) -> tuple[Tensor | None, Tensor | None]:
    """The form that `layers.ATTENTION` takes, for masks in which a row may see nothing.

    The official code fills blocked scores with one finite number, so a row that sees nothing attends to all columns
    alike. Here such a row sees everything with a query of zero, which is the same.

    Args:
        seen: (B, 1, T, S) bool, True = may be seen.
        dtype: Of the scores.
        eager: Whether `attend_eagerly` is used, which adds the mask.

    Returns:
        The mask, None if a single token sees everything; and (B, 1, T, 1) bool, True where the query must be zero, None
        if nowhere.
    """
    nothing = ~seen.any(-1, keepdim=True)
    silent = nothing if _may_hold(nothing) else None
    if silent is not None:
        seen = seen | silent
    if seen.shape[2] == 1 and not _may_hold(~seen):
        return None, silent
    if eager:
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
            ~seen, torch.finfo(dtype).min
        ), silent
    return seen, silent


def _may_hold(condition: Tensor) -> bool:
    """Whether a condition holds anywhere; on the meta device, where there are no values, it may."""
    return condition.is_meta or bool(condition.any())


class PrefixLayout:
    """Masks and positions of a batch that is padded on the left: for the prompts, then token after token.

    Args:
        ids: The prompts, (B, T) int64.
        pads: Columns of padding of each row, (B,) int64.
        sop_id: The id that starts an answer; every prompt has it.
        mask_ids: Groups of mask tokens, see `mask_position`.
        counting_ids: None for two rows of positions. Else there is one row, and it counts on behind these mask tokens.
        blocked: Whether the model's masks say what is blocked (True) instead of what may be seen.
        dtype: Of the masks.
    """

    whole_prompt = True

    def __init__(
        self,
        ids: Tensor,
        pads: Tensor,
        *,
        sop_id: int,
        mask_ids: Sequence[Collection[int]],
        counting_ids: Collection[int] | None = None,
        blocked: bool = True,
        dtype: torch.dtype = torch.bool,
    ) -> None:
        self.columns = ids.shape[1]  # so far
        self.pads = pads.to(ids.device)
        columns = torch.arange(ids.shape[1], device=ids.device)
        # Padding may have any id, also one of the commands; below its column nothing is looked for.
        real = torch.where(columns >= self.pads[:, None], ids, -1)
        self.context = context_length(real, sop_id)
        self.mask = mask_position(real, mask_ids)
        self.counts_on: Tensor | None = None
        if counting_ids is not None:
            self.counts_on = _is_any(real.gather(1, self.mask[:, None])[:, 0], counting_ids)
        self.blocked, self.dtype = blocked, dtype

    def prompt(self, start: int, end: int) -> dict[str, Tensor]:
        """Keyword arguments of the model for columns start to end of the prompts, or of what follows them.

        Args:
            start: First column.
            end: Column behind the last.

        Returns:
            attention_mask (B, 1, end - start, end) and position_ids, (B, 2, end - start) or (B, end - start).
        """
        rows = torch.arange(start, end, device=self.pads.device)
        seen = visible(rows, torch.arange(end, device=self.pads.device), self.context, self.pads)
        return {"attention_mask": self._in_the_models_words(seen), "position_ids": self._positions(rows)}

    def step(self, tokens: int = 1) -> dict[str, Tensor]:
        """Keyword arguments of the model for the next tokens of every row.

        Args:
            tokens: How many, `T`.

        Returns:
            attention_mask (B, 1, T, S) and position_ids, (B, 2, T) or (B, T).
        """
        self.columns += tokens
        return self.prompt(self.columns - tokens, self.columns)

    def rewind(self, tokens: int) -> None:
        """Takes back the last tokens that `step` counted.

        Args:
            tokens: How many.
        """
        self.columns -= tokens

    def select(self, places: Sequence[int]) -> None:
        """Keeps some rows of the batch.

        Args:
            places: Their places in it.
        """
        kept = torch.tensor(list(places), device=self.pads.device)
        self.pads, self.context, self.mask = self.pads[kept], self.context[kept], self.mask[kept]
        self.counts_on = None if self.counts_on is None else self.counts_on[kept]

    def _positions(self, columns: Tensor) -> Tensor:
        if self.counts_on is None:
            return two_row_positions(columns, self.context, self.mask, self.pads)
        return one_row_positions(columns, self.context, self.mask, self.pads, self.counts_on)

    def _in_the_models_words(self, seen: Tensor) -> Tensor:
        return (~seen if self.blocked else seen).to(self.dtype)
