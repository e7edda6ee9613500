"""Rows that advance together, token by token: the state of a generation, and the one place where the model is called.

    last token, drafts -> model -> logits of each -> draw a token -> is it the draft? then the next draw needs no model
                       ^                                              if not: the cache forgets the rest of the drafts
                       +------------------------------------------------+

Letters: `B` rows, `T` new tokens, `V` vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import torch
from torch import Tensor

from glmkit import hf
from glmkit.engine.cache import BufferCache, LanguageModel
from glmkit.engine.forward import forward_for
from glmkit.engine.layout import InputLayout, layout_for
from glmkit.engine.lookup import Lookup
from glmkit.engine.sampling import Draw, SamplingOptions, sample


class Batch:
    """Rows that advance together: their cache, their place in it, and what they have said so far.

    Args:
        model: The language model.
        prompts: Ids of each row.
        rows: The rows' numbers in the caller's list.
        options: How tokens are chosen.
        generators: Random numbers of each row.
        cache: Empty, or for a single row with earlier tokens.
        layout: Masks and positions; None: the model's own, or the causal one.
    """

    @torch.inference_mode()  # all ids are tensors of one kind, so a compiled model is compiled for one kind only
    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        options: SamplingOptions,
        generators: Sequence[Random],
        cache: hf.Cache,
        layout: InputLayout | None = None,
    ) -> None:
        self.model, self.options, self.cache = model, options, cache
        self.rows, self.generators = list(rows), list(generators)
        self.history = [[int(token) for token in prompt] for prompt in prompts]
        self.step = 0
        self.logits = torch.empty(0)  # (B, keep, V) of the last positions
        self.place = 0  # among these, of the next token; above 0 it counts the drafts that have come true
        self.drawn: Draw | None = None
        self.lookup: Lookup | None = None  # where drafts come from, for a single row
        self.drafts: list[int] = []  # that went through the model with the last token
        self.columns = 0  # of the cache before they did
        self.forward = forward_for(model, cache)
        lengths = [len(prompt) for prompt in self.history]
        width = max(lengths)
        padded = [[0] * (width - len(prompt)) + prompt for prompt in self.history]
        self.ids = torch.tensor(padded, dtype=torch.int64, device=model.device)  # (B, T)
        pads = torch.tensor([width - length for length in lengths], device=model.device)
        self.layout = layout_for(model, self.ids, pads) if layout is None else layout

    def prefill(self, chunk_tokens: int) -> Iterator[int]:
        """Reads the prompts; yields before each chunk, and at the end, the number of tokens read so far."""
        width = self.ids.shape[1]
        if self.layout.whole_prompt:
            chunk_tokens = width
        for start in range(0, width, chunk_tokens):
            yield start
            end = min(start + chunk_tokens, width)
            with torch.inference_mode():  # not around a yield: left open there, it would leak into the consumer's code
                self.logits = self.forward(self.ids[:, start:end], self.layout.prompt(start, end), 1)
        yield width

    @torch.inference_mode()
    def advance(self, room: int = 0, *, with_logprobs: bool = True) -> Draw:
        """Chooses the next token of every row, after running the model over the last ones.

        Args:
            room: Most tokens that may follow it; no more are drafted.
            with_logprobs: Whether log-probabilities are wanted.
        """
        if self.drawn is not None and not self.place:
            self._read(self.drawn.ids[:, None], [] if self.lookup is None else self.lookup.propose(room))
        self.drawn = sample(
            self.logits[:, self.place],
            self.options,
            self.generators,
            self.history,
            step=self.step,
            rows=self.rows,
            with_logprobs=with_logprobs,
        )
        for history, token in zip(self.history, self.drawn.token_ids):
            history.append(token)
        self.step += 1
        if self.lookup is not None:
            self.lookup.push(self.drawn.token_ids[0])
            self._compare(self.lookup, self.drawn.token_ids[0])
        return self.drawn

    def _read(self, ids: Tensor, drafts: list[int]) -> None:
        """Runs the model over the last tokens, (B, 1), and over drafts of what follows them."""
        if drafts:
            self.drafts, self.columns = drafts, self.cache.get_seq_length()
            ids = torch.cat((ids, ids.new_tensor([drafts])), dim=1)
        self.logits = self.forward(ids, self.layout.step(ids.shape[1]), ids.shape[1])

    def _compare(self, lookup: Lookup, token: int) -> None:
        """Goes on to the next logits if the token was drafted; else takes the drafts that are left out of the cache."""
        drafts = self.drafts
        if self.place < len(drafts) and drafts[self.place] == token:
            self.place += 1
        elif drafts:
            if self.place < len(drafts):
                _truncate(self.cache, self.columns + 1 + self.place)
                self.layout.rewind(len(drafts) - self.place)
            lookup.judge(len(drafts), self.place)
            self.drafts, self.place = [], 0

    def forget_drafts(self) -> None:
        """Ends the answer: the cache keeps prompt and answer, but for the last token given out."""
        if self.drafts and self.lookup is not None:
            _truncate(self.cache, self.columns + self.place)
            self.lookup.judge(len(self.drafts), self.place)
            self.drafts, self.place = [], 0

    def select(self, places: Sequence[int]) -> None:
        """Keeps some rows of the batch, by their place in it."""
        assert isinstance(self.cache, BufferCache)
        assert self.drawn is not None
        self.cache.select_rows(places)
        kept = torch.tensor(places, device=self.drawn.ids.device)
        self.drawn = self.drawn._replace(ids=self.drawn.ids[kept])
        self.layout.select(places)
        for name in ("rows", "generators", "history"):
            values = getattr(self, name)
            setattr(self, name, [values[place] for place in places])


def _truncate(cache: hf.Cache, tokens: int) -> None:
    assert isinstance(cache, BufferCache)
    cache.truncate(tokens)
