"""Tools that are safe to grant to anybody: they compute and look things up, and reach neither files, network nor shell.

    registry = Registry(SAFE_TOOLS)

Their weather is an example and nobody's forecast. What a model is told of them, to the dot that no description has, is
what the built-in glm-nano has learnt.
"""

from __future__ import annotations

import ast
import math
import operator
import random
import zlib
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Annotated, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from glmkit.tools.registry import Tool

Clock = Callable[[], datetime]
_MAX_EXPRESSION_CHARACTERS = 200
_MAX_BITS = 512  # of any whole number on the way
_DECIMALS = 6

# --- calculator ---

_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "－": "-", "＋": "+", "（": "(", "）": ")", "，": ",", "^": "**"})
_OPERATIONS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_CONSTANTS = {"pi": math.pi, "e": math.e}
_FUNCTIONS: dict[str, Callable[[float], Any]] = {  # of one number each: round with two can take for ever
    "sqrt": math.sqrt,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "log": math.log,
    "log10": math.log10,
    "exp": math.exp,
    "abs": abs,
    "round": round,
    "floor": math.floor,
    "ceil": math.ceil,
}


def calculator(expression: Annotated[str, "expression"]) -> dict[str, Any]:
    """Compute an expression

    Numbers, + - * / // % ** and parentheses, pi, e, and common functions as sqrt. The tree of the expression is
    walked; nothing is evaluated, and numbers and exponents are bounded.

    Args:
        expression: What to compute; × and ÷ are understood too.

    Returns:
        `result`, to six decimals.

    Raises:
        ValueError: It is no arithmetic, is too long, or a number on the way is too large.
    """
    if len(expression) > _MAX_EXPRESSION_CHARACTERS:
        raise ValueError(f"the expression has more than {_MAX_EXPRESSION_CHARACTERS} characters")
    text = expression.translate(_SIGNS).strip().removesuffix("=").removesuffix("=?").strip()
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{expression!r} is no arithmetic expression") from None
    return {"result": _number(_compute(tree))}


