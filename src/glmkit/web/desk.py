"""The conversations of all who use the page: open ones in memory, all of them on disk, each seen by its owner only."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import cast

from glmkit.chat.interchange import MEDIA_TYPES, Form, export, import_conversation
from glmkit.chat.messages import Message
from glmkit.chat.store import BASE, Conversation, ConversationStore, Entry, new_id
from glmkit.errors import OutputError, UsageError
from glmkit.tools.loop import instruct
from glmkit.tools.registry import Registry
from glmkit.web.interpreters import Interpreters
from glmkit.web.models import Models, adapter_names
from glmkit.web.talks import Note, Talk
from glmkit.web.texts import Language, Mode
from glmkit.web.toolbox import take_over_tools
from glmkit.web.turns import Turn, head, prompt_messages

logger = logging.getLogger("glmkit")
_OPEN_TALKS = 256  # in memory; those that nobody has used for longest go back to the disk


class Desk:
    """What the pages work on.

    Args:
        store: Where conversations lie.
        models: The models.
        registry: Tools that run here.
        safe: Names of those that run without asking.
        interpreters: Code interpreters, or why there are none.
        offered: Names of the tools that a new conversation offers; None: all.
    """

    def __init__(
        self,
        store: ConversationStore,
        models: Models,
        registry: Registry,
        safe: Sequence[str],
        interpreters: Interpreters,
        offered: Sequence[str] | None = None,
    ) -> None:
        self._store, self.models, self.registry = store, models, registry
        self.safe, self.interpreters = frozenset(safe), interpreters
        self._offered = [tool.name for tool in registry] if offered is None else list(offered)
        self._stores: dict[str, ConversationStore] = {}
        self._talks: OrderedDict[tuple[str, str], Talk] = OrderedDict()

    # --- one conversation ---

    def new(self, owner: str, mode: Mode = "chat", model: str | None = None) -> Talk:
        """Begins a conversation; it goes to disk with its first question.

        Args:
            owner: Whose.
            mode: Chat, tools or code.
            model: Who answers; None: the first model.
        """
        talk = Talk(new_id(), owner, mode, model or self.models.first, offered=list(self._offered))
        talk.adapter = self._first_adapter(talk.model)
        self._put(talk)
        return talk

    async def open(self, owner: str, id: str) -> Talk:
        """A conversation.

        Args:
            owner: Who asks.
            id: Its id.

        Raises:
            UsageError: There is none of this id among theirs.
        """
        talk = self._talks.get((owner, id))
        if talk is None:
            talk = self._read(owner, await asyncio.to_thread(self.store(owner).open, id))
            talk = self._talks.get((owner, id), talk)  # somebody else may have been quicker
            self._put(talk)
        self._talks.move_to_end((owner, id))
        return talk

    def answer(self, talk: Talk) -> None:
        """Starts the turn that answers a conversation's last message.

        Args:
            talk: The conversation.

        Raises:
            UsageError: One is running, its model is not loaded, or its mode cannot be had.
        """
        if talk.mode == "code":
            self.interpreters.check()
        talk.begin(self._turn(talk).run)

    def go_on(self, talk: Talk) -> None:
        """Starts the turn that goes on with a cut answer.

        Args:
            talk: The conversation.

        Raises:
            UsageError: See `answer`.
        """
        talk.begin(self._turn(talk).go_on)

    def _turn(self, talk: Talk) -> Turn:
        served = self.models.get(talk.model)
        if talk.adapter is not None and talk.adapter not in adapter_names(served):
            talk.adapter = None
        interpreter = self.interpreters.of(talk.id) if talk.mode == "code" else None
        return Turn(talk, served, self.registry, self.safe, interpreter, lambda: self.save(talk))

    def is_used(self, model: str) -> bool:
        """Whether an answer of a model is being written.

        Args:
            model: Its name.
        """
        return any(talk.running and talk.model == model for talk in self._talks.values())

    # --- disk ---

    async def save(self, talk: Talk) -> None:
        """Writes a conversation to disk, if there is something to keep; a full disk is a line in the log.

        Args:
            talk: The conversation.
        """
        if not talk.messages or talk.deleted:
            return
        conversation = self._conversation(talk)
        try:
            saved = await asyncio.to_thread(self.store(talk.owner).save, conversation)
        except OutputError as error:
            logger.warning("a conversation could not be written: %s", type(error).__name__)
            return
        talk.title = saved.title
        if talk.deleted:  # meanwhile
            await asyncio.to_thread(self.store(talk.owner).delete, talk.id)

    def entries(self, owner: str, text: str = "") -> tuple[Entry, ...]:
        """The conversations of a person, the newest first; blocking.

        Args:
            owner: Whose.
            text: What their titles or messages have in them.
        """
        store = self.store(owner)
        return store.find(text) if text.strip() else store.list().entries

    async def rename(self, talk: Talk, title: str) -> None:
        """Gives a conversation another title.

        Args:
            talk: The conversation.
            title: The title.

        Raises:
            UsageError: It is too long, or the conversation is not on disk yet.
        """
        renamed = await asyncio.to_thread(self.store(talk.owner).rename, talk.id, title)
        talk.title = renamed.title

    async def delete(self, talk: Talk) -> None:
        """Removes a conversation, with its interpreter; a running answer ends.

        Args:
            talk: The conversation.
        """
        talk.deleted = True
        talk.stop()
        self._talks.pop((talk.owner, talk.id), None)
        await self.interpreters.end(talk.id)
        await asyncio.to_thread(self.store(talk.owner).delete, talk.id)

    def export(self, talk: Talk, form: str, language: Language) -> str:
        """A conversation in a form that others read.

        Args:
            talk: The conversation.
            form: One of `glmkit.chat.interchange.MEDIA_TYPES`.
            language: Of the labels.

        Raises:
            UsageError: There is no such form.
        """
        if form not in MEDIA_TYPES:
            raise UsageError(f"there is no form {form!r}")
        return export(self._conversation(talk), cast(Form, form), language)

    async def take_in(self, owner: str, content: bytes) -> Talk:
        """Adds a conversation from a file that somebody has.

        Args:
            owner: Whose it becomes.
            content: The file, see `glmkit.chat.interchange.import_conversation`.

        Raises:
            UsageError: It is none.
        """
        read = await asyncio.to_thread(lambda: import_conversation(content.decode("utf-8", "replace")))
        saved = await asyncio.to_thread(self.store(owner).save, read)
        return await self.open(owner, saved.id)

    def store(self, owner: str) -> ConversationStore:
        """The store of a person.

        Args:
            owner: Who; "" is whoever sits at this machine, who shares it with the terminal.
        """
        if owner not in self._stores:
            self._stores[owner] = self._store.for_owner(owner) if owner else self._store
        return self._stores[owner]

    async def close(self) -> None:
        """Ends all turns and interpreters."""
        for talk in list(self._talks.values()):
            talk.stop()
            await talk.finished()
        await self.interpreters.close()

    def _put(self, talk: Talk) -> None:
        self._talks[talk.owner, talk.id] = talk
        idle = [key for key, one in self._talks.items() if not one.running and one is not talk]
        for key in idle[: max(0, len(self._talks) - _OPEN_TALKS)]:
            del self._talks[key]

    def _first_adapter(self, model: str) -> str | None:
        if not self.models.is_loaded(model):
            return None
        adapters = getattr(self.models.get(model).loaded, "adapters", None)
        return None if adapters is None else adapters.chosen

    def _conversation(self, talk: Talk) -> Conversation:
        """The conversation as the store keeps it: with its system message."""
        system = self._system(talk)
        images = {
            place + len(system): tuple(talk.figures[name] for name in note.figures if name in talk.figures)
            for place, note in talk.notes.items()
            if note.figures
        }
        adapters = adapter_names(self.models.get(talk.model)) if self.models.is_loaded(talk.model) else ()
        return Conversation(
            model=talk.model,
            messages=(*system, *talk.messages),
            id=talk.id,
            title=talk.title,
            mode=talk.mode,
            active=(talk.adapter or BASE) if adapters else None,
            settings=dict(talk.settings),
            images=images,
        )

    def _system(self, talk: Talk) -> list[Message]:
        """The system message as the model reads it, so that the tools are on disk too."""
        if not self.models.is_loaded(talk.model):
            return head(talk)
        try:
            generation = self.models.get(talk.model).tokenizer.generation
            return [one for one in prompt_messages(talk, self.registry, generation)[:1] if one.role == "system"]
        except UsageError:  # the person is still writing them
            return head(talk)

    def _read(self, owner: str, kept: Conversation) -> Talk:
        system, body = _divide(kept.messages)
        model = kept.model if kept.model in self.models.names else self.models.first
        talk = Talk(kept.id, owner, kept.mode, model, kept.title, settings=dict(kept.settings), messages=list(body))
        talk.settings = {name: value for name, value in kept.settings.items() if name in SETTINGS}
        own = instruct([system], [], False, 0) if system is not None else ()
        talk.system = own[0].content if own else ""
        talk.offered = list(self._offered)
        take_over_tools(talk, system, self.registry)
        talk.adapter = None if kept.active in (None, BASE) else kept.active
        _take_over_images(talk, kept.images, len(kept.messages) - len(body))
        return talk


SETTINGS = ("max_new_tokens", "top_p", "temperature", "repetition_penalty")
"""What the page's sliders change."""


def _divide(messages: Sequence[Message]) -> tuple[Message | None, Sequence[Message]]:
    if messages and messages[0].role == "system":
        return messages[0], messages[1:]
    return None, messages


def _take_over_images(talk: Talk, images: Mapping[int, tuple[bytes, ...]], shift: int) -> None:
    for place, pngs in images.items():
        note = talk.notes.setdefault(place - shift, Note())
        for png in pngs:
            name = f"{new_id()[:16]}.png"
            talk.figures[name] = png
            note.figures.append(name)
