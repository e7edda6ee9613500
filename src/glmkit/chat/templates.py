"""Messages to token ids: the one place where prompts are made, for inference and for training.

    generation 1    q0 [gMASK] sop | a0 eop             [Round 0] 问：q 答：a [Round 1] 问：q 答： [gMASK] sop | a eop
    generation 2    [gMASK] sop [Round 1] 问：q 答：a [Round 2] 问：q 答： | a </s>
    generation 3    [gMASK] sop   <|user|> "\\n" q <|assistant|> | "\\n" a <|user|> "\\n" q <|assistant|> | "\\n" a </s>
    generation 4    [gMASK] <sop> <|user|> "\\n" q <|assistant|> | "\\n" a <|user|> … | "\\n" a <|endoftext|>

A row of FORMATS is all that differs between generations: how ids are made (`rounds`, `blocks`), what a reply looks
like, how tools are called, and how the official code samples. The primitives that make ids (`encode_text`,
`build_single_message`) belong to the tokenizer, whose official methods use them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glmkit.chat.blocks import Blocks, chatglm3_contents, glm4_contents
from glmkit.chat.messages import Message
from glmkit.chat.rounds import Rounds
from glmkit.chat.tools import (
    GLM4_BUILT_IN,
    INTERPRETER,
    parse_json_call,
    parse_tool_call,
    write_json_call,
    write_tool_call,
)
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import UsageError

ChatFormat = Rounds | Blocks

# What chat() of the official models does; its top_k comes from transformers' defaults of the time.
_FIRST_SAMPLING = SamplingOptions(temperature=0.95, top_p=0.7, top_k=50)
_SAMPLING = SamplingOptions(temperature=0.8, top_p=0.8, top_k=50)

FORMATS: Mapping[int, ChatFormat] = {
    1: Rounds("ChatGLM-6B", _FIRST_SAMPLING, 0, "\n", bare=True, full_width=True),
    2: Rounds("ChatGLM2", _SAMPLING, 1, "\n\n"),
    3: Blocks(
        "ChatGLM3",
        _SAMPLING,
        chatglm3_contents,
        parse_tool_call,
        write_tool_call,
        frozenset({INTERPRETER}),
        dummy_prefix=True,
    ),
    4: Blocks(
        "GLM-4",
        _SAMPLING,
        glm4_contents,
        parse_json_call,
        write_json_call,
        frozenset(GLM4_BUILT_IN),
        dummy_prefix=False,
    ),
}


def chat_format(tokenizer: Any) -> ChatFormat:
    """The chat format of a tokenizer's generation.

    Args:
        tokenizer: The model's tokenizer.

    Raises:
        UsageError: The model has none, as those that fill blanks.
    """
    found = FORMATS.get(tokenizer.generation)
    if found is None:
        raise UsageError(
            f"{type(tokenizer).__name__} belongs to a model without a chat format",
            hint="a model that fills blanks takes one text with [MASK] in it",
        )
    return found


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Gives the ids after which the assistant speaks.

    Args:
        tokenizer: The model's tokenizer.
        messages: The conversation so far.

    Returns:
        Ids up to the mark at which the answer begins. No text in the messages becomes a control id.

    Raises:
        UsageError: Messages that this generation has no form for.
    """
    return chat_format(tokenizer).prompt_ids(tokenizer, messages)


def answer_ids(tokenizer: Any, message: Message, last: bool = True) -> list[int]:
    """Gives the ids that the model should produce for an assistant message.

    Args:
        tokenizer: The model's tokenizer.
        message: The assistant's message.
        last: Whether it ends the conversation; then the end mark follows. Otherwise the role id of the next message
            would.

    Returns:
        What follows `prompt_ids`: in generations 3 and 4 header line and content, in 1 and 2 the content.

    Raises:
        UsageError: It is not the assistant's, or it has metadata in generation 1 or 2.
    """
    if message.role != "assistant":
        raise UsageError(f"an answer is the assistant's; this message is the {message.role}'s")
    return chat_format(tokenizer).answer_ids(tokenizer, message, last)


def conversation_ids(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Gives the ids of a whole conversation and which of them are to be learnt.

    In generations 3 and 4 every assistant message is learnt, with the role id or end mark that ends it, and not the
    assistant id in front of it (unless it ends another assistant message). In generations 1 and 2 the rounds are one
    text, so only the last answer follows exactly what the model is asked later, and only that one is learnt.

    Args:
        tokenizer: The model's tokenizer.
        messages: The conversation; the last message is the assistant's.

    Returns:
        The ids with the end mark, and for each whether it is a target.

    Raises:
        UsageError: The last message is not the assistant's, or a message has no form in this generation.
    """
    if not messages or messages[-1].role != "assistant":
        raise UsageError("a conversation to learn from ends with the assistant's message")
    return chat_format(tokenizer).conversation_ids(tokenizer, messages)


def text_ids(tokenizer: Any, text: str) -> tuple[list[int], list[bool]]:
    """Gives the ids of plain text, without any role, and which of them are to be learnt: all of the text.

    In generation 1, where what is asked is read in both directions, the text follows an empty question.

    Args:
        tokenizer: The model's tokenizer.
        text: The text.

    Returns:
        The ids with the end mark, and for each whether it is a target.

    Raises:
        UsageError: The model has no chat format.
    """
    start = chat_format(tokenizer).text_ids(tokenizer, "")
    ids = [*start, *tokenizer.encode_text(text), tokenizer.eos_token_id]
    return ids, [False] * len(start) + [True] * (len(ids) - len(start))
