"""The web app without a browser: conversations and their turns, what is shown, who may come in, and models."""

from __future__ import annotations

import asyncio
import json
import random
import re
import string
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

import glmkit
from glmkit.chat.following import serve
from glmkit.chat.messages import Message
from glmkit.chat.store import ConversationStore
from glmkit.chat.templates import prompt_ids
from glmkit.errors import UsageError
from glmkit.tools.examples import SAFE_TOOLS
from glmkit.tools.registry import Registry
from glmkit.tools.schema import read_definitions
from glmkit.web import launch as launching
from glmkit.web.actions import Actions
from glmkit.web.app import create_app
from glmkit.web.desk import Desk
from glmkit.web.gate import TOKEN_HEADER, Access
from glmkit.web.interpreters import Interpreters, Isolation
from glmkit.web.login import COOKIE, Passwords, Sessions
from glmkit.web.models import Models
from glmkit.web.page import build
from glmkit.web.talks import Note, Talk
from glmkit.web.texts import EXAMPLES, LANGUAGES, MODES, TEXTS, say
from glmkit.web.toolbox import EXAMPLE
from glmkit.web.turns import prompt_messages
from glmkit.web.view import JOINER, original, plain_markdown, prompt_pieces, rows, safe_markdown
from scripted import scripted

pytest.importorskip("gradio")
PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 32


@dataclass
class FakeKernel:
    """Runs nothing; gives a picture for code that plots."""

    ran: list[str] = field(default_factory=list)

    async def run(self, code: str) -> Any:
        self.ran.append(code)
        images = (PNG,) if "plot" in code else ()
        return SimpleNamespace(text="4950", images=images, failed=False, seconds=0.01)

    async def reset(self) -> None: ...

    async def interrupt(self) -> None: ...

    def files(self) -> list[Any]:
        return [SimpleNamespace(name="a b.csv", size_bytes=12)]

    def read_file(self, name: str) -> bytes:
        if name != "a b.csv":
            raise UsageError("there is no such file")
        return b"<script>1"


class FakePool:
    def __init__(self) -> None:
        self.kernels: dict[str, FakeKernel] = {}

    def of(self, conversation: str) -> FakeKernel:
        return self.kernels.setdefault(conversation, FakeKernel())

    async def drop(self, conversation: str) -> None:
        self.kernels.pop(conversation, None)

    async def close(self) -> None:
        self.kernels.clear()


def say_it(prompt: str) -> Message:
    """The script: a tool for the weather, code for plots, else a long answer."""
    asked = prompt.rstrip().splitlines()[-1]
    if "}" in asked or "4950" in prompt:
        return Message("assistant", "北京今天晴。")
    if "weather" in asked:
        return Message("assistant", "", "get_weather", arguments={"city": "北京"})
    if "secret" in asked:
        return Message("assistant", "", "open_door", arguments={"code": "1234"})
    if "plot" in asked:
        return Message("assistant", "```python\nplot(sum(range(100)))\n```", "interpreter")
    return Message("assistant", "一二三四五六七八九十" * 6)


def open_door(code: str) -> str:
    """Open the door."""
    return f"opened {code}"


def make_desk(folder: Path, *, seconds: float = 0.0, served: Any = None, extra: bool = False) -> Desk:
    registry = Registry(SAFE_TOOLS)
    if extra:
        from typing import Annotated

        open_door.__annotations__["code"] = Annotated[str, "the code"]
        registry.add(open_door)
    isolation = Isolation("full", {"zh": "已隔离", "en": "isolated"})
    served = served or scripted(say_it, seconds)
    safe = [tool.name for tool in SAFE_TOOLS] + ["interpreter"]
    return Desk(
        ConversationStore(folder),
        Models.of({"glm-nano": served}),
        registry,
        safe,
        Interpreters(FakePool(), isolation),
        ["get_weather", "calculator", *(["open_door"] if extra else [])],
    )


def run(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), 30))


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


# --- words ---


def test_both_languages_have_the_same_texts_and_blanks() -> None:
    def blanks(text: str) -> list[str]:
        return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name)

    assert {key: blanks(text) for key, text in TEXTS["zh"].items()} == {
        key: blanks(text) for key, text in TEXTS["en"].items()
    }
    assert all(text.strip() for texts in TEXTS.values() for text in texts.values())
    for language in LANGUAGES:
        assert set(EXAMPLES[language]) == set(MODES)
        assert all(EXAMPLES[language][mode] for mode in MODES)
    chinese = [text for text in TEXTS["zh"].values() if re.search(r"[\u4e00-\u9fff]", text)]
    assert len(chinese) > 0.9 * len(TEXTS["zh"])
    assert not [text for text in TEXTS["en"].values() if re.search(r"[\u4e00-\u9fff]", text)]


