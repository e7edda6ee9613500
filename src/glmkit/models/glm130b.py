"""GLM-130B: one network, read top-down.

    ids (B, T)
     | word_embeddings                               x = E[ids]
     |
     +-----------------+   block, num_layers times; alpha = sqrt(2 * num_layers)
     | input_layernorm |   a = LN(x)
     | attention       |   q, k, v of each head side by side in one product; rotary on the whole head
     +--------(+)------+   y = alpha * a + attention(a)         the norm's output is skipped on, not x
     | post_attention_ |
     | layernorm, mlp  |   u = LN(y);  W2 (value * gelu(gate)), value and gate in one product (gate last)
     +--------(+)------+   x = alpha * u + mlp(u)
     |
     | final_layernorm
     | word_embeddings again                         logits = E x

Letters: `B` batch, `T` new tokens, `S` all keys, `H` heads, `D` head width, `C` hidden, `F` inner, `V` vocabulary rows.

The model fills blanks. A row is a text with [MASK], [sMASK] or [gMASK] in it, then `sop`, then the filling: everything
in front of sop sees all of itself, sop and the filling see it and what they have behind them. For [MASK] and [sMASK]
sop and the filling all stand at the position of the mask; for [gMASK] positions just go on.

Modules and parameters carry the names of the official checkpoint, so loading and saving rename nothing; output and
embedding are one matrix.

Source: THUDM/GLM-130B and its model in SwissArmyTransformer 0.4.12; DeepNorm: Wang et al. 2022 (arXiv:2203.00555).
What differs on purpose: tensors are batch-first, the loss stays in float32, and scores are scaled once: the official
code divides queries by the layer's number and multiplies the scores by it again, against overflow in float16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glmkit import hf
from glmkit.errors import UsageError
from glmkit.models import prefix_lm
from glmkit.models.glm130b_config import GLM130BConfig
from glmkit.models.language_model import LanguageModelHead, either
from glmkit.models.layers import ATTENTION, rotary_angles, rotate_halves
from glmkit.models.prefix_lm import PrefixLayout

Rotary = tuple[Tensor, Tensor]  # cos and sin, each (B, T, D/2)
Mask = tuple[Tensor | None, Tensor | None]  # what `ATTENTION` takes; (B, 1, T, 1) True where a row sees nothing


class SelfAttention(nn.Module):
    """Attention with as many heads as its weights have rows for: a tensor-parallel part has fewer than the config."""

    def __init__(self, config: GLM130BConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index, self.width = layer_index, config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.query_key_value.matrices, self.query_key_value.head_width = 3, self.width  # type: ignore[assignment]
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.attend = ATTENTION[config._attn_implementation or "sdpa"]

    def forward(self, x: Tensor, mask: Mask, rotary: Rotary, cache: hf.Cache | None) -> Tensor:
        q, k, v = self.query_key_value(x).unflatten(-1, (-1, 3 * self.width)).chunk(3, dim=-1)  # (B, T, H, D) each
        q = rotate_halves(q, *rotary).transpose(1, 2)  # (B, H, T, D)
        k = rotate_halves(k, *rotary).transpose(1, 2)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_index)  # (B, H, S, D)
        seen, silent = mask
        if silent is not None:  # the official mask is a finite number, so a row that sees nothing sees all alike
            q = q.masked_fill(silent, 0)
        return self.dense(self.attend(q, k, v, seen).flatten(2))


class MLP(nn.Module):
    """`W2 (value * gelu(gate))`, value and gate packed in that order in `dense_h_to_4h`; gelu by the error function."""

    def __init__(self, config: GLM130BConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.inner_hidden_size)
        self.dense_h_to_4h.matrices = 2  # type: ignore[assignment]
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.dense_h_to_4h(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.dense_4h_to_h(value * F.gelu(gate))


class Block(hf.GradientCheckpointingLayer):
    """One transformer block; under activation checkpointing its forward is recomputed in the backward pass."""

    def __init__(self, config: GLM130BConfig, layer_index: int) -> None:
        super().__init__()
        self.alpha = config.residual_scale
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = SelfAttention(config, layer_index)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Mask, rotary: Rotary, cache: hf.Cache | None) -> Tensor:
        a = self.input_layernorm(x)
        u = self.post_attention_layernorm(self.alpha * a + self.attention(a, mask, rotary, cache))
        return self.alpha * u + self.mlp(u)


class GLM130BPreTrainedModel(hf.PreTrainedModel):
    """What transformers needs to know about the network."""

    config_class = GLM130BConfig
    config: GLM130BConfig
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _skip_keys_device_placement = ("past_key_values",)
    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.inv_freq", r"^mixins\.")  # constants that checkpoints store
    _supports_sdpa = True

    def __init__(self, config: GLM130BConfig) -> None:
        config.check()
        super().__init__(config)

    def input_layout(self, ids: Tensor, pads: Tensor) -> PrefixLayout:
        """Masks and positions of prompts and answers, for whoever feeds the model.

        Args:
            ids: (B, T) int64, padded on the left, each row with a mask token and sop.
            pads: Columns of padding, (B,).

        Returns:
            The layout; the answer belongs to the first mask token of a row, of whatever kind.
        """
        config = self.config
        masks = (config.mask_token_id, config.smask_token_id, config.gmask_token_id)
        sop = config.bos_token_id
        assert sop is not None
        return PrefixLayout(ids, pads, sop_id=sop, mask_ids=[masks], counting_ids=[config.gmask_token_id])

    def _init_weights(self, module: nn.Module) -> None:
        """DeepNorm: Xavier, with a gain of `(2L)^-1/2` for all products but queries and keys."""
        gain = 1 / self.config.residual_scale
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            rows, columns = module.weight.shape  # of several matrices, if the linear has been told so
            matrices, head_width = getattr(module, "matrices", 1), getattr(module, "head_width", None)
            std = (2 / (rows / matrices + columns)) ** 0.5
            nn.init.normal_(module.weight, std=std if head_width else gain * std)
            nn.init.zeros_(module.bias)
            if head_width and not getattr(module.weight, "_is_hf_initialized", False):
                module.weight.data.unflatten(0, (-1, 3, head_width))[:, 2].mul_(gain)  # the values


class GLM130BModel(GLM130BPreTrainedModel):
    """The network up to the final norm."""

    def __init__(self, config: GLM130BConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

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
            attention_mask: (B, 1, T, S) bool, True where attention is BLOCKED, as in the official code; or (B, S), 1
                for tokens and 0 for padding; or None.
            position_ids: (B, T). Where mask or positions are left out they are made from the ids.
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
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        checkpointing = self.gradient_checkpointing and self.training
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if past_key_values is None and use_cache and not checkpointing:
            past_key_values = hf.DynamicCache(config=self.config)
        blocked, position_ids = self.mask_and_positions(input_ids, attention_mask, position_ids, past_key_values)
        eager = self.config._attn_implementation == "eager"
        mask = prefix_lm.attention_mask(~blocked.to(x.device), torch.float32, eager)
        rotary = self.rotary(position_ids, x.dtype)
        keeps_states = either(output_hidden_states, self.config.output_hidden_states)
        hidden_states = [x] if keeps_states else []
        for block in self.layers:
            x = block(x, mask, rotary, past_key_values)
            if keeps_states:
                hidden_states.append(x)
        output = hf.BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(x),
            past_key_values=past_key_values,
            hidden_states=tuple(hidden_states) or None,
        )
        return output if either(return_dict, self.config.return_dict) else output.to_tuple()

    def mask_and_positions(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: hf.Cache | None,
    ) -> tuple[Tensor, Tensor]:
        """What is not given is made from the ids. Returns (B, 1, T, S) bool, True = blocked, and (B, T).

        Raises:
            UsageError: The ids do not say it: they have no mask or sop, or follow others that are in the cache.
        """
        whole = attention_mask is not None and attention_mask.ndim == 4
        if not whole or position_ids is None:
            if input_ids is None or (cache is not None and cache.get_seq_length()):
                raise UsageError(
                    "mask and positions depend on the whole prompt, and here is only a part of it",
                    hint="give attention_mask (B, 1, T, S) and position_ids (B, T), as input_layout makes them",
                )
            pads = None if whole or attention_mask is None else (attention_mask.cumsum(1) == 0).sum(1)
            layout = self.input_layout(input_ids, input_ids.new_zeros(len(input_ids)) if pads is None else pads)
            made = layout.prompt(0, input_ids.shape[1])
            position_ids = made["position_ids"] if position_ids is None else position_ids
            if not whole:
                padding = None if attention_mask is None else attention_mask[:, None, None] == 0  # (B, 1, 1, S)
                attention_mask = made["attention_mask"] if padding is None else made["attention_mask"] | padding
        assert attention_mask is not None
        return attention_mask.bool(), position_ids

    def rotary(self, position_ids: Tensor, dtype: torch.dtype) -> Rotary:
        """The whole head rotates."""
        cos, sin = rotary_angles(position_ids, self.config.head_dim, 10_000.0)
        return cos.to(dtype), sin.to(dtype)


class GLM130BForCausalLM(LanguageModelHead, GLM130BPreTrainedModel, hf.GenerationMixin):
    """The language model; its output layer is the embedding."""

    def __init__(self, config: GLM130BConfig) -> None:
        super().__init__(config)
        self.transformer = GLM130BModel(config)
        self.post_init()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """For `generate`: mask and positions follow from the ids, whatever counted positions it offers."""
        inputs = super().prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)
        pads = input_ids.new_zeros(len(input_ids))
        if attention_mask is not None:
            pads = (attention_mask.cumsum(1) == 0).sum(1)
        columns = input_ids.shape[1]
        start = 0 if next_sequence_length is None else columns - next_sequence_length
        return {**inputs, **self.input_layout(input_ids, pads).prompt(start, columns)}

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) after the final norm -> (..., V)."""
        return F.linear(hidden, self.transformer.word_embeddings.weight)

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
            (others): As in `GLM130BModel.forward`.

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
