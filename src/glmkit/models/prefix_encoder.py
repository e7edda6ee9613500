"""P-Tuning v2: learned keys and values in front of every layer's own (Liu et al. 2021, arXiv:2110.07602).

    table (P, row)                            row = 2 * L * H * D: layer by layer, key before value
     | trans, if it is projected              two layers that widen a narrower table
     | in the dtype of the activations, dropout 0.1 while training
    keys and values of each layer             (B, H, P, D) each: not rotated, seen by every token, never in the cache

Letters: `P` prefix columns, `L` layers, `H` key/value heads, `D` head width, `B` batch.

Source: PrefixEncoder and get_prompt of ChatGLM-6B and ChatGLM2-6B. The original GLM has no prefix there; its layout
here is that of ChatGLM-6B, and ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Prefix = tuple[Tensor, Tensor]  # keys and values of one layer, each (B, H, P, D)

_DROPOUT = 0.1


class PrefixPart:
    """What starts with torch's own random numbers, as officially, and not with those of the model's other parts."""

    def reset_parameters(self) -> None:
        """Starts anew."""
        super().reset_parameters()  # type: ignore[misc]


class _Table(PrefixPart, nn.Embedding):
    """Starts as N(0, 1)."""


class _Layer(PrefixPart, nn.Linear):
    """Starts uniformly, by the width of its input."""


class PrefixEncoder(nn.Module):
    """Makes the keys and values of all layers; it computes in the dtype of its own parameters, autocast or not.

    Args:
        length: `P`.
        num_layers: `L`.
        heads: `H`.
        width: `D`.
        projection: None, or the width of the table and of the layer behind it.
    """

    def __init__(
        self, length: int, num_layers: int, heads: int, width: int, projection: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.shape = (length, 2 * num_layers, heads, width)
        row = 2 * num_layers * heads * width
        table, hidden = projection or (row, 0)
        self.embedding = _Table(length, table)
        self.trans = nn.Sequential(_Layer(table, hidden), nn.Tanh(), _Layer(hidden, row)) if projection else None

    def forward(self, batch: int, dtype: torch.dtype | None = None) -> list[Prefix]:
        """Returns one (keys, values) per layer.

        Args:
            batch: `B`; while training every row has a dropout of its own.
            dtype: Of the activations; None: as it is computed.
        """
        table = self.embedding.weight
        with torch.autocast(table.device.type, enabled=False):  # large values overflow in float16
            rows = table if self.trans is None else self.trans(table)
        columns = rows.to(dtype or rows.dtype).view(self.shape).permute(1, 2, 0, 3).unsqueeze(1)  # (2L, 1, H, P, D)
        columns = F.dropout(columns.expand(-1, batch, -1, -1, -1), _DROPOUT, self.training)
        return list(zip(columns[0::2], columns[1::2]))


class PrefixTuned:
    """A network that can have a prefix, as `prefix_encoder`; its config says how long it is and whether projected."""

    config: Any
    prefix_encoder: PrefixEncoder

    def new_prefix(self) -> PrefixEncoder:
        """A prefix encoder with new values, of the sizes that the config says."""
        raise NotImplementedError

    def attach_prefix(self, length: int, projection: bool) -> None:
        """Gives a model that is already loaded a new prefix, in float32 on the model's device.

        Args:
            length: Number of columns, `P`.
            projection: Whether a small network makes the values.

        Raises:
            ConfigError: The length is out of range.
        """
        before = (self.config.pre_seq_len, self.config.prefix_projection)
        self.config.pre_seq_len, self.config.prefix_projection = length, projection
        try:
            self.config.check()
        except ValueError:
            self.config.pre_seq_len, self.config.prefix_projection = before
            raise
        first = next(self.parameters())  # type: ignore[attr-defined]
        with torch.device(first.device):
            self.prefix_encoder = self.new_prefix().float()

    def freeze_all_but_prefix(self) -> None:
        """P-Tuning trains the prefix alone."""
        self.requires_grad_(False)  # type: ignore[attr-defined]
        self.prefix_encoder.requires_grad_(True)

    def prefixes(self, batch: int, dtype: torch.dtype) -> list[Prefix | None]:
        """Keys and values in front of each layer's own; None for each layer without a prefix.

        Args:
            batch: `B`.
            dtype: Of the activations.
        """
        encoder = getattr(self, "prefix_encoder", None)
        return [None] * self.config.num_layers if encoder is None else list(encoder(batch, dtype))
