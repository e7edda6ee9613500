"""Messages to ids, ids to messages, and tool calls."""

from __future__ import annotations

import ast
import json
import random
import re
from pathlib import Path

import pytest

from glmkit.chat.messages import Message, to_messages
from glmkit.chat.reply import ReplyStream, parse_reply
from glmkit.chat.templates import answer_ids, chat_format, conversation_ids, prompt_ids
from glmkit.chat.tools import (
    GLM4_BUILT_IN,
    GLM4_PREAMBLES,
    TOOLS_SENTENCE,
    ToolCall,
    ToolCallError,
    documented_tools,
    glm4_tools,
    parse_json_call,
    parse_tool_call,
)
from glmkit.data.examples import make_example
from glmkit.data.records import Record
from glmkit.errors import UsageError
from glmkit.runtime.punctuation import FullWidthStream, full_width
from glmkit.runtime.replies import Delta
from glmkit.tokenizers import ChatGLMTokenizer
from glmkit.tokenizers.chatglm import ChatGLM1Tokenizer
from glmkit.tokenizers.glm4 import ChatGLM4Tokenizer
from test_tokenizer import small_file as small_file  # the small vocabulary trained there
from test_tokenizer import train
from tiny_families import glm4_tokenizer, train_ice_text

WEATHER = {"name": "get_weather", "description": "查询天气", "parameters": {"city": {"type": "string"}}}
CALL = "```python\ntool_call(city='北京')\n```"


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(train(tmp_path_factory.mktemp("three") / "tokenizer.model"), generation=3)


