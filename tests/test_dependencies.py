"""A-46: versions with known holes are kept out by our bounds or by those of what we ask for, or cannot be reached.

The list is what concerns this project and was known when it was made. `pip-audit` asks a service that knows all
advisories; tests contact nothing, so run it yourself.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = ROOT / "pyproject.toml"

# A version without the hole, and what it was.
SAFE = {
    "torch": ("2.6", "CVE-2025-32434: torch.load(weights_only=True) ran code"),
    "starlette": ("0.49.1", "CVE-2024-47874, CVE-2025-54121, CVE-2025-62727: form fields, large files, ranges"),
    "h11": ("0.16", "CVE-2025-43859: chunked bodies, request smuggling"),
    "python-multipart": ("0.0.18", "CVE-2024-53981: parts without end"),
    "gradio": ("6.16", "GHSA-j36p-7w88-g82j and those before it: files of the server"),
    "jinja2": ("3.1.6", "CVE-2025-27516: the way out of its sandbox"),
    "pillow": ("10.3", "CVE-2024-28219: a buffer that overflows"),
    "tornado": ("6.5", "CVE-2025-47287: a parser that writes the log full"),
    "protobuf": ("5.29.5", "CVE-2025-4565: recursion without end"),
    "urllib3": ("2.5", "CVE-2025-50181: redirects that were switched off"),
    "requests": ("2.32.4", "CVE-2024-47081: credentials for another host"),
    "jupyter-core": ("5.8.1", "CVE-2025-30167: settings of others"),
    "pyarrow": ("14.0.1", "CVE-2023-47248: code in data files"),
    "onnx": ("1.17", "CVE-2024-5187: paths out of the folder"),
}

# What our bounds and those of our dependencies leave open: the newest version is what pip takes, but it may take less.
# Each is used only behind a check of ours, which is said here.
LEFT_OPEN = {
    "h11": "uvicorn asks for any; a length and a Transfer-Encoding together are refused by serve/protection.py",
    "pillow": "gradio and matplotlib ask for less; pictures of others are not decoded (interpreter/transcript.py)",
    "jinja2": "torch and gradio ask for less; nothing of a checkpoint or a client is rendered",
    "urllib3": "clients of the hub ask for any; they are used for downloads only",
    "requests": "the same",
    "tornado": "part of jupyter-client; its parser meets nobody here, kernels speak over pipes of their own",
    "jupyter-core": "its fault is of Windows",
    "protobuf": "tokenizer files are read whole by our own check first (tokenizers/sentencepiece_file.py)",
    "pyarrow": "part of datasets; what it reads was written by ourselves",
    "python-multipart": "part of gradio",
    "starlette": "part of fastapi and gradio",
}


def declared() -> dict[str, list[Requirement]]:
    """What pyproject.toml asks for, all extras together."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        tomllib = pytest.importorskip("tomli")
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    found: dict[str, list[Requirement]] = {}
    for text in texts:
        one = Requirement(text)
        found.setdefault(canonical(one.name), []).append(one)
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def floor_of(one: Requirement) -> Version | None:
    floors = [Version(part.version.removesuffix(".*")) for part in one.specifier if part.operator in (">=", "==", "~=")]
    return max(floors, default=None)


def floors_of_others(name: str) -> list[Version]:
    """The lower bounds that installed packages which we ask for set for another one."""
    found = []
    for package in declared():
        try:
            wanted = requires(package) or []
        except PackageNotFoundError:
            continue
        for text in wanted:
            one = Requirement(text)
            floor = floor_of(one)
            if canonical(one.name) == name and "extra" not in str(one.marker) and floor is not None:
                found.append(floor)
    return found


@pytest.mark.skipif(not PROJECT.is_file(), reason="not in a checkout")
@pytest.mark.parametrize("name", SAFE)
def test_a_version_with_a_known_hole_is_not_allowed_or_cannot_be_reached(name: str) -> None:
    safe, hole = Version(SAFE[name][0]), SAFE[name][1]
    floors = [floor for one in declared().get(name, []) if (floor := floor_of(one)) is not None]
    best = max([*floors, *floors_of_others(name)], default=Version("0"))
    assert best >= safe or name in LEFT_OPEN, f"{name} {best} is allowed, and had {hole} before {safe}"


@pytest.mark.parametrize("name", SAFE)
def test_what_is_installed_has_no_known_hole(name: str) -> None:
    try:
        installed = version(name)
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    assert Version(installed) >= Version(SAFE[name][0]), SAFE[name][1]


@pytest.mark.skipif(not PROJECT.is_file(), reason="not in a checkout")
def test_everything_that_is_asked_for_has_a_lower_bound() -> None:
    without = {
        name
        for name, ones in declared().items()
        if name != "glmkit" and not name.startswith("types-") and all(floor_of(one) is None for one in ones)
    }
    assert without == set()


@pytest.mark.skipif(not PROJECT.is_file(), reason="not in a checkout")
def test_the_server_has_no_pickle_and_no_telemetry() -> None:
    """A-44, A-47: no socket carries a pickle, and gradio's reports are switched off before it is imported."""
    sources = [*(ROOT / "src/glmkit/serve").glob("*.py"), *(ROOT / "src/glmkit/web").glob("*.py")]
    sources += (ROOT / "src/glmkit/interpreter").glob("*.py")
    assert len(sources) > 40
    for source in sources:
        text = source.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) (pickle|marshal|shelve|dill|cloudpickle)\b", text, re.M), source
    assert "GRADIO_ANALYTICS_ENABLED" in "".join(source.read_text(encoding="utf-8") for source in sources)
