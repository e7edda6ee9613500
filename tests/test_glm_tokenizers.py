"""The four tokenizers of GLM (2021): ids, text, model inputs, files, and what must never happen.

Small vocabularies made here, so that the suite means something on any machine; the official ones from ../shared where
it is there, with the stored results of both official codes.
"""

from __future__ import annotations

import copy
import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from glm_words import MERGES, WORDS, WordIds, bert_files, byte_files, chinese_files
from glmkit.errors import TokenizerError, UsageError
from glmkit.tokenizers.glm import (
    GLMBertTokenizer,
    GLMChineseTokenizer,
    GLMGPT2Tokenizer,
    GLMRobertaTokenizer,
    GLMTokenizer,
    glm_tokenizer_class,
)
from glmkit.tokenizers.glm_builders import generation_inputs, multiple_choice_inputs

CLASSES = {"bert": GLMBertTokenizer, "gpt2": GLMGPT2Tokenizer, "roberta": GLMRobertaTokenizer}
CLASSES["chinese"] = GLMChineseTokenizer
FOLDERS = {"bert": "glm-bert", "gpt2": "glm-gpt2", "roberta": "glm-roberta", "chinese": "cog-pretrain"}
BUILDERS = json.loads((Path(__file__).parent / "fixtures" / "glm_text" / "builders.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("glm")
    return {
        "bert": bert_files(root / "bert"),
        "gpt2": byte_files(root / "gpt2"),
        "roberta": byte_files(root / "roberta", roberta=True),
        "chinese": chinese_files(root / "chinese"),
    }


def load(folders: dict[str, Path], kind: str, **options: Any) -> GLMTokenizer:
    return CLASSES[kind].from_pretrained(folders[kind], **options)


# --- the official codes' numbers ---


def official(shared: Path, name: str) -> dict[str, Any]:
    return json.loads((shared / "conformance" / "tokenizer_glm" / name).read_text(encoding="utf-8"))["tokenizers"]


@pytest.mark.parametrize(
    "name",
    ["bert_base_large", "gpt2_10b", "roberta_large", "roberta_large_finetune", "chinese_10b", "chinese_large_fixed"],
)
def test_the_training_repository(shared: Path, name: str) -> None:
    stored = official(shared, "glm_original.json")[name]
    kind = name.split("_")[0]
    options = {"task_mask": stored["options"].get("add_task_mask", False)}
    options["decoder_mask"] = stored["options"].get("add_decoder_mask", False)
    if kind == "chinese":
        options["fix_command_token"] = stored["options"].get("fix_command_token", False)
    folder = shared / "tokenizers" / FOLDERS[kind]
    assert glm_tokenizer_class(folder) is CLASSES[kind]
    tokenizer = CLASSES[kind].from_pretrained(folder, style="original", **options)
    assert len(tokenizer) == stored["num_tokens"]
    assert {one.name: [one.token, one.index] for one in tokenizer.control} == stored["commands"]
    for row in stored["strings"]:
        assert tokenizer.encode_with_masks(row["text"]) == row["ids"], row["text"]
        assert tokenizer.decode_ids(row["ids"]) == tokenizer.decode(row["ids"]) == row["decode"], row["text"]


@pytest.mark.parametrize("name", ["GLMChineseTokenizer", "GLMGPT2Tokenizer"])
def test_the_hugging_face_classes(shared: Path, name: str) -> None:
    stored = official(shared, "glm_hf.json")[name]
    kind = "chinese" if "Chinese" in name else "gpt2"
    tokenizer = CLASSES[kind].from_pretrained(shared / "tokenizers" / FOLDERS[kind])
    assert len(tokenizer) == stored["len"]
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in stored["special"]} == stored["special"]
    for row in stored["strings"]:
        assert tokenizer(row["text"])["input_ids"] == row["ids"], row["text"]
        assert tokenizer.encode(row["text"], add_special_tokens=False) == row["ids_no_special"], row["text"]
        assert tokenizer.decode(row["ids_no_special"]) == row["decode"], row["text"]
    builders = stored["builders"]
    encoded = tokenizer(builders["sources"], padding=True, return_tensors="pt")
    for key in ("input_ids", "attention_mask"):
        assert encoded[key].tolist() == builders["encoded"][key]
    width = len(builders["generation"]["position_ids"][0][0]) - encoded["input_ids"].shape[1]
    targets = [
        tokenizer.decode([index for index in row if index not in (-100, tokenizer.eop_token_id)])
        for row in builders["seq2seq"]["labels"]
    ]
    choices = [[tokenizer.decode(ids) for ids in row] for row in builders["multiple_choice"]["choice_ids"]]
    built = {
        "generation": tokenizer.build_inputs_for_generation(encoded, max_gen_length=width),
        "seq2seq": tokenizer.build_inputs_for_generation(encoded, max_gen_length=width, targets=targets),
        "multiple_choice": tokenizer.build_inputs_for_multiple_choice(encoded, choices),
    }
    for key, batch in built.items():
        assert {name: as_lists(value) for name, value in batch.items()} == builders[key]


def as_lists(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        assert value.dtype == torch.int64
        return value.tolist()
    return [as_lists(one) for one in value]


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "chinese"])
def test_official_vocabularies_on_random_texts(shared: Path, kind: str) -> None:
    """Round trips of bytes, and the SentencePiece library itself."""
    tokenizer = CLASSES[kind].from_pretrained(shared / "tokenizers" / FOLDERS[kind], style="original")
    texts = random_texts(2000)
    if kind != "chinese":
        assert [tokenizer.decode_ids(tokenizer.encode_text(text)) for text in texts] == texts
        return
    library = SentencePieceProcessor(str(shared / "tokenizers" / "cog-pretrain" / "cog-pretrain.model"))
    assert [tokenizer.encode_text(text) for text in texts] == library.encode(texts)


