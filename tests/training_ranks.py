"""What the tests of distributed training run on every process: `torchrun … training_ranks.py JOBS`.

JOBS is a JSON list of runs, done one after the other by the same processes. Of each, process N writes OUTPUT.N.json:
{"curve": {step: loss}, "says": what runs, "error": None or text}.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from glmkit.data.examples import Example
from glmkit.errors import GlmkitError
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.train.arguments import Recipe
from glmkit.train.loop import train
from glmkit.train.processes import Processes, processes_for
from tiny_runs import PadOnly

SIZES = {
    "num_layers": 2,
    "padded_vocab_size": 64,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "kv_channels": 8,
    "num_attention_heads": 4,
    "multi_query_group_num": 2,
    "seq_length": 64,
}


class Cut(Exception):
    """The end of a run that is to be continued."""


def examples() -> list[Example]:
    """27 rows that count upwards: with batches of 4 the second window of a pass has a batch less."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(27):
        length = int(torch.randint(6, 24, (1,), generator=generator))
        start = int(torch.randint(3, 30, (1,), generator=generator))
        ids = torch.arange(start, start + length, dtype=torch.int32)
        labels = ids.clone()
        labels[: length // 3] = -100
        made.append(Example(ids, labels, int((labels[1:] != -100).sum()), f"row {index}"))
    return made


def recipe_of(job: dict[str, Any]) -> Recipe:
    """The recipe of a job: four batches a step, whatever the number of processes."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    block = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "num_train_epochs": 4, "logging_steps": 1}
    block |= {"gradient_accumulation_steps": 4 // world, "save_steps": 3, **job.get("train", {})}
    return Recipe.model_validate(
        {
            "model": {"path": "tiny", "device": "cpu"},
            "data": {"train_file": "none"},
            "method": {"name": "full", "lora_dropout": 0.0, **job.get("method", {})},
            "train": block,
            "distributed": job.get("distributed", {}),
            "output": {"dir": job["output"]},
        }
    )


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job.

    Args:
        job: output; method, train, distributed: blocks of the recipe; model: changed sizes; dtype: of the weights;
            resume; and what is special: "from", a run's folder to go on with a copy of; "cut", a step after which the
            run ends as in a crash; "die", a step after which process 1 is killed; "stop", the same and for how many
            seconds it stands still; "disk_fails_on", the process that
            cannot write; "no_number", the step of which the loss is no number in the last process; "native", a folder
            for DeepSpeed's own files.

    Returns:
        Curve, what ran, and the error.
    """
    if "from" in job:
        if os.environ.get("RANK", "0") == "0":
            shutil.copytree(job["from"], job["output"])
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    torch.manual_seed(5)
    model = ChatGLM2ForCausalLM(ChatGLM2Config(**{**SIZES, **job.get("model", {})})).to(
        getattr(torch, job.get("dtype", "float32"))
    )
    recipe = recipe_of(job)
    curve: dict[str, float] = {}
    if "no_number" in job and int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        _spoil(model, lambda: len(curve) + 1 == job["no_number"])

    def on_step(step: int, total: int, figures: dict[str, float]) -> None:
        curve[str(step)] = figures["loss"]
        if step == job.get("cut"):
            raise Cut
        if step == job.get("die") and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if "stop" in job and step == job["stop"][0] and os.environ.get("RANK") == "1":
            subprocess.Popen(["sh", "-c", f"sleep {job['stop'][1]}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)

    says, error = "", None
    try:
        processes = processes_for(recipe, torch.device("cpu"))
        says = processes.describe()
        _break_disk(processes, job)
        with patch("torch.nn.functional.dropout", _no_dropout):  # the official prefix has some, which no setting ends
            train(
                model,
                PadOnly(),
                recipe,
                examples(),
                examples()[:6],
                resume=job.get("resume", False),
                on_step=on_step,
                progress=False,
                processes=processes,
            )
        if "native" in job:
            processes.engine.save_checkpoint(job["native"], tag="global_step8")  # type: ignore[attr-defined]
    except Cut:
        pass
    except GlmkitError as problem:
        error = problem.message
    return {"curve": curve, "says": says, "error": error}


def _no_dropout(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return x


def _spoil(model: Any, now: Callable[[], bool]) -> None:
    """Makes the training loss no number while a condition holds."""
    whole = model.label_loss

    def spoilt(**inputs: torch.Tensor) -> tuple[torch.Tensor, int]:
        loss, targets = whole(**inputs)
        return loss * (float("nan") if now() and torch.is_grad_enabled() else 1.0), targets

    model.label_loss = spoilt


def _break_disk(processes: Processes, job: dict[str, Any]) -> None:
    """Let one process fail where it writes its part of a checkpoint."""
    if job.get("disk_fails_on") != processes.rank:
        return
    write: Callable[[Path], None] = processes.write

    def fail(folder: Path) -> None:
        write(folder)  # what the others take part in is done
        raise OSError(28, "No space left on device")

    processes.write = fail  # type: ignore[method-assign]


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        found = run(job)
        Path(f"{job['output']}.{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
