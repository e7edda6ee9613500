"""Evaluation of many short questions: answered together, and one at a time, by us and by transformers.

    python bench/evaluation.py --out FOLDER [--work FOLDER] [--data dev.json] [--models nano,wide] [--records 1070]
        [--alone 60] [--batch 64] [--tokens N] [--repeats 3] [--quick]

    batched       generate_batch over all records, --batch rows at once
    one at a time stream over every n-th record, --alone of them in all: reading the prompt and all tokens, no text
    transformers  GlmForCausalLM.generate over the same records as "one at a time", the same weights by
                  `glm convert --to native`

--data is ADGEN's dev.json (1,070 records); without it the advertising copy that glm-nano learnt from, as often as it
takes. All variants take turns and choose greedily. What is compared is seconds per record; answers of nano end by
themselves (at most --tokens, 256), those of wide (4 blocks as wide as ChatGLM3-6B's, random weights, bfloat16) have
--tokens tokens each (128). OUT/evaluation.jsonl has all records, OUT/evaluation.md the table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path

import torch

from glmkit.bench import machine
from glmkit.bench.measure import PeakMemory, Timing, interleaved, paired_ratio
from glmkit.bench.report import Journal, markdown, number
from glmkit.data.records import read_records
from glmkit.engine.decode import generate_batch, stream
from glmkit.location import builtin
from serving_variants import MODELS, NEVER, Load

TOKENS = {"nano": 256, "wide": 128}


@dataclass
class Asked:
    """Some records, answered in one way; called again and again.

    Args:
        answer: Prompts to answers.
        prompts: Ids of each record.
    """

    answer: Callable[[Sequence[Sequence[int]]], list[list[int]]]
    prompts: Sequence[Sequence[int]]
    tokens: int = 0
    answers: list[list[int]] = field(default_factory=list)

    def __call__(self) -> float:
        started = time.perf_counter()
        self.answers = self.answer(self.prompts)
        seconds = time.perf_counter() - started
        self.tokens = sum(map(len, self.answers))
        return seconds / len(self.prompts)


def batched(load: Load, rows: int) -> Callable[[Sequence[Sequence[int]]], list[list[int]]]:
    """All together."""
    stops = () if load.endless else load.loaded.tokenizer.stop_ids
    return lambda prompts: generate_batch(
        load.loaded.model, prompts, load.options, stop_ids=stops, max_new_tokens=load.tokens, batch_size=rows
    )


def one_at_a_time(load: Load) -> Callable[[Sequence[Sequence[int]]], list[list[int]]]:
    """Our own stream, prompt after prompt."""
    stops = () if load.endless else load.loaded.tokenizer.stop_ids

    def answer(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        found = []
        for prompt in prompts:
            steps = stream(load.loaded.model, prompt, load.options, stop_ids=stops, max_new_tokens=load.tokens)
            found.append([step.token_id for step in steps if step.is_text])
        return found

    return answer


def by_transformers(load: Load) -> Callable[[Sequence[Sequence[int]]], list[list[int]]]:
    """`generate` of transformers' own class, prompt after prompt."""
    from transformers import GenerationConfig, GlmForCausalLM

    model = GlmForCausalLM.from_pretrained(load.native, dtype=load.dtype).eval()
    stops = [] if load.endless else sorted(load.loaded.tokenizer.stop_ids)
    bias = {(token,): NEVER for token in load.loaded.tokenizer.stop_ids} if load.endless else None
    generation = GenerationConfig(
        max_new_tokens=load.tokens, do_sample=False, eos_token_id=stops or None, pad_token_id=0, sequence_bias=bias
    )

    def answer(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        found = []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=generation)
            found.append([token for token in out[0, len(prompt) :].tolist() if token not in stops])
        return found

    return answer


def records(arguments: argparse.Namespace) -> list[str]:
    """The questions."""
    files = (
        [arguments.data] if arguments.data else [builtin("data") / f"style_{part}.jsonl" for part in ("dev", "train")]
    )
    texts = [record.messages[0].content for file in files for record in read_records(file)]
    return list(islice(cycle(texts), arguments.records))


