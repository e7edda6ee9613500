"""Full-width marks for ChatGLM-6B, whose tokenizer makes all of them half-width.

    , ! : ; ?  directly behind or in front of a Chinese character become  ， ！ ： ； ？

Only the neighbours count: in "好,,,好" the middle one stays. Source: process_response of modeling_chatglm.py.
"""

from __future__ import annotations

import re

_CHINESE = "\u4e00-\u9fff"
_FULL = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_MARK = re.compile(f"(?<=[{_CHINESE}])[,!:;?]|[,!:;?](?=[{_CHINESE}])")


def full_width(text: str) -> str:
    """Makes marks full-width beside Chinese characters.

    Args:
        text: The text.
    """
    return _MARK.sub(lambda found: _FULL[found[0]], text)


class FullWidthStream:
    """Does so to a text that arrives in pieces; a mark at the end waits until its right neighbour is known."""

    def __init__(self) -> None:
        self._before = ""  # the last character given out, as it came
        self._held = ""  # a mark that may still change

    def push(self, text: str) -> str:
        """Takes the next piece.

        Args:
            text: The piece.

        Returns:
            What is certain.
        """
        text, self._held = self._held + text, ""
        if text[-1:] in _FULL and not _is_chinese((self._before + text)[-2:-1]):
            text, self._held = text[:-1], text[-1]
        return self._give(text)

    def finish(self) -> str:
        """Gives out what was held back."""
        text, self._held = self._held, ""
        return self._give(text)

    def _give(self, text: str) -> str:
        if not text:
            return ""
        shown = full_width(self._before + text + self._held)
        shown = shown[len(self._before) : len(self._before) + len(text)]
        self._before = text[-1]
        return shown


def _is_chinese(character: str) -> bool:
    return "\u4e00" <= character <= "\u9fff"
