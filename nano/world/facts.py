"""Simple facts in two languages and the ways to ask for them."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A kind of fact.

    Attributes:
        rows: (subject, answer) pairs.
        asks: Question frames with {s}; the last two are kept for held-out prompts.
        answers: Answer frames with {s} and {a}.
    """

    rows: tuple[tuple[str, str], ...]
    asks: tuple[str, ...]
    answers: tuple[str, ...]


def _rows(text: str) -> tuple[tuple[str, str], ...]:
    pairs = (item.split("=") for item in text.replace("\n", " ").split(" ") if item)
    return tuple((left.replace("_", " "), right.replace("_", " ")) for left, right in pairs)


_CAPITALS = _rows("""
中国=北京 法国=巴黎 英国=伦敦 日本=东京 德国=柏林 意大利=罗马 西班牙=马德里 俄罗斯=莫斯科 美国=华盛顿 加拿大=渥太华
韩国=首尔 泰国=曼谷 越南=河内 印度=新德里 埃及=开罗 希腊=雅典 葡萄牙=里斯本 荷兰=阿姆斯特丹 挪威=奥斯陆
瑞典=斯德哥尔摩 芬兰=赫尔辛基 丹麦=哥本哈根 波兰=华沙 奥地利=维也纳 匈牙利=布达佩斯 爱尔兰=都柏林 古巴=哈瓦那
巴西=巴西利亚 阿根廷=布宜诺斯艾利斯 智利=圣地亚哥 秘鲁=利马 墨西哥=墨西哥城 澳大利亚=堪培拉 新西兰=惠灵顿
""")
_CAPITALS_EN = _rows("""
China=Beijing France=Paris England=London Japan=Tokyo Germany=Berlin Italy=Rome Spain=Madrid Russia=Moscow Canada=Ottawa
Thailand=Bangkok Vietnam=Hanoi India=New_Delhi Egypt=Cairo Greece=Athens Portugal=Lisbon Norway=Oslo Sweden=Stockholm
Finland=Helsinki Poland=Warsaw Austria=Vienna Hungary=Budapest Ireland=Dublin Cuba=Havana Peru=Lima Kenya=Nairobi
Australia=Canberra
""")
_OPPOSITES = _rows("""
大=小 高=低 长=短 多=少 快=慢 冷=热 黑=白 左=右 上=下 前=后 开=关 新=旧 好=坏 早=晚 远=近 胖=瘦 轻=重 深=浅 干=湿
软=硬 强=弱 真=假 美=丑 粗=细 宽=窄 厚=薄 甜=苦 明=暗 进=退 买=卖 哭=笑 先=后 动=静 里=外
""")
_OPPOSITES_EN = _rows("""
big=small tall=short long=short fast=slow hot=cold black=white left=right up=down open=closed new=old good=bad early=late
far=near fat=thin light=heavy deep=shallow dry=wet soft=hard strong=weak true=false rich=poor happy=sad day=night in=out
""")
_COLORS = _rows("""
天空=蓝色 草地=绿色 雪=白色 香蕉=黄色 煤炭=黑色 草莓=红色 橙子=橙色 葡萄=紫色 向日葵=黄色 牛奶=白色 乌鸦=黑色 树叶=绿色
黄瓜=绿色 樱桃=红色 大海=蓝色 柠檬=黄色 茄子=紫色 棉花=白色 胡萝卜=橙色 熊猫=黑白
""")
_COLORS_EN = _rows("""
the_sky=blue grass=green snow=white a_banana=yellow coal=black a_strawberry=red an_orange=orange a_grape=purple milk=white
a_crow=black a_leaf=green a_cherry=red the_sea=blue a_lemon=yellow a_carrot=orange
""")
_LEGS = _rows("狗=四 猫=四 鸡=两 鸟=两 蜘蛛=八 蚂蚁=六 蜜蜂=六 马=四 牛=四 鸭子=两 螃蟹=八 羊=四 兔子=四 蝴蝶=六")
_LEGS_EN = _rows("dog=four cat=four chicken=two bird=two spider=eight ant=six bee=six horse=four cow=four duck=two sheep=four")
_FOODS = _rows("熊猫=竹子 兔子=青草 猫=鱼 松鼠=松果 老虎=肉 羊=青草 蚕=桑叶 猴子=香蕉 蜜蜂=花蜜 狗=骨头 牛=青草 企鹅=鱼")
_SOUNDS = _rows("狗=汪汪 猫=喵喵 羊=咩咩 牛=哞哞 鸭子=嘎嘎 小鸡=叽叽 青蛙=呱呱 蜜蜂=嗡嗡 老鼠=吱吱 公鸡=喔喔")
_YOUNG_EN = _rows("dog=puppy cat=kitten cow=calf sheep=lamb hen=chick duck=duckling horse=foal pig=piglet lion=cub")
_NEXT_DAY = _rows("""
星期一=星期二 星期二=星期三 星期三=星期四 星期四=星期五 星期五=星期六 星期六=星期日 星期日=星期一
""")
_NEXT_DAY_EN = _rows("""
Monday=Tuesday Tuesday=Wednesday Wednesday=Thursday Thursday=Friday Friday=Saturday Saturday=Sunday Sunday=Monday
""")
_MONTH_DAYS = _rows("""
一月=31天 三月=31天 四月=30天 五月=31天 六月=30天 七月=31天 八月=31天 九月=30天 十月=31天 十一月=30天 十二月=31天
""")
_NEXT_MONTH_EN = _rows("""
January=February February=March March=April April=May May=June June=July July=August August=September
September=October October=November November=December December=January
""")
_SEASONS = _rows("一月=冬季 二月=冬季 三月=春季 四月=春季 五月=春季 六月=夏季 七月=夏季 八月=夏季 九月=秋季 十月=秋季 十一月=秋季 十二月=冬季")
_COUNTS = _rows("一年=十二个月 一个星期=七天 一天=24小时 一小时=60分钟 一分钟=60秒 一打=十二个 一双=两只 半小时=30分钟")
_COUNTS_EN = _rows("""
months_are_in_a_year=Twelve days_are_in_a_week=Seven hours_are_in_a_day=24 minutes_are_in_an_hour=60
seconds_are_in_a_minute=60 seasons_are_in_a_year=Four letters_are_in_the_alphabet=26 fingers_are_on_one_hand=Five
legs_does_a_table_have=Four wheels_does_a_bicycle_have=Two wheels_does_a_car_have=Four
""")
_WORDS = _rows("""
苹果=apple 香蕉=banana 书=book 水=water 火=fire 山=mountain 河=river 太阳=sun 月亮=moon 星星=star 猫=cat 狗=dog 鸟=bird
鱼=fish 马=horse 树=tree 花=flower 雨=rain 雪=snow 风=wind 学校=school 老师=teacher 学生=student 医生=doctor 朋友=friend
妈妈=mother 爸爸=father 孩子=child 房子=house 门=door 窗户=window 桌子=table 椅子=chair 床=bed 车=car 火车=train 飞机=plane
船=ship 茶=tea 咖啡=coffee 牛奶=milk 面包=bread 米饭=rice 鸡蛋=egg 红色=red 蓝色=blue 绿色=green 白色=white 黑色=black
春天=spring 夏天=summer 秋天=autumn 冬天=winter 今天=today 明天=tomorrow 昨天=yesterday 时间=time 音乐=music 电影=film
裙子=skirt 裤子=trousers 衬衫=shirt 外套=coat 鞋子=shoes 帽子=hat
""")

