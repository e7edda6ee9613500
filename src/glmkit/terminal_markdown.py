"""Markdown of an answer in colours, while the answer arrives.

What is shown in a terminal cannot be taken back, and what is copied from it should be the answer. So this only paints:
**bold**, `code`, blocks of code and headings. Without the colours the text is what the model wrote, mark for mark. A
colour ends with its line, except that of a block. It waits for two characters at most to know what a mark means.
"""

from __future__ import annotations

_RESET = "\x1b[0m"
_BOLD, _CODE, _BLOCK = "\x1b[1m", "\x1b[36m", "\x1b[2;36m"
_FENCE = "```"


class MarkdownPainter:
    """Puts colours into pieces of Markdown for a terminal."""

    def __init__(self) -> None:
        self._waiting = ""  # characters whose meaning is not known yet
        self._before = "\n"
        self._heading = self._bold = self._code = self._block = self._fence = False
        self._ending = False  # of the code or bold that the characters to be shown close
        self._in_force = ""  # colours that the terminal has been told

    def feed(self, piece: str) -> str:
        """Paints the next piece.

        Args:
            piece: Text, of any length.

        Returns:
            What can be shown now.
        """
        self._waiting += piece
        return self._painted(at_end=False)

    def end(self) -> str:
        """Paints what was waited with, and ends all colours."""
        shown = self._painted(at_end=True)
        return shown + (_RESET if self._in_force else "")

    def _painted(self, *, at_end: bool) -> str:
        shown = []
        while self._waiting:
            count = self._marked(at_end=at_end)
            if count == 0:
                break
            shown.append(self._colour() + self._waiting[:count])
            self._before, self._waiting = self._waiting[count - 1], self._waiting[count:]
            self._after()
        return "".join(shown)

    def _marked(self, *, at_end: bool) -> int:
        """Notes which colours begin with the next characters.

        Returns:
            How many of them belong together; 0 if more must be known.
        """
        waiting, self._ending = self._waiting, False
        if self._before == "\n":
            fence = waiting[:3]
            if fence == _FENCE:
                self._fence, self._block = True, not self._block
                return 3
            if not at_end and _FENCE.startswith(fence):
                return 0
            self._heading = waiting[0] == "#" and not self._block
        if self._block or self._fence or waiting[0] not in "`*":
            return 1
        if waiting[0] == "`":
            self._ending, self._code = self._code, True
            return 1
        if self._code or waiting[:2] != "**":
            return 0 if waiting == "*" and not self._code and not at_end else 1
        if self._bold:
            self._ending = True
            return 2
        if len(waiting) < 3 and not at_end:
            return 0
        follows = waiting[2:3]
        # 2**10 is a power, 这是**重点** is not
        self._bold = bool(follows) and not follows.isspace() and not (self._before.isascii() and self._before.isalnum())
        return 2

    def _after(self) -> None:
        """Ends what ended with the characters that were just shown."""
        if self._before == "\n":
            self._heading = self._bold = self._code = self._fence = False
        elif self._ending:
            if self._before == "`":
                self._code = False
            else:
                self._bold = False

    def _colour(self) -> str:
        """The codes that change the colours in force to those that are wanted now."""
        if self._waiting[0] == "\n":
            wanted = ""
        elif self._block or self._fence:
            wanted = _BLOCK
        else:
            wanted = (_BOLD if self._bold or self._heading else "") + (_CODE if self._code else "")
        if wanted == self._in_force:
            return ""
        change = (_RESET if self._in_force else "") + wanted
        self._in_force = wanted
        return change
