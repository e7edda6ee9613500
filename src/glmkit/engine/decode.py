"""The decode loop: a prompt in chunks, then one token a step. A stream is a batch of one row.

Letters: `B` rows, `T` new tokens, `S` tokens in the cache after them, `V` vocabulary rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from random import Random

from glmkit import hf
from glmkit.engine.batch import Batch
from glmkit.engine.cache import BufferCache, LanguageModel, new_cache
from glmkit.engine.layout import InputLayout, reads_whole_prompts
from glmkit.engine.lookup import Lookup
from glmkit.engine.native import why_not
from glmkit.engine.places import answer_in_places
from glmkit.engine.sampling import SamplingOptions, row_generators
from glmkit.errors import ContextLengthError, UsageError

_FIRST_ROOM_TOKENS = 1024  # room made for an answer; few are as long as they may be, and the cache grows
NO_TOKEN = -1


class CancelToken:
    """Asks a running generation to end; it does so before its next token.

    Safe to use from a signal handler or another thread: setting it is one assignment.
    """

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        """Asks for the end; asking twice is fine."""
        self.cancelled = True


@dataclass(frozen=True)
class Usage:
    """What a stream did and how long the model took; time that the consumer spends between steps is not counted.

    Args:
        cached_tokens: Tokens that were in the cache before.
        prompt_tokens: Tokens of the prompt that were computed.
        completion_tokens: Tokens generated, the stop id among them.
        prefill_seconds: From the first chunk of the prompt to the first token.
        decode_seconds: All tokens after the first.
        drafted_tokens: Tokens that went through the model before they were drawn, see `lookup_tokens` of `stream`.
        accepted_tokens: Those of them that were drawn then: so many calls of the model fewer.
    """

    cached_tokens: int
    prompt_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Step:
    """One token of an answer.

    Args:
        token_id: The token; NO_TOKEN (-1) if the answer was cancelled.
        logprob: Its log-probability under the model, before penalty, bias, bans and filters.
        finish_reason: None while it goes on; "stop": this is a stop id; "length": this is the last token that was
            allowed, and part of the answer; "cancelled": no token.
        usage: With the last step only.
        top_logprobs: The most likely tokens with their log-probabilities, if they were asked for.
    """

    token_id: int
    logprob: float
    finish_reason: str | None = None
    usage: Usage | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether the token belongs to the answer: stop ids and cancelled steps do not."""
        return self.finish_reason is None or self.finish_reason == "length"


WAITING = Step(NO_TOKEN, 0.0, "waiting")
"""What comes instead of a step that is not there yet, from a stream whose reader must not be held up."""


def stream(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    options: SamplingOptions,
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    cancel: CancelToken | None = None,
    prefill_chunk_tokens: int = 512,
    cache: hf.Cache | None = None,
    layout: InputLayout | None = None,
    lookup_tokens: int = 0,
    lookup_ids: Sequence[int] = (),
) -> Iterator[Step]:
    """Generates one answer, token by token.

    With `lookup_tokens` the text itself says how it may go on (see `engine/lookup.py`), and one call of the model looks
    at up to so many tokens more. The answer stays what it is without, token for token, greedy or drawn with a seed,
    up to rounding in the model: every token is drawn from the model's own logits, and a draft only saves the call. It
    pays where reading the weights takes the time (large models, one answer at a time) and the answer repeats what was
    there; 8 is a good number. Batches have no drafts: each row would accept another number of them.

    Args:
        model: The language model.
        prompt_ids: Ids of the prompt; with a cache, only what follows the tokens in it.
        options: How tokens are chosen. Penalty and bans look at `prompt_ids` and the answer, not at the cache.
        stop_ids: Ids that end the answer.
        max_new_tokens: Limit of the answer. Where the model's context leaves less room, that is the limit.
        cancel: Ends the answer early; looked at before each chunk of the prompt and each token.
        prefill_chunk_tokens: Tokens of the prompt per model call: bounds memory, and the time until cancel is seen. A
            model that reads prompts in both directions gets them whole.
        cache: Tokens of earlier turns. Afterwards it holds prompt and answer too, but for the last token given out.
        layout: Masks and positions of prompt and answer; None: the model's own, or the causal one.
        lookup_tokens: Most tokens that are drafted at once; 0 is off. Needs a cache of ours, which can forget.
        lookup_ids: Further text to look drafts up in: that of the tokens in the cache, say.

    Returns:
        A generator of steps; the last one has a finish_reason. Closing it early is fine.

    Raises:
        UsageError: The prompt is empty, has ids the model does not know or leaves no room for an answer; or a number
            is out of range. Raised by this call, before the first step.
        GenerationError: From the generator: the model's logits are not finite.
    """
    check_limits(model, options, max_new_tokens=max_new_tokens, prefill_chunk_tokens=prefill_chunk_tokens)
    _check_lookup(lookup_tokens, cache)
    cached = cache.get_seq_length() if cache is not None else 0
    if cached and reads_whole_prompts(model):
        raise UsageError(
            f"{type(model).__name__} reads a prompt in both directions and cannot go on behind {cached} cached tokens",
            hint="give the whole prompt and no cache",
        )
    limit = answer_limit(model, prompt_ids, max_new_tokens, cached)
    if cache is None:
        cache = new_cache(model, 1, len(prompt_ids) + min(limit, _FIRST_ROOM_TOKENS))
    stops = frozenset(stop_ids)
    batch = Batch(model, [prompt_ids], [0], options, row_generators(options, 1), cache, layout)
    if lookup_tokens:
        batch.lookup = Lookup([*lookup_ids, *prompt_ids], lookup_tokens, stops)
    return _steps(batch, stops, limit, cancel or CancelToken(), prefill_chunk_tokens, cached)


