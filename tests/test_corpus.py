"""Streams of text: every byte leads to its document, memory stays small, and a stream goes on where it was cut."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from glmkit.data import corpus as module
from glmkit.data.blank_infilling import BlankIds, BlankMaker
from glmkit.data.corpus import Corpus, Row, RowStream
from glmkit.data.made_texts import made_texts
from glmkit.data.mixtures import MIXTURES
from glmkit.errors import DataError
from glmkit.train.sources import Blanks

ENC, EOS, STOP = 3, 4, 5


def encode(text: str) -> list[int]:
    """One id for each character; a full stop ends a sentence."""
    return [STOP if character in ".。" else 10 + ord(character) % 500 for character in text]


def stream(corpus: Corpus, length: int = 64, seed: int = 1) -> RowStream:
    return RowStream(
        corpus, encode, enc_id=ENC, eos_id=EOS, ends_sentence=lambda token: token == STOP, length=length, seed=seed
    )


def random_texts(number: int) -> list[str]:
    generator = random.Random(2)
    texts = []
    for _ in range(number):
        text = "".join(generator.choice("天地玄黄abc de.。\n") for _ in range(generator.randrange(1, 300)))
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        texts.append("\n".join(lines) or "空")
    return texts


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return random_texts(400)


@pytest.mark.parametrize("form", ["paragraphs", "lines", "jsonl"])
def test_every_byte_leads_to_its_document(tmp_path: Path, texts: list[str], form: str) -> None:
    if form == "lines":
        texts = [text.replace("\n", " ") for text in texts]
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    for path, part in ((first, texts[:200]), (second, texts[200:])):
        if form == "jsonl":
            path.write_text("".join(json.dumps({"body": text}, ensure_ascii=False) + "\n" for text in part))
        else:
            between = "\n \n\t\r\n" if form == "paragraphs" else "\n"
            path.write_text(between.join(part) + between, newline="")
    corpus = Corpus([tmp_path / "*.txt"], form=form, text_field="body")  # type: ignore[arg-type]
    assert [document.text for document in corpus.documents()] == texts
    met: list[str] = []
    for place in range(0, corpus.size_bytes, 1 if form == "lines" else 3):
        document = corpus.document_at(place)
        if document is not None and (not met or met[-1] != document.text):
            met.append(document.text)
            assert 0 <= document.place <= len(document.text)
    # Equal neighbours cannot be told apart here, and a step of 3 bytes may jump over a document of 1.
    assert [text for text in met if len(text) > 1] == [
        text for at, text in enumerate(texts) if len(text) > 1 and (at == 0 or texts[at - 1] != text)
    ]


def test_documents_are_drawn_by_their_length(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("a" * 99 + "\n" + "b" * 299 + "\n" + "c" * 599 + "\n")
    corpus, generator = Corpus([file], form="lines"), random.Random(1)
    seen = Counter(corpus.draw(generator).text[0] for _ in range(4000))
    for letter, share in (("a", 0.1), ("b", 0.3), ("c", 0.6)):
        assert abs(seen[letter] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_bad_lines_are_refused_by_name_or_counted(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    lines = [
        b'{"text": "first"}',
        b'{"txt": 3}',
        b"",
        b"[1]",
        b'{"text": 5}',
        b'{"text": "\xff"}',
        b"{oops",
        b'{"text": "last"}',
    ]
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(
        DataError, match=r"bad\.jsonl:2: there is no field 'text'; found 'txt'\nhint: .*on_bad_line=skip"
    ):
        list(Corpus([file]).documents())
    with pytest.raises(DataError, match=r"bad\.jsonl:7: Expecting property name"):
        Corpus([file]).document_at(file.read_bytes().index(b"oops"))
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(b'\xef\xbb\xbf{"text": "first"}\n')
    assert [one.text for one in Corpus([marked]).documents()] == ["first"]
    corpus = Corpus([file], skip_bad_lines=True)
    assert [(one.text, one.where) for one in corpus.documents()] == [("first", f"{file}:1"), ("last", f"{file}:8")]
    assert corpus.bad.number == 5
    assert [where.rpartition(":")[2] for where in corpus.bad.named] == ["2", "4", "5", "6", "7"]
    drawn = {corpus.draw(random.Random(seed)).text for seed in range(60)}
    assert drawn == {"first", "last"}
    assert corpus.bad.number > 20
    file.write_bytes(b"[1]\n[2]\n")
    with pytest.raises(
        DataError, match=r"1000 documents .* cannot be used: .*bad\.jsonl:1: expected an object, found list"
    ):
        Corpus([file], skip_bad_lines=True).draw(random.Random(0))
    with pytest.raises(DataError, match="there is no corpus file"):
        Corpus([tmp_path / "none*.txt"])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="there is no text in"):
        Corpus([tmp_path / "empty.txt"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "recursion"),
        (b'{"text": "half \\ud800"}', "surrogates not allowed"),
    ],
)
def test_json_that_is_no_text_is_a_bad_line(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"text": "first"}\n' + line + b'\n{"text": "last \\ud83d\\ude00"}\n')
    with pytest.raises(DataError, match=rf"bad\.jsonl:2: .*{message}"):
        list(Corpus([file]).documents())
    corpus = Corpus([file], skip_bad_lines=True)
    assert [one.text for one in corpus.documents()] == ["first", "last \U0001f600"]
    assert corpus.bad.number == 1


def test_the_lines_of_a_paragraph_are_joined_once(tmp_path: Path) -> None:
    """A paragraph of 4 MB in lines of two bytes: joining it line by line would copy terabytes."""
    file = tmp_path / "long.txt"
    file.write_bytes(b"a\n" * (module.LONGEST_BYTES // 2 + 1000) + b"\nb\n")
    assert [len(one.text) for one in Corpus([file]).documents()] == [module.LONGEST_BYTES - 1, 1999, 1]


def test_very_long_documents_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_BYTES", 1 << 14)
    monkeypatch.setattr(module, "_FIRST_WINDOW_BYTES", 1 << 11)
    file = tmp_path / "long.txt"
    text = "天地玄黄é" * 20_000
    file.write_text(text)
    for form in ("lines", "paragraphs"):
        corpus = Corpus([file], form=form)  # type: ignore[arg-type]
        assert "".join(one.text for one in corpus.documents()) == text
        for seed in range(20):
            piece = corpus.draw(random.Random(seed))
            assert piece.text in text
            assert 3000 < len(piece.text) < 1 << 14
    jsonl = tmp_path / "long.jsonl"
    jsonl.write_text(json.dumps({"text": text}) + '\n{"text": "short"}\n')
    corpus = Corpus([jsonl], skip_bad_lines=True)
    assert [one.text for one in corpus.documents()] == ["short"]
    assert corpus.document_at(50_000) is None
    assert corpus.bad.number == 2
    with pytest.raises(DataError, match=r"long\.jsonl:1: the line is longer than 16384 bytes"):
        Corpus([jsonl]).document_at(50_000)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    peaks = []
    for number in (1_000, 60_000):
        file = tmp_path / f"{number}.txt"
        line = "".join(text + " " for text in made_texts(4, number)) + "\n"
        file.write_text(line * number)
        tracemalloc.start()
        rows = stream(Corpus([file], form="lines"), 512)
        for index in range(200):
            rows.row(index)
        assert sum(1 for _ in rows.corpus.documents()) == number
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] + 100_000
    assert peaks[1] < 2_000_000 < file.stat().st_size / 10


# --- rows ---


def test_rows_are_full_and_made_of_whole_documents(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    known = sorted(set(made_texts(300, 1)))
    file.write_text("\n".join(known))
    encoded = {tuple(encode(text)) for text in known}
    rows = stream(Corpus([file], form="lines"), 600)
    lengths = []
    for number in range(100):
        row = rows.row(number)
        lengths.append(len(row.ids))
        starts = [place for place, token in enumerate(row.ids) if token == ENC]
        assert starts[0] == 0
        assert row.loss_mask == [int(token != ENC) for token in row.ids]
        for start, end in itertools.pairwise(starts):
            assert row.ids[end - 1] == EOS
            assert tuple(row.ids[start + 1 : end - 1]) in encoded
        last = tuple(row.ids[starts[-1] + 1 :])
        assert last[:-1] in encoded or any(last == one[: len(last)] for one in encoded)
    assert max(lengths) <= 600
    assert sum(lengths) / len(lengths) > 560


def test_pieces_of_long_documents_begin_and_end_at_sentences(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("".join(f"sentence number {number} is here." for number in range(2000)))
    rows = stream(Corpus([file], form="lines"), 120)
    begins = []
    for number in range(200):
        row = rows.row(number)
        assert 60 <= len(row.ids) <= 120
        assert row.ids[-1] in (STOP, EOS)
        begins.append(row.ids[1:9] == encode("sentence"))
    assert sum(begins) > 195  # all but those that reach the end of the document
    assert len({tuple(rows.row(number).ids) for number in range(200)}) > 180


# --- the stream as a source of batches ---


def make_blanks(file: Path) -> Blanks:
    ids = BlankIds(eos=EOS, enc=ENC, mask=6, smask=7, gmask=8, sop=1, eop=2, dblock=9)
    maker = BlankMaker(ids, MIXTURES["10b"], lambda token: token == STOP, 64)
    rows = stream(Corpus([file], form="lines", skip_bad_lines=True))
    return Blanks(rows, maker, batch_size=3, seed=5)


@pytest.fixture(scope="module")
def made_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("made") / "texts.txt"
    file.write_bytes(b"\n".join(text.encode() + b"\n\xff broken" for text in made_texts(200, 1)))
    return file


def test_windows_of_other_sizes_hold_the_same_batches(made_file: Path) -> None:
    def batches(size: int) -> list[str]:
        windows = itertools.islice(make_blanks(made_file).windows({}, size), 12 // size)
        return [str(batch.inputs["input_ids"].tolist()) for window in windows for batch in window.batches]

    assert batches(1) == batches(3) == batches(4)


_WRITER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_corpus import line_of, make_blanks
place = eval(sys.argv[1])
for window in make_blanks(Path({file!r})).windows(place, 2):
    print(line_of(window), flush=True)
"""


