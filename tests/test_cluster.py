"""Rank tables of Ascend clusters: made, merged, and refused with everything that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glmkit import cli
from glmkit.cluster import check_table, file_name, make_table, merge_tables, read_table
from glmkit.errors import DataError, UsageError


def addresses(first: int, count: int = 8) -> list[str]:
    return [f"192.168.{first}.{number}" for number in range(1, count + 1)]


def test_a_table_as_the_driver_says(tmp_path: Path) -> None:
    (tmp_path / "hccn.conf").write_text(
        "".join(f"address_{number}=192.168.100.{101 + number}\n" for number in range(8))
    )
    table = make_table("[6,8)", server_ip="10.0.0.1", addresses=tmp_path / "hccn.conf")
    assert table == {
        "version": "1.0",
        "server_count": "1",
        "server_list": [
            {
                "server_id": "10.0.0.1",
                "device": [
                    {"device_id": "6", "device_ip": "192.168.100.107", "rank_id": "0"},
                    {"device_id": "7", "device_ip": "192.168.100.108", "rank_id": "1"},
                ],
                "host_nic_ip": "reserve",
            }
        ],
        "status": "completed",
    }
    assert file_name(table) == "hccl_2p_67_10.0.0.1.json"


def test_merged_ranks_count_on_and_devices_stay() -> None:
    made = [make_table("[0,8)", server_ip=f"10.0.0.{n}", device_ips=addresses(n)) for n in (1, 2)]
    made.append(make_table("[2,4)", server_ip="10.0.0.3", device_ips=addresses(3, 2)))
    merged = merge_tables(made)
    assert merged["server_count"] == "3"
    devices = [device for server in merged["server_list"] for device in server["device"]]
    assert [device["rank_id"] for device in devices] == [str(rank) for rank in range(18)]
    assert [device["device_id"] for device in devices] == [*"01234567", *"01234567", "2", "3"]
    assert [server["server_id"] for server in merged["server_list"]] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    assert made[1]["server_list"][0]["device"][0]["rank_id"] == "0"  # what was given is not changed
    assert merge_tables([merge_tables(made[:2]), made[2]]) == merged
    assert file_name(merged) == "hccl_18p_3s.json"
    with pytest.raises(DataError, match=r"server_id 10.0.0.1 stands there twice"):
        merge_tables([made[0], made[0]])
    with pytest.raises(UsageError, match="1 table to merge"):
        merge_tables(made[:1])


@pytest.mark.parametrize("devices", ["[0,9)", "[3,3)", "[5,2)", "0-8", "[0,8]", "[-1,4)", ""])
def test_ranges_that_no_machine_has(devices: str) -> None:
    with pytest.raises(UsageError, match="devices="):
        make_table(devices, server_ip="10.0.0.1", device_ips=addresses(1))


def test_addresses_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'ten' is no IP address of the server"):
        make_table("[0,1)", server_ip="ten", device_ips=["192.168.0.1"])
    with pytest.raises(UsageError, match="2 addresses for 8 devices"):
        make_table("[0,8)", server_ip="10.0.0.1", device_ips=addresses(1, 2))
    with pytest.raises(UsageError, match=r"hccn\.conf: No such file"):
        make_table("[0,8)", server_ip="10.0.0.1", addresses=tmp_path / "hccn.conf")
    (tmp_path / "hccn.conf").write_text("address_0=192.168.0.1\n")
    with pytest.raises(UsageError, match="no address of device 1, 2"):
        make_table("[0,3)", server_ip="10.0.0.1", addresses=tmp_path / "hccn.conf")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("version"), "version is missing"),
        (lambda t: t.update(server_count=1), "server_count is 1; expected '1'"),
        (lambda t: t.update(status="initializing"), "status is 'initializing'"),
        (lambda t: t["server_list"][0].update(device=[]), "server 0 has no list of devices"),
        (lambda t: t["server_list"][0].update(server_id="server"), "server_id is 'server'; expected an IP address"),
        (lambda t: t["server_list"][0]["device"][1].update(rank_id=1), "rank_id is 1; expected a number as text"),
        (lambda t: t["server_list"][0]["device"][1].update(rank_id="5"), "rank_id are 0, 5; expected 0 to 1 in order"),
        (lambda t: t["server_list"][0]["device"][1].update(device_id="0"), "device_id are 0, 0"),
        (lambda t: t["server_list"][0]["device"][1].update(device_id="8"), "device_id are 0, 8"),
        (lambda t: t["server_list"][0]["device"][1].update(device_ip="192.168.1.1"), "192.168.1.1 stands there twice"),
        (lambda t: t["server_list"][0]["device"].append(3), "a device is 3; expected an object"),
        (lambda t: t.update(server_list={}), "it has no server_list"),
    ],
)
def test_what_is_wrong_is_said(change: Any, said: str) -> None:
    table = make_table("[0,2)", server_ip="10.0.0.1", device_ips=addresses(1, 2))
    check_table(table, "it")
    change(table)
    with pytest.raises(DataError, match="rank table") as caught:
        check_table(table, "it")
    assert said in caught.value.message


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        ips = [part for ip in addresses(number, 2) for part in ("--device-ip", ip)]
        given = ["cluster", "rank-table", "[0,2)", "--server-ip", f"10.0.0.{number}", *ips, "-o", str(tmp_path)]
        assert cli.run(given) == 0
    files = capsys.readouterr().out.split()
    assert [Path(file).name for file in files] == ["hccl_2p_01_10.0.0.1.json", "hccl_2p_01_10.0.0.2.json"]
    both = tmp_path / "both.json"
    assert cli.run(["cluster", "merge", *files, "-o", str(both)]) == 0
    assert cli.run(["cluster", "merge", *files, "-o", str(both)]) == 1
    assert "both.json exists" in capsys.readouterr().err
    assert json.loads(both.read_text())["server_list"][1]["device"][1]["rank_id"] == "3"
    assert read_table(both)["server_count"] == "2"
    assert cli.run(["cluster", "check", str(both)]) == 0
    assert capsys.readouterr().out == f"{both}: 2 servers, 4 devices, ranks 0 to 3\n"
    both.write_text(both.read_text().replace('"rank_id": "3"', '"rank_id": "2"'))
    assert cli.run(["cluster", "check", str(both)]) == 1
    assert "rank_id are 0, 1, 2, 2; expected 0 to 3 in order" in capsys.readouterr().err
