"""Functions that a model may call. A registry is passed in and empty at first: nothing is granted that nobody added.

registry = Registry()

@registry.tool
def get_time(city: Annotated[str, "city name"]) -> dict[str, str]:
    \"\"\"Get the time of a city.\"\"\"

result = await registry.call("get_time", {"city": "Paris"})     # never raises for what the model or the function did
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pydantic

from glmkit.chat.tools import MAX_CALL_CHARACTERS, MAX_DEPTH, depth_of
from glmkit.errors import UsageError
from glmkit.tools.schema import Parameter, check_name, description_of, read_parameters

F = TypeVar("F", bound=Callable[..., Any])
MAX_REASON_CHARACTERS = 500
_MAX_ABANDONED = 16  # calls that nobody waits for any more and that still run
# A path of this machine in an error's message; what follows a word, a dot or :/ is no path of its own (URLs, 3/4).
_PATH = re.compile(r"(?<![\w.:/])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\":]+[/\\])+")


@dataclass(frozen=True)
class Result:
    """What a call gave.

    Args:
        text: What the model is told.
        failed: Whether it did not work; the text says why.
    """

    text: str
    failed: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Args:
        name: What the model calls it.
        description: What it does.
        parameters: What it takes, by name.
        function: The function, synchronous or not.
    """

    name: str
    description: str
    parameters: dict[str, Parameter]
    function: Callable[..., Any] = field(repr=False)

    @classmethod
    def from_function(cls, function: Callable[..., Any]) -> Tool:
        """Makes a tool of a typed and described function.

        Args:
            function: See `glmkit.tools.schema.read_parameters`; the first paragraph of its docstring says what it does.

        Raises:
            UsageError: A type or a description is missing, or the name cannot be a tool's; the message says which.
        """
        return cls(check_name(function.__name__), description_of(function), read_parameters(function), function)

    def schema(self) -> dict[str, Any]:
        """What the model is told of it: name, description, and parameters in JSON schema."""
        return {
            "name": self.name,
            "description": self.description,
            "parameters": {
                "type": "object",
                "properties": {name: parameter.schema for name, parameter in self.parameters.items()},
                "required": [name for name, parameter in self.parameters.items() if parameter.required],
            },
        }


