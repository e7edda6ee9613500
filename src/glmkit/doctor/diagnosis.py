"""All checks by name, and their findings as JSON and as lines to read.

diagnose()   findings, and facts of the machine; plain values, ready for JSON
describe()   the same as lines
mend()       what can be done without asking
"""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from glmkit import machine
from glmkit.doctor import hardware, outside, places, software
from glmkit.doctor.finding import Finding, Repair, fail
from glmkit.errors import GlmkitError
from glmkit.translation import Language, translate

SCHEMA = 2
CHECKS: Mapping[str, Callable[[], Finding]] = {
    "python": software.python,
    "torch": software.torch,
    "transformers": software.transformers,
    "packages": software.packages,
    "packages fit": software.fit,
    "extras": software.extras,
    "cpu": hardware.cpu,
    "threads": hardware.threads,
    "kernels": software.kernels,
    "compiler": software.compiler,
    "openmp": hardware.openmp,
    "accelerator": hardware.accelerator,
    "memory": hardware.memory,
    "shared memory": hardware.shared_memory,
    "huge pages": hardware.huge_pages,
    "numa": hardware.numa,
    "limits": hardware.limits,
    "disk": places.disk,
    "models": places.models,
    "downloads": places.downloads,
    "leftovers": places.leftovers,
    "remote code": places.remote_code,
    "state": places.state,
    "conversations": places.conversations,
    "cache": places.cache,
    "encoding": outside.encoding,
    "terminal": outside.terminal,
    "ports": outside.ports,
    "clock": outside.clock,
    "sandbox": software.sandbox,
}
"""Every check but that of the network, which is asked whether it may contact somebody."""
_WIDTH = 100
_CURE: Mapping[Language, str] = {"en": "cure: ", "zh": "解决办法："}
_SAFE: Mapping[Language, str] = {
    "en": "glm doctor --fix does what is safe",
    "zh": "glm doctor --fix 会完成其中安全的部分",
}


def examine(*, online: bool = False) -> dict[str, Finding]:
    """Runs all checks.

    Args:
        online: Whether the hub and ModelScope are contacted; nothing else is, in any case.

    Returns:
        What each found, by its name.
    """
    checks = {**CHECKS, "network": lambda: outside.network(online)}
    return {name: _run(check) for name, check in checks.items()}


def _run(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except ModuleNotFoundError as error:
        return fail(f"this needs the package {error.name}, which is not installed", f"pip install {error.name}")
    except GlmkitError as error:
        return fail(error.message, error.hint)
    except Exception as error:  # a doctor goes on to the next patient
        return fail(f"could not be checked: {type(error).__name__}: {error}", None)


def mend(findings: Mapping[str, Finding]) -> list[str]:
    """Does what can be done without asking: makes folders, removes what was left half.

    Args:
        findings: What `examine` returned.

    Returns:
        A line for each repair: what was done, or why it could not be.
    """
    return [_repaired(repair) for finding in findings.values() for repair in finding.repairs]


def _repaired(repair: Repair) -> str:
    try:
        repair.run()
    except OSError as error:
        return f"{repair.does}: {error.strerror}"
    return repair.does


def as_json(findings: Mapping[str, Finding]) -> dict[str, Any]:
    """Findings and facts as plain values.

    Args:
        findings: What `examine` returned.

    Returns:
        schema; status, that of the worst check; checks: name, status, reason, cure and repairs of each; and machine,
        see `facts`.
    """
    listed = [
        {
            "name": name,
            "status": one.status,
            "reason": one.reason,
            "cure": one.cure,
            "repairs": [repair.does for repair in one.repairs],
        }
        for name, one in findings.items()
    ]
    return {"schema": SCHEMA, "status": worst(findings), "checks": listed, "machine": facts()}


def facts() -> dict[str, Any]:
    """What the machine is.

    Returns:
        versions, cpu, memory_bytes (total, available), huge_pages, numa_nodes; and where torch is installed
        torch_threads, openmp, devices (name, memory_bytes), kernels (the fields of `glmkit.kernels.build.Status`, and
        problem) and runs_on (kind of weight -> what multiplies with it).
    """
    named = ("glmkit", "torch", "transformers")
    found: dict[str, Any] = {
        "versions": {"python": platform.python_version()} | {name: software.version_of(name) for name in named},
        "cpu": machine.cpu(),
        "memory_bytes": {"total": machine.memory_bytes("MemTotal"), "available": machine.memory_bytes("MemAvailable")},
        "huge_pages": machine.huge_pages(),
        "numa_nodes": machine.numa_nodes(),
    }
    try:
        import torch

        from glmkit import devices
    except ImportError:
        return found
    kernels = software.kernel_facts()
    return found | {
        "torch_threads": torch.get_num_threads(),
        "openmp": machine.openmp_libraries(),
        "devices": devices.described(),
        "kernels": kernels,
        "runs_on": software.runs_on(kernels["level"]),
    }


def worst(findings: Mapping[str, Finding]) -> str:
    """The status of the worst finding."""
    statuses = {one.status for one in findings.values()}
    return "fail" if "fail" in statuses else "warn" if "warn" in statuses else "ok"


def describe(findings: Mapping[str, Finding], to: Language = "en") -> str:
    """Findings as lines to read: the status, the check, the reason, and below it the cure.

    Args:
        findings: What `examine` returned.
        to: The language of reasons and cures; names and statuses are those of the JSON.
    """
    width, lines = max(map(len, findings)), []
    for name, one in findings.items():
        lines += _folded(f"{one.status:4}  {name.ljust(width)}  ", translate(one.reason, to))
        if one.cure:
            lines += _folded(f"{' ' * (6 + width)}  {_CURE[to]}", translate(one.cure, to))
    counted = {status: sum(one.status == status for one in findings.values()) for status in ("ok", "warn", "fail")}
    lines += ["", ", ".join(f"{number} {status}" for status, number in counted.items())]
    if any(one.repairs for one in findings.values()):
        lines.append(_SAFE[to])
    return "\n".join(lines)


def _folded(head: str, text: str) -> list[str]:
    """A text behind a head; what is on further lines stands below its beginning."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, _WIDTH, break_long_words=False) or [""]]
    return [head + lines[0], *(" " * len(head) + line for line in lines[1:])]
