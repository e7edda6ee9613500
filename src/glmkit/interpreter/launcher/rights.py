"""The steps in which a process gives up rights: its root, its identity, its limits, its paths, its system calls.

Each takes what `sandbox.py` decided, does it, and raises StepFailedError if the kernel will not.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import stat
import struct
from typing import Any

NAMESPACES = {
    "mount": 0x00020000, "pid": 0x20000000, "net": 0x40000000, "ipc": 0x08000000 | 0x04000000 | 0x02000000,
}  # fmt: skip
_NEW_USER_NAMESPACE = 0x10000000
_USER_INSIDE = 1000

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _ATTR_NOEXEC = 1, 2, 4, 8
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_SECUREBITS, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 28, 36, 38, 47
_ROOT_MEANS_NOTHING = 0b101111
_FILE_RIGHTS = 0b111 | 1 << 14 | 1 << 15  # those of Landlock's rights that a file can have
_NEW_ROOT = "/tmp"  # any folder that exists; covered in the new mount namespace only

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class StepFailedError(Exception):
    """A right that could not be given up, or a limit that could not be set."""


def _check(result: int, step: str) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise StepFailedError(f"{step}: {os.strerror(number)}")
    return result


def _prctl(option: int, *values: int, step: str) -> None:
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    _check(_libc.prctl(option, *padded), step)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [value.encode() if value is not None else None for value in (source, target, kind, options)]
    result = _libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    _check(result, f"mount {kind or source} on {target}")


def _restrict_mount(target: str, attributes: int, *, recursive: bool) -> None:
    wanted = struct.pack("QQQQ", attributes, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    result = _libc.syscall(
        _MOUNT_SETATTR, _AT_FDCWD, target.encode(), ctypes.c_uint(flags), wanted, ctypes.c_size_t(32)
    )
    _check(result, f"mount_setattr {target}")


# The new root


def enter_new_root(tree: dict[str, Any], *, own_processes: bool) -> int:
    """Builds the tree that is seen inside and makes it the root.

    Args:
        tree: What `tree.py` wrote.
        own_processes: /proc shows this PID namespace, which is a new one.

    Returns:
        A descriptor of the folder that holds the folders one can write to.
    """
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    # Opened now: the new root covers a folder in which sources may lie.
    sources = {source: os.open(source, os.O_PATH) for source, _ in tree["binds"]}
    _mount("tmpfs", _NEW_ROOT, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,nr_inodes=4k,mode=755")
    scratch = _scratch(tree)  # first, as packages may be installed below /tmp
    for source, target in tree["binds"]:
        _bind(sources[source], target, _ATTR_RDONLY | _ATTR_NOSUID | (0 if target.startswith("/dev/") else _ATTR_NODEV))
    for path, text in tree["texts"].items():
        os.makedirs(os.path.dirname(_NEW_ROOT + path), exist_ok=True)
        with open(_NEW_ROOT + path, "x", encoding="utf-8") as file:
            file.write(text)
    for path, target in tree["links"].items():
        os.symlink(target, _NEW_ROOT + path)
    _show_processes(tree, own=own_processes)
    for descriptor in sources.values():
        os.close(descriptor)
    os.chdir(_NEW_ROOT)
    _check(_libc.pivot_root(b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "unmount the old root")
    os.chdir("/")
    _restrict_mount("/", _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, recursive=False)
    return scratch


def _bind(source: int, target: str, attributes: int) -> None:
    path = _NEW_ROOT + target
    if stat.S_ISDIR(os.fstat(source).st_mode):
        os.makedirs(path, exist_ok=True)
    elif not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(f"/proc/self/fd/{source}", path, None, _MS_BIND | _MS_REC)
    _restrict_mount(path, attributes, recursive=True)


def _scratch(tree: dict[str, Any]) -> int:
    """Mounts the file system in memory, limited in bytes and files, on whose folders one can write."""
    whole = _NEW_ROOT + "/scratch"
    os.mkdir(whole)
    options = f"size={tree['disk_bytes']},nr_inodes={tree['files']},mode=755"
    _mount("tmpfs", whole, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)
    for name, target in tree["own"].items():
        os.mkdir(f"{whole}/{name}")
        os.chown(f"{whole}/{name}", _USER_INSIDE, _USER_INSIDE)
        os.chmod(f"{whole}/{name}", 0o700)
        os.makedirs(_NEW_ROOT + target, exist_ok=True)
        _mount(f"{whole}/{name}", _NEW_ROOT + target, None, _MS_BIND)
    descriptor = os.open(whole, os.O_RDONLY | os.O_DIRECTORY)
    _check(_libc.umount2(whole.encode(), _MNT_DETACH), "unmount scratch")
    os.rmdir(whole)
    return descriptor


def _show_processes(tree: dict[str, Any], *, own: bool) -> None:
    path = _NEW_ROOT + "/proc"
    os.mkdir(path)
    if not own:
        _mount("/proc", path, None, _MS_BIND | _MS_REC)
        return
    _mount("proc", path, "proc", _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    for name in tree["hidden_in_proc"]:
        hidden = f"{path}/{name}"
        if os.path.isdir(hidden):
            _mount("tmpfs", hidden, "tmpfs", _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "size=0,nr_inodes=1")
        elif os.path.lexists(hidden):
            _mount(_NEW_ROOT + "/dev/null", hidden, None, _MS_BIND)


# Giving up rights


def drop_identity(user: int | None) -> None:
    """Drops all capabilities for good, and becomes the given user."""
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) == -1:
            break  # no such capability, or none that could be dropped
    _libc.prctl(_PR_SET_SECUREBITS, ctypes.c_ulong(_ROOT_MEANS_NOTHING), 0, 0, 0)
    if user is not None:
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _libc.prctl(_PR_CAP_AMBIENT, ctypes.c_ulong(4), 0, 0, 0)
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check(_libc.capset(header, nothing), "drop capabilities")
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        held = {line.split()[0]: int(line.split()[1], 16) for line in file if line.startswith(("CapEff", "CapPrm"))}
    if any(held.values()) or len(held) != 2:
        raise StepFailedError("capabilities are still held")


def limit(limits: dict[str, int], *, tasks_of_user: int) -> None:
    """Sets limits for this process and its children.

    Args:
        limits: Names in `resource` -> most.
        tasks_of_user: Processes and threads that the user has outside; the kernel counts these too.
    """
    for name, value in limits.items():
        number = getattr(resource, name)
        wanted = value + tasks_of_user if name == "RLIMIT_NPROC" else value
        hard = resource.getrlimit(number)[1]
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(number, (wanted, wanted))


def restrict_paths(rules: dict[str, Any]) -> None:
    """Applies what `landlock.py` wrote."""
    attributes = struct.pack("QQQ", rules["files"], rules["network"], rules["scopes"])
    created = _libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(24), ctypes.c_uint(0))
    ruleset = _check(created, "landlock_create_ruleset")
    for path, rights in rules["rules"]:
        try:
            descriptor = os.open(path, os.O_PATH)
        except (FileNotFoundError, PermissionError):
            continue  # what cannot be reached needs no permission
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _FILE_RIGHTS
        rule = struct.pack("=Qi", rights, descriptor)
        _check(_libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, ctypes.c_uint(0)), f"landlock_add_rule {path}")
        os.close(descriptor)
    _check(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, ctypes.c_uint(0)), "landlock_restrict_self")
    os.close(ruleset)


def filter_system_calls(program: bytes) -> None:
    """Applies what `seccomp.py` wrote."""
    if not program or len(program) % 8:
        raise StepFailedError("the list of system calls is missing")
    instructions = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    header = ctypes.create_string_buffer(described, len(described))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(header), step="install the list of system calls")


def enter_new_namespaces(names: list[str]) -> None:
    """Leaves the namespaces of the system: those named, and that of users. For PIDs, children do."""
    flags = _NEW_USER_NAMESPACE
    for name in names:
        flags |= NAMESPACES[name]
    _check(_libc.unshare(ctypes.c_int(flags)), "new namespaces")


def hide_host_name() -> None:
    """Gives the namespace a name of its own."""
    _check(_libc.sethostname(b"sandbox", ctypes.c_size_t(7)), "sethostname")


def end_with_parent() -> None:
    """Has this process killed when its parent ends. A change of user resets it."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, step="end with the parent")


def collect_orphans() -> None:
    """Has grandchildren without parents become children of this process."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, step="collect orphans")


def go_first_without_memory() -> None:
    """Has the kernel end this process and its children before others when the machine runs out of memory."""
    with open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
        file.write("1000")


def close_memory() -> None:
    """Keeps processes of the same user out of this one's memory and descriptors, until it runs another program."""
    _prctl(_PR_SET_DUMPABLE, 0, step="close own memory")


def gain_nothing_by_exec() -> None:
    """Makes setuid programs ordinary ones, for good."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, step="no_new_privs")
