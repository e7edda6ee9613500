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
    Block,
    CorpusBlock,
    DataBlock,
    DistributedBlock,
    EvaluateBlock,
    EvaluationData,
    EvaluationRecipe,
    Given,
    MethodBlock,
    ModelBlock,
    NewModelBlock,
    OutputBlock,
    PretrainRecipe,
    Recipe,
    RunRecipe,
    TrainBlock,
    WholeRecipe,
)

__all__ = [
    "BlanksBlock",
    "CorpusBlock",
    "DataBlock",
    "DistributedBlock",
    "EvaluateBlock",
    "EvaluationData",
    "EvaluationRecipe",
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

Location = tuple[str, ...]
"""Block and key of a setting."""
AnyRecipe = TypeVar("AnyRecipe", Recipe, PretrainRecipe, EvaluationRecipe)
VERBS: dict[type[BaseModel], str] = {Recipe: "finetune", PretrainRecipe: "pretrain", EvaluationRecipe: "evaluate"}
"""Every kind of recipe, and the verb of the command that runs it."""
_MOST_BYTES = 2**18  # of a recipe, by far
_MOST_ALIASES = 20  # each may double what the file says
_MARKS: dict[type[BaseModel], str] = {PretrainRecipe: "corpus", EvaluationRecipe: "evaluate"}
"""The block that shows the kind; a recipe without one of them is for tuning."""


def load_recipe(
    path_or_name: str | Path | None,
    overrides: Sequence[str] = (),
    kind: type[AnyRecipe] = Recipe,  # type: ignore[assignment]
) -> AnyRecipe:
    """Read a recipe from a YAML file, or one that comes with the package by its name.

    Args:
        path_or_name: A file, or a bare name such as "adgen_lora"; None: nothing but the overrides.
        overrides: "block.key=value" each, the value written as in YAML; the block may be left out where only one
            block has the key. Keys may be those of other tools, as in the file.
        kind: What the recipe is for, `Recipe` (tuning), `PretrainRecipe` or `EvaluationRecipe`.

    Returns:
        The checked recipe.

    Raises:
        UsageError: If the file is missing or not YAML, or a key or value is wrong; names the line and the nearest
            key that exists.
    """
    name, text = ("the settings", "{}\n") if path_or_name is None else _recipe_text(path_or_name, kind)
    try:
        if sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)) > _MOST_ALIASES:
            raise ValueError(f"more than {_MOST_ALIASES} references to other places of the file")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
        places = _lines(tree, name) if isinstance(content, dict) else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also a date or a number that is none
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"{name} is not valid YAML: {error}", hint="glm recipe copy NAME writes a recipe to begin with"
        ) from None
    if not isinstance(content, dict):
        raise UsageError(
            f"{name} must hold the blocks {', '.join(kind.model_fields)}",
            hint="glm recipe copy NAME writes a recipe to begin with",
        )
    lines = {_own_location(location, kind): line for location, line in places.items()}
    content = _with_own_names(content, kind)
    origins: dict[Location, str] = {}
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
        recipe = kind.model_validate(content)
    except ValidationError as error:
        problems = [_problem(name, item, lines, origins, kind) for item in error.errors()]
        raise UsageError("\n".join(problems)) from None
    recipe.set_given(Given(name, text, tuple(overrides), frozenset(location[:2] for location in origins)))
    return recipe


def recipe_names(kind: type[BaseModel] = Recipe) -> list[str]:
    """List the recipes of one kind that come with the package.

    Args:
        kind: A key of `VERBS`.
    """
    folder = resources.files("glmkit") / "recipes"
    files = {entry.name.removesuffix(".yaml"): entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}
    return sorted(name for name, file in files.items() if _kind(file.read_text(encoding="utf-8")) is kind)


def _kind(text: str) -> type[BaseModel]:
    return next((kind for kind in _MARKS if re.search(rf"^{_MARKS[kind]}\s*:", text, re.MULTILINE)), Recipe)


