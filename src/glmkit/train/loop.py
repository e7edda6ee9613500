"""The only training loop: every method, every kind of data and every number of batches per step goes through it.

One optimizer step sees a window of batches. The loss of the window is the sum of the cross entropies of all its label
tokens divided by their number, so dividing the window into batches differently changes nothing. Every window carries
its place in the source, which checkpoints keep, so a resumed run continues exactly where it was cut.
"""

from __future__ import annotations

import itertools
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glmkit import hf
from glmkit.data.examples import Example
from glmkit.errors import TrainingError
from glmkit.train.arguments import RunRecipe, TrainBlock
from glmkit.train.checkpoints import checkpoints, lock_folder, newest_checkpoint, publish, save_checkpoint
from glmkit.train.journal import Figures, Journal
from glmkit.train.methods import Method, make_method
from glmkit.train.precision import LossScale, precision
from glmkit.train.processes import Processes, learning, own_share, processes_for
from glmkit.train.progress import Progress
from glmkit.train.signals import StopSignals
from glmkit.train.sources import Batch, Place, Records, Source, Window
from glmkit.train.validation import mean_loss

# What may differ between a run and its continuation: where it goes and how often it reports, never what it computes.
_FREE_TO_CHANGE = {("output", "dir"), ("output", "report_to"), ("model", "device")}
_FREE_TO_CHANGE |= {("data", key) for key in ("eval_file", "max_eval_samples", "num_proc", "cache_dir")}
_FREE_TO_CHANGE |= {("corpus", key) for key in ("eval_files", "eval_rows", "check_first")}
_FREE_TO_CHANGE |= {("train", key) for key in ("logging_steps", "eval_steps", "save_steps", "save_total_limit")}
_FREE_TO_CHANGE |= {("train", key) for key in ("eval_epochs", "predict_with_generate", "max_predict_samples")}
# What the processes compute together is fixed by batches_per_step; how they share it is not.
_FREE_TO_CHANGE |= {("train", "gradient_accumulation_steps"), ("train", "per_device_eval_batch_size")}
_FREE_TO_CHANGE |= {("distributed", key) for key in ("strategy", "deepspeed", "cpu_offload", "reshard_after_forward")}

