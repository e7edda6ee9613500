"""What an exported folder says of itself: `runtime/runtime.json`, written by `glmkit.export.runtime_data`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmkit.errors import CheckpointError

FOLDER, FILE = "runtime", "runtime.json"
SCHEMA = 1
_MAX_BYTES = 16 * 2**20
_PARTS = {
    "family": str,
    "tokens": dict,
    "prompt": dict,
    "reply": dict,
    "layout": dict,
    "sampling": dict,
    "graph": dict,
    "context_tokens": int,
}


@dataclass(frozen=True)
class Description:
    """The content of runtime.json.

    Args:
        folder: The exported folder.
        family: The model's name.
        tokens: The vocabulary, see `Tokens`.
        prompt: The chat format, see `glmkit.runtime.prompts`.
        reply: What ids of a reply mean: `stop_ids`, `vocabulary_size`; for chats the other fields of `ReplyForm` and
            `text_tools`, header lines whose message is text; for blanks `sop_id`.
        layout: Masks and positions, see `glmkit.runtime.layout`.
        sampling: The model's own settings, fields of `Sampling` and `max_new_tokens`.
        graph: `engine` and `file`.
        context_tokens: What prompt and answer may have together.
    """

    folder: Path
    family: str
    tokens: dict[str, Any]
    prompt: dict[str, Any]
    reply: dict[str, Any]
    layout: dict[str, Any]
    sampling: dict[str, Any]
    graph: dict[str, Any]
    context_tokens: int


def read_description(folder: Path | str) -> Description:
    """Reads what an exported folder says of itself.

    Args:
        folder: The folder.

    Returns:
        Its description.

    Raises:
        CheckpointError: There is none, or it is damaged or of another release.
    """
    path = Path(folder) / FOLDER / FILE
    if not path.is_file():
        raise CheckpointError(
            str(folder),
            [f"there is no {FOLDER}/{FILE}"],
            hint="glm export MODEL DIR --to openvino (or onnx) makes a folder to run; glm chat talks to a checkpoint",
        )
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(str(folder), [f"{FOLDER}/{FILE} has more than {_MAX_BYTES} bytes"])
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(folder), [f"{FOLDER}/{FILE} is no JSON: {error}"], hint="export it again") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else data
        raise CheckpointError(
            str(folder), [f"{FOLDER}/{FILE} has the schema {found!r:.80}; expected {SCHEMA}"], hint="export it again"
        )
    wrong = [name for name, kind in _PARTS.items() if not isinstance(data.get(name), kind)]
    if wrong:
        raise CheckpointError(
            str(folder), [f"{FOLDER}/{FILE} lacks {name}, or it is none" for name in wrong], hint="export it again"
        )
    return Description(Path(folder), **{name: data[name] for name in _PARTS})
