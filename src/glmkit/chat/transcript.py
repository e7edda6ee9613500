"""A conversation as a file: JSON whose first line is what a list shows, so that thousands are listed quickly.

{"schema": 2, "title": "…", "mode": "chat", "model": "…", "created": 1.5, "updated": 2.5, "count": 2,
"adapter": null, "active": null, "settings": {},
"messages": [
{"role": "user", "content": "…"},
{"role": "assistant", "content": "…"}],
"images": {"3": ["iVBORw0KGgo…"]}}
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import secrets
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from glmkit.chat.messages import Message
from glmkit.chat.tools import MAX_DEPTH, depth_of
from glmkit.errors import GlmkitError, OutputError, UsageError
from glmkit.writing import write_text_atomic

Mode = Literal["chat", "tools", "code"]
BASE = "base"  # which no adapter is called
MAX_FILE_BYTES = 64 * 2**20
MAX_TITLE_CHARACTERS = 200
_TITLE_CHARACTERS = 60  # of a title that is made of the first question
_HEAD_BYTES = 8192
_SCHEMA = 2
_LAST_SECOND = 250_000_000_000.0  # the year 9892: what follows has no date
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Conversation:
    """A conversation and what is needed to go on with it.

    Args:
        model: What the user called the model.
        messages: All messages, a system message among them.
        id: Its name in the store; nobody can guess it.
        title: What lists show. Once a conversation is on disk, only `ConversationStore.rename` changes it.
        mode: "chat", "tools" or "code".
        adapter: The adapter's folder, if any; of several their names and folders.
        active: Name of the adapter that answered last, or BASE; None where there was nothing to choose.
        settings: Sampling settings that the user chose, by name.
        images: PNG files that belong to messages, by the message's place from 0.
        created: When it began, in seconds since 1970.
        updated: When it was last written to, in seconds since 1970.
    """

    model: str
    messages: tuple[Message, ...] = ()
    id: str = field(default_factory=lambda: new_id())
    title: str = ""
    mode: Mode = "chat"
    adapter: str | dict[str, str] | None = None
    active: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    images: Mapping[int, tuple[bytes, ...]] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    updated: float = 0.0


@dataclass(frozen=True)
class Entry:
    """What a list shows of a conversation; the fields are those of `Conversation`, `count` is its messages."""

    id: str
    title: str
    mode: Mode
    model: str
    created: float
    updated: float
    count: int


def new_id() -> str:
    """An id that no other conversation has and nobody can guess: 128 random bits."""
    return secrets.token_hex(16)


def title_of(messages: Sequence[Message]) -> str:
    """A title made of the first question; empty if there is none.

    Args:
        messages: The messages.
    """
    first = next((message.content for message in messages if message.role == "user"), "")
    line = " ".join(first[:1000].split())
    return line if len(line) <= _TITLE_CHARACTERS else line[: _TITLE_CHARACTERS - 1].rstrip() + "…"


def message_to_dict(message: Message) -> dict[str, Any]:
    """A message as plain values, without its empty fields.

    Args:
        message: The message.
    """
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.metadata:
        plain["metadata"] = message.metadata
    if message.tools is not None:
        plain["tools"] = message.tools
    if message.arguments is not None:
        plain["arguments"] = message.arguments
    return plain


def messages_to_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as plain values.

    Args:
        messages: The messages.
    """
    return [message_to_dict(message) for message in messages]


def write_conversation(path: Path, conversation: Conversation) -> None:
    """Writes a conversation beside its place and moves it there, so that the file is always whole.

    Args:
        path: Its file; the folder is made if needed, for its owner only.
        conversation: The conversation.

    Raises:
        OutputError: It cannot be written there, or has a value that JSON has no form for.
    """
    text = _to_text(conversation)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    write_text_atomic(path, text, private=True)


