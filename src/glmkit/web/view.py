"""What the page shows of a conversation: rows for the chat component, the meter, and the prompt as the model gets it.

A model's text is nobody's HTML. Marks that would begin a tag get an invisible character behind them, except in code and
formulas, where the page shows them as text anyway; images of other machines become links. The page's own filter and its
Content-Security-Policy stand behind that.
"""

from __future__ import annotations

import html
import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from urllib.parse import quote

from glmkit.chat.context import fit_context, reserve_tokens
from glmkit.chat.messages import Message
from glmkit.chat.printing import arguments_of, fenced
from glmkit.tools.loop import IMAGE, NO_OUTPUT, code_of
from glmkit.web.talks import Context, Kind, Note, Part, Talk
from glmkit.web.texts import Language, say

JOINER = "\u2060"  # nothing to see, no place to break a line
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})", re.MULTILINE)
# What begins code or a formula, or is a sign that begins none; and what can end it. A formula between single dollars is
# found whole.
_OPENING = re.compile(r"\\[\\`]|`+|\$\$|\\[\[(]|(?<!\$)\$(?!\$)[^$\n]+\$(?!\$)")
_CLOSING = re.compile(r"`+|\$\$|\\[\])]")
_ENDED_BY = {"\\[": "\\]", "\\(": "\\)"}  # other marks end themselves
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_LOCAL = r"/figures/[0-9a-f]+/[0-9a-f]+\.png"
_LOCAL_IMAGE = rf"!\[[^\[\]\n]*\]\({_LOCAL}\)"
_REMOTE_IMAGE = re.compile(rf"(?!{_LOCAL_IMAGE})!\[([^\[\]\n]*)\]\(\s*<?([^)\s>\[]+)(?:[\s>][^)\n\[]*)?\)")
_OTHER_IMAGE = re.compile(rf"(?!{_LOCAL_IMAGE})!(?=\[)")  # by reference, or written in a way that is not read above
_SCHEME = re.compile(
    r"\](?=(?:\(|:)\s*(?:<\s*)?(?:(?:j\s*a\s*v\s*a|v\s*b)\s*s\s*c\s*r\s*i\s*p\s*t|data|file|blob)\s*:)", re.IGNORECASE
)
_OWN = re.compile(r"(?<!\n)\n*<span class=\"glm-[a-z]+\">[^<]*</span>")  # what the page adds below an answer
_MARKUP = re.compile(r"[\\`*_\[\]<$|~&]")
_LINE_MARKUP = re.compile(r"^([ \t]*(?:\d+(?=[.)]))?)([#>+=.)-])", re.MULTILINE)
_INDENT = re.compile(r"^[ \t]+", re.MULTILINE)
_SPACES = {" ": "\u00a0", "\t": "\u2003"}
LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
    {"left": "$", "right": "$", "display": False},
]


@dataclass(frozen=True)
class Row:
    """One entry of the chat component.

    Args:
        shown: What the component gets.
        place: Index of the message in the conversation, if the row is its text and can be edited; else -1.
    """

    shown: dict[str, Any]
    place: int = -1


# --- a model's text as Markdown without surprises ---


def safe_markdown(text: str, language: Language = "en") -> str:
    """Markdown that shows a text and loads or runs nothing.

    Args:
        text: What a model, a tool or a person wrote.
        language: Of the words for an image that is not loaded.

    Returns:
        Markdown; `original` takes the invisible characters out again.
    """
    pieces, fence = [], ""
    lines = text.splitlines(keepends=True)
    plain: list[str] = []
    for line in lines:
        found = _FENCE.match(line)
        if not fence and found:
            pieces.append(_safe_prose("".join(plain), language))
            plain, fence = [], found[1]
            pieces.append(_safe_fence(line))
        elif fence:
            pieces.append(line)
            if found and found[1][0] == fence[0] and len(found[1]) >= len(fence) and line.strip() == found[1]:
                fence = ""
        else:
            plain.append(line)
    return "".join([*pieces, _safe_prose("".join(plain), language)])


def plain_markdown(text: str) -> str:
    """Markdown that shows a text exactly as somebody typed it; `original` gives the text back.

    Args:
        text: What a person wrote.
    """
    text = _MARKUP.sub(lambda found: f"{JOINER}\\{found[0]}", text)
    text = _LINE_MARKUP.sub(lambda found: f"{found[1]}{JOINER}\\{found[2]}", text)
    return _INDENT.sub(lambda found: "".join(JOINER + _SPACES[space] for space in found[0]), text)


def original(text: str) -> str:
    """The text that `safe_markdown` or `plain_markdown` was given, images of other machines aside.

    Args:
        text: Markdown from the page.
    """
    text = _OWN.sub("", text).replace(JOINER + "\\", "")
    text = text.replace("<" + JOINER, "<").replace("!" + JOINER, "!").replace("]" + JOINER, "]")
    for space, shown in _SPACES.items():
        text = text.replace(JOINER + shown, space)
    return text


