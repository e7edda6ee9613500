"""Seq2seq fine-tuning of GLM (2021): layouts, lengths, labels that the model's loss takes.

Texts are ids written as words (glm_words.WordIds), in which words that are no number, such as " Content:", have none.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glm_words import WordIds
from glmkit.data.seq2seq import TASKS, Seq2SeqTask, clean_summary, collate_seq2seq, encode_seq2seq, squad_windows
from glmkit.errors import DataError, UsageError
from glmkit.models.glm import GLMForConditionalGeneration
from glmkit.models.glm_config import GLMConfig
from glmkit.tokenizers.glm import GLMBertTokenizer, GLMGPT2Tokenizer

CLS, PAD, MASK, SMASK, SOP, EOP, DOT = 119, 118, 120, 125, 123, 124, 100


def small(task: str, source: int, target: int = 4) -> Seq2SeqTask:
    return replace(TASKS[task], source_tokens=source, target_tokens=target)


def test_the_published_lengths() -> None:
    table = {name: (t.source_tokens, t.target_tokens, t.num_beams, t.length_penalty) for name, t in TASKS.items()}
    assert table["cnn_dm"] == (608, 160, 5, 0.7)
    assert table["xsum"] == (608, 60, 6, 1.0)
    assert table["gigaword"] == (192, 32, 5, 0.6)
    assert table["squad"] == (512, 64, 5, 0.0)
    assert (TASKS["cnn_dm"].min_target_tokens, TASKS["cnn_dm"].no_repeat_ngram_size) == (55, 3)
    assert (TASKS["cnn_dm"].epochs, TASKS["cnn_dm"].learning_rate, TASKS["cnn_dm"].label_smoothing) == (15, 3e-5, 0.1)


def test_a_summary() -> None:
    """[CLS] [sMASK] source, filled, sop target; the blank's index behind; labels where they are predicted."""
    one = encode_seq2seq(WordIds(), small("cnn_dm", 7), "1 2 3", "50 51")
    assert one.input_ids.tolist() == [CLS, SMASK, 1, 2, 3, PAD, PAD, SOP, 50, 51]
    assert one.labels.tolist() == [-100] * 7 + [50, 51, EOP]
    assert one.position_ids.tolist() == [[*range(7), 1, 1, 1], [0] * 7 + [1, 2, 3]]
    assert (one.sep, one.context_tokens) == (7, 5)
    prompt = encode_seq2seq(WordIds(), small("cnn_dm", 7), "1 2 3")
    assert prompt.input_ids.tolist() == one.input_ids[:8].tolist()
    assert prompt.position_ids[:, 7].tolist() == [1, 1]
    assert prompt.labels.tolist() == [-100] * 8
    cut = encode_seq2seq(WordIds(), small("cnn_dm", 4, 2), "1 2 3", "50 51")
    assert cut.input_ids.tolist() == [CLS, SMASK, 1, 2, SOP, 50]
    assert cut.labels[4:].tolist() == [50, 51]  # no eop


def test_a_vocabulary_without_task_masks_uses_mask() -> None:
    words = WordIds()
    words.mask_token_ids = (MASK,)
    assert encode_seq2seq(words, small("xsum", 4), "1").input_ids.tolist() == [CLS, MASK, 1, PAD, SOP]


def test_questions_and_answers() -> None:
    squad = encode_seq2seq(WordIds(), small("squad", 9), "1 2 3 4 5 6", " 50 ", question="7 8")
    assert squad.input_ids.tolist() == [CLS, 7, 8, SMASK, DOT, 1, 2, 3, 4, SOP, 50]
    assert squad.position_ids[0, 9:].tolist() == [3, 3]
    cmrc = encode_seq2seq(WordIds(), small("cmrc", 6), "1 2 3", "50", question=" 7 ")
    assert cmrc.input_ids[: cmrc.sep].tolist() == [CLS, MASK, 1, 2, 3, PAD]  # the question's text is no number here
    anything = encode_seq2seq(WordIds(), small("customization", 6), "1 2 3 4 5", "50")
    assert anything.input_ids.tolist() == [CLS, 3, 4, 5, SMASK, PAD, SOP, 50]
    with pytest.raises(UsageError, match="needs a question"):
        encode_seq2seq(WordIds(), "squad", "1")
    with pytest.raises(DataError, match="takes 6 of 6 tokens"):
        encode_seq2seq(WordIds(), small("squad", 6), "1", question="1 2 3")
    with pytest.raises(UsageError, match="no task 'cnn'; expected one of cnn_dm"):
        encode_seq2seq(WordIds(), "cnn", "1")


