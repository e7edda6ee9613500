"""Data files become records, records become ids and labels: what is trained is what is asked later, to the token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from glmkit.chat.messages import Message
from glmkit.chat.templates import answer_ids, conversation_ids, prompt_ids
from glmkit.chat.tools import parse_tool_call
from glmkit.data.examples import (
    IGNORED,
    Example,
    Limits,
    collate,
    fingerprint,
    make_example,
    make_examples,
    plan_epoch,
)
from glmkit.data.records import Record, read_records
from glmkit.errors import DataError
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer
from tiny import train_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ChatGLMTokenizer]:
    file = train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    return {generation: ChatGLMTokenizer(file, generation=generation) for generation in (2, 3)}


@pytest.fixture(params=[2, 3])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[int, ChatGLMTokenizer]) -> ChatGLMTokenizer:
    return tokenizers[request.param]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def pair(content: str = "上衣 材质 棉", summary: str = "今天天气很好。") -> Record:
    return Record((Message("user", content), Message("assistant", summary)), (False, True), "here:1")


def targets(example: Example) -> list[int]:
    return [label for label in example.labels.tolist() if label != IGNORED]


# --- files


def test_lines_arrays_and_columns_give_the_same_records(tmp_path: Path) -> None:
    rows = [{"content": "a\u2028b", "summary": "c"}, {"content": "d", "summary": "e"}]
    lines = tmp_path / "lines.json"
    lines.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    array = write(tmp_path / "array.jsonl", json.dumps(rows, indent=1))
    other = write(tmp_path / "other.json", *({"q": row["content"], "a": row["summary"], "n": 1} for row in rows))
    read = [
        read_records(lines),
        read_records(array),
        read_records(other, prompt_column="q", response_column="a"),
    ]
    assert [[record.messages for record in records] for records in read] == [
        [(Message("user", row["content"]), Message("assistant", row["summary"])) for row in rows]
    ] * 3
    assert [record.where for record in read[0]] == [f"{lines}:1", f"{lines}:3"]
    assert [record.where for record in read[1]] == [f"{array} item 1", f"{array} item 2"]
    assert len(read_records(lines, limit=1)) == 1
    assert (read[0][0].prompt, read[0][0].answer) == ((Message("user", "a\u2028b"),), "c")


def test_all_bad_rows_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    good = {"content": "a", "summary": "b"}
    bad = ['{"content": ', {"content": "a"}, {"content": "a", "summary": 7}, "[1]", {"conversations": []}]
    bad += [{"conversations": [{"role": "robot", "content": "x"}]}] * 3
    path = write(tmp_path / "data.jsonl", good, *bad, good)
    with pytest.raises(DataError) as caught:
        read_records(path)
    text = str(caught.value)
    assert "8 of 10 rows" in text
    assert f"{path}:2: not valid JSON" in text
    assert f"{path}:3: no field 'summary'; the row has 'content'" in text
    assert f"{path}:4: field 'summary' must be text, this is int" in text
    assert f"{path}:5: a row must be a JSON object, this is list" in text
    assert f"{path}:7" not in text
    assert "only a training recipe can name other fields" in text  # this reader serves `glm evaluate` too


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"", "no records"), (b"\xff\xfe", "not UTF-8"), (b"[1,", ":1: not valid JSON"), (b"[" * 100_000, "JSON")],
)
def test_files_that_are_no_data_are_refused(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(DataError, match=found):
        read_records(tmp_path / "data.json")
    with pytest.raises(DataError, match="there is no data file"):
        read_records(tmp_path / "missing.json")


def test_conversations_with_tools_become_calls_and_observations(tmp_path: Path) -> None:
    tools = [{"name": "add", "parameters": {}}]
    row = {
        "tools": tools,
        "conversations": [
            {"role": "user", "content": "1 + 2"},
            {"role": "assistant", "content": "I add.", "loss": False},
            {"role": "tool", "name": "add", "parameters": {"a": 1, "b": "it's", "c": True}, "observation": {"sum": 3}},
            {"role": "assistant", "content": "3"},
        ],
    }
    record = read_records(write(tmp_path / "data.jsonl", row))[0]
    call = '```python\ntool_call(a=1, b="it\'s", c=True)\n```'
    assert record.messages == (
        Message("system", "", "", tools),
        Message("user", "1 + 2"),
        Message("assistant", "I add."),
        Message("assistant", call, "add"),
        Message("observation", '{"sum": 3}'),
        Message("assistant", "3"),
    )
    assert parse_tool_call(call) == {"a": 1, "b": "it's", "c": True}
    assert record.loss == (False, False, False, True, False, True)


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ([{"role": "user", "content": "a"}], "last message must be the assistant's"),
        ([{"role": "user"}, {"role": "assistant", "content": "b"}], "message 1 .user. must have text"),
        ([{"role": "tool", "name": "x"}], "message 1 .tool. needs"),
        ([{"role": "assistant", "content": "b", "loss": 1}], "'loss' must be true or false"),
        ([{"role": "user", "content": "a", "tools": []}, {"role": "assistant", "content": "b"}], "has tools"),
    ],
)
def test_conversations_that_cannot_be_learnt_are_refused(tmp_path: Path, turns: Any, found: str) -> None:
    with pytest.raises(DataError, match=found):
        read_records(write(tmp_path / "data.jsonl", {"conversations": turns}))


# --- ids and labels


def test_training_ids_are_the_prompt_and_the_answer_of_inference(tokenizer: ChatGLMTokenizer) -> None:
    record = pair()
    example, cut_prompt, cut_answer = make_example(tokenizer, record)
    prompt, answer = prompt_ids(tokenizer, record.prompt), answer_ids(tokenizer, record.messages[-1])
    assert example.input_ids.tolist() == prompt + answer
    assert example.labels.tolist() == [IGNORED] * len(prompt) + answer
    assert answer[-1] == tokenizer.eos_token_id
    assert example.label_tokens == len(answer)
    assert (cut_prompt, cut_answer) == (False, False)


def test_a_long_question_is_shortened_inside_its_text_only(tokenizer: ChatGLMTokenizer) -> None:
    record = pair(content="上衣 材质 棉 显瘦 " * 20)
    empty = len(prompt_ids(tokenizer, [Message("user", "")]))
    example, cut_prompt, cut_answer = make_example(tokenizer, record, Limits(source_tokens=empty + 9))
    answer = answer_ids(tokenizer, record.messages[-1])
    prompt = example.input_ids.tolist()[: -len(answer)]
    assert (cut_prompt, cut_answer) == (True, False)
    assert empty + 5 <= len(prompt) <= empty + 9
    assert targets(example) == answer
    kept = [
        length
        for length in range(200)
        if prompt_ids(tokenizer, [Message("user", record.prompt[0].content[:length])]) == prompt
    ]
    assert kept
    with pytest.raises(DataError, match=r"here:1: the prompt needs \d+ tokens without any text"):
        make_example(tokenizer, record, Limits(source_tokens=empty - 1))


def test_a_cut_answer_has_no_end_and_a_fitting_one_keeps_it(tokenizer: ChatGLMTokenizer) -> None:
    record = pair()
    answer = answer_ids(tokenizer, record.messages[-1])
    fitting, _, cut = make_example(tokenizer, record, Limits(target_tokens=len(answer) - 1))
    assert (targets(fitting), cut) == (answer, False)
    shorter, _, cut = make_example(tokenizer, record, Limits(target_tokens=len(answer) - 2))
    assert (targets(shorter), cut) == (answer[:-2], True)
    length = len(fitting.input_ids)
    whole, _, cut = make_example(tokenizer, record, Limits(total_tokens=length - 1, target_tokens=len(answer) - 1))
    assert (len(whole.input_ids), cut) == (length - 1, True)


def test_all_tokens_can_be_learnt(tokenizer: ChatGLMTokenizer) -> None:
    example, _, _ = make_example(tokenizer, pair(), loss_on="all")
    assert example.labels.tolist() == [IGNORED, IGNORED, *example.input_ids.tolist()[2:]]


def test_a_conversation_learns_every_answer_and_the_role_that_ends_it(tokenizers: dict[int, ChatGLMTokenizer]) -> None:
    tokenizer = tokenizers[3]
    messages = (
        Message("user", "hello"),
        Message("assistant", "你好"),
        Message("user", "1 + 2"),
        Message("assistant", "= 3"),
    )
    first, second = (answer_ids(tokenizer, messages[index], last=False) for index in (1, 3))
    end, user = tokenizer.eos_token_id, tokenizer.get_command("<|user|>")
    whole, _, _ = make_example(tokenizer, Record(messages, (False, True, False, True), "x"))
    assert targets(whole) == [*first, user, *second, end]
    assert whole.input_ids.tolist() == conversation_ids(tokenizer, messages)[0]
    one, _, _ = make_example(tokenizer, Record(messages, (False, False, False, True), "x"))
    assert targets(one) == [*second, end]
    assert torch.equal(one.input_ids, whole.input_ids)
    other, _, _ = make_example(tokenizer, Record(messages, (False, True, False, False), "x"))
    assert targets(other) == [*first, user]


def test_records_with_nothing_to_learn_are_dropped_and_counted(tokenizer: ChatGLMTokenizer) -> None:
    unlearnt = Record(pair().messages, (False, False), "here:2")
    examples, report = make_examples(
        tokenizer, [pair(), unlearnt, pair(summary="很好。" * 9)], Limits(target_tokens=12)
    )
    assert [example.where for example in examples] == ["here:1", "here:1"]
    assert (report.records, report.cut_prompts, report.cut_answers, report.dropped) == (3, 0, 1, 1)
    with pytest.raises(DataError, match="nothing is left to learn from"):
        make_examples(tokenizer, [unlearnt])


def test_a_record_without_a_form_is_named(tokenizers: dict[int, ChatGLMTokenizer]) -> None:
    messages = (Message("user", "a"), Message("assistant", "b", "tool"))
    with pytest.raises(DataError, match="here:7: ChatGLM2 has no form for tools"):
        make_examples(tokenizers[2], [Record(messages, (False, True), "here:7")])
    with pytest.raises(DataError, match="here:1"):
        make_examples(tokenizers[3], [pair(content="half \ud800 a pair")])


def test_the_fingerprint_follows_ids_labels_and_order(tokenizers: dict[int, ChatGLMTokenizer]) -> None:
    def prints(*records: Record, **options: Any) -> str:
        return fingerprint(make_examples(tokenizers[3], records, **options)[0])

    first, second = pair(), pair("tea", "rice")
    assert prints(first, second) == prints(first, second)
    assert len({prints(first, second), prints(second, first), prints(first), prints(first, second, loss_on="all")}) == 4


# --- batches


def test_batches_are_padded_on_the_right() -> None:
    def example(*ids: int) -> Example:
        labels = torch.tensor([IGNORED, *ids[1:]], dtype=torch.int32)
        return Example(torch.tensor(ids, dtype=torch.int32), labels, len(ids) - 1, "x")

    batch = collate([example(5, 6, 7), example(8, 9)], pad_token_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    nothing = Example(torch.tensor([3, 4], dtype=torch.int32), torch.tensor([IGNORED] * 2), 0, "file:9")
    with pytest.raises(DataError, match="nothing to learn: file:9"):
        collate([nothing], pad_token_id=1)


LENGTHS = [int(length) for length in torch.randint(5, 300, (700,), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("cut", [{"batch_size": 4}, {"tokens_per_batch": 1200}], ids=["size", "tokens"])
def test_an_epoch_holds_every_example_once_in_an_order_of_its_own(cut: dict[str, int]) -> None:
    plan = plan_epoch(LENGTHS, seed=1, epoch=0, accumulation=3, **cut)
    numbers = [number for window in plan for batch in window for number in batch]
    assert sorted(numbers) == list(range(len(LENGTHS)))
    assert plan == plan_epoch(LENGTHS, seed=1, epoch=0, accumulation=3, **cut)
    assert plan != plan_epoch(LENGTHS, seed=1, epoch=1, accumulation=3, **cut)
    assert plan != plan_epoch(LENGTHS, seed=2, epoch=0, accumulation=3, **cut)
    batches = [batch for window in plan for batch in window]
    assert all(len(window) == 3 for window in plan) or sum(len(window) < 3 for window in plan) <= 4
    padded = sum(len(batch) * max(LENGTHS[number] for number in batch) for batch in batches)
    assert sum(LENGTHS) / padded > 0.93
    if "tokens_per_batch" in cut:
        assert all(len(batch) * max(LENGTHS[number] for number in batch) <= 1200 for batch in batches)
    else:
        assert max(map(len, batches)) == 4


def test_a_window_is_the_same_examples_however_it_is_divided() -> None:
    whole = plan_epoch(LENGTHS, seed=1, epoch=0, batch_size=8)
    halves = plan_epoch(LENGTHS, seed=1, epoch=0, batch_size=2, accumulation=4)

    def together(plan: list[list[list[int]]]) -> list[list[int]]:
        return [sorted(number for batch in window for number in batch) for window in plan]

    assert together(whole) == together(halves)


def test_a_record_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    plan = plan_epoch([50, 5, 5, 5], seed=0, epoch=0, tokens_per_batch=16)
    assert sorted(sorted(batch) for window in plan for batch in window) == [[0], [1, 2, 3]]


def test_what_64_tokens_do_to_adgen(shared: Path, tmp_path: Path) -> None:
    """Counted with the official tokenizer: 181 of 1,070 prompts lost their end, 815 summaries are over 64 tokens."""
    file = shared / "tokenizers" / "chatglm2-chatglm3.tokenizer.model"
    tokenizer = ChatGLMTokenizer(file, generation=2)
    records = read_records(shared / "data" / "adgen" / "dev.json")
    examples, report = make_examples(tokenizer, records, Limits(source_tokens=64, target_tokens=64))
    assert (report.records, report.cut_prompts, report.cut_answers, report.dropped) == (1070, 181, 815, 0)
    mark = tokenizer.encode_text("答：")[-2:]
    for example in examples:
        start = int((example.labels != IGNORED).nonzero()[0])
        assert start <= 64
        assert example.input_ids[start - 2 : start].tolist() == mark
