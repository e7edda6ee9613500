"""Checks of what surrounds the process: terminal, encoding, ports, clock, network."""

from __future__ import annotations

import locale
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from glmkit.doctor.finding import Finding, fail, ok, warn

PORTS = {"serve": 8000, "web": 7860}  # what the verbs take if nobody says another
HUB = "https://huggingface.co"
MODELSCOPE = "https://www.modelscope.cn"
_SECONDS = 5.0
_DAY_SECONDS = 86_400.0


def encoding() -> Finding:
    """Whether Chinese text can be printed and typed."""
    wrong = {
        name: stream.encoding
        for name, stream in (("input", sys.stdin), ("output", sys.stdout), ("errors", sys.stderr))
        if getattr(stream, "encoding", None) and stream.encoding.lower().replace("-", "") not in ("utf8", "utf8sig")
    }
    if wrong:
        said = ", ".join(f"{name} in {encoding}" for name, encoding in wrong.items())
        return warn(f"{said}: Chinese text may become question marks", "export LANG=C.UTF-8, or PYTHONUTF8=1")
    return ok(f"UTF-8; files by default {locale.getpreferredencoding(False)}")


def terminal() -> Finding:
    """Whether chatting has keys and colours."""
    if not (sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()):
        return ok("none: lines are read and written as they are")
    if os.environ.get("TERM", "dumb") == "dumb":
        return warn("TERM says that this terminal can do nothing", "export TERM=xterm-256color")
    colours = "without colours (NO_COLOR)" if os.environ.get("NO_COLOR") else "with colours"
    return ok(f"{os.environ['TERM']}, {colours}")


def ports() -> Finding:
    """Whether the ports of `glm serve` and `glm web` are free."""
    taken = [(verb, port) for verb, port in PORTS.items() if not _is_free(port)]
    if taken:
        said = " and ".join(f"{port} of glm {verb}" for verb, port in taken)
        return warn(f"something listens already on port {said}", f"glm {taken[0][0]} … --port {taken[0][1] + 1}")
    return ok(", ".join(f"{port} ({verb})" for verb, port in PORTS.items()) + " are free")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def clock() -> Finding:
    """Whether the time can be right: certificates and the order of conversations depend on it."""
    now, installed = time.time(), Path(__file__).stat().st_mtime
    said = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(now))
    if now < installed - _DAY_SECONDS:
        return warn(f"{said}: that is before this package was installed", "set the clock: timedatectl set-ntp true")
    return ok(said)


def network(online: bool) -> Finding:
    """Whether models could be fetched; somebody is contacted only if the user asked for it.

    Args:
        online: Whether to try.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB
    if not endpoint.startswith(("http://", "https://")):
        return fail(f"HF_ENDPOINT={endpoint} is no address", "HF_ENDPOINT=https://…, or unset HF_ENDPOINT")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return ok("HF_HUB_OFFLINE is set: nothing is fetched")
    if not online:
        return ok(f"{endpoint}; not contacted, glm doctor --online does")
    problems = {address: _problem(address) for address in (endpoint, MODELSCOPE)}
    said = "; ".join(f"{address}: {problem or 'reached'}" for address, problem in problems.items())
    if all(problems.values()):
        return fail(said, "check network and proxy (HTTPS_PROXY), or give glm a folder that was copied here")
    if problems[endpoint]:
        return warn(said, "glm pull --source modelscope, or HF_ENDPOINT=https://MIRROR")
    return ok(said)


def _problem(address: str) -> str | None:
    """Why an address does not answer; None if it does, whatever it says."""
    request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "glmkit"})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", None) or error) or type(error).__name__
