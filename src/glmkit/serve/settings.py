"""What a server was started with: addresses, keys, limits and deadlines. Checked once, never changed."""

from __future__ import annotations

import hashlib
import ipaddress
import re
import secrets
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from glmkit.errors import UsageError

_NEW_KEY_HINT = "openssl rand -hex 24 > keys.txt && chmod 600 keys.txt, then --api-key-file keys.txt"


@dataclass(frozen=True)
class ApiKey:
    """One key, of which only the SHA-256 is kept.

    Args:
        digest: SHA-256 of the key's UTF-8 bytes.
    """

    digest: bytes

    @classmethod
    def of(cls, text: str) -> ApiKey:
        """Hashes a key as it was typed.

        Args:
            text: The key.

        Raises:
            UsageError: It is empty, short, or holds what an Authorization header cannot carry.
        """
        if not re.fullmatch(r"[\x21-\x7e]{8,256}", text):
            raise UsageError(
                "an API key has to be 8 to 256 visible ASCII characters without spaces", hint=f"new: {_NEW_KEY_HINT}"
            )
        return cls(hashlib.sha256(text.encode()).digest())

    @property
    def owner(self) -> str:
        """What stands for the key in logs and divides caches: never enough to guess it from."""
        return self.digest.hex()[:12]


@dataclass(frozen=True)
class Settings:
    """What one server may do. Every field has a default that is safe on a machine with other users.

    Args:
        host: Address to listen on. One that is not loopback needs `api_keys`.
        port: TCP port; 0 takes a free one.
        api_keys: Who may use it; empty: everybody who reaches the loopback address.
        allowed_hosts: Names in the Host header beside `localhost`, IP addresses and `host` itself.
        cors_origins: Web pages of other origins that may read answers, as `https://chat.example.org`.
        max_body_bytes: Longest request body.
        max_header_bytes: Longest head of a request, all header lines together.
        max_connections: Open connections; beyond it the longest idle one is closed.
        header_seconds: How long a connection may take to send the head of a request.
        body_seconds: How long it may then take to send the body.
        write_seconds: How long a client may leave sent bytes unread.
        idle_seconds: How long a connection stays open between two requests.
        waiting_seconds: How long a request may wait for its first token.
        request_seconds: How long a request may take altogether.
        drain_seconds: How long running requests may go on after SIGTERM.
        stall_seconds: How long an engine with work may make no progress before `/ready` says so.
        requests_per_minute: Requests for answers that one key may send; None: any number.
        tokens_per_minute: Tokens of prompts and answers that one key may use; None: any number.
        log_prompts: Write request bodies to the log.
        store: Folder of stored completions; None: nothing is stored.

    Raises:
        UsageError: A combination that is not safe or cannot work.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[ApiKey, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 2**20
    max_header_bytes: int = 32 * 2**10
    max_connections: int = 512
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 30.0
    idle_seconds: float = 30.0
    waiting_seconds: float = 120.0
    request_seconds: float = 600.0
    drain_seconds: float = 30.0
    stall_seconds: float = 10.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    log_prompts: bool = False
    store: Path | None = None

    def __post_init__(self) -> None:
        if not self.api_keys and not is_loopback(self.host):
            raise UsageError(
                f"--host {self.host} can be reached by other machines, and there is no API key", hint=_NEW_KEY_HINT
            )
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port} does not exist", hint="0 to 65535; 0 takes a free one")
        for origin in self.cors_origins:
            _check_origin(origin)
        for name in self.allowed_hosts:
            if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?", name):
                raise UsageError(f"--allowed-host {name!r} is not a host name", hint="such as api.example.org")
        for field in _POSITIVE:
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise UsageError(f"{field} has to be above 0, not {value}")
        if self.drain_seconds < 0:
            raise UsageError(f"drain_seconds has to be 0 or more, not {self.drain_seconds}")


_POSITIVE = (
    "max_body_bytes",
    "max_header_bytes",
    "max_connections",
    "header_seconds",
    "body_seconds",
    "write_seconds",
    "idle_seconds",
    "waiting_seconds",
    "request_seconds",
    "stall_seconds",
    "requests_per_minute",
    "tokens_per_minute",
)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    Args:
        host: IP address or name to listen on. Names other than localhost count as reachable.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def matching_key(keys: Iterable[ApiKey], presented: bytes) -> ApiKey | None:
    """Finds the key that somebody presented, in a time that tells nothing about the keys.

    Args:
        keys: The keys that are valid. All of them are compared, also after a hit.
        presented: What came with the request.

    Returns:
        The key, or None.
    """
    digest = hashlib.sha256(presented).digest()
    found = None
    for key in keys:
        if secrets.compare_digest(key.digest, digest):
            found = key
    return found


def read_key_file(path: Path) -> tuple[tuple[ApiKey, ...], list[str]]:
    """Reads API keys, one a line; empty lines and lines that begin with # do not count.

    Args:
        path: The file.

    Returns:
        The keys, and warnings about the file.

    Raises:
        UsageError: The file cannot be read, others may write it, or it holds no key.
    """
    try:
        with path.open(encoding="utf-8") as file:
            mode = stat.S_IMODE(path.stat().st_mode)
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"cannot read the key file {path}: {reason}", hint=_NEW_KEY_HINT) from None
    if mode & stat.S_IWOTH:
        raise UsageError(f"everybody on this machine may write the key file {path}", hint=f"chmod 600 {path}")
    keys = tuple(ApiKey.of(line) for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UsageError(f"the key file {path} holds no key", hint=_NEW_KEY_HINT)
    readable = mode & stat.S_IROTH
    return keys, [f"everybody on this machine may read the key file {path}; chmod 600 {path}"] if readable else []


def _check_origin(origin: str) -> None:
    if origin == "*":
        raise UsageError(
            "--cors-origin * would let every page somebody visits use this server",
            hint="name the pages that may, such as https://chat.example.org",
        )
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.hostname or f"{parts.scheme}://{parts.netloc}" != origin:
        raise UsageError(f"--cors-origin {origin!r} is not an origin", hint="such as https://chat.example.org")
