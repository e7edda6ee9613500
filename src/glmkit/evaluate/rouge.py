"""ROUGE-1, ROUGE-2 and ROUGE-L over words, and BLEU-4 over characters, as the official ADGEN scripts count them.

Both have quirks that published figures contain, so they are kept: ROUGE-N compares sets (a word that is repeated
counts once), n-grams run across sentence ends, a sentence of blanks counts as one empty word, and F has 1e-8 in its
denominator; BLEU's smoothing halves once for every order without a match.

Source: the counting rules of rouge-chinese 1.0.3 and of nltk's sentence_bleu with smoothing method 3; the code is new.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_TINY = 1e-8
# Where a sentence ends: after its mark unless a closing quote follows, then after the quote. The character behind the
# mark is taken along, so of two marks in a row only the first ends a sentence.
_SENTENCE_ENDS = (
    re.compile(r"([。！？?])([^”’])"),
    re.compile(r"(\.{6})([^”’])"),
    re.compile(r"(…{2})([^”’])"),
    re.compile(r"([。！？?][”’])([^，。！？?])"),
)


def words_of(text: str) -> list[str]:
    """Split blank-separated text into the words that ROUGE counts.

    Args:
        text: Words joined by blanks.

    Returns:
        The words of all sentences in order; empty if the text has no sentence.
    """
    for end in _SENTENCE_ENDS:
        text = end.sub(r"\1\n\2", text)
    sentences = [sentence for sentence in text.rstrip().split("\n") if sentence]
    # A sentence of blanks alone gives one empty word, which str.split(" ") keeps and str.split() would not.
    return [word for sentence in sentences for word in " ".join(sentence.split()).split(" ")]


def rouge_n(prediction: Sequence[str], label: Sequence[str], order: int) -> float:
    """Return the F value of the overlap of two sets of n-grams.

    Args:
        prediction: Words of the prediction.
        label: Words of the label.
        order: Words in an n-gram.

    Returns:
        F between 0 and 1.
    """
    found, wanted = set(_ngrams(prediction, order)), set(_ngrams(label, order))
    return _f_value(len(found & wanted), len(found), len(wanted))


def rouge_l(prediction: Sequence[str], label: Sequence[str]) -> float:
    """Return the F value of the longest common subsequence of two texts.

    Args:
        prediction: Words of the prediction.
        label: Words of the label.

    Returns:
        F between 0 and 1.
    """
    return _f_value(longest_common_subsequence(prediction, label), len(prediction), len(label))


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, one row of the table per machine operation on bits.

    Args:
        first: One sequence.
        second: The other.

    Returns:
        The length.

    Source: Hyyrö, Bit-parallel LCS-length computation revisited (2004).
    """
    everywhere = (1 << len(first)) - 1
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    row = everywhere
    for word in second:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & everywhere
    return len(first) - row.bit_count()


def bleu_4(prediction: str, label: str) -> float:
    """Return the BLEU-4 of one text over characters.

    Args:
        prediction: The text to judge.
        label: The reference.

    Returns:
        BLEU between 0 and 1; 0 if no character matches.
    """
    logarithms = []
    without_match = 0
    for order in range(1, 5):
        found, wanted = Counter(_ngrams(prediction, order)), Counter(_ngrams(label, order))
        matched = sum((found & wanted).values())
        total = max(1, sum(found.values()))
        if matched == 0 and order == 1:
            return 0.0
        if matched == 0:
            without_match += 1
            logarithms.append(math.log(1 / (2**without_match * total)))
        else:
            logarithms.append(math.log(matched / total))
    brevity = 1.0 if len(prediction) > len(label) else math.exp(1 - len(label) / len(prediction))
    return brevity * math.exp(math.fsum(0.25 * value for value in logarithms))


def _ngrams(items: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(items[start : start + order]) for start in range(len(items) - order + 1)]


def _f_value(common: int, found: int, wanted: int) -> float:
    precision = common / found if found else 0.0
    recall = common / wanted if wanted else 0.0
    return 2.0 * ((precision * recall) / (precision + recall + _TINY))
