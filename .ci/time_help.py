"""Times `glm --help`; torch or transformers at start-up would cost seconds."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

GOAL_SECONDS = 0.3
LIMIT_SECONDS = 1.0  # what fails: far enough from the goal for a busy machine, far below an import of torch

command = [sys.argv[1], "--help"]
seconds = []
for _ in range(7):
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds.append(time.perf_counter() - start)
median = statistics.median(seconds)
print(f"glm --help: median {median:.2f} s of {len(seconds)} (goal {GOAL_SECONDS} s), fastest {min(seconds):.2f} s")
sys.exit(median > LIMIT_SECONDS)
