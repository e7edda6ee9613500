"""Completions that clients asked to keep (`store: true`): in the store that the terminal and the web app use too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glmkit.chat.messages import Message
from glmkit.chat.store import Conversation, ConversationStore
from glmkit.errors import UsageError
from glmkit.serve.failures import APIError

_FIELD = "completion"  # of a conversation's settings


class Stored:
    """Stored completions; those of one key are not seen with another.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._store = ConversationStore(folder)

    def keep(self, owner: str, completion: Mapping[str, Any], messages: Sequence[Message]) -> None:
        """Stores a completion.

        Args:
            owner: Whose it is.
            completion: The response.
            messages: The conversation with its first answer.

        Raises:
            OutputError: It cannot be written.
        """
        self._of(owner).save(
            Conversation(
                model=completion["model"],
                messages=tuple(messages),
                id=completion["id"],
                settings={_FIELD: dict(completion)},
                created=float(completion["created"]),
            )
        )

    def find(self, owner: str, id: str) -> dict[str, Any]:
        """A completion.

        Args:
            owner: Who asks.
            id: Its id.

        Raises:
            APIError: 404: this owner has none of this id.
        """
        try:
            found = self._of(owner).open(id).settings.get(_FIELD)
        except UsageError:
            found = None
        if not isinstance(found, dict):
            raise APIError(404, "there is no stored completion of this id", "invalid_request_error", param="id")
        return found

    def delete(self, owner: str, id: str) -> None:
        """Removes a completion.

        Args:
            owner: Who asks.
            id: Its id.

        Raises:
            APIError: 404: this owner has none of this id.
        """
        self.find(owner, id)
        self._of(owner).delete(id)

    def list(
        self, owner: str, *, limit: int, after: str | None, newest_first: bool, model: str | None
    ) -> tuple[list[dict[str, Any]], bool]:
        """Completions in the order of their times.

        Args:
            owner: Who asks.
            limit: How many at most.
            after: Id of the last one that is known already.
            newest_first: Whether the newest come first.
            model: Only those of this model.

        Returns:
            The completions, and whether there are more.
        """
        entries = [entry for entry in self._of(owner).list().entries if model in (None, entry.model)]
        entries.sort(key=lambda entry: (entry.created, entry.id), reverse=newest_first)
        ids = [entry.id for entry in entries]
        if after is not None:
            ids = ids[ids.index(after) + 1 :] if after in ids else []
        found = []
        for id in ids[:limit]:
            try:
                found.append(self.find(owner, id))
            except APIError:
                continue  # removed while we looked, or a conversation of the terminal
        return found, len(ids) > limit

    def _of(self, owner: str) -> ConversationStore:
        return self._store.for_owner(owner) if owner else self._store
