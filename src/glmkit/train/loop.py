"""The only training loop: every method, every kind of data and every number of batches per step goes through it.

One optimizer step sees a window of batches. The loss of the window is the sum of the cross entropies of all its label
tokens divided by their number, so dividing the window into batches differently changes nothing. Every window carries
its place in the source, which checkpoints keep, so a resumed run continues exactly where it was cut.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
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
from glmkit.devices import peak_bytes
from glmkit.errors import RunRefusedError, TrainingError, UsageError
from glmkit.train.arguments import RunRecipe
from glmkit.train.card import card
from glmkit.train.checkpoints import (
    checkpoints,
    lock_folder,
    newest_checkpoint,
    publish,
    read_json,
    save_checkpoint,
    space_warning,
    sweep,
)
from glmkit.train.identity import compare, identity_of
from glmkit.train.journal import Figures, Journal, warning_signs
from glmkit.train.methods import Method, make_method
from glmkit.train.optimizer import make_optimizer, warnings_about
from glmkit.train.precision import LossScale
from glmkit.train.processes import Processes, learning, processes_for
from glmkit.train.progress import Progress
from glmkit.train.run_folder import RunRecord, begin, recorded
from glmkit.train.signals import StopSignals
from glmkit.train.sources import Batch, Place, Records, Source, Window
from glmkit.train.speed import Operations, measured_peak
from glmkit.train.stepper import Stepper
from glmkit.train.validation import Best, HeldOut, Validation
from glmkit.writing import write_text_atomic

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
        best_step: The step of the best validation, None without one.
    """

    loss: float
    eval_loss: float | None
    steps: int
    seconds: float
    output_dir: Path
    result_dir: Path | None
    metrics: list[dict[str, float]] = field(repr=False)
    interrupted: bool = False
    best_step: int | None = None


def train(
    model: nn.Module,
    tokenizer: Any,
    recipe: RunRecipe,
    train_examples: Sequence[Example] | Source,
    held_out: HeldOut | Sequence[Example] | Sequence[Batch] | None = None,
    resume: bool = False,
    on_step: OnStep | None = None,
    progress: bool = True,
    processes: Processes | None = None,
    allow_change: bool = False,
    adapter: Path | None = None,
) -> TrainingResult:
    """Train a model and write the result.

    SIGINT and SIGTERM save a checkpoint after the step in progress; a second signal ends at once.

    Args:
        model: The model, where it is to be trained; changed in place.
        tokenizer: Its tokenizer, for the padding id and to be saved with a whole model.
        recipe: What to do.
        train_examples: What to learn: examples in memory, or any source of windows.
        held_out: What to measure on; examples or batches alone are for the validation loss.
        resume: Continue from the newest good checkpoint in the output folder.
        on_step: Called after every step with its number, the number of all steps, and its metrics.
        progress: Show a bar, or lines where there is no terminal.
        processes: How the work is shared; None: as the recipe and the environment say.
        allow_change: Resume also with settings that differ, if what that does is known; it is told.
        adapter: Folder of what the method learnt before, to go on from; a resumed run has its own.

    Returns:
        The result.

    Raises:
        TrainingError: If the output folder is in use, not writable or of another run, or the loss is not a number.
    """
    output = Path(recipe.output.dir)
    if processes is None:
        processes = processes_for(recipe, next(model.parameters()).device)
    first = processes.rank == 0
    with (
        recorded(recipe, resume=resume, writes=first) as record,
        lock_folder(output, processes),
        StopSignals() as signals,
    ):
        if not isinstance(held_out, HeldOut):
            held_out = HeldOut(held_out or ())
        run = _Run(model, tokenizer, recipe, train_examples, held_out, output, processes, record)
        run.start(resume, allow_change, adapter)
        record.step, record.total_steps = run.step, run.total_steps
        begin(recipe, processes.describe(), record)
        run.introduce(show=progress)
        started = time.monotonic()
        with Progress("training", run.total_steps, done=run.step, enabled=progress and first) as bar:
            for window in run.windows():
                figures = run.optimise(window)
                bar.update(run.step, f"loss {figures['loss']:.4f}")
                record.step = run.step
                run.after_step(figures)
                if on_step is not None:
                    on_step(run.step, run.total_steps, figures)
                if run.ended_early or not processes.all_agree(not signals.received):
                    break
        interrupted = run.step < run.total_steps and not run.ended_early
        run.finish(interrupted)
        record.interrupted = interrupted
        record.result = None if interrupted else run.method.folder_name
        loss = run.journal.last("loss")
        return TrainingResult(
            loss=math.nan if loss is None else loss,
            eval_loss=run.journal.last("eval_loss"),
            steps=run.step,
            seconds=time.monotonic() - started,
            output_dir=output,
            result_dir=None if interrupted else output / run.method.folder_name,
            metrics=run.journal.lines,
            interrupted=interrupted,
            best_step=run.best.step,
        )


