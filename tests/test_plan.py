"""What a plan says of memory is what a step takes, and what does not fit is refused with settings that do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glmkit.cli import run
from glmkit.errors import TrainingError, UsageError
from glmkit.export.quantized import quantize
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.train.arguments import Recipe
from glmkit.train.fitting import MOST_SHARE, check_fits, memory_bytes, model_plans, nearest, require_fit
from glmkit.train.methods import make_method
from glmkit.train.optimizer import make_optimizer
from glmkit.train.plan import Batch, Plan, Subject, largest_batch, plan_inference, plan_training, subject_of

ROOT = Path(__file__).resolve().parent.parent
SIZES: dict[str, Any] = {
    "num_layers": 3,
    "padded_vocab_size": 500,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "kv_channels": 16,
    "num_attention_heads": 4,
    "multi_query_group_num": 2,
    "seq_length": 256,
    "add_qkv_bias": True,
}


def recipe(method: str = "full", data: dict[str, Any] | None = None, **blocks: dict[str, Any]) -> Recipe:
    return Recipe(
        model={
            "init": {**SIZES, "model_type": "chatglm"},
            "tokenizer": "none",
            "device": "cpu",
            **blocks.pop("model", {}),
        },
        data={"train_file": "none", "max_length": 100, **(data or {})},
        method={"name": method, "pre_seq_len": 8},
        output={"dir": "none"},
        **blocks,
    )


def subject(bits: int = 0, dtype: torch.dtype = torch.float32) -> Subject:
    return Subject("tiny", ChatGLM2Config(**SIZES), dtype, bits)


def test_weights_gradients_and_moments_are_counted_to_the_byte() -> None:
    for method in ("full", "lora", "freeze", "ptuning_v2"):
        block = recipe(method)
        plan = plan_training(block, subject=subject())
        model = make_method(block.method).prepare(ChatGLM2ForCausalLM(ChatGLM2Config(**SIZES))).train()
        ids = torch.ones(1, 20, dtype=torch.int64)
        optimizer = make_optimizer(model, block.train)
        model.label_loss(input_ids=ids, labels=ids)[0].backward()  # type: ignore[operator]
        optimizer.step()
        learnt = [one for one in model.parameters() if one.requires_grad]
        moments = [one for state in optimizer.state.values() for one in state.values() if one.ndim]
        assert plan.parts["weights"] == sum(one.numel() * one.element_size() for one in set(model.parameters()))
        assert plan.parts["gradients"] == sum(one.grad.nbytes for one in learnt if one.grad is not None)
        assert plan.parts["optimizer"] == sum(one.nbytes for one in moments)
        assert plan.disk == 4 * 12 * sum(one.numel() for one in learnt) - 8 * sum(one.numel() for one in learnt)


def test_activations_are_what_the_real_step_keeps() -> None:
    block = recipe("full", train={"per_device_train_batch_size": 4})
    plan = plan_training(block, subject=subject())
    model = ChatGLM2ForCausalLM(ChatGLM2Config(**SIZES)).train()
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.ones(4, 100, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.transformer(ids, use_cache=False).last_hidden_state
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert hidden.shape == (4, 100, 64)
    assert plan.parts["activations"] == pytest.approx(saved, rel=0.1)


def test_settings_that_save_memory_do() -> None:
    def most(method: str = "lora", bits: int = 0, **train: Any) -> Plan:
        return plan_training(recipe(method, train={"per_device_train_batch_size": 8, **train}), subject=subject(bits))

    plain = most()
    assert most(gradient_checkpointing=True).parts["activations"] < plain.parts["activations"] / 3
    assert most(loss_chunk_tokens=100).parts["logits and loss"] < plain.parts["logits and loss"] / 3
    assert most(bits=4).parts["weights"] < most(bits=8).parts["weights"] < plain.parts["weights"]
    assert most(per_device_train_batch_size=4).parts["activations"] == pytest.approx(
        plain.parts["activations"] / 2, rel=0.05
    )
    # With a second batch the gradients of the first are there already.
    assert most("full", gradient_accumulation_steps=2).peak > most("full").peak


def test_processes_hold_their_parts(tmp_path: Path) -> None:
    whole = plan_training(recipe(), subject=subject())
    ddp = plan_training(recipe(), subject=subject(), world=4)
    assert (ddp.parts, ddp.peak) == (whole.parts, whole.peak)
    fsdp = plan_training(recipe(distributed={"strategy": "fsdp"}), subject=subject(), world=4)
    for part in ("weights", "gradients", "optimizer"):
        assert fsdp.parts[part] == pytest.approx(whole.parts[part] / 4, abs=4)
    assert fsdp.parts["weights gathered"] > 0
    off = recipe(distributed={"strategy": "fsdp", "cpu_offload": True})
    offloaded = plan_training(off, subject=subject(), world=4)
    assert offloaded.parts["weights"] == offloaded.parts["optimizer"] == 0
    assert offloaded.host == sum(fsdp.parts[part] for part in ("weights", "gradients", "optimizer"))
    learn = whole.parts["gradients"] // 4
    for stage, weights, gradients in ((1, 2 + 1, 2), (2, 2 + 1, 0.5), (3, 0.5 + 1, 0.5)):
        file = tmp_path / "deepspeed.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}, "bf16": {"enabled": "auto"}}))
        block = recipe(distributed={"deepspeed": str(file)}, train={"bf16": True})
        zero = plan_training(block, subject=subject(), world=4)
        # The model in 16 bits, a quarter of a float32 copy of it; a quarter of two moments.
        assert zero.parts["weights"] == pytest.approx(learn * weights, rel=1e-3)
        assert zero.parts["gradients"] == pytest.approx(learn * gradients, rel=1e-3)
        assert zero.parts["optimizer"] == pytest.approx(learn * 2, rel=1e-3)
    packaged = recipe(distributed={"deepspeed": "deepspeed_zero2.json"}, train={"bf16": True})
    assert plan_training(packaged, subject=subject(), world=4).parts["gradients"] == pytest.approx(learn / 2, rel=1e-3)
    both = recipe(distributed={"deepspeed": "deepspeed_zero2.json", "strategy": "fsdp"})
    with pytest.raises(UsageError, match="contradict each other"):
        plan_training(both, subject=subject(), world=4)


def test_the_largest_batch_follows_limits_and_data() -> None:
    limits = {"max_source_length": 30, "max_target_length": 40}
    assert largest_batch(recipe(train={"per_device_train_batch_size": 2})) == Batch(2, 100, 200)
    assert largest_batch(recipe(data=limits)) == Batch(8, 71, 8 * 41)
    assert largest_batch(recipe(data=limits), (50, 20)) == Batch(8, 50, 160)
    assert largest_batch(recipe(data={**limits, "packing": True}), (50, 20)) == Batch(8, 100, 800)
    assert largest_batch(recipe(train={"tokens_per_batch": 350})) == Batch(3, 100, 300)


def test_what_does_not_fit_is_refused_with_settings_that_do() -> None:
    block = recipe("full", train={"per_device_train_batch_size": 16})
    plan = plan_training(block)
    check_fits(plan, int(plan.peak / MOST_SHARE) + 1, block)
    check_fits(plan, None, block)
    free = plan.peak
    with pytest.raises(TrainingError) as caught:
        check_fits(plan, free, block)
    assert f"this needs {plan.peak / 1e9:.1f} GB" in str(caught.value)
    found = nearest(block, free)
    assert found is not None
    settings, better = found
    assert " ".join(settings) in str(caught.value)
    assert settings == ["train.gradient_checkpointing=true"]  # one change, and no more than is needed
    assert better.peak <= MOST_SHARE * free
    several = nearest(block, better.peak)
    assert several is not None
    assert len(several[0]) > 1
    assert several[1].peak <= MOST_SHARE * better.peak
    with pytest.raises(TrainingError, match="nothing that is known makes it fit"):
        check_fits(plan, 1000, block)


def test_a_run_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    block = recipe()
    assert require_fit(block) is None  # so small that nothing is counted
    monkeypatch.setattr("glmkit.train.fitting.free_bytes", lambda device: 2_000_000)
    with pytest.raises(TrainingError, match="are free"):
        require_fit(block)
    plan = require_fit(block, force=True)
    assert plan is not None
    assert plan.peak > 2_000_000


def test_answers_need_weights_cache_and_one_call() -> None:
    plan = plan_inference(subject(dtype=torch.float16), tokens=200, rows=3)
    assert plan.parts["cache"] == 2 * 3 * 2 * 16 * 2 * 200 * 3  # keys and values, layers, groups, width, bytes
    assert plan.parts["weights"] == plan_inference(subject(), tokens=1).parts["weights"] // 2
    assert plan.peak == sum(plan.parts.values())


def test_the_verb_plans_recipes_and_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "quickstart", "train.per_device_train_batch_size=1", "data.max_length=64", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["peak_bytes"] > plan["parts_bytes"]["weights"] > 10_000_000
    assert run(["plan", "quickstart", "data.max_length=64", "--memory", "1MB"]) == 1
    assert "error: this needs" in capsys.readouterr().err
    assert run(["plan", "quickstart", "data.max_length=64", "--memory", "1MB", "--force"]) == 0
    assert run(["plan", "no-such-model"]) == 2
    assert [memory_bytes(text) for text in ("24GB", "1.5 GiB", "7")] == [24 * 10**9, 3 * 2**29, 7]
    with pytest.raises(UsageError, match="'much' is no amount of memory"):
        memory_bytes("much")


# --- docs/memory.md


def documented(table: str) -> list[list[str]]:
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {table} -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert found is not None
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in found[1].strip().splitlines()[2:]]


@pytest.mark.parametrize("bits", [0, 4])
def test_the_documented_memory_of_answers_is_what_is_counted(bits: int) -> None:
    rows = {(row[0], row[1]): row for row in documented("models")}
    found = subject_of(recipe().model.model_copy(update={"path": "chatglm-6b", "init": None, "dtype": "float16"}))
    plan = plan_inference(Subject(found.name, found.config, torch.float16, bits), tokens=2048)
    column = {0: 2, 8: 3, 4: 4}[bits]
    assert rows["chatglm-6b", "answers, context 2,048"][column] == f"{plan.peak / 1e9:.1f}"


@pytest.mark.slow
def test_the_documented_table_is_what_is_counted() -> None:
    for name in ("chatglm-6b", "chatglm2-6b"):
        plans = model_plans(name)
        for row in documented("models"):
            kind = {"answers": "answer", "P-Tuning": "ptuning_v2", "LoRA": "lora"}.get(re.split(r"[ ,]", row[1])[0])
            if row[0] == name and kind:
                assert row[2:5] == [
                    f"{plans[f'{kind}, {form}'].peak / 1e9:.1f}" for form in ("float16", "int8", "int4")
                ]


@pytest.mark.parametrize("scheme", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_quantised_folder_is_planned_in_its_own_format(tmp_path: Path, scheme: str) -> None:
    quantize("glm-nano", tmp_path / scheme, scheme)
    plans = model_plans(str(tmp_path / scheme), tokens=64)
    assert list(plans) == [f"{method}, {scheme}" for method in ("answer", "ptuning_v2", "lora")]


@pytest.mark.slow
def test_models_are_planned_in_the_formats_that_they_can_have() -> None:
    assert next(iter(model_plans("chatglm2-6b-int4", tokens=64))) == "answer, official-int4"
    assert "full, float16" in model_plans("glm-nano", tokens=64)


def test_documented_expectations_are_near_what_was_measured() -> None:
    for row in documented("measured"):
        expected, measured = (float(cell.removesuffix(" GB")) for cell in row[1:3])
        assert expected == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("case", [0, 1])
def test_glm_nano_takes_what_is_expected(case: int) -> None:
    script = ROOT / "bench" / "plan.py"
    done = subprocess.run([sys.executable, script, "--only", str(case)], capture_output=True, text=True, check=True)
    difference = float(done.stdout.splitlines()[-1].split("|")[-2].strip(" %"))
    assert abs(difference) <= 15
