"""What several verbs print: tables, sizes, descriptions of models and of results."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lays out rows in columns, the first to the left, the others to the right.

    Args:
        rows: All of the same length.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )


def in_units(size: int) -> str:
    """Writes a number of bytes for people.

    Args:
        size: Bytes.
    """
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def describe_model(found: dict[str, Any]) -> str:
    """Turns what `glmkit.inspection.inspect` found into lines to read.

    Args:
        found: Its result, with or without the tensors.
    """
    config = found["config"]
    names = ("num_layers", "hidden_size", "num_attention_heads", "multi_query_group_num", "padded_vocab_size",
             "vocab_size")  # fmt: skip
    kind = f"generation {found['generation']}" if found["generation"] else f"the network of {found['network']}"
    lines = [
        f"{found['name']}: {found['family'] or 'no known family'}, {kind}",
        f"  source      {found['source']}",
        f"  licence     {found['licence'] or 'unknown'}",
        f"  parameters  {found['parameters']:,} in {', '.join(found['dtypes'])}",
        f"  stored      {in_units(found['stored_bytes'])}",
        *([f"  quantised   {_described_format(found['quantised'])}"] if found["quantised"] else []),
        "  sizes       " + ", ".join(f"{name} {config[name]}" for name in names if name in config),
        "",
        f"memory for {found['context_tokens']:,} tokens x {found['batch']}:",
    ]
    lines.append(_memory_table(found["memory_bytes"]))
    for number, costs in found.get("memory_per_device_bytes", {}).items():
        lines += ["", f"memory of each of {number} devices, tensor-parallel:", _memory_table(costs)]
    if "tensors" in found:
        listed = [(one["name"], " x ".join(map(str, one["shape"])), one["dtype"]) for one in found["tensors"]]
        lines += ["", table([("tensor", "shape", "dtype"), *listed])]
    return "\n".join(lines)


def described_export(found: dict[str, Any]) -> str:
    """What an exported folder or file is, as lines to read."""
    from glmkit.runtime.exported import FORMATS

    context = f"{found['context_tokens']:,} tokens" if found["context_tokens"] else "unknown"
    weights = ", ".join(f"{kind} {in_units(size)}" for kind, size in found["weights_bytes"].items())
    return "\n".join(
        [
            f"{found['name']}: exported to {FORMATS[found['exported']]}, {found['family'] or 'no known family'}",
            f"  source      {found['source']}",
            f"  stored      {in_units(found['stored_bytes'])}",
            f"  weights     {weights}",
            f"  context     {context}",
            "  use         " + "\n              ".join(found["uses"]),
        ]
    )


def _described_format(found: dict[str, Any]) -> str:
    one_for = f"{found['group_size']} columns" if found.get("group_size") else "row"
    output = f"; output layer {found['output_layer']}" if found.get("output_layer") else ""
    return f"{found['scheme']}: {found['bits']} bits, a scale for each {one_for}{output}"


def _memory_table(costs: dict[str, dict[str, int]]) -> str:
    rows: list[Sequence[str]] = [("", "weights", "KV cache", "total")]
    for label, cost in costs.items():
        rows.append((f"  {label}", *(in_units(cost[part]) for part in ("weights", "kv_cache", "total"))))
    return table(rows)


def show_made(made: Any, as_json: bool) -> None:
    """Notes on what was written, to stderr, and all that is known of it as JSON, if that was asked for."""
    from dataclasses import asdict

    for note in made.notes:
        print(note, file=sys.stderr)
    if as_json:
        print(json.dumps({"schema": 1} | asdict(made), indent=2))
