"""What a model is told of a tool: read from a typed Python function, or from a definition in JSON or YAML.

def get_time(city: Annotated[str, "city name"]) -> dict:       {"name": "get_time",
    \"\"\"Get the time of a city.\"\"\"                              "description": "Get the time of a city.",
                                                                "parameters": {"type": "object", "properties": {
                                                                    "city": {"type": "string", "description": …}},
                                                                    "required": ["city"]}}
"""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
import yaml

from glmkit.chat.tools import MAX_DEPTH, TEXT_TOOLS, depth_of, documented_tools
from glmkit.errors import UsageError

MAX_DEFINITIONS = 32
MAX_DEFINITION_CHARACTERS = 65_536
_MAX_LEVELS = MAX_DEPTH + 8  # of a text: the parameters stand within a definition within a list
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}
_ARGUMENT = re.compile(r"(?P<name>\w+)(?: ?\([^)]*\))?: (?P<text>.+)")


@dataclass(frozen=True)
class Parameter:
    """One argument of a tool.

    Args:
        schema: What the model is told of it, in JSON schema.
        required: Whether a call must have it.
        type: Checks a value, and makes it what the function takes.
    """

    schema: dict[str, Any]
    required: bool
    type: pydantic.TypeAdapter[Any]


def check_name(name: str) -> str:
    """Gives back a name that a tool can have.

    Args:
        name: The name.

    Raises:
        UsageError: It has other characters than letters, digits, - and _, is too long, or means something else.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"{str(name)[:80]!r} is no name of a tool; expected at most 64 letters, digits, - and _")
    if name in TEXT_TOOLS:
        raise UsageError(
            f"a tool cannot be called {name}, which means something else to the models", hint="choose another name"
        )
    return name


def read_parameters(function: Callable[..., Any]) -> dict[str, Parameter]:
    """Reads what a function takes.

    Args:
        function: Its parameters are `Annotated[type, "description"]`, or `Annotated[type, "description", required]`,
            or plainly typed with a description under "Args:" of the docstring. Types are str, int, float, bool, list,
            tuple, dict, Literal, Optional and Enum, and what they are made of.

    Returns:
        Its parameters by name, in order.

    Raises:
        UsageError: A type or description is missing, or a type is none of these; the message says which.
    """
    name = function.__name__
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:  # a name in an annotation that does not exist, say
        raise UsageError(f"the types of {name} cannot be read: {error}") from error
    described = _docstring_arguments(inspect.getdoc(function) or "")
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UsageError(f"{name} takes {parameter}; a tool takes arguments by name only")
        if parameter.name not in hints:
            raise UsageError(
                f"the parameter {parameter.name} of {name} has no type",
                hint=f'write {parameter.name}: Annotated[str, "what it is"]',
            )
        found[parameter.name] = _parameter(name, parameter, hints[parameter.name], described)
    return found


def _parameter(function: str, parameter: inspect.Parameter, hint: Any, described: Mapping[str, str]) -> Parameter:
    extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    kind = get_args(hint)[0] if extras else hint
    texts = [extra for extra in extras if isinstance(extra, str)]
    description = texts[0] if texts else described.get(parameter.name, "")
    if not description.strip():
        raise UsageError(
            f"the parameter {parameter.name} of {function} has no description",
            hint=f'write {parameter.name}: Annotated[…, "what it is"], or describe it under "Args:" in the docstring',
        )
    optional = parameter.default is not parameter.empty
    said = next((extra for extra in extras if isinstance(extra, bool)), not optional)
    if not said and not optional:
        raise UsageError(f"the parameter {parameter.name} of {function} is not required and has no default")
    try:
        schema = _schema(kind)
    except TypeError as error:
        raise UsageError(
            f"the parameter {parameter.name} of {function} has the type {error}, which has no form in JSON schema here",
            hint="use str, int, float, bool, list, tuple, dict, Literal, Optional or an Enum",
        ) from None
    return Parameter({**schema, "description": description.strip()}, said, pydantic.TypeAdapter(hint))


def _schema(kind: Any) -> dict[str, Any]:
    """A type in JSON schema; TypeError names one that has no form."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if origin is Annotated:
        return _schema(inner[0])
    if origin is Literal:
        return _values(inner, kind)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _values([member.value for member in kind], kind)
    if kind is list or origin is list:
        return {"type": "array", **({"items": _schema(inner[0])} if inner else {})}
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        items = [_schema(item) for item in inner]
        same = all(item == items[0] for item in items)
        return {
            "type": "array",
            **({"items": items[0]} if same else {"prefixItems": items}),
            "minItems": len(items),
            "maxItems": len(items),
        }
    if kind is dict or origin is dict:
        return {"type": "object", **({"additionalProperties": _schema(inner[1])} if inner else {})}
    if origin in (Union, types.UnionType):
        rest = [_schema(item) for item in inner if item is not type(None)]
        return rest[0] if len(rest) == 1 else {"anyOf": rest}
    if kind is Any:
        return {}
    raise TypeError(getattr(kind, "__name__", None) or str(kind))