def _steps(
    batch: Batch, stop_ids: frozenset[int], limit: int, cancel: CancelToken, chunk_tokens: int, cached: int
) -> Iterator[Step]:
    prompt_tokens = 0
    started = time.perf_counter()
    prefill_seconds = decode_seconds = 0.0

    def last(token: int, logprob: float, reason: str, tokens: int) -> Step:
        batch.forget_drafts()
        lookup = batch.lookup
        drafts = (0, 0) if lookup is None else (lookup.drafted_tokens, lookup.accepted_tokens)
        usage = Usage(cached, prompt_tokens, tokens, prefill_seconds, decode_seconds, *drafts)
        return Step(token, logprob, reason, usage)

    for prompt_tokens in batch.prefill(chunk_tokens):  # noqa: B007 - read by last()
        if cancel.cancelled:
            break
    prefill_seconds = time.perf_counter() - started
    try:
        for count in range(limit):
            if cancel.cancelled:
                yield last(NO_TOKEN, 0.0, "cancelled", count)
                return
            started = time.perf_counter()
            drawn = batch.advance(limit - count - 1)
            if count == 0:
                prefill_seconds += time.perf_counter() - started
            else:
                decode_seconds += time.perf_counter() - started
            token, logprob = drawn.token_ids[0], drawn.logprobs[0]
            if token in stop_ids:
                yield last(token, logprob, "stop", count + 1)
                return
            if count + 1 == limit:
                yield last(token, logprob, "length", count + 1)
                return
            yield Step(token, logprob)
    finally:  # closed early, or the model failed
        batch.forget_drafts()


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    batch_size: int,
    cancel: CancelToken | None = None,
    progress: Callable[[int, int], None] | None = None,
    prefill_chunk_tokens: int = 512,
) -> list[list[int]]:
    """Generates an answer for each of many prompts.

    Where native code runs the model, `batch_size` rows of any length run side by side and a finished one leaves its
    place to the next prompt. Elsewhere prompts of similar length share a batch, padded on the left. With a seed, an
    answer depends on the seed, its number in `prompts` and its prompt: row i of a batch is
    `stream(..., replace(options, seed=row_seed(seed, i)))`, up to rounding in the model.

    Args:
        model: The language model; a call must accept `attention_mask` and `position_ids`.
        prompts: Ids of each prompt.
        options: How tokens are chosen.
        stop_ids: Ids that end an answer.
        max_new_tokens: Limit of each answer; less where the model's context leaves less room.
        batch_size: Rows at once. More are faster, up to some 64 on a CPU, as long as their keys and values fit.
        cancel: Ends all; looked at before each chunk of a prompt and each token.
        progress: Called with (rows finished, rows in all) whenever rows finish.
        prefill_chunk_tokens: Tokens of the prompts per model call.

    Returns:
        The answers in the order of the prompts, without stop ids. After a cancel, what is there until then.

    Raises:
        UsageError: A prompt or a number does not fit; before anything is computed.
        GenerationError: The model's logits are not finite.
    """
    sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "prefill_chunk_tokens": prefill_chunk_tokens}
    check_limits(model, options, **sizes)
    limits = [answer_limit(model, prompt, max_new_tokens, 0) for prompt in prompts]
    generators = row_generators(options, len(prompts))
    cancel = cancel or CancelToken()
    answers: list[list[int]] = [[] for _ in prompts]

    def take(row: int, token: int) -> bool:
        if token in stops:
            return False
        answers[row].append(token)
        return len(answers[row]) < limits[row]

    stops = frozenset(stop_ids)
    if prompts and why_not(model) is None:
        room = max(len(prompt) + min(limit, _FIRST_ROOM_TOKENS) for prompt, limit in zip(prompts, limits))
        done = answer_in_places(
            model,
            prompts,
            options,
            generators,
            places=batch_size,
            room_tokens=room,
            chunk_tokens=prefill_chunk_tokens,
            take=take,
            cancelled=lambda: cancel.cancelled,
        )
    else:
        sizes_of_calls = (batch_size, prefill_chunk_tokens)
        done = _answer_padded(model, prompts, options, generators, limits, sizes_of_calls, take, cancel)
    finished = 0
    for rows in done:
        finished += rows
        if progress is not None:
            progress(finished, len(prompts))
    return answers


