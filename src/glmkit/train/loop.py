"""The only training loop: every method, every kind of data and every number of batches per step goes through it.

One optimizer step sees a window of batches. The loss of the window is the sum of the cross entropies of all its label
tokens divided by their number, so dividing the window into batches differently changes nothing. Every window carries
its place in the source, which checkpoints keep, so a resumed run continues exactly where it was cut.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from glmkit import hf
from glmkit.data.examples import Example
from glmkit.errors import TrainingError
from glmkit.train.arguments import RunRecipe, TrainBlock
from glmkit.train.checkpoints import checkpoints, lock_folder, newest_checkpoint, publish, save_checkpoint
from glmkit.train.methods import Method, make_method
from glmkit.train.progress import Progress
from glmkit.train.signals import StopSignals
from glmkit.train.sources import Batch, Place, Records, Source, Window
from glmkit.train.state import load_tensors, save_tensors

# What may differ between a run and its continuation: where it goes and how often it reports, never what it computes.
_FREE_TO_CHANGE = {("output", "dir"), ("data", "eval_file"), ("data", "max_eval_samples"), ("model", "device")}
_FREE_TO_CHANGE |= {("corpus", key) for key in ("eval_files", "eval_rows", "check_first")}
_FREE_TO_CHANGE |= {("train", key) for key in ("logging_steps", "eval_steps", "save_steps", "save_total_limit")}

OnStep = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainingResult:
    """What a run gave.

    Attributes:
        loss: Mean training loss per label token over the last logged steps.
        eval_loss: Mean validation loss per label token at the end, None without validation data.
        steps: Optimizer steps done.
        seconds: Time of this call.
        output_dir: The run's folder.
        result_dir: Folder with the model or adapter; None if the run was stopped before its end.
        metrics: All lines of metrics.jsonl.
        interrupted: True if a signal stopped the run; a checkpoint was saved.
    """

    loss: float
    eval_loss: float | None
    steps: int
    seconds: float
    output_dir: Path
    result_dir: Path | None
    metrics: list[dict[str, float]] = field(repr=False)
    interrupted: bool = False


def train(
    model: nn.Module,
    tokenizer: Any,
    recipe: RunRecipe,
    train_examples: Sequence[Example] | Source,
    eval_examples: Sequence[Example] | Sequence[Batch] | None = None,
    resume: bool = False,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> TrainingResult:
    """Train a model and write the result.

    SIGINT and SIGTERM save a checkpoint after the step in progress; a second signal ends at once.

    Args:
        model: The model, where it is to be trained; changed in place.
        tokenizer: Its tokenizer, for the padding id and to be saved with a whole model.
        recipe: What to do.
        train_examples: What to learn: examples in memory, or any source of windows.
        eval_examples: What to measure the validation loss on: examples, or batches as they are.
        resume: Continue from the newest good checkpoint in the output folder.
        on_step: Called after every step with its number, the number of all steps, and its metrics.
        progress: Show a bar, or lines where there is no terminal.

    Returns:
        The result.

    Raises:
        TrainingError: If the output folder is in use, not writable or of another run, or the loss is not a number.
    """
    output = Path(recipe.output.dir)
    with lock_folder(output), StopSignals() as signals:
        run = _Run(model, tokenizer, recipe, _as_source(train_examples, tokenizer, recipe), eval_examples or (), output)
        run.start(resume)
        started = time.monotonic()
        with Progress("training", run.total_steps, done=run.step, enabled=progress) as bar:
            for window in run.windows():
                metrics = run.optimise(window)
                bar.update(run.step, f"loss {metrics['loss']:.4f}")
                run.after_step(metrics)
                if on_step is not None:
                    on_step(run.step, run.total_steps, metrics)
                if signals.received:
                    break
        interrupted = run.step < run.total_steps
        run.finish(interrupted)
        return TrainingResult(
            loss=run.metrics[-1]["loss"] if run.metrics else math.nan,
            eval_loss=next((line["eval_loss"] for line in reversed(run.metrics) if "eval_loss" in line), None),
            steps=run.step,
            seconds=time.monotonic() - started,
            output_dir=output,
            result_dir=None if interrupted else output / run.method.folder_name,
            metrics=run.metrics,
            interrupted=interrupted,
        )


def learning_rate(step: int, total_steps: int, block: TrainBlock) -> float:
    """Return the learning rate of a step.

    Args:
        step: The step, from 1.
        total_steps: All steps of the run.
        block: Highest rate, kind of schedule and warm-up.

    Returns:
        The rate: rising linearly to the highest over the warm-up (without one the first step has the highest), then
        falling to `lr_min_ratio` of it at step `lr_decay_steps`, or at the last one.
    """
    last = block.lr_decay_steps or total_steps
    warmup_steps = math.ceil(block.warmup_ratio * last)
    if step <= warmup_steps:
        return block.learning_rate * step / warmup_steps
    if block.lr_scheduler_type == "constant":
        return block.learning_rate
    highest = max(1, warmup_steps)  # the step with the highest rate
    done = min(1.0, (step - highest) / max(1, last - highest))
    if block.lr_scheduler_type == "exponential":
        return block.learning_rate * block.lr_min_ratio**done
    fall = 1 - done if block.lr_scheduler_type == "linear" else (1 + math.cos(math.pi * done)) / 2
    return block.learning_rate * (block.lr_min_ratio + (1 - block.lr_min_ratio) * fall)


def mean_loss(
    model: nn.Module, examples: Sequence[Example] | Sequence[Batch], pad_token_id: int, recipe: RunRecipe
) -> float:
    """Measure the mean loss per label token, without learning.

    Args:
        model: A model with `label_loss`.
        examples: What to measure on, or the batches to measure on.
        pad_token_id: Fills short rows of examples.
        recipe: Batch size and precision.

    Returns:
        The loss in nats per token.
    """
    was_training = model.training
    model.eval()
    loss_sum, label_tokens = 0.0, 0
    try:
        with torch.no_grad():
            for batch in _in_batches(examples, pad_token_id, recipe.train):
                with _precision(recipe.train, model):
                    loss, count = model.label_loss(**_to_device(batch.inputs, model))  # type: ignore[operator]
                loss_sum += loss.item()
                label_tokens += count
    finally:
        model.train(was_training)
    return loss_sum / label_tokens


class _Run:
    """Everything a run carries from step to step."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        recipe: RunRecipe,
        source: Source,
        eval_examples: Sequence[Example] | Sequence[Batch],
        output: Path,
    ) -> None:
        self.recipe, self.tokenizer, self.output = recipe, tokenizer, output
        self.source, self.eval_examples = source, eval_examples
        self.place: Place = {}
        self.identity = {"recipe": recipe.model_dump(mode="json"), "data": source.fingerprint()}
        self.run_id = uuid.uuid4().hex
        self.step = 0
        self.metrics: list[dict[str, float]] = []
        self.pending: list[dict[str, float]] = []  # steps since the last line of metrics
        self.saved_step = -1
        block = recipe.train
        self.total_steps = block.max_steps
        if self.total_steps < 0:
            self.total_steps = source.steps(block.num_train_epochs)
        torch.manual_seed(block.seed)
        self.method: Method = make_method(recipe.method)
        self.model = self.method.prepare(model)
        self.model.train()
        if block.gradient_checkpointing:
            hf.checkpoint_activations(self.model)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in self.trained if parameter.ndim >= 2]
        vectors = [parameter for parameter in self.trained if parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": block.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=block.learning_rate,
            betas=(block.adam_beta1, block.adam_beta2),
            eps=block.adam_epsilon,
            fused=True,
        )

    def windows(self) -> Iterator[Window]:
        """Yield the windows of the steps still to do."""
        return itertools.islice(self.source.windows(self.place), self.total_steps - self.step)

    def optimise(self, window: Window) -> dict[str, float]:
        """Do one optimizer step and return its figures."""
        started, step = time.monotonic(), self.step + 1
        label_tokens = sum(batch.label_tokens for batch in window.batches)
        losses = []
        for batch in window.batches:
            inputs = _to_device(batch.inputs, self.model)
            with _precision(self.recipe.train, self.model):
                loss, _ = self.model.label_loss(**inputs)  # type: ignore[operator]
            (loss / label_tokens).backward()
            losses.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.trained, self.recipe.train.max_grad_norm)
        loss_value, norm_value = (torch.stack(losses).sum() / label_tokens).item(), norm.item()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            members = [where for batch in window.batches for where in batch.where]
            places = ", ".join(members[:8])
            raise TrainingError(
                f"step {step}: the loss is {loss_value} and the norm of the gradient {norm_value}; the weights were "
                f"left as they were before it. Records: {places}{', …' if len(members) > 8 else ''}",
                hint="lower train.learning_rate, or look at these records; --resume continues from the last checkpoint",
            )
        rate = learning_rate(step, self.total_steps, self.recipe.train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.place = step, window.place
        return {
            "step": step,
            "epoch": window.epoch,
            "loss": loss_value,
            "learning_rate": rate,
            "grad_norm": norm_value,
            "tokens": sum(batch.tokens for batch in window.batches),
            "label_tokens": label_tokens,
            "seconds": time.monotonic() - started,
        }

    def after_step(self, figures: dict[str, float]) -> None:
        """Log, validate and save as often as the recipe says."""
        block = self.recipe.train
        self.pending.append(figures)
        last = self.step == self.total_steps
        validate = bool(self.eval_examples) and (last or (block.eval_steps > 0 and self.step % block.eval_steps == 0))
        if last or validate or self.step % block.logging_steps == 0:
            line = _summary(self.pending)
            if validate:
                pad = self.tokenizer.pad_token_id
                line["eval_loss"] = mean_loss(self.model, self.eval_examples, pad, self.recipe)
            self.pending = []
            self.metrics.append(line)
            with open(self.output / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if block.save_steps > 0 and self.step % block.save_steps == 0 and not last:
            self.save()

    def save(self) -> None:
        """Write a checkpoint at a step boundary; gradients are never pending there."""
        save_checkpoint(self.output, self.step, self.run_id, self._write_state, self.recipe.train.save_total_limit)
        self.saved_step = self.step

    def _write_state(self, folder: Path) -> None:
        learnt = folder / self.method.folder_name
        learnt.mkdir()
        self.method.save(self.model, self.tokenizer, learnt)
        save_tensors(folder, self.optimizer, _device(self.model))
        state = {
            "step": self.step,
            "place": self.place,
            "run_id": self.run_id,
            "pending": self.pending,
            **self.identity,
        }
        state["versions"] = {"torch": str(torch.__version__)}
        (folder / "state.json").write_text(json.dumps(state, indent=1))

    def start(self, resume: bool) -> None:
        """Begin anew in an empty folder, or continue from the newest good checkpoint."""
        identity_file = self.output / "run.json"
        if not resume:
            if identity_file.exists() or checkpoints(self.output):
                raise TrainingError(
                    f"{self.output} already holds a run",
                    hint="continue it with --resume, or choose another output.dir=",
                )
            identity_file.write_text(json.dumps({"run_id": self.run_id, **self.identity}, indent=1))
            return
        if not identity_file.exists():
            raise TrainingError(f"{self.output} holds no run to continue", hint="leave out --resume to begin one")
        before = json.loads(identity_file.read_text())
        differences = _differences(before, self.identity)
        if differences:
            raise TrainingError(
                f"the run in {self.output} was started differently:\n" + "\n".join(f"  - {one}" for one in differences),
                hint="continue with the same settings, or choose another output.dir=",
            )
        self.run_id = before["run_id"]
        found, skipped = newest_checkpoint(self.output, self.run_id)
        if found is None and skipped:
            raise TrainingError(f"no checkpoint in {self.output} can be used:\n" + "\n".join(skipped))
        if found is not None:
            self._restore(found)
        kept = [line for line in _read_lines(self.output / "metrics.jsonl") if line["step"] <= self.step]
        self.metrics = kept
        (self.output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))

    def _restore(self, folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        self.method.restore(self.model, folder / self.method.folder_name)
        load_tensors(folder, self.optimizer, _device(self.model))
        self.step = self.saved_step = state["step"]
        self.place = state.get("place", {"windows": self.step})  # older checkpoints know records only
        self.pending = state["pending"]

    def finish(self, interrupted: bool) -> None:
        """Save a checkpoint if the run was stopped, the result if it came to its end."""
        if interrupted:
            if self.step != self.saved_step:
                self.save()
            return
        self.model.eval()
        publish(
            self.output / self.method.folder_name,
            lambda folder: self.method.save(self.model, self.tokenizer, folder),
        )


def _as_source(examples: Sequence[Example] | Source, tokenizer: Any, recipe: RunRecipe) -> Source:
    return Records(examples, tokenizer.pad_token_id, recipe.train) if isinstance(examples, Sequence) else examples


def _in_batches(examples: Sequence[Example] | Sequence[Batch], pad_token_id: int, block: TrainBlock) -> Iterator[Batch]:
    """Yield batches as they are, or examples in batches of similar lengths."""
    if all(isinstance(example, Batch) for example in examples):
        yield from cast("Sequence[Batch]", examples)
        return
    one_each = block.model_copy(update={"gradient_accumulation_steps": 1, "seed": 0})
    records = Records(cast("Sequence[Example]", examples), pad_token_id, one_each)
    for window in itertools.islice(records.windows({}), records.steps(1)):
        yield from window.batches


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _to_device(batch: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.to(_device(model), non_blocking=True) for name, tensor in batch.items()}


def _precision(block: TrainBlock, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    if not block.bf16:
        return contextlib.nullcontext()
    return torch.autocast(_device(model).type, dtype=torch.bfloat16)


def _summary(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Join the figures of several steps into one line of metrics."""
    seconds = sum(one["seconds"] for one in steps)
    label_tokens = sum(one["label_tokens"] for one in steps)
    return {
        "step": steps[-1]["step"],
        "epoch": steps[-1]["epoch"],
        "loss": sum(one["loss"] * one["label_tokens"] for one in steps) / label_tokens,
        "learning_rate": steps[-1]["learning_rate"],
        "grad_norm": max(one["grad_norm"] for one in steps),
        "tokens_per_second": sum(one["tokens"] for one in steps) / max(seconds, 1e-9),
    }


def _read_lines(path: Path) -> list[dict[str, float]]:
    """Read metrics; a last line that a kill cut short is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    for block, values in now["recipe"].items():
        for key, value in values.items():
            # A key that is younger than the run had its default then, and has it now unless it was set.
            earlier = before["recipe"].get(block, {}).get(key, value)
            if (block, key) not in _FREE_TO_CHANGE and earlier != value:
                found.append(f"{block}.{key}: {earlier!r} then, {value!r} now")
    if before["data"] != now["data"]:
        found.append("the training data, or how it becomes tokens, has changed")
    return found
