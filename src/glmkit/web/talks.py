"""A conversation as the web app holds it: what was said, how answers are made, and the answer that is being written.

The turn that writes an answer belongs to its conversation and not to a page: a page follows it (`Talk.follow`), may go
away, and finds it again. Pages only show; everything that is true stands here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from glmkit.chat.messages import Message
from glmkit.engine.decode import CancelToken
from glmkit.errors import UsageError
from glmkit.web.texts import Mode

Kind = Literal["user", "text", "call", "code"]
FOLLOW_SECONDS = 0.06  # between two pictures of an answer that is being written
MAX_CHARACTERS = 200_000  # of one message that somebody types or edits


@dataclass
class Note:
    """What is known about a message besides its text; shown, and never read by the model.

    Args:
        seconds: How long a call ran.
        failed: Whether it failed.
        truncated: Whether its observation was cut.
        by_hand: Whether a person gave the observation.
        figures: Names of the pictures that code drew.
        adapter: Who wrote an answer: an adapter's name, or "" for the base.
        model: The model that wrote it.
        first_token_seconds: From the question to the first token.
        tokens_per_second: Speed of writing.
        tokens: Length of the answer.
        finish_reason: Why it ended: "stop", "length", "cancelled", "tool_calls".
        malformed: Why what looks like a tool call is none.
    """

    seconds: float | None = None
    failed: bool = False
    truncated: bool = False
    by_hand: bool = False
    figures: list[str] = field(default_factory=list)
    adapter: str = ""
    model: str = ""
    first_token_seconds: float | None = None
    tokens_per_second: float | None = None
    tokens: int | None = None
    finish_reason: str = ""
    malformed: str = ""


@dataclass
class Part:
    """A piece of a conversation as it is shown: a message, or a call together with what came back.

    Args:
        kind: What it is.
        text: The message, or the code.
        name: The tool of a call.
        arguments: Its arguments, if they could be read.
        observation: What came back; None as long as nothing did.
        place: Index of its message in `Talk.messages`; -1 while it is being written.
        note: Besides the text.
        running: Whether it is being written or run.
    """

    kind: Kind
    text: str = ""
    name: str = ""
    arguments: dict[str, Any] | None = None
    observation: str | None = None
    place: int = -1
    note: Note = field(default_factory=Note)
    running: bool = False


@dataclass
class Asking:
    """A call that waits for somebody's consent.

    Args:
        name: The tool.
        arguments: What it would be given.
        answer: Set to True or False by `Talk.decide`.
    """

    name: str
    arguments: dict[str, Any]
    answer: asyncio.Future[bool]


@dataclass(frozen=True)
class Context:
    """How full the model's context is.

    Args:
        used_tokens: Prompt and answer.
        limit_tokens: What the model can hold.
        dropped_turns: How many of the oldest turns were left out of the last prompt.
    """

    used_tokens: int = 0
    limit_tokens: int = 0
    dropped_turns: int = 0


@dataclass
class Talk:
    """One conversation of one person.

    Args:
        id: Its name in the store.
        owner: Whose it is.
        mode: Chat, tools or code.
        model: The model that answers.
        title: What the list calls it; empty before the first question.
        system: The person's system prompt.
        settings: Sampling settings that the person changed, by name.
        adapter: Who answers next; None is the base.
        definitions: Tools as JSON schema or YAML that a person answers for.
        offered: Registered tools that the model may call.
        by_hand: Whether a person answers for all tools.
        messages: What was said, without the system message.
        notes: Besides the messages, by their index.
        figures: Pictures that code drew, PNG files by name.
    """

    id: str
    owner: str
    mode: Mode = "chat"
    model: str = ""
    title: str = ""
    system: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    definitions: str = ""
    offered: list[str] = field(default_factory=list)
    by_hand: bool = False
    messages: list[Message] = field(default_factory=list)
    notes: dict[int, Note] = field(default_factory=dict)
    figures: dict[str, bytes] = field(default_factory=dict)
    allowed: set[str] = field(default_factory=set)  # tools that may run without asking
    context: Context = field(default_factory=Context)
    live: list[Part] = field(default_factory=list)  # what the running turn has given so far
    asking: Asking | None = None
    problem: str = ""  # of the last turn
    deleted: bool = False

    def __post_init__(self) -> None:
        self._cancel: CancelToken | None = None
        self._task: asyncio.Task[None] | None = None
        self._version, self._event = 0, asyncio.Event()

    # --- the turn ---

    @property
    def running(self) -> bool:
        """Whether an answer is being written."""
        return self._task is not None and not self._task.done()

    def begin(self, work: Callable[[CancelToken], Any]) -> None:
        """Starts a turn.

        Args:
            work: Gets the token that stops it and returns a coroutine.

        Raises:
            UsageError: One is running.
        """
        if self.running:
            raise UsageError("another answer is still being written", hint="stop it first")
        self.problem, self.live, self._cancel = "", [], CancelToken()
        self._task = asyncio.get_running_loop().create_task(self._run(work(self._cancel)))
        self.touch()

    async def _run(self, coroutine: Any) -> None:
        try:
            await coroutine
        finally:
            self.live, self.asking = [], None
            asyncio.get_running_loop().call_soon(self.touch)  # once the task counts as done

    def stop(self) -> None:
        """Ends the turn before its next token; without one nothing happens."""
        if self._cancel is not None:
            self._cancel.cancel()
        if self.asking is not None and not self.asking.answer.done():
            self.asking.answer.set_result(False)
        self.touch()

    async def finished(self) -> None:
        """Waits for the turn, if there is one."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def ask(self, name: str, arguments: dict[str, Any]) -> bool:
        """Asks the person whether a tool may run; returns their answer, or what they said for the whole conversation.

        Args:
            name: The tool.
            arguments: What it would be given.
        """
        if name in self.allowed:
            return True
        if self._cancel is not None and self._cancel.cancelled:
            return False
        self.asking = Asking(name, arguments, asyncio.get_running_loop().create_future())
        self.touch()
        try:
            return await self.asking.answer
        finally:
            self.asking = None
            self.touch()

    def decide(self, allowed: bool, always: bool = False) -> None:
        """Answers what `ask` asked; without a question nothing happens.

        Args:
            allowed: Whether the call may run.
            always: Whether the same tool may run in this conversation without asking again.
        """
        if self.asking is None or self.asking.answer.done():
            return
        if allowed and always:
            self.allowed.add(self.asking.name)
        self.asking.answer.set_result(allowed)

    # --- who looks ---

    def touch(self) -> None:
        """Tells everybody who follows that something has changed."""
        self._version += 1
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def follow(self) -> AsyncIterator[None]:
        """Gives a sign at once, after each change while a turn runs (no faster than one can see), and at its end."""
        while True:
            seen, running = self._version, self.running
            yield
            if not running:
                return
            await asyncio.sleep(FOLLOW_SECONDS)
            if self._version == seen and self.running:
                await self._event.wait()

    # --- what was said ---

    @property
    def pending(self) -> str | None:
        """The tool whose answer a person has to give next; None if none waits."""
        if not self.messages or self.mode != "tools":
            return None
        last, note = self.messages[-1], self.notes.get(len(self.messages) - 1)
        if last.role != "assistant" or (note is not None and note.finish_reason != "tool_calls"):
            return None
        return last.metadata or None

    @property
    def last_question(self) -> int | None:
        """Index of the last thing that the person asked."""
        for place in range(len(self.messages) - 1, -1, -1):
            if self.messages[place].role == "user":
                return place
        return None

    @property
    def cut(self) -> bool:
        """Whether the last answer is text that was cut, so that it can go on."""
        if not self.messages or self.running:
            return False
        last, note = self.messages[-1], self.notes.get(len(self.messages) - 1)
        return (
            last.role == "assistant"
            and not last.metadata
            and note is not None
            and note.finish_reason in ("length", "cancelled")
        )

    def add(self, role: str, text: str, note: Note | None = None) -> None:
        """Adds a message.

        Args:
            role: Who says it.
            text: What.
            note: Besides.

        Raises:
            UsageError: It is empty or far too long, or an answer is being written.
        """
        self._check_still()
        if role == "user" and not text.strip():
            raise UsageError("the message is empty")
        self._check_length(text)
        self.messages.append(Message(role, text))
        if note is not None:
            self.notes[len(self.messages) - 1] = note

    def keep(self, count: int) -> None:
        """Forgets all messages but the first ones.

        Args:
            count: How many stay.

        Raises:
            UsageError: An answer is being written.
        """
        self._check_still()
        del self.messages[count:]
        self.notes = {place: note for place, note in self.notes.items() if place < count}
        kept = {name for note in self.notes.values() for name in note.figures}
        self.figures = {name: png for name, png in self.figures.items() if name in kept}
        self.problem = ""

    def rewrite(self, place: int, text: str) -> None:
        """Changes the text of one message.

        Args:
            place: Its index.
            text: The new text.

        Raises:
            UsageError: No such message, too long a text, or an answer is being written.
        """
        self._check_still()
        self._check_length(text)
        if not 0 <= place < len(self.messages):
            raise UsageError(f"there is no message {place}")
        old = self.messages[place]
        self.messages[place] = Message(old.role, text, old.metadata)

    def _check_still(self) -> None:
        if self.running:
            raise UsageError("another answer is still being written", hint="stop it first")

    def _check_length(self, text: str) -> None:
        if len(text) > MAX_CHARACTERS:
            raise UsageError(f"the message has {len(text):,} characters; the limit is {MAX_CHARACTERS:,}")
