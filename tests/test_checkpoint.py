"""Opening, reading and writing of checkpoint folders that are as they should be."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch

from glmkit.checkpoint import ADAPTER_WEIGHTS, check_tensors, open_folder
from glmkit.errors import CheckpointError, OutputError
from glmkit.writing import save_tensors, write_folder, write_text_atomic


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "transformer.embedding.word_embeddings.weight": torch.randn(7, 4, generator=generator),
        "half": torch.randn(3, 5, generator=generator).to(torch.float16),
        "brain": torch.randn(2, 3, 4, generator=generator).to(torch.bfloat16),
        "bytes": torch.arange(-3, 4, dtype=torch.int8),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
    }


def _make(folder: Path, tensors: Mapping[str, torch.Tensor], file: str = "pytorch_model.bin") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"num_layers": 1}')
    if file.endswith(".bin"):
        torch.save(dict(tensors), folder / file)
    else:
        safetensors.torch.save_file(dict(tensors), folder / file)
    return folder


def _assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert found[name].is_contiguous(), name
        assert torch.equal(found[name], tensor), name


def _reference(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(file)
    for file in sorted(folder.glob("*.bin")):
        tensors |= torch.load(file, weights_only=True)
    return tensors


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_every_dtype_and_shape_is_read_exactly(tmp_path: Path, file: str) -> None:
    _make(tmp_path, _tensors(), file)
    with open_folder(tmp_path) as folder:
        assert folder.config == {"num_layers": 1}
        assert folder.nbytes == sum(tensor.nbytes for tensor in _tensors().values())
        _assert_same(dict(folder.read()), _tensors())
        assert folder.tensors["half"].file == file
        assert folder.tensors["brain"].shape == (2, 3, 4)


def test_tensors_that_share_or_jump_in_their_storage(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tied = torch.randn(3, 2)
    tensors = {
        "base": base,
        "transposed": base.t(),
        "column": base[:, 3],
        "block": base[1:3, 2:5],
        "steps": base[::2, ::3],
        "one_row": base[2:3],
        "tied": tied,
        "lm_head": tied,
        "parameter": torch.nn.Parameter(base[3]),
    }
    _make(tmp_path, tensors)
    with open_folder(tmp_path) as folder:
        found = dict(folder.read())
        _assert_same(found, {name: tensor.detach() for name, tensor in tensors.items()})
        found["tied"].zero_()
        assert torch.equal(found["lm_head"], tied), "tensors must not share memory"


def test_state_dict_of_a_module_and_pickle_without_check_sum(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    _make(tmp_path, {})
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    with open_folder(tmp_path) as folder:
        _assert_same(dict(folder.read()), module.state_dict())
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    with open_folder(tmp_path) as folder:
        _assert_same(dict(folder.read()), module.state_dict())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_all_pickle_protocols_that_torch_offers(tmp_path: Path, protocol: int) -> None:
    _make(tmp_path, {})
    torch.save(_tensors(), tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
    with open_folder(tmp_path) as folder:
        _assert_same(dict(folder.read()), _tensors())


def test_read_takes_names_and_keeps_the_order_of_the_file(tmp_path: Path) -> None:
    _make(tmp_path, {"a": torch.ones(1), "b": torch.ones(2), "c": torch.ones(3)})
    with open_folder(tmp_path) as folder:
        assert [name for name, _ in folder.read(["c", "a", "c"])] == ["a", "c"]
        with pytest.raises(CheckpointError, match="no tensor nothing"):
            list(folder.read(["nothing"]))
    with pytest.raises(CheckpointError, match="closed"):
        list(folder.read())


def test_safetensors_is_preferred_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """W-37: both formats with different contents."""
    _make(tmp_path, {"old": torch.ones(1)}, "pytorch_model.bin")
    _make(tmp_path, {"new": torch.ones(1)}, "model.safetensors")
    with caplog.at_level(logging.INFO, logger="glmkit"), open_folder(tmp_path) as folder:
        assert list(folder.tensors) == ["new"]
    assert "using model.safetensors and leaving pytorch_model.bin" in caplog.text


def test_adapter_folders_open_through_the_same_gate(tmp_path: Path) -> None:
    weights = {"base_model.model.x.lora_A.weight": torch.randn(2, 3)}
    for file in ADAPTER_WEIGHTS:
        folder = tmp_path / file
        _make(folder, weights, file)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        with open_folder(folder, weights=ADAPTER_WEIGHTS, config="adapter_config.json") as opened:
            assert opened.config["peft_type"] == "LORA"
            _assert_same(dict(opened.read()), weights)
        with open_folder(folder, weights=ADAPTER_WEIGHTS, config=None) as opened:
            assert opened.config == {}
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="adapter="):
        open_folder(folder)


def test_small_files_and_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("ChatGLM 你好")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe")
    with open_folder(tmp_path, weights=(), config=None) as folder:
        assert folder.tensors == {}
        assert folder.read_text("note.txt") == "ChatGLM 你好"
        assert folder.read_bytes("latin.txt") == b"\xff\xfe"
        assert folder.read_text("absent.txt") is None
        assert folder.has("note.txt")
        assert not folder.has("absent.txt")
        for name, limit in (("note.txt", 5), ("latin.txt", 100), ("../x", 100)):
            with pytest.raises(CheckpointError):
                folder.read_text(name, limit_bytes=limit)


def test_missing_things_have_a_cure(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        open_folder(tmp_path / "nowhere")
    _make(tmp_path, {"a": torch.ones(1)}, "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"index\.json that belongs to them is missing"):
        open_folder(tmp_path)
    with pytest.raises(CheckpointError, match="give the folder, not a file"):
        open_folder(tmp_path / "config.json")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(CheckpointError, match="git lfs pull"):
            open_folder(tmp_path)
        (tmp_path / name).unlink()


def test_hugging_face_cache_and_links_inside_the_folder(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3)}
    blobs = _make(tmp_path / "models--org--name" / "blobs", tensors, "model.safetensors")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for number, name in enumerate(["config.json", "model.safetensors"]):
        blob = f"{number}" * 40
        (blobs / name).rename(blobs / blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    with open_folder(snapshot) as folder:
        _assert_same(dict(folder.read()), tensors)
    plain = _make(tmp_path / "plain", tensors, "weights.safetensors")
    (plain / "model.safetensors").symlink_to("weights.safetensors")
    with open_folder(plain) as folder:
        _assert_same(dict(folder.read()), tensors)
    (tmp_path / "elsewhere").symlink_to(plain)
    with open_folder(tmp_path / "elsewhere") as folder:
        assert list(folder.tensors) == ["a"]


def test_check_tensors_lists_every_problem(tmp_path: Path) -> None:
    embedding = "transformer.embedding.word_embeddings.weight"
    tensors = {embedding: torch.ones(7, 4), "w": torch.ones(2, 3), "old.inv_freq": torch.ones(2), "odd": torch.ones(1)}
    _make(tmp_path, tensors)
    with open_folder(tmp_path) as folder:
        right = {embedding: (7, 4), "w": (2, 3), "odd": (1,)}
        check_tensors(folder, right, ignore=lambda name: name.endswith("inv_freq"))
        with pytest.raises(CheckpointError) as caught:
            check_tensors(folder, {embedding: (9, 4), "w": (3, 2), "gone": (5,)})
    assert caught.value.problems == [
        f"{embedding} has a vocabulary of 7 rows, config.json says 9",
        "tensor w has shape [2, 3], expected [3, 2]",
        "tensor gone of shape [5] is missing",
        "tensor old.inv_freq of shape [2] is not part of this model",
        "tensor odd of shape [1] is not part of this model",
    ]


def test_stale_total_size_is_not_looked_at(tmp_path: Path) -> None:
    """W-40."""
    (tmp_path / "config.json").write_text("{}")
    save_tensors(tmp_path, _tensors(), max_shard_bytes=60)
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["metadata"]["total_size"] = -1
    index_file.write_text(json.dumps(index))
    with open_folder(tmp_path) as folder:
        _assert_same(dict(folder.read()), _tensors())


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 100, 1])
def test_saved_tensors_are_what_the_official_library_reads(tmp_path: Path, max_shard_bytes: int) -> None:
    tensors = _tensors() | {"transposed": torch.arange(6.0).reshape(2, 3).t()}
    (tmp_path / "config.json").write_text("{}")
    files = save_tensors(tmp_path, tensors, max_shard_bytes=max_shard_bytes)
    _assert_same(_reference(tmp_path), tensors)
    with open_folder(tmp_path) as folder:
        _assert_same(dict(folder.read()), tensors)
    for file in files:
        with safetensors.safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    index = tmp_path / "model.safetensors.index.json"
    if len(files) == 1:
        assert files[0].name == "model.safetensors"
        assert not index.exists()
    else:
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert set(content["weight_map"]) == set(tensors)


def test_saving_fetches_one_tensor_at_a_time(tmp_path: Path) -> None:
    tensors = _tensors()
    promised = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    asked: list[str] = []

    def fetch(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]

    save_tensors(tmp_path, promised, fetch=fetch, file_name="adapter_model.safetensors")
    _assert_same(_reference(tmp_path), tensors)
    assert sorted(asked) == sorted(tensors)
    with pytest.raises(OutputError, match="promised was"):
        save_tensors(tmp_path, promised, fetch=lambda name: torch.zeros(1))
    with pytest.raises(OutputError, match="complex64"):
        save_tensors(tmp_path, {"a": torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises(OutputError, match="No such file"):
        save_tensors(tmp_path / "nowhere", tensors)


def test_folder_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"

    def fail(kind: type[BaseException]) -> None:
        with write_folder(target) as folder:
            (folder / "half").write_text("x")
            raise kind

    for kind in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(kind):
            fail(kind)
        assert not target.exists()
        assert list(target.parent.iterdir()) == []
    with write_folder(target) as folder:
        assert folder.parent == target.parent
        assert not target.exists()
        (folder / "file").write_text("one")
    assert (target / "file").read_text() == "one"
    assert os.listdir(target.parent) == ["out"]


def test_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with write_folder(target) as folder:  # empty: as if it did not exist
        (folder / "file").write_text("one")
    with pytest.raises(OutputError, match="not empty"), write_folder(target):
        pass
    with pytest.raises(RuntimeError), write_folder(target, overwrite=True):
        raise RuntimeError
    assert (target / "file").read_text() == "one"
    with write_folder(target, overwrite=True) as folder:
        (folder / "other").write_text("two")
    assert os.listdir(target) == ["other"]
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(OutputError, match="is a file"), write_folder(target / "other"):
        pass


def test_failed_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("one")
    rename = os.rename

    def fail_to_publish(source: str, destination: str) -> None:
        if ".tmp-" in str(source):
            raise OSError(28, "No space left on device")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail_to_publish)
    with pytest.raises(OutputError, match="No space left"), write_folder(target, overwrite=True):
        pass
    assert (target / "file").read_text() == "one"
    assert os.listdir(tmp_path) == ["out"]


def test_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_text_atomic(target, "一\n")
    assert target.read_bytes() == "一\n".encode()
    write_text_atomic(target, "\ud800", private=True)  # half a pair cannot be UTF-8
    assert target.read_bytes() == b"\\ud800"
    assert target.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(OutputError):
        write_text_atomic(tmp_path / "nowhere" / "a.json", "x")


@pytest.mark.parametrize(
    "case",
    [
        *("chatglm/model", "chatglm2/model", "chatglm2-32k/model", "chatglm3/model"),
        *("chatglm2/ptuning_emb", "chatglm3/ptuning_proj", "config_switches/chatglm2-base"),
        *("quantization/chatglm2-int4", "quantization/chatglm-int8"),
    ],
)
def test_official_layouts(shared: Path, case: str) -> None:
    path = shared / "conformance" / case
    with open_folder(path) as folder:
        assert folder.config["model_type"] == "chatglm"
        _assert_same(dict(folder.read()), _reference(path))
