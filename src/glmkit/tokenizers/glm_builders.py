"""Model inputs of GLM (2021) from encoded text: filling a blank, learning to fill it, and choosing between answers.

    filling    [CLS] a [MASK] b eos | sop                 row 0 of the positions: 0 1 2 3 4 | 2 2 2 ...
                                                          row 1:                  0 0 0 0 0 | 1 2 3 ...
    learning   ... | sop t1 t2      labels ... | t1 t2 eop
    choosing   ... | sop c1 c2 | sop d1 d2                every choice sees the source and itself

Letters: `B` rows, `S` columns of the source, `G` columns that are generated, `T = S + G`, `C` choices.

Positions are indices into the padded row, as in the official code: with padding on the left they include it.

Source: tokenization_glm.py of the Hugging Face repositories (behaviour, not code).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from glmkit.errors import TokenizerError, UsageError
from glmkit.hf import BatchEncoding

IGNORED = -100


class _Tokenizer(Protocol):
    @property
    def mask_token_id(self) -> int: ...

    @property
    def mask_token_ids(self) -> list[int]: ...

    @property
    def sop_token_id(self) -> int: ...

    @property
    def eop_token_id(self) -> int: ...

    @property
    def pad_token_id(self) -> int: ...

    def encode_with_masks(self, text: str) -> list[int]: ...


def generation_inputs(
    tokenizer: _Tokenizer,
    model_input: Mapping[str, Any],
    max_gen_length: int,
    targets: str | Sequence[str] | None,
    padding: bool,
) -> BatchEncoding:
    """Builds the inputs of filling the first blank of every row, or of learning to.

    Args:
        tokenizer: Names the control tokens, and encodes the targets.
        model_input: What the tokenizer returned: input_ids and attention_mask (B, S).
        max_gen_length: `G`: most tokens to generate, or to learn, eop included.
        targets: What fills the blanks, to learn from; None to generate.
        padding: With `targets`: whether `G` stays as it is, instead of the length of the longest target.

    Returns:
        To generate: input_ids (B, S + 1), position_ids (B, 2, T), generation_attention_mask (B, 1, T, T). To learn:
        input_ids and labels (B, T), position_ids, attention_mask. See `GLMTokenizer.build_inputs_for_generation`.

    Raises:
        TokenizerError: A row has no mask token; the message says which.
        UsageError: The number of targets is not that of rows.
    """
    source, visible = _tensors(model_input)  # (B, S) both
    rows, length = source.shape
    answers = None if targets is None else _targets(tokenizer, targets, rows, max_gen_length)
    if answers is not None and not padding:
        max_gen_length = max(map(len, answers))
    blanks = _first_blanks(source, tokenizer.mask_token_ids)
    generated = torch.arange(1, max_gen_length + 1, dtype=source.dtype, device=source.device)
    first = torch.cat((torch.arange(length).to(source).expand(rows, -1), blanks[:, None].expand(-1, max_gen_length)), 1)
    second = torch.cat((source.new_zeros(length), generated)).expand(rows, -1)
    of_source = visible[:, None, :].expand(-1, length + max_gen_length, -1)  # (B, T, S)
    of_answer = torch.cat(
        (
            visible.new_zeros(length, max_gen_length),
            torch.tril(visible.new_ones(max_gen_length, max_gen_length)),
        )
    ).expand(rows, -1, -1)  # (B, T, G)
    mask = torch.cat((of_source, of_answer), dim=2)[:, None]
    positions = torch.stack((first, second), dim=1)
    sop = source.new_full((rows, 1), tokenizer.sop_token_id)
    if answers is None:
        data = {"input_ids": torch.cat((source, sop), dim=1), "position_ids": positions}
        return BatchEncoding(data | {"generation_attention_mask": mask})
    inputs = source.new_full((rows, max_gen_length), tokenizer.pad_token_id)
    labels = source.new_full((rows, length + max_gen_length), IGNORED)
    for row, answer in enumerate(answers):
        inputs[row, : len(answer)] = torch.tensor(answer)
        labels[row, length : length + len(answer)] = torch.tensor(answer)
    inputs = torch.cat((source, sop, inputs[:, :-1]), dim=1)
    return BatchEncoding({"input_ids": inputs, "position_ids": positions, "attention_mask": mask, "labels": labels})


def multiple_choice_inputs(
    tokenizer: _Tokenizer,
    model_input: Mapping[str, Any],
    choices: Sequence[Sequence[str]],
    max_length: int | None,
) -> BatchEncoding:
    """Builds the inputs of scoring several answers to every row in one pass.

    Args:
        tokenizer: Names the control tokens, and encodes the choices.
        model_input: What the tokenizer returned: input_ids and attention_mask (B, S).
        choices: The answers to each row.
        max_length: Most tokens of a row with its answers; None sets no limit.

    Returns:
        input_ids (B, T), position_ids (B, 2, T), attention_mask (B, 1, T, T), T of the longest row; choice_ids, for
        every row the ids of each answer, and choice_indices, the columns that predict them.

    Raises:
        TokenizerError: A row has no [MASK]; the message says which.
        UsageError: There is not a list of choices for every row, one is empty, or a row is too long.
    """
    source, visible = _tensors(model_input)
    if len(choices) != len(source):
        raise UsageError(f"choices has {len(choices)} rows and the inputs {len(source)}; expected a list for every row")
    blanks = _first_blanks(source, [tokenizer.mask_token_id])
    built = [_choice_row(tokenizer, *row) for row in zip(source, visible, blanks.tolist(), choices)]
    longest = max(len(row["input_ids"]) for row in built)
    if max_length is not None and longest > max_length:
        number = next(index for index, row in enumerate(built) if len(row["input_ids"]) > max_length)
        raise UsageError(
            f"row {number} has {len(built[number]['input_ids'])} tokens with its choices; max_length={max_length}",
            hint="cut the source: tokenizer(texts, truncation=True, max_length=...)",
        )
    input_ids = source.new_zeros(len(built), longest)
    positions = source.new_zeros(len(built), 2, longest)
    mask = visible.new_zeros(len(built), 1, longest, longest)
    for number, row in enumerate(built):
        length = len(row["input_ids"])
        input_ids[number, :length] = row["input_ids"]
        positions[number, :, :length] = row["position_ids"]
        positions[number, :, length:] = row["position_ids"][:, -1:]
        mask[number, 0, :length, :length] = row["attention_mask"]
    return BatchEncoding(
        {
            "input_ids": input_ids,
            "position_ids": positions,
            "attention_mask": mask,
            "choice_ids": [row["choice_ids"] for row in built],
            "choice_indices": [row["choice_indices"] for row in built],
        }
    )


def _choice_row(
    tokenizer: _Tokenizer, source: Tensor, visible: Tensor, blank: int, choices: Sequence[str]
) -> dict[str, Any]:
    """One row: the source (S), then for each choice sop and all of its tokens but the last."""
    encoded = [source.new_tensor(tokenizer.encode_with_masks(choice)) for choice in choices]
    if not encoded or not all(map(len, encoded)):
        raise UsageError(f"choices {list(choices)!r}: expected at least one, and none without a token")
    ids, indices, end = [source], [], len(source)
    blocks = [visible.expand(len(source), -1)]
    for choice in encoded:
        ids += [source.new_tensor([tokenizer.sop_token_id]), choice[:-1]]
        indices.append(torch.arange(end, end + len(choice), device=source.device))
        blocks.append(torch.tril(visible.new_ones(len(choice), len(choice))))
        end += len(choice)
    mask = torch.block_diag(*blocks)
    mask[len(source) :, : len(source)] = visible
    zeros = source.new_zeros(len(source))
    first = torch.cat((torch.arange(len(source)).to(source), source.new_full((end - len(source),), blank)))
    second = torch.cat((zeros, *(torch.arange(1, len(choice) + 1).to(source) for choice in encoded)))
    return {
        "input_ids": torch.cat(ids),
        "position_ids": torch.stack((first, second)),
        "attention_mask": mask,
        "choice_ids": encoded,
        "choice_indices": indices,
    }


def _tensors(model_input: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The ids and the padding mask of an encoded batch, as tensors with a row for every text."""
    ids = torch.as_tensor(model_input["input_ids"])
    ids = ids[None] if ids.dim() == 1 else ids
    visible = model_input.get("attention_mask")
    visible = torch.ones_like(ids) if visible is None else torch.as_tensor(visible).view_as(ids)
    return ids, visible


def _first_blanks(source: Tensor, mask_ids: Sequence[int]) -> Tensor:
    """The index (B) of the first mask token of each row."""
    found = torch.isin(source, source.new_tensor(mask_ids))
    without = (~found.any(dim=1)).nonzero()[:, 0].tolist()
    if without:
        rows = ", ".join(map(str, without))
        raise TokenizerError(
            f"no mask token in row {rows}; expected one of the ids {', '.join(map(str, mask_ids))} in every row",
            hint="write [MASK], or another mask token of this model, where an answer is wanted",
        )
    return found.int().argmax(dim=1).to(source.dtype)


def _targets(tokenizer: _Tokenizer, targets: str | Sequence[str], rows: int, limit: int) -> list[list[int]]:
    texts = [targets] if isinstance(targets, str) else list(targets)
    if len(texts) != rows:
        raise UsageError(f"{len(texts)} targets for {rows} rows; expected one for every row")
    return [[*tokenizer.encode_with_masks(text), tokenizer.eop_token_id][:limit] for text in texts]
