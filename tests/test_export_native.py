"""Official folders in transformers' own layout and back: the same logits, and not a bit changed on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

import official
from glmkit.checkpoint import open_folder
from glmkit.errors import CheckpointError, ConfigError, OutputError, UsageError
from glmkit.export import convert
from glmkit.export.native import from_native, to_native
from glmkit.tokenizers import ChatGLM4Tokenizer, ChatGLMTokenizer
from tiny import train_tokenizer

ATOL = 2e-5  # two orders of the same float32 sums
CONSTANT = "transformer.rotary_pos_emb.inv_freq"
GLM4 = {"_name_or_path": "THUDM/glm-4-9b-chat", "rope_ratio": 500, "eos_token_id": [400, 401, 402], "pad_token_id": 400}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with open_folder(folder) as opened:
        return dict(opened.read())


def assert_same_bits(left: Path, right: Path, **kwargs: Any) -> None:
    first, second = tensors(left), tensors(right)
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def assert_same_logits(official_folder: Path, native: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(official_folder, dtype=torch.float32).eval()
    theirs, report = GlmForCausalLM.from_pretrained(native, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.randint(0, ours.config.padded_vocab_size, (3, 24), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, :1] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0) + torch.tensor([[0], [50], [100]])
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        mine, other = ours(**inputs).logits, theirs.eval()(**inputs).logits
    seen = mask.bool()
    torch.testing.assert_close(mine[seen], other[seen], atol=ATOL, rtol=1e-5)


def both_ways(source: Path, work: Path) -> tuple[Path, Path]:
    native, back = work / "native", work / "back"
    to_native(source, native)
    from_native(native, back)
    assert_same_bits(source, back)
    assert_same_logits(source, native)
    assert_same_logits(back, native)
    return native, back


# --- checkpoints of the official code ---


@pytest.mark.parametrize("family", ["chatglm2", "chatglm2-32k", "chatglm3"])
def test_official_checkpoints(shared: Path, tmp_path: Path, family: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(shared / "conformance" / family / "model", source)
    shutil.copy(shared / "tokenizers" / "chatglm2-chatglm3.tokenizer.model", source / "tokenizer.model")
    native, back = both_ways(source, tmp_path)
    before, after = config(source), config(back)
    assert {name: after.get(name) for name in before if name in after} == {
        name: before[name] for name in before if name in after
    }
    if family == "chatglm2-32k":
        assert config(native)["rope_scaling"] == {"rope_type": "linear", "factor": 16.0}
        assert (after["rope_ratio"], after["rope_ratio_applies_to"]) == (16, "position")
    for folder in (native, back):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert type(tokenizer) is ChatGLMTokenizer
        assert tokenizer.generation == (3 if family == "chatglm3" else 2)


def test_glm4_equals_the_stored_native_folder(shared: Path, tmp_path: Path) -> None:
    folder = shared / "conformance" / "glm4"
    native, back = both_ways(folder / "hf_repo", tmp_path)
    assert_same_bits(native, folder / "hf_native")
    from_native(folder / "hf_native", tmp_path / "from_stored")
    assert_same_bits(tmp_path / "from_stored", folder / "hf_repo")
    mine, stored = (
        GlmConfig.from_pretrained(native).to_dict(),
        GlmConfig.from_pretrained(folder / "hf_native").to_dict(),
    )
    ignored = {"transformers_version", "architectures", "_name_or_path", "dtype"}
    assert {k: v for k, v in mine.items() if k not in ignored} == {k: stored.get(k) for k in mine if k not in ignored}
    before = config(folder / "hf_repo")
    for written in (back, tmp_path / "from_stored"):
        after = config(written)
        assert {name: after[name] for name in before if name in after} == {
            name: before[name] for name in before if name in after
        }
        assert (written / "generation_config.json").exists() == (written == back)
    single = load_file(folder / "single.safetensors")
    model = GlmForCausalLM.from_pretrained(native).eval()
    with torch.no_grad():
        assert torch.equal(model(single["input_ids"]).logits, single["logits"])


def test_glm4_tokenizer_goes_along(shared: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(shared / "conformance" / "glm4" / "hf_repo", source)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(shared / "tokenizers" / "glm4" / name, source)
    to_native(source, tmp_path / "native")
    from_native(tmp_path / "native", tmp_path / "back")
    text = "[gMASK]<sop><|user|>\n你好, world"
    expected = ChatGLM4Tokenizer.from_pretrained(source)(text)["input_ids"]
    for folder in ("native", "back"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder, trust_remote_code=True)
        assert type(tokenizer) is ChatGLM4Tokenizer
        assert tokenizer(text)["input_ids"] == expected
    alone = PreTrainedTokenizerFast.from_pretrained(tmp_path / "native")  # transformers without glmkit
    assert alone(text)["input_ids"] == expected
    assert (alone.eos_token_id, alone.pad_token_id, alone.padding_side) == (151_329, 151_329, "left")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert not (tmp_path / "back" / "tokenizer.json").exists()


# --- anywhere ---


@pytest.mark.parametrize(
    ("generation", "dtype", "changes"),
    [
        (2, torch.float16, {}),
        (3, torch.bfloat16, {"torch_dtype": "bfloat16"}),
        (3, torch.float16, {"rope_ratio": 50}),
        (2, torch.float16, {"rope_ratio": 16}),
        (3, torch.float32, GLM4 | {"torch_dtype": "float32", "layernorm_epsilon": 1.5625e-07}),
        (3, torch.float32, {"add_qkv_bias": False, "torch_dtype": "float32"}),
    ],
    ids=["chatglm2", "bfloat16", "long chatglm3", "32k", "glm4", "no bias"],
)
def test_round_trip(tmp_path: Path, generation: int, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    source = official.write_folder(tmp_path / "source", generation, dtype=dtype, **changes)
    (source / "model.safetensors").unlink(missing_ok=True)
    state = tensors(source)
    state[CONSTANT] = 1.0 / (10_000 ** (torch.arange(0, 4, 2).to(dtype) / 4))  # as the official code stores it
    for file in source.glob("model-*"):
        file.unlink()
    (source / "model.safetensors.index.json").unlink()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    native, back = both_ways(source, tmp_path)
    values = config(native)
    ratio = changes.get("rope_ratio", 1)
    divides = generation == 2 and ratio != 1
    assert values["rope_theta"] == 10_000.0 * (1 if divides else ratio)
    assert ("rope_scaling" in values) == divides
    assert values["attention_bias"] == changes.get("add_qkv_bias", True)
    assert values["eos_token_id"] == changes.get("eos_token_id", 2)
    assert config(back)["torch_dtype"] == changes.get("torch_dtype", "float16")
    assert config(back)["eos_token_id"] == values["eos_token_id"]
    assert (native / "generation_config.json").read_text() == (source / "generation_config.json").read_text()


def test_the_fused_matrix_of_the_draft_and_a_tied_output(tmp_path: Path) -> None:
    source = official.write_folder(tmp_path / "source", 3)
    to_native(source, tmp_path / "native")
    state = tensors(tmp_path / "native")
    for kind in ("weight", "bias"):
        for layer in range(2):
            start = f"model.layers.{layer}.self_attn"
            parts = [state.pop(f"{start}.{name}_proj.{kind}") for name in "qkv"]
            state[f"{start}.qkv_proj.{kind}"] = torch.cat(parts)
    fused = tmp_path / "fused"
    shutil.copytree(tmp_path / "native", fused)
    save_file(state, fused / "model.safetensors", metadata={"format": "pt"})
    from_native(fused, tmp_path / "back")
    from_native(tmp_path / "native", tmp_path / "other")
    assert_same_bits(tmp_path / "back", tmp_path / "other")

    del state["lm_head.weight"]
    save_file(state, fused / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .* is missing"):
        from_native(fused, tmp_path / "tied")
    (fused / "config.json").write_text(json.dumps(config(fused) | {"tie_word_embeddings": True}))
    from_native(fused, tmp_path / "tied")
    written = tensors(tmp_path / "tied")
    assert torch.equal(written["transformer.output_layer.weight"], state["model.embed_tokens.weight"])
    assert config(tmp_path / "tied")["tie_word_embeddings"] is False


def test_tokenizer_of_chatglm3(tmp_path: Path) -> None:
    source = official.write_folder(tmp_path / "source", 3, tokenizer=train_tokenizer(tmp_path / "t.model"))
    to_native(source, tmp_path / "native")
    text = "hello 你好 [MASK]"
    expected = ChatGLMTokenizer.from_pretrained(source)(text)["input_ids"]
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "native")(text)["input_ids"] == expected
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "native", trust_remote_code=True)
    assert (type(tokenizer), tokenizer.generation) == (ChatGLMTokenizer, 3)
    assert not (source / official.CANARY).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_bias_linear": True}, "add_bias_linear=True"),
        ({"rope_ratio": 8, "_name_or_path": "mine"}, "rope_ratio"),
    ],
)
def test_what_cannot_be_native_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = official.write_folder(tmp_path / "source", 3, **changes)
    for code in official.CODE:
        (source / code).unlink()
    with pytest.raises(ConfigError, match=message):
        to_native(source, tmp_path / "native")
    assert not (tmp_path / "native").exists()
    if "rope_ratio" in changes:
        to_native(source, tmp_path / "native", family="chatglm3-6b")
        assert config(tmp_path / "native")["rope_theta"] == 80_000.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"partial_rotary_factor": 1.0}, r"partial_rotary_factor=1\.0"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e6}, "rope_type='linear'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"model_type": "chatglm"}, "no folder of transformers' own layout"),
        ({"num_layers": 2}, "no folder of transformers' own layout"),
    ],
)
def test_what_cannot_be_official_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    to_native(official.write_folder(tmp_path / "source", 3), tmp_path / "native")
    (tmp_path / "native" / "config.json").write_text(json.dumps(config(tmp_path / "native") | changes))
    with pytest.raises(ConfigError, match=message):
        from_native(tmp_path / "native", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "'vocab_size'"),
        ({"torch_dtype": "x"}, "torch_dtype='x': expected a name such as 'float16'"),
        ({"dtype": []}, r"dtype=\[\]"),
        ({"rope_theta": []}, r"rope_theta=\[\]: expected a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta=inf"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "twice"}}, "factor='twice'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor'"),
        ({"rope_scaling": "x"}, "'rope_parameters'"),
        ({"id2label": 3}, "id2label=3"),
    ],
)
def test_a_damaged_config_is_refused_by_its_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    to_native(official.write_folder(tmp_path / "source", 3), tmp_path / "native")
    (tmp_path / "native" / "config.json").write_text(json.dumps(config(tmp_path / "native") | changes))
    with pytest.raises(ConfigError, match=rf"native is damaged:\n  - .*{message}"):
        from_native(tmp_path / "native", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("to", ["native", "official", "shards"])
def test_heads_are_told_for_shards_only(tmp_path: Path, to: str) -> None:
    with pytest.raises(UsageError, match="heads=4 "):
        convert(tmp_path, tmp_path / "out", to, heads=4)


def test_damage_is_found_before_anything_is_written(tmp_path: Path) -> None:
    source = official.write_folder(tmp_path / "source", 3)
    to_native(source, tmp_path / "native")
    with pytest.raises(OutputError, match="exists and is not empty"):
        to_native(source, tmp_path / "native")
    to_native(source, tmp_path / "native", overwrite=True)
    state = tensors(tmp_path / "native")
    state["model.norm.weight"] = torch.ones(7, dtype=torch.float16)
    state["model.extra"] = torch.ones(7)
    save_file(state, tmp_path / "native" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight(.|\n)*model\.extra"):
        from_native(tmp_path / "native", tmp_path / "back")
    state = tensors(source)
    quantised = tmp_path / "quantised"
    shutil.copytree(source, quantised)
    (quantised / "config.json").write_text(json.dumps(config(quantised) | {"quantization_bit": 4}))
    with pytest.raises(ConfigError, match="quantization_bit=4"):
        to_native(quantised, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "quantised", "source"]
