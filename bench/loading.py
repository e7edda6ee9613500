"""Peak memory and time of loading a checkpoint: ours against transformers', each in its own process.

    python bench/loading.py FOLDER [--dtype bfloat16] [--quantize official-int8]

Prints, for each, seconds and the peak of anonymous memory (RssAnon, sampled every 2 ms) above what the imports take,
as a multiple of the final model. Goal: at most 1.15 x the model plus its largest tensor.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

CHILD = """
import json, sys, time
sys.path.insert(0, {bench!r})
from loading import PeakMemory
import torch, glmkit
from glmkit.checkpoint import open_folder
from glmkit.loading import read_config
from glmkit.registration import LANGUAGE_MODELS
from glmkit.weights import load_model
with PeakMemory() as peak:
    started = time.monotonic()
    if {ours}:
        with open_folder({folder!r}) as folder:
            config = read_config(folder)
            model = load_model(folder, LANGUAGE_MODELS[type(config)], config, torch.{dtype}, torch.device("cpu"),
                               quantize={bits})
    else:
        from transformers import PreTrainedModel
        with open_folder({folder!r}) as folder:
            cls = LANGUAGE_MODELS[type(read_config(folder))]
        model = PreTrainedModel.from_pretrained.__func__(cls, {folder!r}, dtype=torch.{dtype})
    seconds = time.monotonic() - started
sizes = [t.numel() * t.element_size() for t in {{t.data_ptr(): t for t in model.state_dict().values()}}.values()]
print(json.dumps(dict(seconds=seconds, peak=peak.bytes, model=sum(sizes), largest=max(sizes))))
"""


class PeakMemory:
    """Samples the anonymous memory of this process and keeps its peak above the start."""

    bytes = 0

    def __enter__(self) -> PeakMemory:
        self._start, self._stop = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.bytes = max(self.bytes, anonymous_bytes() - self._start)
            if self._stop.wait(0.002):
                return


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def measure(folder: str, ours: bool, dtype: str, bits: int | None) -> dict[str, float]:
    """Loads in a fresh process and returns its figures."""
    code = CHILD.format(bench=str(Path(__file__).parent), folder=folder, ours=ours, dtype=dtype, bits=bits)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", choices=["official-int8", "official-int4"])
    arguments = parser.parse_args()
    bits = {"official-int8": 8, "official-int4": 4, None: None}[arguments.quantize]
    for label, ours in (("glmkit", True), ("transformers", False)):
        if not ours and bits:
            continue
        time.sleep(1)
        found = measure(arguments.folder, ours, arguments.dtype, bits)
        limit = 1.15 * found["model"] + found["largest"]
        print(
            f"{label:13} {found['seconds']:6.1f} s   peak {found['peak'] / 1e9:6.2f} GB"
            f" = {found['peak'] / found['model']:.3f} x the model of {found['model'] / 1e9:.2f} GB"
            f"   (goal {limit / 1e9:.2f} GB)"
        )


if __name__ == "__main__":
    main()
