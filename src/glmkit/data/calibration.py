"""Calibration text for GPTQ: a file of the user as batches of token ids without padding.

    notes.txt      cut into rows of equal length, each behind the ids that start every text of the model
    records.jsonl  dialogues in the model's own chat format, none cut into the next; rows of a batch are equally long

A chat model is calibrated best by dialogues such as it will hold.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmkit.chat.templates import chat_format
from glmkit.data.cutting import Limits
from glmkit.data.examples import make_examples
from glmkit.data.records import read_records
from glmkit.data.rows import read_text
from glmkit.errors import DataError

TOKENS = 32_768
"""How much text is taken: more than the columns of any layer. For glm-nano 4,096 do as well as 16,384."""
_SEED = 1


def calibration_batches(
    tokenizer: Any, path: str | Path, *, tokens: int = TOKENS, length: int = 512, batch_size: int = 8
) -> list[Tensor]:
    """Reads a calibration text.

    Args:
        tokenizer: The model's tokenizer.
        path: Plain text in UTF-8 (`.txt` or `.md`), or records in any form that training reads.
        tokens: Most tokens that are taken, from the whole file evenly or at random.
        length: Most tokens of a row.
        batch_size: Most rows of a batch.

    Returns:
        Token ids, each (B, T) int64, B and T at most batch_size and length.

    Raises:
        DataError: The file is missing, is empty, or cannot be read.
        UsageError: The model has no chat format.
    """
    path = Path(path)
    if path.suffix.lower() in (".txt", ".md"):
        rows = _text_rows(tokenizer, path, tokens, length)
    else:
        rows = _record_rows(tokenizer, path, tokens, length)
    groups: dict[int, list[Tensor]] = {}
    for row in rows:
        groups.setdefault(len(row), []).append(row)
    return [batch for group in groups.values() for batch in torch.stack(group).split(batch_size)]


def _text_rows(tokenizer: Any, path: Path, tokens: int, length: int) -> list[Tensor]:
    if not path.is_file():
        raise DataError(f"there is no file {path}", hint="check the path; it is relative to the current folder")
    ids = torch.tensor(tokenizer.encode_text(read_text(path)), dtype=torch.int64)
    if not len(ids):
        raise DataError(f"{path} is empty", hint="some 100,000 characters of text as the model will read it")
    start = torch.tensor(chat_format(tokenizer).text_ids(tokenizer, ""), dtype=torch.int64)
    pieces = ids.split(length - len(start))
    step = max(1, len(pieces) * length // tokens)
    return [torch.cat((start, piece)) for piece in pieces[::step]][: max(1, tokens // length)]


def _record_rows(tokenizer: Any, path: Path, tokens: int, length: int) -> list[Tensor]:
    records = read_records(path)
    random.Random(_SEED).shuffle(records)
    rows: list[Tensor] = []
    taken = 0
    for record in records:
        if taken >= tokens:
            break
        [example] = make_examples(tokenizer, [record], Limits(total_tokens=length))[0]
        rows.append(example.input_ids.long())
        taken += len(example.input_ids)
    return rows
