"""Tool calls: whether a model calls a tool where a dialogue calls one, well formed, the right one, with its arguments.

Every turn of the assistant in a dialogue with tools is asked for, after what really came before it. Where the dialogue
calls a tool, the reply is counted as

    called     the reply ends with what its header line announces as a call
    formed     and it is one: a tool of the dialogue's list, arguments that can be read
    right      and it names the tool that the dialogue calls
    exact      and with the same arguments

and where the dialogue answers in text, a call is counted as false.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from glmkit.chat.messages import Message
from glmkit.chat.reply import parse_reply
from glmkit.chat.templates import chat_format, prompt_ids
from glmkit.chat.tools import ToolCallError, documented_tools
from glmkit.data.records import Record
from glmkit.engine.decode import generate_batch
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import DataError

_GREEDY = SamplingOptions(temperature=0.0)


@dataclass(frozen=True)
class Turn:
    """A turn of the assistant to ask for.

    Args:
        prompt: The dialogue before it.
        tools: Names of the tools that may be called; empty if the dialogue describes them in text only.
        name: The tool that the dialogue calls there, None if it answers in text.
        arguments: The call's arguments.
        where: Where the dialogue came from.
    """

    prompt: tuple[Message, ...]
    tools: frozenset[str]
    name: str | None
    arguments: dict[str, Any] | None
    where: str


def turns(tokenizer: Any, records: Sequence[Record]) -> list[Turn]:
    """List the turns of dialogues with tools.

    Args:
        tokenizer: The model's tokenizer; its format reads calls that are text.
        records: Dialogues; those without tools are left out.

    Returns:
        A turn for each run of assistant messages.

    Raises:
        DataError: No dialogue has tools.
    """
    found = []
    for record in records:
        named = [tool_names(message.tools) for message in record.messages if message.tools]
        if not named:
            continue
        for place, message in enumerate(record.messages):
            if message.role == "assistant" and record.messages[place - 1].role != "assistant":
                name, arguments = _call(tokenizer, record.messages[place:])
                found.append(Turn(record.messages[:place], frozenset().union(*named), name, arguments, record.where))
    if not found:
        raise DataError("no dialogue of these records has tools", hint="records need 'tools', see docs/data.md")
    return found


def evaluate_tool_calls(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    options: SamplingOptions = _GREEDY,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Ask for every turn and count the calls.

    Args:
        model: The model, in eval mode.
        tokenizer: Its tokenizer.
        records: Dialogues with tools.
        options: How tokens are chosen; greedily by default.
        max_new_tokens: Longest reply in tokens.
        batch_size: Replies written together.
        limit: Use only the first turns.
        progress: Called with the number of turns done and of all turns.

    Returns:
        call_turns and text_turns; called, formed, right and exact in percent of call_turns; false in percent of
        text_turns; too_long, how many turns were left out because the prompt and a reply exceed the model's context.

    Raises:
        DataError: No dialogue has tools, or all are too long.
    """
    asked = turns(tokenizer, records)[:limit]
    prompts = [prompt_ids(tokenizer, turn.prompt) for turn in asked]
    room = model.config.max_position_embeddings - max_new_tokens
    fitting = [number for number, ids in enumerate(prompts) if len(ids) <= room]
    if not fitting:
        raise DataError(f"all {len(asked)} prompts are longer than the model's context minus {max_new_tokens} tokens")
    replies = generate_batch(
        model,
        [prompts[number] for number in fitting],
        options,
        stop_ids=tokenizer.stop_ids,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    counted = {"called": 0, "formed": 0, "right": 0, "exact": 0, "false": 0}
    calls = sum(asked[number].name is not None for number in fitting)
    for number, ids in zip(fitting, replies):
        for name in judge(tokenizer, asked[number], ids):
            counted[name] += 1
    texts = len(fitting) - calls
    shares = {name: _percent(counted[name], calls) for name in ("called", "formed", "right", "exact")}
    counts = {"call_turns": calls, "text_turns": texts, "too_long": len(asked) - len(fitting)}
    return {**counts, **shares, "false": _percent(counted["false"], texts)}


def judge(tokenizer: Any, turn: Turn, ids: Sequence[int]) -> list[str]:
    """Say what a reply counts as.

    Args:
        tokenizer: The model's tokenizer.
        turn: What was asked for.
        ids: What the model wrote, with or without the stop id.

    Returns:
        Some of called, formed, right, exact; or false.
    """
    reply = parse_reply(tokenizer, ids)
    called = reply.call is not None or reply.problem is not None
    if turn.name is None:
        return ["false"] if called else []
    found = ["called"] if called else []
    if reply.call is not None and (not turn.tools or reply.call.name in turn.tools):
        found.append("formed")
        if reply.call.name == turn.name:
            found.append("right")
            if reply.call.arguments == turn.arguments:
                found.append("exact")
    return found


def tool_names(tools: Any) -> frozenset[str]:
    """Names of the tools of a system message, in any of the forms that are in use."""
    documented = documented_tools(tools)
    if isinstance(documented, dict):
        return frozenset(map(str, documented))
    return frozenset(str(tool["name"]) for tool in documented if isinstance(tool, dict) and "name" in tool)


def _call(tokenizer: Any, messages: Sequence[Message]) -> tuple[str | None, dict[str, Any] | None]:
    """The call that a run of assistant messages ends with."""
    run = []
    for message in messages:
        if message.role != "assistant":
            break
        run.append(message)
    last, form = run[-1], chat_format(tokenizer)
    if not last.metadata or last.metadata in form.text_tools:
        return None, None
    if last.arguments is not None:
        return last.metadata, last.arguments
    try:
        return last.metadata, form.read_call(last.content)
    except ToolCallError:
        return last.metadata, None


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 2) if whole else 0.0
