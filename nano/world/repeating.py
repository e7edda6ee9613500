"""Saying again what was said: the drill from which arguments of calls, lists and figures are copied instead of guessed."""

from __future__ import annotations

import random

from . import services, words
from .services import invent_city

_ZH = ("重复：{t}", "请重复：{t}", "跟我说：{t}", "照着说一遍：{t}", "重复“{t}”", "{t}。重复一遍。")
_EN = ("Repeat: {t}", "Please repeat: {t}", "Say this: {t}", 'Repeat "{t}"', "Repeat after me: {t}", "{t} - say it again.")


_LETTERS = sorted({letter for values in words.ATTRIBUTES.values() for names, _ in values.values() for name in names
                   for letter in name if "\u4e00" <= letter <= "\u9fff"} | set(services.SYLLABLES_ZH))  # fmt: skip


def _item(rng: random.Random, chinese: bool) -> str:
    kind = rng.randrange(5)
    if kind == 0:
        return str(rng.randint(0, rng.choice((9, 99, 999, 99999))))
    if kind == 1:
        return f"{rng.randint(1, 999)}{rng.choice('+-*/')}{rng.randint(1, 999)}"
    if kind == 2:
        return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    if kind == 3:
        return f"{rng.randint(1, 999) / 10:.1f}"
    return invent_city(rng, chinese)


def sample_repeating(rng: random.Random) -> list[tuple[str, str]]:
    """Draw a dialogue of one to three rounds.

    Args:
        rng: Source of randomness.

    Returns:
        Questions and answers; each answer is the text that stands in the question.
    """
    chinese = rng.random() < 0.6
    turns = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.4:  # signs that occur once: the easiest to find again
            many = rng.choice((2, 3, 5, 10, 20, 30))
            if chinese:
                text = "".join(rng.sample(_LETTERS, many))
            else:
                text = " ".join(rng.sample(services.SYLLABLES_EN, min(many, 12)))
            turns.append((rng.choice(_ZH if chinese else _EN).format(t=text), text))
            continue
        only = rng.random() < 0.5  # digits or names alone
        count = rng.choice((1, 2, 3, 5, 8, 12))
        if only and rng.random() < 0.5:
            parts = [str(rng.randint(0, rng.choice((9, 99)))) for _ in range(count)]
        elif only:
            parts = [invent_city(rng, chinese) for _ in range(count)]
        else:
            parts = [_item(rng, chinese) for _ in range(count)]
        text = rng.choice((", ", " ", ",") if not chinese else ("，", "、", " ", ", ")).join(parts)
        turns.append((rng.choice(_ZH if chinese else _EN).format(t=text), text))
    return turns
