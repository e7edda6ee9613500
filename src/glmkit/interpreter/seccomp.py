"""Which system calls code inside the sandbox may make, as a seccomp program.

A list of what is allowed: computing, files that are in reach anyway, threads, child processes, and Unix sockets to
listen on. Everything else does not exist (ENOSYS), so that libraries take their fallback. Calls that are harmless with
some arguments only are allowed with these and refused (EPERM) with others. The filter is a sequence of classic BPF
instructions, written here and installed by `launcher/`; nothing but the standard library is needed for it.

Source: Linux, Documentation/userspace-api/seccomp_filter.rst; numbers from asm/unistd_64.h and asm-generic/unistd.h.
"""

from __future__ import annotations

import platform
import struct
from dataclasses import dataclass

# name:number on x86_64:number on aarch64, "-" where that architecture has no such call.
_ALLOWED = """
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69 pwritev:296:70 preadv2:327:286
pwritev2:328:287 lseek:8:62 close:3:57 close_range:436:436 fsync:74:82 fdatasync:75:83 sync_file_range:277:84
fadvise64:221:223 readahead:187:213 copy_file_range:326:285 sendfile:40:71
stat:4:- fstat:5:80 lstat:6:- newfstatat:262:79 statx:332:291 statfs:137:43 fstatfs:138:44
access:21:- faccessat:269:48 faccessat2:439:439 getdents:78:- getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50
mkdir:83:- mkdirat:258:34 rmdir:84:- unlink:87:- unlinkat:263:35 rename:82:- renameat:264:38 renameat2:316:276
link:86:- linkat:265:37 symlink:88:- symlinkat:266:36 readlink:89:- readlinkat:267:78 chown:92:- fchown:93:55
lchown:94:- fchownat:260:54 utime:132:- utimes:235:- futimesat:261:- utimensat:280:88 truncate:76:45 ftruncate:77:46
fallocate:285:47 umask:95:166 flock:73:32 getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11
llistxattr:195:12 flistxattr:196:13
dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59 poll:7:- ppoll:271:73 select:23:- pselect6:270:72
epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22 epoll_pwait2:441:441
eventfd:284:- eventfd2:290:19 signalfd:282:- signalfd4:289:74 timerfd_create:283:85 timerfd_settime:286:86
timerfd_gettime:287:87
munmap:11:215 mremap:25:216 mprotect:10:226 madvise:28:233 brk:12:214 msync:26:227 mincore:27:232
mlock:149:228 munlock:150:229 pkey_alloc:330:289 pkey_free:331:290 pkey_mprotect:329:288 membarrier:324:283
fork:57:- vfork:58:- execve:59:221 exit:60:93 exit_group:231:94 wait4:61:260 waitid:247:95 getpid:39:172 getppid:110:173
gettid:186:178 getpgid:121:155 getpgrp:111:- setpgid:109:154 getsid:124:156 setsid:112:157 set_tid_address:218:96
set_robust_list:273:99 get_robust_list:274:100 rseq:334:293 arch_prctl:158:- getrlimit:97:163 getrusage:98:165
times:100:153 sched_yield:24:124 sched_getaffinity:204:123 sched_getparam:143:121 sched_getscheduler:145:120
sched_get_priority_max:146:125 sched_get_priority_min:147:126 getpriority:140:141 getcpu:309:168 capget:125:90
getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177 getresuid:118:148 getresgid:120:150 getgroups:115:158
uname:63:160 sysinfo:99:179 getrandom:318:278
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigsuspend:130:133
rt_sigtimedwait:128:137 sigaltstack:131:132 restart_syscall:219:128 pause:34:- alarm:37:- getitimer:36:102
setitimer:38:103
time:201:- gettimeofday:96:169 clock_gettime:228:113 clock_getres:229:114 clock_nanosleep:230:115 nanosleep:35:101
futex:202:98 futex_waitv:449:449 timer_create:222:107 timer_settime:223:110 timer_gettime:224:108
timer_getoverrun:225:109 timer_delete:226:111
bind:49:200 listen:50:201 accept:43:202 accept4:288:242 getsockname:51:204 getpeername:52:205 getsockopt:55:209
setsockopt:54:208 shutdown:48:210 sendto:44:206 sendmsg:46:211 recvfrom:45:207 recvmsg:47:212 recvmmsg:299:243
"""

_SIGNALS = "kill:62:129 tkill:200:130 tgkill:234:131"

_ALL = 0xFFFFFFFF
_SETUID_BITS = 0o6000
_NEW_NAMESPACE = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
_UNTRACED = 0x00800000
_MAP_SHARED, _MAP_ANONYMOUS, _MAP_HUGETLB = 0x01, 0x20, 0x40000


@dataclass(frozen=True)
class _Check:
    """An argument that must be one of `values` under `mask`. The kernel reads 32 bits of all arguments checked here."""

    argument: int
    mask: int
    values: tuple[int, ...]


_STREAM_OF_UNIX = (
    _Check(0, _ALL, (1,)),  # AF_UNIX
    # Streams and SOCK_SEQPACKET; a datagram socket could write to any socket whose name it knows, without connect().
    _Check(1, 0xF, (1, 5)),
)