def _to_text(conversation: Conversation) -> str:
    head = {
        "schema": _SCHEMA,
        "title": conversation.title,
        "mode": conversation.mode,
        "model": conversation.model,
        "created": conversation.created,
        "updated": conversation.updated,
        "count": len(conversation.messages),
    }
    settings = {"adapter": conversation.adapter, "active": conversation.active, "settings": conversation.settings}
    images = {
        str(place): [base64.b64encode(image).decode("ascii") for image in images]
        for place, images in conversation.images.items()
    }
    try:
        messages = ",\n".join(_json(one) for one in messages_to_dicts(conversation.messages))
        opening = f"{_json(head)[:-1]},\n{_json(settings)[1:-1]},"
    except (TypeError, ValueError, RecursionError) as error:
        raise OutputError(f"the conversation has a value that cannot be written: {error}") from error
    text = f'{opening}\n"messages": [\n{messages}],\n"images": {_json(images)}}}\n'
    if 4 * len(text) > MAX_FILE_BYTES and len(text.encode("utf-8", "backslashreplace")) > MAX_FILE_BYTES:
        raise OutputError(f"the conversation has more than {MAX_FILE_BYTES:,} bytes", hint="begin a new one")
    return text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# --- reading: a file may be damaged, or somebody else's ---


def read_entry(path: Path) -> Entry:
    """What a list shows of a file: from its first line; older files are read whole.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: It is not there.
        UsageError: It is no conversation.
    """
    try:
        first, newline, _ = _read_bytes(path, _HEAD_BYTES, whole=False).partition(b"\n")
        if newline and first.startswith(b'{"schema"'):
            head = json.loads(first.rstrip(b",") + b"}")
            _check_schema(head)
            if not isinstance(head["count"], int):
                raise ValueError("the number of messages is no number")
            return Entry(path.stem, *_head(head), head["count"])
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error
    whole = read_conversation(path)
    return Entry(whole.id, whole.title, whole.mode, whole.model, whole.created, whole.updated, len(whole.messages))


def read_conversation(path: Path) -> Conversation:
    """Reads a conversation; its id is its file's name.

    Args:
        path: The file.

    Raises:
        UsageError: There is none, or it is no conversation.
    """
    try:
        content = json.loads(_read_bytes(path, MAX_FILE_BYTES))
        return parse_conversation(content, id=path.stem, modified=path.stat().st_mtime)
    except FileNotFoundError as error:
        raise UsageError(f"there is no conversation {path.stem}") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error


def says(path: Path, text: str) -> bool:
    """Whether a text stands in what was said in a conversation, in upper or lower case; not in the system message.

    Args:
        path: Its file.
        text: What to look for.

    Returns:
        False too if the file cannot be read.
    """
    try:
        raw = _read_bytes(path, MAX_FILE_BYTES)
        said = raw[: raw.rfind(b'\n"images"')].decode("utf-8", "replace").casefold()
        if _json(text)[1:-1].casefold() not in said:  # spares most files the reading
            return False
        messages = read_conversation(path).messages
    except (UsageError, OSError, ValueError):
        return False
    return any(text.casefold() in one.content.casefold() for one in messages if one.role != "system")


def parse_conversation(content: Any, *, id: str | None = None, modified: float = 0.0) -> Conversation:
    """Makes a conversation of a file's content.

    Args:
        content: What JSON gave.
        id: Its id; None for a new one.
        modified: When the file was written, which older files do not say themselves.

    Raises:
        ValueError: It is no conversation; so say KeyError, TypeError and RecursionError.
    """
    _check_schema(content)
    if content["schema"] == 1:  # had neither mode nor times
        content = {"mode": "chat", "title": "", "created": modified, "updated": modified, **content}
    title, mode, model, created, updated = _head(content)
    messages = _read_messages(content["messages"])
    adapter, settings, active = content.get("adapter"), content.get("settings") or {}, content.get("active")
    if not isinstance(adapter, (str, dict, type(None))) or not isinstance(active, (str, type(None))):
        raise ValueError("the adapter is no name")
    if not isinstance(settings, dict):
        raise ValueError("the settings are no mapping")
    return Conversation(
        model=model,
        messages=messages,
        id=id or new_id(),
        title=title or title_of(messages),
        mode=mode,
        adapter=adapter,
        active=active,
        settings=settings,
        images=_read_images(content.get("images", {}), len(messages)),
        created=created,
        updated=updated,
    )