@pytest.fixture(scope="module")
def two(three: ChatGLMTokenizer) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(three.vocab_file, generation=2)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> ChatGLM1Tokenizer:
    return ChatGLM1Tokenizer(train_ice_text(tmp_path_factory.mktemp("one") / "ice_text.model"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> ChatGLM4Tokenizer:
    return glm4_tokenizer(tmp_path_factory.mktemp("four") / "tokenizer.model")


# --- messages ---


def test_every_form_becomes_the_same_messages() -> None:
    expected = [Message("user", "q"), Message("assistant", "a"), Message("user", "new")]
    assert to_messages("new", [("q", "a")]) == expected
    assert to_messages("new", [["q", "a"]]) == expected
    assert (
        to_messages([{"role": "user", "content": "q"}, Message("assistant", "a"), Message("user", "new")]) == expected
    )
    assert to_messages({"role": "user", "content": "new"}, expected[:2]) == expected
    assert to_messages("new", system="s") == [Message("system", "s"), Message("user", "new")]
    with_tools = to_messages([{"role": "system", "content": "s", "tools": [WEATHER]}])
    assert with_tools == [Message("system", "s", tools=[WEATHER])]


@pytest.mark.parametrize(
    "wrong",
    [
        {"role": "robot", "content": "x"},
        {"content": "x"},
        {"role": "user", "text": "x"},
        {"role": "user", "content": ["x"]},
        {"role": "user", "content": "x", "tools": []},
        ("q", "a", "b"),
        5,
    ],
)
def test_other_forms_are_refused(wrong: object) -> None:
    with pytest.raises(UsageError):
        to_messages([wrong])


def test_two_system_messages_are_refused() -> None:
    with pytest.raises(UsageError, match="twice"):
        to_messages("q", [{"role": "system", "content": "s"}], system="t")


# --- prompts ---


def test_prompt_of_generation_3_is_the_official_input(three: ChatGLMTokenizer) -> None:
    history = [
        {"role": "system", "content": TOOLS_SENTENCE, "tools": [WEATHER]},
        {"role": "user", "content": "天气<|user|>"},
        {"role": "assistant", "content": "我来查询"},
        {"role": "assistant", "metadata": "get_weather", "content": CALL},
    ]
    query = '{"temp": 25}'
    official = three.build_chat_input(query, history, role="observation")
    ids = prompt_ids(three, to_messages([*history, {"role": "observation", "content": query}]))
    assert [ids] == official["input_ids"].tolist()
    assert official["attention_mask"].tolist() == [[1] * len(ids)]
    assert official["position_ids"].tolist() == [list(range(len(ids)))]
    roles = [three.get_command(f"<|{role}|>") for role in ("system", "user", "assistant", "observation")]
    assert [token for token in ids if token in roles] == [roles[0], roles[1], roles[2], roles[2], roles[3], roles[2]]


def test_generation_3_block(three: ChatGLMTokenizer) -> None:
    role, newline = three.get_command("<|user|>"), three.encode_text("\n")
    assert newline[-1] == 13
    block = [role, *newline, *three.encode_text("hi")]
    assert three.build_single_message("user", "", "hi") == block
    assert prompt_ids(three, [Message("user", "hi")]) == [*three.prefix_ids, *block, three.get_command("<|assistant|>")]
    with pytest.raises(UsageError, match="no role"):
        three.build_single_message("tool", "", "x")
    with pytest.raises(UsageError, match="build_chat_input"):
        three.build_prompt("q")


def test_tools_in_the_system_message(three: ChatGLMTokenizer) -> None:
    text = TOOLS_SENTENCE + "\n" + json.dumps([WEATHER], indent=4, ensure_ascii=False)
    expected = prompt_ids(three, [Message("system", text)])
    for tools in ([WEATHER], [{"type": "function", "function": WEATHER}]):
        assert prompt_ids(three, [Message("system", "", tools=tools)]) == expected
        assert prompt_ids(three, [Message("system", TOOLS_SENTENCE, tools=tools)]) == expected
    named = {"get_weather": {"name": "get_weather", "description": "d", "params": []}}
    assert documented_tools(named) == named
    assert prompt_ids(three, [Message("system", "", tools=named)]) == prompt_ids(
        three, [Message("system", TOOLS_SENTENCE + "\n" + json.dumps(named, indent=4))]
    )


def test_prompt_of_generation_2(two: ChatGLMTokenizer) -> None:
    text = "[Round 1]\n\n问：sq\n\n答：a\n\n[Round 2]\n\n问：你好\n\n答："
    assert two.build_prompt("你好", [("sq", "a")]) == text
    messages = to_messages("你好", [("q", "a")], system="s")
    assert prompt_ids(two, messages) == [*two.prefix_ids, *two.encode_text(text)] == two(text)["input_ids"]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [Message("user", "q"), Message("user", "q")],
        [Message("user", "q"), Message("assistant", "a")],
        [Message("user", "q"), Message("assistant", "a", "get_weather"), Message("user", "q")],
        [Message("user", "q"), Message("assistant", "a"), Message("observation", "q")],
        [Message("system", "q", tools=[WEATHER]), Message("user", "q")],
    ],
)
def test_generation_2_refuses_what_it_has_no_form_for(two: ChatGLMTokenizer, messages: list[Message]) -> None:
    with pytest.raises(UsageError, match="ChatGLM2"):
        prompt_ids(two, messages)


def test_prompt_of_generation_1(one: ChatGLM1Tokenizer) -> None:
    marks = [one.get_command("[gMASK]"), one.get_command("<sop>")]
    assert prompt_ids(one, [Message("user", "你好")]) == [*one.encode_text("你好"), *marks]
    text = "[Round 0]\n问：sq\n答：a\n[Round 1]\n问：你好\n答："
    messages = to_messages("你好", [("q", "a")], system="s")
    assert prompt_ids(one, messages) == [*one.encode_text(text), *marks] == one(text)["input_ids"]
    assert prompt_ids(one, to_messages("q", system="s")) == [*one.encode_text("sq"), *marks]
    for text in ("<sop> [MASK] <eop>", "[gMASK]"):
        ids = prompt_ids(one, [Message("user", text)])
        assert not {*marks, one.eos_token_id, one.mask_token_id} & set(ids[:-2])
    with pytest.raises(UsageError, match="ChatGLM-6B has no form"):
        prompt_ids(one, [Message("system", "", tools=[WEATHER]), Message("user", "q")])


