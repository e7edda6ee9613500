"""Folders made to hurt: each is refused with one clear error, quickly, without memory and without running anything.

The numbers W-.. are the rows of the project's list of hostile checkpoint inputs.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import socket
import struct
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from glmkit.checkpoint import MAX_TENSORS, Folder, check_tensors, open_folder
from glmkit.errors import CheckpointError

_DANGEROUS = {"os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "pickle.find_class"}
_events: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _events is not None and (event in _DANGEROUS or event.startswith("socket.")):
        _events.append(event)


sys.addaudithook(_watch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def _refused(folder: Path, *expected: str) -> CheckpointError:
    """Opens, expects an error with all the texts, and checks time, memory and that nothing ran."""
    global _events
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    _events = []
    try:
        with pytest.raises(CheckpointError) as caught:
            open_folder(folder)
    finally:
        events, _events = _events, None
    assert events == []
    assert time.process_time() - start < 3  # a second on an idle machine
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300 << 10  # KiB
    text = str(caught.value)
    assert all(character.isprintable() or character == "\n" for character in text), repr(text)
    assert len(text) < 5000
    for part in expected:
        assert part in text
    return caught.value


# One safetensors file ------------------------------------------------------------------------------------------------

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def _safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _entry(**changes: Any) -> bytes:
    entry = ENTRY | changes
    return _safetensors({"a": entry}, b"\0" * 8)


SAFETENSORS_CASES: dict[str, tuple[bytes, str]] = {
    "W-01": (b"", "0 bytes"),
    "W-02": (b"1234567", "7 bytes"),
    "W-03": (_safetensors(b"{}", length=2**63 - 1), "9223372036854775807"),
    "W-03 all ones": (b"\xff" * 8, "18446744073709551615"),
    "W-04": (_safetensors(b"{}", length=11), "cut short"),
    "W-06": (_safetensors(b'{"\xff": 1}'), "not JSON"),
    "W-07 no JSON": (_safetensors(b"{nonsense"), "not JSON"),
    "W-07 garbage": (_safetensors(b"{} {}"), "not JSON"),
    "W-07 array": (_safetensors(b"[]"), "expected an object"),
    "W-08": (_safetensors(b'{"a":' * 100_000), "nested too deep"),
    "W-08 closed": (_safetensors(b'{"a":' + b"[" * 500 + b"]" * 500 + b"}"), "nested too deep"),
    "W-09": (
        _safetensors(b'{"a": %s, "a": %s}' % ((json.dumps(ENTRY).encode(),) * 2), b"\0" * 8),
        "the key a stands twice",
    ),
    "W-10 number": (_safetensors({"__metadata__": {"x": 1}}), "__metadata__"),
    "W-10 long": (_safetensors({"__metadata__": {"x": "y" * (10 << 20)}}), "megabyte"),
    "W-12": (_safetensors({"a": ENTRY, "b": ENTRY}, b"\0" * 8), "overlap"),
    "W-13": (_safetensors({"a": ENTRY | {"data_offsets": [8, 16]}}, b"\0" * 16), "hole"),
    "W-14": (_entry(data_offsets=[8, 0]), "sizes differ"),
    "W-15": (_entry(shape=[2**40], data_offsets=[0, 2**42]), "cut short"),
    "W-16": (_entry(shape=[2**32, 2**32]), "impossible shape"),
    "W-16 wrap": (_entry(shape=[2**62, 4, 2]), "impossible shape"),
    "W-17 negative": (_entry(shape=[-2]), "numbers from 0"),
    "W-17 float": (_entry(shape=[2.0]), "numbers from 0"),
    "W-17 boolean": (_entry(shape=[True, 2]), "numbers from 0"),
    "W-17 offset": (_entry(data_offsets=["0", 8]), "numbers from 0"),
    "W-17 huge": (_safetensors(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 10_000 + b"]}}"), "not JSON"),
    "W-18 unknown": (_entry(dtype="os.system"), "unknown dtype"),
    "W-18 list": (_entry(dtype=["F32"]), "unknown dtype"),
    "W-18 sub-byte": (_entry(dtype="F4"), "unknown dtype"),
    "W-19": (_entry(shape=[0, 2**63], data_offsets=[0, 0]), "impossible shape"),
    "W-20": (_entry() + b"PK\x05\x06" + b"\0" * 18, "after its last tensor"),
    "W-21": (_entry()[:-1], "cut short"),
    "W-51": (b"\x80\x02cposix\nsystem\n.", "torch file under a .safetensors name"),
    "W-51 zip": (b"PK\x03\x04" + b"\0" * 40, "torch file under a .safetensors name"),
    "other keys": (_entry(extra=1), "not described by"),
    "no entry": (_safetensors({"a": 3}), "not described by"),
    "dimensions": (_entry(shape=[1] * 9 + [2]), "impossible shape"),
    "escape in a name": (_safetensors({"\x1b[2J": ENTRY}, b"\0" * 8), "\\x1b[2J"),
    "long name": (_safetensors({"n" * 600: ENTRY}, b"\0" * 8), "nnn…"),
}


@pytest.mark.parametrize("case", SAFETENSORS_CASES)
def test_safetensors(folder: Path, case: str) -> None:
    content, expected = SAFETENSORS_CASES[case]
    (folder / "model.safetensors").write_bytes(content)
    _refused(folder, "model.safetensors", expected)


def test_header_of_spaces(folder: Path) -> None:
    """W-05."""
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 99_999_999))
        file.truncate(100_000_007)
    _refused(folder, "header of 99999999 bytes")


def test_too_many_tensors(folder: Path) -> None:
    """W-11."""
    entry = '"%d":{"dtype":"U8","shape":[],"data_offsets":[0,1]}'
    header = "{" + ",".join(entry % number for number in range(MAX_TENSORS + 1)) + "}"
    (folder / "model.safetensors").write_bytes(_safetensors(header.encode(), b"\0"))
    _refused(folder, f"more than {MAX_TENSORS} tensors")


def test_file_shortened_after_opening(folder: Path) -> None:
    """W-21: an error, not a dead process."""
    for name, content in (("model.safetensors", _entry()), ("pytorch_model.bin", _saved({"a": torch.ones(2)}))):
        (folder / name).write_bytes(content)
        opened = open_folder(folder)
        os.truncate(folder / name, 20)
        with opened, pytest.raises(CheckpointError, match="cut short"):
            list(opened.read())
        (folder / name).unlink()


def test_sparse_file_of_ten_terabytes(folder: Path) -> None:
    """W-22: nothing is allocated for it, and the comparison with the model refuses it."""
    size = 10 << 40
    header = _safetensors({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        try:
            file.truncate(len(header) + size)
        except OSError:
            pytest.skip("this file system has no files of that size")
    with open_folder(folder) as opened:
        assert opened.nbytes == size
        with pytest.raises(CheckpointError, match="expected"):
            check_tensors(opened, {"a": (4,)})


def test_zero_size_and_not_a_number_are_valid(folder: Path) -> None:
    """W-19 and W-23."""
    header = {"a": ENTRY, "b": {"dtype": "F32", "shape": [0, 1 << 20], "data_offsets": [8, 8]}}
    (folder / "model.safetensors").write_bytes(_safetensors(header, struct.pack("<2f", float("nan"), float("inf"))))
    with open_folder(folder) as opened:
        found = dict(opened.read())
    assert found["a"].isnan().tolist() == [True, False]
    assert found["b"].shape == (0, 1 << 20)


# Index and folder ----------------------------------------------------------------------------------------------------


def _index(folder: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def _shard(folder: Path, name: str, *tensors: str) -> None:
    header = {tensor: ENTRY | {"data_offsets": [8 * number, 8 * number + 8]} for number, tensor in enumerate(tensors)}
    (folder / name).write_bytes(_safetensors(header, b"\0" * 8 * len(tensors)))


@pytest.mark.parametrize(
    "name",
    [
        *("../../etc/passwd", "../x.safetensors", "a/../../x.safetensors", "..", ".", ""),  # W-24
        *("/etc/passwd", "/tmp/x.safetensors", "//x.safetensors"),  # W-25
        *("..\\x.safetensors", "C:\\x.safetensors", "%2e%2e%2fx.safetensors", "a%5cx.safetensors"),  # W-26
        *("a\0.safetensors", "a\n.safetensors", "a" * 300 + ".safetensors", "\x1b]0;x\x07.safetensors"),  # W-27
        *("\u202ex.safetensors", "\ud800.safetensors", "\u2028.safetensors", "好" * 90 + ".safetensors"),
        "folder/model.safetensors",
    ],
)
def test_shard_names_that_are_not_plain(folder: Path, name: str) -> None:
    _index(folder, {"a": name})
    _refused(folder, "not a plain file name inside the folder")


@pytest.mark.parametrize("name", ["shard.bin", "config.json", "model.safetensors.exe"])
def test_shard_of_another_format(folder: Path, name: str) -> None:
    """W-36."""
    _index(folder, {"a": name})
    _refused(folder, name, "expected a .safetensors file")


@pytest.mark.parametrize("weight_map", [None, [], "x", 3, [["a", "b"]]])
def test_weight_map_that_is_no_object(folder: Path, weight_map: Any) -> None:
    """W-35."""
    _index(folder, weight_map)
    _refused(folder, "no weight_map object")


@pytest.mark.parametrize("shard", [None, 3, ["model.safetensors"], {"a": 1}])
def test_shard_that_is_no_text(folder: Path, shard: Any) -> None:
    _index(folder, {"a": shard})
    _refused(folder, "no text")


def test_links(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """W-28 and W-29."""
    outside = tmp_path_factory.mktemp("outside")
    _shard(outside, "secret.safetensors", "a")
    weights = folder / "model.safetensors"
    relative = os.path.relpath(outside / "secret.safetensors", folder)
    for target in (str(outside / "secret.safetensors"), relative, "/dev/zero", "../../blobs/secret", "sub/x", ".."):
        weights.symlink_to(target)
        _refused(folder, "model.safetensors")
        weights.unlink()
    weights.symlink_to("model.safetensors")
    _refused(folder, "not a regular file")
    weights.unlink()
    weights.symlink_to("two.safetensors")
    (folder / "two.safetensors").symlink_to(outside / "secret.safetensors")
    _refused(folder, "not a regular file")


def test_hugging_face_links_stay_in_their_cache_entry(tmp_path: Path) -> None:
    """W-28: only ../../blobs/NAME, only below snapshots, and a blob is no link."""
    _shard(tmp_path, "secret.safetensors", "a")
    entry = tmp_path / "models--org--name"
    snapshot = entry / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    (snapshot / "config.json").write_text("{}")
    weights = snapshot / "model.safetensors"
    (entry / "blobs" / "linked").symlink_to("../../secret.safetensors")
    for target in ("../../../secret.safetensors", "../../blobs/../../secret.safetensors", "../../blobs/linked"):
        weights.symlink_to(target)
        _refused(snapshot, "model.safetensors")
        weights.unlink()
    (entry / "blobs" / "linked").unlink()
    (entry / "blobs").rmdir()
    (entry / "blobs").symlink_to(tmp_path)
    weights.symlink_to("../../blobs/secret.safetensors")
    _refused(snapshot, "model.safetensors")


def _make_fifo(path: Path) -> None:
    os.mkfifo(path)


def _make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may have about 100 characters only
    try:
        with socket.socket(socket.AF_UNIX) as endpoint:
            endpoint.bind(path.name)
    finally:
        os.chdir(here)


def _make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except OSError:
        pytest.skip("only root may make a device")


@pytest.mark.parametrize("make", [_make_fifo, _make_socket, _make_device, Path.mkdir])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "shard"])
def test_not_a_regular_file(folder: Path, make: Callable[[Path], None], name: str) -> None:
    """W-30, without waiting for somebody to write."""
    if name == "shard":
        name = "model-00001-of-00001.safetensors"
        _index(folder, {"a": name})
    make(folder / name)
    _refused(folder, f"{name} is not a regular file")


def test_config_that_is_a_pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    _shard(folder, "model.safetensors", "a")
    _refused(folder, "config.json is not a regular file")


def test_index_and_shards_that_disagree(folder: Path) -> None:
    """W-31, W-32 and W-33, all in one error."""
    _shard(folder, "1.safetensors", "a", "both", "stranger")
    _shard(folder, "2.safetensors", "b", "both", "moved")
    (folder / "4.safetensors").write_bytes(b"junk")
    shards = {"a": "1", "both": "1", "b": "2", "ghost": "2", "moved": "1", "c": "3", "d": "4"}
    _index(folder, {name: f"{shard}.safetensors" for name, shard in shards.items()})
    error = _refused(folder)
    assert error.problems == [
        "3.safetensors is missing",
        "4.safetensors has 4 bytes, which is no safetensors file",
        "tensor both stands in 2 shards: 1.safetensors, 2.safetensors",
        "tensor stranger stands in 1.safetensors, but not in the index",
        "tensor moved stands in 2.safetensors, but the index says 1.safetensors",
        "tensor ghost is promised by the index, but 2.safetensors does not have it",
    ]


def test_too_many_shards_and_too_large_an_index(folder: Path) -> None:
    """W-34."""
    _index(folder, {str(number): f"{number}.safetensors" for number in range(10_000)})
    _refused(folder, "names 10000 shards")
    with open(folder / "model.safetensors.index.json", "wb") as file:
        file.truncate(100 << 20)
    _refused(folder, "has 104857600 bytes")


def test_shards_that_differ_in_case_only(folder: Path) -> None:
    """W-38."""
    _index(folder, {"a": "model-1.safetensors", "b": "Model-1.safetensors"})
    _refused(folder, "differ in more than case")


def test_a_file_replaced_after_opening_is_not_used(folder: Path) -> None:
    """W-39."""
    (folder / "model.safetensors").write_bytes(_safetensors({"a": ENTRY}, struct.pack("<2f", 1, 2)))
    with open_folder(folder) as opened:
        (folder / "new").write_bytes(b"something else")
        os.replace(folder / "new", folder / "model.safetensors")
        assert dict(opened.read())["a"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not JSON"),
        (b"[1]", "expected an object"),
        (b"\xff{}", "not JSON"),
        (b'{"a": ' * 100_000, "nested too deep"),  # W-61
        (b'{"a": ' * 100 + b"1" + b"}" * 100, "nested too deep"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "not JSON"),
        (b" " * (11 << 20), "bytes, at most"),
    ],
)
def test_config(folder: Path, content: bytes, expected: str) -> None:
    (folder / "config.json").write_bytes(content)
    _shard(folder, "model.safetensors", "a")
    _refused(folder, "config.json", expected)


# .bin files ----------------------------------------------------------------------------------------------------------


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _archive(program: bytes, **entries: bytes) -> bytes:
    """A file in torch's format around a pickle program; keyword d0=... is the storage data/0."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", b"3\n")
        for name, data in entries.items():
            archive.writestr(f"archive/{name.replace('d', 'data/', 1) if name[1:].isdigit() else name}", data)
    return buffer.getvalue()


