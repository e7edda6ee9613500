"""Cloze tasks of GLM (2021): SuperGLUE, CLUE and FewCLUE as blanks whose answers are scored.

    example -> pattern of the task -> "… ? [MASK]. …" -> score of each answer -> the best one is the model's choice

Patterns and their words are in `glmkit.data.cloze_patterns`, forms of files in `glmkit.data.cloze_records`.

    accuracy       every task
    f1             tasks with two labels that are published with it, of the label that means yes
    exact_match    multirc: questions of which every answer is judged right (a note)
    macro_f1       cb: the mean of the labels' F1 (a note)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glmkit.data.cloze import ClozeExample
from glmkit.data.cloze_patterns import TASKS
from glmkit.data.cloze_records import read_cloze
from glmkit.errors import DataError, UsageError
from glmkit.evaluate.cloze import answer_scores
from glmkit.evaluate.tasks import Figure, Row, Settings
from glmkit.evaluate.text import context_tokens, place_in, tokenizer_of
from glmkit.loading import Loaded
from glmkit.models.glm_config import GLMConfig

_F1_TASKS = ("multirc", "mrpc", "qqp")
_MACRO_F1_TASKS = ("cb",)
_FOLDER_NAMES = {"ax-b": ("axb",), "ax-g": ("axg",), "cluewsc": ("cluewsc2020",), "mnli": ("mnli-matched",)}
_DATA_FILES = ("dev_public", "dev_few_all", "validation", "val", "dev", "test_public")
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_EXTRA = {"name": None, "pattern": 0, "multi_token": False, "length_penalty": 0.0, "tokens": 256}


@dataclass(frozen=True)
class Cloze:
    """A cloze task.

    Args:
        task: A name in `TASKS`.
        path: File of its examples.
        pattern: Which pattern of the task.
        multi_token: Whether words that are one token are scored as answers with an end too.
        length_penalty: Power of the length that sums of answers are divided by.
        tokens: Longest row; longer texts are cut as in fine-tuning.
        batch_size: Examples that go through the model together.
        limit: Only the first rows of the file.
    """

    task: str
    path: Path
    pattern: int = 0
    multi_token: bool = False
    length_penalty: float = 0.0
    tokens: int = 256
    batch_size: int = 32
    limit: int | None = None
    rows_file: str = "predictions.jsonl"

    @property
    def name(self) -> str:
        """As the catalogue has it, so that results can be measured again; which of them it was is in the notes."""
        return "cloze"

    def items(self, loaded: Loaded) -> list[ClozeExample]:
        """Reads the examples; see `Task.items`."""
        if not isinstance(loaded.config, GLMConfig):
            raise DataError(
                f"cloze tasks fill a blank within a text, as GLM (2021) does; this is {type(loaded.model).__name__}",
                hint="describe the task in a YAML file of type mul: glm evaluate FILE.yaml works for every model",
            )
        tokenizer_of(loaded)
        found = read_cloze(self.path, self.task, limit=self.limit)
        return [replace(example, uid=place_in(self.path, str(example.uid))) for example in found]

    def answer(
        self, loaded: Loaded, items: Sequence[Any], first: int, progress: Callable[[int], None] | None = None
    ) -> list[Row]:
        """Scores the answers of examples; see `Task.answer`."""
        scores = answer_scores(
            loaded.model,
            tokenizer_of(loaded),
            self.task,
            items,
            pattern_id=self.pattern,
            max_seq_length=min(self.tokens, context_tokens(loaded)),
            multi_token=self.multi_token,
            length_penalty=self.length_penalty,
            batch_size=self.batch_size,
            progress=progress,
        )
        return [
            {
                "id": example.uid,
                "question": example.text_b if self.task == "multirc" else None,
                "label": TASKS[self.task].labels.index(example.label),
                "answer": max(range(len(own)), key=own.__getitem__),
                "scores": own,
            }
            for example, own in zip(items, scores)
        ]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        """Accuracy, and F1 where the task is published with it."""
        found = [Figure("accuracy", [float(row["answer"] == row["label"]) for row in rows])]
        if self.task in _F1_TASKS:
            hits = [2.0 * (row["answer"] == row["label"] == 1) for row in rows]
            found.append(Figure("f1", hits, [float((row["answer"] == 1) + (row["label"] == 1)) for row in rows]))
        return found

    def notes(self, rows: Sequence[Row]) -> Mapping[str, Any]:
        """How often each label was right and chosen, and figures that are no mean over rows."""
        labels = [str(label) for label in TASKS[self.task].labels]
        found: dict[str, Any] = {"cloze": self.task, "pattern": self.pattern}
        if TASKS[self.task].patterns[0].words:
            found["right"] = {label: sum(row["label"] == place for row in rows) for place, label in enumerate(labels)}
            found["chosen"] = {label: sum(row["answer"] == place for row in rows) for place, label in enumerate(labels)}
        if self.task in _MACRO_F1_TASKS:
            found["macro_f1"] = round(100 * sum(_f1(rows, place) for place in range(len(labels))) / len(labels), 4)
        if self.task == "multirc":
            found["exact_match"] = round(_exact_match(rows), 4)
        return found


def make_cloze(data: str | Path, how: Settings) -> Cloze:
    """Makes a cloze task.

    Args:
        data: A file of examples, or a folder with one, such as SuperGLUE's COPA.
        how: Knows batch_size, limit, and in `extra` "name" (of the task; None: what file or folder are called),
            "pattern", "multi_token", "length_penalty" and "tokens".

    Returns:
        The task.

    Raises:
        UsageError: There is no such task, or a setting that it does not know.
        DataError: The folder has no file of examples.
    """
    how.only("cloze", "extra", "seed")
    wrong = [name for name in how.extra if name not in _EXTRA]
    if wrong:
        raise UsageError(f"the task cloze does not know {', '.join(wrong)}", hint=f"it knows {', '.join(_EXTRA)}")
    extra = {**_EXTRA, **how.extra}
    path = Path(data)
    task = extra.pop("name") or _task_of(path)
    if task not in TASKS:
        raise UsageError(f"no cloze task {task!r}; expected one of {', '.join(TASKS)}")
    count = len(TASKS[task].patterns)
    if not isinstance(extra["pattern"], int) or not 0 <= extra["pattern"] < count:
        raise UsageError(f"no pattern {extra['pattern']} of {task}; expected one from 0 to {count - 1}")
    return Cloze(task, _file(path), batch_size=how.batch_size, limit=how.limit, **extra)


def _task_of(path: Path) -> str:
    """The task that a file or folder is named after: COPA/val.jsonl is copa, tnews/dev_public.json tnews."""
    known = {name: name for name in TASKS} | {other: name for name, more in _FOLDER_NAMES.items() for other in more}
    for part in (path.stem, path.name, path.resolve().parent.name):
        if part.lower() in known:
            return known[part.lower()]
    raise UsageError(
        f"neither {path.name} nor its folder is called as a cloze task, so it is not known which one this is",
        hint=f"give its name: {', '.join(TASKS)}",
    )


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    candidates = [path / f"{name}{suffix}" for name in _DATA_FILES for suffix in _SUFFIXES]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        expected = ", ".join(f"{name}.jsonl" for name in _DATA_FILES)
        raise DataError(f"{path} has no file of examples; expected one of {expected}, also .json, .csv or .parquet")
    return found


def _f1(rows: Sequence[Row], label: int) -> float:
    both = sum(row["answer"] == row["label"] == label for row in rows)
    either = sum((row["answer"] == label) + (row["label"] == label) for row in rows)
    return 2 * both / either if either else 0.0


def _exact_match(rows: Sequence[Row]) -> float:
    """Percent of the questions whose answers are all judged right."""
    questions: dict[tuple[Any, Any], bool] = defaultdict(lambda: True)
    for row in rows:
        questions[row["id"], row["question"]] &= row["answer"] == row["label"]
    return 100 * sum(questions.values()) / len(questions) if questions else 0.0
