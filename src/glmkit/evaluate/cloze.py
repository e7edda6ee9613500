"""Scores answers to a blank with GLM (2021), and answers cloze tasks.

    scores = score(model, tokenizer, ["The sky is [MASK]."], ["blue", "green"])       text in, numbers out
    scores = cloze_scores(model, collate_cloze(samples))                              for encoded tasks, with gradient
    loss = cloze_loss(scores, batch["labels"], "hinge", batch.get("choice_mask"))

The last two are of `glmkit.models.glm_scoring`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glmkit.data.cloze import ClozeExample, FastClozeSample, collate_cloze, encode_cloze
from glmkit.errors import DataError
from glmkit.models.glm_scoring import LOSSES, cloze_loss, cloze_scores, network_of

__all__ = ["LOSSES", "answer_scores", "classify", "cloze_loss", "cloze_scores", "score"]


def score(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[str] | Sequence[Sequence[str]],
    *,
    length_penalty: float = 0.0,
    take_softmax: bool = True,
    batch_size: int = 16,
) -> list[list[float]]:
    """Scores answers to the blank of every text. A text is read once, whatever the number of its answers.

    Args:
        model: A GLM, on any device.
        tokenizer: Its tokenizer.
        texts: Texts with a mask token; of several the last is filled.
        labels: The answers, the same for all texts or a list for each. A blank in front belongs to the answer.
        length_penalty: Power of the length, eop counted, that sums are divided by; 1 gives means, 0 sums.
        take_softmax: False sums raw logits instead of log-probabilities.
        batch_size: How many texts are read together.

    Returns:
        For each text a score for each answer; the highest is the model's choice.

    Raises:
        DataError: A text without mask token, without answers, or longer than the model reads; the message says which.
    """
    common = all(isinstance(one, str) for one in labels)
    answers: list[Sequence[str]] = [list(labels)] * len(texts) if common else list(labels)  # type: ignore[arg-type]
    if len(answers) != len(texts):
        raise DataError(f"{len(answers)} lists of answers for {len(texts)} texts; expected one for each")
    limit = network_of(model).config.max_sequence_length
    samples = [_encode(tokenizer, number, *pair, limit) for number, pair in enumerate(zip(texts, answers))]
    device = next(model.parameters()).device
    found: list[list[float]] = []
    with torch.inference_mode():
        for start in range(0, len(samples), batch_size):
            part = samples[start : start + batch_size]
            batch = {name: value.to(device) for name, value in collate_cloze(_levelled(tokenizer, part)).items()}
            rows = cloze_scores(model, batch, length_penalty=length_penalty, take_softmax=take_softmax).tolist()
            found += [row[: len(sample.answer_ids)] for row, sample in zip(rows, part)]
    return found


def classify(
    model: Any,
    tokenizer: Any,
    task: str,
    examples: Sequence[ClozeExample],
    *,
    pattern_id: int = 0,
    max_seq_length: int = 256,
    multi_token: bool = False,
    length_penalty: float = 0.0,
    batch_size: int = 16,
) -> list[int]:
    """Answers the examples of a task.

    Args:
        model: A GLM, on any device.
        tokenizer: Its tokenizer.
        task: A name in `glmkit.data.cloze_patterns.TASKS`.
        examples: The examples.
        pattern_id: Which pattern of the task.
        max_seq_length: Columns that an example gets.
        multi_token: Whether words that are one token are scored as answers with an end too.
        length_penalty: See `score`.
        batch_size: How many examples are read together.

    Returns:
        For each example the index of the label or answer with the highest score.

    Raises:
        DataError: See `glmkit.data.cloze.encode_cloze`.
    """
    scores = answer_scores(
        model,
        tokenizer,
        task,
        examples,
        pattern_id=pattern_id,
        max_seq_length=max_seq_length,
        multi_token=multi_token,
        length_penalty=length_penalty,
        batch_size=batch_size,
    )
    return [max(range(len(own)), key=own.__getitem__) for own in scores]


def answer_scores(
    model: Any,
    tokenizer: Any,
    task: str,
    examples: Sequence[ClozeExample],
    *,
    pattern_id: int = 0,
    max_seq_length: int = 256,
    multi_token: bool = False,
    length_penalty: float = 0.0,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Scores the labels or answers of the examples of a task.

    Args:
        model: A GLM, on any device.
        tokenizer: Its tokenizer.
        task: A name in `glmkit.data.cloze_patterns.TASKS`.
        examples: The examples.
        pattern_id: Which pattern of the task.
        max_seq_length: Columns that an example gets.
        multi_token: Whether words that are one token are scored as answers with an end too.
        length_penalty: See `score`.
        batch_size: How many examples are read together.
        progress: Called with the number of examples done.

    Returns:
        For each example a score for each label or answer.

    Raises:
        DataError: See `glmkit.data.cloze.encode_cloze`.
    """
    device = next(model.parameters()).device
    found: list[list[float]] = []
    with torch.inference_mode():
        for start in range(0, len(examples), batch_size):
            samples = [
                encode_cloze(
                    tokenizer,
                    task,
                    example,
                    pattern_id=pattern_id,
                    max_seq_length=max_seq_length,
                    multi_token=multi_token,
                    loss="generative",  # the answers of "wsc" too, not the right one alone
                )
                for example in examples[start : start + batch_size]
            ]
            batch = {name: value.to(device) for name, value in collate_cloze(samples).items()}
            scores = cloze_scores(model, batch, length_penalty=length_penalty).tolist()
            counts = (
                batch["choice_mask"].sum(dim=1).tolist() if "choice_mask" in batch else [len(row) for row in scores]
            )
            found += [row[:count] for row, count in zip(scores, counts)]
            if progress is not None:
                progress(len(found))
    return found