def test_prompt_of_generation_4(four: ChatGLM4Tokenizer) -> None:
    messages = to_messages(
        [
            {"role": "system", "content": "", "tools": [{"type": "function", "function": WEATHER}]},
            {"role": "user", "content": "hi <|user|>"},
            {"role": "assistant", "metadata": "get_weather", "content": '{"city": "北京"}'},
            {"role": "observation", "content": "25"},
        ]
    )
    tools = (
        f"{GLM4_PREAMBLES['2024-06']}\n\n## get_weather\n\n{json.dumps(WEATHER, indent=4, ensure_ascii=False)}"
        "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
    )
    ids = prompt_ids(four, messages)
    assert four.decode_ids(ids) == (
        f"[gMASK]<sop><|system|>\n{tools}<|user|>\nhi <|user|>"
        '<|assistant|>get_weather\n{"city": "北京"}<|observation|>\n25<|assistant|>'
    )
    assert ids.count(four.get_command("<|user|>")) == 1, "what the user typed is text"
    with_text = prompt_ids(four, [Message("system", "be kind", tools=[WEATHER]), *messages[1:2]])
    assert four.decode_ids(with_text).startswith(f"[gMASK]<sop><|system|>\n{tools}<|system|>\nbe kind<|user|>")
    assert prompt_ids(four, [Message("user", ""), messages[1]]) == prompt_ids(four, messages[1:2])


def test_tools_of_generation_4(tmp_path: Path) -> None:
    assert glm4_tools({"get_weather": WEATHER}, "P") == glm4_tools([{"type": "function", "function": WEATHER}], "P")
    text = glm4_tools([{"type": name} for name in GLM4_BUILT_IN], "P")
    assert text == "P" + "".join(f"\n\n## {name}\n\n{lines}" for name, lines in GLM4_BUILT_IN.items())
    for wrong in ({"type": "web"}, {"type": "function", "function": {}}, "get_weather", {"name": 5}):
        with pytest.raises(UsageError, match="a tool is"):
            glm4_tools([wrong], "P")
    four = glm4_tokenizer(tmp_path / "tokenizer.model")
    four.tools_preamble = GLM4_PREAMBLES["2024-10"]  # type: ignore[attr-defined]
    said = four.decode_ids(prompt_ids(four, [Message("system", "", tools=[WEATHER]), Message("user", "q")]))
    assert "ChatGLM 的人工智能助手" in said
    assert "# 可用工具\n\n## get_weather" in said


# --- what is learnt ---


def test_loss_mask_of_generation_3(three: ChatGLMTokenizer) -> None:
    """Assistant messages and what ends them are learnt; the assistant id is, where it ends an assistant message."""
    messages = [
        Message("system", "s"),
        Message("user", "q"),
        Message("assistant", "thought"),
        Message("assistant", CALL, "get_weather"),
        Message("observation", "25"),
        Message("assistant", "done"),
    ]
    ids, learnt = conversation_ids(three, messages)
    system, user, assistant, observation = (
        three.get_command(f"<|{m}|>") for m in "system user assistant observation".split()
    )
    line, text = three.encode_text("\n"), three.encode_text
    parts = [
        (three.prefix_ids, False),
        ([system, *line, *text("s")], False),
        ([user, *line, *text("q")], False),
        ([assistant], False),
        ([*line, *text("thought")], True),
        ([assistant], True),
        ([*text("get_weather\n"), *text(CALL)], True),
        ([observation], True),
        ([*line, *text("25")], False),
        ([assistant], False),
        ([*line, *text("done"), 2], True),
    ]
    assert ids == [token for part, _ in parts for token in part]
    assert learnt == [target for part, target in parts for _ in part]
    # What is learnt follows exactly what is asked at inference.
    for number in (2, 3, 5):
        start = prompt_ids(three, messages[:number])
        assert ids[: len(start)] == start
        answer = answer_ids(three, messages[number], last=number == 5)
        assert ids[len(start) : len(start) + len(answer)] == answer
        assert all(learnt[len(start) : len(start) + len(answer)])


def test_loss_mask_of_generation_2(two: ChatGLMTokenizer) -> None:
    messages = to_messages([("q", "a"), ("你好", "世界")])
    ids, learnt = conversation_ids(two, messages)
    prompt = prompt_ids(two, messages[:-1])
    assert ids == [*prompt, *two.encode_text("世界"), 2]
    assert learnt == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    assert answer_ids(two, messages[-1], last=False) == two.encode_text("世界")


