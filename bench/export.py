"""Exports a checkpoint of a released model's size to OpenVINO: seconds, peak memory, size, and how fast it answers.

    python bench/checkpoint_of_random_weights.py FOLDER            12.5 GB: 28 layers of ChatGLM3-6B in bfloat16
    python bench/export.py FOLDER TARGET [--weights int4] [--prompt 512] [--tokens 32] [--json FILE]

Each part runs in a process of its own. Memory is the peak of what the process alone holds (RssAnon, sampled every 2 ms)
above what its imports take. A TARGET that exists is only measured. Speed is that of one row: a prompt in one call, then
one token after the other, in float32 and in the precision that OpenVINO chooses by itself; decoding is bound by reading
the weights, so GB/s stand beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from glmkit.bench.report import Journal

EXPORT = """
import dataclasses, json, sys, time
order = json.load(sys.stdin)
import glmkit.export.openvino as openvino
from glmkit.bench.measure import PeakMemory
openvino.load_openvino()
with PeakMemory() as peak:
    began = time.monotonic()
    made = openvino.export(order["source"], order["target"], weights=order["weights"])
    seconds = time.monotonic() - began
print(json.dumps(dataclasses.asdict(made) | {"seconds": seconds, "peak": peak.bytes, "resident": peak.resident}))
"""
ANSWER = """
import glmkit_command, json, sys, time
from pathlib import Path
order = json.load(sys.stdin)
import numpy as np
from glmkit.runtime.session import load_openvino
openvino = load_openvino()
began = time.monotonic()
settings = {"INFERENCE_PRECISION_HINT": order["precision"]} if order["precision"] else {}
compiled = openvino.Core().compile_model(order["model"], "CPU", settings)
request = compiled.create_infer_request()
opened = time.monotonic() - began
def step(start, end):
    request.infer({"input_ids": np.arange(start, end, dtype=np.int64)[None] % 5000 + 100,
                   "attention_mask": np.ones((1, end), np.int64),
                   "position_ids": np.arange(start, end, dtype=np.int64)[None], "beam_idx": np.zeros(1, np.int32)})
step(0, order["prompt"]); request.reset_state()
began = time.monotonic(); step(0, order["prompt"]); prefill = time.monotonic() - began
times = []
for place in range(order["prompt"], order["prompt"] + order["tokens"]):
    began = time.monotonic(); step(place, place + 1); times.append(time.monotonic() - began)
resident = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"opened": opened, "prefill": prefill, "step": sorted(times)[len(times) // 2], "resident": resident}))
"""


def child(code: str, order: dict[str, Any]) -> dict[str, Any]:
    """Runs a part in a process of its own, and returns what it printed."""
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(order), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--weights", choices=["int8", "int4"])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of the answer")
    parser.add_argument("--json", type=Path, help="file to which records are added")
    arguments = parser.parse_args()
    journal = Journal(arguments.json)
    if not arguments.target.exists():
        order = {"source": str(arguments.source), "target": str(arguments.target), "weights": arguments.weights}
        made = child(EXPORT, order)
        journal.add({"what": "export", "to": "openvino", "weights": arguments.weights} | made)
        print(
            f"export    {made['seconds']:.0f} s, peak {made['peak'] / 1e9:.2f} GB, {made['bytes'] / 1e9:.2f} GB on disk"
        )
        print(f"logits    differ by {made['difference']:.3g} of their size", *made["notes"], sep="\n")
    model = arguments.target / "openvino_model.xml"
    size = model.with_suffix(".bin").stat().st_size
    for precision in ("f32", None):
        order = {"model": str(model), "precision": precision, "prompt": arguments.prompt, "tokens": arguments.tokens}
        ran = child(ANSWER, order)
        journal.add({"what": "answer", "by": "openvino", "weights": arguments.weights, **order} | ran)
        read, write = arguments.prompt / ran["prefill"], 1 / ran["step"]
        print(
            f"{precision or 'default':8}  opened in {ran['opened']:.1f} s, {read:.0f} prompt tokens/s, {write:.2f}"
            f" tokens/s ({size * write / 1e9:.1f} GB/s), resident {ran['resident'] / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    main()
