"""The chat loop: commands with lines from a pipe, and keys in a real terminal."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import random
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import glmkit
import tiny
from glmkit import cli
from glmkit.chat.messages import Message
from glmkit.chat.session import Session
from glmkit.chat.store import Conversation, ConversationStore
from glmkit.chat.transcript import read_conversation
from glmkit.engine.decode import CancelToken
from glmkit.errors import UsageError
from glmkit.terminal import printable, write_answer
from glmkit.terminal_loop import ChatLoop
from glmkit.terminal_markdown import MarkdownPainter
from glmkit.terminal_texts import _TEXTS, COMMANDS
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatGLMTokenizer:
    path = tiny.train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    return ChatGLMTokenizer(path, generation=3)


@pytest.fixture(scope="module")
def endless(tokenizer: ChatGLMTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose answers end only where the context does, after minutes."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    return tiny.write_model(folder, Path(tokenizer.vocab_file), endless=True, seq_length=1_000_000)


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMKIT_LANG", "en")


def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], session: Session, *lines: str
) -> tuple[int, str, str]:
    """Runs the loop over lines from a pipe; exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    code = ChatLoop(session).run()
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def scripted(tokenizer: ChatGLMTokenizer, *answers: str, context_tokens: int = 2048, **options: Any) -> Session:
    ids = [token for answer in answers for token in tiny.say(tokenizer, answer)]
    model = tiny.ScriptedModel(tokenizer, ids, context_tokens)
    loaded = SimpleNamespace(model=model, tokenizer=tokenizer, adapter=None)
    return Session(loaded, "scripted", settings={"temperature": 0}, **options)


# --- lines from a pipe ---


def test_answers_are_on_stdout_and_the_rest_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: ChatGLMTokenizer
) -> None:
    session = scripted(tokenizer, "tea", "rice")
    code, out, err = talk(monkeypatch, capsys, session, "hello", "", "/stats", "how are you?")
    assert (code, out) == (0, "tea\nrice\n")
    assert "4 tokens" in err
    assert [message.content for message in session.messages] == ["hello", "tea", "how are you?", "rice"]


@pytest.mark.parametrize("word", ["stop", "/quit", "/bye", "!quit", "/exit"])
def test_words_that_leave(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: ChatGLMTokenizer, word: str
) -> None:
    assert talk(monkeypatch, capsys, scripted(tokenizer), word, "hello")[:2] == (0, "")


def test_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: ChatGLMTokenizer, tmp_path: Path
) -> None:
    session = scripted(tokenizer, "tea", "rice", "hello", "world")
    saved = tmp_path / "talk.json"
    _, out, err = talk(monkeypatch, capsys, session, "/system be kind", "hello", "/retry", f"/save {saved}")
    assert out == "tea\nrice\n"
    assert [message.content for message in session.messages] == ["be kind", "hello", "rice"]
    assert json.loads(saved.read_text(encoding="utf-8"))["messages"][-1] == {"role": "assistant", "content": "rice"}
    _, out, err = talk(monkeypatch, capsys, session, f"/save {saved}", "/undo", "!set top_p=0.5", "/set seed 7")
    assert "exists already" in err
    assert session.messages == [Message("system", "be kind")]
    assert (session.settings["top_p"], session.settings["seed"]) == (0.5, 7)
    _, out, err = talk(monkeypatch, capsys, session, "/set top_p=9", "/set tempratur=1", "/set", "/sett", "/set x")
    assert "top_p=9" in err
    assert "did you mean temperature?" in err
    assert "top_p = 0.5" in err
    assert "did you mean /set?" in err
    talk(monkeypatch, capsys, session, "/set top_p=default", "hello", "clear", "/system off")
    assert "top_p" not in session.settings
    assert session.messages == []
    assert session.last is None
    _, out, err = talk(monkeypatch, capsys, session, "/stats", "/retry", "/undo", "/save", "/help")
    assert err.count("error: ") == 4
    assert all(command in err for command in COMMANDS)


