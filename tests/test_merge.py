"""Base and adapter as one plain checkpoint: numbers, names, config, what is refused, and kills at any moment."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import glmkit
import official
from glmkit import cli
from glmkit.checkpoint import open_folder
from glmkit.errors import CheckpointError, OutputError, UsageError
from glmkit.export import folders
from glmkit.export.merge import merge
from glmkit.quant.linear import QuantizedLinear
from test_adapters import FAMILIES, bases, linear_layers, logits, write_lora, write_prefix

__all__ = ["bases"]  # a fixture
module: Any = sys.modules["glmkit.export.merge"]


@pytest.fixture
def base(bases: Callable[[str], Path]) -> Path:
    return bases("chatglm3")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with open_folder(folder) as opened:
        return dict(opened.read())


def half(folder: Path, target: Path, dtype: torch.dtype) -> Path:
    """The folder again, in another dtype."""
    model, tokenizer = glmkit.load(folder, dtype=dtype)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_in_every_family(family: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Every changed weight is W + scale * B A in float32, rounded once; every other tensor is the base's own."""
    folder = bases(family)
    ends = ("query_key_value", "dense_4h_to_h")
    path = write_lora(tmp_path / "lora", folder, ends=ends, lora_alpha=6)
    merged = merge(folder, path, tmp_path / "merged")
    assert (merged.kind, merged.layers) == ("lora", 4)
    assert merged.difference is not None
    assert merged.difference < 1e-5
    before, after, learnt = tensors(folder), tensors(tmp_path / "merged"), load_file(path / "adapter_model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    changed = set()
    for name, tensor in after.items():
        if torch.equal(tensor, before[name]):
            continue
        changed.add(name)
        [(a, b)] = [
            (learnt[own], learnt[own.replace("lora_A", "lora_B")])
            for own in learnt
            if own.removeprefix("base_model.model.") == name.removesuffix("weight") + "lora_A.weight"
        ]
        exact = before[name].double() + 1.5 * b.double() @ a.double()
        torch.testing.assert_close(tensor.double(), exact, atol=1e-6, rtol=1e-6)
    assert {name.removesuffix(".weight") for name in changed} == set(linear_layers(glmkit.load(folder).model, *ends))
    expected = logits(glmkit.load(folder, adapter=path, dtype="float32").model)
    torch.testing.assert_close(
        logits(glmkit.load(tmp_path / "merged", dtype="float32").model), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("projects", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_in_every_family(family: str, projects: bool, bases: Callable[[str], Path], tmp_path: Path) -> None:
    folder = bases(family)
    path = write_prefix(tmp_path / "prefix", folder, projects=projects)
    merged = merge(folder, path, tmp_path / "merged")
    assert (merged.kind, merged.layers) == ("p-tuning", 0)
    assert "cannot become part of the weights" in merged.notes[0]
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["pre_seq_len"], config["prefix_projection"]) == (5, projects)
    after = tensors(tmp_path / "merged")
    wanted = tensors(folder) | torch.load(path / "pytorch_model.bin")
    assert after.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in after.items())
    expected = logits(glmkit.load(folder, adapter=path, dtype="float32").model)
    found = logits(glmkit.load(tmp_path / "merged", dtype="float32").model)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("stored", "asked", "result"),
    [
        (torch.float16, "auto", torch.float16),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "float16", torch.float16),
    ],
)
def test_the_dtype_of_the_base_stays(
    base: Path, tmp_path: Path, stored: torch.dtype, asked: str, result: torch.dtype
) -> None:
    """One rounding of the float32 sum, and nothing but that."""
    source = half(base, tmp_path / "base", stored)
    path = write_lora(tmp_path / "lora", source)
    merged = merge(source, path, tmp_path / "merged", dtype=asked)
    assert merged.dtypes == [str(result).removeprefix("torch.")]
    assert merged.difference is not None
    assert merged.difference < max(8 * torch.finfo(result).eps, 1e-5)
    name = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
    learnt = load_file(path / "adapter_model.safetensors")
    a, b = (learnt[f"base_model.model.{name.removesuffix('weight')}lora_{side}.weight"] for side in "AB")
    exact = torch.addmm(tensors(source)[name].float(), b, a, alpha=2)
    assert torch.equal(tensors(tmp_path / "merged")[name], exact.to(result))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == merged.dtypes[0]
    assert glmkit.load(tmp_path / "merged", dtype=result).chat("tea", max_new_tokens=2).text is not None


