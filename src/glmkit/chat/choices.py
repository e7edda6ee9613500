"""How to answer: what the caller asked for, completed by what the model's own files say."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from glmkit.chat.templates import FORMATS, chat_format
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import UsageError

OFFICIAL_SAMPLING = FORMATS[3].sampling  # what most chat models do
# What the official scripts do that fill blanks: generate_block.sh of GLM, generate.sh of GLM-130B.
_FILLING_SAMPLING = {
    "glm": SamplingOptions(temperature=0.9, top_k=40),
    "glm-130b": SamplingOptions(temperature=1.0, top_p=0.7),
}

_SYNONYMS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",
    "temp": "temperature",
    "repeat_penalty": "repetition_penalty",
    "prompt_lookup_num_tokens": "lookup_tokens",
}
_KNOWN = {field.name for field in fields(SamplingOptions)} | {"max_new_tokens", "stop", "do_sample", "lookup_tokens"}


@dataclass(frozen=True)
class Choices:
    """How to answer: the rules for a token, when to stop, and whether to guess ahead.

    Args:
        options: How tokens are chosen.
        max_new_tokens: Longest answer; None is what the context leaves.
        stop: Texts that end an answer and are not part of it.
        lookup_tokens: Most tokens that are drafted from the text so far; 0 is off. It changes the speed only.
    """

    options: SamplingOptions
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    lookup_tokens: int = 0


def choose(
    model: Any,
    options: SamplingOptions | None = None,
    max_new_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    sampling: Mapping[str, Any] | None = None,
    *,
    official: SamplingOptions = OFFICIAL_SAMPLING,
) -> Choices:
    """Completes what the caller asked for by the model's own settings.

    The start is `options`; else the model's generation_config, if it says something about sampling (`do_sample: false`
    is greedy); else what the official code does.

    Args:
        model: The model.
        options: How tokens are chosen.
        max_new_tokens: Longest answer.
        stop: A text or texts that end the answer.
        sampling: Single settings that overrule: the fields of SamplingOptions, `do_sample`, and the names that other
            tools use. None means "not given".
        official: What the official code does, see `official_sampling`.

    Raises:
        UsageError: A name or value that does not exist or fit.
    """
    given: dict[str, Any] = {}
    for name, value in (sampling or {}).items():
        meant = canonical_name(name)
        if value is not None:
            given[meant] = value
    max_new_tokens = given.pop("max_new_tokens", max_new_tokens)
    stop = given.pop("stop", stop)
    config = getattr(model, "generation_config", None)
    if max_new_tokens is None:
        max_new_tokens = getattr(config, "max_new_tokens", None)
    if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 1):
        raise UsageError(f"max_new_tokens={max_new_tokens!r}: expected a whole number, 1 or more")
    lookup_tokens = given.pop("lookup_tokens", 0)
    if type(lookup_tokens) is not int or lookup_tokens < 0:
        raise UsageError(f"lookup_tokens={lookup_tokens!r}: expected a whole number, 0 (off) or more")
    base = options or _own_sampling(config, official)
    do_sample = given.pop("do_sample", None)
    if do_sample is False:
        given["temperature"] = 0.0
    elif do_sample and not base.do_sample:
        given.setdefault("temperature", official.temperature)
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    return Choices(replace(base, **given), max_new_tokens, stop, lookup_tokens)


def official_sampling(model: Any, tokenizer: Any) -> SamplingOptions:
    """How the official code of a model chooses tokens when nothing else is said.

    Args:
        model: The model.
        tokenizer: Its tokenizer; None if there is none.
    """
    if tokenizer is None:
        return OFFICIAL_SAMPLING
    if tokenizer.generation == 0:
        return _FILLING_SAMPLING.get(model.config.model_type, SamplingOptions())
    return chat_format(tokenizer).sampling


def canonical_name(name: str) -> str:
    """Our name of a setting that may be called as in another tool.

    Args:
        name: The name.

    Raises:
        UsageError: There is no such setting.
    """
    meant = _SYNONYMS.get(name, name)
    if meant not in _KNOWN:
        raise _unknown_setting(name)
    return meant


def _own_sampling(config: Any, official: SamplingOptions) -> SamplingOptions:
    """What a generation_config says; top_k 50 is transformers' value where it says nothing."""
    said = {
        name: getattr(config, name, None)
        for name in ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    }
    penalty = said["repetition_penalty"] or 1.0
    if said["do_sample"] is False:
        # A caller who then asks for a temperature gets the official way with it.
        return replace(official, temperature=0.0, repetition_penalty=penalty)
    if all(said[name] is None for name in ("do_sample", "temperature", "top_p", "top_k", "min_p")):
        return replace(official, repetition_penalty=penalty)
    return SamplingOptions(
        temperature=1.0 if said["temperature"] is None else said["temperature"],
        top_p=1.0 if said["top_p"] is None else said["top_p"],
        top_k=50 if said["top_k"] is None else said["top_k"],
        min_p=said["min_p"] or 0.0,
        repetition_penalty=penalty,
    )


def _unknown_setting(name: str) -> UsageError:
    known = sorted(_KNOWN | set(_SYNONYMS) | {"history", "system", "tools", "options", "cancel"})
    close = difflib.get_close_matches(name, known, n=1)
    return UsageError(
        f"there is no setting {name!r}",
        hint=f"did you mean {close[0]}?" if close else "known: " + ", ".join(sorted(_KNOWN)),
    )


def is_setting(name: str) -> bool:
    """Whether a name is a setting or so close to one that it can only be a slip of the fingers.

    Args:
        name: A keyword.
    """
    return bool(difflib.get_close_matches(name, _KNOWN | set(_SYNONYMS), n=1, cutoff=0.8))
