"""Attacks on the sandbox: each is stopped, and each succeeds when the layers that stop it are left out.

The numbers X-01 … are those of the table in docs/reliability.md. An attack is a piece of Python that raises an error
where it is stopped. It aims at stand-ins that the test has made (a process, a port, files anybody may write), so that
its success does no harm. Attacks that need the same layers left out run in one sandbox, one after the other.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import pty
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from glmkit.errors import SandboxError
from glmkit.interpreter import sandbox as sandbox_module
from glmkit.interpreter.sandbox import NAMESPACES, Level, Limits, Sandbox

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sandboxes exist on Linux only")

MB = 1 << 20
LIMITS = Limits(memory_bytes=192 * MB, disk_bytes=8 * MB, files=100, processes=24, cpu_seconds=30)

FILES = frozenset({"mount", "landlock"})
NETWORK = frozenset({"net", "seccomp", "landlock"})
OTHER_PROCESSES = NAMESPACES | {"landlock", "seccomp", "identity"}
SYSTEM_CALLS = frozenset({"seccomp"})
NUMBERS = frozenset({"rlimits", "watchdog"})

# Before each attack: what several of them need.
PRELUDE = """
import ctypes, errno, os, platform, resource, signal, socket, stat, sys, time
from pathlib import Path
libc = ctypes.CDLL(None, use_errno=True)
ARM = platform.machine() == "aarch64"
def call(x86_64, aarch64, *values):
    if libc.syscall(ctypes.c_long(aarch64 if ARM else x86_64), *values) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def fork_and_wait(count):
    children = []
    try:
        for _ in range(count):
            child = os.fork()
            if child == 0:
                time.sleep(3)
                os._exit(0)
            children.append(child)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
"""

RUNNER = """
import json, sys
prelude, aim, attacks = json.loads(sys.argv[1])
for name, code in attacks.items():
    names = {"aim": aim}
    try:
        exec(prelude, names)
        exec(code, names)
        outcome = "through"
    except (OSError, MemoryError, RuntimeError) as error:
        outcome = f"stopped: {type(error).__name__} {error}"
    print(json.dumps([name, outcome]), flush=True)
"""


@dataclass(frozen=True)
class Attack:
    """Code that raises where it is stopped; `off` are the layers without which it is not."""

    name: str
    off: frozenset[str]
    code: str


ATTACKS = [
    Attack("X-01 read a key of the server", FILES, "assert Path(aim['folder'], 'key').read_text() == 'secret'"),
    Attack("X-02 environment of another process", OTHER_PROCESSES,
           "assert b'SECRET=1' in Path('/proc/%d/environ' % aim['victim']).read_bytes()"),
    Attack("X-02 descriptors of another process", OTHER_PROCESSES, "assert os.listdir('/proc/%d/fd' % aim['victim'])"),
    Attack("X-02 root of another process", OTHER_PROCESSES, "assert os.listdir('/proc/%d/root/' % aim['victim'])"),
    Attack("X-03 write outside", FILES, "open(Path(aim['folder'], 'key'), 'r+').write('secret')"),
    Attack("X-05 hard link to a file of the server", FILES, "os.link(Path(aim['folder'], 'key'), 'linked')"),
    Attack("X-07 fill the disk", FILES | NUMBERS, "for i in range(6): Path(f'big{i}').write_bytes(bytes(4 << 20))"),
    Attack("X-08 many files", FILES | NUMBERS, "for i in range(300): Path(f'small{i}').touch()"),
    Attack("X-09 sparse file of 1 PB", frozenset({"rlimits"}),
           "with open('sparse', 'wb') as file: file.truncate(1 << 50)"),
    Attack("X-10 FIFO instead of a picture", SYSTEM_CALLS | {"landlock"}, "os.mkfifo('plot.png')"),
    Attack("X-11 setuid bit", SYSTEM_CALLS, "Path('tool').touch(); os.chmod('tool', 0o4755)"),
    Attack("X-11 setuid bit while creating", SYSTEM_CALLS,
           "os.close(os.open('tool2', os.O_CREAT | os.O_WRONLY, 0o4755))"),
    Attack("X-11 run what was written", FILES, """
