"""Which network a config.json means, what its neighbours are told, and the table of released models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, GlmConfig

import glmkit
from glmkit.errors import ConfigError
from glmkit.families import FAMILIES, find_family
from glmkit.inspection import inspect, released_config
from glmkit.models.architectures import CONFIGS, config_class
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.chatglm_config import ChatGLMConfig
from glmkit.models.glm130b_config import GLM130BConfig
from glmkit.models.glm_config import GLMConfig
from glmkit.registration import LANGUAGE_MODELS

NEIGHBOURS: dict[str, dict[str, Any]] = {
    "GLM-4V-9B": {"model_type": "chatglm", "padded_vocab_size": 151552, "vision_config": {"image_size": 1120}},
    "VisualGLM-6B": {"model_type": "chatglm", "inner_hidden_size": 16384, "image_length": 32, "eva_config": {}},
    "CogVLM": {"architectures": ["CogVLMForCausalLM"], "vision_config": {}},
    "GLM-4-0414": {"model_type": "glm4", "num_hidden_layers": 40},
    "later model of the GLM series": {"model_type": "glm4_moe", "num_hidden_layers": 46},
    "transformers' own `glm` layout": {"model_type": "glm", "num_hidden_layers": 40, "num_key_value_heads": 2},
}
OURS = [
    ({"model_type": "chatglm", "position_encoding_2d": True}, ChatGLMConfig),
    ({"model_type": "chatglm", "inner_hidden_size": 64}, ChatGLMConfig),
    ({"model_type": "chatglm", "padded_vocab_size": 65024}, ChatGLM2Config),
    ({"model_type": "chatglm", "padded_vocab_size": 151552, "rope_ratio": 500}, ChatGLM2Config),
    ({"padded_vocab_size": 65024}, ChatGLM2Config),
    ({"model_type": "glm", "block_position_encoding": True, "max_sequence_length": 512}, GLMConfig),
    ({"model_type": "glm-130b"}, GLM130BConfig),
]


@pytest.mark.parametrize(("values", "expected"), OURS)
def test_fields_decide(values: dict[str, Any], expected: type) -> None:
    assert config_class(values) is expected


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_neighbour_is_named_and_told_where_to_go(name: str) -> None:
    with pytest.raises(ConfigError, match="which glmkit does not load") as caught:
        config_class(NEIGHBOURS[name])
    assert name in str(caught.value)
    assert "transformers" in str(caught.value.hint) or "repository" in str(caught.value.hint)


def test_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="'llama'"):
        config_class({"model_type": "llama"})


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_labels", 10**7),  # transformers would make a table of them first, which takes minutes
        ("num_labels", "x"),
        ("id2label", [1]),
        ("torch_dtype", "nope"),
        ("architectures", True),
        ("vocab_size", [1]),
    ],
)
def test_fields_that_transformers_takes_apart_are_looked_at_first(name: str, field: str, value: Any) -> None:
    values = {**CONFIGS[name]().to_dict(), "model_type": CONFIGS[name].model_type, field: value}
    with pytest.raises(ConfigError, match=field):
        config_class(values).from_dict(values)


def test_auto_config_leaves_transformers_its_own_layout(tmp_path: Any) -> None:
    GlmConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is GlmConfig
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="own `glm` layout"):
        glmkit.load(tmp_path)


def test_for_model_gives_the_class_that_the_fields_mean() -> None:
    assert type(AutoConfig.for_model("chatglm", padded_vocab_size=65024, multi_query_attention=True)) is ChatGLM2Config
    assert type(AutoConfig.for_model("glm", block_position_encoding=True, num_layers=2)) is GLMConfig


# Parameters counted by hand from the formulas of docs/models: layers x (attention + inner layer + norms) + tables.
PARAMETERS = {
    "chatglm-6b": 6_173_286_400,
    "chatglm2-6b": 6_243_584_000,
    "glm-4-9b-chat": 9_399_951_360,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_released_sizes(name: str) -> None:
    assert inspect(name)["parameters"] == PARAMETERS[name]


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_every_row_builds(row: Any) -> None:
    """The network of every row exists on the meta device, and its float16 size is the download's, to a tenth."""
    config = released_config(row)
    assert type(config) is CONFIGS[row.architecture]
    config.check()
    with torch.device("meta"):
        model = LANGUAGE_MODELS[type(config)](config)
    if row.name != "glm-nano" and not getattr(config, "quantization_bit", 0):
        count = sum(parameter.numel() for parameter in model.parameters())
        assert row.bytes == pytest.approx(2 * count, rel=0.12)
    assert config.max_position_embeddings >= min(row.context_tokens, 8192)
    for name in (row.name, *row.aliases, f"THUDM/{row.name}"):
        assert find_family(name) is row
