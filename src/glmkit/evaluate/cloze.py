"""Scores answers to a blank with GLM (2021), and the losses that teach it to give the right one more.

    scores = score(model, tokenizer, ["The sky is [MASK]."], ["blue", "green"])       text in, numbers out
    scores = cloze_scores(model, collate_cloze(samples))                              for encoded tasks, with gradient
    loss = cloze_loss(scores, batch["labels"], "hinge", batch.get("choice_mask"))

    an answer of n tokens    sum of log p over its tokens and eop, / (n + 1) ^ length_penalty
    a word that is a token   its raw logit at sop, or its log p

Letters: `B` examples, `C` answers, `T` columns, `D` columns of an answer, `W` words.

Source: model/downstream.py and finetune_glm.py of the training repository (behaviour, not code). On purpose different:
logits are computed where answers are predicted and nowhere else; with segments and unequal numbers of answers, the
missing ones do not win.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glmkit.data.cloze import ClozeExample, FastClozeSample, collate_cloze, encode_cloze
from glmkit.errors import DataError, UsageError

LOSSES = ("cross_entropy", "hinge", "generative", "mix", "adapet")
_NO_ANSWER = -10000.0  # the score of rows that only fill up


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
    limit = _network(model).config.max_sequence_length
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
    device = next(model.parameters()).device
    found: list[int] = []
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
            found += cloze_scores(model, batch, length_penalty=length_penalty).argmax(dim=1).tolist()
    return found


def cloze_scores(
    model: Any, batch: dict[str, Tensor], *, length_penalty: float = 0.0, take_softmax: bool | None = None
) -> Tensor:
    """Scores the answers of an encoded batch, with gradient where it is wanted.

    Args:
        model: A GLM.
        batch: What `collate_cloze` returned, on the model's device.
        length_penalty: Power of the length that sums of answers are divided by.
        take_softmax: Whether log-probabilities are taken, or raw logits. None: for answers of several tokens.

    Returns:
        (B, C), or (B, W) where words are single tokens, float32. Rows that only fill up have -10000.
    """
    if "answer_ids" in batch:
        chosen = _chosen_fast(model, batch)
    elif batch["input_ids"].dim() == 3:
        chosen = _chosen_whole(model, batch)
    else:
        hidden = _hidden(model, batch["input_ids"], batch["position_ids"], batch["sep"])
        logits = _network(model).logits(hidden[torch.arange(len(hidden)), batch["sep"]]).float()  # (B, V)
        logits = logits.log_softmax(dim=-1) if take_softmax else logits
        return logits.gather(1, batch["target_ids"])
    hidden, targets, mask = chosen
    logits = _network(model).logits(hidden[mask]).float()  # (tokens, V)
    logits = logits if take_softmax is False else logits.log_softmax(dim=-1)
    sums = logits.new_zeros(mask.shape[0])
    sums = sums.index_add(0, mask.nonzero()[:, 0], logits.gather(1, targets[mask][:, None])[:, 0])
    if length_penalty > 0:
        sums = sums / mask.sum(dim=1) ** length_penalty
    scores = sums.view(batch["target_ids"].shape[:2])
    used = batch["choice_mask"].to(scores) if "choice_mask" in batch else torch.ones_like(scores)
    if "segment_ids" in batch:
        scores, used = _of_answers(scores * used, batch["segment_ids"], used)
    return scores * used + _NO_ANSWER * (1 - used)


def cloze_loss(
    scores: Tensor, labels: Tensor, kind: str = "cross_entropy", choice_mask: Tensor | None = None
) -> Tensor:
    """The loss of cloze fine-tuning, a mean over examples.

    Args:
        scores: (B, C) of `cloze_scores`.
        labels: (B) int64, which answer is right.
        kind: "cross_entropy" over answers; "hinge", a margin of 1 to every wrong one; "generative", minus the right
            score; "mix", the first and the third; "adapet", every wrong score up and the right one down.
        choice_mask: (B, C), 0 for rows that only fill up. Needed by "adapet" alone.

    Returns:
        float32 scalar.

    Raises:
        UsageError: There is no such loss.
    """
    scores = scores.float()
    right = scores.gather(1, labels[:, None])
    if kind == "cross_entropy":
        return F.cross_entropy(scores, labels)
    if kind == "hinge":
        return (1 + scores - right).clamp(min=0).sum(dim=1).mean() - 1  # the right one alone would add 1
    if kind == "generative":
        return -right.mean()
    if kind == "mix":
        return F.cross_entropy(scores, labels) - right.mean()
    if kind == "adapet":
        signs = torch.ones_like(scores).scatter(1, labels[:, None], -1.0)
        signs = signs if choice_mask is None else signs * choice_mask.to(scores)
        return (scores * signs).sum() / len(scores)
    raise UsageError(f"no loss {kind!r}; expected one of {', '.join(LOSSES)}")


def _network(model: Any) -> Any:
    """The network itself, which heads keep as `glm`."""
    return getattr(model, "glm", model)


def _hidden(model: Any, ids: Tensor, positions: Tensor, mask: Tensor, **more: Any) -> Tensor:
    more = {"use_cache": False} | more
    output = _network(model)(
        input_ids=ids, position_ids=positions, attention_mask=mask, return_dict=True, output_predict=False, **more
    )
    return output.last_hidden_states


def _chosen_whole(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Every answer in a row with its text: hidden (B*C, T, h), targets (B*C, T), and where they count."""
    ids, positions, sep = (batch[name].flatten(0, 1) for name in ("input_ids", "position_ids", "sep"))
    return (
        _hidden(model, ids, positions, sep),
        batch["target_ids"].flatten(0, 1),
        batch["logit_mask"].flatten(0, 1).bool(),
    )


def _chosen_fast(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Texts once, then all answers against their keys and values: as `_chosen_whole`, with D for T."""
    ids, (_, count, width) = batch["input_ids"], batch["answer_ids"].shape
    output = _network(model)(
        input_ids=ids,
        position_ids=batch["position_ids"],
        attention_mask=batch["sep"],
        use_cache=True,
        return_dict=True,
        output_predict=False,
    )
    cache = output.past_key_values
    cache.batch_repeat_interleave(count)
    of_text = torch.arange(ids.shape[1], device=ids.device) < batch["sep"].repeat_interleave(count)[:, None]  # (B*C, T)
    of_answer = torch.ones(width, width, dtype=torch.bool, device=ids.device).tril()
    visible = torch.cat((of_text[:, None].expand(-1, width, -1), of_answer.expand(len(of_text), -1, -1)), dim=2).long()
    answers, positions = (batch[name].flatten(0, 1) for name in ("answer_ids", "answer_position_ids"))
    hidden = _hidden(model, answers, positions, visible[:, None], past_key_values=cache, use_cache=True)
    return hidden, batch["target_ids"].flatten(0, 1), batch["logit_mask"].flatten(0, 1).bool()


def _of_answers(scores: Tensor, segments: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Adds up the scores (B, rows) of an answer's segments, and tells which answers there are."""
    count = int(segments.max()) + 1
    shape = (len(scores), count)
    sums = scores.new_zeros(shape).scatter_add(1, segments, scores)
    rows = used.new_zeros(shape).scatter_add(1, segments, used)
    return sums, (rows > 0).to(scores)


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
