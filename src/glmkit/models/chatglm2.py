"""ChatGLM2-6B, ChatGLM2-6B-32K, ChatGLM3-6B and GLM-4-9B: one network, read top-down.

    ids (B, T)
     | embedding                                     x = E[ids]
     |
     +-----------------+   block, num_layers times
     | input_layernorm |   RMSNorm
     | self_attention  |   q, k, v in one product, H query heads, K key/value heads; rotary on half of each head
     +--------(+)------+   x = x + attention
     | post_attention_ |
     | layernorm, mlp  |   silu(gate) * up, gate and up in one product (gate first)
     +--------(+)------+   x = x + mlp
     |
     | final_layernorm
     | output_layer                                  logits = W x   (not tied to E)

Letters: `B` batch, `T` new tokens, `S` all keys, `P` prefix columns, `H` query heads, `K` key/value heads, `D` head
width (`kv_channels`), `C` hidden, `F` inner (`ffn_hidden_size`), `V` vocabulary rows.

Modules and parameters carry the names of the official checkpoints, so loading and saving rename nothing.

Source: modeling_chatglm.py of ChatGLM2-6B (2023-09-08), ChatGLM2-6B-32K (2023-08-24) and ChatGLM3-6B (2023-12-07).
What differs on purpose: tensors are batch-first, rotary angles are always computed in float32 (the generation 2 code
rounds positions above 2,048 in float16), the loss stays in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glmkit import hf
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.language_model import LanguageModelHead, either
from glmkit.models.layers import ATTENTION, RMSNorm, rotary_angles, rotate_pairs
from glmkit.models.prefix_encoder import Prefix, PrefixEncoder, PrefixPart, PrefixTuned

Rotary = tuple[Tensor, Tensor]  # cos and sin, each (B, T, D/4)


class SelfAttention(nn.Module):
    """Grouped-query attention with half-rotated heads, as many as the weights have: a part of a model has fewer."""

    def __init__(self, config: ChatGLM2Config, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.width = config.kv_channels
        queries, keys = config.num_attention_heads * self.width, config.multi_query_group_num * self.width
        bias = config.add_bias_linear
        self.query_key_value = nn.Linear(config.hidden_size, queries + 2 * keys, bias=bias or config.add_qkv_bias)
        self.dense = nn.Linear(queries, config.hidden_size, bias=bias)
        self.attend = ATTENTION[config._attn_implementation or "sdpa"]

    def forward(
        self, x: Tensor, mask: Tensor | None, rotary: Rotary, cache: hf.Cache | None, prefix: Prefix | None
    ) -> Tensor:
        packed, queries = self.query_key_value(x), self.dense.in_features
        keys = (packed.shape[-1] - queries) // 2
        q, k, v = (part.unflatten(-1, (-1, self.width)) for part in packed.split((queries, keys, keys), dim=-1))
        q = rotate_pairs(q, *rotary).transpose(1, 2)  # (B, H, T, D)
        k = rotate_pairs(k, *rotary).transpose(1, 2)  # (B, K, T, D)
        v = v.transpose(1, 2)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_index)  # (B, K, S, D)
        if prefix is not None:  # in front of all tokens, never rotated, never in the cache
            k = torch.cat((prefix[0].to(k.dtype), k), dim=2)  # (B, K, P+S, D)
            v = torch.cat((prefix[1].to(v.dtype), v), dim=2)
        return self.dense(self.attend(q, k, v, mask).flatten(2))


class MLP(nn.Module):
    """`W (silu(gate) * up)`, gate and up packed in that order in `dense_h_to_4h`."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=config.add_bias_linear)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.dense_4h_to_h(F.silu(gate) * up)


class Block(hf.GradientCheckpointingLayer):
    """One transformer block; under activation checkpointing its forward is recomputed in the backward pass."""

    def __init__(self, config: ChatGLM2Config, layer_index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config, layer_index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, mask: Tensor | None, rotary: Rotary, cache: hf.Cache | None, prefix: Prefix | None
    ) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x), mask, rotary, cache, prefix)
        return x + self.mlp(self.post_attention_layernorm(x))


class Embedding(nn.Module):
    """Holds the table under its official name."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class Encoder(nn.Module):
    """Holds the blocks and the last norm under their official names."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)


class ChatGLM2PreTrainedModel(hf.PreTrainedModel):
    """What transformers needs to know about the network."""

    config_class = ChatGLM2Config
    config: ChatGLM2Config
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _skip_keys_device_placement = ("past_key_values",)
    _keys_to_ignore_on_load_unexpected = (r"rotary_pos_emb\.inv_freq",)  # a constant that old checkpoints store
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def __init__(self, config: ChatGLM2Config) -> None:
        config.check()
        super().__init__(config)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PrefixPart):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


