"""The chat loop: commands with lines from a pipe, and keys in a real terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import sys
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
from glmkit.chat.transcript import read_conversation
from glmkit.terminal import printable
from glmkit.terminal_loop import COMMANDS, ChatLoop
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


# --- a real terminal ---

PROMPT = r"\x1b\[\?2004h.*>"  # the editor takes keys: it asks for marked pastes, and shows its prompt


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *arguments: str, state: Path) -> None:
        self.seen = ""
        self.pid, self.keys = pty.fork()
        if self.pid == 0:
            os.environ |= {"XDG_STATE_HOME": str(state), "TERM": "xterm", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
            os.environ["PROMPT_TOOLKIT_NO_CPR"] = "1"  # nobody here answers where the cursor is
            run = "import glmkit_command as command; command.main()"
            os.execv(sys.executable, [sys.executable, "-c", run, *arguments])

    def type(self, text: str) -> None:
        os.write(self.keys, text.encode())

    def expect(self, pattern: str, seconds: float = 60) -> str:
        """Waits for a text; what was seen up to its end is not looked at again."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            if time.monotonic() > end:
                raise AssertionError(f"{pattern!r} did not come; on the screen: {self.seen[-2000:]!r}")
            if select.select([self.keys], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.keys, 65536).decode(errors="replace")
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
                    self.seen += os.read(self.keys, 65536).decode(errors="replace")  # else its end waits for a reader
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