Path('program').write_bytes(Path(aim['program']).read_bytes()); os.chmod('program', 0o700)
child = os.fork()
if child == 0:
    try: os.execv('program', ['program', '-c', ''])
    except OSError: os._exit(99)
if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 99: raise OSError('not run')
"""),
    Attack("X-13 change an installed package", FILES, "Path(aim['package'], 'sitecustomize.py').write_text('')"),
    Attack("X-15 fork bomb", NUMBERS, "fork_and_wait(100)"),
    Attack("X-18 kill another process", OTHER_PROCESSES, "os.kill(aim['second_victim'], signal.SIGKILL)"),
    Attack("X-19 trace another process", OTHER_PROCESSES, "call(101, 117, 0x4206, aim['victim'], None, None)"),
    Attack("X-19 read memory of another process", OTHER_PROCESSES,
           "open('/proc/%d/mem' % aim['victim'], 'rb').close()"),
    Attack("X-19 process_vm_readv", SYSTEM_CALLS, """
try: call(310, 270, os.getpid(), None, ctypes.c_ulong(0), None, ctypes.c_ulong(0), ctypes.c_ulong(0))
except OSError as error:
    if error.errno == errno.ENOSYS: raise
"""),
    Attack("X-21 thread bomb", NUMBERS, """
import threading
done = threading.Event()
try:
    for _ in range(100): threading.Thread(target=done.wait, args=(3,), daemon=True).start()
finally: done.set()
"""),
    Attack("X-22 zombies", NUMBERS, """
children = []
try:
    for _ in range(100):
        child = os.fork()
        if child == 0: os._exit(0)
        children.append(child)
finally:
    for child in children: os.waitpid(child, 0)
"""),
    Attack("X-23 bytearray growth", NUMBERS, """
held = bytearray()
for _ in range(30): held += b'x' * (10 << 20)
"""),
    Attack("X-24 memory in a memfd", SYSTEM_CALLS | NUMBERS, "os.write(os.memfd_create('hidden'), bytes(1 << 20))"),
    Attack("X-24 System V shared memory", SYSTEM_CALLS, "call(29, 194, 0, ctypes.c_size_t(1 << 20), 0o1600)"),
    Attack("X-24 shared memory without a file", SYSTEM_CALLS, "import mmap; mmap.mmap(-1, 4096)"),
    Attack("X-24 shared memory of /dev/zero", FILES,
           "import mmap; mmap.mmap(os.open('/dev/zero', os.O_RDWR), 4096)"),
    Attack("X-25 fill /dev/shm", FILES | NUMBERS, """
name = Path('/dev/shm', aim['unique'])
try: name.write_bytes(bytes(24 << 20))
finally: name.unlink(missing_ok=True)
"""),
    Attack("X-28 zip bomb", NUMBERS, """
import zlib
bomb = zlib.compress(bytes(20 << 20), 1)
held = [zlib.decompress(bomb) for _ in range(15)]
"""),
    Attack("X-29 the server's port", NETWORK, "socket.create_connection(('127.0.0.1', aim['port']), timeout=2)"),
    Attack("X-31 a datagram out", NETWORK,
           "socket.socket(type=socket.SOCK_DGRAM).sendto(b'secret', ('127.0.0.1', aim['udp']))"),
    Attack("X-32 a named socket", FILES | NETWORK, "socket.socket(socket.AF_UNIX).connect(aim['folder'] + '/socket')"),
    Attack("X-32 an abstract socket", NETWORK, "socket.socket(socket.AF_UNIX).connect(chr(0) + aim['unique'])"),
    Attack("X-32 a datagram to a named socket", SYSTEM_CALLS, "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)"),
    Attack("X-33 netlink", SYSTEM_CALLS, "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)"),
    Attack("X-33 packets", SYSTEM_CALLS | {"identity"}, "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    Attack("X-34 IPv6", NETWORK, "socket.create_connection(('::1', aim['port6']), timeout=2)"),
    Attack("X-35 an open file of the server", frozenset({"descriptors"}),
           "assert os.pread(aim['descriptor'], 6, 0) == b'secret'"),
    Attack("X-36 a user namespace by unshare", SYSTEM_CALLS, """
