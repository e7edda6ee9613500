"""The tools that a conversation offers to the model: registered ones that run, and those a person answers for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from glmkit.chat.messages import Message
from glmkit.errors import UsageError
from glmkit.tools.registry import Registry
from glmkit.web.talks import Talk

MAX_DEFINITION_CHARACTERS = 20_000
MAX_DEFINITIONS = 32
MAX_DEPTH = 32
EXAMPLE = """\
# name, description, parameters: as JSON schema, in YAML or JSON
- name: translate
  description: 翻译文本
  parameters:
    type: object
    properties:
      text: {type: string, description: 文本}
      target: {type: string, description: 目标语言}
    required: [text, target]
"""


@dataclass(frozen=True)
class Offer:
    """The tools of one turn.

    Args:
        registry: Those that run here; None if there are none.
        manual: Schemas of those that a person answers for.
    """

    registry: Registry | None
    manual: list[dict[str, Any]]

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """Schemas of all, as the model reads them."""
        return [*(self.registry.schemas() if self.registry is not None else []), *self.manual]


def offer(talk: Talk, registry: Registry) -> Offer:
    """The tools that a conversation offers now.

    Args:
        talk: The conversation.
        registry: Everything that is registered.

    Raises:
        UsageError: Its definitions are none.
    """
    own = read_definitions(talk.definitions)
    taken = {schema["name"] for schema in own}
    chosen = [tool for tool in registry if tool.name in talk.offered and tool.name not in taken]
    if talk.by_hand:
        return Offer(None, [*(tool.schema() for tool in chosen), *own])
    running = Registry()
    for tool in chosen:
        running.add(tool)
    return Offer(running if chosen else None, own)


def read_definitions(text: str) -> list[dict[str, Any]]:
    """Reads tool definitions: one or a list, in JSON or YAML, with or without the OpenAI wrapper.

    Args:
        text: What somebody typed.

    Returns:
        Schemas with name, description and parameters.

    Raises:
        UsageError: It is something else; the message says where.
    """
    if len(text) > MAX_DEFINITION_CHARACTERS:
        raise UsageError(f"the definitions have {len(text):,} characters; the limit is {MAX_DEFINITION_CHARACTERS:,}")
    try:
        _refuse_depth(text)
        _refuse_aliases(text)
        content = yaml.safe_load(text)  # JSON is YAML
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark is not None else ""
        raise UsageError(f"neither JSON nor YAML{place}: {getattr(error, 'problem', None) or error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"neither JSON nor YAML: {error}") from None
    items = [] if content is None else content if isinstance(content, list) else [content]
    if len(items) > MAX_DEFINITIONS:
        raise UsageError(f"there are {len(items)} tools; the limit is {MAX_DEFINITIONS}")
    schemas = [_schema(item, number) for number, item in enumerate(items, start=1)]
    names = [schema["name"] for schema in schemas]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(f"the tool {min(twice)} is defined twice")
    return schemas


def write_definitions(schemas: Iterable[Mapping[str, Any]]) -> str:
    """The text that `read_definitions` reads.

    Args:
        schemas: Schemas; none give an empty text.
    """
    items = [dict(schema) for schema in schemas]
    return yaml.safe_dump(items, allow_unicode=True, sort_keys=False) if items else ""


def take_over_tools(talk: Talk, system: Message | None, registry: Registry) -> None:
    """Gives a conversation that comes from disk the tools that its system message names.

    Args:
        talk: The conversation.
        system: Its system message, if any.
        registry: Everything that is registered.
    """
    tools = system.tools if system is not None and isinstance(system.tools, list) else None
    if tools is None:
        return
    named = [tool for tool in tools if isinstance(tool, dict) and isinstance(tool.get("name"), str)]
    known = {tool.name for tool in registry}
    talk.offered = [tool["name"] for tool in named if tool["name"] in known]
    talk.definitions = write_definitions(tool for tool in named if tool["name"] not in known)


def _schema(item: Any, number: int) -> dict[str, Any]:
    if isinstance(item, dict) and item.get("type") == "function" and isinstance(item.get("function"), dict):
        item = item["function"]
    if not isinstance(item, dict):
        raise UsageError(f"tool {number} is {type(item).__name__}; expected name, description and parameters")
    name, parameters = item.get("name"), item.get("parameters", {"type": "object", "properties": {}})
    if not isinstance(name, str) or not name.isidentifier() or len(name) > 64:
        raise UsageError(f"tool {number} has the name {name!r}; expected a word of letters, digits and _")
    if not isinstance(parameters, dict) or not isinstance(parameters.get("properties", {}), dict):
        raise UsageError(f"the parameters of {name} are no JSON schema of an object")
    description = item.get("description", "")
    if not isinstance(description, str):
        raise UsageError(f"the description of {name} is no text")
    return {"name": name, "description": description, "parameters": parameters}


def _refuse_depth(text: str) -> None:
    """The reader of YAML takes a time that grows with the square of the depth."""
    depth = deepest = 0
    for mark in re.findall(r"[\[{\]}]", text):
        depth = max(0, depth + (1 if mark in "[{" else -1))
        deepest = max(deepest, depth)
    in_a_row = max((len(run) for run in re.findall(r"(?:[-?:] +)+", text)), default=0)
    if deepest > MAX_DEPTH or in_a_row > 2 * MAX_DEPTH:
        raise UsageError(f"the definitions are nested deeper than {MAX_DEPTH} levels")


def _refuse_aliases(text: str) -> None:
    """Aliases of YAML make gigabytes of a few lines."""
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.events.AliasEvent):
            raise UsageError(f"YAML aliases (*{event.anchor}) are not read here")
