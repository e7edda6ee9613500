"""Checks of Python, of packages and how they fit together, of native kernels and of the sandbox."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from typing import Any

from glmkit.doctor.finding import Finding, fail, ok, warn
from glmkit.errors import GlmkitError

OURS = "glmkit"
# Packages that were built for one release of another. When that one changes, importing them fails in strange places.
_BUILT_FOR = ("torch", "transformers", "tokenizers", "huggingface-hub", "torchvision", "torchaudio", "torchao", "peft",
              "accelerate", "bitsandbytes", "deepspeed", "gradio", "gradio-client", "openvino-tokenizers")  # fmt: skip
_NOT_FOR_USERS = ("dev", "all")


def python() -> Finding:
    """Whether this Python is one that the package was made for."""
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    wanted = (metadata.metadata(OURS).get_all("Requires-Python") or [""])[0]
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return fail(f"Python {version}, expected {wanted}", "make an environment with a newer Python")
    return ok(f"{version} ({platform.python_implementation()}, {platform.system()})")


def torch() -> Finding:
    """Whether torch is there, in a version that the tests cover."""
    return _required("torch")


def transformers() -> Finding:
    """Whether transformers is there, in a version that the tests cover."""
    return _required("transformers")


def _required(name: str) -> Finding:
    wanted = next(need for need in _needs(OURS) if need.name == name)
    found = version_of(name)
    if found is None:
        without = "; glm run, which answers from an exported folder, does without"
        return fail(f"{name} is not installed", f'pip install "{wanted}"{without}')
    if not wanted.specifier.contains(found, prereleases=True):
        return fail(f"{name} {found}, expected {wanted.specifier}", f'pip install "{wanted}"')
    return ok(found)


def packages() -> Finding:
    """Whether all other packages that glmkit always needs are there."""
    needs = [need for need in _needs(OURS) if need.name not in ("torch", "transformers")]
    wrong = [need for need in needs if _is_wrong(need)]
    if wrong:
        found = ", ".join(f"{need.name} {version_of(need.name) or 'is missing'}" for need in wrong)
        return fail(found, "pip install " + " ".join(f'"{need.name}{need.specifier}"' for need in wrong))
    return ok(", ".join(f"{need.name} {version_of(need.name)}" for need in needs))


def fit() -> Finding:
    """Whether packages that were built for one release of another find that release."""
    wrong = [
        (owner, need)
        for owner in _BUILT_FOR
        if version_of(owner) is not None
        for need in _needs(owner)
        if need.name in (*_BUILT_FOR, "numpy", "safetensors") and version_of(need.name) and _is_wrong(need)
    ]
    if wrong:
        said = [f"{owner} {version_of(owner)} needs {need}, found {version_of(need.name)}" for owner, need in wrong]
        owners = sorted({owner for owner, _ in wrong} - {"torch", "transformers"}) or [wrong[0][1].name]
        return warn("; ".join(said), f"pip install --upgrade {' '.join(owners)}; or uninstall what is not needed")
    return ok("the installed packages fit together")


def extras() -> Finding:
    """Which optional parts can be used."""
    provided = [name for name in metadata.metadata(OURS).get_all("Provides-Extra") or [] if name not in _NOT_FOR_USERS]
    complete: list[str] = []
    missing: list[str] = []
    wrong: list[Any] = []
    for extra in provided:
        needs = list(_needs_of_extra(extra))
        absent = [need.name for need in needs if version_of(need.name) is None]
        wrong += [need for need in needs if need.name not in absent and _is_wrong(need)]
        if absent:
            missing.append(f"{extra} ({', '.join(absent)})")
        else:
            complete.append(extra)
    reason = f"there: {', '.join(complete) or 'none'}; not there: {', '.join(missing) or 'none'}"
    if wrong:
        found = ", ".join(f"{need.name} {version_of(need.name)}, expected {need.specifier}" for need in _unique(wrong))
        return warn(found, "pip install " + " ".join(f'"{need.name}{need.specifier}"' for need in _unique(wrong)))
    return ok(reason)


def kernels() -> Finding:
    """Whether native code computes; the first time it is compiled."""
    status = kernel_facts()
    level, torch_level, variable = status["level"], *_kernel_names()
    if status["problem"]:
        return fail(status["problem"], status["hint"] or f"unset {variable}")
    if variable in os.environ:
        return warn(f"{variable}={os.environ[variable]} is set", f"unset {variable}: the best level is taken then")
    if level == torch_level:
        return warn(f"no native kernels ({status['why']}): torch computes", status["hint"] or "see docs/kernels.md")
    if status["hint"]:
        return warn(status["why"], status["hint"])
    if not status["openmp"]:
        return warn(
            f"the kernels use one thread, {status['compiler']} has no OpenMP",
            f"another CXX, and rm {status['path']}",
        )
    return ok(f"{level}: {status['why']}")


def compiler() -> Finding:
    """Whether native kernels could be compiled."""
    from glmkit.kernels.build import find_compiler

    found = find_compiler()
    if found is None:
        return warn("there is no C++ compiler, and kernels that are not built yet cannot be", "apt install g++")
    return ok(found[1])


def sandbox() -> Finding:
    """How well the code of a model can be isolated, measured by trying to break out; takes about a second."""
    from glmkit.interpreter.measure import measure
    from glmkit.interpreter.sandbox import Level

    try:
        found = measure(Level.REDUCED)
    except GlmkitError as error:
        return warn(f"the code interpreter cannot be used: {error.message}", error.hint)
    if found.level is Level.FULL:
        return ok(f"FULL: {found.sentence_en}")
    cure = "sysctl user.max_user_namespaces=10000; glm web --code-interpreter-minimum reduced takes it as it is"
    return warn(f"{found.level.name}: {found.sentence_en}", cure)


# --- facts ---


def kernel_facts() -> dict[str, Any]:
    """The fields of the kernels' status, with `problem` None; or why there is none, where the user named a level."""
    import torch

    from glmkit.kernels import build

    try:
        status = asdict(build.status())
        return status | {"path": str(status["path"]) if status["path"] else None, "problem": None}
    except GlmkitError as error:
        compiler = build.find_compiler()
        return {
            "level": None,
            "why": None,
            "hint": error.hint,
            "path": None,
            "features": sorted(build.cpu_features()),
            "compiler": compiler[1] if compiler else None,
            "openmp": False,
            "threads": torch.get_num_threads(),
            "problem": error.message,
        }


