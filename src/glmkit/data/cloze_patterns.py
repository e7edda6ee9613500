"""The patterns that turn a classification task into a blank, and the words that stand for its labels. Data, no code.

A pattern has one or two sides, each a row of parts. The sides follow one another in the text; which side a part is on
only decides where text is cut when it is too long.

    "[MASK]"       the blank
    "<...>"        a part that may be shortened
    "{a}" "{b}"    the first and the second text of the example; other names are fields of its `meta`
    "{b.bare}"     without marks at its end        "{b.low}"  first letter in lower case
    "{b.trim}"     without blanks at its end       and combinations, read from the left

Blanks inside a part matter: " Yes" and "Yes" are different tokens.

Source: tasks/superglue/pvp.py and dataset.py of the training repository (the wording of prompts is data of the task).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

MASK = "[MASK]"
Parts = tuple[str, ...]


@dataclass(frozen=True)
class Pattern:
    """One way to ask.

    Args:
        first: Parts of the first side.
        second: Parts of the second side.
        words: The word for each label; empty if the answers are texts of the example.
    """

    first: Parts
    second: Parts = ()
    words: Mapping[Any, str] | None = None


@dataclass(frozen=True)
class ClozeTask:
    """A task.

    Args:
        labels: Its labels, in the order of scores.
        patterns: The ways to ask; `pattern_id` counts them.
        answers: Templates of the answers where they are texts of the example. "{*name}" gives one for each text in the
            list `name`, and none if the example has no such list.
    """

    labels: tuple[Hashable, ...]
    patterns: tuple[Pattern, ...]
    answers: tuple[str, ...] = ()


def _ask(words: Mapping[Any, str] | None, *sides: tuple[Parts, Parts]) -> tuple[Pattern, ...]:
    return tuple(Pattern(first, second, words) for first, second in sides)


_YES_NO = {"entailment": " Yes", "not_entailment": " No"}
_THREE = {"contradiction": " No", "entailment": " Yes", "neutral": " Maybe"}
_FALSE_TRUE = {"false": " No", "true": " Yes"}
_IS_SAME = {"0": " No", "1": " Yes"}
_TWO_TEXTS = (
    (('"', "<{b.bare}>", '" ?'), (MASK, ",", ' "', "<{a}>", '"')),
    (("<{b.bare}>", "?"), (MASK, ",", "< {a}>")),
    (('"', "<{b.bare}>", '" ?'), (MASK, '. "', "<{a}>", '"')),
    (("<{b.bare}>", "?"), (MASK, ".", "< {a}>")),
)
_RTE = ClozeTask(
    ("entailment", "not_entailment"),
    (
        *_ask(_YES_NO, *_TWO_TEXTS),
        Pattern(
            ("<{a}>", " question:", "< {b.bare}>", " True or False?", " answer:", MASK),
            words={"entailment": " true", "not_entailment": " false"},
        ),
    ),
)
_BOOLQ_SIDES = (
    (("<{a}>", " Question:", "< {b}>", "? Answer:", MASK, "."), ()),
    (("<{a}>", " Based on the previous passage,", "< {b}>", "?", MASK, "."), ()),
    (("Based on the following passage", "< {b}>", "?", MASK, ".", "< {a}>"), ()),
)
_TOPIC_SIDES = (
    ((MASK, ":", "<{a}>", "<{b}>"), ()),
    ((MASK, " {kind}:", "<{a}>", "<{b}>"), ()),
    (("<{a}>", "(", MASK, ")", "<{b}>"), ()),
    (("<{a}>", "<{b}>", "(", MASK, ")"), ()),
    (("[ Category:", MASK, "]", "<{a}>", "<{b}>"), ()),
    ((MASK, "-", "<{a}>", "<{b}>"), ()),
)


def _topics(kind: str, words: Mapping[Any, str]) -> ClozeTask:
    sides = tuple((tuple(part.replace("{kind}", kind) for part in first), second) for first, second in _TOPIC_SIDES)
    return ClozeTask(tuple(words), _ask(words, *sides))


def _yelp(words: Mapping[Any, str]) -> ClozeTask:
    return ClozeTask(
        tuple(words),
        _ask(
            words,
            (("It was", MASK, ".", "<{a}>"), ()),
            (("<{a}>", ". All in all, it was", MASK, "."), ()),
            (("Just", MASK, "!"), ("<{a}>",)),
            (("<{a}>",), (" In summary, the restaurant is", MASK, ".")),
        ),
    )


def _stance() -> ClozeTask:
    sides = ((('"', "<{a}>", '"'), (MASK, '. "', "<{b}>", '"')), (("<{a}>",), (MASK, ".", "<{b}>")))
    words = (("Ja", "Nein"), ("Yes", "No"), ("Oui", "Non"))
    patterns = tuple(pattern for yes, no in words for pattern in _ask({"FAVOR": yes, "AGAINST": no}, *sides))
    return ClozeTask(("FAVOR", "AGAINST"), patterns)


_MNLI_WORDS = ({"contradiction": " Wrong", "entailment": " Right", "neutral": " Maybe"}, _THREE)
_MNLI_SIDES = ((('"', "<{a.bare}>", '" ?'), (MASK, ', "', "<{b}>", '"')), (("<{a.bare}>", "?"), (MASK, ",", "<{b}>")))

TASKS: dict[str, ClozeTask] = {
    # --- SuperGLUE ---
    "rte": _RTE,
    "ax-b": _RTE,
    "ax-g": _RTE,
    "cb": ClozeTask(
        ("entailment", "contradiction", "neutral"),
        (
            *_ask(_THREE, *_TWO_TEXTS),
            Pattern(
                ("<{a}>", " question:", "< {b}>", " true, false or neither?", " answer:", MASK),
                words={"entailment": " true", "contradiction": " false", "neutral": " neither"},
            ),
        ),
    ),
    "boolq": ClozeTask(
        ("false", "true"),
        tuple(
            pattern
            for side in _BOOLQ_SIDES
            for words in (_FALSE_TRUE, {"false": " false", "true": " true"})
            for pattern in _ask(words, side)
        ),
    ),
    "wic": ClozeTask(
        ("false", "true"),
        (
            *_ask(
                _FALSE_TRUE,
                (('<"{a}" / "{b}">', ' Similar sense of "{word}"?', MASK, "."), ()),
                (("<{a}>", "< {b}>", " Does {word} have the same meaning in both sentences?", MASK), ()),
            ),
            Pattern(
                ("{word}", " .", ' Sense (1) (a) "', "<{a}>", '"', " (", MASK, ') "', "{b}", '"'),
                words={"false": "2", "true": "b"},
            ),
        ),
    ),
    "multirc": ClozeTask(
        (0, 1),
        (
            *_ask(
                {0: " No", 1: " Yes"},
                (("<{a.trim.bare}>", ".", " Question:", " {b.trim.bare}?", " Is it", " {answer}", "?", MASK, "."), ()),
                (
                    (
                        *("<{a.trim.bare}>", ".", " Question:", " {b.trim.bare}", "?"),
                        *(' Is the correct answer "', "{answer}", '"?', MASK, "."),
                    ),
                    (),
                ),
                (
                    (
                        *("<{a.trim.bare}>", ". Based on the previous passage,", " {b.trim.bare}", "?", ' Is "'),
                        *("{answer}", '" a correct answer?', MASK, "."),
                    ),
                    (),
                ),
            ),
            Pattern(
                ("<{a.trim.bare}>", " {b.trim.bare}", "- [", MASK, "]", "{answer}"), words={0: " False", 1: " True"}
            ),
            Pattern(
                ("<{a.trim.bare}>", ".", " Question:", " {b.trim.bare}", "?", " {answer}", "?", MASK, "."),
                words={0: " No", 1: " Yes"},
            ),
        ),
    ),
    "copa": ClozeTask(  # {joiner}: " because" or ", so", by `question`
        (0, 1),
        _ask(
            None,
            (
                (
                    *('"', "{choice1.low.bare}", '" or "', "{choice2.low.bare}", '"?'),
                    *("< {a.bare}>", "{joiner}", MASK, "."),
                ),
                (),
            ),
            (("{choice1.low.bare}", " or", " {choice2.low.bare}", "?", "< {a.bare}>", "{joiner}", MASK, "."), ()),
        ),
        answers=(" {choice1.low.bare}", " {choice2.low.bare}"),
    ),
    "wsc": ClozeTask(  # {marked}: the text with stars around the pronoun
        ("False", "True"),
        _ask(
            None,
            (("<{marked}>", " The pronoun '*{span2_text}*' refers to", MASK, "."), ()),
            (("<{marked}>", " In the previous sentence, the pronoun '*{span2_text}*' refers to", MASK, "."), ()),
            (
                (
                    "<{marked}>",
                    " Question: In the passage above, what does the pronoun '*{span2_text}*' refer to?",
                    *(" Answer:", MASK, "."),
                ),
                (),
            ),
        ),
        answers=(" {span1_text}", " {*candidates}"),
    ),
    "record": ClozeTask(  # {before} and {after}: the query around @placeholder
        ("0", "1"), _ask(None, (("<{a}>", " {before}", MASK, "{after}"), ())), answers=(" {*candidates}",)
    ),
    # --- other English tasks ---
    "race": ClozeTask(
        ("A", "B", "C", "D"),
        _ask(
            None,
            (("<{a}>",), (" Question:", "< {b}>", " Answer:", MASK)),
            (("<{a}>",), (" Based on the previous passage,", "< {b}>", MASK)),
        ),
        answers=(" {*choices}",),
    ),
    "race-blank": ClozeTask(  # a question with a _ in it, which is cut there
        ("A", "B", "C", "D"),
        _ask(
            None,
            (("<{a}>",), ("<{left}>", MASK, "<{right}>")),
            (("<{a}>",), (" Based on the previous passage,", "<{left}>", MASK, "<{right}>")),
        ),
        answers=(" {*choices}",),
    ),
    "squad": ClozeTask(("0",), _ask(None, (("<{a}>", " {b}", MASK, "."), ())), answers=(" {answer}",)),
    "sst2": ClozeTask(
        ("0", "1"),
        (
            Pattern(("<{a}>", " It was", MASK, "."), words={"0": " terrible", "1": " great"}),
            Pattern(("<{a}>", " It was", MASK, "."), words={"0": " bad", "1": " good"}),
        ),
    ),
    "cola": ClozeTask(
        ("0", "1"), _ask({"0": " incorrect", "1": " correct"}, (('"', "<{a}>", '"', " This is", MASK, "."), ()))
    ),
    "mrpc": ClozeTask(
        ("0", "1"),
        _ask(
            _IS_SAME,
            (("<{a}>",), (MASK, ", ", "<{b.low}>")),
            (("<{a}>",), (" Does it mean that", "<{b.low.bare}>", "?", MASK)),
        ),
    ),
    "qqp": ClozeTask(
        ("0", "1"),
        _ask(
            _IS_SAME,
            (("<{a}>",), (" Do you mean ", "<{b.low}>", MASK, ".")),
            (("<{a}>",), (MASK, ", ", "<{b.low}>")),
        ),
    ),
    "qnli": ClozeTask(
        ("entailment", "not_entailment"),
        _ask(
            _YES_NO,
            (("<{b}>", " Question:", "< {a.bare}>", "? Do you know the answer?", MASK, "."), ()),
            (("<{b}>", " Based on the previous passage, do you know the answer", "< {a.bare}>", "?", MASK, "."), ()),
            (("Based on the following passage, do you know the answer", "< {a.bare}>", "?", MASK, ".", "< {b}>"), ()),
        ),
    ),
    "mnli": ClozeTask(
        ("contradiction", "entailment", "neutral"),
        tuple(pattern for words in _MNLI_WORDS for pattern in _ask(words, *_MNLI_SIDES)),
    ),
    "agnews": _topics("News", {"1": " World", "2": " Sports", "3": " Business", "4": " Tech"}),
    "yahoo": _topics(
        "Question",
        {
            "1": " Society",
            "2": " Science",
            "3": " Health",
            "4": " Education",
            "5": " Computer",
            "6": " Sports",
            "7": " Business",
            "8": " Entertainment",
            "9": " Relationship",
            "10": " Politics",
        },
    ),
    "yelp-polarity": _yelp({"1": " bad", "2": " good"}),
    "yelp-full": _yelp({"1": " terrible", "2": " bad", "3": " okay", "4": " good", "5": " great"}),
    "xstance": (_STANCE := _stance()),  # two patterns each in German, English and French
    "xstance-de": _STANCE,
    "xstance-fr": _STANCE,
    # --- Chinese tasks ---
    "afqmc": ClozeTask(
        ("0", "1"),
        _ask(
            {"0": "▁不是", "1": "▁是"},
            (("<{a}>", "？"), ("你是说", "<{b}>", "？", MASK, "。")),
            (("<{a}>", "？"), (MASK, "，", "<{b}>")),
        ),
    ),
    "tnews": ClozeTask(
        tuple("100 101 102 103 104 106 107 108 109 110 112 113 114 115 116".split()),
        _ask(
            {
                "100": "故事",
                "101": "文化",
                "102": "娱乐",
                "103": "体育",
                "104": "金融",
                "106": "居家",
                "107": "汽车",
                "108": "教育",
                "109": "科技",
                "110": "军事",
                "112": "旅游",
                "113": "世界",
                "114": "股票",
                "115": "农业",
                "116": "游戏",
            },
            (("标题：", "<{a}>", "关键词：", "<{b}>", "类别：", MASK), ()),
        ),
    ),
    "cluewsc": ClozeTask(  # {marked}: the text with stars around the pronoun and hashes around the noun
        ("false", "true"),
        _ask(
            {"false": "不是", "true": "是"},
            (("<{marked}>", "代词'*{span2_text}*'", MASK, "指#{span1_text}#."), ()),
            (("在如下的句子中：", "<{marked}>", "代词'*{span2_text}*'", MASK, "指'#{span1_text}#'."), ()),
        ),
    ),
    # --- FewCLUE; the training repository has none of these, so the wording is ours ---
    "eprstmt": ClozeTask(
        ("Negative", "Positive"),
        _ask({"Negative": "不好", "Positive": "很好"}, (("<{a}>", "总之，感觉", MASK, "。"), ())),
    ),
    "ocnli": ClozeTask(
        ("contradiction", "entailment", "neutral"),
        _ask(
            {"contradiction": "错", "entailment": "对", "neutral": "可能"},
            (("<{a}>", "？"), (MASK, "，", "<{b}>")),
        ),
    ),
    "bustm": ClozeTask(
        ("0", "1"),
        _ask(
            {"0": "不是", "1": "是"},
            (("<{a}>", "？"), ("你是说", "<{b}>", "？", MASK, "。")),
            (("<{a}>", "？"), (MASK, "，", "<{b}>")),
        ),
    ),
    "csl": ClozeTask(
        ("0", "1"),
        _ask({"0": "不是", "1": "是"}, (("摘要：", "<{a}>", "关键词：{b}，", MASK, "准确。"), ())),
    ),
    "chid": ClozeTask(  # {before} and {after}: the text around #idiom#
        (0, 1, 2, 3, 4, 5, 6), _ask(None, (("<{before}>", MASK, "<{after}>"), ())), answers=("{*candidates}",)
    ),
    "cmrc": ClozeTask(  # of the second pattern the official code makes no row
        ("0",),
        _ask(
            None,
            (("<{a}>", "请问，{b}", MASK, "。"), ()),
            (("<根据以下信息：{a}>", "请问，{b}", MASK, "。"), ()),
        ),
        answers=("{answer}",),
    ),
}
