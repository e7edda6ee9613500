"""The one door for checkpoints: folder or file in, folder or file out, opened again and compared before it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmkit.errors import UsageError
from glmkit.runtime.exported import refuse

if TYPE_CHECKING:
    from glmkit.export.folders import Converted
    from glmkit.export.merge import Merged
    from glmkit.export.quantized import Quantized

FORMS = {
    "official": "a folder of safetensors with the official names; also from shards, bare files and .bin",
    "native": "transformers' own glm layout, which vLLM, SGLang and mlx-lm read",
    "shards": "mp_rank files of GLM and GLM-130B, --degree of them, in --bits",
    "file": "one state dict: a .pth, .bin or .safetensors file",
    "mindformers": "one .ckpt, .npz or .safetensors file with MindFormers' names",
    "merged": "base and --adapter as one folder; glm merge is short for it",
    "int8": "our int8 format; glm quantize is short for it",
    "int4": "our int4 format",
}
"""What a checkpoint can be written as, and what that is."""
_TAKES = {  # which options mean something for which form
    "like": ("official", "native", "file", "mindformers"),
    "dtype": ("official", "native", "file", "mindformers", "merged"),
    "shard_bytes": ("official", "native"),
    "keep_code": ("official", "merged"),
    "family": ("official", "native", "file", "mindformers", "merged", "int8", "int4"),
    "degree": ("shards",),
    "bits": ("shards",),
    "heads": ("official",),
    "adapter": ("merged",),
    "dequantize": ("merged",),
}


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    like: str | Path | None = None,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    dequantize: bool = False,
    degree: int | None = None,
    bits: int | None = None,
    heads: int | None = None,
    family: str | None = None,
    keep_code: bool = False,
    overwrite: bool = False,
) -> Converted | Merged | Quantized:
    """Writes a checkpoint in another form; it appears only when it is complete, opened again and compared.

    Args:
        source: A folder, a model name or hub id; or a bare file of weights.
        target: The folder or file to make.
        to: A name of `FORMS`; "folder" is taken for "official".
        like: For a bare file: the folder whose config.json and tokenizer belong to it.
        adapter: Folder of the adapter ("merged").
        dtype: "auto", "float32", "bfloat16" or "float16"; None is "auto".
        shard_bytes: The most tensor data in one file.
        dequantize: Whether a quantised base may be written in 16 bit ("merged").
        degree: Number of ranks ("shards"); None is 1.
        bits: 8 or 4 to quantise every rank's linears ("shards").
        heads: Attention heads of the source's model, where its shards do not say it ("official").
        family: What the source is, if it does not say it.
        keep_code: Whether the source's python files go along, unchanged and never run.
        overwrite: Whether an existing target may be replaced.

    Returns:
        What was done; its fields `path`, `difference` (quantised: `logits_error`) and `notes` are always there.

    Raises:
        UsageError: There is no such form, the source cannot have it, or an option is none of this form's.
        CheckpointError: The source is damaged.
        OutputError: The target cannot be written, or is not what its source is.
    """
    to = "official" if to == "folder" else to
    if to not in FORMS:
        raise UsageError(f"to={to!r}: expected one of {', '.join(FORMS)}")
    options: dict[str, Any] = {
        "like": like, "adapter": adapter, "dtype": dtype, "shard_bytes": shard_bytes, "degree": degree, "bits": bits,
        "heads": heads, "family": family, "dequantize": dequantize or None, "keep_code": keep_code or None,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if to not in _TAKES[name]:
            raise UsageError(
                f"{name}={value} and to={to!r}: {name} is told only for to={' or '.join(map(repr, _TAKES[name]))}",
                hint=f"leave out {name}",
            )
    if to not in _TAKES["like"] and Path(source).expanduser().is_file():
        refuse(source)
        raise UsageError(
            f"{source} is a bare file of weights, and to={to!r} takes a folder",
            hint="first: glm convert SRC FOLDER --to official --like DIR",
        )
    return _FORMS[to](source, target, given | {"overwrite": overwrite})


def _official(source: Any, target: Any, given: dict[str, Any]) -> Converted:
    from glmkit.export import model_parallel, native, official

    file = Path(source).expanduser()
    if not file.is_file() and model_parallel.is_model_parallel(source):
        heads = given.pop("heads", None)
        foreign = [name for name in ("like", "family", "keep_code") if name in given]
        if foreign:
            raise UsageError(f"{foreign[0]} and a source of shards", hint=f"leave out {foreign[0]}")
        sizes = {"num_attention_heads": heads} if heads else None
        return model_parallel.unshard(source, target, config=sizes, **given)
    if "heads" in given:
        raise UsageError(
            f"heads={given['heads']} is for shards that do not say it; {source} has a config.json",
            hint="leave out heads",
        )
    if not file.is_file() and native.is_native_folder(source):
        foreign = [name for name in ("like", "family", "keep_code") if name in given]
        if foreign:
            raise UsageError(f"{foreign[0]} and a source in the native layout", hint=f"leave out {foreign[0]}")
        return native.from_native(source, target, **given)
    return official.to_official(source, target, **given)


def _native(source: Any, target: Any, given: dict[str, Any]) -> Converted:
    from glmkit.export import native

    return native.to_native(source, target, **given)


def _shards(source: Any, target: Any, given: dict[str, Any]) -> Converted:
    from glmkit.export import model_parallel

    degree, bits = given.pop("degree", 1), given.pop("bits", None)
    if bits and degree != 1:
        raise UsageError(
            f"bits={bits} and degree={degree}: shards are quantised as they are",
            hint=f"first to='shards', degree={degree}, then to='shards', bits={bits} of the result",
        )
    if bits:
        return model_parallel.quantize_shards(source, target, bits, **given)
    return model_parallel.reshard(source, target, degree, **given)


def _file(source: Any, target: Any, given: dict[str, Any]) -> Converted:
    from glmkit.export import official

    return official.to_file(source, target, **given)


def _mindformers(source: Any, target: Any, given: dict[str, Any]) -> Converted:
    from glmkit.export import official

    return official.to_file(source, target, mindformers=True, **given)


def _merged(source: Any, target: Any, given: dict[str, Any]) -> Merged:
    from glmkit.export.merge import merge

    if "adapter" not in given:
        raise UsageError("to='merged' merges a base with an adapter", hint="--adapter FOLDER (adapter=)")
    return merge(source, given.pop("adapter"), target, **given)


def _quantized(scheme: str) -> Any:
    def run(source: Any, target: Any, given: dict[str, Any]) -> Quantized:
        from glmkit.export.quantized import quantize

        return quantize(source, target, scheme, **given)

    return run


_FORMS: dict[str, Any] = {
    "official": _official,
    "native": _native,
    "shards": _shards,
    "file": _file,
    "mindformers": _mindformers,
    "merged": _merged,
    "int8": _quantized("int8"),
    "int4": _quantized("int4"),
}