class Registry:
    """Tools by name.

    Args:
        functions: Functions or tools to begin with.
        timeout_seconds: How long a call is waited for.

    Raises:
        UsageError: A function cannot be a tool, see `Tool.from_function`, or two have one name.
    """

    def __init__(self, functions: Iterable[Callable[..., Any] | Tool] = (), *, timeout_seconds: float = 30.0) -> None:
        self._tools: dict[str, Tool] = {}
        self._timeout_seconds = timeout_seconds
        self._abandoned: set[threading.Thread] = set()
        for function in functions:
            self.add(function)

    def add(self, function: Callable[..., Any] | Tool) -> Tool:
        """Grants a tool.

        Args:
            function: A function, see `Tool.from_function`, or a tool.

        Returns:
            The tool.

        Raises:
            UsageError: It cannot be one, or there is one of its name.
        """
        tool = function if isinstance(function, Tool) else Tool.from_function(function)
        if tool.name in self._tools:
            raise UsageError(f"there is a tool {tool.name} already")
        self._tools[tool.name] = tool
        return tool

    def tool(self, function: F) -> F:
        """Grants a tool, as a decorator; the function stays what it is.

        Args:
            function: See `add`.
        """
        self.add(function)
        return function

    def __len__(self) -> int:
        return len(self._tools)

    def __contains__(self, name: object) -> bool:
        return name in self._tools

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools.values())

    def schemas(self) -> list[dict[str, Any]]:
        """What a model is told of the tools, in the order in which they were added."""
        return [tool.schema() for tool in self._tools.values()]

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Calls a tool.

        Args:
            name: Its name.
            arguments: What it is given, by name.

        Returns:
            What it gave; or why it did not: no such tool, arguments that do not fit, an error, too long a time.
        """
        tool = self._tools.get(name)
        if tool is None:
            known = ", ".join(self._tools) or "none"
            return Result(f"There is no tool {str(name)[:64]!r}. The tools are: {known}.", failed=True)
        try:
            values = _checked(tool, arguments)
        except ValueError as error:
            return Result(f"The call of {name} does not fit: {error}", failed=True)
        started = time.monotonic()
        try:
            return Result(_to_text(await self._run(tool, values)))
        except asyncio.TimeoutError as error:
            if time.monotonic() - started < self._timeout_seconds:  # one that the tool itself ran into
                return Result(f"The tool {name} failed: {_reason(error)}", failed=True)
            return Result(
                f"The tool {name} was not done after {self._timeout_seconds:g} seconds and is not waited for any more.",
                failed=True,
            )
        except (Exception, SystemExit) as error:
            return Result(f"The tool {name} failed: {_reason(error)}", failed=True)

    async def _run(self, tool: Tool, values: dict[str, Any]) -> Any:
        if inspect.iscoroutinefunction(tool.function):
            return await asyncio.wait_for(tool.function(**values), self._timeout_seconds)
        self._abandoned = {thread for thread in self._abandoned if thread.is_alive()}
        if len(self._abandoned) >= _MAX_ABANDONED:
            raise RuntimeError(f"{_MAX_ABANDONED} calls that took too long are still running")
        future, thread = _start(lambda: tool.function(**values))
        try:
            value = await asyncio.wait_for(future, self._timeout_seconds)
        finally:
            if thread.is_alive():
                self._abandoned.add(thread)
        return await asyncio.wait_for(value, self._timeout_seconds) if inspect.isawaitable(value) else value


def _start(work: Callable[[], Any]) -> tuple[asyncio.Future[Any], threading.Thread]:
    """Runs work in a thread of its own: one that never ends holds up neither other calls nor the end of the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def tell(value: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    def run() -> None:
        value: Any = None
        error: BaseException | None = None
        try:
            value = work()
        except StopIteration as stop:  # which no future can hold
            error = RuntimeError(f"StopIteration: {stop}")
        except BaseException as raised:
            error = raised if isinstance(raised, Exception) else RuntimeError(_reason(raised))
        with contextlib.suppress(RuntimeError):  # the loop may be closed: nobody waits any more
            loop.call_soon_threadsafe(tell, value, error)

    thread = threading.Thread(target=run, name="glmkit-tool", daemon=True)
    thread.start()
    return future, thread


def _checked(tool: Tool, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the function takes them; ValueError says what does not fit."""
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments are a {type(arguments).__name__}, expected names and values")
    if depth_of(arguments) > MAX_DEPTH:
        raise ValueError(f"the arguments are nested deeper than {MAX_DEPTH} levels")
    size = len(repr(arguments))
    if size > MAX_CALL_CHARACTERS:
        raise ValueError(f"the arguments have {size} characters, expected at most {MAX_CALL_CHARACTERS}")
    expected = ", ".join(tool.parameters) or "none"
    unknown = [str(name)[:64] for name in arguments if name not in tool.parameters]
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}; the arguments are: {expected}")
    missing = [name for name, parameter in tool.parameters.items() if parameter.required and name not in arguments]
    if missing:
        raise ValueError(f"missing argument {missing[0]!r}; the arguments are: {expected}")
    values = {}
    for name, value in arguments.items():
        try:
            values[name] = tool.parameters[name].type.validate_python(value)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = "".join(f"[{part!r}]" for part in first["loc"])
            found = repr(value)[:80]
            raise ValueError(f"{name}{place} is {found}: {first['msg']}") from None
    return values


def _to_text(value: Any) -> str:
    """What a model is told of a value: text as it is, JSON for mappings and lists, else what `str` gives."""
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _reason(error: BaseException) -> str:
    """Type and message of an error, without its traceback and without folders of this machine."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return _PATH.sub("…/", text)[:MAX_REASON_CHARACTERS]
