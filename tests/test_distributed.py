"""Training with several processes: the curve of one process, checkpoints for any number of them, and no hanging.

Every start of torchrun costs seconds, so one start does many runs (`training_ranks.py`).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import training_ranks
from glmkit.errors import CheckpointError, UsageError
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.pickles import FileRefused, inspect_deepspeed_file
from glmkit.train.blocks import Recipe
from glmkit.train.parts import PARTS
from glmkit.train.ranks import strategy_of
from glmkit.train.transform import transform
from glmkit.train.zero_config import read_config
from glmkit.train.zero_files import ZeroFiles

SECONDS = 400  # for a busy machine
ATOL = 1e-5  # sums over processes add in another order
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"name": "lora", "lora_rank": 4},
    "freeze": {"name": "freeze", "num_layer_trainable": 1},
    "ptuning": {"name": "ptuning_v2", "pre_seq_len": 3},
}
Found = dict[str, dict[str, Any]]


def torchrun(folder: Path, jobs: list[dict[str, Any]], processes: int = 2) -> subprocess.CompletedProcess[str]:
    file = folder / f"jobs-{time.monotonic_ns()}.json"
    file.write_text(json.dumps(jobs))
    script = str(Path(__file__).with_name("training_ranks.py"))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [*start, script, str(file)], capture_output=True, text=True, timeout=SECONDS, env=environment, check=False
    )


def results(jobs: list[dict[str, Any]], rank: int = 0) -> Found:
    return {Path(job["output"]).name: json.loads(Path(f"{job['output']}.{rank}.json").read_text()) for job in jobs}


def run_all(folder: Path, jobs: list[dict[str, Any]]) -> Found:
    done = torchrun(folder, jobs)
    assert done.returncode == 0, done.stderr[-6000:]
    return results(jobs)


def equal_curves(found: dict[str, Any], alone: dict[str, Any], steps: range) -> None:
    assert found["error"] is None
    assert list(found["curve"]) == [str(step) for step in steps]
    for step, loss in found["curve"].items():
        assert loss == pytest.approx(alone["curve"][step], abs=ATOL), f"step {step}"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    for file in folder.glob("*.bin"):  # of the official P-Tuning scripts
        found |= torch.load(file, weights_only=True)
    assert found
    return found


def close(one: Path, other: Path, atol: float = ATOL) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        mine, yours = tensor, second[name]
        if name.endswith("query_key_value.bias"):  # what is added to all keys changes nothing: its gradient is noise
            mine, yours = (torch.cat((bias[:32], bias[48:])) for bias in (mine, yours))
        torch.testing.assert_close(yours, mine, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Found:
    """One process: whole runs, and runs that were cut after step 5 with a checkpoint of step 3."""
    jobs = [{"output": str(folder / f"one-{name}"), "method": method} for name, method in METHODS.items()]
    jobs += [{"output": str(folder / f"cut-{name}"), "method": METHODS[name], "cut": 5} for name in ("full", "lora")]
    jobs.append(no_number(folder, "one", {}))
    return {Path(job["output"]).name: training_ranks.run(job) for job in jobs}


def no_number(folder: Path, kind: str, distributed: dict[str, Any]) -> dict[str, Any]:
    """A run that leaves its second step out, because one process has no number."""
    left_out = {"no_number": 2, "train": {"on_nonfinite_loss": "skip"}}
    return {"output": str(folder / f"{kind}-no-number"), "distributed": distributed, **left_out}


def check_no_number(folder: Path, kind: str, found: Found, alone: Found) -> None:
    curve, whole = found[f"{kind}-no-number"]["curve"], alone["one-no-number"]["curve"]
    assert math.isnan(whole["2"])
    assert math.isnan(curve["2"])
    assert [curve[step] for step in curve if step != "2"] == pytest.approx(
        [whole[step] for step in whole if step != "2"], abs=ATOL
    )
    close(folder / "one-no-number" / "model", folder / f"{kind}-no-number" / "model")


def legs(folder: Path, kind: str, distributed: dict[str, Any]) -> list[dict[str, Any]]:
    """With two processes: a run that is cut, its continuation, and the continuation of one process's run."""
    jobs = [no_number(folder, kind, distributed)]
    for name in ("full", "lora"):
        shared = {"method": METHODS[name], "distributed": distributed}
        cut = str(folder / f"{kind}-{name}")
        jobs.append({"output": cut, "cut": 5, **shared})
        jobs.append({"output": f"{cut}-on", "from": cut, "resume": True, **shared})
        jobs.append({"output": f"{cut}-up", "from": str(folder / f"cut-{name}"), "resume": True, **shared})
    return jobs


