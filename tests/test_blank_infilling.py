"""Blank infilling: sample for sample what the official sampler makes, and the same statistics over thousands."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glmkit.data.blank_infilling import BlankIds, BlankMaker, Sample, collate, reconstruct
from glmkit.data.corpus import Row
from glmkit.data.mixtures import MIXTURES, Mixture

FIXTURES = Path(__file__).parent / "fixtures" / "glm_blank_sampler"
IDS = BlankIds(eos=1000, enc=1002, mask=1003, smask=1008, gmask=1009, sop=1006, eop=1007, dblock=1010)
CONFIGS = {
    "token_only_base_large": MIXTURES["token"],
    "argparse_defaults": MIXTURES["token_document"],
    "multi_10b_512": MIXTURES["10b"],
    "multi_10b_1024": MIXTURES["10b_stage2"],
    "large_chinese_512": MIXTURES["large_chinese"],
}


def ends_sentence(token: int) -> bool:
    return token < 40


def maker(mixture: Mixture, length: int) -> BlankMaker:
    return BlankMaker(IDS, mixture, ends_sentence, length)


def make_row(generator: random.Random, length: int, documents: int = 1) -> Row:
    ids = [IDS.enc, *(generator.randrange(1000) for _ in range(length - 1))]
    if documents == 2:
        middle = generator.randrange(length // 4, 3 * length // 4)
        ids[middle : middle + 2] = [IDS.eos, IDS.enc]
    return Row(ids, [int(token != IDS.enc) for token in ids])


def violations(sample: Sample, mixture: Mixture, row: Row | None = None) -> list[str]:
    """What the specification says of every sample, and this one breaks."""
    found = []
    sep, size = sample.sep, len(sample.input_ids)
    part_a, targets = sample.input_ids[:sep], sample.targets
    lists = (targets, sample.loss_mask, sample.positions, sample.block_positions)
    if any(len(one) != size for one in lists):
        found.append("lists of different lengths")
    if any(sample.loss_mask[:sep]) or targets[:sep] != part_a:
        found.append("part A is learnt, or is not its own target")
    if sample.ends and not all(sample.loss_mask[sep:]):
        found.append("part B is not learnt as a whole")
    if sample.positions[:sep] != list(range(sep)) or any(sample.block_positions[:sep]):
        found.append("positions of part A")
    blank = {"bert": IDS.mask, "sentence": IDS.smask, "gpt": IDS.gmask}[sample.kind]
    blank = blank if mixture.task_mask else IDS.mask
    spans: list[list[int]] = []
    for place in range(sep, size):
        if sample.block_positions[place] == 1:
            spans.append([])
            if sample.input_ids[place] != IDS.sop:
                found.append("a span does not begin with sop")
        spans[-1].append(place)
    blanks = [place for place, token in enumerate(part_a) if token == blank]
    if sorted(sample.positions[span[0]] for span in spans) != blanks:
        found.append("spans and blanks do not belong to each other")
    for span in spans:
        if len({sample.positions[place] for place in span}) != 1:
            found.append("first positions change inside a span")
        if [sample.block_positions[place] for place in span] != list(range(1, len(span) + 1)):
            found.append("second positions of a span")
        inputs = [sample.input_ids[place] for place in span[1:]]
        learnt = [targets[place] for place in span[:-1]]
        noise = sum(one == IDS.dblock for one in inputs) if mixture.block_mask_prob and sample.kind == "bert" else 0
        if sum(one != other for one, other in zip(inputs, learnt)) != noise:
            found.append("a span's inputs are not its targets")
        if (targets[span[-1]] == IDS.eop) != sample.ends:
            found.append("a span ends wrongly")
    if sample.kind == "bert" and any(second - first < 2 for first, second in itertools.pairwise(blanks)):
        found.append("two short spans touch")
    if row is not None and reconstruct(sample) != row.ids:
        found.append("it does not reconstruct")
    return found


def read_dumps(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "dumps.json").read_text())


def check_dump(dump: dict[str, Any]) -> None:
    rows = [Row(one["text"], one["loss_mask"]) for one in dump["input"]]
    mixture = CONFIGS[dump["config"]]
    generators = random.Random(dump["rng_seed"]), random.Random(dump["global_random_seed"])
    samples = maker(mixture, max(len(row.ids) for row in rows)).make(rows, *generators)
    size = max(len(sample.input_ids) for sample in samples)

    def padded(values: list[int]) -> list[int]:
        return values + [0] * (size - len(values))

    ours = {
        "text": [padded(one.input_ids) for one in samples],
        "target": [padded(one.targets) for one in samples],
        "loss_mask": [padded(one.loss_mask) for one in samples],
        "position_id": [[padded(one.positions), padded(one.block_positions)] for one in samples],
        "attention_mask": [one.sep for one in samples],
        "mode": samples[0].kind,
    }
    assert ours == dump["output"]
    batch = collate(samples)
    expected = dump["output"]
    assert batch["input_ids"].tolist() == expected["text"]
    assert batch["position_ids"].tolist() == expected["position_id"]
    assert batch["attention_mask"].tolist() == expected["attention_mask"]
    labels = torch.tensor(expected["target"]).masked_fill(torch.tensor(expected["loss_mask"]) == 0, -100)
    assert torch.equal(batch["labels"], labels)


def theirs(dump: dict[str, Any]) -> list[Sample]:
    """The samples of a dump without their padding."""
    output, found = dump["output"], []
    for number, ids in enumerate(output["text"]):
        first, second = output["position_id"][number]
        size = len(ids)
        while second[size - 1] == 0:
            size -= 1
        lists = [
            values[:size] for values in (ids, output["target"][number], output["loss_mask"][number], first, second)
        ]
        ends = lists[1][-1] == IDS.eop
        found.append(Sample(*lists, sep=output["attention_mask"][number], kind=output["mode"], ends=ends))
    return found


def test_samples_of_the_official_sampler_are_computed_again() -> None:
    dumps = read_dumps(FIXTURES)
    for dump in dumps:
        check_dump(dump)
    assert {dump["output"]["mode"] for dump in dumps} == {"bert", "sentence", "gpt"}


def test_all_samples_of_the_official_sampler_are_computed_again(shared: Path) -> None:
    for dump in read_dumps(shared / "conformance" / "glm_blank_sampler"):
        check_dump(dump)


def test_the_official_samples_keep_the_rules_and_reconstruct() -> None:
    for dump in read_dumps(FIXTURES):
        samples = theirs(dump)
        for number, sample in enumerate(samples):
            assert violations(sample, CONFIGS[dump["config"]]) == []
            if len(samples) == len(dump["input"]):
                whole = dump["input"][number]["text"]
                ids = reconstruct(sample)
                # The row itself, or one piece of it behind ENC.
                assert ids == whole or any(whole[at : at + len(ids) - 1] == ids[1:] for at in range(len(whole)))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_sample_keeps_the_rules_and_reconstructs(name: str) -> None:
    mixture = replace(CONFIGS[name], short_seq_prob=0.0)
    generator = random.Random(11)
    seen: Counter[str] = Counter()
    for number in range(300):
        rows = [make_row(generator, generator.randrange(24, 200), 1 + (number % 3 == 0)) for _ in range(3)]
        samples = maker(mixture, 256).make(rows, random.Random(number))
        by_where = {tuple(reconstruct(sample)): sample for sample in samples}
        for row in rows:
            if tuple(row.ids) in by_where:
                sample = by_where.pop(tuple(row.ids))
                assert violations(sample, mixture, row) == []
                seen[sample.kind] += 1
        assert not by_where  # nothing came that was not asked for
    kinds = {"bert"} | ({"sentence"} if mixture.gap_sentence_prob else set())
    kinds |= {"gpt"} if mixture.bert_prob + mixture.gap_sentence_prob < 0.99 else set()
    assert set(seen) == kinds
    assert sum(seen.values()) > 850  # few rows are dropped


def test_short_pieces_are_pieces() -> None:
    mixture = replace(MIXTURES["10b"], short_seq_prob=1.0)
    generator = random.Random(3)
    for number in range(100):
        row = make_row(generator, 256)
        samples = maker(mixture, 256).make([row], random.Random(number))
        assert len(samples) >= 1
        for sample in samples:
            ids = reconstruct(sample)
            assert ids[0] == IDS.enc
            assert any(row.ids[at : at + len(ids) - 1] == ids[1:] for at in range(1, 256))
            assert violations(sample, mixture) == []


# --- statistics ---


def draw(name: str, calls: int) -> tuple[list[tuple[Row, Sample]], Counter[str]]:
    """Rows of the fixture's kind: every fourth one has two documents."""
    mixture = CONFIGS[name]
    length = 1024 if name == "multi_10b_1024" else 512
    generator, made, modes = random.Random(17), [], Counter()
    one = maker(mixture, length)
    for number in range(calls):
        row = make_row(generator, length, 1 + (number % 4 == 0))
        samples = one.make([row], random.Random(number), random.Random(-1 - number))
        modes.update(samples[0].kind for _ in samples[:1])
        made += [(row, sample) for sample in samples]
    return made, modes


