"""One package for every device: kinds of devices are named in one module only, and an imitated machine is used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import glmkit
from glmkit import completion, devices
from glmkit.engine.layout import layout_for
from glmkit.errors import UsageError
from glmkit.placement import plan_layers
from glmkit.train.arguments import TrainBlock
from glmkit.train.precision import precision
from glmkit.train.validation import untouched_random
from official_families import FAMILIES, Family, write_family

SOURCES = Path(glmkit.__file__).parent
KINDS = tuple(devices.NAMES)
EXTENSIONS = ("npu", "mlu")  # packages of their own give torch these names
_LITERAL = re.compile(rf"({'|'.join(KINDS)}|hpu)(:\d+)?")


# --- the sources ---


def in_messages(tree: ast.AST) -> set[int]:
    """Lines of strings that only people read: docstrings, and what errors, help and default texts say."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def device_names(path: Path) -> Iterator[str]:
    """Strings that are a device's name, and attributes of torch that are one kind's only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    said = in_messages(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if _LITERAL.fullmatch(node.value) and node.lineno not in said:
                yield f"{path.relative_to(SOURCES)}:{node.lineno} {node.value!r}"
        elif isinstance(node, ast.Attribute) and node.attr in KINDS:
            yield f"{path.relative_to(SOURCES)}:{node.lineno} .{node.attr}"


def test_no_source_names_a_device_but_one() -> None:
    # What completion offers is written out there, because it may not import torch.
    files = [path for path in SOURCES.rglob("*.py") if path.name not in ("devices.py", "completion.py")]
    assert len(files) > 250
    assert [name for path in files for name in device_names(path)] == []
    assert completion._CHOICES["--device"] == ("auto", "cpu", *KINDS)


@pytest.mark.parametrize(
    "line", ["x.to('cuda')", "x = 'npu:1'", "torch.cuda.synchronize()", "model.mps()", "f(device='mlu')"]
)
def test_the_walk_finds(tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "module.py"
    file.write_text(f'"""About cuda."""\n{line}\n')
    monkeypatch.setitem(globals(), "SOURCES", tmp_path)
    assert len(list(device_names(file))) == 1


# --- no device at all: shapes and dtypes of every family ---


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Any]:
    folder = tmp_path_factory.mktemp("family")
    write_family(folder, request.param)
    return request.param, glmkit.load(folder, dtype="float32").config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_family_runs_without_a_device(config: tuple[Family, Any], dtype: torch.dtype) -> None:
    """On the meta device nothing falls back to the CPU: a table or mask made in the wrong place is an error here."""
    family, values = config
    with torch.device("meta"):
        model = family.network(values).to(dtype).eval()
    ends = [*(getattr(values, "mask_token_ids", None) or ())[:1]]
    ends += [getattr(values, name, None) for name in ("gmask_token_id", "bos_token_id", "sop_token_id")]
    ids = torch.tensor([[5, 6, 7, *(end for end in ends if isinstance(end, int))]] * 2)
    given = layout_for(model, ids, torch.tensor([0, 0])).prompt(0, ids.shape[1])  # of padding the values must be seen
    found = model(ids.to("meta"), **{name: value.to("meta") for name, value in given.items()}).logits
    assert (found.device.type, found.dtype, found.shape[:2]) == ("meta", dtype, ids.shape)


# --- an imitated machine ---


class Backend(SimpleNamespace):
    """What torch, or an extension of it, has for a kind of device."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.waited, self.state = kind, 0, torch.tensor([7], dtype=torch.uint8)
        if kind != "mps":
            self.mem_get_info = lambda device: ((3 + (device.index or 0)) * 10**9, 8 * 10**9)
            self.max_memory_allocated = lambda device: 5
            self.get_device_properties = lambda index: SimpleNamespace(name=f"Card {index}", total_memory=8 * 10**9)

    def get_rng_state(self, *device: torch.device) -> torch.Tensor:
        assert len(device) == (self.kind != "mps")
        return self.state

    def set_rng_state(self, state: torch.Tensor, *device: torch.device) -> None:
        assert len(device) == (self.kind != "mps")
        self.state = state