def check_legs(folder: Path, kind: str, found: Found, alone: Found) -> None:
    check_no_number(folder, kind, found, alone)
    for name in ("full", "lora"):
        whole = alone[f"one-{name}"]
        equal_curves(found[f"{kind}-{name}"], whole, range(1, 6))
        equal_curves(found[f"{kind}-{name}-on"], whole, range(4, 9))
        equal_curves(found[f"{kind}-{name}-up"], whole, range(4, 9))
        result = "model" if name == "full" else "adapter"
        for end in ("on", "up"):
            close(folder / f"one-{name}" / result, folder / f"{kind}-{name}-{end}" / result)
        down = {"output": str(folder / f"{kind}-{name}-down"), "from": str(folder / f"{kind}-{name}")}
        back = training_ranks.run({**down, "method": METHODS[name], "resume": True})
        equal_curves(back, whole, range(4, 9))
        close(folder / f"one-{name}" / result, Path(down["output"]) / result)


@pytest.fixture(scope="module")
def two(folder: Path, alone: Found) -> Found:
    """Everything that torch alone does, with one start."""
    jobs = legs(folder, "ddp", {"strategy": "ddp"}) + legs(folder, "fsdp", {"strategy": "fsdp"})
    for name in ("freeze", "ptuning"):
        jobs.append({"output": str(folder / f"ddp-{name}"), "method": METHODS[name]})
        jobs.append(
            {"output": str(folder / f"fsdp-{name}"), "method": METHODS[name], "distributed": {"strategy": "fsdp"}}
        )
    again = {"strategy": "fsdp", "reshard_after_forward": False}
    jobs.append({"output": str(folder / "fsdp-again"), "distributed": again, "train": {"gradient_checkpointing": True}})
    jobs.append({"output": str(folder / "fsdp-bf16"), "distributed": again, "train": {"bf16": True}, "cut": 5})
    for rank in (0, 1):
        for kind in ("ddp", "fsdp"):
            output = str(folder / f"full-disk-{kind}-{rank}")
            jobs.append({"output": output, "distributed": {"strategy": kind}, "disk_fails_on": rank})
    return run_all(folder, jobs) | {f"{name} (1)": value for name, value in results(jobs, rank=1).items()}


def test_ddp_gives_the_curve_of_one_process_and_resumes_on_any_number(folder: Path, two: Found, alone: Found) -> None:
    check_legs(folder, "ddp", two, alone)
    assert two["ddp-full"]["says"] == "2 processes, DDP over gloo, the whole model on cpu in each"


def test_fsdp_gives_the_curve_of_one_process_and_resumes_on_any_number(folder: Path, two: Found, alone: Found) -> None:
    check_legs(folder, "fsdp", two, alone)
    assert two["fsdp-full"]["says"] == "2 processes, FSDP2 over gloo on cpu"
    parts = sorted((folder / "fsdp-full" / "step-3" / PARTS).glob("*.safetensors"))
    assert len(parts) == 2
    halves = [load_file(part)["weights.transformer.embedding.word_embeddings.weight"] for part in parts]
    assert [list(half.shape) for half in halves] == [[32, 32], [32, 32]]  # of 64 rows
    assert not list((folder / "fsdp-full" / "step-3").rglob("*.metadata"))  # no pickle


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["freeze", "ptuning"])
def test_every_method_learns_the_same_with_two_processes(
    folder: Path, two: Found, alone: Found, kind: str, name: str
) -> None:
    equal_curves(two[f"{kind}-{name}"], alone[f"one-{name}"], range(1, 9))
    result = "model" if name == "freeze" else "adapter"
    close(folder / f"one-{name}" / result, folder / f"{kind}-{name}" / result)


