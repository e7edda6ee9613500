"""`glm doctor`: what each check finds on machines that are written down here, and a cure for all that is wrong."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import glmkit
from glmkit import cli, devices, machine
from glmkit.chat.messages import Message
from glmkit.chat.store import Conversation, ConversationStore
from glmkit.doctor import hardware, outside, places, software
from glmkit.doctor.diagnosis import CHECKS, as_json, describe, examine, facts, mend, worst
from glmkit.doctor.finding import Finding, Repair
from glmkit.downloads import hub
from glmkit.errors import SandboxError, UsageError
from glmkit.interpreter import measure
from glmkit.interpreter.sandbox import Level
from glmkit.kernels import build
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
ISOLATED = measure.Measured(Level.FULL, (), "Isolated.", "已隔离。")


@pytest.fixture(autouse=True)
def ward(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Four cores with two hardware threads each, 64 GB, a home of its own, and nothing to improve."""
    for name in (
        "OMP_NUM_THREADS", "GLMKIT_KERNELS", "GLMKIT_MODELS", "GLMKIT_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT",
        "HF_HUB_OFFLINE", "HF_MODULES_CACHE", "MODELSCOPE_CACHE", "XDG_CACHE_HOME", "XDG_STATE_HOME",
        "CUDA_VISIBLE_DEVICES", "HUGGINGFACE_HUB_CACHE",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here, tmp_path / "dev" / "shm"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    monkeypatch.setenv("GLMKIT_LANG", "en")
    monkeypatch.setattr(hub, "cache_folder", lambda: home / ".cache/huggingface/hub")
    monkeypatch.setattr(machine, "SYSTEM", tmp_path / "sys")
    monkeypatch.setattr(machine, "PROCESSES", tmp_path / "proc")
    monkeypatch.setattr(hardware, "DEVICES", tmp_path / "dev")
    for i in range(8):
        write(tmp_path, f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list", f"{i % 4},{i % 4 + 4}\n")
    write(tmp_path, "sys/devices/system/node/node0/cpulist", "0-7\n")
    write(tmp_path, "sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
    write(tmp_path, "proc/cpuinfo", "processor\t: 0\nmodel name\t: Fast CPU 9\n")
    write(tmp_path, "proc/meminfo", "MemTotal:       64000000 kB\nMemFree: 1 kB\nMemAvailable:   32000000 kB\n")
    write(tmp_path, "proc/self/maps", "7f00-7f01 r-xp 0 0 0 /site/torch/lib/libgomp.so.1\n7f02-7f03 rw-p 0 0 0\n")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(measure, "measure", lambda minimum: ISOLATED)
    have(monkeypatch, NATIVE)
    return tmp_path


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def have(monkeypatch: pytest.MonkeyPatch, status: Status) -> None:
    monkeypatch.setattr(build, "status", lambda: status)


def age(path: Path, seconds: float = 2 * places.STALE_SECONDS) -> Path:
    for one in (*path.rglob("*"), path):
        os.utime(one, (time.time() - seconds,) * 2)
    return path


def warned(check: Callable[[], Finding]) -> tuple[str, str | None]:
    found = check()
    assert found.status == "warn", found
    return found.reason, found.cure


def failed(check: Callable[[], Finding]) -> tuple[str, str | None]:
    found = check()
    assert found.status == "fail", found
    return found.reason, found.cure


# --- all of them ---


def test_every_check_has_a_name_a_status_a_reason_and_a_cure_if_something_is_wrong() -> None:
    found = examine()
    assert len(found) >= 15
    assert set(found) == {*CHECKS, "network"}
    for name, one in found.items():
        assert one.reason, name
        assert one.status == "ok" or one.cure, name
    for line in (
        "ok    cpu            Fast CPU 9 (x86_64): 4 cores, 8 hardware threads",
        "ok    threads        torch uses 4",
        "ok    memory         65.5 GB, 32.8 GB available",
        "ok    huge pages     madvise",
        "ok    sandbox        FULL: Isolated.",
        "ok    openmp         libgomp.so.1",
        "ok    conversations  0, all can be opened",
    ):
        assert line in describe(found).splitlines()


def test_as_json() -> None:
    found = {"good": Finding("ok", "it is"), "bad": Finding("warn", "it is not", "do it", (Repair("rm x", list),))}
    made = json.loads(json.dumps(as_json(found)))
    assert (made["schema"], made["status"]) == (2, "warn")
    assert made["checks"] == [
        {"name": "good", "status": "ok", "reason": "it is", "cure": None, "repairs": []},
        {"name": "bad", "status": "warn", "reason": "it is not", "cure": "do it", "repairs": ["rm x"]},
    ]
    assert made["machine"]["versions"]["glmkit"] == glmkit.__version__
    assert made["machine"]["cpu"] == {
        "name": "Fast CPU 9", "architecture": "x86_64", "cores": 4, "hardware_threads": 8, "quota": None,
    }  # fmt: skip
    assert made["machine"]["memory_bytes"] == {"total": 64_000_000 * 1024, "available": 32_000_000 * 1024}
    assert made["machine"]["kernels"]["path"] == "/cache/kernels/glm-avx512.so"
    assert made["machine"]["runs_on"].keys() == {"int8, int4", "float"}
    assert worst({}) == "ok"
    assert worst(found | {"worse": Finding("fail", "", "")}) == "fail"


def test_it_speaks_chinese() -> None:
    told = describe({"numa": hardware.numa(), "bad": Finding("fail", "?", "CXX=x")}, "zh").splitlines()
    assert told[0] == "ok    numa  1 个节点"
    assert told[2] == "            解决办法：CXX=x"


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Finding:
        raise RuntimeError("surprise")

    def without() -> Finding:
        raise ModuleNotFoundError(name="packaging")

    monkeypatch.setattr("glmkit.doctor.diagnosis.CHECKS", {"a": broken, "b": without, "c": hardware.cpu})
    found = examine()
    assert found["a"].reason == "could not be checked: RuntimeError: surprise"
    assert (found["b"].status, found["b"].cure) == ("fail", "pip install packaging")
    assert found["c"].status == "ok"


# --- hardware ---


def test_only_what_the_process_may_use_counts(monkeypatch: pytest.MonkeyPatch, ward: Path) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 4}, raising=False)
    write(ward, "sys/fs/cgroup/cpu.max", "150000 100000\n")
    found = machine.cpu()
    assert (found["cores"], found["hardware_threads"], found["quota"]) == (2, 3, 1.5)
    assert "of which a container may use 1.5" in hardware.cpu().reason


def test_a_machine_that_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "SYSTEM", tmp_path / "none")
    monkeypatch.setattr(machine, "PROCESSES", tmp_path / "none")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    found = facts()
    assert found["cpu"]["name"]
    assert found["cpu"]["cores"] == 8
    assert found["memory_bytes"] == {"total": None, "available": None}
    assert (found["huge_pages"], found["numa_nodes"]) == (None, 1)
    assert hardware.memory() == Finding("ok", "unknown, unknown available")
    assert {hardware.threads().status, hardware.numa().status, hardware.huge_pages().status} == {"ok"}


