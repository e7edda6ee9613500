"""How likely a model finds given tokens behind others, in the way of its family, several texts at a time.

    ChatGLM2, ChatGLM3, GLM-4   [gMASK] sop known scored         every token sees what is behind it
    ChatGLM-6B, GLM-130B        known [gMASK] | sop scored       what is known sees all of itself
    GLM (2021)                  [CLS] known [gMASK] | sop scored

A row ends in front of its last scored token, so the logits that score are those of its last columns, whatever the
family; rows are padded on the left, with the masks and positions of the decode loop. Passages that give the same row,
such as the letters of a question with options, share it.

Source: tasks/language_model/dataset.py of THUDM/GLM and evaluation/dataset.py of GLM-130B (behaviour, not code).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glmkit.engine.layout import layout_for
from glmkit.errors import UsageError
from glmkit.models.glm_config import GLMConfig
from glmkit.models.glm_scoring import network_of
from glmkit.models.language_model import LanguageModelHead
from glmkit.tokenizers.glm_tokenizer import GLMTokenizer

_LOGITS_AT_ONCE = 512  # rows of logits that exist at once, the largest tensor by far


@dataclass(frozen=True)
class Frame:
    """Control tokens around what is known.

    Args:
        before: In front of it.
        between: Behind it, in front of what is scored.
    """

    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()


@dataclass(frozen=True)
class Passage:
    """A text of which the end is scored.

    Args:
        known: Ids that the model is given.
        scored: Ids whose probabilities are asked for, at least one.
    """

    known: Sequence[int]
    scored: Sequence[int]


@dataclass(frozen=True)
class Scored:
    """What a model makes of a passage.

    Attributes:
        log_probabilities: Of each scored token, natural logarithms.
        likeliest: The token that the model would have put at each place, given the right ones behind it.
    """

    log_probabilities: list[float]
    likeliest: list[int]


def frame_of(tokenizer: Any, *, closed: bool = False) -> Frame:
    """The control tokens of a family for going on with a text.

    Args:
        tokenizer: The model's tokenizer.
        closed: Whether what is known ends in eos in GLM (2021), as its LAMBADA has it and its language modelling not.

    Returns:
        The frame. GLM without a [gMASK] has [MASK].
    """
    if tokenizer.generation >= 2:
        return Frame(tuple(tokenizer.prefix_ids))
    if tokenizer.generation == 1:
        return Frame((), (tokenizer.gmask_token_id, tokenizer.bos_token_id))
    if isinstance(tokenizer, GLMTokenizer):
        masks = tokenizer.mask_token_ids
        mask = tokenizer.gmask_token_id if len(masks) > 1 else masks[0]
        end = (tokenizer.eos_token_id,) if closed else ()
        return Frame(tuple(tokenizer.prefix_ids), (mask, *end, tokenizer.sop_token_id))
    return Frame((), (tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")))


def score_passages(
    model: Any,
    frame: Frame,
    passages: Sequence[Passage],
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Scored]:
    """Scores the ends of texts.

    Args:
        model: A language model of any family, in eval mode.
        frame: Its control tokens, see `frame_of`.
        passages: The texts.
        batch_size: Rows that go through the model together; the longest first.
        progress: Called with the number of passages done.

    Returns:
        A `Scored` for each passage, the same whatever the batch size, up to rounding.

    Raises:
        UsageError: The model has no logits of next tokens, or a passage has nothing to predict or to predict from.
    """
    if not isinstance(model, LanguageModelHead) and not isinstance(getattr(model, "config", None), GLMConfig):
        raise UsageError(
            f"{type(model).__name__} gives no probabilities of tokens, expected a language model of these families"
        )
    members: dict[tuple[int, ...], list[int]] = {}  # a row and the numbers of its passages
    for number, passage in enumerate(passages):
        row = (*frame.before, *passage.known, *frame.between, *passage.scored[:-1])
        if not passage.scored or len(row) < len(passage.scored):
            raise UsageError(f"passage {number} has no token to score, or none in front of those that are")
        members.setdefault(row, []).append(number)
    rows = sorted(members, key=lambda row: -len(row))  # memory runs out at once
    found: dict[int, Scored] = {}
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        found |= _score_rows(model, part, [members[row] for row in part], passages)
        if progress is not None:
            progress(len(found))
    return [found[number] for number in range(len(passages))]


def token_log_probabilities(model: Any, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities of tokens, without the logits of all of them at once.

    Args:
        model: The language model.
        states: (N, C), normed hidden states.
        targets: (N,) int64, the token of each.

    Returns:
        (N,) float32, natural logarithms; and the likeliest token of each, (N,) int64.
    """
    logs, best = [], []
    for few, wanted in zip(states.split(_LOGITS_AT_ONCE), targets.split(_LOGITS_AT_ONCE)):
        logits = network_of(model).logits(few).float()  # (n, V)
        best.append(logits.argmax(-1))
        logs.append(logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(logs), torch.cat(best)


@torch.inference_mode()
def _score_rows(
    model: Any, rows: Sequence[Sequence[int]], members: Sequence[Sequence[int]], passages: Sequence[Passage]
) -> dict[int, Scored]:
    """Scores passages by their numbers; `members` has those of each row."""
    hidden = _hidden(model, rows)  # (B, T, C)
    numbers = [(place, number) for place, row in enumerate(members) for number in row]
    ends = [hidden[place, -len(passages[number].scored) :] for place, number in numbers]
    states = torch.cat(ends)  # (N, C)
    targets = torch.tensor([token for _, number in numbers for token in passages[number].scored], device=states.device)
    logs, best = token_log_probabilities(model, states, targets)
    lengths = [len(passages[number].scored) for _, number in numbers]
    parts = zip(logs.split(lengths), best.split(lengths))
    return {number: Scored(log.tolist(), word.tolist()) for (_, number), (log, word) in zip(numbers, parts)}


def _hidden(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Normed hidden states (B, T, C) of rows that are padded on the left."""
    width = max(map(len, rows))
    device = next(model.parameters()).device
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    pads = torch.tensor([width - len(row) for row in rows], device=device)
    given = {**layout_for(model, ids, pads).prompt(0, width), "use_cache": False, "return_dict": True}
    if isinstance(model, LanguageModelHead):
        hidden: Tensor = model.transformer(input_ids=ids, **given).last_hidden_state
    else:
        hidden = network_of(model)(input_ids=ids, output_predict=False, **given).last_hidden_states
    return hidden