def _recipe_text(path_or_name: str | Path, kind: type[BaseModel]) -> tuple[str, str]:
    path = Path(path_or_name)
    packaged = resources.files("glmkit") / "recipes" / f"{path_or_name}.yaml"
    if path.is_file():
        name, text = str(path), _file_text(path)
    elif path.name == str(path_or_name) and packaged.is_file():
        name, text = f"recipe {path_or_name}", packaged.read_text(encoding="utf-8")
    else:
        known = ", ".join(recipe_names(kind))
        raise UsageError(
            f"there is no recipe file {path_or_name}", hint=f"give a YAML file or one of the names {known}"
        )
    found = _kind(text)
    if found is not kind:
        what = f"a block {_MARKS[found]!r}" if found in _MARKS else f"no block {_MARKS[kind]!r}"
        raise UsageError(f"{name} has {what}: expected another kind", hint=f"glm {VERBS[found]} {path_or_name}")
    return name, text


def _file_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise UsageError(f"{path} has more than {_MOST_BYTES:,} bytes: it is no recipe")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}", hint="save the file as UTF-8") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def blocks_of(kind: type[BaseModel]) -> dict[str, type[Block]]:
    """Return the blocks of a kind of recipe by name.

    Args:
        kind: A key of `VERBS`.
    """
    return {
        name: field.annotation
        for name, field in kind.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Block)
    }


def _override(override: str, kind: type[BaseModel]) -> tuple[Location, Any]:
    key, equals, text = override.partition("=")
    key = key.strip().lstrip("-")
    if not equals or not key:
        raise UsageError(f"{override!r} is not of the form key=value", hint="for instance train.learning_rate=1e-4")
    location = find_key(key, kind)
    if location is None:
        raise UsageError(f"{override!r}: {unknown_key(key, (), kind)}")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # also what looks like a date and is none
        value = text
    block = blocks_of(kind).get(location[0])
    field = block.model_fields.get(location[1]) if block is not None and len(location) == 2 else None
    if block is not None and len(location) == 1 and not isinstance(value, dict):
        raise UsageError(f"{override!r}: {unknown_key(location[0], (), kind)}")
    # A folder called 2024 is a text, whatever YAML thinks of it.
    if field is not None and field.annotation in (str, str | None) and value is not None:
        value = value if isinstance(value, str) else text
    return location, value


def find_key(key: str, kind: type[BaseModel]) -> Location | None:
    """Find the setting that a key means.

    Args:
        key: As it was typed: with its block or without, ours or another tool's.
        kind: The kind of recipe.

    Returns:
        Block and key in our words; None if no block, or more than one, has such a key. A key with a block is not
        looked up.
    """
    location = tuple(key.split("."))
    blocks = blocks_of(kind)
    if location[0] not in kind.model_fields:
        owners = [name for name, block in blocks.items() if location[0] in block.model_fields]
        owners = owners or [name for name, block in blocks.items() if location[0] in block.synonyms]
        if len(owners) != 1:
            return None
        location = (owners[0], *location)
    return _own_location(location, kind)


def _own_location(location: Location, kind: type[BaseModel]) -> Location:
    block = blocks_of(kind).get(location[0])
    if block is None or len(location) < 2:
        return location
    return (location[0], block.synonyms.get(location[1], location[1]), *location[2:])


