"""Corpora of any size as an endless stream of rows, in constant memory and without an index.

A row begins with a document that is drawn by its length: a byte of the whole corpus is chosen at random, and the
document around it is read from the file. Row number n is a function of corpus, seed and n alone. So the whole state of
a stream is one number, every process of a parallel run takes numbers of its own, and no file is read from its start.
Documents come again at random; there are no passes.

Three forms of files: `jsonl` (an object per line, the text in one of its fields), `lines` (a document per line) and
`paragraphs` (documents with blank lines between them).

Source of the law of rows: THUDM/GLM data_utils/datasets.py, BlockDataset.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from glmkit.errors import DataError

Form = Literal["auto", "jsonl", "lines", "paragraphs"]

# A text that is longer than this is read in pieces, a line of JSON that is longer is refused.
LONGEST_BYTES = 1 << 22
_FIRST_WINDOW_BYTES = 1 << 13
_SAMPLED_BYTES = 1 << 16  # of both ends of a file, for the fingerprint
_NAMED_BAD_LINES = 10
_DRAWS = 1000
# What stands between documents; blanks around a document are stripped anyway.
_BETWEEN = {"lines": re.compile(rb"\n"), "jsonl": re.compile(rb"\n"), "paragraphs": re.compile(rb"\n[ \t\r]*\n\s*")}
# Rows are cut at these; the Chinese marks are missing in the official code too.
ROW_MARKS = ".?!;:\n"


@dataclass(frozen=True)
class Document:
    """A text of a corpus.

    Attributes:
        text: Without blanks at its ends.
        where: File and byte, or line, at which it begins.
        place: Character that was asked for, see `Corpus.document_at`.
    """

    text: str
    where: str
    place: int = 0


@dataclass
class BadLines:
    """Lines and documents that could not be read and were left out.

    Attributes:
        number: How many were met; one that is met again counts again.
        named: The first few different ones: where, and what is wrong, with file and line.
    """

    number: int = 0
    named: dict[str, str] = field(default_factory=dict)

    def add(self, where: str, problem: Callable[[], str]) -> None:
        """Count one.

        Args:
            where: Tells it from others.
            problem: Says what is wrong; called only if it is to be named, because counting lines is slow.
        """
        self.number += 1
        if where not in self.named and len(self.named) < _NAMED_BAD_LINES:
            self.named[where] = problem()


class Corpus:
    """Text files, read where they are needed.

    Args:
        files: Paths or patterns such as "data/*.jsonl".
        form: Their form; auto takes `jsonl` for names that end in .jsonl or .json, else `paragraphs`.
        text_field: Field of the text in `jsonl`.
        skip_bad_lines: Count what cannot be read in `bad`, instead of refusing it.

    Raises:
        DataError: If a pattern fits no file, or the files are empty.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        *,
        form: Form = "auto",
        text_field: str = "text",
        skip_bad_lines: bool = False,
    ) -> None:
        self.text_field, self.skip_bad_lines = text_field, skip_bad_lines
        self.files = [path for pattern in files for path in _expand(str(pattern))]
        self._forms = [_form_of(path) if form == "auto" else form for path in self.files]
        self._sizes = [path.stat().st_size for path in self.files]
        self._ends = list(itertools.accumulate(self._sizes))
        self.bad = BadLines()
        if not self._ends or not self._ends[-1]:
            raise DataError(
                f"there is no text in {', '.join(map(str, files)) or 'an empty list of files'}",
                hint="give files that hold text: corpus.files=FILE",
            )

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return self._ends[-1]

    def fingerprint(self) -> str:
        """Return a SHA-256 over names, sizes and both ends of every file: cheap, and different for other data."""
        digest = hashlib.sha256()
        for path, size, form in zip(self.files, self._sizes, self._forms):
            digest.update(f"{path.name}\0{size}\0{form}\0{self.text_field}\0".encode())
            with open(path, "rb") as file:
                digest.update(file.read(_SAMPLED_BYTES))
                file.seek(max(0, size - _SAMPLED_BYTES))
                digest.update(file.read(_SAMPLED_BYTES))
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        """Read all documents in the order of the files; texts longer than LONGEST_BYTES come in pieces.

        Raises:
            DataError: At the first document that cannot be read, unless these are to be skipped.
        """
        for path, form in zip(self.files, self._forms):
            with open(path, "rb") as file:
                for line, raw in _pieces(file, form):
                    document = self._read(raw, form, lambda path=path, line=line: f"{path}:{line}")  # type: ignore[misc]
                    if document is not None and document.text:
                        yield document

    def document_at(self, place: int) -> Document | None:
        """Read the document around a byte.

        Args:
            place: Number of a byte of all files together, from 0.

        Returns:
            The document, with the character of that byte; None if it is empty or was skipped.

        Raises:
            DataError: If it cannot be read, unless such documents are to be skipped.
        """
        number = bisect_right(self._ends, place)
        path, form = self.files[number], self._forms[number]
        offset = place - (self._ends[number] - self._sizes[number])
        with open(path, "rb") as file:
            start, raw = _around(file, offset, self._sizes[number], form)
        document = self._read(raw, form, lambda: f"{path}:{_line_number(path, start)}", f"{path}, byte {start}")
        if document is None or not document.text:
            return None
        # In jsonl the share of the line is taken for the share of the text.
        return Document(document.text, document.where, len(document.text) * (offset - start) // len(raw or b" "))

    def draw(self, generator: random.Random) -> Document:
        """Read a document at random, the longer the likelier.

        Args:
            generator: Source of randomness.

        Raises:
            DataError: If nothing but empty or skipped documents is met.
        """
        for _ in range(_DRAWS):
            document = self.document_at(generator.randrange(self.size_bytes))
            if document is not None:
                return document
        known = "; ".join(self.bad.named.values()) or "they are all empty"
        raise DataError(
            f"{_DRAWS} documents drawn one after the other cannot be used: {known}",
            hint="docs/pretraining.md shows the forms of a corpus; corpus.form= names one",
        )

    def _read(self, raw: bytes | None, form: str, line: Callable[[], str], where: str = "") -> Document | None:
        try:
            if raw is None:
                raise ValueError(f"the line is longer than {LONGEST_BYTES} bytes")
            text = raw.decode("utf-8").lstrip("\ufeff")  # the mark that some editors put in front of a file
            if form == "jsonl" and text.strip():
                text = _field(json.loads(text), self.text_field)
                text.encode("utf-8")  # half of a pair, "\\ud800", is JSON and no text
        except (ValueError, RecursionError) as error:  # errors of Unicode and of JSON are ValueErrors
            reason = str(error)
            if not self.skip_bad_lines:
                hint = "mend the line, or leave such lines out with corpus.on_bad_line=skip"
                raise DataError(f"{line()}: {reason}", hint=hint) from None
            self.bad.add(where or line(), lambda: f"{line()}: {reason}")
            return None
        return Document(text.strip(), where or line())


@dataclass(frozen=True)
class Row:
    """A piece of text to learn from: `ENC t1 t2 …`, or several documents `ENC … eos ENC …`.

    Attributes:
        ids: Its ids.
        loss_mask: 1 where a token may be learnt.
        where: Where its first document comes from.
    """

    ids: list[int]
    loss_mask: list[int]
    where: str = ""


class RowStream:
    """Rows for pre-training: `ENC document eos`, filled up with further documents, or a piece of a long one.

    Args:
        corpus: Where documents come from.
        encode: Turns text into ids, without control tokens.
        enc_id: Goes in front of every document.
        eos_id: Goes behind every document.
        ends_sentence: Says of an id whether a row may be cut behind it.
        length: Most tokens of a row, and of most rows the number.
        seed: Seed of everything drawn.
    """

    def __init__(
        self,
        corpus: Corpus,
        encode: Callable[[str], list[int]],
        *,
        enc_id: int,
        eos_id: int,
        ends_sentence: Callable[[int], bool],
        length: int,
        seed: int,
    ) -> None:
        self.corpus, self.length, self.seed = corpus, length, seed
        self._encode, self._ends_sentence = encode, ends_sentence
        self._enc, self._eos = enc_id, eos_id

    def row(self, number: int) -> Row:
        """Make one row.

        Args:
            number: Which; the same number gives the same row in every process and after every restart.

        Raises:
            DataError: If a document that cannot be read is met and is not to be skipped.
        """
        generator = random.Random(f"row {self.seed} {number}")
        ids, where = self._document(generator)
        if len(ids) >= self.length:
            start = self._start(ids, generator)
            return self._row(self._cut([self._enc, *ids[start:]], self.length), where)
        row = [self._enc, *ids]
        full = False
        while not full and len(row) < self.length:
            more, _ = self._document(generator)
            room = self.length - len(row)
            full = len(more) + 1 >= room  # cut behind a sentence, it may leave room that stays empty
            row += self._cut([self._enc, *more], room)
        return self._row(row, where)

    def _row(self, ids: list[int], where: str) -> Row:
        return Row(ids, [int(token != self._enc) for token in ids], where)

    def _document(self, generator: random.Random) -> tuple[list[int], str]:
        """Draw a document as ids with eos; of a long one, a piece around the drawn place is enough."""
        document = self.corpus.draw(generator)
        longest = 16 * self.length  # characters; many times what a row holds, whatever the language
        text = document.text
        start = max(0, min(document.place - longest // 2, len(text) - longest))
        ids = self._encode(text[start : start + longest])
        return (ids if start + longest < len(text) else [*ids, self._eos]), document.where

    def _start(self, ids: list[int], generator: random.Random) -> int:
        """Choose where a piece of a long document begins: at random, moved left or right to a sentence."""
        start = generator.randrange(len(ids) - self.length + 1)
        step = -1 if generator.random() < 0.5 else 1
        for _ in range(self.length // 2):
            if start == 0 or start == len(ids) - 2 or self._ends_sentence(ids[start - 1]):
                break
            start += step
        return start

    def _cut(self, ids: list[int], length: int) -> list[int]:
        """Cut on the right, behind a sentence if that leaves half of the length."""
        if len(ids) <= length and ids[-1] == self._eos:
            return ids
        longest = min(length, len(ids))
        for end in range(longest, max(1, length // 2) - 1, -1):
            if self._ends_sentence(ids[end - 1]):
                return ids[:end]
        return ids[:longest]


def _expand(pattern: str) -> list[Path]:
    if Path(pattern).is_file():
        return [Path(pattern)]
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
    if not found:
        raise DataError(
            f"there is no corpus file {pattern}", hint="check the path; it is relative to the current folder"
        )
    return found


def _form_of(path: Path) -> str:
    return "jsonl" if path.suffix in {".jsonl", ".json"} else "paragraphs"


def _field(record: object, name: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {type(record).__name__}")
    if name not in record:
        raise ValueError(f"there is no field {name!r}; found {', '.join(map(repr, record)) or 'none'}")
    if not isinstance(record[name], str):
        raise ValueError(f"the field {name!r} is no text but {type(record[name]).__name__}")
    return record[name]


def _pieces(file: BinaryIO, form: str) -> Iterator[tuple[int, bytes | None]]:
    """Yield (line number, bytes) of the documents of a file, long texts in pieces, None for a long line of JSON."""
    collected: list[bytes] = []
    collected_bytes, start = 0, 1
    for line, raw, whole in _lines(file):
        if form == "jsonl":
            if not whole:
                _skip_line(file)
            yield line, raw if whole else None
        elif form == "lines":
            yield line, raw
        else:
            start = start if collected else line
            if raw.strip():
                collected.append(raw)
                collected_bytes += len(raw)
            if collected and (not raw.strip() or collected_bytes >= LONGEST_BYTES):
                yield start, b"".join(collected)
                collected, collected_bytes = [], 0
    if collected:
        yield start, b"".join(collected)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes, bool]]:
    """Yield (number, bytes, whether it is whole) of lines; one that is too long comes in pieces of whole characters."""
    line, rest = 1, b""
    while raw := file.readline(LONGEST_BYTES):
        raw = rest + raw
        whole = raw.endswith(b"\n") or len(raw) < LONGEST_BYTES
        kept = len(raw) if whole else _whole_characters(raw)
        yield line, raw[:kept], whole
        rest = raw[kept:]
        line += whole


def _whole_characters(raw: bytes) -> int:
    """Return how many bytes are left without a last character that is cut."""
    for back in range(1, min(4, len(raw)) + 1):
        if raw[-back] & 0xC0 != 0x80:  # the first byte of the last character
            needed = 1 + (raw[-back] >= 0xC0) + (raw[-back] >= 0xE0) + (raw[-back] >= 0xF0)
            return len(raw) if needed <= back else len(raw) - back
    return len(raw)


def _skip_line(file: BinaryIO) -> None:
    while (raw := file.readline(LONGEST_BYTES)) and not raw.endswith(b"\n"):
        pass


def _around(file: BinaryIO, offset: int, size: int, form: str) -> tuple[int, bytes | None]:
    """Read the document around a byte from windows that grow; of a very long text, the largest window.

    Returns:
        Where it begins, and its bytes; None for a line of JSON that is too long.
    """
    reach = _FIRST_WINDOW_BYTES
    while True:
        first, last = max(0, offset - reach), min(size, offset + reach)
        file.seek(first)
        window = file.read(last - first)
        start, end = (0 if first == 0 else None), (len(window) if last == size else None)
        for match in _BETWEEN[form].finditer(window):
            if match.end() > offset - first:
                end = match.start()
                break
            start = match.end()
        if start is not None and end is not None:
            return first + start, window[start:end]
        if reach >= LONGEST_BYTES:
            break
        reach *= 8
    if form == "jsonl":
        return first + (start or 0), None
    start, end = start or 0, _whole_characters(window) if end is None else end
    while start < end and window[start] & 0xC0 == 0x80:  # the rest of a character that begins outside
        start += 1
    return first + start, window[start:end]


def _line_number(path: Path, offset: int) -> int:
    """Count lines up to a byte; slow, for messages."""
    number = 1
    with open(path, "rb") as file:
        while offset > 0 and (block := file.read(min(offset, 1 << 20))):
            number += block.count(b"\n")
            offset -= len(block)
    return number
