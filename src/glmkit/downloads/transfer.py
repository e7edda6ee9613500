"""One file from its address to the disk: in parts, over several attempts, by safe redirects, compared with its hash.

The hub's own client begins a file anew after its process was killed, and a file here has up to ten gigabytes.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from glmkit.downloads.files import AGAIN, DownloadError, RemoteFile, Tell, hash_part, is_whole, new_hash

_REDIRECTS = 5
_ATTEMPTS = 5  # without a byte between them
_WAIT_SECONDS = (0.2, 1.0, 3.0, 10.0)


def have(
    file: RemoteFile, final: Path, part: Path, origin: Origin, tell: Tell, stop: Callable[[], bool] = lambda: False
) -> None:
    """Makes a file be there and whole; one that is damaged, or whose part turns out to be, is fetched once more.

    Args:
        file: What it must be.
        final: Its place.
        part: Where it grows until it is whole; one that an earlier attempt left is gone on with.
        origin: Where it comes from.
        tell: Is told of every byte that is there.
        stop: Whether to give up, asked before each block; the part stays.

    Raises:
        DownloadError: It could not be had whole.
        OSError: It cannot be written.
    """
    with _only_one(part):
        if is_whole(final, file):
            tell(file.size_bytes)
        else:
            _replace(file, final, part, origin, tell, stop)


@contextlib.contextmanager
def _only_one(part: Path) -> Iterator[None]:
    """Two commands that fetch the same file wait for each other."""
    from filelock import FileLock

    lock = part.with_name(f".{part.name}.lock")
    with FileLock(str(lock)):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _replace(file: RemoteFile, final: Path, part: Path, origin: Origin, tell: Tell, stop: Callable[[], bool]) -> None:
    for last in (False, True):
        digest = _grow(file, part, origin, tell, stop)
        if not file.digest or digest == file.digest:
            os.replace(part, final)
            return
        part.unlink()
        tell(-file.size_bytes)
        if last:
            raise DownloadError(
                f"{file.name} arrived damaged twice: its SHA is {digest[:12]}…, expected {file.digest[:12]}…",
                hint="the source or a proxy changes files: try HF_ENDPOINT, --source modelscope, another network",
            )


def _grow(file: RemoteFile, part: Path, origin: Origin, tell: Tell, stop: Callable[[], bool]) -> str:
    """Fetches what is missing at the end of a part, as often as the connection breaks.

    Returns:
        The hash of all of it.
    """
    if part.exists() and part.stat().st_size > file.size_bytes:
        part.unlink()
    part.touch()
    digest, there = hash_part(part, file), part.stat().st_size
    tell(there)
    failures = 0
    while there < file.size_bytes:
        before, problem = there, "the connection was closed"
        try:
            with origin.opened(there) as (blocks, begins), open(part, "ab") as stream:
                if begins != there:  # the whole file, because this server knows no parts
                    stream.truncate(0)
                    tell(-there)
                    digest, there = new_hash(file), 0
                for block in blocks:
                    if stop():
                        raise DownloadError("stopped", hint=AGAIN)
                    block = block[: file.size_bytes - there]
                    stream.write(block)
                    digest.update(block)
                    there += len(block)
                    tell(len(block))
        except OSError:  # the disk's; the client's errors are no OSErrors
            raise
        except Exception as error:
            problem = str(error).strip().partition("\n")[0] or type(error).__name__
        failures = 1 if there > before else failures + 1
        if there < file.size_bytes:
            if failures >= _ATTEMPTS:
                raise DownloadError(
                    f"{file.name}: {problem}, at {there:,} of {file.size_bytes:,} bytes, {failures} times", hint=AGAIN
                )
            _wait(_WAIT_SECONDS[failures - 1], stop)
    return digest.hexdigest()


def _wait(seconds: float, stop: Callable[[], bool]) -> None:
    """Lets some time pass before the next attempt, of which there is none after Ctrl-C."""
    until = time.monotonic() + seconds
    while not stop() and time.monotonic() < until:
        time.sleep(0.05)
    if stop():
        raise DownloadError("stopped", hint=AGAIN)


class Origin:
    """The address of a file, with the rules for where a redirect may lead."""

    def __init__(self, address: str, headers: dict[str, str]) -> None:
        self._address, self._headers = address, headers

    @contextlib.contextmanager
    def opened(self, from_byte: int) -> Iterator[tuple[Iterator[bytes], int]]:
        """Asks for the file from some byte on; gives its blocks, and the byte that they really begin with."""
        from huggingface_hub import constants, get_session

        address = self._address
        headers = {**self._headers, "Accept-Encoding": "identity"}
        if from_byte:
            headers["Range"] = f"bytes={from_byte}-"
        for _ in range(_REDIRECTS):
            with get_session().stream(
                "GET", address, headers=headers, follow_redirects=False, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            ) as answer:
                if answer.status_code in (301, 302, 303, 307, 308):
                    target = urljoin(address, answer.headers.get("location", ""))
                    check_redirect(address, target)
                    if urlsplit(target).netloc != urlsplit(self._address).netloc:
                        headers.pop("authorization", None)  # a storage server must not see the token
                    address = target
                    continue
                if answer.status_code not in (200, 206):
                    kind = _Broken if answer.status_code >= 500 or answer.status_code == 429 else DownloadError
                    raise kind(f"{urlsplit(address).netloc} answered {answer.status_code} for {self._address}")
                yield answer.iter_bytes(), from_byte if answer.status_code == 206 else 0
                return
        raise DownloadError(f"{self._address}: more than {_REDIRECTS} redirects")


class _Broken(Exception):
    """An answer after which it is worth to ask again."""


def check_redirect(address: str, target: str) -> None:
    """Refuses redirects by which a server could make this machine ask its own network, or read its own files.

    Args:
        address: What was asked.
        target: Where the answer points.

    Raises:
        DownloadError: It is no http(s) address, it gives up encryption, it is on this machine or in its network
            although what was asked is not, or it is a link-local address, where clouds keep credentials.
    """
    old, new = urlsplit(address), urlsplit(target)
    reason = ""
    if new.scheme not in ("http", "https") or not new.hostname:
        reason = "only http and https are followed"
    elif old.scheme == "https" and new.scheme == "http":
        reason = "it would give up encryption"
    elif new.hostname != old.hostname:
        kinds = set(map(_kind, _addresses(new.hostname)))
        if "link-local" in kinds:
            reason = "it is a link-local address"
        elif "local" in kinds and "local" not in set(map(_kind, _addresses(old.hostname or ""))):
            reason = "it is an address of this machine or its network"
    if reason:
        shown = f"{new.scheme}://{new.netloc}"
        raise DownloadError(
            f"{old.netloc} redirects to {shown}: {reason}",
            hint="do not use this source; HF_ENDPOINT names another, or --source modelscope",
        )


def _addresses(host: str) -> set[str]:
    try:
        return {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return set()  # behind a proxy names need not be known here


def _kind(address: str) -> str:
    number = ipaddress.ip_address(address)
    number = getattr(number, "ipv4_mapped", None) or number
    if number.is_link_local or number.is_unspecified:
        return "link-local"
    return "global" if number.is_global else "local"