_CONDITIONAL: dict[str, tuple[_Check, ...]] = {
    "socket:41:198": _STREAM_OF_UNIX,
    "socketpair:53:199": _STREAM_OF_UNIX,
    "clone:56:220": (_Check(0, _NEW_NAMESPACE | _UNTRACED, (0,)),),
    # Not shared and anonymous: such memory outlives its mapping, and is then in no number that the watchdog sees.
    "mmap:9:222": (_Check(3, _MAP_SHARED | _MAP_ANONYMOUS | _MAP_HUGETLB, (0, _MAP_SHARED, _MAP_ANONYMOUS)),),
    "prlimit64:302:261": (_Check(0, _ALL, (0,)),),
    "sched_setaffinity:203:122": (_Check(0, _ALL, (0,)),),
    # What ZeroMQ asks for, and ends the process without: to stay with the ordinary policy.
    "sched_setscheduler:144:119": (_Check(1, _ALL, (0,)),),
    "open:2:-": (_Check(2, _SETUID_BITS, (0,)),),
    "openat:257:56": (_Check(3, _SETUID_BITS, (0,)),),
    "creat:85:-": (_Check(1, _SETUID_BITS, (0,)),),
    "chmod:90:-": (_Check(1, _SETUID_BITS, (0,)),),
    "fchmod:91:52": (_Check(1, _SETUID_BITS, (0,)),),
    "fchmodat:268:53": (_Check(2, _SETUID_BITS, (0,)),),
    # Duplicates, flags and locks; not owners of signals, leases and pipe sizes.
    "fcntl:72:25": (_Check(1, _ALL, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)),),
    # FIONREAD, FIONBIO, FIOCLEX, FIONCLEX, TCGETS, TCGETS2, TIOCGWINSZ; TIOCSTI and TIOCLINUX are what this is about.
    "ioctl:16:29": (_Check(1, _ALL, (0x541B, 0x5421, 0x5451, 0x5450, 0x5401, 0x802C542A, 0x5413)),),
    # Names of threads and memory, and questions. Not PR_SET_PDEATHSIG, and not PR_SET_DUMPABLE, which hides memory
    # from the watchdog.
    "prctl:157:167": (_Check(0, _ALL, (2, 3, 15, 16, 21, 23, 30, 39, 0x53564D41)),),
}

_ONLY_OWN_GROUP = {"kill:62:129": (_Check(0, _ALL, (0,)),)}

_ARCHITECTURES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}
_X32_BIT = 0x40000000

_ALLOW = 0x7FFF0000
_KILL_PROCESS = 0x80000000
_ERRNO = 0x00050000
_EPERM, _ENOSYS = 1, 38

_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


def _checked(checks: tuple[_Check, ...]) -> list[bytes]:
    """Instructions that end the filter: allowed if every check holds, else refused."""
    block: list[bytes] = []
    for check in checks:
        block.append(_instruction(_LOAD, _ARGUMENTS_AT + 8 * check.argument))
        block.append(_instruction(_AND, check.mask))
        remaining = len(check.values)
        for value in check.values:
            block.append(_instruction(_EQUAL, value, if_true=remaining))
            remaining -= 1
        block.append(_instruction(_RETURN, _ERRNO | _EPERM))
    return [*block, _instruction(_RETURN, _ALLOW)]


def system_calls_program(*, signals_are_scoped: bool, machine: str | None = None) -> bytes:
    """The filter for this machine.

    Args:
        signals_are_scoped: Something else (a PID namespace, Landlock) keeps signals inside. Otherwise a process may
            signal its own group only.
        machine: Name of the architecture as in `platform.machine()`; None: this one.

    Returns:
        The instructions, 8 bytes each, for PR_SET_SECCOMP.

    Raises:
        ValueError: If the architecture has no table here.
    """
    machine = platform.machine() if machine is None else machine
    if machine not in _ARCHITECTURES:
        raise ValueError(f"no list of system calls for {machine}; there is one for {', '.join(_ARCHITECTURES)}")
    architecture, column = _ARCHITECTURES[machine]
    plain = _ALLOWED + (_SIGNALS if signals_are_scoped else "")
    conditional = _CONDITIONAL if signals_are_scoped else _CONDITIONAL | _ONLY_OWN_GROUP

    program = [
        _instruction(_LOAD, _ARCHITECTURE_AT),
        _instruction(_EQUAL, architecture, if_true=1),
        # Numbers mean other calls under another architecture (int 0x80 on x86_64), so there is no list for it.
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD, _NUMBER_AT),
    ]
    if machine == "x86_64":
        program += [_instruction(_AT_LEAST, _X32_BIT, if_false=1), _instruction(_RETURN, _KILL_PROCESS)]
    for call in plain.split():
        number = call.split(":")[column]
        if number != "-":
            program += [_instruction(_EQUAL, int(number), if_false=1), _instruction(_RETURN, _ALLOW)]
    for call, checks in conditional.items():
        number = call.split(":")[column]
        if number != "-":
            block = _checked(checks)
            program += [_instruction(_EQUAL, int(number), if_false=len(block)), *block]
    program.append(_instruction(_RETURN, _ERRNO | _ENOSYS))
    return b"".join(program)
