"""ADGEN: write advertising copy from attribute lists, and score it as ChatGLM-6B's and ChatGLM2-6B's scripts do.

What differs on purpose: labels are whole, questions are shortened inside their text, and an empty text scores 0 and is
counted instead of raising. `preset="paper"` cuts as the official scripts do, for comparison with their figures:

    prompt    the first `source_tokens` ids of the whole prompt, so a long one loses the mark of the answer
    label     the first `max_new_tokens` - 2 ids of the text, decoded again (2 ids are the tokenizer's own)
    answer    source_tokens + max_new_tokens + 1 less the longest prompt of its 1,000 records: prompts are padded to
              that, and the length of a text counts the padding, too

Source: ptuning/main.py of ChatGLM-6B (since May 2023; before, up to 512 with the prompt) and ChatGLM2-6B (behaviour,
not code).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from glmkit.chat.official import decode_reply
from glmkit.chat.templates import FORMATS, prompt_ids
from glmkit.data.cutting import Limits, fit
from glmkit.data.records import Record, read_records
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import DataError, MissingDependencyError, UsageError
from glmkit.evaluate.results import Results
from glmkit.evaluate.rouge import bleu_4, rouge_l, rouge_n, words_of
from glmkit.evaluate.run import run
from glmkit.evaluate.tasks import Figure, Row, Settings, write_answers
from glmkit.loading import Loaded
from glmkit.writing import write_text_atomic

METRICS = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
OFFICIAL_RESULTS_FILE = "predict_results.json"
_ROWS_FILE = "generated_predictions.txt"
_NEW_TOKENS = 256
_PAPER_TOKENS = 64  # of the prompt, and of the answer: max_source_length and max_target_length of evaluate.sh
_OWN_IDS = 2  # that the official tokenizers put around a label
_PADDED_TOGETHER = 1000  # prompts: what `map` of Hugging Face's datasets gives the scripts at once


@dataclass(frozen=True)
class Asked:
    """A record as it is asked.

    Args:
        prompt: Ids of the prompt.
        label: The answer to compare with.
        max_new_tokens: Longest answer.
    """

    prompt: list[int]
    label: str
    max_new_tokens: int


class Adgen:
    """The task `adgen`; see `glmkit.evaluate.tasks.Task`.

    Args:
        read: Gives the records.
        options: How tokens are chosen.
        max_new_tokens: Longest answer in tokens; None: 256, for the paper 64.
        batch_size: Answers generated together.
        source_tokens: Longest prompt; None: whole, for the paper 64.
        paper: Whether to cut as the official scripts do.
    """

    name, rows_file = "adgen", _ROWS_FILE

    def __init__(
        self,
        read: Callable[[], Sequence[Record]],
        options: SamplingOptions,
        *,
        max_new_tokens: int | None = None,
        batch_size: int = 32,
        source_tokens: int | None = None,
        paper: bool = False,
    ) -> None:
        self.batch_size = batch_size
        self._read, self._options, self._paper = read, options, paper
        self._new_tokens = max_new_tokens or (_PAPER_TOKENS if paper else _NEW_TOKENS)
        self._source_tokens = source_tokens or (_PAPER_TOKENS if paper else None)
        self._asked: list[Asked] = []
        self._shortened = self._cut_labels = 0

    def items(self, loaded: Loaded) -> Sequence[Asked]:
        """Makes prompts of the records.

        Args:
            loaded: The model.

        Raises:
            DataError: Records are plain text, or the template alone is longer than `source_tokens`.
            UsageError: The paper's cutting is not known for this model.
            MissingDependencyError: jieba is not installed.
        """
        if find_spec("jieba") is None:  # before the answers are written, not after
            raise MissingDependencyError("jieba", "evaluate")
        tokenizer = chat_tokenizer(loaded)
        records = self._read()
        if not all(record.messages for record in records):
            raise DataError("the records hold plain text, which asks nothing", hint="give questions with their answers")
        self._shortened = self._cut_labels = 0
        ask = self._as_official if self._paper else self._whole
        self._asked = [ask(tokenizer, record) for record in records]
        if self._paper:
            self._asked = self._with_official_room(self._asked)
        return self._asked

    def answer(
        self, loaded: Loaded, items: Sequence[Asked], first: int, progress: Callable[[int], None] | None = None
    ) -> list[Row]:
        """Writes answers.

        Args:
            loaded: The model.
            items: A unit.
            first: Number of its first item.
            progress: Called with how many are done.

        Returns:
            `labels` and `predict` of each, as the official scripts call them.
        """
        tokenizer: Any = loaded.tokenizer
        answers = write_answers(
            loaded,
            [item.prompt for item in items],
            self._options,
            first,
            max_new_tokens=max(item.max_new_tokens for item in items),
            batch_size=self.batch_size,
            progress=progress,
        )
        texts = [answer_text(tokenizer, ids[: item.max_new_tokens]) for item, ids in zip(items, answers)]
        return [{"labels": item.label, "predict": text} for item, text in zip(items, texts)]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        """Scores the answers.

        Args:
            rows: All of them.

        Returns:
            bleu-4, rouge-1, rouge-2, rouge-l.

        Raises:
            DataError: The labels are not those of the records, so the file was changed.
        """
        for number, (item, row) in enumerate(zip(self._asked, rows), start=1):
            if row.get("labels") != item.label or not isinstance(row.get("predict"), str):
                raise DataError(
                    f"{_ROWS_FILE}:{number} holds no prediction for record {number} of this data",
                    hint="choose another output folder, or delete this file",
                )
        scores = [score_pair(row["predict"], row["labels"]) for row in rows]
        return [
            Figure(name, [0.0 if one is None else one[name] / 100 for one in scores])
            for name in sorted(METRICS)  # bleu-4 first: with rouge-2 it tells systems apart
        ]

    def notes(self, rows: Sequence[Row]) -> Mapping[str, Any]:
        """Counts what has no interval: empty texts, and what was cut.

        Args:
            rows: All of them.
        """
        empty = sum(not row["predict"].strip() or not row["labels"].strip() for row in rows)
        return {"empty": empty, "shortened": self._shortened, "labels_cut": self._cut_labels}

    def _whole(self, tokenizer: Any, record: Record) -> Asked:
        """The label whole, and the question shortened in its text if there is a limit."""
        asked = record
        if self._source_tokens is not None:
            try:
                asked = fit(tokenizer, record, Limits(source_tokens=self._source_tokens))[0]
            except DataError as error:
                hint = "raise data.max_source_length, or data.max_source_length=null"
                raise DataError(error.message, hint=hint) from None
        self._shortened += asked is not record
        return Asked(prompt_ids(tokenizer, asked.prompt), record.answer, self._new_tokens)

    def _as_official(self, tokenizer: Any, record: Record) -> Asked:
        """Prompt and label cut as the scripts of the tokenizer's generation do."""
        if tokenizer.generation not in (1, 2):
            raise UsageError(
                "evaluate.preset=paper cuts as the scripts of ChatGLM-6B and ChatGLM2-6B do; this model has none",
                hint="leave the preset out",
            )
        assert self._source_tokens is not None
        whole = prompt_ids(tokenizer, record.prompt)
        prompt = whole[: self._source_tokens]
        if tokenizer.generation == 1:  # what stands behind the text is put there after the cut
            behind = tokenizer.prefix_ids
            prompt = [*whole[: len(whole) - len(behind)][: self._source_tokens - len(behind)], *behind]
        label = tokenizer.encode_text(record.answer)
        kept = label[: max(0, self._new_tokens - _OWN_IDS)]
        self._shortened += len(prompt) < len(whole)
        self._cut_labels += len(kept) < len(label)
        return Asked(prompt, answer_text(tokenizer, kept), self._new_tokens)

    def _with_official_room(self, asked: Sequence[Asked]) -> list[Asked]:
        """Answers as long as the scripts let them be."""
        assert self._source_tokens is not None
        whole = self._source_tokens + self._new_tokens + 1
        found: list[Asked] = []
        for start in range(0, len(asked), _PADDED_TOGETHER):
            together = asked[start : start + _PADDED_TOGETHER]
            longest = max(len(one.prompt) for one in together)
            found += [replace(one, max_new_tokens=whole - longest) for one in together]
        return found


