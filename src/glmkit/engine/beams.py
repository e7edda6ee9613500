"""Strategies that keep several answers: beam search of GLM-130B and GLM, plain sampling in the same form, and blanks.

A strategy is a function of logits with a memory: `step` takes the logits of every beam and the tokens so far, and says
how the beams go on and which beam each of them comes from. It knows nothing of models, so stored logits can drive it.

    prompt -> model -> logits (N, V) -> step -> tokens (M, T+1), parents (M,) -> cache rows reordered -> model -> ...

Letters: `N` beams before a step, `M` beams after it, `T` tokens so far, `V` vocabulary rows.

Source: generation/strategies.py and generate.py of GLM-130B; generation_utils.py of GLM (behaviour, not code).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from glmkit.engine.cache import LanguageModel, new_cache
from glmkit.engine.decode import CancelToken
from glmkit.engine.forward import forward_for
from glmkit.engine.layout import layout_for
from glmkit.engine.sampling import SamplingOptions, draw, row_generators, shortlist
from glmkit.errors import GenerationError, UsageError

_BANNED = -65504.0  # the smallest float16; a number and not -inf, so that there is always some way to go on
_DONE = -1

LengthMeasure = Callable[[int, int], float]


def whole_length(whole: int, generated: int) -> float:
    """GLM-130B's length of an answer: `(5 + whole) / 6`.

    Args:
        whole: Tokens of prompt and answer, the end token among them.
        generated: Not looked at.

    Returns:
        The length.
    """
    return (5.0 + whole) / 6.0


def generated_length(whole: int, generated: int) -> float:
    """The length of an answer in GLM (2021): the answer's own tokens.

    Args:
        whole: Not looked at.
        generated: Tokens of the answer, without its end token.

    Returns:
        The length; an empty answer counts as one token.
    """
    return float(max(1, generated))


class Hypothesis(NamedTuple):
    """An answer and how good it is: its summed log-probability over the length, to the power of the penalty."""

    ids: list[int]  # prompt and answer, the end token among them if there is one
    score: float


class Strategy(Protocol):
    """How beams go on."""

    @property
    def is_done(self) -> bool: ...

    def step(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]: ...

    def finish(self, tokens: Tensor) -> list[Hypothesis]: ...


class BaseStrategy:
    """Draws each row's next token from the softmax of what temperature, top-k and top-p leave.

    Args:
        temperature: Divides the logits; 0 is greedy.
        top_k: Only the k most likely tokens; 0 is off, 1 is greedy.
        top_p: Only the most likely tokens that together reach this probability; 1 is off.
        end_ids: Tokens that end a row.
        banned_ids: Tokens that never come.
        seed: Makes it reproducible; None: from torch's global generator.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.7,
        end_ids: Collection[int] = (),
        banned_ids: Collection[int] = (),
        seed: int | None = None,
    ) -> None:
        self.options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        self.end_ids, self.banned_ids = frozenset(end_ids), sorted(banned_ids)
        self._generators: list[Any] = []
        self._done: list[bool] = []

    @property
    def is_done(self) -> bool:
        """Whether every row has ended."""
        return bool(self._done) and all(self._done)

    def step(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Adds one token to every row; a row that has ended gets -1.

        Args:
            logits: (N, V) of the last position.
            tokens: (N, T) int64.

        Returns:
            Tokens (N, T+1), and the row each one continues: always itself, (N,).
        """
        rows = len(logits)
        if not self._done:
            self._done = [False] * rows
        if len(self._generators) != rows:
            self._generators = list(row_generators(self.options, rows))
        scores = _with_bans(logits, self.banned_ids)
        if self.options.do_sample:
            chosen = draw(*shortlist(scores, self.options), self._generators)
        else:
            chosen = scores.argmax(-1)
        done = torch.tensor(self._done, device=chosen.device)
        chosen = chosen.masked_fill(done, _DONE)
        self._done = [before or token in self.end_ids for before, token in zip(self._done, chosen.tolist())]
        return torch.cat((tokens, chosen[:, None]), dim=1), torch.arange(rows, device=tokens.device)

    def finish(self, tokens: Tensor) -> list[Hypothesis]:
        """The rows as they are; forgets them, so that the strategy can be used again.

        Args:
            tokens: (N, T), as the last step returned them.

        Returns:
            The N rows without the -1 behind their ends, each with the score 0.
        """
        self._done = []
        return [Hypothesis([token for token in row if token != _DONE], 0.0) for row in tokens.tolist()]


class BeamSearchStrategy:
    """Keeps the `num_beams` best beginnings, and the `num_beams` best answers that have ended.

    An answer's score is `sum(log p) / length ** length_penalty`. Each step looks at the `(ends + 1) * num_beams` best
    continuations, so that enough of them go on. The search is over when the worst answer that is kept is as good as
    the best beginning.

    Args:
        num_beams: Beginnings, and answers, that are kept.
        length_penalty: 0: the sum counts; the larger, the more a long answer is preferred.
        no_repeat_ngram_size: No n tokens in a row come twice in the answer; the first of them may stand in the
            prompt. 0 is off.
        min_gen_length: Tokens before an end token may come.
        end_ids: Tokens that end an answer.
        banned_ids: Tokens that never come.
        first_banned_ids: Tokens that do not come first.
        consider_end: Whether `finish` returns the answers that have ended and the beginnings that have not, by
            score; else it returns the beginnings alone.
        deterministic: Whether the best continuations are taken; else they are drawn by their probability.
        measure: Length of an answer: `whole_length` of GLM-130B or `generated_length` of GLM.
        ends_by_rank: GLM's rule: an end counts only if it is among the `num_beams` best continuations.
        seed: Of the drawing; None: from torch's global generator.

    Raises:
        UsageError: A number is out of range.
    """

    def __init__(
        self,
        num_beams: int = 4,
        *,
        length_penalty: float = 1.0,
        no_repeat_ngram_size: int = 3,
        min_gen_length: int = 0,
        end_ids: Collection[int] = (),
        banned_ids: Collection[int] = (),
        first_banned_ids: Collection[int] = (),
        consider_end: bool = True,
        deterministic: bool = True,
        measure: LengthMeasure = whole_length,
        ends_by_rank: bool = False,
        seed: int | None = None,
    ) -> None:
        for name, value, least in (
            ("num_beams", num_beams, 1),
            ("no_repeat_ngram_size", no_repeat_ngram_size, 0),
            ("min_gen_length", min_gen_length, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name}={value!r}: expected a whole number, {least} or more")
        if not math.isfinite(length_penalty):
            raise UsageError(f"length_penalty={length_penalty!r}: expected a finite number")
        self.num_beams, self.length_penalty, self.ngram = num_beams, float(length_penalty), no_repeat_ngram_size
        self.min_gen_length, self.consider_end, self.deterministic = min_gen_length, consider_end, deterministic
        self.end_ids, self.banned_ids, self.first_banned_ids = frozenset(end_ids), banned_ids, first_banned_ids
        self.measure, self.ends_by_rank, self.seed = measure, ends_by_rank, seed
        self._generator: torch.Generator | None = None
        self._start_over()

    def _start_over(self) -> None:
        self.is_done = False
        self.ended: list[Hypothesis] = []  # best first
        self._sums: Tensor | None = None  # (M,) summed log-probabilities of the beginnings
        self._prompt_tokens = 0
        self._generated = 0

    def step(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Moves every beam on by a token.

        Args:
            logits: (N, V) of the last position. N is `num_beams`, or less in the first step, where only the first row
                is looked at.
            tokens: (N, T) int64, prompt and answers so far.

        Returns:
            Tokens (M, T+1), and for each of the M = num_beams beams the number of the beam it continues, (M,).

        Raises:
            UsageError: The vocabulary is too small for so many beams.
        """
        if self._sums is None:
            self._prompt_tokens = tokens.shape[1]
        vocabulary = logits.shape[-1]
        scores = self._scores(logits, tokens)
        sums, parents, words = self._candidates(scores[:1] if len(scores) < self.num_beams else scores)
        kept: list[int] = []
        for rank, word in enumerate(words):
            if word in self.end_ids and not self.is_done:
                if rank < self.num_beams or not self.ends_by_rank:
                    self._keep([*tokens[parents[rank]].tolist(), word], sums[rank], self._generated)
            elif len(kept) < self.num_beams:
                kept.append(rank)
            else:
                break
        if len(kept) < self.num_beams:
            raise UsageError(
                f"{self.num_beams} beams need more than the {vocabulary} tokens of this vocabulary",
                hint="search with fewer beams",
            )
        self._sums = torch.tensor([sums[rank] for rank in kept], device=logits.device)
        taken = torch.tensor([parents[rank] for rank in kept], device=tokens.device)
        added = torch.tensor([words[rank] for rank in kept], device=tokens.device)
        if len(self.ended) == self.num_beams:
            best = self._score(float(self._sums.max()), tokens.shape[1] + 1, self._generated)
            self.is_done = self.is_done or self.ended[-1].score >= best
        self._generated += 1
        return torch.cat((tokens[taken], added[:, None]), dim=1), taken

    def finish(self, tokens: Tensor) -> list[Hypothesis]:
        """The answers, best first, and forgets them, so that the strategy can be used again.

        Args:
            tokens: (M, T), as the last step returned them.

        Returns:
            With `consider_end` at most `num_beams` answers; else the M beginnings.
        """
        sums = [0.0] * len(tokens) if self._sums is None else self._sums.tolist()
        running = list(zip(tokens.tolist(), sums))
        if not self.consider_end:
            result = [Hypothesis(ids, self._score(total, len(ids), self._generated)) for ids, total in running]
        else:
            for ids, total in [] if self.is_done else running:
                self._keep(ids, total, self._generated)
            result = self.ended
        self._start_over()
        return result

    def _scores(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Summed log-probability of every continuation of every beam, (N, V) float32."""
        banned = set(self.banned_ids)
        if self._generated == 0:
            banned |= set(self.first_banned_ids)
        if self._generated < self.min_gen_length:
            banned |= self.end_ids
        scores = _with_bans(logits, sorted(banned))
        if 0 < self.ngram < tokens.shape[1] and self._generated:
            for beam, ids in enumerate(tokens.tolist()):
                repeated = _ends_of_ngrams(ids, self.ngram, self._prompt_tokens)
                scores[beam, torch.tensor(repeated, dtype=torch.int64, device=scores.device)] = _BANNED
        scores = scores.log_softmax(-1)
        return scores if self._sums is None else scores + self._sums[:, None]

    def _candidates(self, scores: Tensor) -> tuple[list[float], list[int], list[int]]:
        """Sums, beams and tokens of the continuations to look at, best first."""
        flat = scores.flatten()
        count = min((max(1, len(self.end_ids)) + 1) * self.num_beams, flat.numel())
        if self.deterministic:
            sums, picked = flat.topk(count)
        else:  # the largest of log p plus Gumbel noise are a draw without replacement
            noise = -torch.empty(flat.shape).exponential_(generator=self._random()).log()
            picked = (flat + noise.to(flat.device)).topk(count).indices
            sums, order = flat[picked].sort(descending=True)
            picked = picked[order]
        vocabulary = scores.shape[-1]
        return sums.tolist(), (picked // vocabulary).tolist(), (picked % vocabulary).tolist()

    def _random(self) -> torch.Generator:
        if self._generator is None:
            seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
            self._generator = torch.Generator().manual_seed(seed)
        return self._generator

    def _score(self, total: float, whole: int, generated: int) -> float:
        return float(total / self.measure(whole, generated) ** self.length_penalty)

    def _keep(self, ids: list[int], total: float, generated: int) -> None:
        score = self._score(total, len(ids), generated)
        place = sum(other.score > score for other in self.ended)
        self.ended.insert(place, Hypothesis(ids, score))
        del self.ended[self.num_beams :]


def _with_bans(logits: Tensor, banned: Sequence[int]) -> Tensor:
    scores = logits.float()
    if not bool(scores.amax(-1).isfinite().all()):
        raise GenerationError(
            "the model gave logits that are no finite numbers",
            hint="float16 overflows above 65,504: load with dtype='bfloat16' or 'float32'",
        )
    if not banned:
        return scores.clone()
    return scores.index_fill(-1, torch.tensor(list(banned), device=logits.device), _BANNED)


def _ends_of_ngrams(ids: Sequence[int], size: int, start: int) -> list[int]:
    """Tokens that would repeat an n-gram of which the last token stands at `start` or later."""
    last = list(ids[len(ids) - size + 1 :])
    return [ids[end] for end in range(max(start, size - 1), len(ids)) if list(ids[end - size + 1 : end]) == last]


@torch.inference_mode()
def search(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    strategy: Strategy,
    *,
    max_new_tokens: int,
    cancel: CancelToken | None = None,
) -> list[Hypothesis]:
    """Answers one prompt with a strategy.

    Args:
        model: A language model of any family.
        prompt_ids: Ids of the prompt, with everything in front of the answer (sop for the blank-filling families).
        strategy: How beams go on; afterwards it can be used again, and its random numbers go on.
        max_new_tokens: Longest answer, the end token among them.
        cancel: Ends the search early, with what there is; looked at before each token.

    Returns:
        Prompt and answer of each beam, best first.

    Raises:
        UsageError: The prompt is empty or leaves no room in the model's context.
        GenerationError: The model's logits are not finite.
    """
    room = _room(model, prompt_ids, max_new_tokens)
    tokens = torch.tensor([list(prompt_ids)], dtype=torch.int64, device=model.device)
    layout = layout_for(model, tokens, tokens.new_zeros(1))
    cache = new_cache(model, 1, tokens.shape[1] + room)
    forward = forward_for(model, cache)
    ids, inputs = tokens, layout.prompt(0, tokens.shape[1])
    try:
        for left in range(room - 1, -1, -1):
            tokens, parents = strategy.step(forward(ids, inputs, 1)[:, -1], tokens)
            if strategy.is_done or not left or (cancel is not None and cancel.cancelled):
                break
            places = parents.tolist()
            if places != list(range(cache.layers[0].batch_size)):
                cache.select_rows(places, shared_tokens=len(prompt_ids))
                layout.select(places)
            ids, inputs = tokens[:, -1:], layout.step()
    finally:  # also when the model fails: the next search must not find this one's beams
        answers = strategy.finish(tokens)
    return answers


def beam_search(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    *,
    num_beams: int = 4,
    max_new_tokens: int = 128,
    end_ids: Collection[int] | None = None,
    **options: Any,
) -> list[Hypothesis]:
    """Beam search over the answers to one prompt, for every family.

    Args:
        model: The language model.
        prompt_ids: Ids of the prompt.
        num_beams: Beams.
        max_new_tokens: Longest answer, the end token among them.
        end_ids: Tokens that end an answer; None: `eos_token_id` of the model's config.
        **options: Of `BeamSearchStrategy`.

    Returns:
        At most `num_beams` of prompt and answer, best first.

    Raises:
        UsageError: A number is out of range, or the prompt does not fit.
    """
    if end_ids is None:
        named = getattr(model.config, "eos_token_id", None)
        end_ids = () if named is None else [named] if isinstance(named, int) else list(named)
    strategy = BeamSearchStrategy(num_beams, end_ids=end_ids, **options)
    return search(model, prompt_ids, strategy, max_new_tokens=max_new_tokens)


def _room(model: LanguageModel, prompt_ids: Sequence[int], max_new_tokens: int) -> int:
    if not len(prompt_ids):
        raise UsageError("the prompt is empty: expected at least one token id")
    context = getattr(model.config, "max_position_embeddings", None)
    room = max_new_tokens if context is None else min(max_new_tokens, context - len(prompt_ids))
    if room < 1:
        raise UsageError(
            f"no room for an answer: {len(prompt_ids)} tokens of prompt, {max_new_tokens} new tokens at most, and a"
            f" context of {context}",
            hint="shorten the prompt or ask for at least one new token",
        )
    return room
