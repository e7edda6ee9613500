"""Cloze fine-tuning of GLM (2021): patterns, rows, scores and losses.

The parts of the patterns are those of the official code, from tests/fixtures/glm_text; rows with the official
vocabularies and scores of the official classifiers are compared where ../shared is there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glm_words import WordIds
from glmkit.data.cloze import (
    ClozeExample,
    ClozeSample,
    FastClozeSample,
    cloze_parts,
    collate_cloze,
    encode_cloze,
    encode_cloze_fast,
)
from glmkit.data.cloze_patterns import MASK, TASKS, ClozeTask, Pattern
from glmkit.errors import DataError, UsageError
from glmkit.evaluate.cloze import classify, cloze_loss, cloze_scores, score
from glmkit.models.glm import GLMForConditionalGeneration, GLMModel
from glmkit.models.glm_config import GLMConfig
from glmkit.tokenizers.glm import GLMBertTokenizer, GLMGPT2Tokenizer

PARTS = json.loads((Path(__file__).parent / "fixtures" / "glm_text" / "parts.json").read_text(encoding="utf-8"))["rows"]
CLS, EOS, BLANK, SOP, EOP = 119, 118, 120, 123, 124
# A task whose texts are ids: "choose" scores answers of the example, "words" has a word for each label.
NUMBERS = {
    "choose": ClozeTask(("0", "1"), (Pattern(("<{a}>", MASK, "9"), ("7", "<{b}>")),), answers=("{*choices}",)),
    "words": ClozeTask(("no", "yes"), (Pattern(("<{a}>", MASK), words={"no": "40", "yes": "41"}),)),
}


@pytest.fixture(autouse=True)
def numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, task in NUMBERS.items():
        monkeypatch.setitem(TASKS, name, task)


@pytest.fixture(scope="module")
def model() -> GLMForConditionalGeneration:
    torch.manual_seed(5)
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 128, "max_sequence_length": 64}
    network = GLMForConditionalGeneration(GLMConfig(**sizes)).eval()
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return network


def example(a: str, b: str = "", choices: tuple[str, ...] = (), label: object = None) -> ClozeExample:
    return ClozeExample(a, b, label, {"choices": list(choices)}, uid=f"{a}|{b}")


# --- patterns ---


@pytest.mark.parametrize("row", PARTS, ids=[f"{row['task']}-{row['pattern_id']}" for row in PARTS])
def test_parts_are_the_official_ones(row: dict[str, Any]) -> None:
    given = row["example"]
    found = cloze_parts(
        row["task"], ClozeExample(given["text_a"], given["text_b"], given["label"], given["meta"]), row["pattern_id"]
    )
    assert list(found) == row["parts"]


@pytest.mark.parametrize("name", [name for name in TASKS if name not in NUMBERS])
def test_every_pattern_has_one_blank_and_a_word_for_every_label(name: str) -> None:
    task = TASKS[name]
    for pattern in task.patterns:
        parts = pattern.first + pattern.second
        assert parts.count(MASK) == 1
        assert any(part.startswith("<") and part.endswith(">") for part in parts)
        assert bool(task.answers) != bool(pattern.words)
        assert pattern.words is None or set(pattern.words) == set(task.labels)


def test_chinese_patterns_and_questions_with_a_gap() -> None:
    assert cloze_parts("tnews", ClozeExample("足球赛", "进球")) == (
        ["标题：", "足球赛", "关键词：", "进球", "类别：", MASK],
        [],
    )
    assert cloze_parts("afqmc", ClozeExample("甲", "乙")) == (["甲", "？"], ["你是说", "乙", "？", MASK, "。"])
    meta = {"span1_text": "小明", "span1_index": 0, "span1_length": 2}
    meta |= {"span2_text": "他", "span2_index": 3, "span2_length": 1}
    assert cloze_parts("cluewsc", ClozeExample("小明说他来", None, "true", meta)) == (
        ["#小明#说*他*来", "代词'*他*'", MASK, "指#小明#."],
        [],
    )
    gap = ClozeExample("Text.", "Tom is _ today.", "A", {"choices": ["ill", "well"]})
    assert cloze_parts("race", gap) == (["Text."], [" Tom is", MASK, " today."])
    assert cloze_parts("race", gap, 1)[1][:2] == [" Based on the previous passage,", " Tom is"]


def test_what_does_not_fit_a_task_is_named() -> None:
    with pytest.raises(UsageError, match="no task 'rtee'; expected one of rte, ax-b"):
        cloze_parts("rtee", ClozeExample("a"))
    with pytest.raises(UsageError, match="no pattern 5 of rte; expected one from 0 to 4"):
        cloze_parts("rte", ClozeExample("a", "b"), 5)
    with pytest.raises(UsageError, match="segment_length=-1: expected a number of tokens, or 0"):
        encode_cloze(None, "rte", ClozeExample("a", "b"), segment_length=-1)
    with pytest.raises(DataError, match=r"example 'x' of rte lacks 'b'"):
        cloze_parts("RTE", ClozeExample("a", uid="x"))
    with pytest.raises(DataError, match="one @placeholder"):
        cloze_parts("record", ClozeExample("a", "b", meta={"candidates": ["c"]}))
    with pytest.raises(DataError, match="span2_index=9 is no place"):
        cloze_parts("wsc", ClozeExample("a b", meta={"span1_text": "a", "span2_text": "b", "span2_index": 9}))
    with pytest.raises(DataError, match="label 'maybe'; expected one of 'no', 'yes'"):
        encode_cloze(WordIds(), "words", example("1", label="maybe"))
    with pytest.raises(DataError, match="text_a is None, expected a text"):
        cloze_parts("rte", ClozeExample(None, "b", "entailment"))  # type: ignore[arg-type]
    for wrong in ("12", [12], 12):
        with pytest.raises(DataError, match=r"choices is .*, expected texts"):
            encode_cloze(WordIds(), "choose", ClozeExample("1", "2", "0", {"choices": wrong}))
    with pytest.raises(DataError, match="has no answers"):
        encode_cloze(WordIds(), "choose", example("1"))


# --- rows ---


def test_a_row_for_each_answer() -> None:
    """[CLS] a [MASK] 9 7 b eos | sop answer, filled with eos; the blank's index and 1, 2, 3 as positions."""
    sample = encode_cloze(WordIds(), "choose", example("1 2", "3", ("50", "51 52"), "1"), max_seq_length=14)
    text = [CLS, 1, 2, BLANK, 9, 7, 3, EOS]
    assert sample.input_ids.tolist() == [text + [SOP, 50] + [EOS] * 4, text + [SOP, 51, 52] + [EOS] * 3]
    assert sample.position_ids[1].tolist() == [[*range(8), 3, 3, 3, 0, 0, 0], [0] * 8 + [1, 2, 3, 0, 0, 0]]
    assert sample.sep.tolist() == [8, 8]
    assert sample.target_ids.tolist() == [[0] * 8 + [50, EOP] + [0] * 4, [0] * 8 + [51, 52, EOP] + [0] * 3]
    assert sample.logit_mask.tolist() == [[0] * 8 + [1, 1] + [0] * 4, [0] * 8 + [1, 1, 1] + [0] * 3]
    assert sample.label == 1
    assert all(value.dtype == torch.int64 for value in vars(sample).values() if isinstance(value, torch.Tensor))


