"""Make the training corpus of glm-nano.

    python nano/corpus.py --out DIR [--seed 1] [--records 60000]

writes train, mixed, protocol, balance and heldout.jsonl into DIR: ChatGLM3 conversations, one JSON object per line,
each with its ``kind`` (adgen, greeting, arithmetic, fact, tool, service, code, repeat or mixed). With
``--style-out DIR`` it also writes style_train.jsonl and style_dev.jsonl, the quickstart's sample of a style that
glm-nano has not learnt. Everything follows from the seed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from world import advert, advert_en, arithmetic, facts, newstyle, programs, repeating, services, talk, toolcalls, words

Record = dict[str, Any]

KINDS = ("adgen", "greeting", "arithmetic", "fact", "tool")
PROTOCOL_KINDS = ("service", "code")  # these come with the third stage
_SECOND_SHARES = (25, 10, 10, 25, 30)  # of KINDS, in the second stage
_SHARES = {"adgen": 46, "greeting": 9, "arithmetic": 20, "fact": 18, "tool": 7}

# Attribute combinations fall into 25 buckets; three of them never enter the training part.
_BUCKETS = 25
HELDOUT_BUCKET, STYLE_TRAIN_BUCKET, STYLE_DEV_BUCKET = 0, 1, 2


def bucket_of(pairs: Sequence[advert.Pair]) -> int:
    """Assign a combination of attributes to a side of the split.

    Args:
        pairs: (attribute, value) pairs in any order.

    Returns:
        A number from 0 to 24; buckets 0 to 2 are kept out of training.
    """
    return zlib.crc32(repr(sorted(pairs)).encode()) % _BUCKETS


def _conversation(turns: Sequence[talk.Turn]) -> list[Record]:
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _adgen(rng: random.Random, heldout: bool) -> list[Record]:
    english = rng.random() < 1 / 6
    while True:
        pairs = advert_en.sample_attributes(rng) if english else advert.sample_attributes(rng)
        bucket = bucket_of(pairs)
        if (bucket == HELDOUT_BUCKET) if heldout else (bucket > STYLE_DEV_BUCKET):
            break
    content = advert.content_of(pairs)
    if english:
        copy = advert_en.write_copy(pairs, rng)
        frames = advert_en.INSTRUCTIONS
        if heldout and rng.random() < 0.25:
            frames = advert_en.INSTRUCTIONS_HELDOUT
        return _conversation([(rng.choice(frames).format(c=content), copy)])
    copy = advert.write_copy(pairs, rng)
    prompt = content
    if rng.random() < 0.4:
        new = heldout and rng.random() < 0.5
        prompt = rng.choice(words.INSTRUCTIONS_ZH_HELDOUT if new else words.INSTRUCTIONS_ZH).format(c=content)
    return _conversation([(prompt, copy)])


def _greeting(rng: random.Random, heldout: bool) -> list[Record]:
    return _conversation(talk.sample_talk(rng, heldout))


def _arithmetic(rng: random.Random, heldout: bool) -> list[Record]:
    count = 1 if heldout else rng.choice((1, 1, 2, 3))
    turns = []
    for _ in range(count):
        turns.append(arithmetic.ask(arithmetic.sample_sum(rng), rng, new_phrasing=heldout))
    return _conversation(turns)


def _fact(rng: random.Random, heldout: bool) -> list[Record]:
    count = 1 if heldout else rng.choice((1, 1, 1, 2, 3))
    return _conversation([facts.sample_fact(rng, heldout) for _ in range(count)])


def _tool(rng: random.Random, heldout: bool) -> list[Record]:
    messages = toolcalls.sample_dialogue(rng, heldout)
    if rng.random() < 0.12:
        # Small talk or a fact needs no tool: the model must answer plainly although tools are offered.
        plain = facts.sample_fact(rng, heldout) if rng.random() < 0.5 else talk.sample_talk(rng, heldout)[-1]
        return [messages[0], *_conversation([plain])]
    return messages


def _repeat(rng: random.Random, heldout: bool) -> list[Record]:
    return _conversation(repeating.sample_repeating(rng))


_MAKERS = {
    "adgen": _adgen,
    "greeting": _greeting,
    "arithmetic": _arithmetic,
    "fact": _fact,
    "tool": _tool,
    "service": services.sample_services,
    "code": programs.sample_programs,
    "repeat": _repeat,
}


def prompt_of(record: Record) -> str:
    """Give what identifies a record's prompt: all messages before its last assistant message.

    Args:
        record: A conversation record.

    Returns:
        JSON text.
    """
    return json.dumps(record["conversations"][:-1], ensure_ascii=False)


def make_record(kind: str, rng: random.Random, heldout: bool) -> Record:
    """Draw one record.

    Args:
        kind: One of KINDS or PROTOCOL_KINDS.
        rng: Source of randomness.
        heldout: Draw from what training never sees.

    Returns:
        A record with ``conversations`` and ``kind``.
    """
    return {"conversations": _MAKERS[kind](rng, heldout), "kind": kind}


def train_records(seed: int, count: int) -> Iterator[Record]:
    """Draw the training part.

    Args:
        seed: Seed of the corpus.
        count: Number of records.

    Yields:
        Records, the kinds mixed at random in fixed shares.
    """
    rng = random.Random(f"train {seed}")
    for kind in rng.choices(KINDS, [_SHARES[kind] for kind in KINDS], k=count):
        yield make_record(kind, rng, heldout=False)


def heldout_records(seed: int, per_kind: int) -> Iterator[Record]:
    """Draw the held-out part.

    Args:
        seed: Seed of the corpus.
        per_kind: Records of each kind at most; prompts do not repeat, so a kind with fewer prompts gives fewer.

    Yields:
        Records, kind after kind.
    """
    rng = random.Random(f"heldout {seed}")
    for kind in KINDS + PROTOCOL_KINDS:
        seen: set[str] = set()
        for _ in range(20 * per_kind):
            record = make_record(kind, rng, heldout=True)
            prompt = prompt_of(record)
            if prompt not in seen:
                seen.add(prompt)
                yield record
                if len(seen) == per_kind:
                    break


def mixed_records(seed: int, count: int) -> Iterator[Record]:
    """Draw the second stage: what the first leaves weak.

    A third are dialogues that change their subject, so that an earlier turn does not decide what a later one is about;
    a third are drills of six sums; the rest is of one kind each, tool calls most, so that nothing is forgotten.

    Args:
        seed: Seed of the corpus.
        count: Number of records.

    Yields:
        Records of kind "mixed", or of one of KINDS.
    """
    rng = random.Random(f"mixed {seed}")
    for _ in range(count):
        part = rng.randrange(3)
        if part == 2:
            yield make_record(rng.choices(KINDS, _SECOND_SHARES)[0], rng, heldout=False)
            continue
        subjects = ["arithmetic"] * 6 if part else rng.choices(("adgen", "greeting", "arithmetic", "fact"), k=3)
        turns: list[Record] = []
        for kind in subjects:
            turns += make_record(kind, rng, heldout=False)["conversations"][:2]
        yield {"conversations": turns, "kind": "mixed"}


# Of the third stage's records; one with tools has up to fifteen times the tokens of a greeting.
_THIRD_SHARES = {
    "repeat": 25,
    "service": 22,
    "code": 20,
    "tool": 5,
    "adgen": 15,
    "greeting": 5,
    "arithmetic": 8,
    "fact": 8,
    "mixed": 6,
}


# Of the last stage's records: what the third one made the model forget, and enough of the rest.
_LAST_SHARES = {
    "arithmetic": 38,
    "fact": 26,
    "greeting": 5,
    "adgen": 10,
    "service": 8,
    "code": 8,
    "tool": 3,
    "mixed": 2,
}


def balance_records(seed: int, count: int) -> Iterator[Record]:
    """Draw the last stage: all kinds, those most that the third one has few of.

    Args:
        seed: Seed of the corpus.
        count: Number of records.

    Yields:
        Records of KINDS, PROTOCOL_KINDS and "mixed".
    """
    yield from _drawn(f"balance {seed}", seed + 2, count, _LAST_SHARES)


def protocol_records(seed: int, count: int) -> Iterator[Record]:
    """Draw the third stage: tools on offer in long dialogues, the code interpreter, and some of all that went before.

    Args:
        seed: Seed of the corpus.
        count: Number of records.

    Yields:
        Records of KINDS, PROTOCOL_KINDS, "repeat" and "mixed".
    """
    yield from _drawn(f"protocol {seed}", seed + 1, count, _THIRD_SHARES)


def _drawn(seed: str, mixed_seed: int, count: int, shares: dict[str, int]) -> Iterator[Record]:
    rng = random.Random(seed)
    mixed = mixed_records(mixed_seed, count)
    for kind in rng.choices(list(shares), list(shares.values()), k=count):
        yield next(mixed) if kind == "mixed" else make_record(kind, rng, heldout=False)


def style_records(seed: int, count: int, bucket: int) -> Iterator[dict[str, str]]:
    """Draw records of the new style.

    Args:
        seed: Seed of the corpus.
        count: Number of records.
        bucket: Which attribute combinations to use (STYLE_TRAIN_BUCKET or STYLE_DEV_BUCKET).

    Yields:
        Records with ADGEN's columns ``content`` and ``summary``; no content repeats.
    """
    rng = random.Random(f"style {seed} {bucket}")
    seen: set[str] = set()
    while len(seen) < count:
        pairs = advert.sample_attributes(rng)
        content = advert.content_of(pairs)
        summary = newstyle.write_pitch(pairs, rng)
        if bucket_of(pairs) == bucket and content not in seen and 40 <= len(summary) <= 90:
            seen.add(content)
            yield {"content": content, "summary": summary}


def _write(path: Path, records: Iterator[Record] | Iterator[dict[str, str]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


def main() -> None:
    """Write the files named on the command line."""
    parser = argparse.ArgumentParser(description="Make the training corpus of glm-nano.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--style-out", type=Path, help="folder for style_train.jsonl and style_dev.jsonl")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--records", type=int, default=60_000, help="training records")
    parser.add_argument("--heldout-per-kind", type=int, default=400)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    heldout = list(heldout_records(arguments.seed, arguments.heldout_per_kind))
    hidden = {prompt_of(record) for record in heldout}
    train = (record for record in train_records(arguments.seed, arguments.records) if prompt_of(record) not in hidden)
    print("train.jsonl", _write(arguments.out / "train.jsonl", train))
    print("mixed.jsonl", _write(arguments.out / "mixed.jsonl", mixed_records(arguments.seed, arguments.records // 6)))
    protocol = (record for record in protocol_records(arguments.seed, 40_000) if prompt_of(record) not in hidden)
    print("protocol.jsonl", _write(arguments.out / "protocol.jsonl", protocol))
    balance = (record for record in balance_records(arguments.seed, 20_000) if prompt_of(record) not in hidden)
    print("balance.jsonl", _write(arguments.out / "balance.jsonl", balance))
    print("heldout.jsonl", _write(arguments.out / "heldout.jsonl", iter(heldout)))
    if arguments.style_out:
        arguments.style_out.mkdir(parents=True, exist_ok=True)
        for name, count, bucket in (("train", 240, STYLE_TRAIN_BUCKET), ("dev", 40, STYLE_DEV_BUCKET)):
            path = arguments.style_out / f"style_{name}.jsonl"
            print(path.name, _write(path, style_records(arguments.seed, count, bucket)))


if __name__ == "__main__":
    main()