class _Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self._reduced


class _Tensors:
    """Pickles tensor programs with chosen sizes."""

    def __init__(self, **changes: Any) -> None:
        self.values = {"key": "0", "elements": 4, "offset": 0, "shape": (2, 2), "stride": (2, 1)} | changes

    def program(self) -> bytes:
        values = self.values

        class Pickler(pickle.Pickler):
            def persistent_id(self, value: Any) -> Any:
                storage = ("storage", values.get("kind", torch.FloatStorage), values["key"], "cpu", values["elements"])
                return values.get("reference", storage) if value == "STORAGE" else None

        arguments = ("STORAGE", values["offset"], values["shape"], values["stride"], False, OrderedDict())
        buffer = io.BytesIO()
        Pickler(buffer, protocol=2).dump({"a": _Call(torch._utils._rebuild_tensor_v2, *arguments)})
        return buffer.getvalue()


def _global(module: str, name: str) -> bytes:
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X\x02\x00\x00\x00id\x85R."


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code of the checkpoint was run"


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_pickle_that_runs_a_command(folder: Path, canary: Path, protocol: int) -> None:
    """W-41; protocol 2 is what torch.save writes."""
    program = pickle.dumps({"a": _Call(os.system, f"touch {canary}")}, protocol=protocol)
    pickle.loads(program)
    assert canary.exists(), "the attack itself must work"
    canary.unlink()
    (folder / "pytorch_model.bin").write_bytes(_archive(program))
    if protocol:  # of protocol 0 even the instruction for a dictionary is unknown
        _refused(folder, "pytorch_model.bin asks to run posix.system")
    else:
        _refused(folder, "pytorch_model.bin has the pickle instruction")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(("builtins", "getattr"), ("builtins", "__import__"), ("__builtin__", "eval"), ("builtins", "exec")),  # W-42
        *(("torch.utils.collect_env", "run"), ("multiprocessing.util", "spawnv_passfds"), ("timeit", "timeit")),  # W-43
        *(("numpy.f2py.crackfortran", "myeval"), ("torch.hub", "load"), ("torch", "load"), ("runpy", "run_path")),
        *(("collections", "OrderedDict.fromkeys"), ("torch._utils", "_rebuild_tensor_v2.__globals__")),
        *(
            ("torch", "FloatStorage.from_file"),
            ("torch.FloatStorage", "from_file"),
            ("torch._utils", "_rebuild_tensor"),
        ),
        *(("numpy.core.multiarray", "_reconstruct"), ("torch.storage", "_load_from_bytes"), ("torch.jit", "load")),
        *(("transformers.training_args", "TrainingArguments"), ("argparse", "Namespace")),  # W-53
    ],
)
@pytest.mark.parametrize("instruction", ["GLOBAL", "STACK_GLOBAL", "INST"])
def test_pickle_that_names_anything_else(folder: Path, module: str, name: str, instruction: str) -> None:
    program = _global(module, name)
    if instruction == "STACK_GLOBAL":
        texts = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)]
        program = b"\x80\x04" + b"".join(texts) + b"\x93)R."
    elif instruction == "INST":
        program = f"(i{module}\n{name}\n.".encode()
    (folder / "pytorch_model.bin").write_bytes(_archive(program))
    _refused(folder, f"asks to run {module}.{name}")


