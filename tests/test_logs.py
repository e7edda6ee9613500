"""`glm logs`: kept conversations are listed, read, found in Chinese too, and written for others."""

from __future__ import annotations

import json
import re
import stat
import time
from pathlib import Path

import pytest

from glmkit import cli
from glmkit.chat.interchange import import_conversation
from glmkit.chat.messages import Message
from glmkit.chat.store import Conversation, ConversationStore
from glmkit.errors import UsageError

TEA, TRAIN = "a" * 32, "ab" + "c" * 30


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ConversationStore:
    """Two conversations, that on trains is the newest."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("GLMKIT_LANG", "en")
    kept = ConversationStore()
    tea = (
        Message("system", "说到火车就停"),
        Message("user", "What is 绿茶?"),
        Message("assistant", "Tea.\x1b[2J 是茶。"),
    )
    kept.save(Conversation("glm-nano", tea, id=TEA, settings={"top_p": 0.5}))
    time.sleep(0.01)
    kept.save(Conversation("chatglm3-6b", (Message("user", "火车几点开？"), Message("assistant", "八点。")), id=TRAIN))
    return kept


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(["logs", *arguments])
    return code, *capsys.readouterr()


def test_list(capsys: pytest.CaptureFixture[str], store: ConversationStore) -> None:
    code, out, err = run(capsys, "list")
    assert (code, err) == (0, "")
    time_of_day = r"\d{4}-\d\d-\d\d \d\d:\d\d"
    first, second = out.splitlines()
    assert re.fullmatch(rf"abcccccc  {time_of_day}  2 messages  chat  chatglm3-6b  火车几点开？", first)
    assert re.fullmatch(rf"aaaaaaaa  {time_of_day}  3 messages  chat     glm-nano  What is 绿茶\?", second)
    (store.folder / f"{'f' * 32}.json").write_text("{")
    _, out, err = run(capsys, "list", "--limit", "1")
    assert out.splitlines() == [first]
    assert err.startswith(f"{'f' * 32}.json cannot be opened: ")
    assert err.endswith("1 more: --limit 2\n")
    listed = json.loads(run(capsys, "list", "--json")[1])
    assert listed["schema"] == 1
    assert [one["id"] for one in listed["conversations"]] == [TRAIN, TEA]
    assert set(listed["conversations"][0]) == {"id", "title", "mode", "model", "created", "updated", "count"}
    assert list(listed["damaged"]) == [f"{'f' * 32}.json"]


def test_an_empty_list_leaves_stdout_clean(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    assert run(capsys, "list") == (0, "", "there is no conversation yet; glm chat begins one\n")
    assert json.loads(run(capsys, "list", "--json")[1])["conversations"] == []
    assert run(capsys, "show")[0] == 2


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = run(capsys, "show", "aa")
    assert "Tea.[2J 是茶。" in out  # nothing of a model's answer takes over the terminal
    assert "\x1b" not in out
    assert "火车几点开" in run(capsys, "show")[1]  # the newest
    shown = json.loads(run(capsys, "show", "aaaa", "--json")[1])
    assert (shown["schema"], shown["id"], shown["settings"]) == (1, TEA, {"top_p": 0.5})
    assert shown["messages"][2] == {"role": "assistant", "content": "Tea.\x1b[2J 是茶。"}
    code, out, err = run(capsys, "show", "a")
    assert (code, out) == (2, "")
    assert f"2 conversations begin with 'a': {TRAIN}, {TEA}" in err
    assert "no conversation begins with '../x'" in run(capsys, "show", "../x")[2]


@pytest.mark.parametrize(
    ("text", "found"),
    [("火车", [TRAIN]), ("绿茶", [TEA]), ("茶", [TEA]), ("是茶", [TEA]), ("TEA", [TEA]), ("点", [TRAIN]), ("咖啡", [])],
)
def test_search_finds_chinese_words_of_one_and_two_characters(
    capsys: pytest.CaptureFixture[str], text: str, found: list[str]
) -> None:
    code, out, err = run(capsys, "search", text, "--json")
    assert [one["id"] for one in json.loads(out)["conversations"]] == found  # what the system message says is not said
    assert code == (0 if found else 1)
    code, out, err = run(capsys, "search", text)
    assert [line[:8] for line in out.splitlines() if not line.startswith(" ")] == [id[:8] for id in found]
    assert err == ("" if found else f"nobody said {text!r}\n")
    if found:
        assert all(text.casefold() in line.casefold() for line in out.splitlines() if line.startswith("    "))


def test_search_shows_what_stands_around(capsys: pytest.CaptureFixture[str], store: ConversationStore) -> None:
    store.save(Conversation("m", (Message("user", "一" * 100 + "大熊猫" + "二" * 100),), id="d" * 32))
    (one,) = json.loads(run(capsys, "search", "熊猫", "--json")[1])["conversations"]
    assert one["passages"] == [{"role": "user", "text": "一" * 29 + "大熊猫" + "二" * 30}]
    assert run(capsys, "search", " ")[0] == 2


def test_three_hundred_conversations_are_searched_in_a_third_of_a_second(
    capsys: pytest.CaptureFixture[str], store: ConversationStore
) -> None:
    for number in range(300):
        store.save(Conversation("m", (Message("user", f"第{number}个问题" + "很长" * 500), Message("assistant", "好"))))
    store.save(Conversation("m", (Message("user", "河马"),)))
    started = time.process_time()
    assert run(capsys, "search", "河马")[0] == 0
    assert time.process_time() - started < 0.3


def test_path_and_export(capsys: pytest.CaptureFixture[str], store: ConversationStore, tmp_path: Path) -> None:
    assert run(capsys, "path") == (0, f"{store.folder}\n", "")
    assert run(capsys, "path", "aa")[1] == f"{store.folder / TEA}.json\n"
    for name, begin in (("t.md", "# What is 绿茶?"), ("t.html", "<!doctype html>"), ("t.json", "{")):
        code, out, _ = run(capsys, "export", "aa", "-o", str(tmp_path / name))
        assert (code, out) == (0, f"{tmp_path / name}\n")
        written = (tmp_path / name).read_text(encoding="utf-8")
        assert written.lower().startswith(begin.lower())
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
        assert run(capsys, "export", "aa", "--form", name[2:])[1] == written
    again = import_conversation((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert [one.content for one in again.messages][1:] == ["What is 绿茶?", "Tea.\x1b[2J 是茶。"]
    assert "exists already" in run(capsys, "export", "aa", "-o", str(tmp_path / "t.md"))[2]
    assert "expected one of md, json, html" in run(capsys, "export", "aa", "-o", str(tmp_path / "t.pdf"))[2]


def test_labels_in_chinese(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMKIT_LANG", "zh")
    assert "**用户**" in run(capsys, "show")[1]


def test_identify(store: ConversationStore) -> None:
    assert store.identify("") == TRAIN
    assert store.identify(TEA) == TEA
    assert store.identify("ab") == TRAIN
    with pytest.raises(UsageError, match="2 conversations"):
        store.identify("a")
