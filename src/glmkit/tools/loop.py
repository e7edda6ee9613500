"""One question with tools: the model answers, what it calls is run, and it goes on, until it has said its answer.

    answer -> text                                     ended: answered
           -> call of a tool    -> observation -> answer ...
           -> code to run       -> observation -> answer ...
           -> call of a tool that nobody can run here  ended: pending; append the observation and take the turn again

What a tool gives back is content of an observation and nothing else: no text in it becomes a role mark, and a call
counts only where the model itself wrote it behind its header line.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Literal

from glmkit.chat.answers import Reply
from glmkit.chat.following import Following, Served, answer
from glmkit.chat.messages import Message
from glmkit.chat.reply import ReplyStream
from glmkit.chat.tools import CODE_TOOLS, INTERPRETER_PROMPT, TOOLS_SENTENCE
from glmkit.engine.decode import CancelToken
from glmkit.errors import GlmkitError, UsageError
from glmkit.tools.events import (
    CallEnded,
    CallPending,
    CallStarted,
    CodeStarted,
    Ended,
    Event,
    Interpreter,
    Reason,
    Text,
)
from glmkit.tools.registry import Registry, Result
from glmkit.tools.schema import checked_definition

IMAGE = "[Image]"  # what the model is told of a picture
TRUNCATED = " [TRUNCATED]"
NO_OUTPUT = "[no output]"  # an empty observation would be none at all in GLM-4's format
_MAX_MARKS = 16
_POLL_SECONDS = 0.05
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")


Approve = Callable[[str, dict[str, Any]], Awaitable[bool]]
"""Asks whether a call may be made: the tool's name, or that of code, and its arguments or {"code": …}."""


async def take_turn(
    served: Served,
    messages: Sequence[Message],
    *,
    registry: Registry | None = None,
    interpreter: Interpreter | None = None,
    manual_tools: Sequence[Mapping[str, Any]] | None = None,
    approve: Approve | None = None,
    max_calls: int = 5,
    max_seconds: float = 300.0,
    observation_characters: int = 1024,
    cancel: CancelToken | None = None,
    adapter: str | None = None,
    owner: str = "",
    **sampling: Any,
) -> AsyncIterator[Event]:
    """Answers the last message, runs what the answer calls, and goes on until the answer calls nothing.

    Closing the iterator early ends everything that runs; to keep what there is by then, use `cancel` instead.

    Args:
        served: The model.
        messages: The conversation; the last message is a question, or an observation that a pending call waits for.
            Its system message is given the tools of this turn, whatever tools it had.
        registry: Tools that run here.
        interpreter: What runs code.
        manual_tools: Definitions of tools that the user answers for, see `glmkit.tools.schema.read_definitions`.
        approve: Asked before each call that runs here; a call that is refused is an observation that says so.
        max_calls: Most calls; after the last one no further answer is asked for.
        max_seconds: Longest time for all answers and calls together.
        observation_characters: Longest observation; what is longer is cut, and says so.
        cancel: Ends the turn, also while a tool runs.
        adapter: The adapter to answer with; None is the base.
        owner: Whose request it is: what was read for one owner is not reused for another.
        **sampling: Settings as in `glmkit.chat.conversation.stream_reply`.

    Yields:
        What happens, in order; last `Ended`. Errors are events too: what failed is its `problem`.

    Raises:
        UsageError: Definitions of manual tools that are none, two tools of one name, a model that knows no tools, or
            no call at all allowed.
    """
    if max_calls < 1:
        raise UsageError(f"max_calls is {max_calls}, expected at least 1", hint="without tools nothing is called")
    turn = _Turn(served, registry, interpreter, manual_tools or (), approve, cancel or CancelToken())
    turn.deadline, turn.observation_characters = time.monotonic() + max_seconds, observation_characters
    options = {"adapter": adapter, "owner": owner, **sampling}
    generation = served.tokenizer.generation
    turn.messages = instruct(messages, turn.definitions, interpreter is not None, generation)
    for number in range(1, max_calls + 1):
        async with contextlib.aclosing(turn.answer(options)) as pieces:
            async for piece in pieces:
                yield piece
        called = turn.called()
        if called is None:
            yield turn.ended()
            return
        name, work = called
        if name in turn.manual and isinstance(work, dict):
            yield CallPending(name, work)
            yield turn.ended("pending")
            return
        yield CallStarted(name, work, number) if isinstance(work, dict) else CodeStarted(work, number)
        yield await turn.run(name, work)
        if turn.stopped:
            yield turn.ended(turn.stopped)
            return
    turn.problem = f"the most calls of a turn, {max_calls}, were made"
    yield turn.ended("turns")


