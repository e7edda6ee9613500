"""Chatting in a terminal: `glm chat`, as a loop or with one question.

The answer, and nothing else, goes to standard output; everything about it goes to standard error.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from glmkit.cli import paint
from glmkit.errors import UsageError
from glmkit.terminal_markdown import MarkdownPainter
from glmkit.terminal_texts import say
from glmkit.translation import Language, language

if TYPE_CHECKING:
    from glmkit.chat.answers import AnswerStream, Reply
    from glmkit.chat.session import Session
    from glmkit.chat.store import Conversation, ConversationStore
    from glmkit.engine.decode import CancelToken

DEFAULT_MODEL = "glm-nano"
_SCHEMA = 1
_WAIT_SECONDS = 3.0
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line end


@dataclass(frozen=True)
class ChatRequest:
    """What `glm chat` was asked for.

    Args:
        model: Folder, name or hub id; None is that of the conversation to continue, or glm-nano.
        prompt: One question; "-" is standard input. None is the loop.
        system: System prompt.
        loading: Arguments of `glmkit.load`.
        sampling: Settings of `glmkit.chat.choices.choose`.
        json: Print one JSON object in place of the answer.
        continued: Go on with the conversation whose id begins so, "" with the last; None begins a new one.
        plain: No line editor, and no colours in answers.
        verbose: Print speed and tokens after each answer.
    """

    model: str | None = None
    prompt: str | None = None
    system: str | None = None
    loading: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    json: bool = False
    continued: str | None = None
    plain: bool = False
    verbose: bool = False


def run(request: ChatRequest) -> int:
    """Chats.

    Args:
        request: What was asked for.

    Returns:
        The exit code.

    Raises:
        GlmkitError: What the user can cure.
    """
    if request.json and request.prompt is None:
        raise UsageError("--json prints one answer and needs a question", hint='glm chat --json --prompt "你好"')
    # What can be wrong with the request is found before the seconds that loading takes.
    question = None if request.prompt is None else read_question(request.prompt)
    session = _open_session(request)
    if question is not None:
        return _answer_once(session, question, request)
    from glmkit.terminal_loop import ChatLoop

    others = request.loading | {"adapter": None, "family": None}  # which belong to the first model
    return ChatLoop(
        session, plain=request.plain, verbose=request.verbose, load=lambda name: load_model(name, others)
    ).run()


def notice(text: str) -> None:
    """Prints something about the conversation on standard error.

    Args:
        text: What.
    """
    print(paint(text, "2", sys.stderr), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Takes out the control characters with which a text could take over a terminal.

    Args:
        text: What a model wrote.
    """
    return _CONTROL.sub("", text)


# --- beginning ---


def read_question(prompt: str) -> str:
    """Puts the question together from the flag and standard input.

    Args:
        prompt: What followed `--prompt`; "-" stands for standard input. Other text is followed by what is piped in.

    Raises:
        UsageError: There is no text, or it is not UTF-8.
    """
    if prompt == "-":
        question = _read_stdin() if sys.stdin is not None else ""
    else:
        piped = _read_stdin() if _is_piped() else ""
        question = f"{prompt}\n\n{piped}" if piped else prompt
    if not question.strip():
        raise UsageError("the question is empty", hint='glm chat --prompt "你好"')
    return question


def _is_piped() -> bool:
    """Whether standard input is a pipe or file; what services and editors leave there may never end."""
    if sys.stdin is None or sys.stdin.isatty():
        return False
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return True  # no file behind it: somebody's text in memory
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _read_stdin() -> str:
    # A program that started this one may hold the other end of the pipe open without knowing it.
    timer = threading.Timer(_WAIT_SECONDS, notice, ["reading standard input to its end; '< /dev/null' gives none"])
    timer.daemon = True
    timer.start()
    try:
        return sys.stdin.buffer.read().decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8 (byte {error.start})", hint="iconv -f GB18030 -t UTF-8 FILE | glm chat -p -"
        ) from None
    finally:
        timer.cancel()


def _open_session(request: ChatRequest) -> Session:
    store, earlier = _kept(request)
    name = request.model or (earlier.model if earlier else DEFAULT_MODEL)
    arguments = dict(request.loading)
    if earlier is not None and earlier.model == name and arguments.get("adapter") is None:
        arguments["adapter"] = earlier.adapter
    loaded = load_model(name, arguments)
    from glmkit.chat.session import Session
    from glmkit.chat.store import BASE

    if earlier is not None and loaded.adapters is not None and earlier.active in (BASE, *loaded.adapters.names):
        loaded.use(None if earlier.active == BASE else earlier.active)
    if fills_blanks(loaded):
        if request.prompt is None:
            notice(say("fills", language(), name=name))
    elif loaded.family is not None and not loaded.family.chat:
        notice(say("base_model", language(), name=loaded.family.name))
    session = Session(
        loaded,
        name,
        settings=(earlier.settings if earlier else {}) | request.sampling,
        store=store,
        earlier=earlier,
        warn=lambda text: notice(f"warning: {text}"),
    )
    if request.system is not None:
        session.set_system(request.system)
    return session


def load_model(name: str, arguments: dict[str, Any]) -> Any:
    """Loads a model for a conversation.

    Args:
        name: Folder, name or hub id.
        arguments: Of `glmkit.load`.

    Raises:
        GlmkitError: There is no such model, or it cannot be loaded.
    """
    from glmkit.location import locate

    locate(name, download=bool(arguments.get("download")))  # before the seconds that importing torch takes
    if sys.stderr.isatty():
        notice(say("loading", language(), name=name))
    from glmkit.loading import load

    return load(name, **arguments)


def fills_blanks(loaded: Any) -> bool:
    """Whether a model fills the blanks of a text instead of chatting.

    Args:
        loaded: A `glmkit.loading.Loaded`.
    """
    return getattr(loaded.tokenizer, "generation", None) == 0