def test_activations_computed_again_change_nothing(folder: Path, two: Found, alone: Found) -> None:
    equal_curves(two["fsdp-again"], alone["one-full"], range(1, 9))
    assert "blocks stay gathered" in two["fsdp-again"]["says"]


def test_bfloat16_is_close_and_says_so(two: Found, alone: Found) -> None:
    assert "blocks gathered in bfloat16" in two["fsdp-bf16"]["says"]
    for step, loss in two["fsdp-bf16"]["curve"].items():
        assert loss == pytest.approx(alone["one-full"]["curve"][step], abs=0.03)
    assert two["fsdp-bf16"]["curve"] != {step: alone["one-full"]["curve"][step] for step in ("1", "2", "3", "4", "5")}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_fails_for_one_process_ends_all_and_publishes_nothing(
    folder: Path, two: Found, kind: str, rank: int
) -> None:
    """T-13 and T-14: that this test ends at all is the point."""
    name = f"full-disk-{kind}-{rank}"
    assert "No space left" in two[name if rank == 0 else f"{name} (1)"]["error"]
    assert "another process" in two[f"{name} (1)" if rank == 0 else name]["error"]
    assert list(two[name]["curve"]) == ["1", "2"]  # the save after step 3 failed
    assert not list((folder / name).glob("step-*"))
    assert not list((folder / name).glob(".step-*"))


def test_parts_become_a_model_folder_that_any_program_reads(folder: Path, two: Found, alone: Found) -> None:
    done = transform(folder / "fsdp-full", folder / "merged")  # the run's newest checkpoint
    assert done.source == "2 parts of step 3"
    close(folder / "cut-full" / "step-3" / "model", folder / "merged")
    model = ChatGLM2ForCausalLM.from_pretrained(folder / "merged")
    own = ChatGLM2ForCausalLM.from_pretrained(folder / "cut-full" / "step-3" / "model")
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(model(ids).logits, own(ids).logits, atol=1e-4, rtol=0)
    with pytest.raises(UsageError, match="has the whole weights"):
        transform(folder / "cut-full" / "step-3", folder / "nothing")
    with pytest.raises(UsageError, match="whole already"):
        transform(folder / "fsdp-lora" / "step-3", folder / "nothing")


def test_parts_are_divided_for_another_number_of_processes(folder: Path, two: Found, alone: Found) -> None:
    run = folder / "three-parts"
    shutil.copytree(folder / "fsdp-full", run)
    shutil.rmtree(run / "step-3")
    done = transform(folder / "fsdp-full" / "step-3", run / "step-3", ranks=3)
    assert done.source == "2 parts of step 3 as 3"
    sizes = [path.stat().st_size for path in (run / "step-3" / PARTS).glob("*.safetensors")]
    assert len(sizes) == 3
    assert max(sizes) < 1.3 * min(sizes)
    equal_curves(training_ranks.run({"output": str(run), "resume": True}), alone["one-full"], range(4, 9))


def test_a_process_that_dies_ends_all_and_three_become_one(folder: Path) -> None:
    """T-12 and T-37, with matrices that have fewer rows than there are processes."""
    method = {**METHODS["lora"], "lora_rank": 2}
    output = folder / "dies"
    job = {"output": str(output), "method": method, "distributed": {"strategy": "fsdp"}, "die": 5}
    began = time.monotonic()
    done = torchrun(folder, [{**job, "train": {"gradient_accumulation_steps": 1}}], processes=3)
    seconds = time.monotonic() - began
    assert done.returncode != 0
    found = results([job], rank=0) if Path(f"{output}.0.json").exists() else {}
    assert not found or found["dies"]["error"]
    assert seconds < 120  # starting three processes is most of it
    assert not _children_of(str(folder))
    settings = {"gradient_accumulation_steps": 3}
    whole = training_ranks.run({"output": str(folder / "three"), "method": method, "train": settings})
    back = training_ranks.run({"output": str(output), "method": method, "train": settings, "resume": True})
    equal_curves(back, whole, range(4, len(whole["curve"]) + 1))


