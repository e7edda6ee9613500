"""Tuning GLM (2021): cloze tasks learnt by choosing, seq2seq tasks, and their files. All texts are invented here."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import glmkit
from glmkit.data.cloze import ClozeExample, collate_cloze
from glmkit.data.cloze_records import read_cloze
from glmkit.data.seq2seq import TASKS, encode_seq2seq, without_filling
from glmkit.errors import DataError, UsageError
from glmkit.evaluate.cloze import classify, cloze_loss, cloze_scores
from glmkit.models.glm import GLMForConditionalGeneration, GLMForMultipleChoice
from glmkit.models.glm_config import GLMConfig
from glmkit.tokenizers.glm import GLMBertTokenizer
from glmkit.train.blocks import DataBlock, Recipe
from glmkit.train.glm_examples import (
    cloze_batch,
    cloze_examples,
    glm_head,
    right_answers,
    seq2seq_examples,
)
from glmkit.train.loop import TrainingResult
from glmkit.train.run import finetune

GOOD = ("sweet", "warm", "fresh", "bright", "kind", "quick")
BAD = ("bitter", "cold", "stale", "dull", "rude", "slow")
LINEARS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
THINGS = ("tea", "soup", "bread", "lamp", "cook", "train", "room", "song")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "was", "it", "and", "a", "yes", "no", "maybe", "great"]
WORDS += ["terrible", "good", "because", "so", "question", "answer", "content", ".", ",", "?", "!", '"', ":", "-"]
WORDS += [*GOOD, *BAD, *THINGS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GLM with random weights that knows these words."""
    folder = tmp_path_factory.mktemp("glm")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    tokenizer = GLMBertTokenizer(folder / "vocab.txt")
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_sequence_length": 64}
    sizes |= {f"{part}_dropout_prob": 0.0 for part in ("embedding", "attention", "output")}
    ids = {"sop_token_id": tokenizer.sop_token_id, "mask_token_ids": tokenizer.mask_token_ids}
    config = GLMConfig(**sizes, **ids, vocab_size=tokenizer.vocab_size + 8, output_predict=True)
    model = GLMForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> GLMBertTokenizer:
    return GLMBertTokenizer.from_pretrained(folder)


def model_of(folder: Path) -> GLMForConditionalGeneration:
    return GLMForConditionalGeneration.from_pretrained(folder)


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reviews(number: int, seed: int) -> list[dict[str, Any]]:
    """Sentences that are good or bad by one word among others, labelled as SST-2 is."""
    generator = random.Random(seed)
    rows = []
    for index in range(number):
        label = index % 2
        word = generator.choice(GOOD if label else BAD)
        one, other = generator.sample(THINGS, 2)
        rows.append({"sentence": f"the {one} and the {other} was {word}", "label": str(label)})
    return rows


def block(path: Path, **changes: Any) -> DataBlock:
    return DataBlock(train_file=str(path), **({"format": "cloze", "task": "sst2", "max_length": 32} | changes))


# --- the loss ---


@pytest.mark.parametrize(("task", "rows"), [
    ("sst2", reviews(3, 1)),
    ("copa", [
        {"premise": "the tea was cold.", "choice1": "The cook was slow.", "choice2": "It was a song.",
         "question": "cause", "label": 0},
        {"premise": "the room was warm.", "choice1": "a", "choice2": "It was a bright and fresh room.",
         "question": "effect", "label": 1},
    ]),
])  # fmt: skip
def test_the_loss_of_a_batch_is_that_of_its_examples(
    folder: Path, tokenizer: GLMBertTokenizer, tmp_path: Path, task: str, rows: list[dict[str, Any]]
) -> None:
    """Columns that only fill up are left out, and change nothing."""
    data = block(write_lines(tmp_path / "rows.jsonl", rows), task=task, max_length=40)
    model = model_of(folder).eval()
    head = glm_head(model, data)
    assert isinstance(head, GLMForMultipleChoice)
    items = cloze_examples(tokenizer, data.train_file, data)
    batch = cloze_batch(items)
    assert batch.inputs["input_ids"].shape[-1] < 40
    assert batch.label_tokens == len(rows)
    assert batch.where == [f"{data.train_file}:{number}" for number in range(1, len(rows) + 1)]
    with torch.no_grad():
        loss, number = head.label_loss(**batch.inputs)
        whole = collate_cloze([item.sample for item in items])
        scores = cloze_scores(model, whole)
        right = right_answers(head, batch.inputs)
    assert number == len(rows)
    torch.testing.assert_close(loss, cloze_loss(scores, whole["labels"]) * len(rows), atol=1e-5, rtol=1e-6)
    assert right == int((scores.argmax(dim=1) == whole["labels"]).sum())