@pytest.mark.parametrize(
    ("given", "threads", "reason"),
    [
        (None, 8, "torch uses 8 threads on 4 cores, they take turns"),
        ("8", 8, "torch uses 8 threads on 4 cores, they take turns"),
        ("1", 1, "OMP_NUM_THREADS=1: torch uses 1 of 4 cores"),
        (None, 2, "torch uses 2 of 4 cores"),
        ("many", 4, "OMP_NUM_THREADS=many is no number of threads"),
        ("0", 4, "OMP_NUM_THREADS=0 is no number of threads"),
    ],
)
def test_threads(monkeypatch: pytest.MonkeyPatch, given: str | None, threads: int, reason: str) -> None:
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert warned(hardware.threads) == (reason, "OMP_NUM_THREADS=4")


def test_a_container_with_less_than_its_machine(ward: Path) -> None:
    write(ward, "sys/fs/cgroup/cpu.max", "250000 100000\n")
    assert warned(hardware.threads) == (
        "torch uses 4 threads on 2 cores that the container may use, they take turns", "OMP_NUM_THREADS=2",
    )  # fmt: skip
    write(ward, "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert hardware.threads().status == "ok"
    write(ward, "sys/fs/cgroup/memory.max", "6000000000\n")
    write(ward, "sys/fs/cgroup/memory.current", "1000000000\n")
    assert hardware.memory().reason.endswith("the container may use 6.0 GB, 5.0 GB of it are left")
    # Files that were read fill what a container may use, and make room when it is needed.
    write(ward, "sys/fs/cgroup/memory.current", "5900000000\n")
    write(ward, "sys/fs/cgroup/memory.stat", "anon 1\ninactive_file 4900000000\nactive_file 2\n")
    assert hardware.memory().reason.endswith("5.0 GB of it are left")
    assert devices.free_bytes(devices.CPU) == machine.free_memory_bytes() == 5_000_000_000
    write(ward, "sys/fs/cgroup/memory.stat", "")
    write(ward, "sys/fs/cgroup/memory.current", "3000000000\n")
    assert "less than ChatGLM3-6B takes even with int4 weights" in warned(hardware.memory)[0]


def test_two_openmp_libraries_pages_and_nodes(ward: Path) -> None:
    write(ward, "proc/self/maps", "1-2 r-xp 0 0 0 /a/libgomp.so.1\n3-4 r-xp 0 0 0 /b/libomp.so.5\n")
    assert warned(hardware.openmp)[0].startswith("libgomp.so.1 and libomp.so.5 are loaded")
    write(ward, "sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n")
    assert str(warned(hardware.huge_pages)[1]).startswith("echo madvise | sudo tee ")
    write(ward, "sys/devices/system/node/node1/cpulist", "\n")
    assert warned(hardware.numa) == (
        "memory is divided over 2 nodes, and a model lies on the one that read it", "numactl --interleave=all glm …",
    )  # fmt: skip


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory = "H9", 141_000_000_000

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert facts()["devices"] == [{"name": f"cuda:{i} H9", "memory_bytes": 141_000_000_000} for i in range(2)]
    assert hardware.accelerator() == Finding("ok", "cuda:0 H9 (141.0 GB), cuda:1 H9 (141.0 GB)")


def test_a_device_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch, ward: Path) -> None:
    assert hardware.accelerator() == Finding("ok", "none: the CPU computes")
    write(ward, "dev/nvidia0", "")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert warned(hardware.accelerator)[0].endswith("is a build without CUDA")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    version = write(ward, "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03\n")
    reason, cure = warned(hardware.accelerator)
    assert reason.startswith("the NVIDIA driver is 535.129, and torch ")
    assert reason.endswith(" for CUDA 13.0 needs 580 or later")
    assert "update the driver" in str(cure)
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert warned(hardware.accelerator) == (
        "CUDA_VISIBLE_DEVICES hides the NVIDIA device", "unset CUDA_VISIBLE_DEVICES",
    )  # fmt: skip
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "(driver 580.65), and torch does not see it" in warned(hardware.accelerator)[0]
    (ward / "dev/nvidia0").rename(ward / "dev/davinci0")
    assert "install torch-npu" in str(warned(hardware.accelerator)[1])
    (ward / "dev/davinci0").rename(ward / "dev/kfd")
    monkeypatch.setattr(torch.version, "hip", None)
    assert warned(hardware.accelerator)[1] == "install torch's build for ROCm"


