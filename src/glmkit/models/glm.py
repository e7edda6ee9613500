"""What GLM (2021) is used for: filling blanks, choosing between answers, sorting texts into classes.

The network is in `glm_network.py`; there is also the legend of the letters. Each head keeps it under `glm.`, as the
Hugging Face classes do, so what is saved of a head has that in front of its names. The plain release has not; both are
read (`official_name`), and `model.glm.save_pretrained(...)` writes the plain form.

Source: modeling_glm.py of the Hugging Face folders, and the classifiers of THUDM/GLM.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glmkit import hf
from glmkit.errors import UsageError
from glmkit.models.glm_config import GLMConfig
from glmkit.models.glm_network import GLMModel, GLMOutput, GLMPreTrainedModel
from glmkit.models.glm_scoring import cloze_loss, cloze_scores
from glmkit.models.language_model import divided, either, kept, summed_loss
from glmkit.models.prefix_lm import PrefixLayout

__all__ = [
    "GLMForConditionalGeneration",
    "GLMForMultipleChoice",
    "GLMForSequenceClassification",
    "GLMModel",
    "GLMOutput",
    "GLMPreTrainedModel",
    "official_name",
]


class GLMForConditionalGeneration(GLMPreTrainedModel, hf.GenerationMixin):
    """The language model that fills blanks."""

    loss_chunk_tokens: int | None = None
    """Most positions whose logits exist at once while a loss is computed; None: all of them."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.glm = GLMModel(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | int | None = None,
        labels: Tensor | None = None,
        mems: Sequence[Tensor] | None = None,
        past_key_values: hf.Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> GLMOutput | tuple[Any, ...]:
        """Logits, and the loss if labels are given.

        Args:
            labels: (B, T), NOT to be shifted: position t of it is what position t of the input shall predict; -100 is
                no target. That is how the tokenizer's builders make them.
            logits_to_keep: Number of last positions (0: all), or a 1-D tensor of positions, to compute logits for.
            num_items_in_batch: Divisor of the summed loss; None: the number of targets.
            (others): As in `GLMModel.forward`.

        Returns:
            loss (float32 scalar), logits (B, T or kept, V), mems or past_key_values, hidden_states.
        """
        output = self.glm(
            input_ids,
            position_ids,
            attention_mask,
            mems,
            past_key_values,
            use_cache,
            output_hidden_states,
            return_dict=True,
            output_predict=False,
        )
        hidden = output.last_hidden_states
        loss = None if labels is None else summed_loss(self.glm.logits, hidden, labels, self.loss_chunk_tokens)
        result = GLMOutput(
            loss=None if loss is None else divided(loss, num_items_in_batch),
            logits=self.glm.logits(kept(hidden, logits_to_keep)),
            mems=output.mems,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )
        return result if either(return_dict, self.config.return_dict) else result.to_tuple()

    def label_loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | int | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Summed cross entropy in float32, with logits at label positions only: the training loss.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T), NOT to be shifted, as in `forward`: position t of it is what position t predicts; -100 is no
                target. (The causal models of this package shift their labels; this family's data comes shifted.)
            attention_mask: As in `GLMModel.forward`; in training mostly the lengths of part A, (B,).
            position_ids: (B, 2, T) or None.

        Returns:
            The sum over all targets (float32 scalar) and their number.
        """
        output = self.glm(
            input_ids, position_ids, attention_mask, use_cache=False, return_dict=True, output_predict=False
        )
        return summed_loss(self.glm.logits, output.last_hidden_states, labels, self.loss_chunk_tokens)

    def input_layout(self, ids: Tensor, pads: Tensor) -> PrefixLayout:
        """Masks and positions of prompts for the decode loop: a prompt is read whole, in both directions.

        Args:
            ids: (B, T) int64, padded on the left; each row has a mask token and ends in sop.
            pads: (B,) int64, columns of padding.

        Returns:
            The layout; a padded row gives what it gives alone.

        Raises:
            UsageError: A row without sop or mask token, or a config that does not name their ids.
        """
        sop, masks = self.config.sop_token_id, self.config.mask_token_ids
        if sop is None or not masks:
            raise UsageError(
                "the ids of sop and of the mask tokens are not known, so prompts cannot be laid out",
                hint="load the model with its tokenizer, or set config.sop_token_id and config.mask_token_ids",
            )
        return PrefixLayout(ids, pads, sop_id=sop, mask_ids=[masks], blocked=False)

    def generate(
        self, inputs: Tensor | None = None, *args: Any, position_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """transformers' `generate`, for what `build_inputs_for_generation` of the tokenizers returns.

        Args:
            inputs: (B, S) int64, or give input_ids=.
            *args: As in transformers.
            position_ids: (B, 2, S + G), for the prompt and the G tokens that may follow. transformers would take a
                tensor of three dimensions for positions of pictures and repeat the wrong one for beams, so it travels
                under another name.
            **kwargs: As in transformers; generation_attention_mask (B, 1, S + G, S + G).

        Returns:
            As in transformers.
        """
        if position_ids is not None:
            kwargs["generation_position_ids"] = position_ids
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        generation_attention_mask: Tensor | None = None,
        generation_position_ids: Tensor | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """What one step of `generate` gives to `forward`.

        Args:
            input_ids: (B, T) int64, everything so far.
            past_key_values: The cache.
            position_ids: (B, 2, S + G); of other shapes transformers made it, and it is not used.
            generation_attention_mask: (B, 1, S + G, S + G) or None: causal. The 2-D attention_mask of transformers is
                not used, as in the official code.
            generation_position_ids: position_ids as `generate` passes them on.
            **others: use_cache, logits_to_keep and what else forward takes.

        Returns:
            Keyword arguments of `forward`.

        Raises:
            UsageError: More tokens than the mask or the positions are made for.
        """
        # Without a cache transformers hands back mems under this name; nothing is kept then, so there are none.
        cache = past_key_values if isinstance(past_key_values, hf.Cache) else None
        start, end = cache.get_seq_length() if cache is not None else 0, input_ids.shape[1]
        mask = generation_attention_mask
        if generation_position_ids is None and position_ids is not None and position_ids.ndim == 3:
            generation_position_ids = position_ids
        positions = generation_position_ids
        for name, given in (("position_ids", positions), ("generation_attention_mask", mask)):
            if given is not None and given.shape[-1] < end:
                raise UsageError(
                    f"{name} are made for {given.shape[-1]} tokens, and there are {end}",
                    hint="build the inputs with a larger max_gen_length, or generate fewer new tokens",
                )
        names = ("use_cache", "logits_to_keep", "output_hidden_states", "return_dict")
        return {
            "input_ids": input_ids[:, start:],
            "position_ids": None if positions is None else positions[:, :, start:end],
            "attention_mask": None if mask is None else mask[:, :, start:end, :end],
            "past_key_values": cache,
            **{name: others[name] for name in names if name in others},
        }


class GLMForMultipleChoice(GLMPreTrainedModel):
    """Scores answers by their log-probability: all of a row's choices stand in it, each seeing the text alone."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.glm = GLMModel(config)
        self.post_init()

    @classmethod
    def around(cls, model: Any) -> GLMForMultipleChoice:
        """Makes this head around the network of another; nothing is copied.

        Args:
            model: Any head of GLM.
        """
        with torch.device("meta"):
            head = cls(model.config)
        head.glm = model.glm
        return head.train(model.training)

    def label_loss(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        sep: Tensor,
        target_ids: Tensor,
        logit_mask: Tensor,
        labels: Tensor,
        choice_mask: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Summed cross entropy over the answers of each example: the training loss of cloze tasks.

        Args:
            input_ids: (B, T) int64 where answers are single words, else (B, C, T), like the others of
                `glmkit.data.cloze.collate_cloze`.
            position_ids: (B, 2, T) or (B, C, 2, T).
            sep: (B) or (B, C), length of the text.
            target_ids: (B, W) or (B, C, T).
            logit_mask: (B, T) or (B, C, T), 1 where an answer is predicted.
            labels: (B), which answer is right.
            choice_mask: (B, C), 0 for rows that only fill up.

        Returns:
            The sum over all examples (float32 scalar) and their number.
        """
        scores = self.choice_scores(input_ids, position_ids, sep, target_ids, logit_mask, choice_mask)
        return cloze_loss(scores, labels) * len(labels), len(labels)

    def choice_scores(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        sep: Tensor,
        target_ids: Tensor,
        logit_mask: Tensor,
        choice_mask: Tensor | None = None,
    ) -> Tensor:
        """Scores the answers of encoded examples.

        Args:
            (all): As in `label_loss`.

        Returns:
            (B, C) or (B, W) float32; the highest is the model's choice.
        """
        batch = {"input_ids": input_ids, "position_ids": position_ids, "sep": sep, "target_ids": target_ids}
        batch["logit_mask"] = logit_mask
        return cloze_scores(self, batch if choice_mask is None else batch | {"choice_mask": choice_mask})

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | int | None = None,
        choice_ids: Sequence[Sequence[Tensor]] = (),
        choice_indices: Sequence[Sequence[Tensor]] = (),
        labels: Tensor | None = None,
        mems: Sequence[Tensor] | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> GLMOutput | tuple[Any, ...]:
        """Scores the choices.

        Args:
            choice_ids: For every row its N choices, each the ids of an answer.
            choice_indices: Alike, the columns that predict these ids.
            labels: (B,) which choice is right.
            (others): As in `GLMModel.forward`.

        Returns:
            loss (float32 scalar, cross entropy over the scores), logits (B, N), the summed log-probabilities, neither
            divided by length nor with an end token; lm_logits (B, T, V), mems.

        Raises:
            UsageError: There are no choices, or ids and columns are not as many as they must be.
        """
        _check_choices(choice_ids, choice_indices, input_ids.shape[0])
        output = self.glm(input_ids, position_ids, attention_mask, mems, return_dict=True, output_predict=True)
        rows = [
            torch.stack([_log_probability(logits, ids, columns) for ids, columns in zip(choices, places)])
            for logits, choices, places in zip(output.logits, choice_ids, choice_indices)
        ]
        scores = torch.stack(rows)  # (B, N)
        result = GLMOutput(
            loss=None if labels is None else F.cross_entropy(scores, labels.to(scores.device)),
            logits=scores,
            lm_logits=output.logits,
            mems=output.mems,
        )
        return result if either(return_dict, self.config.return_dict) else result.to_tuple()


def _check_choices(ids: Sequence[Sequence[Any]], columns: Sequence[Sequence[Any]], rows: int) -> None:
    """Refuses choices that would be left out silently, or make no table (rows, N)."""
    if not len(ids) or not all(len(choices) for choices in ids):
        raise UsageError(
            f"there are no choices in choice_ids for each of {rows} rows",
            hint="tokenizer.build_inputs_for_multiple_choice makes choice_ids and choice_indices",
        )
    if len(ids) != rows or len(columns) != rows or len({len(choices) for choices in (*ids, *columns)}) != 1:
        raise UsageError(
            f"choice_ids has {[len(choices) for choices in ids]} choices, choice_indices"
            f" {[len(choices) for choices in columns]}: expected the same number for each of {rows} rows"
        )
    for row, (choices, places) in enumerate(zip(ids, columns)):
        for number, (one, place) in enumerate(zip(choices, places)):
            if len(one) != len(place):
                raise UsageError(
                    f"row {row}, choice {number}: choice_ids has {len(one)} ids, choice_indices {len(place)} columns"
                )


def _log_probability(logits: Tensor, ids: Tensor, columns: Tensor) -> Tensor:
    """Summed log-probability of ids (N,) at columns (N,) of logits (T, V), in float32."""
    ids, columns = (torch.as_tensor(value, device=logits.device) for value in (ids, columns))
    return logits[columns].float().log_softmax(-1).gather(-1, ids[:, None]).sum()


class GLMForSequenceClassification(GLMPreTrainedModel):
    """`out_proj(tanh(dense(h)))` on the first token. It needs no logits, whatever `output_predict` says."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.glm = GLMModel(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        rate = config.classifier_dropout
        self.dropout = nn.Dropout(config.output_dropout_prob if rate is None else rate)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> hf.SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Scores the classes.

        Args:
            input_ids: (B, T), or (B, N, T) for N choices, each scored as a row of its own; then the other arguments
                have N as their second dimension too.
            labels: (B,) int64.
            (others): As in `GLMModel.forward`.

        Returns:
            loss (float32 scalar), logits (B, num_labels) or (B, N), and as hidden_states what the official class
            returns there: the network's normed output, (B or B*N, T, C).
        """
        choices = input_ids.shape[1] if input_ids.ndim == 3 else None
        if choices is not None:
            input_ids = input_ids.flatten(0, 1)
            position_ids = None if position_ids is None else position_ids.flatten(0, 1)
            attention_mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        output = self.glm(
            input_ids, position_ids, attention_mask, use_cache=False, return_dict=True, output_predict=False
        )
        hidden = output.last_hidden_states
        pooled = torch.tanh(self.dense(self.dropout(hidden[:, 0])))
        logits = self.out_proj(self.dropout(pooled)).float()
        logits = logits if choices is None else logits.view(-1, choices)
        result = hf.SequenceClassifierOutputWithPast(
            loss=None if labels is None else F.cross_entropy(logits, labels.to(logits.device)),
            logits=logits,
            hidden_states=hidden,
        )
        return result if either(return_dict, self.config.return_dict) else result.to_tuple()


_CLASSIFIERS = {"pool_layer.": "dense.", "multichoice_head.": "out_proj."}  # the training code's names


def official_name(name: str, names: Collection[str]) -> str:
    """What a model calls a stored tensor.

    A plain release has no `glm.` in front, a fine-tuned head has it, and the training code's classifiers have `model.`
    and names of their own for the head.

    Args:
        name: The stored name.
        names: All names of the model, such as `model.state_dict().keys()`.

    Returns:
        The model's name for it; `name` itself if there is none.
    """
    for old, new in _CLASSIFIERS.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    bare = name.removeprefix("glm.") if name.startswith("glm.") else name.removeprefix("model.")
    return next((known for known in (name, bare, f"glm.{bare}") if known in names), name)
