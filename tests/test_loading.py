"""`glmkit.load` and the other doors: what is accepted, what is refused with everything that is wrong, and adapters."""

from __future__ import annotations

import io
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM

import glmkit
import official
from glmkit import cli
from glmkit.devices import choose_device
from glmkit.errors import CheckpointError, ConfigError, GlmkitError, TokenizerError, UsageError
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.quant.linear import QuantizedLinear

IDS = torch.tensor([[5, 6, 7, 8, 300, 2, 41]])
EMBEDDING = "transformer.embedding.word_embeddings.weight"
BLOCK = "transformer.encoder.layers.0."
QKV = f"{BLOCK}self_attention.query_key_value"

# Every way into a checkpoint from Python.
DOORS: dict[str, Callable[..., Any]] = {
    "glmkit.load": glmkit.load,
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "ChatGLM2ForCausalLM": ChatGLM2ForCausalLM.from_pretrained,
}
VERBS = (["inspect"], ["chat", "--prompt", "hello", "--max-tokens", "1"])


@pytest.fixture(autouse=True)
def nothing_is_piped_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official.train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vocabulary: Path) -> Path:
    """A sound one, which no test changes."""
    return official.write_folder(tmp_path_factory.mktemp("sound") / "model", tokenizer=vocabulary)


@pytest.fixture
def own(tmp_path: Path, vocabulary: Path) -> Path:
    """One that the test may damage."""
    return official.write_folder(tmp_path / "own", tokenizer=vocabulary, form="safetensors")


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def set_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


# --- dtype, device, what comes back ---


def test_what_load_returns(folder: Path) -> None:
    loaded = glmkit.load(folder)
    model, tokenizer = loaded
    assert (model, tokenizer) == (loaded.model, loaded.tokenizer)
    assert type(model) is ChatGLM2ForCausalLM
    assert not model.training
    assert loaded.family is not None
    assert (loaded.family.name, tokenizer.generation, loaded.config.generation) == ("chatglm3-6b", 3, 3)
    assert (loaded.path, loaded.adapter, loaded.device.type) == (folder, None, "cpu")
    assert model.generation_config.max_new_tokens == 6
    assert model.name_or_path == model.config._name_or_path == str(folder)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert isinstance(loaded.chat("你好", max_new_tokens=2).text, str)
    assert not (folder / official.CANARY).exists()


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin", "bin-shards"])
def test_every_layout_has_the_same_logits(folder: Path, tmp_path: Path, vocabulary: Path, form: str) -> None:
    """Among them: a stale total_size and the constant inv_freq, which old checkpoints store."""
    other = official.write_folder(tmp_path / form, form=form, tokenizer=vocabulary)
    expected = logits(glmkit.load(folder).model)
    for door in DOORS.values():
        found = door(other, dtype=torch.float32)
        assert torch.equal(logits(getattr(found, "model", found)), expected)


def test_mixed_dtypes(own: Path) -> None:
    state = official.weights(torch.float32)
    expected = {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in state.items()}
    expected[EMBEDDING] = state[EMBEDDING].bfloat16()
    official.write_weights(own, expected, "safetensors")
    for door in DOORS.values():
        found = door(own, dtype="float32")
        loaded = getattr(found, "model", found).state_dict()
        assert all(torch.equal(tensor, expected[name].float()) for name, tensor in loaded.items())
    assert glmkit.load(own).model.dtype == torch.float32  # most tensors are


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.float16, "auto", torch.float32),  # a CPU is slow at float16
        (torch.float16, None, torch.float32),
        (torch.float16, "float16", torch.float16),
        (torch.float16, "fp16", torch.float16),
        (torch.float16, "half", torch.float16),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "auto", torch.float32),
        (torch.float32, "bf16", torch.bfloat16),
        (torch.float32, "torch.float16", torch.float16),
    ],
)
def test_dtype(tmp_path: Path, vocabulary: Path, stored: torch.dtype, asked: Any, expected: torch.dtype) -> None:
    made = official.write_folder(tmp_path / "m", form="safetensors", dtype=stored, tokenizer=vocabulary)
    model = glmkit.load(made, dtype=asked).model
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_large_float16_checkpoints_become_bfloat16_on_a_cpu(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr("glmkit.loading._SMALL_BYTES", 1000)
    assert glmkit.load(folder).model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ({"dtype": "float31"}, "dtype='float31'", "bfloat16"),
        ({"dtype": torch.int8}, "dtype=torch.int8", "bfloat16"),
        ({"dtype": "object"}, "dtype='object'", "bfloat16"),
        ({"device": "tpu9000"}, "no device", "auto, cpu"),
        ({"device": "cuda:7"}, "this machine has", "auto"),
        ({"quantize": "int4"}, "int4 has groups of 32 columns", "int8"),  # this folder has layers of 48
        ({"kernels": "fast"}, "kernels='fast'", "native"),
        ({"quantize": "awq"}, "awq", "official-int8"),
        ({"family": "llama"}, "llama", "FAMILIES"),
        ({"adapter": "nowhere"}, "nowhere", "folder"),
        ({"dtypes": "auto"}, "no argument 'dtypes'", "did you mean dtype?"),
        ({"adaptor": "x"}, "no argument 'adaptor'", "did you mean adapter?"),
        ({"quantization_config": object()}, "no argument 'quantization_config'", "did you mean quantize?"),
        ({"zzz": 1}, "no argument 'zzz'", None),
    ],
)
def test_wrong_arguments(folder: Path, arguments: dict[str, Any], message: str, hint: str | None) -> None:
    if arguments.get("device") == "cuda:7" and torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(UsageError) as caught:
        glmkit.load(folder, **arguments)
    assert message in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")


