"""A function in a process of its own: how everything that was written is opened again, as its user will."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from glmkit.errors import OutputError

_CODE = """
import importlib, json, sys
order = json.load(sys.stdin)
for name in order["forbidden"]:
    sys.modules[name] = None
found = getattr(importlib.import_module(order["module"]), order["function"])(**order["arguments"])
print("\\n" + json.dumps(found))
"""


def in_new_process(
    function: str,
    arguments: Mapping[str, Any],
    *,
    forbidden: tuple[str, ...] = (),
    light: bool = False,
    hint: str = "nothing was kept",
) -> Any:
    """Calls a function in a new process, which knows nothing but its arguments.

    Args:
        function: "module:name".
        arguments: What can be said as JSON.
        forbidden: Packages that may not be imported there; a machine without them is imitated so.
        light: Whether `import glmkit` leaves out registering with transformers, as the command does.
        hint: What became of what was written, and what to do, if the process fails.

    Returns:
        What the function returned, which must be plain values.

    Raises:
        OutputError: The process failed; its last line says why.
    """
    module, _, name = function.partition(":")
    order = {"module": module, "function": name, "arguments": dict(arguments), "forbidden": list(forbidden)}
    done = subprocess.run(
        [sys.executable, "-c", "import glmkit_command\n" * light + _CODE],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise OutputError(f"what was written could not be opened again: {last[:500]}", hint=hint)
    return json.loads(done.stdout.splitlines()[-1])
