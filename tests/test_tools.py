"""Tools: what a model is told of a function, what a call may be given, what it gives, and what it cannot do."""

from __future__ import annotations

import asyncio
import enum
import json
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import pytest

from glmkit.errors import UsageError
from glmkit.tools import examples
from glmkit.tools.examples import SAFE_TOOLS
from glmkit.tools.registry import Registry, Result, Tool
from glmkit.tools.schema import read_definitions


def call(registry: Registry, name: str, arguments: Mapping[str, Any]) -> Result:
    return asyncio.run(registry.call(name, arguments))


# --- functions to schemas ---


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


def paint(
    text: Annotated[str, "what to write"],
    colour: Annotated[Colour, "its colour"],
    sizes: Annotated[list[int], "sizes in points"],
    place: Annotated[tuple[int, int], "where"] = (0, 0),
    style: Literal["plain", "bold"] = "plain",
    more: Optional[dict[str, float]] = None,  # noqa: UP045 - the form that people write
) -> str:
    """Paints a text
    in colour.

    More that the model is not told.

    Args:
        style: How to
            write it.
        more (dict): Anything else.

    Returns:
        What was painted.
    """
    return f"{text} {colour.name} {sizes} {place} {style} {more}"


def test_a_function_becomes_the_schema_that_the_models_read() -> None:
    assert Tool.from_function(paint).schema() == {
        "name": "paint",
        "description": "Paints a text in colour.",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string", "description": "what to write"},
                "colour": {"type": "string", "enum": ["red", "blue"], "description": "its colour"},
                "sizes": {"type": "array", "items": {"type": "integer"}, "description": "sizes in points"},
                "place": {
                    "type": "array",
                    "items": {"type": "integer"},
                    "minItems": 2,
                    "maxItems": 2,
                    "description": "where",
                },
                "style": {"type": "string", "enum": ["plain", "bold"], "description": "How to write it."},
                "more": {
                    "type": "object",
                    "additionalProperties": {"type": "number"},
                    "description": "Anything else.",
                },
            },
            "required": ["text", "colour", "sizes"],
        },
    }


def test_the_official_demos_form_of_a_tool_works() -> None:
    registry = Registry()

    @registry.tool
    def random_number_generator(
        seed: Annotated[int, "The random seed used by the generator", True],
        range: Annotated[tuple[int, int], "The range of the generated numbers", True],
        digits: Annotated[int, "How many digits", False] = 0,
    ) -> int:
        """Generates a random number x, s.t. range[0] <= x < range[1]"""
        return seed + range[0] + digits

    (schema,) = registry.schemas()
    assert schema["description"] == "Generates a random number x, s.t. range[0] <= x < range[1]"
    assert schema["parameters"]["required"] == ["seed", "range"]
    assert random_number_generator(1, (2, 3)) == 3  # the function stays what it is
    assert call(registry, "random_number_generator", {"seed": 40, "range": (2, 9)}) == Result("42")


def no_type(city) -> str:  # type: ignore[no-untyped-def]
    """Tells."""
    return str(city)


def no_description(city: str) -> str:
    """Tells.

    Args:
        town: Not this one.
    """
    return city


def no_docstring(city: Annotated[str, "city"]) -> str:
    return city


def odd_type(city: Annotated[set[str], "cities"]) -> str:
    """Tells."""
    return str(city)


def any_number(*cities: Annotated[str, "cities"]) -> str:
    """Tells."""
    return str(cities)


def not_required(city: Annotated[str, "city", False]) -> str:
    """Tells."""
    return city


