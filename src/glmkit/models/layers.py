"""Parts that the architectures share, in plain torch.

Letters: `B` batch, `T` new tokens, `S` all keys, `H` heads, `K` key/value heads, `G = H / K` heads per group, `D` head
width, `C` hidden, `R` rotated width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FEW_TOKENS = 32  # more are work enough to hide that torch's operator reads keys and values once for each head


class RMSNorm(nn.Module):
    """Scales each vector to unit root mean square, then by a learned weight: `w * x / sqrt(mean(x^2) + eps)`.

    The mean, the scaling and the product are in float32 whatever the dtype of `x`, as in the official code.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * y).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.LayerNorm):
    """torch's, which also takes vectors of another dtype than its weights have: autocast may give these to it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def rotary_angles(positions: Tensor, rotated: int, base: float, position_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, always computed in float32.

    The tables are made from the positions at every call and are no buffers, so neither `model.half()` nor loading on
    the meta device can round or lose them: half precision keeps positions beyond 2,048 exact.

    Args:
        positions: Token positions, (B, T), integer.
        rotated: Number of channels of a head that are rotated, `R`.
        base: Base of the geometric row of frequencies.
        position_scale: Positions are divided by it (linear interpolation).

    Returns:
        cos and sin, each (B, T, R/2), float32.
    """
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device=positions.device) / rotated
    angles = (positions.float() / position_scale).unsqueeze(-1) / base**exponents  # (B, T, R/2)
    return angles.cos(), angles.sin()


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring channels (2i, 2i+1) of the first `R` channels of each head; the others pass.

    Args:
        x: Queries or keys, (B, T, H, D).
        cos: (B, T, R/2) in the dtype of `x`.
        sin: Like cos.

    Returns:
        Like `x`.
    """
    rotated = 2 * cos.shape[-1]
    pairs = x[..., :rotated].unflatten(-1, (-1, 2))  # (B, T, H, R/2, 2)
    even, odd = pairs.unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (B, T, 1, R/2)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned, x[..., rotated:]), dim=-1)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel i of each head together with channel i + D/2, over the whole head.

    Args:
        x: Queries or keys, (B, T, H, D).
        cos: (B, T, D/2) in the dtype of `x`.
        sin: Like cos.

    Returns:
        Like `x`.
    """
    first, second = x.chunk(2, dim=-1)  # (B, T, H, D/2) each
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (B, T, 1, D/2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention with grouped key/value heads, by torch's fused operator.

    Args:
        q: (B, H, T, D).
        k: (B, K, S, D); group j serves query heads j*G … (j+1)*G-1.
        v: Like k.
        mask: Boolean (B, 1, T, S), True = may be seen. None: causal if T > 1 (then S = T), everything if T = 1.
        dropout: Share of the attention weights that is set to zero; the others grow to make up for it.

    Returns:
        (B, T, H, D). A row that may see nothing is zero.
    """
    B, H, T, D = q.shape
    K, G = k.shape[1], H // k.shape[1]
    if T == 1 or (G > 1 and T <= _FEW_TOKENS and mask is not None):
        # A group's heads become rows of one product, so keys and values are read once, not G times.
        rows, seen = q.reshape(B, K, G * T, D), mask if mask is None or T == 1 else mask.repeat(1, 1, G, 1)
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=seen, dropout_p=dropout)
        return out.reshape(B, H, T, D).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, enable_gqa=K != H
    )
    return out.transpose(1, 2)


def attend_eagerly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """The same as `attend`, step by step: the readable reference, with an additive mask.

    Args:
        q: (B, H, T, D).
        k: (B, K, S, D).
        v: Like k.
        mask: Additive (B, 1, T, S), 0 = may be seen, a very negative number = may not; or None, as in `attend`.
        dropout: As in `attend`.

    Returns:
        (B, T, H, D).
    """
    H, T, D = q.shape[1:]
    k = k.repeat_interleave(H // k.shape[1], dim=1)
    v = v.repeat_interleave(H // v.shape[1], dim=1)
    scores = (q @ k.transpose(-1, -2)).float() / D**0.5  # (B, H, T, S)
    if mask is not None:
        scores = scores + mask
    elif T > 1:
        future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    weights = F.dropout(scores.softmax(-1).to(v.dtype), dropout, dropout > 0)
    return (weights @ v).transpose(1, 2)


ATTENTION = {"sdpa": attend, "eager": attend_eagerly}
