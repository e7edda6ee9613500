"""Conversations on disk: one place for the terminal, the web app and the API.

Each is a file of its own, written whole beside its place and moved there after every message, so a crash loses one
answer at most and never leaves half a file. They lie under `$XDG_STATE_HOME/glmkit/conversations` (by default
`~/.local/state`), readable by their owner only.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from glmkit.chat.transcript import (
    BASE,
    MAX_TITLE_CHARACTERS,
    Conversation,
    Entry,
    Mode,
    new_id,
    read_conversation,
    read_entry,
    says,
    title_of,
    write_conversation,
)
from glmkit.errors import OutputError, UsageError

__all__ = ["BASE", "Conversation", "ConversationStore", "Entry", "Listing", "Mode", "new_id", "state_folder"]

MAX_IMAGE_BYTES = 16 * 2**20  # of all images of a conversation; the oldest go first
_KEPT = 1000
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{15,79}")
_ORPHAN_SECONDS = 3600.0  # after which a file that a killed process left half is nobody's


@dataclass(frozen=True)
class Listing:
    """The conversations of a store.

    Args:
        entries: Those that can be opened, the one last written to first.
        damaged: Names of files that are no conversations, and why.
    """

    entries: tuple[Entry, ...]
    damaged: dict[str, str]


def state_folder() -> Path:
    """The folder for what this package remembers between two runs."""
    root = os.environ.get("XDG_STATE_HOME")
    return (Path(root) if root and Path(root).is_absolute() else Path.home() / ".local" / "state") / "glmkit"


class ConversationStore:
    """The conversations in one folder. Processes and threads may share it: a file is whole whenever it is looked at.

    Args:
        folder: Where they lie; made when the first is written. By default that of the user.
        kept: Most conversations; when a new one is written the oldest make room.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, kept: int = _KEPT) -> None:
        self.folder = Path(folder) if folder is not None else state_folder() / "conversations"
        self._kept = kept
        self._known: dict[str, tuple[tuple[int, int], Entry]] = {}  # by name: time and size of the file, what it says

    def for_owner(self, owner: str) -> ConversationStore:
        """The store of one of several people, whose conversations no other sees.

        Args:
            owner: Their name, any text; the folder's name is made of its hash.
        """
        name = hashlib.sha256(owner.encode("utf-8", "backslashreplace")).hexdigest()[:32]
        return ConversationStore(self.folder / "owners" / name, kept=self._kept)

    # --- one conversation ---

    def save(self, conversation: Conversation) -> Conversation:
        """Writes a conversation.

        Args:
            conversation: The conversation. If it is on disk already it keeps the title and the beginning it has there.

        Returns:
            It as it is on disk now: with its title, its time, and without images that there is no room for.

        Raises:
            UsageError: Its id is none.
            OutputError: It cannot be written.
        """
        path = self._path(conversation.id)
        known = self._entry(path)
        created = conversation.created if known is None else known.created
        title = (conversation.title if known is None else known.title) or title_of(conversation.messages)
        saved = replace(
            conversation, title=title, created=created, updated=time.time(), images=_fitting_images(conversation)
        )
        if known is None:
            self._make_room()
        write_conversation(path, saved)
        return saved

    def open(self, id: str) -> Conversation:
        """Reads a conversation.

        Args:
            id: Its id.

        Raises:
            UsageError: There is none of this id, or its file is damaged.
        """
        return read_conversation(self._path(id))

    def rename(self, id: str, title: str) -> Conversation:
        """Gives a conversation another title.

        Args:
            id: Its id.
            title: The title; blanks at its ends and line ends go. An empty one is made of the first question again.

        Raises:
            UsageError: There is none of this id, or the title is too long.
            OutputError: It cannot be written.
        """
        title = " ".join(title.split())
        if len(title) > MAX_TITLE_CHARACTERS:
            raise UsageError(f"the title has {len(title)} characters, expected at most {MAX_TITLE_CHARACTERS}")
        old = self.open(id)
        renamed = replace(old, title=title or title_of(old.messages))
        write_conversation(self._path(id), renamed)
        return renamed

    def delete(self, id: str) -> None:
        """Removes a conversation; one that is not there is no error.

        Args:
            id: Its id.

        Raises:
            UsageError: It is no id.
            OutputError: It cannot be removed.
        """
        path = self._path(id)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"cannot remove the conversation {id}: {error.strerror}") from error
        self._known.pop(path.name, None)

    # --- all of them ---

    def list(self) -> Listing:
        """All conversations, the one last written to first."""
        entries, damaged = [], {}
        for path in self._files():
            try:
                entries.append(self._read_entry(path))
            except FileNotFoundError:
                continue  # removed while we looked
            except (UsageError, OSError) as error:
                damaged[path.name] = error.message if isinstance(error, UsageError) else error.strerror or str(error)
        return Listing(tuple(sorted(entries, key=lambda entry: -entry.updated)), damaged)

    def newest(self) -> str | None:
        """Id of the conversation that was written to last, None if there is none."""
        return next((entry.id for entry in self.list().entries), None)

    def identify(self, beginning: str) -> str:
        """The id that begins so.

        Args:
            beginning: The first characters of an id, or all; nothing is the conversation that was last written to.

        Raises:
            UsageError: There is none, or there are several.
        """
        found = [entry.id for entry in self.list().entries if entry.id.startswith(beginning)]
        if not found:
            what = f"no conversation begins with {beginning[:80]!r}" if beginning else "there is no conversation yet"
            raise UsageError(what, hint="glm logs list shows them; glm chat begins one")
        if beginning and len(found) > 1 and beginning not in found:
            shown = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
            raise UsageError(
                f"{len(found)} conversations begin with {beginning!r}: {shown}", hint="type more of the id"
            )
        return beginning if beginning in found else found[0]

    def find(self, text: str) -> tuple[Entry, ...]:
        """Conversations with a text in their title or in what was said, in upper or lower case.

        Args:
            text: What to look for, in any language; nothing finds all.

        Returns:
            Their entries, the one last written to first.
        """
        wanted, entries = text.casefold(), self.list().entries
        return tuple(one for one in entries if wanted in one.title.casefold() or says(self._path(one.id), text))

    # --- files ---

    def _path(self, id: str) -> Path:
        if not isinstance(id, str) or not _ID.fullmatch(id):
            raise UsageError(f"{str(id)[:80]!r} is no id of a conversation")
        return self.folder / f"{id}.json"

    def _files(self) -> Iterator[Path]:
        try:
            found = list(os.scandir(self.folder))
        except OSError:
            return
        for item in found:
            if item.name.endswith(".json") and not item.name.startswith("."):
                yield Path(item.path)

    def _entry(self, path: Path) -> Entry | None:
        """What is on disk under a name; None if nothing that can be read."""
        try:
            return self._read_entry(path)
        except (UsageError, OSError):
            return None

    def _read_entry(self, path: Path) -> Entry:
        status = path.lstat()
        stamp = (status.st_mtime_ns, status.st_size)
        known = self._known.get(path.name)
        if known is not None and known[0] == stamp:
            return known[1]
        if not _ID.fullmatch(path.stem):
            raise UsageError("its name is no id of a conversation")
        entry = read_entry(path)
        self._known[path.name] = (stamp, entry)
        return entry

    def _make_room(self) -> None:
        """Removes the oldest conversations, and what killed processes left."""
        files = list(self._files())
        if len(files) >= self._kept:
            for old in sorted(files, key=_modified, reverse=True)[max(0, self._kept - 1) :]:
                old.unlink(missing_ok=True)
                self._known.pop(old.name, None)
        for orphan in self.folder.glob(".*.json.tmp-*"):
            if time.time() - _modified(orphan) > _ORPHAN_SECONDS:
                orphan.unlink(missing_ok=True)


def _modified(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _fitting_images(conversation: Conversation) -> dict[int, tuple[bytes, ...]]:
    """The images of messages that are there, the newest of them if not all have room."""
    kept: dict[int, tuple[bytes, ...]] = {}
    room = MAX_IMAGE_BYTES
    for place in sorted(conversation.images, reverse=True):
        images = conversation.images[place]
        room -= sum(map(len, images))
        if room < 0:
            break
        if place < len(conversation.messages):
            kept[place] = images
    return dict(sorted(kept.items()))