def runs_on(level: str | None) -> dict[str, str]:
    """Kind of weight -> what multiplies with it on the CPU."""
    if level is None:
        return {}
    if level == _kernel_names()[0]:
        return {"int8, int4": "torch, which makes a float matrix of them at each product", "float": "torch"}
    return {
        "int8, int4": f"{level} kernels, if the model computes in bfloat16 or float16; in float32 torch, exactly",
        "float": f"torch; tokens one by one with {level} kernels",
    }


def _kernel_names() -> tuple[str, str]:
    """What the level without native code is called, and the variable that names a level."""
    from glmkit.kernels.levels import TORCH, VARIABLE

    return TORCH, VARIABLE


def version_of(package: str) -> str | None:
    """The installed version of a package; None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _needs(package: str, extra: str = "") -> Iterator[Any]:
    """The requirements of a package that hold here: always, or those of an extra only."""
    from packaging.requirements import Requirement

    for text in metadata.requires(package) or []:
        need = Requirement(text)
        marker = need.marker
        if marker is None or marker.evaluate({"extra": ""}):
            wanted = not extra
        else:
            wanted = bool(extra) and marker.evaluate({"extra": extra})
        if wanted:
            yield need


def _needs_of_extra(extra: str) -> Iterator[Any]:
    """The requirements of one of our extras, and of those that it is made of."""
    for need in _needs(OURS, extra):
        if need.name == OURS:
            for part in need.extras:
                yield from _needs_of_extra(part)
        else:
            yield need


def _is_wrong(need: Any) -> bool:
    """Whether a package is missing, or another version than needed."""
    found = version_of(need.name)
    return found is None or not need.specifier.contains(found, prereleases=True)


def _unique(needs: list[Any]) -> list[Any]:
    return list({need.name: need for need in needs}.values())