def instruct(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], code: bool, generation: int
) -> tuple[Message, ...]:
    """Tells the model of its tools, as it was trained to be told; what earlier turns told it of tools is taken back.

    Args:
        messages: The conversation.
        tools: Definitions of the tools it may call.
        code: Whether code that it writes is run.
        generation: Of its chat format.

    Returns:
        The conversation with the system message that this takes, if any. Its own text stays.

    Raises:
        UsageError: The model knows no tools.
    """
    if (tools or code) and generation not in CODE_TOOLS:
        raise UsageError("this model knows no tools", hint="ChatGLM3 and GLM-4 do")
    first = messages[0] if messages and messages[0].role == "system" else None
    rest = tuple(messages if first is None else messages[1:])
    own = "" if first is None else first.content.replace(INTERPRETER_PROMPT, "").replace(TOOLS_SENTENCE, "").strip()
    definitions: list[Any] = [dict(tool) for tool in tools]
    parts = [own]
    if generation == 3:
        parts = [INTERPRETER_PROMPT if code else "", own, TOOLS_SENTENCE if tools else ""]
    elif code:
        definitions.append({"type": CODE_TOOLS[generation]})
    content = "\n".join(part for part in parts if part)
    if not content and not definitions:
        return rest
    return (Message("system", content, tools=definitions or None), *rest)


def code_of(content: str, *, generation: int) -> str:
    """The code in what a model wrote to be run.

    Args:
        content: The message behind its header line.
        generation: Of its chat format: ChatGLM3 writes code into a fence, GLM-4 as it is.

    Returns:
        What stands in the last fence; all of it where there is none. Of GLM-4, a fence counts in the first line only.
    """
    lines = content.strip().split("\n")
    fences = [place for place, line in enumerate(lines) if line.strip().startswith("```")]
    if not fences or (generation == 4 and fences[0] != 0):
        return content
    if generation == 4:  # a fence within the code is part of it
        return "\n".join(lines[1 : fences[-1] if len(fences) > 1 else None])
    opening = fences[-2] if len(fences) % 2 == 0 else fences[-1]  # one that nothing closes goes to the end
    return "\n".join(lines[opening + 1 : fences[-1] if fences[-1] > opening else None])


def observe(text: str, images: int = 0, characters: int = 1024) -> tuple[str, bool]:
    """What a model is told of a result.

    Args:
        text: What a tool or code gave.
        images: How many pictures came with it.
        characters: The most of the text that is told.

    Returns:
        The text without the codes that colour a terminal, cut if it is longer, and a mark for each picture; and
        whether it was cut.
    """
    looked_at = text[: 16 * characters]  # a huge text is not read to its end for nothing
    plain = _ANSI.sub("", looked_at).strip().encode("utf-8", "replace").decode("utf-8")  # half a pair has no ids
    truncated = len(plain) > characters or len(looked_at) < len(text)
    shown = plain[:characters] + TRUNCATED if truncated else plain
    marks = [IMAGE] * min(images, _MAX_MARKS)
    return "\n".join([*([shown] if shown else []), *marks]) or NO_OUTPUT, truncated