def test_one_token_an_answer() -> None:
    sample = encode_cloze(WordIds(), "words", example("1 2", label="yes"), max_seq_length=8)
    assert sample.input_ids.tolist() == [CLS, 1, 2, BLANK, EOS, SOP, EOS, EOS]
    assert sample.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0]]
    assert (sample.sep.item(), sample.target_ids.tolist(), sample.label) == (5, [40, 41], 1)
    assert sample.logit_mask.tolist() == [0] * 5 + [1, 0, 0]
    TASKS["words"] = ClozeTask(("no", "yes"), (Pattern((MASK,), words={"no": "40 41", "yes": "41"}),))
    with pytest.raises(DataError, match="'40 41' is 2 tokens"):
        encode_cloze(WordIds(), "words", example("1"))


def test_the_longer_side_gives_way_and_then_the_second() -> None:
    long = example("1 2 3 4 5", "11 12 13", ("50",))
    for length, first, second in ((15, "1 2 3 4 5", "11 12 13"), (14, "1 2 3 4", "11 12 13"), (13, "1 2 3", "11 12 13"),
                                  (12, "1 2 3", "11 12"), (11, "1 2", "11 12"), (10, "1 2", "11")):  # fmt: skip
        ids = encode_cloze(WordIds(), "choose", long, max_seq_length=length).input_ids[0].tolist()
        want = [CLS, *map(int, first.split()), BLANK, 9, 7, *map(int, second.split()), EOS, SOP, 50]
        assert ids == want, length
    assert encode_cloze(WordIds(), "choose", long, max_seq_length=7).input_ids[0].tolist() == [
        *(CLS, BLANK, 9, 7),
        *(EOS, SOP, 50),
    ]
    with pytest.raises(DataError, match=r"example '1 2 3 4 5\|11 12 13' does not fit into 6 tokens"):
        encode_cloze(WordIds(), "choose", long, max_seq_length=6)


