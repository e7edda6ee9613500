"""Every format of data becomes messages; what is trained of them is what is asked later, to the token."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from glmkit.chat.messages import Message
from glmkit.chat.templates import answer_ids, conversation_ids, prompt_ids, text_ids
from glmkit.chat.tools import ToolCallError, parse_json_call, parse_tool_call, write_json_call, write_tool_call
from glmkit.cli import run
from glmkit.data.examples import IGNORED, make_example, make_examples
from glmkit.data.records import Record, convert, read_records
from glmkit.errors import DataError, MissingDependencyError, OutputError, UsageError
from glmkit.tokenizers.chatglm import ChatGLM1Tokenizer
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer
from glmkit.tokenizers.glm4 import ChatGLM4Tokenizer
from tiny import train_tokenizer
from tiny_families import glm4_tokenizer, train_ice_text

NAMED = (("add", "a"), ("mul", "b"))  # tools and their parameters
ADD = {"name": "add", "description": "加法", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
SUM = {"a": 1, "b": "it's", "c": [True, None, {"d": 2.5}]}


def call_turn(name: str, arguments: dict[str, Any]) -> dict[str, str]:
    return {"from": "function_call", "value": json.dumps({"name": name, "arguments": arguments})}


def tool_call(name: str, arguments: dict[str, Any], number: int) -> dict[str, Any]:
    return {
        "id": f"call_{number}",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments)},
    }


# One invented row of every format; the last two have tools.
ROWS: dict[str, dict[str, Any]] = {
    "adgen": {"content": "上衣 材质 棉", "summary": "今天天气很好。"},
    "columns": {"content": "hello", "summary": "world", "id": 7},
    "alpaca": {"instruction": "I like", "input": "tea", "output": "rice"},
    "history": {"prompt": "你好", "response": "hello", "history": [["tea", "rice"], ["how", "are you?"]]},
    "text": {"text": "hello world, how are you? 你好"},
    "conversations": {
        "tools": [ADD],
        "conversations": [
            {"role": "system", "content": "I like rice."},
            {"role": "user", "content": "1 + 2"},
            {"role": "assistant", "content": "I add.", "loss": False},
            {"role": "tool", "name": "add", "parameters": SUM, "observation": {"sum": 3}},
            {"role": "assistant", "content": "3"},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "metadata": "add", "content": "```python\ntool_call(from=1)\n```"},
            {"role": "observation", "content": "4"},
            {"role": "assistant", "metadata": "interpreter", "content": "```python\nprint(1)\n```"},
            {"role": "observation", "content": "1"},
            {"role": "assistant", "content": "你好"},
        ],
    },
    "sharegpt": {
        "tools": json.dumps([ADD]),
        "conversations": [
            {"from": "human", "value": "1 + 2"},
            call_turn("add", {"from": "1", "b": 2}),
            {"from": "observation", "value": '{"sum": 3}'},
            {"from": "gpt", "value": "3"},
            {"from": "user", "value": "你好"},
            {"from": "assistant", "value": "hello"},
        ],
    },
    "messages": {
        "tools": [{"type": "function", "function": ADD}],
        "messages": [
            {"role": "system", "content": "I like rice."},
            {"role": "user", "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "2"}]},
            {"role": "assistant", "content": None, "tool_calls": [tool_call("add", SUM, 1), tool_call("mul", {}, 2)]},
            {"role": "tool", "tool_call_id": "call_2", "content": "two"},
            {"role": "tool", "tool_call_id": "call_1", "content": "one"},
            {"role": "assistant", "content": "I go on.", "tool_calls": [tool_call("add", {"a": 2}, 3)]},
            {"role": "tool", "tool_call_id": "call_3", "content": "three"},
            {"role": "assistant", "content": "not this", "weight": 0},
            {"role": "user", "content": "tea"},
            {"role": "assistant", "content": "rice"},
        ],
    },
    "toolalpaca": {
        "NLDocumentation": "getRain: how much\nParameters: {}",
        "Instances": [
            {
                "input": "hello",
                "intermediate_steps": [
                    [["getRain", '{"town": "B"}', "I look.\nAction: getRain\nAction Input: …"], "Status: 3"],
                    [["getRain", "{}", "Action: getRain"], "4"],
                ],
                "Final Thought": "I know.",
                "output": "3 and 4",
            }
        ],
    },
}
WITH_TOOLS = ("conversations", "sharegpt", "messages", "toolalpaca")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    folder = tmp_path_factory.mktemp("tokenizers")
    file = train_tokenizer(folder / "tokenizer.model")
    return {
        1: ChatGLM1Tokenizer(train_ice_text(folder / "ice_text.model")),
        2: ChatGLMTokenizer(file, generation=2),
        3: ChatGLMTokenizer(file, generation=3),
        4: glm4_tokenizer(folder / "glm4.model"),
    }


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(folder: Path, *rows: Any, **options: Any) -> list[Record]:
    return read_records(write(folder / "data.jsonl", *rows), **options)


def one(folder: Path, name: str, **options: Any) -> Record:
    (record,) = read(folder, ROWS[name], **options)
    return record


def said(record: Record) -> list[tuple[str, str, str, Any, bool]]:
    return [(m.role, m.metadata, m.content, m.arguments, learn) for m, learn in zip(record.messages, record.loss)]


# --- formats


def test_columns_alpaca_and_history_become_rounds(tmp_path: Path) -> None:
    assert said(one(tmp_path, "adgen")) == [
        ("user", "", "上衣 材质 棉", None, False),
        ("assistant", "", "今天天气很好。", None, True),
    ]
    assert [m.content for m in one(tmp_path, "alpaca").messages] == ["I like\ntea", "rice"]
    assert [m.content for m in one(tmp_path, "alpaca", format="alpaca_text").messages] == [
        "### Instruction:\nI like\n\n### Input:\ntea\n\n### Response:\n",
        "rice",
    ]
    bare = {"instruction": "I like", "input": "", "output": "tea", "system": "rice", "history": [["a", "b"]]}
    (record,) = read(tmp_path, bare)
    assert [m.content for m in record.messages] == ["rice", "a", "b", "I like", "tea"]
    assert record.loss == (False, False, True, False, True)
    (record,) = read(tmp_path, bare, format="alpaca_text")
    assert record.messages[-2].content == "### Instruction:\nI like\n\n### Response:\n"
    history = one(tmp_path, "history")
    assert [m.content for m in history.messages] == ["tea", "rice", "how", "are you?", "你好", "hello"]
    own = {"q": "a", "a": "b", "before": '[["c", "d"]]'}  # as a CSV file has it
    (record,) = read(tmp_path, own, prompt_column="q", response_column="a", history_column="before")
    assert [m.content for m in record.messages] == ["c", "d", "a", "b"]
    assert read(tmp_path, {"prompt": "a", "response": "b", "history": []})[0].messages[0].content == "a"


def test_conversations_keep_calls_by_their_arguments(tmp_path: Path) -> None:
    record = one(tmp_path, "conversations")
    assert said(record) == [
        ("system", "", "I like rice.", None, False),
        ("user", "", "1 + 2", None, False),
        ("assistant", "", "I add.", None, False),
        ("assistant", "add", "", SUM, True),
        ("observation", "", '{"sum": 3}', None, False),
        ("assistant", "", "3", None, True),
        ("user", "", "hello", None, False),
        ("assistant", "add", "", {"from": 1}, True),
        ("observation", "", "4", None, False),
        ("assistant", "interpreter", "```python\nprint(1)\n```", None, True),
        ("observation", "", "1", None, False),
        ("assistant", "", "你好", None, True),
    ]
    assert record.messages[0].tools == [ADD]


def test_sharegpt_reads_tools_and_calls_from_json_text(tmp_path: Path) -> None:
    record = one(tmp_path, "sharegpt")
    assert said(record) == [
        ("system", "", "", None, False),
        ("user", "", "1 + 2", None, False),
        ("assistant", "add", "", {"from": "1", "b": 2}, True),
        ("observation", "", '{"sum": 3}', None, False),
        ("assistant", "", "3", None, True),
        ("user", "", "你好", None, False),
        ("assistant", "", "hello", None, True),
    ]
    assert record.messages[0].tools == [ADD]
    plain = {"system": "rice", "tools": "[]", "messages": ROWS["sharegpt"]["conversations"][4:]}
    assert [(m.role, m.content, m.tools) for m in read(tmp_path, plain)[0].messages] == [
        ("system", "rice", None),
        ("user", "你好", None),
        ("assistant", "hello", None),
    ]


def test_calls_made_at_once_are_made_one_after_the_other(tmp_path: Path) -> None:
    record = one(tmp_path, "messages")
    assert said(record) == [
        ("system", "", "I like rice.", None, False),
        ("user", "", "1 + 2", None, False),
        ("assistant", "mul", "", {}, True),  # in the order of the results, each behind its call
        ("observation", "", "two", None, False),
        ("assistant", "add", "", SUM, True),
        ("observation", "", "one", None, False),
        ("assistant", "", "I go on.", None, True),
        ("assistant", "add", "", {"a": 2}, True),
        ("observation", "", "three", None, False),
        ("assistant", "", "not this", None, False),
        ("user", "", "tea", None, False),
        ("assistant", "", "rice", None, True),
    ]
    old = [
        {"role": "user", "content": "1 + 2"},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "add", "content": "3"},
        {"role": "assistant", "content": "3"},
    ]
    (record,) = read(tmp_path, {"messages": old, "functions": [ADD]})
    assert [m.arguments for m in record.messages] == [None, None, {"a": 1}, None, None]
    assert record.messages[0].tools == [ADD]
    (record,) = read(tmp_path, {"messages": old[:2]})  # only to learn when to call
    assert record.messages[-1].arguments == {"a": 1}


def test_toolalpaca_becomes_thoughts_calls_and_a_final_answer(tmp_path: Path) -> None:
    record = one(tmp_path, "toolalpaca")
    assert said(record) == [
        ("system", "", "", None, False),
        ("user", "", "hello", None, False),
        ("assistant", "", "I look.", None, True),
        ("assistant", "getRain", "", {"town": "B"}, True),
        ("observation", "", "Status: 3", None, False),
        ("assistant", "getRain", "", {}, True),  # a step without a thought
        ("observation", "", "4", None, False),
        ("assistant", "", "I know.\n3 and 4", None, True),
    ]
    assert record.messages[0].tools == ["getRain: how much\nParameters: {}"]
    assert record.where.endswith("data.jsonl:1, instance 1")


def test_a_named_format_is_not_guessed(tmp_path: Path) -> None:
    both = {"content": "a", "summary": "b", "instruction": "c", "output": "d"}
    assert read(tmp_path, both)[0].answer == "b"
    assert read(tmp_path, both, format="alpaca")[0].answer == "d"
    with pytest.raises(UsageError, match="no data format 'alpacca'; known are auto, columns, adgen"):
        read(tmp_path, both, format="alpacca")
    with pytest.raises(DataError) as caught:
        read(tmp_path, {"frage": "a", "antwort": "b"})
    assert "data.jsonl:1: no known format has the fields 'frage', 'antwort'; looked for 'content', 'summary'" in str(
        caught.value
    )
    for fields in ("'instruction', 'output'", "'prompt', 'response'", "'conversations'", "'messages'", "'text'"):
        assert fields in str(caught.value)
    # The form shows in the first row that can be read; the broken one before it is still reported.
    with pytest.raises(DataError, match="1 of 2 rows") as caught:
        read(tmp_path, '{"instruction": ', ROWS["alpaca"])
    assert "data.jsonl:1: not valid JSON" in str(caught.value)


TWICE = [tool_call("add", {}, 1), tool_call("add", {}, 2)]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"content": "a", "summary": " \n"}, "field 'summary', the answer to learn, is empty"),
        ({"instruction": "a", "output": ""}, "field 'output', the answer to learn, is empty"),
        ({"instruction": "a", "output": "b", "input": 3}, "'input' must be text"),
        ({"prompt": "a", "response": "b", "history": [["c"]]}, r"\[question, answer\] pairs of text, one is \['c'\]"),
        ({"prompt": "a", "response": "b", "history": "no list"}, "'history' is text that is no JSON"),
        ({"text": " "}, "field 'text' is empty"),
        ({"text": 3}, "field 'text' must be text"),
        ({"conversations": [{"role": "assistant", "content": ""}]}, "message 1, an answer to learn, is empty"),
        ({"conversations": ["hello"]}, "message 1 is str, expected an object"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]},
            "message 2 is from 'bot'",
        ),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]}, "message 2, an answer"),
        ({"conversations": [{"from": "human", "value": 1}]}, "must have text in 'value'"),
        (
            {"conversations": [{"from": "function_call", "value": "add"}]},
            "message 1 .function_call. is text that is no",
        ),
        ({"conversations": [{"from": "function_call", "value": "[{}, {}]"}]}, "holds 2 calls and one result"),
        ({"conversations": [{"from": "function_call", "value": '{"name": "a", "arguments": [1]}'}]}, "be an object"),
        ({"conversations": [{"from": "human", "value": "a"}], "tools": "{"}, "'tools' is text that is no JSON"),
        ({"messages": [{"role": "robot"}]}, "message 1 has the role 'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "the content must be text"),
        ({"messages": [{"role": "tool", "content": "3"}]}, "the result of no call before it"),
        (
            {"messages": [{"role": "assistant", "tool_calls": TWICE}, {"role": "tool", "tool_call_id": "x"}]},
            "the result of no call before it, its id is 'x'",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": TWICE}, {"role": "user"}]}, "before the result of the call"),
        ({"messages": [{"role": "assistant", "tool_calls": TWICE}]}, "calls 2 tools at once"),
        ({"messages": [{"role": "assistant", "content": None}]}, "an answer to learn, is empty"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 2}]}, "'weight' must be 0 or 1"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the last message must be the assistant's"),
        ({"NLDocumentation": "a", "Instances": {}}, "needs 'NLDocumentation' .text. and 'Instances' .list."),
        ({"NLDocumentation": "a", "Instances": [{"input": "b"}]}, "instance 1: an instance needs 'Final Thought'"),
    ],
)
def test_rows_that_cannot_be_learnt_are_named_with_their_line(tmp_path: Path, row: Any, found: str) -> None:
    with pytest.raises(DataError, match=found) as caught:
        read(tmp_path, row)
    assert f"1 of 1 rows of {tmp_path / 'data.jsonl'} cannot be used:\n  - {tmp_path / 'data.jsonl'}:1" in str(
        caught.value
    )


# --- files


def test_csv_and_parquet_give_what_json_gives(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    for name in ("adgen", "alpaca", "history", "sharegpt", "conversations", "text"):
        row = ROWS[name]
        expected = [(record.messages, record.loss, record.text) for record in read(tmp_path, row, row)]
        table = tmp_path / "data.csv"
        with table.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            writer.writeheader()
            cells = {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
            writer.writerows([cells, cells])
        assert [(record.messages, record.loss, record.text) for record in read_records(table)] == expected
        if name in ("conversations", "history"):  # Parquet has one type for a column, so a mixed one is text
            row = cells
        parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / "any.name")
        found = read_records(tmp_path / "any.name")
        assert [(record.messages, record.loss, record.text) for record in found] == expected
        assert found[1].where == f"{tmp_path / 'any.name'}, row 2"


def test_nested_parquet_has_no_fields_that_other_objects_have(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    add, mul = ({"name": n, "parameters": {"type": "object", "properties": {p: {"type": "number"}}}} for n, p in NAMED)
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    calls = [{"role": "tool", "name": n, "parameters": {p: 1.0}, "observation": "1"} for n, p in NAMED]
    asked = {"tools": [add, mul], "conversations": [user, *calls, {**assistant, "loss": False}, user, assistant]}
    called = {"role": "assistant", "content": None, "tool_calls": [tool_call("add", {"a": None}, 1)]}
    answered = {"role": "tool", "tool_call_id": "call_1", "content": "1"}
    posted = {"tools": [add, mul], "messages": [user, called, answered, {**assistant, "weight": 1}]}
    for row in (asked, posted):
        (expected,) = read(tmp_path, row)
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "nested.parquet")
        (found,) = read_records(tmp_path / "nested.parquet")
        assert (found.messages, found.loss) == (expected.messages, expected.loss)


def test_null_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    user = {"role": "user", "content": "a"}
    with_null = {"conversations": [user, {"role": "assistant", "content": "b", "loss": None}]}
    assert read(tmp_path, with_null)[0].loss == (False, True)
    call = {"type": "function", "function": {"name": "add", "arguments": None}}
    turns = [user, {"role": "assistant", "content": None, "weight": None, "tool_calls": [call]}]
    (record,) = read(tmp_path, {"messages": turns, "tools": None})
    assert said(record)[1:] == [("assistant", "add", "", {}, True)]


def test_a_call_may_have_parameters_and_a_system_message_tools(tmp_path: Path) -> None:
    call = {"from": "function_call", "value": json.dumps({"name": "add", "parameters": SUM})}
    (record,) = read(tmp_path, {"conversations": [{"from": "human", "value": "a"}, call]})
    assert record.messages[-1].arguments == SUM
    turns = [{"role": "system", "content": "a", "tools": [ADD]}, {"role": "user", "content": "b"}]
    (record,) = read(tmp_path, {"messages": [*turns, {"role": "assistant", "content": "c"}]})
    assert record.messages[0] == Message("system", "a", tools=[ADD])


def test_messages_of_glm4s_own_script(tmp_path: Path) -> None:
    call = json.dumps({"name": "add", "arguments": {"a": 1}})
    turns = [{"role": "user", "content": "b"}, {"role": "assistant", "content": call}]
    end = [{"role": "observation", "content": "3"}, {"role": "assistant", "content": "c"}]
    (record,) = read(tmp_path, {"messages": [*turns, *end]})
    assert said(record)[1:3] == [("assistant", "", call, None, True), ("observation", "", "3", None, False)]
    posted = {"role": "assistant", "content": None, "tool_calls": [tool_call("add", {"a": 1}, 1)]}
    (record,) = read(tmp_path, {"messages": [turns[0], posted, *end]})
    assert said(record)[1:3] == [("assistant", "add", "", {"a": 1}, True), ("observation", "", "3", None, False)]


def test_places_are_exact_lines(tmp_path: Path) -> None:
    table = tmp_path / "data.csv"
    table.write_text('content,summary\n"two\nlines",b\n\nc,d\ne\nf,\n"g', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_records(table)
    text = str(caught.value)
    assert "3 of 5 rows" in text
    assert f"{table}:6: 1 cells, expected 2: content, summary" in text
    assert f"{table}:7: field 'summary', the answer to learn, is empty" in text
    assert f"{table}:8: not valid CSV: unexpected end of data" in text
    array = tmp_path / "data.json"
    good = '{\n "content": "a",\n "summary": "b"\n}'
    array.write_text(f'\n[\n{good},\n\n{good}\n,{{"content": 1,\n"summary": "b"}}, {good} ,\n {{"content": }}]')
    with pytest.raises(DataError) as caught:
        read_records(array)
    assert "2 of 5 rows" in str(caught.value)
    assert f"{array}:12, item 3: field 'content' must be text" in str(caught.value)
    assert f"{array}:17: not valid JSON" in str(caught.value)
    array.write_text(f"[{good}]")
    assert read_records(array)[0].where == f"{array}:1, item 1"
    for broken, found in (
        (f"[{good}\n{good}]", ":5: not valid JSON: expected , or"),
        (f"[{good}]\n]", ":5: not valid"),
    ):
        array.write_text(broken)
        with pytest.raises(DataError, match=found):
            read_records(array)
    assert len(read_records(write(array, [ROWS["adgen"]] * 5), limit=3)) == 3


def test_parquet_that_is_broken_or_has_no_reader_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "data.parquet"
    file.write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(DataError, match="is no whole Parquet file"):
        read_records(file)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"glmkit\[train\]"):
        read_records(file)


# --- calls


@pytest.mark.parametrize(
    "arguments", [{}, SUM, {"from": "B", "class": -1, "to": 'a "b" \n\u2028 c'}, {"a": {"b": [1e-9]}}]
)
def test_a_call_is_read_as_it_was_written(arguments: dict[str, Any]) -> None:
    assert parse_tool_call(write_tool_call(arguments)) == arguments
    assert parse_json_call(write_json_call(arguments)) == arguments


def test_calls_are_written_as_the_models_were_trained() -> None:
    assert write_tool_call(SUM) == "```python\ntool_call(a=1, b=\"it's\", c=[True, None, {'d': 2.5}])\n```"
    assert write_json_call({"城": "北京", "n": 1}) == '{"城": "北京", "n": 1}'
    for arguments, found in (({"a b": 1}, "'a b' cannot be written"), ({"a": float("nan")}, "not finite")):
        with pytest.raises(UsageError, match=found):
            write_tool_call(arguments)
    with pytest.raises(UsageError, match="not finite"):
        write_json_call({"a": [float("inf")]})
    for text in ("tool_call(a=from)", "tool_call(from=1, from=2)", "from=1", "tool_call(from)", "tool_call(from='"):
        with pytest.raises(ToolCallError):
            parse_tool_call(text)


def test_only_a_named_call_without_content_has_arguments() -> None:
    for message in (("user", "", "add"), ("assistant", "", ""), ("assistant", "text", "add")):
        with pytest.raises(UsageError, match="only an assistant message has arguments"):
            Message(*message, arguments={})


# --- ids


def labels_by_rule(tokenizer: ChatGLMTokenizer, record: Record) -> tuple[list[int], list[int]]:
    """Ids and labels by the rule of ChatGLM3's script: a token is learnt when the one before it carries loss."""
    ids = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")]
    carries = [False, False]
    for message, learn in zip(record.messages, record.loss):
        content = message.content if message.arguments is None else write_tool_call(message.arguments)
        if message.tools:
            sentence = "Answer the following questions as best as you can. You have access to the following tools:"
            tools = [tool.get("function", tool) if isinstance(tool, dict) else tool for tool in message.tools]
            content = f"{content or sentence}\n{json.dumps(tools, ensure_ascii=False, indent=4)}"
        block = tokenizer.build_single_message(message.role, message.metadata, content)
        ids += block
        carries += [learn] * len(block)
    ids.append(tokenizer.eos_token_id)
    return ids, [token if before else IGNORED for token, before in zip(ids, [False, *carries])]