def agrees(values: list[float], expected: dict[str, Any]) -> bool:
    """Whether a mean is within four standard errors of that of the fixture."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    error = math.sqrt(variance / len(values) + expected["std"] ** 2 / expected["n"])
    return abs(mean - expected["mean"]) <= 4 * error + 1e-9


def span_lengths(sample: Sample) -> list[int]:
    starts = [place for place in range(sample.sep, len(sample.targets)) if sample.block_positions[place] == 1]
    return [end - start - 1 for start, end in zip(starts, [*starts[1:], len(sample.targets)])]


@pytest.mark.parametrize("name", CONFIGS)
def test_statistics_are_those_of_the_official_sampler(name: str) -> None:
    stats = json.loads((FIXTURES / "stats.json").read_text())[name]
    made, modes = draw(name, 2000)
    for kind, share in stats["share_of_modes"].items():
        error = math.sqrt(max(share * (1 - share), 1e-4) * 2 / 2000)
        assert abs(modes[kind] / sum(modes.values()) - share) <= 4 * error, kind
    of_kind = {kind: [sample for _, sample in made if sample.kind == kind] for kind in ("bert", "sentence", "gpt")}

    lengths = Counter(length for sample in of_kind["bert"] for length in span_lengths(sample))
    total = sum(lengths.values())
    law = [math.exp(-3) * 3**length / math.factorial(length) for length in range(1, 40)]
    law = [one / sum(law) for one in law]
    classes = [(lengths[length], total * law[length - 1]) for length in range(1, 9)]
    classes.append((total - sum(seen for seen, _ in classes), total - sum(wanted for _, wanted in classes)))
    chi_square = sum((seen - wanted) ** 2 / wanted for seen, wanted in classes)
    # 1 in 10,000 for 8 degrees of freedom is 31.8. Long spans are cut off a little where they do not fit.
    assert chi_square < 31.8
    assert (
        abs(sum(length * number for length, number in lengths.items()) / total - stats["bert"]["span_length_mean"])
        < 0.05
    )

    masked = [sum(span_lengths(one)) / len(reconstruct(one)) for one in of_kind["bert"]]
    assert agrees(masked, stats["bert"]["masked_fraction_of_row"])
    assert agrees([len(span_lengths(one)) for one in of_kind["bert"]], stats["bert"]["spans_per_row"])
    noise = [token == IDS.dblock for one in of_kind["bert"] for token in one.input_ids[one.sep :] if token != IDS.sop]
    assert abs(sum(noise) / len(noise) - stats["bert"]["dBLOCK_rate_among_B_input_tokens"]) < 0.004
    if of_kind["sentence"]:
        spans = [span_lengths(one) for one in of_kind["sentence"]]
        assert agrees([len(one) for one in spans], stats["sentence"]["spans_per_row"])
        assert agrees([length for one in spans for length in one], stats["sentence"]["span_length"])
    if of_kind["gpt"]:
        long = [len(one.input_ids) - one.sep for one in of_kind["gpt"]]
        assert agrees(long, stats["gpt"]["part_B_input_length"])
        places = stats["gpt"]["mask_place"]
        share = places["mask_last_in_A"] / sum(places.values())
        last = [one.positions[-1] == one.sep - 1 for one in of_kind["gpt"]]
        error = math.sqrt(share * (1 - share) * (1 / len(last) + 1 / sum(places.values())))
        assert abs(sum(last) / len(last) - share) <= 4 * error


def test_the_mixtures_are_those_of_the_official_runs() -> None:
    stats = json.loads((FIXTURES / "stats.json").read_text())
    renamed = {"average_block_length": "avg_block_length"}
    for name, mixture in CONFIGS.items():
        told = {renamed.get(key, key): value for key, value in stats[name]["config"].items() if key != "seq"}
        assert mixture == Mixture(**told), name
    assert MIXTURES["10b_chinese_stage2"] == replace(MIXTURES["10b_stage2"], bert_prob=0.5, single_span_prob=0.0)
    assert MIXTURES["token_roberta"] == replace(MIXTURES["token"], task_mask=True)
    assert MIXTURES["2b"] == MIXTURES["large_chinese"]


# --- single rules ---


def test_a_row_whose_spans_do_not_fit_is_dropped() -> None:
    row = Row([IDS.enc, 1, 2, 3, 4], [0, 1, 1, 1, 1])
    crowded = replace(MIXTURES["token"], bert_ratio=0.9)
    assert maker(crowded, 64).make([row], random.Random(0)) == []


def test_tokens_near_blanks_are_replaced_in_part_a_only() -> None:
    mixture = replace(MIXTURES["token"], context_mask_ratio=0.05)
    row = make_row(random.Random(4), 200)
    (sample,) = maker(mixture, 200).make([row], random.Random(5))
    changed = [place for place, token in enumerate(sample.input_ids) if token == IDS.dblock]
    assert len(changed) == 10
    blanks = set(sample.positions[sample.sep :])
    assert all(place < sample.sep and min(abs(place - blank) for blank in blanks) <= 3 for place in changed)
    assert reconstruct(sample) == row.ids


def test_left_to_right_rows_keep_their_loss_mask() -> None:
    row = make_row(random.Random(4), 100, documents=2)
    one = maker(Mixture(bert_prob=0.0, gpt_min_ratio=0.9), 100)
    (sample,) = one.make([row], random.Random(1))
    second_enc = row.ids.index(IDS.enc, 1)
    place = sample.sep + second_enc - (sample.sep - 1)
    assert sample.targets[place] == IDS.enc
    assert sample.loss_mask[place] == 0
    assert sum(sample.loss_mask) == len(row.ids) - (sample.sep - 1) - 1
    assert not sample.ends
