"""Strategies against what the official ones gave, and against searching by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import glm130b_tiny
from glmkit.engine.beams import BaseStrategy, BeamSearchStrategy, beam_search, generated_length, search
from glmkit.engine.decode import CancelToken
from glmkit.engine.filling import fill
from glmkit.errors import GenerationError, UsageError

# How the stored results were made; the ends of the last two are all words of one residue.
STORED = {
    "greedy_topk1": lambda: BaseStrategy(top_k=1, end_ids=[93, 88]),
    "beam4_lp1_ng3": lambda: BeamSearchStrategy(4, length_penalty=1, no_repeat_ngram_size=3, end_ids=[93, 88]),
    "beam3_lp0.6_min5": lambda: BeamSearchStrategy(
        3, length_penalty=0.6, min_gen_length=5, no_repeat_ngram_size=0, end_ids=range(0, 96, 6)
    ),
    "beam4_ends": lambda: BeamSearchStrategy(4, length_penalty=1, no_repeat_ngram_size=2, end_ids=range(1, 96, 8)),
}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return glm130b_tiny.model()


@pytest.mark.parametrize("strategy", STORED)
@pytest.mark.parametrize("name", ["MASK", "gMASK"])
def test_official_answers(model: torch.nn.Module, name: str, strategy: str) -> None:
    facts = glm130b_tiny.stored()["generation"][name]
    chosen = STORED[strategy]()
    for _ in range(2):  # a strategy is as new after a search
        answers = search(model, facts["prompt_with_sop"], chosen, max_new_tokens=facts["max_gen_length"])
        assert [answer.ids for answer in answers] == facts[strategy][0]


def table(rows: dict[tuple[int, ...], list[float]], vocabulary: int) -> object:
    """Logits by hand: the last tokens of a beam -> its probabilities."""

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        found = [rows.get(tuple(ids), rows[()]) for ids in tokens.tolist()]
        return torch.tensor(found).log()

    return logits


def run(strategy: BeamSearchStrategy, logits: object, steps: int, start: list[int]) -> list[tuple[list[int], float]]:
    tokens = torch.tensor([start])
    for _ in range(steps):
        tokens, _ = strategy.step(logits(tokens), tokens)
        if strategy.is_done:
            break
    return [(answer.ids, answer.score) for answer in strategy.finish(tokens)]


def test_scores_by_hand() -> None:
    """Two words and an end (2); the whole sequence counts, end and prompt too, and an answer is ranked by it."""
    logits = table({(7,): [0.5, 0.3, 0.2], (7, 0): [0.1, 0.1, 0.8], (): [0.25, 0.25, 0.5]}, 3)
    strategy = BeamSearchStrategy(2, length_penalty=2.0, no_repeat_ngram_size=0, end_ids=[2])
    found = run(strategy, logits, 3, [7])
    by_hand = {
        (7, 2): math.log(0.2) / (7 / 6) ** 2,
        (7, 0, 2): math.log(0.4) / (8 / 6) ** 2,
        (7, 1, 2): math.log(0.15) / (8 / 6) ** 2,
    }
    best = sorted(by_hand.items(), key=lambda pair: -pair[1])[:2]
    assert [tuple(ids) for ids, _ in found] == [ids for ids, _ in best]
    for (_, score), (_, wanted) in zip(found, best):
        assert score == pytest.approx(wanted, rel=1e-5)


def test_glm_measures_the_answer_without_its_end() -> None:
    logits = table({(7,): [0.5, 0.3, 0.2], (7, 0): [0.1, 0.1, 0.8], (): [0.25, 0.25, 0.5]}, 3)
    strategy = BeamSearchStrategy(
        1, length_penalty=0.5, no_repeat_ngram_size=0, end_ids=[2], measure=generated_length, ends_by_rank=True
    )
    # The end is third at first, so it does not count; then it is the best.
    assert run(strategy, logits, 3, [7]) == [([7, 0, 2], pytest.approx(math.log(0.4), rel=1e-5))]


def test_a_search_that_loses_nothing_finds_the_best() -> None:
    """Three words and an end, three beams, two steps: no beginning is dropped, so the best is that of trying all."""
    torch.manual_seed(3)
    for _ in range(20):
        weights = torch.randn(4, 4, 4)

        def logits(tokens: torch.Tensor, weights: torch.Tensor = weights) -> torch.Tensor:
            return weights[tokens[:, -2], tokens[:, -1]]

        def score(words: tuple[int, ...], weights: torch.Tensor = weights) -> float:
            ids, total = [0, 1], 0.0
            for word in words:
                total += float(weights[ids[-2], ids[-1]].log_softmax(-1)[word])
                ids.append(word)
            return total

        answers = [(3,), *itertools.product(range(3), range(4))]
        best = max(answers, key=score)
        strategy = BeamSearchStrategy(3, no_repeat_ngram_size=0, length_penalty=0.0, end_ids=[3])
        assert run(strategy, logits, 2, [0, 1])[0] == ([0, 1, *best], pytest.approx(score(best), rel=1e-5))


def test_too_many_beams_are_refused() -> None:
    strategy = BeamSearchStrategy(9, no_repeat_ngram_size=0, end_ids=[3])
    with pytest.raises(UsageError, match="9 beams need more than the 4 tokens"):
        strategy.step(torch.zeros(1, 4), torch.tensor([[0]]))


def test_no_ngram_of_the_answer_comes_twice(model: torch.nn.Module) -> None:
    prompt = glm130b_tiny.stored()["generation"]["MASK"]["prompt_with_sop"]
    for size in (2, 3):
        for answer in beam_search(model, prompt, num_beams=3, max_new_tokens=30, no_repeat_ngram_size=size, end_ids=[]):
            ids = answer.ids[len(prompt) - size + 1 :]  # an n-gram may begin in the prompt
            grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
            assert len(set(grams)) == len(grams)
            assert len(answer.ids) == len(prompt) + 30


def test_ends_and_bans(model: torch.nn.Module) -> None:
    prompt = glm130b_tiny.stored()["generation"]["gMASK"]["prompt_with_sop"]
    ends = range(1, 96, 8)
    answers = beam_search(model, prompt, max_new_tokens=12, min_gen_length=6, end_ids=ends)
    for answer in answers:
        generated = answer.ids[len(prompt) :]
        assert not set(generated[:6]) & set(ends)
        assert not set(generated[:-1]) & set(ends)
    first = answers[0].ids[len(prompt)]
    other = beam_search(model, prompt, max_new_tokens=4, end_ids=ends, first_banned_ids=[first])
    assert all(answer.ids[len(prompt)] != first for answer in other)


def test_drawing_without_replacement_follows_the_probabilities() -> None:
    """One beam, no end: the first of two candidates in order of probability is kept, so it is the likelier one."""
    probabilities = torch.tensor([[0.6, 0.3, 0.1]])
    strategy = BeamSearchStrategy(1, no_repeat_ngram_size=0, deterministic=False, seed=5)
    counts = [0, 0, 0]
    for _ in range(3000):
        tokens, parents = strategy.step(probabilities.log(), torch.tensor([[7]]))
        strategy.finish(tokens)
        assert parents.tolist() == [0]
        counts[int(tokens[0, -1])] += 1
    # P(0 among two of three) = 0.6 + 0.3*0.6/0.7 + 0.1*0.6/0.9; the pair {1, 2} keeps 1, so 2 never comes
    wanted = 0.6 + 0.3 * 0.6 / 0.7 + 0.1 * 0.6 / 0.9
    assert counts[0] / 3000 == pytest.approx(wanted, abs=0.03)
    assert counts[2] == 0


def test_a_seed_repeats_a_drawn_search(model: torch.nn.Module) -> None:
    prompt = glm130b_tiny.stored()["generation"]["gMASK"]["prompt_with_sop"]
    options = {"num_beams": 3, "max_new_tokens": 8, "deterministic": False}
    one, two = (beam_search(model, prompt, seed=4, **options) for _ in range(2))
    assert one == two
    assert beam_search(model, prompt, seed=5, **options) != one


def test_rows_that_have_ended_get_minus_one() -> None:
    strategy = BaseStrategy(top_k=1, end_ids=[2])
    tokens = torch.tensor([[5], [5]])
    logits = torch.tensor([[0.0, 1.0, 3.0], [0.0, 3.0, 1.0]])
    tokens, parents = strategy.step(logits, tokens)
    assert parents.tolist() == [0, 1]
    tokens, _ = strategy.step(logits, tokens)
    assert tokens.tolist() == [[5, 2, -1], [5, 1, 1]]
    assert not strategy.is_done
    tokens, _ = strategy.step(logits.flip(0), tokens)
    assert strategy.is_done
    assert [answer.ids for answer in strategy.finish(tokens)] == [[5, 2], [5, 1, 1, 2]]


def test_one_beam_is_greedy(model: torch.nn.Module) -> None:
    for name in ("MASK", "gMASK"):
        facts = glm130b_tiny.stored()["generation"][name]
        answers = beam_search(
            model, facts["prompt_with_sop"], num_beams=1, max_new_tokens=12, no_repeat_ngram_size=0, end_ids=[]
        )
        assert [answer.ids for answer in answers] == facts["greedy_topk1"][0]


@pytest.mark.parametrize(
    ("values", "word"),
    [({"num_beams": 0}, "num_beams"), ({"no_repeat_ngram_size": -1}, "ngram"), ({"length_penalty": math.inf}, "pena")],
)
def test_numbers_out_of_range_are_refused(values: dict[str, object], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        BeamSearchStrategy(**values)


def test_no_room_is_refused(model: torch.nn.Module) -> None:
    with pytest.raises(UsageError, match="no room"):
        beam_search(model, [1] * 62 + [89, 92])
    with pytest.raises(UsageError, match="empty"):
        beam_search(model, [])


class Words:
    """A tokenizer whose text is numbers."""

    stop_ids = frozenset({93, 88})
    prefix_ids = frozenset[int]()
    mask_token_ids = frozenset({89, 90, 91})
    names = {"[MASK]": 89, "[gMASK]": 90, "[sMASK]": 91, "sop": 92}  # noqa: RUF012

    def fill_prompt(self, text: str) -> list[int]:
        ids = [self.names.get(word) or int(word) for word in text.split()]
        if not set(ids) & self.mask_token_ids:
            ids.append(90)
        return ids if ids[-1] in self.mask_token_ids else [*ids, 88]

    def get_command(self, name: str) -> int:
        return self.names[name]

    def decode_ids(self, ids: list[int]) -> str:
        return " ".join(str(token) for token in ids if token != 88)


def test_blanks_are_filled_from_left_to_right(model: torch.nn.Module) -> None:
    """The first filling is that of the text alone; it stands in its place when the second is made."""
    tokenizer = Words()
    text = "73 79 56 4 [MASK] 48 35 [sMASK] 60"
    strategy = BaseStrategy(top_k=1, end_ids=tokenizer.stop_ids)
    (whole,) = fill(model, tokenizer, text, strategy, max_total_tokens=18)

    ids = tokenizer.fill_prompt(text)
    (answer,) = search(model, [*ids, 92], strategy, max_new_tokens=18 - len(ids) - 1)
    first = answer.ids[len(ids) + 1 :]
    assert whole.blanks[0] == tokenizer.decode_ids(first)
    second = [73, 79, 56, 4, *first, 48, 35, 91, 60, 88]
    assert len(second) < 18
    (answer,) = search(model, [*second, 92], strategy, max_new_tokens=18 - len(second) - 1)
    last = [token for token in answer.ids[len(second) + 1 :] if token not in tokenizer.stop_ids]
    assert whole.ids == [73, 79, 56, 4, *first, 48, 35, *last, 60, 88]
    assert whole.text == tokenizer.decode_ids(whole.ids)


def test_a_cancelled_filling_keeps_what_it_has(model: torch.nn.Module) -> None:
    cancel = CancelToken()
    cancel.cancel()
    (whole,) = fill(model, Words(), "73 79 [MASK] 48 [MASK] 60", BaseStrategy(top_k=1), cancel=cancel)
    assert len(whole.blanks) == 1
    assert whole.ids[2:3] == [int(whole.blanks[0])]
    assert whole.ids.count(89) == 1


def test_logits_that_are_not_finite_are_an_error(model: torch.nn.Module) -> None:
    for strategy in (BaseStrategy(), BeamSearchStrategy(2)):
        with pytest.raises(GenerationError, match="finite"):
            strategy.step(torch.tensor([[0.0, math.nan, 1.0]]), torch.tensor([[1]]))


def test_all_beams_of_the_last_blank_come_back(model: torch.nn.Module) -> None:
    found = fill(model, Words(), "56 41 5 18", BeamSearchStrategy(3, end_ids=[93, 88]), max_total_tokens=12)
    assert len(found) == 3
    assert [filling.score for filling in found] == sorted((filling.score for filling in found), reverse=True)
    assert all(filling.text == f"56 41 5 18 {filling.blanks[0]}".strip() for filling in found)


def test_a_text_without_room_is_refused(model: torch.nn.Module) -> None:
    with pytest.raises(UsageError, match="no room to fill 13 tokens"):
        fill(model, Words(), "1 2 3 4 5 6 7 8 9 10 11 12", max_total_tokens=13)
