"""Our int8 and int4: bytes on disk, every door that loads them, what is refused, and blocks that nobody sees."""

from __future__ import annotations

import copy
import gc
import io
import json
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import glmkit
import official
from glmkit import cli
from glmkit.data.calibration import calibration_batches
from glmkit.engine.layout import layout_for
from glmkit.errors import CheckpointError, ConfigError, OutputError, UsageError
from glmkit.export import convert
from glmkit.export.merge import merge
from glmkit.export.quantized import quantize
from glmkit.inspection import inspect
from glmkit.kernels import build
from glmkit.kernels.linear import Arena, packed_bytes
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.parallel import load_part
from glmkit.placement import plan_layers
from glmkit.quant import search
from glmkit.quant.linear import QuantizedLinear, dequantize, pack_model, pack_nibbles, unpack_nibbles
from glmkit.quant.official import is_quantised_layer
from glmkit.quant.schemes import FORMS, Scheme, scheme_of
from glmkit.train.arguments import Recipe
from glmkit.train.blocks import MethodBlock, ModelBlock
from glmkit.train.methods import make_method
from glmkit.train.plan import plan_inference, subject_of
from glmkit.train.run import load_model
from official_families import FAMILIES, Family, write_family

DOCS = Path(__file__).parents[1] / "docs" / "quantisation.md"
IDS = torch.tensor([[5, 6, 7, 8, 300, 2, 41]])
SIZES = {"ffn_hidden_size": 64}  # columns in groups of 32
BLOCK = "transformer.encoder.layers.0."
QKV = f"{BLOCK}self_attention.query_key_value"
NAMES = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
LAYERS = [f"transformer.encoder.layers.{layer}.{name}" for layer in (0, 1) for name in NAMES]
SCHEMES = ("int8", "int4")
native = pytest.mark.skipif("build.level() == 'torch'", reason="no native code here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound one of floating-point numbers, which no test changes."""
    root = tmp_path_factory.mktemp("plain")
    return official.write_folder(root / "model", tokenizer=official.train_tokenizer(root / "tokenizer.model"), **SIZES)


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same in each of our formats, by `glm quantize`."""
    root = tmp_path_factory.mktemp("written")
    for scheme in SCHEMES:
        quantize(folder, root / scheme, scheme)
    return {scheme: root / scheme for scheme in SCHEMES}


@pytest.fixture(scope="module")
def sane(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider model with the weights that training starts from, whose sums do not cancel out."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 256, "ffn_hidden_size": 512, "kv_channels": 64, "padded_vocab_size": 512}
    config = ChatGLM2Config.from_dict(official.CONFIG | sizes | {"generation": 3, "rope_ratio_applies_to": "base"})
    path = tmp_path_factory.mktemp("sane")
    ChatGLM2ForCausalLM(config).half().save_pretrained(path)
    return path


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def change_config(folder: Path, **changes: Any) -> None:
    """Changes fields of `quantization_config`; `...` removes one."""
    config = json.loads((folder / "config.json").read_text())
    values = config["quantization_config"] | changes
    config["quantization_config"] = {key: value for key, value in values.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **layout_for(model, ids, ids.new_zeros(1)).prompt(0, ids.shape[1])).logits.float()


def quantised_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def dequantised_copy(model: Any, plain: Any) -> Any:
    """The model of floating-point numbers, with the numbers that the quantised one stands for."""
    with torch.no_grad():
        for name, layer in quantised_layers(model).items():
            plain.get_submodule(name).weight.copy_(layer.dequantize())
    return plain


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    one, other = first.state_dict(), second.state_dict()
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(tensor, other[name]), name


# --- on disk ---


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_reader_in_the_docs_reads_what_the_model_computes_with(written: dict[str, Path], scheme: str) -> None:
    [code] = re.findall(r"```python\n(import glob\n.*?)```", DOCS.read_text(), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    space: dict[str, Any] = {}
    exec(code, space)
    for name, layer in quantised_layers(glmkit.load(written[scheme]).model).items():
        found = space["read_weight"](written[scheme], name)
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, layer.dequantize().numpy())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_on_disk(folder: Path, written: dict[str, Path], scheme: str) -> None:
    before, after = official.weights(**SIZES), load_file(written[scheme] / "model.safetensors")
    del before["transformer.rotary_pos_emb.inv_freq"]  # a constant of old files
    scales = {f"{name}.weight_scale" for name in LAYERS}
    assert set(after) == set(before) | scales
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in LAYERS:
            assert torch.equal(after[name], tensor), name
            continue
        (rows, columns), codes, scale = tensor.shape, after[name], after[f"{name}_scale"]
        assert (codes.dtype, scale.dtype) == (torch.int8, torch.float16)
        assert codes.shape == (rows, columns if scheme == "int8" else columns // 2)
        assert scale.shape == ((rows,) if scheme == "int8" else (rows, columns // 32))
        error = relative(dequantize(codes, scale, 8 if scheme == "int8" else 4).float(), tensor.float())
        assert error < (0.01 if scheme == "int8" else 0.12), name
    config = json.loads((written[scheme] / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "glmkit",
        "version": 1,
        "scheme": scheme,
        "bits": int(scheme[3:]),
        "group_size": None if scheme == "int8" else 32,
        "output_layer": None,
        "made_by": {"how": "search"},
    }
    assert not config.get("quantization_bit")
    assert "auto_map" not in config
    for file in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (written[scheme] / file).is_file()
    assert sorted(file.suffix for file in written[scheme].iterdir() if file.suffix == ".py") == []


def test_nibbles_in_pairs() -> None:
    values = torch.tensor([[-8, 7, 0, -1, 3, -4]], dtype=torch.int8)
    packed = pack_nibbles(values)
    assert packed.view(torch.uint8).tolist() == [[0x87, 0x0F, 0x3C]]
    assert torch.equal(unpack_nibbles(packed), values)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_door_has_the_same_bytes(folder: Path, written: dict[str, Path], tmp_path: Path, scheme: str) -> None:
    stored = glmkit.load(written[scheme], dtype="float16", kernels="torch").model
    during = glmkit.load(folder, dtype="float16", quantize=scheme, kernels="torch")
    during.model.save_pretrained(tmp_path)
    during.tokenizer.save_pretrained(tmp_path)
    doors: list[Any] = [
        during.model,
        glmkit.load(tmp_path, dtype="float16").model,
        glmkit.load(written[scheme], dtype="float16", quantize=scheme).model,
        AutoModel.from_pretrained(tmp_path, dtype=torch.float16),
        AutoModelForCausalLM.from_pretrained(written[scheme], trust_remote_code=True),
        ChatGLM2ForCausalLM.from_pretrained(written[scheme], dtype=torch.float16, device_map="auto").cpu(),
    ]
    for model in doors:
        assert_same_state(model, stored)
        assert set(quantised_layers(model)) == set(LAYERS)
        assert scheme_of(model.config) == Scheme(scheme, None, {"how": "search"})
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(written[scheme] / "model.safetensors").keys()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_float32_is_the_dequantised_model(folder: Path, written: dict[str, Path], scheme: str) -> None:
    model = glmkit.load(written[scheme], dtype="float32").model  # kernels="auto", and float32 means exact
    assert not any(layer.packed for layer in quantised_layers(model).values())
    plain = glmkit.load(folder, dtype="float32").model
    expected = logits(plain)
    exact = logits(dequantised_copy(model, plain))
    torch.testing.assert_close(logits(model), exact, atol=1e-5, rtol=1e-5)
    assert relative(exact, expected) > 1e-3
    auto = AutoModel.from_pretrained(written[scheme], dtype=torch.float32)
    torch.testing.assert_close(logits(auto), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_output_layer_too(folder: Path, written: dict[str, Path], tmp_path: Path, scheme: str) -> None:
    made = quantize(folder, tmp_path / "q", scheme, output_layer="int8")
    assert made.layers == len(LAYERS) + 1
    model = glmkit.load(tmp_path / "q", dtype="float32").model
    layer = model.get_output_embeddings()
    assert (type(layer), layer.bits, layer.group_size) == (QuantizedLinear, 8, None)
    expected = logits(glmkit.load(written[scheme], dtype="float32").model)
    assert 1e-4 < relative(logits(model), expected) < 0.01
    plain = {**load_file(tmp_path / "q" / "model.safetensors")}
    assert plain["transformer.output_layer.weight"].dtype == torch.int8
    model.save_pretrained(tmp_path / "again")
    assert_same_state(glmkit.load(tmp_path / "again", dtype="float32").model, model)


def _families() -> list[Family]:
    wanted = ("chatglm-6b", "glm-4-9b-chat", "glm with BERT's words", "glm-130b", "glm-130b, 2 ranks")
    chosen = [next(family for family in FAMILIES if family.name == name) for name in wanted]
    sizes: dict[str, Any] = {"glm-4-9b-chat": SIZES, "glm-130b": {"inner_hidden_size": 64}}
    sizes["glm-130b, 2 ranks"] = sizes["glm-130b"]
    return [replace(family, config=family.config | sizes.get(family.name, {})) for family in chosen]


@pytest.mark.parametrize("family", _families(), ids=lambda family: family.name)
def test_every_family(family: Family, tmp_path: Path) -> None:
    write_family(tmp_path / "plain", family)
    plain, tokenizer = glmkit.load(tmp_path / "plain", dtype="float32")
    text = family.texts[0]
    fills = tokenizer.generation == 0
    ids = [*tokenizer.fill_prompt(text), tokenizer.get_command("sop")] if fills else tokenizer.encode(text)
    asked = torch.tensor([ids])
    linears = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in linears if is_quantised_layer(name)}
    assert len(expected) == 8
    for scheme in SCHEMES:
        quantize(tmp_path / "plain", tmp_path / scheme, scheme)
        model = glmkit.load(tmp_path / scheme, dtype="float32").model
        assert set(quantised_layers(model)) == expected
        assert_same_state(glmkit.load(tmp_path / "plain", dtype="float32", quantize=scheme).model, model)
        exact = copy.deepcopy(plain)
        expected_logits = logits(dequantised_copy(model, exact), asked)
        torch.testing.assert_close(logits(model, asked), expected_logits, atol=1e-5, rtol=1e-5)
    if family.name != "glm-4-9b-chat":
        with pytest.raises(UsageError, match="is its embedding") as caught:
            quantize(tmp_path / "plain", tmp_path / "no", "int8", output_layer="int8")
        assert "keep" in str(caught.value.hint)
        assert not (tmp_path / "no").exists()


def test_a_bfloat16_checkpoint_stays_one(tmp_path: Path, folder: Path) -> None:
    """Its scales are float16, and there may be more of them than of anything else."""
    vocabulary = folder / "tokenizer.model"
    source = official.write_folder(tmp_path / "m", tokenizer=vocabulary, dtype=torch.bfloat16, **SIZES)
    quantize(source, tmp_path / "q", "int4")
    model = glmkit.load(tmp_path / "q").model
    assert model.dtype == torch.bfloat16
    assert {tensor.dtype for name, tensor in model.state_dict().items() if "scale" in name} == {torch.float16}


# --- native code ---


@native
@pytest.mark.parametrize("quantise", ["int8", "int4", "official-int4"])
def test_native_products_are_near(quantise: str) -> None:
    """Of a trained model, on a text; seen were 0.35 % at most."""
    exact, tokenizer = glmkit.load("glm-nano", dtype="float32", quantize=quantise, kernels="torch")
    packed = glmkit.load("glm-nano", dtype="float32", quantize=quantise, kernels="native").model
    assert not any(layer.packed for layer in quantised_layers(exact).values())
    assert all(layer.packed for layer in quantised_layers(packed).values())
    ids = torch.tensor([tokenizer("今天天气怎么样?")["input_ids"]])
    assert 1e-4 < relative(logits(packed, ids), logits(exact, ids)) < 0.01


@native
def test_which_models_are_packed(sane: Path) -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        for kernels, expected in (("auto", dtype != "float32"), ("native", True), ("torch", False)):
            model = glmkit.load(sane, dtype=dtype, quantize="int4", kernels=kernels).model
            assert {layer.packed for layer in quantised_layers(model).values()} == {expected}, (dtype, kernels)
            assert model.glm_kernels == kernels
    assert {type(one) for one in AutoModel.from_pretrained(sane).modules()}.isdisjoint({QuantizedLinear})
    block = ModelBlock(path=str(sane), dtype="bfloat16", quantize="int4")
    trained, _ = load_model(block, seed=0)  # tuning stays with torch
    assert not any(layer.packed for layer in quantised_layers(trained).values())


@native
@pytest.mark.parametrize("quantise", ["int8", "int4", "official-int8"])
def test_nobody_sees_blocks(sane: Path, tmp_path: Path, quantise: str) -> None:
    plain = glmkit.load(sane, dtype="bfloat16", quantize=quantise, kernels="torch").model
    model = glmkit.load(sane, dtype="bfloat16", quantize=quantise).model
    layer = model.get_submodule(QKV)
    assert layer.packed
    assert layer.weight.shape != plain.get_submodule(QKV).weight.shape
    assert torch.equal(layer.dequantize(), plain.get_submodule(QKV).dequantize())
    assert_same_state(model, plain)
    model.save_pretrained(tmp_path / "saved")
    assert_same_state(glmkit.load(tmp_path / "saved", dtype="bfloat16").model, plain)
    twin = copy.deepcopy(model)
    assert not twin.get_submodule(QKV).packed
    assert torch.equal(logits(twin), logits(plain))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert torch.equal(logits(torch.load(stream, weights_only=False)), logits(plain))
    before = logits(model)
    assert not torch.equal(before, logits(plain))
    for same in (lambda: model.to("cpu"), model.bfloat16, lambda: model.eval()):
        same()
        assert layer.packed
        assert torch.equal(logits(model), before)
    assert layer.bias.dtype == torch.bfloat16
    assert model.half().get_submodule(QKV).packed
    assert layer.bias.dtype == torch.float16
    model.float()
    assert not layer.packed
    assert relative(logits(model), logits(plain.float())) < 1e-5
    meta = glmkit.load(sane, dtype="bfloat16", quantize=quantise).model.to("meta")
    assert meta.get_submodule(QKV).weight.shape == plain.get_submodule(QKV).weight.shape


@native
def test_a_packed_layer_takes_other_weights_and_gives_gradients() -> None:
    weight, scale = search.quantize_groups(torch.randn(32, 64, generator=torch.Generator().manual_seed(1)))
    other = QuantizedLinear(*search.quantize_groups(torch.randn(32, 64)), torch.randn(32), 4)
    layer = QuantizedLinear(weight, scale, torch.zeros(32), 4)
    assert layer.pack(Arena(packed_bytes(32, 64, 4, 32)))
    assert layer.pack(Arena())  # again is nothing
    x = torch.randn(5, 64, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, x @ dequantize(weight, scale, 4).float().t())  # with a gradient, exactly
    y.sum().backward()
    torch.testing.assert_close(x.grad, dequantize(weight, scale, 4).float().sum(0).expand(5, 64))
    layer.load_state_dict(other.state_dict())
    assert not layer.packed
    assert torch.equal(layer(x.detach()), other(x.detach()))
    uneven = QuantizedLinear(*search.quantize_rows(torch.randn(9, 40)), None, 8)
    assert not uneven.pack(Arena())  # sizes that the kernels do not take stay with torch
    assert torch.equal(uneven(torch.ones(1, 40)), uneven.exact_product(torch.ones(1, 40)))


@native
def test_packing_keeps_no_second_copy(sane: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = glmkit.load(sane, dtype="bfloat16", quantize="int4", kernels="torch").model
    layers = quantised_layers(model).values()
    old = [weakref.ref(layer.weight) for layer in layers]
    before = sum(tensor.nbytes for layer in layers for tensor in (layer.weight, layer.weight_scale))
    arenas: list[int] = []
    monkeypatch.setattr(Arena, "__init__", _recorded(Arena.__init__, arenas))
    assert pack_model(model, "auto") == len(old)
    gc.collect()
    assert [ref() for ref in old] == [None] * len(old)
    after = sum(tensor.nbytes for layer in layers for tensor in (layer.weight, layer.weight_scale))
    assert arenas == [before] == [after]


def _recorded(init: Callable[..., None], sizes: list[int]) -> Callable[..., None]:
    def recorded(self: Arena, nbytes: int = 0) -> None:
        sizes.append(nbytes)
        init(self, nbytes)

    return recorded


def test_native_code_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = replace(build.status(), level="torch", path=None, why="no compiler", hint="install g++")
    monkeypatch.setattr(build, "status", lambda: missing)
    model = glmkit.load(folder, quantize="int4", dtype="bfloat16").model
    assert not any(layer.packed for layer in quantised_layers(model).values())
    with pytest.raises(UsageError, match="no compiler") as caught:
        glmkit.load(folder, quantize="int4", kernels="native")
    assert caught.value.hint == "install g++"
    with pytest.raises(UsageError, match="kernels='fast'"):
        glmkit.load(folder, kernels="fast")


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"quant_method": "gptq"}, "'gptq'", "quantize='int8' or 'int4'"),
        ({"quant_method": "awq"}, "'awq'", "glm quantize"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'", "glm quantize"),
        ({"quant_method": "fp8"}, "'fp8'", "glm quantize"),
        ({"quant_method": ...}, "None", "glm quantize"),
        ({"version": 2}, "version=2", "newer"),
        ({"version": ...}, "version=None", "newer"),
        ({"scheme": "int3"}, "scheme='int3'", "newer"),
        ({"scheme": ["int4"]}, "scheme=['int4']", "newer"),
        ({"bits": 8}, "bits=8: int4 has 4", "newer"),
        ({"group_size": 64}, "group_size=64: int4 has 32", "newer"),
        ({"group_size": ...}, "group_size=None", "newer"),
        ({"output_layer": "int4"}, "output_layer='int4'", "newer"),
        ({"rotated": True}, "unknown key 'rotated'", "newer"),
    ],
)
def test_formats_that_are_not_read(
    written: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str, hint: str
) -> None:
    own = copied(written["int4"], tmp_path / "own")
    change_config(own, **changes)
    for door in (glmkit.load, AutoModel.from_pretrained, lambda path: inspect(str(path))):
        with pytest.raises(ConfigError) as caught:
            door(own)
        assert message in caught.value.message
        assert hint in str(caught.value.hint)


def test_two_formats_in_one_config_and_all_problems_at_once(written: dict[str, Path], tmp_path: Path) -> None:
    own = copied(written["int4"], tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"quantization_bit": 4}))
    with pytest.raises(ConfigError, match="quantization_bit=4 stands beside it"):
        glmkit.load(own)
    change_config(own, version=7, later=1)
    with pytest.raises(ConfigError) as caught:
        AutoModel.from_pretrained(own)
    assert caught.value.message.count("\n  - ") == 3


def test_tensors_that_do_not_fit_are_listed(written: dict[str, Path], tmp_path: Path) -> None:
    own = copied(written["int4"], tmp_path / "own")
    state = load_file(own / "model.safetensors")
    names = [f"{name}.weight" for name in LAYERS]
    del state[f"{names[0]}_scale"]
    state[f"{names[1]}_scale"] = state[f"{names[1]}_scale"].float()
    state[names[2]] = state[names[2]].to(torch.int16)
    state[f"{names[3]}_scale"] = torch.ones(len(state[names[3]]), dtype=torch.float16)
    state["transformer.output_layer.weight_scale"] = torch.ones(448, dtype=torch.float16)
    state[names[4]] = state[names[4]].half()
    save_file(state, own / "model.safetensors")
    for door in (glmkit.load, AutoModel.from_pretrained):
        with pytest.raises(CheckpointError) as caught:
            door(own)
        problems = "\n".join(caught.value.problems)
        assert len(caught.value.problems) == 6, problems
        assert f"{names[0]}_scale of shape [64, 1] is missing" in problems
        assert f"{names[1]}_scale is float32, expected float16" in problems
        assert f"{names[2]} is int16, expected int8, as config.json says quantization_config" in problems
        assert f"{names[3]}_scale has shape [32], expected [32, 2]" in problems
        assert "output_layer.weight_scale of shape [448] is not part of this model" in problems
        assert f"{names[4]} is float16, expected int8" in problems


def test_a_plain_config_on_quantised_tensors_and_the_other_way_round(
    folder: Path, written: dict[str, Path], tmp_path: Path
) -> None:
    own = copied(written["int8"], tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    scheme = config.pop("quantization_config")
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        glmkit.load(own)
    assert f"{QKV}.weight is int8, expected a floating-point type" in str(caught.value)
    plain = official.write_folder(tmp_path / "plain", tokenizer=folder / "tokenizer.model", **SIZES)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    with pytest.raises(CheckpointError) as caught:
        glmkit.load(plain)
    assert len([one for one in caught.value.problems if "weight_scale" in one]) == len(LAYERS)


def test_nothing_is_quantised_twice(folder: Path, written: dict[str, Path], tmp_path: Path) -> None:
    official_folder = tmp_path / "official"
    loaded = glmkit.load(folder, dtype="float16", quantize="official-int4")
    loaded.model.save_pretrained(official_folder)
    loaded.tokenizer.save_pretrained(official_folder)
    for name in ("int8", "official-int4", "bnb-nf4"):
        if name != "bnb-nf4":
            with pytest.raises(UsageError, match=f"already quantised to int4, so it cannot become {name[:3]}|4 bits"):
                glmkit.load(written["int4"], quantize=name)
    with pytest.raises(UsageError, match="already quantised to 4 bits, so it cannot become int4"):
        glmkit.load(official_folder, quantize="int4")
    with pytest.raises(UsageError, match="format of its own"):
        glmkit.load(written["int4"]).model.quantize(4)
    with pytest.raises(UsageError, match="already quantised to int4"):
        AutoModel.from_pretrained(written["int4"], quantization_config={"quant_method": "bitsandbytes"})
    for source, found in ((written["int4"], "to int4"), (official_folder, "official int4 format")):
        with pytest.raises(UsageError, match=found):
            quantize(source, tmp_path / "no", "int8")
    assert not (tmp_path / "no").exists()


def test_columns_that_make_no_groups(folder: Path, tmp_path: Path) -> None:
    odd = official.write_folder(tmp_path / "odd", tokenizer=folder / "tokenizer.model")  # 48 columns
    for attempt in (lambda: glmkit.load(odd, quantize="int4"), lambda: quantize(odd, tmp_path / "q", "int4")):
        with pytest.raises(UsageError) as caught:
            attempt()
        assert f"{BLOCK}mlp.dense_4h_to_h (48 columns)" in caught.value.message
        assert "int8" in str(caught.value.hint)
    assert not (tmp_path / "q").exists()
    assert logits(glmkit.load(odd, quantize="int8").model).isfinite().all()


def test_tensor_parallel_and_native_layout_say_what_to_do(written: dict[str, Path], tmp_path: Path) -> None:
    from glmkit.checkpoint import open_folder
    from glmkit.loading import read_config

    with pytest.raises(ConfigError, match="quantization_config"):
        convert(written["int4"], tmp_path / "no", "native")
    with pytest.raises(UsageError, match="is quantised"):
        convert(written["int4"], tmp_path / "no", "shards", degree=2)
    with open_folder(written["int4"]) as opened, pytest.raises(UsageError, match="tensor parallelism"):
        load_part(opened, ChatGLM2ForCausalLM, read_config(opened), torch.float32, torch.device("cpu"), 0, 2)
    assert not (tmp_path / "no").exists()


# --- glm quantize ---


def run(*arguments: str) -> int:
    return cli.run(["quantize", *arguments])


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "q"
    assert run(str(folder), str(target), "--scheme", "int4", "--output-layer", "int8") == 0
    out = capsys.readouterr().out
    assert "9 layers in int4" in out
    assert "logits of a test prompt by" in out
    assert f"glm chat {target}" in out
    assert run(str(folder), str(target), "--scheme", "int8") == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert run(str(folder), str(target), "--scheme", "int8", "--force", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["scheme"], found["output_layer"], found["layers"]) == ("int8", None, 8)
    assert found["bytes_after"] == inspect(str(target))["stored_bytes"]
    assert 0.001 < found["weight_error"] < 0.01
    assert run(str(folder), str(tmp_path / "no"), "--scheme", "int5") == 2
    assert run(str(folder), str(tmp_path / "no"), "--scheme", "int4", "--output-layer", "int4") == 2
    assert run(str(folder), str(tmp_path / "no"), "--scheme", "int4", "--calibration", str(tmp_path / "none")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_never_half_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def breaks(weight: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(weight.shape)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return genuine(weight)

    genuine = search.quantize_groups
    with monkeypatch.context() as patch:
        patch.setattr(search, "quantize_groups", breaks)
        with pytest.raises(KeyboardInterrupt):
            quantize(folder, tmp_path / "q", "int4")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match="GB free"):
        quantize(folder, tmp_path / "q", "int4")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_not_written_as_made(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glmkit.export import quantized

    genuine = quantized.save_tensors

    def damaged(new: Path, *arguments: Any, **options: Any) -> Any:
        paths = genuine(new, *arguments, **options)
        data = bytearray(paths[0].read_bytes())
        data[-7] ^= 1
        paths[0].write_bytes(data)
        return paths

    monkeypatch.setattr(quantized, "save_tensors", damaged)
    with pytest.raises(OutputError, match="was not written as it was made"):
        quantize(folder, tmp_path / "q", "int4")
    assert list(tmp_path.iterdir()) == []


def test_in_shards(folder: Path, written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmkit.export.quantized._SHARD_BYTES", 9_000)
    quantize(folder, tmp_path / "q", "int4")
    assert len(list((tmp_path / "q").glob("model-*.safetensors"))) > 3
    same = glmkit.load(written["int4"], kernels="torch").model
    assert_same_state(glmkit.load(tmp_path / "q", kernels="torch").model, same)


def test_the_official_ways_pack_large_models(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model stays exact; from some size on `quantize` and `from_pretrained` lead to native code too."""
    model = glmkit.load(folder, dtype="bfloat16").model.quantize(4)
    assert not model.get_submodule(QKV).packed
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("glmkit.quant.linear._LARGE_BYTES", 1)
    native = build.status().path is not None
    assert glmkit.load(folder, dtype="bfloat16").model.quantize(4).get_submodule(QKV).packed == native
    assert not glmkit.load(folder, dtype="bfloat16", kernels="torch").model.quantize(4).get_submodule(QKV).packed
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.get_submodule(QKV).packed == native
    assert_same_state(loaded, model)


def test_without_a_dtype_our_formats_are_packed(folder: Path) -> None:
    native = build.status().path is not None
    left_open = glmkit.load(folder, quantize="int4").model
    assert left_open.get_submodule(QKV).packed == native
    assert not glmkit.load(folder, quantize="int4", dtype="float32").model.get_submodule(QKV).packed


def test_calibrated(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("今天天气很好。hello world, 你好。\n" * 300)
    made = quantize(folder, tmp_path / "q", "int4", calibration=text)
    model = glmkit.load(tmp_path / "q", kernels="torch").model
    tokens = sum(ids.numel() for ids in calibration_batches(glmkit.load(folder).tokenizer, text))
    assert tokens > 1_000
    assert scheme_of(model.config) == Scheme("int4", None, {"how": "gptq", "tokens": tokens})
    searched = glmkit.load(folder, quantize="int4", kernels="torch").model
    assert not torch.equal(model.get_submodule(QKV).weight, searched.get_submodule(QKV).weight)
    assert made.weight_error < 0.5
    with pytest.raises(UsageError, match="calibration is for int4"):
        quantize(folder, tmp_path / "no", "int8", calibration=text)


# --- what stands around it ---


@pytest.mark.parametrize("scheme", SCHEMES)
def test_inspect_plan_and_placement_know_the_bytes(folder: Path, written: dict[str, Path], scheme: str) -> None:
    model = glmkit.load(written[scheme], dtype="float16", kernels="torch").model
    nbytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    plain, found = inspect(str(folder)), inspect(str(written[scheme]))
    assert found["quantised"]["scheme"] == scheme
    assert plain["quantised"] is None
    assert found["parameters"] == plain["parameters"]
    assert found["stored_bytes"] == nbytes
    assert found["memory_bytes"][scheme]["weights"] == plain["memory_bytes"][scheme]["weights"] == nbytes
    assert found["memory_bytes"]["float16"]["weights"] == plain["memory_bytes"]["float16"]["weights"]
    for block in (
        ModelBlock(path=str(written[scheme]), dtype="float16"),
        ModelBlock(path=str(folder), quantize=scheme, dtype="float16"),
    ):
        assert plan_inference(subject_of(block), tokens=16).parts["weights"] == nbytes
    form = FORMS[scheme]
    config = glmkit.load(folder).config
    with torch.device("meta"):
        empty = ChatGLM2ForCausalLM(config)
    sizes = sum(form.nbytes(*empty.get_submodule(name).weight.shape) for name in LAYERS)
    rows = sum(2 * empty.get_submodule(name).weight.shape[0] for name in LAYERS)
    rest = sum(one.numel() for name, one in empty.named_parameters() if name.removesuffix(".weight") not in LAYERS)
    needed = sizes + 2 * rest - (rows if form.group_size is None else 0)  # scales of rows are not counted
    options: dict[str, Any] = {"dtype": torch.float16, "quantize": form.bits, "group_size": form.group_size}
    assert plan_layers(empty, ["cpu"], {"cpu": needed}, **options)
    with pytest.raises(UsageError, match="room"):
        plan_layers(empty, ["cpu"], {"cpu": needed - 1}, **options)


@pytest.mark.parametrize("method", [{"name": "lora", "r": 2}, {"name": "ptuning_v2", "pre_seq_len": 3}])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_beside_it_is_one_beside_its_dequantised_copy(
    folder: Path, written: dict[str, Path], tmp_path: Path, scheme: str, method: dict[str, Any]
) -> None:
    base, tokenizer = glmkit.load(written[scheme], dtype="float32")
    plain = dequantised_copy(base, glmkit.load(folder, dtype="float32").model)
    found = []
    for model in (base, plain):
        torch.manual_seed(4)
        own = make_method(MethodBlock.model_validate(method))
        tuned = own.prepare(model)
        generator = torch.Generator().manual_seed(8)
        learns = {name: one for name, one in tuned.named_parameters() if one.requires_grad}
        with torch.no_grad():
            for parameter in learns.values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        total, count = tuned.label_loss(input_ids=IDS, labels=IDS)
        (total / count).backward()
        with torch.no_grad():
            for parameter in learns.values():
                parameter -= 0.1 * parameter.grad
        found.append(({name: one.grad for name, one in learns.items()}, logits(tuned.eval()), own, tuned))
    assert found[0][0].keys() == found[1][0].keys()
    for name, gradient in found[1][0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[0][0][name], gradient, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-4)
    (tmp_path / "adapter").mkdir()
    found[0][2].save(found[0][3], tokenizer, tmp_path / "adapter")
    for path, quantise in ((written[scheme], None), (folder, scheme)):
        again = glmkit.load(path, adapter=tmp_path / "adapter", dtype="float32", quantize=quantise).model
        torch.testing.assert_close(logits(again), found[0][1], atol=1e-5, rtol=1e-5)
    if method["name"] == "lora":
        with pytest.raises(UsageError, match="quantised to"):
            merge(written[scheme], tmp_path / "adapter", tmp_path / "merged")
        options: dict[str, Any] = {"dequantize": True, "dtype": "float32", "check": False}
        merge(written[scheme], tmp_path / "adapter", tmp_path / "merged", **options)
        whole = glmkit.load(tmp_path / "merged")
        assert not quantised_layers(whole.model)
        assert relative(logits(whole.model), found[0][1]) < 1e-4


def test_recipes_know_our_formats() -> None:
    recipe = Recipe(
        model={"path": "chatglm3-6b", "quantize": "int4", "device": "cpu"},
        data={"train_file": "none"},
        method={"name": "lora"},
        output={"dir": "none"},
    )
    subject = subject_of(recipe.base)
    assert (subject.scheme, subject.bits) == (Scheme("int4"), 0)
    with pytest.raises(UsageError, match="int8, int4, official-int8"):
        subject_of(ModelBlock(path="chatglm3-6b", quantize="int5"))