def make_adgen(data: str, how: Settings) -> Adgen:
    """Makes the task `adgen`.

    Args:
        data: File of records.
        how: batch_size, max_new_tokens, temperature, top_p, seed, limit, preset, columns, format, source_tokens.

    Returns:
        The task.

    Raises:
        UsageError: A setting is not known here.
    """
    how.only("adgen", "max_new_tokens", "temperature", "top_p", "seed", "preset", "columns", "format", "source_tokens")
    if how.preset not in (None, "paper"):
        raise UsageError(f"evaluate.preset={how.preset}, expected paper or nothing")
    return Adgen(
        lambda: read_asked(data, how),
        how.sampling,
        max_new_tokens=how.max_new_tokens,
        batch_size=how.batch_size,
        source_tokens=how.source_tokens,
        paper=how.preset == "paper",
    )


def read_asked(data: str, how: Settings) -> list[Record]:
    """Reads the records of a task, with the columns and the limit of its settings.

    Args:
        data: The file.
        how: Its columns, format and limit.

    Returns:
        The records.

    Raises:
        DataError: The file cannot be used.
    """
    return read_records(
        data,
        format=how.format,
        prompt_column=how.columns.get("prompt", "content"),
        response_column=how.columns.get("response", "summary"),
        history_column=how.columns.get("history"),
        limit=how.limit,
    )


def chat_tokenizer(loaded: Loaded) -> Any:
    """Gives the tokenizer of a model that chats.

    Args:
        loaded: The model.

    Raises:
        UsageError: It does not, or has no tokenizer.
    """
    if loaded.tokenizer is None or loaded.tokenizer.generation not in FORMATS:
        raise UsageError(
            f"{loaded.path} is no chat model, and questions are asked as in a chat",
            hint="choose a ChatGLM or GLM-4; a model that fills blanks takes a text with [MASK] in it: glm chat",
        )
    return loaded.tokenizer


