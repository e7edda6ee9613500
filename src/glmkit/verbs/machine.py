"""Verbs about this machine: doctor, bench, version, cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from glmkit.errors import UsageError
from glmkit.verbs.app import (
    Json,
    Verb,
    group,
    verb,
)
from glmkit.verbs.printing import table

_cluster = group("cluster", "Write and check rank tables of Ascend clusters.")


@verb("Check this machine, and name cures.")
def doctor(
    json_: Json = False,
    fix: Annotated[
        bool, typer.Option("--fix", help="Do what is safe: make folders, remove what killed programs left.")
    ] = False,
    online: Annotated[bool, typer.Option("--online", help="Also ask whether the hub and ModelScope answer.")] = False,
) -> int:
    """Looks at the machine; the first time it also compiles the native kernels. 1 if something does not work."""
    import logging

    from glmkit.doctor.diagnosis import as_json, describe, examine, mend, worst
    from glmkit.translation import language

    told, logger = logging.StreamHandler(), logging.getLogger("glmkit")
    before = logger.level
    logger.addHandler(told)
    logger.setLevel(logging.INFO)  # compiling takes a while, and says so
    try:
        found = examine(online=online)
        if fix:
            for line in mend(found):
                print(line, file=sys.stderr)
            found = examine(online=online)
    finally:
        logger.removeHandler(told)
        logger.setLevel(before)
    print(json.dumps(as_json(found), ensure_ascii=False, indent=2) if json_ else describe(found, language()))
    return 1 if worst(found) == "fail" else 0


@verb("Measure speed and memory with random weights.")
def bench(
    presets: Annotated[
        list[str] | None,
        typer.Argument(help="chatglm3-6b (if none is named), glm-nano ...: measured by turns.", metavar="[MODEL]..."),
    ] = None,
    checkpoint: Annotated[str | None, typer.Option("--checkpoint", help="A folder instead of random weights.")] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="A slice of so many blocks; all by default.")] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme", help="int4 by default; or bf16, float32, int8, official-int8, -int4; several with commas."
        ),
    ] = None,
    output_layer: Annotated[str, typer.Option("--output-layer", help="keep, or int8.")] = "keep",
    batch: Annotated[str, typer.Option("--batch", help="Rows of decoding.")] = "1",
    context: Annotated[str, typer.Option("--context", help="Tokens in the cache while decoding; '' for none.")] = "512",
    prompt: Annotated[str, typer.Option("--prompt", help="Tokens of prompts to read; '' for none.")] = "512",
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of one repetition of decoding.")] = 16,
    repeats: Annotated[int, typer.Option("--repeats", help="Repetitions that no other process disturbed.")] = 3,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="The official way in bf16, official-int8 or -int4; or transformers' generate."),
    ] = None,
    json_: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Add the records to a file, a line each.")
    ] = None,
) -> int:
    """Measures; the table goes to standard output, what happens to standard error."""
    from glmkit.bench.run import Request
    from glmkit.bench.run import bench as run

    def numbers(flag: str, text: str) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in text.split(",") if part.strip())
        except ValueError:
            raise UsageError(f"{flag} {text}: expected whole numbers with commas, such as 1,4,16") from None

    if checkpoint is not None and presets:
        raise UsageError("--checkpoint and a model name: expected one of them")
    run(
        Request(
            presets=tuple(presets or ("chatglm3-6b",)),
            checkpoint=None if checkpoint is None else Path(checkpoint),
            layers=layers,
            schemes=tuple(part.strip() for part in (scheme or "").split(",") if part.strip()),
            output_layer=output_layer,
            batch=numbers("--batch", batch),
            context=numbers("--context", context),
            prompt=numbers("--prompt", prompt),
            tokens=tokens,
            repeats=repeats,
            baseline=baseline,
            json=None if json_ is None else Path(json_),
            command="glm " + " ".join(sys.argv[1:]),
        )
    )
    return 0


@verb("Print versions, also of what it stands on.")
def version(json_: Json = False) -> int:
    """Prints versions without importing anything heavy."""
    import platform
    from importlib import metadata

    from glmkit import __version__

    versions = {"glmkit": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "safetensors", "peft"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    print(json.dumps({"schema": 1} | versions, indent=2) if json_ else table(list(versions.items())))
    return 0


@_cluster.command("rank-table", cls=Verb, help="Write the rank table (RANK_TABLE_FILE) of this machine.")
def cluster_rank_table(
    devices: Annotated[str, typer.Argument(help="First device, and the one behind the last.", metavar="[0,8)")],
    server_ip: Annotated[
        str | None, typer.Option("--server-ip", "--server_ip", help="Address of this machine.")
    ] = None,
    device_ip: Annotated[
        list[str] | None,
        typer.Option("--device-ip", help="Once for each device; by default as /etc/hccn.conf says."),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="File or folder; by default here.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> int:
    """Makes a table and prints where it is."""
    from glmkit.cluster import make_table, write_table

    table = make_table(devices, server_ip=server_ip, device_ips=device_ip)
    print(write_table(table, output, overwrite=overwrite))
    return 0


@_cluster.command("merge", cls=Verb, help="Write one rank table of several machines; all of them use it.")
def cluster_merge(
    tables: Annotated[list[str], typer.Argument(help="The machines' tables, in the order of their ranks.")],
    output: Annotated[str | None, typer.Option("--output", "-o", help="File or folder; by default here.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> int:
    """Merges tables and prints where the result is."""
    from glmkit.cluster import merge_tables, read_table, write_table

    print(write_table(merge_tables([read_table(path) for path in tables]), output, overwrite=overwrite))
    return 0


@_cluster.command("check", cls=Verb, help="Say whether a rank table is whole.")
def cluster_check(table: Annotated[str, typer.Argument(help="The file.")]) -> int:
    """Checks a table and says what it has."""
    from glmkit.cluster import read_table

    servers = read_table(table)["server_list"]
    devices = sum(len(server["device"]) for server in servers)
    print(f"{table}: {len(servers)} servers, {devices} devices, ranks 0 to {devices - 1}")
    return 0
