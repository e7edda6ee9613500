"""Tasks about plain text: its perplexity with a sliding window, and the last words of passages.

    perplexity   a text file, cut into windows; each token counts once
    lambada      "… he opened the" -> " door": is each token of the last word the likeliest one, given the passage?

Both score tokens that are given, so nothing is generated, and both work for every family in its own way; see
`scoring.py`.

Source: tasks/language_model of THUDM/GLM, for what a passage and its last word are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmkit.data.rows import Unreadable, read_rows, read_text
from glmkit.errors import DataError, UsageError
from glmkit.evaluate.perplexity import windows
from glmkit.evaluate.scoring import Frame, Passage, frame_of, score_passages
from glmkit.evaluate.tasks import Figure, Row, Settings
from glmkit.loading import Loaded

_WINDOW_TOKENS = 1024
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class TextWindow:
    """A window of a text.

    Args:
        first_token: Number of its first token in the text.
        known: Ids that an earlier window has scored.
        scored: Ids that this one scores.
        text_bytes: Its share of the text in UTF-8: bytes of the text times its share of the scored tokens.
    """

    first_token: int
    known: list[int]
    scored: list[int]
    text_bytes: float


@dataclass(frozen=True)
class TextPerplexity:
    """The task "perplexity".

    Args:
        path: The text, UTF-8.
        window: Tokens of text that the model sees at most; None: 1,024, or what its context has room for.
        stride: By how many a window moves on; None: by half of it.
        batch_size: Windows that go through the model together.
        limit: Only the first windows.
    """

    path: Path
    window: int | None = None
    stride: int | None = None
    batch_size: int = 32
    limit: int | None = None
    name: str = "perplexity"
    rows_file: str = "predictions.jsonl"

    def items(self, loaded: Loaded) -> list[TextWindow]:
        """Cuts the text into windows; see `Task.items`."""
        tokenizer = tokenizer_of(loaded)
        text = read_text(existing(self.path))
        ids = tokenizer.encode_text(text)
        if not ids:
            raise DataError(f"{self.path} has no text")
        frame = frame_of(tokenizer)
        room = room_tokens(loaded, frame)
        window = min(_WINDOW_TOKENS, room) if self.window is None else self.window
        if not 1 <= window <= room:
            raise DataError(f"a window of {window} tokens: expected 1 to {room}, the room in the context of this model")
        stride = max(1, window // 2) if self.stride is None else self.stride
        share = len(text.encode()) / len(ids)
        parts = windows(len(ids), window, stride)[: self.limit]
        return [
            TextWindow(
                part.first,
                ids[part.first : part.scored],
                ids[part.scored : part.last],
                share * (part.last - part.scored),
            )
            for part in parts
        ]

    def answer(
        self, loaded: Loaded, items: Sequence[Any], first: int, progress: Callable[[int], None] | None = None
    ) -> list[Row]:
        """Scores windows; see `Task.answer`."""
        passages = [Passage(item.known, item.scored) for item in items]
        scored = score_passages(
            loaded.model,
            frame_of(tokenizer_of(loaded)),
            passages,
            batch_size=self.batch_size,
            progress=progress,
        )
        return [
            {
                "id": first + number,
                "first_token": item.first_token + len(item.known),
                "tokens": len(item.scored),
                "bytes": item.text_bytes,
                "loss": -math.fsum(one.log_probabilities),
            }
            for number, (item, one) in enumerate(zip(items, scored))
        ]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        """Perplexity of a token, and bits for each byte of the text, which vocabularies can be compared by."""
        losses = [row["loss"] for row in rows]
        bits = [loss / math.log(2) for loss in losses]
        return [
            Figure("perplexity", losses, [row["tokens"] for row in rows], unit="exp", better="less"),
            Figure("bits_per_byte", bits, [row["bytes"] for row in rows], unit="number", better="less"),
        ]

    def notes(self, rows: Sequence[Row]) -> Mapping[str, Any]:
        """How much was read."""
        return {"windows": len(rows), "tokens": sum(row["tokens"] for row in rows)}


@dataclass(frozen=True)
class LastWord:
    """A passage without its last word, and that word.

    Args:
        where: Place in the file.
        known: Ids of the passage.
        word: The word.
        scored: Its ids.
    """

    where: str
    known: list[int]
    word: str
    scored: list[int]


@dataclass(frozen=True)
class LastWords:
    """The task "lambada".

    Args:
        path: JSON Lines with `text`, or with `inputs_pretokenized` and `targets_pretokenized`; or plain text (.txt)
            with a passage in each line.
        batch_size: Passages that go through the model together.
        limit: Only the first passages.
    """

    path: Path
    batch_size: int = 32
    limit: int | None = None
    name: str = "lambada"
    rows_file: str = "predictions.jsonl"

    def items(self, loaded: Loaded) -> list[LastWord]:
        """Reads the passages; one that is too long loses its beginning. See `Task.items`."""
        tokenizer = tokenizer_of(loaded)
        frame = frame_of(tokenizer, closed=True)
        room = room_tokens(loaded, frame)
        found = []
        for where, passage, word in _passages(existing(self.path)):
            known, scored = split_ids(tokenizer, passage, word)
            if len(scored) >= room:
                raise DataError(f"{where}: the last word has {len(scored)} tokens, more than the context of this model")
            found.append(LastWord(where, known[max(0, len(known) + len(scored) - room) :], word.strip(), scored))
            if self.limit is not None and len(found) == self.limit:
                break
        return found

    def answer(
        self, loaded: Loaded, items: Sequence[Any], first: int, progress: Callable[[int], None] | None = None
    ) -> list[Row]:
        """Scores the last words; see `Task.answer`."""
        tokenizer = tokenizer_of(loaded)
        scored = score_passages(
            loaded.model,
            frame_of(tokenizer, closed=True),
            [Passage(item.known, item.scored) for item in items],
            batch_size=self.batch_size,
            progress=progress,
        )
        return [
            {
                "id": item.where,
                "target": item.word,
                "predict": tokenizer.decode_ids(one.likeliest).strip(),
                "correct": one.likeliest == list(item.scored),
                "loss": -math.fsum(one.log_probabilities),
            }
            for item, one in zip(items, scored)
        ]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        """Share of words of which every token was the likeliest, and the perplexity of a word."""
        return [
            Figure("accuracy", [float(row["correct"]) for row in rows]),
            Figure("word_perplexity", [row["loss"] for row in rows], unit="exp", better="less"),
        ]

    def notes(self, rows: Sequence[Row]) -> Mapping[str, Any]:
        """Nothing beside the figures."""
        return {}


def make_perplexity(data: str | Path, how: Settings) -> TextPerplexity:
    """Makes the task "perplexity".

    Args:
        data: A text file.
        how: Knows window, stride, batch_size and limit.

    Returns:
        The task.

    Raises:
        UsageError: A setting that it does not know.
    """
    how.only("perplexity", "window", "stride", "seed")
    return TextPerplexity(Path(data), how.window, how.stride, how.batch_size, how.limit)


def make_lambada(data: str | Path, how: Settings) -> LastWords:
    """Makes the task "lambada".

    Args:
        data: See `LastWords`.
        how: Knows batch_size and limit.

    Returns:
        The task.

    Raises:
        UsageError: A setting that it does not know.
    """
    how.only("lambada", "seed")
    return LastWords(Path(data), how.batch_size, how.limit)


def split_ids(tokenizer: Any, passage: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encodes a text of two parts as one, so that its tokens are those of running text.

    Args:
        tokenizer: The model's tokenizer.
        passage: The first part; blanks at its end belong to the second.
        continuation: What follows it, with the blank in front if there is one.

    Returns:
        Ids of the first part, and of the rest. A token that reaches over the border belongs to the rest.
    """
    bare = passage.rstrip()
    ids = tokenizer.encode_text(passage + continuation)
    before = tokenizer.encode_text(bare) if bare else []
    same = next(
        (place for place, pair in enumerate(zip(before, ids)) if pair[0] != pair[1]), min(len(before), len(ids))
    )
    same = max(0, min(same, len(ids) - 1))
    return ids[:same], ids[same:]


