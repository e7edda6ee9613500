"""Sampling rules: against stored results of the official code, against transformers, and their own promises."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from glmkit.engine import sampling
from glmkit.engine.sampling import SamplingOptions, sample, warp
from glmkit.errors import GenerationError, UsageError

INF = math.inf


def random_logits(rows=3, vocabulary=500, seed=0, scale=3.0):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def draws(logits, options, count):
    return sample(logits.expand(count, -1), options, [random.Random(0)] * count, [[]] * count).token_ids


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", INF),
        ("temperature", "0.8"),
        ("temperature", True),
        ("temperature", None),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", "50"),
        ("top_p", 1.01),
        ("top_p", -0.1),
        ("top_p", math.nan),
        ("top_p", "0.8"),
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", INF),
        ("repetition_penalty", "1.1"),
        ("seed", -1),
        ("seed", 1.5),
        ("seed", "7"),
        ("banned_ids", "abc"),
        ("banned_ids", (5,)),
        ("banned_ids", ((),)),
        ("banned_ids", ((-1,),)),
        ("banned_ids", (("a",),)),
        ("logit_bias", [(1, 2.0)]),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {5: -INF}),
    ],
)
def test_options_refuse_what_is_out_of_range(field, value):
    with pytest.raises(UsageError) as caught:
        SamplingOptions(**{field: value})
    assert field in str(caught.value)
    assert "expected" in str(caught.value)


def test_options_are_values_and_accept_numpy_numbers():
    words = [[1, 2], [3]]
    bias = {np.int64(5): np.float32(0.5)}
    options = SamplingOptions(temperature=np.float32(0.5), top_k=np.int64(3), banned_ids=words, logit_bias=bias)
    words[0].append(9)
    bias[7] = 1.0
    assert options.banned_ids == ((1, 2), (3,))
    assert options.logit_bias == {5: 0.5}
    assert options == SamplingOptions(temperature=0.5, top_k=3, banned_ids=((1, 2), (3,)), logit_bias={5: 0.5})
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.top_k = 4


def test_do_sample_follows_from_temperature():
    assert SamplingOptions().do_sample
    assert not SamplingOptions(temperature=0).do_sample
    assert not SamplingOptions(temperature=1e-6).do_sample


def test_ids_beyond_the_vocabulary_are_named():
    SamplingOptions(banned_ids=((9,),), logit_bias={9: 1.0}).check_vocabulary(10)
    with pytest.raises(UsageError, match="banned_ids=10"):
        SamplingOptions(banned_ids=((3, 10),)).check_vocabulary(10)
    with pytest.raises(UsageError, match="logit_bias=12"):
        SamplingOptions(logit_bias={12: 1.0}).check_vocabulary(10)


# --- against the official results ------------------------------------------------------------------------------------


def test_scores_and_probabilities_equal_the_official_ones(shared):
    folder = shared / "conformance" / "sampling"
    arrays = np.load(folder / "arrays.npz")
    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    checked = 0
    for name, case in cases.items():
        if not isinstance(case, dict):
            continue
        options = SamplingOptions(temperature=case["temperature"], top_k=case["top_k"], top_p=case["top_p"])
        scores = warp(torch.from_numpy(arrays[f"{name}.logits"]), options)
        expected = torch.from_numpy(arrays[f"{name}.scores"])
        assert torch.equal(scores > -INF, expected > -INF), name
        assert (scores > -INF).sum(-1).tolist() == case["kept"]
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(scores.softmax(-1), torch.from_numpy(arrays[f"{name}.probs"]), rtol=1e-5, atol=1e-7)
        checked += 1
    assert checked == 6


def test_repetition_penalty_equals_the_official_one(shared):
    arrays = np.load(shared / "conformance" / "sampling" / "arrays.npz")
    name = "repetition_penalty_1.3"
    scores = sampling.penalise_repetition(
        torch.from_numpy(arrays[f"{name}.logits"]), arrays[f"{name}.input_ids"].tolist(), 1.3
    )
    torch.testing.assert_close(scores, torch.from_numpy(arrays[f"{name}.scores"]), rtol=1e-6, atol=0)


# --- against transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_rules_equal_transformers(seed):
    from transformers.generation import logits_process as theirs

    dice = random.Random(seed)
    vocabulary = dice.choice([7, 300, 2000])
    logits = random_logits(4, vocabulary, seed, scale=dice.choice([0.3, 3.0, 20.0]))
    if seed % 2:  # ties, as half precision makes them
        logits = logits.bfloat16().float()
    ids = torch.randint(vocabulary, (4, 12), generator=torch.Generator().manual_seed(seed))
    words = [[int(ids[0, -1]), 3], [int(ids[1, -2]), int(ids[1, -1]), 4], [5]]
    bias = {2: 1.5, 6: -2.0}
    values = SamplingOptions(
        temperature=dice.choice([0.1, 0.8, 1.0, 1.7]),
        top_k=dice.choice([0, 1, 5, 50, 5000]),
        top_p=dice.choice([0.0, 0.3, 0.8, 0.95, 1.0]),
        min_p=dice.choice([0.0, 0.05, 0.5, 1.0]),
        repetition_penalty=dice.choice([0.8, 1.0, 1.3]),
        banned_ids=words,
        logit_bias=bias,
    )
    rules = [theirs.RepetitionPenaltyLogitsProcessor(values.repetition_penalty)]
    rules += [theirs.SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])]
    rules += [theirs.NoBadWordsLogitsProcessor(words), theirs.TemperatureLogitsWarper(values.temperature)]
    rules += [theirs.TopKLogitsWarper(values.top_k)] if values.top_k else []
    rules += [theirs.TopPLogitsWarper(values.top_p)] if values.top_p < 1 else []
    rules += [theirs.MinPLogitsWarper(values.min_p)] if values.min_p else []
    expected = logits.clone()
    for rule in rules:
        expected = rule(ids, expected)
    scores = warp(sampling.adjust(logits, values, ids.tolist(), [0] * len(ids)), values)
    if seed % 2 and values.top_p < 1:
        # Which of several equal scores stays at the edge of top-p is up to the sort; their number is not.
        scores, expected = scores.sort(-1).values, expected.sort(-1).values
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_single_rules_equal_transformers():
    from transformers.generation import logits_process as theirs

    logits = random_logits(8, 400)
    tied = logits.mul(2).round()
    assert torch.equal(sampling.keep_top_k(tied, 10), theirs.TopKLogitsWarper(10)(None, tied))
    assert torch.equal(sampling.keep_top_p(logits, 0.7), theirs.TopPLogitsWarper(0.7)(None, logits))
    assert torch.equal(sampling.keep_min_p(logits, 0.1), theirs.MinPLogitsWarper(0.1)(None, logits))


@pytest.mark.parametrize("scale", [0.1, 3.0])  # flat: the first look is too short; peaked: it is enough
def test_top_p_over_a_large_vocabulary(scale):
    from transformers.generation import logits_process as theirs

    logits = random_logits(2, 8000, scale=scale)
    ours, expected = sampling.keep_top_p(logits, 0.9), theirs.TopPLogitsWarper(0.9)(None, logits)
    assert int((ours > -INF).sum()) > 2
    # 8,000 float32 probabilities summed from the other end: one token at the edge may fall on the other side.
    assert int(((ours > -INF) != (expected > -INF)).sum()) <= 2


# --- choosing --------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_largest_and_ignores_filters():
    logits = random_logits()
    chosen = sample(logits, SamplingOptions(temperature=0, top_k=3, top_p=0.1), [], [[]] * 3)
    assert chosen.token_ids == logits.argmax(-1).tolist() == chosen.ids.tolist()
    expected = logits.log_softmax(-1).amax(-1).tolist()
    assert chosen.logprobs == pytest.approx(expected, abs=1e-5)


def test_logprob_is_the_models_own():
    logits = random_logits(1, 50)
    options = SamplingOptions(temperature=0.3, top_k=5, repetition_penalty=1.5, logit_bias={3: 4.0}, seed=1)
    chosen = sample(logits, options, [random.Random(1)], [[7, 8]])
    assert chosen.logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[0, chosen.token_ids[0]]), abs=1e-5)


@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(top_k=4), SamplingOptions(top_p=0.9)])
def test_draws_follow_the_distribution(options):
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, -INF, 0.5]])
    expected = warp(logits, options).softmax(-1)[0]
    counts = collections.Counter(draws(logits, options, 20_000))
    for token, probability in enumerate(expected.tolist()):
        # Four standard deviations of a binomial count.
        assert abs(counts[token] - 20_000 * probability) <= 4 * math.sqrt(20_000 * probability * (1 - probability))
        if probability == 0:
            assert counts[token] == 0


def test_a_number_next_to_one_draws_the_last_token_that_can_be_drawn():
    class Edge:
        def __init__(self, value):
            self.value = value

        def random(self):
            return self.value

    logits = torch.tensor([[0.0, 1.0, 2.0, -INF, -INF]])
    assert sample(logits, SamplingOptions(), [Edge(1 - 2**-53)], [[]]).token_ids == [2]
    assert sample(logits, SamplingOptions(), [Edge(0.0)], [[]]).token_ids == [0]
    logits = torch.tensor([[-INF, 1.0, 2.0]])
    assert sample(logits, SamplingOptions(), [Edge(0.0)], [[]]).token_ids == [1]


def test_a_seed_repeats_and_rows_do_not_depend_on_neighbours():
    logits = random_logits(5, 200, scale=1.0)
    for options in (SamplingOptions(seed=3), SamplingOptions(seed=3, top_k=50, top_p=0.9)):
        together = sample(logits, options, sampling.row_generators(options, 5), [[]] * 5).token_ids
        again = sample(logits, options, sampling.row_generators(options, 5), [[]] * 5).token_ids
        alone = [
            sample(logits[row : row + 1], options, [sampling.row_generators(options, 5)[row]], [[]]).token_ids[0]
            for row in range(5)
        ]
        assert together == again == alone
    same = logits[:1].expand(5, -1)
    rows = sample(same, options, sampling.row_generators(options, 5), [[]] * 5).token_ids
    assert len(set(rows)) > 1, "every row has a random source of its own"


def test_a_draw_does_not_depend_on_how_many_columns_the_neighbours_need():
    """Columns of -inf between the others must not move the border between two tokens by the last place of a sum."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randn(1, 600, generator=generator)
        places = torch.randperm(6144, generator=generator)[:600].sort().values
        wide = torch.full((1, 6144), -math.inf)
        wide[0, places] = scores
        shares = (scores - scores.max()).exp().cumsum(-1)[0]
        numbers = [SimpleNamespace(random=lambda border=float(share): border) for share in shares / shares[-1]]
        narrow = sampling.draw(scores.expand(600, -1), None, numbers)
        assert torch.equal(sampling.draw(wide.expand(600, -1), None, numbers), places[narrow])