child = os.fork()
if child == 0:
    try: call(272, 97, 0x10000000)
    except OSError: os._exit(1)
    os._exit(0)
if os.waitpid(child, 0)[1]: raise OSError('unshare')
"""),
    Attack("X-36 a user namespace by clone", SYSTEM_CALLS, """
flags = ctypes.c_ulong(0x10000000 | signal.SIGCHLD)
child = libc.syscall(ctypes.c_long(220 if ARM else 56), flags, None, None, None, None)
if child == 0: os._exit(0)
if child == -1: raise OSError(ctypes.get_errno(), 'clone')
os.waitpid(child, 0)
"""),
    Attack("X-37 mount", SYSTEM_CALLS | {"landlock", "identity"}, """
if libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == -1: raise OSError(ctypes.get_errno(), 'mount')
libc.umount(b'/tmp')
"""),
    Attack("X-37 chroot", SYSTEM_CALLS | {"landlock", "identity"}, """
child = os.fork()
if child == 0:
    try: os.chroot('/tmp')
    except OSError: os._exit(1)
    os._exit(0)
if os.waitpid(child, 0)[1]: raise OSError('chroot')
"""),
    Attack("X-38 rare parts of the kernel", SYSTEM_CALLS, """
reached = []
calls = {'bpf': (321, 280), 'perf': (298, 241), 'io_uring': (425, 425), 'userfaultfd': (323, 282), 'keyctl': (250, 219),
         'kexec': (246, 104), 'module': (175, 105), 'add_key': (248, 217), 'setns': (308, 268), 'fsopen': (430, 430),
         'open_by_handle': (304, 265), 'pidfd_getfd': (438, 438), 'personality': (135, 92), 'swapoff': (168, 225)}
for name, numbers in calls.items():
    try: call(*numbers, None, None, None, None, None)
    except OSError as error:
        if error.errno == errno.ENOSYS: continue
    reached.append(name)
if not reached: raise OSError('none of them exists')
"""),
    Attack("X-40 a system call past Python", NETWORK, """
call(41, 198, 2, 1, 0)
"""),
    Attack("X-41 write to /proc", FILES | {"pid"}, "Path('/proc/self/comm').write_text('other')"),
    Attack("X-46 secrets in the environment", frozenset({"environment"}),
           "if 'GLMKIT_TEST_SECRET' not in os.environ: raise OSError"),
]  # fmt: skip


@functools.cache
def python_for_everybody() -> str | None:
    """An interpreter that an unprivileged user reaches without a new root; None if there is none."""
    if os.geteuid() != 0:
        return sys.executable
    for path in (Path(sys.executable), Path("/usr/bin/python3").resolve()):
        really = path.resolve()
        if really.exists() and all(
            folder.stat().st_mode & 0o001 for folder in (really, *really.parents, *path.parents)
        ):
            return str(path)
    return None


@pytest.fixture(scope="module", autouse=True)
def _namespaces_are_allowed() -> None:
    try:
        with Sandbox(Level.FULL) as trial:
            assert trial.start([sys.executable, "-I", "-S", "-c", "pass"]).wait(20) == 0
    except SandboxError as error:
        pytest.skip(f"no full isolation here: {error.message}")


ENDED_BY_THE_WATCHDOG = ("X-07 fill the disk", "X-08 many files")


@dataclass
class Ended:
    """What a run left: what it printed, its status, and the watchdog's reason."""

    text: str
    status: int
    reason: str | None


def run(
    code: str,
    *arguments: str,
    off: frozenset[str] = frozenset(),
    level: Level = Level.FULL,
    limits: Limits = LIMITS,
    seconds: float = 20,
) -> Ended:
    """Runs Python in a sandbox without some layers."""
    python = sys.executable
    if "mount" in off or level < Level.FULL:
        python = python_for_everybody() or pytest.skip("no interpreter that every user can run")
    with tempfile.TemporaryFile() as output, Sandbox(level, limits, without=off) as place:
        process = place.start([python, "-I", "-S", "-c", code, *arguments], output=output.fileno())
        status = process.wait(seconds)
        output.seek(0)
        return Ended(output.read(1 << 20).decode(errors="replace"), status, process.reason)


