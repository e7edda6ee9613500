"""Many streams at once: the batch engine, the API, one request after the other, and transformers' continuous batching.

    python bench/serving.py --out FOLDER [--work FOLDER] [--models nano,wide] [--streams 1,4,16,64] [--repeats 3]
        [--quick]
    python bench/serving.py --out FOLDER --soak 10000
    python bench/serving.py --out FOLDER --soak-seconds 3600 [--in-flight 64] [--faulty 0.3] [--kill-seconds 60]

    engine        BatchEngine, all requests at once
    api           the same behind HTTP: /v1/chat/completions as a stream; client and server share the processors
    one by one    stream_reply, each request when the one before it is done, which is how the official demos serve
    transformers  continuous batching (generate_batch) of GlmForCausalLM, same weights by `glm convert --to native`; its
                  cache is sized for what is asked, for left alone it takes most of the memory there is

All variants take turns in one run, start at one moment with all requests, choose greedily, and give answers of the same
lengths. nano is glm-nano (float32, advertising copy, which ends by itself); wide is 4 blocks as wide as
ChatGLM3-6B's with random weights (bfloat16) and glm-nano's vocabulary, every answer of --tokens tokens.

Further parts: "prefix", 16 requests with one long system prompt, reused or not; "long prompt", which arrives while four
streams run, and the longest pause they see. The soaks look for what is lost, hangs or grows (serving_soak.py,
serving_faults.py). OUT/serving.jsonl has all records, OUT/serving.md the tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import glmkit
from glmkit.bench import machine
from glmkit.bench.measure import Timing, interleaved, paired_ratio
from glmkit.bench.report import Journal, markdown, number
from glmkit.chat.following import serve
from glmkit.engine.decode import WAITING
from glmkit.engine.sampling import SamplingOptions
from glmkit.engine.scheduler import BatchEngine
from serving_faults import soak_with_faults
from serving_server import Server
from serving_soak import soak, soak_over_http
from serving_variants import (
    MODELS,
    NAME,
    NEVER,
    Answer,
    Load,
    Variant,
    by_api,
    by_engine,
    by_transformers,
    by_turns,
)


def milliseconds(values: Sequence[float]) -> str:
    """Median and 99th percentile."""
    if not values:
        return "-"
    ordered = sorted(values)
    last = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return f"{number(1000 * statistics.median(ordered))} / {number(1000 * last)}"


@dataclass
class Measured:
    """Repetitions of one variant: their seconds, and what the answers of each were."""

    run: Variant
    places: Sequence[int]
    own_seconds: list[float] | None = None  # measured by the client
    answers: list[list[Answer]] = field(default_factory=list)

    def __call__(self) -> float | None:
        self.answers.append(self.run(self.places))
        return None if self.own_seconds is None else self.own_seconds[-1]

    def figures(self, timing: Timing) -> tuple[float, list[float], list[float]]:
        """Tokens per second, seconds to the first token, seconds between tokens; of clean repetitions if there are."""
        counted = self.answers[-len(timing.repetitions) :]
        kept = [answers for answers, one in zip(counted, timing.repetitions) if one.clean] or counted
        tokens = statistics.median(sum(answer.tokens for answer in answers) for answers in kept)
        firsts = [answer.arrivals[0] for answers in kept for answer in answers if answer.arrivals]
        gaps = [gap for answers in kept for answer in answers for gap in answer.gaps]
        return tokens / timing.seconds, firsts, gaps


def many_streams(name: str, load: Load, arguments: argparse.Namespace, journal: Journal) -> str:
    """The first table: all variants, by number of streams."""
    lines = [["streams", "variant", "tok/s", "to one by one", "first token p50 / p99 ms", "next p50 / p99 ms"]]
    served = serve(load.loaded, NAME, max_running=arguments.max_running, max_waiting=256)
    with Server(served) as server:
        their_seconds: list[float] = []
        theirs = by_transformers(load, their_seconds)
        for streams in arguments.streams:
            print(f"{name}: {streams} streams", file=sys.stderr)
            places, seconds = range(streams), list[float]()
            variants = {
                "engine": Measured(by_engine(load, served.engine, owners=True), places),
                "api": Measured(by_api(load, server.url, seconds), places, seconds),
                "one by one": Measured(by_turns(load), places),
                "transformers": Measured(theirs, places, their_seconds),
            }
            timings = interleaved(variants, arguments.repeats)
            for variant, measured in variants.items():
                timing = timings[variant]
                speed, firsts, gaps = measured.figures(timing)
                ratio, mark = paired_ratio(timing, timings["one by one"])
                journal.add({
                    "what": "streams", "model": name, "streams": streams, "variant": variant,
                    "tokens_per_second": speed,
                    "ratio": ratio, "clean": timing.clean, "seconds": [one.seconds for one in timing.repetitions],
                    "first_seconds": firsts, "gap_seconds": gaps,
                })  # fmt: skip
                lines.append([str(streams), variant + timing.mark, number(speed), f"{number(ratio)}{mark}",
                              milliseconds(firsts), milliseconds(gaps)])  # fmt: skip
    served.close()
    return f"{name}\n\n{markdown(lines)}\n"


def shared_prefix(name: str, load: Load, arguments: argparse.Namespace, journal: Journal) -> str:
    """Sixteen requests with one system prompt that nearly fills half of the context, read once or sixteen times."""
    system = "家人们，这款衣服真的很好看。" * (4 if arguments.quick else 30)
    conversations = [[{"role": "system", "content": system}, *one] for one in load.conversations[:16]]
    asked = Load(load.loaded, load.native, load.dtype, conversations, 8, load.endless)
    engine = BatchEngine(load.loaded.model, max_running=16)
    places = range(4 if arguments.quick else 16)
    variants = {
        "reused": Measured(by_engine(asked, engine), places),
        "read by each": Measured(by_engine(asked, engine, owners=True), places),
    }
    timings = interleaved(variants, arguments.repeats)
    ratio, mark = paired_ratio(timings["reused"], timings["read by each"])
    lines = [["system prompt", "seconds", "first token p50 / p99 ms"]]
    for variant, measured in variants.items():
        _, firsts, _ = measured.figures(timings[variant])
        lines.append([variant + timings[variant].mark, number(timings[variant].seconds), milliseconds(firsts)])
    tokens = len(asked.prompts[0]) - len(load.prompts[0])
    journal.add({"what": "prefix", "model": name, "tokens": tokens, "requests": len(places), "ratio": ratio,
                 "seconds": {variant: timing.seconds for variant, timing in timings.items()}})  # fmt: skip
    engine.close()
    head = (
        f"{name}: {len(places)} requests, one system prompt of {tokens} tokens; reused {number(ratio)}{mark} x as fast"
    )
    return f"{head}\n\n{markdown(lines)}\n"


def long_prompt(name: str, load: Load, arguments: argparse.Namespace, journal: Journal) -> str:
    """Four streams run, then a prompt as long as the context allows arrives: the longest pause that they see."""
    engine = BatchEngine(load.loaded.model, max_running=8)
    context = 128 if arguments.quick else load.loaded.config.seq_length - 40
    context = min(context, 2048)
    prompt = (load.prompts[0] * (context // len(load.prompts[0]) + 1))[:context]
    stops = dict.fromkeys(load.loaded.tokenizer.stop_ids, NEVER)
    options = SamplingOptions(temperature=0.0, logit_bias=stops)
    pauses: dict[str, list[float]] = {"before": [], "while it is read": []}
    alone: list[float] = []
    for round_ in range(arguments.repeats):
        started = time.perf_counter()
        next(engine.stream(prompt, options, stop_ids=(), max_new_tokens=1, owner=f"alone {round_}"))
        alone.append(time.perf_counter() - started)
        streams = [
            engine.stream(one, options, stop_ids=(), max_new_tokens=load.loaded.config.seq_length, owner="running")
            for one in load.prompts[:4]
        ]
        times = {place: [time.perf_counter()] for place in range(4) if next(streams[place])}
        long, arrived, done = None, 0.0, 0.0
        while not done:
            for place, stream in enumerate(streams):
                next(stream)
                times[place].append(time.perf_counter())
            if len(times[0]) == 12:
                arrived = time.perf_counter()
                long = engine.stream(prompt, options, stop_ids=(), max_new_tokens=1, owner=f"long {round_}")
                long.do_not_wait(lambda: None)
            if long is not None and next(long) is not WAITING:
                done = time.perf_counter()
        for stream in streams:
            stream.cancel()
        for arrivals in times.values():
            gaps = [(after, after - before) for before, after in pairwise(arrivals[1:])]
            pauses["before"] += [gap for after, gap in gaps if after <= arrived]
            pauses["while it is read"] += [gap for after, gap in gaps if after > arrived]
    engine.close()
    journal.add(
        {"what": "long prompt", "model": name, "tokens": context, "alone_seconds": alone, "gap_seconds": pauses}
    )
    lines = [["next token of four streams", "p50 / p99 ms", "longest ms"]]
    lines += [[when, milliseconds(gaps), number(1000 * max(gaps))] for when, gaps in pauses.items()]
    head = f"{name}: a prompt of {context} tokens, which alone takes {number(1000 * statistics.median(alone))} ms"
    return f"{head}\n\n{markdown(lines)}\n"


def soaked(arguments: argparse.Namespace, journal: Journal) -> str:
    """Thousands of requests with random cancels, half straight to the engine and half over HTTP."""
    served = serve(glmkit.load("glm-nano"), NAME, max_running=16, max_waiting=8)
    lines = [["", "requests", "answered", "cancelled", "refused", "lost", "MB per 1,000", "peak MB", "seconds"]]
    with Server(served) as server:
        found = {
            "engine": soak(served.engine, served.tokenizer, arguments.soak // 2),
            "http": soak_over_http(server.url, served.engine, NAME, arguments.soak - arguments.soak // 2),
        }
    served.close()
    for name, one in found.items():
        journal.add({"what": "soak", "way": name, **json.loads(str(one))})
        lines.append([name, *map(str, (one.requests, one.answered, one.cancelled, one.refused, one.lost)),
                      f"{one.slope_megabytes:.2f}", number(one.peak_megabytes), number(one.seconds)])  # fmt: skip
    return f"{markdown(lines)}\n"


def soaked_with_faults(arguments: argparse.Namespace, journal: Journal) -> tuple[str, list[str]]:
    """Clients of which some do it wrong, for a given time: the curve of what the server holds, and what went wrong."""
    folder: Path = arguments.out / "faults"
    found = soak_with_faults(
        folder,
        arguments.soak_seconds,
        in_flight=arguments.in_flight,
        faulty=arguments.faulty,
        kill_seconds=arguments.kill_seconds,
    )
    journal.add({"what": "soak with faults", "in_flight": arguments.in_flight, "faulty": arguments.faulty,
                 **asdict(found)})  # fmt: skip
    points = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    shown = points[:: max(1, len(points) // 12)]
    curve = [["minutes", "requests", "resident MB", "descriptors", "threads"]]
    for point in shown:
        curve.append([f"{point['seconds'] / 60:.1f}", str(point["requests"]), f"{point['resident_bytes'] / 1e6:.1f}",
                      str(point["descriptors"]), str(point["threads"])])  # fmt: skip
    ends = [["how requests ended", ""], *([name, str(count)] for name, count in sorted(found.ends.items()))]
    head = (
        f"{found.requests} requests in {number(found.seconds)} s, {arguments.in_flight} in flight, "
        f"{100 * arguments.faulty:g} % faulty, {found.kills} kills; {found.slope_megabytes:.3f} MB per 1,000 requests; "
        f"of the quiet server {found.descriptors:+d} descriptors, {found.threads:+d} threads; "
        f"{len(found.problems)} problems"
    )
    return "\n".join([head, "", markdown(curve), "", markdown(ends), ""]), found.problems


def main() -> None:
    arguments = _parser().parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.work = arguments.work or arguments.out
    journal = Journal(arguments.out / "serving.jsonl")
    journal.add({"what": "machine", "command": " ".join(sys.argv), **machine.description()})
    parts, problems = list[str](), list[str]()
    if arguments.soak:
        parts.append(soaked(arguments, journal))
    elif arguments.soak_seconds:
        text, problems = soaked_with_faults(arguments, journal)
        parts.append(text)
    else:
        for name in arguments.models.split(","):
            load = MODELS[name](arguments)
            for measure in (many_streams, shared_prefix, long_prompt):
                parts.append(measure(name, load, arguments, journal))
                print(parts[-1])
    path = arguments.out / ("soak.md" if arguments.soak or arguments.soak_seconds else "serving.md")
    path.write_text("\n".join(parts), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))
    if problems:
        sys.exit("\n".join(problems))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for serving.jsonl and serving.md")
    parser.add_argument("--work", type=Path, help="folder for checkpoints (3.5 GB with wide); default: OUT")
    parser.add_argument("--models", default="nano,wide")
    parser.add_argument("--streams", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 16, 64])
    parser.add_argument("--max-running", type=int, default=64, help="rows of the engine")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer of wide")
    parser.add_argument("--repeats", type=int, default=3, help="clean repetitions of each variant")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="only the soak, of N requests")
    parser.add_argument("--soak-seconds", type=float, default=0.0, metavar="S", help="only the soak with faults")
    parser.add_argument("--in-flight", type=int, default=64, help="clients of the soak with faults")
    parser.add_argument("--faulty", type=float, default=0.3, help="share of their requests that are faulty")
    parser.add_argument("--kill-seconds", type=float, help="kill and start their server so often")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    return parser


if __name__ == "__main__":
    main()