def test_every_text_is_used_and_every_used_text_is_there() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in Path(launching.__file__).parent.glob("*.py"))
    built = {f"{stem}_{mode}" for stem in ("mode", "greeting", "about", "placeholder") for mode in MODES}
    built |= {"export_md", "export_json", "export_html"}
    code = code.replace("'", '"')
    unused = [key for key in TEXTS["en"] if f'"{key}"' not in code.replace(f'    "{key}": ', "") and key not in built]
    assert unused == []
    assert set(re.findall(r'\bsay\([a-z_.]+, "(\w+)"', code)) <= set(TEXTS["en"])


# --- a model's text on the page ---


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "a <img src=x onerror=alert(1)> b",
        "<svg><animate onbegin=alert(1)></svg>",
        "<math><mtext></mtext></math>",
        "<!-- --><iframe src='//evil'>",
        "</span><form action=//evil>",
        "> <b>quoted",
        "- <style>*{display:none}</style>",
        "`a` <u> `b`",
        "$x$ <u> $y$",
    ],
)
def test_a_models_text_begins_no_tag(text: str) -> None:
    shown = safe_markdown(text)
    assert re.search(r"<[A-Za-z/!?]", re.sub(r"`[^`]*`", "", shown)) is None
    assert original(shown) == text


@pytest.mark.parametrize("scheme", ["javascript", "JavaScript", "java\tscript", "vbscript", "data", "file"])
def test_links_that_would_run_something_are_text(scheme: str) -> None:
    for text in (f"[x]({scheme}:alert(1))", f"[x]( {scheme}:alert(1))", f"[x]: {scheme}:alert(1)", f"<{scheme}:a>"):
        shown = safe_markdown(text)
        assert re.search(r"\][(:]|<\w", shown) is None
        assert original(shown) == text


def test_images_of_other_machines_become_links() -> None:
    shown = safe_markdown(
        "![secret](https://evil.example/a.png?q=chat) ![x][y]\n\n[y]: https://evil.example/b.png", "en"
    )
    assert "![" not in shown.replace("!" + JOINER, "")
    assert "[🖼 secret (remote image, not loaded)](https://evil.example/a.png?q=chat)" in shown
    own = f"![a](/figures/{'0' * 32}/{'1' * 16}.png)"
    assert safe_markdown(own) == own


