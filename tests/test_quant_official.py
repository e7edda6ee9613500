"""The official int8 and int4 format against bytes, scales, products and logits of the official code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import glmkit
import official
from glmkit.errors import CheckpointError, UsageError
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.quant.linear import QuantizedLinear, dequantize
from glmkit.quant.official import quantize_rows

FIXTURES = Path(__file__).parent / "fixtures" / "quantization"
CASES = [f"chatglm2.{kind}.int{bits}" for kind in ("normal", "heavy_tail", "tiny_and_big_rows") for bits in (8, 4)]
IDS = torch.tensor([[5, 6, 7, 8, 300, 2, 41]])


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "arrays.npz"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quant")
    return official.write_folder(root / "model", tokenizer=official.train_tokenizer(root / "tokenizer.model"))


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


# --- one matrix ---


def check_case(arrays: Mapping[str, np.ndarray], case: str) -> None:
    bits = int(case[-1])
    weight, scale = quantize_rows(torch.from_numpy(arrays[f"{case}.float_weight"]), bits)
    np.testing.assert_array_equal(weight.numpy(), arrays[f"{case}.weight"])
    np.testing.assert_array_equal(scale.numpy().view(np.uint16), arrays[f"{case}.weight_scale"].view(np.uint16))
    dense = dequantize(weight, scale, bits)
    np.testing.assert_array_equal(dense.numpy().view(np.uint16), arrays[f"{case}.dequantised"].view(np.uint16))
    layer = QuantizedLinear(weight, scale, torch.from_numpy(arrays[f"{case}.bias"]), bits)
    product = layer(torch.from_numpy(arrays[f"{case}.x"])).numpy()
    stored = arrays[f"{case}.y_float32"]
    np.testing.assert_allclose(product, stored, rtol=0, atol=2e-6 * np.abs(stored).max())


@pytest.mark.parametrize("case", CASES)
def test_packed_bytes_scales_and_products_are_the_official_ones(arrays: dict[str, np.ndarray], case: str) -> None:
    check_case(arrays, case)


def test_the_same_for_chatglm_6b_and_every_byte_of_int4(shared: Path) -> None:
    arrays = np.load(shared / "conformance" / "quantization" / "arrays.npz")
    for case in CASES:
        check_case(arrays, case.replace("chatglm2", "chatglm"))
    packed = torch.from_numpy(arrays["int4_table.packed_byte"])
    np.testing.assert_array_equal(dequantize(packed, torch.ones(256), 4).numpy(), arrays["int4_table.unpacked"])


def test_int4_holds_the_even_column_in_the_high_nibble() -> None:
    for byte in range(256):
        packed = torch.tensor([[byte - 256 if byte > 127 else byte]], dtype=torch.int8)
        nibbles = [nibble - 16 if nibble > 7 else nibble for nibble in (byte >> 4, byte & 15)]
        assert dequantize(packed, torch.ones(1), 4).tolist() == [nibbles]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_row_of_zeros_stays_zero(bits: int, dtype: torch.dtype) -> None:
    weight = torch.tensor([[0.0] * 6, [1.0, -2.0, 3.0, 0.0, 0.5, -3.0]], dtype=dtype)
    quantised, scale = quantize_rows(weight, bits)
    assert torch.isfinite(scale).all()
    dense = dequantize(quantised, scale, bits)
    assert dense[0].tolist() == [0.0] * 6
    assert (dense[1] - weight[1]).abs().max() <= scale[1] * 0.51 + (3 * 2**-8 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_too_small_for_their_scale_become_zero_and_not_something_else(bits: int) -> None:
    """The smallest number of float16 divided by 127 or 7 is no number of float16 any more."""
    weight = torch.full((2, 4), 6e-8, dtype=torch.float16)
    weight[1] = 1.0
    quantised, scale = quantize_rows(weight, bits)
    dense = dequantize(quantised, scale, bits)
    assert torch.isfinite(dense).all()
    assert dense[0].abs().max() <= 1e-7
    torch.testing.assert_close(dense[1], weight[1], atol=1e-2, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_wide_weights_are_divided_by_the_narrow_scale(bits: int) -> None:
    """As officially: only the scale is rounded to float16; a weight that is rounded first gives other scales."""
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(5))
    largest = 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(1) / largest).half()
    expected = (weight / scale.float()[:, None]).round()
    quantised, found = quantize_rows(weight, bits)
    assert torch.equal(found, scale)
    assert torch.equal(dequantize(quantised, torch.ones(64), bits), expected)
    assert not torch.equal(found, quantize_rows(weight.half(), bits)[1])


def test_an_odd_number_of_columns_has_no_int4_form() -> None:
    weight = torch.randn(3, 5)
    assert quantize_rows(weight, 8)[0].shape == (3, 5)
    with pytest.raises(UsageError, match="5 columns"):
        quantize_rows(weight, 4)


# --- a whole checkpoint ---


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, ChatGLM2ForCausalLM])
def test_a_quantised_checkpoint_has_the_official_logits(arrays: dict[str, np.ndarray], auto: type, bits: int) -> None:
    model = auto.from_pretrained(FIXTURES / f"chatglm2-int{bits}", trust_remote_code=True)
    assert model.dtype == torch.float16
    assert not model.training
    ids = torch.from_numpy(arrays[f"chatglm2-int{bits}.input_ids"])
    stored = arrays[f"chatglm2-int{bits}.logits"]
    assert np.abs(logits(model, ids).float().numpy() - stored).max() < 0.05  # in float16
    np.testing.assert_allclose(logits(model.float(), ids).numpy(), stored, atol=1e-5, rtol=0)
    direct = auto.from_pretrained(FIXTURES / f"chatglm2-int{bits}", dtype=torch.float32)
    np.testing.assert_allclose(logits(direct, ids).numpy(), stored, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_glmkit_load_of_a_quantised_checkpoint(
    arrays: dict[str, np.ndarray], folder: Path, tmp_path: Path, bits: int
) -> None:
    for file in (FIXTURES / f"chatglm2-int{bits}").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    ids, stored = (torch.from_numpy(arrays[f"chatglm2-int{bits}.{name}"]) for name in ("input_ids", "logits"))
    for quantize in (None, f"official-int{bits}"):
        loaded = glmkit.load(tmp_path, dtype="float32", quantize=quantize)
        torch.testing.assert_close(logits(loaded.model, ids), stored, atol=1e-5, rtol=0)
        assert loaded.model.quantize(bits) is loaded.model
    torch.testing.assert_close(logits(glmkit.load(tmp_path).model.float(), ids), stored, atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match=f"already quantised to {bits} bits"):
        glmkit.load(tmp_path, quantize=f"official-int{12 - bits}")
    with pytest.raises(UsageError, match=f"already quantised to {bits} bits"):
        loaded.model.quantize(12 - bits)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_quantising_while_loading_is_quantising_afterwards(folder: Path, bits: int, dtype: str) -> None:
    """Bit for bit; the rest of the model may be wider or narrower, the stored weights decide the bytes."""
    during = glmkit.load(folder, dtype=dtype, quantize=f"official-int{bits}", kernels="torch").model
    assert during.dtype == getattr(torch, dtype)
    after = glmkit.load(folder, dtype="float16").model.quantize(bits)
    second = after.state_dict()
    for name, tensor in during.state_dict().items():
        if name.endswith("_scale") or tensor.dtype == torch.int8:
            assert torch.equal(tensor, second[name]), name
    if dtype != "bfloat16":  # which would round the scales too
        after = after.to(getattr(torch, dtype))
        assert torch.equal(logits(during), logits(after))
    assert during.config.quantization_bit == after.config.quantization_bit == bits


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_quantised_and_what_is_not(folder: Path, bits: int) -> None:
    model = glmkit.load(folder, quantize=f"official-int{bits}").model
    kinds = {name: type(module) for name, module in model.named_modules() if hasattr(module, "in_features")}
    quantised = {name for name, kind in kinds.items() if kind is QuantizedLinear}
    layers = [f"transformer.encoder.layers.{layer}." for layer in (0, 1)]
    names = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert quantised == {layer + name for layer in layers for name in names}
    assert set(kinds) - quantised == {"transformer.output_layer"}
    sizes = {
        name: sum(tensor.nbytes for tensor in model.get_submodule(name).state_dict().values()) for name in quantised
    }
    assert sizes[f"{layers[0]}mlp.dense_h_to_4h"] == 96 * 32 * bits // 8 + 2 * 96


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("door", ["glmkit.load", "AutoModel"])
def test_a_saved_quantised_model_is_the_same_when_loaded(folder: Path, tmp_path: Path, bits: int, door: str) -> None:
    if door == "AutoModel":
        model = AutoModel.from_pretrained(folder).quantize(bits)
        tokenizer = glmkit.load(folder).tokenizer
    else:
        model, tokenizer = glmkit.load(folder, dtype="float16", quantize=f"official-int{bits}", kernels="torch")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_bit"] == bits
    stored = load_file(tmp_path / "model.safetensors")
    scales = {name for name in stored if name.endswith("weight_scale")}
    assert len(scales) == 8
    assert {stored[name].dtype for name in scales} == {torch.float16}
    assert {stored[name.removesuffix("_scale")].dtype for name in scales} == {torch.int8}
    for again in (
        AutoModel.from_pretrained(tmp_path),
        glmkit.load(tmp_path, dtype="float16", kernels="torch").model,
        glmkit.load(tmp_path, quantize=f"official-int{bits}", dtype="float16", kernels="torch").model,
    ):
        assert torch.equal(logits(again), logits(model))


def test_a_model_widened_after_quantising_is_saved_and_loaded_without_change(folder: Path, tmp_path: Path) -> None:
    """`.quantize(4).float()` makes the scales float32; their values and the products must survive."""
    model = AutoModel.from_pretrained(folder).quantize(4).float()
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for name, tensor in model.state_dict().items() if "_scale" in name} == {torch.float16}
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


def test_quantised_tensors_of_wrong_shape_or_missing_are_listed(folder: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(folder).quantize(4)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    start = "transformer.encoder.layers.0.self_attention."
    del state[f"{start}dense.weight_scale"]
    state[f"{start}query_key_value.weight"] = torch.zeros(64, 32, dtype=torch.int8)
    official.write_weights(tmp_path, state, "safetensors")
    for door in (AutoModel.from_pretrained, glmkit.load):
        with pytest.raises(CheckpointError) as caught:
            door(tmp_path)
        assert len(caught.value.problems) == 2
        assert "dense.weight_scale" in str(caught.value)
        assert "[64, 32], expected [64, 16]" in str(caught.value)


def test_arguments_of_transformers_reach_a_quantised_checkpoint(folder: Path, tmp_path: Path) -> None:
    """transformers does not load these folders, so what users tell it must not get lost."""
    AutoModel.from_pretrained(folder).quantize(8).save_pretrained(tmp_path)
    expected = logits(AutoModel.from_pretrained(tmp_path, dtype=torch.float32))
    for options in ({"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"device_map": torch.device("cpu")}):
        model = AutoModel.from_pretrained(tmp_path, torch_dtype=torch.float32, **options)
        torch.testing.assert_close(logits(model.cpu()), expected, atol=1e-4, rtol=0)
    eager = AutoModel.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert eager.transformer.encoder.layers[0].self_attention.attend.__name__ == "attend_eagerly"
    torch.testing.assert_close(logits(eager), expected, atol=1e-4, rtol=0)
    for place in ({"transformer.embedding": "cpu", "transformer.encoder": "disk"}, "nonsense"):
        with pytest.raises(UsageError, match="device"):
            AutoModel.from_pretrained(tmp_path, device_map=place)


def test_other_bits_and_other_formats(folder: Path) -> None:
    model = AutoModel.from_pretrained(folder)
    with pytest.raises(UsageError, match="4 or 8 bits"):
        model.quantize(5)
    with pytest.raises(UsageError, match="nf4") as caught:
        glmkit.load(folder, quantize="nf4")
    assert "int8, int4, official-int8" in str(caught.value.hint)


def test_int4_of_a_model_with_odd_columns_is_refused(tmp_path: Path, folder: Path) -> None:
    vocabulary = folder / "tokenizer.model"
    odd = official.write_folder(tmp_path / "odd", tokenizer=vocabulary, ffn_hidden_size=47)
    before = AutoModel.from_pretrained(odd)
    with pytest.raises(UsageError, match="47 columns"):
        before.quantize(4)
    assert before.config.quantization_bit == 0
    assert not any(isinstance(module, QuantizedLinear) for module in before.modules())
    with pytest.raises(UsageError, match="47 columns"):
        glmkit.load(odd, quantize="official-int4")
    assert logits(glmkit.load(odd, quantize="official-int8").model).isfinite().all()
