"""The way of the official code, in plain torch: what glmkit is measured against.

    every layer     keys and values of all tokens are joined to the new ones (torch.cat), a whole copy at each token
    ChatGLM2/3      keys and values are repeated for all query heads, then torch's fused attention
    ChatGLM-6B      scores by baddbmm, filled where blocked, softmax in float32, then bmm
    int8, int4      a whole weight is made of its codes, then F.linear
    at the end      logits of every position

It shares the tensors of a model of glmkit, so both fit into memory together. Activations are (T, B, C), as there.

Source: modeling_chatglm.py of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B, described in our own words. There `generate` of
ChatGLM2 and later asks for logits of the last position only, which `all_logits=False` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.models.layers import rotary_angles
from glmkit.quant.linear import QuantizedLinear, dequantize

Past = list[tuple[Tensor, Tensor]]  # keys and values of each layer, (S, B, K, D)


class OfficialWay:
    """A network that computes like the official code.

    Args:
        model: ChatGLM-6B or ChatGLM2 and later; its tensors are used, not copied, unless they are packed.
        all_logits: Whether logits of every position are computed, as a call of the official model does.
    """

    def __init__(self, model: Any, *, all_logits: bool = True) -> None:
        self.model, self.config, self.all_logits = model, model.config, all_logits
        self.first_generation = not isinstance(model, ChatGLM2ForCausalLM)
        self.linears = {id(one): _linear(one) for one in model.modules() if _has_weight(one)}

    @torch.inference_mode()
    def __call__(self, ids: Tensor, past: Past | None, positions: Tensor | None = None) -> tuple[Tensor, Past]:
        """Runs the network over new tokens.

        Args:
            ids: (B, T) int64.
            past: Of earlier tokens; None without any.
            positions: ChatGLM-6B: (B, 2, T). ChatGLM2 and later: (B, T); None: counted on.

        Returns:
            Logits (B, T, V), or (B, 1, V) without all_logits, and keys and values of all tokens.
        """
        start = past[0][0].shape[0] if past else 0
        x = self.model.get_input_embeddings()(ids).transpose(0, 1)  # (T, B, C)
        if positions is None:
            positions = torch.arange(start, start + ids.shape[1]).expand(ids.shape)
        network = self.model.transformer
        layers, norm = (
            (network.layers, network.final_layernorm)
            if self.first_generation
            else (network.encoder.layers, network.encoder.final_layernorm)
        )
        rotary = [(cos.transpose(0, 1), sin.transpose(0, 1)) for cos, sin in self._rotary(positions, x.dtype)]
        blocked = self._blocked(ids, past)
        block = self._first_block if self.first_generation else self._later_block
        new: Past = []
        for index, layer in enumerate(layers):
            x, pair = block(layer, x, rotary, past[index] if past else None, blocked)
            new.append(pair)
        x = norm(x)
        if not self.all_logits:
            x = x[-1:]
        logits = self._product(self.model.get_output_embeddings(), x)
        return logits.transpose(0, 1).contiguous(), new

    def random_past(self, rows: int, columns: int) -> Past:
        """Keys and values of a context that nobody has read.

        Args:
            rows: `B`.
            columns: `S`.
        """
        config = self.config
        shape = (columns, rows, config.num_key_value_heads, config.head_dim)
        numbers = torch.randn(shape).to(self.model.dtype)
        return [(numbers.clone(), numbers.clone()) for _ in range(config.num_layers)]

    # --- ChatGLM2 and later ---

    def _later_block(
        self, layer: Any, x: Tensor, rotary: list[tuple[Tensor, Tensor]], past: Any, blocked: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        config, attention = self.config, layer.self_attention
        heads, groups, width = config.num_attention_heads, config.multi_query_group_num, config.kv_channels
        mixed = self._product(attention.query_key_value, layer.input_layernorm(x))
        sizes = (heads * width, groups * width, groups * width)
        q, k, v = (part.unflatten(-1, (-1, width)) for part in mixed.split(sizes, dim=-1))  # (T, B, H or K, D)
        q, k = _turn_pairs(q, *rotary[0]), _turn_pairs(k, *rotary[0])
        if past is not None:
            k, v = torch.cat((past[0], k), dim=0), torch.cat((past[1], v), dim=0)
        pair = (k, v)
        k, v = (one.unsqueeze(-2).expand(-1, -1, -1, heads // groups, -1).contiguous().flatten(2, 3) for one in (k, v))
        q, k, v = (one.permute(1, 2, 0, 3) for one in (q, k, v))  # (B, H, T or S, D)
        whole = q.shape[2] == k.shape[2]
        seen = None if whole or blocked is None else ~blocked
        context = F.scaled_dot_product_attention(q, k, v, seen, is_causal=whole)
        x = x + self._product(attention.dense, context.permute(2, 0, 1, 3).flatten(2))
        gate, up = self._product(layer.mlp.dense_h_to_4h, layer.post_attention_layernorm(x)).chunk(2, dim=-1)
        return x + self._product(layer.mlp.dense_4h_to_h, F.silu(gate) * up), pair

    # --- the first generation ---

    def _first_block(
        self, layer: Any, x: Tensor, rotary: list[tuple[Tensor, Tensor]], past: Any, blocked: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        heads, alpha = self.config.num_attention_heads, 56**0.5
        width, scale = self.config.head_dim, float(layer.attention.layer_index + 1)
        a = layer.input_layernorm(x)
        mixed = self._product(layer.attention.query_key_value, a).unflatten(-1, (heads, 3 * width))
        q, k, v = mixed.chunk(3, dim=-1)  # (T, B, H, D)
        q, k = _turn_parts(q, rotary), _turn_parts(k, rotary)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=0), torch.cat((past[1], v), dim=0)
        pair = (k, v)
        B = q.shape[1]
        q, k, v = ((one / (width**0.5 * scale) if one is q else one).flatten(1, 2) for one in (q, k, v))  # (T, B*H, D)
        empty = torch.empty(q.shape[1], q.shape[0], k.shape[0], dtype=q.dtype)
        scores = torch.baddbmm(empty, q.transpose(0, 1), k.permute(1, 2, 0), beta=0.0).unflatten(0, (B, heads))
        if blocked is not None:
            scores = scores.masked_fill(blocked, -10000.0)
        weights = (scores.float() * scale).softmax(-1).to(v.dtype).flatten(0, 1)
        context = torch.bmm(weights, v.transpose(0, 1)).unflatten(0, (B, heads)).permute(2, 0, 1, 3).flatten(2)
        m = layer.post_attention_layernorm(a * alpha + self._product(layer.attention.dense, context))
        inner = F.gelu(self._product(layer.mlp.dense_h_to_4h, m), approximate="tanh")
        return m * alpha + self._product(layer.mlp.dense_4h_to_h, inner), pair

    # --- both ---

    def _product(self, layer: nn.Module, x: Tensor) -> Tensor:
        weight, scale, bits, bias = self.linears[id(layer)]
        if scale is not None:
            weight = dequantize(weight, scale, bits).to(x.dtype)
        return F.linear(x, weight, bias)

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        if self.first_generation:
            return list(self.model.transformer.rotary(positions, dtype))
        angles = rotary_angles(positions, self.config.kv_channels // 2, *self.config.rotary_base_and_scale())
        return [(angles[0].to(dtype), angles[1].to(dtype))]

    def _blocked(self, ids: Tensor, past: Past | None) -> Tensor | None:
        """(B, 1, T, S) bool, True where a token must not look; None where it may look everywhere."""
        B, T = ids.shape
        if T == 1:
            return None
        start = past[0][0].shape[0] if past else 0
        blocked = torch.ones(B, 1, T, start + T, dtype=torch.bool).triu(start + 1)
        if self.first_generation and not past:
            for row, context in enumerate((ids == self.config.bos_token_id).int().argmax(1).tolist()):
                blocked[row, :, :, :context] = False
        return blocked


Weight = tuple[Tensor, Tensor | None, int, Tensor | None]  # codes or numbers, scales, bits, bias


def _has_weight(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, QuantizedLinear))


def _linear(layer: Any) -> Weight:
    """What a layer computes with; of a packed one a copy in the official layout, which the official code needs."""
    if isinstance(layer, QuantizedLinear):
        weight, scale = layer.stored()
        return weight, scale, layer.bits, layer.bias
    return layer.weight, None, 0, layer.bias


def _turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first half of each head, neighbours together; x (T, B, H, D), cos and sin (T, B, D/4)."""
    turned, kept = x.chunk(2, dim=-1)
    even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return torch.cat((pairs.flatten(-2), kept), dim=-1)


def _turn_parts(x: Tensor, rotary: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Rotates each part of the heads by its own positions, channel i with channel i + half of the part."""
    parts = []
    for part, (cos, sin) in zip(x.chunk(len(rotary), dim=-1), rotary):
        first, second = part.chunk(2, dim=-1)
        half = torch.cat((-second, first), dim=-1)
        cos, sin = (torch.cat((one, one), dim=-1).unsqueeze(2) for one in (cos, sin))
        parts.append(part * cos + half * sin)
    return torch.cat(parts, dim=-1)
