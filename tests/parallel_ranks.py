"""What the tests of tensor parallelism run on every rank: `torchrun … parallel_ranks.py JOBS`.

JOBS is a file of torch.save: a list of {"name", "folder", "inputs" (of the model's call), "prompt" (ids), "tokens"}.
Each rank writes what it found beside it, as rank0.pt and so on.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from glmkit.engine import SamplingOptions, stream
from glmkit.engine.cache import new_cache
from glmkit.parallel import join_ranks, load_parallel


def run(job: dict[str, Any]) -> dict[str, Any]:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = load_parallel(job["folder"], dtype=torch.float32, device="cpu").model
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) << 10
    if job.get("only_load"):
        return {"peak_bytes": peak, "bytes": sum(p.numel() * p.element_size() for p in model.parameters())}
    with torch.no_grad():
        logits = model(**job["inputs"], use_cache=False).logits
    cache = new_cache(model, 1, 64)
    options = SamplingOptions(temperature=job.get("temperature", 0.0))
    steps = stream(model, job["prompt"], options, stop_ids=(), max_new_tokens=job["tokens"], cache=cache)
    ids = [step.token_id for step in steps]
    return {
        "logits": logits,
        "ids": ids,
        "cache": tuple(cache.layers[0].keys.shape),
        "shapes": {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
    }


def main() -> None:
    jobs = Path(sys.argv[1])
    ranks = join_ranks("cpu")
    found = {job["name"]: run(job) for job in torch.load(jobs)}
    torch.save(found, jobs.parent / f"rank{ranks.rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
