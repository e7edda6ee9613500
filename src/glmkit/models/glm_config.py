"""The config of GLM (Du et al. 2022): official field names, the published sizes, and reading sizes off tensors.

Two kinds of checkpoints exist. A Hugging Face folder has a config.json, and its code computes the GELU by the error
function. The original checkpoints of the training code have none: their sizes are read off the tensors, and the GELU
they were trained with is the tanh approximation. The field `gelu` says which one is meant: it is "erf" unless it says
otherwise, so a Hugging Face folder computes what it always did, and `config_from_tensors` sets "tanh". All published
weights were trained with "tanh"; `"gelu": "tanh"` in config.json gives any folder that behaviour.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from glmkit.errors import ConfigError
from glmkit.models.checked_config import CheckedConfig, foreign_ids, is_positive, prefix_problems

_HEAD_CHANNELS = 64  # of every published size


class GLMConfig(CheckedConfig):
    """Sizes and switches, named as in the official config.json.

    Args:
        num_layers: Number of blocks, `L`.
        vocab_size: Rows of the embedding, which is the output layer too, `V`.
        hidden_size: `C`; the inner width is always `4 C`.
        num_attention_heads: `H`.
        max_sequence_length: Longest row in tokens; both position tables have one row more.
        embedding_dropout_prob: Dropout after the embedding, while training.
        attention_dropout_prob: Dropout of attention probabilities.
        output_dropout_prob: Dropout of what attention and mlp add.
        output_predict: Whether `GLMModel` computes logits. The language-model heads always do.
        gelu: "erf" (the Hugging Face code) or "tanh" (the training code, and so the published weights).
        attention_scale: Divides scores before the softmax's maximum is taken off and multiplies them after: for
            float16 only, the result is the same.
        initializer_range: Standard deviation of new weights.
        classifier_dropout: Dropout of the classification head; None: `output_dropout_prob`.
        mask_token_ids: Ids of [MASK], [gMASK] and [sMASK]; None: not known. Only the decode loop asks for it.
        sop_token_id: Id of <|startofpiece|>; likewise.
        quantization_bit: 4 or 8 for weights in the official row-wise format, 0 for none.
        pre_seq_len: Number of P-Tuning columns, None for none.
        prefix_projection: Whether the prefix goes through two layers.
        (others): Fields without numerical role, or with one released value.

    Raises:
        ConfigError: From `check` and `from_dict`, naming every field that is refused.
    """

    model_type: ClassVar[str] = "glm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["mems", "past_key_values", "hidden_states"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "num_key_value_heads": "num_attention_heads",
        "max_position_embeddings": "max_sequence_length",
    }

    first_architecture: ClassVar[str] = "GLMModel"
    sizes: ClassVar[dict[str, int]] = {
        "num_layers": 256,
        "vocab_size": 10_000_000,
        "hidden_size": 1_000_000,
        "num_attention_heads": 65_536,
        "max_sequence_length": 100_000_000,
    }
    only_value: ClassVar[dict[str, Any]] = {
        "relative_encoding": False,
        "block_position_encoding": True,
        "spell_length": None,
        "pool_token": "cls",
        "tie_word_embeddings": True,
    }
    dropped_if_none: ClassVar[tuple[str, ...]] = (
        "classifier_dropout",
        "mask_token_ids",
        "sop_token_id",
        "pre_seq_len",
    )

    num_layers: int = 24
    vocab_size: int = 30_592
    hidden_size: int = 1024
    num_attention_heads: int = 16
    embedding_dropout_prob: float = 0.1
    attention_dropout_prob: float = 0.1
    output_dropout_prob: float = 0.1
    max_sequence_length: int = 512
    checkpoint_activations: bool = False
    checkpoint_num_layers: int = 1
    parallel_output: bool = True
    relative_encoding: bool = False
    block_position_encoding: bool = True
    output_predict: bool = False
    spell_length: int | None = None
    spell_func: str = "lstm"
    attention_scale: float = 1.0
    initializer_range: float = 0.02
    pool_token: str = "cls"
    classifier_dropout: float | None = None
    gelu: str = "erf"
    mask_token_ids: list[int] | None = None
    sop_token_id: int | None = None
    quantization_bit: int = 0
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        """Channels of a head, `D`."""
        return self.hidden_size // self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        """Inner width of the mlp."""
        return 4 * self.hidden_size

    @classmethod
    def problems(cls, values: dict[str, Any]) -> list[str]:
        """Every field whose value cannot be computed with, in words."""
        found = super().problems(values)
        if not found and values.get("hidden_size", 1024) % values.get("num_attention_heads", 16):
            found.append("hidden_size must be a multiple of num_attention_heads")
        if values.get("gelu", "erf") not in ("erf", "tanh"):
            found.append(f"gelu={values['gelu']!r}: expected 'erf' or 'tanh'")
        for name in ("attention_scale", "initializer_range"):
            if not is_positive(values.get(name, 1)):
                found.append(f"{name}={values[name]!r}: expected a positive number")
        for name in ("embedding_dropout_prob", "attention_dropout_prob", "output_dropout_prob", "classifier_dropout"):
            value = values.get(name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1
            ):
                found.append(f"{name}={value!r}: expected a number from 0 up to, not including, 1")
        masks, sop = values.get("mask_token_ids"), values.get("sop_token_id")
        if masks is not None and not isinstance(masks, (list, tuple)):
            found.append(f"mask_token_ids={masks!r:.80}: expected a list of token ids")
        elif isinstance(sop, (list, tuple)):
            found.append(f"sop_token_id={sop!r:.80}: expected a token id")
        else:
            tokens = {"mask_token_ids": None, "sop_token_id": None}
            found += foreign_ids(values, tokens, values.get("vocab_size", 30_592))
        return found + prefix_problems(values)


def config_from_tensors(
    shapes: Mapping[str, Sequence[int]],
    *,
    num_attention_heads: int | None = None,
    gelu: str = "tanh",
    output_predict: bool = True,
    **fields: Any,
) -> GLMConfig:
    """Reads the sizes off the tensors of a whole (merged) original checkpoint.

    Args:
        shapes: Name -> shape of every tensor, with the official names, with or without "glm." or "model." in front.
        num_attention_heads: `H`, which no shape shows. None: 64 channels for each head, as in every published size.
        gelu: "tanh", which the training code computes, or "erf".
        output_predict: Whether `GLMModel` computes logits.
        **fields: Other fields of the config.

    Returns:
        The config.

    Raises:
        ConfigError: A tensor that tells a size is missing or has another shape, or the width is no multiple of 64.
    """
    shapes = {re.sub(r"^(glm|model)\.", "", name): tuple(shape) for name, shape in shapes.items()}
    wanted = ("word_embeddings.weight", "transformer.position_embeddings.weight")
    missing = [name for name in wanted if len(shapes.get(name, ())) != 2]
    layers = {match[1] for name in shapes if (match := re.match(r"transformer\.layers\.(\d+)\.", name))}
    if missing or not layers:
        found = [f"{name}: expected a matrix, found {shapes.get(name, 'nothing')}" for name in missing]
        found += [] if layers else ["transformer.layers.*: expected the tensors of the blocks, found nothing"]
        raise ConfigError(
            "these tensors do not look like a GLM checkpoint:\n" + "\n".join(f"  - {line}" for line in found),
            hint="give the merged tensors, with names like transformer.layers.0.attention.query_key_value.weight",
        )
    vocabulary, hidden = shapes[wanted[0]]
    if num_attention_heads is None and hidden % _HEAD_CHANNELS:
        raise ConfigError(
            f"hidden_size is {hidden}: expected a multiple of {_HEAD_CHANNELS}, the width of a head in every published"
            " size, because the tensors do not show the number of heads",
            hint="give num_attention_heads=",
        )
    config = GLMConfig(
        num_layers=len(layers),
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_attention_heads=num_attention_heads or hidden // _HEAD_CHANNELS,
        max_sequence_length=shapes[wanted[1]][0] - 1,
        gelu=gelu,
        output_predict=output_predict,
        **fields,
    )
    config.check()
    return config