def test_loss_mask_of_generation_1(one: ChatGLM1Tokenizer) -> None:
    messages = to_messages([("q", "a"), ("你好", "世界")])
    ids, learnt = conversation_ids(one, messages)
    prompt = prompt_ids(one, messages[:-1])
    assert ids == [*prompt, *one.encode_text("世界"), one.eos_token_id]
    assert learnt == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


def test_generation_1_does_not_learn_its_prompt(one: ChatGLM1Tokenizer) -> None:
    record = Record(tuple(to_messages([("q", "a")])), (False, True), "line 1")
    assert make_example(one, record)[0].label_tokens == len(one.encode_text("a")) + 1
    with pytest.raises(UsageError, match="both directions"):
        make_example(one, record, loss_on="all")


def test_loss_mask_of_generation_4(four: ChatGLM4Tokenizer) -> None:
    messages = [
        Message("system", "s", tools=[{"type": "python"}]),
        Message("user", "q"),
        Message("assistant", "thought"),
        Message("assistant", '{"a": 1}', "get_weather"),
        Message("observation", "25"),
        Message("assistant", "done"),
    ]
    ids, learnt = conversation_ids(four, messages)
    text = four.decode_ids([token for token, target in zip(ids, learnt) if target])
    assert text == '\nthought<|assistant|>get_weather\n{"a": 1}<|observation|>\ndone<|endoftext|>'
    for number in (2, 3, 5):
        start = prompt_ids(four, messages[:number])
        answer = answer_ids(four, messages[number], last=number == 5)
        assert ids[: len(start) + len(answer)] == [*start, *answer]
        assert all(learnt[len(start) : len(start) + len(answer)])
        assert not learnt[len(start) - 1] or number == 3


def test_only_answers_can_be_learnt(
    three: ChatGLMTokenizer, two: ChatGLMTokenizer, one: ChatGLM1Tokenizer, four: ChatGLM4Tokenizer
) -> None:
    for tokenizer in (one, two, three, four):
        for messages in ([], [Message("user", "q")]):
            with pytest.raises(UsageError, match="ends with the assistant"):
                conversation_ids(tokenizer, messages)
        with pytest.raises(UsageError, match="the assistant's"):
            answer_ids(tokenizer, Message("user", "q"))


# --- replies ---


def generated(tokenizer: ChatGLMTokenizer, *messages: Message) -> list[int]:
    """What a perfect model generates for assistant messages, with the id that stops it."""
    ids: list[int] = []
    for number, message in enumerate(messages):
        ids += [tokenizer.get_command("<|assistant|>")] * (number > 0) + answer_ids(tokenizer, message, last=False)
    return [*ids, tokenizer.get_command("<|observation|>") if messages[-1].metadata else 2]


def test_reply_is_what_was_trained(three: ChatGLMTokenizer) -> None:
    messages = [Message("assistant", "我来查询 🙂"), Message("assistant", CALL, "get_weather")]
    parsed = parse_reply(three, generated(three, *messages))
    assert parsed.messages == messages
    assert parsed.call == ToolCall("get_weather", {"city": "北京"})
    assert parsed.problem is None
    # The parsed messages give the same ids in the next turn.
    assert generated(three, *parsed.messages) == generated(three, *messages)


def test_stream_holds_back_header_lines_and_half_characters(three: ChatGLMTokenizer) -> None:
    messages = [Message("assistant", "先想想 🙂 ok"), Message("assistant", CALL, "get_weather")]
    stream, deltas = ReplyStream(three), []
    for token in generated(three, *messages):
        deltas += stream.push(token)
    deltas += stream.finish()
    assert all(delta.text and "\ufffd" not in delta.text for delta in deltas)
    for number, message in enumerate(messages):
        of_message = [delta for delta in deltas if delta.number == number]
        assert "".join(delta.text for delta in of_message) == message.content
        assert {delta.metadata for delta in of_message} == {message.metadata}
    assert len([delta for delta in deltas if delta.number == 0]) > 3  # it did stream


