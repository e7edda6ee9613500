"""Generated text as the official `chat` methods return it: answers, calls of tools, and the history with them.

What differs from the official code, on purpose: tool calls are read as literals and never evaluated, and one that is
not complete (or is other code) has the parameters None instead of raising; ids that the model's vocabulary is padded
with decode to nothing.

Source: process_response of modeling_chatglm.py (behaviour, not code).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

from glmkit.chat.blocks import Blocks
from glmkit.chat.templates import chat_format
from glmkit.chat.tools import ToolCallError, parse_json_call, parse_tool_call
from glmkit.runtime.punctuation import full_width


def process_response(self: Any, output: str, history: Sequence[Any] | None = None) -> Any:
    """Turns generated text into an answer.

    Args:
        self: The model.
        output: The text, in generations 3 and 4 with header lines and "<|assistant|>" between messages.
        history: Generations 3 and 4: the messages so far.

    Returns:
        Generation 2 (no history): the answer. Generations 3 and 4: the answer, see `glmkit.chat.official.chat`, and the
        history with it.
    """
    if history is None:
        return _with_year(output.strip())
    return process_parts(output.split("<|assistant|>"), history)


def process_response_of_chatglm(self: Any, response: str) -> str:
    """Turns generated text of ChatGLM-6B into an answer: its marks are full-width beside Chinese characters.

    Args:
        self: The model.
        response: The text.
    """
    return full_width(_with_year(response.strip()))


def _with_year(text: str) -> str:
    return text.replace("[[训练时间]]", "2023年")


def decode_reply(tokenizer: Any, ids: Sequence[int]) -> str:
    """Turns generated ids into text.

    Args:
        tokenizer: The model's tokenizer.
        ids: What the model wrote; ids that its vocabulary is padded with decode to nothing.

    Returns:
        The text.
    """
    return tokenizer.decode([token for token in ids if token < tokenizer.vocab_size])


def response_so_far(
    tokenizer: Any, query: str, ids: list[int], history: list[Any], role: str, *, partial: bool
) -> tuple[Any, list[Any]] | None:
    """Answer and history for the ids of a stream so far.

    Args:
        tokenizer: The model's tokenizer.
        query: The question.
        ids: What the model wrote so far.
        history: What was said before the question.
        role: Who asked.
        partial: Whether more will come.

    Returns:
        Both, or None when there is nothing to show: no text, or half a character at its end.
    """
    text = decode_reply(tokenizer, ids)
    if not text or text.endswith("\ufffd"):
        return None
    if not isinstance(chat_format(tokenizer), Blocks):
        response = process_response(None, text)
        return response, [*history, (query, response)]
    parts = reply_parts(tokenizer, ids)
    if partial and len(parts) > 1 and "\n" not in parts[-1]:
        parts.pop()  # the header line behind an assistant id is not complete
    return process_parts(parts, [*history, {"role": role, "content": query}])


def reply_parts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each message of a reply, divided by the assistant id and not by its name in the text.

    Args:
        tokenizer: The model's tokenizer.
        ids: What the model wrote, without the stop id.
    """
    assistant = tokenizer.get_command("<|assistant|>")
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == assistant:
            parts.append([token])
        else:
            parts[-1].append(token)
    # Decoded with the id in front, a later message keeps its leading blank, as in the text of the whole.
    return [tokenizer.decode(part).removeprefix("<|assistant|>" if number else "") for number, part in enumerate(parts)]


def process_parts(parts: Sequence[str], before: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Turns the messages of a reply into an answer.

    Args:
        parts: Their texts, each with its header line.
        before: The history up to the question.

    Returns:
        The answer, see `glmkit.chat.official.chat`, and the history with it.
    """
    history = copy.deepcopy(list(before))
    response: Any = ""
    for part in parts:
        metadata, newline, content = part.partition("\n")
        if not newline:
            metadata, content = "", part
        if not metadata.strip():
            content = content.strip()
            history.append({"role": "assistant", "metadata": metadata, "content": content})
            response = _with_year(content)
            continue
        history.append({"role": "assistant", "metadata": metadata, "content": content})
        response = {"name": metadata.strip()}
        if history[0]["role"] == "system" and "tools" in history[0]:
            response["parameters"] = _parameters(content)
        else:
            response["content"] = content
    return response, history


def _parameters(content: str) -> dict[str, Any] | None:
    """The arguments of a call in the form of either generation, or None if it is not complete or no call."""
    for read in (parse_tool_call, parse_json_call):
        with contextlib.suppress(ToolCallError):
            return read(content)
    return None
