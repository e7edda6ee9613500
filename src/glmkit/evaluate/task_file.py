"""Task files: a YAML file in the form of GLM-130B's evaluation says what to ask and how to judge, without code.

    name: AFQMC                        type: mul (choose), gen (write), lm (perplexity)
    type: mul
    path: CLUE/afqmc                   below --data, else below the folder of the file
    file-pattern: {dev: "**/dev.json"}   groups of files

Rows of data are as GLM-130B has them (`inputs_pretokenized`, `choices_pretokenized`, `label`, `targets_pretokenized`),
or anything else, if the file says how they read:

    rows: examples                     the list within a JSON file that has the rows (BIG-Bench Hard)
    inputs: "{context}\\n问：{input}\\n答："   text with the names of fields, or a single name in choices and targets
    choices: ["不同", "相同"]            labels: ["0", "1"]   what the field of `label` says for each choice
    targets: answers                   metrics: [EM, F1]    answer: 'the answer is (.*?)\\.'

Source: evaluation/configs.py of GLM-130B (behaviour, not code). Python that `module` names is never run; what the
official modules do is part of this package, others are refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from glmkit.data.rows import read_text
from glmkit.errors import DataError, UsageError
from glmkit.evaluate.matching import METRICS
from glmkit.evaluate.tasks import Settings, Task

TYPES = ("mul", "gen", "lm")
STRATEGIES = ("BaseStrategy", "BeamSearchStrategy")
_CHOICE_METRICS = ("Accuracy", "F1_mul", "Precision", "Recall")  # averaged over all choices they are the same number
_METRICS: Mapping[str, Sequence[str]] = {"mul": _CHOICE_METRICS, "gen": tuple(METRICS), "lm": ("PPL",)}
_DEFAULT_METRICS = {"mul": ("Accuracy",), "gen": ("EM", "F1"), "lm": ("PPL",)}
_PLAIN_MODULES = ("MultiChoiceTask", "GenerationTask", "LanguageModelTask", "MMLU")


@dataclass(frozen=True)
class TaskFile:
    """What a task file says. Names are those of the file, with _ for -.

    Args:
        name: Of the task.
        type: "mul", "gen" or "lm".
        path: Folder of the data.
        module: Class of the official code.
        metrics: Names; empty: those of the type.
        use_task_mask: Whether the blank is [gMASK].
        unidirectional: Whether no token sees a later one; needs use_task_mask.
        max_seq_length: Longest row in tokens.
        file_pattern: Pattern of the files of each group.
        micro_batch_size: Rows that go through the model together.
        sampling_strategy: "BaseStrategy" takes the likeliest token, "BeamSearchStrategy" searches.
        num_beams: Of the search.
        length_penalty: Of the search.
        no_repeat_ngram_size: Of the search.
        min_gen_length: Of the search, in tokens.
        max_gen_length: Longest answer in tokens.
        generation_length: Tokens that a window scores, but for the first (lm).
        rows: Name of the list of rows within a JSON object.
        inputs: Template of the text.
        choices: Templates of the choices, or the name of a field that lists them.
        labels: What the label's field says for each choice.
        label: Name of the label's field.
        targets: Template of the right answer, or the name of a field that has it or lists several.
        ask: "text": the model goes on with the text. "chat": the text is a user's message.
        answer: Regular expression that finds the answer in what was generated.
        stop: The answer ends in front of the first of these.
        cut: Where a text that is too long loses tokens: "beginning" or "middle".
    """

    name: str
    type: str
    path: str
    module: str | None = None
    metrics: tuple[str, ...] = ()
    use_task_mask: bool = False
    use_multitask_encoding: bool = False
    unidirectional: bool = False
    max_seq_length: int = 2048
    file_pattern: Mapping[str, str] = field(default_factory=lambda: {"all": "**/*.json*"})
    micro_batch_size: int = 1
    sampling_strategy: str = "BaseStrategy"
    num_beams: int = 4
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 3
    min_gen_length: int = 0
    max_gen_length: int = 128
    generation_length: int = 256
    rows: str | None = None
    inputs: str | None = None
    choices: tuple[str, ...] | str | None = None
    labels: tuple[str, ...] = ()
    label: str = "label"
    targets: str | None = None
    ask: str = "text"
    answer: str | None = None
    stop: tuple[str, ...] = ()
    cut: str = "beginning"

    @property
    def finds_words(self) -> bool:
        """Whether it is LAMBADA of the official code: the answer is one word and begins with no punctuation."""
        return self.module is not None and self.module.endswith(".LAMBADA")


def make_task_file(path: str | Path, how: Settings) -> Task:
    """Makes the task that a file describes.

    Args:
        path: The YAML file.
        how: Knows batch_size and limit; max_new_tokens, which goes before max_gen_length; and in `extra` "data", the
            folder that the file's `path` is below, `--data-path` of the official script. None: the file's own folder.

    Returns:
        The task.

    Raises:
        DataError: The file cannot be read or used, or there is no data where it says.
        UsageError: A setting that it does not know.
    """
    from glmkit.evaluate.glm130b import Choosing, Modelling, Writing

    how.only(Path(path).name, "max_new_tokens", "seed", "extra")
    unknown = sorted(set(how.extra) - {"data"})
    if unknown:
        raise UsageError(f"a task file has no setting {', '.join(unknown)} in extra", hint="it knows data")
    data = how.extra.get("data")
    description = read_task_file(path)
    folder = (Path(path).resolve().parent if data is None else Path(data)) / description.path
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder}, where the task {description.name} has its data",
            hint="give the folder that `path` of the task file is below: --data FOLDER",
        )
    kinds: dict[str, type[Choosing] | type[Writing] | type[Modelling]]
    kinds = {"mul": Choosing, "gen": Writing, "lm": Modelling}
    return kinds[description.type](description, folder, how)


def read_task_file(path: str | Path) -> TaskFile:
    """Reads a task file.

    Args:
        path: The YAML file.

    Returns:
        What it says.

    Raises:
        DataError: It is not there, or says what is not understood; the message names every such thing.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no task file {path}", hint="check the path; it is relative to the current folder")
    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also a date or a number that is none
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not valid YAML: {error}", hint="see docs/evaluation.md for the forms") from None
    if not isinstance(content, dict):
        raise DataError(
            f"{path} is no task file: expected name, type and path", hint="see docs/evaluation.md for the forms"
        )
    said = {str(name).replace("-", "_"): value for name, value in content.items()}
    problems = [f"{name} is missing" for name in ("name", "type", "path") if name not in said]
    known = {one.name: one for one in fields(TaskFile)}
    for name in said.keys() - known.keys():
        close = difflib.get_close_matches(name, known, n=1)
        problems.append(f"{name} is not known" + (f"; did you mean {close[0]}?" if close else ""))
    values: dict[str, Any] = {}
    for name in said.keys() & known.keys():
        try:
            values[name] = _value(name, str(known[name].type), said[name])
        except ValueError as error:
            problems.append(f"{name} is {said[name]!r}; expected {error}")
    if not problems:
        description = TaskFile(**values)
        problems = list(_contradictions(description))
    if problems:
        raise DataError(
            f"{path} cannot be used:\n" + "\n".join(f"  - {one}" for one in sorted(problems)),
            hint="see docs/evaluation.md for the forms",
        )
    return description


