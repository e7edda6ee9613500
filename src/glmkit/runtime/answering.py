"""A model that was exported, ready to answer.

import glmkit.runtime

model = glmkit.runtime.load("folder")
for piece in model.answer("你好"):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from glmkit.errors import UsageError
from glmkit.runtime.blanks import fill
from glmkit.runtime.decoding import Limits, generate_batch, stream
from glmkit.runtime.folder import FOLDER, Description, read_description
from glmkit.runtime.layout import Ints, Layout, layout_of
from glmkit.runtime.prompts import Blanks, Prompts, Said, prompts_of
from glmkit.runtime.replies import Delta, ReplyForm, Replying
from glmkit.runtime.sampling import Sampling
from glmkit.runtime.session import Session, open_session
from glmkit.runtime.text import StopText
from glmkit.runtime.tokens import Tokens

_RESERVE_TOKENS = 1024  # of the context, for an answer; at most a quarter of it

Message = Said | Mapping[str, Any]


@dataclass
class Answer:
    """What came of one question, filled while it is answered.

    Args:
        text: All of it so far.
        messages: The assistant's messages: several if it called a tool.
        finish_reason: "stop", "length", or None while it goes on.
        token_ids: What the model generated, without what ended it.
        dropped_turns: Oldest turns that did not fit into the context.
    """

    text: str = ""
    messages: list[Said] = field(default_factory=list)
    finish_reason: str | None = None
    token_ids: list[int] = field(default_factory=list)
    dropped_turns: int = 0


class Model:
    """An exported model; answers one after the other.

    Args:
        description: What its folder says.
        session: Its graph.
    """

    def __init__(self, description: Description, session: Session) -> None:
        self.description, self.session = description, session
        self.tokens = Tokens(description.folder / FOLDER, description.tokens)
        self.prompts: Prompts = prompts_of(self.tokens, description.prompt)
        self.stop_ids = frozenset(description.reply["stop_ids"])
        self.last = Answer()

    @property
    def fills_blanks(self) -> bool:
        """Whether it fills the blanks of a text instead of chatting."""
        return isinstance(self.prompts, Blanks)

    def prompt_ids(self, messages: str | Sequence[Message]) -> list[int]:
        """The ids after which the model answers; nothing that a message says becomes a control id.

        Args:
            messages: A question, or messages with role and content.

        Raises:
            UsageError: The model has no form for them.
        """
        ids = self.prompts.ids(_messages(messages))
        return [*ids, self.description.reply["sop_id"]] if self.fills_blanks else ids

    def answer(
        self, messages: str | Sequence[Message], *, stop: Sequence[str] = (), **settings: Any
    ) -> Generator[str, None, None]:
        """Answers; afterwards `last` has all of it.

        Args:
            messages: A question, or messages with role and content; the oldest turns are left out where all do not fit.
            stop: Texts that end the answer and are not part of it.
            **settings: `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `seed`, `max_new_tokens`; what
                is not given is the model's own.

        Yields:
            Pieces of text, never half a character.

        Raises:
            UsageError: A setting or message that there is no form for.
            ContextLengthError: The last turn alone fills the context.
            GenerationError: The graph's scores are not finite.
        """
        self.last = answer = Answer()
        sampling, limits = self._settings(settings)
        said = _messages(messages)
        if isinstance(self.prompts, Blanks):
            yield from fill(self, self.prompts, said, sampling, limits, stop)
            return
        prompt, answer.dropped_turns = self._fitting(said, limits)
        replying, ending, shown = Replying(self._form()), StopText(stop), _Shown(self.description.reply["text_tools"])
        try:
            for token, reason in stream(self.session, self.layout, prompt, sampling, limits):
                if reason != "stop":
                    answer.token_ids.append(token)
                deltas = replying.push(token)
                if reason:
                    deltas += replying.finish()
                text = ending.push("".join(map(shown.piece, deltas))) + (ending.finish() if reason else "")
                answer.text += text
                answer.finish_reason = "stop" if ending.stopped else reason
                if text:
                    yield text
                if ending.stopped:
                    break
        finally:  # a reader may leave early; what was read is kept, so that a conversation can go on
            answer.messages = [Said("assistant", content, header) for content, header in replying.finished]
            if ending.stopped or (answer.finish_reason is None and answer.text):
                answer.messages = [Said("assistant", answer.text)]

    def generate(self, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
        """Generates ids behind ids, for several rows at once.

        Args:
            prompts: Ids of each row, such as `prompt_ids` gives.
            **settings: See `answer`.

        Returns:
            The ids of each answer, without what ended it.

        Raises:
            UsageError: A setting or prompt does not fit.
            GenerationError: The graph's scores are not finite.
        """
        return generate_batch(self.session, self.layout, prompts, *self._settings(settings))

    def layout(self, ids: Ints, pads: Ints) -> Layout:
        """Masks and positions of padded prompts.

        Args:
            ids: (B, T), padded on the left.
            pads: Columns of padding of each row, (B,).
        """
        return layout_of(self.description.layout, ids, pads)

    def _form(self) -> ReplyForm:
        said = self.description.reply
        return ReplyForm(
            self.tokens.decode,
            self.stop_ids,
            said["vocabulary_size"],
            said["divider"],
            said["full_width"],
            said["drops_blank"],
        )

    def _settings(self, given: Mapping[str, Any]) -> tuple[Sampling, Limits]:
        known = {one.name for one in fields(Sampling)}
        unknown = set(given) - known - {"max_new_tokens"}
        if unknown:
            raise UsageError(f"there is no setting {sorted(unknown)[0]!r}", hint="known: " + ", ".join(sorted(known)))
        own = self.description.sampling
        sampling = Sampling(**{name: own[name] for name in known if name in own})
        wanted = {name: value for name, value in given.items() if value is not None}
        longest = wanted.pop("max_new_tokens", own.get("max_new_tokens"))
        return replace(sampling, **wanted), Limits(self.stop_ids, self.description.context_tokens, longest)

    def _fitting(self, messages: Sequence[Said], limits: Limits) -> tuple[list[int], int]:
        """The prompt without as many of the oldest turns as it takes to leave room; and how many these are."""
        context = limits.context_tokens
        reserve = context // 4 if limits.max_new_tokens is None else min(limits.max_new_tokens, context // 2)
        room = context - max(1, min(reserve, _RESERVE_TOKENS) if limits.max_new_tokens is None else reserve)
        first = next((place for place, said in enumerate(messages) if said.role != "system"), len(messages))
        starts = [place for place in range(first, len(messages)) if messages[place].role == "user"]
        ids, dropped = self.prompts.ids(messages), 0
        while len(ids) > room and dropped + 1 < len(starts):
            dropped += 1
            ids = self.prompts.ids([*messages[:first], *messages[starts[dropped] :]])
        return ids, dropped


class _Shown:
    """What people see of several messages: each on lines of its own, a call of a tool behind the tool's name.

    Args:
        text_tools: Header lines of tools whose call is text, such as code.
    """

    def __init__(self, text_tools: Sequence[str]) -> None:
        self._text_tools, self._number, self._begun = frozenset(text_tools), -1, False

    def piece(self, delta: Delta) -> str:
        """What is shown of a piece of a message."""
        front = ""
        if delta.number != self._number:
            front = "\n" if self._begun else ""
            front += f"{delta.metadata}\n" if delta.metadata and delta.metadata not in self._text_tools else ""
        self._number, self._begun = delta.number, True
        return front + delta.text


def load(folder: str | Path, *, threads: int | None = None) -> Model:
    """Opens an exported folder.

    Args:
        folder: What `glm export` wrote.
        threads: How many compute; None: as many as the engine thinks fit.

    Returns:
        The model.

    Raises:
        CheckpointError: It is no exported folder.
        MissingDependencyError: The engine or the tokenizer's package is not installed.
        OutputError: The engine cannot open the graph.
    """
    description = read_description(folder)
    return Model(description, open_session(description.folder, description.graph, threads))


def _messages(given: str | Sequence[Message]) -> list[Said]:
    if isinstance(given, str):
        return [Said("user", given)]
    messages = []
    for one in given:
        said = one if isinstance(one, Said) else Said(one["role"], one.get("content", ""), one.get("metadata") or "")
        if not isinstance(said.content, str) or not isinstance(said.metadata, str):
            raise UsageError(f"the content of a {said.role} message is {type(said.content).__name__}; expected text")
        messages.append(said)
    return messages