def test_limits_and_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    set_to = {resource.RLIMIT_NOFILE: 256}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (set_to.get(kind, resource.RLIM_INFINITY),) * 2)
    assert warned(hardware.limits)[1] == "ulimit -n 1024"
    set_to.clear()
    assert hardware.limits().reason == "any number of open files, no limit of sizes"
    set_to[resource.RLIMIT_AS] = 8 * 10**9
    assert warned(hardware.limits) == (
        "address space may have 8.0 GB at most, and models are large", "ulimit -v unlimited",
    )  # fmt: skip
    monkeypatch.setattr(hardware.os, "statvfs", lambda _: SimpleNamespace(f_blocks=16_384, f_frsize=4096))
    assert warned(hardware.shared_memory)[1] == "docker run --shm-size=8g"


# --- software ---


def test_packages_that_are_missing_old_or_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.13.0", "transformers": "5.23.0", "torchvision": "0.20.0", "numpy": "1.0"}
    needs = {
        "glmkit": ["torch<2.14,>=2.9", "transformers<6,>=5.20", "numpy>=1.26", "pyyaml>=6",
                   'peft>=0.19; extra == "train"', 'glmkit[train]; extra == "web"', 'gradio>=6; extra == "web"'],
        "torchvision": ["torch==2.5.0", "numpy"],
    }  # fmt: skip
    monkeypatch.setattr(software, "version_of", installed.get)
    monkeypatch.setattr(software.metadata, "requires", lambda name: needs.get(name))
    assert {software.torch().status, software.transformers().status} == {"ok"}
    assert failed(software.packages) == (
        "numpy 1.0, pyyaml is missing", 'pip install "numpy>=1.26" "pyyaml>=6"',
    )  # fmt: skip
    assert warned(software.fit) == (
        "torchvision 0.20.0 needs torch==2.5.0, found 2.13.0",
        "pip install --upgrade torchvision; or uninstall what is not needed",
    )
    installed["torch"] = "2.3.1"
    assert failed(software.torch) == ("torch 2.3.1, expected <2.14,>=2.9", 'pip install "torch<2.14,>=2.9"')
    del installed["torch"]
    assert str(failed(software.torch)[1]).startswith('pip install "torch<2.14,>=2.9"; glm run')
    about = SimpleNamespace(get_all=lambda key: {"Provides-Extra": ["train", "web", "dev"]}.get(key, [">=3.99"]))
    monkeypatch.setattr(software.metadata, "metadata", lambda name: about)
    assert software.extras().reason == "there: none; not there: train (peft), web (peft, gradio)"
    installed |= {"peft": "0.19", "gradio": "5.0"}
    assert warned(software.extras) == ("gradio 5.0, expected >=6", 'pip install "gradio>=6"')
    assert failed(software.python)[0].endswith("expected >=3.99")


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.kernels().reason == "avx512: the best this CPU can run"
    why = "avx2, portable: there is no C++ compiler"
    none = replace(NATIVE, level="torch", why=why, hint="apt install g++", path=None, compiler=None, openmp=False)
    have(monkeypatch, none)
    assert warned(software.kernels) == (f"no native kernels ({why}): torch computes", "apt install g++")
    assert facts()["runs_on"]["int8, int4"] == "torch, which makes a float matrix of them at each product"
    have(monkeypatch, replace(NATIVE, why="amx: the library does not work here: SIGILL", hint="delete it"))
    assert warned(software.kernels) == ("amx: the library does not work here: SIGILL", "delete it")
    have(monkeypatch, replace(NATIVE, openmp=False))
    assert warned(software.kernels)[0] == "the kernels use one thread, g++ 12.2.0 has no OpenMP"
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    assert warned(software.compiler)[1] == "apt install g++"


