"""Dialogues with the five tools of glmkit.tools.examples: several questions in one dialogue, some that need no tool."""

from __future__ import annotations

import json
import operator
import random
from typing import Any

from .facts import sample_fact
from .talk import sample_talk
from .toolcalls import SYSTEM, Episode, Tool, call_text, is_heldout

# Those that people ask about first come most; but places are many, and some are invented: a name is to be copied from
# the question, not remembered.
_USUAL = "北京 上海 广州 深圳 杭州 南京 成都 武汉 西安 重庆 天津 苏州 青岛 香港 东京 巴黎 伦敦 纽约 柏林 悉尼".split()
_USUAL_EN = "Beijing;Shanghai;Paris;London;Tokyo;Berlin;Rome;Sydney;Madrid;Boston;Chicago;New York;Moscow;Seoul".split(";")
_CITIES = (
    "北京 上海 广州 深圳 杭州 南京 成都 武汉 西安 重庆 天津 苏州 长沙 青岛 大连 厦门 昆明 哈尔滨 沈阳 济南 郑州 福州 合肥 南昌 贵阳 "
    "兰州 海口 三亚 桂林 拉萨 巴黎 伦敦 东京 纽约 柏林 罗马 悉尼 曼谷 首尔 莫斯科 石家庄 太原 呼和浩特 长春 南宁 西宁 银川 乌鲁木齐 "
    "香港 澳门 台北 宁波 温州 无锡 常州 徐州 扬州 绍兴 珠海 佛山 东莞 惠州 汕头 烟台 威海 洛阳 开封 宜昌 襄阳 岳阳 大理 丽江 敦煌 "
    "吐鲁番 延安 大同 保定 唐山 秦皇岛 承德 吉林 牡丹江 大庆 赣州 泉州 漳州 柳州 北海 遵义 绵阳 宜宾 马德里 维也纳 布拉格 雅典 开罗 "
    "新德里 孟买 河内 雅加达 马尼拉 新加坡 吉隆坡 大阪 京都 釜山 墨尔本 奥克兰 多伦多 温哥华 芝加哥 波士顿 洛杉矶 旧金山 西雅图 都柏林 奥斯陆"
).split()
_CITIES_EN = (
    "Beijing;Shanghai;Paris;London;Tokyo;Berlin;Rome;Sydney;Bangkok;Seoul;Moscow;Madrid;Boston;Chicago;Oslo;Vienna;Cairo;"
    "Delhi;Toronto;Dublin;New York;Los Angeles;San Francisco;Hong Kong;Singapore;Guangzhou;Shenzhen;Hangzhou;Nanjing;"
    "Chengdu;Wuhan;Lisbon;Athens;Prague;Warsaw;Budapest;Helsinki;Stockholm;Copenhagen;Brussels;Amsterdam;Zurich;Geneva;"
    "Milan;Venice;Naples;Barcelona;Munich;Hamburg;Manchester;Edinburgh;Istanbul;Dubai;Mumbai;Jakarta;Manila;Hanoi;Kyoto;"
    "Osaka;Melbourne;Auckland;Vancouver;Seattle;Denver;Dallas;Miami;Lima;Bogota;Nairobi;Lagos;Mexico City;Kuala Lumpur"
).split(";")
SYLLABLES_ZH = "安北昌成川大德东都方丰福高关广海河和华吉江金京静凉林灵龙鹿罗马梅明南宁平清泉日山石水松太天田通万文武溪仙新兴雅阳银永玉元云州"
SYLLABLES_EN = "ba den ford ham ka lin lo mar mil nor ol pen ra ros sal ston tan tor val ver vil win".split()
_WEATHER = {"晴": "sunny", "多云": "cloudy", "小雨": "rainy", "大雪": "snowy", "阴": "overcast", "大风": "windy"}
# (name to say in Chinese, name to say in English, name in the call), and the pairs between which people convert
_UNITS = {
    "km": ("公里", "km"), "mile": ("英里", "miles"), "m": ("米", "meters"), "foot": ("英尺", "feet"),
    "cm": ("厘米", "cm"), "inch": ("英寸", "inches"), "kg": ("公斤", "kg"), "pound": ("磅", "pounds"),
    "celsius": ("摄氏度", "degrees celsius"), "fahrenheit": ("华氏度", "degrees fahrenheit"),
}  # fmt: skip
_PAIRS = (("km", "mile"), ("m", "foot"), ("cm", "inch"), ("kg", "pound"), ("celsius", "fahrenheit"))
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_WORD_SIGNS = {"+": ("加", "plus"), "-": ("减", "minus"), "*": ("乘", "times"), "/": ("除以", "divided by")}


def invent_city(rng: random.Random, chinese: bool) -> str:
    """Draw a name: half are usual ones, every seventh is an invented one.

    Args:
        rng: Source of randomness.
        chinese: Language.

    Returns:
        The name of a city.
    """
    share = rng.random()
    if share < 0.5:
        return rng.choice(_USUAL if chinese else _USUAL_EN)
    if share < 0.85:
        return rng.choice(_CITIES if chinese else _CITIES_EN)
    if chinese:
        return "".join(rng.choice(SYLLABLES_ZH) for _ in range(rng.choice((2, 2, 3))))
    return "".join(rng.choice(SYLLABLES_EN) for _ in range(rng.choice((2, 2, 3)))).capitalize()


