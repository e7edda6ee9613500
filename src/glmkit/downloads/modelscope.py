"""Files of ModelScope, by its own client library, into that library's cache or into a folder.

The library resumes files and compares them with the SHA-256 of the listing; both are checked here again.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glmkit.downloads.files import AGAIN, DownloadError, Plan, RemoteFile, Tell, bytes_to_fetch, is_whole
from glmkit.errors import MissingDependencyError


def cache_folder() -> Path:
    """The folder in which ModelScope's library keeps what it fetched."""
    return Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()


def entries(repository: str, cache: Path | None = None) -> list[Path]:
    """The folders in which a repository may lie in the cache: as the library writes it now, and as it did to 1.37."""
    cache = cache or cache_folder()
    owner, _, name = repository.partition("/")
    old = Path("models") / owner / name.replace(".", "___")
    return [cache / "models" / f"{owner}--{name}", cache / old, cache / "hub" / old]


def snapshot(repository: str, revision: str | None = None) -> Path:
    """The folder of one revision in the cache, whether it exists or not; an old layout has one for all."""
    new, *old = entries(repository)
    for folder in old:
        if folder.is_dir() and any(folder.iterdir()):
            return folder
    return new / "snapshots" / (revision or "master")


def list_files(repository: str, revision: str) -> tuple[str, list[RemoteFile]]:
    """Asks ModelScope what a repository has.

    Args:
        repository: `organisation/name`.
        revision: A branch, tag or commit.

    Returns:
        The revision, and its files.

    Raises:
        DownloadError: ModelScope could not be reached, or does not give what was asked for.
        MissingDependencyError: Its library is not installed.
    """
    try:
        found = _client().list_repo_files(repository, "model", revision=revision)
    except MissingDependencyError:
        raise
    except Exception as error:  # the library raises many kinds; each means that there is no model here
        raise _refused(repository, revision, error) from error
    return revision, [
        RemoteFile(file.path, int(file.size or 0), sha256=(file.sha256 or "").lower() or None)
        for file in found
        if file.type != "tree"
    ]


def missing_bytes(files: Sequence[RemoteFile], folder: Path) -> int:
    """How much of some files is not in a folder."""
    return sum(bytes_to_fetch(file, folder / file.name, folder / f"{file.name}.incomplete") for file in files)


def fetch(plan: Plan, tell: Tell) -> None:
    """Fetches what a plan says with ModelScope's library, and checks every file.

    Args:
        plan: What to fetch.
        tell: Is told of every byte that is there.

    Raises:
        DownloadError: A file could not be had whole, or not be written.
    """

    class Told:
        """What the library calls for every block."""

        def __init__(self, filename: str, file_size: int) -> None:
            pass

        def update(self, size: int) -> None:
            tell(size)

        def end(self) -> None:
            pass

    listed = [{"Path": file.name, "Size": file.size_bytes, "Sha256": file.sha256} for file in plan.files]
    folder = plan.folder
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its bars, a line for each file; `tell` shows one for all
            folder = _client().download_repo(
                plan.repository,
                "model",
                revision=plan.commit,
                local_dir=None if plan.in_cache else plan.folder,
                file_list=listed,
                progress_callbacks=[Told],
            )
    except Exception as error:
        raise _refused(plan.repository, plan.commit, error) from error
    for file in plan.files:
        if not is_whole(Path(folder) / file.name, file):
            raise DownloadError(f"{file.name} arrived damaged: it is not what ModelScope lists", hint=AGAIN)


def _client() -> Any:
    try:
        from modelscope_hub import HubApi
        from modelscope_hub.config import HubConfig
    except ImportError as error:
        raise MissingDependencyError("modelscope-hub", "modelscope") from error
    import logging

    logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
    return HubApi(config=HubConfig())  # its default is that of the first call in this process


def _refused(repository: str, revision: str, error: Exception) -> DownloadError:
    """Says why ModelScope gives nothing, and what to do about it."""
    from modelscope_hub import errors

    failed = dict(getattr(error, "failed_files", None) or {})
    if failed:
        name, cause = next(iter(failed.items()))
        reason = f"{name}: {str(cause).strip().partition(chr(10))[0]}"
        if isinstance(cause, errors.FileIntegrityError):
            reason = f"{name} arrived damaged: {str(cause).strip().partition(chr(10))[0]}"
        return DownloadError(f"cannot fetch {repository}: {reason}", hint=AGAIN)
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if isinstance(error, errors.NotExistError):
        hint = f"check the name and the revision {revision}; names differ between sources"
    elif isinstance(error, errors.AuthenticationError | errors.PermissionDeniedError):
        hint = "MODELSCOPE_API_TOKEN, or modelscope login"
    else:
        hint = "check the network; MODELSCOPE_ENDPOINT names another address, --source hub another source"
    return DownloadError(f"cannot fetch {repository} from ModelScope: {reason}", hint=hint)
