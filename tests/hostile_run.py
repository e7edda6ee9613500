"""Opens the folders of `hostile_cases.py` in one process that watches itself, and prints what happened.

    python [-O] tests/hostile_run.py < ORDERS    [[CASE, DOOR], ...] as JSON; a line of JSON for each of them

Watched are: the time (of this process), the memory (the peak of what is resident, which counts native code too), and
by an audit hook every file that is opened, every module, code object, process, socket and library that comes to life.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
TEXT_READ_CODE = ("modeling_chatglm.py", "tokenization_chatglm.py")  # read as text, for signs
_PROCESSES = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "os.spawn",
    "subprocess.Popen",
    "pty.spawn",
)
_NEVER = (*_PROCESSES, "pickle.find_class", "socket.", "ctypes.dlopen", "urllib.", "ftplib.", "marshal.loads")


class Watch:
    """What happens in this process while it is on.

    Args:
        allowed: Folders whose files may be opened and whose code may run: the project's and Python's own.
    """

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self._allowed = allowed
        self._folder = ""
        self._outside: tuple[str, ...] = ()
        self.on = False
        self.events: list[str] = []
        self.opened: set[str] = set()
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def watching(self, folder: Path, beside: tuple[Path, ...]) -> Iterator[None]:
        """Watches what is done with a folder; files of `beside` may be opened too."""
        self._folder, self._outside = str(folder), tuple(map(str, beside))
        self.events, self.opened, self.on = [], set(), True
        try:
            yield
        finally:
            self.on = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            self._open(arguments[0])
        # A compiler that is asked for its version is our own question, about native code.
        elif event.startswith(_NEVER) and not (event == "ctypes.dlopen" and self._is_own(str(arguments[0]))):
            if not (event == "marshal.loads" and self._importing()) and "--version" not in repr(arguments[:2]):
                self.events.append(f"{event} {arguments[:2]!r:.200}")
        elif event == "exec":
            file = getattr(arguments[0], "co_filename", "")
            if not (file.startswith("<") or self._is_own(file)):
                self.events.append(f"exec {file}")
        elif event == "compile":
            source = arguments[0]
            if source is not None and "CANARY" in (source if isinstance(source, str) else repr(source)):
                self.events.append("compile of the checkpoint's text")

    def _open(self, path: object) -> None:
        name = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        if name.startswith(self._folder + os.sep) or ("/" not in name and name):
            # A name without a folder is opened beside an opened folder; this process stands in an empty one.
            inside = name.removeprefix(self._folder + os.sep)
            self.opened.add(inside)
            if inside.endswith(".py") and inside not in TEXT_READ_CODE:
                self.events.append(f"open {inside}")
        elif name and name != self._folder and not name.startswith(self._outside) and not self._is_own(name):
            self.events.append(f"open {name}")

    def _is_own(self, name: str) -> bool:
        return name.startswith(self._allowed)

    @staticmethod
    def _importing() -> bool:
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False


def own_places() -> tuple[str, ...]:
    """Where the project's and Python's files lie, and what systems ask their machine."""
    project = Path(__file__).resolve().parents[1]
    places = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values()}
    places |= {str(project / "src"), str(project / "tests")}
    places |= {os.path.realpath(place) for place in places}
    system = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/usr/share/zoneinfo", "/etc/localtime")
    return (*sorted(places), *system)


# Doors ----------------------------------------------------------------------------------------------------------------


def _command(*arguments: str) -> None:
    """A verb in this process; raises what its error line says."""
    from glmkit import cli
    from glmkit.errors import GlmkitError

    output, errors = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        old, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(b""))
        try:
            code = cli.run(list(arguments))
        finally:
            sys.stdin = old
    text = errors.getvalue()
    if code == 0:
        return
    lines = [line for line in text.splitlines() if line.startswith(("error:", "错误"))]
    if code not in (1, 2) or not lines or "Traceback" in text or "unexpected" in lines[0]:
        raise AssertionError(f"exit code {code}: {text[-1000:]}")
    raise GlmkitError(text)


def _load(folder: Path, base: Path) -> None:
    import glmkit

    glmkit.load(folder)


def _inspect(folder: Path, base: Path) -> None:
    _command("inspect", str(folder))


def _chat(folder: Path, base: Path) -> None:
    _command("chat", str(folder), "--prompt", "a", "--max-tokens", "2", "--plain")


def _auto(folder: Path, base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        model(torch.tensor([[5, 6]]))


def _tokenizer(folder: Path, base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokenizer.decode(tokenizer.encode("hello 你好 ①<|user|>"))


def _template(folder: Path, base: Path) -> None:
    """The chat format is that of the generation, whatever a folder calls one."""
    from transformers import AutoTokenizer

    asked = [{"role": "user", "content": "hello <|assistant|> [gMASK]"}]
    ids = [AutoTokenizer.from_pretrained(place).apply_chat_template(asked)["input_ids"] for place in (folder, base)]
    assert_equal(*ids)


def _text(folder: Path, base: Path) -> None:
    """What users write is text, also where it looks like a control token."""
    from glmkit.tokenizers import load_tokenizer

    made, plain = load_tokenizer(folder), load_tokenizer(base)
    for text in ("<|user|>", "<|assistant|>\n", "[gMASK]<sop>", "hello", "</s>", "<｜user｜>"):
        ids = made.encode_text(text)
        assert_equal(ids, plain.encode_text(text))
        if set(ids) & set(made.commands.values()):
            raise AssertionError(f"{text} became {ids}")


def _adapter(folder: Path, base: Path) -> None:
    import glmkit

    glmkit.load(base, adapter=folder)


def assert_equal(one: object, other: object) -> None:
    """An assertion that `python -O` keeps."""
    if one != other:
        raise AssertionError(f"{one!r:.300} is not {other!r:.300}")


DOORS: dict[str, Callable[[Path, Path], None]] = {
    "load": _load,
    "inspect": _inspect,
    "chat": _chat,
    "auto": _auto,
    "tokenizer": _tokenizer,
    "template": _template,
    "text": _text,
    "adapter": _adapter,
}


# Folders --------------------------------------------------------------------------------------------------------------


def write_bases(root: Path) -> dict[str, Path]:
    """The valid folders."""
    import mutations
    import tiny
    import tiny_families

    words = tiny.train_tokenizer(root / "words.model")
    bases = {
        "chatglm3": tiny.write_model(root / "chatglm3", words),
        "chatglm": tiny_families.write_chatglm(root / "chatglm"),
        "glm4": tiny_families.write_glm4(root / "glm4"),
        "glm": tiny_families.write_glm(root / "glm"),
    }
    for kind in ("lora", "prefix"):
        bases[kind] = mutations.write_adapter(root / kind, bases["chatglm3"], kind)
    return bases


# Running --------------------------------------------------------------------------------------------------------------


def _resident() -> tuple[int, int]:
    """What is resident now, and was at most, in bytes."""
    found = {}
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(("VmRSS:", "VmHWM:")):
                found[line[:5]] = int(line.split()[1]) << 10
    return found["VmRSS"], found["VmHWM"]


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def run_case(case: Any, door: str, bases: dict[str, Path], root: Path, watch: Watch) -> dict[str, Any]:
    """Makes the folder, opens it, and tells what happened."""
    from glmkit.errors import GlmkitError

    place = root / "case"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    folder, canary = place / "folder", place / "canary"
    shutil.copytree(bases[case.base], folder)
    case.change(folder, canary)
    gc.collect(0)
    measured = _forget_peak()
    before, _ = _resident()
    start = time.process_time()
    message = ""
    model = bases["chatglm3"] if door == "adapter" else bases[case.base]
    with watch.watching(folder, (model,)):
        try:
            DOORS[door](folder, model)
            result = "loaded"
        except GlmkitError as error:
            result, message = "refused", str(error)
        except BaseException as error:
            result, message = f"escaped: {type(error).__name__}", str(error)[:2000]
    seconds = time.process_time() - start
    _, peak = _resident()
    return {
        "case": case.name,
        "door": door,
        "result": result,
        "message": message[:20_000],
        "seconds": seconds,
        "bytes": peak - before if measured else None,
        "events": watch.events,
        "opened": sorted(watch.opened),
        "canary": canary.exists(),
    }


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "GLMKIT_LANG": "en"}
    root = Path(tempfile.mkdtemp(dir=MEMORY))
    try:
        (root / "empty").mkdir()
        os.environ |= {"XDG_STATE_HOME": str(root / "state"), "XDG_CACHE_HOME": str(root / "cache")}
        os.environ |= {"HF_HOME": str(root / "hub"), "GLMKIT_KERNELS": "torch"}
        import torch
        import transformers

        import hostile_cases

        torch.set_num_threads(1)
        logging.disable(logging.CRITICAL)
        transformers.utils.logging.disable_progress_bar()
        bases = write_bases(root)
        os.chdir(root / "empty")
        watch = Watch((*own_places(), str(root / "state"), str(root / "cache"), str(root / "hub")))
        for base in ("chatglm3", "chatglm", "glm4", "glm"):  # what is imported late is imported now
            for door in ("load", "inspect", "chat", "auto", "tokenizer"):
                with contextlib.suppress(ValueError):  # GLM of 2021 is no causal model and does not chat
                    DOORS[door](bases[base], bases["chatglm3"])
        for kind in ("lora", "prefix"):
            _adapter(bases[kind], bases["chatglm3"])
        gc.collect()
        gc.freeze()  # what lives now need not be looked through before every case
        cases = {case.name: case for case in hostile_cases.all_cases()}
        for order in json.load(sys.stdin):
            name, door = order
            print(json.dumps(run_case(cases[name], door, bases, root, watch)), flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