def measure(name: str, arguments: argparse.Namespace, journal: Journal) -> str:
    """One model: a line for each variant."""
    base = MODELS[name](arguments)
    tokens = arguments.tokens or (8 if arguments.quick else TOKENS[name])
    questions = [[{"role": "user", "content": text}] for text in records(arguments)]
    load = replace(base, conversations=questions, tokens=tokens)
    some = load.prompts[:: max(1, len(load.prompts) // arguments.alone)][: arguments.alone]
    variants = {
        "batched": Asked(batched(load, arguments.batch), load.prompts),
        "one at a time": Asked(one_at_a_time(load), some),
        "transformers": Asked(by_transformers(load), some),
    }
    print(f"{name}: {len(load.prompts)} records, {len(some)} of them one at a time", file=sys.stderr)
    timings: dict[str, Timing] = interleaved(variants, arguments.repeats, warm=not arguments.quick)
    with PeakMemory() as memory:
        variants["batched"]()
    lines = [["", "records", "tokens of an answer", "seconds for 1,070", "tok/s", "batched is faster by"]]
    for variant, asked in variants.items():
        timing = timings[variant]
        ratio, mark = paired_ratio(timings["batched"], timing)
        answer_tokens = asked.tokens / len(asked.prompts)
        journal.add({
            "what": "evaluation", "model": name, "variant": variant, "records": len(asked.prompts),
            "batch": arguments.batch, "prompt_tokens": sum(map(len, asked.prompts)) / len(asked.prompts),
            "answer_tokens": answer_tokens, "seconds_per_record": [one.seconds for one in timing.repetitions],
            "clean": timing.clean, "ratio": ratio, "peak_bytes": memory.bytes,
        })  # fmt: skip
        lines.append([variant + timing.mark, str(len(asked.prompts)), number(answer_tokens),
                      number(1070 * timing.seconds), number(answer_tokens / timing.seconds),
                      "" if variant == "batched" else f"{number(ratio)}{mark} x"])  # fmt: skip
    places = [load.prompts.index(prompt) for prompt in some]
    together = [variants["batched"].answers[place] for place in places]
    equal = sum(a == b for a, b in zip(together, variants["one at a time"].answers))
    theirs = sum(a == b for a, b in zip(together, variants["transformers"].answers))
    text = (
        f"{name}, {arguments.batch} rows at once: of {len(some)} answers {equal} are those given one at a time,"
        f" {theirs} those of transformers; {memory.bytes / 2**20:.0f} MiB above the weights\n\n{markdown(lines)}\n"
    )
    print(text)
    return text


def main() -> None:
    arguments = _parser().parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.work = arguments.work or arguments.out
    if arguments.quick:
        arguments.records, arguments.alone, arguments.repeats = min(arguments.records, 24), 3, 1
    journal = Journal(arguments.out / "evaluation.jsonl")
    journal.add({"what": "machine", "command": " ".join(sys.argv), **machine.description()})
    parts = [measure(name, arguments, journal) for name in arguments.models.split(",")]
    (arguments.out / "evaluation.md").write_text("\n".join(parts), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for evaluation.jsonl and evaluation.md")
    parser.add_argument("--work", type=Path, help="folder for checkpoints (3.5 GB with wide); default: OUT")
    parser.add_argument("--data", type=Path, help="ADGEN's dev.json")
    parser.add_argument("--models", default="nano,wide")
    parser.add_argument("--records", type=int, default=1070)
    parser.add_argument("--alone", type=int, default=60, help="records that are answered one at a time")
    parser.add_argument("--batch", type=int, default=64, help="rows at once")
    parser.add_argument("--tokens", type=int, help="longest answer; of wide: every answer")
    parser.add_argument("--repeats", type=int, default=3, help="clean repetitions of each variant")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    return parser


if __name__ == "__main__":
    main()
