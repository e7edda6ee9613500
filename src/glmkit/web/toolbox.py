"""The tools that a conversation offers to the model: registered ones that run, and those a person answers for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from glmkit.chat.messages import Message
from glmkit.tools.registry import Registry
from glmkit.tools.schema import read_definitions
from glmkit.web.talks import Talk

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


def write_definitions(schemas: Iterable[Mapping[str, Any]]) -> str:
    """The text that `glmkit.tools.schema.read_definitions` reads.

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
