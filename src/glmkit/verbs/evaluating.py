"""Verbs that measure answers: evaluate, predict."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
from typing import Annotated, Any

import typer

from glmkit.errors import UsageError
from glmkit.verbs.app import (
    Adapter,
    FamilyName,
    Json,
    Quantize,
    RecipeVerb,
    Schema,
    Set,
    Yes,
    verb,
)
from glmkit.verbs.printing import table
from glmkit.verbs.recipes import read_recipe, show_recipe, show_schema


@verb("Measure a model on a task, or as a recipe says.", cls=RecipeVerb)
def evaluate(
    task: Annotated[
        str,
        typer.Argument(
            help="adgen, tools, ceval, cmmlu, mmlu, gsm8k, perplexity, lambada or cloze; a task file of GLM-130B's "
            "form; a recipe, as a YAML file or by its name; or compare, with result folders.",
            metavar="TASK|RECIPE|compare",
        ),
    ] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it, such as data.file=dev.json; folders to compare.", metavar="[KEY=VALUE]..."),
    ] = None,
    set_: Set = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder, model name or hub id; a task alone asks glm-nano.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="What the task reads, a file or folder: docs/evaluation.md.")
    ] = None,
    adapter: Adapter = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first records or questions.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Answers written together.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Longest answer in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 always takes the likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="1 is off.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampled answers repeatable.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for predictions and results.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1, npu, ...")] = None,
    quantize: Quantize = None,
    family: FamilyName = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe, print it whole, and leave.")] = False,
    schema: Schema = False,
    json_: Json = False,
    yes: Yes = False,
) -> int:
    """Evaluates and prints the results; the flags and a recipe are two ways to say the same."""
    if task == "compare":
        from glmkit.evaluate.comparison import compare

        return _show_comparison(compare, [*(overrides or ())], output)
    from glmkit.evaluate.catalogue import TASKS, is_task, is_task_file
    from glmkit.train.arguments import EvaluationRecipe, one_line

    if schema:
        return show_schema(EvaluationRecipe)
    flags = {
        "model.path": model, "model.adapter": adapter, "model.dtype": dtype, "model.device": device,
        "model.quantize": quantize, "model.family": family, "data.file": data, "data.max_samples": limit,
        "evaluate.per_device_eval_batch_size": batch_size, "evaluate.max_target_length": max_tokens,
        "evaluate.temperature": temperature, "evaluate.top_p": top_p, "evaluate.seed": seed,
        "evaluate.output_dir": output,
    }  # fmt: skip
    changes = [*(set_ or ()), *(f"{key}={one_line(value)}" for key, value in flags.items() if value is not None)]
    if is_task(task):
        if data is None and not overrides and not set_ and not is_task_file(task):
            hint = f"glm evaluate {task} --data PATH --model MODEL"
            raise UsageError(f"--data is missing: {TASKS[task].data}", hint=hint)
        changes = ["model.path=glm-nano", f"evaluate.task={task}", *(overrides or ()), *changes]
        checked = read_recipe("", changes, None, EvaluationRecipe)
    else:
        _check_task(task)
        checked = read_recipe(task, overrides, changes, EvaluationRecipe)
    if dry_run:
        return show_recipe(checked)
    return _show_evaluation(checked, json_, yes)


def _check_task(task: str) -> None:
    """Refuses a word that is neither a task nor a recipe of any kind; a recipe for another verb is refused later."""
    from glmkit.evaluate.catalogue import TASKS
    from glmkit.train.arguments import VERBS, EvaluationRecipe, recipe_names

    if not task:
        raise UsageError("missing argument 'TASK'", hint=f"{', '.join(TASKS)}, or a recipe: glm recipe list")
    if "=" in task or os.path.isfile(task) or any(task in recipe_names(kind) for kind in VERBS):
        return
    names = [*TASKS, *recipe_names(EvaluationRecipe)]
    close = difflib.get_close_matches(task, names, n=1, cutoff=0.4)
    hint = f"did you mean glm evaluate {close[0]}?" if close else f"tasks and recipes are {', '.join(names)}"
    raise UsageError(f"there is no task {task!r}, and no recipe of that name", hint=hint)


def _show_evaluation(recipe: Any, as_json: bool, download: bool) -> int:
    from glmkit.train.evaluation import evaluate as run

    found = run(recipe, download=download)
    if os.environ.get("RANK", "0") != "0":  # of several processes one prints
        return 0
    if as_json:
        described = {**dataclasses.asdict(found.measured), "output": str(found.output_dir)}
        print(json.dumps(described | {"results": found.results}, ensure_ascii=False, indent=2))
        return 0
    figures = [(name, *_shown_figure(one)) for name, one in found.measured.figures.items()]
    print(table([*figures, *((name, _shown_note(value), "") for name, value in found.measured.notes.items())]))
    pace = f"{found.measured.items_per_second:.3g} a second"
    print(f"{found.measured.items} items in {found.measured.seconds:.1f} s, {pace}", file=sys.stderr)
    if found.shortened:
        limit = recipe.data.max_source_length or "what preset=paper has"
        print(f"prompts shortened to data.max_source_length={limit}: {found.shortened}", file=sys.stderr)
    print(f"predictions and results in {found.output_dir}", file=sys.stderr)
    return 0


def _shown_figure(figure: Any) -> tuple[str, str]:
    """A figure and its interval of 95 %, for a table."""
    if figure.value is None:
        return "-", "nothing counted"
    return f"{figure.value:.4g}", f"{figure.low:.4g} to {figure.high:.4g} (95 %)"


def _shown_note(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _show_comparison(compare: Any, folders: list[str], output: str | None) -> int:
    print(compare(folders, output))
    return 0


@verb("Answer every row of a file, in batches.")
def predict(
    input_: Annotated[str, typer.Option("--input", "-i", help="Questions: JSON Lines, a JSON array, CSV or Parquet.")],
    output: Annotated[str, typer.Option("--output", "-o", help="File of JSON Lines for rows and answers.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Folder, model name or hub id.")] = "glm-nano",
    adapter: Adapter = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first rows.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Answers written together.")] = 32,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Longest answer; 512.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 always takes the likeliest.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0, max=1, help="1 is off.")] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Makes sampled answers repeatable.")] = None,
    format_: Annotated[str, typer.Option("--format", help="What a row looks like; auto looks at it.")] = "auto",
    prompt_column: Annotated[
        str | None, typer.Option("--prompt-column", help="Field with the question, of rows that have named columns.")
    ] = None,
    history_column: Annotated[
        str | None, typer.Option("--history-column", help="Field with earlier [question, answer] pairs.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, or a device such as cpu.")] = "auto",
    quantize: Quantize = None,
    family: FamilyName = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    json_: Json = False,
    yes: Yes = False,
) -> int:
    """Answers a file; the same call goes on where one was cut."""
    from glmkit.evaluate.predict import predict as answer
    from glmkit.evaluate.tasks import Settings
    from glmkit.train.arguments import ModelBlock
    from glmkit.train.evaluation import load_shared
    from glmkit.train.progress import Progress

    columns = {"prompt": prompt_column, "history": history_column}
    how = Settings(
        batch_size, max_tokens, temperature, top_p, seed, limit, format=format_,
        columns={key: name for key, name in columns.items() if name is not None},
    )  # fmt: skip
    block = ModelBlock(path=model, adapter=adapter, dtype=dtype, device=device, quantize=quantize, family=family)
    loaded, ranks = load_shared(block, download=yes)
    with Progress("answering", 0, enabled=ranks.rank == 0) as bar:
        found = answer(
            loaded, input_, output, how, ranks=ranks, overwrite=overwrite,
            progress=lambda done, total: bar.update(done, total=total),
        )  # fmt: skip
    if ranks.rank:  # of several processes one prints
        return 0
    if json_:
        print(json.dumps({"schema": 1, "output": output, **dataclasses.asdict(found)}, ensure_ascii=False, indent=2))
        return 0
    pace = f"{found.answered / found.seconds:.3g} a second" if found.answered and found.seconds else "nothing was left"
    print(f"{found.rows} rows in {output}; {found.answered} answered in {found.seconds:.1f} s, {pace}")
    if found.problems:
        print(f"{found.problems} rows are longer than the model's context: `problem` says so", file=sys.stderr)
    return 0