def random_texts(count: int) -> list[str]:
    source = random.Random(7)
    blocks = [(0x20, 0x7F), (0x20, 0x7F), (0x80, 0x250), (0x3000, 0x3100), (0x4E00, 0x9FFF), (0x1F300, 0x1F700)]
    pieces = ["hello", " world", "\n", "  ", "[MASK]", "é", "你好", "Σ", "\u3000", "\ufb01", "e\u0301"]
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(source.randint(1, 8)):
            low, high = source.choice(blocks)
            parts.append(source.choice(pieces) if source.random() < 0.4 else chr(source.randrange(low, high)))
        texts.append("".join(parts))
    return texts


# --- control tokens ---


def test_numbers_follow_the_vocabulary(folders: dict[str, Path]) -> None:
    bert, gpt2, roberta, chinese = (load(folders, kind) for kind in ("bert", "gpt2", "roberta", "chinese"))
    n = len(WORDS)
    assert (bert.cls_token_id, bert.sep_token_id, bert.mask_token_id, bert.eos_token_id) == (2, 3, 4, 0)
    assert (bert.sop_token_id, bert.eop_token_id, bert.mask_token_ids, len(bert)) == (n, n + 1, [4], n + 2)
    n = 256 + len(MERGES) + 1
    assert (gpt2.eos_token_id, gpt2.pad_token_id, gpt2.sop_token_id, gpt2.eop_token_id) == (n - 1, n - 1, n, n + 1)
    assert (gpt2.cls_token_id, gpt2.mask_token_id, gpt2.sep_token_id, gpt2.unk_token_id) == (n + 2, n + 3, n + 4, n + 5)
    assert gpt2.mask_token_ids == [n + 3, n + 7, n + 6]  # [MASK], [sMASK], [gMASK]
    n += 4
    assert (roberta.cls_token_id, roberta.eos_token_id, roberta.unk_token_id, roberta.mask_token_id) == (0, 2, 3, n - 1)
    assert (roberta.sop_token_id, roberta.eop_token_id) == (n, n + 1)
    n = 220
    assert (chinese.eos_token_id, chinese.sep_token_id, chinese.cls_token_id, chinese.mask_token_id) == (
        *(n, n + 1, n + 2),
        n + 3,
    )
    assert (chinese.sop_token_id, chinese.eop_token_id, chinese.smask_token_id, chinese.gmask_token_id) == (
        *(n + 6, n + 7, n + 8),
        n + 9,
    )
    for tokenizer in (bert, gpt2, roberta, chinese):
        assert tokenizer.stop_ids == {tokenizer.eop_token_id, tokenizer.eos_token_id}
        assert tokenizer.prefix_ids == [tokenizer.cls_token_id]
        assert tokenizer.generation == 0
        assert tokenizer.get_command("ENC") == tokenizer.get_command(tokenizer.cls_token) == tokenizer.cls_token_id


