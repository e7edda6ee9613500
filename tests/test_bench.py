"""`glm bench`: what it counts is what is there, its baseline computes what the model computes, its filter filters."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from glmkit import cli
from glmkit.bench import machine, measure
from glmkit.bench.machine import Limits
from glmkit.bench.measure import Load, Repetition, Timing, interleaved, load_now, paired_ratio, share_of_others
from glmkit.bench.models import first_block, preset, random_model
from glmkit.bench.official import OfficialWay
from glmkit.bench.report import Row, table, whole_seconds
from glmkit.bench.run import Request, bench
from glmkit.bench.subjects import Generate, Official, Ours, random_cache, random_prompts
from glmkit.bench.work import cache_bytes, prompt_operations, step_operations, weight_bytes
from glmkit.engine.decode import stream
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import UsageError

TICK = os.sysconf("SC_CLK_TCK")
SMALL_FIRST = {"hidden_size": 64, "num_attention_heads": 4, "inner_hidden_size": 128}


@pytest.fixture(scope="module")
def small_limits() -> Limits:
    """Small matrices and buffers: what the machine can do does not matter here."""
    return machine.limits(matrices=(64,), buffer_bytes=2**20)


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch: pytest.MonkeyPatch, small_limits: Limits) -> None:
    monkeypatch.setattr(machine, "limits", lambda: small_limits)


def test_limits_name_the_way_they_were_reached(small_limits: Limits) -> None:
    assert min(small_limits.read_bytes, small_limits.bfloat16_ops, small_limits.int8_ops) > 0
    assert set(small_limits.how) == {"read", "bfloat16", "int8"}
    assert "64^3" in small_limits.how["bfloat16"]


def test_the_best_way_counts_and_missing_ones_do_not() -> None:
    def missing() -> float:
        raise RuntimeError("not in this build")

    name, speed = machine.best({"missing": missing, "few": lambda: 1.0, "many": lambda: 1e12})
    assert name == "many"
    assert speed > 1e12  # in less than a second
    assert machine.best({"missing": missing}) == ("", 0.0)


def test_the_native_loops_work_through_everything() -> None:
    library = machine.library()
    if library is None:
        pytest.skip("no native code here")
    buffer = torch.full((1000 * 1024,), 3, dtype=torch.uint8)
    words = buffer.numel() // 256 * 256 // 8
    for threads in (1, 2):
        found = machine.read_once(library, buffer, threads)
        assert found == words * 0x0303030303030303 % 2**64
    assert machine.multiply_once(library, 100, 2) == 2 * machine.multiply_once(library, 100, 1) > 100


def config_of(generation: int):
    if generation == 1:
        config = preset("chatglm-6b", 3)
        for name, value in SMALL_FIRST.items():
            setattr(config, name, value)
        return config
    return preset("glm-nano", 3)


# --- figures ---


def test_bytes_and_operations_are_those_of_the_tensors() -> None:
    config = preset("glm-nano", 2)
    C, F, V = config.hidden_size, config.ffn_hidden_size, config.padded_vocab_size
    Q, K = config.num_attention_heads * config.kv_channels, config.multi_query_group_num * config.kv_channels
    matrices = (Q + 2 * K) * C + C * Q + 2 * F * C + C * F
    rows = Q + 2 * K + C + 2 * F + C
    others = 2 * (2 * C + Q + 2 * K) + C  # norms and biases of two blocks, the last norm
    assert weight_bytes(random_model(config, "bf16")) == 2 * (2 * matrices + V * C + others)
    assert weight_bytes(random_model(config, "float32")) == 4 * (2 * matrices + V * C + others)
    kept = 2 * (V * C + others)
    int8 = random_model(config, "int8", packed=False)
    assert weight_bytes(int8) == 2 * matrices + 2 * (2 * rows) + kept
    int4 = random_model(config, "int4", packed=False)
    assert weight_bytes(int4) == matrices + 2 * (2 * matrices // 32) + kept
    head8 = random_model(config, "int8", output_layer="int8", packed=False)
    assert weight_bytes(head8) == 2 * (matrices + 2 * rows) + V * C + 2 * V + 2 * others
    assert step_operations(int4, 3, 0) == 3 * 2 * (2 * matrices + V * C)
    attention = 4 * 2 * Q  # one query with one key and value, two blocks
    assert step_operations(int4, 3, 10) - step_operations(int4, 3, 0) == 3 * attention * 10
    assert prompt_operations(int4, 5) == 5 * 2 * 2 * matrices + 2 * V * C + attention * 15
    cache = random_cache(int8, 2, 7, 1)
    held = sum(layer.keys[:, :, :7].numel() + layer.values[:, :, :7].numel() for layer in cache.layers)
    assert cache_bytes(config, 2, 7, 2) == 2 * held


def test_packing_changes_no_bytes_but_those_of_row_scales() -> None:
    config = preset("glm-nano", 1)
    assert weight_bytes(random_model(config, "int4")) == weight_bytes(random_model(config, "int4", packed=False))


def test_the_tied_table_of_the_first_generation_is_counted_once() -> None:
    model = random_model(config_of(1), "bf16")
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert weight_bytes(model) == 2 * sum(one.numel() for one in model.parameters())


def test_whole_model_from_slices() -> None:
    outside, block = 0.5, 0.25
    assert whole_seconds(outside + 4 * block, outside + block, 4, 28) == pytest.approx(outside + 28 * block)
    assert whole_seconds(1.0, 0.25, 4, 28) == pytest.approx(7.0)  # nothing outside
    assert whole_seconds(1.0, 0.2, 4, 28) == pytest.approx(7.0)  # noise must not make what is outside negative
    assert whole_seconds(1.0, 1.2, 4, 28) == pytest.approx(1.0)  # nor the blocks


def test_first_block_shares_tensors() -> None:
    model = random_model(preset("glm-nano"), "float32")
    one = first_block(model)
    assert len(one.transformer.encoder.layers) == 1
    for name, tensor in one.named_parameters():
        assert tensor is model.get_parameter(name)
    ids = random_prompts(model, 1, 6)
    with torch.inference_mode():
        states = model.transformer(ids, output_hidden_states=True).hidden_states
        wanted = model.logits(model.transformer.encoder.final_layernorm(states[1]))
        assert (one(ids).logits - wanted).abs().max() < 1e-5


# --- the official way ---


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("scheme", ["float32", "official-int8", "official-int4"])
def test_official_way_computes_what_the_model_computes(generation: int, scheme: str) -> None:
    model = random_model(config_of(generation), scheme, packed=False).float()
    way = OfficialWay(model)
    ids = random_prompts(model, 2, 9)
    positions = model.transformer.positions(ids) if way.first_generation else None
    with torch.inference_mode():
        wanted = model(ids).logits
    logits, past = way(ids, None, positions)
    assert logits.shape == wanted.shape
    assert (logits - wanted).abs().max() < 1e-5
    assert past[0][0].shape[:2] == (9, 2)

    prompt = ids[0].tolist()
    greedy = SamplingOptions(temperature=0.0)
    expected = [step.token_id for step in stream(model, prompt, greedy, stop_ids=(), max_new_tokens=6)]
    logits, past = way(ids[:1], None, None if positions is None else positions[:1])
    found = []
    for step in range(6):
        found.append(int(logits[0, -1].argmax()))
        place = torch.tensor([[[len(prompt) - 2], [step + 2]]]) if way.first_generation else None
        logits, past = way(torch.tensor([[found[-1]]]), past, place)
    assert found == expected


def test_official_way_can_leave_out_logits() -> None:
    model = random_model(config_of(2), "float32")
    ids = random_prompts(model, 1, 5)
    whole, _ = OfficialWay(model)(ids, None)
    last, _ = OfficialWay(model, all_logits=False)(ids, None)
    assert last.shape == (1, 1, model.config.vocab_size)
    assert torch.allclose(last, whole[:, -1:], atol=1e-6)


@pytest.mark.parametrize("generation", [1, 2])
def test_our_subject_continues_from_a_random_context(generation: int) -> None:
    """Decoding behind a filled cache gives the tokens that the model itself gives behind these keys and values."""
    model = random_model(config_of(generation), "float32")
    ours = Ours(model, "ours")
    torch.manual_seed(5)
    work = ours.decode(2, 12, 3)
    assert work() > 0
    assert work() > 0  # the cache goes back to the context
    for subject in (ours, Official(model, "official"), Generate(model, "generate")):
        assert subject.decode(1, 12, 2)() > 0
        assert subject.prefill(8)() > 0
        assert subject.slice().model.config.num_layers == 1


# --- the filter ---


def stat(*columns: int) -> str:
    return "cpu  " + " ".join(map(str, columns)) + "\ncpu0 1 2 3\n"


def test_load_counts_what_is_busy() -> None:
    # user nice system idle iowait irq softirq steal guest guest_nice
    found = load_now(stat(10, 20, 30, 1000, 500, 4, 5, 6, 7, 8))
    assert found is not None
    assert found.busy == pytest.approx((10 + 20 + 30 + 4 + 5 + 6) / TICK)  # guest time is in user's already


def test_others_are_what_is_left() -> None:
    before = Load(wall=100.0, busy=50.0, own=7.0)
    unsure = 2 * 2 / TICK
    after = Load(wall=110.0, busy=50.0 + 18.0 + 1.0 + unsure, own=7.0 + 18.0)
    assert share_of_others(before, after, 2) == pytest.approx(1.0 / 20)
    alone = Load(wall=110.0, busy=68.0, own=25.0)
    assert share_of_others(before, alone, 2) == 0.0
    assert share_of_others(None, alone, 2) == 0.0


def test_median_of_the_clean_ones() -> None:
    timing = Timing([Repetition(1.0, 0.5), Repetition(3.0), Repetition(5.0, 0.039), Repetition(4.0)])
    assert (timing.clean, timing.seconds, timing.mark) == (3, 4.0, "")
    disturbed = Timing([Repetition(2.0, 0.5), Repetition(1.5, 0.04)])
    assert (disturbed.clean, disturbed.seconds, disturbed.mark) == (0, 1.5, "~")


def test_ratios_are_of_the_same_round() -> None:
    """The machine grows slower by the round; the ratio does not."""
    ours = Timing([Repetition(1.0), Repetition(2.0), Repetition(100.0, 0.9), Repetition(4.0)])
    theirs = Timing([Repetition(2.0), Repetition(4.0), Repetition(8.0), Repetition(8.0)])
    assert paired_ratio(ours, theirs) == (2.0, "")
    assert paired_ratio(Timing([Repetition(1.0, 0.9)]), theirs) == (2.0, "~")


def test_variants_take_turns_until_all_are_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    loads = iter([0.9, 0.0, 0.0, 0.9] + [0.0] * 20)
    monkeypatch.setattr(measure, "share_of_others", lambda *_: next(loads))
    found = interleaved({name: lambda name=name: calls.append(name) for name in "AB"}, 2)
    assert "".join(calls) == "AB" + "AB" * 3  # warmed up once, then rounds until both had two clean ones
    assert [len(timing.repetitions) for timing in found.values()] == [3, 3]
    assert [timing.clean for timing in found.values()] == [2, 2]


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "share_of_others", lambda *_: 0.9)
    found = interleaved({"A": lambda: 1.0}, 2, patience=3)
    assert len(found["A"].repetitions) == 6
    assert found["A"].mark == "~"


def test_a_work_may_say_its_own_seconds() -> None:
    assert interleaved({"A": lambda: 12.5}, 1)["A"].seconds == 12.5


def test_peak_of_memory_sees_what_is_freed_again() -> None:
    with measure.PeakMemory() as peak:
        tensor = torch.ones(2**24)
        tensor += 1
        until = time.monotonic() + 10
        while peak.bytes < 2**25 and time.monotonic() < until:  # a busy machine may not let the sampler run for a while
            time.sleep(0.002)
        del tensor
        kept = torch.ones(2**20)
    if peak.resident == 0:
        pytest.skip("this system does not say")
    assert peak.bytes > 0.5 * 2**26
    assert kept.sum() == 2**20


# --- the whole ---


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "records" / "bench.jsonl"
    code = cli.run(
        ["bench", "glm-nano", "--layers", "2", "--scheme", "bf16,int4", "--batch", "1,2", "--context", "16",
         "--prompt", "16", "--tokens", "2", "--repeats", "1", "--baseline", "bf16", "--json", str(out)]
    )  # fmt: skip
    assert code == 0
    printed = capsys.readouterr().out
    assert "decode, glm-nano int4" in printed
    assert "official way" in printed
    records = [json.loads(line) for line in out.read_text().splitlines()]
    first, rows, memory = records[0], records[1:-1], records[-1]
    assert first["what"] == "machine"
    assert first["limits"]["read_bytes"] > 0
    assert memory["anonymous_bytes"] > 0
    assert len(rows) == 9  # three subjects; batch 1, batch 2, prompt
    for row in rows:
        assert row["schema"] == 1
        per_step = row["batch"] if row["what"] == "decode" else row["context"]
        assert row["tokens_per_second"] == pytest.approx(per_step / row["seconds"])
        assert row["whole_tokens_per_second"] > 0  # a slice of glm-nano's blocks
        assert (row["ratio"] is None) == ("official" in row["subject"])
        if row["what"] == "decode":
            share = row["read_bytes"] / row["seconds"] / first["limits"]["read_bytes"]
            assert row["read_share"] == pytest.approx(share)
    model = random_model(preset("glm-nano", 2), "int4")
    decode = next(row for row in rows if row["subject"] == "glm-nano int4" and row["batch"] == 1)
    assert decode["read_bytes"] == weight_bytes(model) + cache_bytes(model.config, 1, 16 + 1.5, 2)


def test_checkpoint_and_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from glmkit.location import builtin

    out = tmp_path / "bench.jsonl"
    rows = bench(
        Request(
            checkpoint=builtin("glm-nano"), baseline="generate", context=(16,), prompt=(), tokens=2, repeats=1, json=out
        )
    )
    assert [row.subject for row in rows] == ["glm-nano stored", "glm-nano stored, generate"]
    assert rows[0].ratio is not None
    assert rows[0].whole_tokens_per_second is None
    loaded = json.loads(out.read_text().splitlines()[1])
    assert loaded["what"] == "load"
    assert loaded["model_bytes"] > 4e6
    assert "tok/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(presets=("nothing",)), "nothing"),
        (Request(presets=("glm-nano",), layers=99), "--layers 99"),
        (Request(presets=("glm-nano",), schemes=("int3",)), "int3"),
        (Request(presets=("glm-nano",), schemes=("official-int4",), output_layer="int9"), "int9"),
        (Request(presets=("glm-nano",), baseline="llama"), "llama"),
        (Request(presets=("glm-nano",), context=(0,)), "--context 0"),
        (Request(presets=("glm-nano",), repeats=0), "--repeats 0"),
        (Request(checkpoint=Path("nothing")), "nothing"),
        (Request(checkpoint=Path("glm-nano"), schemes=("int3",)), "--scheme int3"),
        (Request(checkpoint=Path("glm-nano"), layers=2), "--layers 2 beside --checkpoint"),
        (Request(checkpoint=Path("glm-nano"), baseline="bf16"), "--baseline bf16 beside --checkpoint"),
        (Request(checkpoint=Path("glm-nano"), output_layer="int8"), "--output-layer int8 beside --checkpoint"),
    ],
)
def test_wrong_settings(request_: Request, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        bench(request_)


def test_table_marks_what_was_disturbed() -> None:
    row = Row("decode", "x", 2, 1, 512, 8, 0.1, "~", 0, 10.0, 10**9, 0.5, 1e9, None, 2.0, "~")
    line = table([row]).splitlines()[-1]
    assert "~10.0" in line
    assert "10.0 |" in line  # GB/s
    assert "50 %" in line
    assert "~2.00" in line
