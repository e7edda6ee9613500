"""Small sums: the operands, the ways to ask, the ways to answer."""

from __future__ import annotations

import random
from dataclasses import dataclass

_ZH_WORD = {"+": "加", "-": "减", "*": "乘"}
_EN_WORD = {"+": "plus", "-": "minus", "*": "times"}

_ASK_ZH = ("{e}等于多少？", "{e}=?", "计算{e}", "{z}等于几？", "请问{z}是多少？", "帮我算一下{e}", "{e}是多少？", "算一算：{e}")
_ASK_EN = ("What is {e}?", "{e}=", "Calculate {e}", "What is {w}?", "How much is {w}?", "Please compute {e}.")
_ASK_ZH_HELDOUT = ("你能算出{e}吗？", "{z}的结果是什么？")
_ASK_EN_HELDOUT = ("Can you calculate {e}?", "Tell me what {w} is.")


@dataclass(frozen=True)
class Sum:
    """One exercise with small whole numbers.

    Attributes:
        left: First operand.
        sign: One of + - *.
        right: Second operand.
    """

    left: int
    sign: str
    right: int

    @property
    def result(self) -> int:
        """The exact answer."""
        if self.sign == "+":
            return self.left + self.right
        return self.left - self.right if self.sign == "-" else self.left * self.right


def sample_sum(rng: random.Random) -> Sum:
    """Draw an exercise.

    Args:
        rng: Source of randomness.

    Returns:
        A sum with operands 0 to 20 (multiplication 0 to 9) and a result of at least 0. These are few enough to be
        learnt as facts; what is held out is how they are asked for.
    """
    sign = rng.choice("++--*")
    top = 9 if sign == "*" else rng.choice((10, 20))
    left, right = rng.randint(0, top), rng.randint(0, top)
    if sign == "-" and left < right:
        left, right = right, left
    return Sum(left, sign, right)


def ask(exercise: Sum, rng: random.Random, new_phrasing: bool) -> tuple[str, str]:
    """Phrase an exercise and its answer.

    Args:
        exercise: What to ask.
        rng: Source of randomness.
        new_phrasing: Use the phrasings that training never shows.

    Returns:
        Question and answer, both Chinese or both English.
    """
    left, sign, right = exercise.left, exercise.sign, exercise.right
    written = f"{left}{rng.choice(('×', '*')) if sign == '*' else sign}{right}"
    chinese = f"{left}{_ZH_WORD[sign]}{right}"
    english = f"{left} {_EN_WORD[sign]} {right}"
    if rng.random() < 0.6:
        frames: tuple[str, ...] = _ASK_ZH_HELDOUT if new_phrasing else _ASK_ZH
        answer = f"{left}{'×' if sign == '*' else sign}{right}={exercise.result}。"
    else:
        frames = _ASK_EN_HELDOUT if new_phrasing else _ASK_EN
        spaced = f"{left} {sign if sign != '*' else '×'} {right}"
        written = spaced if rng.random() < 0.5 else written
        answer = f"{left}{'×' if sign == '*' else sign}{right}={exercise.result}."
    question = rng.choice(frames).format(e=written, z=chinese, w=english)
    return question, answer