@pytest.mark.parametrize("device", ["tpu9000", "cuda", "cuda:7"])
def test_a_device_that_is_not_there_is_said_before_loading(folder: Path, device: str) -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(UsageError, match="device="):
        AutoModel.from_pretrained(folder, trust_remote_code=True, device=device)


@pytest.mark.parametrize(("device", "there"), [("cuda", True), ("cuda:1", True), ("cuda:2", False)])
def test_the_number_of_a_device_must_exist(monkeypatch: pytest.MonkeyPatch, device: str, there: bool) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    if there:
        assert choose_device(device).type == "cuda"
        return
    with pytest.raises(UsageError, match="device='cuda:2': this machine has 2 of cuda") as caught:
        choose_device(device)
    assert caught.value.hint == "cuda:0 is the first"


def test_names_from_other_tools(folder: Path, tmp_path: Path) -> None:
    loaded = glmkit.load(
        folder, torch_dtype=torch.bfloat16, device_map="auto", trust_remote_code=True, low_cpu_mem_usage=True
    )
    assert loaded.model.dtype == torch.bfloat16
    for arguments, bits in (
        ({"load_in_4bit": True}, 4),
        ({"load_in_8bit": True}, 8),
        ({"quantization_bit": 4}, 4),
        ({"quantization": "official-int8"}, 8),
        ({"load_in_4bit": False}, 0),
        ({"quantization_bit": None}, 0),
    ):
        assert glmkit.load(folder, **arguments).model.config.quantization_bit == bits, arguments  # type: ignore[arg-type]
    prefix(tmp_path, torch.zeros(3, 64))
    for name in ("adapter_path", "adapter_name_or_path", "lora_path", "peft_model_id", "ptuning_checkpoint"):
        assert glmkit.load(folder, **{name: tmp_path}).adapter == tmp_path  # type: ignore[arg-type]


def test_without_a_tokenizer_the_model_is_loaded_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = official.write_folder(tmp_path / "bare")
    loaded = glmkit.load(bare)
    assert loaded.tokenizer is None
    assert "has no tokenizer" in caplog.text
    assert torch.isfinite(logits(loaded.model)).all()
    with pytest.raises(UsageError, match="has no tokenizer"):
        loaded.chat("你好")


def test_the_generation_stays_open_without_signs_and_is_told_by_family(own: Path) -> None:
    (own / "tokenization_chatglm.py").unlink()
    (own / "tokenizer_config.json").write_text("{}")
    set_config(own, _name_or_path=...)
    with pytest.raises(TokenizerError, match="may be ChatGLM2 or ChatGLM3") as caught:
        glmkit.load(own)
    assert "family='chatglm2-6b'" in str(caught.value.hint)
    for generation in (2, 3):
        loaded = glmkit.load(own, family=f"chatglm{generation}-6b")
        assert loaded.tokenizer.generation == loaded.config.generation == generation


