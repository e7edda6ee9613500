"""The config of ChatGLM2, ChatGLM3 and GLM-4-9B: official field names, and what is refused.

Only the released layouts are implemented; `CheckedConfig` says how everything else is refused.

`rope_ratio` has two meanings under one name. ChatGLM2-6B-32K divides the *position* by it; every later code (long
ChatGLM3, GLM-4) multiplies the *base* by it. Which one is meant is decided by, in this order: the field
`rope_ratio_applies_to` ("position" or "base"), which our own folders carry; the name in `_name_or_path` (chatglm2
against chatglm3, glm-4, longalign, codegeex4); a list of stop ids, which only GLM-4 configs have. If these signs
disagree, or if there is none while rope_ratio is not 1, the config is refused.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from glmkit.models.checked_config import CheckedConfig, is_positive, prefix_problems


class ChatGLM2Config(CheckedConfig):
    """Sizes and switches, named as in the official config.json.

    Args:
        num_layers: Number of blocks.
        padded_vocab_size: Rows of embedding and output layer, `V`.
        hidden_size: `C`.
        ffn_hidden_size: `F`.
        kv_channels: Width of a head, `D`.
        num_attention_heads: `H`.
        multi_query_group_num: Key/value heads, `K`.
        seq_length: Longest context in tokens.
        rope_ratio: Stretch of the rotary positions.
        rope_ratio_applies_to: "position" (divides it), "base" (multiplies it) or None (not yet decided).
        pre_seq_len: Number of P-Tuning columns, None for none.
        quantization_bit: 4 or 8 for a checkpoint in the official row-wise format, 0 for none.
        generation: 2 or 3, the chat format that belongs to the weights; None if the folder's signs shall decide.
        (others): See `CheckedConfig`.

    Raises:
        ConfigError: From `check` and `from_dict`, naming every field that is refused.
    """

    model_type: ClassVar[str] = "chatglm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "intermediate_size": "ffn_hidden_size",
        "head_dim": "kv_channels",
        "num_key_value_heads": "multi_query_group_num",
        "max_position_embeddings": "seq_length",
    }

    sizes: ClassVar[dict[str, int]] = {
        "num_layers": 256,
        "padded_vocab_size": 10_000_000,
        "hidden_size": 1_000_000,
        "ffn_hidden_size": 4_000_000,
        "kv_channels": 65_536,
        "num_attention_heads": 65_536,
        "multi_query_group_num": 65_536,
        "seq_length": 100_000_000,
    }
    only_value: ClassVar[dict[str, Any]] = {
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "multi_query_attention": True,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "tie_word_embeddings": False,
        "quantization_embeddings": False,
    }
    if_absent: ClassVar[dict[str, Any]] = {
        "add_qkv_bias": False,
        "multi_query_attention": False,
        "multi_query_group_num": 1,
        "seq_length": 2048,
    }
    dropped_if_none: ClassVar[tuple[str, ...]] = ("rope_ratio_applies_to", "pre_seq_len", "generation")
    cures: ClassVar[dict[str, str]] = {
        "rope_ratio": 'add "rope_ratio_applies_to": "position" (ChatGLM2-6B-32K) or "base" (later ones) to config.json'
    }

    num_layers: int = 28
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    multi_query_group_num: int = 2
    seq_length: int = 8192
    hidden_dropout: float = 0.0
    classifier_dropout: float | None = None
    attention_dropout: float = 0.0
    layernorm_epsilon: float = 1e-5
    rope_ratio: float = 1
    rope_ratio_applies_to: str | None = None
    original_rope: bool = True
    rmsnorm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    post_layer_norm: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = True
    bias_dropout_fusion: bool = True
    multi_query_attention: bool = True
    apply_query_key_layer_scaling: bool = True
    attention_softmax_in_fp32: bool = True
    fp32_residual_connection: bool = False
    quantization_bit: int = 0
    quantization_embeddings: bool = False
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    generation: int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0

    @classmethod
    def complete(cls, values: dict[str, Any]) -> list[str]:
        """Decides what `rope_ratio` means, if the config says it."""
        if values.get("rope_ratio_applies_to") is not None:
            return []
        signs = _meanings_of_rope_ratio(values)
        if values.get("rope_ratio", 1) != 1 and len(signs) > 1:
            ratio = values["rope_ratio"]
            return [f"the signs of what rope_ratio={ratio!r} means disagree (_name_or_path, eos_token_id)"]
        values["rope_ratio_applies_to"] = signs.pop() if len(signs) == 1 else None
        return []

    @classmethod
    def problems(cls, values: dict[str, Any]) -> list[str]:
        """Every field whose value cannot be computed with, in words."""
        found = super().problems(values)
        if not found and values.get("num_attention_heads", 32) % values.get("multi_query_group_num", 2):
            found.append("num_attention_heads must be a multiple of multi_query_group_num")
        if not found and values.get("kv_channels", 128) % 4:
            found.append(f"kv_channels={values['kv_channels']}: half of it must be whole pairs, so a multiple of 4")
        for name in ("layernorm_epsilon", "rope_ratio"):
            if not is_positive(values.get(name, 1)):
                found.append(f"{name}={values[name]!r}: expected a positive number")
        if values.get("rope_ratio_applies_to") not in (None, "position", "base"):
            found.append(f"rope_ratio_applies_to={values['rope_ratio_applies_to']!r}: expected 'position' or 'base'")
        if values.get("generation") not in (None, 2, 3, 4):
            found.append(f"generation={values['generation']!r}: expected 2, 3 or 4")
        return found + prefix_problems(values)

    def check(self) -> None:
        """Refuses what the network does not compute.

        Raises:
            ConfigError: Naming every field in question at once.
        """
        super().check()
        if self.rope_ratio != 1 and self.rope_ratio_applies_to is None:
            self.refuse(
                [
                    f"rope_ratio={self.rope_ratio!r} is ambiguous: ChatGLM2-6B-32K divides the position by it, later"
                    " models multiply the base by it, and nothing in the config says which"
                ]
            )

    def rotary_base_and_scale(self) -> tuple[float, float]:
        """The base of the rotary frequencies and the number that positions are divided by."""
        if self.rope_ratio_applies_to == "position":
            return 10_000.0, float(self.rope_ratio)
        return 10_000.0 * self.rope_ratio, 1.0

    def architectures_to_write(self, architectures: list[str]) -> list[str]:
        """The official name of what is saved."""
        classifier = any("SequenceClassification" in name for name in architectures)
        return ["ChatGLMForSequenceClassification" if classifier else "ChatGLMModel"]


def _meanings_of_rope_ratio(values: dict[str, Any]) -> set[str]:
    name = str(values.get("_name_or_path") or values.get("name_or_path") or "").lower()
    signs = set()
    if re.search(r"chatglm2", name):
        signs.add("position")
    if re.search(r"chatglm3|glm-?4|longalign|codegeex4", name) or isinstance(values.get("eos_token_id"), list):
        signs.add("base")
    return signs