class ChatGLM2Model(PrefixTuned, ChatGLM2PreTrainedModel):
    """The network up to the final norm; it also holds `output_layer`, as the official class does."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.encoder = Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        if config.pre_seq_len:
            self.prefix_encoder = self.new_prefix()
            self.freeze_all_but_prefix()
        self.gradient_checkpointing = False
        self.post_init()

    def new_prefix(self) -> PrefixEncoder:
        """A prefix encoder with new values; projected, its table is as wide as a row of values."""
        config, heads, width = self.config, self.config.multi_query_group_num, self.config.kv_channels
        assert config.pre_seq_len is not None
        projection = (2 * config.num_layers * heads * width, config.hidden_size) if config.prefix_projection else None
        return PrefixEncoder(config.pre_seq_len, config.num_layers, heads, width, projection)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: hf.Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> hf.BaseModelOutputWithPast | tuple[Any, ...]:
        """Runs the blocks.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, S) 1 for tokens, 0 for padding. None: no padding. (B, 1, T, S) bool, True where a column
                is seen: taken as it is, and nothing else hides columns then.
            position_ids: (B, T). None: counted from the length of the cache, padding included.
            past_key_values: Keys and values of earlier tokens; it is extended in place.
            inputs_embeds: (B, T, C) instead of input_ids.
            use_cache: Whether to make a cache if none is given. None: the config's choice outside training.
            output_hidden_states: Whether to return the embeddings and every block's output, the last before the norm.
            return_dict: False returns a tuple.

        Returns:
            last_hidden_state (B, T, C) after the final norm, past_key_values, hidden_states (num_layers + 1 tensors).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embedding.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        checkpointing = self.gradient_checkpointing and self.training
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if past_key_values is None and use_cache and not checkpointing:
            past_key_values = hf.DynamicCache(config=self.config)
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(x.shape[1], device=x.device) + start).unsqueeze(0)
        prefixes = self.prefixes(x.shape[0], x.dtype)
        mask = self.attention_mask(x, attention_mask, past_key_values)
        rotary = self.rotary(position_ids, x.dtype)
        keeps_states = either(output_hidden_states, self.config.output_hidden_states)
        hidden_states = [x] if keeps_states else []
        for block, prefix in zip(self.encoder.layers, prefixes):
            x = block(x, mask, rotary, past_key_values, prefix)
            if keeps_states:
                hidden_states.append(x)
        output = hf.BaseModelOutputWithPast(
            last_hidden_state=self.encoder.final_layernorm(x),
            past_key_values=past_key_values,
            hidden_states=tuple(hidden_states) or None,
        )
        return output if either(return_dict, self.config.return_dict) else output.to_tuple()

    def rotary(self, position_ids: Tensor, dtype: torch.dtype) -> Rotary:
        """Half of each head rotates; `rope_ratio` stretches the positions or the base, as the config decides."""
        cos, sin = rotary_angles(position_ids, self.config.kv_channels // 2, *self.config.rotary_base_and_scale())
        return cos.to(dtype), sin.to(dtype)

    def attention_mask(self, x: Tensor, attention_mask: Tensor | None, cache: hf.Cache | None) -> Tensor | None:
        """Causal mask with padding; prefix columns in front are seen by all. None where plain causality is enough.

        Rows of padding in a first prefill see everything, as in the official code, so that no softmax is empty.
        """
        columns = self.config.pre_seq_len or 0
        mask = hf.create_causal_mask(self.config, x, attention_mask, cache, allow_is_causal_skip=columns == 0)
        if mask is None:
            return None
        if mask.dtype == torch.bool and self.config._attn_implementation == "eager":  # a mask of packed rows, as given
            blocked = torch.finfo(torch.float32).min
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, blocked)
        visible = 1 if mask.dtype == torch.bool else 0
        if columns:
            return torch.cat((mask.new_full((*mask.shape[:3], columns), visible), mask), dim=-1)  # (B, 1, T, P+S)
        if attention_mask is not None and attention_mask.ndim == 2 and (cache is None or not cache.get_seq_length()):
            padding = attention_mask[:, None, -x.shape[1] :, None] == 0  # (B, 1, T, 1)
            mask = mask.masked_fill(padding, visible)
        return mask


class ChatGLM2ForCausalLM(LanguageModelHead, ChatGLM2PreTrainedModel, hf.GenerationMixin):
    """The language model. `chat`, `stream_chat` and `quantize` are joined to it in glmkit.registration."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__(config)
        self.transformer = ChatGLM2Model(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.transformer.output_layer

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.transformer.output_layer = value

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) after the final norm -> (..., V)."""
        return self.transformer.output_layer(hidden)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: hf.Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> hf.CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and the loss if labels are given.

        Args:
            labels: (B, T), position t + 1 is the target of position t, -100 is no target.
            logits_to_keep: Number of last positions (0: all), or a 1-D tensor of positions, to compute logits for.
            num_items_in_batch: Divisor of the summed loss; None: the number of targets.
            (others): As in `ChatGLM2Model.forward`.

        Returns:
            loss (float32 scalar), logits (B, T or kept, V), past_key_values, hidden_states.
        """
        output = self.transformer(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            return_dict=True,
        )
        return self.logits_and_loss(output, labels, logits_to_keep, num_items_in_batch, return_dict)


class ChatGLM2ForSequenceClassification(ChatGLM2PreTrainedModel):
    """A linear head on the last position, so batches must be padded on the left.

    Source: ChatGLMForSequenceClassification of ChatGLM2-6B.
    """

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__(config)
        self.transformer = ChatGLM2Model(config)
        self.classifier_head = nn.Linear(config.hidden_size, config.num_labels)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: hf.Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> hf.SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Class logits (B, num_labels) and, with labels, the loss that `problem_type` or the labels' dtype ask for."""
        output = self.transformer(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier_head(self.dropout(output.last_hidden_state[:, -1])).float()
        result = hf.SequenceClassifierOutputWithPast(
            loss=None if labels is None else self._loss(logits, labels.to(logits.device)),
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )
        return result if either(return_dict, self.config.return_dict) else result.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind = self.config.problem_type
        if kind is None:
            integers = labels.dtype in (torch.int64, torch.int32)
            kind = "single_label_classification" if integers else "multi_label_classification"
            kind = "regression" if self.config.num_labels == 1 else kind
        if kind == "regression":
            return F.mse_loss(logits.squeeze(), labels.squeeze().float())
        if kind == "single_label_classification":
            return F.cross_entropy(logits, labels.view(-1).long())
        return F.binary_cross_entropy_with_logits(logits, labels.float())
