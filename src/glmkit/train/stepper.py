"""One optimizer step: the loss of a window, its gradients, and what happens if they are no numbers."""

from __future__ import annotations

import math
import time

import torch

from glmkit.errors import TrainingError
from glmkit.train.arguments import TrainBlock
from glmkit.train.journal import Figures
from glmkit.train.optimizer import learning_rate
from glmkit.train.precision import LossScale, precision
from glmkit.train.processes import Processes, own_share
from glmkit.train.run_folder import RunRecord
from glmkit.train.sources import Window

_MOST_SKIPPED = 50  # steps in a row that are left out before a run that asked for it ends all the same


class Stepper:
    """Takes one step after the other.

    Args:
        block: Rates, clipping, precision.
        processes: They hold the model and share its windows.
        record: Told of steps that are left out.
    """

    def __init__(self, block: TrainBlock, processes: Processes, record: RunRecord) -> None:
        self.block, self.processes, self.record = block, processes, record
        self.scale = LossScale.of(block)
        self.skipped_in_a_row = 0

    def take(self, window: Window, step: int, total_steps: int) -> Figures:
        """Do one optimizer step.

        Args:
            window: What it sees.
            step: Its number, from 1.
            total_steps: All steps of the run.

        Returns:
            Its figures: step, epoch, loss, learning_rate, grad_norm, tokens, label_tokens, samples, seconds; `skipped`
            if it was left out, and `loss_scale` in float16.

        Raises:
            TrainingError: If loss or gradient is no number, and the recipe does not say to go on.
        """
        started, block = time.monotonic(), self.block
        label_tokens = sum(batch.label_tokens for batch in window.batches)
        own = list(own_share(window.batches, self.processes.rank, self.processes.world))
        losses = []
        for number, (batch, counts) in enumerate(own, start=1):
            with precision(block, self.processes.device):
                loss, _ = self.processes.loss(batch.inputs, last=number == len(own))
            part = loss / label_tokens * counts
            self.processes.backward(part * self.scale.scale, last=number == len(own))
            losses.append(part.detach())
        (loss_value,) = self.processes.sums(torch.stack(losses).sum().item())
        rate = learning_rate(step, total_steps, block)
        if math.isfinite(loss_value):
            norm = self.processes.step(rate, block.max_grad_norm or math.inf, self.scale.scale)
        else:
            norm = math.nan
            self.processes.skip()
        finite = math.isfinite(norm)
        if not finite:
            self._leave_out(step, loss_value, norm, window)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        extra: Figures = {} if finite else {"skipped": 1}
        if self.scale.moves:
            extra["loss_scale"] = self.scale.scale
        self.scale.after(finite)
        return {
            "step": step,
            "epoch": window.epoch,
            "loss": loss_value,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": sum(batch.tokens for batch in window.batches),
            "label_tokens": label_tokens,
            "samples": sum(len(batch.where) for batch in window.batches),
            "seconds": time.monotonic() - started,
            **extra,
        }

    def _leave_out(self, step: int, loss: float, norm: float, window: Window) -> None:
        """Go on without a step that has no numbers, if that is expected or asked for; else stop."""
        if self.scale.moves and self.scale.scale > 1 and math.isfinite(loss):
            return  # float16 gradients that were scaled too far: the next ones will be scaled less
        members = [where for batch in window.batches for where in batch.where]
        places = ", ".join(members[:8]) + (", …" if len(members) > 8 else "")
        found = f"step {step}: the loss is {loss} and the norm of the gradient {norm}; "
        if self.block.on_nonfinite_loss == "skip" and self.skipped_in_a_row < _MOST_SKIPPED:
            self.record.say(f"{found}left out. Records: {places}")
            return
        raise TrainingError(
            f"{found}the weights were left as they were before it. Records: {places}",
            hint="lower train.learning_rate, or look at these records; --resume continues from the last checkpoint",
        )
