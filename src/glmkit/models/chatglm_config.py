"""The config of ChatGLM-6B: official field names, and what is refused.

Two vocabularies are in circulation under one `model_type`: the one of 130,528 rows, and an older one of 150,528 rows
whose first 20,000 ids are pieces of pictures. Their control ids differ, and weights of one give noise with the ids of
the other, so ids that do not belong to the vocabulary are refused. The defaults here are the released values; those of
the official class are stale.
"""

from __future__ import annotations

from typing import Any, ClassVar

from glmkit.models.checked_config import CheckedConfig, is_positive, prefix_problems

IMAGE_TOKENS = 20_000  # in front of the text in the older vocabulary
# Control ids of the two vocabularies. Other sizes are small models of somebody's own, which must name their ids.
_CONTROL_IDS: dict[int, dict[str, int]] = {
    130_528: {
        "mask_token_id": 130_000,
        "gmask_token_id": 130_001,
        "bos_token_id": 130_004,
        "eos_token_id": 130_005,
        "pad_token_id": 3,
    },
    150_528: {
        "mask_token_id": 150_000,
        "gmask_token_id": 150_001,
        "bos_token_id": 150_004,
        "eos_token_id": 150_005,
        "pad_token_id": IMAGE_TOKENS + 3,
    },
}


class ChatGLMConfig(CheckedConfig):
    """Sizes and switches, named as in the official config.json.

    Args:
        num_layers: Number of blocks.
        vocab_size: Rows of the embedding, which is the output layer too, `V`.
        hidden_size: `C`.
        inner_hidden_size: `F`.
        num_attention_heads: `H`.
        max_sequence_length: Longest context in tokens.
        layernorm_epsilon: Added to the variance.
        position_encoding_2d: Whether there are two rows of positions; False is the 1-D mode of later tuning code.
        mask_token_id: [MASK].
        gmask_token_id: [gMASK].
        bos_token_id: `<sop>`, which starts an answer.
        eos_token_id: `<eop>`, which ends it.
        pre_seq_len: Number of P-Tuning columns, None for none.
        prefix_projection: Whether the prefix goes through two layers.
        quantization_bit: 4 or 8 for a checkpoint in the official row-wise format, 0 for none.
        quantization_embeddings: Whether the embedding is quantised too (the int4-qe release).

    Raises:
        ConfigError: From `check` and `from_dict`, naming every field that is refused.
    """

    model_type: ClassVar[str] = "chatglm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "num_key_value_heads": "num_attention_heads",
        "max_position_embeddings": "max_sequence_length",
    }

    sizes: ClassVar[dict[str, int]] = {
        "num_layers": 256,
        "vocab_size": 10_000_000,
        "hidden_size": 1_000_000,
        "inner_hidden_size": 4_000_000,
        "num_attention_heads": 65_536,
        "max_sequence_length": 100_000_000,
    }
    only_value: ClassVar[dict[str, Any]] = {"tie_word_embeddings": True}
    if_absent: ClassVar[dict[str, Any]] = {"pre_seq_len": None}
    dropped_if_none: ClassVar[tuple[str, ...]] = ("pre_seq_len",)
    cures: ClassVar[dict[str, str]] = {
        "_token_id": "config.json and weights must have the same vocabulary: 130,528 rows with ids from 130000, or the"
        " older 150,528 with ids from 150000"
    }

    num_layers: int = 28
    vocab_size: int = 130_528
    hidden_size: int = 4096
    inner_hidden_size: int = 16384
    num_attention_heads: int = 32
    max_sequence_length: int = 2048
    layernorm_epsilon: float = 1e-5
    position_encoding_2d: bool = True
    mask_token_id: int = 130_000
    gmask_token_id: int = 130_001
    bos_token_id: int | None = 130_004
    eos_token_id: int | list[int] | None = 130_005
    pad_token_id: int | None = 3
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    quantization_bit: int = 0
    quantization_embeddings: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        """Channels of a head, `D`."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def complete(cls, values: dict[str, Any]) -> list[str]:
        """Fills in the control ids that belong to the vocabulary."""
        rows = values.setdefault("vocab_size", 130_528)
        known = _CONTROL_IDS.get(rows) if isinstance(rows, int) else None
        wanted = _CONTROL_IDS[130_528]
        missing = [name for name in wanted if values.get(name) is None]
        if known is None:
            return [f"{name} is missing, and no released vocabulary has {rows!r} rows" for name in missing]
        values.update({name: known[name] for name in missing})
        return []

    @classmethod
    def problems(cls, values: dict[str, Any]) -> list[str]:
        """Every field whose value cannot be computed with, in words."""
        found = super().problems(values)
        if not found and values.get("hidden_size", 4096) % values.get("num_attention_heads", 32):
            found.append("hidden_size must be a multiple of num_attention_heads")
        parts = 4 if values.get("position_encoding_2d", True) else 2
        if not found and (values.get("hidden_size", 4096) // values.get("num_attention_heads", 32)) % parts:
            found.append(f"hidden_size / num_attention_heads must be a multiple of {parts}, to be rotated in pairs")
        if not is_positive(values.get("layernorm_epsilon", 1e-5)):
            found.append(f"layernorm_epsilon={values['layernorm_epsilon']!r}: expected a positive number")
        if values.get("quantization_embeddings") and not values.get("quantization_bit"):
            found.append("quantization_embeddings is set and quantization_bit is not")
        return found + _foreign_ids(values) + prefix_problems(values)

    def architectures_to_write(self, architectures: list[str]) -> list[str]:
        """The official name of what is saved."""
        return ["ChatGLMModel"]


def _foreign_ids(values: dict[str, Any]) -> list[str]:
    """Control ids that lie outside the vocabulary or are those of the other one."""
    rows = values.get("vocab_size", 130_528)
    found = []
    for name in _CONTROL_IDS[130_528]:
        given = values.get(name)
        for token in given if isinstance(given, list) else [given]:
            other = next((size for size, ids in _CONTROL_IDS.items() if size != rows and ids[name] == token), None)
            if isinstance(token, bool) or (token is not None and not isinstance(token, int)):
                found.append(f"{name}={token!r}: expected a token id")
            elif token is not None and isinstance(rows, int) and (token < 0 or token >= rows):
                belongs = f"; it is that of the vocabulary of {other:,}" if other else ""
                found.append(f"{name}={token} lies outside the vocabulary of {rows:,}{belongs}")
            elif token is not None and other and rows in tuple(_CONTROL_IDS) and name != "pad_token_id":
                found.append(f"{name}={token} is that of the vocabulary of {other:,}, but vocab_size is {rows:,}")
    return found
