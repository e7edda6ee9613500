"""Many prompts on a fixed number of places: who finishes leaves its place, and its cache, to the next prompt.

    prompts, longest first -> [place 0][place 1] ... [place B-1] -> every place gets a token in one call of the model
                                  ^ read alone, into the cache of the one before

Every place has a cache of its own, so a row's neighbours may be of any length: nothing is padded, nothing is copied
when rows come and go, and no place is empty while a prompt waits.

Letters: `B` places, `V` vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random

import torch
from torch import Tensor

from glmkit.engine.cache import BufferCache, LanguageModel, new_cache
from glmkit.engine.layout import InputLayout, layout_for
from glmkit.engine.native import Runner, runner_for
from glmkit.engine.rows import rows_forward
from glmkit.engine.sampling import SamplingOptions, sample


class Place:
    """One row: its cache, and what is in it.

    Args:
        model: The language model.
        runner: Reads prompts.
        room_tokens: To make room for at the beginning.
    """

    def __init__(self, model: LanguageModel, runner: Runner, room_tokens: int) -> None:
        self._model, self._runner = model, runner
        self.cache: BufferCache = new_cache(model, 1, room_tokens)
        self.row = -1  # number of the prompt
        self.prompt_tokens = 0
        self.ids: list[int] = []  # prompt and answer
        self.layout: InputLayout

    def read(self, row: int, prompt: Sequence[int], chunk_tokens: int) -> Iterator[Tensor | None]:
        """Reads a prompt in the place of what was here; yields None before each chunk, and its logits (1, V) last."""
        self.row, self.prompt_tokens, self.ids = row, len(prompt), [int(token) for token in prompt]
        self.cache.truncate(0)
        ids = torch.tensor([self.ids], dtype=torch.int64, device=self._model.device)
        self.layout = layout_for(self._model, ids, torch.zeros(1, dtype=torch.int64, device=self._model.device))
        logits = None
        for start in range(0, len(prompt), chunk_tokens):
            yield None
            end = min(start + chunk_tokens, len(prompt))
            mask, positions = map(self.layout.prompt(start, end).get, ("attention_mask", "position_ids"))
            logits = self._runner(ids[:, start:end], attention_mask=mask, position_ids=positions, cache=self.cache)[
                :, -1
            ]
        yield logits

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - self.prompt_tokens


def answer_in_places(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    generators: Sequence[Random],
    *,
    places: int,
    room_tokens: int,
    chunk_tokens: int,
    take: Callable[[int, int], bool],
    cancelled: Callable[[], bool],
) -> Iterator[int]:
    """Answers all prompts; for models that are no obstacle to native code, whose prompts may be read in parts.

    Args:
        model: The language model.
        prompts: Ids of each.
        options: How tokens are chosen.
        generators: Random numbers of each prompt's answer.
        places: Rows at once.
        room_tokens: To make room for in each place; it grows.
        chunk_tokens: Tokens of a prompt per model call.
        take: Gets a prompt's number and the next token of its answer, and says whether the answer goes on.
        cancelled: Whether to end; asked before each chunk of a prompt and each token.

    Returns:
        A generator: how many answers finished, whenever some do.
    """
    waiting = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # the longest last, and taken first
    runner = runner_for(model)
    assert runner is not None
    free = [Place(model, runner, room_tokens) for _ in range(min(places, len(prompts)))]
    running: list[Place] = []
    step = rows_forward(model, exact=False)
    while running or waiting:
        if free and waiting:
            drawing = [free.pop() for _ in range(min(len(free), len(waiting)))]
            read = []
            for place in drawing:
                row = waiting.pop()
                for logits in place.read(row, prompts[row], chunk_tokens):
                    if cancelled():
                        return
                    if logits is not None:
                        read.append(logits)
            drawn_from = torch.cat(read)
        else:
            drawing, running = running, []
            ids = torch.tensor([[place.ids[-1]] for place in drawing], dtype=torch.int64)
            drawn_from = step(ids, [place.layout for place in drawing], [place.cache for place in drawing])
        goes_on = _draw(drawing, drawn_from, options, generators, take)
        running += [place for place, on in zip(drawing, goes_on) if on]
        free += [place for place, on in zip(drawing, goes_on) if not on]
        if not all(goes_on):
            yield goes_on.count(False)
        if cancelled():
            return


@torch.inference_mode()
def _draw(
    running: Sequence[Place],
    logits: Tensor,
    options: SamplingOptions,
    generators: Sequence[Random],
    take: Callable[[int, int], bool],
) -> list[bool]:
    """Chooses the next token of every place; returns which of them go on."""
    drawn = sample(
        logits,
        options,
        [generators[place.row] for place in running],
        [place.ids for place in running],
        rows=[place.row for place in running],
        answer_tokens=[place.answer_tokens for place in running],
        with_logprobs=False,
    )
    for place, token in zip(running, drawn.token_ids):
        place.ids.append(token)
    return [take(place.row, token) for place, token in zip(running, drawn.token_ids)]