def test_the_head_shares_the_network_and_learns_all_of_it(folder: Path, tokenizer: GLMBertTokenizer) -> None:
    model = model_of(folder)
    head = GLMForMultipleChoice.around(model)
    assert head.glm is model.glm
    assert {name for name, _ in head.named_parameters()} == {name for name, _ in model.named_parameters()}
    assert all(not parameter.is_meta for parameter in head.parameters())


# --- files ---


def test_files_of_tasks(tmp_path: Path) -> None:
    rows = {
        "rte": {"premise": "the tea was \u201cwarm\u201d", "hypothesis": "it was", "label": "not_entailment", "idx": 1},
        "boolq": {"passage": "p", "question": "q", "label": True},
        "wic": {"sentence1": "a", "sentence2": "b", "word": "w", "label": False},
        "copa": {"premise": "a", "choice1": "b", "choice2": "c", "question": "effect", "label": 1},
        "tnews": {"sentence": "a", "keywords": "b", "label": "104", "label_desc": "x"},
        "afqmc": {"sentence1": "a", "sentence2": "b", "label": "1"},
        "cluewsc": {"text": "abc", "label": "true", "target": {"span1_text": "a", "span1_index": 0, "span2_text": "b",
                                                              "span2_index": 1}},
        "race": {"text_a": "a", "text_b": "b", "choices": ["c", "d"], "label": "B"},
    }  # fmt: skip
    labels = {"rte": "not_entailment", "boolq": "true", "wic": "false", "copa": 1, "tnews": "104", "afqmc": "1",
              "cluewsc": "true", "race": "B"}  # fmt: skip
    for task, row in rows.items():
        (found,) = read_cloze(write_lines(tmp_path / "rows.jsonl", [row]), task)
        assert found.label == labels[task], task
        assert found.uid == f"{tmp_path / 'rows.jsonl'}:1"
    (found,) = read_cloze(write_lines(tmp_path / "rows.jsonl", [rows["rte"]]), "rte")
    assert (found.text_a, found.text_b) == ('the tea was "warm"', "it was")
    (found,) = read_cloze(write_lines(tmp_path / "rows.jsonl", [rows["cluewsc"]]), "cluewsc")
    assert (found.meta["span1_length"], found.meta["span2_index"]) == (1, 1)
    passage = {
        "text": "t",
        "questions": [{"question": "q", "answers": [{"text": "x", "label": 1}, {"text": "y", "label": 0}]}],
    }
    found_all = read_cloze(write_lines(tmp_path / "rows.jsonl", [{"passage": passage}]), "multirc")
    assert [(one.text_a, one.text_b, one.meta["answer"], one.label) for one in found_all] == [
        ("t", "q", "x", 1), ("t", "q", "y", 0)]  # fmt: skip


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    rows = [
        {"sentence": "a", "label": "1"},
        {"sentence": "a", "label": "7"},
        {"text": "a", "label": "1"},
        {"sentence": "b"},
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"3 rows of .* cannot be used for the task sst2") as caught:
        read_cloze(path, "sst2")
    said = str(caught.value)
    assert "rows.jsonl:2: the label is '7'; expected one of '0', '1'" in said
    assert "rows.jsonl:3: no text in the field 'sentence'; the row has 'text', 'label'" in said
    assert "rows.jsonl:4: the label is missing" in said
    with pytest.raises(UsageError, match="cannot be learnt by choosing: an example may have several right answers"):
        read_cloze(path, "record")


def test_settings_of_tasks_are_checked_with_the_recipe(tmp_path: Path) -> None:
    for changes, said in (
        ({"task": "sst3"}, "data.task is 'sst3'; tasks of the format cloze are rte"),
        ({"task": "rte", "pattern_id": 5}, "rte has the patterns 0 to 4"),
        ({"format": "seq2seq", "task": "rte"}, "tasks of the format seq2seq are cnn_dm"),
        ({"format": "adgen"}, "is for the formats cloze and seq2seq"),
    ):
        with pytest.raises(ValueError, match=said):
            block(tmp_path, **changes)


