"""Verbs that look at a model or write it in another form: inspect, convert, export, merge, quantize."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from glmkit.errors import UsageError
from glmkit.verbs.app import (
    FamilyName,
    Json,
    Yes,
    verb,
)
from glmkit.verbs.printing import describe_model, described_export, in_units, show_made

_RUNTIMES = ("openvino", "onnx", "gguf")  # glm export --to


@verb("Show what a model is and what memory it needs.")
def inspect(
    model: Annotated[str, typer.Argument(help="Folder, model name or hub id.", metavar="MODEL")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    context: Annotated[
        int | None, typer.Option("--context", help="Context in tokens for the memory estimate; 8192, or the model's.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Conversations at once, for the memory estimate.")] = 1,
    devices: Annotated[
        list[int] | None, typer.Option("--devices", help="Memory of each of so many devices; repeatable.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="Show instead who sees whom in this text.")] = None,
    picture: Annotated[str | None, typer.Option("--picture", metavar="FILE", help="Draw that as a PNG.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="GLM, a text without [MASK]: other spans are cut out.")] = 0,
    json_: Json = False,
) -> int:
    """Prints a description of a checkpoint, family or exported model, or shows masks and positions for a text."""
    if text is not None or picture is not None:
        return _show_text(model, text, picture, seed, json_)
    from glmkit.runtime.exported import FORMATS
    from glmkit.runtime.exported import describe as describe_exported

    if (exported := describe_exported(model)) is not None:
        if tensors or devices or context is not None or batch != 1:
            raise UsageError(
                f"{model} is an exported model ({FORMATS[exported['exported']]}): nothing can be chosen for it",
                hint="leave out --tensors, --context, --batch and --devices",
            )
        print(json.dumps(exported, ensure_ascii=False, indent=2) if json_ else described_export(exported))
        return 0
    from glmkit.inspection import inspect as describe

    given = [] if context is None else [("--context", context)]
    for name, value in (*given, ("--batch", batch), *(("--devices", one) for one in devices or ())):
        if value < 1:
            raise UsageError(f"{name} {value}: expected 1 or more")
    found = describe(model, context_tokens=context, batch=batch, devices=devices or None)
    if not tensors:
        del found["tensors"]
    print(json.dumps(found, ensure_ascii=False, indent=2) if json_ else describe_model(found))
    return 0


def _show_text(model: str, text: str | None, picture: str | None, seed: int, json_: bool) -> int:
    """Draws a text, or prints what would be drawn."""
    if text is None:
        raise UsageError("--picture needs a text to draw", hint='add --text "What is the capital of France?"')
    from dataclasses import asdict

    from glmkit.picture import scene as scenes

    scene = scenes.describe(model, text, seed=seed)
    if picture is not None:
        from glmkit.picture.drawing import draw

        unwritten = draw(scene, picture)
        if unwritten:
            listed = " ".join(unwritten)
            print(f"no font on this machine can write {listed}; the picture has ids in their place", file=sys.stderr)
        print(f"written to {picture}", file=sys.stderr)
    if json_:
        print(json.dumps({"schema": 1} | asdict(scene), ensure_ascii=False, indent=2))
    elif picture is None:
        print(scenes.as_text(scene))
    return 0


@verb("Write a checkpoint in another layout, dtype or form.")
def convert(
    source: Annotated[str, typer.Argument(help="Folder, model name or hub id; or a file of weights.", metavar="SRC")],
    target: Annotated[str, typer.Argument(help="Folder, or file, to make.", metavar="DST")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="official: safetensors; native: transformers' glm; shards: mp_rank files; file: one .pth, .bin or"
            " .safetensors; mindformers: one .ckpt or .npz; merged: with --adapter; int8, int4.",
        ),
    ],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; else each its own.")
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option("--shard-size", metavar="SIZE", help="Most tensor data in one file: 2GB, 500MB. 5GB.")
    ] = None,
    like: Annotated[
        str | None, typer.Option("--like", metavar="DIR", help="A file's config.json and tokenizer are those of DIR.")
    ] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", "-a", help="merged: folder of the adapter.")] = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="merged: write a quantised base in 16 bit.")] = False,
    degree: Annotated[int | None, typer.Option("--degree", help="shards: number of tensor-parallel ranks.")] = None,
    bits: Annotated[int | None, typer.Option("--bits", help="shards: 8 or 4, quantise each rank's linears.")] = None,
    heads: Annotated[
        int | None, typer.Option("--heads", help="official: attention heads, where shards do not say it.")
    ] = None,
    family: FamilyName = None,
    keep_code: Annotated[
        bool, typer.Option("--keep-code", help="Carry the source's python files, unchanged and never run.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
    json_: Json = False,
) -> int:
    """Converts; the result appears only when it is complete, opened again and compared."""
    from glmkit.export import convert as run
    from glmkit.export.numbers import to_bytes

    size = None if shard_size is None else to_bytes(shard_size)
    made = run(source, target, to, dtype=dtype, shard_bytes=size, like=like, adapter=adapter, dequantize=dequantize,
               degree=degree, bits=bits, heads=heads, family=family, keep_code=keep_code,
               overwrite=overwrite)  # fmt: skip
    show_made(made, json_)
    if not json_:
        print(target)
    return 0


@verb("Write a model for OpenVINO, ONNX or GGUF.")
def export(
    source: Annotated[str, typer.Argument(help="Folder, model name or hub id.", metavar="SRC")],
    target: Annotated[str, typer.Argument(help="Folder, for gguf a file, to make.", metavar="DST")],
    to: Annotated[str, typer.Option("--to", help="openvino, onnx or gguf.")],
    weights: Annotated[
        str | None, typer.Option("--weights", help="int8 or int4; gguf: f16, q8_0 or q4_0. Else as they are.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", help="Folder of an adapter: LoRA is merged, a prefix carried.")
    ] = None,
    family: FamilyName = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", "--force", help="Replace DST if it exists.")] = False,
    yes: Yes = False,
    json_: Json = False,
) -> int:
    """Exports; the result appears only when it was opened again by the runtime that it is for."""
    import importlib

    from glmkit.location import locate

    if to not in _RUNTIMES:
        raise UsageError(f"--to {to}", hint=", ".join(_RUNTIMES))
    run = importlib.import_module(f"glmkit.export.{to}").export
    locate(source, download=yes)
    made = run(source, target, weights=weights, adapter=adapter, family=family, overwrite=overwrite)
    show_made(made, json_)
    if json_:
        return 0
    logits = "" if made.difference is None else f", logits differ by {made.difference:.2g} of their size"
    print(f"{made.path}: {in_units(made.bytes)}{logits}")
    if to != "gguf":
        print(f"next: glm run {made.path}")
    return 0


@verb("Write a base and an adapter as one plain checkpoint.")
def merge(
    base: Annotated[str, typer.Argument(help="Folder, model name or hub id of the base.", metavar="BASE")],
    adapter: Annotated[str, typer.Argument(help="Folder of a LoRA or P-Tuning adapter.", metavar="ADAPTER")],
    target: Annotated[str, typer.Argument(help="Folder to make.", metavar="DST")],
    dtype: Annotated[str, typer.Option("--dtype", help="auto (as the base), float32, bfloat16 or float16.")] = "auto",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write a quantised base in 16 bit, which a LoRA needs.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare the result with base and adapter before it is kept.")
    ] = True,
    family: FamilyName = None,
    keep_code: Annotated[
        bool, typer.Option("--keep-code", help="Carry the base's python files, unchanged and never run.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
    json_: Json = False,
) -> int:
    """Merges; the result appears only when it is complete and checked."""
    from glmkit.export.merge import merge as run

    merged = run(base, adapter, target, dtype=dtype, dequantize=dequantize, check=check, family=family,
                 keep_code=keep_code, overwrite=overwrite)  # fmt: skip
    show_made(merged, json_)
    if not json_:
        print(target)
    return 0


@verb("Write a checkpoint with int8 or int4 weights.")
def quantize(
    source: Annotated[str, typer.Argument(help="Folder, model name or hub id.", metavar="SRC")],
    target: Annotated[str, typer.Argument(help="Folder to make.", metavar="DST")],
    scheme: Annotated[str, typer.Option("--scheme", "-s", help="int8, or the smaller int4.")],
    output_layer: Annotated[str, typer.Option("--output-layer", help="keep its numbers, or int8.")] = "keep",
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="int4: a text by which weights are chosen (GPTQ). Slower.")
    ] = None,
    family: FamilyName = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", "--force", help="Replace DST if it exists.")] = False,
    yes: Yes = False,
    json_: Json = False,
) -> int:
    """Quantises; the result appears only when it is complete and read again."""
    from glmkit.export.quantized import quantize as run
    from glmkit.location import locate

    def show(done: int, of: int) -> None:
        print(f"\r{done} of {of} layers", end="\n" if done == of else "", file=sys.stderr, flush=True)

    locate(source, download=yes)
    made = run(source, target, scheme, output_layer=None if output_layer == "keep" else output_layer,
               calibration=calibration, family=family, overwrite=overwrite,
               progress=show if sys.stderr.isatty() else None)  # fmt: skip
    show_made(made, json_)
    if json_:
        return 0
    sizes = f"{in_units(made.bytes_before)} -> {in_units(made.bytes_after)}"
    logits = f", logits of a test prompt by {made.logits_error:.1%}"
    print(f"{target}: {sizes}, {made.layers} layers in {made.scheme}, {made.seconds:.0f} s")
    kept = "" if calibration is None else " (GPTQ keeps what layers compute, not the weights)"
    print(f"weights differ by {made.weight_error:.1%} of their size{kept}{logits}")
    print(f"next: glm chat {target}")
    return 0