@pytest.mark.parametrize(
    "text",
    ["\\[", "![", "![](a ", "$$ ", "$a", "`a``b```c", "](" + " " * 100_000, "![](" + "a" * 100_000, "\n", "<"],
    ids=lambda text: text[:8],
)
def test_no_text_takes_long_to_be_shown(text: str) -> None:
    text = (text * (100_000 // len(text) + 1))[:100_000]
    began = time.process_time()
    original(safe_markdown(text))
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize("text", ["\\`<img>`", "`a\n\n<img>\n\n`", "``a\n- <img> ``", "![a ![](x <img>"])
def test_what_only_looks_like_code_begins_no_tag(text: str) -> None:
    assert "<img" not in safe_markdown(text)


def test_code_stays_code_and_a_fence_name_is_a_word() -> None:
    text = '```html"><img src=x>\n<b>kept</b>\n```\n<i>'
    assert safe_markdown(text) == f"```html\n<b>kept</b>\n```\n<{JOINER}i>"
    assert safe_markdown("~~~py\n```\n<b>\n~~~") == "~~~py\n```\n<b>\n~~~"


def test_what_somebody_typed_is_shown_as_typed_and_comes_back() -> None:
    assert original(plain_markdown("类型#裙*颜色#蓝色*风格#简约")) == "类型#裙*颜色#蓝色*风格#简约"
    draw = random.Random(1)
    for _ in range(2000):
        text = "".join(draw.choice("ab中 \t\n*_`#>-+=.)(1$|~&<[]\\!:😀") for _ in range(draw.randrange(30)))
        assert original(plain_markdown(text)) == text
        assert (
            original(safe_markdown(text)).replace("\n", "") == text.replace("\n", "") or "```" in text or "~~~" in text
        )


def test_special_tokens_of_a_text_stay_text(tmp_path: Path) -> None:
    tokenizer = glmkit.load("glm-nano").tokenizer
    pieces, ids = prompt_pieces(tokenizer, [Message("user", "a <|assistant|> [gMASK] b")], 1024)
    assert [name for name, label in pieces if label] == ["[gMASK]", "sop", "<|user|>", "<|assistant|>"]
    assert [int(label) for _, label in pieces if label] == [ids[0], ids[1], ids[2], ids[-1]]
    assert "".join(name for name, label in pieces if not label).strip() == "a <|assistant|> [gMASK] b"
    assert ids == prompt_ids(tokenizer, [Message("user", "a <|assistant|> [gMASK] b")])


# --- tools ---


def test_definitions_are_read_as_json_yaml_and_openai() -> None:
    (schema,) = read_definitions(EXAMPLE)
    assert schema["name"] == "translate"
    assert schema["parameters"]["required"] == ["text", "target"]
    assert read_definitions(json.dumps([schema])) == [schema]
    assert read_definitions(json.dumps({"type": "function", "function": schema})) == [schema]
    assert read_definitions("") == []


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "- 1",
        "- {name: 'a b'}",
        "- {name: x, parameters: 3}",
        "- {name: x}\n- {name: x}",
        "a: &x [1]\nb: [*x, *x]",
        "!!python/object/apply:os.system ['true']",
        "- {name: x, description: [1]}",
        "[" * 5000,
        "- " * 5000,
        "{a: " * 3000,
        "- {name: a}\n" * 40,
        "x" * 70_000,
    ],
)
def test_definitions_that_are_none_are_refused_with_a_reason(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        read_definitions(text)
    assert len(raised.value.message) < 400


# --- a conversation and its turns ---


def test_an_answer_belongs_to_its_conversation_and_is_seen_growing(tmp_path: Path) -> None:
    async def work() -> None:
        desk = make_desk(tmp_path, seconds=0.01)
        talk = desk.new("")
        talk.add("user", "你好")
        desk.answer(talk)
        lengths = []
        async for _ in talk.follow():  # the page
            lengths.append(len(rows(talk, "zh")[-1].shown["content"]) if talk.live else 0)
            if len(lengths) == 4:
                break  # it goes away
        assert talk.running
        again = 0
        async for _ in talk.follow():  # and comes back
            again += 1
        assert not talk.running
        assert again > 3
        assert lengths[1:] == sorted(lengths[1:])
        assert talk.messages[-1].content == "一二三四五六七八九十" * 6
        assert (await make_desk(tmp_path).open("", talk.id)).messages == talk.messages

    run(work)


def test_stop_frees_the_model_within_one_token(tmp_path: Path) -> None:
    served = serve(glmkit.load("glm-nano"), "glm-nano")

    async def work() -> None:
        desk = make_desk(tmp_path, served=served)
        talk = desk.new("")
        talk.settings = {"banned_ids": [[token] for token in served.tokenizer.stop_ids]}  # never ends by itself
        talk.add("user", "你好")
        desk.answer(talk)
        await until(lambda: talk.live and len(talk.live[-1].text) > 5)
        before = served.engine.state().generated_tokens
        talk.stop()
        await talk.finished()
        assert served.engine.state().generated_tokens - before <= 2  # the one in work, and one that was done unseen
        await until(lambda: served.engine.state().running == 0)
        assert talk.notes[1].finish_reason == "cancelled"
        assert talk.cut

    try:
        run(work)
    finally:
        served.close()


def test_a_cut_answer_goes_on_to_what_it_would_have_been(tmp_path: Path) -> None:
    served = serve(glmkit.load("glm-nano"), "glm-nano")

    async def work() -> None:
        desk = make_desk(tmp_path, served=served)
        whole, cut = desk.new(""), desk.new("")
        cut.settings = {"max_new_tokens": 6}
        for talk in (whole, cut):
            talk.settings["temperature"] = 0.0
            talk.add("user", "你好")
            desk.answer(talk)
            await talk.finished()
        assert cut.cut
        assert whole.messages[-1].content.startswith(cut.messages[-1].content)
        cut.settings = {"temperature": 0.0}
        desk.go_on(cut)
        await cut.finished()
        assert cut.problem == ""
        assert cut.messages == whole.messages
        assert not cut.cut

    try:
        run(work)
    finally:
        served.close()


def test_a_tool_runs_and_the_second_prompt_is_in_the_models_format(tmp_path: Path) -> None:
    async def work() -> None:
        desk = make_desk(tmp_path)
        served = desk.models.get("glm-nano")
        talk = desk.new("", "tools")
        talk.add("user", "weather?")
        desk.answer(talk)
        await talk.finished()
        call, observation, answer = talk.messages[1:]
        assert call.metadata == "get_weather"
        assert answer.content == "北京今天晴。"
        expected = [
            Message("system", "", tools=[tool.schema() for tool in desk.registry if tool.name in talk.offered]),
            Message("user", "weather?"),
            Message("assistant", "", "get_weather", arguments={"city": "北京"}),
            Message("observation", observation.content),
        ]
        assert served.engine.prompts[1] == prompt_ids(served.tokenizer, expected)
        panel = rows(talk, "zh")[1].shown
        assert panel["metadata"]["title"] == "调用工具 get_weather · city: 北京"
        assert panel["metadata"]["status"] == "done"
        assert panel["metadata"]["duration"] >= 0
        assert "weather" in panel["content"]
        again = await make_desk(tmp_path).open("", talk.id)
        assert (again.mode, set(again.offered), again.messages) == ("tools", set(talk.offered), talk.messages)

    run(work)


def test_by_hand_the_next_input_is_the_observation(tmp_path: Path) -> None:
    async def work() -> None:
        desk = make_desk(tmp_path)
        page = build("en")
        actions, request = Actions(page, desk, "en"), SimpleNamespace(username="")
        talk = desk.new("", "tools")
        controls = ("", "", None, None, None, None, ["get_weather"], True, EXAMPLE)
        await actions.send("weather?", talk.id, "en", request, controls)
        await talk.finished()
        assert talk.pending == "get_weather"
        updates = await actions.show.whole(talk, "en")
        assert "get_weather" in updates[page.input]["placeholder"]
        await actions.send('{"weather": "hail"}', talk.id, "en", request, controls)
        await talk.finished()
        assert [message.role for message in talk.messages] == ["user", "assistant", "observation", "assistant"]
        assert talk.messages[2].content == '{"weather": "hail"}'
        assert talk.notes[2].by_hand
        assert [tool["name"] for tool in prompt_messages(talk, desk.registry, 3)[0].tools] == [
            "get_weather",
            "translate",
        ]

    run(work)


@pytest.mark.parametrize(("answer", "opened"), [("once", True), ("always", True), ("no", False), ("stop", False)])
def test_a_tool_that_is_not_known_to_be_safe_asks_first(tmp_path: Path, answer: str, opened: bool) -> None:
    async def work() -> None:
        desk = make_desk(tmp_path, extra=True)
        talk = desk.new("", "tools")
        talk.add("user", "secret")
        desk.answer(talk)
        await until(lambda: talk.asking is not None)
        assert (talk.asking.name, talk.asking.arguments) == ("open_door", {"code": "1234"})
        if answer == "stop":
            talk.stop()
        else:
            talk.decide(answer != "no", always=answer == "always")
        await until(lambda: talk.asking is None)
        talk.stop()
        await talk.finished()
        observed = [message.content for message in talk.messages if message.role == "observation"]
        assert ("opened 1234" in observed[:1]) is opened
        assert talk.allowed == ({"open_door"} if answer == "always" else set())

    run(work)


def test_code_runs_in_its_interpreter_and_its_figure_is_seen_by_its_owner_only(tmp_path: Path) -> None:
    async def work() -> None:
        desk = make_desk(tmp_path)
        talk = desk.new("ann", "code")
        talk.add("user", "plot")
        desk.answer(talk)
        await talk.finished()
        assert desk.interpreters.of(talk.id).ran == ["plot(sum(range(100)))"]
        (name,) = talk.figures
        shown = [row.shown["content"] for row in rows(talk, "en")]
        assert f"![Figure 1](/figures/{talk.id}/{name})" in shown
        assert "[Image]" not in "".join(shown)
        passwords = Passwords(["ann:one-password", "bob:two-password"])
        access = Access(Sessions(), passwords)
        async with browser(create_app(desk, access)) as client:
            for user, status in (("ann", 200), ("bob", 404)):
                client.cookies.set(COOKIE, access.sessions.begin(user))
                for path in (f"/figures/{talk.id}/{name}", f"/export/{talk.id}.md", f"/files/{talk.id}/a%20b.csv"):
                    answer = await client.get(path)
                    assert answer.status_code == status, (user, path)
                    assert "sandbox" in answer.headers["content-security-policy"]
                    assert status == 404 or "figures" in path or "attachment" in answer.headers["content-disposition"]
        again = await make_desk(tmp_path).open("ann", talk.id)
        assert list(again.figures.values()) == [PNG]

    run(work)


def test_without_isolation_the_mode_is_off_and_says_why(tmp_path: Path) -> None:
    async def work() -> None:
        desk = make_desk(tmp_path)
        desk.interpreters = Interpreters(None, reason="no namespaces here")
        actions = Actions(build("en"), desk, "en")
        talk = desk.new("", "code")
        updates = await actions.show.whole(talk, "en")
        assert updates[actions.page.input]["interactive"] is False
        assert "no namespaces here" in updates[actions.page.chat]["placeholder"]
        with pytest.raises(UsageError, match="no namespaces here"):
            await actions.send("plot", talk.id, "en", SimpleNamespace(username=""), CONTROLS)
        assert talk.messages == []

    run(work)


CONTROLS = ("", "", None, None, None, None, ["get_weather"], False, "")


def test_retry_undo_edit_and_clear(tmp_path: Path) -> None:
    async def work() -> None:
        desk = make_desk(tmp_path)
        actions = Actions(build("zh"), desk, "zh")
        request, page = SimpleNamespace(username=""), actions.page
        talk = desk.new("")
        for text in ("一*问*", "二问"):
            await actions.send(text, talk.id, "zh", request, CONTROLS)
            await talk.finished()
        await actions.retry(talk.id, "zh", request, CONTROLS)
        await talk.finished()
        assert [message.content for message in talk.messages if message.role == "user"] == ["一*问*", "二问"]
        places = [row.place for row in rows(talk, "zh")]
        answer = SimpleNamespace(index=places.index(1), value="改过的 <b>")
        await actions.edit(answer, talk.id, "zh", request, CONTROLS)
        assert talk.messages[1].content == "改过的 <b>"
        assert len(talk.messages) == 4
        undone = await actions.undo(talk.id, "zh", request)
        assert undone[page.input]["value"] == "二问"
        assert len(talk.messages) == 2
        question = SimpleNamespace(index=[places.index(0)], value=plain_markdown("新*问"))
        await actions.edit(question, talk.id, "zh", request, CONTROLS)
        await talk.finished()
        assert [message.content[:4] for message in talk.messages] == ["新*问", "一二三四"]
        cleared = await actions.clear(talk.id, "zh", request)
        assert cleared[page.chat]["value"] == []
        assert desk.entries("") == ()

    run(work)


def test_sliders_begin_at_the_models_values_and_say_what_was_changed(tmp_path: Path) -> None:
    async def work() -> None:
        desk = make_desk(tmp_path)
        actions, request = Actions(build("en"), desk, "en"), SimpleNamespace(username="")
        talk = desk.new("")
        sliders = actions.show.slider_parts(talk, "en")
        own = [sliders[slider]["value"] for slider in actions.page.sliders]
        assert own[0] == 1024
        assert all(sliders[slider]["info"].startswith("default") for slider in actions.page.sliders)
        controls = ("", "be kind", *own[:2], 1.5, own[3], [], False, "")
        updates = await actions.apply(talk.id, "en", request, controls)
        assert talk.settings == {"temperature": 1.5}
        assert updates[actions.page.temperature]["info"].startswith("changed")
        assert talk.system == "be kind"
        await actions.reset(talk.id, "en", request)
        assert talk.settings == {}

    run(work)


def test_turns_that_fell_out_of_the_context_are_told(tmp_path: Path) -> None:
    async def work() -> None:
        desk = make_desk(tmp_path)
        actions, request = Actions(build("en"), desk, "en"), SimpleNamespace(username="")
        talk = desk.new("")
        for _ in range(9):
            await actions.send("问" * 120, talk.id, "en", request, CONTROLS)
            await talk.finished()
        assert talk.context.dropped_turns > 0
        updates = actions.show.moving(talk, "en")
        assert f"({talk.context.dropped_turns})" in updates[actions.page.meter]
        assert 'role="meter"' in updates[actions.page.meter]
        assert any(
            say("en", "forgotten", count=talk.context.dropped_turns) in row.shown["content"] for row in rows(talk, "en")
        )

    run(work)


def test_nobody_reaches_the_conversation_of_another(tmp_path: Path) -> None:
    async def work() -> None:
        desk = make_desk(tmp_path)
        actions = Actions(build("en"), desk, "en")
        talk = desk.new("ann")
        talk.add("user", "hello")
        await desk.save(talk)
        bob = SimpleNamespace(username="bob")
        for action in (
            actions.send("x", talk.id, "en", bob, CONTROLS),
            actions.retry(talk.id, "en", bob, CONTROLS),
            actions.stop(talk.id, bob),
            actions.clear(talk.id, "en", bob),
            actions.open(talk.id, "en", bob),
            actions.show_prompt("", talk.id, bob),
            actions.rename("x", talk.id, "en", bob),
        ):
            with pytest.raises(UsageError, match="no conversation"):
                await action
        assert desk.entries("bob") == ()
        assert [entry.title for entry in desk.entries("ann", "HELLO")] == ["hello"]
        loaded = await actions.load("en", talk.id, bob)  # gets a new one instead
        assert loaded[actions.page.talk_id] != talk.id

    run(work)


def test_two_people_talk_at_once_and_share_no_cache(tmp_path: Path) -> None:
    async def work() -> None:
        desk = make_desk(tmp_path, seconds=0.005)
        talks = [desk.new(owner) for owner in ("ann", "bob")]
        for talk in talks:
            talk.add("user", "你好")
            desk.answer(talk)
        assert all(talk.running for talk in talks)
        for talk in talks:
            await talk.finished()
        assert sorted(desk.models.get("glm-nano").engine.owners) == ["ann", "bob"]
        assert all(len(talk.messages) == 2 for talk in talks)

    run(work)


def test_a_failure_is_a_number_on_the_page_and_the_next_turn_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        desk = make_desk(tmp_path)
        served = desk.models.get("glm-nano")
        stream, served.engine.stream = served.engine.stream, None
        talk = desk.new("")
        talk.add("user", "你好")
        desk.answer(talk)
        await talk.finished()
        assert re.fullmatch(r"error [0-9a-f]{8}", talk.problem)
        assert talk.problem.split()[1] in caplog.text
        served.engine.stream = stream
        desk.answer(talk)
        await talk.finished()
        assert talk.problem == ""
        assert len(talk.messages) == 2

    run(work)


def test_a_file_of_somebody_is_taken_in_and_export_gives_it_back(tmp_path: Path) -> None:
    async def work() -> None:
        desk = make_desk(tmp_path)
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello <b>"}]
        talk = await desk.take_in("", json.dumps({"messages": messages}).encode())
        assert [(message.role, message.content) for message in talk.messages] == [
            ("user", "hi"),
            ("assistant", "hello <b>"),
        ]
        assert json.loads(desk.export(talk, "json", "en"))["messages"] == messages
        assert "hello &lt;b&gt;" in desk.export(talk, "html", "en")
        assert "hi" in desk.export(talk, "md", "zh")
        with pytest.raises(UsageError):
            await desk.take_in("", b"\x00\xff")
        with pytest.raises(UsageError):
            desk.export(talk, "../../x", "en")

    run(work)


# --- models ---


def test_a_model_that_does_not_fit_is_refused_and_idle_ones_make_room() -> None:
    closed: list[str] = []

    def load(name: str) -> Any:
        return SimpleNamespace(name=name, close=lambda: closed.append(name), loaded=SimpleNamespace(adapters=None))

    async def work() -> None:
        sizes = {"a": 60, "b": 60, "huge": 1000}
        models = Models(list(sizes), load, estimate=sizes.__getitem__, limit_bytes=100)
        assert (await models.estimate("huge")).fits is False
        with pytest.raises(UsageError, match="huge needs"):
            await models.load("huge")
        await models.load("a")
        assert await models.load("a") is models.get("a")
        with pytest.raises(UsageError, match="not loaded"):
            models.get("b")
        with pytest.raises(UsageError, match="there is no model"):
            await models.load("../x")
        models._limit_bytes = 10
        with pytest.raises(UsageError):
            await models.load("b", busy=lambda name: True)
        assert closed == []
        with pytest.raises(UsageError):
            await models.load("b")
        assert closed == ["a"]

    run(work)


def test_the_estimate_is_that_of_inspect() -> None:
    async def work() -> None:
        estimate = await Models(["glm-nano"], lambda name: None).estimate("glm-nano")  # type: ignore[arg-type,return-value]
        assert 9e6 < estimate.need_bytes < 60e6
        assert estimate.free_bytes > 1e8

    run(work)


# --- who may come in ---


def browser(app: Any, host: str = "127.0.0.1:7860") -> Any:
    transport = httpx.ASGITransport(app=app, client=("127.0.0.1", 5000))
    return httpx.AsyncClient(transport=transport, base_url=f"http://{host}")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Access]:
    access = Access(Sessions(), Passwords(["ann:correct-horse"]), frozenset({"chat.example.org"}))
    return create_app(make_desk(tmp_path_factory.mktemp("talks")), access, "en"), access


