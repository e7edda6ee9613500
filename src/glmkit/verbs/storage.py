"""Verbs for the models on this machine: pull, list, where, rm."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glmkit.errors import UsageError
from glmkit.verbs.app import Json, verb
from glmkit.verbs.printing import in_units, table

if TYPE_CHECKING:
    from glmkit.downloads import Plan
    from glmkit.inventory import StoredModel

Name = Annotated[str, typer.Argument(help="Model name such as chatglm3-6b, or hub id.", metavar="NAME")]


@verb("Fetch a model; run it again to go on, or to check the files.")
def pull(
    name: Name,
    source: Annotated[
        str | None, typer.Option("--source", help="hub, modelscope or auto; or GLMKIT_SOURCE. auto is the hub.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit.")] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="DIR", help="Into this folder, not into the cache.")] = None,
    json_: Json = False,
) -> int:
    """Fetches what is missing, checks all of it, and prints the folder."""
    from glmkit.downloads import fetch, prepare
    from glmkit.location import builtin, repository

    if (folder := _own_folder(name)) is not None:
        raise UsageError(f"{folder} is a folder on this machine: nothing is to be fetched", hint=f"glm chat {name}")
    if (packaged := builtin(name)).is_dir() and "/" not in name:
        if to:
            raise UsageError(f"{name} comes with this package", hint=f"to copy it: cp -r {packaged} {to}")
        print(f"{name} comes with this package", file=sys.stderr)
        print(json.dumps({"schema": 1, "path": str(packaged)}) if json_ else packaged)
        return 0
    plan = prepare(repository(name), source=source, revision=revision, to=Path(to).expanduser() if to else None)
    print(_announced(plan), file=sys.stderr)
    folder = fetch(plan)
    if json_:
        print(json.dumps(_as_json(plan), ensure_ascii=False, indent=2))
        return 0
    print(f"checked: {len(plan.files)} files are whole", file=sys.stderr)
    print(folder)
    print(f"next: glm chat {to or name}{_flag_that_fits(plan)}", file=sys.stderr)
    return 0


def _flag_that_fits(plan: Plan) -> str:
    """How the model has to be quantised to fit into the memory of this machine."""
    from glmkit.families import find_family
    from glmkit.inventory import choose_scheme
    from glmkit.machine import free_memory_bytes

    row = find_family(plan.repository)
    if row is None or row.sizes.get("quantization_bit"):
        return ""
    scheme = choose_scheme(_weights_bytes(plan), free_memory_bytes())
    return f" --quantize {scheme}" if scheme else ""


def _weights_bytes(plan: Plan) -> int:
    return sum(file.size_bytes for file in plan.files if file.name.endswith((".safetensors", ".bin")))


def _own_folder(name: str) -> Path | None:
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else None


def _announced(plan: Plan) -> str:
    """What a download is and what the model will need, before it begins."""
    from glmkit.families import find_family
    from glmkit.inventory import estimate_memory
    from glmkit.machine import free_memory_bytes

    row = find_family(plan.repository)
    schemes: tuple[str | None, ...] = (None,) if row and row.sizes.get("quantization_bit") else (None, "int8", "int4")
    needs = ", ".join(
        f"{in_units(estimate_memory(_weights_bytes(plan), scheme))}{f' as {scheme}' if scheme else ''}"
        for scheme in schemes
    )
    free = free_memory_bytes()
    there = "" if free is None else f"; {in_units(free)} are free"
    missing = in_units(plan.missing_bytes) if plan.missing_bytes else "nothing"
    return "\n".join(
        [
            f"{plan.repository} at {plan.commit[:12]} from {plan.source}: {len(plan.files)} files,"
            f" {in_units(plan.size_bytes)}, {missing} to fetch",
            f"into {plan.folder}",
            f"memory to chat: about {needs}{there}",
            *([f"licence: {row.licence}"] if row else []),
        ]
    )


def _as_json(plan: Plan) -> dict[str, Any]:
    return {
        "schema": 1,
        "path": str(plan.folder),
        "source": plan.source,
        "repository": plan.repository,
        "revision": plan.revision,
        "commit": plan.commit,
        "size_bytes": plan.size_bytes,
        "fetched_bytes": plan.missing_bytes,
        "files": [{"name": file.name, "size_bytes": file.size_bytes, "digest": file.digest} for file in plan.files],
    }


@verb("List the models on this machine.")
def list(json_: Json = False) -> int:
    """Lists them, with what can be called by a name first."""
    from glmkit.inventory import stored_models

    models = stored_models()
    if json_:
        print(
            json.dumps({"schema": 1, "models": [_described(model) for model in models]}, ensure_ascii=False, indent=2)
        )
        return 0
    rows = [("NAME", "IS", "WEIGHTS", "STATE", "IN", "SIZE")]
    for model in models:
        what = model.repository or model.family or "unknown"
        place = f"{model.place} {model.revision[:8]}" if model.revision else model.place
        state = "complete" if model.complete else "partial"
        rows.append((model.name, what, model.quantised or "plain", state, place, in_units(model.size_bytes)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    print(table([[cell.ljust(width) for cell, width in zip(row[:-1], widths)] + [row[-1]] for row in rows]))
    return 0


def _described(model: StoredModel) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(model) | {"path": str(model.path)}


@verb("Print the folder of a model on this machine.")
def where(name: Name) -> int:
    """Prints one path, for scripts; fetches nothing."""
    from glmkit.location import locate

    print(Path(locate(name, hub={"local_files_only": True})).absolute())
    return 0


@verb("Remove a fetched model from its cache.")
def rm(
    name: Name,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Only this commit (its beginning will do), or ModelScope branch.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json_: Json = False,
) -> int:
    """Removes it after asking; what lies in a folder of the user's is never touched."""
    from glmkit.inventory import find_stored, remove

    if (folder := _own_folder(name)) is not None:
        raise UsageError(f"{folder} is a folder of yours, not of a cache", hint=f"remove it by hand: rm -r {folder}")
    found = find_stored(name)
    chosen = [
        model
        for model in found
        if model.place in ("hub", "modelscope") and (not revision or (model.revision or "").startswith(revision))
    ]
    if not chosen:
        if found and not revision:
            remove(found[:1])  # says whose it is
        raise UsageError(
            f"{name}{f' at {revision}' if revision else ''} is in no cache of this machine",
            hint="glm list shows what is",
        )
    for model in chosen:
        print(
            f"{model.repository} {(model.revision or '')[:12]}: {in_units(model.size_bytes)}, {model.path}",
            file=sys.stderr,
        )
    if not yes and not _agreed():
        print("nothing removed", file=sys.stderr)
        return 1
    freed = remove(chosen)
    print(json.dumps({"schema": 1, "freed_bytes": freed}) if json_ else f"freed {in_units(freed)}")
    return 0


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise UsageError("nobody is there to be asked whether to remove this", hint="--yes removes it without asking")
    print("remove? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes", "是")


@verb("Print the script by which a shell completes glm.")
def completion(
    shell: Annotated[str, typer.Argument(help="bash, zsh or fish.", metavar="SHELL")],
) -> int:
    """Prints it; the head of the script says where it belongs."""
    from glmkit.completion import script

    print(script(shell), end="")
    return 0