def line_of(window: object) -> str:
    batches = [{name: tensor.tolist() for name, tensor in batch.inputs.items()} for batch in window.batches]  # type: ignore[attr-defined]
    return json.dumps({"place": window.place, "batches": batches})  # type: ignore[attr-defined]


def test_a_stream_that_was_killed_goes_on_sample_for_sample(made_file: Path) -> None:
    whole = []
    for window, _ in zip(make_blanks(made_file).windows({}, 2), range(24)):
        whole.append(line_of(window))
    code = _WRITER.format(tests=str(Path(__file__).parent), file=str(made_file))
    got: list[str] = []
    for stop in (11, 24):
        place = json.loads(got[-1])["place"] if got else {}
        process = subprocess.Popen([sys.executable, "-c", code, repr(place)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        while len(got) < stop:
            got.append(process.stdout.readline().rstrip("\n"))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert got == whole
    assert json.loads(got[-1])["place"]["bad_lines"] > 0


def test_a_corpus_without_room_for_blanks_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("a\n")
    blanks = make_blanks(file)
    blanks.rows.row = lambda number: Row([ENC, 20, 21], [0, 1, 1])  # type: ignore[method-assign]
    blanks.maker.mixture = MIXTURES["token"]
    with pytest.raises(DataError, match="no row in which the wanted blanks fit"):
        next(blanks.windows({}, 2))