HOSTS = [
    *(("localhost", True), ("LOCALHOST:7860", True), ("127.0.0.1", True), ("127.0.0.1:80", True), ("[::1]:7860", True)),
    *(("chat.example.org", True), ("chat.example.org:443", True), ("192.168.1.5", True)),
    *(("evil.com", False), ("localhost.evil.com", False), ("evil.com:7860", False), ("127.0.0.1.evil.com", False)),
    *(("", False), (":7860", False), ("0.0.0.0", False), ("localhost.", False), ("chat.example.org.evil.com", False)),
    *(("127.1", False), ("localhost:99999", False), ("a b", False), ("user@localhost", False), ("localhost/x", False)),
]


@pytest.mark.parametrize(("host", "allowed"), HOSTS)
def test_only_declared_hosts_are_answered(locked: tuple[Any, Access], host: str, allowed: bool) -> None:
    async def work() -> int:
        async with browser(locked[0]) as client:
            return (await client.get("/live", headers={"host": host, "x-forwarded-host": "localhost"})).status_code

    assert run(work) == (200 if allowed else 403)


ORIGINS = [
    *((None, True), ("http://127.0.0.1:7860", True)),
    *(("null", False), ("http://evil.com", False), ("http://127.0.0.1:7861", False), ("file://", False)),
    *(("http://127.0.0.1:7860.evil.com", False), ("http://evil.com/127.0.0.1:7860", False), ("", False)),
]