OnStep = Callable[[int, int, Figures], None]


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
    processes: Processes | None = None,
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
        processes: How the work is shared; None: as the recipe and the environment say.

    Returns:
        The result.

    Raises:
        TrainingError: If the output folder is in use, not writable or of another run, or the loss is not a number.
    """
    output = Path(recipe.output.dir)
    if processes is None:
        processes = processes_for(recipe, next(model.parameters()).device)
    with lock_folder(output, processes), StopSignals() as signals:
        run = _Run(model, tokenizer, recipe, train_examples, eval_examples or (), output, processes)
        run.start(resume)
        started = time.monotonic()
        with Progress("training", run.total_steps, done=run.step, enabled=progress and processes.rank == 0) as bar:
            for window in run.windows():
                figures = run.optimise(window)
                bar.update(run.step, f"loss {figures['loss']:.4f}")
                run.after_step(figures)
                if on_step is not None:
                    on_step(run.step, run.total_steps, figures)
                if not processes.all_agree(not signals.received):
                    break
        interrupted = run.step < run.total_steps
        run.finish(interrupted)
        return TrainingResult(
            loss=run.journal.lines[-1]["loss"] if run.journal.lines else math.nan,
            eval_loss=run.journal.last("eval_loss"),
            steps=run.step,
            seconds=time.monotonic() - started,
            output_dir=output,
            result_dir=None if interrupted else output / run.method.folder_name,
            metrics=run.journal.lines,
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


class _Run:
    """Everything a run carries from step to step."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        recipe: RunRecipe,
        examples: Sequence[Example] | Source,
        eval_examples: Sequence[Example] | Sequence[Batch],
        output: Path,
        processes: Processes,
    ) -> None:
        self.recipe, self.tokenizer, self.output = recipe, tokenizer, output
        self.source: Source = (
            Records(examples, tokenizer.pad_token_id, recipe.train) if isinstance(examples, Sequence) else examples
        )
        self.eval_examples, self.processes = eval_examples, processes
        self.place: Place = {}
        block = recipe.train
        self.batches_per_step = block.gradient_accumulation_steps * processes.world
        self.identity = {"recipe": recipe.model_dump(mode="json"), "data": self.source.fingerprint()}
        self.run_id = uuid.uuid4().hex
        self.step = 0
        self.journal = Journal(output, writes=processes.rank == 0)
        self.scale = LossScale.of(block)
        self.saved_step = -1
        torch.manual_seed(block.seed)
        self.method: Method = make_method(recipe.method)
        self.model = self.method.prepare(model)
        self.model.train()
        if block.gradient_checkpointing:
            hf.checkpoint_activations(self.model)
        processes.prepare(self.model, lambda module: _optimizer(module, block))

    @property
    def total_steps(self) -> int:
        """All optimizer steps of the run."""
        block = self.recipe.train
        return (
            block.max_steps
            if block.max_steps >= 0
            else self.source.steps(block.num_train_epochs, self.batches_per_step)
        )

    def windows(self) -> Iterator[Window]:
        """Yield the windows of the steps still to do."""
        return itertools.islice(self.source.windows(self.place, self.batches_per_step), self.total_steps - self.step)

    def optimise(self, window: Window) -> Figures:
        """Do one optimizer step and return its figures."""
        started, step, block = time.monotonic(), self.step + 1, self.recipe.train
        label_tokens = sum(batch.label_tokens for batch in window.batches)
        own = list(own_share(window.batches, self.processes.rank, self.processes.world))
        losses = []
        for number, (batch, counts) in enumerate(own, start=1):
            with precision(block, self.processes.device):
                loss, _ = self.processes.loss(batch.inputs)
            part = loss / label_tokens * counts
            self.processes.backward(part * self.scale.scale, last=number == len(own))
            losses.append(part.detach())
        (loss_value,) = self.processes.sums(torch.stack(losses).sum().item())
        rate = learning_rate(step, self.total_steps, block)
        if math.isfinite(loss_value):
            norm = self.processes.step(rate, block.max_grad_norm, self.scale.scale)
        else:
            norm = math.nan
            self.processes.skip()
        finite = math.isfinite(norm)
        if not finite and (not self.scale.moves or not math.isfinite(loss_value)):
            self._not_a_number(step, loss_value, norm, window)
        self.scale.after(finite)
        self.step, self.place = step, window.place
        return {
            "step": step,
            "epoch": window.epoch,
            "loss": loss_value,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": sum(batch.tokens for batch in window.batches),
            "label_tokens": label_tokens,
            "seconds": time.monotonic() - started,
        }

    def _not_a_number(self, step: int, loss: float, norm: float, window: Window) -> None:
        members = [where for batch in window.batches for where in batch.where]
        places = ", ".join(members[:8])
        raise TrainingError(
            f"step {step}: the loss is {loss} and the norm of the gradient {norm}; the weights were "
            f"left as they were before it. Records: {places}{', …' if len(members) > 8 else ''}",
            hint="lower train.learning_rate, or look at these records; --resume continues from the last checkpoint",
        )

    def after_step(self, figures: Figures) -> None:
        """Log, validate and save as often as the recipe says."""
        block = self.recipe.train
        self.journal.add(figures)
        last = self.step == self.total_steps
        validate = bool(self.eval_examples) and (last or (block.eval_steps > 0 and self.step % block.eval_steps == 0))
        if last or validate or self.step % block.logging_steps == 0:
            self.journal.write(self.validate() if validate else {})
        if block.save_steps > 0 and self.step % block.save_steps == 0 and not last:
            self.save()

    def validate(self) -> Figures:
        """Measure the model as it is."""
        pad = self.tokenizer.pad_token_id
        return {"eval_loss": mean_loss(self.model, self.processes, self.eval_examples, pad, self.recipe.train)}

    def save(self) -> None:
        """Write a checkpoint at a step boundary; gradients are never pending there."""
        save_checkpoint(
            self.output,
            self.step,
            self.run_id,
            self._write_state,
            self.recipe.train.save_total_limit,
            processes=self.processes,
        )
        self.saved_step = self.step

    def _write_state(self, folder: Path) -> None:
        self._write_learnt(folder / self.method.folder_name)
        self.processes.write(folder)
        if self.processes.rank != 0:
            return
        state = {
            "step": self.step,
            "place": self.place,
            "run_id": self.run_id,
            "pending": self.journal.pending,
            "loss_scale": asdict(self.scale),
            "batches_per_step": self.batches_per_step,
            "world": self.processes.world,
            **self.identity,
        }
        state["versions"] = {"torch": str(torch.__version__)}
        (folder / "state.json").write_text(json.dumps(state, indent=1))

    def _write_learnt(self, folder: Path) -> None:
        """Write what was learnt; every process helps to gather it, the first one writes."""
        gathered = self.processes.learnt()
        if self.processes.rank == 0:
            folder.mkdir(exist_ok=True)
            self.method.save(self.model, self.tokenizer, folder, gathered)

    def start(self, resume: bool) -> None:
        """Begin anew in an empty folder, or continue from the newest good checkpoint."""
        identity_file = self.output / "run.json"
        if not resume:
            if not self.processes.all_agree(not identity_file.exists() and not checkpoints(self.output)):
                raise TrainingError(
                    f"{self.output} already holds a run",
                    hint="continue it with --resume, or choose another output.dir=",
                )
            self.run_id = self.processes.share(self.run_id)
            if self.processes.rank == 0:
                content = {"run_id": self.run_id, "batches_per_step": self.batches_per_step, **self.identity}
                identity_file.write_text(json.dumps(content, indent=1))
            self.processes.wait()
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
        # A run that began with another number of processes, or in an older version, keeps its windows.
        accumulated = before["recipe"]["train"]["gradient_accumulation_steps"]
        self.batches_per_step = before.get("batches_per_step", accumulated)
        found, skipped = self.processes.share(_names(newest_checkpoint(self.output, self.run_id)))
        if found is None and skipped:
            raise TrainingError(f"no checkpoint in {self.output} can be used:\n" + "\n".join(skipped))
        pending = self._restore(self.output / found) if found is not None else []
        self.journal.resume(self.step, pending)

    def _restore(self, folder: Path) -> list[Figures]:
        state = json.loads((folder / "state.json").read_text())
        if self.processes.whole:
            self.method.restore(self.model, folder / self.method.folder_name)
        self.processes.read(folder)
        self.step = self.saved_step = state["step"]
        self.place = state.get("place", {"windows": self.step})  # older checkpoints know records only
        if "loss_scale" in state:
            self.scale = LossScale(**state["loss_scale"])
        pending: list[Figures] = state["pending"]
        return pending

    def finish(self, interrupted: bool) -> None:
        """Save a checkpoint if the run was stopped, the result if it came to its end."""
        if interrupted:
            if self.step != self.saved_step:
                self.save()
            return
        self.model.eval()
        publish(self.output / self.method.folder_name, self._write_learnt, processes=self.processes)


def _optimizer(model: nn.Module, block: TrainBlock) -> torch.optim.Optimizer:
    """AdamW over what learns; vectors do not decay."""
    trained = learning(model)
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": block.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=block.learning_rate,
        betas=(block.adam_beta1, block.adam_beta2),
        eps=block.adam_epsilon,
        fused=True,
    )


def _names(found: tuple[Path | None, list[str]]) -> tuple[str | None, list[str]]:
    return (None if found[0] is None else found[0].name), found[1]


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
