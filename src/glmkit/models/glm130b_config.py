"""The config of GLM-130B: the sizes of the release, and how to read them off the tensors of a checkpoint.

The release has no config.json: its sizes stand on the command line of its scripts. Our folders carry one, with the
names of those arguments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from glmkit.errors import ConfigError
from glmkit.models.checked_config import CheckedConfig, foreign_ids, is_positive, prefix_problems

_HEAD_CHANNELS = 128  # of the release; a checkpoint may say it itself, by its rotary frequencies
_TOKENS = {  # control ids of the release
    "mask_token_id": 150_000,
    "gmask_token_id": 150_001,
    "smask_token_id": 150_002,
    "bos_token_id": 150_004,
    "eos_token_id": [150_005, 20_002],
    "pad_token_id": 20_003,
}


class GLM130BConfig(CheckedConfig):
    """Sizes and token ids, named as the arguments of the official scripts.

    Args:
        num_layers: Number of blocks, `L`.
        vocab_size: Rows of the embedding, which is the output layer too, `V`.
        hidden_size: `C`.
        num_attention_heads: `H`.
        inner_hidden_size: Width of gate and value in the feed-forward part, `F`.
        max_sequence_length: Longest context in tokens.
        layernorm_epsilon: Added to the variance.
        layernorm_order: "post", the only one.
        mask_token_id: [MASK], a blank of some words.
        gmask_token_id: [gMASK], a blank up to the end.
        smask_token_id: [sMASK], a blank of a sentence.
        bos_token_id: sop, which starts a filling.
        eos_token_id: eop and eos, which both end one.
        quantization_bit: 4 or 8 for weights in the official row-wise format, 0 for none.

    Raises:
        ConfigError: From `check` and `from_dict`, naming every field that is refused.
    """

    model_type: ClassVar[str] = "glm-130b"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "num_key_value_heads": "num_attention_heads",
        "max_position_embeddings": "max_sequence_length",
    }

    first_architecture: ClassVar[str] = "GLM130BForCausalLM"
    sizes: ClassVar[dict[str, int]] = {
        "num_layers": 256,
        "vocab_size": 10_000_000,
        "hidden_size": 1_000_000,
        "num_attention_heads": 65_536,
        "inner_hidden_size": 4_000_000,
        "max_sequence_length": 100_000_000,
    }
    only_value: ClassVar[dict[str, Any]] = {"layernorm_order": "post", "tie_word_embeddings": True}

    num_layers: int = 70
    vocab_size: int = 150_528
    hidden_size: int = 12_288
    num_attention_heads: int = 96
    inner_hidden_size: int = 32_768
    max_sequence_length: int = 2048
    layernorm_epsilon: float = 1e-5
    layernorm_order: str = "post"
    mask_token_id: int = 150_000
    gmask_token_id: int = 150_001
    smask_token_id: int = 150_002
    bos_token_id: int | None = 150_004
    eos_token_id: int | list[int] | None = None  # [eop, eos] of the release unless given
    pad_token_id: int | None = 20_003
    quantization_bit: int = 0
    use_cache: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.eos_token_id is None:
            self.eos_token_id = [150_005, 20_002]
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Channels of a head, `D`."""
        return self.hidden_size // self.num_attention_heads

    @property
    def residual_scale(self) -> float:
        """How much the skipped part of a sublayer weighs: `alpha = sqrt(2 L)` of DeepNorm."""
        return float((2 * self.num_layers) ** 0.5)

    @classmethod
    def problems(cls, values: dict[str, Any]) -> list[str]:
        """Every field whose value cannot be computed with, in words."""
        found = super().problems(values)
        if not found and values.get("hidden_size", 12_288) % (2 * values.get("num_attention_heads", 96)):
            found.append("hidden_size must be a multiple of 2 * num_attention_heads")
        if not is_positive(values.get("layernorm_epsilon", 1e-5)):
            found.append(f"layernorm_epsilon={values['layernorm_epsilon']!r}: expected a positive number")
        found += [
            f"{name}={values[name]!r:.80}: expected a token id"
            for name in _TOKENS
            if name != "eos_token_id" and isinstance(values.get(name), (list, tuple))
        ]
        return found + foreign_ids(values, _TOKENS, values.get("vocab_size", 150_528)) + prefix_problems(values)


def config_from_tensors(
    shapes: Mapping[str, Sequence[int]], *, num_attention_heads: int | None = None, **fields: Any
) -> GLM130BConfig:
    """Reads the sizes off the tensors of a whole (merged) checkpoint.

    Args:
        shapes: Name -> shape of every tensor, with the official names.
        num_attention_heads: `H`. None: from the width of `rotary_emb.inv_freq` if the checkpoint has it, else 128
            channels for each head, as in the release.
        **fields: Other fields of the config, such as token ids.

    Returns:
        The config; quantised weights are known by their `weight_scale`.

    Raises:
        ConfigError: A tensor that tells a size is missing or has another shape.
    """
    first = "transformer.layers.0."
    wanted = {
        "transformer.word_embeddings.weight": 2,
        f"{first}attention.query_key_value.weight": 2,
        f"{first}mlp.dense_h_to_4h.weight": 2,
    }
    missing = [name for name, dimensions in wanted.items() if len(shapes.get(name, ())) != dimensions]
    if missing:
        problems = [f"{name}: expected a matrix, found {shapes.get(name, 'nothing')}" for name in missing]
        raise ConfigError(
            "these tensors do not look like a GLM-130B checkpoint:\n" + "\n".join(f"  - {one}" for one in problems),
            hint="give the merged tensors, with names like transformer.layers.0.attention.query_key_value.weight",
        )
    vocabulary, hidden = shapes["transformer.word_embeddings.weight"]
    rows, columns = shapes[f"{first}attention.query_key_value.weight"]
    bits = 0
    if f"{first}attention.query_key_value.weight_scale" in shapes:
        bits = 8 * columns // hidden
    frequencies = next((shape for name, shape in shapes.items() if name.endswith("rotary_emb.inv_freq")), None)
    channels = 2 * frequencies[0] if frequencies else _HEAD_CHANNELS
    layers = {match[1] for name in shapes if (match := re.match(r"transformer\.layers\.(\d+)\.", name))}
    config = GLM130BConfig(
        num_layers=len(layers),
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_attention_heads=num_attention_heads or max(1, rows // 3 // channels),
        inner_hidden_size=shapes[f"{first}mlp.dense_h_to_4h.weight"][0] // 2,
        quantization_bit=bits,
        **fields,
    )
    config.check()
    return config
