"""The life of a sandbox, its measured level, and the filters it is made of."""

from __future__ import annotations

import os
import socket
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from glmkit.errors import SandboxError
from glmkit.interpreter import landlock, measure, sandbox, tree
from glmkit.interpreter.measure import Probe
from glmkit.interpreter.sandbox import LAYERS, NAMESPACES, Level, Limits, Sandbox
from glmkit.interpreter.seccomp import system_calls_program

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sandboxes exist on Linux only")

LIMITS = Limits(memory_bytes=192 << 20, disk_bytes=8 << 20, files=100, processes=16)


def python(code: str) -> list[str]:
    """A program that needs nothing but the interpreter."""
    return [sys.executable, "-I", "-S", "-c", code]


@pytest.fixture(scope="module")
def full() -> None:
    """Skips where namespaces are not allowed."""
    try:
        with Sandbox(Level.FULL) as trial:
            assert trial.start(python("pass")).wait(20) == 0
    except SandboxError as error:
        pytest.skip(f"no full isolation here: {error.message}")


def said_by(code: str, limits: Limits = LIMITS) -> str:
    """What a program prints at level FULL."""
    with tempfile.TemporaryFile() as output, Sandbox(Level.FULL, limits) as place:
        place.start(python(code), output=output.fileno()).wait(20)
        output.seek(0)
        return output.read().decode()


# Life


def test_program_finds_its_folders_and_nothing_of_the_host(full: None) -> None:
    with tempfile.TemporaryFile() as output, Sandbox(Level.FULL, LIMITS) as place:
        code = """
import json, os, sys
print(json.dumps([os.getcwd(), os.environ["HOME"], sorted(os.environ), os.getuid(), open(sys.argv[1]).read(),
                  sorted(os.listdir("/mnt")), os.path.exists("/sys"), os.path.exists("/usr/bin/env"),
                  sys.stdin.read()]))
"""
        process = place.start(
            [*python(code), str(place.home_inside / "settings")], files={"settings": b"given"}, output=output.fileno()
        )
        assert process.wait(20) == 0
        output.seek(0)
        environment = ["HOME", "LANG", "PATH"]
        assert json_of(output.read()) == [
            "/mnt/data", "/mnt/home", environment, 1000, "given", ["data", "home"], False, False, "",
        ]  # fmt: skip


def json_of(said: bytes) -> list[object]:
    """The value that a program printed, without what Python itself adds to the environment."""
    import json

    value = json.loads(said)
    value[2] = [name for name in value[2] if name != "LC_CTYPE"]
    return list(value)


def test_what_is_asked_for_is_added_to_the_environment(full: None) -> None:
    with tempfile.TemporaryFile() as output, Sandbox(Level.FULL, LIMITS) as place:
        program = python("import os; print(os.environ['GIVEN'])")
        place.start(program, env={"GIVEN": "1"}, output=output.fileno()).wait(20)
        output.seek(0)
        assert output.read() == b"1\n"


def test_host_reads_files_and_reaches_sockets_until_the_end(full: None) -> None:
    """What the kernel's messages travel over: a socket that is bound inside."""
    code = """
import socket
open("result", "w").write("42")
server = socket.socket(socket.AF_UNIX)
server.bind("/mnt/home/socket")
server.listen()
server.accept()[0].sendall(b"hello")
"""
    with Sandbox(Level.FULL, LIMITS) as place:
        process = place.start(python(code))
        until = time.monotonic() + 10
        client = socket.socket(socket.AF_UNIX)
        while time.monotonic() < until:
            try:
                client.connect(str(process.home / "socket"))
                break
            except OSError:
                time.sleep(0.02)
        assert client.recv(5) == b"hello"
        client.close()
        assert process.wait(10) == 0
        assert (process.data / "result").read_text() == "42"
        process.close()
        assert not process.data.exists()


@pytest.mark.parametrize(("code", "status"), [("pass", 0), ("raise SystemExit(7)", 7), ("import os; os.abort()", 134)])
def test_status_is_that_of_the_program(full: None, code: str, status: int) -> None:
    with Sandbox(Level.FULL, LIMITS) as place:
        process = place.start(python(code))
        assert (process.wait(20), process.poll(), process.reason) == (status, status, None)


def test_interrupt_reaches_the_program_only(full: None) -> None:
    code = """
import os, time
if os.fork() == 0:
    time.sleep(60)
try:
    os.write(1, b"ready\\n")  # an interrupt within print() would leave the line in its buffer, to be written again
    time.sleep(60)
except KeyboardInterrupt:
    os.write(1, b"interrupted\\n")
"""
    reading, writing = os.pipe()
    with Sandbox(Level.FULL, LIMITS) as place, open(reading) as said:
        process = place.start(python(code), output=writing)
        os.close(writing)
        assert said.readline() == "ready\n"
        process.interrupt()
        assert said.readline() == "interrupted\n"
        assert process.wait(10) == 0
        process.interrupt()  # nobody is there


