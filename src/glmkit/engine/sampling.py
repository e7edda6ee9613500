"""From logits to the next token: options, one pure function per rule, and the draw itself.

The rules and their order are those of transformers, which the official code calls: repetition penalty, bias and bans,
then temperature, top-k, top-p and min-p.

Letters: `B` rows, `V` vocabulary rows. Every function takes and returns float32 scores (B, V); -inf means "never".
"""

from __future__ import annotations

import hashlib
import math
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glmkit.errors import GenerationError, UsageError

_GREEDY_BELOW = 1e-5  # dividing by less than this says nothing that argmax does not say
_TOP_P_LOOKS = (128, 1024)  # best scores that are looked at before all 65,024 are sorted, which takes 25 times as long


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen; the defaults sample from the model's own distribution.

    Args:
        temperature: Divides the logits; 0 (and anything below 1e-5) takes the most likely token, whatever follows.
        top_k: Only the k most likely tokens, with all that tie with the last of them; 0 is off.
        top_p: Only the most likely tokens that together reach this probability; 1 is off, 0 leaves one token.
        min_p: Only tokens with at least this share of the most likely token's probability; 0 is off.
        repetition_penalty: Tokens of the prompt and the answer so far lose: a positive logit is divided by it, a
            negative one multiplied; 1 is off.
        presence_penalty: Taken off the logits of tokens that the answer has already; 0 is off.
        frequency_penalty: The same, once for each time that the answer has the token; 0 is off.
        seed: Makes sampling reproducible. None: taken from torch's global generator, which `torch.manual_seed` sets.
        banned_ids: Token sequences that must not appear, each a tuple of ids.
        logit_bias: Token id -> number added to its logit.

    Raises:
        UsageError: A value is of the wrong kind or outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    banned_ids: tuple[tuple[int, ...], ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(_is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _require(_is_id(self.top_k), "top_k", self.top_k, "a whole number, 0 (off) or more")
        _require(_is_number(self.top_p) and 0 <= self.top_p <= 1, "top_p", self.top_p, "a number from 0 to 1 (off)")
        _require(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "a number from 0 (off) to 1")
        penalty = self.repetition_penalty
        _require(_is_number(penalty) and penalty > 0, "repetition_penalty", penalty, "a number above 0 (1 is off)")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(_is_number(getattr(self, name)), name, getattr(self, name), "a finite number (0 is off)")
        _require(self.seed is None or _is_id(self.seed), "seed", self.seed, "a whole number, 0 or more, or None")
        banned = "a list of non-empty lists of token ids, 0 or more"
        _require(_is_list(self.banned_ids), "banned_ids", self.banned_ids, banned)
        for word in self.banned_ids:
            _require(_is_list(word) and len(word) > 0 and all(map(_is_id, word)), "banned_ids", word, banned)
        bias = "a mapping of token ids, 0 or more, to finite numbers"
        _require(isinstance(self.logit_bias, Mapping), "logit_bias", self.logit_bias, bias)
        for token, value in self.logit_bias.items():
            _require(_is_id(token) and _is_number(value), "logit_bias", {token: value}, bias)
        # Copies, so that the caller's lists can change without changing these options.
        object.__setattr__(self, "banned_ids", tuple(tuple(int(token) for token in word) for word in self.banned_ids))
        object.__setattr__(self, "logit_bias", {int(token): float(value) for token, value in self.logit_bias.items()})

    @property
    def do_sample(self) -> bool:
        """Whether there is chance in it; False is greedy."""
        return self.temperature >= _GREEDY_BELOW

    def check_vocabulary(self, vocabulary_size: int) -> None:
        """Refuses banned or biased token ids that the model does not have.

        Args:
            vocabulary_size: `V`.

        Raises:
            UsageError: An id is `V` or more.
        """
        banned = [token for word in self.banned_ids for token in word]
        for name, ids in (("banned_ids", banned), ("logit_bias", list(self.logit_bias))):
            last = max(ids, default=-1)
            _require(last < vocabulary_size, name, last, f"token ids below the vocabulary size {vocabulary_size}")


class Draw(NamedTuple):
    """The chosen tokens of a batch: on the device for the next step, and as numbers for everybody else."""

    ids: Tensor  # (B,) int64
    token_ids: list[int]
    logprobs: list[float]


def sample(
    logits: Tensor,
    options: SamplingOptions,
    generators: Sequence[random.Random],
    previous_ids: Sequence[Sequence[int]],
    *,
    step: int = 0,
    rows: Sequence[int] | None = None,
    answer_tokens: Sequence[int] | None = None,
    allowed: Sequence[Tensor | None] | None = None,
    with_logprobs: bool = True,
) -> Draw:
    """Chooses one token per row.

    Every row draws one number from its own generator, so what a row gets does not depend on its neighbours, and a seed
    means the same on every device.

    Args:
        logits: (B, V), any floating dtype, as the model gave them.
        options: The rules.
        generators: One per row; greedy choice does not touch them.
        previous_ids: Prompt and answer so far of each row; only penalties and bans of several tokens look at them.
        step: Number of the token in the answer, for messages.
        rows: The rows' numbers in the caller's batch, for messages; 0 … B-1 if None.
        answer_tokens: How many of each row's `previous_ids` are its answer; None: `step`.
        allowed: For each row the only tokens that may be chosen, (V,) bool, or None; None: no row is limited.
        with_logprobs: Whether log-probabilities are wanted; a greedy choice takes half the time without.

    Returns:
        The tokens, and their log-probability under the model itself: before penalty, bias, bans and filters. Without
        log-probabilities that list is empty.

    Raises:
        GenerationError: A logit is NaN or +inf, or no token is left.
    """
    logits = logits.float()
    answers = [len(ids) - (step if answer_tokens is None else answer_tokens[i]) for i, ids in enumerate(previous_ids)]
    scores = adjust(logits, options, previous_ids, answers)
    if allowed is not None:
        scores = keep_allowed(scores, allowed)
    if scores is not logits and bool((scores.amax(-1) == -math.inf).any()):
        raise GenerationError(
            f"no token is left to choose from at step {step}: every one is banned", hint="ban fewer tokens"
        )
    ids = draw(*shortlist(scores, options), generators) if options.do_sample else _best(scores)
    # NaN and +inf anywhere in a row reach all its log-probabilities, and win an argmax over all its logits: so one look
    # at B numbers sees them all.
    told = logits if not with_logprobs and not options.do_sample and scores is logits else logits.log_softmax(-1)
    numbers = told.gather(-1, ids[:, None])[:, 0].tolist()
    for row, number in enumerate(numbers):
        if not math.isfinite(number):
            raise _not_finite(logits[row], row if rows is None else rows[row], step)
    return Draw(ids, ids.tolist(), numbers if with_logprobs else [])


def adjust(
    logits: Tensor, options: SamplingOptions, previous_ids: Sequence[Sequence[int]], answers: Sequence[int]
) -> Tensor:
    """Penalties, bias and bans: what holds for greedy choice too.

    Args:
        logits: (B, V) float32, not changed.
        options: The rules.
        previous_ids: Prompt and answer so far of each row.
        answers: Where in them each row's answer begins.

    Returns:
        (B, V) float32; `logits` itself if nothing is asked for.
    """
    scores = logits
    if options.repetition_penalty != 1.0:
        scores = penalise_repetition(scores, previous_ids, options.repetition_penalty)
    if options.presence_penalty or options.frequency_penalty:
        said = [ids[start:] for ids, start in zip(previous_ids, answers)]
        scores = penalise_said(scores, said, options.presence_penalty, options.frequency_penalty)
    if options.logit_bias:
        scores = add_bias(scores, options.logit_bias)
    if options.banned_ids:
        scores = ban(scores, previous_ids, options.banned_ids)
    return scores


def warp(scores: Tensor, options: SamplingOptions) -> Tensor:
    """Temperature, top-k, top-p and min-p over the whole vocabulary: the distribution that `sample` draws from.

    Args:
        scores: (B, V) float32.
        options: The rules; `do_sample` must hold.

    Returns:
        (B, V) float32, -inf where a token is left out; softmax gives the probabilities.
    """
    values, ids = shortlist(scores, options)
    return values if ids is None else torch.full_like(scores, -math.inf).scatter(-1, ids, values)


def shortlist(scores: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor | None]:
    """Like `warp`, but after top-k or top-p only the tokens that are left are looked at again.

    Returns:
        Scores (B, N) and their token ids (B, N), or (B, V) and None without top-k and top-p.
    """
    scores = scores / options.temperature
    ids = None
    if options.top_k:
        scores, ids = largest(scores, options.top_k)
        if options.top_p < 1.0:
            scores = keep_top_p(scores, options.top_p)
    elif options.top_p < 1.0:
        values, found = _nucleus(scores, options.top_p)
        ids, order = found.sort(dim=-1)  # a seed gives the same tokens as over the whole vocabulary
        scores = values.gather(-1, order)
    if options.min_p > 0.0:
        scores = keep_min_p(scores, options.min_p)
    return scores, ids


def penalise_repetition(scores: Tensor, previous_ids: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Makes tokens that were there before less likely (penalty > 1) or more (< 1).

    Args:
        scores: (B, V) float32.
        previous_ids: Ids of each row, in any number, also repeated: a token is penalised once.
        penalty: Positive scores are divided by it, negative ones multiplied.

    Returns:
        (B, V) float32.

    Source: Keskar et al. 2019 (arXiv:1909.05858) as transformers does it.
    """
    out = scores.clone()
    for row, previous in enumerate(previous_ids):
        ids = torch.tensor(previous, dtype=torch.int64, device=scores.device)
        seen = scores[row, ids]
        out[row, ids] = torch.where(seen < 0, seen * penalty, seen / penalty)
    return out


def penalise_said(scores: Tensor, answers: Sequence[Sequence[int]], presence: float, frequency: float) -> Tensor:
    """Makes tokens that the answer has already less likely (positive penalties) or more (negative).

    Args:
        scores: (B, V) float32.
        answers: Ids of each row's answer so far.
        presence: Taken off once.
        frequency: Taken off for each time.

    Returns:
        (B, V) float32.

    Source: the parameters presence_penalty and frequency_penalty of OpenAI's API.
    """
    out = scores.clone()
    for row, answer in enumerate(answers):
        ids, counts = torch.tensor(answer, dtype=torch.int64, device=scores.device).unique(return_counts=True)
        out[row, ids] -= presence + frequency * counts.to(out.dtype)
    return out


def keep_allowed(scores: Tensor, allowed: Sequence[Tensor | None]) -> Tensor:
    """Leaves only some tokens to some rows.

    Args:
        scores: (B, V) float32.
        allowed: (V,) bool for each row, None for one that is free.

    Returns:
        (B, V) float32, -inf for what is not allowed.
    """
    out = scores.clone()
    for row, mask in enumerate(allowed):
        if mask is not None:
            out[row].masked_fill_(~mask.to(out.device), -math.inf)
    return out


def add_bias(scores: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Adds a number to the scores of some tokens, in every row. Returns (B, V) float32."""
    ids = torch.tensor(list(bias), dtype=torch.int64, device=scores.device)
    values = torch.tensor(list(bias.values()), dtype=scores.dtype, device=scores.device)
    return scores.index_add(-1, ids, values.expand(scores.shape[0], -1))


def ban(scores: Tensor, previous_ids: Sequence[Sequence[int]], banned_ids: Iterable[Sequence[int]]) -> Tensor:
    """Forbids the last token of each banned sequence where the tokens before it are already there.

    Args:
        scores: (B, V) float32.
        previous_ids: Prompt and answer so far of each row.
        banned_ids: Sequences of one or more token ids.

    Returns:
        (B, V) float32.
    """
    out = scores.clone()
    words = list(banned_ids)
    for row, previous in enumerate(previous_ids):
        last = [w[-1] for w in words if len(w) == 1 or list(previous[-(len(w) - 1) :]) == list(w[:-1])]
        if last:
            out[row, torch.tensor(last, device=scores.device)] = -math.inf
    return out


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest scores of each row, and all that tie with the last of them.

    Args:
        scores: (B, V) float32.
        count: At least 1; more than V means all.

    Returns:
        Scores (B, N) from large to small and their token ids (B, N). N is the largest number that any row needs; rows
        that need fewer end in -inf.
    """
    count = min(count, scores.shape[-1])
    values, ids = scores.topk(min(count + 1, scores.shape[-1]))
    edge = values[:, count - 1 : count]
    # One more than asked for shows whether there is a tie; counting over the whole vocabulary is then rarely needed.
    if bool(((values[:, count:] == edge) & (edge > -math.inf)).any()):
        values, ids = scores.topk(int((scores >= edge).sum(-1).max()))
        return values.masked_fill(values < edge, -math.inf), ids
    return values[:, :count], ids[:, :count]


def keep_top_k(scores: Tensor, count: int) -> Tensor:
    """Leaves the `count` most likely tokens, with ties of the last. Returns (B, V) float32, the others -inf."""
    values, ids = largest(scores, count)
    return torch.full_like(scores, -math.inf).scatter(-1, ids, values)


def keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Leaves the fewest most likely tokens that together reach probability `top_p`, at least one.

    Args:
        scores: (B, V) float32.
        top_p: From 0 up to, not including, 1.

    Returns:
        (B, V) float32, the others -inf.

    Source: Holtzman et al. 2020 (arXiv:1904.09751).
    """
    values, ids = _nucleus(scores, top_p)
    return torch.full_like(scores, -math.inf).scatter(-1, ids, values)


def _nucleus(scores: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Scores (B, N) from large to small, -inf where they are outside, and their token ids (B, N)."""
    whole = scores.softmax(-1)
    for count in (*_TOP_P_LOOKS, scores.shape[-1]):
        values, ids = scores.topk(count) if count < scores.shape[-1] else scores.sort(descending=True)
        probabilities = whole.gather(-1, ids)
        # The margin is far above the rounding of a float32 sum, so a look that is enough is surely enough.
        if count >= scores.shape[-1] or bool((probabilities.sum(-1) >= top_p + 1e-3).all()):
            break
    more_likely = probabilities.cumsum(-1) - probabilities  # what all better tokens already have
    outside = more_likely >= top_p
    outside[:, 0] = False
    return values.masked_fill(outside, -math.inf), ids


def keep_min_p(scores: Tensor, min_p: float) -> Tensor:
    """Leaves the tokens with at least `min_p` times the probability of the most likely one.

    Args:
        scores: (B, V) float32.
        min_p: From 0 to 1.

    Returns:
        (B, V) float32, the others -inf.
    """
    shares = (scores - scores.amax(-1, keepdim=True)).exp()  # of the most likely token's probability
    return scores.masked_fill(shares < min_p, -math.inf)


def draw(scores: Tensor, ids: Tensor | None, generators: Sequence[random.Random]) -> Tensor:
    """Draws one token per row by inverting the cumulative distribution at one random number.

    Args:
        scores: (B, N) float32.
        ids: Token ids of the columns, (B, N), or None if a column is its own id.
        generators: One per row; each gives one number.

    Returns:
        (B,) int64.
    """
    # Not softmax: its sum depends in its last place on how many columns of -inf the neighbours made necessary.
    cumulative = (scores - scores.amax(-1, keepdim=True)).exp().cumsum(-1)
    total = cumulative[:, -1:]
    numbers = torch.tensor([[generator.random()] for generator in generators], dtype=torch.float64)
    # Rounding must not reach the total: the search would end behind the last token that can be drawn.
    points = torch.minimum(numbers.to(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    columns = torch.searchsorted(cumulative, points, right=True).clamp_(max=scores.shape[-1] - 1)
    return (columns if ids is None else ids.gather(-1, columns))[:, 0]


def _best(scores: Tensor) -> Tensor:
    """The first of the largest scores of each row, (B,) int64; on a CPU numpy finds it 10 times as fast as torch."""
    return torch.from_numpy(scores.numpy(force=True).argmax(-1)) if scores.is_cpu else scores.argmax(-1)


def row_seed(seed: int, row: int) -> int:
    """The seed of one row of a batch: row 0 has the seed itself, so a single answer is row 0 of its batch."""
    return seed if row == 0 else int.from_bytes(hashlib.sha256(f"{seed}/{row}".encode()).digest()[:8], "big")


def row_generators(options: SamplingOptions, rows: int) -> list[random.Random]:
    """One source of random numbers per row of a call, a function of the seed and the row's number alone."""
    seed = options.seed
    if seed is None:  # greedy choice must not move torch's generator, it may be that of a training run
        seed = int(torch.randint(2**62, ())) if options.do_sample else 0
    return [random.Random(row_seed(seed, row)) for row in range(rows)]


def _not_finite(logits: Tensor, row: int, step: int) -> GenerationError:
    nan, infinite = int(logits.isnan().sum()), int((logits == math.inf).sum())
    what = f"{nan} NaN and {infinite} infinite" if nan or infinite else "no finite"
    return GenerationError(
        f"the model gave {what} logits of {logits.numel()} in row {row} at step {step}; expected finite numbers",
        hint="float16 overflows above 65,504: load with dtype='bfloat16' or 'float32'; "
        "if that does not help, weights or adapter are damaged: download or train them again",
    )


def _require(good: bool, name: str, value: Any, expected: str) -> None:
    if not good:
        raise UsageError(f"{name}={value!r:.80}: expected {expected}")


def _is_number(value: Any) -> bool:
    # Compared, not asked by `isfinite`, which fails for a whole number of 400 digits.
    return isinstance(value, Real) and not isinstance(value, bool) and bool(abs(value) <= sys.float_info.max)  # type: ignore[operator]


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
