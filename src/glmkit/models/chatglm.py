"""ChatGLM-6B, the first generation: one network, read top-down.

    ids (B, T)
     | word_embeddings                               x = E[ids]
     |
     +-----------------+   block, num_layers times; alpha = sqrt(56)
     | input_layernorm |   a = LN(x)
     | attention       |   q, k, v of each head side by side in one product; half of each head turns by each position
     +--------(+)------+   h = alpha * a + attention(a)         the norm's output is skipped on, not x
     | post_attention_ |
     | layernorm, mlp  |   m = LN(h);  W2 gelu(W1 m)
     +--------(+)------+   x = alpha * m + mlp(m)
     |
     | final_layernorm
     | lm_head                                       logits = E x   (one matrix with the embedding)

Letters: `B` batch, `T` new tokens, `S` all keys, `P` prefix columns, `H` heads, `D` head width, `C` hidden, `F` inner,
`V` vocabulary rows.

A row is a question, [gMASK] (or a text with [MASK] in it), `<sop>`, the answer. What stands in front of `<sop>` sees
all of itself; see `prefix_lm`. Each token has two positions: its place, which for the answer is the mask token's, and
how far into the answer it is. In the 1-D mode there is the first alone.

Modules and parameters carry the names of the official checkpoints, which store the one matrix twice.

Source: modeling_chatglm.py of ChatGLM-6B (2023-09-04). alpha is sqrt(2 * 28) for any number of layers there, because
the block is not told how many there are. What differs on purpose: tensors are batch-first; rotary angles are computed
in float32 (from frequencies rounded to float16, as officially); scores are scaled once, where the official code divides
the queries by the layer's number and multiplies by it again; the loss stays in float32; tokens after the prompt count
on in the 1-D mode behind [gMASK] as they do in the prompt, where the official `generate` stays at the mask.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glmkit import hf
from glmkit.errors import UsageError
from glmkit.models.chatglm_config import ChatGLMConfig
from glmkit.models.language_model import LanguageModelHead, either
from glmkit.models.layers import ATTENTION, LayerNorm, rotate_halves
from glmkit.models.prefix_encoder import Prefix, PrefixEncoder, PrefixPart, PrefixTuned
from glmkit.models.prefix_lm import (
    PrefixLayout,
    attention_mask,
    blocked_so_far,
    context_length,
    mask_position,
    one_row_positions,
    positions_so_far,
    two_row_positions,
    visible,
)

_ALPHA = 56**0.5

Rotary = list[tuple[Tensor, Tensor]]  # cos and sin for each row of positions, (B, T, D/4); for a single one (B, T, D/2)
Mask = tuple[Tensor | None, Tensor | None]  # what `prefix_lm.attention_mask` gives


class SelfAttention(nn.Module):
    """Attention whose heads are divided between the rows of positions."""

    def __init__(self, config: ChatGLMConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index, self.width = layer_index, config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.attend = ATTENTION[config._attn_implementation or "sdpa"]

    def forward(self, x: Tensor, mask: Mask, rotary: Rotary, cache: hf.Cache | None, prefix: Prefix | None) -> Tensor:
        q, k, v = self.query_key_value(x).unflatten(-1, (-1, 3 * self.width)).chunk(3, dim=-1)  # (B, T, H, D) each
        q, k = _rotate(q, rotary).transpose(1, 2), _rotate(k, rotary).transpose(1, 2)  # (B, H, T, D)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_index)  # (B, H, S, D)
        if prefix is not None:  # in front of all tokens, never rotated, never in the cache
            k = torch.cat((prefix[0].to(k.dtype), k), dim=2)  # (B, H, P+S, D)
            v = torch.cat((prefix[1].to(v.dtype), v), dim=2)
        seen, silent = mask
        if silent is not None:
            q = q.masked_fill(silent, 0)
        return self.dense(self.attend(q, k, v, seen).flatten(2))


def _rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turns each part of the heads by its row of positions."""
    parts = x.chunk(len(rotary), dim=-1)
    return torch.cat([rotate_halves(part, cos, sin) for part, (cos, sin) in zip(parts, rotary)], dim=-1)


