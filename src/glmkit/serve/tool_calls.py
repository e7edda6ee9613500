"""OpenAI's messages and tools to ours, and calls of tools back: the current form, and the old one with functions.

    theirs                                        ours
    system, developer                             Message("system", text); several at the start become one
    assistant, tool_calls [a, b] + tool a, b      call a, observation a, call b, observation b
    assistant, function_call + function           call, observation
    tools, functions                              tools of the first system message

The template then writes what the model was trained on, so the second turn of a conversation with tools is its own
format again, token for token.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glmkit.chat.answers import Reply
from glmkit.chat.messages import Message
from glmkit.chat.tools import MAX_DEPTH, ToolCallError, parse_json_call
from glmkit.runtime.replies import MAX_HEADER_CHARACTERS
from glmkit.serve.failures import refusal
from glmkit.serve.shapes import (
    AssistantMessage,
    CalledFunction,
    CalledTool,
    ChatMessage,
    ChatRequest,
    FinishReason,
    Function,
    FunctionMessage,
    FunctionTool,
    NamedFunction,
    NamedTool,
    SystemMessage,
    TextPart,
    TokenizeRequest,
    ToolMessage,
)


@dataclass(frozen=True)
class Offer:
    """The tools of a request, and how a call of one is asked for and answered.

    Args:
        tools: What the model reads; None if it is offered nothing.
        names: Their names.
        forced: The one that must be called, "" for any of them, None if none must.
        old: Whether the answer has function_call instead of tool_calls.
    """

    tools: list[Any] | dict[str, Any] | None = None
    names: frozenset[str] = frozenset()
    forced: str | None = None
    old: bool = False


def read_offer(body: ChatRequest, generation: int) -> Offer:
    """Reads tools and tool_choice, or functions and function_call.

    Args:
        body: The request.
        generation: The model's, 0 to 4.

    Returns:
        What is offered; nothing if the choice is "none".

    Raises:
        APIError: 400: both forms at once, a choice that names no tool, or a model that calls none.
    """
    if body.tools is not None and body.functions is not None:
        raise refusal("functions", "functions is the old form of tools: send one of them")
    if body.functions is not None:
        choice = body.function_call.name if isinstance(body.function_call, NamedFunction) else body.function_call
        tools, names = _described(body.functions, "functions")
        param, old = "function_call", True
    else:
        if body.function_call is not None:
            raise refusal("function_call", "function_call goes with functions")
        choice = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else body.tool_choice
        tools, names = _described(body.tools, "tools")
        param, old = "tool_choice", body.tools is not None and not _is_current(body.tools)
    if not names:
        if choice not in (None, "none", "auto"):
            raise refusal(param, f"{param} asks for a call, but no tools are given")
        return Offer()
    if generation not in (3, 4):
        raise refusal("functions" if body.functions else "tools", "this model was not made to call tools")
    if isinstance(body.tool_choice, NamedTool) or isinstance(body.function_call, NamedFunction):
        if choice not in names:
            raise refusal(param, f"{param} names a tool that is not among those given")
        return Offer(tools, names, choice, old)  # whatever its name, "none" too
    if choice == "none":
        return Offer()
    return Offer(tools, names, "" if choice == "required" else None, old)


def offered_tools(body: TokenizeRequest) -> list[Any] | dict[str, Any] | None:
    """The tools of a request to /tokenize, as the model reads them."""
    return _described(body.tools, "tools")[0]


def _is_current(tools: Sequence[Any] | Mapping[str, Any]) -> bool:
    return not isinstance(tools, Mapping) and all(isinstance(tool, FunctionTool) for tool in tools)


def _described(
    given: Sequence[FunctionTool | Function] | Mapping[str, Any] | None, param: str
) -> tuple[list[Any] | dict[str, Any] | None, frozenset[str]]:
    """What the model reads of tools, and their names."""
    if not given:
        return None, frozenset()
    if isinstance(given, Mapping):
        for name in given:
            _check_name(name, param)
        return dict(given), frozenset(given)
    functions = [tool.function if isinstance(tool, FunctionTool) else tool for tool in given]
    for place, function in enumerate(functions):
        _check_name(function.name, f"{param}[{place}]")
    names = frozenset(function.name for function in functions)
    if len(names) < len(functions):
        raise refusal(param, "two tools have one name")
    return [function.model_dump(exclude_unset=True, exclude={"strict"}) for function in functions], names


def _check_name(name: str, param: str) -> None:
    """A name becomes a header line, so it must be one."""
    if not name or name != name.strip() or not name.isprintable() or len(name) > MAX_HEADER_CHARACTERS:
        raise refusal(param, "a tool's name is one line of printable letters without blanks around it")


# --- messages ---


def to_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Makes our messages of OpenAI's.

    Args:
        messages: Theirs.

    Returns:
        Ours: each call of a tool with its result behind it.

    Raises:
        APIError: 400 with the message's place: a call without a result or the other way round, arguments that are no
            JSON object, an assistant that says nothing, or an end that nobody has to answer.
    """
    ours: list[Message] = []
    place = 0
    while place < len(messages):
        message = messages[place]
        if isinstance(message, AssistantMessage):
            place += _take_assistant(messages, place, message, ours)
            continue
        if isinstance(message, ToolMessage | FunctionMessage):
            raise refusal(f"messages[{place}]", f"the result of a {message.role} has no call in front of it")
        text = _text(message.content)
        if isinstance(message, SystemMessage) and ours and all(one.role == "system" for one in ours):
            ours[-1] = Message("system", f"{ours[-1].content}\n{text}")
        else:
            ours.append(Message("system" if isinstance(message, SystemMessage) else "user", text))
        place += 1
    if not ours or ours[-1].role not in ("user", "observation"):
        raise refusal("messages", "the last message must be the user's or the result of a tool")
    return ours


