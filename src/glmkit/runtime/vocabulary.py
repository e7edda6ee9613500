"""How tokens are letters, bytes and words: what tokenizers share with what runs an exported folder.

kind            encoded by                       a token's text
pieces          tokenizer.json, a BPE            its letters; `▁` is a blank, `<0xE4>` a byte     ChatGLM2, ChatGLM3
letters         tokenizer.json, a BPE of bytes   a byte for each letter                           GLM-4, GPT-2
words           tokenizer.json, word pieces      words with blanks between them                   GLM, as BERT
sentencepiece   pieces.model, by its library     by its library                                   GLM-Chinese
ice             the same, blanks as pieces       the same                                         ChatGLM-6B
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

from glmkit.errors import TokenizerError

SPACE = "▁"
LINE_END, TAB = "<n>", "<|tab|>"
MAX_BLANKS = 80
_EACH_BYTE = "glmkit.each_byte"
_RUN = re.compile(f" {{2,{MAX_BLANKS}}}")
_BLANK = re.compile(r"<\|blank_([2-9]|[1-7][0-9]|80)\|>")


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """Gives one U+FFFD per undecodable byte, as SentencePiece does; Python alone gives one per broken character."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


class ByteTable:
    """Ids to text where every token is a few bytes.

    Args:
        tokens: The bytes of each id.
        byte_ids: Ids of single bytes of a character, which is never the blank in front of a text.
        drops_blank: Whether a blank that the first token begins with belongs to the format, not to the text.
        each_byte: Whether bytes that form no character become one U+FFFD each, instead of one for a broken character.
    """

    def __init__(
        self, tokens: list[bytes], byte_ids: frozenset[int] = frozenset(), drops_blank: bool = False, *, each_byte: bool
    ) -> None:
        self._tokens, self._byte_ids, self._drops_blank = tokens, byte_ids, drops_blank
        self._errors = _EACH_BYTE if each_byte else "replace"

    def __len__(self) -> int:
        return len(self._tokens)

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids, all of them inside the vocabulary.

        Args:
            ids: Token ids.

        Returns:
            The text.
        """
        table, parts, undecided = self._tokens, [], self._drops_blank
        for index in ids:
            part = table[index]
            if undecided and part:
                undecided = False
                if part[:1] == b" " and index not in self._byte_ids:
                    part = part[1:]
            parts.append(part)
        return b"".join(parts).decode("utf-8", errors=self._errors)


class BertText:
    """BERT's cleaning of a text in front of its word pieces, and its way back: lower case, without accents.

    Rust's own cleaner keeps unassigned and private characters and lowers a final sigma differently, which gave other
    ids for one in ten of 30,000 random texts.

    Args:
        whole_words: Whether a sigma at the end of a word is lowered as such.
    """

    def __init__(self, whole_words: bool) -> None:
        self._whole_words = whole_words
        self._clean, self._split = _CharacterTable(_clean), _CharacterTable(_split)

    def words(self, text: str) -> str:
        """Writes a text as words and marks with blanks between them.

        Args:
            text: Any text.
        """
        text = text.translate(self._clean)
        if not self._whole_words:
            text = text.replace("Σ", "σ")  # the only letter whose lower case depends on its neighbours
        return unicodedata.normalize("NFD", text.lower()).translate(self._split)


def join_word_pieces(pieces: Iterable[str]) -> str:
    """Joins BERT's word pieces: one blank between words, and none in front of what is marked ##.

    Args:
        pieces: The pieces.
    """
    words: list[str] = []
    for piece in pieces:
        if piece.startswith("##") and words:
            words[-1] += piece[2:]
        else:
            words.append(piece)
    return " ".join(words)


def write_blanks(text: str) -> str:
    """Writes line ends, tabs and runs of blanks as the pieces that ChatGLM-6B has for them.

    Args:
        text: Any text.
    """
    written = text.replace("\n", LINE_END).replace("\t", TAB)
    return _RUN.sub(lambda run: f"<|blank_{len(run.group())}|>", written)


def read_blanks(written: str) -> str:
    """Undoes `write_blanks`.

    Args:
        written: What the pieces say.
    """
    written = written.replace(LINE_END, "\n").replace(TAB, "\t")
    return _BLANK.sub(lambda found: " " * int(found.group(1)), written)


def refuse_surrogates(text: object, where: str = "the text") -> None:
    """Refuses text that is not valid Unicode.

    Args:
        text: A string, or strings in lists and tuples; anything else passes.
        where: What the message calls the string.

    Raises:
        TokenizerError: A string has a lone surrogate; the message says which and where.
    """
    if isinstance(text, str):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"{where} has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: "
                "half a character, which cannot be encoded",
                hint="decode the text with its right encoding, or drop them: text.encode('utf-8', 'ignore').decode()",
            ) from None
    elif isinstance(text, (list, tuple)):
        for number, one in enumerate(text):
            refuse_surrogates(one, f"text {number}" if isinstance(text, list) else where)


def byte_letters() -> list[str]:
    """Gives the letter that stands for each byte in a byte-level vocabulary.

    Returns:
        256 letters: the byte's own if it prints, else one from U+0100 on.
    """
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


class _CharacterTable(dict[int, "str | None"]):
    """A table for `str.translate` that works out a character when it first meets it."""

    def __init__(self, rule: Callable[[str], str | None]) -> None:
        super().__init__()
        self._rule = rule

    def __missing__(self, code: int) -> str | None:
        self[code] = found = self._rule(chr(code))
        return found

    def __reduce__(self) -> Any:
        return _CharacterTable, (self._rule,)


_IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def _clean(character: str) -> str | None:
    """BERT's first pass: no control characters, plain blanks, blanks around ideographs."""
    kind = unicodedata.category(character)
    if character in "\t\n\r" or kind == "Zs":
        return " "
    if character == "\ufffd" or kind.startswith("C"):
        return None
    code = ord(character)
    return f" {character} " if any(low <= code <= high for low, high in _IDEOGRAPHS) else character


def _split(character: str) -> str | None:
    """BERT's second pass, over lowered and decomposed text: no accents, blanks around marks."""
    kind = unicodedata.category(character)
    if kind == "Mn":
        return None
    is_mark = kind.startswith("P") or character in "$+<=>^`|~"
    return f" {character} " if is_mark else character
