"""Run an evaluation recipe: a task of the catalogue, model and adapter, answers, figures with intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from glmkit.evaluate.adgen import official_results
from glmkit.evaluate.catalogue import is_task_file, make_task
from glmkit.evaluate.results import Results
from glmkit.evaluate.run import run, share
from glmkit.evaluate.tasks import Settings
from glmkit.evaluate.tool_calls import tool_results
from glmkit.loading import Loaded, load
from glmkit.location import locate
from glmkit.parallel import Ranks, join_ranks
from glmkit.train.arguments import EvaluationRecipe, ModelBlock, load_recipe
from glmkit.train.progress import Progress
from glmkit.writing import write_text_atomic

_TOOL_RESULTS_FILE = "tool_call_results.json"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation has measured.

    Attributes:
        results: The figures by name; of the tasks adgen and tools with the names that their official files have.
        measured: All that results.json holds, intervals too.
        output_dir: Folder with predictions and results.
        shortened: Prompts that were shortened to `data.max_source_length`.
    """

    results: Mapping[str, Any]
    measured: Results
    output_dir: Path
    shortened: int


def evaluate(
    recipe: EvaluationRecipe | str | Path, overrides: Sequence[str] = (), *, download: bool = False
) -> Evaluation:
    """Measure a model as a recipe says.

    Predictions are written as they come; the same call with the same output folder goes on where it was cut. Under
    torchrun the items are shared, with the same figures.

    Args:
        recipe: A recipe, its file, or its name such as "adgen_lora_eval".
        overrides: Changes to a file or name, "block.key=value" each.
        download: Whether a model that is not on this machine may be fetched.

    Returns:
        The figures, and where the predictions are.

    Raises:
        UsageError: If the recipe is wrong, or the model is not there.
        DataError: If the data cannot be used, or the output folder holds the predictions of something else.
        MissingDependencyError: If the task needs a package that is not installed.
    """
    if not isinstance(recipe, EvaluationRecipe):
        recipe = load_recipe(recipe, overrides, EvaluationRecipe)
    how = settings_of(recipe)
    task = make_task(recipe.evaluate.task, recipe.data.file, how)
    loaded, ranks = load_shared(recipe.model, download=download)
    folder = recipe.evaluate.output_dir or share(ranks, _new_folder(task.name, loaded.path.name))
    with Progress(f"answering ({task.name})", 0, enabled=ranks.rank == 0) as bar:
        measured = run(
            task,
            loaded,
            folder,
            settings=settings_said(how),
            limit=how.limit,
            identity={key: getattr(recipe.model, key) for key in ("adapter", "dtype", "quantize")},
            data=recipe.evaluate.task if is_task_file(recipe.evaluate.task) else recipe.data.file,
            data_files=getattr(task, "files", ()),
            ranks=ranks,
            progress=lambda done, total: bar.update(done, total=total),
        )
    results = _named_results(measured, Path(folder), ranks)
    return Evaluation(results, measured, Path(folder), measured.notes.get("shortened", 0))


def settings_of(recipe: EvaluationRecipe) -> Settings:
    """Say a recipe's settings as a task takes them.

    Args:
        recipe: The recipe.
    """
    data, how = recipe.data, recipe.evaluate
    columns = {"prompt": data.prompt_column, "response": data.response_column, "history": data.history_column}
    default = {"prompt": "content", "response": "summary", "history": None}
    extra = dict(how.extra)
    if data.file is not None and is_task_file(how.task):
        extra["data"] = data.file
    return Settings(
        batch_size=how.per_device_eval_batch_size,
        max_new_tokens=how.max_target_length,
        temperature=how.temperature,
        top_p=how.top_p,
        seed=how.seed,
        limit=data.max_samples,
        method=how.method,
        shots=how.shots,
        subjects=tuple(how.subjects),
        window=how.window,
        stride=how.stride,
        preset=how.preset,
        columns={key: name for key, name in columns.items() if name is not None and name != default[key]},
        format=data.format,
        source_tokens=data.max_source_length,
        extra=extra,
    )


def settings_said(how: Settings) -> dict[str, Any]:
    """The settings that rows depend on, as plain values: all that differ from the default, and how tokens are chosen.

    Args:
        how: The settings. `limit` is left out: which items there are is compared in any case.
    """
    always = ("max_new_tokens", "temperature", "top_p", "seed")
    default = Settings()
    said = {name: getattr(how, name) for name in Settings.__dataclass_fields__}
    return {
        name: value
        for name, value in said.items()
        if name in always or (value != getattr(default, name) and name not in ("limit", "batch_size"))
    }


def load_shared(model: ModelBlock, *, download: bool = False) -> tuple[Loaded, Ranks]:
    """Load a model in each process that torchrun has started, on a device of its own.

    Args:
        model: Which one.
        download: Whether a model that is not on this machine may be fetched.

    Returns:
        The model, and the processes.

    Raises:
        UsageError: If the model or the device is not there.
    """
    assert model.path is not None  # the recipe is checked
    locate(model.path, download=download)
    ranks = join_ranks(model.device)
    loaded = load(
        model.path,
        adapter=model.adapter,
        dtype=model.dtype,
        device=model.device if ranks.degree == 1 else ranks.device,
        quantize=model.quantize,
        family=model.family,
        download=download,
    )
    return loaded, ranks


def _named_results(measured: Results, folder: Path, ranks: Ranks) -> Mapping[str, Any]:
    """The figures as plain numbers; the files that official scripts write are written, too."""
    if measured.task == "adgen":
        return official_results(measured, folder if ranks.rank == 0 else None)
    if measured.task == "tools":
        found = tool_results(measured)
        if ranks.rank == 0:
            write_text_atomic(folder / _TOOL_RESULTS_FILE, json.dumps(found, indent=4) + "\n")
        return found
    values = {name: None if one.value is None else round(one.value, 4) for name, one in measured.figures.items()}
    return {**values, **measured.notes}


def _new_folder(task: str, model: str) -> str:
    return str(Path("runs") / f"{Path(task).stem}-{model}-{datetime.now():%Y%m%d-%H%M%S}")