def _safe_fence(line: str) -> str:
    """The name behind a fence becomes a class of an element: letters, digits, + # - . only."""
    mark = _FENCE.match(line)
    assert mark is not None
    name = re.match(r"[\w+#.-]*", line[mark.end() :].strip())
    return f"{line[: mark.end()]}{name[0] if name else ''}\n"


def _safe_prose(text: str, language: Language) -> str:
    parts, end = [], 0
    for begin, after in _left_alone(text):
        parts += [_safe_plain(text[end:begin], language), text[begin:after]]
        end = after
    return "".join([*parts, _safe_plain(text[end:], language)])


def _left_alone(text: str) -> Iterator[tuple[int, int]]:
    """Where code and formulas begin and end. What nothing ends is text, which is found out without reading on."""
    ends: dict[str, list[int]] = {}
    for found in _CLOSING.finditer(text):
        ends.setdefault(found[0], []).append(found.start())
    place = 0
    while opening := _OPENING.search(text, place):
        begin, place = opening.span()
        mark = opening[0]
        if mark[0] == "$" and mark != "$$":
            yield begin, place
            continue
        places = ends.get(_ENDED_BY.get(mark, mark), [])
        later = bisect_right(places, place)
        if later == len(places):
            continue
        # Code over several lines would end at a new paragraph or list, and what follows there could be a tag.
        if mark[0] != "`" or "\n" not in text[place : places[later]]:
            place = places[later] + len(mark)
            yield begin, place


def _safe_plain(text: str, language: Language) -> str:
    text = _REMOTE_IMAGE.sub(lambda found: _image(found, language), text)
    text = _OTHER_IMAGE.sub("!" + JOINER, text)
    text = _SCHEME.sub("]" + JOINER, text)
    return _TAG.sub("<" + JOINER, text)


def _image(found: re.Match[str], language: Language) -> str:
    return f"[🖼 {found[1]} ({say(language, 'remote_image')})]({found[2]})"


# --- a conversation's parts ---


def parts(talk: Talk) -> list[Part]:
    """A conversation as a list of what is shown, the answer that is being written among it.

    Args:
        talk: The conversation.
    """
    shown: list[Part] = []
    for place, message in enumerate(talk.messages):
        note = talk.notes.get(place, Note())
        if message.role == "observation" and shown and shown[-1].kind in ("call", "code"):
            shown[-1].observation, shown[-1].note = message.content, note
        elif message.role == "user":
            shown.append(Part("user", message.content, place=place, note=note))
        elif message.role == "assistant" and message.metadata and not note.malformed:
            kind: Kind = "code" if talk.mode == "code" else "call"
            shown.append(Part(kind, message.content, message.metadata, arguments_of(message), place=place, note=note))
        elif message.role in ("assistant", "observation"):
            shown.append(Part("text", message.content, place=place, note=note))
    return [*shown, *talk.live]


def rows(talk: Talk, language: Language) -> list[Row]:
    """A conversation for the chat component.

    Args:
        talk: The conversation.
        language: Of the words around it.
    """
    made: list[Row] = []
    questions = 0
    for part in parts(talk):
        if part.kind == "user":
            if questions == talk.context.dropped_turns > 0:
                made.append(_forgotten(questions, language))
            questions += 1
            made.append(Row({"role": "user", "content": plain_markdown(part.text)}, part.place))
        elif part.kind == "text":
            caption = _caption(part, language, bool(talk.adapter or part.note.adapter))
            pieces = [piece for piece in (safe_markdown(part.text, language), caption) if piece]
            if pieces:
                made.append(Row({"role": "assistant", "content": "\n\n".join(pieces)}, part.place))
        else:
            made += _panel(talk, part, language)
    if talk.running and (not talk.live or not made or made[-1].shown["role"] == "user"):
        made.append(Row({"role": "assistant", "content": f'<span class="glm-wait">{say(language, "thinking")}</span>'}))
    if talk.problem:
        text = html.escape(say(language, "failed", reason=talk.problem))
        made.append(Row({"role": "assistant", "content": f'<span class="glm-problem">{text}</span>'}))
    return made


def _forgotten(count: int, language: Language) -> Row:
    """The line between what the model no longer sees and what it does."""
    text = html.escape(say(language, "forgotten", count=count))
    return Row({"role": "assistant", "content": f'<span class="glm-forgotten">{text}</span>'})


def _caption(part: Part, language: Language, adapters: bool) -> str:
    """The small line below an answer: who wrote it, how fast, and why it ended early."""
    note, said = part.note, []
    if part.running:
        return ""
    if note.adapter or (adapters and note.tokens is not None):
        said.append(note.adapter or say(language, "adapter_base"))
    if note.first_token_seconds is not None:
        said.append(say(language, "first_token", seconds=note.first_token_seconds))
    if note.tokens_per_second:
        said.append(say(language, "speed", speed=note.tokens_per_second))
    if note.tokens is not None:
        said.append(say(language, "tokens", count=note.tokens))
    if note.finish_reason in ("length", "cancelled"):
        said.append(say(language, "cut" if note.finish_reason == "length" else "stopped"))
    if note.malformed:
        said.append(say(language, "malformed", reason=note.malformed[:200]))
    text = html.escape(" · ".join(said))
    return f'<span class="glm-caption">{text}</span>' if said else ""