def python(code: Annotated[str, "code"]) -> str:
    """Runs."""
    return code


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_type, "the parameter city of no_type has no type"),
        (no_description, "the parameter city of no_description has no description"),
        (no_docstring, "the function no_docstring has no docstring"),
        (odd_type, r"the parameter city of odd_type has the type set"),
        (any_number, "any_number takes"),
        (not_required, "the parameter city of not_required is not required and has no default"),
        (python, "a tool cannot be called python"),
        (lambda: 1, "no name of a tool"),
    ],
)
def test_what_is_missing_is_named(function: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Registry([function])


def test_a_registry_is_empty_at_first_and_has_each_name_once() -> None:
    registry = Registry()
    assert (len(registry), registry.schemas()) == (0, [])
    assert call(registry, "paint", {}).text == "There is no tool 'paint'. The tools are: none."
    registry.add(paint)
    with pytest.raises(UsageError, match="there is a tool paint already"):
        registry.add(paint)
    assert "paint" in registry
    assert "calculator" not in Registry()  # nothing is shared


# --- calls ---


def test_arguments_are_checked_before_the_function_sees_them() -> None:
    seen: list[Any] = []

    def note(text: Annotated[str, "text"], count: Annotated[int, "count"] = 1) -> str:
        """Notes."""
        seen.append((text, count))
        return "ok"

    registry = Registry([note])
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    for arguments, reason in (
        ({}, "missing argument 'text'; the arguments are: text, count"),
        ({"text": "a", "shell": "rm"}, "unknown argument 'shell'"),
        ({"text": 1}, "text is 1: Input should be a valid string"),
        ({"text": "a", "count": "many"}, "count is 'many'"),
        ({"text": "a" * 70_000}, "expected at most 65536"),
        ({"text": deep}, "nested deeper than 32 levels"),
        ([("text", "a")], "the arguments are a list"),
    ):
        result = call(registry, "note", arguments)  # type: ignore[arg-type]
        assert result.failed
        assert reason in result.text
    assert seen == []
    assert call(registry, "note", {"text": "a", "count": 2}) == Result("ok")
    assert seen == [("a", 2)]


def test_values_arrive_as_the_function_declares_them() -> None:
    text = call(Registry([paint]), "paint", {"text": "hi", "colour": "blue", "sizes": [1, 2], "place": [3, 4]}).text
    assert text == "hi BLUE [1, 2] (3, 4) plain None"
    assert (
        "sizes[1] is [1, 'x']"
        in call(Registry([paint]), "paint", {"text": "hi", "colour": "red", "sizes": [1, "x"]}).text
    )


def test_results_are_text() -> None:
    def give(kind: Annotated[str, "which"]) -> Any:
        """Gives."""
        return {"dict": {"天气": "晴"}, "list": [1, None], "text": "晴", "none": None, "number": 1.5}[kind]

    registry = Registry([give])
    texts = {kind: call(registry, "give", {"kind": kind}).text for kind in ("dict", "list", "text", "none", "number")}
    assert texts == {"dict": '{"天气": "晴"}', "list": "[1, null]", "text": "晴", "none": "None", "number": "1.5"}


def test_errors_are_text_without_tracebacks_and_folders() -> None:
    def fail(kind: Annotated[str, "how"]) -> str:
        """Fails."""
        if kind == "exit":
            sys.exit(3)
        if kind == "stop":
            raise StopIteration("over")
        if kind == "file":
            Path("/no/such/secret folder/x.txt").read_text()
        if kind == "text":
            raise ValueError("see /srv/private/notes.txt and https://example.org/a/b, or 3/4")
        raise ZeroDivisionError

    registry = Registry([fail])
    texts = {kind: call(registry, "fail", {"kind": kind}) for kind in ("exit", "stop", "file", "text", "bare")}
    assert all(result.failed for result in texts.values())
    assert {kind: result.text.removeprefix("The tool fail failed: ") for kind, result in texts.items()} == {
        "exit": "RuntimeError: SystemExit: 3",
        "stop": "RuntimeError: StopIteration: over",
        "file": "FileNotFoundError: No such file or directory",
        "text": "ValueError: see …/notes.txt and https://example.org/a/b, or 3/4",
        "bare": "ZeroDivisionError",
    }


def test_asynchronous_tools_and_time() -> None:
    async def quick(x: Annotated[int, "x"]) -> int:
        """Quick."""
        await asyncio.sleep(0)
        return x + 1

    async def slow(x: Annotated[int, "x"]) -> None:
        """Slow."""
        await asyncio.sleep(60)

    def stuck(x: Annotated[int, "x"]) -> None:
        """Stuck."""
        time.sleep(5)

    registry = Registry([quick, slow, stuck], timeout_seconds=0.1)
    assert call(registry, "quick", {"x": 1}) == Result("2")
    for name in ("slow", "stuck"):
        started = time.monotonic()
        result = call(registry, name, {"x": 1})
        assert time.monotonic() - started < 3
        assert result == Result(
            f"The tool {name} was not done after 0.1 seconds and is not waited for any more.", failed=True
        )


def test_a_time_out_within_a_tool_is_an_error_like_any_other() -> None:
    def fetch(x: Annotated[int, "x"]) -> None:
        """Fetch."""
        raise TimeoutError("the server did not answer")

    assert call(Registry([fetch]), "fetch", {"x": 1}) == Result(
        "The tool fetch failed: TimeoutError: the server did not answer", failed=True
    )


def test_a_slow_tool_does_not_hold_up_the_loop() -> None:
    def stuck(x: Annotated[int, "x"]) -> str:
        """Stuck."""
        time.sleep(0.3)
        return "done"

    async def both() -> tuple[Result, int]:
        ticks = 0
        running = asyncio.create_task(Registry([stuck]).call("stuck", {"x": 1}))
        while not running.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return await running, ticks

    result, ticks = asyncio.run(both())
    assert result == Result("done")
    assert ticks > 5


def test_calls_that_never_end_do_not_pile_up() -> None:
    def stuck(x: Annotated[int, "x"]) -> None:
        """Stuck."""
        time.sleep(8)

    async def many() -> list[Result]:
        registry = Registry([stuck], timeout_seconds=0.01)
        return [await registry.call("stuck", {"x": number}) for number in range(18)]

    results = asyncio.run(many())
    assert all("not waited for any more" in result.text for result in results[:16])
    assert all("16 calls that took too long are still running" in result.text for result in results[16:])


# --- definitions without a function ---

GET_WEATHER = {
    "name": "get_weather",
    "description": "天气",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def test_definitions_in_json_and_yaml() -> None:
    wrapped = [{"type": "function", "function": GET_WEATHER}]
    text = """
- name: get_weather
  description: 天气
  parameters:
    type: object
    properties:
      city:
        type: string
    required: [city]
"""
    for given in (json.dumps(GET_WEATHER), json.dumps([GET_WEATHER]), json.dumps(wrapped), text):
        assert read_definitions(given) == [GET_WEATHER]
    assert read_definitions("") == []
    assert read_definitions("name: f") == [{"name": "f", "description": "", "parameters": {}}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON or YAML"),
        ("just words", "a tool is just words"),
        ("- name: f\n" * 2, "the tool f is defined twice"),
        ("- name: f\n" * 33, "there are 33 definitions"),
        ("- name: ../x", "no name of a tool"),
        ("- name: 5", "no name of a tool"),
        ("- name: interpreter", "cannot be called interpreter"),
        ("- name: f\n  parameters: [1]", "the parameters of the tool f are a list"),
        ("- name: f\n  parameters: {properties: [1]}", "the properties of the tool f"),
        ("- name: f\n  parameters: {required: city}", "what the tool f requires"),
        ("- name: f\n  description: 2026-01-01", "no JSON or YAML"),
        ("- name: f\n  description: [1]", "the description of the tool f"),
        ("- name: f\n  parameters: {a: .inf}", "no JSON or YAML"),
        ("a: &a [1]\nb: [*a, *a]", "it has an alias"),
        ("!!python/object/apply:os.system ['true']", "no JSON or YAML"),
        ("[" * 60_000, "nested deeper than 40"),
        ("- " * 30_000, "nested deeper than 40"),
        ("{a: " * 15_000, "nested deeper than 40"),
        ("- name: f\n  parameters: " + '{"a": ' * 34 + "1" + "}" * 34, "nested deeper than 32"),
        ("x" * 70_000, "expected at most 65536"),
    ],
)
def test_definitions_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_definitions(text)


# --- the safe examples ---


def safe(name: str, **arguments: Any) -> Any:
    result = call(Registry(SAFE_TOOLS), name, arguments)
    return result.text if result.failed else json.loads(result.text)


def test_the_safe_tools_are_those_that_the_built_in_model_knows() -> None:
    described = {tool.name: (tool.description, list(tool.parameters)) for tool in SAFE_TOOLS}
    assert described == {
        "calculator": ("Compute an expression", ["expression"]),
        "get_time": ("Get the time of a city", ["city"]),
        "get_weather": ("Get the weather of a city", ["city"]),
        "convert_units": ("Convert a value between units", ["value", "source", "target"]),
        "random_number": ("Draw a random number", ["seed", "low", "high"]),
    }
    assert json.dumps(Registry(SAFE_TOOLS).schemas()[1]) == (
        '{"name": "get_time", "description": "Get the time of a city", "parameters": {"type": "object", "properties": '
        '{"city": {"type": "string", "description": "city name"}}, "required": ["city"]}}'
    )


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("123+456", 579),
        ("(1 + 2) * 3 - 4 / 2", 7),
        ("10/3", 3.333333),
        ("2**10", 1024),
        ("2^3", 8),
        ("7×8÷2=?", 28),
        ("（1＋1）", 2),
        ("-7 // 2", -4),
        ("sqrt(2)", 1.414214),
        ("1e-9", 1e-9),
        ("0.1+0.2", 0.3),
        ("2**200", 2**200),
    ],
)
def test_the_calculator(expression: str, result: float) -> None:
    assert safe("calculator", expression=expression) == {"result": result}


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "().__class__",
        "open('x')",
        "[1 for _ in range(9)]",
        "lambda: 1",
        "'a' * 99",
        "True + 1",
        "1 if 2 else 3",
        "9**9**9",
        "2**-(10**30)**9",
        "(-8)**0.5",
        "round(1, -999999999)",
        "10**100 * 10**100",
        "1e308 * 10",
        "1/0",
        "(" * 190,
        "-" * 199 + "1x",
        "1+" * 150,
        "x",
        "",
        "1;2",
        "\x00",
    ],
)
def test_the_calculator_computes_nothing_else_and_nothing_large(expression: str) -> None:
    started = time.monotonic()
    assert "The tool calculator failed: " in safe("calculator", expression=expression)
    assert time.monotonic() - started < 2


