"""A conversation that goes on: what was said, how answers are made, and its copy on disk. Front ends only show it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glmkit.chat.answers import AnswerStream, Reply
from glmkit.chat.choices import Choices, canonical_name, choose, official_sampling
from glmkit.chat.conversation import stream_reply
from glmkit.chat.messages import Message
from glmkit.chat.prompt_cache import PromptCache
from glmkit.chat.store import BASE, Conversation, ConversationStore
from glmkit.engine.decode import CancelToken
from glmkit.errors import OutputError, UsageError

_SEEDS = 2**32


class Session:
    """One conversation with one model.

    Args:
        loaded: The model and its tokenizer, a `glmkit.loading.Loaded`.
        name: What the user called the model.
        messages: What was said before; by default what `earlier` has.
        settings: Sampling settings by name, see `glmkit.chat.conversation.choose`; they overrule the model's own.
        store: Where the conversation is written after every message; None keeps it in memory only.
        earlier: The conversation to go on with, under the same id.
        warn: Told once if it cannot be written.

    Raises:
        UsageError: A setting does not exist or fit, or there is no tokenizer.
    """

    def __init__(
        self,
        loaded: Any,
        name: str,
        *,
        messages: Sequence[Message] = (),
        settings: dict[str, Any] | None = None,
        store: ConversationStore | None = None,
        earlier: Conversation | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        if loaded.tokenizer is None:
            raise UsageError(
                f"{loaded.path} has no tokenizer, so text cannot be read or written",
                hint="copy the tokenizer's files from the checkpoint's original repository",
            )
        self.loaded, self.name, self.store, self._warn = loaded, name, store, warn
        self._kept = earlier or Conversation(name)
        self.adapter: str | None = None if loaded.adapter is None else loaded.adapters.chosen
        self.messages = list(messages or self._kept.messages)
        self.settings = {canonical_name(setting): value for setting, value in (settings or {}).items()}
        self.last: Reply | None = None
        self.seed = 0  # of the last answer
        self._cache = PromptCache()
        self._choices(self.settings)

    # --- answers ---

    def ask(self, text: str, cancel: CancelToken) -> AnswerStream:
        """Begins to answer a question; a question before it that has no answer is forgotten.

        Args:
            text: The question.
            cancel: Ends the answer early.

        Returns:
            The answer; give it to `finish` afterwards.

        Raises:
            UsageError: The question does not fit into the model's context; it is not kept then.
        """
        return self._answer([*self.messages[: self._answered()], Message("user", text)], cancel)

    def retry(self, cancel: CancelToken) -> AnswerStream:
        """Begins to answer the last question again.

        Args:
            cancel: Ends the answer early.

        Returns:
            The answer; give it to `finish` afterwards.

        Raises:
            UsageError: There is no question yet.
        """
        return self._answer(self.messages[: self._last_question() + 1], cancel)

    def finish(self, replying: AnswerStream) -> Reply:
        """Keeps an answer, whole or cut.

        Args:
            replying: What `ask` or `retry` returned; closed if it is not at its end.

        Returns:
            The answer.
        """
        replying.close()
        self.last = replying.reply
        self.messages = list(self.last.messages)
        self.save()
        return self.last

    def _answer(self, messages: list[Message], cancel: CancelToken) -> AnswerStream:
        given = self.settings.get("seed")
        self.seed = random.SystemRandom().randrange(_SEEDS) if given is None else given
        replying = stream_reply(
            self.loaded.model if self.loaded.adapter is None else self.loaded.with_adapter(self.adapter),
            self.loaded.tokenizer,
            messages,
            cancel=cancel,
            reuse=self._cache,
            **self.settings | {"seed": self.seed},
        )
        self.messages = messages
        self.save()
        return replying

    # --- changes ---

    @property
    def system(self) -> str | None:
        """The system prompt."""
        return self.messages[0].content if self.messages and self.messages[0].role == "system" else None

    def set_system(self, text: str | None) -> None:
        """Changes the system prompt for the answers to come.

        Args:
            text: The new one; None for none.
        """
        rest = self.messages[1:] if self.system is not None else self.messages
        self.messages = [Message("system", text), *rest] if text else rest
        self.save()

    def set(self, name: str, value: Any) -> None:
        """Changes one sampling setting for the answers to come.

        Args:
            name: Its name.
            value: Its value; None for the model's own.

        Raises:
            UsageError: The name or value does not exist or fit; nothing changes then.
        """
        name = canonical_name(name)
        self._choices(self.settings | {name: value})
        self.settings[name] = value
        if value is None:
            del self.settings[name]
        self.save()

    def effective(self) -> dict[str, Any]:
        """The settings in force by name, the model's own among them; a seed of None is a new one for each answer."""
        choices = self._choices(self.settings)
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        shown = {name: getattr(choices.options, name) for name in names}
        others = {"stop": list(choices.stop), "lookup_tokens": choices.lookup_tokens}
        return {**shown, "max_new_tokens": choices.max_new_tokens, **others}

    def _choices(self, settings: dict[str, Any]) -> Choices:
        model = self.loaded.model
        return choose(model, sampling=settings, official=official_sampling(model, self.loaded.tokenizer))

    def use(self, adapter: str | None) -> None:
        """Changes the adapter for the answers to come; the conversation stays.

        Args:
            adapter: Its name; None for the base.

        Raises:
            UsageError: There is no such adapter; nothing changes then.
        """
        self.loaded.with_adapter(adapter)
        self.adapter = adapter
        self.save()

    @property
    def adapter_folder(self) -> Path | None:
        """The folder of the adapter that answers; None for the base."""
        return None if self.adapter is None else self.loaded.adapters.folders[self.adapter]

    def clear(self) -> None:
        """Forgets everything but the system prompt; what is on disk stays, and a new conversation begins."""
        self.messages = self.messages[: 1 if self.system is not None else 0]
        self.last = None
        self._kept = Conversation(self.name)

    def undo(self) -> None:
        """Takes back the last question with all that came of it.

        Raises:
            UsageError: There is no question.
        """
        self.messages = self.messages[: self._last_question()]
        self.save()

    def _last_question(self) -> int:
        for place in range(len(self.messages) - 1, -1, -1):
            if self.messages[place].role == "user":
                return place
        raise UsageError("there is no question yet")

    def _answered(self) -> int:
        """Number of messages without a question at the end that nobody answered."""
        count = len(self.messages)
        while count and self.messages[count - 1].role == "user":
            count -= 1
        return count

    # --- disk ---

    def conversation(self) -> Conversation:
        """The conversation as it is written to disk."""
        given = self.loaded.adapter
        if isinstance(given, Mapping):
            adapter: str | dict[str, str] | None = {name: str(folder) for name, folder in given.items()}
        else:
            adapter = None if given is None else str(given)
        return replace(
            self._kept,
            model=self.name,
            messages=tuple(self.messages),
            adapter=adapter,
            active=None if given is None else self.adapter or BASE,
            settings=self.settings,
        )

    def save(self) -> None:
        """Writes the conversation, if there is a store; failing once is a warning, and ends the writing only."""
        if self.store is None or not any(message.role != "system" for message in self.messages):
            return
        try:
            self._kept = self.store.save(self.conversation())
        except OutputError as error:
            self.store = None
            self._warn(f"this conversation is not being saved: {error.message}")
