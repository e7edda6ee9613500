"""Adapters of every origin beside every family, several in one model, and what is refused before anything is read."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import glmkit
import official
import tiny_families
from glmkit import cli
from glmkit.chat.session import Session
from glmkit.engine.decode import CancelToken
from glmkit.engine.layout import layout_for
from glmkit.errors import CheckpointError, UsageError
from glmkit.parallel import shard_model
from glmkit.quant.linear import QuantizedLinear

TEXT = "tea and rice"
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "chatglm": tiny_families.write_chatglm,
    "chatglm3": lambda folder: official.write_folder(folder, tokenizer=_vocabulary(folder), dtype=torch.float32),
    "glm4": tiny_families.write_glm4,
    "glm": tiny_families.write_glm,
}
MAKERS = FAMILIES | {
    "chatglm2": lambda folder: official.write_folder(folder, 2, tokenizer=_vocabulary(folder), dtype=torch.float32)
}
PROGRAM_FILES = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def _vocabulary(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return official.train_tokenizer(folder.parent / "vocabulary.model")


@pytest.fixture(autouse=True)
def nothing_is_piped_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = MAKERS[family](tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return make


@pytest.fixture(scope="module")
def base(bases: Callable[[str], Path]) -> Path:
    return bases("chatglm3")


def logits(model: Any) -> torch.Tensor:
    """(T, V) of a fixed prompt, as the decode loop gives it."""
    config = model.config
    ends = {"chatglm": ["gmask_token_id", "bos_token_id"], "glm": ["sop_token_id"]}[config.model_type]
    special = [getattr(config, name, None) for name in ends] if not hasattr(config, "kv_channels") else []
    if config.model_type == "glm":
        special = [config.mask_token_ids[0], *special]
    ids = torch.tensor([[5, 6, 7, 8, 9, *(token for token in special if token is not None)]])
    with torch.no_grad():
        given = layout_for(model, ids, ids.new_zeros(1)).prompt(0, ids.shape[1])
        return model(input_ids=ids, **given).logits[0].float()


def linear_layers(model: Any, *ends: str) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if name.endswith(ends) and "layers." in name}


def write_lora(
    folder: Path, base: Path, *, rank: int = 4, ends: tuple[str, ...] = ("query_key_value",), seed: int = 0, **said: Any
) -> Path:
    """A LoRA folder made by hand, with PEFT's names."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, layer in linear_layers(glmkit.load(base, dtype="float32").model, *ends).items():
        state[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features) * 0.3
        state[f"base_model.model.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank) * 0.3
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(ends), **said}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_prefix(folder: Path, base: Path, *, length: int = 5, projects: bool = False, seed: int = 0) -> Path:
    """What the official P-Tuning scripts leave: trainable tensors alone, beside files of the trainer."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = glmkit.load(base).config
    config.pre_seq_len, config.prefix_projection = length, projects
    with torch.device("meta"):
        made = glmkit.registration.LANGUAGE_MODELS[type(config)](config)
    state = {
        name: torch.randn(tensor.shape) * (0.5 if tensor.ndim > 1 else 0.1)
        for name, tensor in made.state_dict().items()
        if ".prefix_encoder." in name
    }
    assert len(state) == (5 if projects else 1)
    torch.save(state, folder / "pytorch_model.bin")
    return folder


class Trap:
    """A pickle that leaves a file if anybody loads it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.canary),))


