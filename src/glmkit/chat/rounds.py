"""Conversations as numbered rounds of one text: ChatGLM-6B and ChatGLM2.

generation 1    [Round 0] 问：q 答：a [Round 1] 问：q 答： [gMASK] sop | a eop      the first question goes in bare
generation 2    [gMASK] sop [Round 1] 问：q 答：a [Round 2] 问：q 答： | a </s>
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glmkit.chat.messages import Message
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import UsageError

Round = tuple[str, str]  # a question and its answer


@dataclass(frozen=True)
class Rounds:
    """The format of one generation; what its methods do is said in `glmkit.chat.templates`.

    Args:
        name: What messages to users call the model.
        sampling: How the official `chat` chooses tokens.
        first: Number of the first round.
        gap: What stands between the lines of a round, and behind it.
        bare: Whether a question without rounds before it is the whole text.
        full_width: Whether marks beside Chinese characters are shown full-width; the tokenizer cannot write them.
    """

    name: str
    sampling: SamplingOptions
    first: int
    gap: str
    bare: bool = False
    full_width: bool = False
    divider: None = None
    text_tools: frozenset[str] = frozenset()
    dummy_prefix: bool = True

    def text(self, query: str, history: Sequence[Sequence[str]] = ()) -> str:
        """Writes the rounds.

        Args:
            query: The new question.
            history: Earlier (question, answer) pairs.

        Returns:
            The text that the model continues.
        """
        if self.bare and not history:
            return query
        rounds = [self._round(number, *pair) for number, pair in enumerate(history, start=self.first)]
        return "".join(rounds) + self._round(self.first + len(rounds), query, "").removesuffix(self.gap)

    def _round(self, number: int, question: str, answer: str) -> str:
        return f"[Round {number}]{self.gap}问：{question}{self.gap}答：{answer}{self.gap}"

    def text_ids(self, tokenizer: Any, text: str) -> list[int]:
        """The ids after which the model goes on with a text."""
        ids: list[int] = tokenizer.build_inputs_with_special_tokens(tokenizer.encode_text(text))
        return ids

    def prompt_ids(self, tokenizer: Any, messages: Sequence[Message]) -> list[int]:
        """See `glmkit.chat.templates.prompt_ids`."""
        return self.text_ids(tokenizer, self.text(*self._pairs(messages)))

    def answer_ids(self, tokenizer: Any, message: Message, last: bool) -> list[int]:
        """See `glmkit.chat.templates.answer_ids`."""
        self._refuse_tools(message)
        return [*tokenizer.encode_text(message.content), *([tokenizer.eos_token_id] if last else [])]

    def conversation_ids(self, tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """See `glmkit.chat.templates.conversation_ids`: the last answer is learnt."""
        prompt = self.prompt_ids(tokenizer, messages[:-1])
        answer = self.answer_ids(tokenizer, messages[-1], True)
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)

    def read_call(self, content: str) -> dict[str, Any]:
        """There are no calls of tools."""
        raise UsageError(f"{self.name} calls no tools")

    def _pairs(self, messages: Sequence[Message]) -> tuple[str, list[Round]]:
        """The last question and the rounds before it; a system message is glued to the first question."""
        for message in messages:
            self._refuse_tools(message)
        system = ""
        if messages and messages[0].role == "system":
            system, messages = messages[0].content, messages[1:]
        roles = [message.role for message in messages]
        expected = ["user", "assistant"] * (len(messages) // 2) + ["user"]
        if roles != expected:
            raise UsageError(
                f"the roles are {', '.join(roles) or 'none'}; "
                f"{self.name} takes user and assistant in turn, ending with user"
            )
        texts = [message.content for message in messages]
        texts[0] = system + texts[0]
        return texts[-1], list(zip(texts[:-1:2], texts[1::2]))

    def _refuse_tools(self, message: Message) -> None:
        if message.role == "observation" or message.metadata or message.tools is not None:
            raise UsageError(
                f"{self.name} has no form for tools, metadata or observations",
                hint="use ChatGLM3 or GLM-4, or put the text into a user message",
            )