def test_segments_see_those_in_front_of_them() -> None:
    sample = encode_cloze(
        WordIds(), "choose", example("1", "", ("50 51 52", "60"), "0"), max_seq_length=14, segment_length=2
    )
    assert sample.segment_ids is not None
    assert sample.segment_ids.tolist() == [0, 0, 1]
    first, second, third = sample.input_ids.tolist()
    assert first[:9] == [CLS, 1, BLANK, 9, 7, EOS, SOP, 50, EOS]
    assert second[:10] == [CLS, 1, 50, 51, BLANK, 9, 7, EOS, SOP, 52]
    assert third[:8] == [CLS, 1, BLANK, 9, 7, EOS, SOP, 60]
    assert sample.target_ids[1, 8:10].tolist() == [52, EOP]
    assert sample.position_ids[1, 0, 8:10].tolist() == [4, 4]


def test_the_fast_form_reads_the_text_once() -> None:
    sample = encode_cloze_fast(
        WordIds(), "choose", example("1", "", ("50", " ".join(map(str, range(60, 80)))), "1"), max_seq_length=10
    )
    assert sample.input_ids.tolist() == [CLS, 1, BLANK, 9, 7, EOS, EOS, EOS, EOS, EOS]
    assert sample.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 0, 0, 0], [0] * 10]
    assert sample.answer_ids[0].tolist() == [SOP, 50] + [EOS] * 14
    assert sample.answer_ids[1].tolist() == [SOP, *range(60, 75)]  # cut to 16 tokens
    assert sample.target_ids[:, :2].tolist() == [[50, EOP], [60, 61]]
    assert sample.answer_position_ids[0].tolist() == [[2, 2] + [0] * 14, [1, 2] + [0] * 14]
    assert (sample.logit_mask.sum(dim=1).tolist(), sample.label) == ([2, 16], 1)


def test_the_right_answer_of_wsc() -> None:
    """One row with the true span; with a generative loss a row for each candidate, the first being right."""
    meta = {"span1_text": "1", "span2_text": "2", "span2_index": 0, "candidates": ["3", "4 5"]}
    given = ClozeExample("a b", None, "True", meta)
    alone = encode_cloze(WordIds(), "wsc", given, max_seq_length=12)
    assert alone.input_ids.dim() == 1
    assert alone.target_ids[alone.logit_mask.bool()].tolist() == [1, EOP]
    every = encode_cloze(WordIds(), "wsc", given, max_seq_length=12, loss="mix", training=True)
    assert every.input_ids.shape == (3, 12)
    assert (every.label, alone.label) == (0, 1)


