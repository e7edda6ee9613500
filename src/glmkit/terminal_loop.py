"""The chat loop of `glm chat`: lines in, answers out, and commands that begin with a slash."""

from __future__ import annotations

import difflib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glmkit.chat.session import Session
from glmkit.chat.transcript import messages_to_dicts
from glmkit.engine.decode import CancelToken
from glmkit.errors import GlmkitError, OutputError, UsageError
from glmkit.terminal import ctrl_c_cancels, describe, fills_blanks, notice, printable, report, write_answer

COMMANDS = {
    "/help": "this list",
    "/clear": "forget the conversation, not the system prompt (also: clear)",
    "/system": "/system TEXT sets the system prompt, /system off removes it, /system shows it",
    "/set": "/set temperature=0.5 changes a setting, /set temperature=default undoes it, /set shows all",
    "/adapter": "/adapter NAME lets it answer, /adapter base none; /adapter lists those that are loaded",
    "/stats": "tokens and speed of the last answer",
    "/retry": "answer the last question again",
    "/undo": "take back the last question and its answer",
    "/save": "/save FILE writes the conversation as JSON",
    "/quit": "leave (also: stop, /bye, Ctrl-D)",
}
_WORDS = {"clear": "/clear", "stop": "/quit", "/bye": "/quit", "/exit": "/quit", "/new": "/clear", "/?": "/help"}
_KEYS = "Enter sends, Esc Enter begins a new line, Ctrl-C stops an answer, twice it leaves"
_BLANKS = "[MASK] is a blank, [sMASK] one for a sentence, [gMASK] one to go on at; what was said before is not read"
_TWICE_SECONDS = 1.0


class ChatLoop:
    """A conversation with somebody at a keyboard, or with lines from a pipe.

    Args:
        session: The conversation.
        line_editor: Whether to edit lines, if this is a terminal.
        verbose: Print tokens and speed after each answer.
    """

    def __init__(self, session: Session, *, line_editor: bool = True, verbose: bool = False) -> None:
        self.session, self.verbose = session, verbose
        self.at_keyboard = sys.stdin.isatty()
        self.interrupted_at = -_TWICE_SECONDS
        self.dropped_turns = 0
        self.read = self._reader(line_editor)

    def run(self) -> int:
        """Talks until the user leaves.

        Returns:
            The exit code: 0, or 130 after Ctrl-C twice.
        """
        self._greet()
        while True:
            try:
                line = self.read()
            except KeyboardInterrupt:
                if time.monotonic() - self.interrupted_at < _TWICE_SECONDS:
                    return 130
                self.interrupted_at = time.monotonic()
                notice("[Ctrl-C again, Ctrl-D or /quit leaves]")
                continue
            except EOFError:
                return 0
            try:
                if self._take(line.strip()):
                    return 0
            except GlmkitError as error:
                notice(f"error: {error.message}")
                if error.hint:
                    notice(f"hint: {error.hint}")

    def _greet(self) -> None:
        unanswered = bool(self.session.messages) and self.session.messages[-1].role == "user"
        if self.at_keyboard:
            adapter = f" with {self.session.adapter}" if self.session.adapter else ""
            notice(f"{self.session.name}{adapter}. {_KEYS}; /help lists commands")
            for message in self.session.messages[-2:]:
                notice(f"  {message.role}: {printable(message.content)[:200]}")
        if unanswered:
            notice("[the last question has no answer; /retry asks it again]")

    def _take(self, line: str) -> bool:
        """Does what a line says.

        Returns:
            Whether to leave.
        """
        word, _, rest = line.partition(" ")
        word = _WORDS.get(line, word)
        if word.startswith("!"):
            word = "/" + word[1:]
        word = _WORDS.get(word, word) if word.startswith("/") else word
        if word == "/quit":
            return True
        if word.startswith("/") and word[1:].isalpha():
            self._command(word, rest.strip())
        elif line:
            self._answer(lambda cancel: self.session.ask(line, cancel))
        return False

    def _answer(self, begin: Callable[[CancelToken], Any]) -> None:
        cancel = CancelToken()
        with ctrl_c_cancels(cancel):
            replying = begin(cancel)
            try:
                write_answer(replying)
            finally:
                reply = self.session.finish(replying)
        if cancel.cancelled:
            self.interrupted_at = time.monotonic()
        report(reply, verbose=self.verbose, known_dropped_turns=self.dropped_turns)
        self.dropped_turns = reply.dropped_turns

    # --- commands ---

    def _command(self, word: str, rest: str) -> None:
        if word not in COMMANDS:
            close = difflib.get_close_matches(word, COMMANDS, n=1)
            raise UsageError(
                f"there is no command {word}", hint=f"did you mean {close[0]}?" if close else "/help lists them"
            )
        getattr(self, f"_do_{word[1:]}")(rest)

    def _do_help(self, rest: str) -> None:
        for word, text in COMMANDS.items():
            notice(f"  {word:8} {text}")
        if fills_blanks(self.session.loaded):
            notice(f"  {_BLANKS}")
        notice(f"  {_KEYS}")

    def _do_clear(self, rest: str) -> None:
        self.session.clear()
        self.dropped_turns = 0
        notice("[cleared]")

    def _do_system(self, rest: str) -> None:
        if rest:
            self.session.set_system(None if rest == "off" else rest)
        notice(f"[system: {self.session.system or 'none'}]")

    def _do_set(self, rest: str) -> None:
        if rest:
            name, equals, text = rest.partition("=") if "=" in rest else rest.partition(" ")
            if not equals or not text.strip():
                raise UsageError("a setting is written name=value", hint="/set temperature=0.5")
            self.session.set(name.strip(), _value(text.strip()))
        for name, value in self.session.effective().items():
            notice(f"  {name} = {value}")

    def _do_adapter(self, rest: str) -> None:
        if rest:
            self.session.use(None if rest in ("base", "none", "off") else rest)
        adapters = self.session.loaded.adapters
        for name in ("base", *(adapters.names if adapters is not None else ())):
            active = name == (self.session.adapter or "base")
            notice(f"  {'*' if active else ' '} {name}")

    def _do_stats(self, rest: str) -> None:
        if self.session.last is None:
            raise UsageError("there is no answer yet")
        notice(describe(self.session.last))

    def _do_retry(self, rest: str) -> None:
        self._answer(self.session.retry)

    def _do_undo(self, rest: str) -> None:
        self.session.undo()
        notice("[took back the last question]")

    def _do_save(self, rest: str) -> None:
        if not rest:
            raise UsageError("/save needs a file", hint="/save talk.json")
        path = Path(rest).expanduser()
        content = {
            "schema": 1,
            "model": self.session.name,
            "messages": messages_to_dicts(self.session.messages),
        }
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")
        except FileExistsError:
            raise OutputError(f"{path} exists already", hint="choose another name") from None
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from None
        notice(f"[saved {path}]")

    # --- input ---

    def _reader(self, line_editor: bool) -> Callable[[], str]:
        if line_editor and self.at_keyboard and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            from glmkit.line_editor import LineEditor

            return LineEditor(COMMANDS).read
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # the tokenizer says what is wrong with other encodings
        return self._read_plain

    def _read_plain(self) -> str:
        if self.at_keyboard:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line


def _value(text: str) -> Any:
    """A setting's value as people type it; None for the model's own."""
    if text in ("default", "none"):
        return None
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text
