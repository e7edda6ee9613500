"""How a conversation gets its answers: the turn with tools or code, and going on with an answer that was cut."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from glmkit.chat.answers import Reply
from glmkit.chat.context import fit_context
from glmkit.chat.following import Served, complete
from glmkit.chat.messages import Message
from glmkit.chat.templates import answer_ids
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
    Text,
)
from glmkit.tools.loop import instruct, take_turn
from glmkit.tools.registry import Registry
from glmkit.web.talks import Context, Note, Part, Talk
from glmkit.web.toolbox import offer

logger = logging.getLogger("glmkit")


def head(talk: Talk) -> list[Message]:
    """What the person tells the model in front of everything, or nothing; `instruct` adds what it is told of tools.

    Args:
        talk: The conversation.
    """
    return [Message("system", talk.system)] if talk.system.strip() else []


def prompt_messages(talk: Talk, registry: Registry, generation: int) -> list[Message]:
    """A conversation as the model reads it next: with everything it is told of tools, up to where it speaks.

    Args:
        talk: The conversation.
        registry: Everything that is registered.
        generation: Of the model's chat format.

    Raises:
        UsageError: The tool definitions are none, or the model knows no tools.
    """
    end = len(talk.messages)
    while end and talk.messages[end - 1].role == "assistant":
        end -= 1
    schemas = offer(talk, registry).schemas if talk.mode == "tools" else []
    return list(instruct([*head(talk), *talk.messages[:end]], schemas, talk.mode == "code", generation))


@dataclass
class Turn:
    """One turn of a conversation.

    Args:
        talk: The conversation; its last message is a question or an observation.
        served: The model that answers.
        registry: Everything that is registered.
        safe: Names of the tools that run without asking.
        interpreter: Runs code; None where there is none.
        save: Writes the conversation to disk.
    """

    talk: Talk
    served: Served
    registry: Registry
    safe: frozenset[str]
    interpreter: Interpreter | None
    save: Callable[[], Awaitable[None]]
    _results: list[Note] = field(default_factory=list)  # of the calls that ended, in order

    async def run(self, cancel: CancelToken) -> None:
        """Takes the turn; what goes wrong becomes the conversation's `problem`.

        Args:
            cancel: Ends it before its next token.
        """
        await self._guarded(self._answer(cancel))

    async def go_on(self, cancel: CancelToken) -> None:
        """Goes on with the last answer, which was cut.

        Args:
            cancel: As in `run`.
        """
        await self._guarded(self._continue(cancel))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except GlmkitError as error:
            self.talk.problem = str(error.message)
        except Exception:  # what it says may hold paths and text: the log gets it, the page a number to find it by
            number = secrets.token_hex(4)
            logger.exception("the turn failed (%s)", number)
            self.talk.problem = f"error {number}"
        finally:
            for part in self.talk.live:
                part.running = False
        await self.save()

    async def _answer(self, cancel: CancelToken) -> None:
        talk = self.talk
        offered = offer(talk, self.registry) if talk.mode == "tools" else None
        events = take_turn(
            self.served,
            [*head(talk), *talk.messages],
            registry=offered.registry if offered else None,
            manual_tools=offered.manual if offered else None,
            interpreter=self.interpreter if talk.mode == "code" else None,
            approve=self._approve,
            cancel=cancel,
            adapter=talk.adapter,
            owner=talk.owner,
            **talk.settings,
        )
        async for event in events:
            if isinstance(event, Ended):
                self._end(event)
            else:
                self._take(event)
            talk.touch()

    async def _approve(self, name: str, arguments: dict[str, Any]) -> bool:
        return name in self.safe or await self.talk.ask(name, arguments)

    def _take(self, event: Event) -> None:
        live = self.talk.live
        last = live[-1] if live and live[-1].running else None
        if isinstance(event, Text):
            kind = "code" if event.code else "text"
            if last is None or last.kind != kind:
                self._close(last)
                live.append(Part("code" if event.code else "text", running=True))
            live[-1].text += event.text
        elif isinstance(event, CodeStarted):
            if last is None or last.kind != "code":
                self._close(last)
                live.append(Part("code", running=True))
            live[-1].text, live[-1].name = event.code, "interpreter"
        elif isinstance(event, CallStarted):
            self._close(last)
            live.append(Part("call", name=event.name, arguments=event.arguments, running=True))
        elif isinstance(event, CallPending):
            self._close(last)
            live.append(Part("call", name=event.name, arguments=event.arguments))
        elif isinstance(event, CallEnded):
            note = Note(seconds=event.seconds, failed=event.failed, truncated=event.truncated)
            note.figures = [self._keep_figure(png) for png in event.images]
            self._results.append(note)
            if last is not None:
                last.observation, last.note, last.running = event.observation, note, False

    def _close(self, part: Part | None) -> None:
        if part is not None:
            part.running = False
            if part.kind == "text" and not part.text.strip():
                self.talk.live.remove(part)

    def _keep_figure(self, png: bytes) -> str:
        name = f"{secrets.token_hex(8)}.png"
        self.talk.figures[name] = png
        return name

    def _end(self, event: Ended) -> None:
        """Takes over what was said; what is known about it goes to the messages it belongs to."""
        talk, before = self.talk, len(self.talk.messages)
        if event.messages:
            talk.messages = [message for message in event.messages if message.role != "system"]
        results = iter(self._results)
        for place in range(before, len(talk.messages)):
            if talk.messages[place].role == "observation":
                talk.notes[place] = next(results, Note())
            elif talk.messages[place].role == "assistant":
                talk.notes[place] = Note(adapter=talk.adapter or "", model=talk.model)
        talk.live = []
        if event.reply is not None:
            self._describe(event.reply)
        if event.reason == "pending" and len(talk.messages) > before:
            talk.notes[len(talk.messages) - 1].finish_reason = "tool_calls"
        if event.reason in ("failed", "time", "turns"):
            talk.problem = event.problem or event.reason

    def _describe(self, reply: Reply) -> None:
        """Figures of the answer that was written last."""
        talk = self.talk
        self._measure(reply)
        place = len(talk.messages) - 1
        note = talk.notes.get(place)
        if note is None or talk.messages[place].role != "assistant":
            return
        talk.notes[place] = replace(
            note,
            first_token_seconds=reply.timings.prefill_seconds,
            tokens_per_second=reply.timings.tokens_per_second,
            tokens=reply.usage.completion_tokens,
            finish_reason=reply.finish_reason,
            malformed=reply.malformed or "",
        )

    def _measure(self, reply: Reply) -> None:
        used = reply.usage.prompt_tokens + reply.usage.completion_tokens
        self.talk.context = Context(used, self.served.context_tokens, reply.dropped_turns)

    async def _continue(self, cancel: CancelToken) -> None:
        talk, tokenizer = self.talk, self.served.tokenizer
        if not talk.messages or talk.messages[-1].role != "assistant" or talk.messages[-1].metadata:
            raise UsageError("there is no cut answer to go on with")
        place, start = len(talk.messages) - 1, talk.messages[-1]
        written = answer_ids(tokenizer, start, last=False)
        context = self.served.context_tokens
        room = context - len(written)
        if room <= 1:
            raise UsageError("the answer fills the model's context")
        asked = prompt_messages(talk, self.registry, tokenizer.generation)
        prompt, dropped = fit_context(tokenizer, asked, room, 1)
        following = await complete(
            self.served, [*prompt, *written], adapter=talk.adapter, owner=talk.owner, cancel=cancel, **talk.settings
        )
        text = start.content
        async with following:
            async for piece in following:
                text += piece
                talk.messages[place] = replace(start, content=text)
                talk.touch()
        talk.notes[place] = Note(adapter=talk.adapter or "", model=talk.model)
        self._describe(replace(following.reply, dropped_turns=dropped))