def test_name_with_terminal_escapes(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(_archive(_global("os\x1b[2J", "system")))
    _refused(folder, "\\x1b[2J.system")


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        # W-44: a harmless looking tensor whose REDUCE goes through an allowed class with hostile arguments.
        (b"\x80\x02ccollections\nOrderedDict\nX\x02\0\0\0id\x85R.", "OrderedDict with 1 arguments"),
        (b"\x80\x02ctorch\nFloatStorage\nK\x05\x85R.", "FloatStorage with 1 arguments"),
        (b"\x80\x02ctorch\nFloatStorage\n)\x81.", "instruction NEWOBJ"),
        (b"\x80\x02]K\x01K\x02s.", "SETITEMS on a list"),  # W-45
        (b"\x80\x02}(K\x01K\x02K\x03u.", "a key without a value"),
        (b"\x80\x02}K\x01a.", "APPEND on a dict"),
        (b"\x80\x02}}K\x01s.", "broken pickle"),
        (b"\x80\x02K\x01)R.", "REDUCE on a int"),
        (b"\x80\x02}K\x01b.", "BUILD on a int"),
        (b"\x80\x02ctorch\nFloatStorage\n}b.", "BUILD on a class"),
        (b"\x80\x02h\x05.", "broken pickle"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "broken pickle"),
        (b"\x80\x02.", "broken pickle"),
        (b"\x80\x02(.", "broken pickle"),
        (b"\x80\x02t.", "broken pickle"),
        (b"\x80\x02", "broken pickle"),
        (b"", "broken pickle"),
        (b"\xfe\xfe", "broken pickle"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "broken pickle"),
        (b"\x80\x02\x8d" + b"\xff" * 7 + b"\x7fabc.", "broken pickle"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"\x80\x02Pposix.system\n.", "instruction PERSID"),
        (b"\x80\x02X\x01\0\0\0aQ.", "unknown persistent id"),
        (b"\x80\x02].", "holds a list"),
        (b"\x80\x02}X\x01\0\0\0aK\x01s.", "holds a int under a"),
        (b"\x80\x02}X\x01\0\0\0a}s.", "holds a dictionary under a"),
        (b"\x80\x02}X\x01\0\0\0aK\x01sX\x01\0\0\0aK\x01s.", "names a twice"),
        (b"\x80\x02}(K\x01K\x02tK\x03s.", "a tuple as a key"),
    ],
)
def test_pickle_programs(folder: Path, program: bytes, expected: str) -> None:
    (folder / "pytorch_model.bin").write_bytes(_archive(program))
    _refused(folder, expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"elements": 5}, "promises 20 bytes in storage 0, but has only 16"),  # W-46
        ({"elements": 2**62}, "but has only 16"),
        ({"elements": -1}, "malformed storage"),
        ({"elements": 4.0}, "malformed storage"),
        ({"elements": True}, "malformed storage"),
        ({"key": "1"}, "no data for storage"),
        ({"key": "../version"}, "no data for storage"),
        ({"key": 0}, "malformed storage"),
        ({"kind": OrderedDict}, "malformed storage"),
        ({"kind": "FloatStorage"}, "broken pickle"),
        ({"reference": ("module", torch.FloatStorage, "0", "cpu", 4)}, "unknown persistent id"),
        ({"reference": ("storage", torch.FloatStorage, "0", "cpu")}, "unknown persistent id"),
        ({"offset": 1}, "reaches outside"),
        ({"offset": -1}, "no number"),
        ({"offset": 2**62}, "reaches outside"),
        ({"shape": (3, 2)}, "reaches outside"),
        ({"shape": (-2, 2)}, "no number"),
        ({"shape": [2, 2]}, "malformed tensor"),
        ({"shape": (2.0, 2)}, "no number"),
        ({"stride": (3, 1)}, "reaches outside"),
        ({"stride": (-2, 1)}, "no number"),
        ({"stride": (1,)}, "2 sizes and 1 strides"),
        ({"shape": (1,) * 9, "stride": (1,) * 9}, "9 sizes"),
        ({"shape": (3, 3), "stride": (0, 0)}, "in a storage of only 4 numbers"),
        ({"shape": (10**12, 10**12), "stride": (0, 0)}, "reaches outside"),
        ({"shape": (0, 2**63), "stride": (1, 1)}, "reaches outside"),
    ],
)
def test_tensor_programs(folder: Path, changes: dict[str, Any], expected: str) -> None:
    (folder / "pytorch_model.bin").write_bytes(_archive(_Tensors(**changes).program(), d0=b"\0" * 16))
    _refused(folder, expected)


