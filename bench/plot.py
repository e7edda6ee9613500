"""Draws what `bench/run_all.py` found: bench-speed.png and bench-context.png. Needs matplotlib.

python bench/plot.py OUT docs
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from run_all import Records, read

_OURS, _THEIRS = "#2b6cb0", "#a0aec0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="what run_all.py wrote")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    arguments = parser.parse_args()
    records = read(arguments.out)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("speed", speed), ("context", context)):
        figure = draw(records)
        if figure is None:
            print(f"{name}: no records")
            continue
        path = arguments.folder / f"bench-{name}.png"
        figure.savefig(path, dpi=110)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def speed(records: Records) -> Figure | None:
    """Bars: decoding and reading a prompt, ours against the others."""
    decode, prefill = [], []
    for row in records.get("peers", []):
        if row["what"] in ("decode", "prefill"):
            to = decode if row["what"] == "decode" else prefill
            to.append((f"{row['subject']}, beside {row['peer']}", row["tokens_per_second"], _OURS))
            to.append((row["peer"], row["peer_tokens_per_second"], _THEIRS))
    for row in records.get("official", []):
        if row["what"] in ("decode", "prefill"):
            to = decode if row["what"] == "decode" else prefill
            to.append((row["subject"], row["tokens_per_second"], _THEIRS if "official" in row["subject"] else _OURS))
    if not decode and not prefill:
        return None
    figure = Figure(figsize=(11, 1.2 + 0.32 * max(len(decode), len(prefill))))
    places = figure.subplots(1, 2)
    for place, bars, title in ((places[0], decode, "decode, batch 1"), (places[1], prefill, "prefill")):
        for height, (_, value, colour) in enumerate(reversed(bars)):
            place.barh(height, value, color=colour)
            place.text(value, height, f" {value:.1f}", va="center", fontsize=8)
        place.set_yticks(range(len(bars)), [label for label, _, _ in reversed(bars)], fontsize=7)
        place.set_title(f"{title}, tokens/s")
        place.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def context(records: Records) -> Figure | None:
    """Decoding speed over the length of the context."""
    rows = sorted(
        (row for row in records.get("context", []) if row["what"] == "decode"), key=lambda row: row["context"]
    )
    if not rows:
        return None
    figure = Figure(figsize=(5.5, 3.2))
    place = figure.subplots()
    place.plot([row["context"] for row in rows], [row["tokens_per_second"] for row in rows], "o-", color=_OURS)
    place.set_xlabel("tokens in the cache")
    place.set_ylabel("tokens/s, batch 1")
    place.set_ylim(bottom=0)
    place.set_title(rows[0]["subject"])
    place.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    main()