def test_a_level_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMKIT_KERNELS", "avx2")
    assert warned(software.kernels) == (
        "GLMKIT_KERNELS=avx2 is set", "unset GLMKIT_KERNELS: the best level is taken then",
    )  # fmt: skip

    def refuse() -> Status:
        raise UsageError("GLMKIT_KERNELS=avx2: this CPU has no fma", hint="this CPU can run portable")

    monkeypatch.setattr(build, "status", refuse)
    assert failed(software.kernels) == ("GLMKIT_KERNELS=avx2: this CPU has no fma", "this CPU can run portable")
    assert (facts()["kernels"]["level"], facts()["runs_on"]) == (None, {})


def test_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    reduced = replace(ISOLATED, level=Level.REDUCED, sentence_en="Reduced.")
    monkeypatch.setattr(measure, "measure", lambda minimum: reduced)
    assert warned(software.sandbox)[0] == "REDUCED: Reduced."

    def none(minimum: Level) -> None:
        raise SandboxError("code cannot be isolated", hint="allow user namespaces")

    monkeypatch.setattr(measure, "measure", none)
    assert warned(software.sandbox) == (
        "the code interpreter cannot be used: code cannot be isolated", "allow user namespaces",
    )  # fmt: skip


# --- places ---


def test_the_folder_of_models(monkeypatch: pytest.MonkeyPatch, ward: Path) -> None:
    assert places.models().status == "ok"
    folder = ward / "models"
    monkeypatch.setenv("GLMKIT_MODELS", str(folder))
    assert failed(places.models)[0] == f"GLMKIT_MODELS={folder} is not there"
    assert mend({"models": places.models()}) == [f"mkdir -p {folder}"]
    assert "no folder in it holds a model" in warned(places.models)[0]
    write(folder, "chatglm3-6b/config.json", "{}")
    write(folder, "THUDM/chatglm2-6b/config.json", "{}")
    assert places.models().reason.endswith(": chatglm2-6b, chatglm3-6b")
    monkeypatch.setenv("GLMKIT_MODELS", str(write(ward, "file", "")))
    assert failed(places.models)[0].endswith("file is no folder")
    assert not places.models().repairs