def test_the_unchanged_tensor_program_is_valid(folder: Path) -> None:
    """Otherwise the cases above would prove nothing."""
    (folder / "pytorch_model.bin").write_bytes(_archive(_Tensors().program(), d0=struct.pack("<4f", 1, 2, 3, 4)))
    with open_folder(folder) as opened:
        assert dict(opened.read())["a"].tolist() == [[1, 2], [3, 4]]


def test_byte_order(folder: Path) -> None:
    """W-47."""
    for order in (b"big", b"", b"LITTLE", b"x" * 1000):
        (folder / "pytorch_model.bin").write_bytes(_archive(_Tensors().program(), d0=b"\0" * 16, byteorder=order))
        _refused(folder, "byte")


def test_formats_from_before_zip(folder: Path) -> None:
    """W-48, and W-51 the other way round."""
    old = io.BytesIO()
    torch.save({"a": torch.ones(2)}, old, _use_new_zipfile_serialization=False)
    tar = b"\0" * 257 + b"ustar" + b"\0" * 300
    for content, expected in (
        (old.getvalue(), "before 1.6"),
        (tar, "before 1.6"),
        (pickle.dumps({"a": 1}), "before 1.6"),
        (_entry(), "safetensors file under a .bin name"),
        (b"", "is empty"),
        (b"GIF89a", "no file that torch.save writes"),
    ):
        (folder / "pytorch_model.bin").write_bytes(content)
        error = _refused(folder, expected)
        assert error.hint or content in (b"", b"GIF89a")


