"""Finished English sentences in the reader's language.

Errors are written in English where they are raised. Nothing there knows of languages: here the template that a finished
sentence came from is found again, and its Chinese edition gets the same values. What is not in the catalogue stays
English. The catalogue is `translations/*.json`, English template -> Chinese template, with `{}` for a value, or `{0}`,
`{1}` where their order differs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

Language = Literal["en", "zh"]

_VARIABLES = ("GLMKIT_LANG", "LC_ALL", "LC_MESSAGES", "LANG")
LABELS: dict[Language, tuple[str, str]] = {"en": ("error: ", "hint: "), "zh": ("错误：", "提示：")}
"""What stands before a message and before a hint."""

_DEPTH = 4  # sentences in sentences
_MOST_CHARACTERS = 20_000
_LINE_CHARACTERS = 1_000
_MOST_SPLITS = 4
_WORD = re.compile("[a-z]{2}")
_BLANK = re.compile(r"\{(\d*)\}")
_FEW_LETTERS = 8
_ITEM = re.compile(r"(\s*(?:- |… )?)(.*)", re.DOTALL)


def language(environment: Mapping[str, str] | None = None) -> Language:
    """The language of whoever sits at this machine.

    Args:
        environment: Variables; those of the process unless told. GLMKIT_LANG goes before LC_ALL, LC_MESSAGES and LANG.
    """
    variables = os.environ if environment is None else environment
    told = next((variables[name] for name in _VARIABLES if variables.get(name)), "")
    return "zh" if told.lower().startswith(("zh", "chinese")) else "en"


def accepted_language(header: str) -> Language:
    """The better liked of our languages, English if none is.

    Args:
        header: What an HTTP client says in `Accept-Language`, such as "zh-CN,zh;q=0.9,en;q=0.5".
    """
    liked: dict[Language, float] = {"en": 0.0, "zh": 0.0}
    for part in header[:1000].split(","):
        name, _, quality = part.strip().lower().partition(";q=")
        try:
            value = float(quality or 1)
        except ValueError:
            continue
        primary = name.partition(";")[0].partition("-")[0].strip()
        if primary == "zh":
            liked["zh"] = max(liked["zh"], value)
        elif primary == "en":
            liked["en"] = max(liked["en"], value)
    return "zh" if liked["zh"] > liked["en"] else "en"


def describe(error: Exception, language: Language) -> tuple[str, str | None]:
    """What an error says and what to do about it.

    Args:
        error: One of `glmkit.errors`; of others the text, without a cure.
        language: In which language.

    Returns:
        The message and the hint, or None.
    """
    message = str(getattr(error, "message", None) or error)
    hint = getattr(error, "hint", None)
    return translate(message, language), translate(hint, language) if hint else None


def labelled(error: Exception, language: Language) -> str:
    """An error as the lines that people read.

    Args:
        error: One of `glmkit.errors`.
        language: In which language.
    """
    told = [label + text for label, text in zip(LABELS[language], describe(error, language)) if text]
    return "\n".join(told)


def translate(text: str, language: Language) -> str:
    """A finished English text in another language, its values as they are.

    Args:
        text: One or several lines.
        language: "en" gives the text back.

    Returns:
        The translation; the text itself where no template fits.
    """
    if language == "en" or not text or len(text) > _MOST_CHARACTERS:
        return text
    return _found(text, _DEPTH) or text


# --- finding the template again ---


class _Template(NamedTuple):
    """One line of the catalogue, prepared for looking: what stands between the values, and the longest of that."""

    pieces: tuple[str, ...]
    chinese: str
    longest: str
    letters: int


@lru_cache(maxsize=1)
def _catalogue() -> tuple[dict[str, str], tuple[_Template, ...]]:
    """Whole sentences, and templates with values, the most telling first."""
    texts: dict[str, str] = {}
    for path in sorted((Path(__file__).parent / "translations").glob("*.json")):
        texts.update(json.loads(path.read_text(encoding="utf-8")))
    templates = []
    for english, chinese in texts.items():
        pieces = tuple(english.split("{}"))
        if len(pieces) > 1:
            letters = sum(character.isalpha() for character in english)
            templates.append(_Template(pieces, chinese, max(pieces, key=len), letters))
    templates.sort(key=lambda one: sum(map(len, one.pieces)), reverse=True)
    return {english: chinese for english, chinese in texts.items() if "{}" not in english}, tuple(templates)


def _found(text: str, depth: int) -> str | None:
    """The translation of a text, or of what can be recognised in it; None if that is nothing."""
    if depth <= 0 or not _WORD.search(text):
        return None
    whole = _as_one_template(text, depth)
    if whole is not None:
        return whole
    if "\n" in text:
        lines = text.split("\n")
        said = [_line(line, depth) for line in lines]
        return "\n".join(new or old for new, old in zip(said, lines)) if any(said) else None
    return _line(text, depth) if len(text) <= _LINE_CHARACTERS else None


def _line(line: str, depth: int) -> str | None:
    match = _ITEM.fullmatch(line)
    assert match is not None
    lead, text = match.groups()
    if lead:
        said = _found(text, depth)
        return lead + said if said else None
    said = _as_one_template(text, depth) or _in_two_parts(text, depth)
    # A template of a word or two fits most sentences, so it comes last, and never for what somebody else wrote.
    return said or (_as_one_template(text, depth, weak=True) if depth == _DEPTH else None)


def _as_one_template(text: str, depth: int, weak: bool = False) -> str | None:
    sentences, templates = _catalogue()
    if text in sentences:
        return sentences[text]
    for one in templates:
        if (one.letters < _FEW_LETTERS) is weak and one.longest in text:
            values = _values(one.pieces, text)
            if values is not None:
                said = [(_found(value, depth - 1) if " " in value else None) or value for value in values]
                if not weak or not any(new == old and _is_prose(old) for new, old in zip(said, values)):
                    return _filled(one.chinese, said)
    return None


def _is_prose(value: str) -> bool:
    """Whether a value looks like a sentence that nobody translated."""
    return value.count(" ") > 3 or any(mark in value for mark in ("\n", "; ", ": expected"))


def _values(pieces: Sequence[str], text: str) -> list[str] | None:
    """What stands between the pieces, each as early as possible; in linear time, for texts may be a stranger's."""
    first, *inner, last = pieces
    if not text.startswith(first) or not text.endswith(last) or len(text) < len(first) + len(last):
        return None
    values, start, end = [], len(first), len(text) - len(last)
    for piece in inner:
        found = text.find(piece, start, end)
        if found < 0:
            return None
        values.append(text[start:found])
        start = found + len(piece)
    return [*values, text[start:end]]


def _in_two_parts(text: str, depth: int) -> str | None:
    """`place: sentence`, `sentence; sentence` or `name sentence`, of which one part is known."""
    if depth <= 1:
        return None
    name, _, sentence = text.partition(" ")
    said = _as_one_template(sentence, depth - 1) if " " in sentence else None
    if said is not None:
        return f"{name} {said}"
    for mark, join in ((": ", "："), ("; ", "；")):
        for head, tail in islice(_splits(text, mark), _MOST_SPLITS):
            said = _as_one_template(tail, depth - 1)
            if said is not None:
                return (_found(head, depth - 2) or head) + join + said
            before = _as_one_template(head, depth - 1)
            if before is not None:
                return before + join + (_found(tail, depth - 2) or tail)
    return None


def _splits(text: str, mark: str) -> Iterator[tuple[str, str]]:
    start = text.find(mark)
    while start >= 0:
        yield text[:start], text[start + len(mark) :]
        start = text.find(mark, start + 1)


def _filled(chinese: str, values: Sequence[str]) -> str:
    count = iter(range(len(values)))
    return _BLANK.sub(lambda blank: values[int(blank[1]) if blank[1] else next(count)], chinese)
