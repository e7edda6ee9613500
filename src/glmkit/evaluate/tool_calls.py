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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glmkit.chat.messages import Message
from glmkit.chat.official import decode_reply
from glmkit.chat.reply import parse_reply
from glmkit.chat.templates import chat_format, prompt_ids
from glmkit.chat.tools import ToolCallError, documented_tools
from glmkit.data.records import Record
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import DataError
from glmkit.evaluate.adgen import chat_tokenizer, read_asked
from glmkit.evaluate.results import Results
from glmkit.evaluate.tasks import Figure, Row, Settings, write_answers
from glmkit.loading import Loaded

_GREEDY = SamplingOptions(temperature=0.0)
_NEW_TOKENS = 256
_SHARES = ("called", "formed", "right", "exact", "false")


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


@dataclass(frozen=True)
class AskedTurn:
    """A turn as it is asked.

    Args:
        turn: The turn.
        prompt: Ids of the dialogue before it.
        fits: Whether the model's context has room for it and a reply.
    """

    turn: Turn
    prompt: list[int]
    fits: bool


class ToolCalls:
    """The task `tools`; see `glmkit.evaluate.tasks.Task`.

    Args:
        read: Gives the dialogues.
        options: How tokens are chosen.
        max_new_tokens: Longest reply in tokens; None: 256.
        batch_size: Replies written together.
    """

    name, rows_file = "tools", "predictions.jsonl"

    def __init__(
        self,
        read: Callable[[], Sequence[Record]],
        options: SamplingOptions = _GREEDY,
        *,
        max_new_tokens: int | None = None,
        batch_size: int = 32,
    ) -> None:
        self.batch_size = batch_size
        self._read, self._options, self._new_tokens = read, options, max_new_tokens or _NEW_TOKENS

    def items(self, loaded: Loaded) -> Sequence[AskedTurn]:
        """Lists the turns of the assistant.

        Args:
            loaded: The model.

        Raises:
            DataError: No dialogue has tools, or all are too long.
            UsageError: The model has no chat format.
        """
        tokenizer = chat_tokenizer(loaded)
        room = loaded.config.max_position_embeddings - self._new_tokens
        asked = []
        for turn in turns(tokenizer, self._read()):
            ids = prompt_ids(tokenizer, turn.prompt)
            asked.append(AskedTurn(turn, ids, len(ids) <= room))
        if not any(one.fits for one in asked):
            what = f"the model's context minus {self._new_tokens} tokens"
            raise DataError(f"all {len(asked)} prompts are longer than {what}")
        return asked

    def answer(
        self, loaded: Loaded, items: Sequence[AskedTurn], first: int, progress: Callable[[int], None] | None = None
    ) -> list[Row]:
        """Writes replies and judges them.

        Args:
            loaded: The model.
            items: A unit.
            first: Number of its first item.
            progress: Called with how many are done.

        Returns:
            `where` the dialogue came from, what was `wanted` (the call's name and arguments, none: text), the `reply`
            as text, what it `counts` as, and whether the prompt was `too_long`.
        """
        fitting = [number for number, item in enumerate(items) if item.fits]
        replies = write_answers(
            loaded,
            [items[number].prompt for number in fitting],
            self._options,
            first,
            max_new_tokens=self._new_tokens,
            batch_size=self.batch_size,
            progress=progress,
        )
        written = dict(zip(fitting, replies))
        return [self._row(loaded.tokenizer, item, written.get(number)) for number, item in enumerate(items)]

    def _row(self, tokenizer: Any, item: AskedTurn, ids: Sequence[int] | None) -> Row:
        turn = item.turn
        return {
            "where": turn.where,
            "wanted": None if turn.name is None else {"name": turn.name, "arguments": turn.arguments},
            "reply": "" if ids is None else decode_reply(tokenizer, ids),
            "counts": [] if ids is None else judge(tokenizer, turn, ids),
            "too_long": ids is None,
        }

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        """Shares of the turns that call a tool, and of those that answer in text.

        Args:
            rows: All of them.

        Returns:
            exact, right, formed and called of the former; false of the latter.
        """
        calls = [float(row["wanted"] is not None and not row["too_long"]) for row in rows]
        texts = [float(row["wanted"] is None and not row["too_long"]) for row in rows]
        figures = [
            Figure(name, [float(name in row["counts"]) for row in rows], weights=calls)
            for name in ("exact", "right", "formed", "called")
        ]
        false = [float("false" in row["counts"]) for row in rows]
        return [*figures, Figure("false", false, weights=texts, better="less")]

    def notes(self, rows: Sequence[Row]) -> Mapping[str, Any]:
        """How many turns there are of each kind, and how many were too long to be asked.

        Args:
            rows: All of them.
        """
        asked = [row for row in rows if not row["too_long"]]
        calls = sum(row["wanted"] is not None for row in asked)
        return {"call_turns": calls, "text_turns": len(asked) - calls, "too_long": len(rows) - len(asked)}


def make_tools(data: str, how: Settings) -> ToolCalls:
    """Makes the task `tools`.

    Args:
        data: File of dialogues with tools.
        how: batch_size, max_new_tokens, temperature, top_p, seed, limit (turns), columns, format.

    Returns:
        The task.

    Raises:
        UsageError: A setting is not known here.
    """
    how.only("tools", "max_new_tokens", "temperature", "top_p", "seed", "columns", "format")
    return ToolCalls(
        lambda: read_asked(data, replace(how, limit=None)),  # the limit is of turns
        how.sampling,
        max_new_tokens=how.max_new_tokens,
        batch_size=how.batch_size,
    )


def tool_results(results: Results) -> dict[str, Any]:
    """What tool_call_results.json holds.

    Args:
        results: What has been measured.

    Returns:
        call_turns, text_turns and too_long; called, formed, right and exact in percent of call_turns; false in percent
        of text_turns.
    """
    shares = {name: round(results.figures[name].value or 0.0, 2) for name in _SHARES}
    return {**results.notes, **shares}


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