def _kept(request: ChatRequest) -> tuple[ConversationStore | None, Conversation | None]:
    """Where the conversation is kept, and the one to continue, if any.

    One question is kept on disk only as part of a conversation that it continues.
    """
    from glmkit.chat.store import ConversationStore

    store = ConversationStore()
    if request.continued is None:
        return None if request.prompt is not None else store, None
    if not request.continued and store.newest() is None:
        raise UsageError("there is no earlier conversation to continue", hint="start one without --continue")
    return store, store.open(store.identify(request.continued))


# --- answering ---


@contextmanager
def ctrl_c_cancels(cancel: CancelToken) -> Iterator[None]:
    """Lets the first Ctrl-C end the answer and the second end the program.

    Args:
        cancel: What the first Ctrl-C sets.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        if cancel.cancelled:
            raise KeyboardInterrupt
        cancel.cancel()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def write_answer(replying: AnswerStream, *, quiet: bool = False, plain: bool = False) -> None:
    """Prints an answer on standard output as it arrives; a terminal gets Markdown in colours, and fillings underlined.

    Args:
        replying: The answer.
        quiet: Print nothing.
        plain: Print it without colours.
    """
    from glmkit.chat.answers import Filled

    coloured = not plain and paint("x", "1", sys.stdout) != "x"
    painter = MarkdownPainter() if coloured else None
    ended = True
    try:
        for piece in replying:
            shown = printable(piece)
            if not shown or quiet:
                continue
            ended = shown.endswith("\n")
            if isinstance(piece, Filled) and painter is not None:
                shown = painter.end() + paint(shown, "1;4", sys.stdout)
                painter = MarkdownPainter()
            elif painter is not None:
                shown = painter.feed(shown)
            print(shown, end="", flush=True)
    finally:
        if painter is not None:
            print(painter.end(), end="", flush=True)
    if not ended:
        print(flush=True)


def report(
    reply: Reply,
    *,
    verbose: bool,
    known_dropped_turns: int = 0,
    context_tokens: int | None = None,
    shown_in: Language = "en",
) -> None:
    """Says on standard error what the answer itself does not show.

    Args:
        reply: The answer.
        verbose: Also say what is as usual: tokens and speed.
        known_dropped_turns: How many turns were left out before, and reported then.
        context_tokens: What prompt and answer may have together, if that is to be told.
        shown_in: The language.
    """
    if reply.dropped_turns > known_dropped_turns:
        key = "dropped_one" if reply.dropped_turns == 1 else "dropped"
        notice(say(key, shown_in, turns=reply.dropped_turns))
    if reply.tool_call is not None:
        arguments = json.dumps(reply.tool_call.arguments, ensure_ascii=False, default=str)
        notice(say("tool", shown_in, name=reply.tool_call.name, arguments=printable(arguments)))
    if reply.malformed is not None:
        notice(say("malformed", shown_in, text=printable(reply.malformed)))
    if reply.finish_reason == "length":
        notice(say("cut", shown_in))
    if reply.finish_reason == "cancelled":
        notice(say("stopped", shown_in))
    if verbose:
        notice(describe(reply, context_tokens=context_tokens, shown_in=shown_in))


def describe(reply: Reply, *, context_tokens: int | None = None, shown_in: Language = "en") -> str:
    """Tokens and speed of an answer in one line.

    Args:
        reply: The answer.
        context_tokens: What prompt and answer may have together, if that is to be told.
        shown_in: The language.
    """
    usage, timings = reply.usage, reply.timings
    used = usage.prompt_tokens + usage.completion_tokens
    return say(
        "stats",
        shown_in,
        tokens=usage.completion_tokens,
        speed=timings.tokens_per_second,
        prompt=usage.prompt_tokens,
        seconds=timings.prefill_seconds,
        reason=reply.finish_reason,
        context=say("stats_context", shown_in, used=used, all=context_tokens) if context_tokens else "",
    )


def _answer_once(session: Session, question: str, request: ChatRequest) -> int:
    from glmkit.engine.decode import CancelToken

    cancel = CancelToken()
    with ctrl_c_cancels(cancel):
        replying = session.ask(question, cancel)
        write_answer(replying, quiet=request.json, plain=request.plain)
    reply = session.finish(replying)
    if request.json:
        print(_escaped(json.dumps(_as_json(session, reply), ensure_ascii=False, indent=2)))
    report(reply, verbose=request.verbose, shown_in=language())
    return 130 if reply.finish_reason == "cancelled" else 0


def _as_json(session: Session, reply: Reply) -> dict[str, Any]:
    call = reply.tool_call
    return {
        "schema": _SCHEMA,
        "model": session.name,
        "adapter": None if session.adapter_folder is None else str(session.adapter_folder),
        "text": reply.text,
        **({"fillings": list(reply.fillings)} if reply.fillings else {}),
        "tool_call": None if call is None else {"name": call.name, "arguments": call.arguments},
        "malformed": reply.malformed,
        "finish_reason": reply.finish_reason,
        "dropped_turns": reply.dropped_turns,
        "seed": session.seed,
        "usage": {
            "prompt_tokens": reply.usage.prompt_tokens,
            "completion_tokens": reply.usage.completion_tokens,
            "total_tokens": reply.usage.prompt_tokens + reply.usage.completion_tokens,
        },
        "timings": {
            "prefill_seconds": round(reply.timings.prefill_seconds, 4),
            "decode_seconds": round(reply.timings.decode_seconds, 4),
            "tokens_per_second": round(reply.timings.tokens_per_second, 2),
        },
    }


def _escaped(text: str) -> str:
    """JSON itself escapes control characters below 0x20 only."""
    return re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text)
