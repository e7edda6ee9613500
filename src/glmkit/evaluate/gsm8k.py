"""GSM8K: sums in words, answered step by step; what counts is the number at the end.

    examples, question -> the model writes -> the number behind "####" or "the answer is", or the last one -> equal?

Numbers are compared as numbers: 1,234.50 and $1234.5 are the same. Where the folder of the data has train.jsonl beside
test.jsonl the examples are its first rows, else those below, which are ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from glmkit.chat.official_replies import decode_reply
from glmkit.data.rows import Unreadable, read_rows
from glmkit.errors import DataError, UsageError
from glmkit.evaluate.asking import Asked, Form, fitted, form_of, open_ids
from glmkit.evaluate.tasks import Figure, Row, Settings, write_answers
from glmkit.loading import Loaded

_SHOTS = 8
_ANSWER_TOKENS = 512
_LEAST_ROOM = 64  # tokens for an answer; a prompt that leaves fewer loses examples
_CUE = "Answer:"

_NUMBER = r"-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\$?\.\d+"
_MARKED = re.compile(rf"####\s*({_NUMBER})")
_SAID = re.compile(rf"(?:answer is|答案[是为]?)\s*[:：]?\s*({_NUMBER})", re.IGNORECASE)
_ANY = re.compile(rf"(?<![\w.])({_NUMBER})")
_NEXT = re.compile(r"\n\s*Question:")  # where a base model goes on with a question of its own
_MARKS = re.compile(r"<<[^<>]*>>")

EXAMPLES: tuple[tuple[str, str], ...] = (
    (
        "A baker makes 5 trays of 12 rolls. 18 rolls are sold in the morning. How many rolls are left?",
        "The baker makes 5 * 12 = 60 rolls.\nAfter the morning 60 - 18 = 42 rolls are left.\n#### 42",
    ),
    (
        "Mina has 7 stamps. Her uncle gives her twice as many as she has. How many stamps does she have then?",
        "Her uncle gives her 2 * 7 = 14 stamps.\nThen she has 7 + 14 = 21 stamps.\n#### 21",
    ),
    (
        "A train ticket costs $15, and children pay half. What do 2 adults and 3 children pay together, in dollars?",
        "A child pays 15 / 2 = 7.5 dollars.\nThe adults pay 2 * 15 = 30 dollars.\n"
        "The children pay 3 * 7.5 = 22.5 dollars.\nTogether they pay 30 + 22.5 = 52.5 dollars.\n#### 52.5",
    ),
    (
        "A tank holds 240 litres and is a quarter full. A pump adds 20 litres a minute. "
        "After how many minutes is it full?",
        "There are 240 / 4 = 60 litres in the tank.\n240 - 60 = 180 litres are missing.\n"
        "The pump needs 180 / 20 = 9 minutes.\n#### 9",
    ),
    (
        "Tomas reads 14 pages a day on 5 days and 30 pages a day on the other 2 days of a week. "
        "How many pages is that?",
        "On the 5 days he reads 5 * 14 = 70 pages.\nOn the other 2 days he reads 2 * 30 = 60 pages.\n"
        "Together that is 70 + 60 = 130 pages.\n#### 130",
    ),
    (
        "A shirt costs $40. It gets 25% cheaper, and then there are $3 for shipping. "
        "What does it cost in all, in dollars?",
        "25% of 40 is 40 * 0.25 = 10 dollars.\nThe shirt costs 40 - 10 = 30 dollars.\n"
        "With shipping that is 30 + 3 = 33 dollars.\n#### 33",
    ),
    (
        "Four friends share 3 pizzas of 8 slices. Everyone eats 5 slices. How many slices are left?",
        "There are 3 * 8 = 24 slices.\nThe friends eat 4 * 5 = 20 slices.\n24 - 20 = 4 slices are left.\n#### 4",
    ),
    (
        "Ada is 6 years older than Bo. In 4 years their ages will add up to 40. How old is Bo now?",
        "In 4 years both are 4 years older, so now their ages add up to 40 - 2 * 4 = 32.\n"
        "Without the 6 years between them that is 32 - 6 = 26, which is twice Bo's age.\nBo is 26 / 2 = 13.\n#### 13",
    ),
)
"""What is shown in front of a question where there is no train.jsonl."""


@dataclass(frozen=True)
class Problem:
    """A sum in words.

    Args:
        question: The text.
        answer: How it is solved, with "#### number" at its end.
        where: File and line.
    """

    question: str
    answer: str
    where: str

    @property
    def number(self) -> Decimal:
        """What it comes to."""
        return _value(_MARKED.findall(self.answer)[-1])


@dataclass(frozen=True)
class GSM8K:
    """The task; see `glmkit.evaluate.tasks.Task` for its methods.

    Args:
        data: test.jsonl, or its folder.
        how: How it is answered.
    """

    data: str
    how: Settings
    name: str = "gsm8k"
    rows_file: str = "predictions.jsonl"

    @property
    def batch_size(self) -> int:
        return self.how.batch_size

    def items(self, loaded: Loaded) -> list[tuple[Problem, Asked]]:
        """The problems in the order of the file, with what is asked."""
        form_of(loaded, self.how.extra.get("prompt"))  # refused now, not after the data was read
        problems = read_problems(_file(self.data, "test.jsonl"))[: self.how.limit]
        shown, shots = self._examples(), self.how.shots
        if shots is not None and shots > len(shown):
            raise DataError(
                f"shots={shots}, and there are {len(shown)} examples", hint="put train.jsonl beside the data"
            )
        examples = tuple(
            (_question(question), answer) for question, answer in shown[: _SHOTS if shots is None else shots]
        )
        return [(problem, Asked(_question(problem.question), examples, joint=" ")) for problem in problems]

    def answer(
        self,
        loaded: Loaded,
        items: Sequence[tuple[Problem, Asked]],
        first: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[Row]:
        """What the model writes, and the number in it."""
        form = form_of(loaded, self.how.extra.get("prompt"))
        prompts = [self._prompt(loaded, form, asked) for _, asked in items]
        there = [ids for ids, _ in prompts if ids]
        written = iter(
            write_answers(
                loaded,
                there,
                self.how.sampling,
                first,
                max_new_tokens=self.how.max_new_tokens or _ANSWER_TOKENS,
                batch_size=self.batch_size,
                progress=progress,
            )
        )
        rows = []
        for number, ((problem, _), (ids, shots)) in enumerate(zip(items, prompts), start=first):
            text = _NEXT.split(_decoded(loaded.tokenizer, next(written)))[0].strip() if ids else ""
            found, marked = find_number(text)
            rows.append(
                {
                    "id": number,
                    "label": _plain(problem.number),
                    "answer": None if found is None else _plain(found),
                    "right": int(found == problem.number),
                    "marked": int(marked),
                    "shots": shots,
                    "asked": int(bool(ids)),
                    "prompt": form,
                    "predict": text,
                }
            )
        return rows

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        """Share of right numbers, and of those that stand behind "####" as in the examples."""
        right = [float(row["right"]) for row in rows]
        return [
            Figure("accuracy", right),
            Figure("accuracy (marked ####)", [one * row["marked"] for one, row in zip(right, rows)]),
        ]

    def notes(self, rows: Sequence[Row]) -> Mapping[str, Any]:
        """How it was asked, and how many answers have no number."""
        return {
            "prompt": sorted({row["prompt"] for row in rows}),
            "shots": {str(count): sum(row["shots"] == count for row in rows) for count in {r["shots"] for r in rows}},
            "examples": "train.jsonl" if self._train() else "glmkit's own",
            "no_number": sum(row["answer"] is None for row in rows),
            "too_long": sum(not row["asked"] for row in rows),
        }

    def _prompt(self, loaded: Loaded, form: Form, asked: Asked) -> tuple[list[int], int]:
        """Ids and how many examples are in them; no ids where the question alone leaves no room for an answer."""
        context = loaded.config.max_position_embeddings
        least = min(_LEAST_ROOM, self.how.max_new_tokens or _ANSWER_TOKENS)
        found = fitted(
            asked,
            lambda one: (open_ids(loaded.tokenizer, form, one), len(one.examples)),
            lambda one: context is None or len(one[0]) + least <= context,
        )
        return found or ([], 0)

    def _examples(self) -> Sequence[tuple[str, str]]:
        train = self._train()
        if train is None:
            return EXAMPLES
        return [(problem.question, _MARKS.sub("", problem.answer)) for problem in read_problems(train)]

    def _train(self) -> Path | None:
        train = _file(self.data, "test.jsonl").parent / "train.jsonl"
        return train if train.is_file() and train != Path(self.data) else None


def make_gsm8k(data: str, how: Settings) -> GSM8K:
    """Makes the task `gsm8k`.

    Args:
        data: test.jsonl, or its folder.
        how: batch_size, limit, shots (None: 8), max_new_tokens (None: 512), temperature, top_p, seed; and in `extra`
            "prompt" ("chat" or "text", see `glmkit.evaluate.asking.form_of`).

    Returns:
        The task.

    Raises:
        UsageError: A setting is not known here.
    """
    how.only("gsm8k", "shots", "max_new_tokens", "temperature", "top_p", "seed", "extra")
    if how.shots is not None and how.shots < 0:
        raise UsageError(f"shots={how.shots}: expected 0 or more")
    unknown = set(how.extra) - {"prompt"}
    if unknown:
        raise UsageError(f"the task gsm8k has no setting {', '.join(sorted(unknown))}")
    return GSM8K(data, how)


def read_problems(path: str | Path) -> list[Problem]:
    """Reads problems.

    Args:
        path: A file with question and answer in each row, such as test.jsonl.

    Returns:
        The problems.

    Raises:
        DataError: There are none, or a row is none; the message names its line.
    """
    problems = []
    for where, row in read_rows(Path(path)):
        if isinstance(row, Unreadable):
            raise DataError(f"{where}: {row.reason}")
        question, answer = (row.get("question"), row.get("answer")) if isinstance(row, dict) else (None, None)
        if not isinstance(question, str) or not isinstance(answer, str):
            raise DataError(f"{where} is no problem; expected question and answer as texts")
        if not _MARKED.search(answer):
            raise DataError(f"{where} has an answer without its number; expected '#### number' at the end")
        problems.append(Problem(question, answer, where))
    if not problems:
        raise DataError(f"{path} has no problems")
    return problems


def find_number(text: str) -> tuple[Decimal | None, bool]:
    """Finds the number that an answer comes to.

    Args:
        text: What a model wrote.

    Returns:
        The number behind the first "####"; else behind the last "the answer is"; else the last number; None if there
        is none. And whether it stood behind "####".
    """
    marked = _MARKED.search(text)
    if marked:
        return _value(marked[1]), True
    said = _SAID.findall(text) or _ANY.findall(_MARKS.sub("", text))
    return (_value(said[-1]) if said else None), False


def _value(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("$", ""))


def _plain(number: Decimal) -> str:
    return f"{number.normalize():f}"


def _question(text: str) -> str:
    return f"Question: {text.strip()}\n{_CUE}"


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    if tokenizer.generation == 0:
        return str(tokenizer.decode_ids(list(ids)))
    return decode_reply(tokenizer, ids)


def _file(data: str, name: str) -> Path:
    path = Path(data)
    return path / name if path.is_dir() else path
