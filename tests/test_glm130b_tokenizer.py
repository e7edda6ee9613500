"""The tokenizer of GLM-130B.

Its own ice_text.model is not at hand. That of ChatGLM-6B has the same pieces at the same places; only the image tokens
are missing, and those are counted and not stored. A file that is trained here has the layout of icetk.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glmkit.engine.beams import BaseStrategy
from glmkit.engine.filling import fill
from glmkit.errors import TokenizerError, UsageError
from glmkit.models.glm130b import GLM130BForCausalLM
from glmkit.models.glm130b_config import GLM130BConfig
from glmkit.tokenizers.glm130b import GLM130BTokenizer


@pytest.fixture(scope="module")
def released(shared: Path) -> GLM130BTokenizer:
    return GLM130BTokenizer(shared / "tokenizers" / "chatglm-6b.ice_text.model")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> GLM130BTokenizer:
    """A Unigram model of a few dozen pieces, with the first pieces that the released one has."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text").write_text("the cat sat on the mat\na dog ran after the cat\nthe mat was red\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "ice_text"),
        model_type="unigram",
        vocab_size=60,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        split_digits=True,
        pad_id=3,
        user_defined_symbols=["<n>"],
        minloglevel=2,
    )
    return GLM130BTokenizer.from_pretrained(folder)


def test_ids_of_the_release(released: GLM130BTokenizer) -> None:
    assert released.mask_token_ids == [150000, 150001, 150002]
    names = ("eod", "sop", "eop", "ENC", "dBLOCK", "eos", "pad")
    assert [released.get_command(name) for name in names] == [150003, 150004, 150005, 150006, 150007, 20002, 20003]
    assert released.get_command("<sop>") == 150004
    assert released.stop_ids == {150005, 20002}
    assert released.vocab_size == 150344
    assert released.encode_text("你好") == [20005, 94874]
    assert released.encode_text("\n\t  x")[1:4] == [20004, 150008, 150009]
    with pytest.raises(TokenizerError, match="no control token"):
        released.get_command("[XMASK]")


@pytest.mark.parametrize(
    "text", ["你好，世界", "Hello world.", "a\nb\tc   d", "x" + " " * 163 + "y", "emoji 😀 end", "1 + 12 = 13"]
)
def test_text_comes_back(released: GLM130BTokenizer, text: str) -> None:
    wanted = text.replace("，", ",")  # the normaliser makes it so
    assert released.decode_ids(released.encode_text(text)) == wanted


def test_prompts(released: GLM130BTokenizer) -> None:
    plain = released.encode_text
    assert released.fill_prompt("Ng is an [MASK] here.") == [
        *plain("Ng is an "),
        150000,
        *plain(" here."),
        20002,
    ]
    assert released.fill_prompt("What is it?") == [*plain("What is it?"), 150001]
    assert released.fill_prompt("A [sMASK]") == [*plain("A"), 150002]
    assert released.fill_prompt("[gMASK]") == [150001]
    assert released.fill_prompt("[MASK] [sMASK]") == [150000, 150002]
    # Other names stay text, and so do masks in plain text.
    assert not {150004, 150005, 150001} & set(released.fill_prompt("<sop> eop [MASK]"))
    assert not set(released.mask_token_ids) & set(plain("[MASK] [gMASK]"))


def test_decoding_passes_over_what_is_no_text(released: GLM130BTokenizer) -> None:
    ids = released.encode_text("one two")
    mixed = [17, *ids[:1], 150001, *ids[1:], 150004, 20002, 20003, 150500, 0]
    assert released.decode(mixed) == "one two"


def test_a_small_file_has_the_same_places(tiny: GLM130BTokenizer, tmp_path: Path) -> None:
    first = tiny.get_command("[MASK]")
    assert first == 20000 + len(tiny) - 20000 - (8 + 80 + 256)
    assert [tiny.get_command(name) - first for name in ("[gMASK]", "[sMASK]", "eod", "sop", "eop")] == [1, 2, 3, 4, 5]
    assert tiny.get_command("eos") == 20002
    for text in ("the cat sat", "the\ncat", "a dog\tran   red", "ö"):
        assert tiny.decode_ids(tiny.encode_text(text)) == text
    assert tiny.fill_prompt("the [MASK] sat")[-1] == 20002

    tiny.save_pretrained(tmp_path / "saved")
    again = GLM130BTokenizer.from_pretrained(tmp_path / "saved")
    assert again.fill_prompt("the [MASK] sat  on\n") == tiny.fill_prompt("the [MASK] sat  on\n")
    shifted = GLM130BTokenizer.from_pretrained(tmp_path / "saved", num_image_tokens=7)
    assert shifted.encode_text("the cat") == [index - 20000 + 7 for index in tiny.encode_text("the cat")]
    shifted.save_pretrained(tmp_path / "shifted")
    assert GLM130BTokenizer.from_pretrained(tmp_path / "shifted").num_image_tokens == 7


def test_errors(tiny: GLM130BTokenizer, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="missing"):
        GLM130BTokenizer.from_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="num_image_tokens"):
        GLM130BTokenizer(tiny.vocab_file, num_image_tokens=-1)
    with pytest.raises(TokenizerError):
        tiny.encode_text("\ud800")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        tiny.save_pretrained(tmp_path / "file")


def test_filling_with_a_model(tiny: GLM130BTokenizer) -> None:
    """From text to text: what is not a blank stays, and the ids in the config are the tokenizer's."""
    tokenizer = GLM130BTokenizer(tiny.vocab_file, num_image_tokens=0)
    names = {"mask_token_id": "[MASK]", "gmask_token_id": "[gMASK]", "smask_token_id": "[sMASK]", "bos_token_id": "sop"}
    config = GLM130BConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        inner_hidden_size=24,
        vocab_size=len(tokenizer),
        max_sequence_length=64,
        eos_token_id=sorted(tokenizer.stop_ids),
        **{field: tokenizer.get_command(name) for field, name in names.items()},
    )
    torch.manual_seed(1)
    model = GLM130BForCausalLM(config)
    model.init_weights()
    strategy = BaseStrategy(top_k=1, end_ids=tokenizer.stop_ids)
    (whole,) = fill(model.eval(), tokenizer, "the cat [MASK] on [sMASK] mat", strategy, max_total_tokens=24)
    blanks = [tokenizer.encode_text(text) for text in ("the cat", "on", "mat")]
    assert len(whole.blanks) == 2
    assert whole.ids[: len(blanks[0])] == blanks[0]
    assert whole.ids[-1 - len(blanks[2]) :] == [*blanks[2], tokenizer.eos_token_id]
    assert not set(whole.ids) & set(tokenizer.mask_token_ids)
    assert whole.text == tokenizer.decode_ids(whole.ids)
