"""C-Eval, CMMLU and MMLU: questions with the options A to D.

    likelihood          examples, question, "Answer:" -> of the four letters, the one that is most likely to come next
    chain-of-thought    the question alone -> the model writes what it thinks -> question, thoughts and
                        "综上所述，ABCD中正确的选项是：" as a new question -> the likeliest letter again

The first is how base models are measured everywhere; the second is what evaluation/evaluate_ceval.py of ChatGLM2-6B
does (behaviour, not code). What differs there: a prompt that is too long loses the beginning of the thoughts, where the
script cuts the end, and with it the words that ask for the letter; and blanks around the thoughts are taken off.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glmkit.chat.official_replies import decode_reply
from glmkit.errors import DataError, GenerationError, UsageError
from glmkit.evaluate import subjects
from glmkit.evaluate.asking import Asked, Form, fitted, form_of, letter_ids, open_ids
from glmkit.evaluate.choice_data import LETTERS, Question, read_exam
from glmkit.evaluate.scoring import Frame, Passage, score_passages
from glmkit.evaluate.subjects import Subject
from glmkit.evaluate.tasks import Figure, Row, Settings, write_answers
from glmkit.loading import Loaded

METHODS = ("likelihood", "chain-of-thought")
_SHOTS = 5  # what the three benchmarks publish, where examples are at hand
_THOUGHT_TOKENS = 512  # as in the official script
_CHINESE_CONCLUSION = "综上所述，ABCD中正确的选项是："


@dataclass(frozen=True)
class Benchmark:
    """What is the same for all models.

    Args:
        name: As it is called in `glm evaluate NAME`.
        subjects: Its subjects by the names of their files.
        split: What is measured: the part with public answers.
        opening: What stands in front of everything, with {title} of the subject.
        cue: What asks for the letter, behind the options.
        joint: What stands between the cue and the letter in a text.
        conclusion: What asks for the letter behind thoughts.
    """

    name: str
    subjects: Mapping[str, Subject]
    split: str
    opening: str
    cue: str
    joint: str
    conclusion: str


CEVAL = Benchmark(
    "ceval",
    subjects.CEVAL,
    "val",
    "以下是中国关于{title}考试的单项选择题，请选出其中的正确答案。",
    "答案：",
    "",
    _CHINESE_CONCLUSION,
)
CMMLU = Benchmark(
    "cmmlu",
    subjects.CMMLU,
    "test",
    "以下是关于{title}的单项选择题，请直接给出正确答案的选项。",
    "答案是：",
    "",
    _CHINESE_CONCLUSION,
)
MMLU = Benchmark(
    "mmlu",
    subjects.MMLU,
    "test",
    "The following are multiple choice questions (with answers) about {title}.",
    "Answer:",
    " ",
    "In conclusion, the correct option among A, B, C and D is:",
)


@dataclass(frozen=True)
class Item:
    """A question, and the examples of its subject that may be shown in front of it."""

    question: Question
    examples: tuple[Question, ...]


@dataclass(frozen=True)
class Prompt:
    """What is read before a letter is chosen: its ids, those of the letters, and how many examples are in it."""

    ids: list[int]
    letters: list[int]
    shots: int


@dataclass(frozen=True)
class Choice:
    """One of the three as a task; see `glmkit.evaluate.tasks.Task` for its methods.

    Args:
        benchmark: Which.
        data: Its folder, zip or file.
        how: How it is answered.
    """

    benchmark: Benchmark
    data: str
    how: Settings
    rows_file: str = "predictions.jsonl"

    @property
    def name(self) -> str:
        return self.benchmark.name

    @property
    def batch_size(self) -> int:
        return self.how.batch_size

    @property
    def method(self) -> str:
        return self.how.method or METHODS[0]

    def items(self, loaded: Loaded) -> list[Item]:
        """The questions in the order of their subjects' names."""
        form = form_of(loaded, self.how.extra.get("prompt"))
        if self.method == METHODS[1] and form != "chat":
            raise UsageError(
                f"method=chain-of-thought asks in the way of a chat, and this model is asked as {form}",
                hint="use method=likelihood, or a chat model",
            )
        exam = read_exam(self.data, self.how.extra.get("split", self.benchmark.split))
        wanted = self._wanted([question.subject for question in exam.questions])
        questions = [question for question in exam.questions if question.subject in wanted]
        shots = 0 if self.method == METHODS[1] else self.how.shots
        items = []
        for question in questions[: self.how.limit]:
            examples = exam.examples.get(question.subject, [])
            if shots is not None and shots > len(examples):
                raise DataError(
                    f"shots={shots}, and {self.data} has {len(examples)} examples of {question.subject}",
                    hint="give the folder that has dev beside the questions, or fewer shots",
                )
            items.append(Item(question, tuple(examples[: _SHOTS if shots is None else shots])))
        return items

    def answer(
        self, loaded: Loaded, items: Sequence[Item], first: int, progress: Callable[[int], None] | None = None
    ) -> list[Row]:
        """The letters that a model chooses."""
        form = form_of(loaded, self.how.extra.get("prompt"))
        thoughts: list[str | None] = [None] * len(items)
        if self.method == METHODS[1]:
            thoughts = self._think(loaded, items, first, progress)
            progress = None  # the rest is quick
        room = loaded.config.max_position_embeddings
        prompts = [self._prompt(loaded, form, item, said, room) for item, said in zip(items, thoughts)]
        chosen = _letter_logs(loaded.model, prompts, self.batch_size, progress)
        rows = []
        for item, said, prompt, logs in zip(items, thoughts, prompts, chosen):
            question = item.question
            answer = LETTERS[max(range(len(logs)), key=logs.__getitem__)] if logs else None
            row: Row = {
                "id": f"{question.subject}/{question.number}",
                "subject": question.subject,
                "category": self._category(question),
                "label": LETTERS[question.answer],
                "answer": answer,
                "right": int(answer == LETTERS[question.answer]),
                "logprobs": [round(log, 5) for log in logs],
                "shots": 0 if prompt is None else prompt.shots,
                "prompt": form,
            }
            rows.append(row if said is None else {**row, "thoughts": said})
        return rows

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        """Accuracy over all questions, and as the mean of subjects, of categories and over marked subjects."""
        right = [float(row["right"]) for row in rows]
        found = [Figure("accuracy", right)]
        for name in ("subject", "category"):
            found.append(Figure(f"accuracy by {name}", right, groups=[row[name] for row in rows]))
        known = self.benchmark.subjects
        for mark in sorted({mark for subject in known.values() for mark in subject.marks}):
            marked = [float(row["subject"] in known and mark in known[row["subject"]].marks) for row in rows]
            if any(marked):
                found.append(Figure(f"accuracy ({mark})", [a * b for a, b in zip(right, marked)], weights=marked))
        return found

    def notes(self, rows: Sequence[Row]) -> Mapping[str, Any]:
        """How it was asked, how many prompts were too long, and how likely a letter was at all."""
        answered = [row for row in rows if row["answer"] is not None]
        likely = [math.fsum(map(math.exp, row["logprobs"])) for row in answered]
        return {
            "method": self.method,
            "prompt": sorted({row["prompt"] for row in rows}),
            "shots": {str(count): sum(row["shots"] == count for row in rows) for count in {r["shots"] for r in rows}},
            "too_long": len(rows) - len(answered),
            "chosen": {letter: sum(row["answer"] == letter for row in rows) for letter in LETTERS},
            "probability_of_a_letter": round(math.fsum(likely) / len(likely), 4) if likely else 0.0,
        }

    def _wanted(self, there: Sequence[str]) -> set[str]:
        """The subjects that were asked for, by their names or categories."""
        names = set(there)
        if not self.how.subjects:
            return names
        categories = {name: self.benchmark.subjects[name].category for name in names & set(self.benchmark.subjects)}
        found: set[str] = set()
        for wanted in ",".join(self.how.subjects).split(","):  # typed as one word or as several
            plain = wanted.strip().lower().replace(" ", "_")
            these = {name for name in names if name.lower() == plain}
            these |= {name for name, category in categories.items() if category.lower().replace(" ", "_") == plain}
            if not these:
                close = difflib.get_close_matches(plain, [*names, *categories.values()], n=1)
                raise UsageError(
                    f"{self.data} has no subject {wanted!r}",
                    hint=f"did you mean {close[0]}?" if close else f"it has {', '.join(sorted(names)[:8])} …",
                )
            found |= these
        return found

    def _category(self, question: Question) -> str:
        known = self.benchmark.subjects.get(question.subject)
        return known.category if known else question.category or "unknown"

    def _prompt(self, loaded: Loaded, form: Form, item: Item, thoughts: str | None, room: int | None) -> Prompt | None:
        """What a letter is chosen behind, cut to the model's context; None where that cannot be done."""

        def made(asked: Asked) -> Prompt:
            return Prompt(*letter_ids(loaded.tokenizer, form, asked, LETTERS), len(asked.examples))

        if thoughts is None:
            return fitted(self._asked(item), made, lambda prompt: room is None or len(prompt.ids) <= room)
        while True:
            prompt = made(Asked(f"{item.question.text}{thoughts}\n{self.benchmark.conclusion}"))
            over = 0 if room is None else len(prompt.ids) - room
            if over <= 0:
                return prompt
            if not thoughts:
                return None
            thoughts = thoughts[over:]  # a token is about a character; where it is less, once more

    def _asked(self, item: Item) -> Asked:
        """The question with all of its examples."""
        subject, cue = item.question.subject, self.benchmark.cue
        known = self.benchmark.subjects.get(subject)
        return Asked(
            f"{item.question.text}\n{cue}",
            tuple((f"{one.text}\n{cue}", LETTERS[one.answer]) for one in item.examples),
            self.benchmark.opening.format(title=known.title if known else subject.replace("_", " ")),
            self.benchmark.joint,
        )

    def _think(
        self, loaded: Loaded, items: Sequence[Item], first: int, progress: Callable[[int], None] | None
    ) -> list[str | None]:
        """What the model writes about each question; nothing where the question fills its context."""
        tokenizer: Any = loaded.tokenizer
        prompts = [open_ids(tokenizer, "chat", Asked(item.question.text)) for item in items]
        room = loaded.config.max_position_embeddings
        fitting = [number for number, ids in enumerate(prompts) if room is None or len(ids) < room]
        answers = write_answers(
            loaded,
            [prompts[number] for number in fitting],
            self.how.sampling,
            first,
            max_new_tokens=self.how.max_new_tokens or _THOUGHT_TOKENS,
            batch_size=self.batch_size,
            progress=progress,
        )
        said: list[str | None] = [""] * len(items)
        for number, ids in zip(fitting, answers):
            said[number] = decode_reply(tokenizer, ids).strip()
        return said


