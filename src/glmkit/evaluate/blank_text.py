"""Texts with a blank, [MASK], and its choices or filling, as each family takes them.

    GLM-130B                 text [MASK] | sop choice | sop choice …     as `glmkit.data.glm130b_tasks` has it
    GLM (2021)               [CLS] text [MASK] eos | sop choice …        the same, with two rows of positions
    ChatGLM-6B               text [gMASK] | sop choice …                 likewise; [MASK] where the text has one
    ChatGLM2/3, GLM-4        [gMASK] sop text choice                     a row for each choice

The last ones read from left to right: a blank at the end of the text is left out, and for one in the middle the choices
are compared together with what follows it. With the others a text without a blank gets one at its end.
A text that is too long loses its beginning or its middle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glmkit.chat.messages import Message
from glmkit.chat.templates import prompt_ids
from glmkit.data.glm130b_tasks import Row, TaskIds, batch_rows, generation_row, multiple_choice_row
from glmkit.errors import DataError
from glmkit.evaluate.scoring import Passage, frame_of, score_passages, token_log_probabilities
from glmkit.evaluate.text import joined, split_ids
from glmkit.models.glm_scoring import network_of
from glmkit.models.language_model import LanguageModelHead
from glmkit.tokenizers.glm_tokenizer import GLMTokenizer

Text = str | list[int]
_BLANK = re.compile(r"\[[gs]?MASK\]")


@dataclass(frozen=True)
class Rendering:
    """How texts become rows.

    Args:
        max_seq_length: Longest row in tokens.
        use_task_mask: Whether the blank that a text gets is [gMASK], where there is one.
        unidirectional: Whether no token sees a later one.
        cut: Where a text that is too long loses tokens: "beginning" or "middle".
    """

    max_seq_length: int = 2048
    use_task_mask: bool = False
    unidirectional: bool = False
    cut: str = "beginning"


def choice_scores(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    choices: Sequence[Sequence[Text]],
    how: Rendering,
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Scores what may stand in the blank of each text: the sum of the tokens' log-probabilities.

    Args:
        model: A language model of any family.
        tokenizer: Its tokenizer.
        texts: Texts, or ids.
        choices: Of each text its choices, texts or ids.
        how: How texts become rows.
        batch_size: Rows that go through the model together.
        progress: Called with the number of texts done.

    Returns:
        For each text a score for each choice.

    Raises:
        DataError: A text or its choices do not fit the model.
    """
    if tokenizer.generation >= 2:
        passages = [
            _passage(tokenizer, text, one, how) for text, several in zip(texts, choices) for one in several
        ]  # those of one token share a row
        frame = frame_of(tokenizer)
        sums = iter(
            math.fsum(one.log_probabilities) for one in score_passages(model, frame, passages, batch_size=batch_size)
        )
        if progress is not None:
            progress(len(texts))
        return [[next(sums) for _ in several] for several in choices]
    two_rows = _has_two_rows(model)
    rows = [_choice_row(tokenizer, text, several, how, two_rows) for text, several in zip(texts, choices)]
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].token_ids))
    found: dict[int, list[float]] = {}
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        found |= zip(part, _row_scores(model, [rows[number] for number in part]))
        if progress is not None:
            progress(len(found))
    return [found[number] for number in range(len(texts))]


def writing_prompt(tokenizer: Any, text: Text, how: Rendering, *, max_new_tokens: int, chat: bool = False) -> list[int]:
    """The ids behind which a model fills the blank of a text, or goes on with it.

    Args:
        tokenizer: The model's tokenizer.
        text: A text, or ids.
        how: How texts become rows.
        max_new_tokens: Room that is left for the filling.
        chat: Whether the text is a user's message.

    Returns:
        The prompt's ids.

    Raises:
        DataError: The text has a blank that the model cannot fill, or the model has no form of chat.
    """
    room = how.max_seq_length - max_new_tokens - 2
    if chat:
        if tokenizer.generation == 0 or not isinstance(text, str):
            raise DataError("ask: chat needs a text and a model that was trained to chat", hint="leave out ask")
        return _chat_prompt(tokenizer, text, room, how.cut)
    if tokenizer.generation >= 2:
        if isinstance(text, str):
            text, behind = _around_blank(text)
            if behind:
                raise DataError(
                    f"a blank stands in front of {behind[:40]!r}, and this model only goes on at the end of a text",
                    hint="put the blank at the end; of choices (type mul) it may stand anywhere",
                )
            text = text.rstrip()
        return [*tokenizer.prefix_ids, *_fitted(_encoded(tokenizer, text), room, how.cut)]
    body, task_mask = _blank_body(tokenizer, text, how, room)
    ids = _task_ids(tokenizer)
    if tokenizer.generation == 1 or isinstance(tokenizer, GLMTokenizer):
        return [*body, ids.sop]
    length = len(body) + max_new_tokens + 2  # it is cut already
    return generation_row(
        body,
        ids,
        max_gen_length=max_new_tokens,
        max_seq_length=length,
        use_task_mask=task_mask,
        unidirectional=how.unidirectional,
    ).token_ids