@pytest.mark.parametrize(("origin", "allowed"), ORIGINS)
def test_only_our_own_page_may_send(locked: tuple[Any, Access], origin: str | None, allowed: bool) -> None:
    async def work() -> int:
        headers = {} if origin is None else {"origin": origin}
        async with browser(locked[0]) as client:
            return (await client.get("/live", headers=headers)).status_code

    assert run(work) == (200 if allowed else 403)


def test_every_route_is_closed_to_those_who_did_not_sign_in(locked: tuple[Any, Access]) -> None:
    def paths(routes: Any, prefix: str = "") -> list[str]:
        found = []
        for route in routes:
            inner = getattr(route, "routes", None) or getattr(getattr(route, "app", None), "routes", None)
            path = prefix + getattr(route, "path", "")
            found += paths(inner, path) if inner else [re.sub(r"\{[^}]*\}", "x", path) or "/"]
        return found

    async def work() -> None:
        opened = {"/live", "/login", "/glm/page.css", "/favicon.ico"}
        every = paths(locked[0].routes)
        assert len(every) >= 28
        async with browser(locked[0]) as client:
            for path in every:
                for method in ("GET", "POST", "PUT", "OPTIONS"):
                    answer = await client.request(method, path, headers={"cookie": f"{COOKIE}=wrong"})
                    if path in opened:
                        continue
                    assert answer.status_code in (303, 401), (method, path)
                    assert method == "GET" or answer.status_code == 401
            assert (await client.get("/")).headers["location"] == "/login"
            for odd in (
                "//config",
                "/CONFIG",
                "/%63onfig",
                "/login/../config",
                "/gradio_api/info",
                "/glm/page.css/../x",
            ):
                assert (await client.get(odd)).status_code in (303, 401, 404), odd

    run(work)


