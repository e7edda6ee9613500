"""Seq2seq fine-tuning of GLM (2021): summaries, questions and answers as the filling of one blank behind a source.

    summary      [CLS] mask " Content:" source                             | sop target
    squad        [CLS] question mask "." context                           | sop answer
    question     [CLS] context " Question:" mask " Answer: x"              | sop question
    cmrc         [CLS] "问题：" question "答案：" [MASK] context              | sop answer
    any          [CLS] source mask eos                                     | sop target
                 filled on the right to `source_tokens`, read both ways      labels: target eop

`mask` is [sMASK] where the vocabulary has it, else [MASK]. The filling of the source is read like text, as it was in
training; `collate_seq2seq(..., mask_padding=True)` hides it. Row 0 of the positions counts the source and stays at the
blank behind it, row 1 counts 1, 2, 3 there. Labels stand where they are predicted.

Letters: `B` rows, `S` columns of the source, `T` all columns.

Source: tasks/seq2seq/dataset.py and config_tasks/seq_*.sh of the training repository (behaviour, not code).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glmkit.errors import DataError, UsageError

IGNORED = -100


@dataclass(frozen=True)
class Seq2SeqTask:
    """A task as it was published.

    Args:
        layout: "summary", "squad", "question", "cmrc" or "any", see the module.
        source_tokens: Columns of the source.
        target_tokens: Most tokens of the target, eop included.
        num_beams: Beams when decoding.
        length_penalty: Power of the length that a finished beam's score is divided by.
        no_repeat_ngram_size: Length of runs of tokens that may not come twice; 0 allows all.
        min_target_tokens: Fewest tokens before eop.
        epochs: Passes over the data.
        learning_rate: Its highest value; it falls in a straight line.
        label_smoothing: Share of the target that goes to all tokens alike.
        warmup: Share of the steps in which the learning rate rises.
        weight_decay: Of AdamW.
    """

    layout: str
    source_tokens: int
    target_tokens: int
    num_beams: int
    length_penalty: float
    no_repeat_ngram_size: int
    min_target_tokens: int
    epochs: int
    learning_rate: float
    label_smoothing: float = 0.1
    warmup: float = 0.06
    weight_decay: float = 0.1


TASKS: dict[str, Seq2SeqTask] = {
    #                                 layout      source target beams penalty ngram min epochs rate
    "cnn_dm": Seq2SeqTask("summary", 608, 160, 5, 0.7, 3, 55, 15, 3e-5),
    "cnn_dm_original": Seq2SeqTask("summary", 608, 160, 5, 0.7, 3, 55, 10, 1e-5),
    "xsum": Seq2SeqTask("summary", 608, 60, 6, 1.0, 3, 10, 6, 1e-5),
    "gigaword": Seq2SeqTask("summary", 192, 32, 5, 0.6, 3, 0, 10, 3e-5),
    "squad": Seq2SeqTask("squad", 512, 64, 5, 0.0, 0, 0, 10, 1e-5),
    "squad_v1": Seq2SeqTask("squad", 512, 64, 5, 0.0, 0, 0, 5, 1e-5),
    "squad_generation": Seq2SeqTask("question", 464, 48, 5, 0.7, 0, 0, 10, 2e-5),
    "cmrc": Seq2SeqTask("cmrc", 464, 48, 5, 0.7, 0, 0, 10, 2e-5),
    "customization": Seq2SeqTask("any", 512, 128, 5, 0.7, 3, 55, 10, 1e-5, weight_decay=0.01),
}

# What summaries' files have in place of marks.
_PLAIN_MARKS = {"\u201c": '"', "\u201d": '"', "\u2019": "'", "\u2018": "'", "\u2013": "-"}
_BRACKETS = {"-lrb-": "(", "-rrb-": ")", "-lsb-": "[", "-rsb-": "]", "-lcb-": "{", "-rcb-": "}"}
_GIGAWORD = {
    "UNK": "[UNK]",
    "<unk>": "[UNK]",
    **_BRACKETS,
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
}
_CNN = {
    **{name.upper(): mark for name, mark in _BRACKETS.items()},
    "''": '"',
    "``": '"',
    "`": "'",
    " n't": "n't",
    " 's": "'s",
    " 'd": "'d",
    " 'll": "'ll",
}


@dataclass(frozen=True)
class Seq2SeqExample:
    """An encoded record.

    Attributes:
        input_ids: (T) int64, the source (S) filled up, sop, and the target without its last token.
        labels: (T) int64, what each position predicts; -100 for none. Without a target all are.
        position_ids: (2, T) int64.
        sep: S, the number of columns that are read in both directions.
        context_tokens: How many of them are not filling.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    sep: int
    context_tokens: int


def plain_marks(text: str) -> str:
    """Writes curly quotes and dashes as ASCII has them, as texts were before training.

    Args:
        text: Any text.
    """
    for found, wanted in _PLAIN_MARKS.items():
        text = text.replace(found, wanted)
    return text


