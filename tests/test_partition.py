"""How tensors are divided over ranks, and the model-parallel folders that hold them: all of it bit for bit."""

from __future__ import annotations

import argparse
import json
import logging
import pickle
import random
import re
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from glmkit import load
from glmkit.checkpoint import open_folder
from glmkit.errors import CheckpointError, UsageError
from glmkit.export.model_parallel import quantize_shards, reshard, unshard
from glmkit.models.partition import Partition, Rule, merge, ranges, split
from glmkit.shards import PartFolder, is_model_parallel, open_model_parallel, rank_file

FIXTURES = Path(__file__).parent / "fixtures"


def _rows(count: int, columns: int = 1) -> torch.Tensor:
    """A matrix whose rows say their number."""
    return torch.arange(count)[:, None].expand(count, columns).contiguous()


def _numbers(partition: Partition, name: str, count: int, rank: int, degree: int) -> list[int]:
    return split(_rows(count), partition.rule(name), rank, degree, name)[:, 0].tolist()


# The table -----------------------------------------------------------------------------------------------------------


def test_query_key_value_of_every_family() -> None:
    """Four heads of two channels: where rank 1 of 2 finds its rows."""
    glm, first = Partition("glm", 4), Partition("chatglm", 4)
    name = "transformer.layers.0.attention.query_key_value.weight"
    assert _numbers(glm, name, 24, 1, 2) == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]  # of q, of k, of v
    assert _numbers(first, name, 24, 1, 2) == list(range(12, 24))  # q, k, v of a head are neighbours
    assert _numbers(Partition("glm-130b", 4), name, 24, 1, 2) == list(range(12, 24))
    name = "transformer.encoder.layers.0.self_attention.query_key_value.bias"
    assert _numbers(Partition("chatglm2", 4, 2), name, 16, 1, 2) == [4, 5, 6, 7, 10, 11, 14, 15]
    assert _numbers(Partition("chatglm2", 4, 4), name, 24, 1, 2) == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]


def test_fewer_groups_than_ranks_are_held_in_copies() -> None:
    partition = Partition("chatglm2", 8, 2)
    name = "layers.0.self_attention.query_key_value.weight"  # rows 0-7 q, 8-9 k, 10-11 v
    found = [_numbers(partition, name, 12, rank, 4) for rank in range(4)]
    assert found == [[0, 1, 8, 10], [2, 3, 8, 10], [4, 5, 9, 11], [6, 7, 9, 11]]


def test_gates_are_divided_in_halves() -> None:
    name = "transformer.layers.0.mlp.dense_h_to_4h.weight"
    assert _numbers(Partition("glm-130b", 2), name, 8, 1, 2) == [2, 3, 6, 7]
    assert _numbers(Partition("chatglm2", 2, 2), name, 8, 1, 2) == [2, 3, 6, 7]
    assert _numbers(Partition("glm", 2), name, 8, 1, 2) == [4, 5, 6, 7]
    assert _numbers(Partition("chatglm", 2), name, 8, 1, 2) == [4, 5, 6, 7]


@pytest.mark.parametrize("family", ["glm", "glm-130b", "chatglm", "chatglm2"])
def test_what_is_summed_and_what_is_whole(family: str) -> None:
    partition = Partition(family, 4, 4)
    attention = "self_attention" if family == "chatglm2" else "attention"
    for module in (f"layers.3.{attention}.dense", "layers.3.mlp.dense_4h_to_h"):
        assert partition.rule(f"{module}.weight").dim == 1
        assert partition.rule(f"{module}.bias").dim is None  # added once, after the sum
        assert partition.rule(f"{module}.weight_scale").dim is None
    assert partition.rule(f"layers.3.{attention}.query_key_value.weight_scale").dim == 0
    assert partition.rule("word_embeddings.weight") == Rule(0)
    for name in ("layers.0.input_layernorm.weight", "final_layernorm.bias", "attention.rotary_emb.inv_freq"):
        assert partition.rule(name).dim is None
    assert partition.rule("transformer.block_position_embeddings.weight").dim is None
    with pytest.raises(CheckpointError, match=r"layers\.0\.router\.weight: it is not known"):
        partition.rule("layers.0.router.weight")


