"""Files of cloze tasks: SuperGLUE's and CLUE's own, or one form for every task, each row an example.

    rte, cb, ax-g   {"premise": …, "hypothesis": …, "label": "entailment"}
    boolq           {"passage": …, "question": …, "label": true}
    copa            {"premise": …, "choice1": …, "choice2": …, "question": "cause", "label": 0}
    multirc         {"passage": {"text": …, "questions": [{"question": …, "answers": [{"text": …, "label": 1}]}]}}
    any task        {"text_a": …, "text_b": …, "label": …, and what its patterns name: "word", "choices", …}

Files are JSON Lines, a JSON array, CSV with a first line of names, or Parquet.

Source: tasks/superglue/dataset.py of the training repository. On purpose different: a row without a label is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from glmkit.data.cloze import ClozeExample
from glmkit.data.cloze_patterns import TASKS
from glmkit.data.rows import Unreadable, read_rows
from glmkit.data.seq2seq import plain_marks
from glmkit.errors import DataError, UsageError

_SHOWN_PROBLEMS = 3
_FIELDS: dict[str, tuple[str, ...]] = {
    "rte": ("premise", "hypothesis"),
    "cb": ("premise", "hypothesis"),
    "ax-g": ("premise", "hypothesis"),
    "ax-b": ("sentence1", "sentence2"),
    "boolq": ("passage", "question"),
    "wic": ("sentence1", "sentence2"),
    "copa": ("premise",),
    "sst2": ("sentence",),
    "cola": ("sentence",),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "mnli": ("sentence1", "sentence2"),
    "xstance": ("question", "comment"),
    "afqmc": ("sentence1", "sentence2"),
    "tnews": ("sentence", "keywords"),
    "cluewsc": ("text",),
    "eprstmt": ("sentence",),
    "ocnli": ("sentence1", "sentence2"),
    "bustm": ("sentence1", "sentence2"),
    "csl": ("abst", "keyword"),
    "chid": ("content",),
}
"""What the published files call the first and the second text."""
_LABELS = {"mnli": "gold_label", "qqp": "is_duplicate", "chid": "answer"}
_WITHOUT_CHOICE = {
    "wsc": "its examples have one answer, or several of which the label does not say which is right",
    "record": "an example may have several right answers",
    "squad": "its examples have one answer",
    "cmrc": "its examples have one answer",
}


def read_cloze(path: str | Path, task: str, *, limit: int | None = None) -> list[ClozeExample]:
    """Reads the examples of a task.

    Args:
        path: A file, see the module.
        task: A name in `glmkit.data.cloze_patterns.TASKS`.
        limit: Stop after so many rows.

    Returns:
        The examples in the order of the file; `uid` is file and line.

    Raises:
        UsageError: There is no such task, or its right answer cannot be told from a label.
        DataError: There is no such file, or it has rows that cannot be used; names the first and their number.
    """
    if task not in TASKS:
        raise UsageError(f"no task {task!r}; expected one of {', '.join(TASKS)}")
    if task in _WITHOUT_CHOICE:
        raise UsageError(
            f"{task} cannot be learnt by choosing: {_WITHOUT_CHOICE[task]}",
            hint="learn to write the answer: data.format=seq2seq data.task=customization",
        )
    read: Callable[[Mapping[str, Any], str, str], Iterator[ClozeExample]] = _multirc if task == "multirc" else _row
    examples: list[ClozeExample] = []
    problems: list[str] = []
    for where, row in islice(read_rows(Path(path)), limit):
        try:
            if isinstance(row, Unreadable):
                raise DataError(row.reason)
            if not isinstance(row, Mapping):
                raise DataError(f"a row must be an object, this is {type(row).__name__}")
            examples += (_row if "text_a" in row else read)(row, task, where)
        except DataError as error:
            problems.append(f"  - {where}: {error.message}")
    if problems:
        shown = "\n".join(problems[:_SHOWN_PROBLEMS])
        raise DataError(
            f"{len(problems)} rows of {path} cannot be used for the task {task}:\n{shown}",
            hint="give the published file of the task, or correct these rows",
        )
    if not examples:
        raise DataError(f"{path} has no examples", hint="give the published file of the task")
    return examples


def _row(row: Mapping[str, Any], task: str, where: str) -> Iterator[ClozeExample]:
    names: tuple[str, ...] = ("text_a", "text_b") if "text_a" in row else _FIELDS.get(task, ("text_a", "text_b"))
    meta = {key: value for key, value in row.items() if key not in names}
    if task == "cluewsc" and isinstance(row.get("target"), Mapping):
        meta |= row["target"]
        meta |= {f"{span}_length": len(str(meta.get(f"{span}_text", ""))) for span in ("span1", "span2")}
    if isinstance(row.get("keyword"), list) and "keyword" in names:  # csl
        row = {**row, "keyword": "，".join(map(str, row["keyword"]))}
    second = names[1] if len(names) > 1 and names[1] in row else None
    yield ClozeExample(
        _text(row, names[0]),
        _text(row, second) if second else None,
        _label(row, _LABELS.get(task, "label") if _LABELS.get(task) in row else "label", task),
        {key: plain_marks(value) if isinstance(value, str) else value for key, value in meta.items()},
        where,
    )


def _multirc(row: Mapping[str, Any], task: str, where: str) -> Iterator[ClozeExample]:
    """An example for every answer of every question."""
    passage = _inner(row, "passage", Mapping)
    for question in _inner(passage, "questions", list):
        for answer in _inner(question, "answers", list):
            yield ClozeExample(
                _text(passage, "text"),
                _text(question, "question"),
                _label(answer, "label", task),
                {"answer": _text(answer, "text")},
                where,
            )


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise DataError(f"no text in the field {name!r}; the row has {', '.join(map(repr, row)) or 'none'}")
    return plain_marks(value)


def _inner(row: Any, name: str, kind: type) -> Any:
    value = row.get(name) if isinstance(row, Mapping) else None
    if not isinstance(value, kind):
        raise DataError(f"the field {name!r} is {value!r:.60}; expected the form of the published file")
    return value


def _label(row: Mapping[str, Any], name: str, task: str) -> Hashable:
    """The label as the task knows it, whatever its type in the file: true, "True" and "true" are one."""
    known = {str(label).lower(): label for label in TASKS[task].labels}
    found = str(row.get(name)).lower()
    if name not in row or found not in known:
        value = repr(row[name]) if name in row else "missing"
        raise DataError(f"the label is {value}; expected one of {', '.join(map(repr, TASKS[task].labels))}")
    return known[found]