def _deflated() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", _Tensors().program())
        archive.writestr("archive/data/0", b"\0" * (40 << 20))
    return buffer.getvalue()


def _patched(offset_of: bytes, skip: int, new: bytes) -> bytes:
    content = bytearray(_archive(_Tensors().program(), d0=b"\0" * 16))
    place = content.index(offset_of) + skip
    content[place : place + len(new)] = new
    return bytes(content)


def _two_of_a_name() -> bytes:
    content = _archive(_Tensors().program(), d0=b"\0" * 16, d1=b"\0" * 16)
    return content.replace(b"archive/data/1", b"archive/data/0")


CENTRAL = b"PK\x01\x02"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (_deflated(), "compressed or unusual entry"),
        (_patched(CENTRAL, 8, b"\x01"), "encrypted entry"),
        (_patched(CENTRAL, 8, b"\x40"), "unusual entry"),
        (_patched(CENTRAL, 16, b"\xff\xff\xff\xff"), "does not match its check sum"),
        (_patched(CENTRAL, 20, b"\xf0\xff\xff\x0f" * 2), "cut short"),
        (_patched(CENTRAL, 42, b"\x10"), "two different headers"),
        (_patched(CENTRAL, 42, b"\xf0\xff\xff\x7f"), "cut short"),
        (_patched(CENTRAL, 0, b"XX"), "broken zip directory"),
        (_patched(CENTRAL, 28, b"\xff\xff"), "cut short"),
        (_patched(b"PK\x05\x06", 10, b"\xff\xff"), "broken zip directory"),
        (_patched(b"PK\x05\x06", 10, b"\x02"), "broken zip directory"),
        (_patched(b"PK\x05\x06", 12, b"\xf0\xff\xff\x7f"), "too many"),
        (_patched(b"PK\x05\x06", 16, b"\xf0\xff\xff\x7f"), "cut short"),
        (_two_of_a_name(), "two entries with the name archive/data/0"),
        (_archive(_Tensors().program(), d0=b"\0" * 16)[:-30], "cut short"),
        (_archive(_Tensors().program(), d0=b"\0" * 16) + b"x", "cut short or has bytes after"),
        (_archive(b"").replace(b"archive/version", b"../../a/version"), "does not write"),
        (_archive(b"", **{"../x": b""}), "does not write"),
        (_archive(b"", **{"data/../x": b""}), "does not write"),
        (_archive(b"", **{"run.sh": b""}), "does not write"),
        (_archive(b"").replace(b"data.pkl", b"data.pkk"), "does not write"),
        (_archive(b"", **{"code/x.py": b""}), "TorchScript"),  # W-52
        (_archive(b"", **{"constants.pkl": b""}), "TorchScript"),
    ],
)
def test_zip_files(folder: Path, content: bytes, expected: str) -> None:
    """W-49 and W-52."""
    (folder / "pytorch_model.bin").write_bytes(content)
    _refused(folder, expected)