def tokenizer_of(loaded: Loaded) -> Any:
    """The model's tokenizer.

    Args:
        loaded: The model.

    Raises:
        UsageError: There is none.
    """
    if loaded.tokenizer is None:
        raise UsageError(
            f"{loaded.path} has no tokenizer, so no text can be read",
            hint="copy the tokenizer's files from the checkpoint's original repository",
        )
    return loaded.tokenizer


def context_tokens(loaded: Loaded) -> int:
    """Most tokens that the model reads, control tokens among them.

    Args:
        loaded: The model.
    """
    return int(loaded.config.max_position_embeddings)


def room_tokens(loaded: Loaded, frame: Frame) -> int:
    """Most tokens of a text, known and scored, that fit beside the control tokens; the last one is never read.

    Args:
        loaded: The model.
        frame: The control tokens.
    """
    return context_tokens(loaded) - len(frame.before) - len(frame.between) + 1


def joined(text: str, continuation: str) -> str:
    """A text's continuation with a blank in front of it, where words are divided by blanks and there is none.

    Args:
        text: The text.
        continuation: What follows it.
    """
    divided = text[-1:].isascii() and continuation[:1].isascii() and continuation[:1].isalnum()
    return f" {continuation}" if text and divided and not text[-1].isspace() else continuation