def _encode(tokenizer: Any, number: int, text: str, answers: Sequence[str], limit: int) -> FastClozeSample:
    """A text and its answers, not filled up."""
    ids = [tokenizer.cls_token_id, *tokenizer.encode_with_masks(text), tokenizer.eos_token_id]
    masks = set(tokenizer.mask_token_ids)
    blank = max((place for place, index in enumerate(ids) if index in masks), default=None)
    if blank is None:
        raise DataError(f"text {number} has no mask token: {text[:80]!r}", hint="write [MASK] where the answer belongs")
    if isinstance(answers, str) or not answers:
        raise DataError(f"text {number} has the answers {answers!r}; expected a list of texts")
    encoded = [[*tokenizer.encode_with_masks(answer), tokenizer.eop_token_id] for answer in answers]
    width = max(map(len, encoded))
    if max(len(ids), width) > limit:
        raise DataError(
            f"text {number} has {len(ids)} tokens and its longest answer {width}; the model reads {limit}",
            hint="shorten the text",
        )
    rows = [torch.tensor([tokenizer.sop_token_id, *answer[:-1]]) for answer in encoded]
    steps = [torch.arange(1, len(answer) + 1) for answer in encoded]
    return FastClozeSample(
        torch.tensor(ids),
        torch.stack((torch.arange(len(ids)), torch.zeros(len(ids), dtype=torch.int64))),
        torch.tensor(len(ids)),
        _filled(rows, width, tokenizer.eos_token_id),
        torch.stack((_filled([torch.full_like(one, blank) for one in steps], width), _filled(steps, width)), dim=1),
        _filled([torch.tensor(answer) for answer in encoded], width),
        _filled([torch.ones_like(one) for one in steps], width),
        label=0,
    )


def _levelled(tokenizer: Any, samples: Sequence[FastClozeSample]) -> list[FastClozeSample]:
    """The samples of a batch, filled on the right to one width."""
    width = max(len(sample.input_ids) for sample in samples)
    deep = max(sample.answer_ids.shape[1] for sample in samples)
    found = []
    for sample in samples:
        more, deeper = width - len(sample.input_ids), deep - sample.answer_ids.shape[1]
        eos = tokenizer.eos_token_id
        found.append(
            FastClozeSample(
                F.pad(sample.input_ids, (0, more), value=eos),
                F.pad(sample.position_ids, (0, more)),
                sample.sep,
                F.pad(sample.answer_ids, (0, deeper), value=eos),
                F.pad(sample.answer_position_ids, (0, deeper)),
                F.pad(sample.target_ids, (0, deeper)),
                F.pad(sample.logit_mask, (0, deeper)),
                sample.label,
            )
        )
    return found


def _filled(rows: Sequence[Tensor], width: int, filler: int = 0) -> Tensor:
    return torch.stack([F.pad(row, (0, width - len(row)), value=filler) for row in rows])
