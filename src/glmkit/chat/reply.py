"""What a model generated, as messages: while it arrives, and as a whole. `glmkit.runtime.replies` has the form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from glmkit.chat.messages import Message
from glmkit.chat.templates import chat_format
from glmkit.chat.tools import ToolCall, ToolCallError
from glmkit.runtime.replies import ReplyForm, Replying


@dataclass(frozen=True)
class ParsedReply:
    """A whole reply.

    Args:
        messages: Its assistant messages, at least one.
        call: The tool call it ends with, if any.
        problem: Why its last message is not the tool call that its header announces; the text is in `messages`.
    """

    messages: list[Message]
    call: ToolCall | None = None
    problem: str | None = None


class ReplyStream(Replying):
    """Turns generated ids into messages as they arrive; see `Replying`.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(reply_form(tokenizer))

    @property
    def messages(self) -> list[Message]:
        """The finished messages."""
        return [Message("assistant", content, metadata) for content, metadata in self.finished]


def reply_form(tokenizer: Any) -> ReplyForm:
    """What the ids of a reply mean.

    Args:
        tokenizer: The model's tokenizer.

    Raises:
        UsageError: The model has no chat format.
    """
    form = chat_format(tokenizer)
    return ReplyForm(
        decode=tokenizer.decode_ids,
        stop_ids=tokenizer.stop_ids,
        vocabulary_size=tokenizer.vocab_size,
        divider=None if form.divider is None else tokenizer.get_command(form.divider),
        full_width=form.full_width,
        drops_blank=form.dummy_prefix,
    )


def parse_reply(tokenizer: Any, ids: Iterable[int]) -> ParsedReply:
    """Reads a whole reply.

    Args:
        tokenizer: The model's tokenizer.
        ids: The generated ids, with or without the stop id.

    Returns:
        Its messages, and the tool call or what is wrong with it.
    """
    stream = ReplyStream(tokenizer)
    for token_id in ids:
        stream.push(token_id)
    stream.finish()
    last, form = stream.messages[-1], chat_format(tokenizer)
    if not last.metadata or last.metadata in form.text_tools:
        return ParsedReply(stream.messages)
    try:
        return ParsedReply(stream.messages, ToolCall(last.metadata, form.read_call(last.content)))
    except ToolCallError as error:
        return ParsedReply(stream.messages, problem=error.message)