def test_a_line_with_a_path_is_a_question(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: ChatGLMTokenizer
) -> None:
    assert talk(monkeypatch, capsys, scripted(tokenizer, "tea"), "/etc/passwd is a file?")[1] == "tea\n"


def test_dropped_turns_are_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: ChatGLMTokenizer
) -> None:
    session = scripted(tokenizer, "tea", "rice", "tea", context_tokens=45)
    _, _, err = talk(monkeypatch, capsys, session, "1 2 3 4 5 6 7 8", "1 2 3 4 5 6 7 8", "hello")
    assert err.count("[the context is full: the oldest turn was left out]") == 1
    assert len(session.messages) == 6


def test_a_message_longer_than_the_context_is_refused_and_the_talk_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: ChatGLMTokenizer
) -> None:
    session = scripted(tokenizer, "tea", context_tokens=60)
    _, out, err = talk(monkeypatch, capsys, session, "rice " * 100, "hello")
    assert out == "tea\n"
    assert re.search(r"error: the message has \d+ tokens .* context is 60 tokens", err)
    assert "hint: shorten the message" in err


def test_a_line_that_is_not_utf_8_is_refused_and_the_talk_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: ChatGLMTokenizer
) -> None:
    lines = io.BytesIO("茶\n".encode("gb18030") + b"hello\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines, encoding="utf-8"))
    assert ChatLoop(scripted(tokenizer, "tea")).run() == 0
    printed = capsys.readouterr()
    assert printed.out == "tea\n"
    assert "lone surrogate" in printed.err


def test_escape_codes_of_a_model_do_not_reach_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: ChatGLMTokenizer
) -> None:
    _, out, _ = talk(monkeypatch, capsys, scripted(tokenizer, "a\x1b[2Jb\x9b1mc\x07\r\x00d\te\nf"), "hello")
    assert out == "a[2Jb1mcd\te\nf\n"
    everything = "".join(map(chr, range(0x100)))
    assert printable(everything) == "".join(
        one for one in everything if one in "\t\n" or not (one < " " or "\x7f" <= one <= "\x9f")
    )


def test_ctrl_c_ends_the_answer_before_the_next_token_and_keeps_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: ChatGLMTokenizer
) -> None:
    session = scripted(tokenizer, "I like tea and rice and tea")
    model, calls = session.loaded.model, []

    class Interrupted:
        config, device, generation_config = model.config, model.device, None

        def __call__(self, *arguments: Any, **named: Any) -> Any:
            calls.append(1)
            if len(calls) == 5:
                signal.raise_signal(signal.SIGINT)
            return model(*arguments, **named)

    session.loaded.model = Interrupted()
    handler = signal.getsignal(signal.SIGINT)
    code, out, err = talk(monkeypatch, capsys, session, "hello", "/stats")
    assert code == 0
    assert len(calls) == 5
    assert signal.getsignal(signal.SIGINT) == handler
    assert out == session.messages[-1].content + "\n"
    assert session.messages[-1].content.startswith("I")
    assert "[stopped]" in err
    assert "ended by: cancelled" in err


# --- conversations and models are changed without leaving ---


def test_another_model_goes_on_with_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: ChatGLMTokenizer, tmp_path: Path
) -> None:
    store = ConversationStore(tmp_path)
    session = scripted(tokenizer, "tea", store=store)
    other = scripted(tokenizer, "rice").loaded

    def load(name: str) -> Any:
        if name != "other":
            raise UsageError(f"no folder and no model is called {name!r}", hint="did you mean other?")
        return other

    loop = ChatLoop(session, load=load)
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("hello\n/set top_p=0.5\n/model othr\n/model other\nhow are you?\n/model\n")
    )
    assert loop.run() == 0
    out, err = capsys.readouterr()
    assert out == "tea\nrice\n"
    assert "did you mean other?" in err
    assert err.count("[model: other]") == 2
    assert [message.content for message in loop.session.messages] == ["hello", "tea", "how are you?", "rice"]
    assert loop.session.settings == {"temperature": 0, "top_p": 0.5}
    (entry,) = store.list().entries  # one conversation, under the model that answers now
    assert (entry.model, entry.count) == ("other", 4)


