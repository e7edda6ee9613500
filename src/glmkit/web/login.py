"""Who may use the page: names and passwords, and the sessions of those who signed in.

Passwords are kept as salted hashes and compared without telling anything by time; sessions live in memory, in cookies
that no script can read and no other site can send.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import stat
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from glmkit.errors import UsageError

COOKIE = "glm-session"
SESSION_SECONDS = 7 * 24 * 3600
_MOST_SESSIONS = 10_000
_FEWEST_CHARACTERS = 8
_HINT = "openssl rand -base64 18 > password.txt && chmod 600 password.txt, then --password-file password.txt"
_FAILURES, _FAILURE_SECONDS, _MOST_ADDRESSES = 10, 60.0, 4096


class Passwords:
    """Names and their passwords.

    Args:
        lines: `name:password` each; a line without a colon is a password for the name "glm".

    Raises:
        UsageError: A password is short, or a name is there twice.
    """

    def __init__(self, lines: list[str]) -> None:
        self._salt = secrets.token_bytes(16)
        self._digests: dict[str, bytes] = {}
        for line in lines:
            name, colon, password = line.partition(":")
            name, password = (name.strip(), password) if colon else ("glm", line)
            if len(password) < _FEWEST_CHARACTERS:
                raise UsageError(f"a password has fewer than {_FEWEST_CHARACTERS} characters", hint=_HINT)
            if not name or name in self._digests:
                raise UsageError("a user name is empty or there twice; each line is name:password")
            self._digests[name] = self._digest(password)
        if not self._digests:
            raise UsageError("there is no password", hint=_HINT)

    @classmethod
    def read(cls, path: Path) -> Passwords:
        """Reads a file; empty lines and lines that begin with # do not count.

        Args:
            path: The file.

        Raises:
            UsageError: It cannot be read, others may read or write it, or it holds no password.
        """
        try:
            with path.open(encoding="utf-8") as file:
                mode = stat.S_IMODE(path.stat().st_mode)
                lines = [line.rstrip("\r\n") for line in file]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UsageError(f"cannot read the password file {path}: {reason}", hint=_HINT) from None
        if mode & (stat.S_IRWXO | stat.S_IWGRP):
            raise UsageError(f"others may read or write the password file {path}", hint=f"chmod 600 {path}")
        return cls([line for line in lines if line.strip() and not line.startswith("#")])

    def check(self, name: str, password: str) -> bool:
        """Whether somebody may sign in; all names take the same time, also those that do not exist.

        Args:
            name: What was typed.
            password: What was typed.
        """
        digest, found = self._digest(password[:1024]), False
        for known, expected in self._digests.items():
            same = hmac.compare_digest(digest, expected)
            found |= same and hmac.compare_digest(known.encode(), name.encode("utf-8", "replace"))
        return found

    def _digest(self, password: str) -> bytes:
        return hashlib.pbkdf2_hmac("sha256", password.encode("utf-8", "replace"), self._salt, 50_000)


@dataclass(frozen=True)
class _Session:
    user: str
    ends: float


class Sessions:
    """Who has signed in."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._sessions: OrderedDict[bytes, _Session] = OrderedDict()
        self._failures: OrderedDict[str, list[float]] = OrderedDict()

    def begin(self, user: str) -> str:
        """Opens a session.

        Args:
            user: Who.

        Returns:
            What the cookie holds.
        """
        token = secrets.token_urlsafe(32)
        self._sessions[_hash(token)] = _Session(user, time.monotonic() + SESSION_SECONDS)
        while len(self._sessions) > _MOST_SESSIONS:
            self._sessions.popitem(last=False)
        return token

    def user(self, token: str) -> str | None:
        """Who a cookie belongs to; None for nobody.

        Args:
            token: What it holds.
        """
        session = self._sessions.get(_hash(token))
        return session.user if session is not None and session.ends > time.monotonic() else None

    def end(self, token: str) -> None:
        """Closes a session.

        Args:
            token: What its cookie holds.
        """
        self._sessions.pop(_hash(token), None)

    def form_token(self, token: str) -> str:
        """What a page of this session has to send along with everything it changes; other sites cannot know it.

        Args:
            token: What the session's cookie holds; "" where nobody signs in.
        """
        return hmac.new(self._secret, token.encode(), "sha256").hexdigest()

    def is_form_token(self, token: str, given: str) -> bool:
        """Whether a page sent the right one.

        Args:
            token: What the session's cookie holds.
            given: What the page sent.
        """
        return hmac.compare_digest(self.form_token(token).encode(), given.encode("latin-1", "replace"))

    # --- guessing ---

    def begin_try(self, address: str) -> bool:
        """Whether an address may try another password now. A try counts as failed at once, so that many together are
        no way around.

        Args:
            address: Where it comes from.
        """
        now = time.monotonic()
        recent = [at for at in self._failures.pop(address, []) if now - at < _FAILURE_SECONDS]
        allowed = len(recent) < _FAILURES
        self._failures[address] = [*recent, now] if allowed else recent
        while len(self._failures) > _MOST_ADDRESSES:
            self._failures.popitem(last=False)
        return allowed

    def has_succeeded(self, address: str) -> None:
        """Takes back that a try failed.

        Args:
            address: Where it came from.
        """
        if self._failures.get(address):
            self._failures[address].pop()


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()
