"""The chat loop of `glm chat`: lines in, answers out, and commands that begin with a slash."""

from __future__ import annotations

import difflib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from glmkit.chat.interchange import Form, export, import_conversation
from glmkit.chat.session import Session
from glmkit.chat.store import Conversation, ConversationStore
from glmkit.engine.decode import CancelToken
from glmkit.errors import GlmkitError, OutputError, UsageError
from glmkit.families import FAMILIES
from glmkit.location import locate
from glmkit.terminal import ctrl_c_cancels, describe, fills_blanks, notice, printable, report, write_answer
from glmkit.terminal_texts import COMMANDS, explain, say
from glmkit.translation import Language, labelled, language

_WORDS = {
    "clear": "/clear", "stop": "/quit", "/bye": "/quit", "/exit": "/quit", "/new": "/clear", "/?": "/help",
    "/export": "/save", "/context": "/stats", "/resume": "/load",
}  # fmt: skip
_TWICE_SECONDS = 1.0
_LISTED = 10
_OFF = ("base", "none", "off")


class ChatLoop:
    """A conversation with somebody at a keyboard, or with lines from a pipe.

    Args:
        session: The conversation.
        plain: No line editor and no colours, also if this is a terminal.
        verbose: Print tokens and speed after each answer.
        load: Loads another model by its name; by default `glmkit.loading.load`.
    """

    def __init__(
        self,
        session: Session,
        *,
        plain: bool = False,
        verbose: bool = False,
        load: Callable[[str], Any] | None = None,
    ) -> None:
        self.session, self.plain, self.verbose, self.load = session, plain, verbose, load
        self.language: Language = language()
        self.at_keyboard = sys.stdin.isatty()
        self.interrupted_at = -_TWICE_SECONDS
        self.dropped_turns = 0
        self.read = self._reader()

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
                self._tell("leave")
                continue
            except EOFError:
                return 0
            try:
                if self._take(line.strip()):
                    return 0
            except GlmkitError as error:
                notice(labelled(error, self.language))

    def _greet(self) -> None:
        unanswered = bool(self.session.messages) and self.session.messages[-1].role == "user"
        if self.at_keyboard:
            key = "greeting_adapter" if self.session.adapter else "greeting"
            keys = say("keys", self.language)
            self._tell(key, name=self.session.name, adapter=self.session.adapter, keys=keys)
            for message in self.session.messages[-2:]:
                notice(f"  {message.role}: {printable(message.content)[:200]}")
        if unanswered:
            self._tell("unanswered")

    def _tell(self, key: str, **values: object) -> None:
        notice(say(key, self.language, **values))

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
                write_answer(replying, plain=self.plain)
            finally:
                reply = self.session.finish(replying)
        if cancel.cancelled:
            self.interrupted_at = time.monotonic()
        report(
            reply,
            verbose=self.verbose,
            known_dropped_turns=self.dropped_turns,
            context_tokens=self._context_tokens(),
            shown_in=self.language,
        )
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
        for word in COMMANDS:
            notice(f"  {word:8} {explain(word, self.language)}")
        if fills_blanks(self.session.loaded):
            notice(f"  {say('blanks', self.language)}")
        notice(f"  {say('keys', self.language)}")

    def _do_lang(self, rest: str) -> None:
        if rest not in ("", *get_args(Language)):
            raise UsageError(f"no language {rest!r}; expected zh or en", hint="/lang zh")
        self.language = rest or self.language  # type: ignore[assignment]
        self._tell("language")

    def _do_clear(self, rest: str) -> None:
        self.session.clear()
        self.dropped_turns = 0
        self._tell("cleared")

    def _do_system(self, rest: str) -> None:
        if rest:
            self.session.set_system(None if rest == "off" else rest)
        self._tell("system", text=self.session.system or say("none", self.language))

    def _do_set(self, rest: str) -> None:
        if rest:
            name, equals, text = rest.partition("=") if "=" in rest else rest.partition(" ")
            if not equals or not text.strip():
                raise UsageError("a setting is written name=value", hint="/set temperature=0.5")
            self.session.set(name.strip(), _value(text.strip()))
        for name, value in self.session.effective().items():
            notice(f"  {name} = {value}")

    def _do_model(self, rest: str) -> None:
        if rest and rest != self.session.name:
            if self.load is None:
                raise UsageError("another model cannot be loaded here")
            try:
                loaded = self.load(rest)
            except KeyboardInterrupt:
                self._tell("stopped")
                return
            self._go_on(replace(self.session.conversation(), adapter=None, active=None), loaded, rest)
        self._tell("model", name=self.session.name)

    def _do_adapter(self, rest: str) -> None:
        if rest:
            self.session.use(None if rest in _OFF else rest)
        for name in self._adapters():
            active = name == (self.session.adapter or "base")
            notice(f"  {'*' if active else ' '} {name}")

    def _adapters(self) -> tuple[str, ...]:
        adapters = self.session.loaded.adapters
        return ("base", *(adapters.names if adapters is not None else ()))

    def _do_stats(self, rest: str) -> None:
        if rest in ("on", "off"):
            self.verbose = rest == "on"
            return
        if self.session.last is None:
            raise UsageError("there is no answer yet")
        notice(describe(self.session.last, context_tokens=self._context_tokens(), shown_in=self.language))

    def _do_retry(self, rest: str) -> None:
        self._answer(self.session.retry)

    def _do_undo(self, rest: str) -> None:
        self.session.undo()
        self._tell("undone")

    def _do_edit(self, rest: str) -> None:
        questions = [message.content for message in self.session.messages if message.role == "user"]
        if not questions:
            raise UsageError("there is no question yet")
        changed = _edited(questions[-1])
        if not changed or changed == questions[-1]:
            self._tell("unchanged")
            return
        before = self.session.messages
        self.session.undo()
        self._tell("asked", text=printable(changed))
        try:
            self._answer(lambda cancel: self.session.ask(changed, cancel))
        except GlmkitError:
            self.session.messages = before
            raise

    def _do_save(self, rest: str) -> None:
        if not rest:
            raise UsageError("/save needs a file", hint="/save talk.json")
        path = Path(rest).expanduser()
        form: Form = "md" if path.suffix.lower() == ".md" else "html" if path.suffix.lower() == ".html" else "json"
        try:
            with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(export(self.session.conversation(), form, self.language))
        except FileExistsError:
            raise OutputError(f"{path} exists already", hint="choose another name") from None
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from None
        self._tell("saved", path=path)

    def _do_load(self, rest: str) -> None:
        store = self.session.store or ConversationStore()
        if not rest:
            entries = store.list().entries[:_LISTED]
            for entry in entries:
                count = say("messages", self.language, count=entry.count)
                notice(f"  {entry.id[:8]}  {count}  {printable(entry.title)}")
            if not entries:
                self._tell("nothing_kept")
            return
        path = Path(rest).expanduser()
        if path.is_file():
            try:
                conversation = import_conversation(path.read_text(encoding="utf-8", errors="replace"))
            except OSError as error:
                raise UsageError(f"cannot read {path}: {error.strerror}") from None
        elif path.suffix:
            raise UsageError(f"there is no file {path}", hint="/load lists what is kept")
        else:
            conversation = store.open(store.identify(rest))
        self._go_on(conversation, self.session.loaded, self.session.name)
        self._tell(
            "loaded", title=printable(self.session.conversation().title or rest), count=len(conversation.messages)
        )
        if conversation.messages and conversation.messages[-1].role == "user":
            self._tell("unanswered")

    def _go_on(self, conversation: Conversation, loaded: Any, name: str) -> None:
        """Goes on with a conversation and a model; if they do not fit, everything stays as it was."""
        settings = self.session.settings if conversation.id == self.session.conversation().id else conversation.settings
        fresh = Session(
            loaded,
            name,
            settings=dict(settings),
            store=self.session.store,
            earlier=conversation,
            warn=lambda text: notice(f"warning: {text}"),
        )
        if loaded is self.session.loaded:
            fresh.adapter = self.session.adapter
        self.session, self.dropped_turns = fresh, 0

    # --- what stands around the line ---

    def _context_tokens(self) -> int | None:
        return getattr(self.session.loaded.model.config, "max_position_embeddings", None)

    def _below(self) -> str:
        """What of the context the last answer used, and its speed."""
        last, all_tokens = self.session.last, self._context_tokens()
        if last is None or not all_tokens:
            return self.session.name
        share = (last.usage.prompt_tokens + last.usage.completion_tokens) / all_tokens
        return say(
            "below", self.language,
            name=self.session.name, share=share, all=all_tokens, speed=last.timings.tokens_per_second,
        )  # fmt: skip

    def _explanations(self) -> Mapping[str, str]:
        return {word: explain(word, self.language) for word in COMMANDS}

    def _choices(self, command: str) -> Sequence[str]:
        """What may follow a command, for completion."""
        command = _WORDS.get(command, command)
        if command == "/set":
            return [f"{name}=" for name in self.session.effective()]
        if command == "/adapter":
            return self._adapters()
        if command == "/model":
            return _local_models()
        if command == "/load":
            return [entry.id[:8] for entry in (self.session.store or ConversationStore()).list().entries]
        return {"/lang": get_args(Language), "/stats": ("on", "off"), "/system": ("off",)}.get(command, ())

    # --- input ---

    def _reader(self) -> Callable[[], str]:
        if not self.plain and self.at_keyboard and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            from glmkit.line_editor import LineEditor

            return LineEditor(self._explanations, self._choices, self._below).read
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


def _edited(text: str) -> str:
    """A text as it is after the user's editor; "" if nothing is left."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    descriptor, name = tempfile.mkstemp(prefix="glm-", suffix=".md")  # its owner alone may read it
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        try:
            code = subprocess.call([*shlex.split(editor), name])
        except (OSError, ValueError) as error:
            raise UsageError(f"the editor {editor!r} cannot be started: {error}", hint="export EDITOR=nano") from None
        return "" if code else Path(name).read_text(encoding="utf-8", errors="replace").strip()
    finally:
        Path(name).unlink(missing_ok=True)


def _local_models() -> list[str]:
    """Families that are on this machine."""
    found = []
    for family in FAMILIES:
        try:
            locate(family.name)
        except GlmkitError:
            continue
        found.append(family.name)
    return found
