"""The recipes that come with the package: their list, their text, copies of them, and their settings explained.

The head of a recipe says in a line each what it needs: hardware, memory, time, source, command.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from glmkit.errors import OutputError, UsageError
from glmkit.train.arguments import VERBS, blocks_of, find_key, recipe_names, unknown_key
from glmkit.train.blocks import Block, Recipe
from glmkit.train.flags import kind_of_value, shown

_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


@dataclass(frozen=True)
class Head:
    """What the comment at the top of a recipe says.

    Attributes:
        title: Its first sentences.
        facts: What follows a word such as hardware, memory, time, source, command; several lines of one word are
            joined by newlines.
    """

    title: str
    facts: dict[str, str]


def head_of(text: str) -> Head:
    """Read the head of a recipe.

    Args:
        text: Of the file.
    """
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].rstrip())
    title = " ".join(line.strip() for line in lines[: lines.index("") if "" in lines else None])
    facts: dict[str, str] = {}
    word = ""
    for line in lines:
        found = re.match(r" ([a-z]+) {2,}(\S.*)", line)
        if found:
            word = found[1]
            facts[word] = f"{facts[word]}\n{found[2]}" if word in facts else found[2]
        elif word and line.startswith(" " * 8):
            facts[word] += f" {line.strip()}"
        else:
            word = ""
    return Head(title, facts)


def packaged_names() -> list[str]:
    """List all files that come with the package: recipes of every kind, and configurations of DeepSpeed.

    Returns:
        Names without their endings, recipes for tuning first.
    """
    settings = sorted(file.stem for file in _folder().glob("*.json"))
    return [*(name for kind in VERBS for name in recipe_names(kind)), *settings]


def packaged_file(name: str) -> Path | None:
    """Find a file that comes with the package.

    Args:
        name: With its ending or without.

    Returns:
        Its path; None if there is none of that name.
    """
    if Path(name).name != name:
        return None
    wanted = [_folder() / ending for ending in (f"{name}.yaml", f"{name}.json", name)]
    return next((file for file in wanted if file.is_file()), None)


def named_file(name: str) -> Path:
    """Find a file of the user's, or else one that comes with the package.

    Args:
        name: A path, or the name of a file in the package.

    Returns:
        Its path; that of `name` where there is neither.
    """
    own = Path(name)
    return own if own.is_file() else packaged_file(name) or own


def recipe_text(name: str) -> str:
    """Return what a recipe of the package says.

    Args:
        name: With its ending or without.

    Raises:
        UsageError: There is none of that name.
    """
    return _existing(name).read_text(encoding="utf-8")


def copy_recipe(name: str, target: str | Path | None = None) -> Path:
    """Copy a recipe of the package, to be changed.

    Args:
        name: With its ending or without.
        target: File or existing folder; None: the current folder.

    Returns:
        The new file.

    Raises:
        UsageError: There is none of that name.
        OutputError: The new file exists, or cannot be written.
    """
    source = _existing(name)
    path = Path(target) if target is not None else Path()
    path = path / source.name if path.is_dir() else path
    if path.exists():
        raise OutputError(f"{path} exists already", hint="name another file")
    from glmkit.writing import write_text_atomic  # brings torch

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, source.read_text(encoding="utf-8"))
    return path


def explain(key: str) -> str:
    """Explain a setting: what it does, what it may be, what other tools call it, and which recipes set it.

    Args:
        key: With its block or without; other tools' names are understood too.

    Returns:
        Some lines of text.

    Raises:
        UsageError: There is no such setting.
    """
    parts = []
    for kind in VERBS:
        location = find_key(key, kind)
        block = blocks_of(kind).get(location[0]) if location is not None else None
        if location is None or block is None or len(location) < 2 or location[1] not in block.model_fields:
            continue
        text = _explained(kind, location[0], location[1])
        if text not in parts:
            parts.append(text)
    if not parts:
        raise UsageError(unknown_key(key.rpartition(".")[2], tuple(key.split(".")[:-1]), Recipe))
    return "\n\n".join(parts)


def _explained(kind: type[BaseModel], block_name: str, name: str) -> str:
    block = blocks_of(kind)[block_name]
    field = block.model_fields[name]
    lines = [f"{block_name}.{name}  {kind_of_value(field.annotation)}"]
    lines.append(f"  {' '.join((field.description or '').split())}")
    if field.is_required():
        lines.append("  needed: a recipe without it is refused")
    else:
        default = None if field.default is PydanticUndefined else field.default
        lines.append(f"  default: {'none' if default in (None, []) else shown(default)}")
    limits = [
        f"{words} {getattr(one, limit)}"
        for one in field.metadata
        for limit, words in _LIMITS.items()
        if hasattr(one, limit)
    ]
    if limits:
        lines.append(f"  limits: {', '.join(limits)}")
    others = [foreign for foreign, own in block.synonyms.items() if own == name]
    if others:
        lines.append(f"  also called: {', '.join(others)}")
    uses = _uses(block_name, block, name)
    width = max(map(len, uses), default=0)
    lines.append("  set by:" if uses else "  set by: no recipe of the package")
    return "\n".join([*lines, *(f"    {recipe.ljust(width)}  {shown(value)}" for recipe, value in uses.items())])


def _uses(block_name: str, block: type[Block], name: str) -> dict[str, Any]:
    """The recipes with this block that set the value, and what to."""
    uses: dict[str, Any] = {}
    for kind in VERBS:
        if blocks_of(kind).get(block_name) is not block:
            continue
        for recipe in recipe_names(kind):
            values = yaml.safe_load(recipe_text(recipe)).get(block_name) or {}
            own = {block.synonyms.get(key, key): value for key, value in values.items()}
            if name in own:
                uses[recipe] = own[name]
    return uses


def _folder() -> Path:
    return Path(str(resources.files("glmkit") / "recipes"))


def _existing(name: str) -> Path:
    file = packaged_file(name)
    if file is not None:
        return file
    from difflib import get_close_matches

    names = packaged_names()
    close = get_close_matches(name, names, n=1)
    raise UsageError(
        f"the package has no recipe {name!r}",
        hint=f"did you mean {close[0]}?" if close else "glm recipe list shows them all",
    )