def test_conversations_are_loaded_from_files_and_from_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: ChatGLMTokenizer, tmp_path: Path
) -> None:
    store = ConversationStore(tmp_path / "kept")
    early = Conversation("m", (Message("user", "绿茶"), Message("assistant", "tea")), id="e" * 32, settings={"seed": 7})
    store.save(early)
    file = tmp_path / "talk.json"
    session = scripted(tokenizer, "rice", "world", "tea", store=store)
    lines = ["hello", f"/save {file}", "/load", "/load eee", "how are you?", "/clear", f"/load {file}", "/retry"]
    _, out, err = talk(monkeypatch, capsys, session, *lines, "/load nobody", "/load none.json")
    assert out == "rice\nworld\ntea\n"
    assert "  eeeeeeee  2 messages  绿茶" in err
    assert "[绿茶: 2 messages]" in err
    assert "no conversation begins with 'nobody'" in err
    assert "there is no file none.json" in err
    assert [one.content for one in store.open("e" * 32).messages] == ["绿茶", "tea", "how are you?", "world"]
    assert store.open("e" * 32).settings == {"seed": 7}
    talks = [[one.content for one in store.open(entry.id).messages] for entry in store.list().entries]
    assert ["hello", "tea"] in talks  # what the file had, answered again under an id of its own
    assert ["hello", "rice"] in talks


def test_a_conversation_is_written_in_three_forms(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: ChatGLMTokenizer, tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in ("talk.md", "talk.html", "talk")]
    session = scripted(tokenizer, "tea")
    talk(
        monkeypatch,
        capsys,
        session,
        "hello",
        f"/save {paths[0]}",
        f"/export {paths[1]}",
        "/lang zh",
        f"/save {paths[2]}",
    )
    assert "**Assistant**\n\ntea" in paths[0].read_text()
    assert paths[1].read_text().lower().startswith("<!doctype html>")
    assert json.loads(paths[2].read_text())["messages"][-1] == {"role": "assistant", "content": "tea"}


def test_the_last_question_is_edited(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: ChatGLMTokenizer
) -> None:
    session = scripted(tokenizer, "tea", "rice")
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", "sed -i s/hello/world/")
    _, out, err = talk(monkeypatch, capsys, session, "/edit", "hello", "/edit", "/edit")
    assert out == "tea\nrice\n"
    assert [message.content for message in session.messages] == ["world", "rice"]
    assert "error: there is no question yet" in err
    assert "> world" in err
    assert "[the question was not changed]" in err
    monkeypatch.setenv("EDITOR", "no-such-editor")
    assert "export EDITOR=nano" in talk(monkeypatch, capsys, session, "/edit")[2]
    monkeypatch.setenv("EDITOR", "sh -c 'yes hello | head -n 3000 > $0'")  # longer than the context
    assert "error: " in talk(monkeypatch, capsys, session, "/edit")[2]
    assert [message.content for message in session.messages] == ["world", "rice"]


def test_speed_and_context_are_in_view(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: ChatGLMTokenizer
) -> None:
    session = scripted(tokenizer, "tea", "tea", "tea", "tea")
    loop = ChatLoop(session)
    assert loop._below() == "scripted"
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/stats on\nhello\n/stats off\nhello\n/context\n"))
    loop.run()
    told = re.findall(r"prompt (\d+) tokens .*; context: ([\d,]+) of 2,048 tokens\]", capsys.readouterr().err)
    assert len(told) == 2
    last = session.last
    assert last is not None
    used = last.usage.prompt_tokens + last.usage.completion_tokens
    assert told[1] == (str(last.usage.prompt_tokens), str(used))
    assert loop._below().startswith(f"scripted  context {used / 2048:.0%} of 2,048  ")
    assert loop._below().endswith(" tokens/s")


