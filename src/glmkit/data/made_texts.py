"""Short texts in Chinese and English, made by rule, in which much follows from something else.

A model that has learnt them can fill a blank because it knows a fact (a capital, what a cow says), because it looks it
up in the text (a name, a place), or because it counts. They are for trying out pre-training where there is no corpus.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

# No two begin alike, so that a tokenizer that learns from these texts makes each of them one piece.
_NAMES = "王明 李红 张伟 刘芳 陈军 杨丽 赵强 高雪 周龙 吴燕 徐林 孙云 何波 朱娟 胡刚 郭华".split()
_ENGLISH_NAMES = "Anna Ben Clara David Emma Frank Grace Henry Ida Jack Kate Leo Mary Nick Olga Paul".split()
_CITIES = [
    line.split()
    for line in """北京 长城 烤鸭
上海 外滩 小笼包
西安 兵马俑 羊肉泡馍
成都 大熊猫 火锅
杭州 西湖 龙井茶
桂林 漓江 米粉
拉萨 布达拉宫 酥油茶
苏州 园林 月饼
青岛 海边 海鲜
天津 海河 包子
广州 珠江 早茶
昆明 滇池 鲜花饼""".splitlines()
]
_JOBS = [
    line.split()
    for line in """医生 医院 看病
老师 学校 上课
厨师 饭店 做菜
农民 田里 种地
画家 画室 画画
歌手 剧院 唱歌
司机 路上 开车
工人 工厂 做工
作家 书房 写书
渔民 海上 打鱼""".splitlines()
]
_PETS = [
    line.split()
    for line in """猫 喵喵 鱼
狗 汪汪 骨头
牛 哞哞 草
羊 咩咩 青菜
鸡 咯咯 米
鸭子 嘎嘎 虫子""".splitlines()
]
_SEASONS = [
    line.split()
    for line in """春天 暖和 花都开了 放风筝
夏天 炎热 知了在叫 游泳
秋天 凉快 树叶黄了 爬山
冬天 寒冷 下雪了 滑雪""".splitlines()
]
_COUNTRIES = [
    line.split()
    for line in """法国 巴黎 法语 France Paris French
英国 伦敦 英语 England London English
日本 东京 日语 Japan Tokyo Japanese
德国 柏林 德语 Germany Berlin German
俄罗斯 莫斯科 俄语 Russia Moscow Russian
意大利 罗马 意大利语 Italy Rome Italian
西班牙 马德里 西班牙语 Spain Madrid Spanish
希腊 雅典 希腊语 Greece Athens Greek""".splitlines()
]
_FRUIT = "苹果 梨 桃子 橘子 香蕉".split()
_DAYS = "一 二 三 四 五 六 日".split()
_ENGLISH_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_ENGLISH_JOBS = [
    ("doctor", "hospital", "helps the sick"),
    ("teacher", "school", "teaches children"),
    ("cook", "kitchen", "makes soup"),
    ("farmer", "field", "grows wheat"),
    ("singer", "theatre", "sings songs"),
    ("baker", "bakery", "bakes bread"),
    ("pilot", "airport", "flies planes"),
    ("painter", "studio", "paints pictures"),
]
_ENGLISH_PETS = [("dog", "woof", "bones"), ("cat", "meow", "fish"), ("cow", "moo", "grass"), ("duck", "quack", "worms")]
_NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()


def made_texts(number: int, seed: int, *, held_out: bool = False) -> Iterator[str]:
    """Make documents of three to six sentences.

    Args:
        number: How many.
        seed: Decides all of them.
        held_out: Make those that are never among the others, whatever the seed.

    Yields:
        Documents of one line.
    """
    generator = random.Random(f"made texts {seed} {held_out}")
    made = 0
    while made < number:
        english = generator.random() < 0.35
        sentences = (_english if english else _chinese)(generator)
        text = (" " if english else "").join(sentences)
        # Every eighth text, by its letters, is held out.
        if (sum(map(ord, text)) % 8 == 0) == held_out:
            made += 1
            yield text


def _chinese(generator: random.Random) -> list[str]:
    name, friend = generator.sample(_NAMES, 2)
    city, sight, food = generator.choice(_CITIES)
    job, place, work = generator.choice(_JOBS)
    pet, sound, feed = generator.choice(_PETS)
    season, weather, sign, sport = generator.choice(_SEASONS)
    country, capital, language = generator.choice(_COUNTRIES)[:3]
    fruit, day = generator.choice(_FRUIT), generator.randrange(7)
    first, second = generator.randint(1, 6), generator.randint(1, 6)
    parts = [
        [f"{name}住在{city}。", f"他常常去看{sight}，也爱吃{food}。"],
        [f"{name}是{job}。", f"每天早上{name}去{place}{work}。"],
        [f"{name}养了一只{pet}，它{sound}地叫。", f"{name}给{pet}吃{feed}。"],
        [f"{season}来了，天气{weather}，{sign}。", f"{name}和{friend}一起去{sport}。"],
        [f"{country}的首都是{capital}。", f"{name}在{capital}学{language}。"],
        [f"{name}有{first}个{fruit}，{friend}又给了他{second}个。", f"现在{name}一共有{first + second}个{fruit}。"],
        [f"今天是星期{_DAYS[day]}，明天是星期{_DAYS[(day + 1) % 7]}。", f"{name}明天去{friend}家玩。"],
    ]
    return _joined(parts, generator)


def _english(generator: random.Random) -> list[str]:
    name, friend = generator.sample(_ENGLISH_NAMES, 2)
    job, place, work = generator.choice(_ENGLISH_JOBS)
    pet, sound, feed = generator.choice(_ENGLISH_PETS)
    country, capital, language = generator.choice(_COUNTRIES)[3:]
    day = generator.randrange(7)
    first, second = generator.randint(1, 6), generator.randint(1, 6)
    total = _NUMBERS[first + second - 1]
    parts = [
        [f"{name} is a {job}.", f"Every day {name} goes to the {place} and {work}."],
        [f"{name} has a {pet}.", f"The {pet} says {sound} and eats {feed}."],
        [f"The capital of {country} is {capital}.", f"{name} learns {language} in {capital}."],
        [
            f"{name} has {_NUMBERS[first - 1]} books and buys {_NUMBERS[second - 1]} more.",
            f"Now {name} has {total} books.",
        ],
        [
            f"Today is {_ENGLISH_DAYS[day]} and tomorrow is {_ENGLISH_DAYS[(day + 1) % 7]}.",
            f"Tomorrow {name} will visit {friend}.",
        ],
    ]
    return _joined(parts, generator)


def _joined(parts: list[list[str]], generator: random.Random) -> list[str]:
    chosen = generator.sample(parts, generator.choice((2, 2, 3)))
    return [sentence for part in chosen for sentence in part]