# What a file says -----------------------------------------------------------------------------------------------------


def _value(name: str, kind: str, value: Any) -> Any:
    """The value of a field, in the type it has here."""
    if name == "file_pattern":
        patterns = {"all": value} if isinstance(value, str) else value
        if not isinstance(patterns, dict) or not patterns or not all(isinstance(one, str) for one in patterns.values()):
            raise ValueError("a pattern, or a pattern for each group")
        return {str(group): pattern for group, pattern in patterns.items()}
    if name in ("metrics", "labels", "stop", "choices"):
        if isinstance(value, str) and name != "labels":
            return value if name == "choices" else (value,)
        if not isinstance(value, list) or not value:
            raise ValueError("a list")
        return tuple(str(one) for one in value)
    if kind == "bool":
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value
    if kind in ("int", "float"):
        least = 0 if name in ("no_repeat_ngram_size", "min_gen_length", "length_penalty") else 1
        right = (int,) if kind == "int" else (int, float)
        if isinstance(value, bool) or not isinstance(value, right) or value < least:
            raise ValueError(f"a {'whole ' if kind == 'int' else ''}number, {least} or more")
        return value
    if value is not None and not isinstance(value, str):
        raise ValueError("a text")
    return value


def _contradictions(said: TaskFile) -> Iterator[str]:
    for name, allowed in (
        ("type", TYPES),
        ("sampling_strategy", STRATEGIES),
        ("ask", ("text", "chat")),
        ("cut", ("beginning", "middle")),
    ):
        if getattr(said, name) not in allowed:
            yield f"{name} is {getattr(said, name)!r}; expected one of {', '.join(allowed)}"
    module = (said.module or "").rsplit(".", 1)[-1]
    if said.module is not None and module not in (*_PLAIN_MODULES, "LAMBADA"):
        yield f"module is {said.module!r}, Python code that is not run; describe the task with inputs, choices, targets"
    if said.use_multitask_encoding:
        yield "use_multitask_encoding is not supported, as in the official code"
    if said.unidirectional and not said.use_task_mask:
        yield "unidirectional needs use_task_mask: only [gMASK] can stand in front of its text"
    if said.type == "lm" and not said.use_task_mask:
        yield "type lm needs use_task_mask: a text that goes on fills [gMASK]"
    if said.type == "lm" and said.generation_length >= said.max_seq_length:
        yield "generation_length must be less than max_seq_length"
    for metric in said.metrics:
        if metric not in _METRICS.get(said.type, ()):
            yield f"metrics has {metric!r}; type {said.type} knows {', '.join(_METRICS.get(said.type, ()))}"
    if said.answer is not None:
        try:
            re.compile(said.answer)
        except re.error as error:
            yield f"answer is no regular expression: {error}"


def metrics_of(description: TaskFile) -> tuple[str, ...]:
    """The metrics of a task.

    Args:
        description: The task file.
    """
    if description.finds_words:
        return ("Accuracy",)
    return description.metrics or _DEFAULT_METRICS[description.type]
