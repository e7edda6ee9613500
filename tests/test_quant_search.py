"""Searched scales and GPTQ: never worse than rounding to nearest, near the optimum, and exact where it can be said."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glmkit.chat.messages import Message
from glmkit.chat.templates import conversation_ids
from glmkit.data.calibration import calibration_batches
from glmkit.errors import DataError, UsageError
from glmkit.evaluate.perplexity import perplexity
from glmkit.loading import load
from glmkit.quant import search
from glmkit.quant.gptq import inverse_factor, quantize_gptq, quantize_model_gptq
from glmkit.quant.linear import QuantizedLinear, pack_nibbles
from glmkit.quant.search import codes_of, quantize_groups, quantize_rows, search_scales
from tiny_families import write_chatglm, write_glm


def _weights(seed: int = 0, shape: tuple[int, int] = (64, 128)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator) * 0.02
    heavy = normal / torch.rand(shape, generator=generator).add(0.05)
    lone = normal.clone()
    lone[:, ::32] *= 50
    return {"normal": normal, "heavy": heavy, "lone": lone, "one-sided": normal.abs(), "tiny": normal * 1e-3}


def _read(packed: Tensor, scale: Tensor) -> Tensor:
    """What int4 codes stand for, in float32."""
    codes = torch.stack((packed >> 4, (packed << 4) >> 4), dim=-1).flatten(1).float()
    return (codes.unflatten(1, (-1, 32)) * scale.float()[..., None]).flatten(1)


def _errors(weight: Tensor, packed: Tensor, scale: Tensor, importance: Tensor | None = None) -> Tensor:
    """Weighted squared error of each group, (N, K / 32)."""
    squares = (weight.float() - _read(packed, scale)).double().square()
    return (squares if importance is None else squares * importance).unflatten(1, (-1, 32)).sum(-1)


def _weighted(weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales whose errors count by column."""
    if importance is None:
        return quantize_groups(weight)
    columns = weight.unflatten(1, (-1, 32)).permute(2, 0, 1).contiguous()  # (32, N, K / 32)
    scale = search_scales(columns, importance.float().view(-1, 32).t()[:, None])
    return pack_nibbles(codes_of(columns, scale).to(torch.int8).permute(1, 2, 0).flatten(1)), scale


# Search --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "heavy", "lone", "one-sided", "tiny"])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_group_is_worse_than_rounding_to_nearest(kind: str, weighted: bool) -> None:
    weight = _weights()[kind]
    importance = torch.rand(128, generator=torch.Generator().manual_seed(3)).pow(4) if weighted else None
    nearest = _errors(weight, *quantize_groups(weight, divisors=()), importance)
    found = _errors(weight, *_weighted(weight, importance), importance)
    assert (found <= nearest * (1 + 1e-6)).all()
    assert found.sum() < (0.95 if kind == "lone" else 0.8) * nearest.sum()


def test_rounding_to_nearest_is_what_it_says() -> None:
    weight = _weights()["normal"]
    packed, scale = quantize_groups(weight, divisors=())
    groups = weight.unflatten(1, (-1, 32))
    expected = (groups.abs().amax(-1) / 7).half()
    assert torch.equal(scale, expected)
    codes = (groups / expected.float()[..., None]).round().clamp(-8, 7)
    assert torch.equal(_read(packed, scale), (codes * expected.float()[..., None]).flatten(1))


def _optimum(group: Tensor, importance: Tensor) -> float:
    """Least error of any real scale: codes change where w / s crosses a half, so every interval between is tried."""
    halves = torch.arange(-7.5, 7.0, 1.0, dtype=torch.float64)
    inverse = (halves[None] / group[:, None].double()).flatten().unique()
    points = torch.cat((inverse[:1] - 1, (inverse[1:] + inverse[:-1]) / 2, inverse[-1:] + 1))
    codes = (points[:, None] * group.double()).round().clamp(-8, 7)  # (intervals, 32)
    product, square = (codes * group * importance).sum(1), (codes * codes * importance).sum(1)
    gain = torch.where(square > 0, product * product / square.clamp(min=1e-300), 0.0)
    return float((group.double().square() * importance).sum() - gain.max())