def test_what_else_is_in_the_folder(tmp_path: Path) -> None:
    """Config, tokenizer, generation_config and licence go along; python files, and what points to them, do not."""
    vocabulary = official.train_tokenizer(tmp_path / "tokenizer.model")
    source = official.write_folder(tmp_path / "base", tokenizer=vocabulary, rope_ratio=16, _name_or_path="tuned")
    (source / "modeling_chatglm.py").write_text("base = base * self.rope_ratio\n")
    (source / "MODEL_LICENSE").write_text("The licence.\n")
    (source / "training_args.bin").write_bytes(b"no")
    path = write_lora(tmp_path / "lora", source)
    merged = merge(source, path, tmp_path / "merged", check=False)
    assert {file.name for file in (tmp_path / "merged").iterdir()} == {
        "config.json", "generation_config.json", "MODEL_LICENSE", "README.md", "model.safetensors", "tokenizer.model",
        "tokenizer_config.json",
    }  # fmt: skip
    assert all(name in merged.notes[0] for name in official.CODE)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    stored = json.loads((source / "config.json").read_text())
    assert "auto_map" not in config
    assert config == {k: v for k, v in stored.items() if k != "auto_map"} | {
        "generation": 3,
        "rope_ratio_applies_to": "base",
        "torch_dtype": "float16",
    }
    assert "auto_map" not in (tmp_path / "merged" / "tokenizer_config.json").read_text()
    again, before = glmkit.load(tmp_path / "merged"), glmkit.load(source)
    assert again.config.rotary_base_and_scale() == before.config.rotary_base_and_scale() == (160_000.0, 1.0)
    assert again.tokenizer.generation == 3
    assert again.model.generation_config.max_new_tokens == 6
    assert (
        tensors(source).keys() == tensors(tmp_path / "merged").keys()
    )  # inv_freq among them, as official folders have


