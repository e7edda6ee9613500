"""What the model has read of a conversation, kept for its next turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glmkit.adapters import adapter_of
from glmkit.engine.cache import BufferCache, new_cache
from glmkit.engine.layout import reads_whole_prompts

_ROOM_TOKENS = 1024  # for an answer, when a cache begins; it grows


class PromptCache:
    """Keys and values of a conversation, so that the next answer reads only what is new.

    One answer at a time may use it, and always of the same model. What was read with one adapter is nothing for
    another: a switch forgets it, and the conversation is read again.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []  # what was given to the model so far, the last token perhaps not yet
        self._cache: BufferCache | None = None
        self._adapter: str | None = None  # that has read it

    def begin(self, model: Any, prompt: Sequence[int]) -> tuple[BufferCache, Sequence[int]]:
        """Forgets what the prompt does not begin with.

        Args:
            model: The model, or its view with an adapter.
            prompt: Ids of the next prompt.

        Returns:
            The cache, and those ids of the prompt that are not in it, at least one.
        """
        if self._cache is None:
            self._cache = new_cache(model, 1, len(prompt) + _ROOM_TOKENS)
        if reads_whole_prompts(model) or adapter_of(model) != self._adapter:
            self._cache.truncate(0)  # nothing of one prompt, or of one adapter's reading, is of use for the next
        self._adapter = adapter_of(model)
        filled = min(self._cache.get_seq_length(), len(self.ids), len(prompt) - 1)
        same = next((place for place in range(filled) if self.ids[place] != prompt[place]), filled)
        self._cache.truncate(same)
        self.ids = list(prompt)
        return self._cache, prompt[same:]
