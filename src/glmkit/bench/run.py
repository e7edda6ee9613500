"""One run of `glm bench`: machine, models, rounds, table."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from glmkit.bench import machine
from glmkit.bench.measure import PeakMemory, Timing, interleaved
from glmkit.bench.models import OFFICIAL_BITS, check_scheme, preset, random_model
from glmkit.bench.report import Journal, Row, compared, decode_row, prefill_row, table, whole_seconds
from glmkit.bench.subjects import Generate, Official, Ours, Subject
from glmkit.bench.work import cache_bytes, prompt_operations, step_operations, weight_bytes
from glmkit.errors import UsageError
from glmkit.loading import load
from glmkit.location import locate
from glmkit.quant.schemes import FORMS

BASELINES = ("bf16", *OFFICIAL_BITS, "generate")


@dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
        presets: Names of released models.
        checkpoint: A folder instead of them.
        layers: Blocks of each; None: all.
        schemes: Formats of the weights; empty: "int4", of a checkpoint as it is stored.
        output_layer: "keep", or "int8" in our own formats.
        batch: Rows of decoding, each is measured.
        context: Tokens in the cache while decoding.
        prompt: Lengths of prompts.
        tokens: Steps of one repetition.
        repeats: Clean repetitions of each figure.
        baseline: One of `BASELINES`: the official way with bf16 or quantised weights, or transformers' `generate` on
            the very model; None for none.
        json: File to which records are added.
        command: What was typed, for the records.
    """

    presets: tuple[str, ...] = ("chatglm3-6b",)
    checkpoint: Path | None = None
    layers: int | None = None
    schemes: tuple[str, ...] = ()
    output_layer: str = "keep"
    batch: tuple[int, ...] = (1,)
    context: tuple[int, ...] = (512,)
    prompt: tuple[int, ...] = (512,)
    tokens: int = 16
    repeats: int = 3
    baseline: str | None = None
    json: Path | None = None
    command: str = ""


@dataclass(frozen=True)
class Place:
    """What a figure is of.

    Args:
        batch: Rows of decoding; None for reading a prompt.
        tokens: Tokens in the cache, or of the prompt.
    """

    batch: int | None
    tokens: int

    def __str__(self) -> str:
        return f"prompt {self.tokens}" if self.batch is None else f"batch {self.batch} context {self.tokens}"

    def work(self, subject: Subject, tokens: int) -> Callable[[], float]:
        """What to run for it; `tokens` steps of decoding."""
        return subject.prefill(self.tokens) if self.batch is None else subject.decode(self.batch, self.tokens, tokens)


@dataclass(frozen=True)
class Contender:
    """A subject with what is known of its model.

    Args:
        subject: What runs.
        whole: Blocks of the released model.
        peak: The machine's best operations per second for its kind of weights.
        weights: Bytes of weights that a step reads.
        against: Name of the baseline; None without one, and for the baseline itself.
    """

    subject: Subject
    whole: int
    peak: float
    weights: int
    against: str | None


def bench(request: Request) -> list[Row]:
    """Measures, prints the table and writes the records.

    Args:
        request: What to measure.

    Returns:
        The rows.

    Raises:
        UsageError: A setting that does not exist or fit.
    """
    _check(request)
    journal = Journal(request.json)
    found, best = machine.description(), machine.limits()
    journal.add({"what": "machine", "command": request.command, **found, "limits": asdict(best)})
    _say(_described(found, best))
    with PeakMemory() as peak:
        contenders = _contenders(request, best, journal)
        rows: list[Row] = []
        for batch in request.batch:
            rows += _round(request, contenders, best, journal, [Place(batch, one) for one in request.context])
        for prompt in request.prompt:
            rows += _round(request, contenders, best, journal, [Place(None, prompt)])
    memory = {"anonymous_bytes": peak.anonymous, "before_bytes": peak.start, "resident_bytes": peak.resident}
    journal.add({"what": "memory", **memory})
    print(f"\n{_described(found, best)}\n\n{table(rows)}\n")
    print(
        f"peak of memory: {peak.anonymous / 1e9:.2f} GB anonymous, of it {peak.start / 1e9:.2f} GB before the models; "
        f"{peak.resident / 1e9:.2f} GB resident, mapped files counted"
    )
    return rows


