"""What may go wrong with a run's folder, its disk and its continuation, by the numbers of docs/reliability.md.

Runs that are killed stand in test_kills.py, several processes in test_distributed.py.
"""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glmkit.errors import OutputError, RunRefusedError, TrainingError
from glmkit.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM
from glmkit.train import checkpoints as saving
from glmkit.train import loop
from glmkit.train.checkpoints import (
    checkpoints,
    lock_folder,
    newest_checkpoint,
    publish,
    save_checkpoint,
    space_warning,
    sweep,
)
from glmkit.train.identity import base_fingerprint
from glmkit.train.processes import OneProcess
from tiny_runs import SIZES, PadOnly, examples, recipe


def write(text: str) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "weights.safetensors").write_text(text)
        (folder / "optimizer.safetensors").write_text("moments")

    return fill


def save(output: Path, step: int, keep: int = 9, run_id: str = "mine", **options: Any) -> Path:
    return save_checkpoint(output, step, run_id, write(f"of step {step}"), keep, **options)


def names(output: Path) -> list[str]:
    return [path.name for path in checkpoints(output)]


def model_of(seed: int = 5, **sizes: Any) -> ChatGLM2ForCausalLM:
    torch.manual_seed(seed)
    return ChatGLM2ForCausalLM(ChatGLM2Config(**SIZES | sizes))


def go(folder: Path, *, model: Any = None, number: int = 21, **options: Any) -> Any:
    """One tiny run; `options` of `train` are taken out of those of the recipe."""
    own = {key: options.pop(key) for key in ("resume", "on_step", "allow_change", "processes") if key in options}
    made = recipe(str(folder), options.pop("method", None), **options)
    return loop.train(model or model_of(), PadOnly(), made, examples(number), progress=False, **own)


def stop_after(step: int) -> Callable[..., None]:
    def stop(done: int, total: int, figures: dict[str, float]) -> None:
        if done == step:
            os.kill(os.getpid(), 15)

    return stop


def fail_with(number: int, name: str, code: int, monkeypatch: pytest.MonkeyPatch, match: str = "") -> None:
    """Lets the `number`-th call of os.NAME for a path with `match` in it fail."""
    plain, count = getattr(os, name), 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        if match in str(args):
            count += 1
            if count == number:
                raise OSError(code, os.strerror(code))
        return plain(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)


# The disk -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mkdir", "fsync", "rename"])
def test_t15_a_full_disk_names_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    save(tmp_path, 2)
    match = {"mkdir": "step-4", "fsync": "", "rename": "step-4"}[name]
    fail_with(1, name, errno.ENOSPC, monkeypatch, match)
    with pytest.raises(TrainingError, match=r"No space left on device.*; step-2 is left, and whole\nhint: .*--resume"):
        save(tmp_path, 4)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path, "mine") == (tmp_path / "step-2", [])
    assert {path.name for path in tmp_path.iterdir()} == {"step-2", "latest"}
    save(tmp_path, 4)
    assert names(tmp_path) == ["step-4", "step-2"]


def test_t16_a_quota_that_is_met_by_the_pointer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2, keep=1)
    fail_with(1, "replace", errno.EDQUOT, monkeypatch, "latest")
    with pytest.raises(TrainingError, match=r"the pointer `latest` could not be moved: .*; step-4 is left, and whole"):
        save(tmp_path, 4, keep=1)
    monkeypatch.undo()
    assert (tmp_path / "latest").read_text() == "step-2\n"
    assert names(tmp_path) == ["step-4", "step-2"]  # nothing is deleted before the pointer has moved
    assert newest_checkpoint(tmp_path, "mine")[0] == tmp_path / "step-4"


def test_t17_a_disk_that_becomes_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"

    def remount(step: int, total: int, figures: dict[str, float]) -> None:
        if step == 3:
            for name in ("mkdir", "open", "rename", "replace"):
                plain = getattr(os, name)

                def refuse(*args: Any, plain: Any = plain, **kwargs: Any) -> Any:
                    if str(folder) in str(args[0]) and not (len(args) > 1 and args[1] == os.O_RDONLY | os.O_CLOEXEC):
                        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
                    return plain(*args, **kwargs)

                monkeypatch.setattr(os, name, refuse)

    with pytest.raises(TrainingError, match=r"Read-only file system.*step-2 is left, and whole"):
        go(folder, on_step=remount)
    monkeypatch.undo()
    assert go(folder, resume=True).steps == 10