def test_asking_keeps_the_part_around_the_answer() -> None:
    """[CLS] context mask answer: of a long context, half of the room is in front of the answer."""
    text = " ".join(map(str, range(1, 21)))
    one = encode_seq2seq(WordIds(), small("squad_generation", 10), text, "70", answer="15 16")
    assert one.input_ids.tolist() == [CLS, 12, 13, 14, 15, 16, 17, SMASK, 15, 16, SOP, 70]
    early = encode_seq2seq(WordIds(), small("squad_generation", 10), text, "70", answer="2 3")
    assert early.input_ids[1:7].tolist() == [1, 2, 3, 4, 5, 6]
    absent = encode_seq2seq(WordIds(), small("squad_generation", 10), text, "70", answer="2 9")
    assert absent.input_ids[1:7].tolist() == [1, 2, 3, 4, 5, 6]
    short = encode_seq2seq(WordIds(), small("squad_generation", 8), "1 2", answer="9")
    assert short.input_ids.tolist() == [CLS, 1, 2, SMASK, 9, PAD, PAD, PAD, SOP]


def test_windows_overlap_and_say_which_holds_the_answer() -> None:
    text = " ".join(map(str, range(1, 17)))
    found = list(squad_windows(WordIds(), small("squad", 12), text, "7 8", ["9 10"]))
    assert found == [("1 2 3 4 5 6 7", "N/A"), ("7 8 9 10 11 12 13", "9 10"), ("13 14 15 16", "N/A")]
    assert [answer for _, answer in squad_windows(WordIds(), "squad", text, "7", [])] == ["N/A"]
    assert list(squad_windows(WordIds(), "squad_v1", text, "7", ["99"])) == []


def test_marks_of_summaries() -> None:
    assert (
        clean_summary("gigaword", " UNK said -lrb- \u201cno\u201d -rrb- &amp; <unk> ") == '[UNK] said ( "no" ) & [UNK]'
    )
    assert clean_summary("cnn_dm", "do n't <S_SEP> -LRB- ``x'' -RRB-") == 'don\'t  ( "x" )'
    assert clean_summary("cnn_dm", "a <S_SEP> b", target=True) == "a [SEP] b"
    assert clean_summary("cnn_dm_original", "\u2018a\u2013b\u2019 -LRB-") == "'a-b' -LRB-"
    assert clean_summary("xsum", " \u201cas it is\u201d ") == " \u201cas it is\u201d "


@pytest.fixture(scope="module")
def model() -> GLMForConditionalGeneration:
    torch.manual_seed(3)
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 128, "max_sequence_length": 64}
    network = GLMForConditionalGeneration(GLMConfig(**sizes)).eval()
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return network


@pytest.mark.parametrize("hidden", [False, True])
def test_the_loss_is_that_of_the_target(model: GLMForConditionalGeneration, hidden: bool) -> None:
    """A batch gives the sum over its rows, and with the filling hidden what rows without filling give."""
    task = small("cnn_dm", 9)
    records = [("1 2 3", "50 51"), ("4", "60 61 62 63")]
    examples = [encode_seq2seq(WordIds(), task, *record) for record in records]
    with torch.no_grad():
        loss, targets = model.label_loss(**collate_seq2seq(examples, PAD, mask_padding=hidden))
        assert targets == 3 + 4  # the longer one has no eop
        alone = []
        for (source, target), example in zip(records, examples):
            width = example.context_tokens if hidden else task.source_tokens
            row = encode_seq2seq(WordIds(), replace(task, source_tokens=width), source, target)
            logits = model(row.input_ids[None], row.position_ids[None], torch.tensor([row.sep])).logits[0]
            wanted = row.labels[row.sep :]
            alone.append(-logits[row.sep :].log_softmax(-1).gather(1, wanted[:, None]).sum())
    torch.testing.assert_close(loss, torch.stack(alone).sum(), atol=1e-3, rtol=1e-5)


def test_official_vocabularies(shared: Path) -> None:
    bert = GLMBertTokenizer.from_pretrained(shared / "tokenizers/glm-bert", style="original")
    gpt2 = GLMGPT2Tokenizer.from_pretrained(shared / "tokenizers/glm-gpt2", style="original")
    one = encode_seq2seq(bert, "gigaword", "hello world", "a world")
    assert one.input_ids[:6].tolist() == [101, 103, *bert.encode_text("content : hello"), 2088]
    assert one.labels[192:].tolist() == [*bert.encode_text("a world"), 30523]
    assert one.position_ids[0, 192:].tolist() == [1, 1, 1]
    two = encode_seq2seq(gpt2, "squad", "It is blue.", "blue", question="Which?")
    assert gpt2.decode_ids(two.input_ids[: two.context_tokens].tolist()) == "[CLS] Which?[sMASK]. It is blue."
    assert two.labels[two.sep :].tolist() == [*gpt2.encode_text(" blue"), 50258]
    three = encode_seq2seq(gpt2, "squad_generation", "It is blue. ", "Which?", answer="blue")
    text = gpt2.decode_ids(three.input_ids[: three.context_tokens].tolist())
    assert text == "[CLS]It is blue. Question:[sMASK] Answer: blue"
