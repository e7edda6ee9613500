"""Answers every row of a file, in batches: questions in, the same rows with `predict` out, in their order.

    {"prompt": q}  {"content": q}  {"instruction": q, "input": …}  {"messages": […]}  {"conversations": […]}

What a row looks like is what `glmkit.data.formats` knows; the answer at its end may be missing, and the model does not
see it. Shared, written and continued as the answers of an evaluation are (`glmkit.evaluate.run`): parts lie in
OUTPUT.parts until all rows are there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from glmkit.chat.context import fit_context
from glmkit.chat.messages import Message
from glmkit.chat.reply import parse_reply
from glmkit.data.formats import Columns, formats, read_dialogue, recognise
from glmkit.data.rows import Unreadable, read_rows
from glmkit.errors import ContextLengthError, DataError, OutputError, UsageError
from glmkit.evaluate.adgen import answer_text, chat_tokenizer
from glmkit.evaluate.run import answer_items, weights_hash
from glmkit.evaluate.tasks import Figure, Row, Settings, write_answers
from glmkit.loading import Loaded
from glmkit.parallel import Ranks

_NEW_TOKENS = 512
_ANSWER = "-"  # stands where the answer would be, so that a question is read as a whole record is
_SHOWN_PROBLEMS = 5
_ROWS = 'a row is {"prompt": …}, {"content": …}, {"messages": […]}; --prompt-column names another field'


@dataclass(frozen=True)
class Predicted:
    """What became of a file.

    Args:
        rows: How many there are.
        answered: How many this call has answered, in all processes.
        problems: How many have none, because the model's context is too short for them.
        seconds: What the answers of this call took.
    """

    rows: int
    answered: int
    problems: int
    seconds: float


def predict(
    loaded: Loaded,
    source: str | Path,
    target: str | Path,
    how: Settings,
    *,
    ranks: Ranks | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Predicted:
    """Answers the rows of a file. A call that was cut goes on when it is made again.

    Args:
        loaded: The model.
        source: JSON Lines, a JSON array, CSV or Parquet.
        target: The file of JSON Lines to write: each row of the source with `predict` (the text), `call` (name and
            arguments, if a tool is called), or `problem` (why there is no answer, `predict` is null then).
        how: batch_size, max_new_tokens (512), temperature, top_p, seed, limit, columns, format.
        ranks: The processes of this run; None: this one alone.
        overwrite: Whether a target that exists is replaced.
        progress: Called with how many rows are done, and how many this process will have seen at the end.

    Returns:
        How many rows were answered, and how fast.

    Raises:
        OutputError: The target exists.
        DataError: The source cannot be used, or OUTPUT.parts holds answers that were made otherwise.
        UsageError: The model does not chat, or a setting is not known here.
    """
    target, ranks = Path(target), ranks or Ranks(0, 1, loaded.device)
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists", hint="choose another name, or --overwrite")
    task = _Predict(str(source), how)
    items = task.items(loaded)[: how.limit]
    parts = target.with_name(target.name + ".parts")
    identity = {
        "weights": weights_hash(loaded.model),
        **{name: getattr(how, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")},
    }
    rows_file = parts / "rows.jsonl"
    found = answer_items(
        task, loaded, items, parts, rows_file=rows_file, identity=identity, ranks=ranks, progress=progress
    )
    if ranks.rank == 0:
        try:
            os.replace(rows_file, target)
        except OSError as error:
            raise OutputError(
                f"cannot write {target}: {error.strerror}", hint=f"the rows are in {rows_file}"
            ) from error
        shutil.rmtree(parts, ignore_errors=True)
    problems = sum(row["predict"] is None for row in found.rows)
    return Predicted(len(items), len(items) - found.before, problems, found.seconds)


@dataclass(frozen=True)
class _Question:
    """A row and what is asked of it: the ids of a prompt, or why it cannot be asked."""

    row: Mapping[str, Any]
    prompt: list[int]
    problem: str = ""


class _Predict:
    """Answers questions; nothing is measured."""

    name, rows_file = "predict", "rows.jsonl"

    def __init__(self, source: str, how: Settings) -> None:
        how.only("predict", "max_new_tokens", "temperature", "top_p", "seed", "columns", "format")
        self.batch_size = how.batch_size
        self._source, self._how = source, how
        self._new_tokens = how.max_new_tokens or _NEW_TOKENS

    def items(self, loaded: Loaded) -> list[_Question]:
        """Reads the rows and makes prompts of them."""
        chat_tokenizer(loaded)
        questions: list[_Question] = []
        problems: list[str] = []
        for where, row in islice(read_rows(Path(self._source)), self._how.limit):
            try:
                if isinstance(row, Unreadable):
                    raise DataError(row.reason)
                messages = read_question(row, self._how)
                questions.append(self._question(loaded, _as_json(row), messages))
            except DataError as error:
                problems.append(f"{where}: {error.message}")
        if problems:
            shown = "\n".join(f"  - {problem}" for problem in problems[:_SHOWN_PROBLEMS])
            raise DataError(
                f"{len(problems)} of {len(problems) + len(questions)} rows of {self._source} cannot be asked:\n{shown}",
                hint=_ROWS,
            )
        if not questions:
            raise DataError(f"{self._source} has no rows", hint=_ROWS)
        return questions

    def _question(self, loaded: Loaded, row: Mapping[str, Any], messages: Sequence[Message]) -> _Question:
        context = loaded.config.max_position_embeddings
        reserve = min(self._new_tokens, context // 2)
        try:
            return _Question(row, fit_context(loaded.tokenizer, messages, context, reserve)[0])
        except ContextLengthError as error:
            return _Question(row, [], error.message)
        except UsageError as error:  # messages that this generation has no form for
            raise DataError(error.message) from None

    def answer(
        self, loaded: Loaded, items: Sequence[_Question], first: int, progress: Callable[[int], None] | None = None
    ) -> list[Row]:
        """Writes the answers."""
        tokenizer: Any = loaded.tokenizer
        asked = [number for number, item in enumerate(items) if not item.problem]
        answers = write_answers(
            loaded,
            [items[number].prompt for number in asked],
            self._how.sampling,
            first,
            max_new_tokens=self._new_tokens,
            batch_size=self.batch_size,
            progress=progress,
        )
        written = dict(zip(asked, answers))
        return [self._row(tokenizer, item, written.get(number)) for number, item in enumerate(items)]

    def _row(self, tokenizer: Any, item: _Question, ids: Sequence[int] | None) -> Row:
        if ids is None:
            return {**item.row, "predict": None, "problem": item.problem}
        row = {**item.row, "predict": answer_text(tokenizer, ids)}
        call = parse_reply(tokenizer, ids).call
        return row if call is None else {**row, "call": {"name": call.name, "arguments": call.arguments}}

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        """None."""
        return []

    def notes(self, rows: Sequence[Row]) -> Mapping[str, Any]:
        """None."""
        return {}


def _as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with values that JSON has: times of Parquet files become text."""

    def text(value: Any) -> str:
        if isinstance(value, (date, time, Decimal)):
            return str(value)
        raise DataError(f"a field holds {type(value).__name__}, which JSON has no form for")

    return dict(json.loads(json.dumps(row, default=text)))


