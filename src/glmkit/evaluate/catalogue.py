"""Which tasks there are. A task's module is imported when it is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from glmkit.errors import DataError, UsageError

if TYPE_CHECKING:  # the command asks for names only, and starts fast
    from glmkit.evaluate.tasks import Settings, Task

Make: TypeAlias = "Callable[[str, Settings], Task]"
"""Makes a task of the path of its data and its settings; reads no more of the data than it has to."""

_TASK_FILES = (".yaml", ".yml")


@dataclass(frozen=True)
class Entry:
    """A task that can be asked for by name.

    Args:
        make: Where its maker is, "module:function".
        about: What it measures, in a few words.
        data: What `--data` is.
    """

    make: str
    about: str
    data: str


TASKS = {
    "adgen": Entry(
        "glmkit.evaluate.adgen:make_adgen",
        "advertising copy: BLEU-4 and ROUGE",
        "records such as ADGEN's dev.json",
    ),
    "tools": Entry(
        "glmkit.evaluate.tool_calls:make_tools",
        "calls of tools in dialogues: well formed, right, exact",
        "dialogues with tools",
    ),
    "ceval": Entry(
        "glmkit.evaluate.choice:make_ceval",
        "C-Eval: accuracy by subject",
        "folder of its CSV or jsonl files",
    ),
    "cmmlu": Entry(
        "glmkit.evaluate.choice:make_cmmlu",
        "CMMLU: accuracy by subject",
        "folder or zip of its CSV files",
    ),
    "mmlu": Entry(
        "glmkit.evaluate.choice:make_mmlu",
        "MMLU: accuracy by subject",
        "folder or zip of its CSV files",
    ),
    "gsm8k": Entry(
        "glmkit.evaluate.gsm8k:make_gsm8k",
        "sums in words: share of right numbers",
        "its test.jsonl",
    ),
    "perplexity": Entry(
        "glmkit.evaluate.text:make_perplexity",
        "perplexity of a text, with a sliding window",
        "a text file",
    ),
    "lambada": Entry(
        "glmkit.evaluate.text:make_lambada",
        "last words of passages",
        "its jsonl",
    ),
    "cloze": Entry(
        "glmkit.evaluate.cloze_task:make_cloze",
        "GLM's SuperGLUE and FewCLUE as blanks to fill",
        "folder of one task, such as COPA or FewCLUE's tnews",
    ),
}
"""Every task by its name."""

_FILE = "glmkit.evaluate.task_file:make_task_file"


def is_task(name: str) -> bool:
    """Tells whether a word of the command is a task: a name of this catalogue, or a task file of GLM-130B's form.

    Args:
        name: What was typed.

    Returns:
        False for recipes, among other things.
    """
    return name in TASKS or is_task_file(name)


def is_task_file(name: str) -> bool:
    """Tells whether a name is a YAML file that describes a task as GLM-130B's do: it has `name`, `type` and `path`.

    Args:
        name: A path, or anything else.

    Returns:
        Whether it is; False if it cannot be read.
    """
    path = Path(name)
    if path.suffix not in _TASK_FILES or not path.is_file():
        return False
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and {"name", "type", "path"} <= content.keys()


def make_task(name: str, data: str | None, how: Settings) -> Task:
    """Makes a task.

    Args:
        name: Its name, or the path of a task file.
        data: Path of its data. A task file says itself where its data is: below this folder, or below its own.
        how: How items are answered.

    Returns:
        The task; items are read when it runs.

    Raises:
        UsageError: There is no such task, its data is missing in the call, or it does not know a setting.
        DataError: There is nothing at that path.
    """
    if name in TASKS:
        entry = TASKS[name]
        if not data:
            raise UsageError(f"--data is missing: {entry.data}", hint=f"glm evaluate {name} --data PATH --model MODEL")
        if not Path(data).exists():
            raise DataError(f"there is no data file {data}, expected {entry.data}", hint="give its path with --data")
        return _maker(entry.make)(data, how)
    if is_task_file(name):
        return _maker(_FILE)(name, how)
    close = difflib.get_close_matches(name, TASKS, n=1)
    raise UsageError(
        f"there is no task {name!r}",
        hint=f"did you mean {close[0]}?" if close else f"tasks are {', '.join(TASKS)}, and YAML files like GLM-130B's",
    )


def _maker(place: str) -> Make:
    module, function = place.split(":")
    return cast("Make", getattr(import_module(module), function))