def make_ceval(data: str, how: Settings) -> Choice:
    """Makes the task `ceval`; its questions are those of val, whose answers are public.

    Args:
        data: Folder, zip or file; see `glmkit.evaluate.choice_data`.
        how: batch_size, limit, method, subjects (or categories), shots (likelihood; None: 5 where the data has
            examples), max_new_tokens, temperature, top_p and seed (chain of thought); and in `extra` "prompt" ("chat"
            or "text", see `glmkit.evaluate.asking.form_of`) and "split" ("val" or "test").

    Returns:
        The task.

    Raises:
        UsageError: A setting is not known here, or not with this method.
    """
    return _make(CEVAL, data, how)


def make_cmmlu(data: str, how: Settings) -> Choice:
    """Makes the task `cmmlu`.

    Args:
        data: As in `make_ceval`.
        how: Likewise.

    Returns:
        The task.

    Raises:
        UsageError: A setting is not known here, or not with this method.
    """
    return _make(CMMLU, data, how)


def make_mmlu(data: str, how: Settings) -> Choice:
    """Makes the task `mmlu`.

    Args:
        data: As in `make_ceval`.
        how: Likewise.

    Returns:
        The task.

    Raises:
        UsageError: A setting is not known here, or not with this method.
    """
    return _make(MMLU, data, how)


