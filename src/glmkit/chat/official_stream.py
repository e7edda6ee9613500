"""`stream_generate` of the official model classes, on our engine, and the logits processor they come with.

Source: modeling_chatglm.py of the official checkpoints (behaviour, not code).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from glmkit.engine.cache import new_cache
from glmkit.engine.decode import stream
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import UsageError
from glmkit.hf import Cache, LogitsProcessor, LogitsProcessorList, PrefixConstrainedLogitsProcessor

# Settings of a generation configuration that change what generate gives and that a stream does not have.
_NOT_STREAMED = (
    *("min_length", "min_new_tokens", "max_time", "stop_strings", "no_repeat_ngram_size", "sequence_bias"),
    *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
    *("top_h", "epsilon_cutoff", "eta_cutoff", "penalty_alpha", "dola_layers", "diversity_penalty", "num_beam_groups"),
    *("constraints", "force_words_ids", "watermarking_config", "token_healing", "encoder_no_repeat_ngram_size"),
)
_NOT_STREAMED_UNLESS_1 = ("typical_p", "encoder_repetition_penalty", "guidance_scale", "num_return_sequences")
_HIDDEN_TOP_K = 50  # the default of generate, which the official chat never turns off


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """Makes id 5 certain in every row if a score anywhere is NaN or infinite, as the official class does."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Checks the scores.

        Args:
            input_ids: (B, T), not looked at.
            scores: (B, V), any floating dtype.

        Returns:
            (B, V): the scores, or 0 everywhere and 5e4 at id 5.
        """
        if torch.isfinite(scores).all():
            return scores
        scores = torch.zeros_like(scores)
        scores[..., 5] = 5e4
        return scores


def with_invalid_score_processor(given: Any) -> LogitsProcessorList:
    """The caller's logits processors and the official one behind them, in a new list.

    Args:
        given: The caller's, or None.
    """
    return LogitsProcessorList([*(given or []), InvalidScoreLogitsProcessor()])


def stream_generate(
    self: Any,
    input_ids: Tensor,
    generation_config: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    return_past_key_values: bool = False,
    **kwargs: Any,
) -> Iterator[Any]:
    """Generates one answer and gives out all ids after every step.

    Args:
        self: The model.
        input_ids: (1, T) int64; with past_key_values, what follows the cache.
        generation_config: Defaults; None: the model's own.
        logits_processor: Applied to the logits before the rules of the configuration.
        stopping_criteria: Called with (ids, None) after each token.
        prefix_allowed_tokens_fn: Gives the ids that may follow.
        return_past_key_values: Whether the cache is given out too. It is one object that grows, and holds all ids but
            the last one given out.
        **kwargs: `past_key_values`, `attention_mask`, and values of the generation configuration (max_length counts
            `input_ids` and the answer).

    Yields:
        (1, T + n) ids, the stop id among them, or a pair of them and the cache.

    Raises:
        UsageError: More than one row, beams, no room for an answer, or an argument that does not exist or has no
            effect on a stream.
    """
    settings = (generation_config, logits_processor, prefix_allowed_tokens_fn)
    for ids, past, _ in _steps(self, input_ids, settings, kwargs, returns_past=return_past_key_values):
        yield (ids, past) if return_past_key_values else ids
        if _is_met(stopping_criteria, ids):
            return


def stream_generate_of_chatglm(
    self: Any,
    input_ids: Tensor,
    generation_config: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    **kwargs: Any,
) -> Iterator[Tensor]:
    """Generates one answer of ChatGLM-6B and gives out all ids after every step but the one that ends it.

    Args:
        self: The model.
        input_ids: (1, T) int64.
        generation_config: See `stream_generate`.
        logits_processor: See `stream_generate`.
        stopping_criteria: See `stream_generate`.
        prefix_allowed_tokens_fn: See `stream_generate`.
        **kwargs: See `stream_generate`.

    Yields:
        (1, T + n) ids. As in the official code neither a stop id nor the last token at the length limit is among them.

    Raises:
        UsageError: See `stream_generate`; and past_key_values, which this model cannot go on from.
    """
    if kwargs.pop("past_key_values", None) is not None:
        raise UsageError("ChatGLM-6B reads a prompt in both directions and cannot go on behind past_key_values")
    settings = (generation_config, logits_processor, prefix_allowed_tokens_fn)
    for ids, _, ends in _steps(self, input_ids, settings, kwargs):
        if ends or _is_met(stopping_criteria, ids):
            return
        yield ids


def _is_met(criteria: Any, ids: Tensor) -> bool:
    return criteria is not None and bool(torch.as_tensor(criteria(ids, None)).all())


def _steps(
    model: Any, input_ids: Tensor, settings: tuple[Any, Any, Any], kwargs: dict[str, Any], *, returns_past: bool = False
) -> Iterator[tuple[Tensor, Cache | None, bool]]:
    """Ids (1, T + n), the cache, and whether the answer ends here, after every step."""
    generation_config, logits_processor, allowed = settings
    past, mask = kwargs.pop("past_key_values", None), kwargs.pop("attention_mask", None)
    kwargs.pop("position_ids", None)  # the model counts on from the cache itself
    config = copy.deepcopy(model.generation_config if generation_config is None else generation_config)
    unknown = config.update(**kwargs)
    if unknown:
        raise UsageError(f"stream_generate has no argument {', '.join(unknown)}")
    _refuse_not_streamed(config)
    if input_ids.shape[0] != 1 or (config.num_beams or 1) != 1:
        raise UsageError(
            f"{input_ids.shape[0]} rows and {config.num_beams or 1} beams: a stream is one row without beams",
            hint="use generate, or glmkit.engine.decode.generate_batch",
        )
    if past is not None and not isinstance(past, Cache):
        raise UsageError(f"past_key_values is a {type(past).__name__}; expected the cache of an earlier stream")
    new_tokens = _room(config, input_ids.shape[1])
    prompt = _without_padding(input_ids, mask)
    processors = LogitsProcessorList(logits_processor or [])
    if allowed is not None:
        processors.append(PrefixConstrainedLogitsProcessor(allowed, 1))
    if past is None and returns_past:
        past = new_cache(model, 1, input_ids.shape[1] + min(new_tokens, 1024))
    stops = as_list(model.config.eos_token_id if config.eos_token_id is None else config.eos_token_id)
    processed = _Processed(model, processors, len(prompt)) if processors else model
    options = _sampling(config)
    for step in stream(processed, prompt.tolist(), options, stop_ids=stops, max_new_tokens=new_tokens, cache=past):
        input_ids = torch.cat((input_ids, input_ids.new_tensor([[step.token_id]])), dim=1)
        yield input_ids, past, step.finish_reason is not None


def _without_padding(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """The ids of the one row that are no padding on its left."""
    if mask is None:
        return input_ids[0]
    if mask.ndim == 4:  # ChatGLM-6B: True where attention is blocked
        return input_ids[0][~mask[0, 0, -1].bool()]
    return input_ids[0][mask[0, -input_ids.shape[1] :].bool()]


class _Processed:
    """A model whose last logits go through logits processors, for the engine.

    Args:
        model: The language model.
        processors: What to apply.
        prompt_tokens: Length of the prompt; chunks of it before its end give no token and are not processed.
    """

    def __init__(self, model: Any, processors: LogitsProcessorList, prompt_tokens: int) -> None:
        self.model, self.processors, self.prompt_tokens = model, processors, prompt_tokens
        self.config, self.device = model.config, model.device
        if hasattr(model, "input_layout"):
            self.input_layout = model.input_layout
        self.ids: Tensor | None = None

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any:
        output = self.model(input_ids=input_ids, **kwargs)
        self.ids = input_ids if self.ids is None else torch.cat((self.ids, input_ids), dim=1)
        if self.ids.shape[1] >= self.prompt_tokens:
            output.logits = self.processors(self.ids, output.logits[:, -1].float())[:, None]
        return output


def _refuse_not_streamed(config: Any) -> None:
    """Refuses settings that would be ignored silently."""
    found = [name for name in _NOT_STREAMED if getattr(config, name, None)]
    found += [name for name in _NOT_STREAMED_UNLESS_1 if getattr(config, name, None) not in (None, 0, 1)]
    if found:
        given = ", ".join(f"{name}={getattr(config, name)!r}" for name in found)
        raise UsageError(f"stream_generate does not do {given}", hint="use generate, or leave it out")


def _banned(config: Any) -> tuple[tuple[int, ...], ...]:
    """Words and tokens that must not be written; as in generate, a stop id is not banned as a word."""
    stops = [[stop] for stop in as_list(config.eos_token_id)]
    words = [list(word) for word in config.bad_words_ids or [] if list(word) not in stops]
    return tuple(map(tuple, words + [[token] for token in as_list(config.suppress_tokens)]))


def _sampling(config: Any) -> SamplingOptions:
    """The engine's options for a generation configuration, with generate's own defaults."""

    def given(name: str, default: Any) -> Any:
        value = getattr(config, name, None)
        return default if value is None else value

    penalty, banned = float(given("repetition_penalty", 1.0)), _banned(config)
    if not given("do_sample", False):
        return SamplingOptions(temperature=0.0, repetition_penalty=penalty, banned_ids=banned)
    return SamplingOptions(
        temperature=float(given("temperature", 1.0)),
        top_k=int(given("top_k", _HIDDEN_TOP_K)),
        top_p=float(given("top_p", 1.0)),
        min_p=float(given("min_p", 0.0)),
        repetition_penalty=penalty,
        banned_ids=banned,
    )


def _room(config: Any, prompt_tokens: int) -> int:
    """How many tokens the answer may have."""
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    max_length = 20 if config.max_length is None else config.max_length  # generate's default
    if max_length <= prompt_tokens:
        raise UsageError(
            f"the prompt has {prompt_tokens} tokens and max_length={max_length} counts prompt and answer: no room",
            hint="raise max_length, or shorten the history",
        )
    return max_length - prompt_tokens


def as_list(value: Any) -> list[int]:
    """One id or several, or none, as a list.

    Args:
        value: An id, a list or tensor of ids, or None.
    """
    if value is None:
        return []
    return [int(one) for one in value] if isinstance(value, (list, tuple, Tensor)) else [int(value)]