def _check(request: Request) -> None:
    if request.checkpoint is None:
        for name in request.presets:
            preset(name, request.layers)
    else:
        _check_checkpoint(request, request.checkpoint)
    for scheme in request.schemes or ("int4",):
        check_scheme(scheme, request.output_layer)
    if request.baseline is not None and request.baseline not in BASELINES:
        raise UsageError(f"--baseline {request.baseline}", hint=f"one of {', '.join(BASELINES)}")
    for name in ("batch", "context", "prompt"):
        for value in getattr(request, name):
            if value < (1 if name == "batch" else 4):
                raise UsageError(f"--{name} {value}", hint="a prompt or context has 4 tokens or more, a batch 1 row")
    for name in ("tokens", "repeats"):
        if getattr(request, name) < 1:
            raise UsageError(f"--{name} {getattr(request, name)}: expected 1 or more")


def _check_checkpoint(request: Request, checkpoint: Path) -> None:
    """A folder is measured as it is loaded: what random weights may have, it cannot have."""
    locate(checkpoint)
    official = None if request.baseline == "generate" else request.baseline
    for flag, value in (("--layers", request.layers), ("--baseline", official)):
        if value is not None:
            raise UsageError(f"{flag} {value} beside --checkpoint", hint="leave one of them out")
    if request.output_layer != "keep":
        raise UsageError(
            f"--output-layer {request.output_layer} beside --checkpoint", hint="glm quantize writes a folder with it"
        )


# --- models ---


def _contenders(request: Request, best: machine.Limits, journal: Journal) -> list[Contender]:
    """All models of the run. A baseline over the same tensors costs no memory of its own."""
    made: list[Contender] = []
    for name, model, whole, scheme in _models(request, journal):
        made.append(_contender(Ours(model, f"{name} {scheme}"), whole, best, _baseline_name(request, name, scheme)))
        if request.baseline == "generate":
            made.append(_contender(Generate(model, f"{name} {scheme}, generate"), whole, best, None))
    if request.baseline in (None, "generate"):
        return made
    models = {one.subject.name: one.subject.model for one in made}
    for name in request.presets:
        label = f"{name} {request.baseline}"
        model = models.get(label) or random_model(preset(name, request.layers), str(request.baseline), packed=False)
        made.append(_contender(Official(model, f"{label}, official way"), preset(name).num_layers, best, None))
    return made


def _models(request: Request, journal: Journal) -> list[tuple[str, Any, int, str]]:
    """Name, model, blocks of the whole model, and scheme."""
    if request.checkpoint is not None:
        return [_loaded(request, scheme, journal) for scheme in request.schemes or ("stored",)]
    made = []
    for name in request.presets:
        for scheme in request.schemes or ("int4",):
            config = preset(name, request.layers)
            head = request.output_layer if scheme in FORMS else "keep"
            _say(f"making {name}, {config.num_layers} blocks, {scheme}")
            model = random_model(config, scheme, output_layer=head)
            made.append((name, model, preset(name).num_layers, scheme + (", head int8" if head == "int8" else "")))
    return made


