"""Small valid folders, damaged at random: each must load or be refused by name, never crash, hang or eat memory.

    python tests/mutations.py --count 2000000 --log FILE    in child processes, with figures once in a while
    python tests/mutations.py --only 48213                  one of them, here, with its traceback

Number n of the cases is a function of n alone (`Case.choose`), so what a log names can be done again. The work is done
in a child, which writes down the number before it begins; a child that dies or stands still is a finding, and the next
one goes on behind it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # folders that are written 20,000 times
HANG_SECONDS = 60.0  # of wall time, on a machine that does other things too
SLOW_SECONDS = 2.0  # of a child's own time for one case
SPARE_BYTES = 1 << 30  # of address space beyond what a child has after its imports

EVIL_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**40, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "a", "../../etc/passwd", "\x1b[2J", "\0", "\ud800", "9" * 5000, "int8", "os.system", "x" * 100_000),
    *(
        [],
        {},
        [None],
        [[]],
        {"a": {"b": 1}},
        [1, "a", None],
        ["a"] * 1000,
        {str(number): number for number in range(500)},
    ),
]


# What is damaged -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A valid folder and what is done with it.

    Args:
        name: For the figures.
        folder: The folder, which is damaged in place and mended after each case.
        files: Which files are damaged.
        use: Loads it whole.
        parts: The door that a file of this ending meets first, which takes a fraction of the time; "" is for others.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    use: Callable[[Path], object]
    parts: Mapping[str, Callable[[Path], object]] = field(default_factory=dict)

    def door(self, file: str, thorough: bool) -> Callable[[Path], object]:
        """What is done with the folder when one file of it is damaged."""
        if thorough or not self.parts:
            return self.use
        fitting = (one for end, one in self.parts.items() if end and file.endswith(end))
        return next(fitting, self.parts.get("", self.use))


def make_targets(root: Path) -> list[Target]:
    """Writes the folders, a few dozen kilobytes each.

    Args:
        root: Where.
    """
    import torch

    import glm_words
    import glmkit
    import official_families
    import tiny
    import tiny_families
    from glmkit.adapters import open_adapter
    from glmkit.checkpoint import open_folder
    from glmkit.loading import read_config
    from glmkit.runtime.exported import describe
    from glmkit.shards import open_model_parallel
    from glmkit.tokenizers import load_tokenizer
    from glmkit.weights import read_generation

    def load(folder: Path) -> object:
        tokenizer = glmkit.load(folder).tokenizer
        return tokenizer and tokenizer.decode(tokenizer.encode("a 你好[MASK]")[:50])

    def tokenizer(folder: Path) -> object:
        made = load_tokenizer(folder)
        return made.decode([*made.encode("a ①你好\n[gMASK]")[:50], *range(0, len(made), 37)])

    def parallel(folder: Path) -> object:
        with open_model_parallel(folder, needs_config=False) as opened:
            return [tensor.shape for _, tensor in opened.read()]

    def weights(folder: Path) -> object:
        with open_folder(folder) as opened:
            return [tensor.shape for _, tensor in opened.read()]

    def adapter_weights(folder: Path) -> object:
        with open_adapter(folder) as opened:
            return [tensor.shape for _, tensor in opened.read()]

    def with_adapter(folder: Path) -> object:
        return glmkit.load(root / "chatglm3", adapter=folder)

    def config(folder: Path) -> object:
        with open_folder(folder) as opened:
            return read_config(opened).check()

    def generation(folder: Path) -> object:
        with open_folder(folder, weights=()) as opened:
            return read_generation(opened)

    parts = {"tokenizer_config.json": tokenizer, "generation_config.json": generation, "config.json": config}
    parts |= {".safetensors": weights, ".bin": weights, ".index.json": weights}
    parts |= {".model": tokenizer, ".txt": tokenizer, "added_tokens.json": tokenizer}
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    later = {**sizes, "ffn_hidden_size": 8, "kv_channels": 4, "multi_query_group_num": 1}
    words = tiny.train_tokenizer(root / "words.model")
    chatglm3 = tiny.write_model(root / "chatglm3", words, **later)
    chatglm = tiny_families.write_chatglm(root / "chatglm", **sizes, inner_hidden_size=8)
    glm4 = tiny_families.write_glm4(root / "glm4", **later)
    glm = tiny_families.write_glm(root / "glm", **sizes)
    sharded = _as_bin_shards(chatglm3, root / "shards")
    lora, loose, prefix = (write_adapter(root / name, chatglm3, name) for name in ("lora", "loose", "prefix"))
    small = ("config.json", "tokenizer_config.json", "generation_config.json")
    stored = ("model.safetensors", *small)
    sampling = {
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.8,
        "max_length": 100,
        "eos_token_id": [2, 5],
        "num_beams": 1,
    }
    for folder in (chatglm3, chatglm):
        (folder / "generation_config.json").write_text(json.dumps(sampling))
    targets = [
        Target("chatglm3", chatglm3, (*stored, "tokenizer.model"), load, parts),
        Target("chatglm", chatglm, (*stored, "ice_text.model"), load, parts),
        Target("glm4", glm4, (*stored, "tokenizer.model"), load, parts),
        Target("glm", glm, (*stored, "vocab.txt", "added_tokens.json"), load, parts),
        Target(
            "bin-shards",
            sharded,
            ("pytorch_model-1-of-2.bin", "pytorch_model-2-of-2.bin", "pytorch_model.bin.index.json", "config.json"),
            load,
            parts,
        ),
    ]
    for name, folder, files in (
        ("lora", lora, ("adapter_model.safetensors", "adapter_config.json")),
        ("loose-lora", loose, ("adapter_model.bin",)),
        ("prefix", prefix, ("pytorch_model.bin", "config.json")),
    ):
        targets.append(Target(name, folder, files, with_adapter, {"": adapter_weights}))
    for name, files in (
        ("bpe", words),
        ("chinese", glm_words.chinese_files(root / "chinese")),
        ("bytes", glm_words.byte_files(root / "bytes")),
    ):
        folder = root / f"only-{name}"
        shutil.copytree(files, folder) if files.is_dir() else folder.mkdir()
        if files.is_file():
            shutil.copy(files, folder / "tokenizer.model")
            (folder / "tokenizer_config.json").write_text('{"generation": 3}')
        names = tuple(sorted(path.name for path in folder.iterdir() if path.is_file()))
        targets.append(Target(f"tokenizer-{name}", folder, names, tokenizer))
    made, its_words = glmkit.load(chatglm3, quantize="int8")
    made.save_pretrained(root / "int8")
    its_words.save_pretrained(root / "int8")
    targets.append(Target("int8", root / "int8", stored, load, parts))
    [ranks] = [family for family in official_families.FAMILIES if family.name == "glm-130b, 2 ranks"]
    official_families.write_family(root / "ranks", ranks)
    parts = tuple(f"49300/mp_rank_{rank:02d}_model_states.pt" for rank in range(2))
    targets.append(Target("ranks", root / "ranks", (*parts, "latest"), parallel))
    (root / "gguf").mkdir()
    (root / "gguf" / "model.gguf").write_bytes(_gguf())
    targets.append(Target("gguf", root / "gguf", ("model.gguf",), describe))
    for target in targets:
        target.use(target.folder)  # valid, and whatever is imported late is imported now
    torch.set_num_threads(1)
    return targets


def _as_bin_shards(source: Path, folder: Path) -> Path:
    import torch
    from safetensors.torch import load_file

    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number}-of-2.bin"
        torch.save({name: state[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def write_adapter(folder: Path, base: Path, kind: str) -> Path:
    """Writes an adapter of a ChatGLM3: "lora" as PEFT does, "loose" as ChatGLM-Tuning does, or a "prefix"."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    layers = range(config["num_layers"])
    rows = (config["num_attention_heads"] + 2 * config["multi_query_group_num"]) * config["kv_channels"]
    if kind == "prefix":
        row = 2 * len(layers) * config["multi_query_group_num"] * config["kv_channels"]
        torch.save({"transformer.prefix_encoder.embedding.weight": torch.ones(3, row)}, folder / "pytorch_model.bin")
        shutil.copy(base / "config.json", folder)
        return folder
    end = "default.weight" if kind == "loose" else "weight"
    starts = [f"base_model.model.transformer.encoder.layers.{at}.self_attention.query_key_value" for at in layers]
    state = {f"{start}.lora_A.{end}": torch.ones(2, config["hidden_size"]) for start in starts}
    state |= {f"{start}.lora_B.{end}": torch.ones(rows, 2) for start in starts}
    if kind == "loose":
        torch.save(state, folder / "adapter_model.bin")
    else:
        save_file(state, folder / "adapter_model.safetensors")
        said = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["query_key_value"], "rank_pattern": {}}
        (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def _gguf() -> bytes:
    """The smallest file with a text, a list, a number and a tensor."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    values = text("general.name") + struct.pack("<I", 8) + text("tiny")
    values += text("general.alignment") + struct.pack("<II", 4, 32)
    values += text("words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    tensor = text("weight") + struct.pack("<IQQIQ", 2, 4, 4, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 3) + values + tensor
    return head + b"\0" * (-len(head) % 32) + b"\0" * 64


# How it is damaged ---------------------------------------------------------------------------------------------------

Random = random.Random
Mutator = Callable[[Random, bytes], bytes]


def _place(rng: Random, size: int) -> int:
    """Mostly near the ends, where formats say what they hold."""
    edge = min(size, 3000)
    pick = rng.random()
    return rng.randrange(edge) if pick < 0.6 else size - 1 - rng.randrange(edge) if pick < 0.8 else rng.randrange(size)


def flip(rng: Random, data: bytes) -> bytes:
    """A few bytes get other values."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place = _place(rng, len(changed))
        changed[place] = rng.choice(
            (0, 1, 0x7F, 0x80, 0xFF, changed[place] ^ 1 << rng.randrange(8), rng.randrange(256))
        )
    return bytes(changed)


def cut(rng: Random, data: bytes) -> bytes:
    """The end is missing, or something in the middle."""
    start = _place(rng, len(data))
    return data[:start] if rng.random() < 0.5 else data[:start] + data[start + rng.choice((1, 2, 8, 100)) :]


def splice(rng: Random, data: bytes) -> bytes:
    """A piece of it, or of nothing, stands somewhere else too."""
    start, length, target = _place(rng, len(data)), rng.choice((1, 4, 8, 64, 1000)), _place(rng, len(data))
    piece = rng.choice((data[start : start + length], bytes(length), b"\xff" * length, rng.randbytes(length)))
    return data[:target] + piece + data[target + (length if rng.random() < 0.5 else 0) :]


def edit_json(rng: Random, data: bytes) -> bytes:
    """A value gets another kind or size, or goes, or comes."""
    try:
        value = json.loads(data)
    except ValueError:
        return flip(rng, data)
    places: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        item = left.pop()
        pairs = (
            list(item.items()) if isinstance(item, dict) else list(enumerate(item)) if isinstance(item, list) else []
        )
        places += [(item, key) for key, _ in pairs]
        left += [child for _, child in pairs if isinstance(child, (dict, list))]
    for _ in range(rng.choice((1, 1, 2)) if places else 0):
        owner, key = rng.choice(places)
        how = rng.randrange(5)
        with contextlib.suppress(KeyError, IndexError, TypeError):
            if how == 0:
                del owner[key]
            elif how == 1 and isinstance(owner, dict):
                owner[rng.choice(("__metadata__", "a", "", "num_layers", f"{key}x"))] = owner.pop(key)
            elif how == 2 and isinstance(owner[key], (int, float)):
                owner[key] = owner[key] * rng.choice((-1, 0, 2, 1000, 0.5)) + rng.choice((0, 1, -1))
            else:
                owner[key] = rng.choice(EVIL_VALUES)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def edit_header(rng: Random, data: bytes) -> bytes:
    """The JSON of a safetensors file is edited, and its length put right."""
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    header = edit_json(rng, data[8 : 8 + size])
    if rng.random() < 0.3:
        header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def edit_protobuf(rng: Random, data: bytes) -> bytes:
    """A SentencePiece file gets other pieces, kinds, scores, rules or switches."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:
        return flip(rng, data)
    for _ in range(rng.choice((1, 1, 2, 5)) if model.pieces else 0):
        piece, how = rng.choice(model.pieces), rng.randrange(9)
        if how == 0:
            piece.piece = rng.choice(("", "a", "\0", "<0x00>", "<0xZZ>", "▁", "<|user|>", "[gMASK]", "x" * 2000, "😀"))
        elif how == 1:
            piece.type = rng.randrange(1, 7)
        elif how == 2:
            piece.score = rng.choice((0.0, 3e38, -3e38, float("nan"), float("inf"), 1e-40, rng.gauss(0, 10)))
        elif how == 3:
            del model.pieces[rng.randrange(len(model.pieces)) :]
        elif how == 4:
            spec = model.normalizer_spec if rng.random() < 0.8 else model.denormalizer_spec
            rules = bytes(spec.precompiled_charsmap) or bytes(2000)
            spec.precompiled_charsmap = rng.choice((flip, cut, splice))(rng, rules)
        elif how == 5:
            name = rng.choice(("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"))
            setattr(model.normalizer_spec, name, rng.random() < 0.5)
        elif how == 6:
            model.trainer_spec.model_type = rng.randrange(1, 5)
        elif how == 7:
            name = rng.choice(("unk_id", "bos_id", "eos_id", "pad_id", "vocab_size"))
            setattr(model.trainer_spec, name, rng.choice((-1, 0, 5, 2**31 - 1, -(2**31))))
        else:
            model.trainer_spec.unk_surface = rng.choice(("", "x" * 5000, "\0", " ⁇ "))
        if not model.pieces:
            break
    return model.SerializeToString()


def edit_zip(rng: Random, data: bytes) -> bytes:
    """The pickle of a torch file is damaged and the archive made anew, so that no check sum gives it away."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(one.filename, archive.read(one)) for one in archive.infolist()]
    except Exception:
        return flip(rng, data)
    how = rng.randrange(6)
    position = next((at for at, (name, _) in enumerate(entries) if name.endswith("data.pkl")), 0)
    if how == 0 and entries:
        at = rng.randrange(len(entries))
        name = rng.choice(
            ("../x", "archive/data/../../x", "code/a.py", "/etc/passwd", "archive/\x1b[2J", entries[0][0])
        )
        entries[at] = (name, entries[at][1])
    elif how == 1 and entries:
        del entries[rng.randrange(len(entries))]
    elif entries:
        mutate = rng.choice((flip, cut, splice, _edit_pickle, _edit_pickle))
        entries[position] = (entries[position][0], mutate(rng, entries[position][1]))
    made = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if rng.random() < 0.02 else zipfile.ZIP_STORED
    with contextlib.suppress(Exception), zipfile.ZipFile(made, "w", kind) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return made.getvalue()


def _edit_pickle(rng: Random, data: bytes) -> bytes:
    """Names and instructions of a pickle program give way to others."""
    pairs = (
        (b"torch._utils", b"posix"),
        (b"_rebuild_tensor_v2", rng.choice((b"system", b"_rebuild_tensor_v3", b"_rebuild_parameter"))),
        (b"FloatStorage", rng.choice((b"HalfStorage", b"LongStorage", b"UntypedStorage", b"BoolStorage"))),
        (b"storage", b"module"),
        (b"cpu", b"cuda:0"),
        (b"K\x02", rng.choice((b"K\xff", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"N", b")"))),
        (b"\x86", rng.choice((b"\x85", b"\x87", b"t", b"0"))),
        (b"R", rng.choice((b"b", b"\x81", b"0", b"2"))),
    )
    old, new = rng.choice(pairs)
    return data.replace(old, new, rng.choice((1, 1, -1)))


def edit_record(rng: Random, data: bytes) -> bytes:
    """Bytes of a zip's own records change."""
    changed = bytearray(data)
    places = [at for mark in (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06") for at in _all(data, mark)]
    if not places:
        return flip(rng, data)
    for _ in range(rng.choice((1, 2))):
        at = rng.choice(places) + rng.randrange(4, 46)
        if at < len(changed):
            changed[at] = rng.choice((0, 1, 8, 0xFF, rng.randrange(256)))
    return bytes(changed)


def _all(data: bytes, mark: bytes) -> Iterator[int]:
    at = data.find(mark)
    while at >= 0:
        yield at
        at = data.find(mark, at + 1)


def mutators(name: str, data: bytes) -> list[Mutator]:
    """What may be done to a file.

    Args:
        name: Its name.
        data: Its content.
    """
    found: list[Mutator] = [flip, cut, splice]
    if name.endswith(".json"):
        found += [edit_json] * 6
    elif name.endswith(".safetensors"):
        found += [edit_header] * 4
    elif data.startswith(b"PK"):
        found += [edit_zip] * 4 + [edit_record]
    elif name.endswith(".model"):
        found += [edit_protobuf] * 4
    return found


# One case ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What number n is: which file of which folder becomes what."""

    target: Target
    file: str
    mutator: str
    content: bytes
    thorough: bool

    @staticmethod
    def choose(number: int, targets: list[Target], originals: dict[Path, bytes]) -> Case:
        rng = random.Random(number)
        target = rng.choice(targets)
        file = rng.choice(target.files)
        data = originals[target.folder / file]
        mutator = rng.choice(mutators(file, data))
        content = mutator(rng, data) if data else rng.randbytes(20)
        return Case(target, file, mutator.__name__, content, thorough=number % 16 == 0)


def run_case(case: Case, original: bytes) -> str:
    """Damages, uses and mends; returns "loaded" or "refused", or raises what escaped."""
    from glmkit.errors import GlmkitError

    path = case.target.folder / case.file
    _overwrite(path, case.content)
    try:
        case.target.door(case.file, case.thorough)(case.target.folder)
    except GlmkitError as error:
        text = str(error)
        if len(text) > 12_000 or any(not (letter.isprintable() or letter == "\n") for letter in text):
            raise AssertionError(
                f"a message of {len(text)} characters, or with control characters: {text[:300]!r}"
            ) from error
        return "refused"
    finally:
        _overwrite(path, original)
    return "loaded"


def _overwrite(path: Path, content: bytes) -> None:
    with open(path, "r+b", buffering=0) as file:  # truncating while opening takes longer
        file.truncate(file.write(content))


# Child and parent ----------------------------------------------------------------------------------------------------


def _child(start: int, stop: int, folder: Path) -> None:
    """Does the cases start..stop-1; FOLDER/now has the number at work, FOLDER/figures the results so far."""
    logging.disable(logging.CRITICAL)
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    targets = make_targets(Path(tempfile.mkdtemp(dir=folder)))
    originals = {
        target.folder / file: (target.folder / file).read_bytes() for target in targets for file in target.files
    }
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, used + SPARE_BYTES))
    now = os.open(folder / "now", os.O_RDWR | os.O_CREAT)
    figures: Counter[str] = Counter()
    findings: list[str] = []
    slowest, written, parent = (0.0, -1), 0.0, os.getppid()

    def write(number: int) -> None:
        state = {"next": number, "figures": figures, "findings": findings, "slowest": slowest}
        (folder / "figures.new").write_text(json.dumps(state))
        os.replace(folder / "figures.new", folder / "figures")

    for number in range(start, stop):
        os.pwrite(now, f"{number:20d}".encode(), 0)
        before = time.process_time()
        case = Case.choose(number, targets, originals)
        try:
            result = run_case(case, originals[case.target.folder / case.file])
        except BaseException as error:  # whatever it is, it is a finding
            result = "escaped"
            last = traceback.extract_tb(error.__traceback__)[-1]
            findings.append(
                f"{number} {case.target.name}/{case.file} {case.mutator}: {type(error).__name__}:"
                f" {str(error)[:300]} ({Path(last.filename).name}:{last.lineno})"
            )
        seconds = time.process_time() - before
        if seconds > SLOW_SECONDS:
            findings.append(f"{number} {case.target.name}/{case.file} {case.mutator}: took {seconds:.1f} s")
        slowest = max(slowest, (seconds, number))
        figures[result] += 1
        figures[f"{result} by {case.mutator}"] += 1
        figures[f"{result} in {case.target.name}"] += 1
        if time.monotonic() - written > 2 or number == stop - 1:
            written = time.monotonic()
            write(number + 1)
            if os.getppid() != parent:  # whoever wanted it is gone
                return
    write(stop)


def run_cases(start: int, count: int, report: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Does many cases in child processes.

    Args:
        start: Number of the first.
        count: How many.
        report: Gets the result so far once in a while.

    Returns:
        figures ("loaded", "refused", "escaped", "crashed", "hung", and the same by mutator and by target), findings
        (a line for everything that is not the first two), slowest (seconds, number).
    """
    figures: Counter[str] = Counter()
    findings: list[str] = []
    slowest = (0.0, -1)
    position, end = start, start + count
    while position < end:
        stop = min(end, position + 100_000)  # a fresh process now and then: what a run leaks is not the question here
        with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
            told = functools.partial(_tell, report, figures, findings)
            died = _watch(position, stop, Path(folder), told)
            state = _read(Path(folder) / "figures") or {
                "next": position,
                "figures": {},
                "findings": [],
                "slowest": [0, -1],
            }
            figures.update(state["figures"])
            findings += state["findings"]
            slowest = max(slowest, tuple(state["slowest"]))
            if died is None:
                position = stop
                continue
            number = (
                int((Path(folder) / "now").read_text() or position) if (Path(folder) / "now").exists() else position
            )
            findings.append(f"{number}: {died}")
            figures[died.split()[0]] += 1
            position = number + 1  # cases between the last figures and this one are not counted; they did no harm
    return {"figures": dict(figures), "findings": findings, "slowest": slowest}


def _tell(
    report: Callable[[dict[str, Any]], None] | None,
    figures: Counter[str],
    findings: list[str],
    state: dict[str, Any],
) -> None:
    if report is not None:
        report(state | {"figures": dict(figures + Counter(state["figures"])), "findings": findings + state["findings"]})


def _watch(start: int, stop: int, folder: Path, report: Callable[[dict[str, Any]], object]) -> str | None:
    """Runs a child; None if it ended well, else what happened to it."""
    command = [sys.executable, __file__, "--child", str(folder), "--start", str(start), "--count", str(stop - start)]
    with open(folder / "stderr", "w") as errors:
        child = subprocess.Popen(command, stderr=errors, cwd=folder)
        seen, since, told = "", time.monotonic(), time.monotonic()
        try:
            while child.poll() is None:
                time.sleep(0.05)
                now = folder / "now"
                number = now.read_text() if now.exists() else ""
                if number != seen:
                    seen, since = number, time.monotonic()
                elif time.monotonic() - since > HANG_SECONDS * (1 if number else 5):
                    child.kill()
                    child.wait()
                    return f"hung for {HANG_SECONDS:.0f} s"
                if time.monotonic() - told > 30 and (state := _read(folder / "figures")):
                    told = time.monotonic()
                    report(state)
        finally:
            child.kill()
            child.wait()
    if child.returncode == 0:
        return None
    name = signal.Signals(-child.returncode).name if child.returncode < 0 else f"exit code {child.returncode}"
    return f"crashed with {name}: {(folder / 'stderr').read_text()[-500:]}"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def _only(number: int) -> None:
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        targets = make_targets(Path(folder))
        originals = {
            target.folder / file: (target.folder / file).read_bytes() for target in targets for file in target.files
        }
        case = Case.choose(number, targets, originals)
        print(case.target.name, case.file, case.mutator, len(case.content), "bytes, crc", zlib.crc32(case.content))
        print(run_case(case, originals[case.target.folder / case.file]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--only", type=int)
    parser.add_argument("--child", type=Path)
    chosen = parser.parse_args()
    if chosen.child:
        _child(chosen.start, chosen.start + chosen.count, chosen.child)
        return
    if chosen.only is not None:
        _only(chosen.only)
        return
    began = time.monotonic()

    def report(result: dict[str, Any]) -> None:
        plain = {name: number for name, number in result["figures"].items() if " " not in name}
        line = f"{time.monotonic() - began:.0f} s: {result.get('next', 'all')} {plain} slowest {result['slowest']}"
        lines = "\n".join([line, *result["findings"]])
        print(lines, flush=True)
        if chosen.log:
            chosen.log.write_text(f"{lines}\n{json.dumps(result['figures'], indent=1, sort_keys=True)}\n")

    result = run_cases(chosen.start, chosen.count, report)
    report(result)
    sys.exit(bool(result["findings"]))


if __name__ == "__main__":
    main()