def test_a_batch_repeats_the_first_answer() -> None:
    samples = [
        encode_cloze(WordIds(), "choose", example("1", "", answers), max_seq_length=12)
        for answers in (("50",), ("51", "52 53", "54"))
    ]
    batch = collate_cloze(samples)
    assert batch["input_ids"].shape == (2, 3, 12)
    assert batch["choice_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert torch.equal(batch["input_ids"][0, 2], samples[0].input_ids[0])
    assert batch["labels"].tolist() == [0, 0]
    with pytest.raises(DataError, match="of one kind"):
        collate_cloze([samples[0], encode_cloze_fast(WordIds(), "choose", example("1", "", ("5",)))])


# --- scores ---


def test_scores_are_sums_of_log_probabilities(model: GLMForConditionalGeneration) -> None:
    sample = encode_cloze(WordIds(), "choose", example("1 2", "3", ("50", "51 52")), max_seq_length=14)
    batch = collate_cloze([sample])
    with torch.no_grad():
        found, means, raw = (
            cloze_scores(model, batch, length_penalty=penalty, take_softmax=softmax)[0]
            for penalty, softmax in ((0.0, None), (1.0, True), (0.0, False))
        )
        logits = model(sample.input_ids, sample.position_ids, sample.sep).logits
    for row, (answer, ids) in enumerate([("50", [50, EOP]), ("51 52", [51, 52, EOP])]):
        places = range(8, 8 + len(ids))
        each = [logits[row, place].log_softmax(-1)[index] for place, index in zip(places, ids)]
        torch.testing.assert_close(found[row], torch.stack(each).sum(), atol=1e-5, rtol=0, msg=answer)
        torch.testing.assert_close(means[row], torch.stack(each).mean(), atol=1e-5, rtol=0)
        torch.testing.assert_close(raw[row], sum(logits[row, p, i] for p, i in zip(places, ids)), atol=1e-4, rtol=0)


def test_words_are_scored_at_sop(model: GLMForConditionalGeneration) -> None:
    sample = encode_cloze(WordIds(), "words", example("1 2"), max_seq_length=9)
    batch = collate_cloze([sample, sample])
    with torch.no_grad():
        logits = model(sample.input_ids[None], sample.position_ids[None], sample.sep[None]).logits[0, 5]
        torch.testing.assert_close(cloze_scores(model, batch)[1], logits[[40, 41]], atol=1e-5, rtol=0)
        want = logits.log_softmax(-1)[[40, 41]]
        torch.testing.assert_close(cloze_scores(model, batch, take_softmax=True)[0], want, atol=1e-5, rtol=0)


def test_the_fast_form_gives_the_same_scores_and_gradients(model: GLMForConditionalGeneration) -> None:
    given = [example("1 2", "3", ("50", "51 52"), "1"), example("4 5 6", "7 8", ("60 61", "62", "63 64 65"), "0")]
    slow = collate_cloze([encode_cloze(WordIds(), "choose", one, max_seq_length=20) for one in given])
    fast = collate_cloze([encode_cloze_fast(WordIds(), "choose", one, max_seq_length=20) for one in given])
    gradients = []
    for batch in (slow, fast):
        model.zero_grad()
        scores = cloze_scores(model, batch)
        assert scores[0, 2] == -10000
        cloze_loss(scores, batch["labels"]).backward()
        gradients.append((scores.detach(), model.glm.word_embeddings.weight.grad.clone()))
    torch.testing.assert_close(gradients[1][0], gradients[0][0], atol=1e-4, rtol=0)
    torch.testing.assert_close(gradients[1][1], gradients[0][1], atol=1e-4, rtol=1e-4)


def test_segments_are_added_up(model: GLMForConditionalGeneration) -> None:
    given = [example("1", "", ("50 51 52", "60"), "0"), example("2", "", ("61",), "0")]
    samples = [encode_cloze(WordIds(), "choose", one, max_seq_length=14, segment_length=2) for one in given]
    with torch.no_grad():
        scores = cloze_scores(model, collate_cloze(samples))
        rows = cloze_scores(model, {**collate_cloze(samples[:1]), "segment_ids": torch.tensor([[0, 1, 2]])})
    assert scores.shape == (2, 2)
    torch.testing.assert_close(scores[0], torch.stack((rows[0, 0] + rows[0, 1], rows[0, 2])), atol=1e-4, rtol=0)
    assert scores[1, 1] == -10000  # the second example has one answer


def test_score_reads_plain_texts(model: GLMForConditionalGeneration) -> None:
    """The public function gives what rows for each answer give, whatever is in the batch beside them."""
    texts, answers = ["1 2 [MASK] 9 7 3", "[MASK] 4 4 4 4 9 7"], [["50", "51 52"], ["60", "61", "62 63 64"]]
    found = score(model, WordIds(), texts, answers, length_penalty=1.0, batch_size=2)
    alone = [score(model, WordIds(), [text], [rows], length_penalty=1.0)[0] for text, rows in zip(texts, answers)]
    batch = collate_cloze([encode_cloze(WordIds(), "choose", example("1 2", "3", ("50", "51 52")), max_seq_length=14)])
    with torch.no_grad():
        slow = cloze_scores(model, batch, length_penalty=1.0)[0]
    torch.testing.assert_close(torch.tensor(found[0]), slow, atol=1e-4, rtol=0)
    for one, other in zip(found, alone):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=1e-4, rtol=0)
    common = score(model.glm, WordIds(), texts, ["50", "51 52"], length_penalty=1.0)  # the plain network too
    torch.testing.assert_close(torch.tensor(common[0]), slow, atol=1e-4, rtol=0)
    with pytest.raises(DataError, match="text 1 has no mask token"):
        score(model, WordIds(), ["[MASK]", "1 2"], ["50"])
    with pytest.raises(DataError, match="2 lists of answers for 1 texts"):
        score(model, WordIds(), ["[MASK]"], [["50"], ["51"]])
    with pytest.raises(DataError, match="text 0 has 72 tokens and its longest answer 2; the model reads 64"):
        score(model, WordIds(), ["[MASK] " + "1 " * 69], ["50"])