@pytest.mark.parametrize("kind", ["normal", "heavy", "one-sided"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_is_near_the_optimum_of_all_scales(kind: str, weighted: bool) -> None:
    weight = _weights(seed=1, shape=(40, 64))[kind]
    importance = (
        torch.rand(64, generator=torch.Generator().manual_seed(4)).double() + 0.2 if weighted else torch.ones(64)
    )
    found = _errors(weight, *_weighted(weight, importance if weighted else None), importance)
    best = torch.tensor(
        [[_optimum(row[first : first + 32], importance[first : first + 32]) for first in (0, 32)] for row in weight]
    )
    assert (found >= best * (1 - 1e-3)).all()  # else the optimum is none
    assert found.sum() <= 1.01 * best.sum()


def test_the_largest_number_may_be_code_minus_eight() -> None:
    """Numbers on the grid of -8 … 7 come back as they are, whatever the sign: rounding to nearest cannot do that."""
    codes = torch.arange(32).remainder(16) - 8.0
    weight = torch.stack((codes, -codes)) * 2.0**-8
    packed, scale = quantize_groups(weight)
    assert torch.equal(_read(packed, scale), weight)
    assert scale.flatten().tolist() == [2.0**-8, -(2.0**-8)]
    assert _errors(weight, *quantize_groups(weight, divisors=())).min() > 0


def test_a_layer_reads_codes_and_scales_as_the_search_meant_them() -> None:
    weight = _weights()["normal"]
    packed, scale = quantize_groups(weight)
    assert packed.shape == (64, 64)
    assert packed.dtype == torch.int8
    assert scale.shape == (64, 4)
    assert scale.dtype == torch.float16
    assert (scale < 0).any()
    layer = QuantizedLinear(packed, scale, None, 4)
    torch.testing.assert_close(layer.dequantize().float(), _read(packed, scale), rtol=2**-11, atol=0)
    again, scales = quantize_groups(_read(packed, scale))
    torch.testing.assert_close(_read(again, scales), _read(packed, scale), rtol=2**-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_give_what_their_numbers_give_in_float32(dtype: torch.dtype) -> None:
    weight = _weights()["normal"].to(dtype)
    for got, expected in zip(quantize_groups(weight), quantize_groups(weight.float())):
        assert torch.equal(got, expected)


def test_rows_searched_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weights()["heavy"]
    groups, rows = quantize_groups(weight), quantize_rows(weight)
    monkeypatch.setattr(search, "_CHUNK", 1000)
    for got, expected in zip(quantize_rows(weight), rows):
        assert torch.equal(got, expected)
    parts = _errors(weight, *quantize_groups(weight))  # sums in another order may prefer another of two equal scales
    torch.testing.assert_close(parts, _errors(weight, *groups), rtol=2e-3, atol=0)


def test_groups_without_numbers() -> None:
    weight = _weights()["normal"]
    weight[3, 32:64] = 0
    weight[4] = 1e-12  # below anything float16 can scale
    packed, scale = quantize_groups(weight)
    assert scale[3, 1] == 1
    assert (scale[4] == 1).all()
    assert (_read(packed, scale)[4] == 0).all()
    assert (_read(packed, scale)[3, 32:64] == 0).all()
    codes, rows = quantize_rows(weight)
    assert rows[4] == 1
    assert (codes[4] == 0).all()


def test_errors_move_to_where_they_count_less() -> None:
    weight = _weights(shape=(256, 64))["normal"]
    importance = torch.ones(64)
    importance[::4] = 30
    plain, weighted = ((weight - _read(*_weighted(weight, one))).square().mean(0) for one in (None, importance))
    assert weighted[::4].mean() < 0.75 * plain[::4].mean()
    assert weighted.mean() < 1.5 * plain.mean()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_named(bad: float) -> None:
    weight = _weights()["normal"]
    weight[5, 7] = bad
    for quantize in (quantize_groups, quantize_rows):
        with pytest.raises(UsageError, match=f"holds {bad}"):
            quantize(weight)


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(UsageError, match="48 columns"):
        quantize_groups(torch.ones(2, 48))
    with pytest.raises(UsageError, match="beyond float16"):
        quantize_groups(torch.full((1, 32), 1e6))


def test_int8_rows() -> None:
    weight = _weights()["heavy"]
    codes, scale = quantize_rows(weight)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float16
    assert scale.shape == (64,)
    expected = (weight.abs().amax(1) / 127).half()
    assert torch.equal(scale, expected)
    assert torch.equal(codes, (weight / expected.float()[:, None]).round().clamp(-127, 127).to(torch.int8))


# GPTQ ----------------------------------------------------------------------------------------------------------------


def _inputs(columns: int, count: int, seed: int = 5) -> Tensor:
    """Correlated inputs of very different sizes, as a network's are."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, columns // 4, generator=generator) @ torch.randn(
        columns // 4, columns, generator=generator
    )
    sizes = torch.randn(columns, generator=generator).exp()
    return (mixed + torch.randn(count, columns, generator=generator)) * sizes


def _output_error(weight: Tensor, quantised: tuple[Tensor, Tensor], x: Tensor) -> float:
    return float(((weight - _read(*quantised)).double() @ x.double().t()).square().sum())


def test_the_factor_is_that_of_the_inverse() -> None:
    x = _inputs(96, 400).double()
    hessian = x.t() @ x
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(96)
    factor = inverse_factor(hessian.float(), 0.01).double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.t() @ factor @ damped, torch.eye(96, dtype=torch.float64), rtol=0, atol=2e-3)


def test_gptq_keeps_outputs_of_texts_it_has_not_seen() -> None:
    weight = _weights(shape=(96, 256))["normal"]
    seen, unseen = _inputs(256, 4096).split(2048)
    importance = seen.square().mean(0)
    nearest = _output_error(weight, quantize_groups(weight, divisors=()), unseen)
    searched = _output_error(weight, quantize_groups(weight), unseen)
    weighted = _output_error(weight, _weighted(weight, importance), unseen)
    calibrated = _output_error(weight, quantize_gptq(weight, seen.t() @ seen), unseen)
    assert searched < 0.8 * nearest
    assert weighted < searched
    assert calibrated < 0.4 * searched


def test_gptq_without_correlation_is_the_plain_search() -> None:
    for weight in (_weights()["heavy"], _weights(shape=(8, 32))["normal"]):
        columns = weight.shape[1]
        before = weight.clone()
        for got, expected in zip(quantize_gptq(weight, 3.0 * torch.eye(columns)), quantize_groups(weight)):
            assert torch.equal(got, expected)
        assert torch.equal(weight, before)  # the weight itself is left alone


def test_gptq_is_what_the_paper_says_column_by_column() -> None:
    """The textbook form: after each column, the free ones take `-e inverse(H_free)[0, :] / inverse(H_free)[0, 0]`."""
    weight, x = _weights(shape=(4, 64))["normal"], _inputs(64, 300)
    hessian = x.t() @ x
    packed, scale = quantize_gptq(weight, hessian)
    got = _read(packed, scale)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(64)
    w = weight.double()
    for column in range(64):
        step = scale[:, column // 32].double()
        rounded = (w[:, column] / step).round().clamp(-8, 7) * step
        assert (rounded - got[:, column]).abs().max() < 1e-6, column
        inverse = torch.linalg.inv(damped[column:, column:])
        w[:, column:] -= (w[:, column] - rounded)[:, None] * inverse[0] / inverse[0, 0]


def test_gptq_takes_inputs_that_span_little_or_nothing() -> None:
    weight = _weights(shape=(8, 64))["normal"]
    few = _inputs(64, 3)
    plain = quantize_groups(weight)
    assert _output_error(weight, quantize_gptq(weight, few.t() @ few), few) < _output_error(weight, plain, few)
    for got, expected in zip(quantize_gptq(weight, torch.zeros(64, 64)), plain):
        assert torch.equal(got, expected)
    with pytest.raises(UsageError, match="overflows"):
        quantize_gptq(weight, torch.full((64, 64), math.inf))


# Models --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano() -> Any:
    return load("glm-nano", dtype="float32")


def _dialogues(tokenizer: Any, count: int) -> Tensor:
    """Token ids of the packaged sample of copy, as the model was trained on such, (count, 128)."""
    from importlib.resources import files

    from glmkit.data.examples import make_examples
    from glmkit.data.records import read_records

    records = read_records(str(files("glmkit") / "builtin/data/style_train.jsonl"))
    ids = torch.cat([example.input_ids for example in make_examples(tokenizer, records)[0]]).long()
    return ids[: count * 128].view(count, 128)


def _moved(model: Any, base: Any, ids: Tensor) -> float:
    """How far the final states are from those of the unquantised model, relative and squared."""
    with torch.no_grad():
        one, other = (m.transformer(ids, use_cache=False).last_hidden_state for m in (model, base))
    return float((one - other).square().sum() / other.square().sum())


def test_a_calibrated_model_stays_nearer_to_the_original(nano: Any) -> None:
    base, tokenizer = nano
    ids = _dialogues(tokenizer, 40)
    calls: list[tuple[int, int]] = []
    model = copy.deepcopy(base)
    assert quantize_model_gptq(model, ids[:32].split(8), progress=lambda *call: calls.append(call)) is model
    assert calls == [(number, 24) for number in range(1, 25)]
    searched = copy.deepcopy(base)
    kinds = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(kinds) == 24
    for name in kinds:
        linear = searched.get_submodule(name)
        searched.set_submodule(name, QuantizedLinear(*quantize_groups(linear.weight), linear.bias, 4))
    assert _moved(model, base, ids[32:]) < 0.75 * _moved(searched, base, ids[32:])

    again = quantize_model_gptq(copy.deepcopy(base), ids[:32].split(8))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_model_that_reads_both_ways_is_calibrated_too(tmp_path: Path) -> None:
    model, tokenizer = load(write_chatglm(tmp_path / "chatglm"), dtype="float32")
    (tmp_path / "text.txt").write_text("hello world, how are you? I like tea and rice. " * 20)
    batches = calibration_batches(tokenizer, tmp_path / "text.txt", length=64)
    exact = copy.deepcopy(model)
    quantize_model_gptq(model, batches)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 8
    assert 0 < _moved(model, exact, batches[0]) < 0.1


def test_calibration_is_refused_where_it_cannot_be(nano: Any, tmp_path: Path) -> None:
    base, _ = nano
    with pytest.raises(UsageError, match="GLMForConditionalGeneration is quantised without calibration"):
        quantize_model_gptq(load(write_glm(tmp_path / "glm")).model, [])
    with pytest.raises(UsageError, match="int8"):
        quantize_model_gptq(base, [], scheme="int8")
    with pytest.raises(UsageError, match="without text"):
        quantize_model_gptq(base, [])
    with pytest.raises(UsageError, match="without calibration"):
        quantize_model_gptq(nn.Linear(32, 32), [])


# Calibration text ----------------------------------------------------------------------------------------------------


def test_text_is_cut_into_rows_behind_the_ids_that_start_a_text(nano: Any, tmp_path: Path) -> None:
    _, tokenizer = nano
    text = "今天天气很好。The weather is fine today. " * 40
    (tmp_path / "notes.txt").write_text(text, encoding="utf-8")
    batches = calibration_batches(tokenizer, tmp_path / "notes.txt", tokens=10_000, length=50, batch_size=3)
    start = tokenizer.prefix_ids
    rows = [row for batch in batches for row in batch.tolist()]
    assert all(row[: len(start)] == start for row in rows)
    assert [token for row in rows for token in row[len(start) :]] == tokenizer.encode_text(text)
    assert max(map(len, batches)) == 3
    assert {batch.shape[1] for batch in batches[:-1]} == {50}
    few = calibration_batches(tokenizer, tmp_path / "notes.txt", tokens=200, length=50)
    assert sum(batch.numel() for batch in few) <= 200


def test_dialogues_are_whole_and_in_the_chat_format(nano: Any, tmp_path: Path) -> None:
    _, tokenizer = nano
    turns = [("你好", "你好！"), ("1+1", "2"), ("你好", "您好。有什么可以帮您？")]
    lines = [{"conversations": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    rows = [tuple(row) for batch in calibration_batches(tokenizer, path) for row in batch.tolist()]
    expected = {tuple(conversation_ids(tokenizer, (Message("user", q), Message("assistant", a)))[0]) for q, a in turns}
    assert set(rows) == expected
    assert len(calibration_batches(tokenizer, path, tokens=1)) == 1


def test_calibration_files_that_cannot_be_read(nano: Any, tmp_path: Path) -> None:
    _, tokenizer = nano
    with pytest.raises(DataError, match="no file"):
        calibration_batches(tokenizer, tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="empty"):
        calibration_batches(tokenizer, tmp_path / "empty.txt")


# Perplexity ----------------------------------------------------------------------------------------------------------


def test_perplexity_by_hand(nano: Any) -> None:
    model, _ = nano
    text, prefix = torch.randint(300, 6000, (13,), generator=torch.Generator().manual_seed(6)).tolist(), [5, 6]

    def surprise(before: list[int], token: int) -> float:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([before])).logits[0, -1].double()
        return float(logits.logsumexp(0) - logits[token])

    window, stride = 6, 4
    starts = {0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 4, 7: 4, 8: 4, 9: 4, 10: 8, 11: 8, 12: 8}
    wanted = [surprise(prefix + text[starts[place] : place], text[place]) for place in range(13)]
    found = perplexity(model, text, window=window, stride=stride, prefix=prefix)
    assert found.tokens == 13
    assert math.isclose(found.value, math.exp(sum(wanted) / 13), rel_tol=1e-5)

    whole = perplexity(model, text, window=20)  # without a prefix the first token cannot be predicted
    assert whole.tokens == 12
    wanted = [surprise(text[:place], text[place]) for place in range(1, 13)]
    assert math.isclose(whole.value, math.exp(sum(wanted) / 12), rel_tol=1e-5)


def test_perplexity_says_what_it_cannot_measure(nano: Any) -> None:
    model, _ = nano
    with pytest.raises(DataError, match="none to predict"):
        perplexity(model, [5], window=4)
    with pytest.raises(UsageError, match="stride=5"):
        perplexity(model, [5, 6], window=4, stride=5)
    with pytest.raises(UsageError, match="Linear"):
        perplexity(nn.Linear(2, 2), [5, 6], window=4)