# --- learning ---


def tune(folder: Path, out: Path, data: dict[str, Any], method: dict[str, Any], **train_block: Any) -> TrainingResult:
    block = {"per_device_train_batch_size": 8, "save_steps": 0, "logging_steps": 20, "learning_rate": 3e-3}
    content = {"model": {"path": str(folder)}, "data": data, "method": method, "output": {"dir": str(out)}}
    content["train"] = block | train_block
    return finetune(Recipe.model_validate(content), progress=False)


def share_right(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    given = [ClozeExample(row["sentence"], label=row["label"]) for row in rows]
    found = classify(model, tokenizer, "sst2", given, max_seq_length=32)
    return sum(int(row["label"]) == index for row, index in zip(rows, found)) / len(rows)


METHODS = {
    "full": ({"name": "full"}, {"max_steps": 90}),
    "lora": (
        {"name": "lora", "lora_rank": 16, "lora_dropout": 0, "target_modules": LINEARS},
        {"max_steps": 150, "learning_rate": 2e-2, "lr_scheduler_type": "cosine"},
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_cloze_task_is_learnt_from_chance(folder: Path, tokenizer: Any, tmp_path: Path, method: str) -> None:
    """And what was learnt is there when the result is loaded as any GLM."""
    held_out = reviews(80, 2)
    data = {
        "train_file": str(write_lines(tmp_path / "train.jsonl", reviews(240, 1))),
        "eval_file": str(write_lines(tmp_path / "dev.jsonl", held_out)),
        "format": "cloze",
        "task": "sst2",
        "max_length": 32,
    }
    assert 0.3 < share_right(model_of(folder), tokenizer, held_out) < 0.7
    settings, steps = METHODS[method]
    kept = {"eval_steps": 50, "metric_for_best_model": "accuracy", "load_best_model_at_end": True}
    result = tune(folder, tmp_path / "run", data, settings, **steps, **kept)
    assert result.result_dir is not None
    loaded = glmkit.load(folder, adapter=result.result_dir) if method == "lora" else glmkit.load(result.result_dir)
    share = share_right(loaded.model, loaded.tokenizer, held_out)
    assert share > 0.9
    assert max(line["accuracy"] for line in result.metrics if "accuracy" in line) == pytest.approx(100 * share)


def test_answers_of_any_length_are_learnt(folder: Path, tmp_path: Path) -> None:
    """The right answer of two is the one with a good word in it; a row for each."""
    generator = random.Random(3)
    rows = []
    for index in range(96):
        answers = [f"it was {generator.choice(GOOD)} and {generator.choice(GOOD)}", f"a {generator.choice(BAD)}"]
        label = index % 2
        first, second = answers[label], answers[1 - label]
        rows.append({"premise": f"the {generator.choice(THINGS)} was", "choice1": first, "choice2": second,
                     "question": "effect", "label": label})  # fmt: skip
    files = {"train_file": str(write_lines(tmp_path / "train.jsonl", rows[:72]))}
    files["eval_file"] = str(write_lines(tmp_path / "dev.jsonl", rows[72:]))
    data = {**files, "format": "cloze", "task": "copa", "max_length": 48}
    result = tune(folder, tmp_path / "run", data, {"name": "full"}, max_steps=40)
    assert result.metrics[-1]["accuracy"] > 90


@pytest.mark.parametrize("preset", ["whole", "paper"])
def test_a_seq2seq_task_is_learnt_and_written(folder: Path, tmp_path: Path, preset: str) -> None:
    """Parallel files as the published ones; the blank behind the source is filled by what was learnt."""
    pairs = [(f"the {thing} was {word}", f"{word} {thing}") for thing, word in zip(THINGS, (*GOOD, *BAD))]
    for number, name in enumerate(("source", "target")):
        (tmp_path / f"train.{name}").write_text("".join(f"{pair[number]}\n" for pair in pairs))
    data = {"train_file": str(tmp_path / "train.source"), "format": "seq2seq", "task": "customization",
            "max_source_length": 12, "max_target_length": 6, "preset": preset}  # fmt: skip
    result = tune(
        folder, tmp_path / "run", data, {"name": "full"}, max_steps=80, learning_rate=1e-2, lr_scheduler_type="cosine"
    )
    assert result.loss < 0.05
    assert result.result_dir is not None
    model, tokenizer = glmkit.load(result.result_dir)
    task = replace(TASKS["customization"], source_tokens=12, target_tokens=6)
    for source, target in pairs:
        prompt = encode_seq2seq(tokenizer, task, source)
        prompt = prompt if preset == "paper" else without_filling(prompt)
        ids = written(model, prompt, tokenizer.eop_token_id)
        assert tokenizer.decode_ids(ids).split() == target.split()


def written(model: Any, prompt: Any, end: int) -> list[int]:
    """Likeliest tokens behind a prompt, each read again from the beginning."""
    ids, positions = prompt.input_ids[None], prompt.position_ids[None]
    found: list[int] = []
    while len(found) < 6:
        with torch.no_grad():
            token = int(model(ids, positions, torch.tensor([prompt.sep])).logits[0, -1].argmax())
        if token == end:
            break
        found.append(token)
        following = positions[:, :, -1:] + torch.tensor([0, 1])[None, :, None]
        ids, positions = torch.cat((ids, torch.tensor([[token]])), 1), torch.cat((positions, following), 2)
    return found


def test_records_of_a_seq2seq_task(tokenizer: GLMBertTokenizer, tmp_path: Path) -> None:
    rows = [
        {"source": "the tea was warm", "target": "warm tea"},
        {"content": "the soup was cold", "summary": "cold soup"},
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    data = block(path, format="seq2seq", task="customization", max_source_length=9, max_target_length=4)
    whole, paper = (
        seq2seq_examples(tokenizer, str(path), data.model_copy(update={"preset": preset}), context=64)
        for preset in ("whole", "paper")
    )
    assert whole.lengths.tolist() == [4 + 3 + 3] * 2  # [CLS] source blank end, sop and all of the target but its end
    assert paper.lengths.tolist() == [9 + 3] * 2
    assert whole[0].labels.tolist()[-3:] == [*tokenizer.encode_with_masks(" warm tea"), tokenizer.eop_token_id]
    with pytest.raises(UsageError, match="9 tokens of a source and 4 of a target are more than the 12"):
        seq2seq_examples(tokenizer, str(path), data, context=12)
    for file, lines in (("b.source", "\ufeffsmall cup\r\nsmall\u2028cup\r\n"), ("b.target", "warm tea\nwarm\rtea\n")):
        (tmp_path / file).write_bytes(lines.encode())
    windows = seq2seq_examples(tokenizer, str(tmp_path / "b.source"), data)
    (tmp_path / "c.source").write_text("small cup\nsmall cup\n")
    (tmp_path / "c.target").write_text("warm tea\nwarm tea\n")
    assert len(windows) == 2
    assert (
        windows[0].input_ids.tolist()
        == seq2seq_examples(tokenizer, str(tmp_path / "c.source"), data)[0].input_ids.tolist()
    )
    (tmp_path / "c.target").write_bytes(b"\xff\n\xff\n")
    with pytest.raises(DataError, match=r"c\.target is not UTF-8"):
        seq2seq_examples(tokenizer, str(tmp_path / "c.source"), data)
    (tmp_path / "a.source").write_text("one\ntwo\n")
    (tmp_path / "a.target").write_text("one\n")
    with pytest.raises(DataError, match=r"has 2 lines and .*a\.target 1; expected a line for a line"):
        seq2seq_examples(tokenizer, str(tmp_path / "a.source"), data)
    write_lines(path, [{"source": "x"}, {"target": "y"}, {"source": "x", "target": " "}])
    with pytest.raises(DataError, match="3 of 3 rows") as caught:
        seq2seq_examples(tokenizer, str(path), data)
    assert "rows.jsonl:1: no text in the field 'target' or 'summary'; the row has source" in str(caught.value)


def test_a_chat_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.format=cloze is for GLM, this model is Linear"):
        glm_head(torch.nn.Linear(1, 1), block(tmp_path))
