"""What stands behind the last norm of every language model: logits where they are asked for, and the loss.

    hidden (B, T, C) -> the positions asked for -> logits (B, T or kept, V)
                     -> the positions with a target -> logits in float32 -> summed cross entropy

Logits of all positions are the largest tensor of a training step, so the loss computes them where a target is, only;
and, where memory asks for it, for some of these at a time, which computes them twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from glmkit import hf

NO_TARGET = -100


class LanguageModelHead:
    """Logits and losses of a model whose labels are the input itself: position t + 1 is the target of position t.

    The model has its network as `transformer`, and says in `logits` how hidden states become logits.
    """

    config: Any
    transformer: Any
    loss_chunk_tokens: int | None = None
    """Most positions whose logits exist at once while a loss is computed; None: all of them."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) after the final norm -> (..., V)."""
        raise NotImplementedError

    def logits_and_loss(
        self,
        output: hf.BaseModelOutputWithPast,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        num_items_in_batch: Tensor | int | None,
        return_dict: bool | None,
    ) -> hf.CausalLMOutputWithPast | tuple[Any, ...]:
        """The end of every `forward`.

        Args:
            output: What the network returned.
            labels: As in `forward`, like the others.
            logits_to_keep: See `kept`.
            num_items_in_batch: Divisor of the summed loss; None: the number of targets.
            return_dict: False returns a tuple.

        Returns:
            What `forward` returns.
        """
        hidden = output.last_hidden_state
        result = hf.CausalLMOutputWithPast(
            loss=None if labels is None else divided(self._summed_loss(hidden, labels), num_items_in_batch),
            logits=self.logits(kept(hidden, logits_to_keep)),
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )
        return result if either(return_dict, self.config.return_dict) else result.to_tuple()

    def label_loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Summed cross entropy in float32, with logits at label positions only: the training loss.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T), not shifted: position t + 1 is the target of position t; -100 is no target.
            attention_mask: As in `forward`. Right padding needs none: nothing looks at what comes later.
            position_ids: As in `forward`.

        Returns:
            The sum over all targets (float32 scalar) and their number.
        """
        output = self.transformer(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False, return_dict=True
        )
        return self._summed_loss(output.last_hidden_state, labels)

    def _summed_loss(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        return summed_loss(self.logits, hidden[:, :-1], labels[:, 1:], self.loss_chunk_tokens)


def kept(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Selects the positions that get logits.

    Args:
        hidden: (B, T, C).
        logits_to_keep: Number of last positions (0: all), or a 1-D tensor of positions.

    Returns:
        (B, kept, C).
    """
    return hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]


def summed_loss(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk_tokens: int | None = None
) -> tuple[Tensor, int]:
    """Cross entropy of the positions that have a target.

    Args:
        logits: Makes logits (N, V) of hidden states (N, C).
        hidden: (B, T, C).
        targets: (B, T), what each position is to predict; -100 is no target.
        chunk_tokens: Most positions whose logits exist at once; they are computed again in the backward pass. None:
            all positions.

    Returns:
        The sum over all targets (float32 scalar) and their number.
    """

    def loss(states: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(logits(states).float(), wanted, reduction="sum")

    targets = targets.to(hidden.device)
    chosen = targets != NO_TARGET
    states, wanted = hidden[chosen], targets[chosen]  # (N, C), (N,)
    if chunk_tokens is None or len(wanted) <= chunk_tokens:
        return loss(states, wanted), len(wanted)
    parts = zip(states.split(chunk_tokens), wanted.split(chunk_tokens))
    losses = [checkpoint(loss, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(losses).sum(), len(wanted)


def divided(loss: tuple[Tensor, int], num_items_in_batch: Tensor | int | None) -> Tensor:
    """The loss of a batch from its sum and number of targets, or the number that the caller counts by."""
    loss_sum, targets = loss
    return loss_sum / (targets if num_items_in_batch is None else num_items_in_batch)


def either(choice: bool | None, default: bool | None) -> bool:
    """A choice, or the config's if none was made."""
    return bool(default if choice is None else choice)