@pytest.mark.parametrize("name", [name for name in ROWS if name != "text"])
def test_chatglm3_learns_what_its_official_script_learnt(tokenizers: dict[int, Any], tmp_path: Path, name: str) -> None:
    record = one(tmp_path, name)
    example, _ = make_example(tokenizers[3], record)
    assert (example.input_ids.tolist(), example.labels.tolist()) == labels_by_rule(tokenizers[3], record)


@pytest.mark.parametrize("generation", [1, 2, 3, 4])
@pytest.mark.parametrize("name", [name for name in ROWS if name != "text"])
def test_training_ids_are_the_ids_of_asking(
    tokenizers: dict[int, Any], tmp_path: Path, name: str, generation: int
) -> None:
    tokenizer, record = tokenizers[generation], one(tmp_path, name)
    if name in WITH_TOOLS and generation < 3:
        with pytest.raises(DataError, match=r"data.jsonl:1.*has no form for tools"):
            make_examples(tokenizer, [record])
        return
    if name == "toolalpaca" and generation == 4:
        with pytest.raises(DataError, match=r"data.jsonl:1, instance 1: a tool is 'getRain"):
            make_examples(tokenizer, [record])
        return
    assert_asked_as_trained(tokenizer, record)


def assert_asked_as_trained(tokenizer: Any, record: Record) -> None:
    """Each answer is trained behind exactly what the model reads when it is to give it."""
    ids, _ = conversation_ids(tokenizer, record.messages)
    example, _ = make_example(tokenizer, record)
    labels = example.labels.tolist()
    assert example.input_ids.tolist() == ids
    last = len(record.messages) - 1
    learnt = 0
    for place, (message, learn) in enumerate(zip(record.messages, record.loss)):
        if message.role != "assistant" or (tokenizer.generation < 3 and place < last):
            continue
        asked, answer = prompt_ids(tokenizer, record.messages[:place]), answer_ids(tokenizer, message, last=False)
        assert ids[: len(asked)] == asked
        end = len(asked) + len(answer) + 1  # with the id that ends the answer
        assert ids[len(asked) : end - 1] == answer
        assert labels[len(asked) : end] == (ids[len(asked) : end] if learn else [IGNORED] * (len(answer) + 1))
        learnt += len(answer) + 1 if learn else 0
    assert sum(label != IGNORED for label in labels) == learnt
    assert ids[-1] == tokenizer.eos_token_id