def test_downloads_that_were_left_half(ward: Path) -> None:
    hub = "home/.cache/huggingface/hub/models--zai-org--chatglm3-6b/blobs"
    young, old = write(ward, f"{hub}/a.incomplete", "12345"), age(write(ward, f"{hub}/b.incomplete", "1" * 10**6))
    scope = age(write(ward, "home/.cache/modelscope/models/ZhipuAI--chatglm3-6b/model.bin.incomplete", "x"))
    whole = age(write(ward, f"{hub}/c", "weights"))
    foreign = ("modelscope/thesis", "huggingface/hub/thesis", "huggingface/hub/datasets--a--b/blobs/d")
    own = [age(write(ward, f"home/.cache/{name}.incomplete", "x")) for name in foreign]  # not fetched by glm pull
    reason, cure = warned(places.downloads)
    assert reason == "3 left half, 0.0 GB; 2 were not written to for a day"
    assert "glm pull goes on with them" in str(cure)
    assert len(mend({"downloads": places.downloads()})) == 2
    assert (young.exists(), old.exists(), scope.exists(), whole.exists()) == (True, False, False, True)
    assert all(path.exists() for path in own)
    assert places.downloads().reason.endswith("the same glm pull goes on with them")


def test_what_killed_programs_left(ward: Path) -> None:
    here = Path.cwd()
    old = age(write(here, ".merged.tmp-0123abcd/model.safetensors", "x").parent)
    working = age(write(here, ".other.tmp-0123abcd/model.safetensors", "x").parent)
    write(working, "model-2.safetensors", "still written")
    own = [write(here, name, "x") for name in (".merged.tmp", "notes.tmp-0123abcd", ".env", ".x.tmp-12345")]
    for path in own:
        age(path)
    assert warned(places.leftovers)[0].startswith("1 of killed programs: ")
    assert mend({"": places.leftovers()}) == [f"rm -r {old}"]
    assert not old.exists()
    assert all(path.exists() for path in (*own, working))
    assert places.leftovers() == Finding("ok", "nothing was left behind")
    replaced = age(write(here, ".model.old-0123abcd/config.json", "{}").parent)
    assert warned(places.leftovers)[1] == f"mv {replaced} {here / 'model'}"
    assert mend({"": places.leftovers()}) == []  # it may be the only copy
    (here / "model").mkdir()
    assert len(mend({"": places.leftovers()})) == 1
    assert not replaced.exists()


def test_state(monkeypatch: pytest.MonkeyPatch, ward: Path) -> None:
    assert places.state().reason == "~/.local/state/glmkit/conversations, which the first conversation makes"
    kept = ConversationStore().save(Conversation("m", (Message("user", "hello"),)))
    assert places.state().status == "ok"
    folder = ward / "home/.local/state/glmkit/conversations"
    folder.chmod(0o755)
    assert "others on this machine may look into it" in warned(places.state)[0]
    assert mend({"": places.state()}) == [f"chmod 700 {folder}"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert places.conversations().reason == "1, all can be opened"
    write(folder, f"{'a' * 32}.json", "{")
    reason, cure = warned(places.conversations)
    assert reason.startswith(f"1 of 2 cannot be opened, such as {'a' * 32}.json: ")
    assert str(cure).endswith(f"rm {folder / ('a' * 32)}.json")
    assert ConversationStore().open(kept.id) == kept
    monkeypatch.setenv("XDG_STATE_HOME", str(write(ward, "file", "")))
    assert "is no folder; conversations are not kept" in failed(places.state)[0]


def test_disk(monkeypatch: pytest.MonkeyPatch, ward: Path) -> None:
    room = 50 * 10**9
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: SimpleNamespace(free=room))
    assert places.disk().reason == "50.0 GB free for models in ~/.cache/huggingface/hub"
    room = 5 * 10**9
    assert warned(places.disk)[0].endswith(", and chatglm3-6b has 12.5 GB")
    room = 10**8
    assert warned(places.disk)[0].startswith("0.1 GB free in ")


def test_code_of_checkpoints(ward: Path) -> None:
    assert places.remote_code() == Finding("ok", "no code of checkpoints is here")
    modules = "home/.cache/huggingface/modules/transformers_modules"
    write(ward, f"{modules}/THUDM/chatglm3-6b/103caa/modeling_chatglm.py", "raise SystemExit")
    reason, cure = warned(places.remote_code)
    assert "has code of 1 ChatGLM checkpoints" in reason
    assert cure == f"rm -r {ward / modules}"