def test_a_folder_is_what_it_says_and_not_what_it_is_called(
    tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official.write_folder(tmp_path / "chatglm3-6b", 2, tokenizer=vocabulary)
    monkeypatch.chdir(tmp_path)
    loaded = glmkit.load("chatglm3-6b")
    assert loaded.tokenizer.generation == 2
    assert loaded.family is not None
    assert loaded.family.name == "chatglm2-6b"


# --- rope_ratio ---


@pytest.mark.parametrize(
    ("changes", "meaning"),
    [
        ({"_name_or_path": "THUDM/chatglm2-6b-32k"}, "position"),
        ({"_name_or_path": "models/chatglm2-6b-32k-tuned"}, "position"),
        ({"_name_or_path": "THUDM/chatglm3-6b-32k"}, "base"),
        ({"_name_or_path": "THUDM/glm-4-9b"}, "base"),
        ({"_name_or_path": ..., "eos_token_id": [2, 10]}, "base"),
        ({"_name_or_path": "THUDM/chatglm2-6b", "eos_token_id": [2, 10]}, None),
        ({"_name_or_path": ...}, None),
        ({"_name_or_path": ..., "rope_ratio_applies_to": "position"}, "position"),
        ({"_name_or_path": "THUDM/chatglm2-6b", "rope_ratio_applies_to": "base"}, "base"),
        ({"_name_or_path": ..., "rope_ratio_applies_to": "both"}, None),
    ],
)
def test_signs_of_what_rope_ratio_means(own: Path, changes: dict[str, Any], meaning: str | None) -> None:
    """Divided positions and a multiplied base give other logits, so what was chosen is seen in them."""
    set_config(own, rope_ratio=16, **changes)
    (own / "tokenizer.model").unlink()
    for door in DOORS.values():
        if meaning is None:
            with pytest.raises(ConfigError, match="rope_ratio") as caught:
                door(own)
            assert '"rope_ratio_applies_to": "position"' in str(caught.value.hint)
            continue
        found = door(own, dtype="float32")
        model = getattr(found, "model", found)
        assert model.config.rope_ratio_applies_to == meaning
        expected = (10_000.0, 16.0) if meaning == "position" else (160_000.0, 1.0)
        assert model.config.rotary_base_and_scale() == expected


@pytest.mark.parametrize(
    ("code", "meaning"),
    [
        ("idx = torch.arange(seq_len) / rope_ratio", "position"),
        ("cache = self.f(seq_len / self.rope_ratio)", "position"),
        ("base = base * self.rope_ratio", "base"),
        ("x / rope_ratio; y * rope_ratio", None),
        ("nothing of the kind", None),
    ],
)
def test_the_sign_in_the_text_of_the_old_code(own: Path, code: str, meaning: str | None) -> None:
    canary = own / official.CANARY
    (own / "modeling_chatglm.py").write_text(f"open({str(canary)!r}, 'w')\n# {code}\n")
    set_config(own, rope_ratio=16, _name_or_path=...)
    for door in DOORS.values():
        if meaning is None:
            with pytest.raises(ConfigError, match="ambiguous"):
                door(own)
        else:
            found = door(own)
            assert getattr(found, "model", found).config.rope_ratio_applies_to == meaning
    assert not canary.exists()


def test_family_overrules_and_equals_the_official_logits(shared: Path, tmp_path: Path) -> None:
    source = shared / "conformance" / "chatglm2-32k"
    for file in (source / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    set_config(tmp_path, _name_or_path=...)
    with pytest.raises(ConfigError, match=r"rope_ratio=16 is ambiguous"):
        glmkit.load(tmp_path)
    arrays = np.load(source / "arrays.npz")
    inputs = {key[8:]: torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith("long.in.")}
    distances = {}
    for family in ("chatglm2-6b-32k", "chatglm3-6b-32k"):
        model = glmkit.load(tmp_path, family=family, dtype="float32").model
        with torch.no_grad():
            found = model(**inputs).logits[..., torch.from_numpy(arrays["vocab_subset"])]
        distances[family] = float(np.abs(found.numpy() - arrays["long.logits"]).max())
    assert distances["chatglm2-6b-32k"] < 1e-4
    assert distances["chatglm3-6b-32k"] > 1e-2


@pytest.mark.parametrize("name", ["chatglm2", "chatglm2-32k", "chatglm3"])
def test_conformance_folders(shared: Path, name: str) -> None:
    """As they lie there, without a tokenizer, through glmkit.load."""
    source = shared / "conformance" / name
    arrays = np.load(source / "arrays.npz")
    loaded = glmkit.load(source / "model", dtype="float32")
    ids = torch.from_numpy(arrays["single.in.input_ids"])
    subset = torch.from_numpy(arrays["vocab_subset"])
    np.testing.assert_allclose(logits(loaded.model, ids)[..., subset].numpy(), arrays["single.logits"], atol=1e-4)


# --- damaged checkpoints: one error lists everything, at every door ---


def everywhere(folder: Path, capsys: pytest.CaptureFixture[str], *expected: str, kind: type = CheckpointError) -> None:
    """Expects the same error from Python and from the command, quickly and without allocating."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, door in DOORS.items():
        start = time.process_time()
        with pytest.raises(kind) as caught:
            door(folder)
        assert time.process_time() - start < 1, name
        for part in expected:
            assert part in caught.value.message, (name, caught.value.message)
        assert caught.value.hint or kind is CheckpointError
    for verb, *rest in VERBS:
        capsys.readouterr()
        code = cli.run([verb, str(folder), *rest])
        out, err = capsys.readouterr()
        assert (code, out) == (1, ""), (verb, err)
        assert err.startswith("error: "), err
        assert "Traceback" not in err
        for part in expected:
            assert part in err, (verb, err)
        assert (caught.value.hint is None) == ("hint: " not in err)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200 << 10  # KiB


def test_everything_wrong_with_the_tensors_is_listed_at_once(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = official.weights()
    del state[f"{QKV}.bias"]
    state["transformer.encoder.layers.0.mlp.extra.weight"] = torch.zeros(2)
    state[f"{BLOCK}self_attention.dense.weight"] = torch.zeros(32, 31)
    state[EMBEDDING] = torch.zeros(450, 32)
    state[f"{BLOCK}mlp.dense_4h_to_h.weight"] = torch.zeros(32, 48, dtype=torch.int8)
    official.write_weights(own, state, "safetensors")
    everywhere(
        own,
        capsys,
        f"tensor {QKV}.bias of shape [64] is missing",
        "layers.0.mlp.extra.weight of shape [2] is not part of this model",
        "self_attention.dense.weight has shape [32, 31], expected [32, 32]",
        f"{EMBEDDING} has a vocabulary of 450 rows, config.json says 448",
        "mlp.dense_4h_to_h.weight is int8, expected a floating-point type",
    )


def test_integers_in_place_of_weights_alone(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = official.weights()
    state[f"{QKV}.weight"] = torch.ones(64, 32, dtype=torch.int8)
    official.write_weights(own, state, "safetensors")
    everywhere(own, capsys, f"tensor {QKV}.weight is int8")


def test_a_quantised_checkpoint_whose_config_does_not_say_so(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModel.from_pretrained(own).quantize(8)
    model.save_pretrained(own)
    set_config(own, quantization_bit=0)
    everywhere(own, capsys, f"{QKV}.weight_scale of shape [64] is not part", f"tensor {QKV}.weight is int8")


def test_missing_and_truncated_shards(tmp_path: Path, vocabulary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = official.write_folder(tmp_path / "shards", tokenizer=vocabulary)
    first, second = sorted(damaged.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-10])
    second.unlink()
    everywhere(damaged, capsys, f"{first.name} ", "cut short", second.name)
    bins = official.write_folder(tmp_path / "bins", tokenizer=vocabulary, form="bin-shards")
    first, second = sorted(bins.glob("*.bin"))
    first.write_bytes(first.read_bytes()[:-100])
    second.unlink()
    everywhere(bins, capsys, first.name, second.name)


class Command:
    """Pickles as a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_bin_file(tmp_path: Path, vocabulary: Path, capsys: pytest.CaptureFixture[str], legacy: bool) -> None:
    canary = tmp_path / "canary"
    folder = official.write_folder(tmp_path / "evil", tokenizer=vocabulary, form="bin")
    state: dict[str, Any] = official.weights()
    state["transformer.evil"] = Command(f"touch {canary}")
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    everywhere(folder, capsys, "pytorch_model.bin", *([] if legacy else ["system"]))
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["prefix", "lora"])
def test_code_in_an_adapter(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    canary = tmp_path / "canary"
    state = {"transformer.prefix_encoder.embedding.weight": Command(f"touch {canary}")}
    if kind == "prefix":
        (tmp_path / "config.json").write_text(json.dumps(official.CONFIG | {"pre_seq_len": 4}))
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
        torch.save(state, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"_model\.bin asks to run posix\.system"):
        glmkit.load(folder, adapter=tmp_path)
    assert cli.run(["chat", str(folder), "--adapter", str(tmp_path), "--prompt", "hello"]) == 1
    assert "posix.system" in capsys.readouterr().err
    assert not canary.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 10**9},  # W-55
        {"hidden_size": 2**31},  # W-56
        {"padded_vocab_size": 2**40},
        {"num_attention_heads": 0},  # W-57
        {"multi_query_group_num": 0},
        {"multi_query_group_num": 3},
        {"num_layers": -1},  # W-58
        {"num_layers": "2"},
        {"num_layers": 2.0},
        {"num_layers": True},
        {"layernorm_epsilon": "1e-5"},
        {"seq_length": 10**12},  # W-59
        {"pre_seq_len": 10**8},  # W-63
        {"rmsnorm": False},
        {"quantization_bit": 3},
        {"a_new_switch": True},
    ],
    ids=str,
)
def test_configs_that_are_refused(own: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]) -> None:
    set_config(own, **changes)
    [name] = changes
    everywhere(own, capsys, name, kind=ConfigError)