class MLP(nn.Module):
    """`W2 gelu(W1 x)`, gelu by its tanh approximation."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Block(hf.GradientCheckpointingLayer):
    """One transformer block; under activation checkpointing its forward is recomputed in the backward pass."""

    def __init__(self, config: ChatGLMConfig, layer_index: int) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = SelfAttention(config, layer_index)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Mask, rotary: Rotary, cache: hf.Cache | None, prefix: Prefix | None) -> Tensor:
        a = self.input_layernorm(x)
        m = self.post_attention_layernorm(_ALPHA * a + self.attention(a, mask, rotary, cache, prefix))
        return _ALPHA * m + self.mlp(m)


class ChatGLMPreTrainedModel(hf.PreTrainedModel):
    """What transformers needs to know about the network."""

    config_class = ChatGLMConfig
    config: ChatGLMConfig
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _skip_keys_device_placement = ("past_key_values",)
    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.inv_freq",)  # a constant that old checkpoints store
    _supports_sdpa = True

    def __init__(self, config: ChatGLMConfig) -> None:
        config.check()
        super().__init__(config)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PrefixPart):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class ChatGLMModel(PrefixTuned, ChatGLMPreTrainedModel):
    """The network up to the final norm."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.final_layernorm = LayerNorm(config.hidden_size, config.layernorm_epsilon)
        if config.pre_seq_len:
            self.prefix_encoder = self.new_prefix()
            self.freeze_all_but_prefix()
        self.gradient_checkpointing = False
        self.post_init()

    def new_prefix(self) -> PrefixEncoder:
        """A prefix encoder with new values; projected, its table is as wide as the model."""
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
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
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
            position_ids: (B, 2, T), in the 1-D mode (B, T). None: worked out from the ids, padding included.
            attention_mask: (B, 1, T, S) bool, True where attention is BLOCKED, as in the official code. None: worked
                out from the ids. Masks of other kinds are not looked at, as in the official code: with padding on the
                left give the tokenizer's mask.
            past_key_values: Keys and values of earlier tokens; it is extended in place. Needs position_ids.
            inputs_embeds: (B, T, C) instead of the embeddings of input_ids, which are needed all the same where mask or
                positions are worked out.
            use_cache: Whether to make a cache if none is given. None: the config's choice outside training.
            output_hidden_states: Whether to return the embeddings and every block's output, the last AFTER the norm.
            return_dict: False returns a tuple.

        Returns:
            last_hidden_state (B, T, C) after the final norm, past_key_values, hidden_states (num_layers + 1 tensors).

        Raises:
            UsageError: A row has no mask token or no `<sop>`; or mask or positions do not fit the ids.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("give input_ids or inputs_embeds")
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        x = x.to(self.final_layernorm.weight.dtype)  # a packed table may give another one
        checkpointing = self.gradient_checkpointing and self.training
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if past_key_values is None and use_cache and not checkpointing:
            past_key_values = hf.DynamicCache(config=self.config)
        prefixes = self.prefixes(x.shape[0], x.dtype)
        seen, position_ids = self._seen_and_positions(input_ids, x, attention_mask, position_ids, past_key_values)
        mask = self._mask(seen, x.dtype)
        rotary = self.rotary(position_ids, x.dtype)
        keeps_states = either(output_hidden_states, self.config.output_hidden_states)
        hidden_states = [x] if keeps_states else []
        for block, prefix in zip(self.layers, prefixes):
            x = block(x, mask, rotary, past_key_values, prefix)
            if keeps_states:
                hidden_states.append(x)
        x = self.final_layernorm(x)
        output = hf.BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*hidden_states[:-1], x) if keeps_states else None,
        )
        return output if either(return_dict, self.config.return_dict) else output.to_tuple()

    def _seen_and_positions(
        self, ids: Tensor | None, x: Tensor, blocked: Tensor | None, positions: Tensor | None, cache: hf.Cache | None
    ) -> tuple[Tensor, Tensor]:
        """What may be seen, (B, 1, T, S) bool, and the positions; worked out from the ids where it is not given."""
        B, T, device = x.shape[0], x.shape[1], x.device
        past = int(cache.get_seq_length()) if cache is not None else 0
        if past and positions is None:
            raise UsageError(
                "tokens behind a cache need position_ids: where they belong stands in the prompt, which is not here",
                hint="use generate or glmkit.engine, which keep count",
            )
        if _is_official_mask(blocked):
            _check_shape("attention_mask", blocked, (B, 1, T, past + T))
            seen = ~blocked
        elif past:
            seen = torch.ones(B, 1, T, past + T, dtype=torch.bool, device=device).tril(past)
        else:
            columns = torch.arange(T, device=device)
            seen = visible(columns, columns, context_length(self._needed(ids), self._sop), columns.new_zeros(B))
        if positions is None:
            positions = self.positions(self._needed(ids))
        _check_shape("position_ids", positions, (B, 2, T) if self.config.position_encoding_2d else (B, T))
        keys = past + T if cache is None else cache.get_mask_sizes(T, 0)[0]
        return F.pad(seen, (0, keys - past - T)), positions  # some caches are wider than what is in them

    @staticmethod
    def _needed(ids: Tensor | None) -> Tensor:
        if ids is None:
            raise UsageError("inputs_embeds without attention_mask and position_ids", hint="give both, or input_ids")
        return ids

    @property
    def _sop(self) -> int:
        assert self.config.bos_token_id is not None
        return self.config.bos_token_id

    @property
    def mask_groups(self) -> tuple[tuple[int], tuple[int]]:
        """Which mask token an answer belongs to: the model takes [gMASK] first, the tokenizer [MASK]."""
        return (self.config.gmask_token_id,), (self.config.mask_token_id,)

    def positions(self, ids: Tensor) -> Tensor:
        """Positions of whole rows, padding counted, as the official model does for ids alone.

        Args:
            ids: (B, S) int64, with mask token and `<sop>` in every row.

        Returns:
            (B, 2, S), in the 1-D mode (B, S).

        Raises:
            UsageError: A row has no mask token or no `<sop>`.
        """
        columns, pads = torch.arange(ids.shape[1], device=ids.device), ids.new_zeros(len(ids))
        context, mask = context_length(ids, self._sop), mask_position(ids, self.mask_groups)
        if self.config.position_encoding_2d:
            return two_row_positions(columns, context, mask, pads)
        counts_on = ids.gather(1, mask[:, None])[:, 0] == self.config.gmask_token_id
        return one_row_positions(columns, context, mask, pads, counts_on)

    def _mask(self, seen: Tensor, dtype: torch.dtype) -> Mask:
        if self.config.pre_seq_len:  # everybody sees the prefix
            seen = torch.cat((seen.new_ones((*seen.shape[:3], self.config.pre_seq_len)), seen), dim=-1)
        return attention_mask(seen, dtype, self.config._attn_implementation == "eager")

    def rotary(self, position_ids: Tensor, dtype: torch.dtype) -> Rotary:
        """Angles of each row of positions, from frequencies that were rounded to float16 when the model was made."""
        rows = position_ids.unbind(1) if self.config.position_encoding_2d else (position_ids,)
        rotated = self.config.head_dim // len(rows)
        exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device=position_ids.device) / rotated
        frequencies = (1.0 / 10_000**exponents).half().float()
        angles = [row.float().unsqueeze(-1) * frequencies for row in rows]  # (B, T, rotated/2)
        return [(angle.cos().to(dtype), angle.sin().to(dtype)) for angle in angles]


