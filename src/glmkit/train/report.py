"""The report of a run: the loss curve as a picture, and a page with what was done and what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from glmkit.data.examples import Example, TruncationReport
from glmkit.train.arguments import Recipe
from glmkit.train.loop import TrainingResult


def write_report(
    result: TrainingResult, recipe: Recipe, examples: Sequence[Example], cuts: TruncationReport, *, finished: str
) -> Path:
    """Write report.md and, if matplotlib is installed, loss.png into the output folder.

    Args:
        result: What the run gave.
        recipe: What was asked for.
        examples: What was learnt.
        cuts: What the length limits did.
        finished: When the run ended, as text.

    Returns:
        The path of report.md.
    """
    picture = plot_loss(result.metrics, result.output_dir / "loss.png") if result.metrics else False
    tokens = sum(len(example.input_ids) for example in examples)
    label_tokens = sum(example.label_tokens for example in examples)
    speeds = sorted(line["tokens_per_second"] for line in result.metrics)
    rows = [
        ("finished", finished + (" (stopped early; --resume continues)" if result.interrupted else "")),
        ("model", recipe.model.path or "new, sizes below"),
        ("method", recipe.method.name),
        ("training data", f"{recipe.data.train_file}: {cuts}"),
        ("tokens in the data", f"{tokens:,}, {label_tokens:,} of them labels"),
        ("optimizer steps", str(result.steps)),
        ("training loss at the end", f"{result.loss:.4f}"),
        ("validation loss", "not measured" if result.eval_loss is None else f"{result.eval_loss:.4f}"),
        ("seconds (this call)", f"{result.seconds:.0f}"),
        ("tokens per second (median)", f"{speeds[len(speeds) // 2]:.0f}" if speeds else "unknown"),
        ("threads, torch", f"{torch.get_num_threads()}, {torch.__version__}"),
        ("result", str(result.result_dir) if result.result_dir else "checkpoint only"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    curve = "![loss curve](loss.png)\n\n" if picture else ""
    settings = json.dumps(recipe.model_dump(mode="json"), indent=1, ensure_ascii=False)
    path = result.output_dir / "report.md"
    path.write_text(
        f"# Training report\n\n| | |\n|---|---|\n{table}\n\n{curve}"
        f"All figures over time are in metrics.jsonl.\n\n## Settings\n\n```json\n{settings}\n```\n",
        encoding="utf-8",
    )
    return path


def plot_loss(metrics: Sequence[dict[str, float]], path: Path) -> bool:
    """Draw training and validation loss over the steps.

    Args:
        metrics: Lines of metrics.jsonl.
        path: The PNG to write.

    Returns:
        False if matplotlib is not installed and nothing was drawn.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([line["step"] for line in metrics], [line["loss"] for line in metrics], label="training", linewidth=1)
    measured = [line for line in metrics if "eval_loss" in line]
    if measured:
        steps, losses = [line["step"] for line in measured], [line["eval_loss"] for line in measured]
        axes.plot(steps, losses, "o-", label="validation", markersize=3)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per label token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True