def test_glm4_reads_and_writes_calls_in_its_own_form(tokenizers: dict[int, Any], tmp_path: Path) -> None:
    tokenizer: ChatGLM4Tokenizer = tokenizers[4]
    record = one(tmp_path, "sharegpt")
    text = tokenizer.decode_ids(make_example(tokenizer, record)[0].input_ids.tolist())
    assert '<|assistant|>add\n{"from": "1", "b": 2}<|observation|>' in text
    assert "## add" in text
    three = tokenizers[3].decode_ids(make_example(tokenizers[3], record)[0].input_ids.tolist())
    assert "tool_call(from='1', b=2)" in three


@pytest.mark.parametrize("generation", [1, 2, 3, 4])
def test_plain_text_is_learnt_whole(tokenizers: dict[int, Any], tmp_path: Path, generation: int) -> None:
    tokenizer, record = tokenizers[generation], one(tmp_path, "text")
    assert (record.messages, record.text) == ((), ROWS["text"]["text"])
    ids, mask = text_ids(tokenizer, record.text)
    encoded = tokenizer.encode_text(record.text)
    assert ids == [*ids[: -len(encoded) - 1], *encoded, tokenizer.eos_token_id]
    assert mask == [False] * 2 + [True] * (len(ids) - 2)
    example, _ = make_example(tokenizer, record)
    assert (example.input_ids.tolist(), example.label_tokens) == (ids, len(encoded) + 1)


