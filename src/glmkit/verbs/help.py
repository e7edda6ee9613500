"""The help of the command in the reader's language."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from glmkit.translation import Language, language, translate

_EXTRA = re.compile(r"(.*?)(\s+\[[^\[\]]*\])?", re.DOTALL)


def in_readers_language(formatter: Any) -> Any:
    """The parser's formatter of help, or one that translates whatever goes through it."""
    here = language()
    return formatter if here == "en" else _Translated(formatter, here)


class _Translated:
    """A formatter of the argument parser, with its texts translated.

    Args:
        formatter: The parser's own.
        to: The language.
    """

    def __init__(self, formatter: Any, to: Language) -> None:
        self._formatter = formatter
        self._to = to

    def __getattr__(self, name: str) -> Any:
        return getattr(self._formatter, name)

    def section(self, name: str) -> Any:
        """A titled part."""
        return self._formatter.section(translate(name, self._to))

    def write_text(self, text: str) -> None:
        """A paragraph."""
        self._formatter.write_text(translate(text, self._to))

    def write_dl(self, rows: Iterable[tuple[str, str]], *arguments: Any, **settings: Any) -> None:
        """Names with what they mean; what the parser adds in brackets, such as a default, stays."""
        self._formatter.write_dl([(name, self._explained(text)) for name, text in rows], *arguments, **settings)

    def _explained(self, text: str) -> str:
        match = _EXTRA.fullmatch(text)
        assert match is not None
        return translate(match[1], self._to) + (match[2] or "")
