"""Prints the oldest versions that pyproject.toml allows for the package and two extras, a requirement a line."""

from __future__ import annotations

import re
from pathlib import Path

BLOCK = re.compile(r"^(?:dependencies|train|evaluate) = \[(.*?)\]", re.MULTILINE | re.DOTALL)
REQUIREMENT = re.compile(r'"([A-Za-z0-9_.-]+)(>=|==)([0-9.]+)')

text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
for block in BLOCK.findall(text):
    for name, sign, version in REQUIREMENT.findall(block):
        # The newest correction of the oldest release: 2.9 means 2.9.0, 2.9.1 and so on.
        print(f"{name}=={version}" + ("" if sign == "==" else ".*"))
