"""What of a conversation fits into the model's context: whole turns, the newest first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glmkit.chat.messages import Message
from glmkit.chat.templates import prompt_ids
from glmkit.errors import ContextLengthError, UsageError

_RESERVE_TOKENS = 1024
_SHORT_CHARACTERS = 16  # for each token of the context: a conversation that is worth reading whole


def reserve_tokens(context_tokens: int, max_new_tokens: int | None) -> int:
    """Room to keep for an answer.

    Args:
        context_tokens: What prompt and answer may have together.
        max_new_tokens: Longest answer if there is a limit; more than half of the context is not kept for it.

    Returns:
        Tokens; without a limit 1,024, but at most a quarter of the context.
    """
    if max_new_tokens is None:
        return min(_RESERVE_TOKENS, context_tokens // 4)
    return min(max_new_tokens, context_tokens // 2)


def fit_context(
    tokenizer: Any, messages: Sequence[Message], context_tokens: int, reserve_tokens: int
) -> tuple[list[int], int]:
    """Turns messages into a prompt, without as many of the oldest turns as it takes to leave room for an answer.

    A turn is a user message with all that follows until the next. System messages at the start and the last turn always
    stay; the last turn may use the reserve.

    Args:
        tokenizer: The model's tokenizer.
        messages: The conversation, ending where the assistant shall speak.
        context_tokens: What prompt and answer may have together.
        reserve_tokens: Room to keep for the answer.

    Returns:
        The prompt's ids, and the number of turns that were left out.

    Raises:
        UsageError: System messages and last turn alone fill the context.
    """
    head, turns = _split_turns(messages)
    room = context_tokens - max(1, reserve_tokens)

    def ids_without(dropped: int) -> list[int]:
        return prompt_ids(tokenizer, [*head, *(message for turn in turns[dropped:] for message in turn)])

    dropped, last = _surely_too_old(tokenizer, turns, context_tokens), len(turns) - 1
    ids = ids_without(dropped)
    if len(ids) > room and dropped < last:
        dropped += 1
        while dropped < last:  # halving: a long conversation is not made into ids once for each of its turns
            middle = (dropped + last) // 2
            if len(ids_without(middle)) <= room:
                last = middle
            else:
                dropped = middle + 1
        ids = ids_without(dropped)
    if len(ids) >= context_tokens:
        raise ContextLengthError(
            f"the message has {len(ids):,} tokens with the chat format and the system message; "
            f"the model's context is {context_tokens:,} tokens, the answer included",
            hint="shorten the message, send it in parts, or use a model with a longer context",
        )
    return ids, dropped


def _surely_too_old(tokenizer: Any, turns: Sequence[Sequence[Message]], context_tokens: int) -> int:
    """How many of the oldest turns can be left out unread, as those behind them fill the context more than once."""
    texts = [[message.content for message in turn] for turn in turns]
    if sum(len(text) for turn in texts for text in turn) <= _SHORT_CHARACTERS * context_tokens:
        return 0
    tokens = 0
    for place in range(len(turns) - 1, -1, -1):
        tokens += sum(len(tokenizer.encode_text(text)) for text in texts[place])
        if tokens > 2 * context_tokens:  # twice: texts may have fewer tokens together than each for itself
            return min(place + 1, len(turns) - 1)
    return 0


def _split_turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    first = next((place for place, message in enumerate(messages) if message.role != "system"), len(messages))
    turns: list[list[Message]] = []
    for message in messages[first:]:
        if message.role == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    if not turns:
        raise UsageError("there is no message to answer", hint="give a question, or messages that end with the user's")
    return list(messages[:first]), turns
