"""Token ids on disk: found again by what they were made of, whole or made anew, and shown as the model sees them."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glmkit.chat.messages import Message
from glmkit.cli import run
from glmkit.data import prepared
from glmkit.data.cutting import Limits
from glmkit.data.examples import Example, Examples, make_example, make_examples
from glmkit.data.lengths import TruncationReport, histogram
from glmkit.data.prepared import Reading, StoredExamples, cache_folder, examples_of, prepare, tokenizer_identity
from glmkit.data.preview import preview
from glmkit.data.records import Record, read_records
from glmkit.data.tokenising import tokenise
from glmkit.errors import DataError, MissingDependencyError, OutputError
from glmkit.tokenizers.chatglm import ChatGLM1Tokenizer
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer
from glmkit.train.arguments import load_recipe
from glmkit.train.data_files import prepare_data, preview_data
from glmkit.train.run import finetune
from tiny import train_tokenizer, write_model
from tiny_families import glm4_tokenizer, glm_tokenizer, train_ice_text

pytest.importorskip("datasets")
LIMITS = Limits(30, 10, 200)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def tokenizer(file: Path) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(file, generation=2)


def write(path: Path, number: int = 12) -> Path:
    rows = [
        {"content": f"tea {index} " * (index % 5 + 1), "summary": "rice " * (index % 4 + 1)} for index in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def reading(tmp_path: Path) -> Reading:
    return Reading(str(write(tmp_path / "data.jsonl")), limits=LIMITS)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Files that were really read."""
    found: list[str] = []

    def count(self: Reading) -> list[Record]:
        found.append(self.file)
        return read_records(self.file, limit=self.max_records)

    monkeypatch.setattr(Reading, "records", count)
    return found


def same(one: Examples, other: Examples) -> bool:
    assert one.lengths.tolist() == other.lengths.tolist()
    assert one.label_tokens.tolist() == other.label_tokens.tolist()
    for first, second in zip(one, other):
        assert torch.equal(first.input_ids, second.input_ids)
        assert torch.equal(first.labels, second.labels)
        assert (first.where, first.sep, first.label_tokens) == (second.where, second.sep, second.label_tokens)
        assert (first.position_ids is None) == (second.position_ids is None)
        assert first.position_ids is None or torch.equal(first.position_ids, second.position_ids)
    return one.fingerprint() == other.fingerprint() and len(one) == len(other)


# --- the cache


def test_a_second_start_reads_nothing_and_gives_the_same(
    reading: Reading, tokenizer: ChatGLMTokenizer, tmp_path: Path, counted: list[str]
) -> None:
    first, report = examples_of(reading, tokenizer, cache_dir=tmp_path / "cache")
    again, same_report = examples_of(reading, tokenizer, cache_dir=tmp_path / "cache")
    made, made_report = make_examples(tokenizer, read_records(reading.file), LIMITS)
    assert counted == [reading.file]
    assert isinstance(again, StoredExamples)
    assert report == same_report == made_report
    assert same(first, made)
    assert same(again, made)
    assert [one.where for one in again[2:4]] == [one.where for one in made[2:4]]
    assert again[-1].where == made[-1].where
    with pytest.raises(IndexError):
        again[12]


def test_the_rows_of_every_family_come_back(tmp_path: Path) -> None:
    records = [
        Record(
            (Message("user", f"i like tea {number}"), Message("assistant", "and rice")), (False, True), f"x:{number}"
        )
        for number in range(3)
    ]
    for number, tokenizer in enumerate(
        (
            ChatGLM1Tokenizer(train_ice_text(tmp_path / "ice")),
            glm_tokenizer(tmp_path / "glm"),
            glm4_tokenizer(tmp_path / "t"),
        )
    ):
        made, report = make_examples(tokenizer, records)
        prepared.store(tmp_path / str(number), made, report, {}, shards=2)
        assert same(StoredExamples(tmp_path / str(number)), made)


