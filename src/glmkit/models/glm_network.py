"""GLM (2021): one network, read top-down.

    ids (B, T)
     | word_embeddings, position_embeddings,         x = E[ids] + P[where] + Q[how far]
     | block_position_embeddings
     |
     +-----------------+   block, num_layers times
     | input_layernorm |
     | attention       |   q, k and v in one product, in three blocks; no rotation
     +--------(+)------+   x = x + attention
     | post_attention_ |
     | layernorm, mlp  |   W2 gelu(W1 u), four times as wide inside
     +--------(+)------+   x = x + mlp
     |
     | final_layernorm
     | word_embeddings again                         logits = E x, rows of padding in the vocabulary included

Letters: `B` batch, `T` new tokens, `M` tokens of memory or cache, `S = M + T`, `H` heads, `D` head width, `C` hidden,
`L` blocks, `V` vocabulary rows.

The model fills blanks. A row is part A, a text with [MASK], [gMASK] or [sMASK] in it, then part B: for every blank
<|startofpiece|> (sop) and its filling. Part A sees all of itself; part B sees part A and what it has behind itself. The
positions have two rows, (B, 2, T): where a token belongs in part A, which for a filling is the place of its blank; and
how far it is into the filling, 1 for sop, 0 in part A.

Earlier tokens come in one of two forms, with the same logits. `mems`, the official one, are L + 1 residual streams
before any norm, from which keys and values are computed anew; `past_key_values` are the keys and values themselves.

A learned prefix (P-Tuning v2) may stand in front of all keys and values, as in ChatGLM-6B; the release has none, so its
layout here is ours. Every token sees it, those of a row that sees nothing else too.

Modules and parameters carry the official names, so loading and saving rename nothing. The plain release is `GLMModel`.

Source: GLM, Du et al. 2022 (arXiv:2103.10360); modeling_glm.py of the Hugging Face folders and of THUDM/GLM.
What differs on purpose: scores are not divided by `attention_scale` and multiplied by it again, which only keeps
float16 from overflowing; there is a key/value cache beside mems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glmkit import hf
from glmkit.errors import UsageError
from glmkit.models.glm_config import GLMConfig
from glmkit.models.language_model import either
from glmkit.models.layers import ATTENTION, LayerNorm
from glmkit.models.prefix_encoder import Prefix, PrefixEncoder, PrefixPart, PrefixTuned
from glmkit.models.prefix_lm import attention_mask as mask_for_attention

Mask = tuple[Tensor | None, Tensor | None]  # who sees whom, and which queries are zero: see `prefix_lm.attention_mask`


@dataclass
class GLMOutput(hf.ModelOutput):
    """What the models return; what is None is left out.

    Args:
        loss: float32 scalar.
        logits: (B, T or kept, V), or the scores of the choices or classes.
        lm_logits: (B, T, V), beside the scores of the choices.
        last_hidden_states: (B, T, C) after the final norm.
        mems: L + 1 tensors (B, S, C), the embedding's output and each block's, cut off from the gradient.
        past_key_values: The cache, if there is one.
        hidden_states: L + 1 tensors (B, T, C), the same places as mems, with gradient.
    """

    loss: Tensor | None = None
    last_hidden_states: Tensor | None = None
    logits: Tensor | None = None
    lm_logits: Tensor | None = None
    mems: list[Tensor] | None = None
    past_key_values: hf.Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def residual_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer whose product is added to the residual stream; new weights of it are smaller, nothing else.

    It is no class of its own, because tools that quantise take layers of torch's own class only.
    """
    layer = nn.Linear(inputs, outputs)
    layer.feeds_residual = True  # type: ignore[assignment]
    return layer


class SelfAttention(nn.Module):
    """Attention with as many heads as its weights have rows for: a tensor-parallel part has fewer than the config."""

    def __init__(self, config: GLMConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index, self.width = layer_index, config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = residual_linear(config.hidden_size, config.hidden_size)
        self.attention_dropout = config.attention_dropout_prob
        self.output_dropout = nn.Dropout(config.output_dropout_prob)
        self.attend = ATTENTION[config._attn_implementation or "sdpa"]

    def forward(
        self, x: Tensor, tokens: int, mask: Mask, cache: hf.Cache | None, prefix: Prefix | None = None
    ) -> Tensor:
        """Attends from the last `tokens` columns of x (B, M+T or T, C) to all of them and to the cache."""
        parts = self.query_key_value(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.width)).transpose(1, 2) for part in parts)  # (B, H, M+T, D) each
        q = q[:, :, -tokens:]  # (B, H, T, D)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_index)  # (B, H, S, D)
        if prefix is not None:  # in front of all tokens, never in the cache
            k = torch.cat((prefix[0].to(k.dtype), k), dim=2)  # (B, H, P+S, D)
            v = torch.cat((prefix[1].to(v.dtype), v), dim=2)
        seen, silent = mask
        if silent is not None:
            q = q.masked_fill(silent, 0.0)
        dropout = self.attention_dropout if self.training else 0.0
        return self.output_dropout(self.dense(self.attend(q, k, v, seen, dropout).flatten(2)))


