"""The three kinds of vocabulary that GLM (2021) was trained with: files to pieces, plain text to ids, ids to text.

    BytePieces      GPT-2's and RoBERTa's byte-level BPE    vocab.json + merges.txt    exact, in Rust
    WordPieces      BERT's lower-case word pieces           vocab.txt                  cleaned here, matched in Rust
    SentencePieces  the Chinese SentencePiece BPE           cog-pretrain.model         by the sentencepiece library

Control tokens are not their business: `glmkit.tokenizers.glm` cuts them out of a text before it comes here.

BERT's text is cleaned in Python, because Rust's own cleaner keeps unassigned and private characters and lowers a final
sigma differently, which gave other ids for one in ten of 30,000 random texts. Why the Chinese file is run by the
library, `sentencepiece_file` says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer, models, pre_tokenizers

from glmkit.errors import TokenizerError
from glmkit.pickles import printable
from glmkit.runtime.vocabulary import BertText, byte_letters, join_word_pieces
from glmkit.tokenizers.sentencepiece_file import (
    CONTROL,
    MAX_FILE_BYTES,
    MAX_PIECES,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceFile,
    read_model,
)


class Vocabulary(Protocol):
    """What a tokenizer needs of its vocabulary.

    Attributes:
        tokens: The token of every id.
        files: File name to content, to be saved again.
    """

    tokens: tuple[str, ...]
    files: dict[str, bytes]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Gives the ids of each text; nothing in it is a control token."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Gives the text of ids inside the vocabulary."""
        ...

    def backend(self, extra: dict[str, int]) -> Tokenizer:
        """Gives a Rust tokenizer with these tokens and some more."""
        ...