def test_t18_a_disk_that_cannot_read_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2)
    save(tmp_path, 4)
    plain = saving._sha256

    def broken(path: Path) -> str:
        if path.parent.name == "step-4":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return plain(path)

    monkeypatch.setattr(saving, "_sha256", broken)
    found, skipped = newest_checkpoint(tmp_path, "mine")
    assert found == tmp_path / "step-2"
    assert skipped == ["step-4: it cannot be read: Input/output error (optimizer.safetensors)"]


def test_t19_a_folder_that_cannot_be_written_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"the output folder .*file/run cannot be written"):
        go(tmp_path / "file" / "run")
    # Root may write everywhere, so a folder that was writable and is not any more is made by hand.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("")
    fail_with(1, "open", errno.EACCES, monkeypatch, ".writable")
    steps: list[int] = []
    with pytest.raises(TrainingError, match=r"cannot be written: .*Permission denied\nhint: .*output\.dir="):
        go(tmp_path / "run", on_step=lambda step, *_: steps.append(step))
    assert steps == []


def test_t20_too_little_room_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert space_warning(tmp_path, 1000, 2) is None
    free = saving.shutil.disk_usage(tmp_path).free
    assert space_warning(tmp_path, free // 3 - 10_000_000, 2) is None
    assert space_warning(tmp_path, free // 2, 2) is not None
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: os.statvfs_result and type("", (), {"free": 40_000}))
    go(tmp_path / "run")
    # 2 checkpoints (the kept one and the next) of the 12 bytes of each weight and its two moments.
    size = sum(parameter.numel() for parameter in model_of().parameters()) * 12
    assert 2 * size > 40_000
    assert "warning: " in capsys.readouterr().err
    assert "GB free; 1 checkpoints of about" in (tmp_path / "run" / "log.txt").read_text()


# What is found --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("shorten", "weights.safetensors has 5 bytes instead of 9"),
        ("flip", "weights.safetensors is damaged (SHA-256 differs)"),
        ("no manifest", "it has no manifest.json"),
        ("half a manifest", "its manifest cannot be used"),
        ("deep manifest", "its manifest cannot be used: manifest.json is nested too deeply"),
        ("empty optimizer", "optimizer.safetensors has 0 bytes instead of 7"),
        ("remove", "weights.safetensors is missing"),
        ("add", "other.safetensors is not in its manifest"),
        ("link", "weights.safetensors is no regular file"),
        ("renamed", "its manifest is that of step 2"),
    ],
)
def test_t21_t22_t23_t24_a_damaged_checkpoint_is_skipped_with_the_reason(
    tmp_path: Path, damage: str, reason: str
) -> None:
    save(tmp_path, 2)
    newest = save(tmp_path, 4)
    weights, manifest = newest / "weights.safetensors", newest / "manifest.json"
    if damage == "shorten":
        weights.write_text("of st")
    elif damage == "flip":
        weights.write_text("of step 5")
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_text(manifest.read_text()[:40])
    elif damage == "deep manifest":
        manifest.write_text('{"a":' * 100_000)
    elif damage == "empty optimizer":
        (newest / "optimizer.safetensors").write_text("")
    elif damage == "remove":
        weights.unlink()
    elif damage == "add":
        (newest / "other.safetensors").write_text("")
    elif damage == "link":
        weights.unlink()
        weights.symlink_to(tmp_path / "step-2" / "weights.safetensors")
    else:
        manifest.write_text((tmp_path / "step-2" / "manifest.json").read_text())
    found, skipped = newest_checkpoint(tmp_path, "mine")
    assert found == tmp_path / "step-2"
    assert len(skipped) == 1
    assert skipped[0].startswith(f"step-4: {reason}")


def test_t24_a_run_goes_on_from_the_last_good_one_and_says_so(tmp_path: Path) -> None:
    expected = go(tmp_path / "uncut", save_total_limit=3).metrics
    folder = tmp_path / "run"
    go(folder, save_total_limit=3, on_step=stop_after(7))
    (folder / "step-7" / "optimizer.safetensors").write_bytes(b"")
    resumed = go(folder, save_total_limit=3, resume=True)
    assert [(line["step"], line["loss"]) for line in resumed.metrics] == [
        (line["step"], line["loss"]) for line in expected
    ]
    assert "skipped step-7: optimizer.safetensors has 0 bytes instead of" in (folder / "log.txt").read_text()


