"""The Hugging Face hub, or a mirror that HF_ENDPOINT names: what it has, and its cache on this machine.

Listing, tokens, addresses and offline rules are those of the hub's own client, and the cache is laid out as it does.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glmkit.downloads.files import AGAIN, DownloadError, Plan, RemoteFile, Tell, bytes_to_fetch

_AT_ONCE = 4
_ID = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # of a commit, or of content; both become names in the cache


def list_files(repository: str, revision: str, token: str | None = None) -> tuple[str, list[RemoteFile]]:
    """Asks the hub what a repository has.

    Args:
        repository: `organisation/name`.
        revision: A branch, tag or commit.
        token: An access token; else the one that the client knows.

    Returns:
        The commit that the revision is now, and that commit's files.

    Raises:
        DownloadError: The hub could not be reached, or does not give what was asked for.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(token=token)
    try:
        commit = api.model_info(repository, revision=revision).sha
        assert commit is not None
        listed = api.list_repo_tree(repository, revision=commit)
        files = [_as_file(entry) for entry in listed if isinstance(entry, RepoFile)]
    except Exception as error:  # the client raises many kinds; each means that there is no model here
        raise _refused(repository, revision, error) from error
    for told in (commit, *(file.digest for file in files)):
        if not _ID.fullmatch(told):
            raise DownloadError(
                f"{api.endpoint} names what it has by {told[:80]!r}, which is no commit and no hash",
                hint="do not use this source; HF_ENDPOINT names another, or --source modelscope",
            )
    return commit, files


def _as_file(entry: Any) -> RemoteFile:
    if entry.lfs is not None:
        return RemoteFile(entry.path, entry.lfs.size, sha256=entry.lfs.sha256)
    return RemoteFile(entry.path, entry.size, git_sha1=entry.blob_id)


def cache_folder() -> Path:
    """The folder in which the hub's client keeps what it fetched.

    The client reads the environment when it is imported, and from then on its answer counts. Before that its rule is
    followed here, because listing and completion should not wait for an import.
    """
    client = sys.modules.get("huggingface_hub.constants")
    if client is not None:
        return Path(client.HF_HUB_CACHE)
    environment = os.environ
    home = environment.get("HF_HOME") or os.path.join(environment.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    folder = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(folder)))


def cache_entry(repository: str, cache_dir: str | None = None) -> Path:
    """The folder of a repository in the hub's cache, whether it exists or not."""
    return Path(cache_dir or cache_folder()).expanduser() / f"models--{repository.replace('/', '--')}"


def snapshot(repository: str, commit: str, cache_dir: str | None = None) -> Path:
    """The folder of one commit in the hub's cache, whether it exists or not."""
    return cache_entry(repository, cache_dir) / "snapshots" / commit


def missing_bytes(files: Sequence[RemoteFile], repository: str, to: Path | None, cache_dir: str | None) -> int:
    """How much of some files is neither in a folder nor, without one, in the cache."""
    return sum(bytes_to_fetch(file, *_places(file, repository, to, cache_dir)) for file in files)


def fetch(plan: Plan, tell: Tell, token: str | None, cache_dir: str | None) -> None:
    """Fetches what a plan says, takes up what an earlier attempt left, and checks every file.

    Args:
        plan: What to fetch.
        tell: Is told of every byte that is there.
        token: An access token; else the one that the client knows.
        cache_dir: The hub's cache; else the client's.

    Raises:
        DownloadError: A file could not be had whole, or not be written.
    """
    from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    from glmkit.downloads.transfer import Origin, have  # with sockets, for which no completion should wait

    headers, to = build_hf_headers(token=token), None if plan.in_cache else plan.folder
    stopped: list[bool] = []

    def one(file: RemoteFile) -> None:
        final, part = _places(file, plan.repository, to, cache_dir)
        address = hf_hub_url(plan.repository, file.name, revision=plan.commit)
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            have(file, final, part, Origin(address, headers), tell, lambda: bool(stopped))
            if to is None:
                _link(final, plan.folder / file.name)
        except DownloadError:
            raise
        except OSError as error:
            raise DownloadError(f"cannot write {final}: {error.strerror}", hint=AGAIN) from error

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        tasks = [pool.submit(one, file) for file in plan.files]
        try:
            wait(tasks, return_when=FIRST_EXCEPTION)
            for task in tasks:
                if task.done():
                    task.result()
        finally:  # also after Ctrl-C: what is on its way ends at the next block and stays as a part
            stopped.append(True)
            pool.shutdown(cancel_futures=True)
    if to is None:
        _write_ref(plan, cache_dir)


def _places(file: RemoteFile, repository: str, to: Path | None, cache_dir: str | None) -> tuple[Path, Path]:
    """Where a file goes, and where it grows until it is whole: in the cache under the name of its content."""
    if to is not None:
        return to / file.name, to / f".{file.name}.incomplete"
    blobs = cache_entry(repository, cache_dir) / "blobs"
    return blobs / file.digest, blobs / f"{file.digest}.incomplete"


def _beside(path: Path) -> Path:
    """A name that no other process uses, for what is renamed to `path` when it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.new")


def _link(blob: Path, name: Path) -> None:
    """Puts a blob into a snapshot as the client does: a relative link, or the file itself where there are no links."""
    name.parent.mkdir(parents=True, exist_ok=True)
    if name.exists() and name.resolve() == blob.resolve():
        return
    fresh = _beside(name)
    try:
        fresh.symlink_to(os.path.relpath(blob, name.parent))
    except OSError:
        os.link(blob, fresh)
    os.replace(fresh, name)


def _write_ref(plan: Plan, cache_dir: str | None) -> None:
    """Notes which commit a branch or tag is, so that it is found without the hub."""
    if plan.revision == plan.commit:
        return
    ref = cache_entry(plan.repository, cache_dir) / "refs" / plan.revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    fresh = _beside(ref)
    fresh.write_text(plan.commit)
    os.replace(fresh, ref)


def _refused(repository: str, revision: str, error: Exception) -> DownloadError:
    """Says why the hub gives nothing, and what to do about it."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repository}"
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        reason, hint = (
            "access to it has to be asked for",
            f"accept its licence on {page}, then hf auth login or HF_TOKEN",
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        reason, hint = f"it has no revision {revision}", f"the branches and tags are on {page}/tree/main"
    elif isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        reason, hint = "there is no such repository, or it is private", "check the name; for a private one HF_TOKEN"
    elif isinstance(error, errors.OfflineModeIsEnabled):
        reason, hint = "HF_HUB_OFFLINE forbids it", "HF_HUB_OFFLINE=0, or the path of a folder that is on this machine"
    else:
        reason = f"{constants.ENDPOINT} cannot be reached: {reason}" if status is None else reason
        hint = (
            "without a way to the hub: glm pull MODEL --source modelscope (GLMKIT_SOURCE=modelscope for all verbs), or"
            " HF_ENDPOINT with the address of a mirror"
        )
    return DownloadError(f"cannot fetch {repository}: {reason}", hint=hint)