# Models that read from left to right ---------------------------------------------------------------------------------


def _passage(tokenizer: Any, text: Text, choice: Text, how: Rendering) -> Passage:
    if not isinstance(text, str) or not isinstance(choice, str):
        known, scored = _encoded(tokenizer, text), _encoded(tokenizer, choice)
    else:
        before, behind = _around_blank(text)
        before = before.rstrip()
        known, scored = split_ids(tokenizer, before, joined(before, choice) + behind)
    if not choice:
        raise DataError("a choice is empty, and this model has no token for nothing")
    room = how.max_seq_length - len(tokenizer.prefix_ids) - len(scored)
    if room < 1:
        raise DataError(f"a choice has {len(scored)} tokens, more than a row of {how.max_seq_length} has room for")
    return Passage(_fitted(known, room, how.cut), scored)


def _around_blank(text: str) -> tuple[str, str]:
    """What stands in front of the first blank, and behind it."""
    found = _BLANK.search(text)
    return (text, "") if found is None else (text[: found.start()], text[found.end() :].rstrip())


def _chat_prompt(tokenizer: Any, text: str, room: int, cut: str) -> list[int]:
    """The prompt of a message that is shortened until it fits; a shortened text may have other tokens at its cut."""
    ids = prompt_ids(tokenizer, [Message("user", text)])
    while len(ids) > room:
        shorter = _fitted(text, max(1, len(text) * room // len(ids) - 1), cut)
        if len(shorter) >= len(text):
            raise DataError(f"no room for a message in {room} tokens")
        text = shorter
        ids = prompt_ids(tokenizer, [Message("user", text)])
    return ids


# Models that fill blanks ---------------------------------------------------------------------------------------------


def _task_ids(tokenizer: Any) -> TaskIds:
    if tokenizer.generation == 1:
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        return TaskIds(tokenizer.mask_token_id, tokenizer.gmask_token_id, *ends)
    if not isinstance(tokenizer, GLMTokenizer):
        return TaskIds(*(tokenizer.get_command(name) for name in ("[MASK]", "[gMASK]", "sop", "eop")))
    mask, ends = tokenizer.mask_token_ids[0], (tokenizer.sop_token_id, tokenizer.eop_token_id)
    has_gmask = len(tokenizer.mask_token_ids) > 1
    return TaskIds(mask, tokenizer.gmask_token_id if has_gmask else mask, *ends)


def _blank_body(tokenizer: Any, text: Text, how: Rendering, room: int) -> tuple[list[int], bool]:
    """All that stands in front of sop, and whether its blank is [gMASK]. `room` is for a text that gets a blank."""
    ids, is_glm = _task_ids(tokenizer), isinstance(tokenizer, GLMTokenizer)
    if how.unidirectional:
        if is_glm or tokenizer.generation == 1:
            raise DataError("unidirectional: only GLM-130B can read a text that stands behind its blank so")
        return _fitted(_encoded(tokenizer, text), room, how.cut), True
    body = _fitted(_encoded(tokenizer, text), room - 2 if is_glm else room, how.cut)
    kinds = (ids.mask, ids.gmask)
    if is_glm or tokenizer.generation == 1:
        if not set(body) & set(kinds):
            body = [*body, ids.gmask if how.use_task_mask or not is_glm else ids.mask]
        ends = [] if not is_glm or body[-1] == ids.gmask != ids.mask else [tokenizer.eos_token_id]
        return [*(tokenizer.prefix_ids if is_glm else []), *body, *ends], ids.mask not in body
    mask = ids.gmask if how.use_task_mask else ids.mask
    return (body if mask in body else [*body, mask]), how.use_task_mask


def _choice_row(tokenizer: Any, text: Text, choices: Sequence[Text], how: Rendering, two_rows: bool) -> Row:
    """A row whose positions stay at the blank where there are two rows of them."""
    ids = _task_ids(tokenizer)
    encoded = [_encoded(tokenizer, choice) or [ids.eop] for choice in choices]
    single = all(len(choice) == 1 for choice in encoded)
    width = 1 if single else sum(map(len, encoded))
    body, task_mask = _blank_body(tokenizer, text, how, how.max_seq_length - width - 2)
    if two_rows:
        blank = next(token for token in body if token in (ids.mask, ids.gmask))
        ids, task_mask = TaskIds(blank, blank, ids.sop, ids.eop), False
    return multiple_choice_row(
        body,
        encoded,
        ids,
        single_token=single,
        max_seq_length=len(body) + width + 2,  # it is cut already
        use_task_mask=task_mask,
        unidirectional=how.unidirectional,
    )


@torch.inference_mode()
def _row_scores(model: Any, rows: Sequence[Row]) -> list[list[float]]:
    """Scores of the choices of rows; logits are made where choices are, only."""
    ids, positions, blocked = (one.to(next(model.parameters()).device) for one in batch_rows(rows, multiple=1))
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False, "return_dict": True}
    if not isinstance(model, LanguageModelHead):
        given |= {"attention_mask": (~blocked).long(), "position_ids": _two_rows(rows, positions)}
        hidden = network_of(model)(output_predict=False, **given).last_hidden_states
    else:
        if _has_two_rows(model):
            positions = _two_rows(rows, positions)
        hidden = model.transformer(attention_mask=blocked, position_ids=positions, **given).last_hidden_state
    states, targets, lengths = [], [], []
    for number, row in enumerate(rows):
        places = row.choice_places * len(row.choices) if len(row.choice_places) == 1 else row.choice_places
        for columns, choice in zip(places, row.choices):
            states.append(hidden[number, columns])
            targets += choice
            lengths.append(len(choice))
    logs, _ = token_log_probabilities(model, torch.cat(states), torch.tensor(targets, device=hidden.device))
    sums = iter([float(part.double().sum()) for part in logs.split(lengths)])
    return [[next(sums) for _ in row.choices] for row in rows]


def _has_two_rows(model: Any) -> bool:
    """Whether a token has two positions: where it belongs, and how far into the filling it is."""
    return not isinstance(model, LanguageModelHead) or getattr(model.config, "position_encoding_2d", False)


def _two_rows(rows: Sequence[Row], positions: Tensor) -> Tensor:
    """Both rows of positions, (B, 2, S), from the first, (B, S)."""
    inside = torch.zeros_like(positions)
    for number, row in enumerate(rows):
        for columns in row.choice_places:
            inside[number, columns] = torch.arange(1, len(columns) + 1, device=positions.device)
    return torch.stack((positions, inside), dim=1)


# Text -----------------------------------------------------------------------------------------------------------------


def _encoded(tokenizer: Any, text: Text) -> list[int]:
    """Ids of a text, in which the families that fill blanks have [MASK] as a token."""
    if not isinstance(text, str):
        if max(text) >= len(tokenizer):
            raise DataError(f"the ids of the data reach {max(text)}, and this vocabulary ends at {len(tokenizer) - 1}")
        return list(text)
    if tokenizer.generation >= 2:
        return list(tokenizer.encode_text(text))
    if isinstance(tokenizer, GLMTokenizer):
        return list(tokenizer.encode_with_masks(text))
    if tokenizer.generation == 0:
        return list(tokenizer.encode(text))
    parts = text.split("[MASK]")
    ids = list(tokenizer.encode_text(parts[0]))
    for part in parts[1:]:
        ids += [tokenizer.mask_token_id, *tokenizer.encode_text(part)]
    return ids


def _fitted(text: Any, room: int, cut: str) -> Any:
    """A list or a text, without its beginning or middle if it is longer than `room`."""
    if len(text) <= room:
        return text
    if room < 1:
        raise DataError("no room for a text beside the answer", hint="raise max_seq_length, or shorten max_gen_length")
    first = room // 2 if cut == "middle" else 0
    return text[:first] + text[len(text) - (room - first) :]