def _answer_padded(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    generators: Sequence[Random],
    limits: Sequence[int],
    sizes: tuple[int, int],
    take: Callable[[int, int], bool],
    cancel: CancelToken,
) -> Iterator[int]:
    """One batch after the other, its rows padded on the left; yields how many rows finished whenever some do."""
    batch_size, chunk_tokens = sizes
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))  # longest first: memory runs out at once
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        room = len(prompts[rows[0]]) + min(max(limits[row] for row in rows), _FIRST_ROOM_TOKENS)
        cache = new_cache(model, len(rows), room)
        batch = Batch(model, [prompts[row] for row in rows], rows, options, [generators[row] for row in rows], cache)
        for _ in batch.prefill(chunk_tokens):
            if cancel.cancelled:
                return
        yield from _answer_rows(batch, take, cancel)
        if cancel.cancelled:
            return


def _answer_rows(batch: Batch, take: Callable[[int, int], bool], cancel: CancelToken) -> Iterator[int]:
    """Advances a batch until its rows are finished; yields how many finished whenever some do."""
    running = set(batch.rows)
    while running and not cancel.cancelled:
        before = len(running)
        for row, token in zip(batch.rows, batch.advance(with_logprobs=False).token_ids):
            if row in running and not take(row, token):
                running.discard(row)
        if len(running) < before:
            yield before - len(running)
        # Dropping rows copies the cache, so it waits until that halves the work.
        if running and 2 * len(running) <= len(batch.rows):
            batch.select([place for place, row in enumerate(batch.rows) if row in running])


def check_limits(model: LanguageModel, options: SamplingOptions, **sizes: int) -> None:
    """Refuses numbers that make no sense, and tokens that the model does not have.

    Args:
        model: The language model.
        options: How tokens are chosen.
        **sizes: Numbers by name that must be 1 or more.

    Raises:
        UsageError: One of them is none, or the options ban or favour a token behind the vocabulary.
    """
    for name, value in sizes.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{name}={value!r}: expected a whole number, 1 or more")
    options.check_vocabulary(model.config.vocab_size)


def _check_lookup(tokens: int, cache: hf.Cache | None) -> None:
    if not isinstance(tokens, Integral) or isinstance(tokens, bool) or tokens < 0:
        raise UsageError(f"lookup_tokens={tokens!r}: expected a whole number, 0 (off) or more")
    if tokens and cache is not None and not isinstance(cache, BufferCache):
        raise UsageError(
            f"lookup_tokens={tokens} with a {type(cache).__name__}: wrong drafts must be taken out of the cache again",
            hint="give a cache from glmkit.engine.new_cache, or lookup_tokens=0",
        )


def answer_limit(model: LanguageModel, prompt: Sequence[int], max_new_tokens: int, cached: int) -> int:
    """How many tokens an answer may have: what was asked for, or what the context leaves.

    Args:
        model: The language model.
        prompt: Ids of the prompt.
        max_new_tokens: What was asked for.
        cached: Tokens that were read before the prompt.

    Raises:
        UsageError: The prompt is empty, has ids that the model does not know, or leaves no room.
    """
    if not len(prompt):
        raise UsageError("the prompt is empty: expected at least one token id")
    vocabulary = model.config.vocab_size
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        bad = next(token for token in prompt if not 0 <= token < vocabulary)
        raise UsageError(
            f"the prompt has the token id {bad}: expected 0 to {vocabulary - 1}",
            hint="tokenizer and model do not belong together",
        )
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        return max_new_tokens
    room = context - cached - len(prompt)
    if room < 1:
        raise ContextLengthError(
            f"the prompt has {cached + len(prompt)} tokens: expected fewer than the model's context of {context}",
            hint="shorten the prompt or leave out old turns",
        )
    return min(max_new_tokens, room)