def test_large_folders_stay_in_shards(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One shard and one tensor at a time: the largest that is held is the largest of the model."""
    path = write_lora(tmp_path / "lora", base)
    monkeypatch.setattr("glmkit.writing.save_tensors.__kwdefaults__", {
        "fetch": None, "max_shard_bytes": 40_000, "file_name": "model.safetensors",
    })  # fmt: skip
    merge(base, path, tmp_path / "merged", check=False)
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 2
    expected = logits(glmkit.load(base, adapter=path).model)
    torch.testing.assert_close(logits(glmkit.load(tmp_path / "merged").model), expected, atol=1e-4, rtol=1e-4)


# --- quantised bases ---


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base(base: Path, tmp_path: Path, bits: int) -> None:
    """Never quantised again: refused, or written in 16 bit on request; a prefix changes no weight and goes along."""
    model, tokenizer = glmkit.load(base, dtype="float16", quantize=f"official-int{bits}", kernels="torch")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    path = write_lora(tmp_path / "lora", base)
    with pytest.raises(UsageError, match=f"quantised to {bits} bits") as caught:
        merge(tmp_path / "base", path, tmp_path / "merged")
    assert "--dequantize" in str(caught.value.hint)
    assert not (tmp_path / "merged").exists()
    merged = merge(tmp_path / "base", path, tmp_path / "merged", dequantize=True)
    assert merged.dtypes == ["float16"]
    assert "16 bit" in merged.notes[0]
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_bit" not in config
    layer = "transformer.encoder.layers.0.self_attention.query_key_value"
    learnt = load_file(path / "adapter_model.safetensors")
    a, b = (learnt[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
    quantised = model.get_submodule(layer)
    assert isinstance(quantised, QuantizedLinear)
    exact = torch.addmm(quantised.dequantize().float(), b, a, alpha=2).half()
    assert torch.equal(tensors(tmp_path / "merged")[f"{layer}.weight"], exact)
    prefix = write_prefix(tmp_path / "prefix", base)
    merge(tmp_path / "base", prefix, tmp_path / "with-prefix")
    again = glmkit.load(tmp_path / "with-prefix", dtype="float32")
    assert again.config.quantization_bit == bits
    expected = logits(glmkit.load(tmp_path / "base", adapter=prefix, dtype="float32").model)
    assert torch.equal(logits(again.model), expected)


def test_a_quantised_embedding(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """ChatGLM-6B-INT4-QE: its output layer is the packed table, and becomes the plain one again."""
    model, tokenizer = glmkit.load(bases("chatglm"), dtype="float16")
    model.quantize(4, quantize_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    path = write_lora(tmp_path / "lora", bases("chatglm"))
    merged = merge(tmp_path / "base", path, tmp_path / "merged", dequantize=True)
    assert merged.difference is not None
    again = glmkit.load(tmp_path / "merged", dtype="float32")
    assert not again.config.quantization_bit
    assert again.model.lm_head.weight is again.model.transformer.word_embeddings.weight


# --- what is refused ---


def test_what_cannot_be_merged(base: Path, bases: Callable[[str], Path], tmp_path: Path) -> None:
    path = write_lora(tmp_path / "lora", base)
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.0.*is not part of this model"):
        merge(bases("chatglm"), path, tmp_path / "other")
    with pytest.raises(UsageError, match="float8"):
        merge(base, path, tmp_path / "other", dtype="float8")
    with pytest.raises(UsageError, match="no adapter folder"):
        merge(base, tmp_path / "nowhere", tmp_path / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError, match="not empty"):
        merge(base, path, tmp_path / "full")
    large = load_file(path / "adapter_model.safetensors")
    save_file({name: tensor * 1000 for name, tensor in large.items()}, path / "adapter_model.safetensors")
    with pytest.raises(OutputError, match=r"query_key_value\.weight has numbers that float16 does not hold") as caught:
        merge(base, path, tmp_path / "other", dtype="float16")
    assert "bfloat16" in str(caught.value.hint)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["full", "lora"]


@pytest.mark.new_process
def test_a_result_that_is_not_base_and_adapter_is_not_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of its own reads what lies on the disk: a weight, or a config, that is wrong there is found."""
    path = write_lora(tmp_path / "lora", base)
    right, complete = module.save_tensors, folders.write_config

    def wrong(folder: Path, plan: Any, *, fetch: Callable[[str], torch.Tensor]) -> Any:
        return right(folder, plan, fetch=lambda name: fetch(name) * (0.9 if "layers.1.mlp" in name else 1))

    monkeypatch.setattr(module, "save_tensors", wrong)
    with pytest.raises(OutputError, match="is not what base and adapter are"):
        merge(base, path, tmp_path / "merged")
    monkeypatch.setattr(module, "save_tensors", right)
    monkeypatch.setattr("glmkit.export.folders.write_config", lambda *_: None)
    with pytest.raises(OutputError, match="could not be opened again"):
        merge(base, path, tmp_path / "merged")
    assert [file.name for file in tmp_path.iterdir()] == ["lora"]
    monkeypatch.setattr("glmkit.export.folders.write_config", complete)
    merged = merge(base, path, tmp_path / "merged")
    assert merged.difference is not None
    assert merged.difference < 1e-5


# --- the command, and kills ---


def test_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, target = write_lora(tmp_path / "lora", base), tmp_path / "merged"
    capsys.readouterr()
    given = ["merge", str(base), str(path), str(target), "--no-check"]
    assert cli.run([*given, "--dtype", "bfloat16", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["schema"], printed["kind"], printed["dtypes"]) == (1, "lora", ["bfloat16"])
    assert cli.run(given) != 0
    assert "not empty" in capsys.readouterr().err
    assert cli.run([*given, "--overwrite"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert {one.dtype for one in tensors(target).values()} == {torch.float32}


@pytest.mark.parametrize("replaces", [False, True])
def test_a_kill_leaves_no_half_merged_folder(base: Path, tmp_path: Path, replaces: bool) -> None:
    """Killed at tensors from the first to the last, at config.json and before the comparison; what was there stays."""
    path, target = write_lora(tmp_path / "lora", base), tmp_path / "merged"
    if replaces:
        merge(base, write_prefix(tmp_path / "prefix", base), target, check=False)
    watched = [folder for folder in (base, path, target) if folder.exists()]
    before = {file: file.read_bytes() for folder in watched for file in folder.iterdir()}
    count = len(tensors(base))

    def kill(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_at(number: int) -> Callable[..., torch.Tensor]:
        fetch, left = module._Plan.fetch, iter(range(number))
        return lambda plan, name: fetch(plan, name) if next(left, None) is not None else kill()

    for point in (0, 1, count // 2, count - 1, "_complete", "_compare"):
        child = os.fork()
        if not child:
            if isinstance(point, str):
                setattr(module, point, kill)
            else:
                module._Plan.fetch = kill_at(point)
            try:
                merge(base, path, target, overwrite=True)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert target.exists() == replaces
        assert {file: file.read_bytes() for folder in watched for file in folder.iterdir()} == before
    assert merge(base, path, target, check=False, overwrite=True).layers == 2
    assert glmkit.load(target).config.pre_seq_len is None