class _Run:
    """Everything a run carries from step to step."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        recipe: RunRecipe,
        examples: Sequence[Example] | Source,
        held_out: HeldOut,
        output: Path,
        processes: Processes,
        record: RunRecord,
    ) -> None:
        self.recipe, self.tokenizer, self.output = recipe, tokenizer, output
        self.source: Source = (
            Records(examples, tokenizer.pad_token_id, recipe.train) if isinstance(examples, Sequence) else examples
        )
        self.processes, self.record = processes, record
        self.place: Place = {}
        block = recipe.train
        self.batches_per_step = block.gradient_accumulation_steps * processes.world
        self.identity = identity_of(recipe, self.source.fingerprint(), model)
        self.run_id = uuid.uuid4().hex
        self.step = self.total_steps = 0
        first = processes.rank == 0
        self.journal = Journal(output, writes=first, report_to=recipe.output.report_to, measure=self._measure)
        self.validation = Validation(tokenizer, block, held_out, processes)
        self.best = Best(block.metric_for_best_model)
        self.best_adapter: Path | None = None  # what becomes the result as it is
        self.ended_early = False
        self.stepper = Stepper(block, processes, record)
        self.epoch_ends: dict[int, int] = {}
        self.saved_step = -1
        torch.manual_seed(block.seed)
        self.method: Method = make_method(recipe.method)
        if block.loss_chunk_tokens is not None and not hasattr(model, "loss_chunk_tokens"):
            raise UsageError(f"{type(model).__name__} has no loss in chunks; leave out train.loss_chunk_tokens")
        model.loss_chunk_tokens = block.loss_chunk_tokens  # type: ignore[assignment]
        self.model: Any = self.method.prepare(model)
        self.model.train()
        if block.gradient_checkpointing:
            hf.checkpoint_activations(self.model)
        self.operations = Operations.of(self.model, recipe.method.name)

    def introduce(self, *, show: bool) -> None:
        """Say in one line what really runs, and what is known to go wrong with it."""
        block, processes, record = self.recipe.train, self.processes, self.record
        if processes.rank != 0:
            return
        learnt = sum(parameter.numel() for parameter in learning(self.model))
        every = sum(parameter.numel() for parameter in self.model.parameters())
        kinds = {str(one.dtype).removeprefix("torch.") for one in self.model.parameters() if one.is_floating_point()}
        computes = "bfloat16" if block.bf16 else "float16" if block.fp16 else "float32"
        size = f"{block.tokens_per_batch} tokens" if block.tokens_per_batch else str(block.per_device_train_batch_size)
        record.say(
            f"{self.method.describe()}; {learnt:,} of {every:,} parameters learn; weights {'/'.join(sorted(kinds))}, "
            f"products in {computes}; {processes.describe()}; {self.total_steps:,} steps of {self.batches_per_step} "
            f"{'batch' if self.batches_per_step == 1 else 'batches'} of {size}",
            show=show,
        )
        record.facts |= {"method": self.method.describe(), "parameters that learn": f"{learnt:,} of {every:,}"}
        warnings = warnings_about(self.recipe)
        room = space_warning(self.output, self.checkpoint_bytes(), block.save_total_limit)
        for warning in [*warnings, *([room] if room else [])]:
            record.say(f"warning: {warning}", show=True)

    def windows(self) -> Iterator[Window]:
        """Yield the windows of the steps still to do."""
        return itertools.islice(self.source.windows(self.place, self.batches_per_step), self.total_steps - self.step)

    def optimise(self, window: Window) -> Figures:
        """Do one optimizer step and return its figures."""
        figures = self.stepper.take(window, self.step + 1, self.total_steps)
        self.step, self.place = self.step + 1, window.place
        return figures

    def _measure(self, sums: Figures) -> Figures:
        """Say what the machine did in some steps."""
        block, device = self.recipe.train, self.processes.device
        dtype = torch.bfloat16 if block.bf16 else torch.float16 if block.fp16 else torch.float32
        done = self.operations.of_step(sums["tokens"], sums["label_tokens"], sums["samples"])
        peak = measured_peak(device, dtype) * self.processes.world
        speed = done / max(sums["seconds"], 1e-9)
        return {"mfu": speed / peak, "peak_memory_bytes": float(peak_bytes(device))}

    def after_step(self, figures: Figures) -> None:
        """Log, validate and save as often as the recipe says."""
        block = self.recipe.train
        self.journal.add(figures)
        last = self.step == self.total_steps
        validate = last or self._validation_is_due(int(figures["epoch"]))
        measured: Figures = {}
        if validate:
            measured = self.validation.measure(self.model) if self.validation.wanted else {}
            self.journal.write_samples(self.step, self.validation.probe(self.model))
        if last or measured or self.step % block.logging_steps == 0:
            self.journal.write(measured)
        if measured:
            self.journal.draw()
        improved = self.best.see(self.step, measured)
        patience = block.early_stopping_patience
        self.ended_early = not last and patience is not None and self.best.worse >= patience
        due = block.save_steps > 0 and self.step % block.save_steps == 0
        if not last and (due or (improved and block.load_best_model_at_end)):
            self.save()

    def _validation_is_due(self, epoch: int) -> bool:
        block = self.recipe.train
        if block.eval_steps > 0 and self.step % block.eval_steps == 0:
            return True
        if block.eval_epochs <= 0 or (epoch + 1) % block.eval_epochs != 0:
            return False
        if epoch not in self.epoch_ends:
            self.epoch_ends = {epoch: self.source.steps(epoch + 1, self.batches_per_step)}
        return self.step == self.epoch_ends[epoch]

    def save(self) -> None:
        """Write a checkpoint at a step boundary; gradients are never pending there."""
        save_checkpoint(
            self.output,
            self.step,
            self.run_id,
            self._write_state,
            self.recipe.train.save_total_limit,
            protected=() if self.best.step is None else (self.best.step,),
            processes=self.processes,
        )
        self.saved_step = self.step

    def checkpoint_bytes(self) -> int:
        """Say how large a checkpoint will be, about: what learns, and two moments of it, in float32."""
        return sum(parameter.numel() for parameter in learning(self.model)) * 12

    def _write_state(self, folder: Path) -> None:
        # What needs all processes comes before anything that may fail in one of them, or the others would wait for it.
        sharded = not self.processes.whole and self.method.folder_name == "model"
        gathered = None if sharded else self.processes.learnt()
        self.processes.write(folder)
        if self.processes.rank != 0:
            return
        learnt = folder / self.method.folder_name
        learnt.mkdir()
        if sharded:  # the weights are in the parts that the processes have written
            self.model.config.save_pretrained(learnt)
            self.tokenizer.save_pretrained(learnt)
        else:
            self.method.save(self.model, self.tokenizer, learnt, gathered)
        state = {
            "step": self.step,
            "place": self.place,
            "run_id": self.run_id,
            "pending": self.journal.pending,
            "loss_scale": asdict(self.stepper.scale),
            "best": asdict(self.best),
            "batches_per_step": self.batches_per_step,
            "world": self.processes.world,
            "sharded": sharded,
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

    def start(self, resume: bool, allow_change: bool, adapter: Path | None) -> None:
        """Begin anew in an empty folder, or continue from the newest good checkpoint."""
        self.adapter = adapter
        self._begin(resume, allow_change)
        block = self.recipe.train
        self.total_steps = block.max_steps
        if self.total_steps < 0:
            self.total_steps = self.source.steps(block.num_train_epochs, self.batches_per_step)
        if self.step == 0:
            self.journal.write_samples(0, self.validation.probe(self.model))

    def _begin(self, resume: bool, allow_change: bool) -> None:
        identity_file = self.output / "run.json"
        if not resume:
            if not self.processes.all_agree(not identity_file.exists() and not checkpoints(self.output)):
                raise RunRefusedError(
                    f"{self.output} already holds a run",
                    hint="continue it with --resume, or choose another output.dir=",
                )
            self.run_id = self.processes.share(self.run_id)
            if self.processes.rank == 0:
                sweep(self.output)
                content = {"run_id": self.run_id, "batches_per_step": self.batches_per_step, **self.identity}
                write_text_atomic(identity_file, json.dumps(content, indent=1))
            self._from_the_first_step()
            self.processes.wait()
            return
        if not identity_file.exists():
            raise RunRefusedError(f"{self.output} holds no run to continue", hint="leave out --resume to begin one")
        before = read_json(identity_file)
        changes = compare(
            before,
            self.identity,
            batches_per_step=self.batches_per_step,
            allow_change=allow_change,
            folder=str(self.output),
        )
        self.run_id = before["run_id"]
        # A run that began with another number of processes, or in an older version, keeps its windows.
        accumulated = before["recipe"]["train"]["gradient_accumulation_steps"]
        self.batches_per_step = before.get("batches_per_step", accumulated)
        first = self.processes.rank == 0
        found, skipped = self.processes.share(_names(newest_checkpoint(self.output, self.run_id)) if first else None)
        for sentence in skipped:
            self.record.say(f"skipped {sentence}")
        if found is None and skipped:
            raise TrainingError(
                f"no checkpoint in {self.output} can be used:\n" + "\n".join(skipped),
                hint="move these folders away to begin from the first step",
            )
        if found is None:
            self._from_the_first_step()
        pending = self._restore(self.output / found) if found is not None else []
        self.journal.resume(self.step, pending)
        if changes and first:
            told = [f"from step {self.step + 1} on, {change}" for change in changes]
            self.record.say("\n".join(told))
            changed = {"batches_per_step": self.batches_per_step, "changes": [*before.get("changes", []), *told]}
            write_text_atomic(identity_file, json.dumps({**before, **self.identity, **changed}, indent=1))

    def _from_the_first_step(self) -> None:
        if self.adapter is not None:
            self.method.restore(self.model, self.adapter)
        self._share_out()

    def _share_out(self) -> None:
        self.processes.prepare(self.model, lambda module: make_optimizer(module, self.recipe.train))

    def _restore(self, folder: Path) -> list[Figures]:
        state = read_json(folder / "state.json")
        if not state.get("sharded", False):
            self.method.restore(self.model, folder / self.method.folder_name)  # while the model is still whole
        self._share_out()
        self.processes.read(folder)
        self.step = self.saved_step = state["step"]
        self.place = state.get("place", {"windows": self.step})  # older checkpoints know records only
        if "loss_scale" in state:
            self.stepper.scale = LossScale(**state["loss_scale"])
        if "best" in state and state["best"]["metric"] == self.best.metric:
            self.best = Best(**state["best"])
        pending: list[Figures] = state["pending"]
        return pending

    def finish(self, interrupted: bool) -> None:
        """Save a checkpoint if the run was stopped, the result if it came to its end."""
        if interrupted:
            if self.step != self.saved_step:
                self.save()
            return
        for sign in warning_signs(self.journal.lines):
            self.record.say(f"note: {sign}")
        self.journal.close()
        if self.recipe.train.load_best_model_at_end and self.best.step not in (None, self.step):
            self._take_best(self.output / f"step-{self.best.step}")
        self.model.eval()
        publish(self.output / self.method.folder_name, self._write_result, processes=self.processes)

    def _write_result(self, folder: Path) -> None:
        if self.best_adapter is None:
            self._write_learnt(folder)
        elif self.processes.rank == 0:
            shutil.copytree(self.best_adapter, folder, dirs_exist_ok=True)
        if self.processes.rank == 0:
            text = card(self.recipe, self.method.describe(), self.journal.lines, self.method.folder_name)
            (folder / "README.md").write_text(text, encoding="utf-8")

    def _take_best(self, folder: Path) -> None:
        """Bring back the weights of the best validation."""
        learnt = folder / self.method.folder_name
        if self.processes.whole:
            self.method.restore(self.model, learnt)
        elif read_json(folder / "state.json")["sharded"]:
            self.processes.read(folder)
        else:  # an adapter lies there whole, and its tensors are spread over the processes
            self.best_adapter = learnt
        self.record.say(f"the result is that of step {self.best.step}, with {self.best.metric} {self.best.value:.4f}")


def _names(found: tuple[Path | None, list[str]]) -> tuple[str | None, list[str]]:
    return (None if found[0] is None else found[0].name), found[1]