def test_all_refused_fields_are_listed(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_config(own, num_layers=10**9, hidden_size=-1, rmsnorm=False, layernorm_epsilon=0)
    everywhere(own, capsys, "num_layers=", "hidden_size=", "rmsnorm=", "layernorm_epsilon=", kind=ConfigError)


def test_a_number_beyond_all_numbers(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (own / "config.json").read_text().replace('"layernorm_epsilon": 1e-05', '"layernorm_epsilon": 1e400')
    (own / "config.json").write_text(text)
    everywhere(own, capsys, "layernorm_epsilon=inf", kind=ConfigError)


def test_sizes_that_are_allowed_but_not_there_cost_no_memory(own: Path) -> None:
    set_config(own, hidden_size=10**6, padded_vocab_size=10**7, num_layers=20)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for door in DOORS.values():
        with pytest.raises(CheckpointError, match=r"expected \[10000000, 1000000\]"):
            door(own)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100 << 10  # KiB


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..\\x.safetensors", "a\nb.safetensors"])
def test_shards_outside_the_folder(
    tmp_path: Path, vocabulary: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """W-24 to W-27 through the doors; the gate's own tests have the rest."""
    folder = official.write_folder(tmp_path / "m", tokenizer=vocabulary)
    save_file(official.weights(), tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"][EMBEDDING] = name
    index.write_text(json.dumps(listed))
    everywhere(folder, capsys, "plain")


def test_a_file_and_nothing(own: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (own / "model.safetensors").unlink()
    everywhere(own, capsys, "model.safetensors")
    (own / "config.json").unlink()
    for door in (glmkit.load, ChatGLM2ForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"config\.json"):
            door(own)
    with pytest.raises(GlmkitError):
        glmkit.load(tmp_path / "nowhere")


@pytest.mark.parametrize("argument", [{"variant": "fp16"}, {"gguf_file": "x.gguf"}])
def test_files_that_the_gate_does_not_see_are_refused(folder: Path, argument: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=next(iter(argument))):
        ChatGLM2ForCausalLM.from_pretrained(folder, **argument)


def test_the_file_that_was_checked_is_the_file_that_is_loaded(own: Path) -> None:
    """W-37: safetensors is preferred, whatever transformers is told."""
    official.write_weights(own, official.weights(seed=1), "bin")
    expected = load_file(own / "model.safetensors")[EMBEDDING]
    for choice in (None, True, False):
        model = AutoModel.from_pretrained(own, use_safetensors=choice)
        assert torch.equal(model.state_dict()[EMBEDDING], expected)


def test_subfolder(tmp_path: Path, folder: Path, vocabulary: Path) -> None:
    official.write_folder(tmp_path / "outer", tokenizer=vocabulary, seed=1)
    official.write_folder(tmp_path / "outer" / "inner", tokenizer=vocabulary)
    model = ChatGLM2ForCausalLM.from_pretrained(tmp_path / "outer", subfolder="inner", dtype=torch.float32)
    assert torch.equal(logits(model), logits(glmkit.load(folder).model))


# --- adapters ---


def prefix(folder: Path, table: torch.Tensor, **others: torch.Tensor) -> Path:
    """Writes what the official P-Tuning script writes."""
    state = {"embedding.weight": table} | others
    torch.save(
        {f"transformer.prefix_encoder.{name}": tensor for name, tensor in state.items()}, folder / "pytorch_model.bin"
    )
    projects = bool(others)
    config = official.CONFIG | {"pre_seq_len": 99, "prefix_projection": projects}  # the tensors know better
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("projection", [False, True])
def test_p_tuning_takes_its_length_from_its_tensors(folder: Path, tmp_path: Path, projection: bool) -> None:
    torch.manual_seed(1)
    w0, b0, w2, b2 = torch.randn(32, 64), torch.randn(32), torch.randn(64, 32), torch.randn(64)
    trans = {"trans.0.weight": w0, "trans.0.bias": b0, "trans.2.weight": w2, "trans.2.bias": b2}
    table = torch.randn(5, 64)
    prefix(tmp_path, table, **(trans if projection else {}))
    loaded = glmkit.load(folder, adapter=tmp_path)
    assert (loaded.config.pre_seq_len, loaded.config.prefix_projection) == (5, False)  # the layers were run once
    trained = {name.split(".")[1] for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    assert trained == {"prefix_encoder"}
    rows = (table @ w0.T + b0).tanh() @ w2.T + b2 if projection else table
    torch.testing.assert_close(loaded.model.transformer.prefix_encoder.embedding.weight, rows, atol=1e-5, rtol=1e-5)
    found = loaded.model.transformer.prefix_encoder(1)
    torch.testing.assert_close(found[1][0][0], rows.view(5, 4, 2, 8)[:, 2].transpose(0, 1), atol=1e-4, rtol=1e-4)
    assert (logits(loaded.model) - logits(glmkit.load(folder).model)).abs().max() > 0.01


def test_a_prefix_stays_exact_on_a_half_base(folder: Path, tmp_path: Path) -> None:
    prefix(tmp_path, torch.randn(5, 64))
    loaded = glmkit.load(folder, adapter=tmp_path, dtype="bfloat16", quantize="official-int8")
    assert torch.isfinite(logits(loaded.model)).all()
    kinds = {type(module) for name, module in loaded.model.named_modules() if name.endswith("dense_h_to_4h")}
    assert kinds == {QuantizedLinear}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"embedding.weight": torch.zeros(5, 63)}, "shape [5, 63], expected [5, 64]"),
        ({"embedding.weight": torch.zeros(5, 64), "more.weight": torch.zeros(2)}, "more.weight"),
        ({"embedding.weight": torch.zeros(5, 64), "trans.0.weight": torch.zeros(32, 64)}, "trans.2.bias"),
        ({"trans.0.weight": torch.zeros(32, 64)}, "embedding.weight"),
    ],
)
def test_prefixes_that_do_not_fit(folder: Path, tmp_path: Path, state: dict[str, torch.Tensor], message: str) -> None:
    prefix(tmp_path, table=torch.zeros(1))
    torch.save({f"transformer.prefix_encoder.{k}": v for k, v in state.items()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        glmkit.load(folder, adapter=tmp_path)
    assert message in caught.value.message


def test_a_prefix_opened_as_a_model_gets_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix(tmp_path, torch.zeros(5, 64))
    set_config(tmp_path, pre_seq_len=5)
    everywhere(tmp_path, capsys, "it holds a P-Tuning prefix only, not a whole model")
    with pytest.raises(CheckpointError) as caught:
        glmkit.load(tmp_path)
    assert "adapter=" in str(caught.value.hint)


def test_a_whole_model_with_its_prefix(folder: Path, tmp_path: Path, vocabulary: Path) -> None:
    """What ChatGLM3's finetune_hf.py leaves: the whole model, and pre_seq_len in its config."""
    table = torch.randn(5, 64)
    whole = official.write_folder(tmp_path / "whole", tokenizer=vocabulary, form="safetensors", pre_seq_len=5)
    state = official.weights() | {"transformer.prefix_encoder.embedding.weight": table}
    official.write_weights(whole, state, "safetensors")
    (tmp_path / "alone").mkdir()
    expected = logits(glmkit.load(folder, adapter=prefix(tmp_path / "alone", table)).model)
    for door in DOORS.values():
        found = door(whole, dtype="float32")
        torch.testing.assert_close(logits(getattr(found, "model", found)), expected, atol=1e-6, rtol=1e-6)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> tuple[Path, torch.Tensor]:
    """A LoRA that PEFT itself trained for three steps, and the logits of PEFT's own model."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, lora_dropout=0.1)
    model = peft.get_peft_model(base, config)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("lora")
    model.save_pretrained(path)
    return path, logits(model.eval())


def test_lora_equals_peft(folder: Path, lora: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    path, expected = lora
    assert (expected - logits(glmkit.load(folder).model)).abs().max() > 0.05
    loaded = glmkit.load(folder, adapter=path)
    assert not loaded.model.training
    torch.testing.assert_close(logits(loaded.model), expected, atol=1e-5, rtol=1e-5)
    for file in path.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    torch.testing.assert_close(logits(glmkit.load(folder, adapter=tmp_path).model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lora_on_a_half_base_keeps_float32_matrices(folder: Path, lora: tuple[Path, torch.Tensor], dtype: str) -> None:
    path, expected = lora
    model = glmkit.load(folder, adapter=path, dtype=dtype).model
    kinds = {parameter.dtype for name, parameter in model.named_parameters() if ".lora_" in name}
    assert kinds == {torch.float32}
    plain = logits(glmkit.load(folder, dtype=dtype).model) - logits(glmkit.load(folder).model)
    assert (logits(model) - expected).abs().max() < 4 * plain.abs().max()


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "kind", "rank"])
def test_every_tensor_of_a_lora_must_find_its_place(
    folder: Path, lora: tuple[Path, torch.Tensor], tmp_path: Path, damage: str
) -> None:
    state = load_file(lora[0] / "adapter_model.safetensors")
    config = json.loads((lora[0] / "adapter_config.json").read_text())
    name = f"base_model.model.{QKV}.lora_B.weight"
    assert name in state
    expected = name
    if damage == "missing":
        del state[name]
    elif damage == "unexpected":
        expected = name.replace("query_key_value", "dense")
        state[expected] = torch.zeros(32, 4)
    elif damage == "shape":
        state[name] = torch.zeros(63, 4)
    elif damage == "kind":
        config["peft_type"], expected = "IA3", "peft_type is 'IA3'"
    else:
        config["r"], expected = 8, "rank [4]"
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        glmkit.load(folder, adapter=tmp_path)
    assert expected in caught.value.message


def test_lora_for_another_model(lora: tuple[Path, torch.Tensor], tmp_path: Path, vocabulary: Path) -> None:
    deeper = official.write_folder(tmp_path / "deeper", tokenizer=vocabulary, num_layers=3)
    with pytest.raises(CheckpointError, match=r"layers\.2.*is missing"):
        glmkit.load(deeper, adapter=lora[0])


def test_the_adapter_config_of_the_official_example(shared: Path, folder: Path, tmp_path: Path) -> None:
    config = (shared / "data" / "formats" / "peft_adapter_config_chatglm3.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    rank = json.loads(config)["r"]
    torch.manual_seed(0)
    state = {}
    for layer in range(2):
        start = f"base_model.model.transformer.encoder.layers.{layer}.self_attention.query_key_value."
        state |= {f"{start}lora_A.weight": torch.randn(rank, 32), f"{start}lora_B.weight": torch.randn(64, rank)}
    save_file(state, tmp_path / "adapter_model.safetensors")
    model = glmkit.load(folder, adapter=tmp_path).model
    layer = model.transformer.encoder.layers[0].self_attention.query_key_value
    x = torch.randn(1, 32)
    a, b = (state[f"base_model.model.{QKV}.lora_{letter}.weight"] for letter in "AB")
    scale = json.loads(config)["lora_alpha"] / rank
    torch.testing.assert_close(
        layer(x), F.linear(x, layer.weight, layer.bias) + scale * x @ a.T @ b.T, atol=1e-4, rtol=1e-4
    )
