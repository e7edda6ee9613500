"""Checkpoint folders made to hurt, W-01 to W-74 of the project's list, as one table: what is done to a valid folder.

    Case("W-05 spaces", change=..., doors=("load", "inspect", "auto"), says="header of")

`hostile_run.py` opens each of them through each of its doors and watches; `test_hostile_corpus.py` judges. What the
gate alone says to the same files, piece by piece, is in `test_checkpoint_hostile.py`, which lends its files here.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import test_checkpoint_hostile as gate

MODEL = ("load", "inspect", "auto")
ALL_MODEL = (*MODEL, "chat")
TOKENIZER = ("load", "tokenizer")
TEXTS = ("tokenizer", "template", "text")


@dataclass(frozen=True)
class Case:
    """One hostile folder.

    Args:
        name: Its number in the list, and what is special.
        change: Makes the valid folder hostile; gets the folder, and a path that nobody may touch.
        doors: Through which it is opened: "load", "inspect", "auto", "chat", "tokenizer", "template", "text" for
            models, "adapter" for adapters.
        says: What the error must say; None: it loads.
        base: Which valid folder.
        untouched: Files of the folder that nobody may open.
    """

    name: str
    change: Callable[[Path, Path], object]
    doors: tuple[str, ...]
    says: str | None
    base: str = "chatglm3"
    untouched: tuple[str, ...] = ()

    @property
    def number(self) -> str:
        return self.name[:4]


class Trap:
    """Pickles as a call that touches the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def trap(canary: Path) -> bytes:
    """A torch file whose unpickling would make the canary."""
    return gate._archive(pickle.dumps({"a": Trap(canary)}, protocol=2))