@pytest.fixture(scope="module")
def aim() -> Iterator[dict[str, Any]]:
    """Stand-ins for the server: what attacks aim at. Nothing but the sandbox protects them."""
    with tempfile.TemporaryDirectory(prefix="glmkit-aim-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "key").write_text("secret")
        (folder / "key").chmod(0o666)
        (folder / "package").mkdir()
        (folder / "package").chmod(0o777)
        sleeping = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(300)"]
        victims = [subprocess.Popen(sleeping, env={"SECRET": "1"}) for _ in range(2)]
        tcp, udp, tcp6 = socket.socket(), socket.socket(type=socket.SOCK_DGRAM), None
        local, abstract, unique = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX), f"glmkit-{os.getpid()}"
        tcp.bind(("127.0.0.1", 0))
        udp.bind(("127.0.0.1", 0))
        local.bind(name + "/socket")
        os.chmod(name + "/socket", 0o666)
        abstract.bind("\0" + unique)
        for server in (tcp, local, abstract):
            server.listen()
        if socket.has_ipv6:
            try:
                tcp6 = socket.create_server(("::1", 0), family=socket.AF_INET6)
            except OSError:
                tcp6 = None
        descriptor = os.dup2(os.open(folder / "key", os.O_RDONLY), 77, inheritable=True)
        yield {
            "folder": name,
            "package": str(folder / "package"),
            "victim": victims[0].pid,
            "second_victim": victims[1].pid,
            "port": tcp.getsockname()[1],
            "udp": udp.getsockname()[1],
            "port6": tcp6.getsockname()[1] if tcp6 else 1,
            "unique": unique,
            "descriptor": descriptor,
            "program": python_for_everybody() or sys.executable,
        }
        os.close(descriptor)
        for victim in victims:
            victim.kill()
            victim.wait()
        for server in (tcp, udp, local, abstract, *([tcp6] if tcp6 else [])):
            server.close()


Outcomes = Callable[..., dict[str, str]]


@pytest.fixture(scope="module")
def outcomes(aim: dict[str, Any]) -> Outcomes:
    """From layers left out to the outcomes of the attacks that they are for; of all attacks for none."""

    @functools.cache
    def attempt(off: frozenset[str], level: Level = Level.FULL) -> dict[str, str]:
        attacks = {attack.name: attack.code for attack in ATTACKS if not off or attack.off == off}
        if level < Level.FULL:
            attacks = {name: code for name, code in attacks.items() if name not in ENDED_BY_THE_WATCHDOG}
        real = sandbox_module.tree.read_only()
        python = python_for_everybody()
        seen = sandbox_module.tree.ReadOnly(
            (*real.runnable, aim["package"], *([python] if python else [])), real.readable
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sandbox_module.tree, "read_only", lambda: seen)
            patch.setenv("GLMKIT_TEST_SECRET", "1")
            ended = run(RUNNER, json.dumps([PRELUDE, aim, attacks]), off=off, level=level)
        found: dict[str, str] = dict(json.loads(line) for line in ended.text.splitlines() if line.startswith("["))
        missing = [name for name in attacks if name not in found]
        assert not missing, f"{missing} left nothing: status {ended.status} {ended.reason}\n{ended.text[-2000:]}"
        return found

    return attempt


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_is_stopped(attack: Attack, outcomes: Outcomes) -> None:
    assert outcomes(frozenset())[attack.name].startswith("stopped")


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_succeeds_without_its_layers(attack: Attack, outcomes: Outcomes, aim: dict[str, Any]) -> None:
    if "IPv6" in attack.name and aim["port6"] == 1:
        pytest.skip("no IPv6 here")
    if "identity" in attack.off and os.geteuid() != 0 and not attack.off & NAMESPACES:
        pytest.skip("an ordinary user loses capabilities with exec in any case")
    assert outcomes(attack.off)[attack.name] == "through"


