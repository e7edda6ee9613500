"""What is measured: glmkit's engine, the official way, and transformers' `generate`, with the same three questions.

    decode   a context that is in the cache already, then N tokens; the context is random, nobody has to read it
    prefill  a prompt of one row, up to its first token
    slice    the same with one block, to know what lies outside of the blocks

Each answer is a function that works once and returns the seconds that count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from glmkit.bench.models import first_block
from glmkit.bench.official import OfficialWay
from glmkit.engine.batch import Batch
from glmkit.engine.cache import BufferCache, new_cache
from glmkit.engine.sampling import SamplingOptions, row_generators

_GREEDY = SamplingOptions(temperature=0.0)
_CHUNK = 512  # tokens of a prompt read at once, the engine's own choice

Work = Callable[[], float]


class Subject(Protocol):
    """Something that generates."""

    name: str
    model: Any

    def decode(self, rows: int, context: int, tokens: int) -> Work:
        """Generates `tokens` tokens in each of `rows` rows behind a context."""
        ...

    def prefill(self, tokens: int) -> Work:
        """Reads a prompt and chooses the first token."""
        ...

    def slice(self) -> Subject:
        """The same with the first block alone."""
        ...


class Ours:
    """glmkit's decode loop, native code and all, if the model has layers for it.

    Args:
        model: The model.
        name: For the table.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    def slice(self) -> Ours:
        return Ours(first_block(self.model), f"{self.name}, one block")

    def decode(self, rows: int, context: int, tokens: int) -> Work:
        cache = random_cache(self.model, rows, context, tokens)
        prompts = random_prompts(self.model, rows, context).tolist()
        logits = torch.randn(rows, 1, self.model.config.vocab_size)

        def work() -> float:
            cache.truncate(context)
            batch = Batch(self.model, prompts, range(rows), _GREEDY, row_generators(_GREEDY, rows), cache)
            batch.logits = logits  # as if the prompt had been read
            batch.advance()
            started = time.perf_counter()
            for _ in range(tokens):
                batch.advance()
            return time.perf_counter() - started

        return work

    def prefill(self, tokens: int) -> Work:
        prompts = random_prompts(self.model, 1, tokens).tolist()

        def work() -> float:
            cache = new_cache(self.model, 1, tokens + 1)
            started = time.perf_counter()
            batch = Batch(self.model, prompts, [0], _GREEDY, row_generators(_GREEDY, 1), cache)
            for _ in batch.prefill(_CHUNK):
                pass
            batch.advance()
            return time.perf_counter() - started

        return work


class Official:
    """The official way, over the same tensors.

    Args:
        model: The model.
        name: For the table.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name, self.way = model, name, OfficialWay(model)

    def slice(self) -> Official:
        return Official(first_block(self.model), f"{self.name}, one block")

    def decode(self, rows: int, context: int, tokens: int) -> Work:
        past = self.way.random_past(rows, context)
        ids = random_prompts(self.model, rows, 2)[:, :1]

        def work() -> float:
            started, new, last = time.perf_counter(), past, ids
            for step in range(tokens):
                logits, new = self.way(last, new, self._positions(rows, context, step))
                last = logits[:, -1].argmax(-1, keepdim=True)
            return time.perf_counter() - started

        return work

    def prefill(self, tokens: int) -> Work:
        ids = random_prompts(self.model, 1, tokens)
        positions = self.model.transformer.positions(ids) if self.way.first_generation else None

        def work() -> float:
            started = time.perf_counter()
            logits, _ = self.way(ids, None, positions)
            logits[:, -1].argmax(-1)
            return time.perf_counter() - started

        return work

    def _positions(self, rows: int, context: int, step: int) -> Tensor | None:
        if not self.way.first_generation:
            return None
        return torch.tensor([[context - 2], [step + 2]]).expand(rows, 2, 1)


class Generate:
    """transformers' `generate` on the same model: what its loop costs, compared with ours.

    Args:
        model: The model.
        name: For the table.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    def slice(self) -> Generate:
        return Generate(first_block(self.model), f"{self.name}, one block")

    def decode(self, rows: int, context: int, tokens: int) -> Work:
        ids = random_prompts(self.model, rows, context)

        def work() -> float:
            return self._seconds(ids, tokens + 1) - self._seconds(ids, 1)

        return work

    def prefill(self, tokens: int) -> Work:
        ids = random_prompts(self.model, 1, tokens)
        return lambda: self._seconds(ids, 1)

    def _seconds(self, ids: Tensor, new: int) -> float:
        started = time.perf_counter()
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        return time.perf_counter() - started


def random_prompts(model: Any, rows: int, tokens: int) -> Tensor:
    """Prompts of random ids, (B, T); those of ChatGLM-6B end with its mask token and the start of the answer."""
    config = model.config
    random = torch.Generator().manual_seed(1)
    most = getattr(config, "gmask_token_id", None) or config.vocab_size
    ids = torch.randint(3, min(most, config.vocab_size) - 1, (rows, tokens), generator=random)
    if hasattr(config, "gmask_token_id"):
        ids[:, -2], ids[:, -1] = config.gmask_token_id, config.bos_token_id
    return ids


def random_cache(model: Any, rows: int, context: int, more: int) -> BufferCache:
    """A cache as it is behind a context that nobody has read.

    Args:
        model: The model.
        rows: `B`.
        context: Tokens in it.
        more: Room for so many more.

    Returns:
        The cache, with random keys and values in the model's dtype.
    """
    config = model.config
    cache = new_cache(model, rows, context + more + 1)
    shape = (rows, config.num_key_value_heads, context, config.head_dim)
    numbers = torch.randn(shape).to(model.dtype)
    for layer in range(config.num_hidden_layers):
        cache.update(numbers, numbers, layer)
    return cache
