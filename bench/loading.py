"""Peak memory and time of loading a checkpoint: ours against transformers', each in its own process.

    python bench/loading.py FOLDER [--dtype bfloat16] [--quantize int4] [--json FILE]

Prints, for each, seconds and the peak of anonymous memory (RssAnon, sampled every 2 ms) above what the imports take,
as a multiple of the final model. Goal: at most 1.15 x the model plus its largest tensor.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from glmkit.bench.report import Journal

CHILD = """
import json, time
import torch, glmkit
from glmkit.bench.measure import PeakMemory
from glmkit.checkpoint import open_folder
from glmkit.loading import load, read_config
from glmkit.registration import LANGUAGE_MODELS
if {native!r}:
    from glmkit.kernels.build import level
    level()  # what is compiled on first use is not loading
with PeakMemory() as peak:
    started = time.monotonic()
    if {ours}:
        model = load({folder!r}, dtype="{dtype}", device="cpu", quantize={quantize!r}).model
    else:
        from transformers import PreTrainedModel
        with open_folder({folder!r}) as folder:
            cls = LANGUAGE_MODELS[type(read_config(folder))]
        model = PreTrainedModel.from_pretrained.__func__(cls, {folder!r}, dtype=torch.{dtype})
    seconds = time.monotonic() - started
sizes = [t.numel() * t.element_size() for t in {{t.data_ptr(): t for t in model.parameters()}}.values()]
print(json.dumps(dict(seconds=seconds, peak=peak.bytes, model=sum(sizes), largest=max(sizes))))
"""


def measure(folder: str, ours: bool, dtype: str, quantize: str | None) -> dict[str, float]:
    """Loads in a fresh process and returns its figures."""
    code = CHILD.format(folder=folder, ours=ours, dtype=dtype, quantize=quantize, native=bool(quantize))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", choices=["official-int8", "official-int4", "int8", "int4"])
    parser.add_argument("--json", type=Path, help="file to which records are added")
    arguments = parser.parse_args()
    for label, ours in (("glmkit", True), ("transformers", False)):
        if not ours and arguments.quantize:
            continue
        time.sleep(1)
        found = measure(arguments.folder, ours, arguments.dtype, arguments.quantize)
        Journal(arguments.json).add({"what": "load", "by": label, "quantize": arguments.quantize} | found)
        limit = 1.15 * found["model"] + found["largest"]
        print(
            f"{label:13} {found['seconds']:6.1f} s   peak {found['peak'] / 1e9:6.2f} GB"
            f" = {found['peak'] / found['model']:.3f} x the model of {found['model'] / 1e9:.2f} GB"
            f"   (goal {limit / 1e9:.2f} GB)"
        )


if __name__ == "__main__":
    main()
