"""Tools: how ChatGLM3 is told of them and how it calls them. Calls are read as literals and never evaluated."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glmkit.errors import GlmkitError

TOOLS_SENTENCE = "Answer the following questions as best as you can. You have access to the following tools:"
INTERPRETER = "interpreter"  # the header line of code to run, which is no tool call
MAX_CALL_CHARACTERS = 65_536
MAX_DEPTH = 32
_FENCE = re.compile(r"\s*```[^\n`]*\n(?P<code>.*?)(?:\n?[ \t]*```\s*)?", re.DOTALL)


class ToolCallError(GlmkitError, ValueError):
    """A text that should be one `tool_call(...)` and is not; the message says why."""


@dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for.

    Args:
        name: The tool.
        arguments: Its arguments by name: numbers, strings, booleans, None, and lists, tuples, dicts of these.
    """

    name: str
    arguments: dict[str, Any]


def documented_tools(tools: list[Any] | Mapping[str, Any]) -> list[Any] | Mapping[str, Any]:
    """Takes the OpenAI wrapper off tools, so that the model reads the form it was trained on.

    Args:
        tools: A list of tools, a list of {"type": "function", "function": tool}, or a mapping from names to tools.

    Returns:
        The tools without the wrapper; everything else as it is.
    """
    if isinstance(tools, Mapping):
        return tools
    return [
        tool["function"]
        if isinstance(tool, Mapping) and tool.get("type") == "function" and isinstance(tool.get("function"), Mapping)
        else tool
        for tool in tools
    ]


def parse_tool_call(text: str) -> dict[str, Any]:
    """Reads one `tool_call(name=literal, ...)`, bare or in a Markdown fence.

    Args:
        text: What the model wrote behind the header line.

    Returns:
        The arguments by name.

    Raises:
        ToolCallError: Anything else: other code, positional arguments, values that are no literals, too long, too deep.
    """
    if len(text) > MAX_CALL_CHARACTERS:
        raise ToolCallError(f"the tool call has {len(text)} characters, expected at most {MAX_CALL_CHARACTERS}")
    fenced = _FENCE.fullmatch(text)
    code = (fenced["code"] if fenced else text).strip()
    try:
        call = ast.parse(code, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error) or type(error).__name__
        raise ToolCallError(f"the tool call is no expression ({reason}): {code[:200]!r}") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "tool_call":
        raise ToolCallError(f"expected one call of tool_call, found {code[:200]!r}")
    if call.args:
        raise ToolCallError(f"tool_call takes arguments by name only, found {code[:200]!r}")
    arguments: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ToolCallError(f"tool_call takes arguments by name only, found ** in {code[:200]!r}")
        if keyword.arg in arguments:
            raise ToolCallError(f"tool_call has the argument {keyword.arg} twice")
        arguments[keyword.arg] = _literal(keyword.value, keyword.arg, MAX_DEPTH)
    return arguments


def _literal(node: ast.expr, name: str, depth: int) -> Any:
    """The value of a literal; `name` is the argument it stands in."""
    if depth == 0:
        raise ToolCallError(f"the argument {name} is nested deeper than {MAX_DEPTH} levels")
    if isinstance(node, ast.Constant):
        return _constant(node.value, name)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand, name, depth - 1)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return -value
    if isinstance(node, ast.List):
        return [_literal(item, name, depth - 1) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_literal(item, name, depth - 1) for item in node.elts)
    if isinstance(node, ast.Dict):
        pairs = {}
        for key, value in zip(node.keys, node.values):
            if not isinstance(key, ast.Constant):
                raise ToolCallError(f"the argument {name} has a dict key that is no plain value")
            pairs[_constant(key.value, name)] = _literal(value, name, depth - 1)
        return pairs
    raise ToolCallError(f"the argument {name} is a {type(node).__name__}, expected a literal")


def _constant(value: Any, name: str) -> Any:
    if value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ToolCallError(
        f"the argument {name} has the value {value!r}, expected text, a finite number, True, False or None"
    )