def test_without_namespaces_the_other_layers_stop_as_much(outcomes: Outcomes) -> None:
    """Level REDUCED. What fills the disk is ended by the watchdog there; see below."""
    through = {name for name, outcome in outcomes(frozenset(), Level.REDUCED).items() if outcome == "through"}
    assert through == set()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import time\nfor i in range(6): open(f'big{i}', 'wb').write(bytes(4 << 20))\ntime.sleep(9)", "disk"),
        ("import time\nfor i in range(300): open(f'small{i}', 'wb')\ntime.sleep(9)", "files"),
    ],
)
def test_without_a_file_system_of_its_own_the_watchdog_counts_files(code: str, reason: str) -> None:
    """X-07, X-08 at level REDUCED."""
    real = sandbox_module.tree.read_only()
    seen = sandbox_module.tree.ReadOnly((*real.runnable, python_for_everybody() or ""), real.readable)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox_module.tree, "read_only", lambda: seen)
        ended = run(code, level=Level.REDUCED)
    assert (ended.status, ended.reason) == (137, reason)


# Attacks that end the process, or whose success is seen from outside


def lives(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def ends_within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Waits for a condition."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


DAEMON = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print("daemon", flush=True)
        time.sleep(300)
    os._exit(0)
os.wait()
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("lasts", ["0", "300"], ids=["the program ends", "the sandbox is closed"])
def test_daemons_end_with_their_sandbox(lasts: str) -> None:
    """X-16, X-17, X-47: a daemon that ignores signals holds the pipe; when nobody holds it, nobody is left."""
    reading, writing = os.pipe()
    with Sandbox(Level.FULL, LIMITS) as place:
        process = place.start([sys.executable, "-I", "-S", "-c", DAEMON, lasts], output=writing)
        os.close(writing)
        assert os.read(reading, 7) == b"daemon\n"
        if lasts == "0":
            assert process.wait(10) == 0
        else:
            process.close()
        assert os.read(reading, 1) == b""
    os.close(reading)


def test_daemons_outlive_an_ordinary_child() -> None:
    """X-16 without a sandbox: killing the program leaves its daemon."""
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", DAEMON, "300"], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"daemon\n"
        children = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if path.exists() and DAEMON.encode() in path.read_bytes() and int(path.parent.name) != program.pid
        ]
        program.kill()
        program.wait()
        left = [pid for pid in children if lives(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert left


def test_kill_all_reaches_only_those_inside() -> None:
    """X-18: kill(-1) leaves this process and even the keeper alone. It is not tried without the PID namespace."""
    ended = run("import os; os.fork() or os._exit(os.kill(-1, 9)); os.wait(); print('done')")
    assert ended.status in (0, 137)
    assert run("import os; os.kill(os.getppid(), 9); print(os.getppid())").text == "1\n"


@pytest.mark.parametrize(
    "code",
    ["import re; print(1, flush=True); re.match('(a+)+$', 'a' * 64 + 'b')", "print(1, flush=True); 9 ** 9 ** 9"],
    ids=["regular expression", "large number"],
)
def test_loops_in_c_are_ended_from_outside(code: str) -> None:
    """X-20, X-26: no signal handler of Python runs in there, so only a kill ends it."""
    reading, writing = os.pipe()
    with Sandbox(Level.FULL, LIMITS) as place:
        process = place.start(
            [sys.executable, "-I", "-S", "-c", f"import signal; signal.signal(2, lambda *_: None); {code}"],
            output=writing,
        )
        os.close(writing)
        assert os.read(reading, 2) == b"1\n"
        process.interrupt()
        time.sleep(0.2)
        assert process.poll() is None
        began = time.monotonic()
        process.close()
        assert time.monotonic() - began < 2.5
        assert process.poll() == 128 + signal.SIGKILL
    os.close(reading)


def test_processor_time_is_limited() -> None:
    """X-26: burning ends by itself, and does not without limits."""
    few = Limits(cpu_seconds=1)
    assert run("while True: pass", limits=few).status in (128 + signal.SIGKILL, 128 + signal.SIGXCPU)
    with pytest.raises(TimeoutError):
        run("while True: pass", limits=few, off=frozenset({"rlimits"}), seconds=2)


SHARED = """
import mmap, time
held = mmap.mmap(-1, 300 << 20)
for place in range(0, len(held), 4096): held[place] = 1
time.sleep(1)
print("through")
"""
MANY_SMALL = """
import os, time
for _ in range(8):
    if os.fork() == 0:
        held = bytes(60 << 20).replace(b"\\0", b"1")
        time.sleep(5)
time.sleep(5)
"""


@pytest.mark.parametrize(
    ("code", "off"), [(SHARED, SYSTEM_CALLS), (MANY_SMALL, frozenset())], ids=["shared memory", "many processes"]
)
def test_memory_that_limits_of_processes_miss_ends_all(code: str, off: frozenset[str]) -> None:
    """X-24: shared memory that is still mapped, and many processes of which each is small."""
    ended = run(code, off=off)
    assert (ended.status, ended.reason, ended.text) == (137, "memory", "")


def test_shared_memory_is_had_without_the_watchdog() -> None:
    """X-24: the same without the layer that stops it."""
    assert run(SHARED, off=SYSTEM_CALLS | {"watchdog"}).text == "through\n"


def test_shared_memory_that_is_no_longer_mapped_would_be_counted_nowhere() -> None:
    """X-24: why shared memory without a file is refused: the watchdog sees only what is mapped."""
    code = SHARED.replace("= 1\n", "= 1; place % MB or held.madvise(mmap.MADV_DONTNEED, 0, place + 4096)\n")
    code = code.replace("MB", str(MB))
    assert run(code, off=SYSTEM_CALLS).text == "through\n"
    assert "Operation not permitted" in run(code).text


def test_watchdog_ends_fork_bombs_alone() -> None:
    """X-15, X-21, X-22: the second layer behind RLIMIT_NPROC, which some kernels count by user and not by namespace."""
    code = "import os, time\nfor _ in range(100): os.fork() or (time.sleep(9), os._exit(0))\ntime.sleep(9)"
    assert run(code, off=frozenset({"rlimits"})).reason == "processes"


def test_open_files_are_counted_together() -> None:
    """X-24: sockets of many processes hold memory that is nobody's."""
    code = """
import os, socket, time
for _ in range(8):
    if os.fork() == 0:
        held = [socket.socketpair() for _ in range(100)]
        time.sleep(9)
time.sleep(1)
print("through")
"""
    assert run(code).reason == "open files"
    assert run(code, off=frozenset({"watchdog"})).text == "through\n"


def test_a_crash_stays_inside() -> None:
    """X-27: deep recursion in C."""
    ended = run("held = []\nfor _ in range(10**5): held = [held]\nimport sys; sys.setrecursionlimit(10**9); repr(held)")
    assert ended.status == 128 + signal.SIGSEGV


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the other call interface is one of x86_64")
def test_calls_of_other_architectures_kill() -> None:
    """X-39: number 20 is getpid for 32-bit programs and writev for others; x32 marks numbers with bit 30."""
    code = """
import ctypes, mmap, os
page = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20; int 0x80; ret
print("other", flush=True)
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))() == os.getpid())
"""
    assert run(code) == Ended("other\n", 128 + signal.SIGSYS, None)
    without = run(code, off=SYSTEM_CALLS)
    # A kernel without 32-bit calls ends it in another way.
    assert without.text == "other\nTrue\n" or without.status == 128 + signal.SIGSEGV
    x32 = "import ctypes; ctypes.CDLL(None).syscall(ctypes.c_long(0x40000000 | 39)); print('came back')"
    assert run(x32).status == 128 + signal.SIGSYS
    assert run(x32, off=SYSTEM_CALLS).text == "came back\n"


def test_nothing_is_typed_into_a_terminal() -> None:
    """X-42: a terminal that is left open to it by mistake."""
    code = """
import fcntl, os, termios
try:
    if os.getsid(0) != os.getpid(): os.setsid()
    fcntl.ioctl(1, termios.TIOCSCTTY, 0)
    for letter in b"rm": fcntl.ioctl(1, termios.TIOCSTI, bytes([letter]))
    result = "through"
except OSError as error:
    result = f"stopped {error}"
print(result)
"""

    def attempt(off: frozenset[str]) -> str:
        terminal, inside = pty.openpty()
        with Sandbox(Level.FULL, LIMITS, without=off) as place:
            place.start([sys.executable, "-I", "-S", "-c", code], output=inside).wait(10)
            said = os.read(terminal, 1000).decode()
        os.close(inside)
        os.close(terminal)
        return said

    assert "stopped" in attempt(frozenset())
    legacy = Path("/proc/sys/dev/tty/legacy_tiocsti")
    if legacy.exists() and legacy.read_text().strip() == "0":
        pytest.skip("this kernel has no TIOCSTI")
    assert "through" in attempt(SYSTEM_CALLS)


WRITE = "import os; open(os.environ['HOME'] + '/sitecustomize.py', 'w').write('1'); open('mine', 'w').write('1')"
LIST = "import os; print(sorted(os.listdir(os.environ['HOME'])), sorted(os.listdir('.')))"


def test_nothing_stays_for_the_next_session() -> None:
    """X-12: not even in the places from which Python starts code."""
    assert run(WRITE).status == 0
    assert run(LIST).text == "[] []\n"


def test_sessions_do_not_see_each_other() -> None:
    """X-48: while both run; without layers one reads the other's file."""
    read = "import sys; print(open(sys.argv[1]).read())"

    def attempt(off: frozenset[str]) -> Ended:
        python = (
            (python_for_everybody() or pytest.skip("no interpreter that every user can run")) if off else sys.executable
        )
        with Sandbox(Level.FULL, LIMITS, without=off) as place:
            first = place.start([python, "-I", "-S", "-c", "open('mine', 'w').write('1'); import time; time.sleep(60)"])
            assert ends_within(10, lambda: (first.data / "mine").exists())
            path = first.data if off else Path("/proc", str(first.pid), "root", "mnt", "data")
            return run(read, f"{path}/mine", off=off)

    assert "Error" in attempt(frozenset()).text
    assert attempt(FILES | OTHER_PROCESSES).text == "1\n"


def open_things() -> tuple[int, int, int]:
    """Descriptors and children of this process, and its folders for temporary files."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    folders = list(Path(tempfile.gettempdir()).glob("glmkit-sandbox-*"))
    return len(os.listdir("/proc/self/fd")), len(children), len(folders)


@pytest.fixture
def own_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Other tests run at the same time."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.parametrize("count", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_dropped_sandboxes_leave_nothing(count: int, own_temporary_folder: None) -> None:
    """X-50: neither closed nor ended."""
    before = open_things()
    for _ in range(count):
        place = Sandbox(Level.FULL, LIMITS)
        place.start([sys.executable, "-I", "-S", "-c", "import time; time.sleep(300)"])
        del place
    assert open_things() == before


@pytest.fixture
def own_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the launcher, which can be changed, and by whose name its processes are found."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f"launcher-{secrets.token_hex(6)}"
        shutil.copytree(sandbox_module.LAUNCHER, copy, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(sandbox_module, "LAUNCHER", copy)
        yield copy


def processes_of(launcher: Path) -> list[int]:
    """Processes that run a launcher."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(launcher).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def mounts() -> int:
    """Mounts that this process sees."""
    return len(Path("/proc/self/mounts").read_text().splitlines())


@pytest.mark.parametrize("after_seconds", [0.0, 0.04, 0.08, 0.12, 0.2, 0.4])
def test_a_killed_launcher_leaves_nothing(own_launcher: Path, after_seconds: float, own_temporary_folder: None) -> None:
    """X-51: killed while it sets up, or later."""
    before, mounted = open_things(), mounts()
    killed = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", KILLER, str(own_launcher), str(after_seconds)], stdout=subprocess.PIPE
    )
    assert killed.stdout is not None
    assert killed.stdout.readline() == b"ready\n"
    reading, writing = os.pipe()
    with Sandbox(Level.FULL, LIMITS) as place, contextlib.suppress(SandboxError):
        place.start([sys.executable, "-I", "-S", "-c", "import time; time.sleep(300)"], output=writing).wait(20)
    os.close(writing)
    assert os.read(reading, 1) == b""
    os.close(reading)
    killed.stdout.close()
    killed.wait()
    assert ends_within(5, lambda: not processes_of(own_launcher))
    assert (open_things(), mounts()) == (before, mounted)


KILLER = """
import os, signal, sys, time
from pathlib import Path
me, name = str(os.getpid()), sys.argv[1].encode()
print("ready", flush=True)
first = []
while not first:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.parent.name != me and name in path.read_bytes(): first.append(int(path.parent.name))
        except OSError: pass
time.sleep(float(sys.argv[2]))
os.kill(min(first), signal.SIGKILL)
"""

SERVER = """
import sys, types, time
package = sys.modules["glmkit"] = types.ModuleType("glmkit")
package.__path__ = [sys.argv[1]]
from glmkit.interpreter.sandbox import *
program = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(300)"]
process = Sandbox(Level[sys.argv[2]]).start(program, output=1)
print("started", process.data, process.pid, flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("level", ["FULL", "REDUCED"])
def test_everything_ends_with_the_server(level: str) -> None:
    """X-51, S-17: the server gets SIGKILL and cleans up nothing itself."""
    package = str(Path(sandbox_module.__file__).parents[1])
    python = sys.executable if level == "FULL" else python_for_everybody()
    if python is None:
        pytest.skip("no interpreter that every user can run")
    with subprocess.Popen([python, "-I", "-S", "-B", "-c", SERVER, package, level], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        started = server.stdout.readline().decode().split()
        assert started[:1] == ["started"]
        assert lives(int(started[2]))
        server.kill()
        assert server.stdout.read() == b""  # nobody holds the pipe any more
    assert level == "FULL" or ends_within(5, lambda: not Path(started[1]).parent.exists())


def test_a_failure_of_the_second_start_is_not_overlooked(own_launcher: Path) -> None:
    """X-52: the namespaces of the first start prove nothing about the second."""
    rights = own_launcher / "rights.py"
    program = [sys.executable, "-I", "-S", "-c", "open('/mnt/home/ran', 'w')"]
    with Sandbox(Level.FULL) as place:
        assert place.start(program).wait(10) == 0
    rights.write_text(rights.read_text().replace("_libc.unshare(ctypes.c_int(flags))", "_libc.unshare(-1)"))
    with Sandbox(Level.FULL) as place, pytest.raises(SandboxError, match="new namespaces: Invalid argument"):
        place.start(program)


@pytest.mark.parametrize("program", [b"", b"1234567", bytes(8)], ids=["none", "cut", "nonsense"])
def test_a_missing_filter_is_not_overlooked(program: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """X-53."""
    monkeypatch.setattr(sandbox_module, "system_calls_program", lambda **_: program)
    with Sandbox(Level.FULL) as place, pytest.raises(SandboxError, match="list of system calls"):
        place.start([sys.executable, "-I", "-S", "-c", "pass"])


@pytest.mark.parametrize("step", ["restrict_paths", "limit", "drop_identity", "gain_nothing_by_exec", "enter_new_root"])
def test_a_failing_step_is_not_overlooked(step: str, own_launcher: Path) -> None:
    """X-53 for the other layers."""
    main = own_launcher / "__main__.py"
    changed = main.read_text().replace(f"rights.{step}(", "_fails(")
    assert changed != main.read_text()
    main.write_text(changed.replace("_KILLED =", "def _fails(*a, **b): raise OSError('cut off')\n_KILLED =", 1))
    with Sandbox(Level.FULL) as place, pytest.raises(SandboxError, match="cut off"):
        place.start([sys.executable, "-I", "-S", "-c", "pass"])