def test_overlapping_zip_entries(folder: Path) -> None:
    content = bytearray(_archive(_Tensors().program(), d0=b"\0" * 400))
    first = content.index(CENTRAL)  # data.pkl, made longer
    content[first + 20 : first + 28] = struct.pack("<LL", 400, 400)
    (folder / "pytorch_model.bin").write_bytes(content)
    _refused(folder, "overlapping entries")


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (b"\x80\x02" + b"N0" * 5_000_000 + b".", "instruction POP"),
        (b"\x80\x02" + b"N" * 10_000_000 + b".", "more than"),
        (b"\x80\x02" + b"(" * 1_000_000 + b"t" * 1_000_000 + b".", "more than"),
        (b"\x80\x02)" + b"\x85" * 190_000 + b".", "holds a tuple"),
        (b"\x80\x02]" + b"q\x00]h\x00h\x00\x86a" * 30_000 + b".", "holds a list"),
    ],
)
def test_pickle_bombs(folder: Path, program: bytes, expected: str) -> None:
    """W-50."""
    (folder / "pytorch_model.bin").write_bytes(_archive(program))
    _refused(folder, expected)


def test_too_large_a_pickle(folder: Path) -> None:
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive, archive.open("archive/data.pkl", "w") as entry:
        for _ in range(65):
            entry.write(b"\0" * (1 << 20))
    _refused(folder, "at most 16777216 expected")


