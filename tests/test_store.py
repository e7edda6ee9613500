"""Conversations on disk: whole after a kill, found again, one owner's only, and nothing of anybody else's files."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import stat
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from glmkit.chat.interchange import export, import_conversation
from glmkit.chat.messages import Message
from glmkit.chat.store import Conversation, ConversationStore, new_id
from glmkit.chat.transcript import MAX_FILE_BYTES
from glmkit.errors import OutputError, UsageError

PNG = b"\x89PNG\r\n\x1a\nimage"
TOOL = {"name": "get_weather", "description": "天气", "parameters": {"type": "object", "properties": {}}}
TALK = (
    Message("system", "Be brief.", tools=[TOOL]),
    Message("user", "北京的天气\n怎么样？"),
    Message("assistant", "我查一下。"),
    Message("assistant", "```python\ntool_call(city='北京')\n```", "get_weather"),
    Message("observation", '{"weather": "晴"}'),
    Message("assistant", "晴。"),
    Message("user", "Draw it."),
    Message("assistant", "```python\nplt.show()\n```", "interpreter"),
    Message("observation", "[Image]"),
    Message("assistant", "Here it is."),
)


@pytest.fixture
def store(tmp_path: Path) -> ConversationStore:
    return ConversationStore(tmp_path / "talks")


def talk(*texts: str, **more: Any) -> Conversation:
    return Conversation("m", tuple(Message("user", text) for text in texts), **more)


# --- one conversation ---


def test_what_is_saved_is_read_again(store: ConversationStore) -> None:
    given = Conversation(
        "glm-nano",
        TALK,
        mode="tools",
        adapter={"ads": "a/b", "base": "c"},
        active="ads",
        settings={"temperature": 0.5, "stop": ["x"]},
        images={8: (PNG, PNG + b"2")},
    )
    before = time.time()
    saved = store.save(given)
    assert saved.title == "北京的天气 怎么样？"
    assert before <= saved.updated <= time.time()
    assert store.open(given.id) == saved
    assert {name: getattr(saved, name) for name in ("messages", "adapter", "active", "settings", "images", "mode")} == {
        name: getattr(given, name) for name in ("messages", "adapter", "active", "settings", "images", "mode")
    }
    (path,) = store.folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert json.loads(path.read_text(encoding="utf-8"))["schema"] == 2


def test_ids_are_random_and_nothing_else_is_an_id(store: ConversationStore) -> None:
    assert len({new_id() for _ in range(1000)}) == 1000
    assert len(new_id()) == 32  # 128 bits
    (store.folder.parent / "secret.json").write_text("{}")
    for id in (
        "../secret",
        "..",
        "",
        "a" * 15,
        "a" * 81,
        "a/" * 10,
        "a\0" * 10,
        "." + "a" * 20,
        "-" + "a" * 20,
        "é" * 20,
        5,
    ):
        for use in (
            store.open,
            store.delete,
            lambda id: store.rename(id, "x"),
            lambda id: store.save(talk("x", id=id)),
        ):
            with pytest.raises(UsageError, match="is no id of a conversation"):
                use(id)  # type: ignore[operator]
    assert (store.folder.parent / "secret.json").exists()
    with pytest.raises(UsageError, match="there is no conversation"):
        store.open(new_id())
    store.delete(new_id())  # it is gone, as asked


def test_titles(store: ConversationStore) -> None:
    assert store.save(talk("word " * 100)).title == "word " * 11 + "word…"
    assert store.save(Conversation("m", (Message("system", "rules"),))).title == ""
    kept = store.save(talk("first"))
    renamed = store.rename(kept.id, "  北京 \n tour ")
    assert (renamed.title, renamed.updated) == ("北京 tour", kept.updated)
    assert store.save(kept).title == "北京 tour"  # whoever still has the old title does not bring it back
    assert store.rename(kept.id, "").title == "first"
    with pytest.raises(UsageError, match="the title has 300 characters, expected at most 200"):
        store.rename(kept.id, "x" * 300)
    assert store.save(talk("x", title="Given")).title == "Given"


def test_images_of_messages_that_are_gone_go_too_and_the_oldest_first(
    store: ConversationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmkit.chat.store.MAX_IMAGE_BYTES", 3 * len(PNG))
    given = talk("a", "b", "c", images={0: (PNG, PNG), 1: (PNG, PNG), 2: (PNG,), 9: ()})
    assert dict(store.save(given).images) == {1: (PNG, PNG), 2: (PNG,)}


def test_a_value_without_a_form_is_refused_and_the_old_file_stays(store: ConversationStore) -> None:
    kept = store.save(talk("a"))
    for settings in ({"x": object()}, {"x": b""}):
        with pytest.raises(OutputError, match="a value that cannot be written"):
            store.save(Conversation("m", kept.messages, id=kept.id, settings=settings))
    with pytest.raises(OutputError, match="more than"):
        store.save(talk("x" * (MAX_FILE_BYTES + 1), id=kept.id))
    assert store.open(kept.id) == kept
    assert len(list(store.folder.iterdir())) == 1


def test_half_a_pair_of_surrogates_is_written_as_an_escape(store: ConversationStore) -> None:
    kept = store.save(talk("半\ud800\u2028"))
    assert store.open(kept.id).messages[0].content == "半\ud800\u2028"
    assert store.list().entries[0].id == kept.id


# --- lists ---


def test_the_list_is_newest_first_and_follows_every_change(store: ConversationStore) -> None:
    assert store.list().entries == ()
    assert store.newest() is None
    first, second = store.save(talk("one")), store.save(talk("two", "more", mode="code"))
    assert [entry.id for entry in store.list().entries] == [second.id, first.id]
    entry = store.list().entries[0]
    assert (entry.title, entry.mode, entry.model, entry.count) == ("two", "code", "m", 2)
    assert (entry.created, entry.updated) == (second.created, second.updated)
    store.save(first)
    assert store.newest() == first.id
    store.rename(second.id, "renamed")
    assert [entry.title for entry in store.list().entries] == ["one", "renamed"]
    other = ConversationStore(store.folder)  # another process
    other.delete(first.id)
    assert [entry.id for entry in store.list().entries] == [second.id]


def test_a_list_reads_first_lines_only_and_those_once(
    store: ConversationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        store.save(talk(f"{number}", "long " * 5000))
    read = 0
    whole = open

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal read
        read += 1
        return whole(*arguments, **options)

    monkeypatch.setattr("glmkit.chat.transcript.open", counted, raising=False)
    monkeypatch.setattr("glmkit.chat.transcript.read_conversation", None)  # which would read all of it
    fresh = ConversationStore(store.folder)
    assert len(fresh.list().entries) == 20
    assert read == 20
    fresh.list()
    assert read == 20
    fresh.save(talk("new"))
    fresh.list()
    assert read == 21


@pytest.mark.slow
def test_thousands_are_listed_and_searched_in_seconds(store: ConversationStore) -> None:
    store = ConversationStore(store.folder, kept=10_000)
    model = store.save(talk("question " * 20, *["回答 " * 200] * 10))
    text = (store.folder / f"{model.id}.json").read_bytes()
    for _ in range(5000):
        (store.folder / f"{new_id()}.json").write_bytes(text)
    started = time.monotonic()
    assert len(ConversationStore(store.folder).list().entries) == 5001
    listed, started = time.monotonic() - started, time.monotonic()
    assert store.find("nowhere in them") == ()
    assert listed < 10
    assert time.monotonic() - started < 20


def test_damaged_files_are_named_and_the_rest_is_listed(store: ConversationStore, tmp_path: Path) -> None:
    kept = store.save(talk("whole"))
    head = '{"schema": 2, "title": "t", "mode": "chat", "model": "m", "created": 1, "updated": 2, "count": 1'
    cases = {
        "empty": "",
        "list": "[]",
        "future": '{"schema": 9}',
        "half": head,
        "mode": head.replace('"chat"', '"king"') + ",\n",
        "time": head.replace('"updated": 2', '"updated": NaN') + ",\n",
        "late": head.replace('"updated": 2', '"updated": 1e300') + ",\n",
        "title": head.replace('"t"', "7") + ",\n",
        "deep": "[" * 100_000,
        "binary": "\0\0\0",
    }
    ids = {name: f"{name:-<16}" for name in cases}
    for name, text in cases.items():
        (store.folder / f"{ids[name]}.json").write_text(text)
    (store.folder / "short.json").write_text("{}")
    os.mkfifo(store.folder / f"{'fifo':-<16}.json")  # nothing waits for it
    os.symlink(tmp_path / "elsewhere", store.folder / f"{'link':-<16}.json")
    (store.folder / f"{'folder':-<16}.json").mkdir()
    listing = store.list()
    assert [entry.id for entry in listing.entries] == [kept.id]
    assert len(listing.damaged) == len(cases) + 4
    assert all(listing.damaged.values())
    assert "schema 9, expected 2" in listing.damaged[f"{ids['future']}.json"]
    assert "no regular file" in listing.damaged[f"{'fifo':-<16}.json"]
    for id in (*ids.values(), f"{'fifo':-<16}", f"{'link':-<16}", f"{'folder':-<16}"):
        with pytest.raises(UsageError, match="no conversation"):
            store.open(id)
    assert store.find("whole") == listing.entries
    assert store.save(talk("new", id=ids["half"])).title == "new"  # a damaged file can be written over


@pytest.mark.parametrize(
    "change",
    [
        {"messages": {}},
        {"messages": [1]},
        {"messages": [{"role": "king", "content": ""}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": "", "more": 1}]},
        {"messages": [{"role": "system", "content": "", "tools": "all"}]},
        {"messages": [{"role": "assistant", "content": "", "metadata": "f", "arguments": [1]}]},
        {"settings": [1]},
        {"adapter": 5},
        {"active": 5},
        {"created": 10**400},
        {"updated": "1.5"},
        {"images": []},
        {"images": {"7": []}},
        {"images": {"-1": []}},
        {"images": {"0": ["no base64!"]}},
        {"images": {"0": [base64.b64encode(b"GIF89a").decode()]}},
    ],
)
def test_a_file_with_a_wrong_part_is_refused(store: ConversationStore, change: dict[str, Any]) -> None:
    kept = store.save(talk("x"))
    path = store.folder / f"{kept.id}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match="is no conversation"):
        store.open(kept.id)


def test_conversations_of_the_first_form_are_still_read(store: ConversationStore) -> None:
    store.folder.mkdir()
    id = "20260102-030405-0a1b2c3d"
    old = {
        "schema": 1,
        "model": "m",
        "adapter": None,
        "active": None,
        "settings": {},
        "messages": [{"role": "user", "content": "old"}],
    }
    (store.folder / f"{id}.json").write_text(json.dumps(old, indent=1))
    (entry,) = store.list().entries
    assert (entry.id, entry.title, entry.mode, entry.count) == (id, "old", "chat", 1)
    store.save(store.open(id))
    assert (store.folder / f"{id}.json").read_text().startswith('{"schema": 2')


def test_finding(store: ConversationStore) -> None:
    first = store.save(talk("Tell me of 北京烤鸭", 'say "quoted"\nline'))
    second = store.save(
        Conversation("m", (Message("system", "duck rules"), Message("user", "Straße")), images={1: (PNG,)})
    )
    store.rename(second.id, "Reise nach Wien")
    found = {
        text: {entry.id for entry in store.find(text)} for text in ("烤鸭", "TELL ME", "wien", "STRASSE", '"quoted"\nL')
    }
    assert found == {
        "烤鸭": {first.id},
        "TELL ME": {first.id},
        "wien": {second.id},
        "STRASSE": {second.id},
        '"quoted"\nL': {first.id},
    }
    for text in ("duck rules", '"role"', "user", "iVBOR", "schema"):
        assert store.find(text) == ()  # what nobody said
    assert len(store.find("")) == 2


def test_the_oldest_make_room_and_nothing_of_a_killed_process_stays(tmp_path: Path) -> None:
    store = ConversationStore(tmp_path, kept=3)
    saved = []
    for number in range(5):
        saved.append(store.save(talk(str(number))))
        os.utime(tmp_path / f"{saved[-1].id}.json", (number, number))
    assert {entry.title for entry in store.list().entries} == {"2", "3", "4"}
    store.save(saved[4])  # one that is there takes no room
    assert len(store.list().entries) == 3
    orphan, young = tmp_path / ".x.json.tmp-1", tmp_path / ".y.json.tmp-2"
    for path in (orphan, young):
        path.write_text("half")
    os.utime(orphan, (1, 1))
    store.save(talk("new"))
    assert (orphan.exists(), young.exists()) == (False, True)


def test_owners_do_not_see_each_other(store: ConversationStore) -> None:
    for owner in ("李", "../../x", "a/b", "A", "a", "\ud800", ""):
        store.for_owner(owner).save(talk(f"of {owner!r}"))
    assert store.list().entries == ()
    for owner in ("李", "../../x", "a/b", "A", "a", "\ud800", ""):
        (entry,) = store.for_owner(owner).list().entries
        assert entry.title == f"of {owner!r}"
        with pytest.raises(UsageError, match="there is no conversation"):
            store.for_owner("somebody else").open(entry.id)
    folders = [path for path in store.folder.parent.rglob("*") if path.is_dir()]
    assert all(path.is_relative_to(store.folder) for path in folders)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in folders if any(path.glob("*.json")))


# --- processes ---


def write_for_ever(folder: Path, id: str) -> None:
    store, number = ConversationStore(folder), 0
    while True:
        number += 1
        store.save(talk(f"{number} " * 20_000, id=id))


def test_a_kill_never_leaves_half_a_file(store: ConversationStore) -> None:
    """Killed at many moments, and looked at while two processes write."""
    id, other = new_id(), new_id()
    fork = multiprocessing.get_context("fork")
    for delay in (0.0, 0.01, 0.02, 0.03, 0.05):
        writers = [fork.Process(target=write_for_ever, args=(store.folder, name), daemon=True) for name in (id, other)]
        for writer in writers:
            writer.start()
        deadline = time.monotonic() + 20
        while len(store.list().entries) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(10):
            assert store.list().damaged == {}
            (message,) = store.open(id).messages
            number = message.content.split(" ", 1)[0]
            assert message.content == f"{number} " * 20_000
        time.sleep(delay)
        for writer in writers:
            writer.kill()
            writer.join()
        listing = store.list()
        assert (len(listing.entries), listing.damaged) == (2, {})
        assert store.open(id).messages[0].content.endswith(" ")


# --- other forms ---


def kept() -> Conversation:
    return Conversation("glm-nano", TALK, title="A talk", mode="tools", images={8: (PNG,)}, created=86400.0)


def test_openai_messages_and_back() -> None:
    written = json.loads(export(kept(), "json"))
    assert (written["title"], written["mode"], written["model"]) == ("A talk", "tools", "glm-nano")
    assert written["tools"] == [{"type": "function", "function": TOOL}]
    roles = [message["role"] for message in written["messages"]]
    assert roles == [
        "system",
        "user",
        "assistant",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    called, told = written["messages"][3], written["messages"][4]
    assert called["content"] is None
    assert called["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "北京"}'}
    assert told == {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": '{"weather": "晴"}'}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(PNG).decode()}}
    assert written["messages"][8]["content"] == [{"type": "text", "text": "[Image]"}, image]
    again = import_conversation(json.dumps(written))
    expected = list(TALK)
    expected[3] = Message("assistant", "", "get_weather", arguments={"city": "北京"})  # each model writes it in its way
    assert again.messages == tuple(expected)
    assert (again.title, again.mode, again.model, again.images) == ("A talk", "tools", "glm-nano", {8: (PNG,)})
    assert again.id != kept().id
    assert json.loads(export(again, "json"))["messages"] == written["messages"]


def test_files_of_the_store_and_our_own_messages_are_imported(store: ConversationStore) -> None:
    saved = store.save(kept())
    again = import_conversation((store.folder / f"{saved.id}.json").read_text())
    assert (again.messages, again.images, again.title) == (saved.messages, saved.images, saved.title)
    assert again.id != saved.id
    ours = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "x", "metadata": "f"},
        {"role": "observation", "content": "b"},
    ]
    assert import_conversation(json.dumps(ours)).messages == (
        Message("user", "a"), Message("assistant", "x", "f"), Message("observation", "b"),
    )  # fmt: skip


def test_calls_made_at_once_become_calls_one_after_the_other() -> None:
    calls = [
        {"id": f"c{n}", "type": "function", "function": {"name": f"f{n}", "arguments": f'{{"n": {n}}}'}} for n in (1, 2)
    ]
    content = [
        {"role": "developer", "content": "rules"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "Both.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "assistant", "content": None, "function_call": {"name": "g", "arguments": ""}},
        {"role": "function", "name": "g", "content": "three"},
    ]
    messages = import_conversation("\ufeff" + json.dumps({"messages": content, "tools": [TOOL]})).messages
    assert messages == (
        Message("system", "rules", tools=[TOOL]),
        Message("user", "ab"),
        Message("assistant", "Both."),
        Message("assistant", "", "f2", arguments={"n": 2}),
        Message("observation", "two"),
        Message("assistant", "", "f1", arguments={"n": 1}),
        Message("observation", "one"),
        Message("assistant", "", "g", arguments={}),
        Message("observation", "three"),
    )


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def assistant(**more: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": None, **more}]


DEEP = json.loads("[" * 400 + "]" * 400)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[" * 200_000, "no JSON"),
        ("5", "no list of messages"),
        ({"messages": {}}, "no list of messages"),
        ({"schema": 9}, "schema 9"),
        ({"schema": 2}, "is no conversation"),
        (
            {"schema": 1, "model": "m", "messages": [{"role": "system", "content": "", "tools": DEEP}]},
            "nested too deep",
        ),
        ([5], "message 1 is 5"),
        ([{"content": "x"}], "message 1 is"),
        ([{"role": ["user"]}], "message 1 is"),
        ([{"role": "king", "content": "x"}], "message 1 has the role 'king'"),
        (user(5), "a part of the content is 5"),
        (user({"type": "text", "text": 5}), "a part of the content"),
        (user([{"type": "image_url", "image_url": {"url": "http://example.org/x.png"}}]), "no PNG in the file itself"),
        (user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]), "no PNG in the file itself"),
        (user([{"type": "image_url", "image_url": {"url": "data:image/png;base64,R0lGODlh"}}]), "no PNG file"),
        (user([{"type": "image_url", "image_url": {"url": "data:image/png;base64,é"}}]), "no base64"),
        (assistant(tool_calls=5), "tool_calls is no list"),
        (assistant(tool_calls=[{"function": 5}]), "a call names no tool"),
        (assistant(tool_calls=[{"function": {"name": "a\nb", "arguments": "{}"}}]), "a call names no tool"),
        (assistant(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "no JSON"),
        (assistant(tool_calls=[{"function": {"name": "f", "arguments": [1]}}]), "no object"),
        (assistant(tool_calls=[{"function": {"name": "f", "arguments": {"a": DEEP}}}]), "nested deeper than 32"),
        (assistant(metadata=5), "metadata is no text"),
        (assistant(tool_calls=[{"function": {"name": "f"}}]), "the arguments of a call are no object"),
        ([*assistant(function_call={"name": "f", "arguments": "{}"}), *user("x")], "comes before the result"),
        ({"messages": [], "tools": "all"}, "the tools are neither"),
        ({"messages": [], "tools": [{"parameters": DEEP}]}, "nested too deep"),
        ({"messages": [], "title": 5}, "title or model is no text"),
        (user("x") * 10_001, "10,001 messages, expected at most 10,000"),
    ],
)
def test_hostile_imports_are_refused(content: Any, message: str) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    with pytest.raises(UsageError, match=message):
        import_conversation(text)


def test_imports_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmkit.chat.interchange.MAX_IMPORT_CHARACTERS", 100)
    with pytest.raises(UsageError, match="101 characters, expected at most 100"):
        import_conversation("x" * 101)
    monkeypatch.undo()
    monkeypatch.setattr("glmkit.chat.interchange.MAX_IMAGE_BYTES", 2 * len(PNG))
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    with pytest.raises(UsageError, match="the images have more than"):
        import_conversation(json.dumps(user([{"type": "image_url", "image_url": {"url": url}}] * 3)))
    half = import_conversation('[{"role": "user", "content": "half \\ud800"}]')
    assert half.messages[0].content == "half ?"  # which no tokenizer has ids for
    assert len(import_conversation(json.dumps({"messages": [], "title": "t" * 999})).title) == 200


def test_markdown() -> None:
    text = export(kept(), "md")
    assert text.startswith("# A talk\n\n*glm-nano · 1970-01-02 00:00 UTC*\n")
    assert '**Calls get_weather**\n\n```json\n{\n "city": "北京"\n}\n```' in text
    assert "**Calls interpreter**\n\n```python\nplt.show()\n```" in text
    assert "![Figure 1](data:image/png;base64," in text
    assert "**用户**" in export(kept(), "md", "zh")
    fences = Conversation("m", (Message("observation", "```\nx\n````"),))
    assert "`````\n```\nx\n````\n`````" in export(fences, "md")
    with pytest.raises(UsageError, match="no form 'pdf'"):
        export(kept(), "pdf")  # type: ignore[arg-type]


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_web_page_shows_texts_and_runs_and_fetches_nothing() -> None:
    evil = '<script>alert(1)</script><img src=x onerror="alert(1)">"\'</pre></title>&amp; [x](javascript:alert(1))'
    messages = (
        Message("system", evil),
        Message("user", evil),
        Message("assistant", f"```{evil}\n{evil}\n```\n{evil}"),
        Message("assistant", f"print('{evil}')", "interpreter"),
        Message("assistant", evil, evil.replace("\n", "")),
        Message("observation", evil),
    )
    page = _Tags(export(Conversation(evil, messages, title=evil, images={5: (PNG,)}), "html"))
    allowed = set("html head meta title style body h1 h2 p section details summary pre code img".split())
    assert {tag for tag, _ in page.tags} <= allowed
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    (image,) = (attributes for tag, attributes in page.tags if tag == "img")
    assert image["src"] == "data:image/png;base64," + base64.b64encode(PNG).decode()
    policy = next(attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert page.text.count("<script>alert(1)</script>") >= 8  # it is all there, as text
    assert 'lang="zh-CN"' in export(kept(), "html", "zh")
