"""The config of ChatGLM2, ChatGLM3 and GLM-4-9B: official field names, and what is refused.

Only the released layouts are implemented. A field that changes the result and has another value is refused by its
name; a field without numerical role may have any value; a field nobody knows is refused too, because ignoring it could
change every answer silently.

`rope_ratio` has two meanings under one name. ChatGLM2-6B-32K divides the *position* by it; every later code (long
ChatGLM3, GLM-4) multiplies the *base* by it. Which one is meant is decided by, in this order: the field
`rope_ratio_applies_to` ("position" or "base"), which our own folders carry; the name in `_name_or_path` (chatglm2
against chatglm3, glm-4, longalign, codegeex4); a list of stop ids, which only GLM-4 configs have. If these signs
disagree, or if there is none while rope_ratio is not 1, the config is refused.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from glmkit import hf
from glmkit.errors import ConfigError

# The released value of every field that has a numerical role but only one implemented value.
_ONLY_VALUE: dict[str, Any] = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "tie_word_embeddings": False,
    "quantization_embeddings": False,
}
# What the official class assumes for a field that config.json leaves out, where it differs from the released value.
_IF_ABSENT: dict[str, Any] = {
    "add_qkv_bias": False,
    "multi_query_attention": False,
    "multi_query_group_num": 1,
    "seq_length": 2048,
}
# Largest sizes that are believed; a file that says more is damaged or hostile, and would exhaust the memory.
_SIZES: dict[str, int] = {
    "num_layers": 256,
    "padded_vocab_size": 10_000_000,
    "hidden_size": 1_000_000,
    "ffn_hidden_size": 4_000_000,
    "kv_channels": 65_536,
    "num_attention_heads": 65_536,
    "multi_query_group_num": 65_536,
    "seq_length": 100_000_000,
}
# Fields of transformers and of tools around it that change nothing in the network.
_INERT = set(
    """_attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures
    auto_map bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id dtype eos_token_id
    finetuning_task id2label interleaved_qkv is_decoder is_encoder_decoder label2id model_type name_or_path num_labels
    output_attentions output_hidden_states pad_token_id prefix problem_type pruned_heads
    return_dict sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype
    torchscript transformers_version use_bfloat16 use_cache""".split()
)


class ChatGLM2Config(hf.PreTrainedConfig):
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
        (others): See the module's docstring.

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
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads the content of a config.json; see the class and the module for what is refused.

        Raises:
            ConfigError: Naming every field in question at once.
        """
        values = dict(config_dict)
        values.pop("auto_map", None)  # names of python files, which are never run
        _raise(_generation_1(values))
        problems = [*_orders(values), *_unknown_fields(cls, values), *_contradictions(cls, values)]
        for foreign, official in cls.attribute_map.items():
            value = values.pop(foreign, None)
            if value is not None:
                values.setdefault(official, value)
        for field, absent in _IF_ABSENT.items():
            values.setdefault(field, absent)
        if values.get("rope_ratio_applies_to") is None:
            values["rope_ratio_applies_to"] = _meaning_of_rope_ratio(values)
        _raise([*problems, *_problems(values)])
        return super().from_dict(values, **kwargs)

    def check(self) -> None:
        """Refuses what the network does not compute.

        Raises:
            ConfigError: Naming every field in question at once.
        """
        problems = _problems({name: getattr(self, name) for name in (*_SIZES, *_ONLY_VALUE, *_OTHERS)})
        if self.rope_ratio != 1 and self.rope_ratio_applies_to is None:
            problems.append(
                f"rope_ratio={self.rope_ratio!r} is ambiguous: ChatGLM2-6B-32K divides the position by it, later models"
                " multiply the base by it, and nothing in the config says which"
            )
        _raise(problems)

    def rotary_base_and_scale(self) -> tuple[float, float]:
        """The base of the rotary frequencies and the number that positions are divided by."""
        if self.rope_ratio_applies_to == "position":
            return 10_000.0, float(self.rope_ratio)
        return 10_000.0 * self.rope_ratio, 1.0

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json gets: the official `architectures`, and no `auto_map` to files that are not there."""
        values = super().to_diff_dict()
        values.pop("auto_map", None)
        for name in ("rope_ratio_applies_to", "pre_seq_len", "generation"):
            if values.get(name) is None:
                values.pop(name, None)
        if "dtype" in values:  # the name that the official code's transformers reads; today's reads it too
            values["torch_dtype"] = values.pop("dtype")
        classifier = any("SequenceClassification" in name for name in values.get("architectures") or ())
        values["architectures"] = ["ChatGLMForSequenceClassification" if classifier else "ChatGLMModel"]
        return values


_OTHERS = ("layernorm_epsilon", "rope_ratio", "rope_ratio_applies_to", "quantization_bit", "pre_seq_len", "generation")


def _problems(values: dict[str, Any]) -> list[str]:
    """Every field whose value cannot be computed with, in words."""
    problems = []
    for name, largest in _SIZES.items():
        value = values.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= largest:
            problems.append(f"{name}={value!r}: expected a whole number from 1 to {largest:,}")
    for name, only in _ONLY_VALUE.items():
        if name in values and values[name] != only:
            problems.append(f"unsupported: {name}={values[name]!r} (all released checkpoints have {only!r})")
    if not problems and values.get("num_attention_heads", 32) % values.get("multi_query_group_num", 2):
        problems.append("num_attention_heads must be a multiple of multi_query_group_num")
    if not problems and values.get("kv_channels", 128) % 4:
        problems.append(f"kv_channels={values['kv_channels']}: half of it must be whole pairs, so a multiple of 4")
    for name in ("layernorm_epsilon", "rope_ratio"):
        value = values.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            problems.append(f"{name}={value!r}: expected a positive number")
    if values.get("rope_ratio_applies_to") not in (None, "position", "base"):
        problems.append(f"rope_ratio_applies_to={values['rope_ratio_applies_to']!r}: expected 'position' or 'base'")
    if values.get("quantization_bit", 0) not in (0, 4, 8, None):
        problems.append(f"quantization_bit={values['quantization_bit']!r}: expected 4 or 8, or 0 for none")
    if values.get("generation") not in (None, 2, 3):
        problems.append(f"generation={values['generation']!r}: expected 2 or 3")
    length = values.get("pre_seq_len")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or not 0 < length <= 65_536):
        problems.append(f"pre_seq_len={length!r}: expected a whole number from 1 to 65,536, or null")
    return problems


def _generation_1(values: dict[str, Any]) -> list[str]:
    if "inner_hidden_size" in values or "position_encoding_2d" in values:
        return ["this is a config of ChatGLM-6B (the first generation), which this version does not load"]
    return []


def _orders(values: dict[str, Any]) -> list[str]:
    """Fields that would make transformers fetch code or quantise; a file may not order that, a caller may."""
    back_end = values.pop("attn_implementation", None)
    problems = []
    if back_end not in (None, "sdpa", "eager"):
        problems.append(f"unsupported: attn_implementation={back_end!r} (expected 'sdpa' or 'eager')")
    if values.pop("quantization_config", None) is not None:
        problems.append(
            "unsupported: quantization_config (give it to from_pretrained, or load an official int4 folder)"
        )
    return problems


def _unknown_fields(cls: type[ChatGLM2Config], values: dict[str, Any]) -> list[str]:
    known = set(cls.__dataclass_fields__) | set(cls.attribute_map) | _INERT
    known |= set(hf.GenerationConfig().to_dict())
    return [
        f"unknown field {name}={value!r}: nobody knows whether it changes the result"
        for name, value in values.items()
        if name not in known and value is not None
    ]


def _contradictions(cls: type[ChatGLM2Config], values: dict[str, Any]) -> list[str]:
    """transformers' names may stand beside the official ones, but must not contradict them."""
    return [
        f"{name}={values[name]!r} contradicts {official}={values[official]!r}"
        for name, official in cls.attribute_map.items()
        if name in values and official in values and values[name] != values[official]
    ]


def _meaning_of_rope_ratio(values: dict[str, Any]) -> str | None:
    name = str(values.get("_name_or_path") or values.get("name_or_path") or "").lower()
    signs = set()
    if re.search(r"chatglm2", name):
        signs.add("position")
    if re.search(r"chatglm3|glm-?4|longalign|codegeex4", name) or isinstance(values.get("eos_token_id"), list):
        signs.add("base")
    if values.get("rope_ratio", 1) != 1 and len(signs) > 1:
        _raise([f"the signs of what rope_ratio={values['rope_ratio']!r} means disagree (_name_or_path, eos_token_id)"])
    return signs.pop() if len(signs) == 1 else None


def _raise(problems: list[str]) -> None:
    if problems:
        ambiguous = any("rope_ratio" in problem for problem in problems)
        raise ConfigError(
            "this config cannot be loaded:\n" + "\n".join(f"  - {problem}" for problem in problems),
            hint=(
                'add "rope_ratio_applies_to": "position" (ChatGLM2-6B-32K) or "base" (later models) to config.json'
                if ambiguous
                else "compare config.json with the one of the official repository"
            ),
        )