def test_signing_in_gives_a_cookie_that_scripts_and_other_sites_cannot_use(locked: tuple[Any, Access]) -> None:
    async def work() -> None:
        async with browser(locked[0]) as client:
            wrong = await client.post("/login", data={"user": "ann", "password": "wrong"})
            assert (wrong.status_code, COOKIE in wrong.headers.get("set-cookie", "")) == (401, False)
            assert (await client.post("/login", data={"user": "bob", "password": "correct-horse"})).status_code == 401
            many = {f"field{number}": "x" for number in range(20)}
            assert (await client.post("/login", data=many)).status_code == 401
            good = await client.post("/login", data={"user": "ann", "password": "correct-horse"})
            cookie = good.headers["set-cookie"]
            assert good.status_code == 303
            assert all(word in cookie.lower() for word in ("httponly", "samesite=strict", "path=/"))
            assert "correct-horse" not in cookie
            page = await client.get("/")
            assert page.status_code == 200
            token = re.search(r'name="glm-token" content="(\w+)"', page.text)[1]
            body = {"data": [], "fn_index": 0, "session_hash": "x"}
            where = "/gradio_api/queue/join"
            assert (await client.post(where, json=body)).status_code == 403  # from a page that does not know the token
            assert (await client.post(where, json=body, headers={TOKEN_HEADER: "0" * 64})).status_code == 403
            text = {TOKEN_HEADER: token, "content-type": "text/plain"}
            assert (await client.post(where, content=json.dumps(body), headers=text)).status_code == 415
            assert (await client.post(where, json=body, headers={TOKEN_HEADER: token})).status_code not in (
                401,
                403,
                415,
            )
            large = {TOKEN_HEADER: token, "content-type": "application/json", "content-length": str(2**40)}
            assert (await client.post(where, content=b"{}", headers=large)).status_code == 413
            await client.get("/logout")
            client.cookies.set(COOKIE, cookie.split("=", 1)[1].split(";")[0])
            assert (await client.get("/config")).status_code == 401  # the old cookie is worth nothing

    run(work)