def test_families_without_a_table_are_refused() -> None:
    with pytest.raises(UsageError, match="'bert'"):
        Partition("bert", 4)
    with pytest.raises(UsageError, match="depends on its heads"):
        Partition("chatglm2")


RULES = [
    (Rule(0), 24),
    (Rule(1), 24),
    (Rule(0, (1, 1)), 48),
    (Rule(0, (12, 12, 12), True), 72),
    (Rule(0, (12,), True), 36),
    (Rule(1, (12,), True), 24),
    (Rule(0, (12, 4, 4), True), 40),
    (Rule(0, (12, 1, 1), True), 42),
    (Rule(), 7),
]


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize(("rule", "size"), RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_merge_is_the_inverse_of_split(rule: Rule, size: int, degree: int, dtype: torch.dtype) -> None:
    shape = (5, size) if rule.dim == 1 else (size, 5)
    tensor = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(size)).to(dtype)
    if rule.units == (12, 4, 4) and degree in (3, 6):
        with pytest.raises(UsageError, match=f"this tensor cannot be divided over {degree} ranks: 4 heads"):
            split(tensor, rule, 0, degree)
        return
    parts = [split(tensor, rule, rank, degree) for rank in range(degree)]
    assert all(part.is_contiguous() and part.shape == parts[0].shape for part in parts)
    assert torch.equal(merge(parts, rule), tensor)
    if rule.dim == 0:  # a row of the matrix and its scale or bias stay together
        rows = [split(tensor[:, 0].contiguous(), rule, rank, degree) for rank in range(degree)]
        assert all(torch.equal(part[:, 0], row) for part, row in zip(parts, rows))


@pytest.mark.parametrize(
    ("rule", "size", "degree", "text"),
    [
        (Rule(0), 10, 4, "x cannot be divided over 4 ranks: 10 rows or columns"),
        (Rule(0, (1, 1)), 10, 2, "x cannot be divided over 2 ranks: 5 rows or columns"),
        (Rule(0, (1, 1)), 7, 1, "x: 7 rows or columns are no multiple of 2"),
        (Rule(0, (4, 4, 4), True), 96, 8, "4 heads are no multiple of 8"),  # a head is never cut
        (Rule(0, (8, 2, 2), True), 96, 16, "8 heads are no multiple of 16"),  # queries are never copied
        (Rule(0), 8, 0, "rank 0 of 0"),
    ],
)
def test_impossible_divisions_are_refused_with_numbers(rule: Rule, size: int, degree: int, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        ranges(size, rule, 0, degree, "x")


def test_copies_must_agree(caplog: pytest.LogCaptureFixture) -> None:
    norm = torch.ones(4)
    with pytest.raises(CheckpointError, match="tensor n: all ranks must have the same"):
        merge([norm, norm * 2], Rule(), "n")
    with pytest.raises(CheckpointError, match="tensor n: all ranks must have the same"):
        merge([norm, norm * 1.001, norm * 2], Rule(), "n")  # the last one too
    with pytest.raises(CheckpointError, match="tensor q: all ranks must have the same"):
        merge([torch.ones(3, 2), torch.zeros(3, 2)], Rule(0, (2, 1, 1), True), "q")
    with caplog.at_level(logging.WARNING, "glmkit"):  # drifted by rounding: the first, as in the official conversion
        assert torch.equal(merge([norm, norm * 1.001], Rule(), "n"), norm)
    assert "tensor n differs a little" in caplog.text
    with pytest.raises(CheckpointError, match="no parts of one tensor"):
        merge([torch.ones(4), torch.ones(6)], Rule(0), "n")


# Folders -------------------------------------------------------------------------------------------------------------

_SIZES_130B = {"num_attention_heads": 4, "num_layers": 3, "vocab_size": 96, "hidden_size": 32, "inner_hidden_size": 40}
_IDS_130B = {"mask_token_id": 89, "gmask_token_id": 90, "smask_token_id": 91, "bos_token_id": 92, "eos_token_id": 93}
_CONFIG_130B = {"model_type": "glm-130b", "max_sequence_length": 64, "pad_token_id": 88, **_SIZES_130B, **_IDS_130B}


def _write(folder: Path, shards: list[dict[str, torch.Tensor]], name: str = "7", **beside: Any) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / "latest").write_text(name)
    for rank, shard in enumerate(shards):
        torch.save({"module": shard, **beside}, folder / name / rank_file(rank))
    return folder


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """The stored small GLM-130B."""
    return load_file(FIXTURES / "glm130b" / "weights.safetensors")


