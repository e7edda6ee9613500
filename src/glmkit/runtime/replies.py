"""What a model generated, as messages, while it arrives.

A reply of ChatGLM3 or GLM-4 is one or more assistant messages, divided by the assistant id. Each starts with a header
line: empty for text, the name of a tool for a call.

    ids      "\\n" 我来查询 <|assistant|> get_weather "\\n" ```python tool_call(city='北京') ``` <|observation|>
    header   ^^^^                        ^^^^^^^^^^^^^^^^

A reply of ChatGLM-6B or ChatGLM2 is one message of plain text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from glmkit.runtime.punctuation import FullWidthStream
from glmkit.runtime.text import TextStream

MAX_HEADER_CHARACTERS = 128  # a first line longer than a tool's name is no header


@dataclass(frozen=True)
class ReplyForm:
    """What the ids of a reply mean.

    Args:
        decode: Ids to text.
        stop_ids: Ids that end a reply.
        vocabulary_size: Ids from here on pad the model's vocabulary.
        divider: The id between two messages; None: there is one message, without a header line.
        full_width: Whether marks beside Chinese characters are shown full-width.
        drops_blank: Whether the content of a call begins with a blank that is not its own.
    """

    decode: Callable[[list[int]], str]
    stop_ids: frozenset[int]
    vocabulary_size: int
    divider: int | None
    full_width: bool
    drops_blank: bool


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


class Said(NamedTuple):
    """A finished message."""

    content: str
    metadata: str


class Replying:
    """Turns generated ids into messages as they arrive.

    Text behind an assistant id is held back until the header line is complete, half a character until it is whole, and
    blanks at the end of plain text until more text follows.

    Args:
        form: What the ids mean.
    """

    def __init__(self, form: ReplyForm) -> None:
        self.finished: list[Said] = []
        self._form = form
        self._begin()

    def _begin(self) -> None:
        self._text = TextStream(self._form.decode)
        self._marks = FullWidthStream() if self._form.full_width else None
        self._header: str | None = None if self._form.divider is not None else ""
        self._waiting = ""  # the header line so far, or blanks that may be the last
        self._content = ""

    def push(self, token_id: int) -> list[Delta]:
        """Takes the next id.

        Args:
            token_id: A generated id; stop ids, and ids that the model's vocabulary is padded with, are ignored.

        Returns:
            What is certain now, often nothing.
        """
        if token_id == self._form.divider:
            return self.finish()
        if token_id in self._form.stop_ids or token_id >= self._form.vocabulary_size:
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
        self.finished.append(Said(content, self._header or ""))
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
        elif not self._content:  # a call: only the blank in front goes, so that its ids can be made again
            shown = text.removeprefix(" ") if self._form.drops_blank else text
        else:
            shown = text
        self._content += shown
        return [Delta(shown, self._header or "", len(self.finished))] if shown else []