def read_question(row: Any, how: Settings) -> tuple[Message, ...]:
    """Reads what a row asks.

    Args:
        row: What the file holds.
        how: Its columns and format.

    Returns:
        The messages before the answer.

    Raises:
        DataError: It is no question in a form that is known.
    """
    columns = Columns(
        how.columns.get("prompt", "content"), how.columns.get("response", "summary"), how.columns.get("history")
    )
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be a JSON object, this is {type(row).__name__}")
    filled = dict(row)
    for asked, answer in ((columns.prompt, columns.response), ("prompt", "response"), ("instruction", "output")):
        if asked in filled and not filled.get(answer):
            filled[answer] = _ANSWER
    for key in ("messages", "conversations"):
        turns = filled.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
            name, text, own = ("from", "value", "gpt") if "from" in turns[-1] else ("role", "content", "assistant")
            if turns[-1].get(name) != own:
                filled[key] = [*turns, {name: own, text: _ANSWER}]
    known = formats(columns)
    name = recognise(filled, columns) if how.format == "auto" else how.format
    if name not in known:
        raise UsageError(f"there is no data format {name!r}; known are auto, {', '.join(known)}")
    dialogue = read_dialogue(known[name], filled)
    if not dialogue.messages:
        raise DataError("field 'text' is plain text, which asks nothing")
    return tuple(dialogue.messages[:-1])
