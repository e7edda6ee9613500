"""glmkit.encode: the states of the full model, padded as the official tokenizer pads, without what generates."""

from __future__ import annotations

import contextlib
import io
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import glmkit
from glmkit.encoding import Encoder
from glmkit.errors import CheckpointError, ConfigError, UsageError
from glmkit.export.quantized import quantize
from glmkit.hf import GenerationMixin
from tiny import train_tokenizer, write_model
from tiny_families import write_chatglm, write_glm4

TEXTS = ["你好，今天天气很好。", "hello world, how are you? " * 8, "", "<|user|> sop [gMASK]"]
SIZES = {"hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16, "num_layers": 3}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ChatGLM3 whose numbers are large enough for layers to differ."""
    work = tmp_path_factory.mktemp("three")
    folder = write_model(work / "model", train_tokenizer(work / "tokenizer.model"), **SIZES)
    [file] = folder.glob("*.safetensors")
    torch.manual_seed(3)
    save_file({name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in load_file(file).items()}, file)
    return folder


@pytest.fixture(scope="module")
def encoder(three: Path) -> Encoder:
    return glmkit.load_encoder(three, dtype="float32", device="cpu")


def test_states_are_those_of_the_full_model(three: Path, encoder: Encoder) -> None:
    """What Kolors computes: the official tokenizer's padding, hidden_states[-2], hidden_states[-1] at the end."""
    found = glmkit.encode(encoder, TEXTS, layers=(-2, 0, 1, -1), length_tokens=24, batch_size=3)
    full = glmkit.load(three, dtype="float32", device="cpu")
    inputs = full.tokenizer(TEXTS, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "position_ids"):
        assert torch.equal(getattr(found, name), inputs[name]), name
    with torch.no_grad():
        states = full.model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == 4
    for layer in (-2, 0, 1, -1):
        assert found.states[layer].shape == (4, 24, 64)
        torch.testing.assert_close(found.states[layer], states[layer], atol=1e-5, rtol=1e-5)
    assert torch.equal(found.pooled, found.states[-1][:, -1])
    assert (found.states[-2] - found.states[-1]).abs().max() > 0.1  # so that a wrong layer would be seen
    assert not found.pooled.requires_grad
    assert not found.pooled.is_inference()  # a pipeline may go on with gradients


def test_the_default_is_kolors(encoder: Encoder) -> None:
    found = glmkit.encode(encoder, "你好")
    assert found.states[-2].shape == (1, 256, 64)
    assert found.pooled.shape == (1, 64)
    tokens = int(found.attention_mask.sum())
    assert found.attention_mask[0, -tokens:].all()
    assert found.position_ids[0, -tokens:].tolist() == list(range(tokens))
    assert not found.position_ids[0, :-tokens].any()


def test_a_long_text_loses_its_end_and_says_so(encoder: Encoder) -> None:
    tokenizer = encoder.tokenizer
    ids = [*tokenizer.prefix_ids, *tokenizer.encode_text(TEXTS[1])]
    found = glmkit.encode(encoder, TEXTS, length_tokens=10)
    assert found.input_ids[1].tolist() == ids[:10]
    assert found.cut_tokens[1] == len(ids) - 10 > 0
    assert found.cut_tokens[2] == 0
    longest = glmkit.encode(encoder, TEXTS, length_tokens=None)
    assert longest.input_ids.shape[1] == max(longest.attention_mask.sum(1))
    assert longest.cut_tokens == [0] * 4


def test_batches_do_not_change_the_result(encoder: Encoder) -> None:
    one, four = (glmkit.encode(encoder, TEXTS, length_tokens=32, batch_size=size) for size in (1, 4))
    torch.testing.assert_close(one.states[-2], four.states[-2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.pooled, four.pooled, atol=1e-5, rtol=1e-5)


def test_nothing_that_generates_is_loaded(three: Path, encoder: Encoder, tmp_path: Path) -> None:
    assert not isinstance(encoder.model, GenerationMixin)
    assert not any("output_layer" in name for name in encoder.model.state_dict())
    full = glmkit.load(three, dtype="float32", device="cpu").model
    table = full.get_output_embeddings().weight.numel()
    assert sum(p.numel() for p in encoder.model.parameters()) == sum(p.numel() for p in full.parameters()) - table
    # a checkpoint that has no output layer is whole for an encoder, and not for anybody else
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        (bare / name).write_bytes((three / name).read_bytes())
    [file] = three.glob("*.safetensors")
    kept = {name: tensor for name, tensor in load_file(file).items() if "output_layer" not in name}
    save_file(kept, bare / file.name)
    found = glmkit.encode(glmkit.load_encoder(bare, dtype="float32", device="cpu"), TEXTS, length_tokens=16)
    assert torch.equal(found.pooled, glmkit.encode(encoder, TEXTS, length_tokens=16).pooled)
    with pytest.raises(CheckpointError, match="output_layer"):
        glmkit.load(bare)
    kept.pop("transformer.encoder.layers.1.mlp.dense_4h_to_h.weight")
    save_file(kept, bare / file.name)
    with pytest.raises(CheckpointError, match="dense_4h_to_h"):
        glmkit.load_encoder(bare)


@pytest.mark.parametrize(("form", "bound"), [("int8", 0.03), ("int4", 0.3)])
def test_quantised_encoders(form: str, bound: float, three: Path, encoder: Encoder, tmp_path: Path) -> None:
    expected = glmkit.encode(encoder, TEXTS, length_tokens=24).states[-2]
    while_loading = glmkit.load_encoder(three, dtype="float32", device="cpu", quantize=form, kernels="torch")
    found = glmkit.encode(while_loading, TEXTS, length_tokens=24).states[-2]
    assert 1e-4 < (found - expected).norm() / expected.norm() < bound
    quantize(three, tmp_path / form, form, output_layer="int8")  # its output layer's form is left out with the layer
    stored = glmkit.load_encoder(tmp_path / form, dtype="float32", device="cpu", kernels="torch")
    again = glmkit.encode(stored, TEXTS, length_tokens=24).states[-2]
    torch.testing.assert_close(again, found, atol=1e-5, rtol=1e-5)


def test_a_loaded_model_and_a_folder_do_too(three: Path, encoder: Encoder) -> None:
    expected = glmkit.encode(encoder, TEXTS[:1], length_tokens=12).states[-2]
    for model in (glmkit.load(three, dtype="float32", device="cpu"), three):
        torch.testing.assert_close(glmkit.encode(model, TEXTS[:1], length_tokens=12).states[-2], expected)


def test_the_tokenizer_may_lie_elsewhere(three: Path, encoder: Encoder, tmp_path: Path) -> None:
    """As in the folders of picture models: text_encoder/ beside tokenizer/."""
    alone, beside = tmp_path / "text_encoder", tmp_path / "tokenizer"
    for folder, names in ((alone, ("config.json", "model.safetensors")), (beside, ("tokenizer.model",))):
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes((three / name).read_bytes())
    with pytest.raises(UsageError, match="no tokenizer"):
        glmkit.load_encoder(alone)
    other = glmkit.load_encoder(alone, tokenizer=beside, dtype="float32", device="cpu")
    assert torch.equal(glmkit.encode(other, TEXTS).pooled, glmkit.encode(encoder, TEXTS).pooled)


def test_glm4_takes_control_tokens_for_text(tmp_path: Path) -> None:
    encoder = glmkit.load_encoder(write_glm4(tmp_path / "four"), dtype="float32", device="cpu")
    ids = glmkit.encode(encoder, "<|user|>", length_tokens=None).input_ids[0].tolist()
    assert ids == [*encoder.tokenizer.prefix_ids, *b"<|user|>"]


def test_what_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    for texts, options, match in (
        ([], {}, "no texts"),
        ("a", {"layers": (4,)}, "0 to 3"),
        ("a", {"layers": (-5,)}, "-4 to -1"),
        ("a", {"length_tokens": 2}, "need 3"),
        ("a", {"batch_size": 0}, "batch_size=0"),
    ):
        with pytest.raises(UsageError, match=match):
            glmkit.encode(encoder, texts, **options)
    first = write_chatglm(tmp_path / "first")
    with pytest.raises(ConfigError, match="ChatGLM3"):
        glmkit.load_encoder(first)
    with pytest.raises(ConfigError, match="ChatGLM3"):
        glmkit.encode(glmkit.load(first), "a")
    with pytest.raises(UsageError, match="int3"):
        glmkit.load_encoder(first, quantize="int3")


def test_the_example_shows_equality(three: Path) -> None:
    example = Path(__file__).parents[1] / "examples" / "text_encoder.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["text_encoder.py", str(three), "int4", "你好"])
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            runpy.run_path(str(example), run_name="__main__")
    lines = {line[:22].strip(): line[22:].strip() for line in shown.getvalue().splitlines()}
    assert lines["states[-2]"].startswith("(1, 256, 64)")
    assert all(float(number) < 1e-6 for number in lines["from the full model"].split())
    assert 1e-3 < float(lines["int4"].split()[0]) < 0.4


def test_official_states(shared: Path, tmp_path: Path) -> None:
    """hidden_states that the official code of ChatGLM3 computed."""
    reference = shared / "conformance" / "chatglm3"
    shutil.copytree(reference / "model", tmp_path / "model")
    shutil.copy(shared / "tokenizers" / "chatglm2-chatglm3.tokenizer.model", tmp_path / "model" / "tokenizer.model")
    encoder = glmkit.load_encoder(tmp_path / "model", dtype="float32", device="cpu")
    arrays = np.load(reference / "arrays.npz")
    with torch.no_grad():
        ids = torch.from_numpy(arrays["single.in.input_ids"])
        states = encoder.model(input_ids=ids, output_hidden_states=True).hidden_states
    expected = torch.from_numpy(arrays["single.hidden_states"])
    torch.testing.assert_close(torch.stack(states), expected, atol=2e-5, rtol=1e-5)
