"""Which network a config.json describes: one of ours, or a neighbour under the same name.

`model_type` does not say it. "chatglm" stands for ChatGLM-6B, for ChatGLM2, ChatGLM3 and GLM-4, and for models with
pictures; "glm" stands for the GLM of 2021 and for transformers' own layout of GLM-4. The fields tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glmkit.errors import ConfigError
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.chatglm_config import ChatGLMConfig
from glmkit.models.checked_config import CheckedConfig
from glmkit.models.glm130b_config import GLM130BConfig
from glmkit.models.glm_config import GLMConfig

CONFIGS: dict[str, type[CheckedConfig]] = {
    "chatglm": ChatGLMConfig,
    "chatglm2": ChatGLM2Config,
    "glm": GLMConfig,
    "glm-130b": GLM130BConfig,
}
"""Name of a network, as in `glmkit.families`, and the class of its config."""

_TRANSFORMERS_OWN = "transformers has a class of its own for it: AutoModelForCausalLM.from_pretrained(FOLDER)"
_PICTURES = "glmkit loads the language models; this one needs the code of its own repository"


def config_class(values: Mapping[str, Any]) -> type[CheckedConfig]:
    """Chooses the config class for the content of a config.json.

    Args:
        values: The fields.

    Returns:
        ChatGLMConfig, ChatGLM2Config, GLMConfig or GLM130BConfig.

    Raises:
        ConfigError: It is a neighbour's, named with what loads it instead, or of another kind altogether.
    """
    kind = values.get("model_type")
    neighbour = _neighbour(values)
    if neighbour is not None:
        name, cure = neighbour
        raise ConfigError(f"this is {name} (model_type {kind!r:.40}), which glmkit does not load", hint=cure)
    if kind == "glm-130b":
        return GLM130BConfig
    if kind == "glm" or (kind is None and "block_position_encoding" in values):
        return GLMConfig
    if kind in ("chatglm", None):
        first = "inner_hidden_size" in values or "position_encoding_2d" in values
        return ChatGLMConfig if first else ChatGLM2Config
    raise ConfigError(
        f"model_type is {kind!r:.40}: expected 'chatglm', 'glm' or 'glm-130b'",
        hint="glmkit loads the GLM lineage; other models are loaded by transformers' AutoModelForCausalLM",
    )


def is_native_layout(values: Mapping[str, Any]) -> bool:
    """Whether a config.json of model_type "glm" is in transformers' own layout, not the GLM of 2021."""
    own = {"block_position_encoding", "num_layers", "max_sequence_length", "output_predict"}
    return values.get("model_type") == "glm" and not own & set(values)


def _neighbour(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Name of a related model that is none of ours, and what to do; None if it is not such a model."""
    kind = str(values.get("model_type") or "").lower()
    named = values.get("architectures")
    classes = " ".join(map(str, named if isinstance(named, list) else [named])).lower()
    if "cogvlm" in kind or "cogvlm" in classes or "cogagent" in classes:
        return "CogVLM", _PICTURES
    if kind == "chatglm" and ({"eva_config", "qformer_config", "image_length"} & set(values) or "withimage" in classes):
        return "VisualGLM-6B", _PICTURES
    if kind == "chatglm" and "vision_config" in values:
        return "GLM-4V-9B", _PICTURES
    if kind == "glm4":
        return "GLM-4-0414", _TRANSFORMERS_OWN
    if is_native_layout(values):
        return (
            "a model in transformers' own `glm` layout (GLM-4-9B-chat-hf, GLM-Edge)",
            _TRANSFORMERS_OWN + "; glm convert FOLDER NEW --to official makes a folder that glmkit loads",
        )
    if kind.startswith(("glm4", "glm_", "glm46v", "glmasr", "glm-")) and kind != "glm-130b":
        return f"a later model of the GLM series ({kind:.40})", _TRANSFORMERS_OWN
    return None