# --- conversion


@pytest.mark.parametrize("name", [name for name in ROWS if name != "text"])
def test_a_converted_file_holds_the_same_records(tmp_path: Path, name: str) -> None:
    rows = [ROWS[name], ROWS[name]]
    source, target = write(tmp_path / "old.json", *rows), tmp_path / "new.jsonl"
    result = convert(name, source, target)
    assert (result.written, result.problems) == (2, ())
    assert [(r.messages, r.loss) for r in read_records(target, format="conversations")] == [
        (r.messages, r.loss) for r in read_records(source, format=name)
    ]


def test_a_conversion_counts_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    api = ROWS["toolalpaca"]
    (good,) = api["Instances"]
    broken = {**good, "intermediate_steps": [[["getRain", "{town: B}", "I look."], "3"]]}
    source = write(tmp_path / "train_data.json", json.dumps([{**api, "Instances": [good, broken]}, api], indent=1))
    target = tmp_path / "new.jsonl"
    assert run(["data", "convert", "toolalpaca", str(source), str(target)]) == 0
    said_so = capsys.readouterr().out
    assert "conversations written: 2, rows left out: 1" in said_so
    assert "item 1, instance 2: step 1: the arguments of getRain are no JSON: '{town: B}'" in said_so
    first = json.loads(target.read_text().splitlines()[0])
    assert first["tools"] == [api["NLDocumentation"]]
    assert [turn["role"] for turn in first["conversations"]] == ["user", "assistant", "tool", "tool", "assistant"]
    before = target.read_bytes()
    for arguments, error in (
        ((source, target), OutputError),  # it exists
        ((write(tmp_path / "bad.json", {**api, "Instances": [broken]}), target), DataError),
        ((write(tmp_path / "text.json", ROWS["text"]), target), DataError),
    ):
        with pytest.raises(error):
            convert(
                "text" if arguments[0].name == "text.json" else "toolalpaca", *arguments, overwrite=error is DataError
            )
    assert target.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "new.jsonl", "text.json", "train_data.json"]


