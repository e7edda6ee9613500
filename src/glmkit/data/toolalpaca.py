"""ToolAlpaca's training file: simulated APIs, each with its documentation and tasks that were solved with its tools.

    {"NLDocumentation": "getRain: …", "Instances": [
        {"input": q, "intermediate_steps": [[[tool, "{…}", "thought … Action: …"], result], …],
         "Final Thought": "…", "output": a}]}

A task becomes a ChatGLM3 conversation whose tools are the one text of documentation.

Source: ChatGLM3 @0ffbe4ca, the script format_tool_alpaca.py (behaviour, not code). Different here: a step without a
thought gives no empty assistant message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from glmkit.errors import DataError


def instances(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Divides an API into its tasks.

    Args:
        row: One API of the file.

    Returns:
        For each task what to add to its place in the file, and what `conversation` reads.

    Raises:
        DataError: It is no API with documentation and tasks.
    """
    documentation, tasks = row.get("NLDocumentation"), row.get("Instances")
    if not isinstance(documentation, str) or not isinstance(tasks, list):
        raise DataError("an API of ToolAlpaca needs 'NLDocumentation' (text) and 'Instances' (list)")
    return [
        (f", instance {number}", {"NLDocumentation": documentation, "instance": task})
        for number, task in enumerate(tasks, start=1)
    ]


def conversation(part: Mapping[str, Any]) -> dict[str, Any]:
    """Makes a ChatGLM3 conversation of a task.

    Args:
        part: What `instances` gave.

    Returns:
        A row with `tools` and `conversations`: the question, for each step a thought and a tool turn, then the final
        thought and the answer.

    Raises:
        DataError: The task is not whole, or the arguments of a call cannot be read.
    """
    task = part["instance"]
    if not isinstance(task, Mapping):
        raise DataError(f"an instance must be an object, this is {type(task).__name__}")
    for field in ("input", "Final Thought", "output"):
        if not isinstance(task.get(field), str):
            raise DataError(f"an instance needs {field!r} (text)")
    steps = task.get("intermediate_steps")
    if not isinstance(steps, list):
        raise DataError("an instance needs 'intermediate_steps' (list)")
    turns: list[dict[str, Any]] = [{"role": "user", "content": task["input"]}]
    for number, step in enumerate(steps, start=1):
        turns += _step(step, number)
    turns.append({"role": "assistant", "content": f"{task['Final Thought']}\n{task['output']}"})
    return {"tools": [part["NLDocumentation"]], "conversations": turns}


def _step(step: Any, number: int) -> list[dict[str, Any]]:
    """The thought, if there is one, and the call with its result."""
    try:
        (name, written, reaction), observation = step
        thought = reaction.split("Action:")[0].strip()
    except (TypeError, ValueError, AttributeError):
        raise DataError(f"step {number} must be [[tool, arguments, text], result], this is {step!r:.80}") from None
    try:
        parameters = json.loads(written)
    except (TypeError, ValueError, RecursionError):
        raise DataError(f"step {number}: the arguments of {name} are no JSON: {written!r:.80}") from None
    if not isinstance(parameters, dict):
        raise DataError(f"step {number}: the arguments of {name} must be an object, this is {written!r:.80}")
    call = {"role": "tool", "name": name, "parameters": parameters, "observation": observation}
    return [{"role": "assistant", "content": thought}, call] if thought else [call]
