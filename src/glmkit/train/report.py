"""The report of a run, report.md and a page of its own, report.html: made from the files of the run folder alone.

So every run has one: also a run that failed, and one that a kill ended long ago (`write_report(folder)`).
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glmkit.train.curves import Curve, curves_of, draw_png, draw_svg
from glmkit.train.run_folder import ENV_FILE, EXIT_FILE, read_lines, read_object
from glmkit.writing import write_text_atomic

_PICTURE = re.compile(r"!\[[^]]*\]\(plots/(\w+)\.png\)")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328;
  background: #fff }
table { border-collapse: collapse; margin: 1rem 0 } td, th { border: 1px solid #8885; padding: .25rem .6rem;
  text-align: left; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere }
pre { background: #8881; padding: .8rem; overflow-x: auto; white-space: pre-wrap }
svg { width: 100%; max-width: 40rem; font: 11px system-ui, sans-serif; fill: currentColor }
.failed { border-left: 4px solid #c2410c; padding-left: .8rem }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117 } }
"""


def write_report(
    output: Path, facts: Mapping[str, str] | None = None, sections: Mapping[str, str] | None = None
) -> Path:
    """Write report.md, report.html and, if matplotlib is installed, plots/*.png.

    Args:
        output: The run's folder.
        facts: Name -> value, further rows of the first table.
        sections: Title -> Markdown, further parts.

    Returns:
        The path of report.md.

    Raises:
        OutputError: If the disk refuses.
    """
    metrics = [line for line in read_lines(output / "metrics.jsonl") if "step" in line]
    curves = curves_of(metrics)
    (output / "plots").mkdir(exist_ok=True)
    for curve in curves:
        draw_png(curve, output / "plots" / f"{curve.name}.png")
    parts = [
        _head(output, metrics, facts or {}),
        *(f"## {_title(curve)}\n\n![{_title(curve)}](plots/{curve.name}.png)" for curve in curves),
        _samples(read_lines(output / "samples.jsonl")),
        *(f"## {title}\n\n{text.strip()}" for title, text in (sections or {}).items()),
        _repeat(output),
        _settings(output),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_text_atomic(output / "report.md", text)
    write_text_atomic(output / "report.html", _page(text, curves))
    return output / "report.md"


def _head(output: Path, metrics: Sequence[Mapping[str, Any]], facts: Mapping[str, str]) -> str:
    ended, environment = read_object(output / EXIT_FILE), read_object(output / ENV_FILE)
    how = str(ended.get("ended", "no end is known: it runs, or it was killed (--resume goes on)"))
    how += {"interrupted": " (--resume goes on)"}.get(how, "")
    rows = {"how it ended": how, "finished": ended.get("finished")}
    rows["optimizer steps"] = (
        f"{ended.get('step', _last(metrics, 'step', '{:.0f}'))} of {ended['total_steps']}"
        if ended.get("total_steps")
        else _last(metrics, "step", "{:.0f}")
    )
    rows["training loss at the end"] = _last(metrics, "loss", "{:.4f}")
    rows["validation loss"] = _last(metrics, "eval_loss", "{:.4f}") or "not measured"
    rows |= facts
    speeds = sorted(line["tokens_per_second"] for line in metrics if "tokens_per_second" in line)
    rows["tokens per second (median)"] = f"{speeds[len(speeds) // 2]:.0f}" if speeds else None
    rows["peak memory"] = _last(metrics, "peak_memory_bytes", "{:.3g} bytes")
    rows["seconds (this call)"] = ended.get("seconds")
    versions = environment.get("versions", {})
    rows["ran on"] = ", ".join(
        str(part)
        for part in (environment.get("processes"), environment.get("accelerator"), environment.get("system"))
        if part
    )
    rows["threads"] = environment.get("threads")
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    result = ended.get("result")
    rows["result"] = result or (f"{ended['checkpoint']} only" if ended.get("checkpoint") else "none")
    trouble = ""
    if ended.get("cause"):
        cure = f"\n\nWhat to do: {ended['cure']}" if ended.get("cure") else ""
        trouble = f"\n\n## Why it ended\n\n{ended['cause']}{cure}"
    return f"# Training report\n\n{_table(rows)}{trouble}"


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """Show what the model answered to each question, from before the first step to the last validation."""
    if not samples:
        return ""
    questions: dict[str, list[str]] = {}
    for sample in samples:
        question = str(sample.get("prompt", sample.get("question", "")))
        answer = str(sample.get("answer", sample.get("prediction", "")))
        questions.setdefault(question, []).append(f"| {sample.get('step', '')} | {_cell(answer)} |")
    shown = [
        f"### {_cell(question)[:200]}\n\n| step | answer |\n|---|---|\n" + "\n".join(rows)
        for question, rows in list(questions.items())[:20]
    ]
    return "## What the model says\n\n" + "\n\n".join(shown)


def _repeat(output: Path) -> str:
    environment = read_object(output / ENV_FILE)
    if not environment:
        return ""
    command = f"cd {environment.get('folder')}\n{environment.get('command')}"
    verb = "pretrain" if "corpus:" in _text(output / "config.resolved.yaml") else "finetune"
    exact = f"glm {verb} {output / 'config.resolved.yaml'} output.dir={output}-again"
    asked = f"As it was asked:\n\n```\n{command}\n```"
    return f"## The same again\n\n{asked}\n\nWith every value written out:\n\n```\n{exact}\n```"


def _settings(output: Path) -> str:
    text = _text(output / "config.resolved.yaml")
    return f"## Settings\n\n```\n{text.strip()}\n```\n\nAll figures over time are in metrics.jsonl." if text else ""


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _title(curve: Curve) -> str:
    return curve.name.replace("_", " ").capitalize()


def _last(metrics: Sequence[Mapping[str, Any]], key: str, form: str) -> str | None:
    value = next((line[key] for line in reversed(metrics) if key in line), None)
    return None if value is None else form.format(value)


def _table(rows: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in rows.items() if value not in (None, "")}
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(str(value))} |" for name, value in kept.items())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# The page -------------------------------------------------------------------------------------------------------------


def _page(markdown: str, curves: Sequence[Curve]) -> str:
    """Turn a report's Markdown (headings, tables, code, pictures, paragraphs; nothing else) into a page of its own."""
    drawn = {curve.name: draw_svg(curve) for curve in curves}
    body: list[str] = []
    for block in _blocks(markdown):
        picture = _PICTURE.fullmatch(block)
        if picture:
            body.append(drawn.get(picture[1], ""))
        elif block.startswith("```"):
            body.append(f"<pre>{html.escape(block.strip('`').strip())}</pre>")
        elif block.startswith("#"):
            marks, _, title = block.partition(" ")
            body.append(f"<h{len(marks)}>{html.escape(title)}</h{len(marks)}>")
        elif block.startswith("|"):
            body.append(_html_table(block))
        else:
            body.append(f"<p>{html.escape(block)}</p>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Training report</title>'
    shown = "\n".join(body)
    return f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{shown}</body></html>\n'


def _blocks(markdown: str) -> list[str]:
    """Split Markdown at blank lines, but not inside code."""
    found: list[str] = []
    for number, part in enumerate(re.split(r"^(```.*?^```)$", markdown, flags=re.MULTILINE | re.DOTALL)):
        found += [part] if number % 2 else [block.strip() for block in re.split(r"\n\s*\n", part)]
    return [block for block in found if block]


def _html_table(block: str) -> str:
    rows = []
    for line in block.splitlines():
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(rows)}</table>"