def test_the_numbers_that_were_not_fixed_have_two_names_for_one_id(folders: dict[str, Path]) -> None:
    tokenizer = load(folders, "chinese", style="original", fix_command_token=False, decoder_mask=True)
    assert tokenizer.gmask_token_id == tokenizer.eop_token_id == 227
    assert (tokenizer.smask_token_id, tokenizer.get_command("dBLOCK"), len(tokenizer)) == (228, 229, 230)
    assert tokenizer.decode_ids([227]) == "[gMASK]"
    with pytest.raises(UsageError, match="style='hf'"):
        load(folders, "chinese", fix_command_token=False)


def test_a_vocabulary_without_task_masks_says_so(folders: dict[str, Path]) -> None:
    tokenizer = load(folders, "bert")
    with pytest.raises(NotImplementedError, match=r"no \[gMASK\]"):
        _ = tokenizer.gmask_token_id
    with pytest.raises(TokenizerError, match=r"'gMASK' is no control token.*MASK"):
        tokenizer.get_command("gMASK")
    with_masks = load(folders, "bert", style="original", task_mask=True)
    assert with_masks.mask_token_ids == [4, len(WORDS) + 3, len(WORDS) + 2]


def test_switches_of_a_folder_are_checked(folders: dict[str, Path]) -> None:
    for wrong in ({"task_mask": "yes"}, {"decoder_mask": 10**9}):
        with pytest.raises(UsageError, match="expected true or false"):
            load(folders, "bert", **wrong)
    with pytest.raises(UsageError, match="expected 'left' or 'right'"):
        load(folders, "bert", padding_side="up")
    with pytest.raises(TokenizerError, match="model_max_length='x': expected a whole number from 1, or null"):
        load(folders, "bert", model_max_length="x")
    assert load(folders, "bert", model_max_length=4.0)("a b c d e", truncation=True)["attention_mask"] == [1] * 4


def test_blanks_beside_masks(folders: dict[str, Path]) -> None:
    hf, original = load(folders, "gpt2"), load(folders, "gpt2", style="original")
    space, mask = hf.encode_text(" "), hf.mask_token_id
    assert hf.encode_with_masks("hello [MASK] world") == [*hf.encode_text("hello"), mask, *hf.encode_text("world")]
    assert original.encode_with_masks("hello [MASK] world") == [
        *(*hf.encode_text("hello"), mask),
        *hf.encode_text(" world"),
    ]
    assert original.encode_with_masks("a [SEP] [MASK]") == [*hf.encode_text("a "), hf.sep_token_id, mask]
    assert (hf.encode_with_masks(" "), original.encode_with_masks(" ")) == (space, [])
    end = "<|endoftext|>"
    assert original.encode_with_masks(end) == [hf.eos_token_id]
    assert hf.encode_with_masks(end) == hf.encode_text(end) != [hf.eos_token_id]


def test_plain_text_never_becomes_a_control_token(folders: dict[str, Path]) -> None:
    for kind in CLASSES:
        for style in ("hf", "original"):
            tokenizer = load(folders, kind, style=style)
            written = " ".join([*tokenizer.all_special_tokens, "<mask>", "</s>", "hello"])
            unknown = {tokenizer.unk_token_id}  # BERT writes what it does not know with a control token
            assert not set(tokenizer.encode_text(written)) & (set(tokenizer.all_special_ids) - unknown)


# --- the vocabularies ---