class BytePieces:
    """A byte-level BPE in the files of GPT-2 and RoBERTa.

    Args:
        vocab_file: vocab.json, token to id.
        merges_file: merges.txt, one pair a line after a line with the version.

    Raises:
        TokenizerError: A file is missing, broken, or does not belong to the other.
    """

    def __init__(self, vocab_file: Path, merges_file: Path) -> None:
        self.files = {"vocab.json": read_file(vocab_file), "merges.txt": read_file(merges_file)}
        self._ids = _token_ids(vocab_file, self.files["vocab.json"])
        self.tokens = tuple(sorted(self._ids, key=self._ids.__getitem__))
        lines = _text(merges_file, self.files["merges.txt"]).split("\n")
        lines = lines[1:] if lines[0].startswith("#version") else lines
        pairs = [pair for line in lines if (pair := line.split())]
        wrong = next((pair for pair in pairs if len(pair) != 2), None)
        if wrong is not None:
            raise TokenizerError(
                f"{merges_file} has the line {' '.join(wrong)!r:.80}; expected two pieces a line",
                hint="copy both files from the same repository",
            )
        self._merges = [(left, right) for left, right in pairs]
        try:
            self._tokenizer = self.backend({})
        except Exception as error:  # the Rust library raises the base class
            raise TokenizerError(
                f"{vocab_file} and {merges_file} do not belong together: {printable(str(error))}",
                hint="copy both files from the same repository",
            ) from error
        letters = byte_letters()
        missing = [letter for letter in letters if letter not in self._ids]
        if missing:
            raise TokenizerError(
                f"{vocab_file} lacks {len(missing)} of the 256 bytes; expected a byte-level vocabulary",
                hint="copy both files from the same repository",
            )
        bytes_of = {letter: byte for byte, letter in enumerate(letters)}
        # Tokens such as <|endoftext|> have no byte letters for what they are, and stand for themselves.
        self._bytes = [
            bytes(bytes_of[letter] for letter in token)
            if all(letter in bytes_of for letter in token)
            else token.encode("utf-8")
            for token in self.tokens
        ]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Gives the ids of each text.

        Args:
            texts: Plain texts.

        Returns:
            One list of ids per text.
        """
        return [one.ids for one in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Gives the text of ids.

        Args:
            ids: Ids inside the vocabulary.

        Returns:
            The text; bytes that form no character become U+FFFD.
        """
        return b"".join(self._bytes[index] for index in ids).decode("utf-8", errors="replace")

    def backend(self, extra: dict[str, int]) -> Tokenizer:
        """Makes the Rust tokenizer.

        Args:
            extra: Further tokens, which no text becomes.

        Returns:
            The tokenizer.
        """
        tokenizer = Tokenizer(models.BPE(vocab=self._ids | extra, merges=self._merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return tokenizer


class WordPieces:
    """BERT's word pieces, lower case, without accents.

    Args:
        vocab_file: vocab.txt, one token a line.
        whole_words: Whether a sigma at the end of a word is lowered as such, as the original code does; the classes
            of Hugging Face lower letter by letter.

    Raises:
        TokenizerError: The file is missing, or lacks one of BERT's control tokens.
    """

    def __init__(self, vocab_file: Path, whole_words: bool = False) -> None:
        self.files = {"vocab.txt": read_file(vocab_file)}
        lines = _text(vocab_file, self.files["vocab.txt"]).split("\n")
        self.tokens = tuple(line.rstrip("\r") for line in (lines[:-1] if not lines[-1] else lines))
        self._ids = {token: index for index, token in enumerate(self.tokens)}
        missing = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token not in self._ids]
        if missing or len(self._ids) != len(self.tokens):
            what = f"lacks {', '.join(missing)}" if missing else "has a token twice"
            raise TokenizerError(
                f"{vocab_file} {what}; expected the vocabulary of BERT uncased",
                hint="copy it from the checkpoint's repository",
            )
        self.text = BertText(whole_words)
        self._tokenizer = self.backend({})

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Gives the ids of each text.

        Args:
            texts: Plain texts.

        Returns:
            One list of ids per text.
        """
        words = [self.text.words(text) for text in texts]
        return [one.ids for one in self._tokenizer.encode_batch(words, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Gives the text of ids.

        Args:
            ids: Ids inside the vocabulary.

        Returns:
            The words with one blank between them; pieces marked ## are joined to the one in front.
        """
        return join_word_pieces(self.tokens[index] for index in ids)

    def backend(self, extra: dict[str, int]) -> Tokenizer:
        """Makes the Rust tokenizer.

        Args:
            extra: Further tokens, which no text becomes.

        Returns:
            The tokenizer; it expects cleaned text with blanks between all words and marks.
        """
        model = models.WordPiece(vocab=self._ids | extra, unk_token="[UNK]", max_input_chars_per_word=100)
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return tokenizer


class SentencePieces:
    """The Chinese vocabulary: SentencePiece BPE, normalised by nmt_nfkc, without byte pieces.

    A line end is a blank like any other; the piece `<n>` appears only where a text says so.

    Args:
        model_file: cog-pretrain.model.

    Raises:
        TokenizerError: The file is missing, broken, or of another kind.
    """

    def __init__(self, model_file: Path) -> None:
        file = read_model(model_file)
        problem = _unlike_the_chinese_file(file)
        if problem:
            raise TokenizerError(
                f"{model_file} is no tokenizer of GLM: {problem}", hint="check that the file belongs to this checkpoint"
            )
        self.files = {"cog-pretrain.model": file.data}
        self.tokens = file.texts
        self._library = file.library()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Gives the ids of each text.

        Args:
            texts: Plain texts.

        Returns:
            One list of ids per text.
        """
        return [self._library.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Gives the text of ids.

        Args:
            ids: Ids inside the vocabulary.

        Returns:
            The text without the blank in front; an unknown piece is " ⁇ ".
        """
        return self._library.decode(ids)

    def backend(self, extra: dict[str, int]) -> Tokenizer:
        """Makes a Rust tokenizer that is a table of tokens and splits nothing.

        Args:
            extra: Further tokens.

        Returns:
            The table.
        """
        ids = {token: index for index, token in enumerate(self.tokens)} | extra
        return Tokenizer(models.WordLevel(vocab=ids, unk_token=self.tokens[0]))


def read_file(path: Path) -> bytes:
    """Reads a vocabulary file.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        TokenizerError: It is missing or larger than any real one.
    """
    if not path.is_file():
        raise TokenizerError(f"no tokenizer: {path} is missing", hint="copy it from the checkpoint's repository")
    size_bytes = path.stat().st_size
    if size_bytes > MAX_FILE_BYTES:
        raise TokenizerError(
            f"{path} has {size_bytes} bytes; a vocabulary file has at most {MAX_FILE_BYTES}",
            hint=f"copy {path.name} from the checkpoint's original repository",
        )
    data = path.read_bytes()
    # Before they are taken apart, which takes the memory. Every token has a line or a colon of its own.
    many = max(data.count(b"\n"), data.count(b":"), data.count(b"["), data.count(b"{"))
    if many > MAX_PIECES:
        raise TokenizerError(f"{path} has {many} tokens or more, at most {MAX_PIECES} expected", hint="copy it again")
    return data


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is no UTF-8 text: {error}", hint="copy it again") from error


def _token_ids(path: Path, data: bytes) -> dict[str, int]:
    try:
        ids = json.loads(_text(path, data))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is no JSON: {error}", hint="copy it again") from error
    if not isinstance(ids, dict) or sorted(ids.values(), key=repr) != sorted(range(len(ids)), key=repr):
        raise TokenizerError(
            f"{path} must be a JSON object of tokens to the ids 0, 1, 2, ... without gaps",
            hint=f"copy {path.name} from the checkpoint's original repository",
        )
    return ids


def _unlike_the_chinese_file(file: SentencePieceFile) -> str | None:
    """What sets a SentencePiece file apart from the kind this class is written for, in words, or None."""
    if file.model_type != "BPE":
        return f"the model type is {file.model_type}, expected BPE"
    if not file.normalizer.add_dummy_prefix:
        return "texts get no blank in front, expected one"
    if file.types[:3] != (UNKNOWN, CONTROL, CONTROL):
        return "ids 0 to 2 are not <unk>, <s> and </s>"
    if any(kind not in (NORMAL, USER_DEFINED) for kind in file.types[3:]):
        return "there are byte, unused or control pieces behind id 2"
    return file.normalizer.problem("nmt_nfkc")