class _Turn:
    """One turn: what may be called, what was said so far, and why it should end.

    Args:
        served: The model.
        registry: Tools that run here.
        interpreter: What runs code.
        manual: Definitions of tools that the user answers for.
        approve: Asked before each call.
        cancel: Ends the turn.
    """

    deadline: float
    observation_characters: int

    def __init__(
        self,
        served: Served,
        registry: Registry | None,
        interpreter: Interpreter | None,
        manual: Sequence[Mapping[str, Any]],
        approve: Approve | None,
        cancel: CancelToken,
    ) -> None:
        self._served, self._interpreter, self._approve, self._cancel = served, interpreter, approve, cancel
        self._registry = Registry() if registry is None else registry
        by_hand = [checked_definition(tool) for tool in manual]
        self.manual = {tool["name"] for tool in by_hand}
        self.definitions = [*self._registry.schemas(), *by_hand]
        names = [tool["name"] for tool in self.definitions]
        if len(set(names)) < len(names):
            raise UsageError(f"two tools have one name; the tools are {', '.join(names)}")
        self._code_tool = None if interpreter is None else CODE_TOOLS[served.tokenizer.generation]
        self.reply: Reply | None = None
        self.messages: tuple[Message, ...] = ()
        self.problem = ""

    @property
    def stopped(self) -> Literal["cancelled", "time"] | None:
        """Why the turn should end before its end."""
        if self._cancel.cancelled:
            return "cancelled"
        return "time" if time.monotonic() > self.deadline else None

    async def answer(self, options: dict[str, Any]) -> AsyncGenerator[Text, None]:
        """Follows one answer; sets `reply`, `messages` and `problem`."""
        self.reply, self.problem = None, ""
        if self.stopped:
            return
        try:
            token = _Ending(self)
            async with await answer(self._served, list(self.messages), cancel=token, **options) as following:
                headers = _Headers(self._served.tokenizer, following)
                watch = asyncio.create_task(self._watch(following))
                try:
                    async for piece in following:
                        yield Text(piece, code=self._code_tool is not None and headers.current() == self._code_tool)
                finally:
                    watch.cancel()
                self.reply = following.reply
            self.messages, self.problem = self.reply.messages, self.reply.malformed or ""
            if self.reply.finish_reason == "cancelled" and self.messages[-1].metadata:
                self.messages = self.messages[:-1]  # half a call, which nothing can follow
        except GlmkitError as error:
            self.problem = error.message

    async def _watch(self, following: Following) -> None:
        """Ends an answer that waits for its place; one that is being written looks at its token itself."""
        while not self.stopped:
            await asyncio.sleep(_POLL_SECONDS)
        following.cancel()

    def called(self) -> tuple[str, dict[str, Any] | str] | None:
        """What the last answer calls: a tool's name and its arguments, or code; None if it calls nothing."""
        if self.reply is None or self.reply.finish_reason in ("cancelled", "length"):
            return None
        if self.reply.tool_call is not None:
            return self.reply.tool_call.name, self.reply.tool_call.arguments
        last = self.messages[-1]
        if self._code_tool is None or last.role != "assistant" or last.metadata != self._code_tool:
            return None
        code = code_of(last.content, generation=self._served.tokenizer.generation)
        if not code.strip():
            self.problem = "the code to run is empty"
            return None
        return self._code_tool, code

    def ended(self, reason: Reason | None = None) -> Ended:
        """The last event; without a reason it is that of the last answer."""
        if reason is None:
            finish = self.reply.finish_reason if self.reply is not None else ""
            if self.problem and self.reply is None:
                reason = "failed"
            elif self.reply is None or finish == "cancelled":
                reason = self.stopped or "cancelled"
            else:
                reason = "length" if finish == "length" else "answered"
        return Ended(self.reply, self.messages, reason, self.problem)

    async def run(self, name: str, work: dict[str, Any] | str) -> CallEnded:
        """Runs a call or code, unless the turn is to end or the user does not allow it; keeps the observation."""
        started = time.monotonic()
        output: Any = None
        if await self._allowed(name, work):
            output = await self._unless_stopped(self._run(name, work))
        elif not self.stopped:
            output = Result("The user did not allow this call.", failed=True)
        if output is None:
            why = "stopped by the user" if self._cancel.cancelled else "ended, because the turn took too long,"
            output = Result(f"The call was {why} before it was done.", failed=True)
        images = tuple(getattr(output, "images", ()))
        text, truncated = observe(output.text, len(images), self.observation_characters)
        self.messages = (*self.messages, Message("observation", text))
        return CallEnded(name, text, time.monotonic() - started, output.failed, truncated, images)

    async def _allowed(self, name: str, work: dict[str, Any] | str) -> bool:
        if self._approve is None:
            return True
        what = {"code": work} if isinstance(work, str) else work
        return await self._unless_stopped(_wait(self._approve(name, what))) is True

    async def _run(self, name: str, work: dict[str, Any] | str) -> Any:
        if isinstance(work, dict):
            return await self._registry.call(name, work)
        assert self._interpreter is not None
        try:
            return await self._interpreter.run(work)
        except GlmkitError as error:
            return Result(f"The code was not run: {error.message}", failed=True)

    async def _unless_stopped(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What work gives; None if the turn is to end first, and then the work has been ended too."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done() and not self.stopped:
                await asyncio.wait({task}, timeout=_POLL_SECONDS)
            return task.result() if task.done() else None
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task


async def _wait(work: Awaitable[Any]) -> Any:
    return await work


class _Ending(CancelToken):
    """Ends an answer with its turn, before the next token; the end of the answer is not that of the turn.

    Args:
        turn: The turn.
    """

    def __init__(self, turn: _Turn) -> None:
        self._own, self._turn = False, turn

    @property
    def cancelled(self) -> bool:  # type: ignore[override]
        """Whether the answer is to end."""
        return self._own or self._turn.stopped is not None

    def cancel(self) -> None:
        """Ends the answer alone."""
        self._own = True


class _Headers:
    """The header line of the message that is being written.

    Args:
        tokenizer: The model's tokenizer.
        following: The answer.
    """

    def __init__(self, tokenizer: Any, following: Following) -> None:
        self._stream, self._following, self._read, self._header = ReplyStream(tokenizer), following, 0, ""

    def current(self) -> str:
        """The header line; empty for plain text."""
        steps = self._following.steps
        for step in steps[self._read :]:
            deltas = self._stream.push(step.token_id) if step.is_text else []
            self._header = deltas[-1].metadata if deltas else self._header
        self._read = len(steps)
        return self._header
