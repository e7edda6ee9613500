"""Scores of the answers to a blank, and the losses that teach GLM (2021) to give the right one more.

    an answer of n tokens    sum of log p over its tokens and eop, / (n + 1) ^ length_penalty
    a word that is a token   its raw logit at sop, or its log p

Logits are computed where answers are predicted and nowhere else. What a batch holds is in `glmkit.data.cloze`.

Letters: `B` examples, `C` answers, `T` columns, `D` columns of an answer, `W` words.

Source: model/downstream.py and finetune_glm.py of the training repository (behaviour, not code). On purpose different:
with segments and unequal numbers of answers, the missing ones do not win.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glmkit.errors import UsageError

LOSSES = ("cross_entropy", "hinge", "generative", "mix", "adapet")
_NO_ANSWER = -10000.0  # the score of rows that only fill up


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
        logits = network_of(model).logits(hidden[torch.arange(len(hidden)), batch["sep"]]).float()  # (B, V)
        logits = logits.log_softmax(dim=-1) if take_softmax else logits
        return logits.gather(1, batch["target_ids"])
    hidden, targets, mask = chosen
    logits = network_of(model).logits(hidden[mask]).float()  # (tokens, V)
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


def network_of(model: Any) -> Any:
    """Returns the network itself, which heads keep as `glm`."""
    return getattr(model, "glm", model)


def _hidden(model: Any, ids: Tensor, positions: Tensor, mask: Tensor, **more: Any) -> Tensor:
    more = {"use_cache": False} | more
    output = network_of(model)(
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
    output = network_of(model)(
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
