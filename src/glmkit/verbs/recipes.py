"""What verbs with a recipe share, and the verb recipe."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from glmkit.errors import UsageError
from glmkit.verbs.app import (
    Json,
    Verb,
    group,
)

_recipes = group("recipe", "List, show, copy and explain recipes.")


def read_recipe(recipe: str, overrides: list[str] | None, more: list[str] | None, kind: Any) -> Any:
    """Reads a recipe with its changes; without a recipe the changes must say everything."""
    from glmkit.train.arguments import load_recipe

    changes = [*(overrides or ()), *(more or ())]
    if "=" in recipe and not os.path.isfile(recipe):
        recipe, changes = "", [recipe, *changes]
    if recipe or not changes:
        _check_recipe_name(recipe, kind)
    return load_recipe(recipe or None, changes, kind)


def _check_recipe_name(recipe: str, kind: Any) -> None:
    """Refuses a recipe that is neither a file nor in the package, with the name that was probably meant."""
    from glmkit.train.arguments import VERBS, recipe_names

    names = recipe_names(kind)
    for verb in (verb for other, verb in VERBS.items() if other is not kind and recipe in recipe_names(other)):
        raise UsageError(f"the recipe {recipe} is not for this verb", hint=f"glm {verb} {recipe}")
    if recipe in names or os.path.isfile(recipe):
        return
    if not recipe:
        raise UsageError("which recipe?", hint=f"a YAML file or one of: {', '.join(names)}")
    from difflib import get_close_matches

    close = get_close_matches(Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe, names, n=1)
    raise UsageError(
        f"there is no recipe {recipe!r}: neither a file nor a recipe of this package",
        hint=f"did you mean {close[0]}?" if close else f"recipes of this package: {', '.join(names)}",
    )


def show_recipe(recipe: Any) -> int:
    """Prints a checked recipe whole, as `--dry-run` asks, and where each value comes from."""
    from glmkit.train.arguments import as_resolved

    print(as_resolved(recipe), end="")
    return 0


def show_schema(kind: Any) -> int:
    """Prints the JSON schema of recipes, for editors."""
    from glmkit.train.flags import schema

    print(json.dumps(schema(kind), ensure_ascii=False, indent=2))
    return 0


@_recipes.command("list", cls=Verb, help="List the recipes of the package, with what they need.")
def recipe_list(
    long: Annotated[bool, typer.Option("--long", "-l", help="Hardware, memory and time of each too.")] = False,
    json_: Json = False,
) -> int:
    """Lists recipes."""
    from glmkit.train.packaged import head_of, packaged_names, recipe_text

    names = packaged_names()
    heads = {name: head_of(recipe_text(name)) for name in names}
    if json_:
        listed = [{"name": name, "title": head.title} | head.facts for name, head in heads.items()]
        print(json.dumps({"schema": 1, "recipes": listed}, ensure_ascii=False, indent=2))
        return 0
    width = max(map(len, names))
    for name, head in heads.items():
        print(f"{name.ljust(width)}  {head.title or 'configuration for distributed.deepspeed'}")
        if long:
            for fact in ("hardware", "memory", "time"):
                if fact in head.facts:
                    print(f"{' ' * width}    {fact}: {head.facts[fact]}")
    return 0


Packaged = Annotated[str, typer.Argument(help="Name of a recipe of the package, see glm recipe list.", metavar="NAME")]


@_recipes.command("show", cls=Verb, help="Print a recipe of the package.")
def recipe_show(name: Packaged) -> int:
    """Prints the file as it is."""
    from glmkit.train.packaged import recipe_text

    print(recipe_text(name), end="")
    return 0


@_recipes.command("copy", cls=Verb, help="Copy a recipe of the package, to be changed.")
def recipe_copy(
    name: Packaged,
    target: Annotated[
        str | None, typer.Argument(help="File or folder; the current folder by default.", metavar="[DST]")
    ] = None,
) -> int:
    """Copies the file; an existing one is kept."""
    from glmkit.train.packaged import copy_recipe

    print(copy_recipe(name, target))
    return 0


@_recipes.command("explain", cls=Verb, help="Explain a setting: meaning, default, limits, other names, who sets it.")
def recipe_explain(
    key: Annotated[str, typer.Argument(help="Such as learning_rate or data.packing.", metavar="KEY")],
) -> int:
    """Explains a setting in some lines."""
    from glmkit.train.packaged import explain

    print(explain(key))
    return 0