@pytest.fixture(params=[kind for kind in KINDS if kind not in EXTENSIONS])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A machine with two devices of a kind (Apple's has one)."""
    kind: str = request.param
    backend, count = Backend(kind), 1 if kind == "mps" else 2
    monkeypatch.setattr(torch, kind, backend, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: setattr(backend, "waited", backend.waited + 1))
    return backend


def test_an_imitated_machine_is_chosen(machine: Backend) -> None:
    kind = machine.kind
    assert devices.choose_device("auto") == torch.device(kind)
    assert devices.choose_device("cpu") == torch.device("cpu")
    assert devices.choose_device(f"{kind}:0") == torch.device(kind, 0)
    if kind != "mps":
        assert devices.choose_device(f"{kind}:1") == torch.device(kind, 1)
        assert devices.accelerators() == [torch.device(kind, 0), torch.device(kind, 1)]
    with pytest.raises(UsageError, match=f"this machine has {len(devices.accelerators())} of {kind}"):
        devices.choose_device(f"{kind}:2")
    other = "cuda" if kind != "cuda" else "xpu"
    with pytest.raises(UsageError, match=f"device='{other}': this machine has {kind}"):
        devices.choose_device(other)


def test_memory_of_an_imitated_machine(machine: Backend) -> None:
    device = devices.accelerators()[-1]
    shown = devices.described()[-1]
    if machine.kind == "mps":  # it says neither
        assert (devices.free_bytes(device), devices.peak_bytes(device)) == (None, 0)
        assert shown == {"name": "mps Apple MPS", "memory_bytes": None}
        return
    assert (devices.free_bytes(device), devices.peak_bytes(device)) == (4 * 10**9, 5)
    assert devices.free_bytes(torch.device(machine.kind, 2)) is None
    assert shown == {"name": f"{machine.kind}:1 Card 1", "memory_bytes": 8 * 10**9}


def test_waiting_and_chance_of_an_imitated_machine(machine: Backend) -> None:
    device = devices.accelerators()[-1]
    devices.wait_for(device)
    devices.wait_for(torch.device("cpu"))
    assert machine.waited == 1
    with untouched_random(device):
        machine.state = torch.tensor([9], dtype=torch.uint8)
    assert machine.state.tolist() == [7]
    assert devices.random_state(torch.device("cpu")) is None


def test_layers_are_placed_on_an_imitated_machine(machine: Backend, config: tuple[Family, Any]) -> None:
    family, values = config
    with torch.device("meta"):
        model = family.network(values)
    table = plan_layers(model, "auto", dtype=torch.float16)
    assert {device.type for device in table.values()} == {machine.kind}
    assert len(set(table.values())) == (1 if machine.kind == "mps" or values.num_layers == 1 else 2)


def test_products_on_an_imitated_machine(machine: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # autocast asks torch's own module for the device
    warnings.simplefilter("ignore")  # it says that the device is not there
    context = precision(TrainBlock(bf16=True), torch.device(machine.kind))
    assert isinstance(context, torch.autocast)
    assert (context.device, context.fast_dtype) == (machine.kind, torch.bfloat16)


def test_a_kind_that_comes_as_an_extension() -> None:
    """In a process of its own: torch can give one kind a new name, once. torch-npu and torch-mlu both do."""
    code = """
import glmkit_command
import torch
import transformers
torch.utils.rename_privateuse1_backend("npu")
from types import SimpleNamespace
state = [torch.tensor([7])]
torch.npu = SimpleNamespace(
    mem_get_info=lambda device: (3 + device.index, 8), max_memory_allocated=lambda device: 5,
    get_device_properties=lambda index: SimpleNamespace(name=f"Ascend {index}", total_memory=8),
    get_rng_state=lambda device: state[0], set_rng_state=lambda new, device: state.insert(0, new),
)
torch.accelerator.is_available = lambda: True
torch.accelerator.current_accelerator = lambda: torch.device("npu")
torch.accelerator.device_count = lambda: 2
from glmkit import devices
device = devices.choose_device("npu:1")
devices.set_random_state(device, devices.random_state(device) + 2)
figures = devices.free_bytes(device), devices.peak_bytes(device)
print(devices.choose_device("auto"), device, devices.described(), *figures)
print(state[0].tolist(), devices.parse_device("npu"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    card = "{'name': 'npu:%d Ascend %d', 'memory_bytes': 8}"
    assert done.stdout == f"npu npu:1 [{card % (0, 0)}, {card % (1, 1)}] 4 5\n[9] npu:0\n"


def test_rocm_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hygon's DCU and AMD's cards call themselves CUDA."""
    monkeypatch.setattr(torch, "cuda", Backend("cuda"))
    monkeypatch.setattr(devices, "accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert devices.described()[0]["name"] == "cuda:0 Card 0 (ROCm)"


# --- what others quantise ---


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm3-6b", "glm-4-9b-chat"])
def test_a_torchao_config_loads(name: str, tmp_path: Path) -> None:
    """bitsandbytes' configs are in test_methods.py."""
    quantization = pytest.importorskip("torchao.quantization")
    family = next(family for family in FAMILIES if family.name == name)
    write_family(tmp_path / name, family)
    config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    plain, small = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32, **options)
        for options in ({}, {"quantization_config": config})
    )
    kinds = {type(parameter).__name__ for parameter in small.parameters()}
    assert "Int8Tensor" in kinds
    ids = torch.tensor([glmkit.load(tmp_path / name).tokenizer.encode(family.texts[0])])
    with torch.no_grad():
        expected, found = plain(ids).logits, small(ids).logits
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.05  # 1.5 to 2.5 % with torchao 0.18