def test_byte_pieces(folders: dict[str, Path]) -> None:
    tokenizer = load(folders, "gpt2")
    assert tokenizer.tokenize("hello world [MASK]") == ["hello", "Ġwor", "ld", "[MASK]"]
    texts = random_texts(300)
    assert [tokenizer.decode_ids(tokenizer.encode_text(text)) for text in texts] == texts
    half = tokenizer.encode_text("你")[:2]
    assert tokenizer.decode_ids([*half, tokenizer.sop_token_id]) == "\ufffd<|startofpiece|>"
    roberta = load(folders, "roberta")
    assert roberta("hello<mask>[MASK]")["input_ids"] == [
        0,
        *roberta.encode_text("hello"),
        *[roberta.mask_token_id] * 2,
        2,
    ]
    original = load(folders, "roberta", style="original")
    assert original.decode_ids([0, 2, original.mask_token_id]) == "[CLS][SEP][MASK]"
    assert roberta.decode_ids([0, 2, roberta.mask_token_id]) == "<s></s><mask>"


def test_word_pieces(folders: dict[str, Path]) -> None:
    tokenizer = load(folders, "bert")
    assert tokenizer.tokenize("HÉLLO, playing\tWörld!\x00\u200b\ue000中文a") == (
        "hello , play ##ing world ! 中 文 a".split()
    )
    assert tokenizer.tokenize("xyz [MASK] plays.") == ["[UNK]", "[MASK]", "play", "##s", "."]
    assert tokenizer.tokenize("ΑΣ") == ["ασ"]
    assert load(folders, "bert", style="original").tokenize("ΑΣ") == ["ας"]  # a sigma at the end of a word
    assert tokenizer.decode_ids(tokenizer.encode_text("Playing, a world!")) == "playing , a world !"
    assert tokenizer.decode(tokenizer.encode_text("Playing, a world!")) == "playing, a world!"
    assert tokenizer("hello", "world")["input_ids"] == [2, 5, 3, 6, 3]


def test_sentence_pieces_are_those_of_the_library(folders: dict[str, Path]) -> None:
    library = SentencePieceProcessor(str(folders["chinese"] / "cog-pretrain.model"))
    tokenizer = load(folders, "chinese")
    texts = ["你好，世界。", "a\nb", "ＡＢＣ　①", "  two   blanks ", "<n>x", "<unk>", *random_texts(500)]
    assert [tokenizer.encode_text(text) for text in texts] == library.encode(texts)
    assert tokenizer.encode_with_masks("你好[MASK]世界") == [
        *library.encode("你好"),
        tokenizer.mask_token_id,
        *library.encode("世界"),
    ]
    ids = [*library.encode("你好"), tokenizer.eop_token_id, *library.encode("世界"), len(tokenizer) + 5]
    assert tokenizer.decode_ids(ids) == "你好<|endofpiece|>世界"
    assert tokenizer.decode(ids) == "你好 <|endofpiece|> 世界"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "你好 世界"  # one run of pieces, as in the official class


def test_decoding_joins_marks_as_the_hugging_face_classes_do(folders: dict[str, Path]) -> None:
    ids = load(folders, "gpt2").encode_text("it 's a dog , no ?")
    assert load(folders, "gpt2").decode(ids) == "it's a dog, no?"
    assert load(folders, "gpt2").decode(ids, clean_up_tokenization_spaces=False) == "it 's a dog , no ?"
    assert load(folders, "gpt2", style="original").decode(ids) == "it 's a dog , no ?"
    one = load(folders, "gpt2")
    row = [one.cls_token_id, *one.encode_text("a"), one.eop_token_id, *one.encode_text(" b"), one.eos_token_id]
    assert one.decode(row) == "[CLS] a <|endofpiece|>  b<|endoftext|>"  # the last is in the vocabulary's file
    assert one.decode(row, skip_special_tokens=True) == "a b"
    assert one.decode_ids(row) == "[CLS]a<|endofpiece|> b<|endoftext|>"
    bert = load(folders, "bert")
    assert bert.decode_ids([5, 8, bert.eop_token_id, 8, 4, 8]) == "helloing <|endofpiece|>ing [MASK]ing"
    assert load(folders, "gpt2").batch_decode(torch.tensor([ids, ids])) == ["it's a dog, no?"] * 2


