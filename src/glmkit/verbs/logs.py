"""The verb logs: conversations that were kept, of the terminal and of the web app."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glmkit.errors import OutputError, UsageError
from glmkit.verbs.app import Json, Verb, group
from glmkit.verbs.printing import table

if TYPE_CHECKING:
    from glmkit.chat.messages import Message
    from glmkit.chat.store import Conversation, Entry

_SCHEMA = 1
_SHOWN_ID = 8
_AROUND_CHARACTERS = 30
_FORMS = ("md", "json", "html")

_logs = group("logs", "List, read, search and export conversations.")

_Which = Annotated[
    str, typer.Argument(help="Beginning of an id that glm logs list shows; the newest by default.", metavar="[ID]")
]


@_logs.command("list", cls=Verb, help="List conversations, the one last written to first.")
def logs_list(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many at most.")] = 20,
    json_: Json = False,
) -> int:
    """Lists them."""
    from glmkit.chat.store import ConversationStore

    found = ConversationStore().list()
    if json_:
        listed = [_plain(entry) for entry in found.entries[:limit]]
        print(_json({"conversations": listed, "damaged": found.damaged}))
        return 0
    for name, why in found.damaged.items():
        print(f"{name} cannot be opened: {why}", file=sys.stderr)
    if not found.entries:
        print("there is no conversation yet; glm chat begins one", file=sys.stderr)
    _show(found.entries[:limit])
    if len(found.entries) > limit:
        print(f"{len(found.entries) - limit} more: --limit {len(found.entries)}", file=sys.stderr)
    return 0


@_logs.command("show", cls=Verb, help="Print a conversation.")
def logs_show(id: _Which = "", json_: Json = False) -> int:
    """Prints it as Markdown, or its messages as JSON."""
    from glmkit.chat.interchange import export
    from glmkit.chat.transcript import messages_to_dicts
    from glmkit.terminal import printable
    from glmkit.translation import language

    found = _open(id)
    if json_:
        about = {
            "id": found.id, "title": found.title, "mode": found.mode, "model": found.model, "adapter": found.adapter,
            "settings": found.settings, "created": found.created, "updated": found.updated,
        }  # fmt: skip
        print(_json(about | {"messages": messages_to_dicts(found.messages)}))
        return 0
    print(printable(export(found, "md", language())).rstrip("\n"))
    return 0


@_logs.command("search", cls=Verb, help="Find conversations in which a text was said, in any language.")
def logs_search(
    text: Annotated[str, typer.Argument(help="What to look for; upper and lower case are one.", metavar="TEXT")],
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many conversations at most.")] = 20,
    json_: Json = False,
) -> int:
    """Searches titles and messages; 1 if nothing was found, as grep does."""
    from glmkit.chat.store import ConversationStore

    if not text.strip():
        raise UsageError("there is no text to look for", hint="glm logs search TEXT; glm logs list shows all")
    store = ConversationStore()
    entries = store.find(text)[:limit]
    places = {entry.id: _passages(store.open(entry.id).messages, text) for entry in entries}
    if json_:
        listed = [
            _plain(entry) | {"passages": [{"role": role, "text": passage} for role, passage in places[entry.id]]}
            for entry in entries
        ]
        print(_json({"text": text, "conversations": listed}))
        return 0 if entries else 1
    for entry, row in zip(entries, _rows(entries)):
        print(row)
        for role, passage in places[entry.id][:3]:
            print(f"    {role}: {_one_line(passage)}")
    if not entries:
        print(f"nobody said {text!r}", file=sys.stderr)
    return 0 if entries else 1


@_logs.command("path", cls=Verb, help="Print where conversations lie, or the file of one.")
def logs_path(id: Annotated[str, typer.Argument(help="Beginning of an id.", metavar="[ID]")] = "") -> int:
    """Prints one path."""
    from glmkit.chat.store import ConversationStore

    store = ConversationStore()
    print(store.folder / f"{store.identify(id)}.json" if id else store.folder)
    return 0


@_logs.command("export", cls=Verb, help="Write a conversation as Markdown, JSON or a web page.")
def logs_export(
    id: _Which = "",
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help=".md, .json or .html; else printed.")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--form", help="md, json or html; by default as FILE ends, or md.")
    ] = None,
) -> int:
    """Writes it; an existing file is kept."""
    from glmkit.chat.interchange import export
    from glmkit.translation import language

    chosen = form or (Path(output).suffix.lower().lstrip(".") if output else "md")
    if chosen not in _FORMS:
        raise UsageError(f"no form {chosen!r}; expected one of {', '.join(_FORMS)}", hint="--form md")
    text = export(_open(id), chosen, language())  # type: ignore[arg-type]
    if output is None:
        from glmkit.terminal import printable

        print(printable(text) if sys.stdout.isatty() else text, end="")
        return 0
    from glmkit.writing import write_text_atomic

    if Path(output).exists():
        raise OutputError(f"{output} exists already", hint="choose another name")
    write_text_atomic(output, text, private=True)
    print(output)
    return 0


# --- showing ---


def _open(id: str) -> Conversation:
    from glmkit.chat.store import ConversationStore

    store = ConversationStore()
    return store.open(store.identify(id))


def _passages(messages: tuple[Message, ...], text: str) -> list[tuple[str, str]]:
    """Who said it, and what stands around it."""
    found, wanted = [], text.casefold()
    for message in messages:
        place = message.content.casefold().find(wanted)
        if place >= 0 and message.role != "system":
            start, end = max(0, place - _AROUND_CHARACTERS), place + len(text) + _AROUND_CHARACTERS
            found.append((message.role, message.content[start:end]))
    return found


def _show(entries: tuple[Entry, ...]) -> None:
    for row in _rows(entries):
        print(row)


def _rows(entries: tuple[Entry, ...]) -> list[str]:
    """A line for each; titles stand last, because Chinese letters are two columns wide."""
    if not entries:
        return []
    cells = [
        (
            entry.id[:_SHOWN_ID],
            time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.updated)),
            f"{entry.count} messages",
            entry.mode,
            _one_line(entry.model),
        )
        for entry in entries
    ]
    return [f"{row}  {_one_line(entry.title)}" for row, entry in zip(table(cells).splitlines(), entries)]


def _one_line(text: str) -> str:
    from glmkit.terminal import printable

    return printable(" ".join(text.split()))


def _plain(entry: Entry) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(entry)


def _json(content: dict[str, Any]) -> str:
    return json.dumps({"schema": _SCHEMA} | content, ensure_ascii=False, indent=2)
