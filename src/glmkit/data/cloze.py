"""Cloze fine-tuning of GLM (2021): an example of a classification task becomes a text with a blank and its answers.

    [CLS] side 1, side 2 eos | sop                     one token an answer: the logits at sop, at the words' columns
    [CLS] side 1, side 2 eos | sop answer              a row for each answer: its log-probability, eop included
                                target: answer eop
    [CLS] side 1, side 2 eos                           fast: this once, then every answer against its memory

Row 0 of the positions counts up to `sep`, the length of the first part, which is read in both directions; behind it is
the index of the blank, and row 1 counts 1, 2, 3. Rows are filled with eos to `max_seq_length`, positions 0.

A text that is too long loses tokens one by one, the last of the last part that may be shortened, on the side with more
tokens in such parts (the second side if equal).

Letters: `T` columns, `C` answers, `W` words that stand for labels, `D` columns of the fast form's answers.

Source: tasks/superglue/pvp.py and tasks/data_utils.py of the training repository (behaviour, not code). On purpose
different: where nothing is left to shorten there is an error that names the example; continuous prompts do not exist.
"""

from __future__ import annotations

import string
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from glmkit.data.cloze_patterns import MASK, TASKS, ClozeTask, Pattern
from glmkit.errors import DataError, UsageError

FAST_ANSWER_TOKENS = 16  # what the fast form cuts answers to
_JOINERS = {"cause": " because", "effect": ", so"}


