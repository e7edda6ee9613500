"""What lies in a folder beside the weights must not get code run, other files loaded, or a quantiser started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import glmkit
from glmkit.errors import CheckpointError, ConfigError, UsageError
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from official import CANARY, train_tokenizer, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", tokenizer=train_tokenizer(tmp_path / "tokenizer.model"))


@pytest.mark.parametrize("trust", [None, False, True])
def test_a_custom_generate_is_not_run(folder: Path, trust: bool | None) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"open({str(folder / CANARY)!r}, 'w')\ndef generate(model, **kwargs):\n    return 'foreign'\n"
    )
    for auto in (AutoModel, AutoModelForCausalLM):
        model = auto.from_pretrained(folder, trust_remote_code=trust)
        assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=1, do_sample=False).shape == (1, 3)
    assert not (folder / CANARY).exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attn_implementation", "somebody/kernel"),
        ("attn_implementation", "flash_attention_2"),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("_attn_implementation_internal", "somebody/kernel"),
    ],
)
def test_a_config_file_cannot_give_orders(folder: Path, field: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    for load in (glmkit.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ConfigError, match=field):
            load(folder)


def test_attention_may_be_chosen_by_the_caller_and_by_a_harmless_file(folder: Path) -> None:
    assert AutoModel.from_pretrained(folder, attn_implementation="eager").config._attn_implementation == "eager"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "sdpa"}))
    assert glmkit.load(folder).config._attn_implementation == "sdpa"


def test_an_adapter_beside_the_weights_is_no_silent_part_of_the_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    for load in (glmkit.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"adapter_config\.json lies beside the weights"):
            load(folder)


def test_family_overrules_what_the_folder_says(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = glmkit.load(folder)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert glmkit.load(tmp_path / "saved").tokenizer.generation == 3
    other = glmkit.load(tmp_path / "saved", family="chatglm2-6b")
    assert (other.tokenizer.generation, other.config.generation) == (2, 2)
    assert other.config.rope_ratio_applies_to == "position"


def test_a_prefix_needs_no_config(folder: Path, tmp_path: Path) -> None:
    config = glmkit.load(folder).config
    row = 2 * config.num_layers * config.multi_query_group_num * config.kv_channels
    (tmp_path / "prefix").mkdir()
    table = {"transformer.prefix_encoder.embedding.weight": torch.randn(5, row)}
    torch.save(table, tmp_path / "prefix" / "pytorch_model.bin")
    assert glmkit.load(folder, adapter=tmp_path / "prefix").config.pre_seq_len == 5


def test_a_bare_name_is_never_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("GLMKIT_MODELS", raising=False)
    with pytest.raises(UsageError, match=r"12\.5 GB"):
        ChatGLM2ForCausalLM.from_pretrained(pretrained_model_name_or_path="chatglm3-6b")
