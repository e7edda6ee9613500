"""From token ids to text while they arrive: no half characters, no half stop strings, constant cost per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from glmkit.errors import UsageError

_UNKNOWN = "\ufffd"  # what decoding gives for each byte of a character that is not complete
_PENDING_BYTES = 3  # of a UTF-8 character of four bytes, three can be waiting for the last
_WINDOW_TOKENS = 16


class StopText:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one.

    Args:
        stop: Strings that end the text; they and what follows are not given out.

    Raises:
        UsageError: Not a list of non-empty strings.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or not all(isinstance(word, str) and word for word in stop):
            raise UsageError(f"stop={stop!r}: expected a list of non-empty strings")
        self.stopped: str | None = None  # the stop string that ended the text
        self._stop = tuple(stop)
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, text: str) -> str:
        """Takes the next piece and returns what is certainly in front of any stop string."""
        if self.stopped is not None:
            return ""
        text = self._held + text
        # The one that was complete first, so that it does not matter in which pieces the text arrives.
        found = [(at + len(word), at, word) for word in self._stop if (at := text.find(word)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, word) for word in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Gives out what was held back."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Turns token ids into pieces of text whose sum is the decoded whole, up to the first stop string.

    Decoding all ids again at every token would cost more and more, and decoding a token alone loses the space in front
    of a word and breaks characters that are spread over several tokens. So the last few tokens are decoded together,
    and the window moves on where text and tokens end at the same place.

    Args:
        decode: Ids -> text; leading blanks of the whole may be dropped, incomplete characters are U+FFFD.
        stop: Strings that end the text; they and what follows are not given out.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = StopText(stop)
        self._ids: list[int] = []  # the window
        self._taken = ""  # how much of the window's text is given out, or held back for a stop string
        self._edge = 0  # a place in the window where a token ends and a character ends too

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, if any."""
        return self._stop.stopped

    def push(self, token_id: int) -> str:
        """Takes the next token.

        Args:
            token_id: Its id.

        Returns:
            The text that is certain now, often empty. Always empty after a stop string.
        """
        if self.stopped is not None:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        certain = _without_pending(text)
        if not certain.startswith(self._taken):  # what is there will look different once the character is complete
            return ""
        fresh = certain[len(self._taken) :]
        self._taken = certain
        if fresh and certain == text:
            self._move_window()
        return self._stop.push(fresh) if fresh else ""

    def finish(self) -> str:
        """Ends the text: gives out what was held back, incomplete characters as U+FFFD."""
        if self.stopped is not None:
            return ""
        fresh = self._decode(self._ids)[len(self._taken) :]
        self._ids, self._taken, self._edge = [], "", 0
        return self._stop.push(fresh) + self._stop.finish()

    def _move_window(self) -> None:
        if len(self._ids) > _WINDOW_TOKENS and self._edge:
            tail = self._ids[self._edge :]
            context = self._decode(tail)
            # A window of blanks alone could lose the next word's blank too, as if it began the whole text.
            if context and self._taken.endswith(context):
                self._ids, self._taken = tail, context
        self._edge = len(self._ids)


def _without_pending(text: str) -> str:
    """Cuts off the U+FFFD at the end that more bytes could still complete."""
    pending = 0
    while pending < min(_PENDING_BYTES, len(text)) and text[-1 - pending] == _UNKNOWN:
        pending += 1
    return text[: len(text) - pending]


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that is a beginning of `word`, but not all of it."""
    for length in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0