# --- LoRA of PEFT ---


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_what_peft_computes(family: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Ranks and scales of single layers, rsLoRA, several layers per block; PEFT wrote the folder and is the oracle."""
    peft = pytest.importorskip("peft")
    folder = bases(family)
    targets = ["query_key_value", "dense_h_to_4h"]
    first = next(iter(linear_layers(glmkit.load(folder).model, "query_key_value")))
    forms: list[dict[str, Any]] = [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"dense_h_to_4h": 2}, "alpha_pattern": {first: 64, "dense_h_to_4h": 3}},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["0.mlp.dense_h_to_4h"]},
    ]
    plain = logits(glmkit.load(folder, dtype="float32").model)
    for number, form in enumerate(forms if family == "chatglm3" else forms[2:3]):
        torch.manual_seed(number)
        config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, **form)
        model = glmkit.load(folder, dtype="float32").model
        wrapped = peft.get_peft_model(model, config).eval()
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        expected = logits(model)
        assert (expected - plain).abs().max() > 0.05
        path = tmp_path / str(number)
        wrapped.save_pretrained(path, save_embedding_layers=False)
        torch.testing.assert_close(logits(glmkit.load(folder, adapter=path, dtype="float32").model), expected)
        tensors = load_file(path / "adapter_model.safetensors")
        (path / "adapter_model.safetensors").unlink()
        torch.save(tensors, path / "adapter_model.bin")
        torch.testing.assert_close(logits(glmkit.load(folder, adapter=path, dtype="float32").model), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_of_the_base(dtype: str, base: Path, tmp_path: Path) -> None:
    """The matrices compute in float32 and hand over in the dtype of the base: PEFT's numbers, bit for bit."""
    peft = pytest.importorskip("peft")
    path = write_lora(tmp_path / "lora", base)
    model = glmkit.load(base, dtype=dtype).model
    expected = logits(peft.PeftModel.from_pretrained(model, path).eval().base_model.model)
    loaded = glmkit.load(base, adapter=path, dtype=dtype)
    assert torch.equal(logits(loaded.model), expected)
    assert {p.dtype for name, p in loaded.model.named_parameters() if ".lora_" in name} == {torch.float32}
    assert isinstance(loaded.chat("hello", max_new_tokens=3).text, str)
    prefix = glmkit.load(base, adapter=write_prefix(tmp_path / "prefix", base, projects=True), dtype=dtype)
    assert torch.isfinite(logits(prefix.model)).all()
    assert isinstance(prefix.chat("hello", max_new_tokens=3).text, str)
    loaded.model.half()  # what official snippets do; the matrices follow
    assert torch.isfinite(logits(loaded.model)).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_lora_beside_quantised_layers(bits: int, base: Path, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "lora", base, ends=("query_key_value", "dense_4h_to_h"))
    tensors = load_file(path / "adapter_model.safetensors")
    quantised = glmkit.load(base, dtype="float32", quantize=f"official-int{bits}")
    quantised.model.save_pretrained(tmp_path / "stored")
    quantised.tokenizer.save_pretrained(tmp_path / "stored")
    for source, quantize in ((base, f"official-int{bits}"), (tmp_path / "stored", None)):
        loaded = glmkit.load(source, adapter=path, dtype="float32", quantize=quantize)
        for name, layer in linear_layers(loaded.model, "query_key_value", "dense_4h_to_h").items():
            assert isinstance(layer, QuantizedLinear)
            a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            x = torch.randn(3, layer.in_features)
            whole = layer.dequantize().float() + 2 * b @ a
            torch.testing.assert_close(layer(x), F.linear(x, whole, layer.bias), atol=1e-4, rtol=1e-4)
        assert torch.equal(logits(loaded.with_adapter(None)), logits(quantised.model))


@pytest.mark.parametrize("kind", ["bnb-int8", "bnb-nf4"])
def test_lora_beside_layers_of_bitsandbytes(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "ffn_hidden_size": 64, "kv_channels": 16}
    folder = official.write_folder(tmp_path / "base", 2, tokenizer=_vocabulary(tmp_path / "base"), **sizes)
    path = write_lora(tmp_path / "lora", folder)
    tensors = load_file(path / "adapter_model.safetensors")
    loaded = glmkit.load(folder, adapter=path, dtype="float32", quantize=kind)
    assert loaded.adapters is not None
    for name, layer in linear_layers(loaded.model, "query_key_value").items():
        assert type(layer).__module__.startswith("bitsandbytes")
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        x = torch.randn(3, 64)
        with torch.no_grad(), loaded.adapters.active(None):
            plain = layer(x)
        with torch.no_grad():
            torch.testing.assert_close(layer(x) - plain, 2 * x @ a.T @ b.T, atol=1e-3, rtol=1e-3)
    assert torch.equal(
        logits(loaded.with_adapter(None)), logits(glmkit.load(folder, dtype="float32", quantize=kind).model)
    )


def test_quantising_afterwards_keeps_the_matrices(base: Path, tmp_path: Path) -> None:
    """`model.quantize(8)` replaces the layers; over several devices they are divided, which adapters are not."""
    path = write_lora(tmp_path / "lora", base)
    first = glmkit.load(base, adapter=path, dtype="float32", quantize="official-int8").model
    then = glmkit.load(base, adapter=path, dtype="float32").model.quantize(8)
    assert torch.equal(logits(then), logits(first))
    with pytest.raises(UsageError, match="adapters are not divided") as caught:
        shard_model(first, 0, 2)
    assert "glm merge" in str(caught.value.hint)


# --- LoRA of ChatGLM-Tuning ---


@pytest.mark.parametrize("named", ["{}.lora_{}.default.weight", "{}.lora_{}.weight"])
@pytest.mark.parametrize("family", ["chatglm", "chatglm3"])
def test_matrices_without_a_config(
    family: str, named: str, bases: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """named_parameters() that learn, as torch.save writes them: rank from the shapes, alpha said to be unknown."""
    folder = bases(family)
    described = write_lora(tmp_path / "peft", folder, rank=3, lora_alpha=32)
    state = load_file(described / "adapter_model.safetensors")
    bare = tmp_path / "checkpoint-50"
    bare.mkdir()
    renamed = {}
    for name, tensor in state.items():
        module, side = name.removesuffix(".weight").split(".lora_")
        renamed[named.format(module, side)] = tensor.half()
    torch.save(renamed, bare / "adapter_model.bin")
    expected = {n.replace(".default.", "."): t.float() for n, t in renamed.items()}
    save_file(expected, described / "adapter_model.safetensors")
    found = logits(glmkit.load(folder, adapter=bare, dtype="float32").model)
    assert "does not say lora_alpha: 32 is taken" in caplog.text
    assert torch.equal(found, logits(glmkit.load(folder, adapter=described, dtype="float32").model))
    config = json.loads((described / "adapter_config.json").read_text()) | {"lora_alpha": 6}
    (described / "adapter_config.json").write_text(json.dumps(config))
    caplog.clear()
    overruled = glmkit.load(folder, adapter=bare, dtype="float32", adapter_config={"lora_alpha": 6}).model
    assert torch.equal(logits(overruled), logits(glmkit.load(folder, adapter=described, dtype="float32").model))
    assert not torch.equal(logits(overruled), found)
    assert "lora_alpha" not in caplog.text
    lacking = dict(list(renamed.items())[:-2])  # the second block
    torch.save(lacking, bare / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"layers\.1.*is missing"):
        glmkit.load(folder, adapter=bare)


# --- what is refused, and what is never run ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["output_layer"]}, "modules_to_save"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"enable_lora": [True, False, True]}, "enable_lora"),
        ({"lora_alpha": "32"}, "lora_alpha is '32'"),
        ({"r": 10**7}, "r is 10000000"),
        ({"rank_pattern": {"(a+)+$": 3}}, "expected names of layers"),
        ({"alpha_pattern": ["query_key_value"]}, "alpha_pattern is"),
        ({"target_modules": ["query_key_value", "dense_h_to_4h"]}, "dense_h_to_4h.lora_A.weight"),
        ({"target_modules": ["dense"]}, "query_key_value.lora_A.weight"),
    ],
)
def test_what_an_adapter_config_may_not_say(base: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_lora(tmp_path / "lora", base, **changes)
    with pytest.raises(CheckpointError) as caught:
        glmkit.load(base, adapter=path)
    assert message in caught.value.message
    assert caught.value.hint


def test_a_pattern_is_not_followed(base: Path, tmp_path: Path) -> None:
    """Matching this one against the names of layers would take longer than anybody lives."""
    path = write_lora(tmp_path / "lora", base, target_modules="(([a-z._0-9])+)+!", exclude_modules="((.)+)+!")
    started = time.monotonic()
    found = logits(glmkit.load(base, adapter=path).model)
    assert time.monotonic() - started < 20
    assert not torch.equal(found, logits(glmkit.load(base).model))


@pytest.mark.parametrize("place", ["adapter", *PROGRAM_FILES])
def test_no_pickle_is_run(base: Path, tmp_path: Path, place: str) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "checkpoint-7"
    if place == "adapter":
        folder.mkdir()
        torch.save({"base_model.model.x.lora_A.weight": Trap(canary)}, folder / "adapter_model.bin")
        with pytest.raises(CheckpointError):
            glmkit.load(base, adapter=folder)
    else:
        write_prefix(folder, base)
        torch.save(Trap(canary), folder / place)
        (folder / "trainer_state.json").write_text("{")
        assert glmkit.load(base, adapter=folder).config.pre_seq_len == 5
    assert not canary.exists()
    torch.load(folder / ("adapter_model.bin" if place == "adapter" else place), weights_only=False)
    assert canary.exists()  # it was a trap


def test_the_folder_above_the_checkpoints(base: Path, tmp_path: Path) -> None:
    write_prefix(tmp_path / "checkpoint-500", base)
    write_prefix(tmp_path / "checkpoint-1000", base)
    with pytest.raises(CheckpointError, match="neither an adapter nor a prefix") as caught:
        glmkit.load(base, adapter=tmp_path)
    assert "checkpoint-1000, checkpoint-500" in str(caught.value.hint)


# --- P-Tuning v2 ---


@pytest.mark.parametrize("projects", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_of_every_family(family: str, projects: bool, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """From both kinds of file, and equal to the same tensors in a whole model with pre_seq_len in its config."""
    folder = bases(family)
    path = write_prefix(tmp_path / "checkpoint-3000", folder, projects=projects)
    loaded = glmkit.load(folder, adapter=path, dtype="float32")
    state = torch.load(path / "pytorch_model.bin")
    (tmp_path / "safe").mkdir()
    save_file(state, tmp_path / "safe" / "model.safetensors")
    found = logits(loaded.model)
    assert torch.equal(logits(glmkit.load(folder, adapter=tmp_path / "safe", dtype="float32").model), found)
    whole = whole_model(tmp_path / "whole", folder, state, projects)
    torch.testing.assert_close(logits(glmkit.load(whole, dtype="float32").model), found, atol=1e-5, rtol=1e-5)
    assert (found - logits(glmkit.load(folder, dtype="float32").model)).abs().max() > 0.05


def whole_model(target: Path, base: Path, prefix: dict[str, torch.Tensor], projects: bool) -> Path:
    """The base and a prefix in one folder, as older official scripts and ChatGLM3's finetune_hf.py save it."""
    target.mkdir()
    for file in base.iterdir():
        if not file.name.endswith((".safetensors", ".bin", ".index.json", ".py")):
            (target / file.name).write_bytes(file.read_bytes())
    state = {n: t for file in base.glob("*.safetensors") for n, t in load_file(file).items()}
    save_file(state | prefix, target / "model.safetensors")
    length = next(t for n, t in prefix.items() if n.endswith("embedding.weight")).shape[0]
    config = json.loads((base / "config.json").read_text()) | {"pre_seq_len": length, "prefix_projection": projects}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_whole_model_with_its_prefix_as_adapter(base: Path, tmp_path: Path) -> None:
    """Taken where the rest of it is the base; otherwise it is told how to load it."""
    path = write_prefix(tmp_path / "alone", base)
    state = torch.load(path / "pytorch_model.bin")
    whole = whole_model(tmp_path / "whole", base, state, projects=False)
    expected = logits(glmkit.load(base, adapter=path, dtype="float32").model)
    assert torch.equal(logits(glmkit.load(base, adapter=whole, dtype="float32").model), expected)
    tensors = load_file(whole / "model.safetensors")
    name = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, whole / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not this base: 1 of .*layers\.1\.mlp\.dense_4h_to_h") as caught:
        glmkit.load(base, adapter=whole)
    assert "glmkit.load(THIS_FOLDER)" in str(caught.value.hint)
    assert torch.isfinite(logits(glmkit.load(whole).model)).all()
    with pytest.raises(CheckpointError, match="a whole model, no adapter") as caught:
        glmkit.load(base, adapter=base)
    assert "glmkit.load(THIS_FOLDER)" in str(caught.value.hint)


# --- several at once ---


@pytest.fixture(scope="module")
def several(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    made: dict[str, dict[str, Path]] = {}

    def make(family: str) -> dict[str, Path]:
        if family not in made:
            root, folder = tmp_path_factory.mktemp(f"{family}-adapters"), bases(family)
            made[family] = {
                "ads": write_lora(root / "ads", folder, seed=1),
                "poet": write_prefix(root / "poet", folder, seed=2),
                "wide": write_lora(root / "wide", folder, rank=7, ends=("query_key_value", "dense_4h_to_h"), seed=3),
                "long": write_prefix(root / "long", folder, length=9, projects=True, seed=4),
            }
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_each_of_several_is_what_it_is_alone(
    family: str, bases: Callable[[str], Path], several: Callable[[str], dict[str, Path]]
) -> None:
    """Bit for bit, in any order, and the base in between."""
    folder, paths = bases(family), several(family)
    expected = {name: logits(glmkit.load(folder, adapter=path, dtype="float32").model) for name, path in paths.items()}
    plain = glmkit.load(folder, dtype="float32")
    expected["base"] = logits(plain.model)
    assert len({tuple(one.flatten()[:50].tolist()) for one in expected.values()}) == 5
    loaded = glmkit.load(folder, adapter=paths, dtype="float32")
    assert loaded.adapters is not None
    assert loaded.adapters.names == tuple(paths)
    assert torch.equal(logits(loaded.model), expected["ads"])  # the first, until another is chosen
    for name in ("long", "base", "poet", "wide", "poet", "ads", "base", "long", "long", "wide"):
        wanted = None if name == "base" else name
        assert torch.equal(logits(loaded.with_adapter(wanted)), expected[name])
        assert torch.equal(logits(loaded.model), expected["ads"])
        with loaded.adapters.active(wanted):
            assert torch.equal(logits(loaded.model), expected[name])
    for name in ("poet", "base", "wide"):
        loaded.use(None if name == "base" else name)
        assert torch.equal(logits(loaded.model), expected[name])
    # One base in memory: all that came along are matrices and tables.
    own = {name for name, _ in plain.model.named_parameters()}
    beside = [n for n, _ in loaded.model.named_parameters() if n not in own and ".lora_" not in n]
    assert [name for name in beside if ".prefix_encoder." not in name] == []


def test_streams_that_take_turns(bases: Callable[[str], Path], several: Callable[[str], dict[str, Path]]) -> None:
    """Answers written token by token in turns, and another adapter chosen for all between any two."""
    folder, paths = bases("chatglm2"), several("chatglm2")
    options = {"max_new_tokens": 12, "temperature": 0.0}
    alone = {name: glmkit.load(folder, adapter=path).chat(TEXT, **options).text for name, path in paths.items()}
    alone["base"] = glmkit.load(folder).chat(TEXT, **options).text
    assert len(set(alone.values())) == 5
    loaded = glmkit.load(folder, adapter=paths)
    chosen = loaded.stream(TEXT, **options)  # of the first, though another is chosen in the middle of it
    streams = {name: loaded.stream(TEXT, adapter=None if name == "base" else name, **options) for name in alone}
    turns = 0
    for turns, _ in enumerate(zip_longest(*streams.values(), chosen)):
        loaded.use(("poet", None, "long")[turns % 3])
    assert turns > 5
    assert {name: one.reply.text for name, one in streams.items()} == alone
    assert chosen.reply.text == alone["ads"]
    assert {name: loaded.chat(TEXT, adapter=name, **options).text for name in paths} == {n: alone[n] for n in paths}


def test_threads_do_not_see_each_other(bases: Callable[[str], Path], several: Callable[[str], dict[str, Path]]) -> None:
    folder, paths = bases("chatglm3"), several("chatglm3")
    loaded = glmkit.load(folder, adapter=paths, dtype="float32")
    names = [*paths, None]
    expected = {name: logits(loaded.with_adapter(name)) for name in names}
    wrong: list[str | None] = []

    def ask(name: str | None) -> None:
        model = loaded.with_adapter(name)
        wrong.extend(name for _ in range(25) if not torch.equal(logits(model), expected[name]))

    threads = [threading.Thread(target=ask, args=(name,)) for name in names * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_error_in_the_middle_leaves_nothing_behind(
    bases: Callable[[str], Path], several: Callable[[str], dict[str, Path]]
) -> None:
    loaded = glmkit.load(bases("chatglm3"), adapter=several("chatglm3"), dtype="float32")
    expected = logits(loaded.model)
    for name in ("long", "ads", None):
        with pytest.raises(IndexError):
            loaded.with_adapter(name)(input_ids=torch.tensor([[10**6]]))
        assert loaded.config.pre_seq_len is None
        assert torch.equal(logits(loaded.model), expected)
    with pytest.raises(UsageError, match="there is no adapter 'poem'") as caught:
        loaded.chat(TEXT, adapter="poem")
    assert "ads, poet, wide, long" in str(caught.value.hint)
    with pytest.raises(UsageError, match="without adapters"):
        glmkit.load(bases("chatglm3")).chat(TEXT, adapter="ads")
    assert glmkit.load(bases("chatglm3")).chat(TEXT, adapter=None, max_new_tokens=1).text is not None


@pytest.mark.parametrize("name", ["base", "", "a b", "none", "x" * 101, "a\nb"])
def test_names_that_tell_nothing_apart(base: Path, tmp_path: Path, name: str) -> None:
    path = write_lora(tmp_path / "lora", base)
    with pytest.raises(UsageError, match="cannot be called"):
        glmkit.load(base, adapter={name: path})


def test_the_official_chat_uses_what_is_chosen(
    bases: Callable[[str], Path], several: Callable[[str], dict[str, Path]]
) -> None:
    folder, paths = bases("chatglm3"), several("chatglm3")
    options = {"do_sample": False, "max_length": 60}
    model, tokenizer = glmkit.load(folder, dtype="float32")
    expected = {None: model.chat(tokenizer, TEXT, **options)[0]}
    for name, path in paths.items():
        model, tokenizer = glmkit.load(folder, adapter=path, dtype="float32")
        expected[name] = model.chat(tokenizer, TEXT, **options)[0]
    loaded = glmkit.load(folder, adapter=paths, dtype="float32")
    for name in ("poet", None, "wide", "ads", "long"):
        loaded.use(name)
        assert loaded.model.chat(loaded.tokenizer, TEXT, **options)[0] == expected[name]
        *_, last = loaded.model.stream_chat(loaded.tokenizer, TEXT, **options)
        assert last[0] == expected[name]


# --- conversations ---


def test_a_conversation_that_changes_its_adapter(
    bases: Callable[[str], Path], several: Callable[[str], dict[str, Path]]
) -> None:
    """Keys and values read with one adapter must not serve another: what is kept is that of a fresh conversation."""

    def answered(session: Session) -> str:
        replying = session.ask("i like tea", CancelToken())
        assert list(replying)
        return session.finish(replying).text

    def kept(session: Session) -> list[torch.Tensor]:
        cache = session._cache._cache
        assert cache is not None
        return [part.clone() for layer in cache.layers for part in layer._filled()]

    folder, paths = bases("chatglm2"), several("chatglm2")
    loaded = glmkit.load(folder, adapter=paths)
    session = Session(loaded, "tiny", settings={"temperature": 0, "max_tokens": 6})
    for name in ("poet", "poet", "ads", None, "long", "ads", "wide"):
        session.use(name)
        before = list(session.messages)
        text = answered(session)
        fresh = Session(loaded, "tiny", messages=before, settings={"temperature": 0, "max_tokens": 6})
        fresh.use(name)
        assert text == answered(fresh)
        torch.testing.assert_close(kept(session), kept(fresh), atol=1e-4, rtol=1e-4)
    with pytest.raises(UsageError):
        session.use("poem")
    assert session.adapter == "wide"
    assert session.adapter_folder == paths["wide"]


def test_the_chat_loop_and_its_conversation(
    bases: Callable[[str], Path],
    several: Callable[[str], dict[str, Path]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, paths = bases("glm4"), several("glm4")
    options = {"max_new_tokens": 5, "temperature": 0.0}
    alone = {name: glmkit.load(folder, adapter=paths[name]).chat(TEXT, **options).text for name in ("ads", "poet")}
    flags = [part for name in ("ads", "poet") for part in ("--adapter", f"{name}={paths[name]}")]
    given = ["chat", str(folder), *flags, "--max-tokens", "5", "--temperature", "0"]

    def talk(arguments: list[str], *lines: str) -> tuple[list[str], str]:
        typed = "".join(f"{line}\n" for line in lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        assert cli.run(arguments) == 0
        printed = capsys.readouterr()
        return printed.out.splitlines(), printed.err

    capsys.readouterr()  # what other packages print when they are imported
    out, err = talk(given, TEXT, "clear", "/adapter poet", TEXT, "/adapter poem", "/adapter")
    assert out == [*alone["ads"].splitlines(), *alone["poet"].splitlines()]
    assert "* poet" in err
    assert "there is no adapter 'poem'" in err
    out, err = talk(["chat", "--continue", "--json", "--prompt", TEXT])
    assert json.loads("\n".join(out))["adapter"] == str(paths["poet"])
    out, err = talk([*given[:2], "--adapter", str(paths["ads"]), *given[6:], "--json", "--prompt", TEXT])
    answer = json.loads("\n".join(out))
    assert (answer["adapter"], answer["text"]) == (str(paths["ads"]), alone["ads"])


def test_a_model_saved_with_adapters_in_it_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    """Nobody gets a base that lost its adapter without a word."""
    loaded = glmkit.load(base, adapter=write_lora(tmp_path / "lora", base))
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="lora_A"):
        glmkit.load(tmp_path / "saved")


def test_peft_reads_our_base_as_before(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    path = write_lora(tmp_path / "lora", base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(model, path).eval()
    assert torch.equal(logits(tuned.base_model.model), logits(glmkit.load(base, adapter=path, dtype="float32").model))