@pytest.mark.parametrize(
    "change",
    [
        {"limits": Limits(30, 9, 200)},
        {"loss_on": "all"},
        {"preset": "paper"},
        {"max_records": 3},
        {"skip_overlength": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_that_decides_the_ids_is_in_the_key(
    change: dict[str, Any], reading: Reading, tokenizer: ChatGLMTokenizer, tmp_path: Path, counted: list[str]
) -> None:
    examples_of(reading, tokenizer, cache_dir=tmp_path / "cache")
    examples, _ = examples_of(replace(reading, **change), tokenizer, cache_dir=tmp_path / "cache")
    assert len(counted) == 2
    assert "max_records" not in change or len(examples) == 3


def test_another_tokenizer_or_a_changed_file_is_another_key(
    reading: Reading, tokenizer: ChatGLMTokenizer, file: Path, tmp_path: Path, counted: list[str]
) -> None:
    examples, _ = examples_of(reading, tokenizer, cache_dir=tmp_path / "cache")
    other, _ = examples_of(reading, ChatGLMTokenizer(file, generation=3), cache_dir=tmp_path / "cache")
    assert other.fingerprint() != examples.fingerprint()
    content = Path(reading.file).read_bytes()
    before = os.stat(reading.file)
    Path(reading.file).write_bytes(content.replace(b"tea 3", b"tea 4"))
    os.utime(reading.file, ns=(before.st_atime_ns, before.st_mtime_ns))  # neither size nor time says it
    changed, _ = examples_of(reading, tokenizer, cache_dir=tmp_path / "cache")
    assert changed.fingerprint() != examples.fingerprint()
    Path(reading.file).write_bytes(content)
    assert examples_of(reading, tokenizer, cache_dir=tmp_path / "cache")[0].fingerprint() == examples.fingerprint()
    assert len(counted) == 3


def _entry(cache: Path) -> Path:
    return next(path for path in cache.iterdir() if path.is_dir())


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "flipped bit": lambda entry: _flip(next(entry.glob("*.arrow"))),
    "shorter file": lambda entry: _truncate(next(entry.glob("*.arrow"))),
    "no file": lambda entry: next(entry.glob("*.arrow")).unlink(),
    "no manifest": lambda entry: (entry / "glmkit.json").unlink(),
    "manifest cut": lambda entry: _truncate(entry / "glmkit.json"),
    "foreign manifest": lambda entry: (entry / "glmkit.json").write_text('{"files": {}, "version": 1}'),
    "a list": lambda entry: (entry / "glmkit.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(
    damage: str, reading: Reading, tokenizer: ChatGLMTokenizer, tmp_path: Path, counted: list[str]
) -> None:
    first, _ = examples_of(reading, tokenizer, cache_dir=tmp_path / "cache")
    expected = first.fingerprint()
    DAMAGES[damage](_entry(tmp_path / "cache"))
    again, report = examples_of(reading, tokenizer, cache_dir=tmp_path / "cache")
    assert (again.fingerprint(), report.records, len(counted)) == (expected, 12, 2)
    examples_of(reading, tokenizer, cache_dir=tmp_path / "cache")
    assert len(counted) == 2
    assert [path.name for path in (tmp_path / "cache").iterdir() if ".tmp" in path.name or ".old" in path.name] == []


def _ask(reading: Reading, file: Path, cache: Path, answers: Any) -> None:
    made = []
    read = Reading.records
    Reading.records = lambda self: made.append(1) or read(self)  # type: ignore[method-assign]
    examples, _ = examples_of(reading, ChatGLMTokenizer(file, generation=2), cache_dir=cache)
    answers.put((examples.fingerprint(), len(made)))


def test_two_processes_at_once_make_it_once(reading: Reading, file: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_ask, args=(reading, file, tmp_path / "cache", answers)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert len({one for one, _ in found}) == 1
    assert sum(made for _, made in found) == 1


def test_a_cache_that_cannot_be_written_is_told_and_not_needed(
    reading: Reading, tokenizer: ChatGLMTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file")
    told: list[str] = []
    examples, _ = examples_of(reading, tokenizer, cache_dir=tmp_path / "taken" / "cache", say=told.append)
    assert len(examples) == 12
    assert len(told) == 1
    assert "not kept for the next start" in told[0]
    monkeypatch.setattr(prepared, "find_spec", lambda name: None)
    told.clear()
    examples, _ = examples_of(reading, tokenizer, cache_dir=tmp_path / "cache", say=told.append)
    assert (len(examples), told) == (
        12,
        ["token ids are not kept for the next start: the package datasets is not installed"],
    )
    with pytest.raises(MissingDependencyError):
        prepare(reading, tokenizer, tmp_path / "out")


def test_old_entries_make_room(
    reading: Reading, tokenizer: ChatGLMTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "_KEPT", 2)
    cache = tmp_path / "cache"
    for number in (3, 4, 5):
        examples_of(replace(reading, max_records=number), tokenizer, cache_dir=cache)
        for age, entry in enumerate(sorted(path for path in cache.iterdir() if path.is_dir())):
            os.utime(entry, (1000 + age, 1000 + age))
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


def test_the_cache_lies_where_the_user_has_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "glmkit" / "examples"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "glmkit" / "examples"


def test_rows_stay_on_disk(tokenizer: ChatGLMTokenizer, tmp_path: Path) -> None:
    """The columns of stored examples are views of the mapped files, not copies."""
    made = Examples(
        Example(torch.arange(500, dtype=torch.int32) + number, torch.arange(500, dtype=torch.int32), 499, f"x:{number}")
        for number in range(400)
    )
    prepared.store(tmp_path / "out", made, TruncationReport(400), {}, shards=3)
    import pyarrow as pa

    before = pa.total_allocated_bytes()
    stored = StoredExamples(tmp_path / "out")
    assert pa.total_allocated_bytes() - before < 100_000  # of 1.6 MB
    assert stored[399].input_ids.tolist() == list(range(399, 899))
    assert not any(values.flags.writeable or values.flags.owndata for _, values in stored._ids._pieces)
    assert sorted(stored.lengths.tolist()) == [500] * 400
    row = stored[7].input_ids
    row[0] = -5  # a copy: what a caller does to it stays with the caller
    assert stored[7].input_ids[0] == 7


def test_several_processes_make_the_same(tokenizer: ChatGLMTokenizer, tmp_path: Path) -> None:
    records = read_records(write(tmp_path / "data.jsonl", 450))
    alone, report = make_examples(tokenizer, records, LIMITS)
    seen: list[int] = []
    shared, shared_report = tokenise(
        tokenizer, records, LIMITS, processes=2, progress=lambda done, total: seen.append(done + total)
    )
    assert same(shared, alone)
    assert shared_report == report
    assert seen[-1] == 900
    broken = [*records[:400], replace(records[400], loss=(False, False))]
    with pytest.raises(DataError, match="1 of 401 records cannot be learnt"):
        tokenise(tokenizer, broken, LIMITS, processes=2)


# --- prepared on purpose


def test_a_prepared_folder_is_what_datasets_reads(
    reading: Reading, tokenizer: ChatGLMTokenizer, tmp_path: Path
) -> None:
    import datasets

    report = prepare(reading, tokenizer, tmp_path / "out", shards=4)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    shards = {f"data-0000{number}-of-00004.arrow" for number in range(4)}
    assert names == {*shards, "dataset_info.json", "state.json", "glmkit.json"}
    read = datasets.load_from_disk(str(tmp_path / "out"))
    made, made_report = make_examples(tokenizer, read_records(reading.file), LIMITS)
    assert read["input_ids"][:] == [one.input_ids.tolist() for one in made]
    assert read["labels"][:] == [one.labels.tolist() for one in made]
    assert read["where"][:] == [one.where for one in made]
    assert read.features["input_ids"].feature.dtype == "int32"
    assert report == made_report
    examples, again = examples_of(replace(reading, file=str(tmp_path / "out")), tokenizer)
    assert same(examples, made)
    assert again == report
    told: list[str] = []
    other = replace(reading, file=str(tmp_path / "out"), max_records=5, loss_on="all", limits=Limits(total_tokens=9))
    assert same(examples_of(other, tokenizer, say=told.append)[0], Examples(made[:5]))
    (sentence,) = told
    assert "was made with data.max_" in sentence
    assert f"data.max_length={LIMITS.total_tokens} (now 9), data.loss_on=answers (now all); it stays" in sentence
    examples_of(replace(reading, file=str(tmp_path / "out")), tokenizer, say=told.append)
    assert told == [sentence]
    with pytest.raises(OutputError, match="exists and is not empty"):
        prepare(reading, tokenizer, tmp_path / "out")


def test_a_prepared_folder_that_does_not_fit_is_refused(
    reading: Reading, tokenizer: ChatGLMTokenizer, file: Path, tmp_path: Path
) -> None:
    prepare(reading, tokenizer, tmp_path / "out")
    folder = replace(reading, file=str(tmp_path / "out"))
    with pytest.raises(DataError, match="made for another tokenizer"):
        examples_of(folder, ChatGLMTokenizer(file, generation=3))
    _flip(next((tmp_path / "out").glob("*.arrow")))
    with pytest.raises(DataError, match="is damaged"):
        examples_of(folder, tokenizer)
    with pytest.raises(DataError, match=r"without glmkit\.json") as caught:
        examples_of(replace(reading, file=str(tmp_path)), tokenizer)
    assert "glm data prepare" in str(caught.value.hint)


def test_a_tokenizer_is_known_by_its_files_and_what_it_makes(
    tokenizer: ChatGLMTokenizer, file: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved.model"
    moved.write_bytes(file.read_bytes())
    same_one = ChatGLMTokenizer(moved, generation=2, padding_side="right")
    assert tokenizer_identity(tokenizer) == tokenizer_identity(same_one)
    assert tokenizer_identity(tokenizer) != tokenizer_identity(ChatGLMTokenizer(file, generation=3))
    other = ChatGLM1Tokenizer(train_ice_text(tmp_path / "ice_text.model"))
    assert len({tokenizer_identity(one) for one in (tokenizer, other, glm_tokenizer(tmp_path / "glm"))}) == 3


# --- what the model sees


def test_the_preview_marks_what_is_learnt_and_where_it_is_cut(tokenizer: ChatGLMTokenizer) -> None:
    said = [Message("user", "tea"), Message("assistant", "rice"), Message("user", "I like tea and rice " * 9)]
    record = Record((*said, Message("assistant", "hello world")), (False, True, False, True), "x:1")
    limits = Limits(source_tokens=40)
    examples, report = make_examples(tokenizer, [record], limits)
    page = preview(tokenizer, examples, report, 3, records=[record], limits=limits)
    shown = page.split("\n\nall records")[0]
    _, cuts = make_example(tokenizer, record, limits)
    kept = ("I like tea and rice " * 9)[: -cuts.characters]
    assert (
        shown.splitlines()[0]
        == f"── x:1: {len(examples[0].input_ids)} tokens, {examples[0].label_tokens} learnt, ✂ 1 oldest rounds ──"
    )
    assert f"[gMASK]sop[Round 1]\n\n问：{kept}✂ {cuts.characters} characters \n\n答：[[hello world</s>]]" in shown
    assert "1 (100.0%) lost their oldest rounds" in page
    coloured = preview(
        tokenizer, examples, report, 1, records=[record], limits=limits, paint=lambda text, code: f"<{code}:{text}>"
    )
    assert "<32:hello world>" in coloured
    assert "<36;4:</s>>" in coloured
    assert "<36:[gMASK]>" in coloured
    assert f"<1;31:✂ {cuts.characters} characters >" in coloured
    assert "[[" not in coloured


def test_the_preview_shows_what_glm_is_to_write(tmp_path: Path) -> None:
    tokenizer = glm_tokenizer(tmp_path)
    record = Record((Message("user", "i like tea"), Message("assistant", "and rice")), (False, True), "x:1")
    examples, report = make_examples(tokenizer, [record])
    page = preview(tokenizer, examples, report, 1, records=[record])
    assert "<|startofpiece|>[[and rice<|endofpiece|>]]" in page.replace(" [[", "[[").replace("[[ ", "[[")


def test_the_histogram_counts_every_record() -> None:
    lengths = np.array([5] * 7 + [9, 10, 10, 24])
    lines = histogram(lengths, bars=4).splitlines()
    assert [int(line.split()[-1]) for line in lines] == [8, 2, 0, 1]
    assert lines[0].count("█") == 40
    assert [line.count("█") for line in lines[1:]] == [10, 0, 5]


# --- with recipes


@pytest.fixture(scope="module")
def model(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m", file, generation=2)


def recipe(model: Path, data: Path, *changes: str) -> Any:
    given = [f"model.path={model}", f"data.train_file={data}", f"output.dir={data.parent / 'run'}"]
    return load_recipe(None, [*given, "train.max_steps=2", "model.device=cpu", *changes])


def test_a_recipe_trains_from_a_prepared_folder_as_from_its_file(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl")
    prepare_data(recipe(model, data), tmp_path / "ids", shards=2, progress=False)
    first = finetune(recipe(model, data, f"output.dir={tmp_path / 'a'}"), progress=False)
    second = finetune(recipe(model, tmp_path / "ids", f"output.dir={tmp_path / 'b'}"), progress=False)
    assert first.loss == second.loss


def test_packing_and_mixing_are_asked_for_in_a_recipe(model: Path, tmp_path: Path) -> None:
    data, general = write(tmp_path / "data.jsonl"), write(tmp_path / "general.jsonl", 6)
    packed = recipe(
        model, data, "data.packing=true", "data.max_length=64", f"data.mix_file={general}", "data.mix_ratio=0.5"
    )
    result = finetune(packed, progress=False)
    plain = finetune(recipe(model, data, f"output.dir={tmp_path / 'plain'}"), progress=False)
    assert result.steps == plain.steps == 2
    assert result.loss != plain.loss
    told = (tmp_path / "run" / "report.md").read_text()
    assert "of the columns hold a token" in told
    assert f"{general}: 6 records" in told


def test_the_preview_needs_no_weights(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmkit.train.run.load_model", None)
    data = write(tmp_path / "data.jsonl")
    page = preview_data(recipe(model, data, "data.max_source_length=32"), 5)
    assert page.count("── ") == 5
    assert page.count("</s>]]") == 5
    assert "✂" in page
    assert not (tmp_path / "run").exists()


def test_the_verbs_prepare_and_show(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data.jsonl")
    asked = ["data", "prepare", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "ids")]
    assert run([*asked, "--skip-overlength", "--shards", "3", "data.max_source_length=32"]) == 0
    assert "are too long and left out" in capsys.readouterr().out
    assert len(list((tmp_path / "ids").glob("data-*-of-00003.arrow"))) == 3
    settings = [f"model.path={model}", f"data.train_file={tmp_path / 'ids'}", f"output.dir={tmp_path / 'run'}"]
    assert run(["finetune", *settings, "--preview", "1"]) == 0
    shown = capsys.readouterr().out
    assert "[gMASK]sop[Round 1]" in shown
    assert "</s>]]" in shown
    assert "\x1b[" not in shown
    assert "are too long and left out" in shown
    assert run(["data", "prepare", "--model", str(model), "--data", str(data)]) == 2
    assert "--output is missing" in capsys.readouterr().err
