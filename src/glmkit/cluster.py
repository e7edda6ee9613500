"""HCCL's rank tables: the JSON files by which Ascend machines of one job find each other (RANK_TABLE_FILE).

    {"version": "1.0",
     "server_count": "1",
     "server_list": [{"server_id": "10.0.0.1",
                      "device": [{"device_id": "0", "device_ip": "192.168.100.101", "rank_id": "0"}, …],
                      "host_nic_ip": "reserve"}],
     "status": "completed"}

All values are texts. A table is made on each machine, and the tables are merged in the order of the machines: ranks are
counted on, numbers of devices stay those of their machine. Every machine gets the same merged file.

Source: what MindFormers' hccl_tools.py and merge_hccl.py write (behaviour, not code).
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glmkit.errors import DataError, OutputError, UsageError
from glmkit.writing import write_text_atomic

Table = dict[str, Any]
_DEVICES = 8  # of one machine
_RANGE = re.compile(r"\[(\d+),\s*(\d+)\)")
_ADDRESSES = re.compile(r"address_(\d+)\s*=\s*(\S+)")
_ADDRESSES_FILE = Path("/etc/hccn.conf")
_MAX_BYTES = 1 << 20
_FIELDS = ("version", "server_count", "server_list", "status")


def make_table(
    devices: str,
    *,
    server_ip: str | None = None,
    device_ips: Sequence[str] | None = None,
    addresses: Path | None = None,
) -> Table:
    """Makes the table of this machine.

    Args:
        devices: A range such as "[0,8)": the first number, and the one behind the last.
        server_ip: Address of this machine; None: the one its name stands for.
        device_ips: Address of each device of the range; None: what `addresses` says.
        addresses: The driver's file with lines `address_0=192.168.100.101`; None: /etc/hccn.conf.

    Returns:
        The table.

    Raises:
        UsageError: A range that no machine has, or no address.
    """
    found = _RANGE.fullmatch(devices.strip())
    first, end = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 <= first < end <= _DEVICES:
        raise UsageError(f"devices={devices!r}", hint=f"a range within [0,{_DEVICES}), such as [0,8) or [4,8)")
    numbers = range(first, end)
    ips = list(device_ips) if device_ips is not None else _device_ips(numbers, addresses or _ADDRESSES_FILE)
    if len(ips) != len(numbers):
        raise UsageError(
            f"{len(ips)} addresses for {len(numbers)} devices; expected one for each",
            hint="--device-ip for each device",
        )
    entries = [
        {"device_id": str(number), "device_ip": _address(ip, f"device {number}"), "rank_id": str(rank)}
        for rank, (number, ip) in enumerate(zip(numbers, ips))
    ]
    return _whole([{"server_id": _address(server_ip or _own_ip(), "the server"), "device": entries}])


def merge_tables(tables: Sequence[Table]) -> Table:
    """One table of several machines; ranks are counted on in the order given.

    Args:
        tables: Of one machine or several each, checked.

    Raises:
        DataError: A machine or a device's address stands in two of them.
        UsageError: There are fewer than two.
    """
    if len(tables) < 2:
        raise UsageError(
            f"{len(tables)} table to merge; expected two or more", hint="glm cluster merge FIRST.json SECOND.json"
        )
    servers: list[dict[str, Any]] = []
    rank = 0
    for server in (server for table in tables for server in table["server_list"]):
        devices = []
        for device in server["device"]:
            devices.append(device | {"rank_id": str(rank)})
            rank += 1
        servers.append(server | {"device": devices})
    merged = _whole(servers)
    check_table(merged, "the merged table")
    return merged


def read_table(path: str | Path) -> Table:
    """Reads and checks a table.

    Raises:
        DataError: Everything that is wrong with it.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path} is larger than any rank table", hint="a file as glm cluster rank-table writes it")
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}", hint="glm cluster rank-table makes one") from None
    check_table(table, str(path))
    checked: Table = table
    return checked


