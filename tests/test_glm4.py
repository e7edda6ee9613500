"""GLM-4-9B: the network of ChatGLM2 with a rotary base of 5,000,000, against stored results of the official code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GlmForCausalLM

import glmkit
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.models.chatglm2_config import ChatGLM2Config

FIXTURES = Path(__file__).parent / "fixtures" / "glm4"
ATOL = 5e-5  # the largest difference between the official code's own paths is 4e-6


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "conformance" / "glm4"


@pytest.fixture(scope="module", params=["AutoModelForCausalLM", "AutoModel", "glmkit.load", "eager"])
def model(request: pytest.FixtureRequest, folder: Path) -> Any:
    repository = folder / "hf_repo"
    if request.param == "glmkit.load":
        loaded = glmkit.load(repository)
        assert loaded.tokenizer is None
        return loaded.model
    auto = AutoModel if request.param == "AutoModel" else AutoModelForCausalLM
    options = {"attn_implementation": "eager"} if request.param == "eager" else {"trust_remote_code": True}
    return auto.from_pretrained(repository, **options).eval()


def close(mine: torch.Tensor, stored: torch.Tensor) -> None:
    torch.testing.assert_close(mine, stored, atol=ATOL, rtol=0)


def test_what_rope_ratio_means_is_known_from_the_config(model: Any, folder: Path) -> None:
    assert type(model) is ChatGLM2ForCausalLM
    assert model.config.rotary_base_and_scale() == (5_000_000.0, 1.0)
    stored = json.loads((folder / "hf_repo" / "config.json").read_text())
    assert model.config.eos_token_id == stored["eos_token_id"]
    assert model.generation_config.eos_token_id == stored["eos_token_id"]


@torch.no_grad()
def test_single(model: Any, folder: Path) -> None:
    stored = load_file(folder / "single.safetensors")
    output = model(stored["input_ids"], output_hidden_states=True, use_cache=True)
    close(output.logits, stored["logits"])
    close(output.logits, stored["logits_eager"])
    assert len(output.hidden_states) == 3
    for number, states in enumerate(output.hidden_states):  # the last one is in front of the final norm
        close(states, stored[f"hidden.{number}"])
    for number, layer in enumerate(output.past_key_values.layers):
        close(layer.keys, stored[f"past.{number}.key"])
        close(layer.values, stored[f"past.{number}.value"])


@torch.no_grad()
def test_padded_batch(model: Any, folder: Path) -> None:
    stored = load_file(folder / "padded_batch.safetensors")
    inputs = {name: stored[name] for name in ("input_ids", "attention_mask", "position_ids")}
    seen = inputs["attention_mask"].bool()
    close(model(**inputs).logits[seen], stored["logits"][seen])
    for row, length in enumerate(seen.sum(1).tolist()):  # and what every row gives alone
        close(model(inputs["input_ids"][row : row + 1, -length:]).logits[0], stored["logits"][row, -length:])


@torch.no_grad()
def test_loss(model: Any, folder: Path) -> None:
    stored = load_file(folder / "loss.safetensors")
    assert float(model(stored["input_ids"], labels=stored["labels"]).loss) == pytest.approx(
        float(stored["loss"]), abs=ATOL
    )
    total, targets = model.label_loss(stored["input_ids"], stored["labels"])
    assert float(total) / targets == pytest.approx(float(stored["loss"]), abs=ATOL)


@torch.no_grad()
def test_tokens_one_by_one_and_a_second_chunk(model: Any, folder: Path) -> None:
    stored = load_file(folder / "incremental.safetensors")
    ids = stored["input_ids"]
    output = model(ids[:, :9], use_cache=True)
    logits = [output.logits]
    for column in range(9, ids.shape[1]):
        output = model(ids[:, column : column + 1], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    close(torch.cat(logits, 1), stored["logits_incremental"])
    cache = model(ids[:, :9], use_cache=True).past_key_values
    close(model(ids[:, 9:], past_key_values=cache, use_cache=True).logits, stored["logits_chunk2"])


@torch.no_grad()
def test_far_positions(model: Any, folder: Path) -> None:
    stored = load_file(folder / "far_positions.safetensors")
    close(model(stored["input_ids"], position_ids=stored["position_ids"]).logits, stored["logits"])


def test_generate(model: Any, folder: Path) -> None:
    stored = load_file(folder / "generate.safetensors")
    ids, expected = stored["input_ids"], stored["greedy"]
    options = {"do_sample": False, "max_new_tokens": expected.shape[1] - ids.shape[1]}
    assert torch.equal(model.generate(ids, eos_token_id=[], **options), expected)

    start = "batch_"
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: stored[start + name] for name in names}
    options["max_new_tokens"] = stored["batch_greedy"].shape[1] - inputs["input_ids"].shape[1]
    assert torch.equal(model.generate(**inputs, eos_token_id=[], **options), stored["batch_greedy"])
    ends = stored["batch_eos_ids"].tolist()
    assert torch.equal(model.generate(**inputs, eos_token_id=ends, **options), stored["batch_greedy_eos"])
    del inputs["position_ids"]  # worked out from the mask
    assert torch.equal(model.generate(**inputs, eos_token_id=ends, **options), stored["batch_greedy_eos"])


@torch.no_grad()
def test_transformers_own_layout_gives_the_same(folder: Path) -> None:
    """Its folder stays transformers' business, with glmkit imported too, and equals the stored logits exactly."""
    auto = AutoModelForCausalLM.from_pretrained(folder / "hf_native").eval()
    assert type(auto) is GlmForCausalLM
    stored = load_file(folder / "single.safetensors")
    assert torch.equal(auto(stored["input_ids"]).logits, stored["logits"])


@torch.no_grad()
def test_one_layer_anywhere(tmp_path: Path) -> None:
    """The first layer with a random final norm and output layer behind it: what enters the second one is stored."""
    config = AutoConfig.from_pretrained(FIXTURES)
    assert type(config) is ChatGLM2Config
    torch.manual_seed(0)
    model = ChatGLM2ForCausalLM(config).eval()
    state = load_file(FIXTURES / "first_layer.safetensors")
    del state["transformer.rotary_pos_emb.inv_freq"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert sorted(missing) == ["transformer.encoder.final_layernorm.weight", "transformer.output_layer.weight"]
    stored = load_file(FIXTURES / "results.safetensors")
    output = model(stored["single.input_ids"], output_hidden_states=True, use_cache=True)
    close(output.hidden_states[1], stored["single.hidden"])
    close(output.past_key_values.layers[0].keys, stored["single.key"])
    close(output.past_key_values.layers[0].values, stored["single.value"])

    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["rope_ratio"], written["rope_ratio_applies_to"]) == (500, "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(stored["single.input_ids"]).logits, output.logits)


def test_other_tokenizers_are_refused(shared: Path, folder: Path, tmp_path: Path) -> None:
    """A ChatGLM3 tokenizer in a GLM-4 folder, said to be GLM-4, does not pass as one."""
    shutil.copytree(folder / "hf_repo", tmp_path / "x")
    shutil.copy(shared / "tokenizers" / "glm4" / "tokenizer.model", tmp_path / "x")
    loaded = glmkit.load(tmp_path / "x")
    assert (loaded.tokenizer.generation, loaded.config.generation) == (4, 4)
    shutil.copy(shared / "tokenizers" / "chatglm2-chatglm3.tokenizer.model", tmp_path / "x" / "tokenizer.model")
    with pytest.raises(glmkit.errors.TokenizerError):
        glmkit.load(tmp_path / "x", family="glm-4-9b-chat")
