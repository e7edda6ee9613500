"""What may come next on the command line: scripts for bash, zsh and fish, and the answers they ask for at every Tab.

An answer must not take long: neither torch nor the parser is imported. What the parser knows (verbs, flags) is written
into a table the first time, and again when the package changed; names on this machine are looked up each time.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh", "fish")
CALL = "__complete"  # glm __complete WORDS...: the last word is the one to be completed
FILES = ":files"  # an answer by which the shell adds files and folders

# What an argument or a flag takes, by its name in the parser; anything else is a file.
_TAKES = {
    ("list", "NAME"): "",
    ("where", "NAME"): "stored",
    ("rm", "NAME"): "removable",
    ("pull", "NAME"): "families",
    ("inspect", "MODEL"): "models",
    ("recipe", "NAME"): "recipes",
    ("logs", "[ID]"): "conversations",
}
_TAKES_ANYWHERE = {
    "MODEL": "models",
    "MODEL...": "models",
    "[MODEL]...": "families",
    "SRC": "models",
    "BASE": "models",
    "ADAPTER": "adapters",
    "RUN": "runs",
    "recipe": "recipes",
    "name": "recipes",
    "TASK|RECIPE|compare": "tasks",
    "--model": "models",
    "--adapter": "adapters",
    "--family": "families",
    "TEXT": "",
    "KEY": "",
    "[KEY=VALUE]...": "",
}
_CHOICES = {
    "--dtype": ("auto", "float32", "bfloat16", "float16"),
    "--device": ("auto", "cpu", "cuda", "npu", "mlu", "xpu", "mps"),  # of devices.py, which imports torch
    "--quantize": ("int8", "int4", "official-int8", "official-int4", "bnb-int8", "bnb-nf4"),
    "--scheme": ("int8", "int4"),
    "--source": ("hub", "modelscope", "auto"),
    "SHELL": SHELLS,
    ("export", "--to"): ("openvino", "onnx", "gguf"),
    ("convert", "--to"): ("official", "native", "shards", "file", "mindformers", "merged", "int8", "int4"),
    ("logs", "--form"): ("md", "json", "html"),
}


def script(shell: str) -> str:
    """Gives what a shell has to read for completing `glm`.

    Args:
        shell: "bash", "zsh" or "fish".

    Returns:
        A script for `eval` or for a file.

    Raises:
        UsageError: It is another shell.
    """
    if shell not in _SCRIPTS:
        from glmkit.errors import UsageError

        raise UsageError(f"there is no completion for the shell {shell!r}", hint=", ".join(SHELLS))
    return _SCRIPTS[shell]


def answer(words: Sequence[str]) -> str:
    """Answers a shell, which must never see an error in the middle of a line.

    Args:
        words: What follows `glm`, the last being the one to be completed, "" if it is not begun.

    Returns:
        A line for each: the word, and after a tab what it is; `FILES` if files fit too.
    """
    try:
        found = complete(words, _table())
    except Exception:  # a damaged cache, a folder that may not be read: then there is nothing to offer
        return ""
    return "".join(f"{word}\t{told}\n" if told else f"{word}\n" for word, told in found)


def complete(words: Sequence[str], table: dict[str, Any]) -> list[tuple[str, str]]:
    """Finds the words that may stand at the end of a command line.

    Args:
        words: What follows `glm`, the last being the one to be completed.
        table: What the parser knows, from `describe_parser`.

    Returns:
        Words that begin as the last one does, and what each is.
    """
    *before, last = words or [""]
    path, rest = _verb(before, table)
    verb = table["verbs"][path]
    if "--" not in before and before and before[-1] in verb["flags"] and verb["flags"][before[-1]]["takes"] is not None:
        found = _values(verb["flags"][before[-1]]["takes"], path)
    elif last.startswith("-") and "--" not in before:
        found = [(flag, known["help"]) for flag, known in verb["flags"].items()]
    elif verb["verbs"]:
        found = [] if _positional(rest, verb["flags"]) else [*verb["verbs"].items()]
    else:
        takes = verb["arguments"]
        position = min(len(_positional(rest, verb["flags"])), len(takes) - 1)
        found = _values(takes[position], path) if takes else []
    return [(word, told) for word, told in found if word.startswith(last) or word == FILES]


def _verb(before: Sequence[str], table: dict[str, Any]) -> tuple[str, list[str]]:
    """The verb that is being typed, and the words behind it."""
    path, rest = "", list(before)
    while rest:
        names = [word for word in rest if word in table["verbs"][path]["verbs"]]
        if not names or any(not word.startswith("-") for word in rest[: rest.index(names[0])]):
            break
        path = f"{path} {names[0]}".strip()
        rest = rest[rest.index(names[0]) + 1 :]
    return path, rest


def _positional(words: Sequence[str], flags: dict[str, Any]) -> list[str]:
    found, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word.startswith("-") and word != "-":
            skip = word in flags and flags[word]["takes"] is not None
        else:
            found.append(word)
    return found


# --- what the parser knows ---


def describe_parser() -> dict[str, Any]:
    """Describes the whole command by asking its parser, which takes a while.

    Returns:
        verbs: by the words behind `glm` ("" for none) their own verbs with a line each, flags, and what arguments take.
        recipes: by verb; tasks: of evaluation.
    """
    from glmkit.evaluate.catalogue import TASKS
    from glmkit.train.arguments import VERBS, recipe_names
    from glmkit.verbs import command

    verbs: dict[str, Any] = {}
    _describe("", command(), verbs)
    recipes = {verb: recipe_names(kind) for kind, verb in VERBS.items()}
    return {"verbs": verbs, "recipes": recipes, "tasks": ["compare", *TASKS]}


def _describe(path: str, command: Any, verbs: dict[str, Any]) -> None:
    inner = {name: one for name, one in getattr(command, "commands", {}).items() if not one.hidden}
    flags, arguments = {}, []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            arguments.append(_takes(path, parameter.metavar or parameter.name))
            continue
        takes = None if parameter.is_flag or getattr(parameter, "count", False) else _takes(path, parameter.opts[0])
        for flag in (*parameter.opts, *parameter.secondary_opts):
            flags[flag] = {"help": (parameter.help or "").partition("\n")[0], "takes": takes}
    flags["--help"] = {"help": "Show this message and exit.", "takes": None}
    told = {name: one.get_short_help_str(64) for name, one in inner.items()}
    verbs[path] = {"verbs": told, "flags": flags, "arguments": arguments}
    for name, one in inner.items():
        _describe(f"{path} {name}".strip(), one, verbs)


def _takes(path: str, name: str) -> str | list[str]:
    verb = path.partition(" ")[0]
    for key in ((verb, name), name):
        if key in _CHOICES:
            return [*_CHOICES[key]]
    return _TAKES.get((verb, name), _TAKES_ANYWHERE.get(name, "files"))


def _table() -> dict[str, Any]:
    """The parser's description, from a file of the user's cache that is made anew when the package changes."""
    from glmkit import __version__

    home = Path(__file__).parent
    sources = [
        *(home / "verbs").glob("*.py"),
        *(home / "recipes").glob("*.yaml"),
        home / "train" / "arguments.py",
        Path(__file__),
    ]
    newest = max(path.stat().st_mtime_ns for path in sources)
    state = f"{__version__} {newest} {len(sources)} {home}"
    root = os.environ.get("XDG_CACHE_HOME")
    file = (Path(root) if root else Path.home() / ".cache") / "glmkit" / "completion.json"
    try:
        kept = json.loads(file.read_bytes())
        if kept["state"] == state:
            return kept["table"]
    except (OSError, ValueError, LookupError, TypeError):
        pass
    table = describe_parser()
    fresh = file.with_name(f".completion.json.tmp-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps({"state": state, "table": table}), encoding="utf-8")
        os.replace(fresh, file)
    except OSError:
        with contextlib.suppress(OSError):  # then every answer takes as long as the first
            fresh.unlink()
    return table


# --- what is on this machine ---


def _values(takes: str | list[str], path: str) -> list[tuple[str, str]]:
    if isinstance(takes, list):
        return [(word, "") for word in takes]
    return list(_NAMES[takes](path))


def _files(path: str) -> Iterator[tuple[str, str]]:
    yield FILES, ""


def _stored(path: str) -> Iterator[tuple[str, str]]:
    from glmkit.inventory import stored_models

    for model in stored_models():
        state = "" if model.complete else ", partial"
        yield model.name, f"{model.size_bytes / 1e9:.1f} GB, {model.place}{state}"


def _removable(path: str) -> Iterator[tuple[str, str]]:
    yield from (one for one in _stored(path) if one[1].partition(", ")[2].startswith(("hub", "modelscope")))


def _families(path: str) -> Iterator[tuple[str, str]]:
    from glmkit.families import FAMILIES

    yield from ((row.name, f"{row.bytes / 1e9:.1f} GB") for row in FAMILIES)


def _models(path: str) -> Iterator[tuple[str, str]]:
    here = dict(_stored(path))
    yield from here.items()
    yield from ((name, f"{told}, not on this machine") for name, told in _families(path) if name not in here)
    yield FILES, ""


def _adapters(path: str) -> Iterator[tuple[str, str]]:
    for pattern in ("*/adapter", "*/*/adapter", "*/*/*/adapter"):
        yield from ((str(folder), "") for folder in sorted(Path().glob(pattern)) if folder.is_dir())
    yield FILES, ""


def _runs(path: str) -> Iterator[tuple[str, str]]:
    for pattern in ("*/recipe.yaml", "*/*/recipe.yaml"):
        yield from ((str(file.parent), "") for file in sorted(Path().glob(pattern)))
    yield FILES, ""


def _recipes(path: str) -> Iterator[tuple[str, str]]:
    known: dict[str, list[str]] = _table()["recipes"]
    names = known.get(path) or sorted({name for names in known.values() for name in names})
    yield from ((name, "") for name in names)
    yield FILES, ""


def _tasks(path: str) -> Iterator[tuple[str, str]]:
    yield from ((name, "") for name in _table()["tasks"])
    yield from _recipes(path)


def _conversations(path: str) -> Iterator[tuple[str, str]]:
    root = os.environ.get("XDG_STATE_HOME")
    state = Path(root) if root and Path(root).is_absolute() else Path.home() / ".local" / "state"
    files = sorted((state / "glmkit" / "conversations").glob("[!.]*.json"), key=lambda file: -file.stat().st_mtime)
    for file in files[:50]:
        with open(file, "rb") as stream:
            found = json.loads(stream.read(2**20))
        yield file.stem, str(found.get("title", "")).replace("\n", " ").replace("\t", " ")[:60]


_NAMES: dict[str, Callable[[str], Iterable[tuple[str, str]]]] = {
    "": lambda path: (),
    "files": _files,
    "stored": _stored,
    "removable": _removable,
    "families": _families,
    "models": _models,
    "adapters": _adapters,
    "runs": _runs,
    "recipes": _recipes,
    "tasks": _tasks,
    "conversations": _conversations,
}

# --- the shells ---

_BASH = """\
# Completion of glm for bash. In ~/.bashrc: eval "$(glm completion bash)"
_glm() {
    local word=${COMP_WORDS[COMP_CWORD]} line words=("${COMP_WORDS[@]:1:COMP_CWORD}")
    COMPREPLY=()
    while IFS= read -r line; do
        line=${line%%$'\\t'*}
        if [[ $line == :files ]]; then
            compopt -o filenames 2>/dev/null
            while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -f -- "$word")
        else
            COMPREPLY+=("$line")
        fi
    done < <("${COMP_WORDS[0]}" __complete "${words[@]}" 2>/dev/null)
}
complete -F _glm glm
"""

_ZSH = """\
#compdef glm
# Completion of glm for zsh. In ~/.zshrc, after compinit: eval "$(glm completion zsh)"
_glm() {
    local line files=0
    local -a found
    for line in ${(f)"$("${words[1]}" __complete "${(@)words[2,CURRENT]}" 2>/dev/null)"}; do
        if [[ $line == :files ]]; then
            files=1
        else
            found+=("${${line%%$'\\t'*}//:/\\\\:}:${line#*$'\\t'}")
        fi
    done
    (( ${#found} )) && _describe glm found
    (( files )) && _files
    return 0
}
if [[ ${funcstack[1]} == _glm ]]; then _glm "$@"; else compdef _glm glm; fi
"""

_FISH = """\
# Completion of glm for fish. In ~/.config/fish/config.fish: glm completion fish | source
function __glm_complete
    set -l words (commandline -opc) (commandline -ct)
    for line in ($words[1] __complete $words[2..-1] 2>/dev/null)
        if test "$line" = :files
            __fish_complete_path (commandline -ct)
        else
            echo $line
        end
    end
end
complete -c glm -f -a '(__glm_complete)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
