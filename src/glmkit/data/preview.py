"""What a model will see of its training data: the text of the ids, with what is learnt and where something was cut.

[gMASK]sop[Round 1]          on a terminal in colours: what is learnt green, control tokens cyan, cuts red
问：…✂ 12 characters
答：[[ … </s>]]              elsewhere in [[ ]]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from glmkit.chat.messages import Message
from glmkit.chat.templates import conversation_ids
from glmkit.data.cutting import Cuts, Limits, fit
from glmkit.data.examples import IGNORED, Example, Examples
from glmkit.data.lengths import TruncationReport, histogram
from glmkit.data.records import Record

_LEARNT, _CONTROL, _CUT, _HEAD = "32", "36", "1;31", "1"
_LONGER = "一二三"  # behind a question that was shortened, to see at which token it ends

Paint = Callable[[str, str], str]


def preview(
    tokenizer: Any,
    examples: Examples,
    report: TruncationReport,
    count: int,
    *,
    records: Sequence[Record] = (),
    limits: Limits | None = None,
    paint: Paint | None = None,
) -> str:
    """Show examples as the model sees them, and how long all of them are.

    Args:
        tokenizer: The model's tokenizer.
        examples: All of them.
        report: What the limits did.
        count: How many are shown, from the first on.
        records: What they were made of, to show where a question was cut; those that are not given are shown without.
        limits: Where they were cut.
        paint: Colours a text by an ANSI code; None marks what is learnt with [[ ]].

    Returns:
        The page.
    """
    by_place = {record.where: record for record in records}
    pages = []
    for number in range(min(count, len(examples))):
        example = examples[number]
        record = by_place.get(example.where)
        cuts, places = _cuts(tokenizer, record, limits or Limits()) if record is not None else (None, {})
        pages.append(_head(example, cuts, paint) + "\n" + _text(tokenizer, example, places, paint))
    bars = f"tokens of a record, and how many records have them\n{histogram(examples.lengths)}"
    return "\n\n".join([*pages, report.page("all records"), bars])


def _head(example: Example, cuts: Cuts | None, paint: Paint | None) -> str:
    words = [f"{example.where}: {len(example.input_ids)} tokens, {example.label_tokens} learnt"]
    if cuts is not None and cuts.rounds:
        words.append(f"✂ {cuts.rounds} oldest rounds")
    if cuts is not None and cuts.answer:
        words.append(f"✂ {cuts.answer} tokens of the answer, end mark included")
    line = f"── {', '.join(words)} ──"
    return line if paint is None else paint(line, _HEAD)


def _cuts(tokenizer: Any, record: Record, limits: Limits) -> tuple[Cuts | None, Mapping[int, str]]:
    """What was cut of a dialogue, and at which ids of what is left."""
    if record.text or tokenizer.generation == 0:
        return None, {}
    shorter, _, cuts = fit(tokenizer, record, limits)
    if not cuts.characters:
        return cuts, {}
    last = max(number for number, message in enumerate(shorter.messages) if message.role == "user")
    question = shorter.messages[last]
    longer: list[Message] = list(shorter.messages)
    longer[last] = replace(question, content=question.content + _LONGER)
    ids, _ = conversation_ids(tokenizer, shorter.messages)
    others, _ = conversation_ids(tokenizer, longer)
    place = next((number for number, (one, other) in enumerate(zip(ids, others)) if one != other), len(ids))
    return cuts, {place: f"✂ {cuts.characters} characters "}


def _text(tokenizer: Any, example: Example, cuts: Mapping[int, str], paint: Paint | None) -> str:
    ids, learnt = _seen(example)
    names = control_names(tokenizer)
    shown = ""
    for is_learnt, group in groupby(_pieces(ids, learnt, names, cuts), key=lambda piece: piece[0]):
        text = ""
        for _, kind, tokens in group:
            if kind == _CUT:
                text += cuts[tokens[0]] if paint is None else paint(cuts[tokens[0]], _CUT)
            elif kind == _CONTROL:
                name = names[tokens[0]]
                text += name if paint is None else paint(name, f"{_CONTROL};4" if is_learnt else _CONTROL)
            else:
                part = tokenizer.decode_ids(tokens)
                text += paint(part, _LEARNT) if paint is not None and is_learnt else part
        shown += f"[[{text}]]" if is_learnt and paint is None else text
    return shown


def _seen(example: Example) -> tuple[list[int], list[bool]]:
    """Ids, and which of them are targets; labels that stand where they are predicted are moved to what they are."""
    ids, labels = example.input_ids.tolist(), example.labels.tolist()
    if example.position_ids is None:
        return ids, [number > 0 and label != IGNORED for number, label in enumerate(labels)]
    learnt = [False] + [label != IGNORED for label in labels]
    return ([*ids, labels[-1]], learnt) if learnt[-1] else (ids, learnt[:-1])


def _pieces(
    ids: Sequence[int], learnt: Sequence[bool], names: Mapping[int, str], cuts: Mapping[int, str]
) -> Iterator[tuple[bool, str, list[int]]]:
    """Stretches of one kind: whether learnt, what it is, and its ids (of a cut, its place)."""
    run: list[int] = []
    for number, (token, target) in enumerate(zip(ids, learnt)):
        ends = number in cuts or token in names or (number > 0 and target != learnt[number - 1])
        if ends and run:
            yield learnt[number - 1], "", run
            run = []
        if number in cuts:
            yield target, _CUT, [number]
        if token in names:
            yield target, _CONTROL, [token]
        else:
            run.append(token)
    if run:
        yield learnt[-1], "", run


def control_names(tokenizer: Any) -> dict[int, str]:
    """Names of the ids that only templates write.

    Args:
        tokenizer: A tokenizer of any family.
    """
    if tokenizer.generation == 0:
        return {one.index: one.token for one in tokenizer.control}
    names = {index: name for name, index in tokenizer.commands.items()}
    return names | {tokenizer.eos_token_id: tokenizer.eos_token}