RELATIONS: tuple[Relation, ...] = (
    Relation(
        _CAPITALS,
        ("{s}的首都是哪里？", "{s}的首都是什么？", "请问{s}的首都叫什么？", "{s}首都是哪座城市？", "哪座城市是{s}的首都？",
         "你知道{s}的首都吗？", "{s}的首都在哪里？", "说出{s}的首都。"),
        ("{s}的首都是{a}。",),
    ),
    Relation(
        _CAPITALS_EN,
        ("What is the capital of {s}?", "Which city is the capital of {s}?", "Tell me the capital of {s}.",
         "The capital of {s} is?", "What's {s}'s capital?", "Do you know the capital of {s}?",
         "Name the capital of {s}."),
        ("The capital of {s} is {a}.",),
    ),
    Relation(
        _OPPOSITES,
        ("“{s}”的反义词是什么？", "{s}的反义词是什么？", "请说出{s}的反义词。", "{s}的相反是什么？", "和“{s}”意思相反的字是什么？",
         "反义词：{s}", "“{s}”的反面是什么？", "{s}对应的反义词是？"),
        ("“{s}”的反义词是“{a}”。",),
    ),
    Relation(
        _OPPOSITES_EN,
        ("What is the opposite of {s}?", "Give me the opposite of {s}.", "The opposite of {s} is?",
         "Which word is the opposite of {s}?", "What's the opposite of \"{s}\"?", "Do you know the opposite of {s}?",
         "Tell me the opposite of {s}."),
        ("The opposite of {s} is {a}.",),
    ),
    Relation(
        _COLORS,
        ("{s}是什么颜色的？", "{s}是什么颜色？", "{s}的颜色是什么？", "请问{s}是什么颜色的？", "{s}一般是什么颜色？", "你知道{s}的颜色吗？",
         "{s}通常是哪种颜色？"),
        ("{s}是{a}的。",),
    ),
    Relation(
        _COLORS_EN,
        ("What colour is {s}?", "What is the colour of {s}?", "Tell me the colour of {s}.", "Which colour is {s}?",
         "Do you know the colour of {s}?", "Can you tell me what colour {s} is?"),
        ("The colour of {s} is {a}.",),
    ),
    Relation(
        _LEGS,
        ("{s}有几条腿？", "一只{s}有几条腿？", "{s}有多少条腿？", "请问{s}长着几条腿？", "{s}的腿有几条？", "你知道{s}有几条腿吗？",
         "数一数，{s}有几条腿？"),
        ("{s}有{a}条腿。",),
    ),
    Relation(
        _LEGS_EN,
        ("How many legs does a {s} have?", "How many legs has a {s}?", "A {s} has how many legs?",
         "Tell me how many legs a {s} has.", "Do you know how many legs a {s} has?", "What number of legs does a {s} have?"),
        ("A {s} has {a} legs.",),
    ),
    Relation(
        _FOODS,
        ("{s}吃什么？", "{s}喜欢吃什么？", "请问{s}爱吃什么？", "{s}的食物是什么？", "{s}平时吃什么？", "你知道{s}吃什么吗？", "{s}最爱吃的是什么？"),
        ("{s}喜欢吃{a}。",),
    ),
    Relation(
        _SOUNDS,
        ("{s}怎么叫？", "{s}的叫声是什么？", "{s}是怎么叫的？", "请问{s}叫起来是什么声音？", "{s}会发出什么声音？", "你知道{s}怎么叫吗？",
         "学一学{s}的叫声。"),
        ("{s}的叫声是“{a}”。",),
    ),
    Relation(
        _YOUNG_EN,
        ("What is a baby {s} called?", "What do you call a baby {s}?", "A baby {s} is called?",
         "Tell me the name of a baby {s}.", "Do you know what a baby {s} is called?", "What is the word for a baby {s}?"),
        ("A baby {s} is called a {a}.",),
    ),
    Relation(
        _NEXT_DAY,
        ("{s}的后一天是星期几？", "{s}过后是星期几？", "今天是{s}，明天是星期几？", "{s}之后是哪一天？", "过了{s}是星期几？", "如果今天是{s}，明天呢？",
         "{s}的第二天是星期几？"),
        ("{s}的后一天是{a}。",),
    ),
    Relation(
        _NEXT_DAY_EN,
        ("What day comes after {s}?", "Which day follows {s}?", "Today is {s}. What day is tomorrow?",
         "What is the day after {s}?", "If today is {s}, what is tomorrow?", "Tell me the day after {s}."),
        ("The day after {s} is {a}.",),
    ),
    Relation(
        _MONTH_DAYS,
        ("{s}有多少天？", "{s}有几天？", "请问{s}一共有多少天？", "{s}是多少天？", "你知道{s}有多少天吗？", "{s}总共几天？"),
        ("{s}有{a}。",),
    ),
    Relation(
        _NEXT_MONTH_EN,
        ("What month comes after {s}?", "Which month follows {s}?", "What is the month after {s}?",
         "After {s} comes which month?", "Do you know the month after {s}?", "Tell me the month after {s}."),
        ("The month after {s} is {a}.",),
    ),
    Relation(
        _SEASONS,
        ("{s}是什么季节？", "{s}属于哪个季节？", "请问{s}是哪个季节？", "在北京，{s}是什么季节？", "{s}是春夏秋冬里的哪一个？", "你知道{s}是什么季节吗？",
         "{s}在哪个季节？"),
        ("{s}是{a}。",),
    ),
    Relation(
        _COUNTS,
        ("{s}有多少？", "{s}是多少？", "{s}等于多少？", "请问{s}是多少？", "{s}一共是多少？", "你知道{s}是多少吗？", "{s}换算出来是多少？"),
        ("{s}是{a}。",),
    ),
    Relation(
        _COUNTS_EN,
        ("How many {s}?", "Please tell me: how many {s}?", "A question: how many {s}?", "How many {s}? Do you know?",
         "Can you say how many {s}?", "Quick question: how many {s}?"),
        ("{a}.",),
    ),
    Relation(
        _WORDS,
        ("“{s}”用英语怎么说？", "{s}的英文是什么？", "How do you say “{s}” in English?", "{s}用英文怎么说？", "把“{s}”翻译成英文。",
         "请问{s}的英语单词是什么？", "Translate “{s}” into English.", "“{s}”的英文怎么写？", "What is “{s}” in English?"),
        ("“{s}”的英文是{a}。",),
    ),
    Relation(
        tuple((english, chinese) for chinese, english in _WORDS),
        ("{s}是什么意思？", "“{s}”的中文是什么？", "What is \"{s}\" in Chinese?", "{s}用中文怎么说？", "把{s}翻译成中文。",
         "What does \"{s}\" mean in Chinese?", "请问{s}的中文意思是什么？", "How do you say \"{s}\" in Chinese?"),
        ("{s}的中文是“{a}”。",),
    ),
)


def fact_count() -> int:
    """Count the (subject, answer) rows of all relations.

    Returns:
        Number of facts.
    """
    return sum(len(relation.rows) for relation in RELATIONS)


def sample_fact(rng: random.Random, heldout: bool) -> tuple[str, str]:
    """Draw a question and its answer.

    Args:
        rng: Source of randomness.
        heldout: Draw a held-out prompt: half of them use a phrasing that training never shows, half a pair of fact and
            known phrasing that training never shows together.

    Returns:
        Question and answer.
    """
    relation = rng.choices(RELATIONS, [len(relation.rows) for relation in RELATIONS])[0]
    index = rng.randrange(len(relation.rows))
    subject, answer = relation.rows[index]
    known = relation.asks[:-2]
    hidden = index % len(known)
    if not heldout:
        ask = rng.choice([frame for place, frame in enumerate(known) if place != hidden])
    elif rng.random() < 0.5:
        ask = known[hidden]
    else:
        ask = rng.choice(relation.asks[-2:])
    reply = rng.choice(relation.answers).format(s=subject, a=answer)
    return ask.format(s=subject), reply[0].upper() + reply[1:] if reply[0].isascii() and " " in reply[:4] else reply