def existing(path: Path) -> Path:
    """The path of a data file.

    Args:
        path: The path.

    Raises:
        DataError: There is no such file.
    """
    if not path.is_file():
        raise DataError(f"there is no data file {path}", hint="check the path; it is relative to the current folder")
    return path


def place_in(path: Path, where: str) -> str:
    """A row's place without the folder of its file, so that it is the same wherever the file lies.

    Args:
        path: The file.
        where: Place of a row as `read_rows` gives it, which begins with the path.
    """
    return where.replace(str(path), path.name, 1)


def _passages(path: Path) -> Iterator[tuple[str, str, str]]:
    """Place, passage and last word, with the blank in front of it."""
    if path.suffix.lower() == ".txt":
        rows: Iterator[tuple[str, Any]] = (
            (f"{path}:{number}", {"text": line})
            for number, line in enumerate(read_text(path).split("\n"), start=1)
            if line.strip()
        )
    else:
        rows = read_rows(path)
    for where, row in rows:
        if isinstance(row, Unreadable):
            raise DataError(f"{where}: {row.reason}")
        yield place_in(path, where), *_last_word(where, row)


def _last_word(where: str, row: Any) -> tuple[str, str]:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a row must be an object, this is {type(row).__name__}")
    if isinstance(row.get("text"), str):
        words = row["text"].split()
        if len(words) < 2:
            raise DataError(
                f"{where}: {row['text'][:_SHOWN_CHARACTERS]!r} has no last word behind others",
                hint="for text without blanks give inputs_pretokenized and targets_pretokenized",
            )
        return row["text"][: row["text"].rfind(words[-1])].strip(), f" {words[-1]}"
    text, targets = row.get("inputs_pretokenized"), row.get("targets_pretokenized")
    target = targets[0] if isinstance(targets, list) and targets else targets
    if not isinstance(text, str) or not isinstance(target, str) or not target.strip():
        names = ", ".join(map(repr, row)) or "none"
        raise DataError(f"{where}: expected text, or inputs_pretokenized and targets_pretokenized; it has {names}")
    return text.strip(), joined(text.strip(), target.strip())