def test_the_clock_can_be_set() -> None:
    noon = datetime(2026, 7, 1, 12, 0, tzinfo=timezone.utc)
    registry = Registry([examples.time_tool(lambda: noon)])
    cities = {
        "北京": "20:00",
        "北京市": "20:00",
        "beijing": "20:00",
        "New  York": "08:00",
        "伦敦": "13:00",
        "Delhi": "17:30",
    }
    for city, expected in cities.items():
        assert json.loads(call(registry, "get_time", {"city": city}).text) == {"time": expected}
    assert "'Atlantis' is not in the table" in call(registry, "get_time", {"city": "Atlantis"}).text


def test_the_weather_is_the_same_in_both_languages() -> None:
    chinese, english = safe("get_weather", city="上海"), safe("get_weather", city="Shanghai")
    assert chinese["temperature"] == english["temperature"]
    words = dict(examples._SKIES)
    assert words[chinese["weather"]] == english["weather"]
    skies = {safe("get_weather", city=city)["weather"] for city in ("Paris", "Rome", "Oslo", "Cairo", "Tokyo", "Lhasa")}
    assert len(skies) > 1


@pytest.mark.parametrize(
    ("value", "source", "target", "result"),
    [
        (1, "mile", "km", 1.609344),
        (100, "celsius", "fahrenheit", 212),
        (-40, "华氏度", "摄氏度", -40),
        (0, "Celsius", "K", 273.15),
        (3, "公斤", "斤", 6),
        (2.5, "foot", "cm", 76.2),
        (36, "km/h", "m/s", 10),
    ],
)
def test_units(value: float, source: str, target: str, result: float) -> None:
    assert safe("convert_units", value=value, source=source, target=target) == {"result": result}


