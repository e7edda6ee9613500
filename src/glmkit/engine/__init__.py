"""Decoding: how tokens are chosen, cached, generated and turned into text."""

from glmkit.engine.cache import BufferCache, LanguageModel, new_cache
from glmkit.engine.decode import NO_TOKEN, CancelToken, Step, Usage, generate_batch, stream
from glmkit.engine.sampling import SamplingOptions, row_seed
from glmkit.runtime.text import TextStream

__all__ = [
    "NO_TOKEN",
    "BufferCache",
    "CancelToken",
    "LanguageModel",
    "SamplingOptions",
    "Step",
    "TextStream",
    "Usage",
    "generate_batch",
    "new_cache",
    "row_seed",
    "stream",
]