def _loaded(request: Request, scheme: str, journal: Journal) -> tuple[str, Any, int, str]:
    """Loads a folder, and notes how long that takes and what it needs."""
    assert request.checkpoint is not None
    floats = {"bf16": "bfloat16", "float32": "float32"}
    quantize = None if scheme == "stored" or scheme in floats else scheme
    with PeakMemory() as peak:
        started = time.perf_counter()
        loaded = load(request.checkpoint, dtype=floats.get(scheme, "auto"), quantize=quantize, device="cpu")
        seconds = time.perf_counter() - started
    weights = sum(one.numel() * one.element_size() for one in loaded.model.parameters())
    record = {"seconds": seconds, "anonymous_bytes": peak.bytes, "resident_bytes": peak.resident}
    journal.add({"what": "load", "path": str(request.checkpoint), "scheme": scheme, "model_bytes": weights, **record})
    _say(f"loaded in {seconds:.1f} s; peak {peak.bytes / 1e9:.2f} GB anonymous, the model has {weights / 1e9:.2f} GB")
    return request.checkpoint.name, loaded.model, loaded.model.config.num_layers, scheme


def _contender(subject: Subject, whole: int, best: machine.Limits, against: str | None) -> Contender:
    model = subject.model
    rounded = any(hasattr(module, "bits") for module in model.modules()) and isinstance(subject, Ours)
    peak = best.int8_ops if rounded else best.bfloat16_ops
    return Contender(subject, whole, peak, weight_bytes(model), against)


def _baseline_name(request: Request, name: str, scheme: str) -> str | None:
    if request.baseline == "generate":
        return f"{name} {scheme}, generate"
    return None if request.baseline is None else f"{name} {request.baseline}, official way"


# --- rounds ---


def _round(
    request: Request, contenders: Sequence[Contender], best: machine.Limits, journal: Journal, places: Sequence[Place]
) -> list[Row]:
    """Figures of every contender at some places, all by turns: what lies in one call of this can be compared."""
    works: dict[str, Callable[[], float]] = {}
    for place in places:
        _say(str(place))
        for one in contenders:
            works[f"{one.subject.name} {place}"] = place.work(one.subject, request.tokens)
            if 1 < one.subject.model.config.num_layers < one.whole:
                works[f"{one.subject.name} {place}, one block"] = place.work(one.subject.slice(), request.tokens)
    timings = interleaved(works, request.repeats)
    rows = []
    for place in places:
        for one in contenders:
            name = one.subject.name
            timing, block = timings[f"{name} {place}"], timings.get(f"{name} {place}, one block")
            row = _figures(request, one, best, timing, place)
            against = timings.get(f"{one.against} {place}")
            if against is not None:
                row = compared(row, timing, against)
            if block is not None:
                steps = 1 if place.batch is None else request.tokens
                seconds = whole_seconds(timing.seconds, block.seconds, row.layers, one.whole) / steps
                row = replace(row, whole_tokens_per_second=(place.batch or place.tokens) / seconds)
            journal.add(asdict(row) | {"repetitions": [asdict(each) for each in timing.repetitions]})
            rows.append(row)
    return rows


def _figures(request: Request, one: Contender, best: machine.Limits, timing: Timing, place: Place) -> Row:
    name, model, config = one.subject.name, one.subject.model, one.subject.model.config
    if place.batch is None:
        operations = prompt_operations(model, place.tokens)
        return prefill_row(name, config.num_layers, place.tokens, timing, operations=operations, peak=one.peak)
    columns = place.tokens + (request.tokens + 1) / 2
    read = one.weights + cache_bytes(config, place.batch, columns, model.dtype.itemsize)
    return decode_row(
        name, config.num_layers, place.batch, place.tokens, request.tokens, timing, read_bytes=read,
        operations=step_operations(model, place.batch, columns), limits=best, peak=one.peak,
    )  # fmt: skip


def _described(found: dict[str, Any], best: machine.Limits) -> str:
    return (
        f"{found['cpu']}, {found['threads']} threads, kernels {found['kernels']}, torch {found['torch']}: "
        f"reads {best.read_bytes / 1e9:.1f} GB/s ({best.how['read']}), "
        f"bfloat16 {best.bfloat16_ops / 1e12:.2f} TOP/s ({best.how['bfloat16']}), "
        f"int8 {best.int8_ops / 1e12:.2f} TOP/s ({best.how['int8']})"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
