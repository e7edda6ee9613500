"""Fetching a model: what it would take (`prepare`), and doing it (`fetch`), from the hub or from ModelScope.

There is one way to fetch: `glm pull`, `--yes` of the other verbs, and `glmkit.load` of a hub id all come here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glmkit.downloads import hub, modelscope
from glmkit.downloads.files import DownloadError, Plan, RemoteFile, Tell, check_room, choose_needed
from glmkit.downloads.progress import Progress
from glmkit.errors import UsageError

__all__ = ["SOURCES", "DownloadError", "Plan", "RemoteFile", "choose_source", "fetch", "prepare"]

ORIGIN_FILE = ".glmkit-origin.json"
SOURCES = ("auto", "hub", "modelscope")
# The organisation that has these models on ModelScope has no repositories on the hub, and the other way round.
_HUB_ORGANISATIONS, _MODELSCOPE_ORGANISATION = ("zai-org", "THUDM"), "ZhipuAI"


def choose_source(asked: str | None = None) -> str:
    """Says where models come from.

    Args:
        asked: "hub", "modelscope" or "auto"; None for what GLMKIT_SOURCE says, else "auto". That is the hub, because
            an id may mean another model elsewhere; where the hub cannot be reached the error names the other source.

    Returns:
        "hub" or "modelscope".

    Raises:
        UsageError: There is no such source.
    """
    name = "--source" if asked else "GLMKIT_SOURCE"
    asked = asked or os.environ.get("GLMKIT_SOURCE") or "auto"
    if asked not in SOURCES:
        raise UsageError(f"{name} {asked}: there is no such source", hint=", ".join(SOURCES))
    return "hub" if asked == "auto" else asked


def repository_at(source: str, repository: str) -> str:
    """The id of a repository at a source: the makers' own models are under another organisation on ModelScope.

    Args:
        source: "hub" or "modelscope".
        repository: Its id on the hub.
    """
    organisation, _, name = repository.partition("/")
    if source == "modelscope" and organisation in _HUB_ORGANISATIONS:
        return f"{_MODELSCOPE_ORGANISATION}/{name}"
    return repository


def prepare(
    repository: str,
    *,
    source: str | None = None,
    revision: str | None = None,
    to: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """Asks a source what a model is, without fetching it.

    Args:
        repository: `organisation/name`, as on the hub.
        source: "hub", "modelscope", "auto"; None for what GLMKIT_SOURCE says.
        revision: A branch, tag or commit; else the main branch.
        to: A folder to fetch into; None for the source's cache.
        options: For the hub: token, cache_dir.

    Returns:
        The plan: which files, how large, where to, and what of it is missing.

    Raises:
        DownloadError: The source cannot be reached or does not have it, or what it has is no model.
        MissingDependencyError: ModelScope's library is not installed.
        UsageError: There is no such source.
    """
    source, options = choose_source(source), dict(options or {})
    repository = repository_at(source, repository)
    if source == "modelscope":
        named = revision or "master"
        commit, listed = modelscope.list_files(repository, named)
        files = choose_needed(repository, listed)
        folder = to or modelscope.snapshot(repository, commit)
        missing = modelscope.missing_bytes(files, folder)
    else:
        named, cache_dir = revision or "main", options.get("cache_dir")
        commit, listed = hub.list_files(repository, named, options.get("token"))
        files = choose_needed(repository, listed)
        folder = to or hub.snapshot(repository, commit, cache_dir)
        missing = hub.missing_bytes(files, repository, to, cache_dir)
    return Plan(source, repository, named, commit, files, folder, to is None, missing)


def fetch(plan: Plan, *, tell: Tell | None = None, options: Mapping[str, Any] | None = None) -> Path:
    """Fetches a model: only what is missing, going on where an earlier attempt stopped, and checks every file.

    Args:
        plan: What `prepare` found.
        tell: Called with the number of bytes that are there more; None shows the progress on standard error.
        options: For the hub: token, cache_dir; the ones of `prepare`.

    Returns:
        The folder.

    Raises:
        DownloadError: There is no room, the connection broke too often, or a file arrived damaged twice; or the folder
            that was asked for holds something else.
    """
    options = dict(options or {})
    check_room(plan.folder, plan.missing_bytes)
    if not plan.in_cache:
        _claim(plan)
    progress = Progress(plan.repository, plan.size_bytes)
    try:
        if plan.source == "modelscope":
            modelscope.fetch(plan, tell or progress.tell)
        else:
            hub.fetch(plan, tell or progress.tell, options.get("token"), options.get("cache_dir"))
    finally:
        if tell is None:
            progress.finish()
    return plan.folder


def _claim(plan: Plan) -> None:
    """Notes in a folder of the user's what is fetched into it; one that holds anything else is left alone."""
    note = plan.folder / ORIGIN_FILE
    text = json.dumps({"source": plan.source, "repository": plan.repository, "revision": plan.commit}) + "\n"
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        if any(plan.folder.iterdir()) and not (note.is_file() and note.read_text(encoding="utf-8") == text):
            raise DownloadError(
                f"{plan.folder} is not empty, and what it holds is not {plan.repository} at {plan.commit[:12]}",
                hint="name an empty folder, or one that does not exist",
            )
        note.write_text(text, encoding="utf-8")
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(f"cannot write {plan.folder}: {error.strerror}", hint="name another folder") from error