def clean_summary(task: str, text: str, target: bool = False) -> str:
    """Undoes what the files of summary tasks do to marks, as was done before training.

    Args:
        task: "gigaword", "cnn_dm" or "cnn_dm_original"; texts of other tasks stay as they are.
        text: A line of a file.
        target: Whether it is a summary: its marks between sentences become [SEP].

    Returns:
        The text.
    """
    if task not in ("gigaword", "cnn_dm", "cnn_dm_original"):
        return text
    rules = dict(_PLAIN_MARKS)
    if task == "gigaword":
        rules |= _GIGAWORD
    elif task == "cnn_dm":
        rules |= {"<S_SEP>": "[SEP]" if target else ""} | _CNN
    text = text.strip()
    for found, wanted in rules.items():
        text = text.replace(found, wanted)
    return text


def encode_seq2seq(
    tokenizer: Any,
    task: str | Seq2SeqTask,
    source: str,
    target: str | None = None,
    *,
    question: str | None = None,
    answer: str | None = None,
) -> Seq2SeqExample:
    """Encodes a record.

    Args:
        tokenizer: A tokenizer of GLM.
        task: A name in `TASKS`, or a task with lengths of its own.
        source: The text to summarise or to ask about.
        target: What is to be learnt: summary, answer, or for "squad_generation" the question. None makes the prompt
            for generating it.
        question: Of "squad" and "cmrc".
        answer: Of "squad_generation", to which a question is wanted.

    Returns:
        The example. Texts are cut to the task's lengths; a target that is too long loses its eop.

    Raises:
        UsageError: There is no such task, or it needs a question or an answer.
        DataError: The question leaves no room for the source.
    """
    found = _task(task)
    ids, mask = _SOURCES[found.layout](tokenizer, found, source, question, answer)
    blank, context = ids.index(mask), len(ids)
    ids = ids + [tokenizer.pad_token_id] * (found.source_tokens - len(ids))
    learnt: list[int] = []
    if target is not None:
        target = target.strip() if found.layout in ("squad", "cmrc") else target
        learnt = [*tokenizer.encode_with_masks(f" {target}"), tokenizer.eop_token_id][: found.target_tokens]
    columns = len(ids) + max(len(learnt), 1)
    positions = torch.zeros(2, columns, dtype=torch.int64)
    positions[0] = torch.arange(columns)
    positions[0, len(ids) :] = blank
    positions[1, len(ids) :] = torch.arange(1, columns - len(ids) + 1)
    labels = [IGNORED] * len(ids) + (learnt or [IGNORED])
    return Seq2SeqExample(
        torch.tensor([*ids, tokenizer.sop_token_id, *learnt[:-1]]), torch.tensor(labels), positions, len(ids), context
    )


def without_filling(example: Seq2SeqExample) -> Seq2SeqExample:
    """Leaves out the columns that only fill up a source; the model then sees what it sees with the filling hidden.

    Args:
        example: Any example.
    """
    kept = torch.ones(len(example.input_ids), dtype=torch.bool)
    kept[example.context_tokens : example.sep] = False
    positions = example.position_ids[:, kept]
    context = example.context_tokens
    return Seq2SeqExample(example.input_ids[kept], example.labels[kept], positions, context, context)


