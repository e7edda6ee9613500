"""What a model generated, as messages: while it arrives, and as a whole.

A reply of ChatGLM3 or GLM-4 is one or more assistant messages, divided by the assistant id. Each starts with a header
line: empty for text, the name of a tool for a call.

    ids      "\\n" 我来查询 <|assistant|> get_weather "\\n" ```python tool_call(city='北京') ``` <|observation|>
    header   ^^^^                        ^^^^^^^^^^^^^^^^

A reply of ChatGLM-6B or ChatGLM2 is one message of plain text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from glmkit.chat.messages import Message
from glmkit.chat.punctuation import FullWidthStream
from glmkit.chat.templates import chat_format
from glmkit.chat.tools import ToolCall, ToolCallError
from glmkit.engine.text import TextStream

MAX_HEADER_CHARACTERS = 128  # a first line longer than a tool's name is no header


@dataclass(frozen=True)
class Delta:
    """A piece of a message that is certain.

    Args:
        text: New text; the sum of a message's pieces is its content.
        metadata: The message's header line.
        number: Which message of the reply it belongs to, from 0.
    """

    text: str
    metadata: str
    number: int


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


class ReplyStream:
    """Turns generated ids into messages as they arrive.

    Text behind an assistant id is held back until the header line is complete, half a character until it is whole, and
    blanks at the end of plain text until more text follows.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.messages: list[Message] = []  # the finished ones
        self._tokenizer, self._format = tokenizer, chat_format(tokenizer)
        divider = self._format.divider
        self._divider = None if divider is None else tokenizer.get_command(divider)
        self._begin()

    def _begin(self) -> None:
        self._text = TextStream(self._tokenizer.decode_ids)
        self._marks = FullWidthStream() if self._format.full_width else None
        self._header: str | None = None if self._divider is not None else ""
        self._waiting = ""  # the header line so far, or blanks that may be the last
        self._content = ""

    def push(self, token_id: int) -> list[Delta]:
        """Takes the next id.

        Args:
            token_id: A generated id; stop ids, and ids that the model's vocabulary is padded with, are ignored.

        Returns:
            What is certain now, often nothing.
        """
        if token_id == self._divider:
            return self.finish()
        if token_id in self._tokenizer.stop_ids or token_id >= self._tokenizer.vocab_size:
            return []
        text = self._text.push(token_id)
        return self._take(text if self._marks is None else self._marks.push(text))

    def finish(self) -> list[Delta]:
        """Ends the message.

        Returns:
            What was held back.
        """
        text = self._text.finish()
        deltas = self._take(text if self._marks is None else self._marks.push(text) + self._marks.finish())
        if self._header is None:
            self._header = ""
            deltas += self._show("")
        content = self._content if self._header else self._content.rstrip()
        self.messages.append(Message("assistant", content, self._header or ""))
        self._begin()
        return deltas

    def _take(self, text: str) -> list[Delta]:
        if self._header is not None:
            return self._show(text)
        self._waiting += text
        line, newline, rest = self._waiting.partition("\n")
        if newline and len(line) <= MAX_HEADER_CHARACTERS:
            self._header, self._waiting = line.strip(), ""
            return self._show(rest)
        if len(line) > MAX_HEADER_CHARACTERS:
            self._header = ""
            return self._show("")
        return []

    def _show(self, text: str) -> list[Delta]:
        if not self._header:  # plain text: no blanks at either end
            text, self._waiting = self._waiting + text, ""
            if not self._content:
                text = text.lstrip()
            shown = text.rstrip()
            self._waiting = text[len(shown) :]
        elif not self._content:  # a call: only the dummy prefix goes, so that its ids can be made again
            shown = text.removeprefix(" ") if self._format.dummy_prefix else text
        else:
            shown = text
        self._content += shown
        return [Delta(shown, self._header or "", len(self.messages))] if shown else []


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