def test_guessing_is_slowed_down() -> None:
    sessions = Sessions()
    for _ in range(10):
        assert sessions.begin_try("10.0.0.1")
    assert not sessions.begin_try("10.0.0.1")  # also while all of them are still being checked
    for _ in range(20):
        assert sessions.begin_try("10.0.0.2")
        sessions.has_succeeded("10.0.0.2")


def test_the_pages_policy_lets_nothing_foreign_in(locked: tuple[Any, Access]) -> None:
    async def work() -> None:
        async with browser(locked[0]) as client:
            client.cookies.set(COOKIE, locked[1].sessions.begin("ann"))
            first, second = await client.get("/"), await client.get("/")
            policy = first.headers["content-security-policy"]
            nonce = re.search(r"'nonce-([^']+)'", policy)[1]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
            assert "http" not in policy
            assert nonce not in second.headers["content-security-policy"]
            scripts = re.findall(r"<script[^>]*>", first.text)
            assert scripts
            assert all(f'nonce="{nonce}"' in script for script in scripts)
            assert first.headers["x-content-type-options"] == "nosniff"
            assert first.headers["referrer-policy"] == "no-referrer"

    run(work)


def test_the_page_tells_no_paths_and_no_functions(locked: tuple[Any, Access]) -> None:
    async def work() -> None:
        async with browser(locked[0]) as client:
            client.cookies.set(COOKIE, locked[1].sessions.begin("ann"))
            config = (await client.get("/config")).text
            assert str(Path.home()) not in config
            assert str(Path(glmkit.__file__).parent) not in config
            parsed = json.loads(config)
            assert parsed["analytics_enabled"] is False
            assert all(one.get("api_visibility", "private") == "private" for one in parsed["dependencies"])
            info = await client.get("/gradio_api/info")
            assert info.status_code != 200 or info.json()["named_endpoints"] == {}

    run(work)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=/proc/self/cwd/x",
        "/gradio_api/file=../../etc/passwd",
        "/GRADIO_API/file=/etc/passwd",
        "/figures/x/../../etc/passwd",
        "/files/x/%2e%2e%2fpasswd",
        "/glm/..%2fapp.py",
    ],
)
def test_no_file_of_the_machine_is_given_out(locked: tuple[Any, Access], path: str) -> None:
    async def work() -> Any:
        async with browser(locked[0]) as client:
            client.cookies.set(COOKIE, locked[1].sessions.begin("ann"))
            return await client.get(path)

    answer = run(work)
    assert answer.status_code in (400, 403, 404)
    assert "root:" not in answer.text


