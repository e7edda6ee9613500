"""Questions with four options, read from the forms in which C-Eval, CMMLU and MMLU are passed on.

    jsonl           inputs_pretokenized (question and options as one text), label 0 to 3     val/STEM/law.jsonl
    CSV, C-Eval     header id,question,A,B,C,D,answer[,explanation]                          val/law_val.csv
    CSV, CMMLU      header ,Question,A,B,C,D,Answer                                          test/law.csv
    CSV, MMLU       no header: question, four options, letter                                test/law_test.csv

in a folder, a zip of it, or a single file. Whether a file has examples (dev) or questions (val, test) is said by the
end of its name or by the folder it is in.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from glmkit.errors import DataError

LETTERS = "ABCD"
_KINDS = (".csv", ".jsonl")
_SPLITS = {name: name for name in ("dev", "val", "test", "train", "auxiliary_train")}
_SPLITS |= {"valid": "val", "validation": "val"}
_END = re.compile(r"_(dev|val|test)$")


@dataclass(frozen=True)
class Question:
    """A question.

    Args:
        subject: The subject, as its file is called.
        number: Its place in the file, from 0.
        text: Question and options, as they are shown: the options in lines of their own, `A. ...` to `D. ...`.
        answer: The right option, 0 to 3.
        category: Name of the folder that the file was in, if it is no split; "" otherwise.
        where: File and line.
    """

    subject: str
    number: int
    text: str
    answer: int
    category: str
    where: str


@dataclass
class Exam:
    """What was read.

    Args:
        questions: In the order of subject names, those of a subject as in its file.
        examples: For each subject what may be shown in front, from the split "dev".
    """

    questions: list[Question] = field(default_factory=list)
    examples: dict[str, list[Question]] = field(default_factory=dict)


def read_exam(path: str | Path, split: str) -> Exam:
    """Reads an exam.

    Args:
        path: A folder, a zip file, or a single file, which is taken whatever it is called.
        split: What is asked: "val" or "test".

    Returns:
        Questions and examples.

    Raises:
        DataError: There is nothing to read, or a row is none; the message says where.
    """
    path = Path(path)
    exam = Exam()
    others: set[str] = set()
    seen: dict[str, str] = {}
    for name, where, content in sorted(_files(path), key=lambda file: (_subject(file[0]), str(file[0]))):
        found = split if path.is_file() and path.suffix in _KINDS else _split(name) or split
        subject = _subject(name)
        if found == "dev" or found == split:
            if seen.setdefault(f"{found} {subject}", where) != where:
                raise DataError(
                    f"{subject} is there twice: {seen[f'{found} {subject}']} and {where}",
                    hint="give a folder that has every subject once",
                )
            questions = _questions(subject, _category(name), where, content)
            if found == split:
                exam.questions += questions
            else:
                exam.examples[subject] = questions
        else:
            others.add(found)
    if not exam.questions:
        listed = sorted(others | ({"dev"} if exam.examples else set()))
        what = f"has files of {', '.join(listed)} only" if listed else "has no .csv or .jsonl files of questions"
        raise DataError(f"{path} {what}; expected questions of {split!r}", hint="see docs/evaluation.md for the forms")
    return exam


def _files(path: Path) -> Iterator[tuple[PurePosixPath, str, bytes]]:
    """Name within the folder or archive, name for messages, content; of folders the last part of their own name too."""
    if path.is_dir():
        for file in path.rglob("*"):
            if _counts(PurePosixPath(file.relative_to(path).as_posix())) and file.is_file():
                yield (
                    PurePosixPath(path.resolve().name) / file.relative_to(path).as_posix(),
                    str(file),
                    file.read_bytes(),
                )
    elif path.suffix in _KINDS and path.is_file():
        yield PurePosixPath(path.name), str(path), path.read_bytes()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if _counts(PurePosixPath(name)):
                    yield PurePosixPath(name), f"{path}:{name}", archive.read(name)
    else:
        raise DataError(
            f"{path} is no folder, zip, .csv or .jsonl file of questions",
            hint="check the path; unpack other archives (tar xf data.tar) and give the folder",
        )


def _counts(name: PurePosixPath) -> bool:
    return name.suffix in _KINDS and not any(part.startswith((".", "__MACOSX")) for part in name.parts)


def _subject(name: PurePosixPath) -> str:
    return _END.sub("", name.stem)


def _split(name: PurePosixPath) -> str:
    """What a file belongs to, by its own name or the nearest folder that says so; "" if nothing does."""
    own = _END.search(name.stem)
    if own:
        return own[1]
    return next((_SPLITS[part] for part in reversed(name.parts[:-1]) if part in _SPLITS), "")


def _category(name: PurePosixPath) -> str:
    """The folder of a file, where that lies within the folder of a split."""
    parents = name.parts[:-1]
    inside = len(parents) > 1 and parents[-1] not in _SPLITS and parents[-2] in _SPLITS
    return parents[-1].replace("_", " ") if inside else ""


def _questions(subject: str, category: str, where: str, content: bytes) -> list[Question]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text: {error}", hint="save the file as UTF-8") from None
    rows = _json_rows(where, text) if where.endswith(".jsonl") else _csv_rows(where, text)
    return [Question(subject, number, *row[:2], category, row[2]) for number, row in enumerate(rows)]


def _json_rows(where: str, text: str) -> Iterator[tuple[str, int, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{where}:{number}"
        try:
            row = json.loads(line)
            asked, label, choices = row["inputs_pretokenized"], row["label"], row.get("choices_pretokenized")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{place} is no question ({type(error).__name__}: {error}); expected inputs_pretokenized and label"
            ) from None
        if row.get("targets_pretokenized") in ([], [""], ""):
            raise DataError(
                f"{place} has no target, so its label {label} is only a placeholder",
                hint="answers of C-Eval's test are not public: measure on val",
            )
        if choices is not None and [str(choice).strip() for choice in choices] != list(LETTERS):
            raise DataError(f"{place} has the options {choices}; expected A, B, C and D")
        if not isinstance(asked, str) or isinstance(label, bool) or label not in range(len(LETTERS)):
            raise DataError(f"{place} has the label {label!r}; expected 0 to 3, and a text as inputs_pretokenized")
        yield asked, label, place


def _csv_rows(where: str, text: str) -> Iterator[tuple[str, int, str]]:
    reader = csv.reader(io.StringIO(text, newline=""))
    columns: Mapping[str, int] = {name: place for place, name in enumerate(("question", *LETTERS, "answer"))}
    wanted = tuple(columns)
    try:
        for number, row in enumerate(reader):
            place = f"{where}:{reader.line_num}"
            names = [cell.strip().lower() if len(cell.strip()) > 1 else cell.strip() for cell in row]
            if number == 0 and {"question", *LETTERS} <= set(names):
                columns = {name: names.index(name) for name in wanted if name in names}
                if "answer" not in columns:
                    raise DataError(
                        f"{where} has no column of answers",
                        hint="answers of C-Eval's test are not public: measure on val",
                    )
                continue
            if not row:
                continue
            if len(row) <= max(columns.values()):
                raise DataError(f"{place} has {len(row)} columns; expected question, A, B, C, D and answer")
            letter = row[columns["answer"]].strip()
            if letter not in LETTERS or len(letter) != 1:
                raise DataError(f"{place} has the answer {letter!r}; expected A, B, C or D")
            options = [f"{name}. {row[columns[name]].strip()}" for name in LETTERS]
            yield "\n".join((row[columns["question"]].strip(), *options)), LETTERS.index(letter), place
    except csv.Error as error:
        raise DataError(f"{where}:{reader.line_num} is not valid CSV: {error}") from None
