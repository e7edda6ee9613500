"""Messages to ids, by the chat format that the folder says.

    rounds    one text of numbered rounds       ChatGLM-6B, ChatGLM2
    blocks    a role's id, then its message     ChatGLM3, GLM-4
    blanks    one text with [MASK] in it        GLM, GLM-130B

The words of a format are data: the exporter takes them from `glmkit.chat.templates` and compares what comes out here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from glmkit.errors import TokenizerError, UsageError
from glmkit.runtime.tokens import Tokens

_PLACE = re.compile(r"\{(number|question|answer|metadata)\}")


class Said(NamedTuple):
    """A message: who says it, what, and for calls of tools the header line."""

    role: str
    content: str
    metadata: str = ""


class Prompts(Protocol):
    """How a conversation becomes ids."""

    def ids(self, messages: Sequence[Said]) -> list[int]:
        """The ids after which the model answers."""
        ...


class Rounds:
    """Conversations as numbered rounds of one text.

    Args:
        tokens: The vocabulary.
        data: What runtime.json says: `name`, the number of the `first` round, the words of a `round` and of the last
            one (`ask`), whether a question alone is `bare`, the ids `before` and `after` the text.
    """

    def __init__(self, tokens: Tokens, data: dict[str, Any]) -> None:
        self._tokens, self._data = tokens, data

    def ids(self, messages: Sequence[Said]) -> list[int]:
        """The ids after which the model answers.

        Args:
            messages: Perhaps a system message, then user and assistant in turn, ending with the user.

        Raises:
            UsageError: They are in another order, or there are tools in them.
        """
        data = self._data
        text = self._text(messages)
        return [*data["before"], *self._tokens.encode(text), *data["after"]]

    def _text(self, messages: Sequence[Said]) -> str:
        name = self._data["name"]
        if any(said.role == "observation" or said.metadata for said in messages):
            raise UsageError(f"{name} has no form for tools, metadata or observations")
        system = ""
        if messages and messages[0].role == "system":
            system, messages = messages[0].content, messages[1:]
        roles = [said.role for said in messages]
        if roles != ["user", "assistant"] * (len(messages) // 2) + ["user"]:
            raise UsageError(
                f"the roles are {', '.join(roles) or 'none'}; {name} takes user and assistant in turn, ending with user"
            )
        texts = [said.content for said in messages]
        texts[0] = system + texts[0]
        if self._data["bare"] and len(texts) == 1:
            return texts[0]
        first: int = self._data["first"]
        rounds = [
            _fill(self._data["round"], number=str(number), question=question, answer=answer)
            for number, (question, answer) in enumerate(zip(texts[:-1:2], texts[1::2]), start=first)
        ]
        return "".join(rounds) + _fill(self._data["ask"], number=str(first + len(rounds)), question=texts[-1])


class Blocks:
    """Conversations as blocks, each begun by the id of the role that speaks.

    Args:
        tokens: The vocabulary.
        data: What runtime.json says: the ids of `roles`, the `header` line, whether an empty message is left out
            (`skips_empty`), the ids `before` and `after`.
    """

    def __init__(self, tokens: Tokens, data: dict[str, Any]) -> None:
        self._tokens, self._data = tokens, data

    def ids(self, messages: Sequence[Said]) -> list[int]:
        """The ids after which the model answers.

        Args:
            messages: The conversation.

        Raises:
            UsageError: There is no such role.
        """
        ids = list(self._data["before"])
        for said in messages:
            if said.role not in self._data["roles"]:
                raise UsageError(f"no role {said.role!r}; expected one of {', '.join(self._data['roles'])}")
            if said.content or not self._data["skips_empty"]:
                header = _fill(self._data["header"], metadata=said.metadata)
                ids += [
                    self._data["roles"][said.role],
                    *self._tokens.encode(header),
                    *self._tokens.encode(said.content),
                ]
        return [*ids, *self._data["after"]]


class Blanks:
    """A text with blanks: what stands in front of the first filling.

    Args:
        tokens: The vocabulary.
        data: What runtime.json says: by which of its parts a text shows that it has a blank (`signs`), the one that is
            `added` where there is none, the ids `before` and `end`, and which `open_ends` take the end's place.
    """

    def __init__(self, tokens: Tokens, data: dict[str, Any]) -> None:
        self._tokens, self._data = tokens, data
        self.mask_ids = frozenset(data["mask_ids"])

    def ids(self, messages: Sequence[Said]) -> list[int]:
        """The ids of the last message, without the start of a filling.

        Args:
            messages: The text to fill is the last one; the model reads no other.

        Raises:
            UsageError: There is no text, or a system message or tool.
            TokenizerError: The text has a mark that this vocabulary lacks, and none that it has.
        """
        if any(said.role not in ("user", "assistant") or said.metadata for said in messages):
            raise UsageError("a model that fills blanks has no form for system messages and tools")
        if not messages or messages[-1].role != "user":
            raise UsageError("there is no text to fill", hint="give a text with [MASK] in it")
        text = messages[-1].content
        if not any(sign in text for sign in self._data["signs"]):
            text += self._data["added"]
        ids = self._tokens.encode_marked(text)
        if not self.mask_ids & set(ids):
            raise TokenizerError(f"no mask token that this vocabulary has in {text[-80:]!r}", hint="write [MASK]")
        end = [] if text.endswith(tuple(self._data["open_ends"])) else self._data["end"]
        return [*self._data["before"], *ids, *end]


_KINDS: dict[str, type[Rounds | Blocks | Blanks]] = {"rounds": Rounds, "blocks": Blocks, "blanks": Blanks}


def prompts_of(tokens: Tokens, data: dict[str, Any]) -> Rounds | Blocks | Blanks:
    """The form that runtime.json names.

    Args:
        tokens: The vocabulary.
        data: Its part `prompt`.

    Raises:
        UsageError: There is no such form.
    """
    if data["kind"] not in _KINDS:
        raise UsageError(f"there are no prompts of the kind {data['kind']!r:.80}; expected {', '.join(_KINDS)}")
    return _KINDS[data["kind"]](tokens, data)


def _fill(words: str, **values: str) -> str:
    """Puts values into their places; what is put in is not looked at again."""
    return _PLACE.sub(lambda place: values.get(place[1], ""), words)