def test_a_group_of_verbs_names_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "convrt"]) == 2
    assert "did you mean glm data convert?" in capsys.readouterr().err


# --- the documentation


def test_the_examples_in_the_documentation_are_what_they_say(tokenizers: dict[int, Any], tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```jsonl (\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert {name for name, _ in examples} == set(ROWS) - {"columns"}
    for name, rows in examples:
        (tmp_path / "data.json").write_text(rows, encoding="utf-8")
        found = read_records(tmp_path / "data.json")
        assert [(r.messages, r.loss, r.text) for r in found] == [
            (r.messages, r.loss, r.text) for r in read_records(tmp_path / "data.json", format=name)
        ]
        assert len(make_examples(tokenizers[3], found)[0]) == len(rows.splitlines())


# --- real files


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_tool_dialogues_are_learnt_as_they_are_asked(shared: Path, language: str, every: int) -> None:
    records = read_records(shared / "data" / "tool_dialogues" / f"glaive_toolcall_{language}_demo.json")
    calls = [message.arguments for record in records for message in record.messages if message.arguments is not None]
    assert (len(records), len(calls)) == {"en": (300, 211), "zh": (300, 216)}[language]
    official = shared / "tokenizers"
    three = ChatGLMTokenizer(official / "chatglm2-chatglm3.tokenizer.model", generation=3)
    for tokenizer in (three, ChatGLM4Tokenizer.from_pretrained(official / "glm4")):
        for record in records[::every]:
            assert_asked_as_trained(tokenizer, record)
    for record in records[: 60 // every]:
        example, _ = make_example(three, record)
        assert (example.input_ids.tolist(), example.labels.tolist()) == labels_by_rule(three, record)
    for arguments in calls:
        assert parse_tool_call(write_tool_call(arguments)) == arguments


@pytest.mark.parametrize(
    ("file", "records"),
    [("adgen/dev.json", 1070), ("adgen/train_5001.json", 5001), ("alpaca/alpaca_data_1k.json", 1000)],
)
def test_real_files_are_recognised(shared: Path, file: str, records: int) -> None:
    assert len(read_records(shared / "data" / file)) == records