def check_table(table: Any, name: str) -> None:
    """Checks a table.

    Args:
        table: What stood in a file.
        name: What to call it in the error.

    Raises:
        DataError: Everything that is wrong with it.
    """
    problems: list[str] = []
    if not isinstance(table, Mapping) or not isinstance(table.get("server_list"), list) or not table["server_list"]:
        raise DataError(f"{name} is no rank table: it has no server_list", hint='"server_list": [{"server_id": …}]')
    problems += [f"{field} is missing" for field in _FIELDS if field not in table]
    servers = table["server_list"]
    if table.get("server_count") != str(len(servers)):
        problems.append(f"server_count is {table.get('server_count')!r}; expected {str(len(servers))!r}")
    if table.get("status") != "completed":
        problems.append(f"status is {table.get('status')!r}; expected 'completed'")
    ranks: list[str] = []
    seen: set[str] = set()
    for place, server in enumerate(servers):
        problems += _problems_of_server(server, f"server {place}", ranks, seen)
    if ranks != [str(rank) for rank in range(len(ranks))]:
        problems.append(f"rank_id are {', '.join(ranks) or 'missing'}; expected 0 to {len(ranks) - 1} in order")
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems[:20])
        raise DataError(f"{name} is no whole rank table:\n{listed}", hint="glm cluster rank-table makes one")


def write_table(table: Table, target: str | Path | None, *, overwrite: bool = False) -> Path:
    """Writes a table.

    Args:
        table: The table, checked.
        target: The file, or a folder for one with the usual name; None: that in the current folder.
        overwrite: Whether an existing file may be replaced.

    Returns:
        Where it is.

    Raises:
        OutputError: The file exists, or cannot be written.
    """
    path = Path(target) if target is not None else Path()
    if path.is_dir():
        path = path / file_name(table)
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists", hint="another name, or --overwrite")
    write_text_atomic(path, json.dumps(table, indent=4) + "\n")
    return path


def file_name(table: Table) -> str:
    """The usual name: number of devices, their numbers, and the first machine's address (merged: how many machines)."""
    servers = table["server_list"]
    count = sum(len(server["device"]) for server in servers)
    if len(servers) > 1:
        return f"hccl_{count}p_{len(servers)}s.json"
    numbers = "".join(device["device_id"] for device in servers[0]["device"])
    return f"hccl_{count}p_{numbers}_{servers[0]['server_id']}.json"


def _whole(servers: list[dict[str, Any]]) -> Table:
    listed = [{**server, "host_nic_ip": server.get("host_nic_ip", "reserve")} for server in servers]
    return {"version": "1.0", "server_count": str(len(servers)), "server_list": listed, "status": "completed"}


def _problems_of_server(server: Any, name: str, ranks: list[str], seen: set[str]) -> list[str]:
    """Notes ranks and addresses of a server, and returns what is wrong with it."""
    if not isinstance(server, Mapping) or not isinstance(server.get("device"), list) or not server["device"]:
        return [f"{name} has no list of devices"]
    problems = _problems_of_address(server.get("server_id"), f"{name}: server_id", seen)
    numbers = []
    for device in server["device"]:
        if not isinstance(device, Mapping):
            problems.append(f"{name}: a device is {device!r}; expected an object")
            continue
        for field in ("device_id", "rank_id"):
            if not isinstance(device.get(field), str) or not re.fullmatch(r"\d{1,6}", device[field]):
                problems.append(f"{name}: {field} is {device.get(field)!r}; expected a number as text")
        numbers.append(str(device.get("device_id")))
        ranks.append(str(device.get("rank_id")))
        problems += _problems_of_address(device.get("device_ip"), f"{name}: device_ip", seen)
    if len(set(numbers)) != len(numbers) or not set(numbers) <= {str(number) for number in range(_DEVICES)}:
        problems.append(f"{name}: device_id are {', '.join(numbers)}; expected different ones of 0 to {_DEVICES - 1}")
    return problems


def _problems_of_address(text: Any, name: str, seen: set[str]) -> list[str]:
    try:
        address = str(ipaddress.ip_address(text)) if isinstance(text, str) else ""
    except ValueError:
        address = ""
    if not address:
        return [f"{name} is {text!r}; expected an IP address"]
    twice = address in seen
    seen.add(address)
    return [f"{name} {address} stands there twice"] if twice else []


def _device_ips(numbers: Sequence[int], file: Path) -> list[str]:
    try:
        found = dict(_ADDRESSES.findall(file.read_text(encoding="utf-8", errors="replace")))
    except OSError as error:
        raise UsageError(
            f"the addresses of the devices are not known: {file}: {error.strerror}",
            hint="on the Ascend machine itself, or --device-ip once for each device",
        ) from None
    missing = [str(number) for number in numbers if str(number) not in found]
    if missing:
        raise UsageError(f"{file} has no address of device {', '.join(missing)}", hint="--device-ip for each device")
    return [found[str(number)] for number in numbers]


def _own_ip() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        raise UsageError("the address of this machine is not known", hint="--server-ip 10.0.0.1") from None


def _address(text: str, whose: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise UsageError(f"{text!r} is no IP address of {whose}", hint="such as 10.0.0.1") from None
