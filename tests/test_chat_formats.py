"""Messages to ids, ids to messages, and tool calls."""

from __future__ import annotations

import ast
import json
import random
from pathlib import Path

import pytest

from glmkit.chat.messages import Message, to_messages
from glmkit.chat.reply import Delta, ReplyStream, parse_reply
from glmkit.chat.templates import answer_ids, conversation_ids, prompt_ids
from glmkit.chat.tools import TOOLS_SENTENCE, ToolCall, ToolCallError, documented_tools, parse_tool_call
from glmkit.errors import UsageError
from glmkit.tokenizers import ChatGLMTokenizer
from test_tokenizer import small_file as small_file  # the small vocabulary trained there
from test_tokenizer import train

WEATHER = {"name": "get_weather", "description": "查询天气", "parameters": {"city": {"type": "string"}}}
CALL = "```python\ntool_call(city='北京')\n```"


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(train(tmp_path_factory.mktemp("three") / "tokenizer.model"), generation=3)


@pytest.fixture(scope="module")
def two(three: ChatGLMTokenizer) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(three.vocab_file, generation=2)


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


def test_only_answers_can_be_learnt(three: ChatGLMTokenizer, two: ChatGLMTokenizer) -> None:
    for tokenizer in (two, three):
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