def _with_own_names(content: dict[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    """Give keys of other tools our names, so that an override replaces them; what is there twice is left to fail."""
    renamed = dict(content)
    for name, block in blocks_of(kind).items():
        values = content.get(name)
        if isinstance(values, dict):
            meant = {key: block.synonyms.get(key, key) for key in values}
            if len(set(meant.values())) == len(meant):
                renamed[name] = {meant[key]: value for key, value in values.items()}
    return renamed


def unknown_key(key: str, within: Location, kind: type[BaseModel]) -> str:
    """Say that a key does not exist, and which one was probably meant.

    Args:
        key: The key.
        within: Its block; empty if none was named.
        kind: The kind of recipe.
    """
    blocks = blocks_of(kind)
    if key in blocks and not within:
        return f"{key} is a block of settings: {', '.join(f'{key}.{name}' for name in blocks[key].model_fields)}"
    dotted = {f"{block}.{name}": name for block, fields in blocks.items() for name in fields.model_fields}
    dotted |= {name: name for name in kind.model_fields}
    foreign = {f"{block}.{name}": name for block, fields in blocks.items() for name in fields.synonyms}
    prefix = ".".join(within)
    own = [full for full in dotted if full.rpartition(".")[0] == prefix]
    here = own + [full for full in foreign if within and full.rpartition(".")[0] == prefix]
    every = dotted | foreign
    found = _closest(key, here, every, 0.6) or _closest(key, [*dotted, *foreign], every, 0.75)
    if found is None:
        return f"there is no key {key!r}; known are {', '.join(own)}"
    known_elsewhere = found not in here and key in every.values()
    missing = f"there is no key {key!r} here" if known_elsewhere else f"there is no key {key!r}"
    meant = ".".join(_own_location(tuple(found.split(".")), kind))
    if meant == found:
        return f"{missing}; did you mean {found!r}?"
    return f"{missing}; did you mean {found!r} (that is {meant})?"


def _closest(key: str, candidates: Sequence[str], names: dict[str, str], cutoff: float) -> str | None:
    """Return the full name whose last part is nearest, equal ones first."""
    close = difflib.get_close_matches(key, [names[full] for full in candidates], n=1, cutoff=cutoff)
    return next((full for full in candidates if names[full] == close[0]), None) if close else None


def _problem(
    name: str,
    item: Any,
    lines: dict[Location, int],
    origins: dict[Location, str],
    kind: type[BaseModel],
) -> str:
    location = tuple(str(part) for part in item["loc"])
    if location in origins:
        where = origins[location]
    else:
        known = next((location[:size] for size in range(len(location), 0, -1) if location[:size] in lines), None)
        where = f"{name}:{lines[known]}" if known else name
    if item["type"] == "extra_forbidden":
        return f"{where}: {unknown_key(location[-1], location[:-1], kind)}"
    if item["type"] == "missing":
        block = blocks_of(kind).get(location[0])
        if len(location) == 1 and block is not None:
            fields = block.model_fields
            location = (location[0], next((name for name in fields if fields[name].is_required()), next(iter(fields))))
        return f"{where}: {'.'.join(location)} is missing; set it in the file or with {'.'.join(location)}=..."
    message = item["msg"].removeprefix("Value error, ")
    found = "" if isinstance(item["input"], dict | BaseModel) else f", found {item['input']!r:.400}"
    key = f"{'.'.join(location)}: " if location else ""  # none: several blocks do not fit together
    return f"{where}: {key}{message}{found}"


class _Dumper(yaml.SafeDumper):
    """Writes every value into one line, also texts with line ends."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def one_line(value: Any) -> str:
    """Write a value as YAML in one line, as overrides have it.

    Args:
        value: Of what JSON can hold.
    """
    text = yaml.dump([value], Dumper=_Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.strip()[1:-1]


def as_given(recipe: RunRecipe) -> str:
    """Return a recipe as it was given, as YAML: the file word for word, or what was set in Python.

    Args:
        recipe: The recipe.
    """
    given = recipe.given
    if given is None:
        settings = recipe.model_dump(mode="json", exclude_unset=True)
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    changes = "".join(f"# with {override}\n" for override in given.overrides)
    return f"# {given.name}\n{changes}{given.text}"


def as_resolved(recipe: RunRecipe | WholeRecipe) -> str:
    """Return a whole recipe as YAML, each value with where it comes from: default, recipe or override.

    Args:
        recipe: The recipe.
    """
    changed = recipe.given.overridden if recipe.given is not None else frozenset()
    lines = []
    for name, values in recipe.model_dump(mode="json").items():
        block = getattr(recipe, name)
        lines.append(f"{name}:")
        for key, value in values.items():
            origin = "recipe" if key in block.model_fields_set else "default"
            origin = "override" if (name, key) in changed else origin
            lines.append(f"  {key}: {one_line(value)}  # {origin}")
    return "\n".join(lines) + "\n"


def _lines(node: Any, name: str, within: Location = ()) -> dict[Location, int]:
    """Map every key of a YAML tree to its line; a key that is there twice is refused, YAML would drop the first."""
    found: dict[Location, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            location = (*within, str(key.value))
            line = key.start_mark.line + 1
            if location in found:
                raise UsageError(f"{name}:{line}: {'.'.join(location)} is there twice, first in line {found[location]}")
            found[location] = line
            found |= _lines(value, name, location)
    return found