def _check_schema(content: Any) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"it is a {type(content).__name__}, expected an object")
    if content.get("schema") not in (1, _SCHEMA):
        raise ValueError(f"schema {content.get('schema')!r}, expected {_SCHEMA}")


def _head(content: Mapping[str, Any]) -> tuple[str, Mode, str, float, float]:
    """Title, mode, model and times; checked."""
    title, mode, model = content["title"], content["mode"], content["model"]
    if not isinstance(title, str) or not isinstance(model, str):
        raise ValueError("title or model is no text")
    if mode not in get_args(Mode):
        raise ValueError(f"mode {mode!r}, expected one of {', '.join(get_args(Mode))}")
    return title[:MAX_TITLE_CHARACTERS], mode, model, _time(content["created"]), _time(content["updated"])


def _time(value: Any) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value < _LAST_SECOND:  # a whole number may not fit into a float
        raise ValueError("a time is none")
    return float(value)


def _read_messages(items: Any) -> tuple[Message, ...]:
    if not isinstance(items, list):
        raise ValueError(f"the messages are a {type(items).__name__}, expected a list")
    messages = []
    for item in items:
        if not isinstance(item, dict) or not set(item) <= {"role", "content", "metadata", "tools", "arguments"}:
            raise ValueError(f"a message is {str(item)[:80]}")
        message = Message(**item)
        if not isinstance(message.tools, (list, dict, type(None))):
            raise ValueError("the tools of a message are neither a list nor a mapping")
        if not isinstance(message.arguments, (dict, type(None))):
            raise ValueError("the arguments of a message are no mapping")
        if max(depth_of(message.tools), depth_of(message.arguments)) > MAX_DEPTH + 4:
            raise ValueError("tools or arguments of a message are nested too deep")
        messages.append(message)
    return tuple(messages)


def _read_images(content: Any, count: int) -> dict[int, tuple[bytes, ...]]:
    """Images from base64 texts by the place of their message, where there are `count` messages."""
    if not isinstance(content, dict):
        raise ValueError("the images are no mapping")
    images: dict[int, tuple[bytes, ...]] = {}
    for place, texts in content.items():
        if not (place.isascii() and place.isdigit() and len(place) < 10 and int(place) < count):
            raise ValueError("an image belongs to no message")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("the images of a message are no list of texts")
        images[int(place)] = tuple(read_image(text) for text in texts)
    return images


def read_image(text: str) -> bytes:
    """An image from its base64 text. Its first bytes are looked at, no more: it is never drawn here.

    Args:
        text: The text.

    Raises:
        ValueError: It is no base64, or no PNG file.
    """
    try:
        image = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"an image is no base64: {error}") from error
    if not image.startswith(_PNG):
        raise ValueError("an image is no PNG file")
    return image


def _damaged(path: Path, error: Exception) -> UsageError:
    reason = error.message if isinstance(error, GlmkitError) else str(error) or type(error).__name__
    if isinstance(error, OSError):
        reason = error.strerror or reason
    return UsageError(f"{path.name} is no conversation: {reason:.200}", hint="start a new one without --continue")


def _read_bytes(path: Path, limit: int, *, whole: bool = True) -> bytes:
    """A regular file's bytes; neither a link is followed nor a pipe waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if not whole:
            return file.read(limit) or b""
        if status.st_size > limit:
            raise ValueError(f"it has {status.st_size} bytes, expected at most {limit}")
        return file.read() or b""
