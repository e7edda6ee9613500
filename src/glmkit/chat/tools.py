"""Tools: how models are told of them, and how calls are written and read. Calls are literals and never evaluated.

    ChatGLM3    tools as one JSON text behind a sentence      calls  tool_call(city='北京')
    GLM-4       a section of text for each tool               calls  {"city": "北京"}

Source: tokenization_chatglm.py of both models' repositories. The texts are what the models were trained to read.
"""

from __future__ import annotations

import ast
import io
import json
import keyword
import math
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from glmkit.errors import GlmkitError, UsageError

TOOLS_SENTENCE = "Answer the following questions as best as you can. You have access to the following tools:"
INTERPRETER = "interpreter"  # the header line of code to run, which is no tool call
# What tells ChatGLM3 that code it writes is run. Source: composite_demo of the official repository.
INTERPRETER_PROMPT = (
    "你是一位智能AI助手，你叫ChatGLM，你连接着一台电脑，但请注意不能联网。在使用Python解决任务时，你可以运行代码并得到结果，"
    "如果运行结果有错误，你需要尽可能对代码进行改进。你可以处理用户上传到电脑上的文件，文件默认存储路径是/mnt/data/。"
)
CODE_TOOLS = {3: INTERPRETER, 4: "python"}  # the header line of code to run, by generation
MAX_CALL_CHARACTERS = 65_536
MAX_DEPTH = 32
_ASSISTANT = (
    "你是一个名为 {} 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。"
)
# What stands in front of GLM-4's tools; the wording of its releases by their first month.
GLM4_PREAMBLES = {
    "2024-06": _ASSISTANT.format("GLM-4"),
    "2024-07": _ASSISTANT.format("GLM-4") + "\n\n# 可用工具",
    "2024-08": _ASSISTANT.format("GhatGLM") + "\n\n# 可用工具",  # not a slip of ours
    "2024-10": _ASSISTANT.format("ChatGLM") + "\n\n# 可用工具",
}
_GLM4_FUNCTION = "在调用上述函数时，请使用 Json 格式表示调用的参数。"
GLM4_BUILT_IN = {
    "python": (
        "当你向 `python` 发送包含 Python 代码的消息时，该代码将会在一个有状态的 Jupyter notebook 环境中执行。\n"
        "`python` 返回代码执行的输出，或在执行 60 秒后返回超时。\n"
        "`/mnt/data` 将会持久化存储你的文件。在此会话中，`python` 无法访问互联网。"
        "不要使用 `python` 进行任何网络请求或者在线 API 调用，这些在线内容的访问将不会成功。"
    ),
    "simple_browser": (
        "你可以使用 `simple_browser` 工具。该工具支持以下函数：\n"
        "`search(query: str, recency_days: int)`：使用搜索引擎进行查询并显示结果，"
        "可以使用 `recency_days` 参数控制搜索内容的时效性。\n"
        "`mclick(ids: list[int])`：获取一系列指定 id 的页面内容。每次调用时，须选择3-10个页面。"
        "选择多个角度的页面，同时尽可能选择可信任的信息来源。"
        "考虑到部分页面是无法加载的，你也可以多打开一些可能有用的页面而不用担心内容过多。\n"
        "`open_url(url: str)`：打开指定的 URL。\n\n"
        "使用 `【{引用 id}†{引用文本}】` 来引用内容。\n\n"
        "操作步骤：1. 使用 `search` 来获得信息列表; 2. 使用 `mclick` 来获取指定 ID 页面的内容; "
        "3. 根据获得的内容进行回复。在回复中应当引用信息来源。\n"
        " 如果用户提供了 URL，也可以用 `open_url` 直接打开页面。\n"
        "如果初次搜索结果没有找到合适的信息，也可以再次使用 `search` 进行搜索。"
    ),
    "cogview": (
        "如果用户的请求中包含了对图像的描述，你可以使用 `cogview` 来生成图像并展示给用户。"
        "你需要向 `cogview` 发送图像描述，规则：\n"
        "- 发送给 `cogview` 的消息必须使用英语。用户的中文描述必须完全翻译为英语。\n"
        "- 应当尽可能详细地描述图像生成的需求，需求描述约 100 英文单词。\n"
        "- 保持用户原始描述的意图。不要虚构内容或者没见过的人物。\n"
        "- 如无特殊说明，所在地为中国，持有中国立场并遵循中国社会主义价值观。"
    ),
}
# Header lines that mean something else than a tool of the user's.
TEXT_TOOLS = frozenset({INTERPRETER, *GLM4_BUILT_IN})
_KEYWORD_MARK = "__keyword__"


class ToolCallError(GlmkitError, ValueError):
    """A text that should be a call and is none; the message says why."""


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


def glm4_tools(tools: list[Any] | Mapping[str, Any], preamble: str) -> str:
    """Writes what GLM-4 reads about its tools.

    Args:
        tools: Descriptions of functions, with or without the OpenAI wrapper; {"type": "python"} and the like for tools
            that the model knows by name (python, simple_browser, cogview). Or a mapping from names to tools.
        preamble: What stands in front of them, see GLM4_PREAMBLES.

    Returns:
        The content of a system message.

    Raises:
        UsageError: Something is no tool of these kinds.
    """
    sections = [_glm4_section(tool) for tool in (tools.values() if isinstance(tools, Mapping) else tools)]
    return preamble + "".join(f"\n\n## {name}\n\n{text}" for name, text in sections)


