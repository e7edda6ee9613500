"""Measuring a model between two steps, without leaving a trace in the training."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy
import torch
from torch import nn

from glmkit.chat.context import fit_context
from glmkit.chat.conversation import reply_to
from glmkit.chat.messages import Message, to_messages
from glmkit.data.examples import Example
from glmkit.data.records import Record
from glmkit.devices import random_state, set_random_state
from glmkit.engine.decode import generate_batch
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import UsageError
from glmkit.evaluate.adgen import METRICS, answer_text, score
from glmkit.train.arguments import TrainBlock
from glmkit.train.journal import Figures
from glmkit.train.precision import precision
from glmkit.train.processes import Processes, own_share
from glmkit.train.sources import Batch, Records

_GREEDY = SamplingOptions(temperature=0.0)


@dataclass(frozen=True)
class HeldOut:
    """What a run is measured on.

    Attributes:
        examples: For the validation loss: examples, or batches as they are.
        records: What is answered and compared with the answers there, if the recipe asks for it.
        answer_tokens: Longest answer in tokens.
        also: Measures something else of the model in eval mode, on a device; every process calls it.
    """

    examples: Sequence[Example] | Sequence[Batch] = ()
    records: Sequence[Record] = ()
    answer_tokens: int = 128
    also: Callable[[Any, torch.device], Figures] | None = None


class Validation:
    """The measurements that a recipe asks for.

    Args:
        tokenizer: The model's tokenizer.
        block: What to measure.
        held_out: What to measure on.
        processes: They share the work; the first one writes answers.

    Raises:
        UsageError: If a measurement that is asked for cannot be made.
    """

    def __init__(self, tokenizer: Any, block: TrainBlock, held_out: HeldOut, processes: Processes) -> None:
        self.tokenizer, self.block, self.held_out, self.processes = tokenizer, block, held_out, processes
        self.answers = block.predict_with_generate and bool(held_out.records)
        self.wanted = bool(held_out.examples) or self.answers
        if (self.answers or block.probe_prompts) and not processes.whole:
            raise UsageError(
                "answers are written by a process that holds the whole model; here each holds a part of it",
                hint="distributed.strategy=ddp, or predict_with_generate=false and no probe_prompts",
            )
        decides = block.early_stopping_patience is not None or block.load_best_model_at_end
        if decides and not self.wanted:
            raise UsageError(
                "early stopping and the best checkpoint need records to measure on", hint="set data.eval_file"
            )
        measured = {"eval_loss"} if held_out.examples else set()
        measured |= set(METRICS) if self.answers else set()
        measured |= {"accuracy"} if held_out.also is not None else set()
        if decides and block.metric_for_best_model not in measured:
            raise UsageError(
                f"metric_for_best_model: {block.metric_for_best_model} is not measured",
                hint="set predict_with_generate=true and data.eval_file, or metric_for_best_model=eval_loss",
            )

    def measure(self, model: nn.Module) -> Figures:
        """Measure a model as it is.

        Args:
            model: What the method has prepared.

        Returns:
            eval_loss, and bleu-4, rouge-1, rouge-2 and rouge-l if they are asked for.
        """
        figures: Figures = {}
        with untouched_random(self.processes.device):
            if self.held_out.examples:
                figures["eval_loss"] = mean_loss(
                    model, self.processes, self.held_out.examples, self.tokenizer.pad_token_id, self.block
                )
            if self.answers:
                figures |= self._scores(model)
            if self.held_out.also is not None:
                figures |= self._others(model, self.held_out.also)
        return figures

    def probe(self, model: nn.Module) -> list[tuple[str, str]]:
        """Answer the recipe's probe prompts.

        Args:
            model: What the method has prepared.

        Returns:
            Prompt and answer of each, on the first process.
        """
        prompts = self.block.probe_prompts
        if not prompts or self.processes.rank != 0:
            return []
        with untouched_random(self.processes.device):
            return list(zip(prompts, self._answer(model, [tuple(to_messages(prompt)) for prompt in prompts])))

    def _scores(self, model: nn.Module) -> Figures:
        scores: Figures = {}
        if self.processes.rank == 0:
            records = self.held_out.records[: self.block.max_predict_samples]
            answers = self._answer(model, [record.prompt for record in records])
            found = score(answers, [record.answer for record in records])
            scores = {name: found[name] for name in METRICS}
        return cast(Figures, self.processes.share(scores))

    def _others(self, model: nn.Module, measure: Callable[[Any, torch.device], Figures]) -> Figures:
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), precision(self.block, self.processes.device):
                return measure(model, self.processes.device)
        finally:
            model.train(was_training)

    def _answer(self, model: nn.Module, prompts: Sequence[Sequence[Message]]) -> list[str]:
        """Answer with the likeliest tokens, many prompts together; the model comes back as it was."""
        block, tokenizer = self.block, self.tokenizer
        asked: Any = model
        was_training = asked.training
        asked.eval()
        try:
            with precision(block, self.processes.device):
                if tokenizer.generation == 0:  # it fills blanks, one text at a time
                    options = {"options": _GREEDY, "max_new_tokens": self.held_out.answer_tokens}
                    texts = ["".join(message.content for message in prompt) for prompt in prompts]
                    return [reply_to(asked, tokenizer, text, **options).text for text in texts]
                context = asked.config.max_position_embeddings
                answers = generate_batch(
                    asked,
                    [fit_context(tokenizer, prompt, context, 1)[0] for prompt in prompts],
                    _GREEDY,
                    stop_ids=tokenizer.stop_ids,
                    max_new_tokens=self.held_out.answer_tokens,
                    batch_size=block.per_device_eval_batch_size or block.per_device_train_batch_size,
                )
                return [answer_text(tokenizer, ids) for ids in answers]
        finally:
            asked.train(was_training)


@dataclass
class Best:
    """The best validation so far.

    Attributes:
        metric: The figure that decides; losses are to be low, others high.
        value: Its best value.
        step: When it was measured.
        worse: Validations since then.
    """

    metric: str
    value: float | None = None
    step: int | None = None
    worse: int = 0

    def see(self, step: int, figures: Figures) -> bool:
        """Compare a validation with the best.

        Args:
            step: Steps done.
            figures: What was measured; without the metric nothing changes.

        Returns:
            Whether it is the best so far.
        """
        value = figures.get(self.metric)
        if value is None:
            return False
        better = self.value is None or (value < self.value if self.metric == "eval_loss" else value > self.value)
        if better:
            self.value, self.step, self.worse = value, step, 0
        else:
            self.worse += 1
        return better


@contextlib.contextmanager
def untouched_random(device: torch.device) -> Iterator[None]:
    """Give back every random generator as it was, so that measuring leaves no trace.

    Args:
        device: Whose generator is kept beside those of the CPU, Python and NumPy.
    """
    kept = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    kept_there = random_state(device)
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        random.setstate(kept[1])
        numpy.random.set_state(kept[2])
        set_random_state(device, kept_there)


def mean_loss(
    model: nn.Module,
    processes: Processes,
    examples: Sequence[Example] | Sequence[Batch],
    pad_token_id: int,
    block: TrainBlock,
) -> float:
    """Measure the mean loss per label token, without learning.

    Args:
        model: The model that the processes hold.
        processes: They share the batches.
        examples: What to measure on, or the batches to measure on.
        pad_token_id: Fills short rows of examples.
        block: Batch size and precision.

    Returns:
        The loss in nats per token.
    """
    was_training = model.training
    model.eval()
    loss_sum = label_tokens = 0.0
    try:
        with torch.no_grad():
            batches = list(_in_batches(examples, pad_token_id, block))
            for batch, counts in own_share(batches, processes.rank, processes.world):
                with precision(block, processes.device):
                    loss, targets = processes.loss(batch.inputs)
                loss_sum += loss.item() * counts
                label_tokens += targets * counts
    finally:
        model.train(was_training)
    loss_sum, label_tokens = processes.sums(loss_sum, label_tokens)
    return loss_sum / label_tokens


def _in_batches(examples: Sequence[Example] | Sequence[Batch], pad_token_id: int, block: TrainBlock) -> Iterator[Batch]:
    """Yield batches as they are, or examples in batches of similar lengths."""
    if all(isinstance(example, Batch) for example in examples):
        yield from cast("Sequence[Batch]", examples)
        return
    size = block.per_device_eval_batch_size or block.per_device_train_batch_size
    fixed = block.model_copy(update={"seed": 0, "per_device_train_batch_size": size})
    records = Records(cast("Sequence[Example]", examples), pad_token_id, fixed)
    for window in itertools.islice(records.windows({}, 1), records.steps(1, 1)):
        yield from window.batches