# --- two languages ---


def test_texts_have_the_same_blanks_in_both_languages() -> None:
    for key, (english, chinese) in _TEXTS.items():
        assert sorted(re.findall(r"\{.*?\}", english)) == sorted(re.findall(r"\{.*?\}", chinese)), key
    for command, (english, chinese) in COMMANDS.items():
        assert re.search("[\u4e00-\u9fff]", chinese), command
        assert not re.search("[\u4e00-\u9fff]", english), command


def test_help_and_notices_in_chinese(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: ChatGLMTokenizer
) -> None:
    monkeypatch.setenv("GLMKIT_LANG", "zh")
    _, out, err = talk(monkeypatch, capsys, scripted(tokenizer, "tea"), "/help", "hello", "/clear", "/lang en", "/help")
    assert out == "tea\n"
    chinese, english = err.split("[language: English]")
    for command, (in_english, in_chinese) in COMMANDS.items():
        assert f"  {command:8} {in_chinese}" in chinese
        assert f"  {command:8} {in_english}" in english
    assert "[已清空]" in chinese
    assert "expected zh or en" in talk(monkeypatch, capsys, scripted(tokenizer, "tea"), "/lang en", "/lang fr")[2]


# --- Markdown ---


def painted(text: str, size: int = 1) -> str:
    painter = MarkdownPainter()
    return "".join(painter.feed(text[at : at + size]) for at in range(0, len(text), size)) + painter.end()


def test_markdown_is_coloured() -> None:
    bold, code, block, end = "\x1b[1m", "\x1b[36m", "\x1b[2;36m", "\x1b[0m"
    for text, shown in (
        ("# 一 `x`\n二", f"{bold}# 一 {end}{bold}{code}`x`{end}\n二"),
        ("这是**重点**。", f"这是{bold}**重点**{end}。"),
        ("`a**b` c", f"{code}`a**b`{end} c"),
        ("2**10 a*b\n* c", "2**10 a*b\n* c"),
        ("**open\nnext", f"{bold}**open{end}\nnext"),
        (
            "```py\n# **no**\n\n```\n**b**",
            f"{block}```py{end}\n{block}# **no**{end}\n\n{block}```{end}\n{bold}**b**{end}",
        ),
        ("`", f"{code}`{end}"),
        ("*", "*"),
    ):
        assert {painted(text, size) for size in (1, 2, 3, 100)} == {shown}


def test_colours_are_for_terminals_that_want_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: ChatGLMTokenizer
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    def shown(plain: bool = False) -> str:
        screen = Screen()
        with contextlib.redirect_stdout(screen):
            session = scripted(tokenizer, "**tea**")
            write_answer(session.ask("hello", CancelToken()), plain=plain)
        return screen.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown() == "**tea**\n"
    monkeypatch.delenv("NO_COLOR")
    assert shown() == "\x1b[1m**tea**\x1b[0m\n"
    assert shown(plain=True) == "**tea**\n"
    monkeypatch.setenv("TERM", "dumb")
    assert shown() == "**tea**\n"


def test_without_its_colours_it_is_the_answer() -> None:
    chance = random.Random(0)
    for _ in range(3000):
        text = "".join(chance.choice("`*#\n a1茶") for _ in range(chance.randrange(20)))
        shown = painted(text)
        assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == text
        assert painted(text, 3) == shown


# --- a real terminal ---

