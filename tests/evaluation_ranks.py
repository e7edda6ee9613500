"""What the test of shared evaluations starts: two processes as torchrun starts them, from one that has imported all.

`evaluation_ranks.py CALLS`: a JSON list of calls of the command, done one after the other by both processes.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import glmkit.evaluate.predict
import glmkit.train.evaluation  # noqa: F401
from glmkit import cli


def work(rank: int, port: int, calls: list[list[str]]) -> int:
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(common, RANK=str(rank), LOCAL_RANK=str(rank))
    failed = any(cli.run(words) != 0 for words in calls)
    sys.stdout.flush()
    return int(failed)


def main() -> int:
    calls = json.loads(Path(sys.argv[1]).read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os._exit(work(rank, port, calls))
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main())
