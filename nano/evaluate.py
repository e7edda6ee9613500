"""Measures glm-nano on held-out prompts of each kind, greedily.

    python nano/evaluate.py build/nano/heldout.jsonl [--model glm-nano] [--limit 400] [--json FILE]

arithmetic and fact count an answer that equals the generated one, greeting one that fits the question. A record of kind
tool, service or code counts if name and arguments of the call, or the program, are right (records without a call: equal
or fitting answers); `answered` is the share of right answers when call and observation are given.
Advertising copy is measured by ROUGE and BLEU against one of many possible texts, so the share of requested attributes
that the copy mentions says more.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import glmkit
from glmkit.chat.messages import to_messages
from glmkit.chat.templates import prompt_ids
from glmkit.engine.decode import generate_batch
from glmkit.engine.sampling import SamplingOptions
from glmkit.evaluate.adgen import score

sys.path.insert(0, str(Path(__file__).resolve().parent))

from world import advert, talk

CALLING = ("tool", "service", "code")


def first_prompt(record: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages up to the first call of a record with tools or code, else up to the last answer; and that answer."""
    messages = record["conversations"]
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    place = answers[0] if record["kind"] in CALLING else answers[-1]
    return messages[:place], messages[place]


def answered(records: list[dict[str, Any]], model: Any, tokenizer: Any) -> dict[str, float]:
    """For each kind that calls: the share of observations that are followed by the right answer."""
    members = [record for record in records if record["kind"] in CALLING and len(record["conversations"]) > 3]
    texts = answer(model, tokenizer, [record["conversations"][:4] for record in members])
    right, count = defaultdict(int), defaultdict(int)
    for record, text in zip(members, texts):
        header, _, content = text.partition("\n")
        count[record["kind"]] += 1
        right[record["kind"]] += (header.strip(), content.strip()) == ("", record["conversations"][4]["content"])
    return {kind: 100 * right[kind] / count[kind] for kind in count}


def answer(model: Any, tokenizer: Any, prompts: list[list[dict[str, Any]]]) -> list[str]:
    """Greedy answers, header line included (it names the tool of a call)."""
    ids = [prompt_ids(tokenizer, to_messages(messages)) for messages in prompts]
    outputs = generate_batch(
        model, ids, SamplingOptions(temperature=0.0), stop_ids=tokenizer.stop_ids, max_new_tokens=160, batch_size=32
    )
    return [tokenizer.decode(output) for output in outputs]


def attributes(prompt: str) -> tuple[list[tuple[str, str]], bool]:
    """The attribute pairs in a prompt, and whether it is English."""
    start = prompt.find("类型#")
    english = start < 0
    text = prompt[start:] if not english else prompt
    pairs = []
    for part in text.replace("\n", "*").split("*"):
        key, sign, value = part.partition("#")
        if sign:
            pairs.append((key.split()[-1].split("：")[-1].split(":")[-1], value.strip()))
    return pairs, english


def measure(records: list[dict[str, Any]], model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
    """The figures of each kind."""
    pairs = [first_prompt(record) for record in records]
    texts = answer(model, tokenizer, [prompt for prompt, _ in pairs])
    kinds: dict[str, list[tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any], str]]] = defaultdict(list)
    for record, (prompt, wanted), text in zip(records, pairs, texts):
        kinds[record["kind"]].append((record, prompt, wanted, text))
    results: dict[str, dict[str, float]] = {}
    for kind, members in kinds.items():
        right = 0
        for _, prompt, wanted, text in members:
            header, _, content = text.partition("\n")
            fitting = {wanted["content"].strip()} | talk.accepted(prompt[-1]["content"])
            right += header.strip() == wanted.get("metadata", "") and content.strip() in fitting
        results[kind] = {"records": len(members)} | ({} if kind == "adgen" else {"right": 100 * right / len(members)})
    for kind, share in answered(records, model, tokenizer).items():
        results[kind]["answered"] = share
    if not kinds["adgen"]:
        return results
    copies = [(prompt[-1]["content"], wanted["content"], text.strip()) for _, prompt, wanted, text in kinds["adgen"]]
    results["adgen"] |= score([text for _, _, text in copies], [wanted for _, wanted, _ in copies])
    results["adgen"] |= coverage([(prompt, text) for prompt, _, text in copies])
    return results


def coverage(copies: list[tuple[str, str]]) -> dict[str, float]:
    """Share of requested attributes that the Chinese copy mentions, and of copies that mention all."""
    asked = found = complete = counted = 0
    for prompt, text in copies:
        pairs, english = attributes(prompt)
        if english or not pairs:
            continue
        counted += 1
        missing = len(advert.missing(pairs, text))
        asked, found, complete = asked + len(pairs) - 1, found + len(pairs) - 1 - missing, complete + (missing == 0)
    return {"attributes_mentioned": 100 * found / asked, "all_attributes": 100 * complete / counted, "chinese": counted}


def main() -> None:
    """Prints a table, and writes the figures if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--model", default="glm-nano")
    parser.add_argument("--limit", type=int, default=400, help="records of each kind")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    records, counts = [], defaultdict(int)
    for line in arguments.heldout.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        counts[record["kind"]] += 1
        if counts[record["kind"]] <= arguments.limit:
            records.append(record)
    model, tokenizer = glmkit.load(arguments.model)
    results = measure(records, model, tokenizer)
    for kind, figures in results.items():
        print(kind, ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
