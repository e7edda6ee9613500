"""The command `glm`: from arguments to a verb, and from every failure to `error: …`, `hint: …` and an exit code.

What is needed to start lies here and imports next to nothing; the verbs are in `glmkit.verbs`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from glmkit import __version__
from glmkit.errors import GlmkitError, UsageError
from glmkit.translation import LABELS, describe, language, translate

# What fingers from other tools type first.
_VERB_SYNONYMS = {
    "infer": "chat",
    "generate": "chat",
    "predict": "chat",
    "train": "finetune",
    "sft": "finetune",
    "lora": "finetune",
    "eval": "evaluate",
    "download": "pull",
    "fetch": "pull",
    "ls": "list",
    "models": "list",
    "path": "where",
    "which": "where",
    "remove": "rm",
    "delete": "rm",
    "show": "inspect",
    "info": "inspect",
    "env": "doctor",
    "diagnose": "doctor",
    "demo": "quickstart",
    "start": "quickstart",
    "webui": "web",
    "ui": "web",
    "gradio": "web",
}
_NO_MEMORY_HINT = "--quantize int8 or int4, a smaller --dtype, a shorter conversation, or --device cpu"


def main() -> None:
    """Runs the command with the arguments of the process and leaves with its exit code."""
    code = run(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C while the process ends must not change its code
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
        arguments: Without the name of the program. `--debug` may stand anywhere before `--`.

    Returns:
        The exit code: 0, 2 for wrong usage, 1 for other failures, 130 after Ctrl-C.
    """
    _tolerate_foreign_encodings(sys.stdout, sys.stderr)
    arguments, debug = _take_debug(arguments)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader left, as `head` does. What is still buffered has nowhere to go, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        return _report(error, debug, arguments[:1])


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(_start_page())
        return 0
    if arguments in (["--version"], ["-V"]):
        print(f"glmkit {__version__}")
        return 0
    if arguments[:1] == ["__complete"]:  # asked at every Tab, before the parser is imported
        from glmkit.completion import answer

        print(answer(arguments[1:]), end="")
        return 0
    if arguments == ["help"]:
        arguments = ["--help"]
    from glmkit.verbs import command

    # Outside standalone mode an exit asked for inside comes back as its code, and None is success.
    return command().main(args=arguments, prog_name="glm", standalone_mode=False) or 0


def _take_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    return [*kept, *arguments[end:]], len(kept) < end


def _tolerate_foreign_encodings(*streams: TextIO) -> None:
    """A terminal that cannot show Chinese gets question marks, not an exception in the middle of an answer."""
    for stream in streams:
        encoding = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "")
        if encoding != "utf8" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _start_page() -> str:
    from glmkit.inventory import next_step

    lines = [
        ("glm quickstart", "the whole way in three minutes, offline: chat, evaluate, tune, evaluate again"),
        ("glm chat", "talk to glm-nano, the small model that comes with this package"),
        next_step(),
        ("glm list", "the models on this machine"),
        ("glm inspect chatglm3-6b", "what a model is and how much memory it needs"),
        ("glm finetune adgen_lora", "tune a model with LoRA; recipes are YAML files"),
        ("glm doctor", "what this machine computes with, and what would make it faster"),
        ("glm --help", "all verbs; glm VERB --help for one"),
    ]
    width = max(len(call) for call, _ in lines)
    here = language()
    listed = "\n".join(f"  {call.ljust(width)}  {translate(text, here)}" for call, text in lines)
    return f"glmkit {__version__}: {translate('load, chat with, tune and evaluate GLM models', here)}\n\n{listed}"


# --- failures ---


def unknown_verb(word: str, known: Sequence[str], command: str = "glm") -> UsageError:
    """The error for a verb that does not exist, with the one that was probably meant.

    Args:
        word: What was typed in place of a verb.
        known: The verbs there are.
        command: What they stand behind: "glm", or a verb that has verbs of its own.
    """
    from difflib import get_close_matches

    from glmkit.families import find_family

    close = get_close_matches(word, known, n=1)
    if word in _VERB_SYNONYMS and command == "glm":
        hint = f"did you mean glm {_VERB_SYNONYMS[word]}?"
    elif close:
        hint = f"did you mean {command} {close[0]}?"
    elif command == "glm" and (find_family(word) or os.path.isdir(word)):
        hint = f"did you mean glm chat {word}?"
    else:
        hint = f"known verbs: {', '.join(known)}"
    return UsageError(f"there is no verb {word!r}", hint=hint)


def _report(error: Exception, debug: bool, verb: Sequence[str]) -> int:
    """Prints an error and its cure on stderr.

    Args:
        error: What was raised.
        debug: Whether its traceback is there already.
        verb: The first argument, if there is one.

    Returns:
        The exit code.
    """
    told = _told(error)
    here = language()
    message, hint = describe(told, here)
    if hint is None and not isinstance(error, GlmkitError) and not debug:
        hint = translate("the same command with --debug shows where it happened", here)
    if hint is None and isinstance(error, UsageError):
        hint = translate(f"{' '.join(['glm', *verb])} --help lists what there is", here)
    from glmkit.terminal import printable  # names of files, and what servers answer, may have control characters

    print(f"{paint(LABELS[here][0], '1;31', sys.stderr)}{printable(message)}", file=sys.stderr)
    if hint:
        print(f"{paint(LABELS[here][1], '1;36', sys.stderr)}{printable(hint)}", file=sys.stderr)
    return told.exit_code


def _told(error: Exception) -> GlmkitError:
    """Any exception as one that says what happened, with its cure and exit code."""
    if isinstance(error, GlmkitError):
        return error
    if hasattr(error, "format_message"):  # of the argument parser, whose classes moved between releases of typer
        return _parser_error(error)
    if type(error).__name__ == "Abort":
        return GlmkitError("input ended")
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return GlmkitError(f"out of memory: {text.splitlines()[0]}" if text else "out of memory", hint=_NO_MEMORY_HINT)
    if isinstance(error, OSError) and error.strerror:
        return GlmkitError(f"{error.strerror}: {error.filename}" if error.filename else error.strerror)
    if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "transformers"):
        return GlmkitError(
            f"this needs the package {error.name}, which is not installed",
            hint=f"pip install {error.name}; or glm run, which answers from what glm export wrote, without it",
        )
    return GlmkitError(f"unexpected {type(error).__name__}: {text}")


def _parser_error(error: Any) -> UsageError:
    from difflib import get_close_matches

    context = getattr(error, "ctx", None)
    command = context.command_path if context else "glm"
    help_hint = f"{command} --help lists what there is"
    if type(error).__name__ == "NoArgsIsHelpError":
        return UsageError("a verb is missing", hint=help_hint)
    message = getattr(error, "message", "") or error.format_message()
    if getattr(error, "param", None) is not None:
        message = error.format_message()
    message = message[:1].lower() + message[1:].rstrip(".")
    option = getattr(error, "option_name", None) or ""
    if option and context is None:
        return UsageError(message, hint="write a value behind it")
    # The parser proposes whatever shares a few letters; a far-fetched proposal is worse than the list.
    close = get_close_matches(option, getattr(error, "possibilities", None) or (), 1, 0.7)
    return UsageError(message, hint=f"did you mean {close[0]}?" if close else help_hint)


def paint(text: str, code: str, stream: TextIO) -> str:
    """Colours text, if the stream is a terminal and nobody asked for none.

    Args:
        text: The text.
        code: ANSI codes, such as "1;31".
        stream: Where it will be printed.
    """
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\x1b[{code}m{text}\x1b[0m"