def _weather(rng: random.Random, chinese: bool) -> Episode:
    city, sky, degrees = invent_city(rng, chinese), rng.choice(list(_WEATHER)), rng.randint(-9, 38)
    asks: tuple[str, ...]
    if chinese:
        asks = ("{c}今天天气怎么样？", "{c}天气怎么样？", "查一下{c}的天气", "{c}的天气如何？", "{c}的天气", "我想知道{c}今天的天气。",
                "今天{c}冷不冷？", "帮我看看{c}天气", "今天{c}天气怎么样", "{c}现在多少度？")
        answer = f"{city}今天{sky}，气温{degrees}度。"
    else:
        asks = ("What is the weather like in {c}?", "What is the weather in {c}?", "What's the weather in {c}?",
                "How is the weather in {c} today?", "Weather in {c}, please.", "Tell me the weather in {c}.",
                "Is it cold in {c} today?", "How warm is it in {c}?")
        sky = _WEATHER[sky]
        answer = f"It is {sky} in {city} today, {degrees} degrees."
    return Episode(
        rng.choice(asks).format(c=city), {"city": city}, {"weather": sky, "temperature": degrees}, answer
    )


def _time(rng: random.Random, chinese: bool) -> Episode:
    city, clock = invent_city(rng, chinese), f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    asks: tuple[str, ...]
    if chinese:
        asks = ("{c}现在几点？", "现在{c}是什么时间？", "帮我查一下{c}的时间", "{c}现在的时间是多少？", "{c}几点了？", "{c}现在几点了？", "现在{c}几点？")
        answer = f"{city}现在是{clock}。"
    else:
        asks = ("What time is it in {c}?", "What time is it in {c} now?", "Tell me the time in {c}.",
                "What is the time in {c} now?", "Time in {c}, please.")
        answer = f"It is {clock} in {city} now."
    return Episode(rng.choice(asks).format(c=city), {"city": city}, {"time": clock}, answer)


def _number(value: float) -> int | float:
    """As a calculator shows it: whole numbers without a point, others to six digits."""
    return int(value) if value == int(value) else float(f"{value:.6g}")


def _calculator(rng: random.Random, chinese: bool) -> Episode:
    top = rng.choice((20, 99, 99, 999))
    left, right, third = rng.randint(1, top), rng.randint(1, top), rng.randint(2, 99)
    sign, blank = rng.choice("++--**/"), rng.choice(("", "", " "))
    form = rng.randrange(8)
    word = _WORD_SIGNS[sign][0 if chinese else 1]
    if form == 0:
        first, last = rng.choice("+-"), rng.choice("*/")
        expression = said = f"({left}{blank}{first}{blank}{right}){blank}{last}{blank}{third}"
        result = _APPLY[last](_APPLY[first](left, right), third)
    elif form == 1:
        first = rng.choice("+-")
        expression = said = f"{left}{blank}{first}{blank}{right}{blank}*{blank}{third}"
        result = _APPLY[first](left, right * third)
    elif form == 2:
        expression = f"{left}{sign}{right}"
        said = f"{left}{word}{right}" if chinese else f"{left} {word} {right}"
        result = _APPLY[sign](left, right)
    elif form == 3:
        expression = said = f"{left / 10:.1f}{blank}{sign}{blank}{right}"
        result = _APPLY[sign](left / 10, right)
    elif form == 4:
        sign = rng.choice("*/")
        expression = f"{left}{sign}{right}"
        said = f"{left}{'×' if sign == '*' else '÷'}{right}"
        result = _APPLY[sign](left, right)
    else:
        expression = said = f"{left}{blank}{sign}{blank}{right}"
        result = _APPLY[sign](left, right)
    result = _number(result)
    asks: tuple[str, ...]
    if chinese:
        asks = ("用计算器算一下{e}", "请用计算器计算{e}", "计算器：{e}等于多少？", "用工具算{e}", "{e}等于多少？", "计算{e}", "算一下{e}",
                "帮我算{e}", "{e}是多少？", "请计算{e}", "{e}=?")
        answer = f"{expression}的结果是{result}。"
    else:
        asks = ("Use the calculator: {e}", "Calculate {e} with the calculator.", "Use your tool to compute {e}.",
                "What is {e}?", "Calculate {e}", "Compute {e}.", "How much is {e}?", "Please compute {e}.")
        answer = f"The result of {expression} is {result}."
    return Episode(rng.choice(asks).format(e=said), {"expression": expression}, {"result": result}, answer)


