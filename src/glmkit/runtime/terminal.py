"""`glm run` and `python -m glmkit.runtime`: one question, or a conversation with somebody at a keyboard.

The answer, and nothing else, goes to standard output; everything about it goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from glmkit.errors import GlmkitError, UsageError
from glmkit.runtime.answering import Model, load
from glmkit.runtime.prompts import Said
from glmkit.translation import labelled, language

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # with which a text could take over a terminal
_SCHEMA = 1
_COMMANDS = {
    "/help": "this list",
    "/clear": "forget the conversation",
    "/system": "/system TEXT sets the system prompt and forgets the conversation",
    "/quit": "leave (also: Ctrl-D)",
}


def run(
    folder: str,
    prompt: str | None = None,
    *,
    system: str | None = None,
    threads: int | None = None,
    as_json: bool = False,
    **settings: Any,
) -> int:
    """Answers one question, or talks until the user leaves.

    Args:
        folder: What `glm export` wrote.
        prompt: The question; "-" is standard input. None is the conversation.
        system: System prompt.
        threads: How many compute.
        as_json: Print one JSON object in place of the answer to the question.
        **settings: See `Model.answer`.

    Returns:
        The exit code.

    Raises:
        GlmkitError: What the user can cure.
    """
    if as_json and prompt is None:
        raise UsageError("--json prints one answer and needs a question", hint='glm run FOLDER --json --prompt "你好"')
    question = sys.stdin.read().strip() if prompt == "-" else prompt
    if question is not None and not question.strip():
        raise UsageError("the question is empty", hint='glm run FOLDER --prompt "你好"')
    model = load(folder, threads=threads)
    before = [] if system is None else [Said("system", system)]
    if question is not None:
        _show(model, [*before, Said("user", question)], settings, quiet=as_json)
        if as_json:
            print(json.dumps(_described(model), ensure_ascii=False, indent=2))
        return 0
    return _Conversation(model, before, settings).run()


class _Conversation:
    def __init__(self, model: Model, before: list[Said], settings: dict[str, Any]) -> None:
        self.model, self.before, self.settings = model, before, settings
        self.messages: list[Said] = []

    def run(self) -> int:
        at_keyboard = sys.stdin.isatty()
        if at_keyboard:
            what = "write [MASK] where it shall put words" if self.model.fills_blanks else "Ctrl-C stops an answer"
            _notice(f"{self.model.description.family}. {what}; /help lists commands")
        while True:
            if at_keyboard:
                print("> ", end="", file=sys.stderr, flush=True)
            try:
                line = sys.stdin.readline()
            except KeyboardInterrupt:
                return 130
            if not line or line.strip() == "/quit":
                return 0
            try:
                self._take(line.strip())
            except GlmkitError as error:
                _notice(labelled(error, language()))

    def _take(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "/help":
            for name, text in _COMMANDS.items():
                _notice(f"  {name:8} {text}")
        elif word in ("/clear", "/system"):
            self.messages = []
            if word == "/system":
                self.before = [Said("system", rest)] if rest else []
        elif word.startswith("/") and word[1:].isalpha():
            raise UsageError(f"there is no command {word}", hint="/help lists them")
        elif line:
            asked = [*self.messages, Said("user", line)]
            _show(self.model, [*self.before, *asked], self.settings)
            if self.model.last.messages and not self.model.fills_blanks:  # none: it was cut before it began
                self.messages = [*asked, *self.model.last.messages]


def _described(model: Model) -> dict[str, Any]:
    """The last answer, with the names that `glm chat --json` has."""
    answer = model.last
    return {
        "schema": _SCHEMA,
        "family": model.description.family,
        "text": answer.text,
        "messages": [{"role": one.role, "content": one.content} for one in answer.messages],
        "finish_reason": answer.finish_reason or "cancelled",
        "dropped_turns": answer.dropped_turns,
        "usage": {"completion_tokens": len(answer.token_ids)},
    }


def _show(model: Model, messages: Sequence[Said], settings: dict[str, Any], *, quiet: bool = False) -> None:
    with _ctrl_c() as asked:
        pieces = model.answer(messages, **settings)
        for piece in pieces:
            if not quiet:
                print(_CONTROL.sub("", piece), end="", flush=True)
            if asked:
                break
        pieces.close()
    if not quiet:
        print(flush=True)
    if model.last.dropped_turns:
        _notice(f"[the oldest {model.last.dropped_turns} turns do not fit into the context and were left out]")


@contextmanager
def _ctrl_c() -> Iterator[list[bool]]:
    """Ctrl-C asks for the end of an answer, instead of ending the process in the middle of a character."""
    asked: list[bool] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(True)

    earlier = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, earlier)


def _notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m glmkit.runtime`: the same with argparse, for machines that have nothing but the engine.

    Args:
        arguments: Of the command; None: those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m glmkit.runtime", description="Answer from an exported folder.")
    parser.add_argument("folder", help="what `glm export` wrote")
    parser.add_argument("--prompt", "-p", help='one question; "-" reads standard input')
    parser.add_argument("--system", help="system prompt")
    for name, kind in (("temperature", float), ("top-p", float), ("repetition-penalty", float)):
        parser.add_argument(f"--{name}", type=kind)
    for name in ("top-k", "seed", "max-new-tokens", "threads"):
        parser.add_argument(f"--{name}", type=int)
    given = vars(parser.parse_args(arguments))
    try:
        return run(given.pop("folder"), given.pop("prompt"), **given)
    except GlmkitError as error:
        _notice(labelled(error, language()))
        return error.exit_code