class ChatGLMForCausalLM(LanguageModelHead, ChatGLMPreTrainedModel, hf.GenerationMixin):
    """The language model. `chat`, `stream_chat` and `quantize` are joined to it in glmkit.registration."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.pre_seq_len:
            self.lm_head.requires_grad_(False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) after the final norm -> (..., V)."""
        return self.lm_head(hidden)

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
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
            (others): As in `ChatGLMModel.forward`.

        Returns:
            loss (float32 scalar), logits (B, T or kept, V), past_key_values, hidden_states.
        """
        output = self.transformer(
            input_ids,
            position_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            return_dict=True,
        )
        return self.logits_and_loss(output, labels, logits_to_keep, num_items_in_batch, return_dict)

    # --- decoding ---

    def input_layout(self, ids: Tensor, pads: Tensor) -> PrefixLayout:
        """Masks and positions for our own decode loop.

        Args:
            ids: Prompts padded on the left, (B, T) int64, each with mask token and `<sop>`.
            pads: Columns of padding of each row, (B,).

        Raises:
            UsageError: A row has no mask token or no `<sop>`.
        """
        counting = None if self.config.position_encoding_2d else (self.config.gmask_token_id,)
        groups = self.transformer.mask_groups
        return PrefixLayout(ids, pads, sop_id=self.transformer._sop, mask_ids=groups, counting_ids=counting)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """`generate` of transformers, with positions and masks that go on as in the official code.

        transformers lengthens `attention_mask` and `position_ids` in its own way after each token; so they travel as
        `prompt_mask` and `prompt_positions`, and `prepare_inputs_for_generation` lengthens them.

        Args:
            inputs: Prompts, (B, T) int64; also as `input_ids`.
            *args: See transformers.
            **kwargs: See transformers. attention_mask (B, 1, T, T) bool and position_ids as the tokenizer gives them;
                masks and positions of other kinds are not looked at, as in the official code.
        """
        mask, positions = kwargs.pop("attention_mask", None), kwargs.pop("position_ids", None)
        if _is_official_mask(mask):
            kwargs["prompt_mask"] = mask
        if positions is not None and positions.ndim == (3 if self.config.position_encoding_2d else 2):
            kwargs["prompt_positions"] = positions
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: hf.Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        prompt_positions: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The next call's arguments: the tokens that are not in the cache, with their positions and mask.

        Args:
            input_ids: All ids so far, (B, S).
            past_key_values: Their cache, filled up to some token.
            attention_mask: Like prompt_mask; those that transformers makes, which are of another kind, mean nothing.
            position_ids: Like prompt_positions, if there are two rows of them.
            prompt_mask: The tokenizer's mask for the prompt, (B, 1, T, T) bool, True = blocked.
            prompt_positions: The tokenizer's positions for the prompt, (B, 2, T), in the 1-D mode (B, T).
            use_cache: Whether the model extends a cache.
            **kwargs: What transformers counts for other models.
        """
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        S = input_ids.shape[1]
        if prompt_mask is None and _is_official_mask(attention_mask):
            prompt_mask = attention_mask
        if prompt_positions is None and position_ids is not None and position_ids.ndim == 3:
            prompt_positions = position_ids
        if prompt_positions is None:
            positions = self.transformer.positions(input_ids)
        else:
            positions = positions_so_far(prompt_positions, S)
        if prompt_mask is None:
            columns = torch.arange(S, device=input_ids.device)
            context = context_length(input_ids, self.transformer._sop)
            blocked = ~visible(columns[past:], columns, context, torch.zeros_like(context))
        else:
            blocked = blocked_so_far(prompt_mask, past, S)
        return {
            "input_ids": input_ids[:, past:],
            "position_ids": positions[..., past:],
            "attention_mask": blocked,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }

    # --- saving ---

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """`save_pretrained` of transformers, which would leave out the second name of the one table.

        The official files have both, and tools that convert them look for `lm_head.weight`.

        Args:
            save_directory: Where to.
            is_main_process: See transformers.
            state_dict: What to save instead of the model's own state.
            *args: See transformers.
            **kwargs: See transformers.
        """
        state = dict(self.state_dict() if state_dict is None else state_dict)
        for copy in self._tied_weights_keys:
            if copy in state:
                state[copy] = state[copy].clone()
        super().save_pretrained(save_directory, is_main_process, state, *args, **kwargs)


def _is_official_mask(mask: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a mask is of the kind that the official code looks at; it drops integers."""
    return mask is not None and mask.dtype == torch.bool and mask.ndim == 4


def _check_shape(name: str, given: Tensor, wanted: tuple[int, ...]) -> None:
    """Dimensions of 1 may stand for all."""
    if given.ndim != len(wanted) or any(size not in (1, right) for size, right in zip(given.shape, wanted)):
        raise UsageError(
            f"{name} has the shape {list(given.shape)}, expected {list(wanted)}",
            hint="give what the tokenizer returns, or leave it out and give whole rows of ids",
        )
