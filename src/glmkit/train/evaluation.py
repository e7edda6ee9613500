"""Run an evaluation recipe: records, model and adapter, answers, scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from glmkit.data.cutting import Limits, fit
from glmkit.data.records import Record, read_records
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import DataError, MissingDependencyError
from glmkit.evaluate.adgen import evaluate_adgen
from glmkit.evaluate.tool_calls import evaluate_tool_calls, turns
from glmkit.loading import Loaded, load
from glmkit.location import locate
from glmkit.train.arguments import EvaluationData, EvaluationRecipe, load_recipe
from glmkit.train.progress import Progress
from glmkit.writing import write_text_atomic

_TOOL_RESULTS_FILE = "tool_call_results.json"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation has measured.

    Attributes:
        results: The figures by name.
        output_dir: Folder with predictions and results; None if no files were asked for.
        shortened: Prompts that were shortened to `data.max_source_length`.
    """

    results: dict[str, float]
    output_dir: Path | None
    shortened: int


def evaluate(
    recipe: EvaluationRecipe | str | Path, overrides: Sequence[str] = (), *, download: bool = False
) -> Evaluation:
    """Measure a model as a recipe says.

    Predictions are written as they come; the same call with the same output folder goes on where it was cut.

    Args:
        recipe: A recipe, its file, or its name such as "adgen_lora_eval".
        overrides: Changes to a file or name, "block.key=value" each.
        download: Whether a model that is not on this machine may be fetched.

    Returns:
        The figures, and where the predictions are.

    Raises:
        UsageError: If the recipe is wrong, or the model is not there.
        DataError: If the records cannot be used, or the output folder holds the predictions of something else.
        MissingDependencyError: If the task needs a package that is not installed.
    """
    if not isinstance(recipe, EvaluationRecipe):
        recipe = load_recipe(recipe, overrides, EvaluationRecipe)
    if recipe.evaluate.task == "adgen" and find_spec("jieba") is None:  # before the answers are written, not after
        raise MissingDependencyError("jieba", "evaluate")
    records = _read(recipe.data)
    model = recipe.model
    assert model.path is not None  # the recipe is checked
    locate(model.path, download=download)
    loaded = load(
        model.path,
        adapter=model.adapter,
        dtype=model.dtype,
        device=model.device,
        quantize=model.quantize,
        family=model.family,
        download=download,
    )
    return _TASKS[recipe.evaluate.task](recipe, loaded, records)


def _read(data: EvaluationData) -> list[Record]:
    records = read_records(
        data.file,
        format=data.format,
        prompt_column=data.prompt_column,
        response_column=data.response_column,
        history_column=data.history_column,
        limit=data.max_samples,
    )
    if not all(record.messages for record in records):
        raise DataError(f"{data.file} holds plain text, which asks nothing", hint="give questions with their answers")
    return records


def _adgen(recipe: EvaluationRecipe, loaded: Loaded, records: list[Record]) -> Evaluation:
    model, how = recipe.model, recipe.evaluate
    asked = _shortened(loaded.tokenizer, records, recipe.data.max_source_length)
    folder = Path(how.output_dir) if how.output_dir is not None else _new_folder(how.task, loaded.path.name)
    with Progress("answering", len(asked)) as bar:
        results = evaluate_adgen(
            loaded.model,
            loaded.tokenizer,
            asked,
            options=_options(recipe),
            max_new_tokens=how.max_target_length,
            batch_size=how.per_device_eval_batch_size,
            output_dir=folder,
            progress=lambda done, _: bar.update(done),
            identity={
                "model": str(loaded.path),
                "adapter": model.adapter,
                "dtype": model.dtype,
                "quantize": model.quantize,
            },
        )
    return Evaluation(results, folder, sum(one is not whole for one, whole in zip(asked, records)))


def _tools(recipe: EvaluationRecipe, loaded: Loaded, records: list[Record]) -> Evaluation:
    how = recipe.evaluate
    with Progress("answering", len(turns(loaded.tokenizer, records))) as bar:
        results = evaluate_tool_calls(
            loaded.model,
            loaded.tokenizer,
            records,
            options=_options(recipe),
            max_new_tokens=how.max_target_length,
            batch_size=how.per_device_eval_batch_size,
            progress=lambda done, _: bar.update(done),
        )
    if how.output_dir is None:
        return Evaluation(results, None, 0)
    folder = Path(how.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / _TOOL_RESULTS_FILE, json.dumps(results, indent=4) + "\n")
    return Evaluation(results, folder, 0)


_TASKS: dict[str, Callable[[EvaluationRecipe, Loaded, list[Record]], Evaluation]] = {"adgen": _adgen, "tools": _tools}


def _options(recipe: EvaluationRecipe) -> SamplingOptions:
    how = recipe.evaluate
    return SamplingOptions(temperature=how.temperature, top_p=how.top_p, seed=how.seed)


def _shortened(tokenizer: Any, records: list[Record], source_tokens: int | None) -> list[Record]:
    """Shorten questions as training does; what fits stays the same object."""
    if source_tokens is None:
        return records
    limits = Limits(source_tokens=source_tokens)
    try:
        return [fit(tokenizer, record, limits)[0] for record in records]
    except DataError as error:
        raise DataError(error.message, hint="raise data.max_source_length, or data.max_source_length=null") from None


def _new_folder(task: str, model: str) -> Path:
    return Path("runs") / f"{task}-{model}-{datetime.now():%Y%m%d-%H%M%S}"
