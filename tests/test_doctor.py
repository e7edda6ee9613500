"""`glm doctor`: what it finds on machines that are written down here, and a hint for each thing to improve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import glmkit
from glmkit import cli, doctor
from glmkit.errors import UsageError
from glmkit.kernels.build import Status

NATIVE = Status(
    level="avx512",
    why="the best this CPU can run",
    hint=None,
    path=Path("/cache/kernels/glm-avx512.so"),
    features=("avx2", "avx512f"),
    compiler="g++ 12.2.0",
    openmp=True,
    threads=4,
)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Four cores with two hardware threads each, 64 GB, and nothing to improve."""
    for name in ("OMP_NUM_THREADS", "GLMKIT_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "_SYSTEM", tmp_path / "sys")
    monkeypatch.setattr(doctor, "_PROCESSES", tmp_path / "proc")
    for i in range(8):
        write(tmp_path, f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list", f"{i % 4},{i % 4 + 4}\n")
    write(tmp_path, "sys/devices/system/node/node0/cpulist", "0-7\n")
    write(tmp_path, "sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
    write(tmp_path, "proc/cpuinfo", "processor\t: 0\nmodel name\t: Fast CPU 9\n")
    write(tmp_path, "proc/meminfo", "MemTotal:       64000000 kB\nMemFree: 1 kB\nMemAvailable:   32000000 kB\n")
    write(tmp_path, "proc/self/maps", "7f00-7f01 r-xp 0 0 0 /site/torch/lib/libgomp.so.1\n7f02-7f03 rw-p 0 0 0\n")
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    have(monkeypatch, NATIVE)
    return tmp_path


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def have(monkeypatch: pytest.MonkeyPatch, status: Status) -> None:
    monkeypatch.setattr(doctor.build, "status", lambda: status)


def only_hint() -> str:
    (hint,) = doctor.diagnose()["hints"]
    assert isinstance(hint, str)
    return hint


# --- facts ---


def test_what_it_finds() -> None:
    found = doctor.diagnose()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["glmkit"] == glmkit.__version__
    assert found["cpu"] == {
        "name": "Fast CPU 9", "architecture": "x86_64", "cores": 4, "hardware_threads": 8, "quota": None,
    }  # fmt: skip
    assert found["memory_bytes"] == {"total": 64_000_000 * 1024, "available": 32_000_000 * 1024}
    assert (found["huge_pages"], found["numa_nodes"], found["torch_threads"]) == ("madvise", 1, 4)
    assert (found["openmp"], found["devices"], found["hints"]) == (["libgomp.so.1"], [], [])
    assert found["kernels"] == {
        "level": "avx512", "why": "the best this CPU can run", "hint": None, "path": "/cache/kernels/glm-avx512.so",
        "features": ("avx2", "avx512f"), "compiler": "g++ 12.2.0", "openmp": True, "threads": 4, "problem": None,
    }  # fmt: skip
    assert json.loads(json.dumps(found))["runs_on"].keys() == {"int8, int4", "float"}
    lines = doctor.describe(found).splitlines()
    for line in (
        "CPU         Fast CPU 9 (x86_64): 4 cores, 8 hardware threads",
        "threads     torch uses 4",
        "memory      65.5 GB, 32.8 GB available",
        "kernels     avx512: the best this CPU can run",
        "library     /cache/kernels/glm-avx512.so",
        "int8, int4  avx512 kernels, if the model computes in bfloat16 or float16; in float32 torch, exactly",
        "nothing to improve",
    ):
        assert line in lines


def test_only_what_the_process_may_use_counts(monkeypatch: pytest.MonkeyPatch, machine: Path) -> None:
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: {0, 1, 4}, raising=False)
    write(machine, "sys/fs/cgroup/cpu.max", "150000 100000\n")
    found = doctor.cpu()
    assert (found["cores"], found["hardware_threads"], found["quota"]) == (2, 3, 1.5)
    assert "of which a container may use 1.5" in doctor.describe(doctor.diagnose())


def test_a_machine_that_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_SYSTEM", tmp_path / "none")
    monkeypatch.setattr(doctor, "_PROCESSES", tmp_path / "none")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    found = doctor.diagnose()
    assert found["cpu"]["name"]
    assert found["cpu"]["cores"] == 8
    assert found["memory_bytes"] == {"total": None, "available": None}
    assert (found["huge_pages"], found["numa_nodes"], found["hints"]) == (None, 1, [])
    assert "memory      unknown, unknown available" in doctor.describe(found)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory = "H9", 141_000_000_000

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    found = doctor.diagnose()
    assert found["devices"] == [{"name": f"cuda:{i} H9", "memory_bytes": 141_000_000_000} for i in range(2)]
    assert "devices     cuda:0 H9 (141.0 GB), cuda:1 H9 (141.0 GB)" in doctor.describe(found)


# --- hints ---


@pytest.mark.parametrize(
    ("given", "threads", "hint"),
    [
        (None, 8, "torch uses 8 threads on 4 cores, they take turns: OMP_NUM_THREADS=4"),
        ("8", 8, "torch uses 8 threads on 4 cores, they take turns: OMP_NUM_THREADS=4"),
        ("1", 1, "OMP_NUM_THREADS=1: torch uses 1 of 4 cores: OMP_NUM_THREADS=4"),
        (None, 2, "torch uses 2 of 4 cores: OMP_NUM_THREADS=4"),
        ("many", 4, "OMP_NUM_THREADS=many is no number of threads: OMP_NUM_THREADS=4"),
        ("0", 4, "OMP_NUM_THREADS=0 is no number of threads: OMP_NUM_THREADS=4"),
    ],
)
def test_threads(monkeypatch: pytest.MonkeyPatch, given: str | None, threads: int, hint: str) -> None:
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert only_hint() == hint


def test_a_container_with_less_than_its_cores(machine: Path) -> None:
    write(machine, "sys/fs/cgroup/cpu.max", "250000 100000\n")
    assert only_hint() == (
        "torch uses 4 threads on 2 cores that the container may use, they take turns: OMP_NUM_THREADS=2"
    )
    write(machine, "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert doctor.diagnose()["hints"] == []


def test_two_openmp_libraries(machine: Path) -> None:
    write(machine, "proc/self/maps", "1-2 r-xp 0 0 0 /a/libgomp.so.1\n3-4 r-xp 0 0 0 /b/libomp.so.5\n")
    assert only_hint().startswith("libgomp.so.1 and libomp.so.5 are loaded")


def test_huge_pages_and_nodes(machine: Path) -> None:
    write(machine, "sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n")
    assert "echo madvise | sudo tee" in only_hint()
    write(machine, "sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never\n")
    write(machine, "sys/devices/system/node/node1/cpulist", "\n")
    assert "memory is divided over 2 nodes" in only_hint()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "avx2, portable: there is no C++ compiler"
    none = replace(NATIVE, level="torch", why=why, hint="apt install g++", path=None, compiler=None, openmp=False)
    have(monkeypatch, none)
    assert only_hint() == f"no native kernels ({why}): apt install g++"
    told = doctor.describe(doctor.diagnose())
    assert "int8, int4  torch, which makes a float matrix of them at each product" in told
    assert "library     none" in told


def test_a_level_that_fell_back_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, replace(NATIVE, why="amx: the library does not work here: SIGILL", hint="delete it"))
    assert only_hint() == "amx: the library does not work here: SIGILL: delete it"
    have(monkeypatch, replace(NATIVE, openmp=False))
    assert only_hint().startswith("the kernels use one thread, g++ 12.2.0 has no OpenMP")


def test_a_level_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMKIT_KERNELS", "avx2")
    assert only_hint() == "GLMKIT_KERNELS=avx2 is set: without it the best level is taken"

    def refuse() -> Status:
        raise UsageError("GLMKIT_KERNELS=avx2: this CPU has no fma", hint="this CPU can run portable")

    monkeypatch.setattr(doctor.build, "status", refuse)
    assert only_hint() == "GLMKIT_KERNELS=avx2: this CPU has no fma; this CPU can run portable"
    found = doctor.diagnose()
    assert (found["kernels"]["level"], found["runs_on"]) == (None, {})
    assert "kernels     none: GLMKIT_KERNELS=avx2: this CPU has no fma" in doctor.describe(found)


# --- the verb ---


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor"]) == 0
    printed = capsys.readouterr()
    assert printed.out == doctor.describe(doctor.diagnose()) + "\n"
    assert printed.err == ""
    assert cli.run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == 1
    assert cli.run(["diagnose"]) == 2
    assert "did you mean glm doctor?" in capsys.readouterr().err


def test_it_looks_without_transformers() -> None:
    code = (
        "import sys, glmkit_command\n"
        "sys.modules['transformers'] = None\n"  # importing it fails
        "from glmkit.doctor import describe, diagnose\n"
        "print(describe(diagnose()))\n"
    )
    environment = {**os.environ, "GLMKIT_KERNELS": "torch"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0, run.stderr
    assert "kernels     torch: GLMKIT_KERNELS=torch" in run.stdout
