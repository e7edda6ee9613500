"""A SentencePiece BPE file as a fast Rust tokenizer, with the same ids and the same decoded text.

SentencePiece merges, again and again, the adjacent pair whose joined piece has the highest score. A Rust BPE wants a
list of pairs in order of preference instead. Both are the same when every way to split a piece into two pieces is
listed, in the order of the pieces' scores. SentencePiece's own normaliser is the identity here: the text gets one `▁`
in front (the dummy prefix) and every blank becomes `▁`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers

from glmkit.errors import TokenizerError
from glmkit.runtime.vocabulary import SPACE, ByteTable
from glmkit.tokenizers.sentencepiece_file import BYTE, CONTROL, NORMAL, UNKNOWN, SentencePieceFile, read_model


def read_pieces(path: Path) -> SentencePieceFile:
    """Reads a SentencePiece file and refuses everything but what ChatGLM2, ChatGLM3 and glm-nano use.

    Args:
        path: The file, usually `tokenizer.model`.

    Returns:
        Its pieces.

    Raises:
        TokenizerError: The file is missing, too large, truncated, not SentencePiece, not BPE, or asks for something
            that this tokenizer does not do; the message says which.
    """
    file = read_model(path)
    problem = _unsupported(file)
    if problem:
        raise TokenizerError(
            f"{path} is no tokenizer of ChatGLM2 or ChatGLM3: {problem}",
            hint="check that the file belongs to this checkpoint",
        )
    return file


def _unsupported(file: SentencePieceFile) -> str | None:
    """The first property that this tokenizer does not do, in words, or None."""
    if file.model_type != "BPE":
        return f"the model type is {file.model_type}, expected BPE"
    problem = file.normalizer.problem("identity")
    if problem:
        return problem
    expected = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
    if list(file.types[: len(expected)]) != expected:
        return "ids 0 to 258 are not <unk>, <s>, </s> and the 256 bytes"
    if any(kind != NORMAL for kind in file.types[len(expected) :]):
        return "there are user-defined, unused or control pieces behind id 258"
    return None


def build_merges(pieces: SentencePieceFile) -> list[tuple[str, str]]:
    """Lists every pair of pieces that joins to a piece, best first.

    Args:
        pieces: The SentencePiece file.

    Returns:
        The pairs in the order of the joined piece's score; of two ways to the same piece the one with the longer left
        half first, because SentencePiece takes the leftmost pair and runs of one character grow from the left.
    """
    ranked = sorted(
        (-score, index) for index, (score, kind) in enumerate(zip(pieces.scores, pieces.types)) if kind == NORMAL
    )
    normal = [pieces.texts[index] for _, index in ranked]
    known = set(normal)
    return [
        (left, right)
        for piece in normal
        for cut in range(len(piece) - 1, 0, -1)
        if (left := piece[:cut]) in known and (right := piece[cut:]) in known
    ]


def build_tokenizer(pieces: SentencePieceFile, control: Sequence[str]) -> Tokenizer:
    """Builds the Rust tokenizer.

    Args:
        pieces: The SentencePiece file.
        control: Names of the control ids, which follow the file's ids in this order. They are plain entries of the
            vocabulary that no merge produces, so that no text becomes one.

    Returns:
        The tokenizer, without special tokens in its post-processor.

    Raises:
        TokenizerError: A control name is also a piece of the file.
    """
    vocabulary = {text: index for index, text in enumerate(pieces.texts)}
    for offset, name in enumerate(control):
        if name in vocabulary:
            raise TokenizerError(
                f"the SentencePiece file has the piece {name!r}, which must be a control id",
                hint="check that all files of the folder belong to one checkpoint",
            )
        vocabulary[name] = len(pieces) + offset
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=build_merges(pieces),
            unk_token=pieces.texts[0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    blanks = normalizers.Replace(" ", SPACE)
    prefix = [normalizers.Prepend(SPACE)] if pieces.normalizer.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, blanks])
    strip = [decoders.Strip(content=" ", left=1, right=0)] if pieces.normalizer.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def piece_table(pieces: SentencePieceFile, extra: Sequence[str]) -> ByteTable:
    """Makes what turns ids into text exactly as SentencePiece does.

    Bytes that do not form a character become one U+FFFD each, and only the blank of a first piece is dropped (the Rust
    decoder replaces a whole run of bytes when one of them is wrong).

    Args:
        pieces: The SentencePiece file.
        extra: What the ids behind the file's decode to, in order.

    Returns:
        The table.
    """
    tokens = [
        bytes([int(text[1:-1], 16)])
        if kind == BYTE
        else b""
        if kind != NORMAL
        else text.replace(SPACE, " ").encode("utf-8")
        for text, kind in zip(pieces.texts, pieces.types)
    ]
    tokens += [text.encode("utf-8") for text in extra]
    byte_ids = frozenset(index for index, kind in enumerate(pieces.types) if kind == BYTE)
    return ByteTable(tokens, byte_ids, pieces.normalizer.add_dummy_prefix, each_byte=True)