def test_t25_t26_folders_of_other_runs_and_tools_are_not_chosen(tmp_path: Path) -> None:
    save(tmp_path, 99999, run_id="another")
    (tmp_path / "checkpoint-99999").mkdir()
    (tmp_path / "checkpoint-99999" / "optimizer.pt").write_bytes(b"")
    for step in (9900, 10000, 900):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-99999", "step-10000", "step-9900", "step-900"]  # by number, not by name
    assert newest_checkpoint(tmp_path, "mine") == (
        tmp_path / "step-10000",
        ["step-99999: it belongs to another run"],
    )


def test_t27_the_newest_stays_whatever_the_limit(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=1)
        assert names(tmp_path) == [f"step-{step}"]
    save(tmp_path, 4, keep=0)
    assert names(tmp_path) == ["step-4"]
    with pytest.raises(ValueError, match="save_total_limit"):
        recipe(str(tmp_path), save_total_limit=0)


def test_t28_a_best_checkpoint_outlives_the_limit(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep=2, protected=[2])
    assert names(tmp_path) == ["step-6", "step-5", "step-2"]


def test_a_damaged_higher_number_neither_counts_nor_is_deleted(tmp_path: Path) -> None:
    for step in (2, 4):
        save(tmp_path, step)
    (tmp_path / "step-4" / "weights.safetensors").write_text("")
    # The run goes on from step 2 and saves at step 3: that is now the last good one.
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-4", "step-3"]
    assert newest_checkpoint(tmp_path, "mine")[0] == tmp_path / "step-3"


def test_t29_times_are_not_looked_at(tmp_path: Path) -> None:
    for number, step in enumerate((2, 4, 6)):
        os.utime(save(tmp_path, step), (10_000 - number, 10_000 - number))
    assert newest_checkpoint(tmp_path, "mine")[0] == tmp_path / "step-6"
    save(tmp_path, 8, keep=2)
    assert names(tmp_path) == ["step-8", "step-6"]