# --- batches ---


def test_cutting_keeps_the_end_and_padding_goes_right(folders: dict[str, Path]) -> None:
    tokenizer = load(folders, "gpt2")
    letters = [tokenizer.encode_text(letter)[0] for letter in "abcdef"]
    cls, eos = tokenizer.cls_token_id, tokenizer.eos_token_id
    assert tokenizer("abcdef", truncation=True, max_length=5)["input_ids"] == [cls, *letters[3:], eos]
    assert tokenizer("abcdef", max_length=5)["input_ids"] == [cls, *letters[3:], eos]
    right = load(folders, "gpt2", truncation_side="right")
    assert right("abcdef", truncation=True, max_length=5)["input_ids"] == [cls, *letters[:3], eos]
    batch = tokenizer(["a", "abc"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[cls, letters[0], eos, eos, eos], [cls, *letters[:3], eos]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert tokenizer(["a", "abc"], padding=True, padding_side="left")["attention_mask"][0] == [0, 0, 1, 1, 1]
    assert load(folders, "gpt2", padding_side="left")(["a", "abc"], padding=True)["attention_mask"][0][0] == 0
    assert len(tokenizer("a", padding="max_length", max_length=9)["input_ids"]) == 9
    assert tokenizer("a", return_tensors="pt")["input_ids"].shape == (1, 3)
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}
    padded = tokenizer.pad([tokenizer("a"), tokenizer("abc")], return_tensors="pt")
    assert torch.equal(padded["input_ids"], batch["input_ids"])


def test_what_is_not_done_is_refused(folders: dict[str, Path]) -> None:
    tokenizer = load(folders, "gpt2")
    with pytest.raises(UsageError, match="return_offsets_mapping"):
        tokenizer("a", return_offsets_mapping=True)
    with pytest.raises(UsageError, match="no pairs"):
        tokenizer("a", "b")
    with pytest.raises(UsageError, match="no room"):
        tokenizer("a", truncation=True, max_length=1)
    with pytest.raises(TokenizerError, match=r"surrogate U\+D800"):
        tokenizer("a\ud800")
    with pytest.raises(UsageError, match="style='fast'"):
        load(folders, "gpt2", style="fast")


def test_the_prompt_of_filling(folders: dict[str, Path]) -> None:
    """As generate_samples.py writes it: a mask is appended, and eos unless the text ends in [gMASK]."""
    tokenizer = load(folders, "gpt2")
    cls, eos, word = tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.encode_text("hello")
    assert tokenizer.fill_prompt("hello") == [cls, *word, tokenizer.gmask_token_id]
    assert tokenizer.fill_prompt("hello[gMASK]") == [cls, *word, tokenizer.gmask_token_id]
    assert tokenizer.fill_prompt("[MASK] hello") == [cls, tokenizer.mask_token_id, *word, eos]
    assert tokenizer.fill_prompt("[gMASK]hello") == [cls, tokenizer.gmask_token_id, *word, eos]
    bert = load(folders, "bert")
    assert bert.fill_prompt("hello") == [2, 5, 4, 0]
    with pytest.raises(TokenizerError, match=r"this vocabulary has \[MASK\]"):
        bert.fill_prompt("hello [gMASK]")


# --- model inputs ---


@pytest.mark.parametrize("name", ["seq2seq_rightpad", "seq2seq_leftpad", "generate_rightpad", "generate_leftpad"])
def test_inputs_for_filling_are_the_official_ones(name: str) -> None:
    stored = BUILDERS["cases"][name]
    arrays = stored["arrays"]
    encoded = {key: torch.tensor(arrays[f"enc_{key}"]) for key in ("input_ids", "attention_mask")}
    targets = None
    if name.startswith("seq2seq"):
        targets = eval(stored["note"].split("targets ")[1].split(";")[0])  # a list of strings in the note
    width = 8 if targets else 12
    built = generation_inputs(WordIds(), encoded, width, targets, False)
    assert {key: value.tolist() for key, value in built.items()} == {
        key: value for key, value in arrays.items() if not key.startswith("enc_")
    }


def test_inputs_for_choosing_are_the_official_ones() -> None:
    arrays = BUILDERS["cases"]["multiple_choice"]["arrays"]
    encoded = {key: torch.tensor(arrays[f"enc_{key}"]) for key in ("input_ids", "attention_mask")}
    choices = [[" ".join(map(str, arrays[f"choice_ids.{row}.{one}"])) for one in range(3)] for row in range(2)]
    built = multiple_choice_inputs(WordIds(), encoded, choices, None)
    for key in ("input_ids", "position_ids", "attention_mask"):
        assert built[key].tolist() == arrays[key]
    for key in ("choice_ids", "choice_indices"):
        found = {
            f"{key}.{row}.{one}": ids.tolist() for row, all_ in enumerate(built[key]) for one, ids in enumerate(all_)
        }
        assert found == {name: value for name, value in arrays.items() if name.startswith(f"{key}.")}


def test_long_targets_and_padding_to_the_limit(folders: dict[str, Path]) -> None:
    tokenizer = load(folders, "gpt2")
    encoded = tokenizer(["a [MASK]", "b[MASK]c"], padding=True, return_tensors="pt")
    short = tokenizer.build_inputs_for_generation(encoded, targets=["abc", "d"], max_gen_length=3)
    a, b, c, d = (tokenizer.encode_text(letter)[0] for letter in "abcd")
    width = encoded["input_ids"].shape[1]
    assert short["labels"][:, width:].tolist() == [[a, b, c], [d, tokenizer.eop_token_id, -100]]  # eop is cut off
    assert short["input_ids"][0, width:].tolist() == [tokenizer.sop_token_id, a, b]
    assert short["input_ids"][1, width : width + 2].tolist() == [tokenizer.sop_token_id, d]
    whole = tokenizer.build_inputs_for_generation(encoded, targets=["abc", "d"], max_gen_length=7, padding=True)
    assert whole["labels"].shape == (2, width + 7)
    assert tokenizer.build_inputs_for_generation(tokenizer("x[MASK]", return_tensors="pt"), targets="abc")[
        "labels"
    ].shape == (1, 4 + 4)


def test_a_row_without_a_mask_is_named(folders: dict[str, Path]) -> None:
    tokenizer = load(folders, "gpt2")
    encoded = tokenizer(["a[MASK]", "bbb", "c[gMASK]", "d"], padding=True, return_tensors="pt")
    with pytest.raises(TokenizerError, match="in row 1, 3"):
        tokenizer.build_inputs_for_generation(encoded)
    with pytest.raises(TokenizerError, match="in row 1, 2, 3"):  # choosing looks for [MASK] only
        tokenizer.build_inputs_for_multiple_choice(encoded, [["x"]] * 4)
    with pytest.raises(UsageError, match="2 targets for 4 rows"):
        tokenizer.build_inputs_for_generation(encoded, targets=["a", "b"])
    good = tokenizer(["a[MASK]"], return_tensors="pt")
    with pytest.raises(UsageError, match="expected at least one"):
        tokenizer.build_inputs_for_multiple_choice(good, [["x", ""]])
    with pytest.raises(UsageError, match="row 0 has 6 tokens"):
        tokenizer.build_inputs_for_multiple_choice(good, [["x", "y"]], max_length=5)
    with pytest.raises(UsageError, match="choices has 2 rows"):
        tokenizer.build_inputs_for_multiple_choice(good, [["x"], ["y"]])


# --- files ---


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_saved_copied_and_pickled_it_is_the_same(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    tokenizer = load(folders, kind, style="original", task_mask=True, decoder_mask=True, padding_side="left")
    tokenizer.save_pretrained(tmp_path)
    assert glm_tokenizer_class(tmp_path) is CLASSES[kind]
    text = "hello [sMASK] wörld, 你好[dBLOCK]"
    for other in (
        CLASSES[kind].from_pretrained(tmp_path),
        copy.deepcopy(tokenizer),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert other.encode(text) == tokenizer.encode(text)
        assert (other.style, other.padding_side, len(other)) == ("original", "left", len(tokenizer))
    again = tmp_path / "again"
    CLASSES[kind].from_pretrained(tmp_path).save_pretrained(again)
    for path in tmp_path.iterdir():
        assert path == again or (again / path.name).read_bytes() == path.read_bytes()
    for name, data in tokenizer.vocabulary.files.items():
        assert data == (folders[kind] / name).read_bytes()


def test_the_training_repositorys_file_names(folders: dict[str, Path], tmp_path: Path) -> None:
    renamed = {"gpt2": "gpt2", "roberta": "roberta"}
    for kind, prefix in renamed.items():
        folder = tmp_path / kind
        folder.mkdir()
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(folders[kind] / name, folder / f"{prefix}-{name}")
        assert glm_tokenizer_class(folder) is CLASSES[kind]
        assert CLASSES[kind].from_pretrained(folder).encode("hello") == load(folders, kind).encode("hello")
    shutil.copy(folders["bert"] / "vocab.txt", tmp_path / "bert-large-uncased-vocab.txt")
    assert glm_tokenizer_class(tmp_path) is GLMBertTokenizer


def test_folders_that_are_none(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no vocabulary of GLM"):
        glm_tokenizer_class(tmp_path)
    with pytest.raises(TokenizerError, match=r"vocab\.txt is missing"):
        GLMBertTokenizer.from_pretrained(tmp_path)
    shutil.copy(folders["bert"] / "vocab.txt", tmp_path)
    shutil.copy(folders["chinese"] / "cog-pretrain.model", tmp_path)
    with pytest.raises(TokenizerError, match="more than one vocabulary"):
        glm_tokenizer_class(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"[gMASK]": 7, "[MASK]": 223}')
    with pytest.raises(TokenizerError, match=r"\[gMASK\] is 7 and not 229"):
        GLMChineseTokenizer.from_pretrained(tmp_path)


def test_broken_and_foreign_files(folders: dict[str, Path], tmp_path: Path) -> None:
    foreign = chinese_files(tmp_path / "identity", normalization_rule_name="identity")
    with pytest.raises(TokenizerError, match="the normaliser is identity or keeps blanks, expected nmt_nfkc"):
        GLMChineseTokenizer.from_pretrained(foreign)
    unigram = chinese_files(tmp_path / "unigram", model_type="unigram", vocab_size=100, hard_vocab_limit=False)
    with pytest.raises(TokenizerError, match="UNIGRAM, expected BPE"):
        GLMChineseTokenizer.from_pretrained(unigram)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "cog-pretrain.model").write_bytes((folders["chinese"] / "cog-pretrain.model").read_bytes()[:-9])
    with pytest.raises(TokenizerError, match="truncated or no SentencePiece file"):
        GLMChineseTokenizer.from_pretrained(cut)
    (tmp_path / "vocab.txt").write_text("hello\nworld\n")
    with pytest.raises(TokenizerError, match=r"lacks \[PAD\], \[UNK\]"):
        GLMBertTokenizer.from_pretrained(tmp_path)
    mixed = byte_files(tmp_path / "mixed")
    with (mixed / "merges.txt").open("a", encoding="utf-8") as file:
        file.write("q q\n")
    with pytest.raises(TokenizerError, match="do not belong together"):
        GLMGPT2Tokenizer.from_pretrained(mixed)
    (mixed / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(TokenizerError, match="the line 'a b c'"):
        GLMGPT2Tokenizer.from_pretrained(mixed)
    (mixed / "vocab.json").write_text('{"a": 0, "b": 5}')
    with pytest.raises(TokenizerError, match="without gaps"):
        GLMGPT2Tokenizer.from_pretrained(mixed)
    with pytest.raises(TokenizerError, match="lacks </s>, <s>, <mask>, <unk>"):
        GLMRobertaTokenizer.from_pretrained(folders["gpt2"])
    outside = tmp_path / "link"
    outside.mkdir()
    (outside / "vocab.txt").symlink_to(folders["bert"] / "vocab.txt")
    with pytest.raises(TokenizerError, match="link out of its folder"):
        GLMBertTokenizer.from_pretrained(outside)
