"""Whether an answer in free words is the right one: exact match, F1 of words, ROUGE-L, and answers cut out of a text.

    "The Eiffel Tower."   ->   ["eiffel", "tower"]          small letters, no punctuation, no articles
    "他出生于 1911 年"      ->   ["他", "出", "生", "于", "1911", "年"]

Of several right answers the best counts.

Source: evaluation/metrics.py of GLM-130B (the SQuAD recipe). On purpose different: a Chinese, Japanese or Korean
character is a word of its own and their punctuation is left out too, as in CMRC's own script; there a whole Chinese
answer is one word, and F1 is exact match.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from glmkit.evaluate.rouge import rouge_l

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WIDE = r"\u2e80-\u303f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_WIDE}]|[^\s{_WIDE}]+")


def words(text: str) -> list[str]:
    """The words that are compared.

    Args:
        text: Any text.

    Returns:
        Words in small letters, without punctuation and articles.
    """
    kept = "".join(char for char in text.lower() if not _is_punctuation(char))
    return _WORD.findall(_ARTICLES.sub(" ", kept))


def exact_match(answer: str, target: str) -> float:
    """1 if both have the same words, else 0.

    Args:
        answer: What was answered.
        target: What is right.
    """
    return float(words(answer) == words(target))


def f1(answer: str, target: str) -> float:
    """F1 of the words of both, each as often as it occurs.

    Args:
        answer: What was answered.
        target: What is right.
    """
    found, wanted = words(answer), words(target)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def same_text(answer: str, target: str) -> float:
    """1 if both are the same but for blanks around them, else 0.

    Args:
        answer: What was answered.
        target: What is right.
    """
    return float(answer.strip() == target.strip())


def contains(answer: str, target: str) -> float:
    """1 if the words of the target stand in the answer one behind the other, else 0.

    Args:
        answer: What was answered.
        target: What is right.
    """
    found, wanted = words(answer), words(target)
    places = range(len(found) - len(wanted) + 1)
    return float(bool(wanted) and any(found[place : place + len(wanted)] == wanted for place in places))


def rouge(answer: str, target: str) -> float:
    """ROUGE-L of the words.

    Args:
        answer: What was answered.
        target: What is right.
    """
    return rouge_l(words(answer), words(target))


METRICS: dict[str, Callable[[str, str], float]] = {
    "EM": exact_match,
    "F1": f1,
    "Accuracy": same_text,
    "Contains": contains,
    "ROUGE-L": rouge,
}
"""Metrics of free answers, as task files call them."""


def best(metric: str, answer: str, targets: Sequence[str]) -> float:
    """The value for the target that fits best.

    Args:
        metric: A name in `METRICS`.
        answer: What was answered.
        targets: What is right, any of them.

    Returns:
        From 0 to 1; 0 without targets.
    """
    return max((METRICS[metric](answer, target) for target in targets), default=0.0)


def cut_out(text: str, *, stop: Sequence[str] = (), pattern: str | None = None, first_word: bool = False) -> str:
    """The part of a generated text that is the answer.

    Args:
        text: What was generated.
        stop: The text ends in front of the first of these.
        pattern: A regular expression: the answer is its first group, or all of it, where it matches last; where it
            does not match, all of the text.
        first_word: Only the first word.

    Returns:
        The answer without blanks around it.
    """
    text = text.strip()  # a stop such as a newline does not mean the one in front
    ends = [text.index(mark) for mark in stop if mark in text]
    text = text[: min(ends, default=len(text))]
    if pattern is not None and (matches := list(re.finditer(pattern, text, re.DOTALL))):
        text = matches[-1][1 if matches[-1].re.groups else 0] or ""
    text = text.strip()
    return text.split(" ")[0] if first_word else text


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or (ord(char) > 127 and unicodedata.category(char).startswith("P"))
