"""ADGEN: write advertising copy from attribute lists, and score it as ChatGLM-6B's and ChatGLM2-6B's scripts do.

Source: the metric recipe of ptuning/main.py of ChatGLM-6B and ChatGLM2-6B. What differs on purpose: labels are whole
(the official script cuts them to the target length), and an empty text scores 0 and is counted instead of raising.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from glmkit.chat.official import decode_reply
from glmkit.chat.templates import prompt_ids
from glmkit.data.records import Record
from glmkit.engine.decode import generate_batch
from glmkit.engine.sampling import SamplingOptions, row_seed
from glmkit.errors import DataError, MissingDependencyError, UsageError
from glmkit.evaluate.rouge import bleu_4, rouge_l, rouge_n, words_of
from glmkit.writing import write_text_atomic

METRICS = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
_PREDICTIONS_FILE = "generated_predictions.txt"
_IDENTITY_FILE = "evaluation.json"
_HASHED_NUMBERS = 64  # of each tensor; a model that was trained or merged differs in the first ones too
_BATCHES_PER_CHUNK = 8


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
    max_new_tokens: int = 256,
    batch_size: int = 8,
    output_dir: str | Path,
    progress: Callable[[int, int], None] | None = None,
    limit: int | None = None,
    identity: Mapping[str, Any] | None = None,
) -> dict[str, float]:
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
        output_dir: Folder for generated_predictions.txt (a line of JSON with labels and predict for each record) and
            predict_results.json; evaluation.json beside them says what they belong to.
        progress: Called with the number of records done and of all records.
        limit: Use only the first records.
        identity: What else a continued run must have in common with the first, as plain values, for instance the names
            of model and adapter. Weights, config, records and options are compared in any case.

    Returns:
        What predict_results.json holds: predict_rouge-1, predict_rouge-2, predict_rouge-l, predict_bleu-4,
        predict_samples, predict_empty, predict_runtime (seconds, of this call), predict_samples_per_second.

    Raises:
        DataError: If the folder holds predictions of another model, or for other records or options.
    """
    records = records[:limit]
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    file = output_dir / _PREDICTIONS_FILE
    own = {
        "weights": _weights_hash(model),
        "records": _records_hash(records),
        "options": asdict(options),
        "max_new_tokens": max_new_tokens,
    }
    _check_identity(output_dir, {**(identity or {}), **own})
    predictions = _earlier_predictions(file, records, batch_size * _BATCHES_PER_CHUNK)
    already = len(predictions)
    started = time.monotonic()
    # Chunks of several batches: long enough to sort by length, short enough to lose little when cut.
    chunk = batch_size * _BATCHES_PER_CHUNK
    with open(file, "a", encoding="utf-8") as lines:
        for start in range(already, len(records), chunk):
            members = records[start : start + chunk]
            answers = generate_batch(
                model,
                [prompt_ids(tokenizer, record.prompt) for record in members],
                options if options.seed is None else replace(options, seed=row_seed(options.seed, start)),
                stop_ids=tokenizer.stop_ids,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                progress=None if progress is None else _shifted(progress, start, len(records)),
            )
            for record, ids in zip(members, answers):
                predictions.append(answer_text(tokenizer, ids))
                row = {"labels": record.answer, "predict": predictions[-1]}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            lines.flush()
    seconds = time.monotonic() - started
    scores = score(predictions, [record.answer for record in records])
    results = {
        **{f"predict_{name}": round(scores[name], 4) for name in METRICS},
        "predict_samples": len(records),
        "predict_empty": int(scores["empty"]),
        "predict_runtime": round(seconds, 2),
        "predict_samples_per_second": round((len(records) - already) / seconds, 3) if seconds > 0 else 0.0,
    }
    (output_dir / "predict_results.json").write_text(json.dumps(results, indent=4) + "\n")
    return results


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


def _check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Note what the predictions in a folder belong to, or compare it with what was noted."""
    file = folder / _IDENTITY_FILE
    now = json.loads(json.dumps(identity, default=str))
    if not (folder / _PREDICTIONS_FILE).exists():
        write_text_atomic(file, json.dumps(now, ensure_ascii=False, indent=1) + "\n")
        return
    try:
        before = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise DataError(
            f"{folder} holds predictions, and no {_IDENTITY_FILE} that says of which model",
            hint="choose another output folder",
        ) from None
    differences = [
        f"  - {key}: {before.get(key)!r} then, {now.get(key)!r} now"
        for key in dict.fromkeys([*now, *before])
        if before.get(key) != now.get(key)
    ]
    if differences:
        raise DataError(
            f"the predictions in {folder} were made differently ({_IDENTITY_FILE}):\n" + "\n".join(differences),
            hint="choose another output folder",
        )


def _records_hash(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([asdict(message) for message in record.messages]).encode())
    return digest.hexdigest()[:16]


def _weights_hash(model: Any) -> str:
    """Stands for config and weights: names, sizes, dtypes and the first numbers of all tensors, so no long reading."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        first = tensor.detach().reshape(-1)[:_HASHED_NUMBERS].cpu()
        digest.update(first.contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(model.config.to_json_string().encode())
    return digest.hexdigest()[:16]


def _earlier_predictions(file: Path, records: Sequence[Record], chunk: int) -> list[str]:
    """Read what an earlier, cut run has written for these records, without a last chunk that is not whole.

    Whole chunks only, so that a seed gives the same answers whether the run was cut or not.
    """
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    if len(lines) < len(records):
        lines = lines[: len(lines) - len(lines) % chunk]
    predictions = []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            label, prediction = row["labels"], str(row["predict"])
        except (ValueError, KeyError, TypeError):
            label = prediction = None
        if prediction is None or number >= len(records) or label != records[number].answer:
            raise DataError(
                f"{file}:{number + 1} holds no prediction for record {number + 1} of this data",
                hint="choose another output folder, or delete this file",
            )
        predictions.append(prediction)
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return predictions


def _shifted(progress: Callable[[int, int], None], start: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: progress(start + done, total)


def _segment(text: str) -> list[str]:
    try:
        import jieba
    except ImportError:
        raise MissingDependencyError("jieba", "evaluate") from None
    jieba.setLogLevel(logging.WARNING)  # it reports the loading of its dictionary on stderr
    return list(jieba.cut(text))
