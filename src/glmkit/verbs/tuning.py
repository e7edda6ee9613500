"""Verbs that train: finetune, pretrain, plan, watch, data, checkpoint."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer

from glmkit.errors import UsageError
from glmkit.verbs.app import (
    AllowChange,
    Force,
    Json,
    RecipeVerb,
    Schema,
    Set,
    Verb,
    Yes,
    group,
    verb,
)
from glmkit.verbs.printing import table
from glmkit.verbs.recipes import read_recipe, show_recipe, show_schema

_data = group("data", "Work on data files.")


_checkpoints = group("checkpoint", "Work on checkpoints of runs with several processes.")


@verb("Tune a model as a recipe says.", cls=RecipeVerb)
def finetune(
    recipe: Annotated[str, typer.Argument(help="YAML file, or the name of a recipe of this package.")] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it, such as train.learning_rate=1e-4.", metavar="[KEY=VALUE]..."),
    ] = None,
    set_: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    allow_change: AllowChange = False,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe, print it whole, and leave.")] = False,
    preview: Annotated[
        int, typer.Option("--preview", min=0, metavar="N", help="Show the first N records as the model sees them.")
    ] = 0,
    schema: Schema = False,
    yes: Yes = False,
) -> int:
    """Trains, or shows what would be trained."""
    from glmkit.train.arguments import Recipe

    if schema:
        return show_schema(Recipe)
    checked = read_recipe(recipe, overrides, set_, Recipe)
    if dry_run:
        return show_recipe(checked)
    if checked.model.path is not None:
        from glmkit.location import locate

        locate(checked.model.path, download=yes)
    if preview:
        return _show_preview(checked, preview)
    from glmkit.train.run import finetune as train

    return _end_of_training(train(checked, resume=resume, allow_change=allow_change, force=force))


@verb("Train a new GLM on texts, by blank infilling.", cls=RecipeVerb)
def pretrain(
    recipe: Annotated[str, typer.Argument(help="YAML file, or the name of a recipe of this package.")] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it, such as corpus.files=[texts/*.jsonl].", metavar="[KEY=VALUE]..."),
    ] = None,
    set_: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    allow_change: AllowChange = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe, print it whole, and leave.")] = False,
    schema: Schema = False,
    yes: Yes = False,
) -> int:
    """Pre-trains, or shows what would be trained."""
    from glmkit.train.arguments import PretrainRecipe

    if schema:
        return show_schema(PretrainRecipe)
    checked = read_recipe(recipe, overrides, set_, PretrainRecipe)
    if dry_run:
        return show_recipe(checked)
    named = checked.model.tokenizer or checked.model.path
    if named is not None:
        from glmkit.location import locate

        locate(named, download=yes)
    from glmkit.train.pretrain import pretrain as train

    return _end_of_training(train(checked, resume=resume, allow_change=allow_change).training)


def _end_of_training(result: Any) -> int:
    """Says how a run ended: the folder with the result on standard output, all else beside it."""
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
        return 130 if result.interrupted else 0
    if result.interrupted:
        print(f"stopped after step {result.steps}; --resume goes on from there", file=sys.stderr)
        return 130
    validation = "" if result.eval_loss is None else f", validation loss {result.eval_loss:.4f}"
    print(
        f"{result.steps} steps in {result.seconds:.0f} s, loss {result.loss:.4f}{validation}; "
        f"report in {result.output_dir}",
        file=sys.stderr,
    )
    print(result.result_dir)
    return 0


@verb("Say what memory and disk a recipe or a model needs.")
def plan(
    name: Annotated[str, typer.Argument(help="A recipe (file or name), or a model (folder or name).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it.", metavar="[KEY=VALUE]...")] = None,
    memory: Annotated[str | None, typer.Option("--memory", help="Of one device, as 24GB; else what is free.")] = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="Processes that share a recipe's work.")] = 1,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens of a model's context.")] = 2048,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows at a time, of a model.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Do not refuse what does not fit.")] = False,
    json_: Json = False,
) -> int:
    """Prints the plan; a recipe that does not fit is an error that names the nearest settings that do."""
    from glmkit.devices import free_bytes
    from glmkit.train.arguments import Recipe, load_recipe, recipe_names
    from glmkit.train.fitting import as_json, check_fits, memory_bytes, model_plans
    from glmkit.train.plan import place_of, plan_training

    if name not in recipe_names(Recipe) and not name.endswith((".yaml", ".yml")):
        plans = model_plans(name, tokens=context, rows=batch)
        if json_:
            print(json.dumps({"schema": 1, "plans": {key: as_json(one) for key, one in plans.items()}}, indent=2))
        else:
            print(table([(key, f"{one.peak / 1e9:.1f} GB") for key, one in plans.items()]))
        return 0
    recipe = load_recipe(name, overrides or ())
    planned = plan_training(recipe, world=devices)
    free = memory_bytes(memory) if memory else free_bytes(place_of(recipe.model))
    if json_:
        print(json.dumps({"schema": 1, "free_bytes": free, **as_json(planned)}, ensure_ascii=False, indent=2))
    else:
        print(planned if free is None else f"{planned}\n  {'free':<22}{free / 1e9:9.2f} GB")
    if not force:
        check_fits(planned, free, recipe, world=devices)
    return 0


@verb("Look at a run of tuning or pre-training from a second terminal.")
def watch(
    folder: Annotated[str, typer.Argument(help="The run's output folder.", metavar="RUN")],
    once: Annotated[bool, typer.Option("--once", help="Print once and leave.")] = False,
) -> int:
    """Prints the whole curve and the time left until the run ends."""
    from glmkit.train.watch import watch as look

    look(folder, once=once)
    return 0


@_data.command("convert", cls=Verb, help="Write a data file again as ChatGLM3 conversations, one per line.")
def data_convert(
    format: Annotated[str, typer.Argument(help="What its rows look like, as toolalpaca; auto looks at the first.")],
    source: Annotated[str, typer.Argument(help="JSON, JSON Lines, CSV or Parquet.")],
    target: Annotated[str, typer.Argument(help="The JSON Lines file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> int:
    """Converts, and says what was left out."""
    from glmkit.data.records import convert

    print(convert(format, source, target, overwrite=overwrite))
    return 0


@_data.command("prepare", cls=Verb, help="Write the token ids of training data, so that no start makes them again.")
def data_prepare(
    recipe: Annotated[str, typer.Argument(help="Recipe whose data it is; or --model and --data.")] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it, such as data.max_length=200.", metavar="[KEY=VALUE]..."),
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write; data.train_file can be it.")] = "",
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model whose tokenizer it is for.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Data file.")] = None,
    skip_overlength: Annotated[
        bool, typer.Option("--skip-overlength", help="Leave out records that are too long instead of cutting them.")
    ] = False,
    shards: Annotated[int, typer.Option("--shards", min=1, help="Arrow files to write.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> int:
    """Prepares, and says how long the records are."""
    if not output:
        raise UsageError("--output is missing: the folder to write")
    changes = [f"output.dir={output}"]  # a recipe has one; nothing else is written into it
    changes += [f"model.path={model}"] if model is not None else []
    changes += [f"data.train_file={data}"] if data is not None else []
    changes += ["data.skip_overlength=true"] if skip_overlength else []
    from glmkit.train.arguments import Recipe
    from glmkit.train.data_files import prepare_data

    checked = read_recipe(recipe, overrides, changes, Recipe)
    print(prepare_data(checked, output, shards=shards, overwrite=overwrite).page(checked.data.train_file))
    return 0


def _show_preview(recipe: Any, count: int) -> int:
    """Prints records as a model sees them, in colours where there is a terminal."""
    from glmkit.cli import paint
    from glmkit.train.data_files import preview_data

    coloured = paint("x", "1", sys.stdout) != "x"
    print(preview_data(recipe, count, paint=(lambda text, code: paint(text, code, sys.stdout)) if coloured else None))
    return 0


@_checkpoints.command(
    "transform", cls=Verb, help="Merge a checkpoint in parts, or of DeepSpeed, into a model; or divide it anew."
)
def checkpoint_transform(
    source: Annotated[str, typer.Argument(help="A run's step-N, or a folder that DeepSpeed wrote.", metavar="SRC")],
    target: Annotated[str, typer.Argument(help="Folder to write.", metavar="DST")],
    ranks: Annotated[int | None, typer.Option(help="Write a checkpoint in so many parts, not a model.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder with config and tokenizer, if SRC has none.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> int:
    """Writes weights of several processes as one folder."""
    from glmkit.train.transform import transform

    done = transform(source, target, ranks=ranks, model=model, overwrite=overwrite)
    print(f"{done.target}: {done.source}, {done.tensors} tensors, {done.parameters:,} numbers")
    return 0