def test_t30_leftovers_are_cleaned_and_the_step_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 2)
    for name in (".step-4.tmp-0123abcd", ".trash-0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
    (tmp_path / ".latest.tmp-0123abcd").write_text("step-4\n")
    # Moved aside to be replaced, and killed before the new one had its name: it gets its own back.
    (tmp_path / ".model.old-0123abcd").mkdir()
    (tmp_path / ".model.old-0123abcd" / "weights").write_text("whole")
    for name in (".config.tmp-notours", "step-3.tmp-0123abcd", ".git"):
        (tmp_path / name).mkdir()
    sweep(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step-2", "latest", "model", ".config.tmp-notours", "step-3.tmp-0123abcd", ".git"}
    save(tmp_path, 4)
    assert newest_checkpoint(tmp_path, "mine") == (tmp_path / "step-4", [])


class Reached(Exception):
    """A pickle was run."""


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch reached",))


@pytest.mark.parametrize("name", ["rng_state.pth", "optimizer.pt", "training_args.bin", "scheduler.pt", "x/data.pkl"])
def test_t45_a_checkpoint_with_pickles_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Also if its manifest was made to fit."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 2)

    def hostile(folder: Path) -> None:
        write("x")(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(pickle.dumps(Evil()))

    save_checkpoint(tmp_path, 4, "mine", hostile, 9)
    for forbidden in (pickle, torch):
        monkeypatch.setattr(forbidden, "load", lambda *_, **__: pytest.fail("something was unpickled"))
    found, skipped = newest_checkpoint(tmp_path, "mine")
    assert found == tmp_path / "step-2"
    assert skipped[0].startswith(f"step-4: {name} is of a kind that can run code")
    assert not (tmp_path / "reached").exists()


def test_t45_a_prefix_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def prefix(content: Any) -> Callable[[Path], None]:
        def fill(folder: Path) -> None:
            (folder / "adapter").mkdir()
            torch.save(content, folder / "adapter" / "pytorch_model.bin")

        return fill

    save_checkpoint(tmp_path, 2, "mine", prefix({"transformer.prefix_encoder.embedding.weight": torch.ones(2, 3)}), 9)
    save_checkpoint(tmp_path, 4, "mine", prefix({"transformer.prefix_encoder.embedding.weight": Evil()}), 9)
    found, skipped = newest_checkpoint(tmp_path, "mine")
    assert found == tmp_path / "step-2"
    assert skipped[0].startswith("step-4: adapter/pytorch_model.bin is refused: ")
    assert not (tmp_path / "reached").exists()


def test_t45_a_manifest_cannot_lead_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    newest = save(tmp_path, 4)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert newest_checkpoint(tmp_path, "mine") == (None, ["step-4: ../secret is missing"])


# Several processes, as far as one can play them -----------------------------------------------------------------------


class Played:
    """Two processes as two threads."""

    def __init__(self, rank: int, board: dict[str, Any], barrier: threading.Barrier) -> None:
        self.rank, self.world, self.board, self.barrier = rank, 2, board, barrier

    def all_agree(self, yes: bool) -> bool:
        self.board[f"yes {self.rank}"] = yes
        self.barrier.wait(20)
        agreed = self.board["yes 0"] and self.board["yes 1"]
        self.barrier.wait(20)
        return agreed

    def share(self, value: Any) -> Any:
        if self.rank == 0:
            self.board["shared"] = value
        self.barrier.wait(20)
        shared = self.board["shared"]
        self.barrier.wait(20)
        return shared


def play(work: Callable[[Any], Any]) -> list[Any]:
    board: dict[str, Any] = {}
    barrier, ended = threading.Barrier(2), [None, None]

    def one(rank: int) -> None:
        try:
            ended[rank] = work(Played(rank, board, barrier))
        except BaseException as error:
            ended[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "a process hangs"
    return ended


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("kind", [OSError(errno.ENOSPC, "No space left on device"), TypeError("a mistake")])
def test_t13_t14_one_process_that_cannot_write_fails_the_save_for_all(
    tmp_path: Path, failing: int, kind: Exception
) -> None:
    save(tmp_path, 2)

    def work(processes: Any) -> Path:
        def part(folder: Path) -> None:
            if processes.rank == failing:
                raise kind
            (folder / f"part-{processes.rank}.safetensors").write_text("part")

        return save_checkpoint(tmp_path, 4, "mine", part, 9, processes=processes)

    ended = play(work)
    assert isinstance(ended[1 - failing], TrainingError)
    assert "another process could not write its part" in str(ended[1 - failing])
    assert "step-2 is left, and whole" in str(ended[1 - failing])
    assert type(ended[failing]) is (TypeError if isinstance(kind, TypeError) else TrainingError)
    assert {path.name for path in tmp_path.iterdir()} == {"step-2", "latest"}


def test_t13_the_first_process_fails_after_all_have_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(1, "rename", errno.ENOSPC, monkeypatch, "step-4")

    def work(processes: Any) -> Path:
        def part(folder: Path) -> None:
            (folder / f"part-{processes.rank}.safetensors").write_text("part")

        return save_checkpoint(tmp_path, 4, "mine", part, 9, processes=processes)

    for error in play(work):
        assert isinstance(error, TrainingError)
        assert "No space left on device" in str(error)
    monkeypatch.undo()
    assert play(work) == [tmp_path / "step-4"] * 2
    files = json.loads((tmp_path / "step-4" / "manifest.json").read_text())["files"]
    assert set(files) == {"part-0.safetensors", "part-1.safetensors"}


def test_a_lock_that_is_taken_refuses_all_processes(tmp_path: Path) -> None:
    def work(processes: Any) -> str:
        with lock_folder(tmp_path, processes):
            return "held"

    assert play(work) == ["held", "held"]
    with lock_folder(tmp_path):
        assert [type(error) for error in play(work)] == [RunRefusedError, RunRefusedError]


def test_t46_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = "import sys, time; from glmkit.train.checkpoints import lock_folder; from pathlib import Path\n"
    code += "with lock_folder(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunRefusedError, match=f"another run is writing to .*: process {holder.pid} on "):
            go(tmp_path)
        # It did not touch the folder of the run that goes on.
        assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    finally:
        holder.kill()
        holder.wait()
    assert go(tmp_path).steps == 10


# Going on -------------------------------------------------------------------------------------------------------------


def test_t33_what_differs_is_listed_and_refused(tmp_path: Path) -> None:
    method = {"name": "lora", "lora_rank": 4}
    pytest.importorskip("peft")
    go(tmp_path, method=method, on_step=stop_after(5))
    before = (tmp_path / "exit.json").read_text()
    for changes, found in (
        ({"gradient_accumulation_steps": 2}, r"train\.gradient_accumulation_steps: 1 then, 2 now"),
        ({"per_device_train_batch_size": 5}, r"train\.per_device_train_batch_size: 3 then, 5 now"),
        ({"method": {"name": "lora", "lora_rank": 2}}, r"method\.lora_rank: 4 then, 2 now"),
        ({"method": {"name": "full"}}, r"method\.name: 'lora' then, 'full' now"),
        ({"number": 20}, "the training data, or how it becomes tokens, has changed"),
        ({"model": model_of(6)}, "the base model has other weights"),
        ({"model": model_of(seq_length=128)}, "the base model has another config"),
    ):
        with pytest.raises(RunRefusedError, match=f"was started differently:\n.*{found}"):
            go(tmp_path, resume=True, allow_change=True, **{"method": method} | changes)
    assert (tmp_path / "exit.json").read_text() == before
    assert go(tmp_path, resume=True, method=method, logging_steps=1).steps == 10


def test_t33_what_may_change_needs_a_word_and_says_what_it_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(tmp_path, on_step=stop_after(5), lr_scheduler_type="constant", warmup_ratio=0)
    changed = {"learning_rate": 1e-3, "max_steps": 12, "lr_scheduler_type": "constant", "warmup_ratio": 0}
    with pytest.raises(
        RunRefusedError, match=r"(?s)learning_rate: 0\.01 then, 0\.001 now \(with --allow-change: .*hint"
    ):
        go(tmp_path, resume=True, **changed)
    resumed = go(tmp_path, resume=True, allow_change=True, logging_steps=1, **changed)
    assert resumed.steps == 12
    assert {line["learning_rate"] for line in resumed.metrics if line["step"] > 6} == {1e-3}
    told = capsys.readouterr().err
    assert "from step 6 on, train.learning_rate: 0.01 then, 0.001 now: the learning rate of every step" in told
    kept = json.loads((tmp_path / "run.json").read_text())
    assert len(kept["changes"]) == 2
    go(tmp_path, resume=True, **changed)  # from now on this is the run


def test_the_base_is_the_same_in_every_precision() -> None:
    model = model_of().to(torch.bfloat16)
    assert base_fingerprint(model) == base_fingerprint(model.float())
    assert base_fingerprint(model)["weights"] != base_fingerprint(model_of(6))["weights"]


def test_t34_t35_the_same_records_in_the_same_order(tmp_path: Path) -> None:
    """Shuffled, over borders of passes: each step of the resumed run sees what it saw in the uncut one."""

    class Listening(OneProcess):
        def __init__(self) -> None:
            super().__init__(torch.device("cpu"))
            self.seen: list[list[int]] = []

        def loss(self, inputs: Any, **options: Any) -> Any:
            self.seen.append(inputs["input_ids"][:, 0].tolist())
            return super().loss(inputs, **options)

    whole, first, second = Listening(), Listening(), Listening()
    settings = {"max_steps": 19, "gradient_accumulation_steps": 2, "save_steps": 0}
    go(tmp_path / "whole", processes=whole, **settings)
    go(tmp_path / "cut", processes=first, on_step=stop_after(6), **settings)
    go(tmp_path / "cut", processes=second, resume=True, **settings)
    assert first.seen + second.seen == whole.seen
    one_pass = sorted(start for batch in whole.seen[:7] for start in batch)
    assert one_pass == sorted(int(example.input_ids[0]) for example in examples())


def test_t36_records_that_changed_are_refused(tmp_path: Path) -> None:
    go(tmp_path, on_step=stop_after(3))
    changed = examples()
    changed[4].input_ids[2] += 1
    made = recipe(str(tmp_path))
    with pytest.raises(RunRefusedError, match="training data"):
        loop.train(model_of(), PadOnly(), made, changed, resume=True, progress=False)


class Ill(ChatGLM2ForCausalLM):
    """A model whose n-th loss is something else."""

    calls, when, what = 0, 0, "nan"

    def label_loss(self, *args: Any, **kwargs: Any) -> Any:
        Ill.calls += 1
        loss, targets = super().label_loss(*args, **kwargs)
        if Ill.calls == Ill.when:
            if Ill.what == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            loss = loss * (math.nan if Ill.what == "nan" else math.inf)
        return loss, targets


def ill(when: int, what: str) -> Ill:
    Ill.calls, Ill.when, Ill.what = 0, when, what
    torch.manual_seed(5)
    return Ill(ChatGLM2Config(**SIZES))


def test_t39_a_loss_scale_that_overflows_before_a_save_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "measured_peak", lambda *_: 1e9)  # float16 products of a CPU take seconds to measure

    class Overflowing(OneProcess):
        """Every third step has gradients that float16 could not hold."""

        steps = 0

        def step(self, rate: float, max_norm: float, scale: float) -> float:
            Overflowing.steps += 1
            if Overflowing.steps % 3 == 1:
                self.skip()
                return math.inf
            return super().step(rate, max_norm, scale)

    results = []
    for folder, cuts in (("uncut", []), ("cut", [4, 7])):
        Overflowing.steps = 0
        for cut in [*cuts, None]:
            on_step = None if cut is None else stop_after(cut)
            processes = Overflowing(torch.device("cpu"))
            go(tmp_path / folder, processes=processes, resume=cut != (cuts or [None])[0], on_step=on_step, fp16=True)
        results.append((tmp_path / folder / "model" / "model.safetensors").read_bytes())
    assert results[0] == results[1]
    state = json.loads((tmp_path / "cut" / "step-8" / "state.json").read_text())
    assert state["loss_scale"]["scale"] == 2.0**16 / 8  # of steps 1, 4 and 7


@pytest.mark.parametrize("what", ["nan", "inf"])
def test_t40_a_loss_that_is_no_number_overwrites_nothing(tmp_path: Path, what: str) -> None:
    with pytest.raises(TrainingError, match=r"step 5: the loss is (nan|inf).*Records: row \d+"):
        go(tmp_path / "run", model=ill(5, what))
    assert names(tmp_path / "run") == ["step-4"]
    assert (
        newest_checkpoint(tmp_path / "run", json.loads((tmp_path / "run" / "run.json").read_text())["run_id"])[1] == []
    )
    ended = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (ended["ended"], ended["step"], ended["checkpoint"]) == ("failed", 4, "step-4")
    assert "learning_rate" in ended["cure"]
    # Healed, it goes on and ends as if nothing had been.
    go(tmp_path / "run", model=ill(0, what), resume=True)
    go(tmp_path / "uncut", model=ill(0, what))
    one, other = (tmp_path / name / "model" / "model.safetensors" for name in ("run", "uncut"))
    assert one.read_bytes() == other.read_bytes()


def test_t41_memory_that_runs_out_ends_clearly_and_can_go_on(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"memory ran out after step 6: CUDA out of memory"):
        go(tmp_path / "run", model=ill(7, "memory"))
    ended = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (ended["ended"], ended["step"]) == ("failed", 6)
    assert "gradient_checkpointing=true" in ended["cure"]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "memory ran out after step 6" in report
    assert "What to do: " in report
    resumed = go(tmp_path / "run", model=ill(0, ""), resume=True, allow_change=True, gradient_checkpointing=True)
    assert resumed.steps == 10
    plain = go(tmp_path / "plain", model=ill(0, ""))
    assert resumed.loss == pytest.approx(plain.loss, rel=1e-5)


def test_t43_what_is_replaced_stays_until_its_successor_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    publish(target, write("old"))

    def half(folder: Path) -> None:
        (folder / "weights.safetensors").write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        publish(target, half)
    assert (target / "weights.safetensors").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_all_generators_go_on(tmp_path: Path) -> None:
    import random

    import numpy

    from glmkit.train.state import load_generators, save_generators

    def draws() -> list[float]:
        return [random.gauss(0, 1), random.random(), numpy.random.standard_normal(), *torch.rand(2).tolist()]

    draws()  # a second half of a pair of normal numbers is waiting now, in Python and in NumPy
    save_generators(tmp_path, torch.device("cpu"), rank=3)
    expected = draws()
    assert load_generators(tmp_path, torch.device("cpu"), rank=3)
    assert draws() == expected
    assert not load_generators(tmp_path, torch.device("cpu"), rank=4)
