"""Checkpoints in other layouts: transformers' own, and the original model-parallel shards."""

from __future__ import annotations

from pathlib import Path

from glmkit.errors import UsageError

LAYOUTS = ("native", "official", "shards", "folder")


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    degree: int = 1,
    bits: int | None = None,
    heads: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint in another layout.

    Args:
        source: The folder with it.
        target: The folder to make; it appears only when it is complete.
        to: "native": transformers' `glm` layout of ChatGLM2, ChatGLM3 and GLM-4; "official": back; "shards": the
            mp_rank files of GLM and GLM-130B; "folder": one folder with config.json from such shards.
        degree: Number of ranks for "shards".
        bits: 8 or 4 to quantise every rank's linears ("shards").
        heads: Attention heads of the source's model, where its shards do not say it ("folder").
        overwrite: Whether an existing target may be replaced.

    Raises:
        UsageError: There is no such layout, the source cannot have it, `bits` and `degree` are both
            given, or `heads` for another layout than "folder".
        CheckpointError: The source is damaged.
        OutputError: The target cannot be written.
    """
    from glmkit.export import model_parallel, native

    if heads is not None and to != "folder":
        raise UsageError(f"heads={heads} and to={to!r}: heads are told only for to='folder'", hint="leave out heads")
    if to == "native":
        native.to_native(source, target, overwrite=overwrite)
    elif to == "official":
        native.from_native(source, target, overwrite=overwrite)
    elif to == "folder":
        sizes = {"num_attention_heads": heads} if heads else None
        model_parallel.unshard(source, target, config=sizes, overwrite=overwrite)
    elif to != "shards":
        raise UsageError(f"to={to!r}: expected one of {', '.join(LAYOUTS)}")
    elif bits and degree != 1:
        raise UsageError(
            f"bits={bits} and degree={degree}: shards are quantised as they are",
            hint=f"first to='shards', degree={degree}, then to='shards', bits={bits} of the result",
        )
    elif bits:
        model_parallel.quantize_shards(source, target, bits, overwrite=overwrite)
    else:
        model_parallel.reshard(source, target, degree, overwrite=overwrite)