def test_classify_takes_the_highest(model: GLMForConditionalGeneration) -> None:
    given = [example("1 2", "3", ("50", "51 52")), example("4", "8", ("60", "61", "62"))]
    found = classify(model, WordIds(), "choose", given, max_seq_length=20, length_penalty=1.0)
    for one, index in zip(given, found):
        scores = score(
            model, WordIds(), [f"{one.text_a} [MASK] 9 7 {one.text_b}"], [one.meta["choices"]], length_penalty=1.0
        )[0]
        assert scores.index(max(scores)) == index


def test_losses() -> None:
    scores, labels = torch.tensor([[1.0, 3.0, 0.5], [2.0, -1.0, 2.5]]), torch.tensor([1, 0])
    entropy = torch.nn.functional.cross_entropy(scores, labels)
    assert cloze_loss(scores, labels) == entropy
    assert cloze_loss(scores, labels, "generative").item() == -2.5
    torch.testing.assert_close(cloze_loss(scores, labels, "mix"), entropy - 2.5)
    # rows: max(0, 1 + 1 - 3) + max(0, 1 + .5 - 3) and max(0, 1 - 1 - 2) + (1 + 2.5 - 2)
    assert cloze_loss(scores, labels, "hinge").item() == pytest.approx(1.5 / 2)
    assert cloze_loss(scores, labels, "adapet").item() == pytest.approx((1 - 3 + 0.5 - 2 - 1 + 2.5) / 2)
    only = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert cloze_loss(scores, labels, "adapet", only).item() == pytest.approx((1 - 3 - 2 - 1 + 2.5) / 2)
    with pytest.raises(UsageError, match="no loss 'mse'"):
        cloze_loss(scores, labels, "mse")


# --- the official code's numbers ---