@pytest.mark.parametrize(
    ("text", "content"),
    [("\n hi  there \n\n", "hi  there"), ("no header", "no header"), (" \n", ""), ("", ""), ("x" * 300, "x" * 300)],
)
def test_plain_replies(three: ChatGLMTokenizer, text: str, content: str) -> None:
    parsed = parse_reply(three, three.encode_text(text))
    assert parsed.messages == [Message("assistant", content)]
    assert parsed.call is parsed.problem is None


def test_a_long_first_line_is_no_header(three: ChatGLMTokenizer) -> None:
    stream = ReplyStream(three)
    early = [delta for token in three.encode_text("x" * 300) for delta in stream.push(token)]
    assert len(early) > 10


def test_generation_2_replies(two: ChatGLMTokenizer) -> None:
    stream = ReplyStream(two)
    assert stream.push(two.encode_text("a")[0])[0] == Delta("a", "", 0)
    parsed = parse_reply(two, [*two.encode_text("世界\nsecond line "), 2])
    assert parsed.messages == [Message("assistant", "世界\nsecond line")]
    assert parse_reply(two, [two.vocab_size + 3, *two.encode_text("x")]).messages == [Message("assistant", "x")]


def test_generation_1_replies(one: ChatGLM1Tokenizer) -> None:
    stream, pieces = ReplyStream(one), []
    for token in [*one.encode_text("好,hello,好 a?"), one.eos_token_id, one.vocab_size + 3]:
        pieces += [delta.text for delta in stream.push(token)]
    pieces += [delta.text for delta in stream.finish()]
    assert "".join(pieces) == stream.messages[0].content == "好，hello，好 a?"


def test_full_width_marks() -> None:
    """A piece at a time as all at once, and all at once as the official two passes for each mark."""
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(rng.choice("好a,!:;?， ") for _ in range(rng.randrange(12)))
        twice = text
        for half, full in zip(",!:;?", "，！：；？"):
            twice = re.sub(rf"([\u4e00-\u9fff])\{half}", rf"\1{full}", twice)
            twice = re.sub(rf"\{half}([\u4e00-\u9fff])", rf"{full}\1", twice)
        assert full_width(text) == twice
        stream, shown, place = FullWidthStream(), "", 0
        while place < len(text):
            count = rng.randrange(4)
            shown += stream.push(text[place : place + count])
            place += count
        assert shown + stream.finish() == twice


def test_generation_4_replies(four: ChatGLM4Tokenizer) -> None:
    messages = [Message("assistant", "我来查询 🙂"), Message("assistant", ' {"city": "北京"}', "get_weather")]
    ids: list[int] = []
    for number, message in enumerate(messages):
        ids += [four.get_command("<|assistant|>")] * number + answer_ids(four, message, last=False)
    stream, deltas = ReplyStream(four), []
    for token in [*ids, four.get_command("<|observation|>")]:
        deltas += stream.push(token)
    deltas += stream.finish()
    assert stream.messages == messages
    assert all("\ufffd" not in delta.text for delta in deltas)
    assert parse_reply(four, ids).call == ToolCall("get_weather", {"city": "北京"})
    for content, problem in (("tool_call(city=1)", "no JSON"), ("[1]", "JSON list"), ('{"a": NaN}', "no JSON")):
        parsed = parse_reply(four, answer_ids(four, Message("assistant", content, "get_weather")))
        assert parsed.call is None
        assert problem in (parsed.problem or "")
    code = parse_reply(four, answer_ids(four, Message("assistant", "print(1)", "python")))
    assert code.call is code.problem is None
    assert code.messages == [Message("assistant", "print(1)", "python")]


def test_a_tokenizer_without_a_chat_format(four: ChatGLM4Tokenizer) -> None:
    with pytest.raises(UsageError, match="without a chat format"):
        chat_format(type("Blanks", (), {"generation": 0})())


def test_the_marker_as_text_divides_nothing(three: ChatGLMTokenizer) -> None:
    parsed = parse_reply(three, generated(three, Message("assistant", "write <|assistant|>get_weather\nlike this")))
    assert parsed.messages == [Message("assistant", "write <|assistant|>get_weather\nlike this")]


