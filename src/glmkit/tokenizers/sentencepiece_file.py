"""A SentencePiece file that anybody may have made: read and checked here, before native code sees it.

    read_model(path) -> SentencePieceFile    the pieces and the two specifications, within limits
    file.library()   -> LibraryPieces        text to ids and back by the sentencepiece library

What a family expects of its file, the family checks. ChatGLM2 and ChatGLM3 make a Rust tokenizer of the pieces
(`sentencepiece_bpe`). Files with the normaliser nmt_nfkc, which are those of ChatGLM-6B, of GLM-130B (`ice_text`) and
of the Chinese GLM, are run by the library: where it takes the longest rule of the normaliser that matches, Rust takes
the shortest, and Rust's Unigram model gave other ids for 68 of 4,322 texts that were normalised already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmkit.errors import TokenizerError
from glmkit.tokenizers.charsmap import problem_of_rules

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces in the file format
MAX_FILE_BYTES = 16 * 2**20  # the largest released file has 2.7 MB
MAX_PIECES = 300_000  # the largest released file has 130,344
MAX_PIECE_BYTES = 1_000  # the longest piece of a released file has 48
_MAX_SURFACE_BYTES = 100  # what unknown text is written as; " ⁇ " in all released files
_BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_COPY_AGAIN = "copy it again; a file of a few hundred bytes is often a Git LFS pointer (`git lfs pull`)"


@dataclass(frozen=True)
class Normalizer:
    """What happens to a text before it is split, named as in the file format.

    Args:
        name: Which set of rules it was made of.
        has_rules: Whether there are rules, the precompiled_charsmap.
        add_dummy_prefix: Whether a blank is put in front of every text.
        remove_extra_whitespaces: Whether blanks at the ends and all but one of a run are dropped.
        escape_whitespaces: Whether a blank becomes `▁`.
        treat_whitespace_as_suffix: Whether it belongs to the word in front of it.
    """

    name: str
    has_rules: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    treat_whitespace_as_suffix: bool

    def problem(self, expected: str) -> str | None:
        """Compares with a known one.

        Args:
            expected: "identity", which keeps blanks as they are, or "nmt_nfkc", which does not.

        Returns:
            The difference in words, or None.
        """
        cleans = expected == "nmt_nfkc"
        if self.has_rules != cleans or self.remove_extra_whitespaces != cleans or not self.escape_whitespaces:
            habit, wanted = ("keeps", expected) if cleans else ("removes", f"the {expected}")
            return f"the normaliser is {self.name or 'unnamed'} or {habit} blanks, expected {wanted}"
        return "blanks are suffixes, expected prefixes" if self.treat_whitespace_as_suffix else None


@dataclass(frozen=True)
class SentencePieceFile:
    """What a SentencePiece file says.

    Args:
        path: Where it was read.
        texts: The piece of every id.
        types: The type of every id (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED or BYTE).
        scores: The score of every id.
        model_type: "UNIGRAM", "BPE", "WORD" or "CHAR".
        normalizer: What happens to a text first.
        data: The file as it is, so that it can be saved again.
    """

    path: Path
    texts: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    model_type: str
    normalizer: Normalizer
    data: bytes

    def __len__(self) -> int:
        return len(self.texts)

    def library(self, more: Sequence[tuple[str, int]] = ()) -> LibraryPieces:
        """Starts the sentencepiece library on the file.

        Args:
            more: Pieces behind the file's, and their types.

        Returns:
            The encoder and decoder.

        Raises:
            TokenizerError: The library refuses the file.
        """
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        data = self.data
        if more:
            model = sentencepiece_model_pb2.ModelProto.FromString(data)
            for text, kind in more:
                model.pieces.add(piece=text, type=kind, score=0.0)
            model.trainer_spec.byte_fallback = any(kind == BYTE for _, kind in more)
            data = model.SerializeToString()
        try:
            return LibraryPieces(SentencePieceProcessor(model_proto=data))
        except (RuntimeError, OSError) as error:
            raise TokenizerError(
                f"{self.path} is refused by the sentencepiece library: {error}", hint="copy it again"
            ) from error


class LibraryPieces:
    """Text to ids and ids to text by the sentencepiece library.

    Args:
        processor: The library's object, which takes ids of its own file only.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def encode(self, text: str) -> list[int]:
        """Gives the ids of a text.

        Args:
            text: Valid Unicode; nothing in it is a control token.

        Returns:
            The ids.
        """
        ids: list[int] = self.processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Gives the text of ids.

        Args:
            ids: Ids inside the vocabulary.

        Returns:
            The text: no blank in front of the first word, nothing for control tokens, " ⁇ " for the unknown piece, one
            U+FFFD for each byte that belongs to no character.
        """
        text: str = self.processor.decode(list(ids))
        return text


def read_model(path: Path) -> SentencePieceFile:
    """Reads a SentencePiece file of any kind.

    Args:
        path: The file.

    Returns:
        What it says.

    Raises:
        TokenizerError: The file is missing, too large, truncated or not SentencePiece, has too many or too long
            pieces, one of them twice or no UTF-8, or a score that is no number.
    """
    if not path.is_file():
        raise TokenizerError(
            f"no tokenizer: {path} is missing", hint=f"copy {path.name} from the checkpoint's original repository"
        )
    size_bytes = path.stat().st_size
    if size_bytes > MAX_FILE_BYTES:
        raise TokenizerError(
            f"{path} has {size_bytes} bytes; a SentencePiece file has at most {MAX_FILE_BYTES}",
            hint=f"copy {path.name} from the checkpoint's original repository",
        )
    data = path.read_bytes()
    if _has_too_many_pieces(data):  # before they are taken apart, which takes the memory
        raise TokenizerError(f"{path} is damaged: more than {MAX_PIECES} pieces", hint="copy it again")
    model = _parse(path, data)
    texts, types, scores = zip(*((piece.piece, piece.type, piece.score) for piece in model.pieces))
    problem = _beyond_limits(texts, scores) or _unlike_a_model(texts, types, model)
    if problem:
        raise TokenizerError(f"{path} is damaged: {problem}", hint="copy it again")
    trainer, spec = model.trainer_spec, model.normalizer_spec
    normalizer = Normalizer(
        spec.name,
        bool(spec.precompiled_charsmap),
        spec.add_dummy_prefix,
        spec.remove_extra_whitespaces,
        spec.escape_whitespaces,
        trainer.treat_whitespace_as_suffix,
    )
    kind = trainer.ModelType.Name(trainer.model_type)
    return SentencePieceFile(path, texts, types, scores, kind, normalizer, data)


def _parse(path: Path, data: bytes) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise TokenizerError(
            f"{path} ({len(data)} bytes) is truncated or no SentencePiece file: {error}", hint=_COPY_AGAIN
        ) from error
    # The specifications lie behind the pieces, so a file cut at a piece boundary parses but lacks them.
    if not model.pieces or not model.HasField("trainer_spec") or not model.HasField("normalizer_spec"):
        raise TokenizerError(
            f"{path} ({len(data)} bytes) is truncated or no SentencePiece file: "
            f"{len(model.pieces)} pieces, and the trainer's or the normaliser's specification is missing",
            hint="copy it again",
        )
    return model


def _has_too_many_pieces(data: bytes) -> bool:
    """Counts the fields of a ModelProto without building any; a file that is cut short is found by the parser."""
    if data.count(b"\n") <= MAX_PIECES:  # the byte that begins a piece, which stands elsewhere too
        return False
    pieces = position = 0
    while position < len(data) and pieces <= MAX_PIECES:
        tag, position = data[position], position + 1
        if tag & 7 != 2 or tag >= 0x80:  # its fields are messages with low numbers; the parser refuses others
            return False
        length = shift = 0
        while position < len(data):
            byte, position = data[position], position + 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80 or shift > 63:
                break
        position += length
        pieces += tag == 0x0A
    return pieces > MAX_PIECES


def _unlike_a_model(texts: Sequence[str], types: Sequence[int], model: Any) -> str | None:
    """What the library would stumble over while it works, where it has no error to give; newer versions do."""
    if any("\0" in text for text in texts):
        return "a piece has a zero byte"
    if types.count(UNKNOWN) != 1:
        return f"{types.count(UNKNOWN)} pieces stand for unknown text, expected 1"
    wrong = [text for text, kind in zip(texts, types) if kind == BYTE and text not in _BYTE_PIECES]
    if wrong:
        return f"the byte {wrong[0][:40]!r} is none from <0x00> to <0xFF>"
    if len(model.trainer_spec.unk_surface.encode("utf-8", "surrogatepass")) > _MAX_SURFACE_BYTES:
        return f"unknown text is written with more than {_MAX_SURFACE_BYTES} bytes"
    rules = (model.normalizer_spec.precompiled_charsmap, model.denormalizer_spec.precompiled_charsmap)
    return next((problem for one in rules if (problem := problem_of_rules(one))), None)


def _beyond_limits(texts: Sequence[str], scores: Sequence[float]) -> str | None:
    if not all(isinstance(text, str) for text in texts):  # protobuf hands on what is no UTF-8 as bytes
        return "a piece is no UTF-8 text"
    longest = max(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if longest > MAX_PIECE_BYTES or not all(texts):
        return f"the longest piece has {longest} bytes, or one has none; expected 1 to {MAX_PIECE_BYTES}"
    if len(set(texts)) != len(texts):
        return "a piece occurs twice"
    if not all(map(math.isfinite, scores)):
        return "a piece's score is no number"
    return None
