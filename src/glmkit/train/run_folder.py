"""The run folder is the report: whatever happens to a run, its folder says what was asked, what ran, and how it ended.

config.yaml            the recipe as it was given           metrics.jsonl, samples.jsonl   while it runs
config.resolved.yaml   every value and where it is from     log.txt                        what was said
env.json               versions, device, threads, command   exit.json                      how it ended: cause, cure
step-N/, latest        checkpoints                          report.md, report.html, plots/
model/ or adapter/     the result
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from glmkit import devices
from glmkit.errors import GlmkitError, RunRefusedError, TrainingError
from glmkit.train.arguments import RunRecipe, as_given, as_resolved
from glmkit.train.checkpoints import lock_folder
from glmkit.writing import write_text_atomic

EXIT_FILE, ENV_FILE, LOG_FILE = "exit.json", "env.json", "log.txt"
_PACKAGES = ("glmkit", "torch", "transformers", "peft", "safetensors", "datasets", "bitsandbytes", "deepspeed", "numpy")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class RunRecord:
    """What is known of a run while it goes.

    Attributes:
        output: The run's folder.
        writes: Whether this process writes; of several only the first does.
        facts: Name -> what the report's first table says of it, in this order.
        sections: Titles and Markdown of what the report says beside its own parts.
        step: Optimizer steps done.
        total_steps: All steps of the run.
        interrupted: Whether a signal stopped it.
        result: Name of the folder with the result, if there is one.
        begun: Whether the folder is this run's; before, what is said waits in `unsaid`.
        unsaid: Lines for log.txt.
    """

    output: Path
    writes: bool = True
    facts: dict[str, str] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)
    step: int = 0
    total_steps: int = 0
    interrupted: bool = False
    result: str | None = None
    begun: bool = False
    unsaid: list[str] = field(default_factory=list)

    def say(self, text: str, *, show: bool = True) -> None:
        """Keep a sentence in log.txt.

        Args:
            text: One or a few lines.
            show: Also show it on stderr.
        """
        if not self.writes:
            return
        if show:
            print(text, file=sys.stderr)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self.unsaid += [f"{stamp} {line}\n" for line in text.splitlines()]
        if not self.begun:
            return
        with contextlib.suppress(OSError), open(self.output / LOG_FILE, "a", encoding="utf-8") as file:
            file.write("".join(self.unsaid))
            self.unsaid.clear()


_current: ContextVar[RunRecord | None] = ContextVar("run_record", default=None)


@contextlib.contextmanager
def recorded(recipe: RunRecipe, *, resume: bool = False, writes: bool = True) -> Iterator[RunRecord]:
    """Record a run in its folder, however it ends; inside another one for the same folder it is that one.

    Args:
        recipe: What is to be done.
        resume: Whether an earlier run in the folder goes on.
        writes: Whether this process writes.

    Yields:
        The record, to be filled.

    Raises:
        TrainingError: In place of an error of the disk or of the memory, with its cause and cure. Other errors pass.
    """
    output, outer = Path(recipe.output.dir), _current.get()
    if outer is not None and outer.output == output:
        yield outer
        return
    record, started = RunRecord(output, writes), time.time()
    token = _current.set(record)
    # A run that was here before is only touched by its own continuation.
    foreign = not resume and (output / "run.json").exists()
    try:
        yield record
    except BaseException as error:
        shown = _with_cure(error, record)
        if not (foreign or isinstance(error, RunRefusedError)):
            _end(record, recipe, started, shown)
        if shown is error:
            raise
        raise shown from error
    else:
        _end(record, recipe, started, None)
    finally:
        _current.reset(token)


def begin(recipe: RunRecipe, processes: str, record: RunRecord) -> None:
    """Write what is known when a run begins or goes on; the lock of the folder is held.

    Args:
        recipe: What is done.
        processes: What really runs, in words.
        record: The run's record.

    Raises:
        OutputError: If the disk refuses.
    """
    if not record.writes:
        return
    record.begun = True
    (record.output / EXIT_FILE).unlink(missing_ok=True)
    _write_settings(recipe, record, processes)
    record.say(f"begins: {environment(processes)['command']}", show=False)


def environment(processes: str) -> dict[str, Any]:
    """Say what a run runs on.

    Args:
        processes: What really runs, in words.

    Returns:
        Versions, system, device, threads, command and time.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    accelerators = devices.described()
    return {
        "command": shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]]),
        "folder": os.getcwd(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "processes": processes,
        "accelerator": accelerators[0]["name"] if accelerators else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions,
    }


