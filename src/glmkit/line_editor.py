"""Editing a message at a terminal: several lines, paste, history, completion of commands and of what follows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.styles import Style

from glmkit.chat.store import state_folder


class LineEditor:
    """Reads messages from a terminal.

    Args:
        commands: The commands to complete, with what they do.
        choices: What may follow a command.
        below: What stands below the line: the model, what of its context is used, its speed.
    """

    def __init__(
        self,
        commands: Callable[[], Mapping[str, str]],
        choices: Callable[[str], Sequence[str]],
        below: Callable[[], str],
    ) -> None:
        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,  # so that a pasted text keeps its lines; Enter sends all the same
            prompt_continuation="  ",
            history=_history(),
            completer=_CommandCompleter(commands, choices),
            complete_while_typing=False,
            bottom_toolbar=below,
            style=Style.from_dict({"bottom-toolbar": "noreverse"}),
            key_bindings=_keys(),
        )

    def read(self) -> str:
        """Reads one message.

        Returns:
            Its text, perhaps of several lines.

        Raises:
            EOFError: Ctrl-D on an empty line.
            KeyboardInterrupt: Ctrl-C.
        """
        return self._session.prompt()


class _CommandCompleter(Completer):
    def __init__(self, commands: Callable[[], Mapping[str, str]], choices: Callable[[str], Sequence[str]]) -> None:
        self._commands, self._choices = commands, choices

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        typed = document.text_before_cursor
        if not typed.startswith(("/", "!")) or "\n" in typed:
            return
        command, space, rest = typed.partition(" ")
        if not space:
            for known, text in self._commands().items():
                if known[1:].startswith(typed[1:]):
                    yield Completion(typed[0] + known[1:], start_position=-len(typed), display_meta=text)
            return
        for choice in self._choices("/" + command[1:]):
            if choice.startswith(rest):
                yield Completion(choice, start_position=-len(rest))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("c-g")
    def open_editor(event: Any) -> None:
        event.current_buffer.open_in_editor(validate_and_handle=False)

    # Alt-Enter arrives as Escape and Enter; Ctrl-J is what some terminals send for Shift-Enter.
    @keys.add("escape", "enter")
    @keys.add("c-j")
    def begin_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    path = state_folder() / "input_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        return FileHistory(str(path))
    except OSError:
        return InMemoryHistory()
