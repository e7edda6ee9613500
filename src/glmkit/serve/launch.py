"""From the flags of `glm serve` to a server that runs: keys, settings, the model and its application."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from glmkit.errors import UsageError
from glmkit.location import locate
from glmkit.serve.logs import Journal
from glmkit.serve.server import Service, run
from glmkit.serve.settings import ApiKey, Settings, read_key_file

KEY_VARIABLE = "GLMKIT_API_KEY"
_WHOLE_PROMPT_STALL_SECONDS = 120.0  # a model that reads a prompt in one call makes no progress in between


def read_keys(file: str | None, typed: str | None) -> tuple[ApiKey, ...]:
    """Collects API keys from a file, from the environment and from the command line.

    Args:
        file: File with a key a line.
        typed: A key that was typed as a flag.

    Returns:
        All of them. The environment variable is removed, so that no child process has it.

    Raises:
        UsageError: A key or the file is not as it should be.
    """
    keys: list[ApiKey] = []
    warnings: list[str] = []
    if file is not None:
        found, warnings = read_key_file(Path(file))
        keys += found
    if variable := os.environ.pop(KEY_VARIABLE, None):
        keys.append(ApiKey.of(variable))
    if typed is not None:
        keys.append(ApiKey.of(typed))
        warnings.append(f"--api-key shows the key in lists of processes; --api-key-file FILE or {KEY_VARIABLE} do not")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return tuple(dict.fromkeys(keys))


def launch(
    model: str, settings: Settings, *, name: str | None, loading: Mapping[str, Any], engine: Mapping[str, Any]
) -> NoReturn:
    """Serves a model until the process is told to end.

    Args:
        model: Folder, name or hub id.
        settings: Address, keys, limits and deadlines.
        name: What clients call the model; None: the last part of `model`.
        loading: Arguments of `glmkit.load`.
        engine: Arguments of `BatchEngine`.

    Raises:
        GlmkitError: The model is not there or cannot be loaded, or the address cannot be listened on.
    """
    locate(model, download=bool(loading.get("download")))
    called = name or Path(model.rstrip("/")).name
    if settings.log_prompts:
        print("warning: --log-prompts writes what clients send to the log", file=sys.stderr)

    def load(journal: Journal) -> Service:
        from glmkit.chat.following import serve
        from glmkit.engine.layout import reads_whole_prompts
        from glmkit.loading import load as load_model
        from glmkit.serve.app import create_app

        loaded = load_model(model, **loading)
        served = serve(loaded, called, **engine)
        mine = settings
        if reads_whole_prompts(loaded.model):
            mine = replace(settings, stall_seconds=max(settings.stall_seconds, _WHOLE_PROMPT_STALL_SECONDS))
        try:
            app = create_app(served, mine, journal)
        except UsageError:
            served.close()
            raise
        return Service(app, {called: served})

    run(load, settings)
