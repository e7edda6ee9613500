"""Filling the blanks of a text, one after the other; each filling is part of the text when the next is made.

    "A [MASK] b [MASK]"  ->  ids sop -> x  ->  "A x b [MASK]"  ->  ids sop -> y  ->  "A x b y"

Source: generate.py of GLM-130B (behaviour, not code). What differs: blanks of different kinds in one text are all
filled, where the official script fills those of one kind and leaves the others.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from glmkit.engine.beams import BaseStrategy, Strategy, search
from glmkit.engine.cache import LanguageModel
from glmkit.engine.decode import CancelToken
from glmkit.errors import UsageError


class FillingTokenizer(Protocol):
    """What filling needs of a tokenizer."""

    stop_ids: Collection[int]

    @property
    def mask_token_ids(self) -> Collection[int]: ...

    @property
    def prefix_ids(self) -> Collection[int]: ...

    def fill_prompt(self, text: str) -> list[int]: ...

    def get_command(self, name: str) -> int: ...

    def decode_ids(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Filling:
    """A text whose blanks are filled.

    Args:
        text: All of it, without the marks around it.
        blanks: What each blank got, in the order of the text.
        ids: The tokens of all of it.
        score: That of the last blank, as the strategy counts; 0 where it does not.
    """

    text: str
    blanks: list[str]
    ids: list[int]
    score: float


def fill(
    model: LanguageModel,
    tokenizer: FillingTokenizer,
    text: str,
    strategy: Strategy | None = None,
    *,
    max_total_tokens: int = 256,
    cancel: CancelToken | None = None,
) -> list[Filling]:
    """Fills the blanks of a text from left to right.

    Args:
        model: A blank-filling model.
        tokenizer: Its tokenizer.
        text: With [MASK], [sMASK] or [gMASK] in it; without any, the model goes on at the end.
        strategy: How a filling is chosen, with the tokenizer's `stop_ids` as `end_ids`. None: `BaseStrategy` with the
            official defaults.
        max_total_tokens: Text and one filling together.
        cancel: Ends the filling early: the blank in work keeps what it has, later ones stay masks.

    Returns:
        The texts, best first: one, or one for each answer of the strategy to the last blank. Fillings of earlier blanks
        are always the best ones.

    Raises:
        UsageError: The text leaves no room for a filling.
    """
    if strategy is None:
        strategy = BaseStrategy(end_ids=tokenizer.stop_ids)
    masks, sop = frozenset(tokenizer.mask_token_ids), tokenizer.get_command("sop")
    ends = frozenset(tokenizer.stop_ids)
    marks = ends | set(tokenizer.prefix_ids)
    ids = tokenizer.fill_prompt(text)
    blanks: list[str] = []
    found: list[Filling] = []
    while any(token in masks for token in ids):
        place = next(index for index, token in enumerate(ids) if token in masks)
        room = max_total_tokens - len(ids) - 1
        if room < 1:
            raise UsageError(
                f"no room to fill {len(ids)} tokens of text: expected at most {max_total_tokens - 2}",
                hint="shorten the text or raise max_total_tokens",
            )
        found = []
        for answer in search(model, [*ids, sop], strategy, max_new_tokens=room, cancel=cancel):
            # A mask that the model itself has written would be filled for ever.
            filling = [token for token in answer.ids[len(ids) + 1 :] if token not in ends | masks]
            whole = [*ids[:place], *filling, *ids[place + 1 :]]
            shown = tokenizer.decode_ids([token for token in whole if token not in marks])
            found.append(Filling(shown, [*blanks, tokenizer.decode_ids(filling)], whole, answer.score))
        ids, blanks = found[0].ids, found[0].blanks
        if cancel is not None and cancel.cancelled:
            break
    return found
