"""What a folder (or hub id) with a tokenizer says: its files, and which generation of ChatGLM it belongs to.

ChatGLM2 and ChatGLM3 use the same SentencePiece file, and their configuration differs in nothing that must be there. So
the generation is decided from several signs, and never when they disagree.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glmkit.checkpoint import MAX_CONFIG_BYTES, open_folder
from glmkit.errors import CheckpointError, OutputError, TokenizerError, UsageError
from glmkit.hf import cached_file

MODEL_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer_config.json"
# What the generation is decided from; a hub id is fetched file by file, and code as text only.
_SIGN_FILES = (CONFIG_FILE, "config.json", "tokenization_chatglm.py")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

MAX_SIGN_BYTES = 2**20  # of each file that is read as a sign; the official ones have a few kilobytes
# Names of released models, those of MindFormers among them. CodeGeeX2 is a ChatGLM2, CodeGeeX4 a GLM-4.
_NAMES = {
    1: re.compile(r"chatglm[-_]6b|(?<![a-z])glm_6b", re.IGNORECASE),
    2: re.compile(r"chatglm2(?!\d)|(?<![a-z])glm2(?=_)|codegeex2(?!\d)", re.IGNORECASE),
    3: re.compile(r"chatglm3(?!\d)|(?<![a-z])glm3(?=_)", re.IGNORECASE),
    4: re.compile(r"(?<![a-z])glm-?4(?!\d)|codegeex4(?!\d)", re.IGNORECASE),
}
_CURE = "say which one it is: generation=2 (ChatGLM2) or generation=3 (ChatGLM3)"


def decide_generation(folder: Path, generation: int | None = None) -> int:
    """Decides between generation 2 and 3, which have the same vocabulary; 1 and 4 are known by their files.

    Signs, each a generation or absent: `name_or_path` in tokenizer_config.json, role tokens in tokenizer_config.json,
    `_name_or_path` in config.json, and the text of tokenization_chatglm.py, which is read and never run. The key
    `generation` in tokenizer_config.json, which glmkit writes, beats them; the argument beats that.

    Args:
        folder: The folder of tokenizer.model.
        generation: 2 or 3 if the caller knows.

    Returns:
        2 or 3.

    Raises:
        TokenizerError: No sign, signs that disagree, or a generation that does not exist.
    """
    tokenizer_text = _read(folder / "tokenizer_config.json")
    tokenizer_config = _object(tokenizer_text)
    told = tokenizer_config.get("generation") if generation is None else generation
    if told is not None:
        if not isinstance(told, int) or told not in (2, 3):
            raise TokenizerError(f"there is no generation {told!r:.40} of this tokenizer", hint=_CURE)
        return told
    signs = {
        "name_or_path in tokenizer_config.json": _named(tokenizer_config.get("name_or_path")),
        "role tokens in tokenizer_config.json": 3
        if "<|system|>" in tokenizer_text or "<|user|>" in tokenizer_text
        else None,
        "_name_or_path in config.json": _named(_object(_read(folder / "config.json")).get("_name_or_path")),
        "the text of tokenization_chatglm.py": _coded(_read(folder / "tokenization_chatglm.py")),
    }
    found = {sign: number for sign, number in signs.items() if number is not None}
    if len(set(found.values())) == 1 and set(found.values()) <= {2, 3}:
        return next(iter(found.values()))
    listed = "; ".join(f"{sign}: {number or 'no sign'}" for sign, number in signs.items())
    problem = "the signs disagree, or with its vocabulary" if found else "there is no sign"
    raise TokenizerError(f"{folder} may be ChatGLM2 or ChatGLM3: {problem} ({listed})", hint=_CURE)


def model_config(folder: Path) -> dict[str, object]:
    """Reads what a folder says of its model.

    Args:
        folder: The folder.

    Returns:
        The content of its config.json, empty if there is none.

    Raises:
        TokenizerError: config.json is larger than any real one, so that it would not be looked at.
    """
    path = folder / "config.json"
    if path.is_file() and path.stat().st_size > MAX_CONFIG_BYTES:
        raise TokenizerError(
            f"{path} has {path.stat().st_size} bytes; at most {MAX_CONFIG_BYTES} expected",
            hint=f"copy {path.name} from the checkpoint's original repository",
        )
    return _object(_read(path, MAX_CONFIG_BYTES))


def declared_class(folder: Path) -> str | None:
    """Reads what a folder calls its tokenizer.

    Args:
        folder: The folder.

    Returns:
        `tokenizer_class` of its tokenizer_config.json, None if it does not say it, or says what is no name.
    """
    name = _object(_read(folder / CONFIG_FILE)).get("tokenizer_class")
    return name if isinstance(name, str) else None


def saved_generation(folder: Path) -> object:
    """Reads the generation that glmkit writes into the tokenizer_config.json of every chat tokenizer it saves.

    Args:
        folder: The folder.

    Returns:
        1 to 4, None if the folder was not saved by glmkit.
    """
    return _object(_read(folder / CONFIG_FILE)).get("generation")


def _read(path: Path, limit_bytes: int = MAX_SIGN_BYTES) -> str:
    """The text of a small file, or nothing."""
    if not path.is_file() or path.stat().st_size > limit_bytes:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _named(name: object) -> int | None:
    if not isinstance(name, str):
        return None
    numbers = [number for number, pattern in _NAMES.items() if pattern.search(name)]
    return numbers[0] if len(numbers) == 1 else None


def _coded(text: str) -> int | None:
    if "tiktoken" in text:
        return 4
    if "<|system|>" in text:
        return 3
    return 2 if "class ChatGLMTokenizer" in text and "ice_text" not in text else None


def find_model_file(name: str, hub: Mapping[str, Any], file: str = MODEL_FILE) -> Path:
    """Finds the vocabulary that a path or a hub id means.

    Args:
        name: A folder, the file itself, which may lie anywhere, or a hub id.
        hub: Arguments for the hub, out of HUB_ARGUMENTS.
        file: The vocabulary's name.

    Returns:
        The file, or the path it should have in the folder.

    Raises:
        TokenizerError: It is a link out of the folder, or cannot be fetched.
    """
    if os.path.isfile(name):
        return Path(name)
    inside = Path(name, hub.get("subfolder") or "", file)
    found = inside if os.path.isdir(name) else _fetch_model_file(name, hub, file)
    check_link(found)
    return found


def _fetch_model_file(name: str, hub: Mapping[str, Any], file: str) -> Path:
    """The vocabulary of a hub id, with the files beside it that are signs."""
    for file_name in _SIGN_FILES:
        try:
            cached_file(name, file_name, **hub)
        except OSError:
            continue  # each of them may be absent; what is needed is missed later, by name
    try:
        return Path(cached_file(name, file, **hub))
    except OSError as error:
        raise TokenizerError(
            f"{name!r} is no folder, and {file} could not be fetched from the hub: {error}",
            hint="check the path or the hub id; with HF_HUB_OFFLINE=1 only what was downloaded before is found",
        ) from error


def folder_to_save_in(save_directory: str | os.PathLike[str], push_to_hub: bool = False) -> Path:
    """Makes the folder of a `save_pretrained`.

    Args:
        save_directory: The folder; it may exist.
        push_to_hub: What the caller asked for; refused.

    Returns:
        The folder.

    Raises:
        UsageError: `push_to_hub` is set, or `save_directory` is a file.
        OutputError: The folder cannot be made.
    """
    if push_to_hub:
        raise UsageError("save_pretrained(push_to_hub=True) is not supported", hint="use tokenizer.push_to_hub(...)")
    folder = Path(save_directory)
    if folder.is_file():
        raise UsageError(f"{folder} is a file; expected a folder to save the tokenizer in")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error}", hint="choose a folder that can be written to") from error
    return folder


def check_link(path: Path) -> None:
    """Refuses a link out of the folder; the links of the hub's cache are none.

    Args:
        path: The file, which may be absent.

    Raises:
        TokenizerError: It is such a link, or no regular file.
    """
    if not os.path.lexists(path):
        return
    with open_folder(path.parent, weights=(), config=None) as folder:
        if not folder.has(path.name):
            raise TokenizerError(
                f"{path} is a link out of its folder, or no regular file", hint="put the file itself into the folder"
            )


def read_config(path: Path) -> dict[str, Any]:
    """Reads a tokenizer_config.json.

    Args:
        path: The file, which may be absent; no link out of its folder.

    Returns:
        Its content, or nothing.

    Raises:
        TokenizerError: The file is no JSON object, larger than 1 MB, or a link out of the folder.
    """
    try:
        with open_folder(path.parent, weights=(), config=None) as folder:
            text = folder.read_text(path.name, MAX_SIGN_BYTES)
        if text is None:
            return {}
        config = json.loads(text)
    except CheckpointError as error:
        raise TokenizerError(error.message, hint=error.hint) from error
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is no JSON: {error}", hint="copy it again") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path} is a JSON {type(config).__name__}, expected an object", hint="copy it again")
    return config


def kept_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Takes what a tokenizer keeps for transformers' base class.

    Args:
        arguments: Arguments of a tokenizer's class; they may come from a tokenizer_config.json.

    Returns:
        Those of `name_or_path` and `model_max_length` that are there.

    Raises:
        TokenizerError: The length is no whole number above zero.
    """
    kept = {key: arguments[key] for key in ("name_or_path", "model_max_length") if key in arguments}
    longest = kept.get("model_max_length")
    if longest is None:
        return kept
    whole = longest.is_integer() if isinstance(longest, float) else type(longest) is int  # JSON may say 1e30
    if not whole or longest <= 0:
        raise TokenizerError(
            f"model_max_length={longest!r:.80}: expected a whole number from 1, or null for no limit",
            hint="copy tokenizer_config.json from the checkpoint's original repository",
        )
    return kept | {"model_max_length": int(longest)}
