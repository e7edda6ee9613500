"""What a child of `kills.py` does: one tiny training run, with one thing going wrong at a chosen place."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import torch

from glmkit.data.examples import Example
from glmkit.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM
from glmkit.train import loop
from glmkit.train.arguments import Recipe
from glmkit.train.processes import OneProcess
from kills import KILLED, FileCalls

SIZES = {
    "num_layers": 1,
    "padded_vocab_size": 48,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "kv_channels": 8,
    "num_attention_heads": 2,
    "multi_query_group_num": 1,
    "seq_length": 64,
    "multi_query_attention": True,
}


class PadOnly:
    """All of a tokenizer that the loop uses."""

    pad_token_id = 0

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.txt").write_text("pad 0\n")


def examples(number: int = 21) -> list[Example]:
    """Sequences that count upwards, of different lengths."""
    generator = random.Random(1)
    made = []
    for index in range(number):
        start, length = generator.randrange(3, 20), generator.randrange(5, 20)
        ids = torch.arange(start, start + length, dtype=torch.int32)
        labels = torch.where(torch.arange(length) < length // 3, torch.tensor(-100, dtype=torch.int32), ids)
        made.append(Example(ids, labels, int((labels[1:] != -100).sum()), f"row {index}"))
    return made


def recipe(folder: str, method: dict[str, Any] | None = None, **settings: Any) -> Recipe:
    """A recipe that saves every second step and keeps one checkpoint."""
    block = {"per_device_train_batch_size": 3, "max_steps": 10, "learning_rate": 1e-2, "save_steps": 2}
    block |= {"save_total_limit": 1, "logging_steps": 3, "warmup_ratio": 0.2, **settings}
    content = {"model": {"path": "tiny"}, "data": {"train_file": "none"}, "method": method or {"name": "full"}}
    return Recipe.model_validate({**content, "train": block, "output": {"dir": folder}})


def train_tiny(order: dict[str, Any]) -> dict[str, Any]:
    """Trains as ordered.

    Args:
        order: folder; resume; method and settings of the recipe; and what goes wrong:
            at_save {step: {kill_at | fail_at, errno, only}}: in the save after that step;
            at_publication {...}: the same when the result is written;
            inside {call: loss | backward | step, number}: killed in that call of the run;
            signals {step: [names]}: sent to itself after that step;
            file_bytes: no file may be larger.

    Returns:
        What is noted: steps, interrupted, and the file calls of the saves that were watched.
    """
    noted: dict[str, Any] = {"calls": {}}
    torch.manual_seed(order.get("generator", 7))  # whatever it is, a resumed run has its own
    if "file_bytes" in order:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"], order["file_bytes"]))
    _watch_saves(order, noted)
    if "inside" in order:
        _die_inside(order["inside"]["call"], order["inside"]["number"])
    torch.manual_seed(5)
    model = ChatGLM2ForCausalLM(ChatGLM2Config(**SIZES | order.get("sizes", {})))
    plan = {int(step): names for step, names in order.get("signals", {}).items()}

    def after_step(step: int, total: int, figures: dict[str, float]) -> None:
        for name in plan.get(step, []):
            os.kill(os.getpid(), getattr(signal, name))

    torch.manual_seed(order.get("generator", 7))
    result = loop.train(
        model,
        PadOnly(),
        recipe(order["folder"], order.get("method"), **order.get("settings", {})),
        examples(order.get("examples", 21)),
        resume=order.get("resume", False),
        on_step=after_step,
        progress=False,
        allow_change=order.get("allow_change", False),
    )
    return noted | {"steps": result.steps, "interrupted": result.interrupted}


def _watch_saves(order: dict[str, Any], noted: dict[str, Any]) -> None:
    save, publish = loop.save_checkpoint, loop.publish

    def watched_save(output: Path, step: int, *rest: Any, **options: Any) -> Path:
        wanted = order.get("at_save", {}).get(str(step))
        if wanted is None:
            return save(output, step, *rest, **options)
        with FileCalls(**wanted) as calls:
            path = save(output, step, *rest, **options)
        noted["calls"][str(step)] = calls.names
        return path

    def watched_publish(*rest: Any, **options: Any) -> None:
        if "at_publication" not in order:
            return publish(*rest, **options)
        with FileCalls(**order["at_publication"]) as calls:
            publish(*rest, **options)
        noted["calls"]["publication"] = calls.names
        return None

    loop.save_checkpoint, loop.publish = watched_save, watched_publish


def _die_inside(name: str, number: int) -> None:
    plain, count = getattr(OneProcess, name), 0

    def dying(self: Any, *rest: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count < number:
            return plain(self, *rest, **options)
        if name == "step":  # half of the weights have moved
            for parameter in list(self.model.parameters())[::2]:
                parameter.data.add_(1.0)
        if name == "backward":
            plain(self, *rest, **options)
        os._exit(KILLED)

    setattr(OneProcess, name, dying)
