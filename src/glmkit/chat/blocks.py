"""Conversations as blocks, each begun by the id of the role that speaks: ChatGLM3 and GLM-4.

    generation 3    [gMASK] sop   <|user|> "\\n" q <|assistant|> | "\\n" a <|user|> "\\n" q <|assistant|> | "\\n" a </s>
    generation 4    [gMASK] <sop> <|user|> "\\n" q <|assistant|> | "\\n" a <|user|> "\\n" q <|assistant|> | "\\n" a end

`end` is <|endoftext|>. The header line is empty or names a tool; it and the content are encoded each for itself, which
in generation 3 gives both the blank that SentencePiece puts in front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glmkit.chat.messages import Message
from glmkit.chat.tools import (
    GLM4_PREAMBLES,
    TOOLS_SENTENCE,
    documented_tools,
    glm4_tools,
)
from glmkit.engine.sampling import SamplingOptions
from glmkit.tokenizers.chatglm2 import join_tools


@dataclass(frozen=True)
class Blocks:
    """The format of one generation; what its methods do is said in `glmkit.chat.templates`.

    Args:
        name: What messages to users call the model.
        sampling: How the official `chat` chooses tokens.
        contents: The contents of the blocks of a message: none, one, or one more for tools.
        read_call: Reads the arguments of a tool call, or raises ToolCallError.
        write_call: Writes them, as the model was trained to.
        text_tools: Header lines of tools whose call is text: code to run, a picture to paint.
        dummy_prefix: Whether a content begins with SentencePiece's blank.
    """

    name: str
    sampling: SamplingOptions
    contents: Callable[[Any, Message], list[str]]
    read_call: Callable[[str], dict[str, Any]]
    write_call: Callable[[dict[str, Any]], str]
    text_tools: frozenset[str]
    dummy_prefix: bool
    divider: str = "<|assistant|>"
    full_width: bool = False

    def text_ids(self, tokenizer: Any, text: str) -> list[int]:
        """The ids after which the model goes on with a text."""
        return [*tokenizer.prefix_ids, *tokenizer.encode_text(text)]

    def message_ids(self, tokenizer: Any, messages: Sequence[Message]) -> list[int]:
        """The blocks of messages, with nothing in front and behind."""
        return [token for message in messages for token in self._block(tokenizer, message)]

    def prompt_ids(self, tokenizer: Any, messages: Sequence[Message]) -> list[int]:
        """See `glmkit.chat.templates.prompt_ids`."""
        blocks = self.message_ids(tokenizer, messages)
        return [*tokenizer.prefix_ids, *blocks, tokenizer.get_command(self.divider)]

    def answer_ids(self, tokenizer: Any, message: Message, last: bool) -> list[int]:
        """See `glmkit.chat.templates.answer_ids`: header line and content."""
        written = self._written(message)
        ids = tokenizer.build_single_message("assistant", written.metadata, written.content)[1:]
        return [*ids, *([tokenizer.eos_token_id] if last else [])]

    def conversation_ids(self, tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """See `glmkit.chat.templates.conversation_ids`: every answer is learnt, with the id that ends it."""
        ids = list(tokenizer.prefix_ids)
        learnt = [False] * len(ids)
        learning = False  # whether the message before is the assistant's
        for message in messages[:-1]:
            block = self._block(tokenizer, message)
            if block:
                ids += block
                learnt += [learning] + [message.role == "assistant"] * (len(block) - 1)
                learning = message.role == "assistant"
        answer = self.answer_ids(tokenizer, messages[-1], True)
        return [*ids, tokenizer.get_command(self.divider), *answer], [*learnt, learning, *[True] * len(answer)]

    def _block(self, tokenizer: Any, message: Message) -> list[int]:
        """A message from its role id to the end of its content."""
        return [
            token
            for content in self.contents(tokenizer, self._written(message))
            for token in tokenizer.build_single_message(message.role, message.metadata, content)
        ]

    def _written(self, message: Message) -> Message:
        """The message with the text of its call, if it is one."""
        if message.arguments is None:
            return message
        return replace(message, content=self.write_call(message.arguments), arguments=None)


def chatglm3_contents(tokenizer: Any, message: Message) -> list[str]:
    """ChatGLM3 reads tools behind the text of the system message.

    Args:
        tokenizer: Not looked at.
        message: The message.
    """
    if message.tools is None:
        return [message.content]
    return [join_tools(message.content or TOOLS_SENTENCE, documented_tools(message.tools))]


def glm4_contents(tokenizer: Any, message: Message) -> list[str]:
    """GLM-4 reads tools in a block of their own, and nothing of an empty message.

    Args:
        tokenizer: Its attribute `tools_preamble` replaces what stands in front of the tools.
        message: The message.
    """
    preamble = getattr(tokenizer, "tools_preamble", None) or GLM4_PREAMBLES["2024-06"]
    tools = [glm4_tools(message.tools, preamble)] if message.tools else []
    return [*tools, message.content] if message.content else tools