def _panel(talk: Talk, part: Part, language: Language) -> list[Row]:
    """A call or code as a panel that folds, and behind it the pictures."""
    note = part.note
    title = say(language, "ran") if part.kind == "code" else say(language, "call", name=part.name)
    if part.arguments:
        title += " · " + ", ".join(f"{name}: {value}" for name, value in part.arguments.items())
    marks = [say(language, key) for key, on in _marks(note) if on]
    waits = part.observation is None and not part.running and part.kind == "call" and part.name == talk.pending
    if waits:
        title = say(language, "call_waits", name=part.name)
    metadata: dict[str, Any] = {"title": _one_line(title)}
    metadata["status"] = "pending" if part.running else "done"
    if marks:
        metadata["log"] = " · ".join(marks)
    if note.seconds is not None:
        metadata["duration"] = round(note.seconds, 2)
    body = [fenced(code_of(part.text, generation=3).strip("\n"), "python")]
    if part.kind == "call":
        given = part.arguments
        body = [f"**{say(language, 'arguments')}**", fenced(part.text if given is None else pretty(given), "json")]
    if part.observation is not None:
        heading = say(language, "output" if part.kind == "code" else "observation")
        text = _without_marks(part.observation, len(note.figures)) or say(language, "nothing_printed")
        body += [f"**{heading}**", fenced(_pretty_text(text), "text")]
    made = [Row({"role": "assistant", "content": "\n\n".join(body), "metadata": metadata})]
    for number, name in enumerate(note.figures, start=1):
        made.append(
            Row(
                {
                    "role": "assistant",
                    "content": f"![{say(language, 'figure', number=number)}]({figure_path(talk, name)})",
                }
            )
        )
    return made


def _without_marks(text: str, figures: int) -> str:
    """What code printed, without the marks that tell the model of pictures: people see them."""
    lines = [line for line in text.splitlines() if not figures or line != IMAGE]
    return "" if lines == [NO_OUTPUT] else "\n".join(lines).strip()


def _marks(note: Note) -> list[tuple[str, bool]]:
    return [("tool_failed", note.failed), ("tool_cut", note.truncated), ("by_you", note.by_hand)]


def figure_path(talk: Talk, name: str) -> str:
    """Where the page finds a picture; only its owner gets it.

    Args:
        talk: The conversation.
        name: The picture's name.
    """
    return f"/figures/{quote(talk.id)}/{quote(name)}"


def pretty(arguments: Any) -> str:
    """Arguments as JSON over several lines.

    Args:
        arguments: Plain values.
    """
    return json.dumps(arguments, ensure_ascii=False, indent=2, default=str)


def _pretty_text(text: str) -> str:
    try:
        return pretty(json.loads(text)) if text[:1] in "{[" else text
    except (ValueError, RecursionError):
        return text


def _one_line(text: str) -> str:
    return " ".join(text.split())[:120].replace("<", "‹").replace(">", "›")


# --- the context ---


def meter(context: Context, language: Language) -> str:
    """How full the context is, as HTML.

    Args:
        context: The numbers.
        language: Of the words.
    """
    if not context.limit_tokens:
        return ""
    share = min(1.0, context.used_tokens / context.limit_tokens)
    text = say(language, "meter", used=f"{context.used_tokens:,}", limit=f"{context.limit_tokens:,}")
    dropped = ""
    if context.dropped_turns:
        dropped = f'<span class="glm-dropped">{say(language, "dropped", count=context.dropped_turns)}</span>'
    level = "full" if share > 0.9 else "high" if share > 0.7 else "low"
    return (
        f'<div class="glm-meter {level}" role="meter" aria-label="{say(language, "meter_label")}" aria-valuemin="0" '
        f'aria-valuemax="{context.limit_tokens}" aria-valuenow="{context.used_tokens}">'
        f'<span class="bar"><span style="width:{share:.1%}"></span></span><span>{text}</span></div>{dropped}'
    )


def prompt_pieces(
    tokenizer: Any, messages: Sequence[Message], limit_tokens: int
) -> tuple[list[tuple[str, str | None]], list[int]]:
    """The prompt as the model gets it.

    Args:
        tokenizer: The model's tokenizer.
        messages: The conversation up to where the assistant speaks.
        limit_tokens: The model's context.

    Returns:
        Pieces of text, special tokens each for itself with their ids as labels; and all ids.

    Raises:
        UsageError: There is nothing to answer, or it does not fit.
    """
    ids, _ = fit_context(tokenizer, messages, limit_tokens, reserve_tokens(limit_tokens, None))
    names = {token: name for name, token in tokenizer.commands.items()}
    pieces: list[tuple[str, str | None]] = []
    for special, run in groupby(ids, key=names.__contains__):
        if special:
            pieces += [(names[token], str(token)) for token in run]
        else:
            pieces.append((tokenizer.decode_ids(list(run)), None))
    return pieces, list(ids)
