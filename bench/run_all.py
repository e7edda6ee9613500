"""Everything behind the table "Speed" of docs/results.md, one command, for a machine that does nothing else meanwhile.

    python bench/run_all.py --out FOLDER [--llama-bench PATH] [--work FOLDER] [--only official,peers] [--quick]

Each part is a process of its own with its records in OUT/PART.jsonl and its output in OUT/PART.log; a part that fails
is named, and the others go on. At the end OUT/summary.md has the table. About 30 minutes on two cores; --quick, on
slices, some minutes, and its figures say nothing. --work keeps llama.cpp's files (10 GB) and a checkpoint of random
weights (12.5 GB). With --only the parts that were run before count in the summary too.

    official     int4 and the official way in bf16: decode, prefill 512
    peers        int4 and int8 against llama.cpp Q4_0 and Q8_0 (needs --llama-bench)
    stock        batch 1, 4 and 16 and prefill against torch's own int8 and int4
    context      512, 4,096 and 8,192 tokens
    dialogue     memory of one dialogue of 8K tokens in int4
    loading      a checkpoint of 12.5 GB, quantised to int4 while it is read
    host         glm-nano against transformers' generate on the same model
    generations  ChatGLM-6B against ChatGLM2-6B, the official way and ours
    perplexity   int4 against rounding to nearest on glm-nano, three seeds
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GLM = [sys.executable, "-m", "glmkit"]
MODEL = "chatglm2-6b"
Records = dict[str, list[dict[str, Any]]]


def main() -> None:
    arguments = _parser().parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    commands = parts(arguments)
    chosen = arguments.only.split(",") if arguments.only else list(commands)
    unknown = [name for name in chosen if name not in commands]
    if unknown:
        raise SystemExit(f"--only {','.join(unknown)}: expected some of {', '.join(commands)}")
    failed = [name for name in chosen if not run(name, commands[name], arguments)]
    summary = table(read(arguments.out))
    (arguments.out / "summary.md").write_text(summary, encoding="utf-8")
    print(summary)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see {arguments.out}/PART.log")


def parts(arguments: argparse.Namespace) -> dict[str, list[list[str]]]:
    """Name of each part -> the commands that it runs, one after the other."""
    quick = arguments.quick
    work = arguments.work
    layers = ["--layers", "2"] if quick else []
    head8 = ["--output-layer", "int8"]
    rounds = "1" if quick else "3"
    context, prompt = ("64", "64") if quick else ("512", "512")
    steps = ["--tokens", "2" if quick else "16", "--repeats", rounds]
    int4 = [*GLM, "bench", MODEL, *layers, "--scheme", "int4"]
    slice4 = ["--layers", "1" if quick else "4"]
    checkpoint = str(work / ("checkpoint-1" if quick else "checkpoint"))
    make = [sys.executable, str(HERE / "checkpoint_of_random_weights.py"), checkpoint, "--family", MODEL]
    found: dict[str, list[list[str]]] = {
        "official": [[*int4, *head8, *steps, "--context", context, "--prompt", prompt, "--baseline", "bf16"]],
        "stock": [
            _stock("--layers", "1" if quick else "28", "--variants", "dynamic-int8,glmkit-int4", "--rows", "1,16",
                   "--prompt", prompt, "--context", context, "--tokens", "2" if quick else "8", "--repeats", rounds),
            _stock(*slice4, "--prompt", prompt, "--context", context, "--tokens", "2" if quick else "8",
                   "--repeats", rounds),
        ],
        "context": [
            [*int4, *head8, *steps, "--context", "64,128" if quick else "512,4096,8192", "--prompt", ""],
        ],
        "dialogue": [
            [*int4, *head8, "--context", "128" if quick else "8176", "--prompt", "128" if quick else "8176",
             "--tokens", "8", "--repeats", "1"],
        ],
        "loading": [
            *([] if Path(checkpoint).exists() else [[*make, "--layers", "1"] if quick else make]),
            [sys.executable, str(HERE / "loading.py"), checkpoint, "--quantize", "int4"],
            [sys.executable, str(HERE / "loading.py"), checkpoint, "--quantize", "int8"],
        ],
        "host": [
            [*GLM, "bench", "glm-nano", "--scheme", scheme, "--context", "64", "--prompt", "", "--baseline", "generate",
             "--tokens", "16" if quick else "400", "--repeats", "1" if quick else "5"]
            for scheme in ("float32", "int4")
        ],
        "generations": [
            [*GLM, "bench", "chatglm-6b", MODEL, *slice4, "--scheme", "bf16", "--baseline", "bf16", "--tokens",
             "2" if quick else "8", "--repeats", rounds, "--context", "64" if quick else "512,2000",
             "--prompt", prompt],
        ],
        "perplexity": [
            [sys.executable, str(HERE / "quantisation.py"), "--seeds", "1" if quick else "3",
             *(["--records", "4", "--tokens", "1024"] if quick else []),
             "--json", str(arguments.out / "perplexity.json")],
        ],
    }  # fmt: skip
    if arguments.llama_bench:
        found["peers"] = [
            [sys.executable, str(HERE / "peers.py"), "--llama-bench", arguments.llama_bench, "--folder", str(work),
             *layers, "--rounds", rounds, "--context", context, "--prompt", prompt, "--tokens", "4" if quick else "32"]
        ]  # fmt: skip
    return found


def _stock(*flags: str) -> list[str]:
    return [sys.executable, str(HERE / "stock_torch.py"), "--model", MODEL, *flags]


def run(name: str, commands: list[list[str]], arguments: argparse.Namespace) -> bool:
    """Runs a part; returns whether all its commands succeeded."""
    records = arguments.out / f"{name}.jsonl"
    records.unlink(missing_ok=True)
    started = time.monotonic()
    with (arguments.out / f"{name}.log").open("w", encoding="utf-8") as log:
        for command in commands:
            if "checkpoint_of_random" not in command[1] and "--json" not in command:
                command = [*command, "--json", str(records)]
            print(f"{name}: {' '.join(command)}", file=sys.stderr, flush=True)
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            if not _finished(command, log, arguments.timeout):
                print(f"{name}: FAILED after {time.monotonic() - started:.0f} s", file=sys.stderr)
                return False
    print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return True


def _finished(command: list[str], log: Any, timeout: float) -> bool:
    """Runs one command; one that hangs is ended with all that it started."""
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(timeout) == 0
    except subprocess.TimeoutExpired:
        log.write(f"\nended after {timeout:.0f} s\n")
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# --- the table ---


def read(out: Path) -> Records:
    """Part -> its records."""
    found = {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(out.glob("*.jsonl"))
    }
    perplexity = out / "perplexity.json"
    if perplexity.exists():
        found["perplexity"] = [{"what": "perplexity"} | json.loads(perplexity.read_text(encoding="utf-8"))]
    return found


def table(records: Records) -> str:
    """The table of docs/results.md, with "-" where a part is missing."""
    machines = [row for rows in records.values() for row in rows if row.get("what") == "machine"]
    lines = ["| metric | measured against | found | must | aim |", "|---|---|---|---|---|"]
    for metric, against, look, must, aim in ROWS:
        try:
            found = look(records)
        except (KeyError, IndexError, StopIteration, ZeroDivisionError, statistics.StatisticsError):
            found = "-"
        lines.append(f"| {metric} | {against} | {found} | {must} | {aim} |")
    return "\n".join([*_machine(machines), "", *lines, ""])


def _machine(machines: list[dict[str, Any]]) -> list[str]:
    if not machines:
        return []
    one = machines[0]
    reads = [row["limits"]["read_bytes"] / 1e9 for row in machines]
    int8 = [row["limits"]["int8_ops"] / 1e12 for row in machines]
    bfloat16 = [row["limits"]["bfloat16_ops"] / 1e12 for row in machines]
    return [
        f"{one['cpu']}, {one['cores']} cores, {one['threads']} threads, {one['memory_bytes'] / 1e9:.0f} GB; kernels "
        f"{one['kernels']}; {one['system']}, Python {one['python']}, torch {one['torch']}, transformers "
        f"{one['transformers']}, {one['compiler']}. Over the parts the machine read {_span(reads)} GB/s and multiplied "
        f"{_span(bfloat16)} TOP/s in bfloat16, {_span(int8)} in int8."
    ]


def _span(numbers: list[float]) -> str:
    return f"{min(numbers):.2f} to {max(numbers):.2f}"


def _row(records: Records, part: str, **wanted: Any) -> dict[str, Any]:
    return next(row for row in records[part] if all(row.get(key) == value for key, value in wanted.items()))


def _peer(kind: str, what: str) -> Callable[[Records], str]:
    def look(records: Records) -> str:
        row = _row(records, "peers", what=what, peer=f"llama.cpp {kind}")
        share = f"; {100 * row['read_share']:.0f} % of read" if "read_share" in row else ""
        mine, theirs = row["tokens_per_second"], row["peer_tokens_per_second"]
        return f"{row['ratio_mark']}{row['ratio']:.2f} x ({mine:.2f} against {theirs:.2f} tok/s{share})"

    return look


def _official(what: str) -> Callable[[Records], str]:
    def look(records: Records) -> str:
        row = next(one for one in records["official"] if one["what"] == what and one["ratio"] is not None)
        share = row["read_share"] or row["matrix_share"]
        of = "read" if row["read_share"] else "peak"
        speed = f"{row['tokens_per_second']:.2f} tok/s, {100 * share:.0f} % of {of}"
        return f"{row['ratio_mark']}{row['ratio']:.2f} x ({speed})"

    return look


def _batch16(records: Records) -> str:
    row = _row(records, "stock", what="decode, batch 16", subject="dynamic-int8")
    mine = _row(records, "stock", what="decode, batch 16", subject="glmkit-int4")
    return (
        f"{row['mark']}{row['ratio_of_last']:.2f} x "
        f"({mine['tokens_per_second']:.1f} against {row['tokens_per_second']:.1f} tok/s, {row['layers']} blocks)"
    )


def _context(records: Records) -> str:
    rows = sorted((row for row in records["context"] if row["what"] == "decode"), key=lambda row: row["context"])
    near = rows[0]
    losses = [f"{100 * (1 - _paired(near, row)):.1f} % at {row['context']:,}" for row in rows[1:]]
    return f"{', '.join(losses)} ({near['mark']}{near['tokens_per_second']:.2f} tok/s at {near['context']})"


def _paired(near: dict[str, Any], far: dict[str, Any]) -> float:
    """Speed behind the longer context as a share of the other, round by round."""
    pairs = list(zip(near["repetitions"], far["repetitions"]))
    clean = [a["seconds"] / b["seconds"] for a, b in pairs if a["others"] < 0.04 and b["others"] < 0.04]
    return statistics.median(clean) if clean else near["seconds"] / far["seconds"]


def _dialogue(records: Records) -> str:
    row = _row(records, "dialogue", what="memory")
    return f"{row['anonymous_bytes'] / 1e9:.2f} GB anonymous, {row['resident_bytes'] / 1e9:.2f} GB with mapped files"


def _loading(records: Records) -> str:
    row = _row(records, "loading", what="load", quantize="int4")
    return f"{row['peak'] / 1e9:.2f} GB, {row['peak'] / row['model']:.2f} x the model; {row['seconds']:.0f} s"


def _host(records: Records) -> str:
    rows = [row for row in records["host"] if row["what"] == "decode" and row["ratio"] is not None]
    return "; ".join(
        f"{row['ratio_mark']}{row['ratio']:.1f} x ({row['subject']}, {row['tokens_per_second']:.0f} tok/s)"
        for row in rows
    )


def _generations(records: Records) -> str:
    rows = [row for row in records["generations"] if row["what"] == "decode"]
    found = []
    for context in sorted({row["context"] for row in rows}):
        for kind in (" bf16, official way", " bf16"):
            first, second = (
                next(row for row in rows if row["subject"] == f"{name}{kind}" and row["context"] == context)
                for name in ("chatglm-6b", MODEL)
            )
            speeds = [row["whole_tokens_per_second"] or row["tokens_per_second"] for row in (first, second)]
            gain = 100 * (speeds[1] / speeds[0] - 1)
            found.append(f"{gain:+.0f} % at {context} ({'official way' if 'official' in kind else 'ours'})")
    return "; ".join(found)


def _perplexity(records: Records) -> str:
    found = records["perplexity"][0]["perplexity"]["all"]

    def shown(name: str) -> str:
        value, low, high = (100 * number for number in found[name]["increase"])
        return f"{value:+.2f} % [{low:.2f}, {high:.2f}]"

    nearest, search, gptq = ("int4 nearest, max/7", "int4 search (default)", "int4 GPTQ and search")
    return f"{shown(search)}; GPTQ {shown(gptq)}; nearest {shown(nearest)}"


Look = Callable[[Records], str]
ROWS: list[tuple[str, str, Look, str, str]] = [
    ("int4 decode, batch 1, context 512", "llama.cpp Q4_0", _peer("q4_0", "decode"), ">= 1.0 x", "85 % of read"),
    ("the same", "the official way, bf16", _official("decode"), "", ""),
    ("int8 decode, batch 1", "llama.cpp Q8_0", _peer("q8_0", "decode"), ">= 1.0 x", "85 % of read"),
    ("prefill 512, int4", "the official way, bf16", _official("prefill"), ">= 1.15 x", "2.2 x"),
    ("the same", "llama.cpp Q4_0", _peer("q4_0", "prefill"), ">= 2.5 x", ""),
    ("batch-16 decode, all rows, int4", "torch dynamic int8", _batch16, ">= 1.0 x", "1.8 x"),
    ("loss by context, decode", "context 512", _context, "< 5 % at 4,096", "2 %"),
    ("memory, int4, 8K context, one dialogue", "6 GB", _dialogue, "<= 5 GB", "4.3 GB"),
    ("memory while loading and quantising 12.5 GB to int4", "-", _loading, "<= 6 GB", "4.5 GB"),
    ("decode of glm-nano", "transformers' generate", _host, ">= 3 x", "8 x"),
    ("perplexity increase, int4 of glm-nano", "rounding to nearest", _perplexity, "below it", "half of it"),
    ("ChatGLM2-6B decodes faster than ChatGLM-6B", "+42 % claimed", _generations, "", ""),
]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="for large files, which are kept")
    parser.add_argument("--llama-bench", default=shutil.which("llama-bench"))
    parser.add_argument("--only", help="parts, with commas")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds of one command")
    return parser


if __name__ == "__main__":
    main()
