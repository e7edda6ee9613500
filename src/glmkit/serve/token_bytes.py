"""The bytes that each token stands for, which text alone cannot say: half a character is a token too."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from glmkit.errors import TokenizerError
from glmkit.runtime.vocabulary import byte_letters

_UNKNOWN = "\ufffd"
_NAMES = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "eos", "pad", "ENC")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTable:
    """Tokens as bytes.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # A text's first blank is dropped in decoding, so every token is decoded behind another one.
        self._front = list(tokenizer.encode_text("a"))
        self._front_text: str = tokenizer.decode_ids(self._front)
        letters = byte_letters() if tokenizer.generation == 4 else []
        self._letters = {letter: byte for byte, letter in enumerate(letters)}
        self._control = frozenset(control_names(tokenizer))

    def bytes_of(self, token_id: int) -> bytes:
        """What a token adds to a text.

        Args:
            token_id: The token.

        Returns:
            Its bytes; a blank in front of a word belongs to it. Nothing for ids that the vocabulary is padded with.
        """
        if not 0 <= token_id < self.size:
            return b""
        piece = self._tokenizer.piece(token_id) if hasattr(self._tokenizer, "piece") else ""
        if self._letters and token_id not in self._control:
            return bytes(self._letters[letter] for letter in piece)
        text: str = self._tokenizer.decode_ids([*self._front, token_id])[len(self._front_text) :]
        found = _BYTE.fullmatch(piece) if text and set(text) == {_UNKNOWN} else None
        return bytes([int(found[1], 16)]) if found else text.encode("utf-8")

    @property
    def size(self) -> int:
        """How many ids the tokenizer has."""
        return max(len(self._tokenizer), 1 + max(self._control, default=0))

    def all(self) -> list[bytes | None]:
        """The bytes of every id in order; None for control tokens and what has no text."""
        return [None if token_id in self._control else self.bytes_of(token_id) or None for token_id in range(self.size)]


def control_names(tokenizer: Any) -> dict[int, str]:
    """The tokens that no text becomes, by their ids.

    Args:
        tokenizer: The tokenizer of any family.
    """
    commands = getattr(tokenizer, "commands", None)
    if commands is not None:
        return {token_id: name for name, token_id in commands.items()}
    found = {}
    for name in _NAMES:  # those that fill blanks know their tokens by name only
        with suppress(TokenizerError):
            found[tokenizer.get_command(name)] = name
    return found


def shown(data: bytes) -> str:
    """A token as text, for a person: bytes that are no character by their number.

    Args:
        data: The token's bytes.
    """
    return data.decode("utf-8", errors="backslashreplace")