def test_without_a_seed_torch_decides():
    def numbers(options):
        return [generator.random() for generator in sampling.row_generators(options, 2)]

    torch.manual_seed(5)
    first = numbers(SamplingOptions())
    other = numbers(SamplingOptions())
    torch.manual_seed(5)
    assert numbers(SamplingOptions()) == first != other
    state = torch.get_rng_state()
    numbers(SamplingOptions(temperature=0))
    assert torch.equal(torch.get_rng_state(), state), "greedy decoding leaves the global generator alone"


def test_banned_words_of_one_and_more_tokens():
    logits = torch.tensor([[0.0, 5.0, 4.0, 3.0]]).expand(3, -1)
    options = SamplingOptions(temperature=0, banned_ids=((1,), (7, 8, 2)))
    assert sample(logits, options, [], [[7, 8], [8], [8, 7]]).token_ids == [3, 2, 2]


def test_bias_can_force_a_token():
    assert sample(torch.zeros(1, 9), SamplingOptions(temperature=0, logit_bias={4: 1.0}), [], [[]]).token_ids == [4]


def test_penalties_count_the_answer_and_not_the_prompt():
    logits = torch.zeros(2, 6)
    options = SamplingOptions(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.25)
    scores = sampling.adjust(logits, options, [[1, 2, 3, 3, 4], [1, 2]], [2, 2])
    assert scores.tolist() == [[0, 0, 0, -1.5, -1.25, 0], [0] * 6]
    favoured = SamplingOptions(temperature=0.0, presence_penalty=-1.0)
    drawn = sample(logits, favoured, [random.Random(0)] * 2, [[1, 5], [2]], answer_tokens=[1, 0])
    assert drawn.token_ids == [5, 0]


