"""The tour: chat with the built-in model, measure it, tune it on a new style, measure again. Offline, in minutes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from glmkit.data.records import Record, read_records
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import MissingDependencyError
from glmkit.evaluate.adgen import METRICS, evaluate_adgen
from glmkit.evaluate.results import read_rows
from glmkit.loading import Loaded, load
from glmkit.location import builtin
from glmkit.train.progress import Progress
from glmkit.train.run import finetune

_MODEL = "glm-nano"
_QUESTIONS = (
    "你好，你是谁？",
    "7加8等于多少？",
    "What is the capital of France?",
    "类型#裙*颜色#蓝色*风格#清新*材质#雪纺*裙长#长裙",
)
_SHOWN = 2  # answers side by side


def main(output: str = "quickstart") -> int:
    """Runs the tour and writes its results.

    Args:
        output: Folder for predictions, adapter, loss curve and report; a free name beside it if it exists.

    Returns:
        0.

    Raises:
        MissingDependencyError: The extras `train` or `evaluate` are not installed.
    """
    _require("peft", "train")
    _require("jieba", "evaluate")
    started = time.monotonic()
    folder = _free_folder(Path(output))
    data = builtin("data")
    records = read_records(data / "style_dev.jsonl")

    _heading(f"1. Chat with {_MODEL}, a small model that comes with this package")
    base = load(_MODEL)
    for question in _QUESTIONS:
        print(f"  you  {question}\n  nano {base.chat(question).text}")

    _heading(f"2. Measure it on {len(records)} records of a style that it has not learnt")
    before = _measure(base, records, folder / "before", "before")

    _heading("3. Teach it the style: LoRA on 240 records")
    result = finetune("quickstart", [f"data.train_file={data / 'style_train.jsonl'}", f"output.dir={folder / 'lora'}"])

    _heading("4. Measure again")
    after = _measure(load(_MODEL, adapter=result.result_dir), records, folder / "after", "after")

    seconds = time.monotonic() - started
    report = _report(records, before, after, result.steps, seconds)
    (folder / "report.md").write_text(report, encoding="utf-8")
    print(f"\n{report}")
    _heading("Next, with a real checkpoint")
    print(
        "  glm chat path/to/chatglm3-6b                   talk to it\n"
        "  glm inspect chatglm3-6b                        what memory it needs\n"
        "  glm finetune adgen_lora model.path=path/to/chatglm3-6b data.train_file=train.json output.dir=out\n"
        "  glm evaluate adgen --model path/to/chatglm3-6b --adapter out/adapter --data dev.json"
    )
    print(f"\nreport, loss curve, predictions and adapter: {folder}/", file=sys.stderr)
    return 0


def _measure(loaded: Loaded, records: list[Record], folder: Path, label: str) -> dict[str, Any]:
    with Progress(f"answering ({label})", len(records)) as bar:
        scores = evaluate_adgen(
            loaded.model,
            loaded.tokenizer,
            records,
            options=SamplingOptions(temperature=0.0),
            max_new_tokens=128,
            batch_size=20,
            output_dir=folder,
            progress=lambda done, _: bar.update(done),
        )
    return {"scores": scores, "predictions": [row["predict"] for row in read_rows(folder)]}


def _report(records: list[Record], before: dict[str, Any], after: dict[str, Any], steps: int, seconds: float) -> str:
    """The table of scores and some answers side by side, as Markdown that also reads well in a terminal."""
    lines = ["| | before | after |", "|---|---:|---:|"]
    for name in METRICS:
        scores = (run["scores"][f"predict_{name}"] for run in (before, after))
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in scores) + " |")
    for number in range(_SHOWN):
        record = records[number]
        lines += [
            f"\nasked:  {record.prompt[-1].content}",
            f"wanted: {record.answer}",
            f"before: {before['predictions'][number]}",
            f"after:  {after['predictions'][number]}",
        ]
    summary = f"{len(records)} held-out records, greedy decoding; {steps} LoRA steps; {seconds:.0f} s in all."
    return "\n".join([*lines, "", summary, ""])


def _require(package: str, extra: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MissingDependencyError(package, extra)


def _free_folder(wanted: Path) -> Path:
    number, folder = 1, wanted
    while folder.exists() and any(folder.iterdir()):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _heading(text: str) -> None:
    print(f"\n{text}", flush=True)