def _values(values: typing.Sequence[Any], kind: Any) -> dict[str, Any]:
    """A choice of values, with their type where it is one."""
    types_found = {_PLAIN.get(type(value)) for value in values}
    if None in types_found:
        raise TypeError(str(kind))
    return {**({"type": types_found.pop()} if len(types_found) == 1 else {}), "enum": list(values)}


def description_of(function: Callable[..., Any]) -> str:
    """The first paragraph of a function's docstring as one line.

    Args:
        function: The function.

    Raises:
        UsageError: It has none.
    """
    first = (inspect.getdoc(function) or "").split("\n\n")[0]
    text = " ".join(first.split())
    if not text:
        raise UsageError(
            f"the function {function.__name__} has no docstring",
            hint="its first paragraph tells the model what the tool does",
        )
    return text


def _docstring_arguments(text: str) -> dict[str, str]:
    """The descriptions under "Args:" of a Google-style docstring."""
    found: dict[str, str] = {}
    lines = iter(text.split("\n"))
    for line in lines:
        if line.strip() in ("Args:", "Arguments:", "Parameters:"):
            break
    name, indent = "", 0
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if line.strip() and depth == 0:
            break  # the next section
        indent = indent or depth
        match = _ARGUMENT.fullmatch(line.strip())
        if depth == indent and match:
            name = match["name"]
            found[name] = match["text"]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


# --- definitions without a function ---


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML without aliases, which can make a small text huge, and not deeper than a definition can be."""

    _level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Reads one node, see `yaml`."""
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name); write the value out")
        self._level += 1
        if self._level > _MAX_LEVELS:
            raise yaml.YAMLError(f"it is nested deeper than {_MAX_LEVELS} levels")
        node = super().compose_node(parent, index)
        self._level -= 1
        return node


def read_definitions(text: str) -> list[dict[str, Any]]:
    """Reads definitions of tools that somebody has typed: nothing of them is ever run.

    Args:
        text: JSON or YAML: one definition or a list, each with name, description and parameters, with or without
            OpenAI's wrapper.

    Returns:
        The definitions without the wrapper; none of an empty text.

    Raises:
        UsageError: It is something else, too long or too deep, too many, or one name twice; the message says what.
    """
    if len(text) > MAX_DEFINITION_CHARACTERS:
        raise UsageError(f"the definitions have {len(text)} characters, expected at most {MAX_DEFINITION_CHARACTERS}")
    try:
        content = yaml.load(text, Loader=_PlainLoader)  # it is a SafeLoader; and JSON is YAML
        json.dumps(content, allow_nan=False)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"the definitions are no JSON or YAML that can be read: {_first_lines(error)}") from error
    items = [] if content is None else content if isinstance(content, list) else [content]
    if len(items) > MAX_DEFINITIONS:
        raise UsageError(f"there are {len(items)} definitions, expected at most {MAX_DEFINITIONS}")
    tools = [checked_definition(tool) for tool in documented_tools(items)]
    names = [tool["name"] for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"the tool {name} is defined twice")
    return tools


def _first_lines(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def checked_definition(tool: Any) -> dict[str, Any]:
    """Checks the definition of a tool.

    Args:
        tool: A mapping with name, and mostly description and parameters.

    Returns:
        It with its parts in the order in which models read them.

    Raises:
        UsageError: It is something else.
    """
    if not isinstance(tool, Mapping) or "name" not in tool:
        raise UsageError(
            f"a tool is {str(tool)[:80]}; expected a mapping with name, description and parameters",
            hint="- name: get_weather\n  description: …\n  parameters: {type: object, properties: {…}, required: […]}",
        )
    name = check_name(tool["name"])
    description, parameters = tool.get("description", ""), tool.get("parameters", {})
    if not isinstance(description, str):
        raise UsageError(f"the description of the tool {name} is no text")
    if not isinstance(parameters, Mapping):
        raise UsageError(f"the parameters of the tool {name} are a {type(parameters).__name__}, expected a mapping")
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    if not isinstance(properties, Mapping) or not all(isinstance(one, Mapping) for one in properties.values()):
        raise UsageError(f"the properties of the tool {name} are no mapping of mappings")
    if not isinstance(required, list) or not all(isinstance(one, str) for one in required):
        raise UsageError(f"what the tool {name} requires is no list of names")
    if depth_of(parameters) > MAX_DEPTH:
        raise UsageError(f"the parameters of the tool {name} are nested deeper than {MAX_DEPTH} levels")
    return {"name": name, "description": description, "parameters": dict(parameters)}