def _compute(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATIONS:
        return _bounded(_OPERATIONS[type(node.op)](_compute(node.operand)))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        left, right = _compute(node.left), _compute(node.right)
        if isinstance(node.op, ast.Pow) and isinstance(left, int) and abs(right) * left.bit_length() > _MAX_BITS:
            raise ValueError("the power is too large")
        return _bounded(_OPERATIONS[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        if len(node.args) != 1 or node.keywords:
            raise ValueError(f"{node.func.id} takes one number")
        return _bounded(_FUNCTIONS[node.func.id](_compute(node.args[0])))
    raise ValueError("only numbers, + - * / // % ** ( ), pi, e and functions as sqrt are computed")


def _bounded(value: Any) -> int | float:
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise ValueError("a number is too large")
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("the result is no real number")
    return value


def _number(value: int | float) -> int | float:
    """As a calculator shows it: whole numbers without a point, others to six decimals."""
    if isinstance(value, int):
        return value
    rounded = round(value, _DECIMALS) if abs(value) >= 10**-_DECIMALS else float(f"{value:.{_DECIMALS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


# --- cities ---

_ZONES = {
    "Asia/Shanghai": "北京 Beijing 上海 Shanghai 广州 Guangzhou 深圳 Shenzhen 杭州 Hangzhou 南京 Nanjing 成都 Chengdu "
    "武汉 Wuhan 西安 Xi'an 重庆 Chongqing 天津 Tianjin 苏州 Suzhou 长沙 Changsha 青岛 Qingdao 大连 Dalian 厦门 Xiamen "
    "昆明 Kunming 哈尔滨 Harbin 沈阳 Shenyang 济南 Jinan 郑州 Zhengzhou 福州 Fuzhou 合肥 Hefei 南昌 Nanchang "
    "贵阳 Guiyang 兰州 Lanzhou 海口 Haikou 三亚 Sanya 桂林 Guilin 拉萨 Lhasa",
    "Asia/Hong_Kong": "香港 Hong_Kong",
    "Asia/Macau": "澳门 Macau",
    "Asia/Taipei": "台北 Taipei",
    "Asia/Tokyo": "东京 Tokyo 大阪 Osaka 京都 Kyoto",
    "Asia/Seoul": "首尔 Seoul",
    "Asia/Singapore": "新加坡 Singapore",
    "Asia/Bangkok": "曼谷 Bangkok",
    "Asia/Kolkata": "新德里 Delhi 孟买 Mumbai",
    "Asia/Dubai": "迪拜 Dubai",
    "Europe/Moscow": "莫斯科 Moscow",
    "Europe/Istanbul": "伊斯坦布尔 Istanbul",
    "Africa/Cairo": "开罗 Cairo",
    "Africa/Nairobi": "内罗毕 Nairobi",
    "Europe/Paris": "巴黎 Paris",
    "Europe/London": "伦敦 London",
    "Europe/Dublin": "都柏林 Dublin",
    "Europe/Berlin": "柏林 Berlin 慕尼黑 Munich",
    "Europe/Rome": "罗马 Rome 米兰 Milan",
    "Europe/Madrid": "马德里 Madrid",
    "Europe/Vienna": "维也纳 Vienna",
    "Europe/Oslo": "奥斯陆 Oslo",
    "Europe/Prague": "布拉格 Prague",
    "Europe/Athens": "雅典 Athens",
    "America/New_York": "纽约 New_York 波士顿 Boston",
    "America/Toronto": "多伦多 Toronto",
    "America/Chicago": "芝加哥 Chicago",
    "America/Los_Angeles": "洛杉矶 Los_Angeles 旧金山 San_Francisco 西雅图 Seattle",
    "America/Vancouver": "温哥华 Vancouver",
    "Australia/Sydney": "悉尼 Sydney 墨尔本 Melbourne",
    "Pacific/Auckland": "奥克兰 Auckland",
}
_CITIES = {
    name.replace("_", " ").casefold(): (zone, names.split()[place - place % 2])
    for zone, names in _ZONES.items()
    for place, name in enumerate(names.split())
}  # -> its zone, and the first of its names
_SKIES = (
    ("晴", "sunny"),
    ("多云", "cloudy"),
    ("小雨", "rainy"),
    ("阴", "overcast"),
    ("大风", "windy"),
)


def _find(city: str) -> tuple[str, str]:
    found = _CITIES.get(" ".join(city.removesuffix("市").split()).casefold())
    if found is None:
        raise ValueError(f"the city {city[:40]!r} is not in the table")
    return found


def _utc() -> datetime:
    return datetime.now(timezone.utc)


def time_tool(clock: Clock = _utc) -> Tool:
    """Makes the tool `get_time`.

    Args:
        clock: Tells the time, with its zone.
    """

    def get_time(city: Annotated[str, "city name"]) -> dict[str, str]:
        """Get the time of a city"""
        zone, _ = _find(city)
        try:
            return {"time": clock().astimezone(ZoneInfo(zone)).strftime("%H:%M")}
        except ZoneInfoNotFoundError:
            raise ValueError("this machine has no table of time zones; the package tzdata brings one") from None

    return Tool.from_function(get_time)


def get_weather(city: Annotated[str, "city name"]) -> dict[str, Any]:
    """Get the weather of a city

    An example: sky and degrees follow from the city's name and never change.

    Args:
        city: Its Chinese or English name.

    Returns:
        `weather`, in the language of the name, and `temperature` in degrees Celsius.

    Raises:
        ValueError: The city is not in the table.
    """
    _, name = _find(city)
    number = zlib.crc32(name.encode())
    sky = _SKIES[number % len(_SKIES)][1 if city.isascii() else 0]
    return {"weather": sky, "temperature": number // 64 % 31 + 2}


# --- units ---

# For each quantity: names of a unit -> its factor to the first unit.
_UNITS: tuple[dict[str, float], ...] = (
    {
        "m meter meters metre metres 米": 1.0,
        "km kilometer kilometers kilometre kilometres 公里 千米": 1000.0,
        "cm centimeter centimeters 厘米": 0.01,
        "mm millimeter millimeters 毫米": 0.001,
        "mile miles mi 英里": 1609.344,
        "yard yards yd 码": 0.9144,
        "foot feet ft 英尺": 0.3048,
        "inch inches in 英寸": 0.0254,
        "里 市里": 500.0,
    },
    {
        "kg kilogram kilograms 公斤 千克": 1.0,
        "g gram grams 克": 0.001,
        "ton tons tonne tonnes t 吨": 1000.0,
        "pound pounds lb lbs 磅": 0.45359237,
        "ounce ounces oz 盎司": 0.028349523125,
        "斤 市斤": 0.5,
        "两": 0.05,
    },
    {
        "l liter liters litre litres 升": 1.0,
        "ml milliliter milliliters 毫升": 0.001,
        "gallon gallons gal 加仑": 3.785411784,
    },
    {
        "s second seconds 秒": 1.0,
        "min minute minutes 分钟 分": 60.0,
        "h hour hours 小时": 3600.0,
        "day days 天": 86400.0,
    },
    {
        "m/s 米每秒": 1.0,
        "km/h kmh 公里每小时": 1 / 3.6,
        "mph 英里每小时": 0.44704,
    },
)
_FACTORS = {
    name: (quantity, factor)
    for quantity, units in enumerate(_UNITS)
    for names, factor in units.items()
    for name in names.split()
}
# A degree's name -> its size in kelvin, and kelvins at its zero.
_DEGREES = {
    **dict.fromkeys(("celsius", "c", "°c", "摄氏度"), (1.0, 273.15)),
    **dict.fromkeys(("fahrenheit", "f", "°f", "华氏度"), (5 / 9, 459.67 * 5 / 9)),
    **dict.fromkeys(("kelvin", "k", "开尔文"), (1.0, 0.0)),
}


def convert_units(
    value: Annotated[float, "value"],
    source: Annotated[str, "from unit"],
    target: Annotated[str, "to unit"],
) -> dict[str, Any]:
    """Convert a value between units

    Args:
        value: How many.
        source: Of which unit, by its Chinese or English name or its sign.
        target: To which unit.

    Returns:
        `result`, to six decimals.

    Raises:
        ValueError: A unit is not in the table, or they measure different things.
    """
    first, second = (" ".join(unit.split()).casefold() for unit in (source, target))
    if first in _DEGREES and second in _DEGREES:
        (size, zero), (new_size, new_zero) = _DEGREES[first], _DEGREES[second]
        return {"result": _number(_bounded((value * size + zero - new_zero) / new_size))}
    for name, unit in ((first, source), (second, target)):
        if name not in _FACTORS and name not in _DEGREES:
            raise ValueError(f"the unit {unit[:40]!r} is not in the table")
    (quantity, factor), (other, divisor) = _FACTORS.get(first, (-1, 1.0)), _FACTORS.get(second, (-2, 1.0))
    if quantity != other:
        raise ValueError(f"{source[:40]} and {target[:40]} measure different things")
    return {"result": _number(_bounded(value * factor / divisor))}


def random_number(
    seed: Annotated[int, "seed"], low: Annotated[int, "lowest"], high: Annotated[int, "highest"]
) -> dict[str, int]:
    """Draw a random number

    Args:
        seed: The same seed draws the same number.
        low: The least that can be drawn.
        high: The most that can be drawn.

    Returns:
        `result`.

    Raises:
        ValueError: The least is above the most.
    """
    if low > high:
        raise ValueError(f"the lowest number {low} is above the highest {high}")
    return {"result": random.Random(seed).randint(low, high)}


SAFE_TOOLS: tuple[Tool, ...] = (
    Tool.from_function(calculator),
    time_tool(),
    Tool.from_function(get_weather),
    Tool.from_function(convert_units),
    Tool.from_function(random_number),
)