# --- outside ---


def test_encoding_and_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside.sys, "stdout", SimpleNamespace(encoding="ANSI_X3.4-1968", isatty=lambda: True))
    monkeypatch.setattr(outside.sys, "stdin", SimpleNamespace(encoding="UTF-8", isatty=lambda: True))
    assert warned(outside.encoding) == (
        "output in ANSI_X3.4-1968: Chinese text may become question marks", "export LANG=C.UTF-8, or PYTHONUTF8=1",
    )  # fmt: skip
    monkeypatch.setenv("TERM", "dumb")
    assert warned(outside.terminal)[1] == "export TERM=xterm-256color"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert outside.terminal().reason == "xterm, without colours (NO_COLOR)"


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(outside, "PORTS", {"serve": port})
        reason = f"something listens already on port {port} of glm serve"
        assert warned(outside.ports) == (reason, f"glm serve … --port {port + 1}")
    assert outside.ports().status == "ok"


def test_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside.time, "time", lambda: 86_400.0)
    assert "1970-01-0" in warned(outside.clock)[0]


def test_nobody_is_contacted_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def contact(*arguments: Any, **named: Any) -> None:
        raise AssertionError("contacted")

    monkeypatch.setattr(outside.urllib.request, "urlopen", contact)
    assert outside.network(False).reason == "https://huggingface.co; not contacted, glm doctor --online does"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert outside.network(True) == Finding("ok", "HF_HUB_OFFLINE is set: nothing is fetched")
    monkeypatch.setenv("HF_ENDPOINT", "mirror.example")
    assert failed(lambda: outside.network(False))[0] == "HF_ENDPOINT=mirror.example is no address"


def test_online(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(401)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    there, nobody = f"http://127.0.0.1:{server.server_port}", "http://127.0.0.1:9"
    try:
        monkeypatch.setenv("HF_ENDPOINT", there)
        monkeypatch.setattr(outside, "MODELSCOPE", nobody)
        assert outside.network(True).reason.startswith(f"{there}: reached; {nobody}: ")
        assert outside.network(True).status == "ok"
        monkeypatch.setenv("HF_ENDPOINT", nobody)
        monkeypatch.setattr(outside, "MODELSCOPE", there)
        assert str(warned(lambda: outside.network(True))[1]).startswith("glm pull --source modelscope")
    finally:
        server.shutdown()
        server.server_close()
    monkeypatch.setattr(outside, "MODELSCOPE", nobody + "/x")
    assert failed(lambda: outside.network(True))[0].count("refused") == 2


# --- the verb ---


def test_the_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ward: Path) -> None:
    assert cli.run(["doctor"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].endswith(" 0 fail")
    assert printed.err == ""
    monkeypatch.setenv("GLMKIT_MODELS", str(ward / "models"))
    assert cli.run(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["status"]) == (2, "fail")
    assert [one["name"] for one in found["checks"] if one["status"] == "fail"] == ["models"]
    assert not (ward / "models").exists()
    assert cli.run(["doctor", "--fix"]) == 0
    assert capsys.readouterr().err == f"mkdir -p {ward / 'models'}\n"
    assert (ward / "models").is_dir()
    assert cli.run(["diagnose"]) == 2
    assert "did you mean glm doctor?" in capsys.readouterr().err


def test_it_looks_without_torch_and_transformers(tmp_path: Path) -> None:
    code = (
        "import sys, glmkit_command\n"
        "gone = ('torch', 'transformers')\n"
        "sys.modules |= dict.fromkeys(gone)\n"  # importing them fails
        "from glmkit.doctor import software\n"
        "from glmkit.doctor.diagnosis import CHECKS, as_json, describe, examine\n"
        "del CHECKS['sandbox']\n"  # which takes a second
        "ask = software.version_of\n"
        "software.version_of = lambda name: None if name in gone else ask(name)\n"
        "found = examine()\n"
        "print(as_json(found)['schema'], describe(found), sep='\\n')\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0, run.stderr
    for missing in ("torch", "transformers"):
        assert f"fail  {missing.ljust(13)}  {missing} is not installed" in run.stdout
    assert "fail  threads        this needs the package torch, which is not installed" in run.stdout
    assert "ok    memory" in run.stdout
    assert "could not be checked" not in run.stdout