@pytest.mark.slow
def test_a_process_that_stands_still_for_a_minute_changes_nothing(folder: Path, alone: Found) -> None:
    """T-11: the other one waits for it, and the run goes on when it does."""
    job = {"output": str(folder / "stops"), "distributed": {"strategy": "ddp"}, "stop": (3, 60)}
    began = time.monotonic()
    found = run_all(folder, [job])
    assert time.monotonic() - began > 60
    equal_curves(found["stops"], alone["one-full"], range(1, len(alone["one-full"]["curve"]) + 1))
    close(folder / "one-full" / "model", folder / "stops" / "model")


def _children_of(text: str) -> list[str]:
    """Processes that still have a text in their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = place.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in command and "training_ranks" in command:
            found.append(command)
    return found


# DeepSpeed -----------------------------------------------------------------------------------------------------------

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no deepspeed")


def zero(folder: Path, stage: int) -> dict[str, Any]:
    file = folder / f"deepspeed-{stage}.json"
    auto: dict[str, Any] = {"fp16": {"enabled": "auto", "loss_scale": 0}, "bf16": {"enabled": "auto"}}
    auto |= {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    file.write_text(json.dumps({**auto, "zero_optimization": {"stage": stage}}))
    return {"deepspeed": str(file)}


@pytest.fixture(scope="module")
def deepspeed(folder: Path, alone: Found) -> Found:
    """Everything that DeepSpeed does, with one start."""
    jobs = legs(folder, "zero2", zero(folder, 2)) + legs(folder, "zero3", zero(folder, 3))
    for stage in (1, 2, 3):
        for name in ("full", "freeze", "ptuning") if stage > 1 else ("full",):
            native = {"native": str(folder / f"native{stage}-{name}")}
            output = str(folder / f"zero{stage}-whole-{name}")
            jobs.append({"output": output, "method": METHODS[name], "distributed": zero(folder, stage), **native})
    return run_all(folder, jobs)


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_gives_the_curve_of_one_process_and_resumes_on_any_number(
    folder: Path, deepspeed: Found, alone: Found, stage: int
) -> None:
    """T-38; also back on one process without DeepSpeed."""
    check_legs(folder, f"zero{stage}", deepspeed, alone)
    assert f"ZeRO-{stage} over gloo on cpu" in deepspeed[f"zero{stage}-full"]["says"]


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "name"),
    [(1, "full"), (2, "full"), (3, "full"), (2, "freeze"), (3, "freeze"), (2, "ptuning"), (3, "ptuning")],
)
def test_files_of_deepspeed_itself_are_merged_bit_for_bit(
    folder: Path, deepspeed: Found, alone: Found, stage: int, name: str
) -> None:
    run = folder / f"zero{stage}-whole-{name}"
    equal_curves(deepspeed[run.name], alone[f"one-{name}"], range(1, 9))
    native = folder / f"native{stage}-{name}"
    files = ZeroFiles(native)
    result = tensors_of(run / ("adapter" if name == "ptuning" else "model"))
    for key, tensor in result.items():
        assert torch.equal(files.tensor(key), tensor), key
    if name == "full":
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            transform(native, folder / "nothing")
        done = transform(native, folder / f"merged-zero{stage}", model=run / "model")
        assert done.source == f"DeepSpeed ZeRO-{'3' if stage == 3 else '1/2'}"
        close(run / "model", folder / f"merged-zero{stage}", atol=0)


@needs_deepspeed
def test_a_file_of_deepspeed_that_would_run_something_is_refused(folder: Path, deepspeed: Found) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {folder / 'was-run'}",)

    bad = folder / "native-bad"
    shutil.copytree(folder / "native2-full", bad)
    torch.save({"optimizer_state_dict": Runs()}, bad / "global_step8" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match="asks to run"):
        transform(bad, folder / "nothing", model=folder / "zero2-whole-full" / "model")
    (bad / "global_step8" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"1 files …_optim_states\.pt, expected 2"):
        transform(bad, folder / "nothing", model=folder / "zero2-whole-full" / "model")
    assert not (folder / "was-run").exists()


@pytest.mark.parametrize("written", ["by name", "of something else", "alone"])
def test_a_member_of_an_enumeration_is_looked_at_and_nothing_else_by_getattr(tmp_path: Path, written: str) -> None:
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    owner = {"by name": config.ZeroStageEnum, "of something else": torch.Size, "alone": config.ZeroStageEnum}[written]

    class Member:  # as Python 3.11.2 writes one
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return getattr, (owner, "gradients") if written != "alone" else (owner,)

    file = tmp_path / "x.pt"
    torch.save({"zero_stage": Member(), "step": 3}, file)
    with open(file, "rb") as opened:

        def read(offset: int, length: int) -> bytes:
            opened.seek(offset)
            return opened.read(length)

        if written == "by name":
            assert inspect_deepspeed_file(read, file.stat().st_size)["step"] == 3
        else:
            with pytest.raises(FileRefused, match="on something that is no enumeration"):
                inspect_deepspeed_file(read, file.stat().st_size)


# Settings ------------------------------------------------------------------------------------------------------------


def recipe(folder: Path, distributed: dict[str, Any] | None = None, **train: Any) -> Recipe:
    job = {"output": str(folder / "run"), "distributed": distributed or {}, "train": train}
    return training_ranks.recipe_of(job)


def test_a_deepspeed_json_is_filled_from_the_recipe(tmp_path: Path) -> None:
    given = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
    }
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(given))
    made = read_config(file, recipe(tmp_path, bf16=True, gradient_accumulation_steps=3, max_grad_norm=0.5), world=2)
    assert made["train_batch_size"] == 4 * 3 * 2
    assert made["train_micro_batch_size_per_gpu"] == 4
    assert made["gradient_accumulation_steps"] == 3
    assert made["gradient_clipping"] == 0.5
    assert made["bf16"]["enabled"] is True
    assert made["fp16"]["enabled"] is False
    assert "optimizer" not in made
    assert "scheduler" not in made


def test_what_contradicts_the_recipe_is_named_all_at_once(tmp_path: Path) -> None:
    given = {
        "train_micro_batch_size_per_gpu": 7,
        "gradient_cliping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "Lamb", "params": {"lr": 0.5}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        "zero_optimization": {"stage": 2, "round_robin_gradients": "auto"},
    }
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(given))
    with pytest.raises(UsageError) as caught:
        read_config(file, recipe(tmp_path), world=2)
    for text in (
        "train_micro_batch_size_per_gpu is 7, but train.per_device_train_batch_size is 4",
        "gradient_cliping is no key of DeepSpeed; did you mean gradient_clipping?",
        "bf16.enabled is True, but train.bf16 is False",
        "optimizer.type is 'Lamb'",
        "optimizer.params.lr is 0.5, but the recipe says 0.01",
        "scheduler has values of its own",
        'zero_optimization.round_robin_gradients is "auto"',
    ):
        assert text in caught.value.message
    file.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    with pytest.raises(UsageError, match="expected 1, 2 or 3"):
        read_config(file, recipe(tmp_path), world=2)
    file.write_text("{")
    with pytest.raises(UsageError, match="is no JSON"):
        read_config(file, recipe(tmp_path), world=2)
    with pytest.raises(UsageError, match="cannot be read"):
        read_config(tmp_path / "none.json", recipe(tmp_path), world=2)


@pytest.mark.parametrize(
    ("distributed", "text"),
    [
        ({"tensor_parallel": 2}, "for inference only"),
        ({"strategy": "fsdp", "deepspeed": "x.json"}, "contradict"),
        ({"strategy": "deepspeed"}, "needs distributed.deepspeed"),
        ({"cpu_offload": True}, "is for strategy=fsdp"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, distributed: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        strategy_of(recipe(tmp_path, distributed))


def test_one_process_needs_no_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert strategy_of(recipe(tmp_path)) == "one"
    assert strategy_of(recipe(tmp_path, {"strategy": "ddp"})) == "one"
    assert strategy_of(recipe(tmp_path, {"deepspeed": "x.json"})) == "deepspeed"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert strategy_of(recipe(tmp_path)) == "ddp"