@pytest.fixture
def one(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    return _write(tmp_path / "one", [weights])


@pytest.fixture
def two(tmp_path: Path, one: Path) -> Path:
    reshard(one, tmp_path / "two", 2)
    return tmp_path / "two"


def _module(folder: Path, rank: int = 0) -> dict[str, Any]:
    [file] = folder.glob(f"*/{rank_file(rank)}")
    return torch.load(file, weights_only=True)


def _same(one: Path, other: Path) -> None:
    """Every rank's tensors, names in order, and what stands beside them."""
    files = sorted(path.relative_to(one) for path in one.rglob("*.pt"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*.pt"))
    for file in files:
        mine, theirs = (torch.load(folder / file, weights_only=True) for folder in (one, other))
        assert {key: value for key, value in mine.items() if key != "module"} == {
            key: value for key, value in theirs.items() if key != "module"
        }
        assert list(mine["module"]) == list(theirs["module"])
        for name, tensor in mine["module"].items():
            assert tensor.dtype == theirs["module"][name].dtype, name
            assert torch.equal(tensor, theirs["module"][name]), name


def test_resharding_there_and_back_changes_no_bit(tmp_path: Path, one: Path, two: Path) -> None:
    reshard(two, tmp_path / "four", 4)
    reshard(tmp_path / "four", tmp_path / "back", 1)
    _same(tmp_path / "back", one)
    assert (tmp_path / "four" / "latest").read_text() == "7"
    assert not (tmp_path / "four" / "latest_checkpointed_iteration.txt").exists()
    assert (one / "7" / rank_file(0)).read_bytes() == (tmp_path / "back" / "7" / rank_file(0)).read_bytes()


def test_a_folder_is_read_as_whole_tensors(two: Path, weights: dict[str, torch.Tensor]) -> None:
    assert is_model_parallel(two)
    assert not is_model_parallel(FIXTURES / "glm130b")
    with open_model_parallel(two) as folder:
        assert (folder.degree, folder.bits, folder.iteration, folder.partition.family) == (2, 0, "7", "glm-130b")
        assert folder.config["model_type"] == "glm-130b"
        assert {name: folder.config[name] for name in _SIZES_130B} == _SIZES_130B  # read off the tensors
        assert folder.nbytes == sum(tensor.nbytes for tensor in weights.values())
        assert {name: info.shape for name, info in folder.tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in weights.items()
        }
        for name, tensor in folder.read():
            assert torch.equal(tensor, weights[name]), name
        with pytest.raises(CheckpointError, match="there is no tensor nothing"):
            list(folder.read(["nothing"]))
    with open_model_parallel(two / "7") as folder:  # one iteration's folder
        assert folder.degree == 2


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_parts_of_any_folder_are_read_alone(
    tmp_path: Path, two: Path, weights: dict[str, torch.Tensor], degree: int
) -> None:
    """What a rank reads of an ordinary folder, and of files for another number of ranks, is what `split` gives."""
    unshard(two, tmp_path / "plain")
    partition = Partition("glm-130b", 4)
    for source in (open_folder(tmp_path / "plain"), open_model_parallel(two)):
        with source as folder:
            for rank in range(degree):
                part = PartFolder(folder, partition, rank, degree)
                for name, tensor in part.read():
                    expected = split(weights[name], partition.rule(name), rank, degree)
                    assert torch.equal(tensor, expected), name
                    assert part.tensors[name].shape == tuple(expected.shape)


def test_columns_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmkit.checkpoint.READ_CHUNK_BYTES", 100)
    tensor = torch.arange(7 * 12, dtype=torch.float32).view(7, 12)
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": tensor, "turned": tensor.t()}, tmp_path / "pytorch_model.bin")
    with open_folder(tmp_path) as folder:
        assert torch.equal(folder.read_part("a", 1, [(2, 4), (9, 12)]), tensor[:, [2, 3, 9, 10, 11]])
        assert torch.equal(folder.read_part("a", 0, [(5, 7), (0, 1)]), tensor[[5, 6, 0]])
        assert torch.equal(folder.read_part("turned", 0, [(1, 3)]), tensor.t()[1:3])
        assert torch.equal(folder.read_part("turned", 1, [(1, 3)]), tensor.t()[:, 1:3])


def test_an_ordinary_folder_and_shards_become_each_other(
    tmp_path: Path, two: Path, weights: dict[str, torch.Tensor]
) -> None:
    (two / "added_tokens.json").write_bytes(b"pieces")
    unshard(two, tmp_path / "plain", config=_CONFIG_130B)
    with open_folder(tmp_path / "plain") as folder:
        read = dict(folder.read())
        assert folder.config["gmask_token_id"] == 90
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith("inv_freq")}
    assert set(read) == set(kept)
    assert all(torch.equal(read[name], tensor) for name, tensor in kept.items())
    assert (tmp_path / "plain" / "added_tokens.json").read_bytes() == b"pieces"
    reshard(tmp_path / "plain", tmp_path / "again", 2)
    shard, expected = _module(tmp_path / "again", 1)["module"], _module(two, 1)["module"]
    assert set(shard) == set(kept)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in shard.items())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["gmask_token_id"] == 90


def test_the_stored_glm_becomes_shards_and_gives_the_same_logits(tmp_path: Path) -> None:
    source = FIXTURES / "glm_base" / "hf_repo"
    reshard(source, tmp_path / "two", 2, iteration="1000")
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        *("1000", "config.json", "latest", "latest_checkpointed_iteration.txt")
    }
    first = _module(tmp_path / "two")
    assert (first["mp_world_size"], first["iteration"]) == (2, 1000)
    assert first["module"]["word_embeddings.weight"].shape == (64, 32)
    ids = torch.tensor([[119, 5, 66, 7, 120]])
    with torch.no_grad():
        one, other = (
            load(folder, device="cpu", dtype="float32").model(input_ids=ids).logits
            for folder in (source, tmp_path / "two")
        )
    assert torch.equal(one, other)
    unshard(tmp_path / "two", tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["gelu"] == "erf"


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_shards_are_made_whole_by_their_numbers(tmp_path: Path, two: Path, bits: int) -> None:
    """Each rank has row scales of its own, so whole weights are what each rank's integers stand for."""
    quantize_shards(two, tmp_path / "quantised", bits)
    name = "transformer.layers.1.mlp.dense_4h_to_h.weight"
    parts = []
    for rank in range(2):
        shard = _module(tmp_path / "quantised", rank)["module"]
        weight, scale = shard[name], shard[f"{name}_scale"]
        assert (weight.dtype, scale.dtype) == (torch.int8, torch.float16)
        original = _module(two, rank)["module"][name]
        largest = 2 ** (bits - 1) - 1
        assert torch.equal(scale, original.abs().amax(1) / largest)
        if bits == 4:
            weight = torch.stack((weight >> 4, (weight << 4) >> 4), dim=-1).flatten(1)
        assert torch.equal(weight, (original / scale[:, None]).round().to(torch.int8))
        parts.append(weight.half() * scale[:, None])
        norm = "transformer.layers.1.input_layernorm.weight"
        assert shard[norm].dtype == torch.float16
    assert not torch.equal(*(_module(tmp_path / "quantised", rank)["module"][f"{name}_scale"] for rank in range(2)))
    with open_model_parallel(tmp_path / "quantised") as folder:
        assert (folder.bits, folder.whole_bits, folder.config["quantization_bit"]) == (bits, 0, 0)
        assert not any(tensor.endswith("_scale") for tensor in folder.tensors)
        [(_, whole)] = folder.read([name])
    assert torch.equal(whole, torch.cat(parts, 1))
    with pytest.raises(UsageError, match="is quantised: the scales of its rows belong"):
        reshard(tmp_path / "quantised", tmp_path / "one_again", 1)
    with pytest.raises(UsageError, match="is quantised"):
        quantize_shards(tmp_path / "quantised", tmp_path / "twice", bits)
    assert not (tmp_path / "one_again").exists()
    reshard(tmp_path / "quantised", tmp_path / "numbers", 1, dequantize=True)
    assert torch.equal(_module(tmp_path / "numbers")["module"][name], whole)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_of_one_rank_stay_quantised(tmp_path: Path, one: Path, bits: int) -> None:
    quantize_shards(one, tmp_path / "quantised", bits)
    with open_model_parallel(tmp_path / "quantised", config=_CONFIG_130B) as folder:
        assert (folder.whole_bits, folder.config["quantization_bit"]) == (bits, bits)
    with open_model_parallel(tmp_path / "quantised", dequantize=True) as folder:
        assert folder.config["quantization_bit"] == 0
        assert folder.tensors["transformer.layers.0.attention.dense.weight"].dtype == torch.float16


# Training files with more in them ------------------------------------------------------------------------------------


def test_what_training_writes_beside_the_weights_is_recognised_and_left_out(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    module = OrderedDict((f"module.{name}", tensor) for name, tensor in weights.items())
    itself: list[Any] = [1]
    itself.append(itself)
    beside = {
        "iteration": 49300,
        "mp_world_size": 1,
        "optimizer": None,
        "lr_scheduler": {"num_iters": 7, "decay": [1.0, "cosine", None, True]},
        "args": argparse.Namespace(lr=1e-4, name="run", nested=argparse.Namespace(a=1)),
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "sparse_tensor_module_names": {"a", "b"},
        "param_shapes": [OrderedDict(a=torch.Size([2, 3]))],
        "ds_config": {"train_batch_size": 4, "fp16": {"enabled": True}},
        "dtype": torch.float16,
        "client": numpy.float64(1.5),
        "itself": itself,
    }
    _write(tmp_path / "trained", [module], **beside)
    with open_model_parallel(tmp_path / "trained") as folder:
        assert all(torch.equal(tensor, weights[name]) for name, tensor in folder.read())  # without `module.`
        plain = ("iteration", "mp_world_size", "optimizer", "lr_scheduler", "ds_config")
        assert {name: folder.training[name] for name in plain} == {name: beside[name] for name in plain}
        assert {"args", "np_rng_state", "torch_rng_state", "sparse_tensor_module_names"} & set(folder.training) == set()
    reshard(tmp_path / "trained", tmp_path / "two", 2)
    second = _module(tmp_path / "two", 1)
    assert (second["iteration"], second["mp_world_size"]) == (49300, 2)
    assert "transformer.final_layernorm.weight" in second["module"]


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pickle.loads, (b"bytes",))


def test_a_file_that_asks_to_run_something_is_refused(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    _write(tmp_path / "hostile", [weights], args=_Runs())
    with pytest.raises(CheckpointError, match=r"asks to run _?pickle\.loads"):
        open_model_parallel(tmp_path / "hostile")
    (tmp_path / "config.json").write_text("{}")  # in a file of weights even the harmless is not expected
    torch.save({"a": torch.ones(2), "args": argparse.Namespace(lr=1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"asks to run argparse\.Namespace"):
        open_folder(tmp_path)


def test_a_file_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("7")
    (tmp_path / "7").mkdir()
    torch.save({"model": {}, "iteration": 7}, tmp_path / "7" / rank_file(0))
    with pytest.raises(CheckpointError, match="has no dictionary 'module' of tensors; found: model, iteration"):
        open_model_parallel(tmp_path)
    torch.save({"module": {"a": torch.ones(1), "nested": {"b": 1}}}, tmp_path / "7" / rank_file(0))
    with pytest.raises(CheckpointError, match="holds a dictionary under nested"):
        open_model_parallel(tmp_path)


# Folders that do not fit together ------------------------------------------------------------------------------------


def test_missing_ranks_are_named(tmp_path: Path, one: Path) -> None:
    reshard(one, tmp_path / "four", 4)
    place = tmp_path / "four" / "7"
    (place / rank_file(1)).unlink()
    (place / rank_file(2)).unlink()
    with pytest.raises(CheckpointError) as caught:
        open_model_parallel(tmp_path / "four")
    assert caught.value.problems == [f"{rank_file(rank)} is missing" for rank in (1, 2)]
    (place / rank_file(1)).write_bytes((place / rank_file(0)).read_bytes())
    (place / rank_file(3)).unlink()
    with pytest.raises(CheckpointError, match=r"has 48 of 96 rows: 2 ranks' files were found, of 4"):
        open_model_parallel(tmp_path / "four")


def test_the_number_of_ranks_that_the_files_say_is_checked(tmp_path: Path) -> None:
    reshard(FIXTURES / "glm_base" / "hf_repo", tmp_path / "two", 2)
    (tmp_path / "two" / "1" / rank_file(1)).unlink()
    with pytest.raises(CheckpointError, match="the files say that there are 2 ranks, found 1"):
        open_model_parallel(tmp_path / "two")


@pytest.mark.parametrize("shape", [(), (0,), (5,), (0, 5), (5, 0), (2, 2, 2)])
def test_matrices_that_are_none_are_refused_by_name(
    tmp_path: Path, weights: dict[str, torch.Tensor], shape: tuple[int, ...]
) -> None:
    for name in weights:
        if name.endswith(("query_key_value.weight", "word_embeddings.weight", "mlp.dense_4h_to_h.weight")):
            shards = [{**weights, name: torch.zeros(shape)}] * 2
            with pytest.raises(CheckpointError, match=rf"tensor {name} has the shape {re.escape(str(list(shape)))}"):
                open_model_parallel(_write(tmp_path / name, shards), config=_CONFIG_130B)


def test_hostile_words_beside_the_weights_are_refused(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    name = "transformer.layers.0.attention.query_key_value.weight"
    scales = {key: tensor for key, tensor in weights.items() if key != name} | {f"{name}_scale": torch.ones(96)}
    with pytest.raises(CheckpointError, match="has no weight that it could scale"):
        open_model_parallel(_write(tmp_path / "scale", [scales]))
    for number, fields in enumerate(({"num_attention_heads": [4]}, {"model_type": ["glm-130b"]}, {"model_type": "x"})):
        folder = _write(tmp_path / str(number), [weights], mp_world_size=[1])
        (folder / "config.json").write_text(json.dumps(_CONFIG_130B | fields))
        with pytest.raises((CheckpointError, UsageError), match=r"number of heads is|how its tensors are divided"):
            open_model_parallel(folder)
    with open_model_parallel(_write(tmp_path / "good", [weights], mp_world_size=[1]), config=_CONFIG_130B) as opened:
        assert opened.degree == 1


def test_given_fields_complete_the_config_of_the_folder(one: Path) -> None:
    (one / "config.json").write_text(json.dumps({"model_type": "glm-130b", "max_sequence_length": 33}))
    with open_model_parallel(one, config={"num_attention_heads": 4}) as folder:
        assert (folder.config["max_sequence_length"], folder.config["num_layers"]) == (33, 3)


def test_all_differences_between_ranks_are_listed(tmp_path: Path, two: Path) -> None:
    shards = [_module(two, rank)["module"] for rank in range(2)]
    del shards[1]["transformer.layers.0.attention.dense.bias"]
    shards[1]["extra"] = torch.ones(1)
    shards[1]["transformer.layers.1.attention.dense.weight"] = torch.ones(32, 8, dtype=torch.float16)
    shards[1]["transformer.final_layernorm.weight"] = torch.ones(32)
    _write(tmp_path / "mixed", shards)
    with pytest.raises(CheckpointError) as caught:
        open_model_parallel(tmp_path / "mixed")
    dense, norm = "transformer.layers.1.attention.dense.weight", "transformer.final_layernorm.weight"
    assert sorted(caught.value.problems) == sorted(
        [
            "rank 1 has no tensor transformer.layers.0.attention.dense.bias",
            "rank 0 has no tensor extra",
            f"tensor {dense} is torch.float16 [32, 16] at rank 0, but torch.float16 [32, 8] at rank 1",
            f"tensor {norm} is torch.float16 [32] at rank 0, but torch.float32 [32] at rank 1",
        ]
    )


@pytest.mark.parametrize(
    ("latest", "other", "text"),
    [
        ("8", None, "latest name the iteration 8, but there is no such folder"),
        ("../7", None, "which is not a plain file name inside the folder"),
        ("7", "8", "name different iterations: 7, 8"),
        ("", None, "which is not a plain file name"),
    ],
)
def test_trackers_that_lead_nowhere_are_refused(one: Path, latest: str, other: str | None, text: str) -> None:
    (one / "latest").write_text(latest)
    if other is not None:
        (one / "latest_checkpointed_iteration.txt").write_text(other)
    with pytest.raises(CheckpointError, match=text):
        open_model_parallel(one)


def test_an_iteration_outside_the_folder_is_refused(tmp_path: Path, one: Path) -> None:
    (one / "7").rename(tmp_path / "7")
    (one / "7").symlink_to(tmp_path / "7")
    with pytest.raises(CheckpointError, match="the iteration 7 is a link out of the folder"):
        open_model_parallel(one)
    (one / "7").unlink()
    (tmp_path / "7").rename(one / "8")
    (one / "7").symlink_to("8")  # inside the folder
    (tmp_path / "named").symlink_to(one)
    with open_model_parallel(tmp_path / "named") as folder:
        assert (folder.iteration, folder.degree) == ("7", 1)


def test_more_ranks_than_files_can_be_open_are_refused(one: Path) -> None:
    (one / "7" / rank_file(256)).touch()
    with pytest.raises(CheckpointError, match=r"mp_rank_256_model_states\.pt: at most 256 ranks expected"):
        open_model_parallel(one)


def test_a_config_that_promises_quantised_weights_is_not_believed(one: Path, caplog: pytest.LogCaptureFixture) -> None:
    (one / "config.json").write_text(json.dumps(_CONFIG_130B | {"quantization_bit": 4}))
    with open_model_parallel(one) as folder:
        assert (folder.bits, folder.config["quantization_bit"]) == (0, 0)
    assert "says quantization_bit=4, but the weights are not quantised" in caplog.text


def test_glm_of_unknown_sizes_needs_its_heads(tmp_path: Path) -> None:
    """The tensors of GLM do not show the heads; dividing asks for them no more than the official script does."""
    source = FIXTURES / "glm_base" / "hf_repo"
    reshard(source, tmp_path / "two", 2)
    (tmp_path / "two" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="the number of attention heads is not in the tensors"):
        open_model_parallel(tmp_path / "two")
    config = json.loads((source / "config.json").read_text())
    with open_model_parallel(tmp_path / "two", config=config) as folder:
        assert folder.partition.heads == 4
        assert folder.config["gelu"] == "tanh"  # the files are those of the training code, which computes it so
    reshard(tmp_path / "two", tmp_path / "one", 1)
    with open_folder(source) as folder:
        whole = dict(folder.read())
    merged = _module(tmp_path / "one")["module"]
    assert all(torch.equal(tensor, whole[name]) for name, tensor in merged.items())


@pytest.mark.parametrize("degree", [0, True, 3])
def test_nothing_is_written_if_it_cannot_be_divided(tmp_path: Path, one: Path, degree: Any) -> None:
    with pytest.raises(UsageError):
        reshard(one, tmp_path / "never", degree)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


# The official conversions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), [(1, 2), (2, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("kind", ["glm_base/megatron_mp", "glm130b/sat_mp"])
def test_resharding_is_what_the_official_scripts_do(
    shared: Path, tmp_path: Path, kind: str, source: int, target: int
) -> None:
    reshard(shared / f"conformance/{kind}{source}", tmp_path / "made", target)
    _same(tmp_path / "made", shared / f"conformance/{kind}{target}")


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_is_what_the_official_script_does(shared: Path, tmp_path: Path, degree: int, bits: int) -> None:
    quantize_shards(shared / f"conformance/glm130b/sat_mp{degree}", tmp_path / "made", bits)
    _same(tmp_path / "made", shared / f"conformance/glm130b/sat_mp{degree}_int{bits}")


@pytest.mark.parametrize("name", ["sat_mp1", "sat_mp2", *(f"sat_mp{d}_int{b}" for d in (1, 2) for b in (8, 4))])
def test_official_shards_load_and_give_the_official_logits(shared: Path, tmp_path: Path, name: str) -> None:
    official = shared / "conformance/glm130b"
    shutil.copytree(official / name, tmp_path / name, copy_function=shutil.copyfile)
    (tmp_path / name / "config.json").write_text(json.dumps(_CONFIG_130B))
    inputs = load_file(official / "logits_gMASK.safetensors")
    degree, _, bits = name.removeprefix("sat_mp").partition("_")
    expected = load_file(official / (f"logits_{bits}_mp{degree}.safetensors" if bits else "logits_gMASK.safetensors"))
    model = load(tmp_path / name, device="cpu", dtype="float32").model
    with torch.no_grad():
        logits = model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            attention_mask=inputs["attention_mask_true_is_blocked"],
        ).logits
    torch.testing.assert_close(logits, expected["logits"], atol=3e-4, rtol=0)  # the fixture's own tolerance