def _glm4_section(tool: Any) -> tuple[str, str]:
    """Name and text of one tool."""
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    if kind in GLM4_BUILT_IN and "function" not in tool:
        return kind, GLM4_BUILT_IN[kind]
    (function,) = documented_tools([tool])
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UsageError(
            f"a tool is {tool!r:.200}; expected a function with a name, or one of the types {', '.join(GLM4_BUILT_IN)}",
            hint='{"type": "function", "function": {"name": "get_weather", "description": …, "parameters": {…}}}',
        )
    return function["name"], f"{json.dumps(function, ensure_ascii=False, indent=4)}\n{_GLM4_FUNCTION}"


def write_json_call(arguments: Mapping[str, Any]) -> str:
    """Writes a call as GLM-4 was trained to: its arguments as one JSON object.

    Args:
        arguments: The arguments by name.

    Returns:
        The content of the assistant's message; the tool's name is its header line.

    Raises:
        UsageError: A value has no such form.
    """
    _check_arguments(arguments)
    return json.dumps(arguments, ensure_ascii=False)


def write_tool_call(arguments: Mapping[str, Any]) -> str:
    """Writes a call as ChatGLM3 was trained to: a fenced `tool_call(name=value, ...)` of Python constants.

    Args:
        arguments: The arguments by name; a name may be a word of Python, as `from`.

    Returns:
        The content of the assistant's message; the tool's name is its header line.

    Raises:
        UsageError: A value has no such form, or a name is none that an argument in Python can have.

    Source: ChatGLM3 @0ffbe4ca finetune_chatmodel_demo/preprocess_utils.py, format_function_call.
    """
    _check_arguments(arguments)
    for name in arguments:
        if not name.isidentifier():
            raise UsageError(
                f"the argument {name[:100]!r} cannot be written as tool_call(name=value), ChatGLM3's form of a call",
                hint="rename it to letters, digits and _",
            )
    return f"```python\ntool_call({', '.join(f'{name}={value!r}' for name, value in arguments.items())})\n```"


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        try:
            _check_json(value, name, MAX_DEPTH)
        except ToolCallError as error:
            raise UsageError(error.message) from None


def parse_json_call(text: str) -> dict[str, Any]:
    """Reads the arguments of a GLM-4 call: one JSON object.

    Args:
        text: What the model wrote behind the header line.

    Returns:
        The arguments by name.

    Raises:
        ToolCallError: Anything else: no JSON, no object, numbers that are not finite, too long, too deep.
    """
    if len(text) > MAX_CALL_CHARACTERS:
        raise ToolCallError(f"the tool call has {len(text)} characters, expected at most {MAX_CALL_CHARACTERS}")
    try:
        arguments = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error) or type(error).__name__
        raise ToolCallError(f"the arguments of the tool call are no JSON ({reason:.100}): {text[:200]!r}") from None
    if not isinstance(arguments, dict):
        raise ToolCallError(f"the arguments of the tool call are a JSON {type(arguments).__name__}, expected an object")
    for name, value in arguments.items():
        _check_json(value, name, MAX_DEPTH)
    return arguments


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_json(value: Any, name: str, depth: int) -> None:
    if depth == 0:
        raise ToolCallError(f"the argument {name:.100} is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, float) and not math.isfinite(value):  # written as 1e999
        raise ToolCallError(f"the argument {name:.100} has a number that is not finite")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_json(item, name, depth - 1)


def depth_of(value: Any) -> int:
    """How deep lists and mappings are nested in a value; one that is neither has depth 0.

    Args:
        value: Plain values; counted up to a few levels more than MAX_DEPTH.
    """
    level, depth = [value], 0
    while depth < 2 * MAX_DEPTH and any(isinstance(one, (Mapping, list, tuple)) for one in level):
        level = [item for one in level for item in _inside(one)]
        depth += 1
    return depth


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else []


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
    code = _inside_fence(text)
    try:
        call = _expression(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error) or type(error).__name__
        raise ToolCallError(f"the tool call is no expression ({reason}): {code[:200]!r}") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "tool_call":
        raise ToolCallError(f"expected one call of tool_call, found {code[:200]!r}")
    if call.args:
        raise ToolCallError(f"tool_call takes arguments by name only, found {code[:200]!r}")
    arguments: dict[str, Any] = {}
    for given in call.keywords:
        if given.arg is None:
            raise ToolCallError(f"tool_call takes arguments by name only, found ** in {code[:200]!r}")
        name = given.arg.removesuffix(_KEYWORD_MARK)
        if name in arguments:
            raise ToolCallError(f"tool_call has the argument {name} twice")
        arguments[name] = _literal(given.value, name, MAX_DEPTH)
    return arguments


def _inside_fence(text: str) -> str:
    """The text inside a Markdown fence that may have no end, or the text itself; in time linear in its length."""
    first, newline, rest = text.lstrip().partition("\n")
    if not newline or not first.startswith("```") or "`" in first[3:]:
        return text.strip()
    return rest.rstrip().removesuffix("```").strip()


def _expression(code: str) -> ast.expr:
    """The code as a tree; arguments may be called as words of Python are, which models write as they learnt it."""
    try:
        return ast.parse(code, mode="eval").body
    except SyntaxError:
        marked = _mark_keywords(code)
        if marked == code:
            raise
    return ast.parse(marked, mode="eval").body


def _mark_keywords(code: str) -> str:
    """The code with words of Python that stand where an argument is named made into other names."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (tokenize.TokenError, SyntaxError):
        return code
    lines = code.split("\n")  # as tokenize counts them; splitlines would also cut at U+2028
    ends: list[list[int]] = [[0] for _ in lines]
    for before, token, after in zip(tokens, tokens[1:], tokens[2:]):
        if keyword.iskeyword(token.string) and before.string in ("(", ",") and after.string == "=":
            row, column = token.end
            ends[row - 1].append(column)
    return "\n".join(
        _KEYWORD_MARK.join(line[start:end] for start, end in pairwise([*columns, len(line)]))
        for line, columns in zip(lines, ends)
    )


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
