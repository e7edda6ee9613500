"""Which Host and Origin headers are answered: what keeps other people's web pages away from a server on this machine.

A page can point its own name at 127.0.0.1 (DNS rebinding); then its origin equals the Host, and only a list of hosts
tells. Names of IP addresses and `localhost` cannot be forged that way; every other name has to be declared.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9.-]{1,253})(:(?P<port>[0-9]{1,5}))?")


def host_is_allowed(host: str, names: Collection[str]) -> bool:
    """Whether a Host header is answered.

    Args:
        host: The header's value.
        names: Names in lower case that are allowed beside `localhost` and IP addresses.
    """
    match = _HOST.fullmatch(host)
    if match is None or int(match["port"] or 0) > 65535:
        return False
    name = match["name"].lower()
    if name == "localhost" or name in names:
        return True
    try:
        address = ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return not address.is_unspecified and (address.version == 6) == name.startswith("[")


def origin_is_allowed(origin: str, host: str, scheme: str, origins: Collection[str]) -> bool:
    """Whether a request that a web page sent is answered.

    Args:
        origin: The Origin header's value.
        host: The Host header's value, which is allowed.
        scheme: "http" or "https", as the server was reached.
        origins: Other origins that are allowed, each exactly.
    """
    same = {f"{scheme}://{host}", f"https://{host}"}  # https: a proxy in front speaks TLS
    return origin in origins or origin.lower() in {one.lower() for one in same}