def test_malformed_calls_come_back_as_text(three: ChatGLMTokenizer) -> None:
    content = "```python\nimport os\n```"
    parsed = parse_reply(three, generated(three, Message("assistant", content, "get_weather")))
    assert parsed.messages == [Message("assistant", content, "get_weather")]
    assert parsed.call is None
    assert "import os" in (parsed.problem or "")
    code = parse_reply(three, generated(three, Message("assistant", "```python\nprint(1)\n```", "interpreter")))
    assert code.call is code.problem is None


# --- tool calls ---


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("tool_call()", {}),
        (
            "tool_call(city='北京', n=-3, x=2.5, ok=True, no=None)",
            {"city": "北京", "n": -3, "x": 2.5, "ok": True, "no": None},
        ),
        (
            "tool_call(a=[1, (2, -3.5)], b={'k': {1: 'v'}, None: []})",
            {"a": [1, (2, -3.5)], "b": {"k": {1: "v"}, None: []}},
        ),
        ("```python\ntool_call(s='a\\nb')\n```", {"s": "a\nb"}),
        (" ```python\ntool_call(\n    s='```',\n)\n```\n", {"s": "```"}),
        ("```python\ntool_call(s=1)", {"s": 1}),
        ("```\ntool_call(s='a' 'b')\n```", {"s": "ab"}),
    ],
)
def test_tool_calls(text: str, arguments: dict) -> None:
    assert parse_tool_call(text) == arguments


@pytest.mark.parametrize(
    "text",
    [
        "",
        "print(1)",
        "tool_call",
        "tool_call(1)",
        "tool_call(*[1])",
        "tool_call(**{'a': 1})",
        "tool_call(a=b)",
        "tool_call(a=f'{1}')",
        "tool_call(a=1+1)",
        "tool_call(a=+1)",
        "tool_call(a=-'x')",
        "tool_call(a=-True)",
        "tool_call(a=not 1)",
        "tool_call(a={1, 2})",
        "tool_call(a={**{}})",
        "tool_call(a={(1,): 2})",
        "tool_call(a=b'x')",
        "tool_call(a=1j)",
        "tool_call(a=1e999)",
        "tool_call(a=...)",
        "tool_call(a=1, a=2)",
        "tool_call(a=[x for x in y])",
        "tool_call(a=__import__('os').system('true'))",
        "tool_call(a=1); tool_call(a=2)",
        "tool_call(a=1)(b=2)",
        "os.tool_call(a=1)",
        "x = tool_call(a=1)",
        "tool_call(a=1)\ntool_call(a=2)",
        "```python\ntool_call(a=1)\n```\ntext",
        "tool_call(a='\0')",
        "tool_call(a=" + "9" * 5000 + ")",
        "tool_call(a=" + "[" * 60 + "]" * 60 + ")",
        "tool_call(a=" + "[" * 30_000 + "]" * 30_000 + ")",
        "tool_call(a=" + "-" * 60_000 + "1)",
        "tool_call(a='" + "x" * 70_000 + "')",
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ToolCallError) as caught:
        parse_tool_call(text)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a": 1} x',
        "[1]",
        "1",
        "null",
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": ' + "9" * 5000 + "}",
        '{"a": ' + "[" * 60 + "]" * 60 + "}",
        '{"a": ' + "[" * 30_000 + "]" * 30_000 + "}",
        '{"a": "' + "x" * 70_000 + '"}',
        "{'a': 1}",
    ],
)
def test_json_calls_that_are_refused(text: str) -> None:
    with pytest.raises(ToolCallError) as caught:
        parse_json_call(text)
    assert len(caught.value.message) < 500


def test_json_calls() -> None:
    arguments = {"city": "北京", "n": [-3, 2.5, True, None], "deep": {"a": {"b": []}}}
    assert parse_json_call(json.dumps(arguments, ensure_ascii=False, indent=2)) == arguments
    assert parse_json_call(" {}\n") == {}