def cause_and_cure(error: BaseException, record: RunRecord) -> tuple[str, str | None]:
    """Say in words why a run ended.

    Args:
        error: What ended it.
        record: Where it had come.

    Returns:
        The cause, and what to do about it, None if nobody knows.
    """
    again = "then go on with --resume" if record.step else "then start again"
    if isinstance(error, GlmkitError):
        return error.message, error.hint
    if isinstance(error, KeyboardInterrupt):
        return "it was stopped at once, by a second Ctrl-C or before the first step", "go on with --resume"
    if _is_out_of_memory(error):
        return (
            f"memory ran out after step {record.step}: {str(error).splitlines()[0] if str(error) else 'no details'}",
            "--resume --allow-change train.gradient_checkpointing=true, or train.loss_chunk_tokens=1024, goes on with "
            "less memory; a new run may halve per_device_train_batch_size and double gradient_accumulation_steps",
        )
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return (
            f"the disk is full after step {record.step}: {_os_reason(error)}",
            f"free space in {record.output}, {again}",
        )
    if isinstance(error, OSError):
        return f"the disk failed after step {record.step}: {_os_reason(error)}", f"mend it, {again}"
    return f"{type(error).__name__}: {error}", "this looks like a mistake in the program; --debug shows where"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; one that a kill cut short is left out.

    Args:
        path: The file; a missing one has no lines.
    """
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            content = json.loads(line)
            if isinstance(content, dict):
                found.append(content)
    return found


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; one that is missing or damaged is empty.

    Args:
        path: The file.
    """
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def _is_out_of_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def _os_reason(error: OSError) -> str:
    file = f" ({Path(error.filename).name})" if isinstance(error.filename, str) else ""
    return f"{error.strerror or error}{file}"


def _with_cure(error: BaseException, record: RunRecord) -> BaseException:
    """Return an error with cause and cure in place of one that has none."""
    known = isinstance(error, GlmkitError | KeyboardInterrupt | SystemExit)
    if known or not (_is_out_of_memory(error) or (isinstance(error, OSError) and error.errno)):
        return error
    cause, cure = cause_and_cure(error, record)
    return TrainingError(cause, hint=cure)


def _write_settings(recipe: RunRecipe, record: RunRecord, processes: str) -> None:
    record.output.mkdir(parents=True, exist_ok=True)
    write_text_atomic(record.output / "config.yaml", as_given(recipe))
    write_text_atomic(record.output / "config.resolved.yaml", as_resolved(recipe))
    text = json.dumps(environment(processes) | {"total_steps": record.total_steps}, indent=1, ensure_ascii=False)
    write_text_atomic(record.output / ENV_FILE, text + "\n")


def _end(record: RunRecord, recipe: RunRecipe, started: float, error: BaseException | None) -> None:
    """Write exit.json and the report; a disk that refuses even that is told on stderr."""
    from glmkit.train.report import write_report

    if not record.writes:
        return
    cause, cure = (None, None) if error is None else cause_and_cure(error, record)
    ended = "interrupted" if record.interrupted or isinstance(error, KeyboardInterrupt) else "finished"
    if error is not None and ended == "finished":
        ended = "failed"
    if record.interrupted:
        cause, cure = cause or "a signal asked it to stop", cure or "go on with --resume"
    latest = record.output / "latest"
    about: Mapping[str, Any] = {
        "ended": ended,
        "cause": cause,
        "cure": cure,
        "error": None if error is None else type(error).__name__,
        "step": record.step,
        "total_steps": record.total_steps,
        "checkpoint": latest.read_text().strip() if latest.is_file() else None,
        "result": record.result,
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started)),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seconds": round(time.time() - started, 1),
    }
    try:
        with lock_folder(record.output):  # one that began before the lock was held may have met another run
            if not record.begun:
                _write_settings(recipe, record, "it ended before the work was shared")
            record.begun = True
            write_text_atomic(record.output / EXIT_FILE, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
            record.say(f"{ended} after step {record.step}" + (f": {cause}" if cause else ""), show=False)
            write_report(record.output, record.facts, record.sections)
    except RunRefusedError:
        return
    except (OSError, GlmkitError) as trouble:
        if error is None:
            print(f"the report of the run could not be written: {trouble}", file=sys.stderr)
