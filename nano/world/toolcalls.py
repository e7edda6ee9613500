"""Dialogues with tools in ChatGLM3's protocol: a call, the host's observation, and the answer."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .arithmetic import sample_sum

SYSTEM = "Answer the following questions as best as you can. You have access to the following tools:"

_CITIES = (
    "北京 上海 广州 深圳 杭州 南京 成都 武汉 西安 重庆 天津 苏州 长沙 青岛 大连 厦门 昆明 哈尔滨 沈阳 济南 郑州 福州 合肥 南昌 贵阳 "
    "兰州 海口 三亚 桂林 拉萨 巴黎 伦敦 东京 纽约 柏林 罗马 悉尼 曼谷 首尔 莫斯科"
).split()
_CITIES_EN = (
    "Beijing Shanghai Paris London Tokyo Berlin Rome Sydney Bangkok Seoul Moscow Madrid Boston Chicago Oslo Vienna Cairo "
    "Delhi Toronto Dublin"
).split()
_WEATHER = {"晴": "sunny", "多云": "cloudy", "小雨": "rainy", "大雪": "snowy", "阴": "overcast", "大风": "windy"}
_WORDS = "你好 谢谢 再见 苹果 朋友 老师 学校 音乐 春天 早上好 晚安 我爱你 生日快乐 新年快乐 加油 欢迎 对不起 没关系 太阳 月亮".split()
_WORDS_EN = (
    "hello;thank you;goodbye;apple;friend;teacher;school;music;spring;good morning;good night;I love you;happy birthday;"
    "happy new year;come on;welcome;sorry;it does not matter;sun;moon"
).split(";")
_GOODS = "裙子 裤子 外套 衬衫 毛衣 卫衣 鞋子 帽子 书包 围巾 手表 雨伞".split()
_GOODS_EN = "skirt trousers coat shirt sweater hoodie shoes hat bag scarf watch umbrella".split()
_COLORS = "红色 蓝色 黑色 白色 绿色 黄色 粉色 灰色 紫色 棕色".split()
_COLORS_EN = "red blue black white green yellow pink grey purple brown".split()
_MONEY = {"人民币": "CNY", "美元": "USD", "欧元": "EUR", "日元": "JPY", "英镑": "GBP", "韩元": "KRW", "泰铢": "THB"}
_MONEY_EN = {"yuan": "CNY", "dollars": "USD", "euros": "EUR", "yen": "JPY", "pounds": "GBP", "won": "KRW", "baht": "THB"}
_PEOPLE = "小明 小红 小刚 小丽 妈妈 爸爸 老师 经理 小李 小王".split()
_PEOPLE_EN = "Tom Lucy Jack Mary Anna Ben Lily Peter Rose Sam".split()


@dataclass(frozen=True)
class Episode:
    """One use of a tool.

    Attributes:
        question: What the user says.
        arguments: Keyword arguments of the call.
        observation: What the tool gives back.
        answer: What the model says at the end.
    """

    question: str
    arguments: dict[str, Any]
    observation: dict[str, Any]
    answer: str


@dataclass(frozen=True)
class Tool:
    """A tool that the training dialogues offer.

    Attributes:
        name: Its name.
        descriptions: What it does, in Chinese and in English.
        parameters: Name to (JSON type, Chinese description, English description).
        play: Draws an episode; its second argument asks for Chinese.
    """

    name: str
    descriptions: tuple[str, str]
    parameters: dict[str, tuple[str, str, str]]
    play: Callable[[random.Random, bool], Episode]

    def schema(self, chinese: bool) -> dict[str, Any]:
        """Describe the tool to the model.

        Args:
            chinese: Language of the descriptions.

        Returns:
            A mapping with name, description and JSON-schema parameters.
        """
        properties = {
            key: {"type": kind, "description": zh if chinese else en} for key, (kind, zh, en) in self.parameters.items()
        }
        return {
            "name": self.name,
            "description": self.descriptions[0 if chinese else 1],
            "parameters": {"type": "object", "properties": properties, "required": list(properties)},
        }


def _weather(rng: random.Random, chinese: bool) -> Episode:
    city = rng.choice(_CITIES if chinese else _CITIES_EN)
    sky, degrees = rng.choice(list(_WEATHER)), rng.randint(-5, 35)
    asks: tuple[str, ...]
    if chinese:
        asks = ("{c}今天天气怎么样？", "查一下{c}的天气", "{c}的天气如何？", "我想知道{c}今天的天气。", "今天{c}冷不冷？", "帮我看看{c}天气")
        answer = f"{city}今天{sky}，气温{degrees}度。"
    else:
        asks = ("What is the weather like in {c}?", "How is the weather in {c} today?", "Weather in {c}, please.",
                "Tell me the weather in {c}.", "Is it cold in {c} today?")
        sky = _WEATHER[sky]
        answer = f"It is {sky} in {city} today, {degrees} degrees."
    observation = {"weather": sky, "temperature": degrees}
    return Episode(rng.choice(asks).format(c=city), {"city": city}, observation, answer)


def _calculator(rng: random.Random, chinese: bool) -> Episode:
    if rng.random() < 0.5:
        exercise = sample_sum(rng)
        left, sign, right = exercise.left, exercise.sign, exercise.right
    else:
        left, sign, right = rng.randint(101, 999), rng.choice("+-*"), rng.randint(10, 999)
    result = left + right if sign == "+" else left - right if sign == "-" else left * right
    expression = f"{left}{sign}{right}"
    asks: tuple[str, ...]
    if chinese:
        asks = ("用计算器算一下{e}", "请用计算器计算{e}", "计算器：{e}等于多少？", "用工具算{e}")
        answer = f"{expression}的结果是{result}。"
    else:
        asks = ("Use the calculator: {e}", "Calculate {e} with the calculator.", "Use your tool to compute {e}.")
        answer = f"The result of {expression} is {result}."
    return Episode(rng.choice(asks).format(e=expression), {"expression": expression}, {"result": result}, answer)


def _time(rng: random.Random, chinese: bool) -> Episode:
    city = rng.choice(_CITIES if chinese else _CITIES_EN)
    clock = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    asks: tuple[str, ...]
    if chinese:
        asks = ("{c}现在几点？", "现在{c}是什么时间？", "帮我查一下{c}的时间", "{c}现在的时间是多少？", "{c}几点了？")
        answer = f"{city}现在是{clock}。"
    else:
        asks = ("What time is it in {c}?", "Tell me the time in {c}.", "What is the time in {c} now?", "Time in {c}, please.")
        answer = f"It is {clock} in {city} now."
    return Episode(rng.choice(asks).format(c=city), {"city": city}, {"time": clock}, answer)


def _translate(rng: random.Random, chinese: bool) -> Episode:
    index = rng.randrange(len(_WORDS))
    to_english = rng.random() < 0.5
    text, result = (_WORDS[index], _WORDS_EN[index]) if to_english else (_WORDS_EN[index], _WORDS[index])
    target = "en" if to_english else "zh"
    asks: tuple[str, ...]
    if chinese:
        language = "英文" if to_english else "中文"
        asks = ("用翻译工具把“{t}”翻译成{l}", "帮我把“{t}”译成{l}", "查一下“{t}”的{l}翻译", "请翻译“{t}”，目标语言是{l}")
        answer = f"“{text}”翻译成{language}是“{result}”。"
    else:
        language = "English" if to_english else "Chinese"
        asks = ('Use the tool to translate "{t}" to {l}.', 'Translate "{t}" to {l} with the tool.', 'Look up "{t}" in {l}.')
        answer = f'"{text}" in {language} is "{result}".'
    question = rng.choice(asks).format(t=text, l=language)
    return Episode(question, {"text": text, "target": target}, {"translation": result}, answer)


def _product(rng: random.Random, chinese: bool) -> Episode:
    goods, color = rng.choice(_GOODS if chinese else _GOODS_EN), rng.choice(_COLORS if chinese else _COLORS_EN)
    count, price = rng.randint(1, 20), rng.randint(3, 60) * 10 - 1
    asks: tuple[str, ...]
    if chinese:
        asks = ("我想买{k}的{g}", "有{k}的{g}吗？", "帮我找一找{k}{g}", "搜索{k}的{g}", "店里有没有{k}的{g}？")
        answer = f"找到{count}款{color}的{goods}，最低{price}元。"
    else:
        asks = ("I want to buy {k} {g}.", "Do you have {k} {g}?", "Search for {k} {g}.", "Find me {k} {g}.")
        answer = f"I found {count} items of {color} {goods}, from {price} yuan."
    question = rng.choice(asks).format(k=color, g=goods)
    return Episode(question, {"category": goods, "color": color}, {"count": count, "lowest_price": price}, answer)


def _currency(rng: random.Random, chinese: bool) -> Episode:
    names = _MONEY if chinese else _MONEY_EN
    source, target = rng.sample(list(names), 2)
    amount, result = rng.randint(1, 50) * rng.choice((1, 10, 100)), rng.randint(1, 9999)
    asks: tuple[str, ...]
    if chinese:
        asks = ("{a}{s}等于多少{t}？", "把{a}{s}换成{t}", "{a}{s}能换多少{t}？", "{a}{s}是多少{t}？")
        answer = f"{amount}{source}等于{result}{target}。"
    else:
        asks = ("How much is {a} {s} in {t}?", "Convert {a} {s} to {t}.", "Change {a} {s} into {t}.")
        answer = f"{amount} {source} is {result} {target}."
    arguments = {"amount": amount, "source": names[source], "target": names[target]}
    return Episode(rng.choice(asks).format(a=amount, s=source, t=target), arguments, {"result": result}, answer)


def _message(rng: random.Random, chinese: bool) -> Episode:
    person = rng.choice(_PEOPLE if chinese else _PEOPLE_EN)
    asks: tuple[str, ...]
    if chinese:
        text = rng.choice(("晚上一起吃饭", "明天见", "我到家了", "会议改到三点", "生日快乐", "我迟到十分钟", "记得带伞", "周末去爬山"))
        asks = ("给{p}发消息：{t}", "发消息告诉{p}：{t}", "请给{p}发一条消息，内容是{t}")
        answer = f"已经给{person}发送消息：{text}。"
    else:
        text = rng.choice(("see you tomorrow", "I am home", "happy birthday", "I will be late", "take an umbrella",
                           "let us have dinner", "the meeting is at three"))
        asks = ("Send a message to {p}: {t}", "Tell {p} by message: {t}", "Message {p}: {t}")
        answer = f"I have sent the message to {person}: {text}."
    return Episode(rng.choice(asks).format(p=person, t=text), {"to": person, "text": text}, {"status": "sent"}, answer)


def _alarm(rng: random.Random, chinese: bool) -> Episode:
    hour, minute = rng.randint(5, 22), rng.choice((0, 10, 15, 20, 30, 40, 45, 50))
    clock = f"{hour:02d}:{minute:02d}"
    asks: tuple[str, ...]
    if chinese:
        asks = ("设一个{c}的闹钟", "{c}叫我起床", "帮我定{c}的闹钟", "请在{c}提醒我")
        answer = f"已经设好{clock}的闹钟。"
    else:
        asks = ("Set an alarm for {c}.", "Wake me up at {c}.", "Remind me at {c}.")
        answer = f"The alarm is set for {clock}."
    return Episode(rng.choice(asks).format(c=clock), {"time": clock}, {"status": "ok"}, answer)


TOOLS: tuple[Tool, ...] = (
    Tool("get_weather", ("查询城市的天气", "Get the weather of a city"), {"city": ("string", "城市", "city name")}, _weather),
    Tool("calculator", ("计算算式", "Compute an expression"), {"expression": ("string", "算式", "expression")}, _calculator),
    Tool("get_time", ("查询城市的当前时间", "Get the time of a city"), {"city": ("string", "城市", "city name")}, _time),
    Tool("translate", ("翻译文本", "Translate a text"),
         {"text": ("string", "文本", "text"), "target": ("string", "目标语言", "target language")}, _translate),
    Tool("search_product", ("搜索商品", "Search for products"),
         {"category": ("string", "类别", "category"), "color": ("string", "颜色", "color")}, _product),
    Tool("convert_currency", ("货币换算", "Convert money"),
         {"amount": ("number", "金额", "amount"), "source": ("string", "原货币", "from"),
          "target": ("string", "目标货币", "to")}, _currency),
    Tool("send_message", ("发送消息", "Send a message"),
         {"to": ("string", "收信人", "receiver"), "text": ("string", "内容", "text")}, _message),
    Tool("set_alarm", ("设置闹钟", "Set an alarm"), {"time": ("string", "时间", "time")}, _alarm),
)


def call_text(arguments: dict[str, Any]) -> str:
    """Write a call as ChatGLM3 does.

    Args:
        arguments: Keyword arguments with literal values.

    Returns:
        A fenced python block with one call of ``tool_call``.
    """
    inner = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"```python\ntool_call({inner})\n```"


def is_heldout(tool: str, arguments: dict[str, Any]) -> bool:
    """Decide on which side of the split a call stands.

    Args:
        tool: Name of the tool.
        arguments: Keyword arguments.

    Returns:
        True for about one call in ten, which training never shows.
    """
    return zlib.crc32(f"{tool}{json.dumps(arguments, sort_keys=True)}".encode()) % 10 == 0


def sample_dialogue(rng: random.Random, heldout: bool) -> list[dict[str, Any]]:
    """Draw a dialogue with one to three tools on offer and one call (sometimes two).

    Args:
        rng: Source of randomness.
        heldout: Use calls that training never shows.

    Returns:
        Messages: system, user, assistant (call), observation, assistant, and perhaps a second round.
    """
    chinese = rng.random() < 0.65
    offered = rng.sample(TOOLS, rng.choice((1, 1, 2, 2, 3)))
    while sum(len(tool.parameters) for tool in offered) > 4:
        offered = rng.sample(TOOLS, len(offered))
    tools = [tool.schema(chinese if rng.random() < 0.8 else not chinese) for tool in offered]
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM, "tools": tools}]
    for _ in range(2 if len(offered) < 3 and rng.random() < 0.15 else 1):
        tool = rng.choice(offered)
        for _ in range(100):
            episode = tool.play(rng, chinese)
            if is_heldout(tool.name, episode.arguments) == heldout:
                break
        else:
            # A tool with few possible calls may have none on this side of the split.
            return sample_dialogue(rng, heldout)
        messages += [
            {"role": "user", "content": episode.question},
            {"role": "assistant", "metadata": tool.name, "content": call_text(episode.arguments)},
            {"role": "observation", "content": json.dumps(episode.observation, ensure_ascii=False)},
            {"role": "assistant", "content": episode.answer},
        ]
    return messages
