"""Messages to token ids: the one place where prompts are made, for inference and for training.

    generation 2    [gMASK] sop | [Round 1] 问：q 答：a [Round 2] 问：q 答： | a </s>
    generation 3    [gMASK] sop | <|user|> "\\n" q <|assistant|> | "\\n" a <|user|> "\\n" q <|assistant|> | "\\n" a </s>

The primitives that make ids (`build_prompt`, `build_single_message`) belong to the tokenizer, whose official methods
use them too.
"""

from __future__ import annotations

from collections.abc import Sequence

from glmkit.chat.messages import Message
from glmkit.chat.tools import TOOLS_SENTENCE, documented_tools
from glmkit.errors import UsageError
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer, join_tools


def prompt_ids(tokenizer: ChatGLMTokenizer, messages: Sequence[Message]) -> list[int]:
    """Gives the ids after which the assistant speaks.

    Args:
        tokenizer: The model's tokenizer.
        messages: The conversation so far.

    Returns:
        Ids from [gMASK] sop to the mark at which the answer begins.

    Raises:
        UsageError: Messages that this generation has no form for.
    """
    if tokenizer.generation == 2:
        query, history = _rounds(messages)
        return tokenizer.prefix_ids + tokenizer.encode_text(tokenizer.build_prompt(query, history))
    blocks = [_block(tokenizer, message) for message in messages]
    return [
        *tokenizer.prefix_ids,
        *(token for block in blocks for token in block),
        tokenizer.get_command("<|assistant|>"),
    ]


def answer_ids(tokenizer: ChatGLMTokenizer, message: Message, last: bool = True) -> list[int]:
    """Gives the ids that the model should produce for an assistant message.

    Args:
        tokenizer: The model's tokenizer.
        message: The assistant's message.
        last: Whether it ends the conversation; then </s> follows. Otherwise the role id of the next message would.

    Returns:
        What follows `prompt_ids`: in generation 3 header line and content, in generation 2 the content.

    Raises:
        UsageError: It is not the assistant's, or generation 2 and the message has metadata.
    """
    if message.role != "assistant":
        raise UsageError(f"an answer is the assistant's; this message is the {message.role}'s")
    end = [tokenizer.eos_token_id] if last else []
    if tokenizer.generation == 2:
        _refuse_tools(message)
        return tokenizer.encode_text(message.content) + end
    return _block(tokenizer, message)[1:] + end


def conversation_ids(tokenizer: ChatGLMTokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Gives the ids of a whole conversation and which of them are to be learnt.

    In generation 3 every assistant message is learnt, with the role id or </s> that ends it, and not the assistant id
    in front of it (unless it ends another assistant message). In generation 2 the rounds are one text, so only the last
    answer follows exactly what the model is asked later, and only that one is learnt.

    Args:
        tokenizer: The model's tokenizer.
        messages: The conversation; the last message is the assistant's.

    Returns:
        The ids with </s> at the end, and for each whether it is a target.

    Raises:
        UsageError: The last message is not the assistant's, or a message has no form in this generation.
    """
    if not messages or messages[-1].role != "assistant":
        raise UsageError("a conversation to learn from ends with the assistant's message")
    if tokenizer.generation == 2:
        prompt, answer = prompt_ids(tokenizer, messages[:-1]), answer_ids(tokenizer, messages[-1])
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)
    ids, learnt = tokenizer.prefix_ids, [False, False]
    learning = False  # whether the message before is the assistant's
    for message in messages:
        block = _block(tokenizer, message)
        ids += block
        learnt += [learning] + [message.role == "assistant"] * (len(block) - 1)
        learning = message.role == "assistant"
    return [*ids, tokenizer.eos_token_id], [*learnt, True]


def _block(tokenizer: ChatGLMTokenizer, message: Message) -> list[int]:
    """A generation-3 message from its role id to the end of its content."""
    content = message.content
    if message.tools is not None:
        content = join_tools(content or TOOLS_SENTENCE, documented_tools(message.tools))
    return tokenizer.build_single_message(message.role, message.metadata, content)


def _rounds(messages: Sequence[Message]) -> tuple[str, list[tuple[str, str]]]:
    """Generation 2: the last question and the rounds before it; a system message is glued to the first question."""
    for message in messages:
        _refuse_tools(message)
    system = ""
    if messages and messages[0].role == "system":
        system, messages = messages[0].content, messages[1:]
    roles = [message.role for message in messages]
    expected = ["user", "assistant"] * (len(messages) // 2) + ["user"]
    if roles != expected:
        raise UsageError(
            f"the roles are {', '.join(roles) or 'none'}; ChatGLM2 takes user and assistant in turn, ending with user"
        )
    texts = [message.content for message in messages]
    texts[0] = system + texts[0]
    return texts[-1], list(zip(texts[:-1:2], texts[1::2]))


def _refuse_tools(message: Message) -> None:
    if message.role == "observation" or message.metadata or message.tools is not None:
        raise UsageError(
            "ChatGLM2 has no form for tools, metadata or observations",
            hint="use ChatGLM3, or put the text into a user message",
        )
