"""Recipes: YAML files, checked word for word, with the line of every mistake. What they may say stands in `blocks`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from glmkit.errors import UsageError
from glmkit.train.blocks import (
    BlanksBlock,
    CorpusBlock,
    DataBlock,
    MethodBlock,
    ModelBlock,
    NewModelBlock,
    OutputBlock,
    PretrainRecipe,
    Recipe,
    RunRecipe,
    TrainBlock,
)

__all__ = [
    "BlanksBlock",
    "CorpusBlock",
    "DataBlock",
    "MethodBlock",
    "ModelBlock",
    "NewModelBlock",
    "OutputBlock",
    "PretrainRecipe",
    "Recipe",
    "RunRecipe",
    "TrainBlock",
    "load_recipe",
    "recipe_names",
]

AnyRecipe = TypeVar("AnyRecipe", Recipe, PretrainRecipe)


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = (), kind: type[AnyRecipe] = Recipe) -> AnyRecipe:  # type: ignore[assignment]
    """Read a recipe from a YAML file, or one that comes with the package by its name.

    Args:
        path_or_name: A file, or a bare name such as "adgen_lora".
        overrides: "block.key=value" each, the value written as in YAML; the block may be left out where only one
            block has the key.
        kind: What the recipe is for, `Recipe` (tuning) or `PretrainRecipe`.

    Returns:
        The checked recipe.

    Raises:
        UsageError: If the file is missing or not YAML, or a key or value is wrong; names the line and the nearest
            key that exists.
    """
    name, text = _recipe_text(path_or_name, kind)
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{name} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{name} must hold the blocks {', '.join(kind.model_fields)}")
    origins: dict[tuple[str, ...], str] = {}
    for override in overrides:
        location, value = _override(override, kind)
        block = content.setdefault(location[0], {})
        for key in location[1:-1]:
            block = block.setdefault(key, {}) if isinstance(block, dict) else {}
        if not isinstance(block, dict):
            raise UsageError(f"{override!r}: {'.'.join(location[:-1])} is not a block of {name}")
        block[location[-1]] = value
        origins[location] = override
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        lines = _lines(tree)
        problems = [_problem(name, item, lines, origins, kind) for item in error.errors()]
        raise UsageError("\n".join(problems)) from None


def recipe_names(kind: type[BaseModel] = Recipe) -> list[str]:
    """List the recipes of one kind that come with the package.

    Args:
        kind: `Recipe` or `PretrainRecipe`.
    """
    folder = resources.files("glmkit") / "recipes"
    files = {entry.name.removesuffix(".yaml"): entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}
    return sorted(name for name, file in files.items() if _kind(file.read_text(encoding="utf-8")) is kind)


def _kind(text: str) -> type[BaseModel]:
    return PretrainRecipe if re.search(r"^corpus\s*:", text, re.MULTILINE) else Recipe


def _recipe_text(path_or_name: str | Path, kind: type[BaseModel]) -> tuple[str, str]:
    path = Path(path_or_name)
    packaged = resources.files("glmkit") / "recipes" / f"{path_or_name}.yaml"
    if path.is_file():
        name, text = str(path), path.read_text(encoding="utf-8")
    elif path.name == str(path_or_name) and packaged.is_file():
        name, text = f"recipe {path_or_name}", packaged.read_text(encoding="utf-8")
    else:
        known = ", ".join(recipe_names(kind))
        raise UsageError(
            f"there is no recipe file {path_or_name}", hint=f"give a YAML file or one of the names {known}"
        )
    if _kind(text) is not kind:
        what, verb = ("a block", "pretrain") if kind is Recipe else ("no block", "finetune")
        raise UsageError(f"{name} has {what} 'corpus': expected another kind", hint=f"glm {verb} {path_or_name}")
    return name, text


def _blocks(kind: type[BaseModel]) -> dict[str, type[BaseModel]]:
    return {
        name: field.annotation
        for name, field in kind.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _override(override: str, kind: type[BaseModel]) -> tuple[tuple[str, ...], Any]:
    key, equals, text = override.partition("=")
    key = key.strip().lstrip("-")
    if not equals or not key:
        raise UsageError(f"{override!r} is not of the form key=value", hint="for instance train.learning_rate=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    location = tuple(key.split("."))
    if len(location) == 1 and location[0] not in kind.model_fields:
        owners = [block for block, fields in _blocks(kind).items() if location[0] in fields.model_fields]
        if len(owners) != 1:
            raise UsageError(f"{override!r}: {_unknown(location[0], (), kind)}")
        location = (owners[0], location[0])
    return location, value


def _unknown(key: str, within: tuple[str, ...], kind: type[BaseModel]) -> str:
    """Say that a key does not exist, and which one was probably meant."""
    dotted = {f"{block}.{name}": name for block, fields in _blocks(kind).items() for name in fields.model_fields}
    dotted |= {name: name for name in kind.model_fields}
    here = [full for full in dotted if full.rpartition(".")[0] == ".".join(within)]
    close = difflib.get_close_matches(key, [dotted[full] for full in here], n=1, cutoff=0.6)
    if close:
        return f"there is no key {key!r}; did you mean {'.'.join([*within, close[0]])!r}?"
    elsewhere = [full for full, name in dotted.items() if name == key]
    elsewhere = elsewhere or [
        full for full, name in dotted.items() if difflib.get_close_matches(key, [name], cutoff=0.75)
    ]
    if elsewhere:
        return f"there is no key {key!r} here; did you mean {elsewhere[0]!r}?"
    return f"there is no key {key!r}; known are {', '.join(here)}"


def _problem(
    name: str,
    item: Any,
    lines: dict[tuple[str, ...], int],
    origins: dict[tuple[str, ...], str],
    kind: type[BaseModel],
) -> str:
    location = tuple(str(part) for part in item["loc"])
    if location in origins:
        where = origins[location]
    else:
        known = next((location[:size] for size in range(len(location), 0, -1) if location[:size] in lines), None)
        where = f"{name}:{lines[known]}" if known else name
    if item["type"] == "extra_forbidden":
        return f"{where}: {_unknown(location[-1], location[:-1], kind)}"
    if item["type"] == "missing":
        return f"{where}: {'.'.join(location)} is missing; set it in the file or with {'.'.join(location)}=..."
    message = item["msg"].removeprefix("Value error, ")
    found = "" if isinstance(item["input"], dict | BaseModel) else f", found {item['input']!r}"
    return f"{where}: {'.'.join(location)}: {message}{found}"


def _lines(node: Any, within: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Map every key of a YAML tree to its line."""
    found: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            location = (*within, str(key.value))
            found[location] = key.start_mark.line + 1
            found |= _lines(value, location)
    return found