def _units(rng: random.Random, chinese: bool) -> Episode:
    source, target = rng.sample(rng.choice(_PAIRS), 2)
    side = 0 if chinese else 1
    said, wanted = _UNITS[source][side], _UNITS[target][side]
    value = rng.choice((rng.randint(1, 99), rng.randint(1, 999), rng.randint(1, 999) / 10))
    result = round(rng.uniform(0.1, 2000), rng.choice((0, 1, 2, 3, 4)))
    result = _number(result)
    asks: tuple[str, ...]
    if chinese:
        asks = ("{v}{s}等于多少{t}？", "把{v}{s}换算成{t}", "{v}{s}是多少{t}？", "{v}{s}换成{t}是多少？")
        answer = f"{value}{said}等于{result}{wanted}。"
    else:
        asks = ("How much is {v} {s} in {t}?", "Convert {v} {s} to {t}.", "What is {v} {s} in {t}?", "{v} {s} in {t}")
        answer = f"{value} {said} is {result} {wanted}."
    arguments = {"value": value, "source": source, "target": target}
    return Episode(rng.choice(asks).format(v=value, s=said, t=wanted), arguments, {"result": result}, answer)


def _random(rng: random.Random, chinese: bool) -> Episode:
    low = rng.choice((0, 1, 1, 10, 50, 100))
    high = low + rng.choice((5, 9, 10, 50, 99, 100, 1000))
    seed = rng.randint(0, 99)
    result = rng.randint(low, high)
    asks: tuple[str, ...]
    if chinese:
        asks = ("用种子{k}给我一个{a}到{b}之间的随机数", "用种子{k}在{a}到{b}之间取一个随机数", "随机数：{a}到{b}，种子{k}")
        answer = f"随机数是{result}。"
    else:
        asks = ("Give me a random number from {a} to {b} with seed {k}.", "Draw a random number between {a} and {b}, seed {k}.")
        answer = f"The random number is {result}."
    arguments = {"seed": seed, "low": low, "high": high}
    return Episode(rng.choice(asks).format(k=seed, a=low, b=high), arguments, {"result": result}, answer)


def _same(text: str) -> tuple[str, str]:
    """These tools describe themselves in English whatever is asked."""
    return text, text


# In the order of glmkit.tools.examples.SAFE_TOOLS, with the names and descriptions that its schemas have.
SERVICES: tuple[Tool, ...] = (
    Tool("calculator", _same("Compute an expression"), {"expression": ("string", *_same("expression"))}, _calculator),
    Tool("get_time", _same("Get the time of a city"), {"city": ("string", *_same("city name"))}, _time),
    Tool("get_weather", _same("Get the weather of a city"), {"city": ("string", *_same("city name"))}, _weather),
    Tool("convert_units", _same("Convert a value between units"),
         {"value": ("number", *_same("value")), "source": ("string", *_same("from unit")),
          "target": ("string", *_same("to unit"))}, _units),
    Tool("random_number", _same("Draw a random number"),
         {"seed": ("integer", *_same("seed")), "low": ("integer", *_same("lowest")),
          "high": ("integer", *_same("highest"))}, _random),
)  # fmt: skip
_WEIGHTS = {"calculator": 4, "get_time": 3, "get_weather": 4, "convert_units": 2, "random_number": 1}


def sample_services(rng: random.Random, heldout: bool) -> list[dict[str, Any]]:
    """Draw a dialogue in which the five tools, or some of them, are on offer.

    Args:
        rng: Source of randomness.
        heldout: Use calls that training never shows; then there is one question, and all five tools are on offer.

    Returns:
        Messages: a system message, then one to four rounds: question, call, observation, answer, or a question that
        needs no tool and its plain answer.
    """
    chinese = rng.random() < 0.6
    offered = list(SERVICES)
    if not heldout and rng.random() < 0.75:  # short dialogues teach the same with fewer tokens
        offered = rng.sample(SERVICES, rng.choice((1, 1, 1, 2, 2, 3)))
    tools = [tool.schema(False) for tool in offered]
    if not heldout and rng.random() < 0.4:  # descriptions with a full stop are the same
        for tool in tools:
            tool["description"] += "."
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM, "tools": tools}]
    for _ in range(1 if heldout else rng.choice((1, 2, 3, 3, 4))):
        if rng.random() < 0.2:
            question, reply = sample_fact(rng, heldout) if rng.random() < 0.5 else sample_talk(rng, heldout)[-1]
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
            continue
        called = rng.choices(offered, [_WEIGHTS[tool.name] for tool in offered])[0]
        while True:
            episode = called.play(rng, chinese if rng.random() < 0.9 else not chinese)
            usual = episode.arguments.get("city") in (*_USUAL, *_USUAL_EN)  # these are learnt, never held out
            if (is_heldout(called.name, episode.arguments) and not usual) == heldout:
                break
        observation, answer = json.dumps(episode.observation, ensure_ascii=False), episode.answer
        city = episode.arguments.get("city")
        if city and not heldout and rng.random() < 0.06:
            observation = f"The tool {called.name} failed: ValueError: the city {city!r} is not in the table"
            answer = f"抱歉，查不到{city}。" if "。" in answer else f"Sorry, I could not find {city}."
        messages += [
            {"role": "user", "content": episode.question},
            {"role": "assistant", "metadata": called.name, "content": call_text(episode.arguments)},
            {"role": "observation", "content": observation},
            {"role": "assistant", "content": answer},
        ]
    return messages
