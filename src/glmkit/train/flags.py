"""Recipes on the command line: flags for every setting, and the help, made of the same blocks."""

from __future__ import annotations

import shutil
import textwrap
import types
from collections.abc import Collection, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from glmkit.errors import UsageError
from glmkit.train.arguments import VERBS, blocks_of, find_key, unknown_key
from glmkit.train.blocks import Block

_BOOLEANS = {"true", "false", "yes", "no", "on", "off"}
_WORDS = {str: "TEXT", int: "N", float: "NUMBER", bool: "[true|false]", dict: "{...}"}


def settings_from_flags(
    arguments: Sequence[str], own: dict[str, bool], kind: type[BaseModel]
) -> tuple[list[str], list[str]]:
    """Take the flags that are settings of a recipe out of the arguments of a verb.

    Args:
        arguments: As typed: `--learning_rate 1e-4`, `--learning-rate=1e-4`, `--train.bf16`.
        own: The verb's flags, and whether each of them takes a value.
        kind: The kind of recipe.

    Returns:
        The other arguments, and the settings as "key=value" in their order.

    Raises:
        UsageError: If a flag is neither the verb's nor a setting, or lacks its value.
    """
    rest: list[str] = []
    settings: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        flag, equals, value = argument.partition("=")
        if argument == "--":
            return [*rest, argument, *waiting], settings
        if not flag.startswith("--") or flag in own:
            rest.append(argument)
            if flag in own and own[flag] and not equals and waiting:
                rest.append(waiting.pop(0))
            continue
        key = flag[2:].replace("-", "_")
        location = find_key(key, kind)
        block = blocks_of(kind).get(location[0]) if location is not None else None
        if location is None or block is None or len(location) < 2 or location[1] not in block.model_fields:
            raise _no_such_option(flag, key, own, kind)
        truth = block.model_fields[location[1]].annotation is bool
        if not equals:
            if waiting and not waiting[0].startswith("--") and (not truth or waiting[0].lower() in _BOOLEANS):
                value = waiting.pop(0)
            elif truth:
                value = "true"
            else:
                raise UsageError(f"{flag} needs a value", hint=f"for instance {flag} {_example(block, location[1])}")
        settings.append(f"{'.'.join(location)}={value}")
    return rest, settings


def _no_such_option(flag: str, key: str, own: Collection[str], kind: type[BaseModel]) -> UsageError:
    from difflib import get_close_matches

    close = get_close_matches(flag, own, n=1, cutoff=0.75)
    if close:
        return UsageError(f"no such option: {flag}", hint=f"did you mean {close[0]}?")
    within, _, last = key.rpartition(".")
    message = unknown_key(last, (within,) if within else (), kind)
    return UsageError(f"no such option: {flag}; {message}", hint=f"glm {VERBS[kind]} --help lists all settings")


def _example(block: type[Block], name: str) -> str:
    default = block.model_fields[name].default
    return "..." if default is None or default is PydanticUndefined else shown(default)


def settings_help(kind: type[BaseModel]) -> str:
    """Lay out every setting of a kind of recipe, block by block.

    Args:
        kind: The kind of recipe.
    """
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    blocks = blocks_of(kind)
    seed = next(f"{name}.seed" for name, block in blocks.items() if "seed" in block.model_fields)
    parts = [f"Settings, as KEY=VALUE, --set KEY=VALUE or --KEY VALUE; a key may be written with its block, {seed}:"]
    for name, block in blocks.items():
        parts.append(f"\n  {name}: {(block.__doc__ or '').strip()}")
        others: dict[str, list[str]] = {}
        for foreign, own in block.synonyms.items():
            others.setdefault(own, []).append(foreign)
        for key, field in block.model_fields.items():
            text = " ".join((field.description or "").split())
            if key in others:
                text += f" Also: {', '.join(others[key])}."
            if field.default is not PydanticUndefined and field.default not in (None, []):
                text += f" [{shown(field.default)}]"
            if field.is_required():
                text += " [required]"
            head = f"    --{key} {kind_of_value(field.annotation)}"
            lines = textwrap.wrap(text, width - 36, break_on_hyphens=False)
            first = f"{head:<36}{lines.pop(0)}" if len(head) < 35 else head
            parts += [first, *(" " * 36 + line for line in lines)]
    return "\n".join(parts)


def kind_of_value(annotation: Any) -> str:
    """Say in a word what a setting's value looks like.

    Args:
        annotation: The type of its field.
    """
    origin = get_origin(annotation)
    if origin is Literal:
        return f"[{'|'.join(map(str, get_args(annotation)))}]"
    if origin in (Union, types.UnionType):
        return next(kind_of_value(one) for one in get_args(annotation) if one is not type(None))
    if origin is list:
        return f"[{kind_of_value(get_args(annotation)[0])},...]"
    return _WORDS.get(origin or annotation, "TEXT")


def shown(value: Any) -> str:
    """Write a value as it is written in a recipe.

    Args:
        value: Of a setting.
    """
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def schema(kind: type[BaseModel]) -> dict[str, Any]:
    """Describe a kind of recipe as JSON schema, for editors that complete YAML.

    Args:
        kind: The kind of recipe.

    Returns:
        The schema; the names that other tools use are in it too.
    """
    described = kind.model_json_schema()
    for block in blocks_of(kind).values():
        properties = described["$defs"][block.__name__]["properties"]
        for foreign, own in block.synonyms.items():
            properties[foreign] = {**properties[own], "title": foreign, "description": f"The same as {own}."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described}
