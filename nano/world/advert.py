"""Grammar that turns an attribute list into Chinese advertising copy."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .words import ATTRIBUTES, CLOSINGS, CONTRADICTIONS, FRAMES, IMPOSSIBLE, OPENINGS, STYLE_WIND, Value

Pair = tuple[str, str]

_TYPES = ("裙", "上衣", "裤")
_TYPE_WEIGHTS = (4, 4, 3)
_COMMON = ("版型", "材质", "颜色", "风格", "图案")
_NOUN_KEYS = frozenset({"衣样式", "裙型", "裙长", "裤型", "裤长"})
_MEASURE = {"上衣": "件", "裙": "条", "裤": "条"}
_PART = {"上衣": "衣身", "裙": "裙身", "裤": "裤身"}
_ADJECTIVE_KEYS = ("版型", "风格", "颜色", "材质")


def sample_attributes(rng: random.Random) -> list[Pair]:
    """Draw one product.

    Args:
        rng: Source of randomness.

    Returns:
        (attribute, value) pairs in the order of the attribute tables; the first is the type, 3 to 6 more follow.
    """
    while True:
        pairs = _draw(rng)
        names = {value for _, value in pairs}
        keys = {key for key, _ in pairs}
        sleeve_clash = "无袖" in names and keys & {"衣袖型", "裙袖型"}
        half_skirt = names & {"半身裙"} and keys & {"裙领型", "裙袖型", "裙袖长"}
        if not sleeve_clash and not half_skirt and not any(pair <= names for pair in CONTRADICTIONS):
            return pairs


def _draw(rng: random.Random) -> list[Pair]:
    kind = rng.choices(_TYPES, _TYPE_WEIGHTS)[0]
    table = ATTRIBUTES[kind]
    special = [key for key in table if key not in _COMMON]
    count = rng.choice((3, 4, 4, 5, 5, 6))
    common = rng.sample(_COMMON, min(len(_COMMON), rng.choice((1, 2, 2, 3, 3, 4)), count))
    chosen = {*common, *rng.sample(special, min(len(special), count - len(common)))}
    pairs: list[Pair] = [("类型", kind)]
    for key, (values, _) in table.items():
        if key in chosen:
            taken = {value for _, value in pairs}
            names = [name for name in values if name not in IMPOSSIBLE[kind] and name not in taken]
            picks = 2 if key in ("风格", "图案") and rng.random() < 0.15 else 1
            pairs.extend((key, name) for name in rng.sample(names, picks))
    return pairs


def content_of(pairs: Sequence[Pair]) -> str:
    """Write (attribute, value) pairs as ADGEN does.

    Args:
        pairs: (attribute, value) pairs.

    Returns:
        For example ``类型#裤*版型#宽松``.
    """
    return "*".join(f"{key}#{value}" for key, value in pairs)


def value_of(kind: str, pair: Pair) -> Value:
    """Look up what the grammar knows about an attribute's value.

    Args:
        kind: 上衣, 裙 or 裤.
        pair: (attribute, value).

    Returns:
        The entry of the table.
    """
    return ATTRIBUTES[kind][pair[0]][0][pair[1]]


def stem(pair: Pair) -> str:
    """Give the part of a value that copy must contain to count as mentioning it.

    Args:
        pair: (attribute, value).

    Returns:
        The value without 布, 风 or its final 裙 or 裤 (a pair of 阔腿长裤 mentions 阔腿裤).
    """
    key, value = pair
    if value in ("牛仔布", "民族风"):
        return value[:-1]
    if key in ("裙型", "裤型", "裤长", "裤口") and value not in ("长裤", "短裤") and value[-1] in "裙裤":
        return value[:-1]
    return value


def missing(pairs: Sequence[Pair], copy: str) -> list[Pair]:
    """List the attributes that a text does not mention; the type itself is not counted.

    Args:
        pairs: (attribute, value) pairs asked for.
        copy: Advertising copy.

    Returns:
        The pairs whose stem is absent.
    """
    return [pair for pair in pairs if pair[0] != "类型" and stem(pair) not in copy]


def noun_of(pairs: Sequence[Pair]) -> str:
    """Name the product.

    Args:
        pairs: (attribute, value) pairs, the type first.

    Returns:
        For example 九分阔腿裤, a字连衣裙, 卫衣.
    """
    known = dict(pairs)
    kind = known["类型"]
    if kind == "上衣":
        return known.get("衣样式", "上衣")
    if kind == "裙":
        base, shape = known.get("裙长", "裙"), known.get("裙型", "")
        if base == "裙":
            return (shape.removesuffix("裙") + "裙") if shape and shape != "大裙摆" else "大裙摆裙子" if shape else "裙子"
        return shape.removesuffix("裙") + base
    length, shape = known.get("裤长", ""), known.get("裤型", "")
    if length in ("短裤", "长裤", "连体裤"):
        return shape.removesuffix("裤") + length
    return length.removesuffix("裤") + (shape or "裤") if length or shape else "裤子"


def _adjective(pair: Pair) -> str:
    key, value = pair
    if key == "材质":
        return stem(pair)
    if key == "风格":
        value = "潮流" if value == "潮" else value
        return value + "风" if value in STYLE_WIND else value
    return value


def _opening(kind: str, pairs: Sequence[Pair], rng: random.Random) -> tuple[str, list[Pair]]:
    """Build the first clause; it names the product and at most two attributes.

    Returns:
        The clause and the pairs that it used up.
    """
    noun, used = noun_of(pairs), [pair for pair in pairs if pair[0] in _NOUN_KEYS]
    adjectives = [pair for pair in pairs if pair[0] in _ADJECTIVE_KEYS]
    picked = rng.sample(adjectives, min(len(adjectives), rng.choice((0, 1, 1, 2))))
    picked = [pair for index, pair in enumerate(picked) if pair[0] not in {p[0] for p in picked[:index]}]
    picked.sort(key=lambda pair: _ADJECTIVE_KEYS.index(pair[0]))
    words = [_adjective(pair) for pair in picked if _adjective(pair) not in noun]
    front = "".join(words)
    if words and picked[-1][0] != "材质" and (len(words) > 1 or rng.random() < 0.6):
        front = "".join(words) + "的"
    if len(words) == 2 and picked[-1][0] == "材质":
        front = words[0] + "的" + words[1]
    sources = [*picked, *used] or [pair for pair in pairs if pair[0] != "类型"][:1]
    source = rng.choice(sources)
    effect = rng.choice(value_of(kind, source).effects)
    frame = rng.choice(OPENINGS if words else OPENINGS[:5])
    text = frame.format(n=front + noun, e=effect, m=_MEASURE[kind])
    return text, [pair for pair in pairs if pair in used or pair in picked]


def _clause(kind: str, pair: Pair, rng: random.Random, said: set[str]) -> str:
    values, frames = ATTRIBUTES[kind][pair[0]]
    value = values[pair[1]]
    fresh = [effect for effect in value.effects if effect not in said] or list(value.effects)
    effect = rng.choice(fresh)
    said.add(effect)
    return rng.choice(FRAMES[frames]).format(p=value.phrase, e=effect, c=_PART[kind])


def write_copy(pairs: Sequence[Pair], rng: random.Random) -> str:
    """Write one piece of copy that mentions every attribute.

    Args:
        pairs: (attribute, value) pairs, the type first.
        rng: Source of randomness.

    Returns:
        One to five Chinese sentences.
    """
    kind = dict(pairs)["类型"]
    opening, used = _opening(kind, pairs, rng)
    said = {effect for pair in pairs[1:] for effect in value_of(kind, pair).effects if effect in opening}
    rest = [pair for pair in pairs if pair[0] != "类型" and pair not in used]
    if len(rest) > 1 and rng.random() < 0.3:
        rng.shuffle(rest)
    # An attribute whose stem the opening happens to lack (an omitted adjective) gets its own clause.
    rest += [pair for pair in missing(pairs, opening) if pair not in rest]
    clauses = [_clause(kind, pair, rng, said) for pair in rest]
    text = opening + "。"
    while clauses:
        group = [clauses.pop(0)]
        if clauses and rng.random() < 0.35:
            group.append(rng.choice(("；", "，同时", "，", "，而且", "；")) + clauses.pop(0))
        text += "".join(group) + "。"
    closings = rng.sample(CLOSINGS, 2)
    while closings and (len(text) < 38 or (len(closings) == 2 and (len(text) < 50 or rng.random() < 0.35))):
        text += closings.pop() + "。"
    return text