def test_closing_twice_and_from_several_threads(full: None) -> None:
    place = Sandbox(Level.FULL, LIMITS)
    process = place.start(python("import time; time.sleep(60)"))
    threads = [threading.Thread(target=close) for close in (process.close, place.close, process.kill)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert process.poll() == 137


def test_a_program_that_is_not_there(full: None) -> None:
    with Sandbox(Level.FULL, LIMITS) as place, pytest.raises(SandboxError, match=r"start /nothing: .*No such file"):
        place.start(["/nothing"])


def test_one_sandbox_starts_once(full: None) -> None:
    with Sandbox(Level.FULL, LIMITS) as place:
        place.start(python("pass")).wait(20)
        with pytest.raises(SandboxError, match="once"):
            place.start(python("pass"))


def test_names_of_files_stay_in_the_home_folder(full: None) -> None:
    with Sandbox(Level.FULL, LIMITS) as place, pytest.raises(SandboxError):
        place.start(python("pass"), files={"../../etc/passwd": b""})


@pytest.mark.parametrize("level", [Level.REDUCED, Level.WEAK])
def test_weaker_levels_remove_their_folder(level: Level) -> None:
    place = Sandbox(level, LIMITS)
    folder = place.data_inside.parent
    assert folder.is_dir()
    place.close()
    assert not folder.exists()


def test_start_costs_little(full: None) -> None:
    """The best of five, as other work on the machine only adds to it."""
    took = []
    for _ in range(5):
        began = time.monotonic()
        with Sandbox(Level.FULL, LIMITS) as place:
            place.start(python("pass"))
            took.append(time.monotonic() - began)
    assert min(took) < 0.5


# Limits


def test_a_whole_session_of_limits_can_be_reached_from_inside(full: None) -> None:
    """The numbers arrive as they were given."""
    code = """
import resource as r, os
s = os.statvfs(".")
print(r.getrlimit(r.RLIMIT_DATA)[1] >> 20, r.getrlimit(r.RLIMIT_NPROC)[1], r.getrlimit(r.RLIMIT_CORE)[1],
      r.getrlimit(r.RLIMIT_CPU)[1], r.getrlimit(r.RLIMIT_NOFILE)[1], s.f_blocks * s.f_frsize >> 20, s.f_files)
"""
    numbers = [int(number) for number in said_by(code).split()]
    assert numbers == [192, 17, 0, 600, 256, 8, 100 + len(tree.OWN_FOLDERS) + 1]


def test_memory_errors_are_errors_in_the_program(full: None) -> None:
    """One process that asks for too much is told so, and lives."""
    assert said_by("try: bytearray(1 << 30)\nexcept MemoryError: print('lives')") == "lives\n"


# Level


def test_measured_level_has_all_attempts_and_a_sentence(full: None) -> None:
    found = measure.measure(Level.FULL)
    assert found.level is Level.FULL
    assert len(found.probes) == 10
    assert all(probe.held and probe.detail for probe in found.probes)
    assert "no network" in found.sentence_en
    assert "无网络" in found.sentence_zh


LEAKS = [
    ("connect to TCP", {"net", "seccomp", "landlock"}),
    ("read a file outside", {"mount", "landlock", "identity"}),
    ("write a file outside", {"mount", "landlock", "identity"}),
    ("trace the server", NAMESPACES | {"landlock", "seccomp", "identity"}),
    ("read the server's environment", NAMESPACES | {"landlock", "seccomp", "identity"}),
    ("make a namespace", {"seccomp"}),
    ("reach the keyring", {"seccomp"}),
    ("connect to a Unix socket", {"net", "seccomp", "landlock"}),
    ("allocate 1 GB", {"rlimits"}),
    ("start many processes", {"rlimits", "watchdog"}),
]


@pytest.mark.parametrize(("name", "off"), LEAKS, ids=[name for name, _ in LEAKS])
def test_each_attempt_notices_its_leak(full: None, name: str, off: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that cannot fail proves nothing; and whatever gets through ends level FULL."""
    monkeypatch.setitem(LAYERS, Level.FULL, LAYERS[Level.FULL] - frozenset(off))
    probes, separate = measure._attempt(Level.FULL)
    assert name in {probe.name for probe in probes if not probe.held}
    assert measure._level(Level.FULL, probes, separate=separate) < Level.FULL
    with pytest.raises(SandboxError, match=name):
        measure.measure(Level.FULL)


def test_shared_namespaces_are_not_full(full: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All attempts held, and still other processes can be seen."""
    monkeypatch.setitem(LAYERS, Level.FULL, LAYERS[Level.FULL] - {"ipc"})
    assert measure.measure(Level.REDUCED).level is Level.REDUCED


@pytest.mark.parametrize(
    ("passed", "separate", "level"),
    [
        (set(), True, Level.FULL),
        (set(), False, Level.REDUCED),
        ({"connect to TCP"}, True, Level.WEAK),
        ({"reach the keyring"}, False, Level.WEAK),
        ({"allocate 1 GB"}, True, Level.NONE),
        ({"connect to TCP", "start many processes"}, True, Level.NONE),
    ],
)
def test_level_is_what_held(passed: set[str], separate: bool, level: Level) -> None:
    probes = tuple(Probe(name, name not in passed, "") for name in measure.ATTEMPTS)
    assert measure._level(Level.FULL, probes, separate=separate) is level
    assert measure._level(Level.WEAK, probes, separate=separate) is min(level, Level.WEAK)


def test_below_the_minimum_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weaker levels are not tried, and the cure is said."""
    tried = []

    def fails(level: Level) -> None:
        tried.append(level)
        raise SandboxError("no namespaces")

    monkeypatch.setattr(measure, "_attempt", fails)
    with pytest.raises(SandboxError, match=r"FULL: no namespaces\n  REDUCED: no namespaces") as caught:
        measure.measure(Level.REDUCED)
    assert tried == [Level.FULL, Level.REDUCED]
    assert "user namespaces" in str(caught.value.hint)


def test_attempts_that_end_early_prove_nothing(full: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cut = tmp_path / "probes.py"
    cut.write_text('print(\'{"name": "connect to TCP", "held": true, "detail": ""}\')')
    monkeypatch.setattr(measure, "_PROBES", cut)
    with pytest.raises(SandboxError, match="ended before 'read a file outside'"):
        measure.measure(Level.FULL)


def test_elsewhere_than_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="Linux only, this is darwin"):
        Sandbox(Level.FULL)
    with pytest.raises(SandboxError, match="Linux only"):
        measure.measure(Level.WEAK)


def test_processors_without_a_list_of_system_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with Sandbox(Level.REDUCED) as place, pytest.raises(SandboxError, match="no list of system calls for riscv64"):
        place.start(python("pass"))


# Filters


def decide(program: bytes, architecture: int, number: int, *arguments: int) -> str:
    """Runs a filter as the kernel does; the words are its answers."""
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, architecture, 0, *(arguments + (0,) * 6)[:6])
    instructions = list(struct.iter_unpack("<HBBI", program))
    at, register = 0, 0
    while True:
        code, if_true, if_false, value = instructions[at]
        at += 1
        if code == 0x20:
            register = struct.unpack_from("<I", data, value)[0]
        elif code == 0x54:
            register &= value
        elif code in (0x15, 0x35):
            at += if_true if (register == value if code == 0x15 else register >= value) else if_false
        else:
            assert code == 0x06, f"unknown instruction {code:#x}"
            return {0x7FFF0000: "allow", 0x80000000: "kill", 0x00050001: "EPERM", 0x00050026: "ENOSYS"}[value]


X86, ARM = ("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)


@pytest.mark.parametrize(
    ("machine", "call", "answer"),
    [
        (X86, (0,), "allow"), (ARM, (63,), "allow"),  # read
        (X86, (41, 1, 1 | 0o2000000), "allow"), (ARM, (198, 1, 1), "allow"),  # socket(AF_UNIX, SOCK_STREAM)
        (X86, (41, 2, 1), "EPERM"), (ARM, (198, 2, 1), "EPERM"),  # AF_INET
        (X86, (41, 10, 1), "EPERM"), (X86, (41, 16, 3), "EPERM"), (X86, (41, 40, 1), "EPERM"),  # IPv6, netlink, vsock
        (X86, (41, 1, 2), "EPERM"), (X86, (53, 1, 2), "EPERM"), (X86, (53, 1, 1), "allow"),  # datagrams; a pair
        (X86, (41, 1 | 1 << 32, 1), "allow"),  # the kernel reads 32 bits
        (X86, (42,), "ENOSYS"), (ARM, (203,), "ENOSYS"),  # connect
        (X86, (56, 0x1200011), "allow"), (ARM, (220, 0x1200011), "allow"),  # fork
        (X86, (56, 0x3D0F00), "allow"),  # a thread
        (X86, (56, 0x10000011), "EPERM"), (ARM, (220, 0x20000011), "EPERM"),  # with namespaces
        (X86, (435,), "ENOSYS"), (ARM, (435,), "ENOSYS"),  # clone3, whose flags cannot be seen
        (X86, (16, 1, 0x5412), "EPERM"), (X86, (16, 1, 0x541C), "EPERM"), (ARM, (29, 1, 0x5412), "EPERM"),  # TIOCSTI
        (X86, (16, 1, 0x5412 | 1 << 32), "EPERM"), (X86, (16, 1, 0x5401), "allow"),
        (X86, (157, 22), "EPERM"), (X86, (157, 1), "EPERM"), (X86, (157, 15), "allow"),  # prctl
        (X86, (144, 7, 0), "allow"), (X86, (144, 7, 1), "EPERM"),  # sched_setscheduler
        (X86, (302, 0), "allow"), (X86, (302, 1), "EPERM"), (ARM, (261, 1), "EPERM"),  # prlimit64 of others
        (X86, (90, 0, 0o4755), "EPERM"), (X86, (90, 0, 0o755), "allow"), (ARM, (53, 0, 0, 0o2755), "EPERM"),  # chmod
        (X86, (9, 0, 9, 3, 0x22), "allow"), (X86, (9, 0, 9, 3, 0x01), "allow"), (ARM, (222, 0, 9, 3, 2), "allow"),
        (X86, (9, 0, 9, 3, 0x21), "EPERM"), (X86, (9, 0, 9, 3, 0x40022), "EPERM"), (ARM, (222, 0, 9, 3, 0x23), "EPERM"),
        (X86, (294, 0), "ENOSYS"), (ARM, (26, 0), "ENOSYS"),  # inotify: a user has 128 in all, inside and outside
        (X86, (72, 0, 8), "EPERM"), (X86, (72, 0, 1030), "allow"),  # fcntl F_SETOWN
        (X86, (101,), "ENOSYS"), (ARM, (117,), "ENOSYS"), (X86, (272,), "ENOSYS"), (X86, (165,), "ENOSYS"),
        (X86, (425,), "ENOSYS"), (X86, (321,), "ENOSYS"), (X86, (319,), "ENOSYS"), (X86, (310,), "ENOSYS"),
        (X86, (0x40000000,), "kill"), (X86, (0xFFFFFFFF,), "kill"), (ARM, (0x40000000,), "ENOSYS"),
    ],
)  # fmt: skip
def test_filter_decides(machine: tuple[str, int], call: tuple[int, ...], answer: str) -> None:
    program = system_calls_program(signals_are_scoped=True, machine=machine[0])
    assert decide(program, machine[1], *call) == answer


@pytest.mark.parametrize("machine", [X86, ARM])
def test_filter_kills_other_architectures(machine: tuple[str, int]) -> None:
    program = system_calls_program(signals_are_scoped=True, machine=machine[0])
    for other in (0x40000003, 0x40000028, X86[1] ^ ARM[1] ^ machine[1]):
        assert decide(program, other, 0) == "kill"
    assert len(program) // 8 <= 4096  # the most that the kernel takes


def test_signals_reach_the_own_group_only_where_nothing_else_keeps_them_inside() -> None:
    program = system_calls_program(signals_are_scoped=False, machine="x86_64")
    assert decide(program, X86[1], 62, 0, 2) == "allow"
    assert decide(program, X86[1], 62, 1234, 9) == "EPERM"
    assert decide(program, X86[1], 62, 0xFFFFFFFF, 9) == "EPERM"
    assert decide(program, X86[1], 234, 1234, 1234, 9) == "ENOSYS"


@pytest.mark.parametrize(
    ("version", "network", "scopes", "truncate"),
    [(1, 0, 0, False), (3, 0, 0, True), (4, 3, 0, True), (6, 3, 3, True), (99, 3, 3, True)],
)
def test_rules_ask_for_what_the_kernel_knows(
    version: int, network: int, scopes: int, truncate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landlock, "landlock_version", lambda: version)
    rules = landlock.path_rules(readable=("/etc",), runnable=("/usr",), own=("/tmp",), devices=("/dev/null",))
    assert (rules.network, rules.scopes, bool(rules.files & landlock.TRUNCATE)) == (network, scopes, truncate)
    assert all(rights & ~rules.files == 0 for _, rights in rules.rules)
    rights = dict(rules.rules)
    assert not rights["/etc"] & (landlock.WRITE_FILE | landlock.EXECUTE)
    assert not rights["/tmp"] & landlock.EXECUTE


def test_tree_has_the_interpreter_and_not_what_is_being_developed() -> None:
    files = tree.read_only()
    shown = (*files.runnable, *files.readable)

    def visible(path: str) -> bool:
        return any(path == parent or path.startswith(parent + "/") for parent in shown)

    assert visible(sys.executable)
    assert visible(os.__file__)
    assert visible(pytest.__file__)
    assert not visible(os.path.realpath(__file__))
    assert not any(
        visible(path) for path in ("/etc/shadow", "/usr/bin/env", str(Path.home() / ".ssh/id_rsa"), os.getcwd())
    )


def test_levels_contain_each_other() -> None:
    assert LAYERS[Level.WEAK] < LAYERS[Level.REDUCED] < LAYERS[Level.FULL]
    with pytest.raises(SandboxError, match="NONE"):
        sandbox.Sandbox(Level.NONE)