def test_units_that_do_not_fit_together() -> None:
    assert "measure different things" in safe("convert_units", value=1, source="kg", target="km")
    assert "measure different things" in safe("convert_units", value=1, source="kg", target="celsius")
    assert "'parsec' is not in the table" in safe("convert_units", value=1, source="parsec", target="km")
    assert "no real number" in safe("convert_units", value=float("inf"), source="m", target="km")


def test_random_numbers_follow_their_seed() -> None:
    draws = [safe("random_number", seed=seed, low=1, high=6)["result"] for seed in (7, 7, 1, 2, 3, 4, 5)]
    assert draws[0] == draws[1]
    assert len(set(draws)) > 1
    assert set(draws) <= set(range(1, 7))
    assert "is above the highest" in safe("random_number", seed=1, low=6, high=1)


def test_the_safe_tools_reach_neither_files_nor_network() -> None:
    """What an interpreter sees of the calls: nothing is opened, imported by name, connected or started."""
    touched: list[str] = []
    watched = ("open", "socket.", "subprocess.", "os.system", "os.exec", "exec", "compile")
    on = False

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        zone = event == "open" and "zoneinfo" in str(arguments[0])  # the table of time zones
        parsing = event == "compile" and len(arguments) > 1 and arguments[1] == "<unknown>"  # ast.parse runs nothing
        if on and event.startswith(watched) and not zone and not parsing:
            touched.append(f"{event} {arguments}")

    sys.addaudithook(audit)
    for name, arguments in {
        "calculator": {"expression": "sqrt(2) ** 2"},
        "get_weather": {"city": "北京"},
        "get_time": {"city": "北京"},
        "convert_units": {"value": 1, "source": "mile", "target": "km"},
        "random_number": {"seed": 1, "low": 0, "high": 9},
    }.items():
        tool = next(tool for tool in SAFE_TOOLS if tool.name == name)
        tool.function(**arguments)
        on = True
        tool.function(**arguments)
        on = False
    assert touched == []