def test_what_a_training_checkpoint_holds_is_refused_as_weights(folder: Path) -> None:
    """W-53."""
    state = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
    (folder / "pytorch_model.bin").write_bytes(_saved(state))
    _refused(folder, "expected a dictionary of names to tensors")


# Random damage -------------------------------------------------------------------------------------------------------


def _fuzz(folder: Path, file: str, rounds: int, seed: int) -> tuple[int, int]:
    original = (folder / file).read_bytes()
    generator = random.Random(seed)
    opened = refused = 0
    for _ in range(rounds):
        content = bytearray(original)
        for _ in range(generator.choice([1, 1, 1, 2, 8])):
            content[generator.randrange(len(content))] = generator.choice(
                [0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)]
            )
        if generator.random() < 0.1:
            del content[generator.randrange(len(content)) :]
        with open(folder / file, "r+b") as target:
            target.write(content)
            target.truncate()
        try:
            with open_folder(folder) as result:
                assert isinstance(result, Folder)
                for _, tensor in result.read():
                    assert tensor.nbytes <= 1 << 16
            opened += 1
        except CheckpointError:
            refused += 1
    (folder / file).write_bytes(original)
    return opened, refused


def test_random_damage_never_gives_anything_but_success_or_the_error(folder: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, 2, dtype=torch.bfloat16).t()}
    (folder / "config.json").write_text('{"num_layers": 2, "hidden_size": [1, 2.5, null]}')
    torch.serialization.set_crc32_options(False)  # otherwise the check sum would hide the pickle from the damage
    try:
        (folder / "pytorch_model.bin").write_bytes(_saved(tensors))
    finally:
        torch.serialization.set_crc32_options(True)
    binary = _fuzz(folder, "pytorch_model.bin", 1200, seed=1)
    (folder / "pytorch_model.bin").unlink()
    _shard(folder, "model-1.safetensors", "a", "b")
    _shard(folder, "model-2.safetensors", "c")
    _index(folder, {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"})
    results = [
        binary,
        _fuzz(folder, "model-1.safetensors", 600, seed=2),
        _fuzz(folder, "model.safetensors.index.json", 300, seed=3),
        _fuzz(folder, "config.json", 100, seed=4),
    ]
    assert all(opened and refused for opened, refused in results), results
