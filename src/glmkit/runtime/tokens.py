"""The tokenizer of an exported folder: what `runtime.json` and the file beside it say.

Nothing in a text becomes a control token: tokenizer.json has no token that a text could be cut at, and in a
SentencePiece file they are of a type that no text becomes. Where blanks are filled, marks such as `[MASK]` are cut out
of the text first (`encode_marked`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from glmkit.errors import MissingDependencyError, TokenizerError
from glmkit.runtime.control import Command, Control
from glmkit.runtime.vocabulary import (
    SPACE,
    BertText,
    ByteTable,
    byte_letters,
    join_word_pieces,
    read_blanks,
    refuse_surrogates,
    write_blanks,
)

_Codec = tuple[Callable[[str], list[int]], Callable[[list[int]], str]]

KINDS = ("pieces", "letters", "words", "sentencepiece", "ice")


class Tokens:
    """Text to ids and back.

    Args:
        folder: The folder of the vocabulary's file.
        data: What runtime.json says about it:
            kind: One of KINDS, see `glmkit.runtime.vocabulary`.
            file: Name of the file, a tokenizer.json or a SentencePiece file.
            size: Ids from here on are nothing.
            first: The id of the file's first token; below are images.
            texts: What control ids are as text, by id; they stand between texts (`apart`) or inside one.
            apart: See texts.
            silent: Ids that are nothing.
            drops_blank: Whether a text begins with a blank that is not its own.
            whole_words: See `BertText`.
            marks: Control tokens that a text may have written in it, as fields of `Command`.
            aliases: Other ways to write them.
            blank_is_empty: Whether a text of blanks has no tokens.

    Raises:
        TokenizerError: The file is missing or not what the data says.
        MissingDependencyError: The package that reads it is not installed.
    """

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self.size: int = data["size"]
        self._first: int = data.get("first", 0)
        self._texts = {int(index): text for index, text in data.get("texts", {}).items()}
        self._apart: bool = data.get("apart", False)
        self._silent = frozenset(data.get("silent", ()))
        self._joint = " " if data["kind"] == "words" else ""
        self._blank_is_empty: bool = data.get("blank_is_empty", False)
        marks = tuple(Command(**one) for one in data.get("marks", ()))
        self._control = Control(marks, data.get("aliases", {})) if marks else None
        if data["kind"] not in KINDS:
            raise TokenizerError(
                f"there is no vocabulary of the kind {data['kind']!r}; expected one of {', '.join(KINDS)}"
            )
        path = folder / data["file"]
        if Path(data["file"]).name != data["file"] or not path.is_file():  # a path would lead out of the folder
            raise TokenizerError(f"no tokenizer: {path} is missing", hint="export the model again")
        library = data["kind"] in ("sentencepiece", "ice")
        self._encode, self._decode = self._of_library(path, data) if library else self._of_rust(path, data)

    # --- text to ids ---

    def encode(self, text: str) -> list[int]:
        """Encodes plain text: nothing in it is read as a control token.

        Args:
            text: Any text.

        Returns:
            Token ids.

        Raises:
            TokenizerError: The text has a lone surrogate.
        """
        refuse_surrogates(text)
        return self._encode(text)

    def encode_marked(self, text: str) -> list[int]:
        """Encodes text in which `[MASK]` and the other marks mean what they say.

        Args:
            text: Any text.

        Returns:
            Token ids.

        Raises:
            TokenizerError: The text has a lone surrogate.
        """
        refuse_surrogates(text)
        if self._blank_is_empty and not text.strip():
            return []
        parts = [text] if self._control is None else self._control.split(text)
        return [index for part in parts for index in ([part] if isinstance(part, int) else self._encode(part))]

    # --- ids to text ---

    def decode(self, ids: Iterable[int]) -> str:
        """Turns ids into text.

        Args:
            ids: Token ids; those outside the vocabulary are nothing.

        Returns:
            The text; an incomplete character is U+FFFD.
        """
        kept = [index for index in ids if self._first <= index < self.size and index not in self._silent]
        if not self._apart:
            return self._decode(kept)
        parts: list[str] = []
        run: list[int] = []
        for index in kept:
            if index in self._texts:
                parts += [self._decode(run)] * bool(run) + [self._texts[index]]
                run = []
            else:
                run.append(index)
        parts += [self._decode(run)] * bool(run)
        text = self._joint.join(parts)
        return text.replace(" ##", "") if self._joint else text

    # --- the kinds ---

    def _of_rust(self, path: Path, data: dict[str, Any]) -> _Codec:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingDependencyError("tokenizers", "export") from error
        try:
            rust = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises the base class
            raise TokenizerError(f"{path} is no tokenizer.json: {error}", hint="export the model again") from error
        tokens = {index: token for token, index in rust.get_vocab(with_added_tokens=False).items()}

        def encode(text: str) -> list[int]:
            return rust.encode(text, add_special_tokens=False).ids

        if data["kind"] == "words":
            bert = BertText(data["whole_words"])
            return lambda text: encode(bert.words(text)), lambda ids: join_word_pieces(tokens[index] for index in ids)
        table = self._table(tokens, data)
        return encode, table.decode

    def _table(self, tokens: dict[int, str], data: dict[str, Any]) -> ByteTable:
        texts = {} if self._apart else self._texts
        if data["kind"] == "letters":
            bytes_of = {letter: byte for byte, letter in enumerate(byte_letters())}

            def as_bytes(token: str) -> bytes:
                # Tokens such as <|endoftext|> have no byte letters for what they are, and stand for themselves.
                known = all(letter in bytes_of for letter in token)
                return bytes(bytes_of[letter] for letter in token) if known else token.encode()

            table = [texts[i].encode() if i in texts else as_bytes(tokens.get(i, "")) for i in range(self.size)]
            return ByteTable(table, each_byte=False)
        first_byte = data["first_byte"]
        byte_ids = frozenset(range(first_byte, first_byte + 256))
        table = [
            texts[index].encode()
            if index in texts
            else bytes([index - first_byte])
            if index in byte_ids
            else tokens.get(index, "").replace(SPACE, " ").encode()
            for index in range(self.size)
        ]
        return ByteTable(table, byte_ids, data["drops_blank"], each_byte=True)

    def _of_library(self, path: Path, data: dict[str, Any]) -> _Codec:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise MissingDependencyError("sentencepiece", "export") from error
        try:
            library = SentencePieceProcessor(model_proto=path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise TokenizerError(f"{path} is refused by the sentencepiece library: {error}") from error
        if data["kind"] == "sentencepiece":
            return library.encode, lambda ids: library.decode(list(ids))
        first = self._first

        def encode(text: str) -> list[int]:
            return [first + index for index in library.encode(write_blanks(text))]

        def decode(ids: Sequence[int]) -> str:
            return read_blanks(library.decode([index - first for index in ids]))

        return encode, decode
