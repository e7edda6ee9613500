"""How far the logits of an exported graph are from those that its source gave: asked in a process without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from glmkit.runtime.session import open_session


def difference(folder: str, graph: dict[str, Any], steps: str) -> float | None:
    """Runs a graph through recorded steps.

    Args:
        folder: The exported folder.
        graph: `engine` and `file`, as runtime.json says it.
        steps: An .npz file: for step N ids.N, mask.N and positions.N, which the graph is fed with; and `expected`,
            (steps, B, V), the logits of the last column of each, or nothing of it where they are not known.

    Returns:
        Distance of the graph's logits from the expected ones, relative to their size; None where none are expected.

    Raises:
        ValueError: A logit is no finite number.
    """
    with np.load(steps, allow_pickle=False) as file:
        recorded = dict(file)
    session = open_session(Path(folder), graph)
    session.start(len(recorded["ids.0"]))
    count = sum(name.startswith("ids.") for name in recorded)
    found = np.stack(
        [session.run(*(recorded[f"{name}.{step}"] for name in ("ids", "mask", "positions"))) for step in range(count)]
    )
    if not np.isfinite(found).all():
        raise ValueError(f"{int((~np.isfinite(found)).sum())} of {found.size} logits are no finite numbers")
    if "expected" not in recorded:
        return None
    expected = recorded["expected"]
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected - expected.mean()))