def test_nothing_reaches_out_while_the_app_is_made_and_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    reached: list[Any] = []

    def refuse(self: Any, address: Any) -> None:
        reached.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **others: reached.append(args) or [])

    async def work() -> None:
        async with browser(create_app(make_desk(tmp_path), Access(Sessions()))) as client:
            page = await client.get("/")
            assert page.status_code == 200
            sources = re.findall(r'(?:src|href)="(https?://[^"]+)"', page.text)
            assert sources == []

    run(work)
    assert [one for one in reached if not isinstance(one, (str, bytes))] == []


# --- the command ---


def test_others_may_come_in_only_with_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launching.PASSWORD_VARIABLE, raising=False)
    for request in (
        launching.Request(("glm-nano",), host="0.0.0.0"),
        launching.Request(("glm-nano",), host="::"),
        launching.Request(("glm-nano",), share=True),
    ):
        with pytest.raises(UsageError, match="no password"):
            launching.read_passwords(request)
    assert launching.read_passwords(launching.Request(("glm-nano",))) is None
    monkeypatch.setenv(launching.PASSWORD_VARIABLE, "a-long-password")
    passwords = launching.read_passwords(launching.Request(("glm-nano",), host="0.0.0.0"))
    assert passwords.check("glm", "a-long-password")
    assert launching.PASSWORD_VARIABLE not in __import__("os").environ


def test_a_password_file_is_private_and_its_passwords_are_long(tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    file.write_text("# people\nann:correct-horse\nbob:battery-staple\n")
    file.chmod(0o644)
    with pytest.raises(UsageError, match="others may read"):
        Passwords.read(file)
    file.chmod(0o600)
    passwords = Passwords.read(file)
    assert passwords.check("bob", "battery-staple")
    assert not passwords.check("ann", "battery-staple")
    for lines in (["short"], [], ["a:12345678", "a:87654321"]):
        with pytest.raises(UsageError):
            Passwords(lines)


def test_functions_of_a_file_become_tools(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from typing import Annotated\n"
        "def greet(name: Annotated[str, 'whom']) -> str:\n    'Greet somebody.'\n    return 'hi ' + name\n"
        "def _hidden(): ...\n"
    )
    registry = launching.read_tools(file)
    assert "greet" in registry
    assert "_hidden" not in registry
    assert len(registry) == len(SAFE_TOOLS) + 1
    file.write_text("1/0")
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        launching.read_tools(file)


def test_the_app_works_in_private_folders() -> None:
    import os
    import tempfile

    before = Path.cwd()
    with launching._private_folder():
        assert Path.cwd() != before
        assert list(Path.cwd().iterdir()) == []
        for folder in (Path.cwd(), Path(tempfile.gettempdir()), Path(os.environ["GRADIO_TEMP_DIR"])):
            assert folder.stat().st_mode & 0o077 == 0
    assert Path.cwd() == before


def test_the_note_of_a_message_follows_it(tmp_path: Path) -> None:
    talk = Talk("0" * 32, "")
    talk.messages = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    talk.notes = {1: Note(tokens=3), 2: Note()}
    talk.keep(2)
    assert list(talk.notes) == [1]
    with pytest.raises(UsageError, match="empty"):
        talk.add("user", " \n")
    with pytest.raises(UsageError, match="characters"):
        talk.add("user", "x" * 300_000)
