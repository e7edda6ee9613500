"""What stands in a folder beside the weights, so that this toolkit and the official code load it.

config.json             the source's, with what only its python files or its tokenizer said
tokenizer files         the vocabulary byte for byte; a tokenizer_config.json without the keys that official
                        tokenizers have as read-only properties (eos_token, pad_token, unk_token …)
generation_config.json, chat_template.jinja, licences    as they are
README.md               what it was made of, and the licence of the weights
*.py                    only on request, unchanged, never run
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from glmkit.checkpoint import Folder
from glmkit.families import find_family
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.checked_config import CheckedConfig
from glmkit.writing import write_bytes_atomic, write_text_atomic

LICENCES = ("LICENSE", "LICENSE.txt", "MODEL_LICENSE", "MODEL_LICENSE.txt", "NOTICE")
CARRIED = ("generation_config.json", "chat_template.jinja", *LICENCES)
"""Files that are copied as they are."""
CODE = ("modeling_chatglm.py", "configuration_chatglm.py", "tokenization_chatglm.py", "quantization.py",
        "modeling_glm.py", "configuration_glm.py", "tokenization_glm.py")  # fmt: skip
"""Python files of official folders."""
_CODE_BYTES = 4 << 20
# Official tokenizers of ChatGLM2 and later compute these; given as arguments they fail: "can't set attribute".
_READ_ONLY = ("eos_token", "pad_token", "unk_token", "bos_token", "eos_token_id", "pad_token_id", "unk_token_id",
              "special_tokens_map", "additional_special_tokens", "extra_special_tokens")  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Args:
        path: The new folder or file.
        to: Its form.
        tensors: Number of tensors.
        dtypes: Names of the dtypes in it.
        bytes_before: Of the source's tensors.
        bytes_after: Of the result's.
        difference: How far its logits are from the source's, relative to their size; None: not compared, and `notes`
            say why.
        notes: What the user should know, in sentences.
    """

    path: str
    to: str
    tensors: int
    dtypes: list[str]
    bytes_before: int
    bytes_after: int
    difference: float | None = None
    notes: list[str] = field(default_factory=list)


def completed_config(folder: Folder, config: CheckedConfig) -> dict[str, Any]:
    """The content of a folder's config.json, with what only its python files or its tokenizer said, and without them.

    Args:
        folder: The folder.
        config: Its config, as read.
    """
    values = {name: value for name, value in folder.config.items() if name != "auto_map"}
    values.setdefault("architectures", [config.first_architecture])
    if isinstance(config, ChatGLM2Config):
        said = {"generation": config.generation, "rope_ratio_applies_to": config.rope_ratio_applies_to}
        values |= {name: value for name, value in said.items() if value is not None}
    return values


def write_config(new: Path, values: Mapping[str, Any]) -> None:
    """Writes config.json.

    Args:
        new: The folder.
        values: Its content.
    """
    write_text_atomic(new / "config.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def complete_folder(
    new: Path, folder: Folder, values: Mapping[str, Any], tokenizer: Any, *, made_by: str, keep_code: bool = False
) -> list[str]:
    """Writes everything that stands beside the weights.

    Args:
        new: The new folder.
        folder: The source.
        values: The content of config.json.
        tokenizer: The source's; None if it has none.
        made_by: What was done, for README.md: "converted to the official layout".
        keep_code: Whether the source's python files go along, with what points to them.

    Returns:
        What the user should know, in sentences.
    """
    code = {name: folder.read_bytes(name, _CODE_BYTES) for name in CODE if folder.has(name)}
    kept = bool(code) and keep_code
    if kept and "auto_map" in folder.config:
        values = {**values, "auto_map": folder.config["auto_map"]}
    write_config(new, values)
    for name in CARRIED:
        data = folder.read_bytes(name)
        if data is not None:
            write_bytes_atomic(new / name, data)
    if tokenizer is not None:
        written = tokenizer.save_pretrained(new)
        _clean_tokenizer_config(new, folder, tokenizer, kept)
        assert written
    for name, data in code.items() if kept else ():
        assert data is not None
        write_bytes_atomic(new / name, data)
    write_text_atomic(new / "README.md", _read_me(new, folder, made_by))
    return [*_about_code(sorted(code), kept, keep_code), *_about_tokenizer(tokenizer)]


def _clean_tokenizer_config(new: Path, folder: Folder, tokenizer: Any, kept: bool) -> None:
    """Takes out what official tokenizers refuse, and puts in where their class is, if it is there."""
    path = new / "tokenizer_config.json"
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    after = dict(before)
    if getattr(tokenizer, "generation", 0) in (2, 3):
        after = {name: value for name, value in after.items() if name not in _READ_ONLY}
    source = folder.read_object("tokenizer_config.json") or {}
    after |= {"auto_map": source["auto_map"]} if kept and "auto_map" in source else {}
    if isinstance(source.get("chat_template"), str):
        after["chat_template"] = source["chat_template"]
    if after != before:
        write_text_atomic(path, json.dumps(after, indent=2, ensure_ascii=False) + "\n")


def _about_code(code: list[str], kept: bool, asked: bool) -> list[str]:
    if kept:
        return [
            f"carried unchanged, and not run: {', '.join(code)}; read them before anything runs them with"
            " trust_remote_code=True"
        ]
    if code:
        return [
            f"left out: {', '.join(code)}; glmkit does not need them. The official code does: --keep-code carries them"
        ]
    if asked:
        return ["the source has no python files to carry; the official code needs those of its own repository"]
    return []


def _about_tokenizer(tokenizer: Any) -> list[str]:
    if tokenizer is None:
        return ["the source has no tokenizer, so the new folder has none: copy it from the official repository"]
    return []


def _read_me(new: Path, folder: Folder, made_by: str) -> str:
    family = find_family(str(folder.config.get("_name_or_path", "")))
    files = [name for name in LICENCES if (new / name).is_file()]
    licence = f"{family.licence}." if family else "that of the model it was made of."
    if files:
        licence += f" See {', '.join(files)}."
    name = family.name if family else "Checkpoint"
    return (
        f"# {name}\n\nA checkpoint {made_by} by glmkit {version('glmkit')}.\n\n"
        f"Licence of the weights: {licence} Converting changes nothing about it.\n"
    )