def official_results(results: Results, folder: str | Path | None) -> dict[str, Any]:
    """Writes predict_results.json, as the official scripts do.

    Args:
        results: What has been measured.
        folder: Where it is written; None: nowhere.

    Returns:
        What it holds: predict_rouge-1, predict_rouge-2, predict_rouge-l, predict_bleu-4, predict_samples,
        predict_empty, predict_runtime (seconds), predict_samples_per_second.
    """
    found = {
        **{f"predict_{name}": round(results.figures[name].value or 0.0, 4) for name in METRICS},
        "predict_samples": results.items,
        "predict_empty": results.notes["empty"],
        "predict_runtime": round(results.seconds, 2),
        "predict_samples_per_second": results.items_per_second,
    }
    if folder is not None:
        write_text_atomic(Path(folder) / OFFICIAL_RESULTS_FILE, json.dumps(found, indent=4) + "\n")
    return found


def score(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Score predictions against labels.

    Args:
        predictions: Generated texts.
        labels: One reference for each.

    Returns:
        Means of rouge-1, rouge-2, rouge-l and bleu-4 in percent, of values rounded to 4 decimals per sample; and
        "empty", how many pairs scored 0 because one side has no text.

    Raises:
        UsageError: If the numbers of predictions and labels differ or are 0.
        MissingDependencyError: If jieba is not installed.
    """
    if len(predictions) != len(labels) or not predictions:
        raise UsageError(f"{len(predictions)} predictions and {len(labels)} labels: as many of each, at least one")
    rows = [score_pair(prediction, label) for prediction, label in zip(predictions, labels)]
    empty = sum(row is None for row in rows)
    means = {name: sum(row[name] for row in rows if row is not None) / len(rows) for name in METRICS}
    return {**means, "empty": empty}


def score_pair(prediction: str, label: str) -> dict[str, float] | None:
    """Score one prediction.

    Args:
        prediction: The generated text.
        label: Its reference.

    Returns:
        The four metrics in percent, rounded to 4 decimals; None if one side has no text.

    Raises:
        MissingDependencyError: If jieba is not installed.
    """
    found, wanted = words_of(" ".join(_segment(prediction))), words_of(" ".join(_segment(label)))
    if not found or not wanted:
        return None
    values = (rouge_n(found, wanted, 1), rouge_n(found, wanted, 2), rouge_l(found, wanted), bleu_4(prediction, label))
    return {name: round(value * 100, 4) for name, value in zip(METRICS, values)}


def evaluate_adgen(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    options: SamplingOptions,
    max_new_tokens: int = _NEW_TOKENS,
    batch_size: int = 32,
    output_dir: str | Path,
    progress: Callable[[int, int], None] | None = None,
    limit: int | None = None,
    identity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Generate an answer for every record, score them, and write both as the official scripts do.

    Predictions are written as they come, so a run that was cut continues where it stopped when called again with the
    same model, records, options and output folder.

    Args:
        model: The model, in eval mode.
        tokenizer: Its tokenizer.
        records: What to ask and the answers to compare with.
        options: How tokens are chosen; temperature 0 is greedy.
        max_new_tokens: Longest answer in tokens.
        batch_size: Answers generated together.
        output_dir: Folder for generated_predictions.txt (a line of JSON with labels and predict for each record),
            predict_results.json and results.json; evaluation.json beside them says what they belong to.
        progress: Called with the number of records done and of all records.
        limit: Use only the first records.
        identity: What else a continued run must have in common with the first, as plain values, for instance the names
            of model and adapter. Weights, config, records and options are compared in any case.

    Returns:
        What predict_results.json holds, see `official_results`.

    Raises:
        DataError: If the folder holds predictions of another model, or for other records or options.
    """
    loaded = Loaded(model, tokenizer, None, model.config, Path(str(model.config._name_or_path)))
    task = Adgen(lambda: records[:limit], options, max_new_tokens=max_new_tokens, batch_size=batch_size)
    settings = {"options": asdict(options), "max_new_tokens": max_new_tokens, "seed": options.seed}
    results = run(task, loaded, output_dir, settings=settings, identity=identity, progress=progress)
    return official_results(results, output_dir)


def answer_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Turn the ids of a plain answer into text.

    Args:
        tokenizer: The model's tokenizer.
        ids: What the model wrote, without the stop id.

    Returns:
        The text without the line that generation 3 puts in front of every answer, and without blanks around it. Ids
        that the model's vocabulary is padded with decode to nothing.
    """
    return decode_reply(tokenizer, ids).strip()


def _segment(text: str) -> list[str]:
    try:
        import jieba
    except ImportError:
        raise MissingDependencyError("jieba", "evaluate") from None
    jieba.setLogLevel(logging.WARNING)  # it reports the loading of its dictionary on stderr
    return list(jieba.cut(text))