PROMPT = r"\x1b\[\?2004h.*>"  # the editor takes keys: it asks for marked pastes, and shows its prompt


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *arguments: str, state: Path, code: str = "", **environment: str) -> None:
        self.seen = ""
        self.pid, self.keys = pty.fork()
        if self.pid == 0:
            os.environ |= {"XDG_STATE_HOME": str(state), "TERM": "xterm", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
            os.environ["PROMPT_TOOLKIT_NO_CPR"] = "1"  # nobody here answers where the cursor is
            os.environ |= environment
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
            run = code or "import glmkit_command as command; command.main()"
            os.execv(sys.executable, [sys.executable, "-c", run, *arguments])

    def type(self, text: str) -> None:
        os.write(self.keys, text.encode())

    def _read(self) -> None:
        arrived = os.read(self.keys, 65536).decode(errors="replace")
        for _ in range(arrived.count("\x1b[6n")):
            self.type("\x1b[1;1R")  # where the cursor is: at the top
        self.seen += arrived

    def expect(self, pattern: str, seconds: float = 60) -> str:
        """Waits for a text; what was seen up to its end is not looked at again."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            if time.monotonic() > end:
                raise AssertionError(f"{pattern!r} did not come; on the screen: {self.seen[-2000:]!r}")
            if select.select([self.keys], [], [], 0.1)[0]:
                try:
                    self._read()
                except OSError:  # how a pty says that the other end is closed
                    raise AssertionError(f"{pattern!r} did not come before the end: {self.seen[-2000:]!r}") from None
        self.seen = self.seen[found.end() :]
        return found.group()

    def exit_code(self, key: str = "", seconds: float = 30) -> int:
        """Waits for the end; `key` is pressed now and then, because a terminal that changes its mode drops keys."""
        end, presses = time.monotonic() + seconds, [0.0, 0.7, 8.0, 8.7, 16.0, 16.7]
        while time.monotonic() < end:
            if key and presses and time.monotonic() >= end - seconds + presses[0]:
                presses.pop(0)
                with contextlib.suppress(OSError):
                    self.type(key)
            if select.select([self.keys], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    self._read()  # else its end waits for a reader
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"it did not end; on the screen: {self.seen[-2000:]!r}")

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        os.close(self.keys)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    started: list[Terminal] = []
    yield started
    for one in started:
        one.kill()


def conversations(state: Path) -> list[Path]:
    return sorted((state / "glmkit" / "conversations").glob("*.json"))


def test_keys(endless: Path, tmp_path: Path, terminals: list[Terminal]) -> None:
    terminal = Terminal("chat", str(endless), state=tmp_path)
    terminals.append(terminal)
    terminal.expect(PROMPT)
    terminal.type("/he\t")
    terminal.expect("/he.*lp")
    terminal.type("\r")
    terminal.expect("/undo .*/quit .*" + PROMPT)
    terminal.type("hello\x1b\rworld\r")  # Alt-Enter begins a new line, Enter sends
    terminal.expect("world.{200}")  # the answer runs
    terminal.type("\x03")
    terminal.expect(r"\[stopped\].*" + PROMPT)
    time.sleep(1.2)
    terminal.type("\x1b[200~tea\rrice\x1b[201~")  # a paste with a line end is not sent
    time.sleep(0.3)
    terminal.type("\r")
    terminal.expect("rice.{200}")
    terminal.type("\x03")
    terminal.expect(r"\[stopped\]")
    assert terminal.exit_code("\x03") == 130  # two within a second leave
    (path,) = conversations(tmp_path)
    questions = [message.content for message in read_conversation(path).messages if message.role == "user"]
    assert questions == ["hello\nworld", "tea\nrice"]
    answers = [message.content for message in read_conversation(path).messages if message.role == "assistant"]
    assert len(answers) == 2
    assert all(answers)
    history = tmp_path / "glmkit" / "input_history"
    assert "+tea" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_a_kill_loses_the_answer_only(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    endless: Path,
    tmp_path: Path,
    terminals: list[Terminal],
) -> None:
    terminal = Terminal("chat", str(endless), "--plain", "--max-tokens", "20", "--system", "rice", state=tmp_path)
    terminals.append(terminal)
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect("cut at the longest length")
    terminal.expect("> ")
    terminal.type("/set max_tokens=900000\n")
    terminal.expect("max_new_tokens = 900000.*> ")
    terminal.type("how are you?\n")
    terminal.expect("how are you.{200}")
    terminal.kill()
    terminals.clear()
    (path,) = conversations(tmp_path)
    saved = read_conversation(path)
    assert [message.role for message in saved.messages] == ["system", "user", "assistant", "user"]
    assert saved.messages[2].content == glmkit.load(endless).chat("hello", system="rice", max_tokens=20).text

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO("/retry\n"))
    assert cli.run(["chat", "-c", "--max-tokens", "5"]) == 0
    assert "the last question has no answer; /retry" in capsys.readouterr().err
    assert conversations(tmp_path) == [path]
    messages = read_conversation(path).messages
    assert messages[:4] == saved.messages
    expected = glmkit.load(endless).chat(list(saved.messages), max_tokens=5)
    assert messages == expected.messages
    monkeypatch.setattr(sys, "stdin", None)
    for wrong in ("zz", "../x"):
        assert cli.run(["chat", "--resume", wrong, "--prompt", "tea"]) == 2
    assert cli.run(["chat", "--resume", path.stem[:6], "--prompt", "tea", "--max-tokens", "3"]) == 0
    assert [one.content for one in read_conversation(path).messages][: len(messages) + 1] == [
        *(one.content for one in messages), "tea",
    ]  # fmt: skip
    capsys.readouterr()
    assert cli.run(["logs", "search", "how are"]) == 0
    assert capsys.readouterr().out.startswith(path.stem[:8])


SCRIPTED = """
import sys
sys.path.insert(0, {tests!r})
from test_terminal import ConversationStore, ChatGLMTokenizer, ChatLoop, scripted
tokenizer = ChatGLMTokenizer({vocabulary!r}, generation=3)
session = scripted(tokenizer, "**tea**", "rice", "world", store=ConversationStore())
sys.exit(ChatLoop(session, load=lambda name: session.loaded).run())
"""


def test_what_people_wish_for(tokenizer: ChatGLMTokenizer, tmp_path: Path, terminals: list[Terminal]) -> None:
    code = SCRIPTED.format(tests=str(Path(__file__).parent), vocabulary=tokenizer.vocab_file)
    terminal = Terminal(
        state=tmp_path, code=code, NO_COLOR="", GLMKIT_LANG="en", VISUAL="sed -i s/x/y/", PROMPT_TOOLKIT_NO_CPR="0"
    )
    terminals.append(terminal)
    terminal.expect(PROMPT)
    terminal.type("/set temp\t")  # what may follow a command is completed
    terminal.expect("erature=")
    terminal.type("0\r")  # settings change without a restart, and are seen
    terminal.expect("temperature = 0.*" + PROMPT)
    terminal.type("/model glm-n\t")  # models too
    terminal.expect("ano")
    terminal.type("\r")
    terminal.expect(r"\[model: glm-nano\].*" + PROMPT)
    terminal.type("hello\r")
    terminal.expect(r"\x1b\[1m\*\*tea\*\*\x1b\[0m")  # Markdown
    terminal.expect(r"context \d+% of 2,048  [\d.]+ tokens/s")  # below the line
    terminal.type("\x1b[A")  # the line before
    terminal.expect("hello")
    terminal.type("x\x07")  # Ctrl-G: the editor makes x a y
    terminal.expect("helloy")
    terminal.type("\r")
    terminal.expect("rice.*" + PROMPT)
    terminal.type(f"/export {tmp_path}/talk.md\r")
    terminal.expect(r"saved.*" + PROMPT)
    terminal.type("/lang zh\r")
    terminal.expect("语言：中文.*" + PROMPT)
    terminal.type("/he\t")
    terminal.expect("/he.*lp")
    terminal.type("\r")
    terminal.expect("重新回答上一个问题.*" + PROMPT)
    terminal.type("/load\r")
    terminal.expect("4 条消息  hello.*" + PROMPT)
    terminal.type("/quit\r")
    assert terminal.exit_code() == 0
    assert "**User**\n\nhelloy\n\n**Assistant**\n\nrice" in (tmp_path / "talk.md").read_text(encoding="utf-8")