class ClozeTokenizer(Protocol):
    """What is needed of a tokenizer; the four of GLM have it."""

    def get_command(self, name: str) -> int: ...

    def encode_with_masks(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class ClozeExample:
    """One example of a task.

    Args:
        text_a: The first text.
        text_b: The second text, if the task has one.
        label: One of the task's labels, or None.
        meta: What else the task's patterns name.
        uid: What errors and results call it.
    """

    text_a: str
    text_b: str | None = None
    label: Hashable = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    uid: Any = None


@dataclass(frozen=True)
class ClozeSample:
    """An encoded example. Shapes for one token an answer; with a row for each answer all but `label` have (C, ...).

    Attributes:
        input_ids: (T) int64.
        position_ids: (2, T) int64.
        sep: () int64, length of the part that is read in both directions: the model's attention mask.
        target_ids: (W) int64, the words' ids; or (C, T), the token that each position predicts.
        logit_mask: (T) int64, 1 where an answer is predicted.
        label: Index of the right answer.
        segment_ids: (C) int64, the answer each row belongs to, if answers are cut into segments.
        uid: Of the example.
    """

    input_ids: Tensor
    position_ids: Tensor
    sep: Tensor
    target_ids: Tensor
    logit_mask: Tensor
    label: int
    segment_ids: Tensor | None = None
    uid: Any = None


@dataclass(frozen=True)
class FastClozeSample:
    """An encoded example whose text is read once for all answers.

    Attributes:
        input_ids: (T) int64, the text.
        position_ids: (2, T) int64.
        sep: () int64, length of the text.
        answer_ids: (C, D) int64, sop and the answer without its last token.
        answer_position_ids: (C, 2, D) int64.
        target_ids: (C, D) int64.
        logit_mask: (C, D) int64.
        label: Index of the right answer.
        uid: Of the example.
    """

    input_ids: Tensor
    position_ids: Tensor
    sep: Tensor
    answer_ids: Tensor
    answer_position_ids: Tensor
    target_ids: Tensor
    logit_mask: Tensor
    label: int
    uid: Any = None


class _Text(str):
    """A field of an example, with what patterns do to it."""

    __slots__ = ()

    @property
    def bare(self) -> _Text:
        return _Text(self.rstrip(string.punctuation))

    @property
    def low(self) -> _Text:
        return _Text(self[:1].lower() + self[1:])

    @property
    def trim(self) -> _Text:
        return _Text(self.rstrip())


def encode_cloze(
    tokenizer: ClozeTokenizer,
    task: str,
    example: ClozeExample,
    *,
    pattern_id: int = 0,
    max_seq_length: int = 256,
    multi_token: bool = False,
    segment_length: int = 0,
    loss: str = "cross_entropy",
    training: bool = False,
) -> ClozeSample:
    """Encodes an example for scoring its answers, or for learning to.

    Args:
        tokenizer: The model's tokenizer.
        task: A name in `TASKS`; case does not matter.
        example: The example.
        pattern_id: Which pattern of the task.
        max_seq_length: T, the number of columns.
        multi_token: Whether each answer gets a row of its own. Always so where answers are texts of the example.
        segment_length: With a row for each answer: cuts answers into pieces of so many tokens, a row each; later ones
            have the earlier ones in front of their blank. 0 cuts none.
        loss: The loss the sample is for. "wsc" has a sample with one row, the right answer, unless it is "generative"
            or "mix".
        training: Whether "wsc" may take the right answer to be the first.

    Returns:
        The sample. For the one row of "wsc", `target_ids` and `logit_mask` are (T).

    Raises:
        DataError: The example lacks a field, has another label, or cannot be shortened enough; a word that stands for
            a label is no single token.
        UsageError: There is no such task or pattern, or `segment_length` is negative.
    """
    if segment_length < 0:
        raise UsageError(f"segment_length={segment_length}: expected a number of tokens, or 0 to cut no answers")
    found, pattern, parts = _filled(task, pattern_id, example)
    label = _label(found, example)
    if not found.answers and not multi_token:
        words = [_single_token(tokenizer, (pattern.words or {})[one]) for one in found.labels]
        body = _shortened(tokenizer, parts, 0, max_seq_length, example, extra=1)
        ids, positions, sep, _, mask = _row(tokenizer, body, None, max_seq_length)
        return ClozeSample(ids, positions, sep, torch.tensor(words), mask, label, uid=example.uid)
    answers = _answers(tokenizer, found, pattern, example)
    if task.lower() == "wsc" and loss not in ("generative", "mix"):
        body = _shortened(tokenizer, parts, len(answers[0]), max_seq_length, example)
        return ClozeSample(*_row(tokenizer, body, answers[0], max_seq_length), label, uid=example.uid)
    rows, segments = [], []
    for number, answer in enumerate(answers):
        body = _shortened(tokenizer, parts, len(answer), max_seq_length, example)
        for start in range(0, len(answer), segment_length or len(answer)):
            segment = answer[start : start + (segment_length or len(answer))]
            rows.append(_row(tokenizer, body, segment, max_seq_length))
            segments.append(number)
            blank = body.index(tokenizer.get_command("MASK"))
            body = body[:blank] + segment + body[blank:]
    label = 0 if task.lower() == "wsc" and training else label
    ids, positions, sep, targets, mask = (torch.stack(column) for column in zip(*rows))
    numbers = torch.tensor(segments) if segment_length else None
    return ClozeSample(ids, positions, sep, targets, mask, label, numbers, example.uid)


def encode_cloze_fast(
    tokenizer: ClozeTokenizer,
    task: str,
    example: ClozeExample,
    *,
    pattern_id: int = 0,
    max_seq_length: int = 256,
    training: bool = False,
) -> FastClozeSample:
    """Encodes an example so that its text is read once and every answer against the memory of it.

    Args:
        tokenizer: The model's tokenizer.
        task: A name in `TASKS`.
        example: The example.
        pattern_id: Which pattern of the task.
        max_seq_length: T, columns of the text.
        training: Whether "wsc" may take the right answer to be the first.

    Returns:
        The sample; answers are cut to 16 tokens, eop included.

    Raises:
        DataError: See `encode_cloze`.
        UsageError: There is no such task or pattern.
    """
    found, pattern, parts = _filled(task, pattern_id, example)
    body = _shortened(tokenizer, parts, 0, max_seq_length, example, extra=1)
    ids = [tokenizer.get_command("ENC"), *body, tokenizer.get_command("eos")]
    blank = ids.index(tokenizer.get_command("MASK"))
    answers = [answer[:FAST_ANSWER_TOKENS] for answer in _answers(tokenizer, found, pattern, example)]
    eos, sop = tokenizer.get_command("eos"), tokenizer.get_command("sop")
    positions = torch.zeros(2, max_seq_length, dtype=torch.int64)
    positions[0, : len(ids)] = torch.arange(len(ids))
    answer_positions = torch.zeros(len(answers), 2, FAST_ANSWER_TOKENS, dtype=torch.int64)
    for number, answer in enumerate(answers):
        answer_positions[number, 0, : len(answer)] = blank
        answer_positions[number, 1, : len(answer)] = torch.arange(1, len(answer) + 1)
    return FastClozeSample(
        _padded(ids, max_seq_length, eos),
        positions,
        torch.tensor(len(ids)),
        torch.stack([_padded([sop, *answer[:-1]], FAST_ANSWER_TOKENS, eos) for answer in answers]),
        answer_positions,
        torch.stack([_padded(answer, FAST_ANSWER_TOKENS, 0) for answer in answers]),
        torch.stack([_padded([1] * len(answer), FAST_ANSWER_TOKENS, 0) for answer in answers]),
        0 if task.lower() == "wsc" and training else _label(found, example),
        example.uid,
    )


def collate_cloze(samples: Sequence[ClozeSample | FastClozeSample]) -> dict[str, Tensor]:
    """Joins samples into a batch.

    Args:
        samples: B samples of one kind.

    Returns:
        Every tensor of the samples by its name, (B, ...); `labels` (B); and where samples have a row for each answer,
        `choice_mask` (B, C): 0 for rows that only fill up, which repeat the first.

    Raises:
        DataError: The samples are of several kinds.
    """
    tensors = [{name: value for name, value in vars(sample).items() if isinstance(value, Tensor)} for sample in samples]
    if not samples or any(one.keys() != tensors[0].keys() for one in tensors):
        raise DataError("a batch needs samples, and all of one kind")
    batch = {"labels": torch.tensor([sample.label for sample in samples])}
    of_answers = "answer_ids" if "answer_ids" in tensors[0] else "input_ids"
    if tensors[0][of_answers].dim() == 1:
        return batch | {name: torch.stack([one[name] for one in tensors]) for name in tensors[0]}
    counts = [len(one[of_answers]) for one in tensors]
    most = max(counts)
    whole = ("input_ids", "position_ids", "sep") if of_answers == "answer_ids" else ()
    for name in tensors[0]:
        rows = [one[name] for one in tensors]
        if name not in whole:
            rows = [torch.cat((row, row[:1].expand(most - len(row), *row.shape[1:]))) for row in rows]
        batch[name] = torch.stack(rows)
    return batch | {"choice_mask": (torch.arange(most) < torch.tensor(counts)[:, None]).long()}


def cloze_parts(task: str, example: ClozeExample, pattern_id: int = 0) -> tuple[list[str], list[str]]:
    """Shows an example in a pattern.

    Args:
        task: A name in `TASKS`.
        example: The example.
        pattern_id: Which pattern of the task.

    Returns:
        The parts of both sides, as text, with [MASK] for the blank.

    Raises:
        DataError: The example lacks a field.
        UsageError: There is no such task or pattern.
    """
    _, _, sides = _filled(task, pattern_id, example)
    first, second = ([text for text, _ in side] for side in sides)
    return first, second


_Sides = list[list[tuple[str, bool]]]  # of each side the parts, and whether a part may be shortened


def _filled(name: str, pattern_id: int, example: ClozeExample) -> tuple[ClozeTask, Pattern, _Sides]:
    key = name.lower()
    if key not in TASKS:
        raise UsageError(f"no task {name!r}; expected one of {', '.join(TASKS)}")
    if key == "race" and "_" in (example.text_b or ""):
        key = "race-blank"
    task = TASKS[key]
    if not isinstance(pattern_id, int) or not 0 <= pattern_id < len(task.patterns):
        raise UsageError(f"no pattern {pattern_id} of {name}; expected one from 0 to {len(task.patterns) - 1}")
    pattern = task.patterns[pattern_id]
    fields = _fields(key, example)
    sides: _Sides = []
    for side in (pattern.first, pattern.second):
        filled = []
        for part in side:
            short = part.startswith("<") and part.endswith(">")
            filled.append((_fill(part[1:-1] if short else part, fields, key, example), short))
        sides.append(filled)
    return task, pattern, sides


def _fill(template: str, fields: Mapping[str, Any], task: str, example: ClozeExample) -> str:
    try:
        return template.format(**fields)
    except KeyError as error:
        raise DataError(f"example {example.uid!r} of {task} lacks {error}; the pattern has {template!r}") from None


def _fields(task: str, example: ClozeExample) -> dict[str, Any]:
    for name, text in (("text_a", example.text_a), ("text_b", example.text_b or "")):
        if not isinstance(text, str):
            raise DataError(f"example {example.uid!r} of {task}: {name} is {text!r:.80}, expected a text")
    fields: dict[str, Any] = {name: _Text(value) for name, value in example.meta.items() if isinstance(value, str)}
    fields["a"] = _Text(example.text_a)
    if example.text_b is not None:
        fields["b"] = _Text(example.text_b)
    if task == "copa" and str(example.meta.get("question")) in _JOINERS:
        fields["joiner"] = _JOINERS[example.meta["question"]]
    elif task == "record":
        parts = (example.text_b or "").split("@placeholder")
        if len(parts) != 2:
            raise DataError(f"example {example.uid!r} of record: expected one @placeholder in {example.text_b!r}")
        fields["before"], fields["after"] = parts[0].rstrip(), parts[1]
    elif task == "chid":
        fields["before"], gap, fields["after"] = example.text_a.partition("#idiom#")
        if not gap:
            raise DataError(f"example {example.uid!r} of chid: expected #idiom# in {example.text_a!r:.80}")
    elif task == "race-blank":
        left, fields["right"] = f" {example.text_b}".split("_", maxsplit=1)
        fields["left"] = left.rstrip()
    elif task in ("wsc", "cluewsc"):
        fields["marked"] = _marked(task, example)
    elif task == "squad" and isinstance(example.meta.get("answer"), Mapping):
        fields["answer"] = example.meta["answer"].get("text", "")
    return fields


def _marked(task: str, example: ClozeExample) -> str:
    """The text with its pronoun in stars, and in Chinese its noun in hashes."""
    meta, chinese = example.meta, task == "cluewsc"
    pieces = list(example.text_a) if chinese else example.text_a.split()
    spans = [("*", "span2"), ("#", "span1")] if chinese else [("*", "span2")]
    for sign, span in spans:
        start = meta.get(f"{span}_index")
        length = meta.get(f"{span}_length") if chinese else 1
        if (
            not isinstance(start, int)
            or not isinstance(length, int)
            or not 0 <= start <= start + length - 1 < len(pieces)
        ):
            raise DataError(
                f"example {example.uid!r} of {task}: {span}_index={start!r} is no place in its {len(pieces)} pieces"
            )
        pieces[start] = sign + pieces[start]
        pieces[start + length - 1] += sign
    return "".join(pieces) if chinese else " ".join(pieces)


def _label(task: ClozeTask, example: ClozeExample) -> int:
    if example.label is None:
        return 0
    if example.label not in task.labels:
        known = ", ".join(map(repr, task.labels))
        raise DataError(f"example {example.uid!r} has the label {example.label!r}; expected one of {known}")
    return task.labels.index(example.label)


def _answers(tokenizer: ClozeTokenizer, task: ClozeTask, pattern: Pattern, example: ClozeExample) -> list[list[int]]:
    """The ids of every answer, each with eop."""
    texts: list[str] = [] if task.answers else [(pattern.words or {})[label] for label in task.labels]
    name = next(name for name, one in TASKS.items() if one is task)
    fields = _fields(name, example)
    for template in task.answers:
        before, star, rest = template.partition("{*")
        if star:
            listed = example.meta.get(rest[:-1], ())
            if not isinstance(listed, (list, tuple)) or not all(isinstance(one, str) for one in listed):
                raise DataError(f"example {example.uid!r} of {name}: {rest[:-1]} is {listed!r:.80}, expected texts")
            texts += [before + one for one in listed]
        else:
            texts.append(_fill(template, fields, name, example))
    if not texts:
        raise DataError(f"example {example.uid!r} of {name} has no answers; expected {' or '.join(task.answers)}")
    return [[*tokenizer.encode_with_masks(text), tokenizer.get_command("eop")] for text in texts]


def _single_token(tokenizer: ClozeTokenizer, word: str) -> int:
    ids = tokenizer.encode_with_masks(word)
    if len(ids) != 1:
        raise DataError(
            f"the word {word!r} is {len(ids)} tokens {ids}; expected one",
            hint="use multi_token=True for this vocabulary",
        )
    return ids[0]


def _shortened(
    tokenizer: ClozeTokenizer, sides: _Sides, answer: int, limit: int, example: ClozeExample, extra: int = 0
) -> list[int]:
    """The ids of both sides, cut so that [CLS], eos, the answer and `extra` more fit into the limit."""
    mask = tokenizer.get_command("MASK")
    encoded = [
        [([mask] if text == MASK else tokenizer.encode_with_masks(text), short) for text, short in side]
        for side in sides
    ]
    total = sum(len(ids) for side in encoded for ids, _ in side)
    room = [sum(len(ids) for ids, short in side if short) for side in encoded]
    for _ in range(total + answer + 2 + extra - limit):
        longer = 0 if room[0] > room[1] else 1
        if not room[longer]:
            raise DataError(
                f"example {example.uid!r} does not fit into {limit} tokens: nothing is left that may be shortened",
                hint="raise max_seq_length, or use a pattern whose long parts may be shortened",
            )
        last = next(ids for ids, short in reversed(encoded[longer]) if short and ids)
        del last[-1]
        room[longer] -= 1
    return [index for side in encoded for ids, _ in side for index in ids]


def _row(
    tokenizer: ClozeTokenizer, body: list[int], answer: list[int] | None, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One row: ids, positions, sep, targets and where they count. Without an answer only sop follows the text."""
    ids = [tokenizer.get_command("ENC"), *body, tokenizer.get_command("eos")]
    sep, mask = len(ids), tokenizer.get_command("MASK")
    if mask not in ids:
        raise DataError(f"no [MASK] in the ids {ids}")
    blank = sep - 1 - ids[::-1].index(mask)
    ids += [tokenizer.get_command("sop"), *(answer or [])[:-1]]
    tail = len(ids) - sep
    positions = torch.zeros(2, length, dtype=torch.int64)
    positions[0, :sep] = torch.arange(sep)
    positions[0, sep : sep + tail] = blank
    positions[1, sep : sep + tail] = torch.arange(1, tail + 1)
    return (
        _padded(ids, length, tokenizer.get_command("eos")),
        positions,
        torch.tensor(sep),
        _padded([0] * sep + (answer or [0]), length, 0),
        _padded([0] * sep + [1] * tail, length, 0),
    )


def _padded(values: list[int], length: int, filler: int) -> Tensor:
    return torch.tensor(values + [filler] * (length - len(values)))