def test_a_row_that_may_only_say_some_things():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    allowed = [torch.tensor([False, True, True]), None]
    drawn = sample(logits, SamplingOptions(temperature=0.0), [random.Random(0)] * 2, [[], []], allowed=allowed)
    assert drawn.token_ids == [1, 0]
    assert drawn.logprobs[0] == pytest.approx(float(logits[0].log_softmax(-1)[1]))  # under the model itself
    with pytest.raises(GenerationError, match="no token is left"):
        sample(logits, SamplingOptions(), [random.Random(0)] * 2, [[], []], allowed=[torch.zeros(3).bool(), None])


def test_banning_everything_is_an_error():
    options = SamplingOptions(banned_ids=((0,), (1,)))
    with pytest.raises(GenerationError, match="every one is banned"):
        sample(torch.zeros(1, 2), options, [random.Random(0)], [[]])


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize(
    "options", [SamplingOptions(temperature=0), SamplingOptions(), SamplingOptions(top_k=5, top_p=0.8, min_p=0.1)]
)
def test_logits_that_are_no_numbers_raise_with_row_step_and_reason(bad, options):
    logits = random_logits(3, 40)
    logits[1, 7] = bad
    with pytest.raises(GenerationError, match="row 12 at step 9") as caught:
        sample(logits, options, [random.Random(0)] * 3, [[]] * 3, step=9, rows=[10, 12, 14])
    assert "float16" in str(caught.value)
    assert "1 NaN" in str(caught.value) or "1 infinite" in str(caught.value)
    logits = torch.full((1, 5), -INF)
    with pytest.raises(GenerationError, match="no finite"):
        sample(logits, options, [random.Random(0)], [[]])


def test_minus_infinity_and_half_precision_are_fine():
    logits = torch.tensor([[-INF, 2.0, 1.0]], dtype=torch.float16)
    assert sample(logits, SamplingOptions(temperature=0), [], [[]]).token_ids == [1]
    assert set(draws(logits, SamplingOptions(), 50)) == {1, 2}
