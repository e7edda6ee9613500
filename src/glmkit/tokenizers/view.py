"""The objects that the official classes keep as `tokenizer.tokenizer` or `sp_tokenizer`, as far as scripts use them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

from glmkit.tokenizers.ice_text import IceText


class _Owner(Protocol):
    def piece(self, index: int) -> str: ...

    def encode_text(self, text: str) -> list[int]: ...

    def decode_ids(self, ids: Sequence[int]) -> str: ...


class SentencePieceView:
    """What scripts use of the official `tokenizer.tokenizer`: plain SentencePiece without the prefix ids.

    Args:
        owner: The tokenizer this is a view of.
        file_ids: How many ids the SentencePiece file has.
        control: Names of the control ids.
        data: Content of the SentencePiece file.
    """

    def __init__(self, owner: _Owner, file_ids: int, control: Sequence[str], data: bytes) -> None:
        self._owner = owner
        self._data = data
        self.special_tokens = {name: file_ids + offset for offset, name in enumerate(control)}
        self.index_special_tokens = {index: name for name, index in self.special_tokens.items()}
        self.n_words = file_ids + len(control)
        self.bos_id, self.eos_id, self.pad_id = 1, 2, 0

    def tokenize(self, s: str) -> list[str]:
        """Splits a text into pieces.

        Args:
            s: The text.

        Returns:
            Its pieces.
        """
        return [self._owner.piece(index) for index in self._owner.encode_text(s)]

    def encode(self, s: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Turns a text into ids.

        Args:
            s: The text.
            bos: Whether id 1 goes in front.
            eos: Whether id 2 goes to the end.

        Returns:
            Token ids.
        """
        return [self.bos_id] * bos + self._owner.encode_text(s) + [self.eos_id] * eos

    def decode(self, t: list[int]) -> str:
        """Turns ids into text.

        Args:
            t: Token ids.

        Returns:
            The text.
        """
        return self._owner.decode_ids(t)

    @cached_property
    def sp_model(self) -> Any:
        """The SentencePieceProcessor itself, made when it is first asked for; nothing here needs it."""
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=self._data)

    def decode_tokens(self, tokens: list[str]) -> str:
        """Joins pieces to text.

        Args:
            tokens: Pieces, such as `tokenize` gives.

        Returns:
            The text.
        """
        return self.sp_model.DecodePieces(tokens)

    def convert_token_to_id(self, token: str) -> int:
        """Gives the id of a piece or control token.

        Args:
            token: The piece, or the name of a control token.

        Returns:
            Its id; 0 if there is none.
        """
        known = self.special_tokens.get(token)
        return self.sp_model.PieceToId(token) if known is None else known

    def convert_id_to_token(self, index: int) -> str:
        """Gives the piece of an id.

        Args:
            index: A token id.

        Returns:
            The piece; ids 0 to 2 are empty, control ids are in generation 2.
        """
        return self._owner.piece(index)


class IceTextView:
    """What scripts use of the official `tokenizer.sp_tokenizer` of ChatGLM-6B: ids without control tokens around them.

    Args:
        text: The vocabulary.
    """

    def __init__(self, text: IceText) -> None:
        self._text = text
        self.num_image_tokens = text.image_tokens
        self.num_text_tokens = len(text.pieces)
        self.num_tokens = len(text)

    def __len__(self) -> int:
        return self.num_tokens

    def encode(self, text: str) -> list[int]:
        """Turns a text into ids.

        Args:
            text: The text.

        Returns:
            Token ids.
        """
        return self._text.encode(text)

    def tokenize(self, text: str) -> list[str]:
        """Splits a text into pieces.

        Args:
            text: The text.

        Returns:
            Its pieces.
        """
        return [self._text.piece(index) for index in self._text.encode(text)]

    def decode(self, text: Sequence[int]) -> str:
        """Turns ids into text.

        Args:
            text: Token ids.

        Returns:
            The text.
        """
        return self._text.decode(text)

    def decode_tokens(self, tokens: Sequence[str]) -> str:
        """Joins pieces to text.

        Args:
            tokens: Pieces, such as `tokenize` gives.

        Returns:
            The text.
        """
        return self._text.decode([self._text.piece_id(token) for token in tokens])

    def __getitem__(self, key: int | str) -> str | int:
        """The piece of an id, or the id of a piece."""
        return self._text.piece(key) if isinstance(key, int) else self._text.piece_id(key)