def collate_seq2seq(
    examples: Sequence[Seq2SeqExample], pad_token_id: int, *, mask_padding: bool = False
) -> dict[str, Tensor]:
    """Joins examples of one task into a batch that `label_loss` of the model takes.

    Args:
        examples: B examples.
        pad_token_id: What to fill with on the right.
        mask_padding: Whether the filling behind a source is hidden.

    Returns:
        input_ids and labels (B, T), position_ids (B, 2, T), and attention_mask: the lengths (B) of the sources, or
        with `mask_padding` (B, 1, T, T), 1 where a token sees a column.

    Raises:
        DataError: There are no examples.
    """
    if not examples:
        raise DataError("a batch needs examples")
    longest = max(len(example.input_ids) for example in examples)
    shape = (len(examples), longest)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    positions = torch.zeros(len(examples), 2, longest, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = example.input_ids
        labels[row, :length] = example.labels
        positions[row, :, :length] = example.position_ids
    mask = torch.tensor([example.sep for example in examples])
    if mask_padding:
        columns = torch.arange(longest)
        context = torch.tensor([example.context_tokens for example in examples])
        behind = (columns >= mask[:, None])[:, None] & (columns <= columns[:, None])  # (B, T, T): answers, causal
        mask = ((columns < context[:, None])[:, None] | behind & (columns[:, None] >= mask[:, None, None])).long()[
            :, None
        ]
    return {"input_ids": input_ids, "labels": labels, "position_ids": positions, "attention_mask": mask}


def squad_windows(
    tokenizer: Any, task: str | Seq2SeqTask, context: str, question: str, answers: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Cuts a long context into windows that overlap by about half, each with the answer if it holds it.

    Args:
        tokenizer: A tokenizer of GLM.
        task: "squad", "squad_v1", or a task with lengths of its own.
        context: The text asked about.
        question: The question.
        answers: Right answers; the first is learnt. None at all means there is no answer in the text.

    Yields:
        The text of a window and its answer, "N/A" if it is not in there. "squad_v1" leaves those out.

    Raises:
        DataError: The question leaves no room for the context.
    """
    found = _task(task)
    tokens = tokenizer.encode_with_masks(context)
    width = found.source_tokens - 3 - len(tokenizer.encode_with_masks(f" {question}"))
    if width <= 0:
        raise DataError(f"the question leaves no room for its context: {question[:80]!r}")
    wanted = tokenizer.decode_ids(tokenizer.encode_with_masks(answers[0] if answers else "N/A"))
    for start in range(0, len(tokens), found.source_tokens // 2):
        window = tokenizer.decode_ids(tokens[start : start + width])
        answer = answers[0] if answers and wanted and wanted in window else "N/A"
        if answer != "N/A" or task != "squad_v1":
            yield window, answer
            if start + width > len(tokens):
                return


def _task(task: str | Seq2SeqTask) -> Seq2SeqTask:
    if isinstance(task, Seq2SeqTask):
        if task.layout not in _SOURCES or task.source_tokens < 3 or task.target_tokens < 1:
            raise UsageError(
                f"{task}: expected a layout of {', '.join(_SOURCES)}, and at least 3 source tokens and 1 target token"
            )
        return task
    if task not in TASKS:
        raise UsageError(f"no task {task!r}; expected one of {', '.join(TASKS)}")
    return TASKS[task]


def _mask_id(tokenizer: Any) -> int:
    """[sMASK], or [MASK] where there is none."""
    return tokenizer.smask_token_id if len(tokenizer.mask_token_ids) > 1 else tokenizer.mask_token_id


def _given(value: str | None, what: str) -> str:
    if value is None:
        raise UsageError(f"this task needs a {what}", hint=f"give {what}=")
    return value.strip()


# Each of these gives the ids of a source, not filled up, and the id of its blank.
_Source = tuple[list[int], int]


def _summary(tokenizer: Any, task: Seq2SeqTask, source: str, question: str | None, answer: str | None) -> _Source:
    mask = _mask_id(tokenizer)
    start = [tokenizer.cls_token_id, mask, *tokenizer.encode_with_masks(" Content:")]
    return (start + tokenizer.encode_with_masks(f" {source}"))[: task.source_tokens], mask


def _squad(tokenizer: Any, task: Seq2SeqTask, source: str, question: str | None, answer: str | None) -> _Source:
    mask = _mask_id(tokenizer)
    asked = tokenizer.encode_with_masks(f" {_given(question, 'question')}")
    stop = tokenizer.convert_tokens_to_ids(".")
    start = [tokenizer.cls_token_id, *asked, mask, stop]
    return _with_room(task, start, tokenizer.encode_with_masks(f" {source.rstrip()}")), mask


def _cmrc(tokenizer: Any, task: Seq2SeqTask, source: str, question: str | None, answer: str | None) -> _Source:
    mask = tokenizer.mask_token_id
    asked = tokenizer.encode_with_masks(f"问题：{_given(question, 'question')}答案：")
    return _with_room(task, [tokenizer.cls_token_id, *asked, mask], tokenizer.encode_with_masks(source.rstrip())), mask


def _with_room(task: Seq2SeqTask, start: list[int], source: list[int]) -> list[int]:
    if len(start) >= task.source_tokens:
        raise DataError(f"a question takes {len(start)} of {task.source_tokens} tokens and leaves none for its context")
    return (start + source)[: task.source_tokens]


def _question(tokenizer: Any, task: Seq2SeqTask, source: str, question: str | None, answer: str | None) -> _Source:
    """Of a source that is too long the part around the answer stays."""
    mask, answer = _mask_id(tokenizer), _given(answer, "answer")
    text = tokenizer.encode_with_masks(f"{source.rstrip()} Question:")
    end = tokenizer.encode_with_masks(f" Answer: {answer}")
    width = task.source_tokens - len(end) - 2
    if width <= 0:
        raise DataError(f"the answer leaves no room for its context: {answer[:80]!r}")
    if len(text) > width:
        pattern = tokenizer.encode_with_masks(f" {answer}")
        places = (place for place in range(len(text)) if text[place : place + len(pattern)] == pattern)
        start = max(next(places, 0) - width // 2, 0)
        text = text[start : start + width]
    return [tokenizer.cls_token_id, *text, mask, *end], mask


def _any(tokenizer: Any, task: Seq2SeqTask, source: str, question: str | None, answer: str | None) -> _Source:
    """Of a source that is too long the end stays."""
    mask = _mask_id(tokenizer)
    text = tokenizer.encode_with_masks(source)
    text = text[max(0, len(text) - (task.source_tokens - 3)) :]
    return [tokenizer.cls_token_id, *text, mask, tokenizer.eos_token_id], mask


_SOURCES = {"summary": _summary, "squad": _squad, "cmrc": _cmrc, "question": _question, "any": _any}