class MLP(nn.Module):
    """`W2 gelu(W1 x)`, with the GELU that the config names."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = residual_linear(config.intermediate_size, config.hidden_size)
        self.approximation = "tanh" if config.gelu == "tanh" else "none"
        self.dropout = nn.Dropout(config.output_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate=self.approximation)))


class Block(hf.GradientCheckpointingLayer):
    """One transformer block; under activation checkpointing its forward is recomputed in the backward pass."""

    def __init__(self, config: GLMConfig, layer_index: int) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, eps=1e-5)
        self.attention = SelfAttention(config, layer_index)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, eps=1e-5)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, mask: Mask, memory: Tensor | None, cache: hf.Cache | None, prefix: Prefix | None
    ) -> Tensor:
        """Args: x (B, T, C), memory (B, M, C) of the same place in the residual stream, or None."""
        seen = x if memory is None else torch.cat((memory.to(x.dtype), x), dim=1)
        x = x + self.attention(self.input_layernorm(seen), x.shape[1], mask, cache, prefix)
        return x + self.mlp(self.post_attention_layernorm(x))


class Stack(nn.Module):
    """The position tables, the blocks and the last norm under their official names."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        rows = config.max_sequence_length + 1
        self.position_embeddings = nn.Embedding(rows, config.hidden_size)
        self.block_position_embeddings = nn.Embedding(rows, config.hidden_size)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout_prob)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.final_layernorm = LayerNorm(config.hidden_size, eps=1e-5)

    def forward(
        self,
        words: Tensor,
        position_ids: Tensor,
        mask: Mask,
        mems: Sequence[Tensor] | None,
        cache: hf.Cache | None,
        prefixes: Sequence[Prefix | None],
        keeps_states: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the normed output (B, T, C) and, if kept, L + 1 residual streams (B, T, C)."""
        where, how_far = position_ids.unbind(1)  # (B or 1, T) each
        x = words + self.position_embeddings(where) + self.block_position_embeddings(how_far)
        x = self.embedding_dropout(x)
        states = [x] if keeps_states else []
        for index, (block, prefix) in enumerate(zip(self.layers, prefixes)):
            x = block(x, mask, None if mems is None else mems[index], cache, prefix)
            if keeps_states:
                states.append(x)
        return self.final_layernorm(x), states


class GLMPreTrainedModel(hf.PreTrainedModel):
    """What transformers needs to know about the network."""

    config_class = GLMConfig
    config: GLMConfig
    base_model_prefix = "glm"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _skip_keys_device_placement = ("past_key_values", "mems")
    _supports_sdpa = True

    def __init__(self, config: GLMConfig) -> None:
        config.check()
        super().__init__(config)

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range), and less by `sqrt(2 L)` where a product feeds the residual; biases zero.

        transformers asks only for modules that have parameters of their own, so a block cannot do this for its parts.
        """
        if isinstance(module, PrefixPart):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            less = (2 * self.config.num_layers) ** 0.5 if hasattr(module, "feeds_residual") else 1.0
            nn.init.normal_(module.weight, std=self.config.initializer_range / less)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class GLMModel(PrefixTuned, GLMPreTrainedModel):
    """The network. With `output_predict` in the config it gives logits too; the plain release is of this class."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer = Stack(config)
        if config.pre_seq_len:
            self.prefix_encoder = self.new_prefix()
            self.freeze_all_but_prefix()
        self.gradient_checkpointing = False
        self.post_init()

    def new_prefix(self) -> PrefixEncoder:
        """A prefix encoder with new values, of the same form as ChatGLM-6B's."""
        config = self.config
        assert config.pre_seq_len is not None
        projection = (config.hidden_size, config.hidden_size) if config.prefix_projection else None
        return PrefixEncoder(
            config.pre_seq_len, config.num_layers, config.num_attention_heads, config.head_dim, projection
        )

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | int | None = None,
        mems: Sequence[Tensor] | None = None,
        past_key_values: hf.Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_predict: bool | None = None,
        **_: Any,
    ) -> GLMOutput | tuple[Any, ...]:
        """Runs the blocks.

        Args:
            input_ids: (B, T) int64.
            position_ids: (B, 2, T). None: counted on from the cache, 0 in the second row. Beside mems it counts from 0,
                as in the official code, so there it should be given.
            attention_mask: Known by its number of elements, as in the official code. One, or B: the length of part A in
                each row, see the module; what was before this call is seen by all. Else (B, S): 1 where a column may be
                seen, by all tokens, without causality. Else (B or 1, 1, T, S): 1 where a token sees a column. None:
                causal. Columns beyond S are cut off on the left.
            mems: Earlier tokens, L + 1 tensors (B, M, C) as returned.
            past_key_values: Earlier tokens, or room for these; it is extended in place.
            use_cache: True makes a cache if none is given; False returns neither cache nor mems. None: mems are
                returned unless a cache is given.
            output_hidden_states: Whether to return the embeddings and every block's output, before the norm.
            return_dict: False returns a tuple.
            output_predict: Whether to compute logits. None: as the config says.

        Returns:
            last_hidden_states, logits, mems or past_key_values, hidden_states.

        Raises:
            UsageError: A mask or positions of no known form, or both mems and a cache.
        """
        if mems is not None and past_key_values is not None:
            raise UsageError("both mems and past_key_values are given: expected one", hint="leave out mems")
        checkpointing = self.gradient_checkpointing and self.training  # which runs blocks twice, a cache only once
        if use_cache and past_key_values is None and mems is None and not checkpointing:
            past_key_values = hf.DynamicCache(config=self.config)
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            where = torch.arange(cached, cached + input_ids.shape[1], device=input_ids.device)
            position_ids = torch.stack((where, torch.zeros_like(where)))[None]
        _check_positions(position_ids, input_ids, self.config.max_sequence_length)
        returns_mems = use_cache is not False and past_key_values is None
        keeps_states = either(output_hidden_states, self.config.output_hidden_states)
        words = self.word_embeddings(input_ids)
        hidden, states = self.transformer(
            words,
            position_ids,
            self._mask(input_ids, attention_mask, mems[0].shape[1] if mems is not None else cached, past_key_values),
            mems,
            past_key_values,
            self.prefixes(len(words), words.dtype),
            keeps_states or returns_mems,
        )
        predicts = self.config.output_predict if output_predict is None else output_predict
        output = GLMOutput(
            last_hidden_states=hidden,
            logits=self.logits(hidden) if predicts else None,
            mems=_extended(mems, states) if returns_mems else None,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if keeps_states else None,
        )
        return output if either(return_dict, self.config.return_dict) else output.to_tuple()

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all vocabulary rows, (..., V), for normed outputs (..., C)."""
        return F.linear(hidden, self.word_embeddings.weight)

    def _mask(self, ids: Tensor, given: Tensor | int | None, memory: int, cache: hf.Cache | None) -> Mask:
        """See `forward` for what is taken; columns of a cache that are not filled yet are never seen."""
        B, T = ids.shape
        columns, prefix = memory + T, self.config.pre_seq_len or 0
        room = cache.get_mask_sizes(T, 0)[0] if cache is not None else columns
        if given is None and room == T and not prefix:
            return None, None
        given = torch.as_tensor(0 if given is None else given, device=ids.device)
        if given.numel() in (1, B):
            seen = _seen_from_lengths(given, T, memory)
        else:
            seen = given[:, None, None] if given.ndim == 2 else given
            if seen.ndim != 4 or seen.shape[2] not in (1, T) or seen.shape[3] < columns:
                raise UsageError(
                    f"attention_mask has the shape {tuple(given.shape)}: expected one length of part A for each of {B}"
                    f" rows, or ({B}, {columns}), or ({B}, 1, {T}, {columns})"
                )
            seen = (seen[..., -columns:] == 1).expand(-1, -1, T, -1)
        seen = F.pad(F.pad(seen, (0, room - columns)), (prefix, 0), value=True)  # everybody sees the prefix
        eager = self.config._attn_implementation == "eager"
        return mask_for_attention(seen, torch.float32, eager)


def _check_positions(position_ids: Tensor, ids: Tensor, largest: int) -> None:
    """Refuses positions of another form, and those that the tables have no row for: a GPU would die of these."""
    if position_ids.ndim != 3 or position_ids.shape[1:] != (2, ids.shape[1]):
        raise UsageError(
            f"position_ids has the shape {tuple(position_ids.shape)}: expected ({ids.shape[0]}, 2, {ids.shape[1]})"
        )
    if not position_ids.numel() or position_ids.is_meta:
        return
    smallest, found = torch.stack(position_ids.aminmax()).tolist()
    if smallest < 0:
        raise UsageError(f"position_ids has {smallest}: expected positions from 0")
    if found > largest:
        raise UsageError(
            f"the input has a token at position {found}: expected at most {largest}, the model's max_sequence_length",
            hint="shorten the text, or fill the blank with fewer tokens",
        )


def _seen_from_lengths(lengths: Tensor, T: int, memory: int) -> Tensor:
    """Part A sees itself, part B also what lies behind it; memory is seen by all. (B or 1, 1, T, S) bool."""
    places = torch.arange(T, device=lengths.device)
    seen = (places <= places[:, None]) | (places < lengths.reshape(-1, 1, 1, 1))
    return F.pad(seen, (memory, 0), value=True)


def _extended(mems: Sequence[Tensor] | None, states: Sequence[Tensor]) -> list[Tensor]:
    """Memory with the new tokens behind it; no gradient goes through it."""
    new = [state.detach() for state in states]
    return new if mems is None else [torch.cat((old.to(now.dtype), now), dim=1) for old, now in zip(mems, new)]