def _take_assistant(messages: Sequence[ChatMessage], place: int, message: AssistantMessage, ours: list[Message]) -> int:
    """Adds an assistant's message, its calls and their results; returns how many messages that were."""
    param, text = f"messages[{place}]", _text(message.content)
    if not message.tool_calls and message.function_call is None:
        if message.content is None:
            raise refusal(f"{param}.content", "a message of the assistant needs a content or calls")
        ours.append(Message("assistant", text))
        return 1
    if message.tool_calls and message.function_call is not None:
        raise refusal(param, "function_call is the old form of tool_calls: send one of them")
    if text.strip():
        ours.append(Message("assistant", text))
    if message.function_call is not None:
        after = messages[place + 1] if place + 1 < len(messages) else None
        if not isinstance(after, FunctionMessage):
            raise refusal(f"{param}.function_call", "a message of role function with its result must follow")
        ours.append(_call(message.function_call, f"{param}.function_call"))
        ours.append(Message("observation", _text(after.content)))
        return 2
    calls = message.tool_calls or []
    results = _results(messages, place + 1)
    for number, call in enumerate(calls):
        where = f"{param}.tool_calls[{number}]"
        if call.id not in results:
            raise refusal(where, "one message of role tool with this call's tool_call_id must follow")
        ours.append(_call(call.function, f"{where}.function"))
        ours.append(results.pop(call.id))
    if results:
        raise refusal(f"messages[{place + 1}]", "a tool_call_id is none of the calls in front of it")
    return 1 + len(calls)


def _results(messages: Sequence[ChatMessage], start: int) -> dict[str, Message]:
    """The results that follow, by the ids of their calls."""
    results: dict[str, Message] = {}
    for place in range(start, len(messages)):
        message = messages[place]
        if not isinstance(message, ToolMessage):
            break
        if message.tool_call_id in results:
            raise refusal(f"messages[{place}].tool_call_id", "two results are for one call")
        results[message.tool_call_id] = Message("observation", _text(message.content))
    return results


def _call(function: CalledFunction, param: str) -> Message:
    _check_name(function.name, f"{param}.name")
    try:
        arguments = parse_json_call(function.arguments or "{}")
    except ToolCallError:
        raise refusal(
            f"{param}.arguments", f"arguments must be the text of a JSON object of at most {MAX_DEPTH} levels"
        ) from None
    return Message("assistant", "", metadata=function.name, arguments=arguments)


def _text(content: str | Sequence[TextPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


# --- calls ---


@dataclass(frozen=True)
class Outcome:
    """What a reply is for the client.

    Args:
        call: The call, in the current form and with an id; None if there is none.
        text: Text of a call that is none, beyond what the reply shows as text.
        malformed: Why it is none.
        finish_reason: As OpenAI says it.
    """

    call: CalledTool | None
    text: str
    malformed: str | None
    finish_reason: FinishReason


def outcome_of(reply: Reply, offer: Offer) -> Outcome:
    """Reads a reply's end.

    Args:
        reply: The reply.
        offer: What was offered; a call of anything else is no call, and its text is shown.

    Returns:
        The call with an id of its own, or the text.
    """
    call = reply.tool_call
    reason: FinishReason = "length" if reply.finish_reason == "length" else "stop"
    if call is None:
        return Outcome(None, "", reply.malformed if offer.names else None, reason)
    if call.name not in offer.names:
        last = reply.messages[-1]
        text = ("\n" if reply.text else "") + f"{last.metadata}\n{last.content}"
        problem = f"it calls {call.name!r:.130}, which was not offered" if offer.names else None
        return Outcome(None, text, problem, "stop")
    function = CalledFunction(name=call.name, arguments=json.dumps(call.arguments, ensure_ascii=False))
    called = CalledTool(id=f"call_{secrets.token_hex(12)}", type="function", function=function)
    return Outcome(called, "", None, "function_call" if offer.old else "tool_calls")
