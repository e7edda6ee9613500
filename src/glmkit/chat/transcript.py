"""Conversations on disk: a JSON file each, written whole after every message, so a crash loses one answer at most.

They lie under `$XDG_STATE_HOME/glmkit/conversations` (by default `~/.local/state`), readable by their owner only.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmkit.chat.messages import Message
from glmkit.errors import OutputError, UsageError
from glmkit.writing import write_text_atomic

_SCHEMA = 1
BASE = "base"  # which no adapter is called
_KEPT = 50  # conversations on disk; older ones are removed when a new one begins


@dataclass(frozen=True)
class Transcript:
    """A conversation and what is needed to go on with it.

    Args:
        model: What the user called the model.
        messages: All messages, a system message among them.
        adapter: The adapter's folder, if any; of several their names and folders.
        settings: Sampling settings that the user chose, by name.
        active: Name of the adapter that answered last, or BASE; None where there was nothing to choose.
    """

    model: str
    messages: tuple[Message, ...]
    adapter: str | dict[str, str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    active: str | None = None


def state_folder() -> Path:
    """The folder for what this package remembers between two runs."""
    root = os.environ.get("XDG_STATE_HOME")
    return (Path(root) if root and Path(root).is_absolute() else Path.home() / ".local" / "state") / "glmkit"


def new_path() -> Path:
    """A path for a conversation that begins now; the oldest ones make room."""
    folder = state_folder() / "conversations"
    for old in _by_age(folder)[_KEPT - 1 :]:
        old.unlink(missing_ok=True)
    return folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}.json"


def newest_path() -> Path | None:
    """The conversation that was written to last, None if there is none."""
    found = _by_age(state_folder() / "conversations")
    return found[0] if found else None


def write(path: Path, transcript: Transcript) -> None:
    """Writes a conversation beside its place and moves it there, so that the file is always whole.

    Args:
        path: Its file; the folder is made if needed.
        transcript: The conversation.

    Raises:
        OutputError: It cannot be written there.
    """
    content = {
        "schema": _SCHEMA,
        "model": transcript.model,
        "adapter": transcript.adapter,
        "active": transcript.active,
        "settings": transcript.settings,
        "messages": [message_to_dict(message) for message in transcript.messages],
    }
    text = json.dumps(content, ensure_ascii=False, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    write_text_atomic(path, text + "\n", private=True)


def read(path: Path) -> Transcript:
    """Reads a conversation.

    Args:
        path: Its file.

    Returns:
        The conversation.

    Raises:
        UsageError: The file is no conversation of this package.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != _SCHEMA:
            raise ValueError(f"schema {content['schema']!r}, expected {_SCHEMA}")
        return Transcript(
            model=str(content["model"]),
            messages=tuple(Message(**message) for message in content["messages"]),
            adapter=content.get("adapter"),
            settings=dict(content.get("settings") or {}),
            active=content.get("active"),
        )
    except OSError as error:
        raise UsageError(f"cannot read the conversation {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no conversation: {error}", hint="start a new one without --continue") from error


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


def _by_age(folder: Path) -> list[Path]:
    """The conversations in a folder, the newest first."""
    try:
        found = [(path.stat().st_mtime_ns, path) for path in folder.glob("*.json")]
    except OSError:
        return []
    return [path for _, path in sorted(found, reverse=True)]