def _make(benchmark: Benchmark, data: str, how: Settings) -> Choice:
    sampling = ("max_new_tokens", "temperature", "top_p", "seed")
    if how.method not in (None, *METHODS):
        raise UsageError(f"method={how.method!r}: expected {' or '.join(METHODS)}")
    own = sampling if how.method == METHODS[1] else ("shots",)
    how.only(benchmark.name, "method", "subjects", "extra", *own)
    if how.shots is not None and how.shots < 0:
        raise UsageError(f"shots={how.shots}: expected 0 or more")
    unknown = set(how.extra) - {"prompt", "split"}
    if unknown:
        raise UsageError(f"the task {benchmark.name} has no setting {', '.join(sorted(unknown))}")
    if how.extra.get("split", benchmark.split) not in ("val", "test"):
        raise UsageError(f"split={how.extra['split']!r}: expected val or test")
    return Choice(benchmark, data, how)


def _letter_logs(
    model: Any, prompts: Sequence[Prompt | None], batch_size: int, progress: Callable[[int], None] | None
) -> list[list[float]]:
    """The log-probability of each letter, for each prompt; nothing where there is none."""
    there = [prompt for prompt in prompts if prompt is not None]
    scored = score_passages(
        model,
        Frame(),
        [Passage(prompt.ids, [letter]) for prompt in there for letter in prompt.letters],
        batch_size=batch_size,
        progress=None if progress is None else lambda done: progress(done // len(LETTERS)),
    )
    logs = [one.log_probabilities[0] for one in scored]
    if not all(map(math.isfinite, logs)):
        raise GenerationError("the model's logits are not finite", hint="load it with dtype bfloat16 or float32")
    found = iter([logs[start : start + len(LETTERS)] for start in range(0, len(logs), len(LETTERS))])
    return [[] if prompt is None else next(found) for prompt in prompts]