def test_every_official_row(shared: Path) -> None:
    stored = json.loads((shared / "conformance/glm_finetune/pvp_encode.json").read_text(encoding="utf-8"))
    tokenizers = {
        "bert": GLMBertTokenizer.from_pretrained(shared / "tokenizers/glm-bert", style="original"),
        "gpt2": GLMGPT2Tokenizer.from_pretrained(shared / "tokenizers/glm-gpt2", style="original"),
    }
    examples: dict[str, ClozeExample] = {}
    for row in stored["rows"]:
        given, want = row["example"], row["sample"]
        one = ClozeExample(given["text_a"], given["text_b"], given["label"], given["meta"], want["uid"])
        examples[row["task"]] = one
        assert list(TASKS[row["task"]].labels) == row["labels"]
        found = encode_cloze(
            tokenizers[row["tokenizer"]],
            row["task"],
            one,
            pattern_id=row["pattern_id"],
            max_seq_length=row["max_seq_length"],
            multi_token=row["multi_token"],
        )
        names = {"text": "input_ids", "target": "target_ids", "label": "label", "uid": "uid"}
        if "loss_mask" in want:
            names |= {"attention_mask": "sep", "loss_mask": "logit_mask", "position_id": "position_ids"}
        else:
            names |= {"mask": "sep", "logit_mask": "logit_mask", "position": "position_ids"}
        for key, name in names.items():
            value = getattr(found, name)
            assert (value.tolist() if isinstance(value, torch.Tensor) else value) == want[key], (row["task"], key)
    for tokenizer, task, pattern_id, multi_token, length, _ in stored["skipped"]:
        with pytest.raises(DataError, match="nothing is left that may be shortened"):
            encode_cloze(
                tokenizers[tokenizer],
                task,
                examples[task],
                pattern_id=pattern_id,
                max_seq_length=length,
                multi_token=multi_token,
            )


def test_official_scores(shared: Path) -> None:
    """float32 on CPU, other order of sums: 5e-5."""
    folder = shared / "conformance"
    config = json.loads((folder / "glm_base/hf_repo/config.json").read_text())
    network = GLMModel(GLMConfig.from_dict(config)).eval()
    network.load_state_dict(load_file(folder / "glm_base/hf_repo/model.safetensors"))
    stored = load_file(folder / "glm_finetune/cloze_scores.safetensors")
    samples: list[ClozeSample] = []
    quick: list[FastClozeSample] = []
    for ids, positions, sep, targets, mask in zip(
        *(stored[key] for key in ("input_ids", "position_ids", "sep", "target_ids", "logit_mask"))
    ):
        samples.append(ClozeSample(ids, positions, sep, targets, mask, 0))
        start = int(sep[0])
        text = torch.arange(ids.shape[1]) < start
        quick.append(
            FastClozeSample(
                torch.where(text, ids[0], EOS),
                torch.where(text, positions[0], 0),
                sep[0],
                *(value[..., start : start + 6] for value in (ids, positions, targets, mask)),
                0,
            )
        )
    words = [ClozeSample(one.input_ids[0], one.position_ids[0], one.sep[0], target, one.logit_mask[0], 0)
             for one, target in zip(samples, stored["single_token_target_ids"])]  # fmt: skip
    with torch.no_grad():
        for batch in (collate_cloze(samples), collate_cloze(quick)):
            for name, options in (
                ("multi_token_softmax", {}),
                ("multi_token_raw", {"take_softmax": False}),
                ("multi_token_softmax_lp1", {"length_penalty": 1.0}),
            ):
                torch.testing.assert_close(cloze_scores(network, batch, **options), stored[name], atol=5e-5, rtol=0)
        batch = collate_cloze(words)
        torch.testing.assert_close(cloze_scores(network, batch), stored["single_token_raw"], atol=5e-5, rtol=0)
        found = cloze_scores(network, batch, take_softmax=True)
        torch.testing.assert_close(found, stored["single_token_softmax"], atol=5e-5, rtol=0)