def test_tool_calls_equal_python_literals() -> None:
    """Against Python's own reader of literals, on random values."""
    rng = random.Random(6)

    def value(depth: int) -> object:
        kind = rng.randrange(9 if depth else 5)
        if kind < 5:
            return [rng.randint(-(10**12), 10**12), rng.uniform(-1e6, 1e6), "北'京\"\n\\x", rng.random() < 0.5, None][
                kind
            ]
        items = [value(depth - 1) for _ in range(rng.randrange(4))]
        return [items, tuple(items), {str(number): item for number, item in enumerate(items)}, items][kind - 5]

    for _ in range(300):
        arguments = {f"a{number}": value(4) for number in range(rng.randrange(5))}
        code = f"tool_call({', '.join(f'{name}={one!r}' for name, one in arguments.items())})"
        assert parse_tool_call(code) == arguments
        assert all(ast.literal_eval(repr(one)) == one for one in arguments.values())


# --- the stored inputs of the official class ---


def test_official_prompts_of_generation_1(shared: Path) -> None:
    tokenizer = ChatGLM1Tokenizer(shared / "tokenizers" / "chatglm-6b.ice_text.model")
    fixtures = shared / "conformance" / "tokenizer_chatglm" / "chatglm" / "fixtures.json"
    for case in json.loads(fixtures.read_text(encoding="utf-8"))["chat"]:
        format_ = chat_format(tokenizer)
        assert format_.text(case["query"], case["history"]) == case["prompt"]  # type: ignore[union-attr]
        if "[MASK]" not in case["prompt"]:  # which the official code reads as a control token
            ids = prompt_ids(tokenizer, to_messages(case["query"], case["history"]))
            assert [ids] == case["chat_generate_kwargs"]["input_ids"]


def test_official_prompts_of_generation_4(shared: Path) -> None:
    tokenizer = ChatGLM4Tokenizer(shared / "tokenizers" / "glm4" / "tokenizer.model")
    fixtures = shared / "conformance" / "tokenizer_glm" / "glm4.json"
    for case in json.loads(fixtures.read_text(encoding="utf-8"))["chats"]:
        assert prompt_ids(tokenizer, to_messages(case["messages"])) == case["ids"]


def test_official_training_rows_of_generation_1(shared: Path) -> None:
    numpy = pytest.importorskip("numpy")
    tokenizer = ChatGLM1Tokenizer(shared / "tokenizers" / "chatglm-6b.ice_text.model")
    folder = shared / "conformance" / "chatglm"
    arrays = numpy.load(folder / "arrays.npz")
    texts = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["texts"]
    rows = zip(texts["prompts"], texts["answers"], arrays["train.in.input_ids"], arrays["train.in.labels"])
    for prompt, answer, input_ids, labels in rows:
        ids, learnt = conversation_ids(tokenizer, [Message("user", prompt), Message("assistant", answer)])
        padding = len(input_ids) - len(ids)
        assert [*ids, *[tokenizer.pad_token_id] * padding] == input_ids.tolist()
        assert [i if t else -100 for i, t in zip(ids, learnt)] + [-100] * padding == labels.tolist()


@pytest.mark.parametrize("generation", [2, 3])
def test_official_prompts(shared: Path, generation: int) -> None:
    file = shared / "tokenizers" / "chatglm2-chatglm3.tokenizer.model"
    fixtures = shared / "conformance" / "tokenizer_chatglm" / f"chatglm{generation}" / "fixtures.json"
    tokenizer = ChatGLMTokenizer(file, generation=generation)
    for case in json.loads(fixtures.read_text(encoding="utf-8"))["chat"]:
        last = {"role": case.get("role", "user"), "content": case["query"]}
        ids = [prompt_ids(tokenizer, to_messages(last, case["history"]))]
        assert ids == case["chat_generate_kwargs"]["input_ids"]
        if generation == 2:
            assert tokenizer.build_prompt(case["query"], case["history"]) == case["prompt"]
        else:
            built = tokenizer.build_chat_input(case["query"], case["history"], case["role"])
            assert {key: value.tolist() for key, value in built.items()} == case["build_chat_input"]