def put(name: str, content: bytes | str | Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    """A change: a file gets this content. Whole weights of another form are taken away first."""

    def change(folder: Path, canary: Path) -> None:
        data = content(canary) if callable(content) else content
        if name.endswith((".bin", ".safetensors", ".index.json")):
            for old in (*folder.glob("*.safetensors"), *folder.glob("*model*.bin")):
                old.unlink()
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return change


def set_fields(name: str, **fields: Any) -> Callable[[Path, Path], None]:
    """A change: a JSON file of the folder says something else."""

    def change(folder: Path, canary: Path) -> None:
        path = folder / name
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(
            json.dumps(old | {key: value(canary) if callable(value) else value for key, value in fields.items()})
        )

    return change


def both(*changes: Callable[[Path, Path], object]) -> Callable[[Path, Path], None]:
    """A change after the other."""

    def change(folder: Path, canary: Path) -> None:
        for one in changes:
            one(folder, canary)

    return change


def _marks(test: Any) -> list[tuple[Any, ...]]:
    """The rows of a parametrised test of the gate."""
    [mark] = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    return list(mark.args[1])


# Files of weights: a model's, and an adapter's ------------------------------------------------------------------------


def _safetensors() -> Iterator[Case]:
    for name, (content, says) in gate.SAFETENSORS_CASES.items():
        key = name if name.startswith("W-") else f"W-18 {name}"
        yield Case(key, put("model.safetensors", content), MODEL, says)
        yield Case(f"{key}, adapter", put("adapter_model.safetensors", content), ("adapter",), says, "lora")

    def spaces(folder: Path, canary: Path) -> None:
        with open(folder / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", 99_999_999))
            file.truncate(100_000_007)

    yield Case("W-05 spaces", spaces, MODEL, "header of 99999999 bytes")
    entry = '"%d":{"dtype":"U8","shape":[],"data_offsets":[0,1]}'
    for count, what in ((1_000_000, "bytes, at most"), (150_000, "more than")):
        header = "{" + ",".join(entry % number for number in range(count)) + "}"
        yield Case(f"W-11 {count}", put("model.safetensors", gate._safetensors(header.encode(), b"\0")), MODEL, what)

    def sparse(folder: Path, canary: Path) -> None:
        size = 10 << 40
        header = gate._safetensors({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
        with open(folder / "model.safetensors", "wb") as file:
            file.write(header)
            file.truncate(len(header) + size)

    yield Case("W-22 ten terabytes", sparse, MODEL, "is not part of this model")

    def not_numbers(folder: Path, canary: Path) -> None:
        from safetensors.torch import load_file, save_file

        state = load_file(folder / "model.safetensors")
        save_file(
            {name: torch.full_like(one, float("nan")) for name, one in state.items()}, folder / "model.safetensors"
        )

    yield Case("W-23 not a number", not_numbers, MODEL, None)
    yield Case("W-23 an answer of it", not_numbers, ("chat",), "expected finite numbers")
    polyglot = io.BytesIO()
    with zipfile.ZipFile(polyglot, "w") as archive:
        archive.writestr("evil.py", "x")
    yield Case(
        "W-20 zip behind", put("model.safetensors", gate._entry() + polyglot.getvalue()), MODEL, "after its last"
    )
    many = b'{"a":' + b"[" + b"[]," * 3_000_000 + b"0]}"
    yield Case("W-11 lists", put("model.safetensors", gate._safetensors(many)), MODEL, "more than")


def _pickles() -> Iterator[Case]:
    def of(name: str, content: bytes | Callable[[Path], bytes], says: str) -> Iterator[Case]:
        yield Case(name, put("pytorch_model.bin", content), MODEL, says)
        yield Case(f"{name}, adapter", put("adapter_model.bin", content), ("adapter",), says, "lora")
        yield Case(f"{name}, prefix", put("pytorch_model.bin", content), ("adapter",), says, "prefix")

    yield from of("W-41 a call", trap, "asks to run posix.mkdir")
    for module, function in _marks_of_names():
        number = "W-42" if "builtin" in module else "W-53" if "raining" in function or "arg" in module else "W-43"
        program = gate._archive(gate._global(module, function))
        yield from of(f"{number} {module} {function}", program, f"asks to run {module}.{function}")
    for index, (program, says) in enumerate(_marks(gate.test_pickle_programs)):
        number = "W-44" if index < 3 else "W-45" if index < 10 else "W-50"
        yield from of(f"{number} program {index}", gate._archive(program), says)
    for index, (changes, says) in enumerate(_marks(gate.test_tensor_programs)):
        content = gate._archive(gate._Tensors(**changes).program(), d0=b"\0" * 16)
        yield from of(f"W-46 storage {index}", content, says)
    for order in (b"big", b"LITTLE"):
        content = gate._archive(gate._Tensors().program(), d0=b"\0" * 16, byteorder=order)
        yield from of(f"W-47 {order.decode()}", content, "byte order")
    old = io.BytesIO()
    torch.save({"a": torch.ones(2)}, old, _use_new_zipfile_serialization=False)
    yield from of("W-48 legacy", old.getvalue(), "before 1.6")
    yield from of("W-48 tar", b"\0" * 257 + b"ustar" + b"\0" * 300, "before 1.6")
    for index, (content, says) in enumerate(_marks(gate.test_zip_files)):
        number = "W-52" if says == "TorchScript" else "W-49"
        yield from of(f"{number} zip {index}", content, says)
    for index, (program, says) in enumerate(_marks(gate.test_pickle_bombs)):
        yield from of(f"W-50 bomb {index}", gate._archive(program), says)
    yield from of("W-51 pickle", lambda canary: pickle.dumps(Trap(canary), protocol=2), "before 1.6")
    yield from of("W-51 safetensors", gate._entry(), "safetensors file under a .bin name")
    yield Case(
        "W-51 pickle as safetensors", put("model.safetensors", trap), MODEL, "torch file under a .safetensors name"
    )


def _marks_of_names() -> list[tuple[str, str]]:
    [names] = [
        mark.args[1]
        for mark in gate.test_pickle_that_names_anything_else.pytestmark
        if mark.name == "parametrize" and isinstance(mark.args[0], tuple)
    ]
    return list(names)


def _programs_beside() -> Iterator[Case]:
    """W-53 and W-54: what trainers leave beside weights is not looked at."""
    names = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "trainer_state.json")

    def change(folder: Path, canary: Path) -> None:
        for name in names:
            (folder / name).write_bytes(trap(canary))

    yield Case("W-53 beside a model", change, ALL_MODEL, None, untouched=names)
    yield Case("W-54 beside a LoRA", change, ("adapter",), None, "lora", untouched=names)
    yield Case("W-54 beside a prefix", change, ("adapter",), None, "prefix", untouched=names)


# Index and folder -----------------------------------------------------------------------------------------------------


def _index(weight_map: Any, **more: Any) -> Callable[[Path, Path], None]:
    return put("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": weight_map, **more}))


def _folders() -> Iterator[Case]:
    plain = "not a plain file name inside the folder"
    rows = {
        "W-24": ("../../etc/passwd", "../x.safetensors", "a/../../x.safetensors"),
        "W-25": ("/etc/passwd", "//x.safetensors"),
        "W-26": ("..\\x.safetensors", "C:\\x.safetensors", "%2e%2e%2fx.safetensors"),
        "W-27": ("a\0.safetensors", "a\n.safetensors", "a" * 300 + ".safetensors", "\x1b]0;x\x07.safetensors"),
    }
    for number, names in rows.items():
        for index, name in enumerate(names):
            yield Case(f"{number} name {index}", _index({"a": name}), MODEL, plain)

    def link(*targets: str) -> Callable[[Path, Path], None]:
        def change(folder: Path, canary: Path) -> None:
            secret = folder.parent / "secret.safetensors"
            secret.write_bytes((folder / "model.safetensors").read_bytes())
            (folder / "model.safetensors").unlink()
            for name, target in zip(("model.safetensors", "two.safetensors"), targets):
                (folder / name).symlink_to(target)

        return change

    out = "../secret.safetensors"
    yield Case("W-28 out of the folder", link(out), MODEL, "is a link out of the folder")
    yield Case("W-28 over another link", link("two.safetensors", out), MODEL, "not a regular file")
    yield Case("W-28 device", link("/dev/zero"), MODEL, "is a link out of the folder")
    yield Case("W-29 loop", link("model.safetensors"), MODEL, "not a regular file")

    def other(make: Callable[[Path], object], name: str) -> Callable[[Path, Path], None]:
        def change(folder: Path, canary: Path) -> None:
            (folder / name).unlink(missing_ok=True)
            make(folder / name)

        return change

    for make in (gate._make_fifo, Path.mkdir):
        for name in ("model.safetensors", "config.json"):
            yield Case(f"W-30 {make.__name__} {name}", other(make, name), ("load", "inspect"), "is not a regular file")
        yield Case(
            f"W-30 {make.__name__} index",
            both(_index({}), other(make, "model.safetensors.index.json")),
            MODEL,
            "regular",
        )
    yield Case(
        "W-29 tokenizer", other(lambda path: path.symlink_to(path.name), "tokenizer.model"), ("chat",), "no token"
    )
    yield Case("W-30 fifo of a tokenizer", other(gate._make_fifo, "tokenizer.model"), TOKENIZER, "tokenizer")
    yield Case("W-31 missing shard", _index({"a": "1.safetensors"}), MODEL, "1.safetensors is missing")

    def shards(weight_map: dict[str, str], **files: tuple[str, ...]) -> Callable[[Path, Path], None]:
        def change(folder: Path, canary: Path) -> None:
            _index(weight_map)(folder, canary)
            for name, tensors in files.items():
                gate._shard(folder, f"{name}.safetensors", *tensors)

        return change

    yield Case(
        "W-32 not in shard", shards({"a": "s.safetensors", "b": "s.safetensors"}, s=("a",)), MODEL, "does not have it"
    )
    yield Case("W-32 not in index", shards({"a": "s.safetensors"}, s=("a", "b")), MODEL, "but not in the index")
    twice = shards({"a": "s.safetensors", "b": "t.safetensors"}, s=("a",), t=("a", "b"))
    yield Case("W-33 twice", twice, MODEL, "stands in 2 shards")
    many = {str(number): f"{number}.safetensors" for number in range(50_000)}
    yield Case("W-34 shards", _index(many), MODEL, "tensors, at most")

    def large(folder: Path, canary: Path) -> None:
        _index({})(folder, canary)
        with open(folder / "model.safetensors.index.json", "wb") as file:
            file.truncate(100 << 20)

    yield Case("W-34 100 MB", large, MODEL, "has 104857600 bytes")
    for value in (None, [], "x", 3):
        yield Case(f"W-35 {value}", _index(value), MODEL, "no weight_map object")
    yield Case("W-36 .bin", _index({"a": "pytorch_model.bin"}), MODEL, "expected a .safetensors file")

    def second(folder: Path, canary: Path) -> None:
        (folder / "pytorch_model.bin").write_bytes(trap(canary))

    yield Case("W-37 both forms", second, MODEL, None, untouched=("pytorch_model.bin",))
    yield Case("W-38 case", _index({"a": "m-1.safetensors", "b": "M-1.safetensors"}), MODEL, "differ in more than case")

    def lies(folder: Path, canary: Path) -> None:
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", "pt") as file:
            names = list(file.keys())
        os.rename(folder / "model.safetensors", folder / "m-1.safetensors")
        index = {"metadata": {"total_size": -(10**30)}, "weight_map": dict.fromkeys(names, "m-1.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    yield Case("W-40 total_size", lies, MODEL, None)


# Configs --------------------------------------------------------------------------------------------------------------


def _configs() -> Iterator[Case]:
    rows: list[tuple[str, dict[str, Any], str | None]] = [
        ("W-55", {"num_layers": 10**9}, "num_layers=1000000000"),
        ("W-55 mapped", {"num_layers": None, "num_hidden_layers": 10**9}, "num_layers"),
        ("W-56 hidden", {"hidden_size": 2**31}, "hidden_size=2147483648"),
        ("W-56 vocabulary", {"padded_vocab_size": 2**40}, "padded_vocab_size=1099511627776"),
        ("W-56 below the limits", {"padded_vocab_size": 9_000_000, "hidden_size": 900_000}, "expected"),
        ("W-57 no heads", {"num_attention_heads": 0}, "num_attention_heads=0"),
        ("W-57 groups", {"multi_query_group_num": 3}, "multiple of multi_query_group_num"),
        ("W-58 text", {"num_layers": "2"}, "num_layers='2'"),
        ("W-58 negative", {"hidden_size": -32}, "hidden_size=-32"),
        ("W-58 boolean", {"num_layers": True}, "num_layers=True"),
        ("W-58 infinite", {"layernorm_epsilon": float("inf")}, "layernorm_epsilon"),
        ("W-58 not a number", {"rope_ratio": float("nan")}, "rope_ratio"),
        ("W-58 digits", {"num_layers": 10**4000}, "num_layers"),
        ("W-58 long text", {"num_layers": "x" * 1_000_000}, "num_layers"),
        ("W-59", {"seq_length": 10**12}, "seq_length=1000000000000"),
        ("W-59 below the limit", {"seq_length": 10**8}, None),
        ("W-60 kernels", {"_attn_implementation_internal": "evil/kernel"}, "_attn_implementation_internal"),
        ("W-60 attention", {"attn_implementation": "evil/kernel"}, "attn_implementation"),
        (
            "W-60 quantiser",
            {"quantization_config": {"quant_method": "os.system", "modules": ["x"]}},
            "quantization_config",
        ),
        ("W-60 trust", {"trust_remote_code": True}, "trust_remote_code"),
        ("W-58 padding", {"pad_token_id": "x"}, "pad_token_id='x'"),
        ("W-60 plans", {"base_model_pp_plan": 7}, "unknown field base_model_pp_plan"),
        ("W-60 renaming", {"attribute_map": {"num_layers": "seq_length"}}, "unknown field attribute_map"),
        ("W-62 object", {"torch_dtype": "object"}, "torch_dtype='object'"),
        ("W-62 function", {"torch_dtype": "load"}, "torch_dtype='load'"),
        ("W-62 number", {"dtype": 7}, "dtype=7"),
        ("W-60 escapes", {"\x1b[2Jevil": "\x1b]0;x\x07"}, "unknown field"),
        ("W-60 many fields", {f"field{number}": number for number in range(20_000)}, "more"),
    ]
    for name, fields, says in rows:
        yield Case(name, set_fields("config.json", **fields), MODEL, says)

    def code(folder: Path, canary: Path) -> None:
        text = f"import os; os.mkdir({str(canary)!r})\n"
        for name in (
            "modeling_evil.py",
            "tokenization_evil.py",
            "custom_generate.py",
            "__init__.py",
            "sitecustomize.py",
        ):
            (folder / name).write_text(text)
        classes = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling_evil.Evil")
        set_fields("config.json", auto_map=classes)(folder, canary)
        own = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
        set_fields("tokenizer_config.json", auto_map=own, tokenizer_class="Evil")(folder, canary)

    python = ("modeling_evil.py", "tokenization_evil.py", "custom_generate.py", "__init__.py", "sitecustomize.py")
    yield Case("W-60 auto_map", code, (*ALL_MODEL, "tokenizer"), None, untouched=python)
    yield Case("W-61 deep", put("config.json", b'{"a": ' * 100_000), ("load", "inspect"), "nested too deep")
    closed = b'{"a": ' * 900 + b"1" + b"}" * 900
    yield Case("W-61 deep and closed", put("config.json", closed), ("load", "inspect"), "nested too deep")
    yield Case("W-61 large", put("config.json", b" " * (11 << 20)), ("load", "inspect"), "bytes, at most")
    lists = b'{"a": [' + b"[]," * 650_000 + b"0]}"
    yield Case("W-61 many lists", put("config.json", lists), ("load", "inspect"), "more than 300000 values")
    rows = [
        ("W-64 length", {"max_length": 10**18, "max_new_tokens": 10**18}, None),
        ("W-64 many ends", {"eos_token_id": list(range(100_000))}, None),
        ("W-64 stop strings", {"stop_strings": ["x" * 1000] * 500}, None),
        ("W-64 text", {"max_new_tokens": "y"}, "generation_config.json is refused by transformers"),
        ("W-64 another class", {"compile_config": {"x": 1}}, "generation_config.json is refused by transformers"),
        ("W-64 cache", {"cache_implementation": "evil"}, "generation_config.json is refused by transformers"),
    ]
    for name, fields, says in rows:
        yield Case(name, set_fields("generation_config.json", **fields), ("load", "auto"), says)
    for name, hot, says in (("text", "x", "temperature='x'"), ("digits", 10**400, "temperature=1000")):
        warm = set_fields("generation_config.json", do_sample=True, temperature=hot)
        yield Case(f"W-64 temperature, {name}", warm, ("chat",), says)
    yield Case("W-64 no object", put("generation_config.json", "[1]"), ("load",), "generation_config.json")
    yield Case("W-64 huge", put("generation_config.json", b" " * (2 << 20)), ("load",), "bytes, at most")


def _adapters() -> Iterator[Case]:
    name = "adapter_config.json"
    rows: list[tuple[str, dict[str, Any], str | None]] = [
        ("W-63 rank", {"r": 10**7}, "r is 10000000"),
        ("W-63 pattern", {"target_modules": "(a+)+$"}, None),
        ("W-63 ranks by pattern", {"rank_pattern": {"(a+)+$": 7}}, "patterns are not followed"),
        ("W-63 alpha", {"lora_alpha": float("inf")}, "lora_alpha"),
        ("W-63 alpha of digits", {"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ("W-63 escapes", {"peft_type": "\x1b[2J"}, "peft_type"),
        ("W-63 another kind", {"peft_type": "BONE"}, "peft_type is 'BONE'"),
        ("W-60 code of an adapter", {"auto_mapping": {"base_model_class": "os.system", "parent_library": "os"}}, None),
    ]
    for case, fields, says in rows:
        yield Case(case, set_fields(name, **fields), ("adapter",), says, "lora")
    yield Case("W-61 deep, adapter", put(name, b'{"a": ' * 100_000), ("adapter",), "nested too deep", "lora")
    for kind in ("lora", "prefix"):
        yield Case(f"W-30 fifo, {kind}", _fifo_of(kind), ("adapter",), "is not a regular file", kind)

    def long_prefix(folder: Path, canary: Path) -> None:
        rows, columns = 10**8, 32
        entry = {"dtype": "F16", "shape": [rows, columns], "data_offsets": [0, 2 * rows * columns]}
        header = gate._safetensors({"transformer.prefix_encoder.embedding.weight": entry})
        (folder / "pytorch_model.bin").unlink()
        with open(folder / "model.safetensors", "wb") as file:
            file.write(header)
            file.truncate(len(header) + 2 * rows * columns)

    yield Case("W-63 prefix", long_prefix, ("adapter",), "pre_seq_len=100000000", "prefix")


def _fifo_of(kind: str) -> Callable[[Path, Path], None]:
    def change(folder: Path, canary: Path) -> None:
        name = {"lora": "adapter_model.safetensors", "prefix": "pytorch_model.bin"}[kind]
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


# Tokenizers and templates ---------------------------------------------------------------------------------------------


def _edit_pieces(edit: Callable[[Any], object]) -> Callable[[Path, Path], None]:
    def change(folder: Path, canary: Path) -> None:
        from sentencepiece import sentencepiece_model_pb2

        [path] = folder.glob("*.model")
        model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
        edit(model)
        path.write_bytes(model.SerializeToString())

    return change


def _tokenizers() -> Iterator[Case]:
    def set_piece(index: int, **values: Any) -> Callable[[Any], None]:
        def edit(model: Any) -> None:
            for name, value in values.items():
                setattr(model.pieces[index], name, value)

        return edit

    for base in ("chatglm3", "chatglm"):
        rows: list[tuple[str, Callable[[Any], object], str]] = [
            ("W-65 long piece", set_piece(-1, piece="x" * 200_000), "200000 bytes"),
            ("W-67 zero byte", set_piece(-1, piece="a\0b"), "zero byte"),
            ("W-67 twice", set_piece(-1, piece="<s>"), "occurs twice"),
            ("W-67 score", set_piece(-1, score=float("nan")), "score is no number"),
            ("W-67 no byte", set_piece(-1, piece="<0xZZ>", type=6), "is none from <0x00>"),
            ("W-67 two unknown", set_piece(-2, type=2), "stand for unknown text"),
            (
                "W-67 long surface",
                lambda model: setattr(model.trainer_spec, "unk_surface", "x" * 10**6),
                "more than 100 bytes",
            ),
        ]
        for name, edit, says in rows:
            yield Case(f"{name}, {base}", _edit_pieces(edit), TOKENIZER, says, base)

        def halved(folder: Path, canary: Path) -> None:
            [path] = folder.glob("*.model")
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

        yield Case(f"W-67 cut, {base}", halved, TOKENIZER, "truncated or no SentencePiece file", base)
        [file] = {"chatglm3": ["tokenizer.model"], "chatglm": ["ice_text.model"]}[base]
        pieces = b"\n\x00" * 5_000_000
        yield Case(f"W-67 5 million, {base}", put(file, pieces), TOKENIZER, "more than 300000 pieces", base)
        yield Case(f"W-67 large, {base}", put(file, b"\x12" * (17 << 20)), TOKENIZER, "at most", base)

    def rules(edit: Callable[[bytearray], bytes]) -> Callable[[Path, Path], None]:
        def change(model: Any) -> None:
            spec = model.normalizer_spec
            spec.precompiled_charsmap = edit(bytearray(spec.precompiled_charsmap))

        return _edit_pieces(change)

    def far(trie: bytearray) -> bytes:
        (size,) = struct.unpack_from("<I", trie)
        for at in range(4, 4 + size, 4):
            (unit,) = struct.unpack_from("<I", trie, at)
            struct.pack_into("<I", trie, at, unit | (0 if unit >> 31 else 0x7FFFFC00))
        return bytes(trie)

    broken = "the normaliser's rules are broken"
    for name, edit, says in (
        ("steps out of the trie", far, broken),
        ("size", lambda trie: b"\xff\xff\xff\xff" + bytes(trie[4:]), broken),
        ("no text", lambda trie: bytes(trie[:-1]) + b"x", broken),
        ("three bytes", lambda trie: b"abc", broken),
        ("long text", lambda trie: bytes(trie) + b"x" * 5000 + b"\0", "bytes for a character"),
        ("huge", lambda trie: bytes(5 << 20), "normaliser's rules have"),
    ):
        yield Case(f"W-66 {name}", rules(edit), TOKENIZER, says, "chatglm")
    lines = b"AA== 0\n" * 2_000_000
    yield Case("W-67 ranks", put("tokenizer.model", lines), TOKENIZER, "lines, at most", "glm4")
    yield Case("W-67 rank twice", put("tokenizer.model", b"AA== 0\nAA== 1\n"), TOKENIZER, "occurs twice", "glm4")
    yield Case("W-67 rank of digits", put("tokenizer.model", b"AA== " + b"9" * 1000 + b"\n"), TOKENIZER, "", "glm4")
    words = b"a\n" * 4_000_000
    yield Case("W-67 words", put("vocab.txt", words), TOKENIZER, "tokens or more", "glm")
    words = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\n"
    yield Case("W-67 words twice", put("vocab.txt", words), TOKENIZER, "twice", "glm")
    regex = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    added = [{"id": 10**6 + number, "content": f"x{number}", "special": True} for number in range(10_000)]
    evil = json.dumps({"version": "1.0", "pre_tokenizer": regex, "added_tokens": added, "model": {"type": "BPE"}})
    yield Case(
        "W-68 tokenizer.json", put("tokenizer.json", evil), (*ALL_MODEL, *TEXTS), None, untouched=("tokenizer.json",)
    )
    attacks = {
        "W-69 globals": "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
        "W-69 attr": "{{ ''|attr('__class__')|attr('__mro__') }}",
        "W-69 format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "W-69 format_map": "{{ '{x.__class__}'.format_map({'x': messages}) }}",
        "W-70 loops": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "W-70 text": "{{ 'a' * 10**9 }}",
        "W-70 recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    }
    for name, template in attacks.items():

        def written(folder: Path, canary: Path, template: str = template) -> None:
            text = template.replace("CANARY", str(canary))
            (folder / "chat_template.jinja").write_text(text)
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool_use.jinja").write_text(text)
            set_fields("tokenizer_config.json", chat_template=text)(folder, canary)

        files = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja")
        doors = (*TEXTS, "load", "chat")
        yield Case(name, written, doors, None, untouched=files)
        yield Case(f"{name}, glm4", written, TEXTS, None, "glm4", untouched=files)
    outside = set_fields("tokenizer_config.json", chat_template="../../secret.jinja", chat_template_file="/etc/passwd")
    yield Case("W-71 path", outside, (*TEXTS, "load"), None)
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    looks = {
        str(5 + at): {"content": text, **special} for at, text in enumerate(("<|user|>", "<｜user｜>", "hello", "a"))
    }
    imitating = set_fields(
        "tokenizer_config.json", added_tokens_decoder=looks, additional_special_tokens=["hello", "a"], eos_token="a"
    )
    for base in ("chatglm3", "glm4", "chatglm"):
        yield Case(f"W-72 look-alikes, {base}", imitating, ("text", "template"), None, base)


# Archives -------------------------------------------------------------------------------------------------------------


def _archives() -> Iterator[Case]:
    def as_tar(folder: Path, canary: Path) -> None:
        made = folder.with_suffix(".tar")
        with tarfile.open(made, "w") as archive:
            for name, kind, target in (
                ("../x", tarfile.REGTYPE, ""),
                ("l", tarfile.SYMTYPE, "/"),
                ("d", tarfile.CHRTYPE, ""),
            ):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, target
                archive.addfile(member)
        shutil.rmtree(folder)
        made.rename(folder)

    def as_zip(folder: Path, canary: Path) -> None:
        made = folder.with_suffix(".zip")
        with zipfile.ZipFile(made, "w") as archive:
            archive.writestr("../../evil", "x")
        shutil.rmtree(folder)
        made.rename(folder)

    yield Case("W-73 tar", as_tar, ("load", "inspect"), "")
    yield Case("W-74 zip", as_zip, ("load", "inspect"), "")


def all_cases() -> list[Case]:
    """The whole table; names are unique."""
    parts = (_safetensors, _pickles, _programs_beside, _folders, _configs, _adapters, _tokenizers, _archives)
    cases = [case for part in parts for case in part()]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), sorted({name for name in names if names.count(name) > 1})
    return cases
