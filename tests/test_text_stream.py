"""Streaming text: the pieces add up to the whole, characters stay whole, stop strings stop."""

from __future__ import annotations

import itertools
import random

import pytest

from glmkit.errors import UsageError
from glmkit.runtime.text import StopText, TextStream

WORDS = [
    "你好",
    "世界",
    " ",
    "  ",
    "a",
    " the",
    " cat",
    "\n",
    "😀",
    "👩‍👩‍👧",
    "é",
    "上衣",
    "#",
    "风格",
    "，",
    " 1",
    "\t",
    "𝄞",
]


class ByteFallback:
    """A toy SentencePiece: pieces from `vocabulary`, bytes for the rest, one leading space dropped.

    As in SentencePiece, each byte of an incomplete character becomes one U+FFFD. Ids: 0-255 bytes, then pieces, then
    one special that decodes to nothing and one that decodes to its name.
    """

    def __init__(self, vocabulary):
        self.pieces = list(vocabulary)
        self.nothing = 256 + len(self.pieces)
        self.named = self.nothing + 1
        self.decoded = 0

    def encode(self, text):
        ids, rest = [], " " + text
        while rest:
            piece = max((p for p in self.pieces if rest.startswith(p)), key=len, default=None)
            ids += list(rest[0].encode()) if piece is None else [256 + self.pieces.index(piece)]
            rest = rest[len(piece or rest[0]) :]
        return ids

    def decode(self, ids):
        self.decoded += len(ids)
        raw = b"".join(
            bytes([i])
            if i < 256
            else b""
            if i == self.nothing
            else b"<|user|>"
            if i == self.named
            else self.pieces[i - 256].encode()
            for i in ids
        )
        text = raw.decode(errors="surrogateescape")
        text = "".join("\ufffd" if "\udc80" <= c <= "\udcff" else c for c in text)
        return text.removeprefix(" ")


TOY = ByteFallback([" ", "  ", "▁", " the", " cat", "a", "你好", "好", "衣", "<", "\n", "#", " a", "cat", "st", "op"])


def random_text(dice, words=WORDS):
    return "".join(dice.choice(words) for _ in range(dice.randrange(40)))


def pieces(ids, decode=TOY.decode, stop=()):
    stream = TextStream(decode, stop)
    return [*(stream.push(token) for token in ids), stream.finish()], stream


def test_pieces_add_up_to_the_whole():
    for seed in range(300):
        text = random_text(random.Random(seed))
        ids = TOY.encode(text)
        parts, _ = pieces(ids)
        assert "".join(parts) == TOY.decode(ids) == text
        assert not any("\ufffd" in part for part in parts)


def test_any_ids_add_up_to_the_whole():
    """Also ids that no encoder would give but a sampling model does: lone bytes, specials, spaces anywhere."""
    for seed in range(300):
        dice = random.Random(seed)
        kinds = [(0, 256), (256, TOY.named + 1), (256, 258)]  # bytes, pieces and specials, blanks
        ids = [dice.randrange(*dice.choice(kinds)) for _ in range(dice.randrange(80))]
        parts, _ = pieces(ids)
        assert "".join(parts) == TOY.decode(ids)


def test_a_space_survives_a_token_that_decodes_to_nothing():
    ids = [TOY.encode("a")[-1], *[TOY.nothing] * 3, *TOY.encode("the")] * 20
    assert "".join(pieces(ids)[0]) == TOY.decode(ids)


def test_a_decoder_that_drops_all_leading_blanks():
    for seed in range(300):
        dice = random.Random(seed)
        ids = TOY.encode(random_text(dice, [" ", " ", " the", "你好", "世", "a"]) * 2)
        parts, _ = pieces(ids, lambda ids: TOY.decode(ids).lstrip(" "))
        assert "".join(parts) == TOY.decode(ids).lstrip(" ")


def test_a_decoder_that_gives_up_a_whole_run_of_bytes():
    """As the `tokenizers` library does: one incomplete character makes all bytes next to it unreadable for a while."""

    def decode(ids):
        runs = [(is_byte, list(run)) for is_byte, run in itertools.groupby(ids, lambda token: token < 256)]
        texts = []
        for is_byte, run in runs:
            try:
                texts.append(bytes(run).decode() if is_byte else "".join(TOY.pieces[token - 256] for token in run))
            except UnicodeDecodeError:
                texts.append("\ufffd" * len(run))
        return "".join(texts).removeprefix(" ")

    for seed in range(100):
        text = random_text(random.Random(seed))
        assert "".join(pieces(TOY.encode(text), decode)[0]) == text


def test_a_character_after_a_long_run_of_lost_bytes():
    for lost in range(12, 24):
        ids = [*[0xFF] * lost, *TOY.encode("世界 the cat")]
        assert "".join(pieces(ids)[0]) == TOY.decode(ids)


def test_characters_come_whole_and_at_once():
    ids = TOY.encode("x世😀")
    assert ids == [256, ord("x"), *"世".encode(), *"😀".encode()]
    parts, _ = pieces(ids)
    assert parts == ["", "x", "", "", "世", "", "", "", "😀", ""]


def test_an_incomplete_character_is_given_out_at_the_end():
    parts, _ = pieces([97, *"世".encode()[:2]])
    assert parts == ["a", "", "", "\ufffd\ufffd"]


def test_bytes_that_can_never_be_a_character_do_not_wait_for_ever():
    stream = TextStream(TOY.decode)
    out = [stream.push(0xFF) for _ in range(10)]
    assert "".join(out) == "\ufffd" * 7, "only the last three can still be completed"
    assert stream.finish() == "\ufffd" * 3


def test_stop_strings():
    for seed in range(300):
        dice = random.Random(seed)
        text = random_text(dice, [*WORDS, "stop", "st", "sto", "<|", "<|user|>"])
        stop = dice.choice(["stop", "<|user|>", "世界", "\n\n", " the cat", "😀", "aa"])
        ids = TOY.encode(text)
        parts, stream = pieces(ids, stop=[stop])
        assert "".join(parts) == text.split(stop)[0]
        assert (stream.stopped == stop) == (stop in text)
        for count in range(len(parts)):
            assert stop not in "".join(parts[:count])


def test_nothing_of_a_stop_string_is_shown_before_it_is_sure():
    parts, stream = pieces([*b"ab sto", *b"re stop it"], stop=["stop", "###"])
    assert parts[:6] == ["a", "b", " ", "", "", ""]
    assert parts[6] == "stor"
    assert "".join(parts) == "ab store "
    assert stream.stopped == "stop"
    assert stream.push(ord("x")) == ""
    assert stream.finish() == ""


def test_what_was_held_for_a_stop_string_comes_at_the_end():
    parts, stream = pieces([*b"ab st"], stop=["stop"])
    assert "".join(parts) == "ab st"
    assert stream.stopped is None


def test_the_first_of_several_stop_strings_ends_the_text():
    assert "".join(pieces([*b"one two three"], stop=["three", "two"])[0]) == "one "


def up_to_a_stop(text, stop):
    """What is in front of the stop string that is complete first; and that string."""
    for end in range(len(text) + 1):
        ended = [word for word in stop if text[:end].endswith(word)]
        if ended:
            return text[: end - max(map(len, ended))], max(ended, key=len)
    return text, None


@pytest.mark.parametrize("cases", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_text_with_any_stop_strings(cases):
    """The stream is the whole; nothing of a stop string, no half character; what was held back comes at the end."""
    parts = [*WORDS, "กำ", "ที่", "नि", "á", "🏳️‍🌈", "st", "op", "ab", "abc", "bc"]
    stopped = 0
    for seed in range(cases):
        dice = random.Random(seed)
        text = random_text(dice, parts)
        pool = [text[i : i + dice.randrange(1, 6)] for i in range(0, len(text), 7)] + dice.sample(parts, 3) + ["stop"]
        stop = [word for word in dice.sample(pool, min(len(pool), dice.randrange(4))) if word]
        ids = TOY.encode(text)
        found, stream = pieces(ids, stop=stop)
        wanted, word = up_to_a_stop(text, stop)
        assert "".join(found) == wanted, (text, stop)
        assert stream.stopped == word
        assert not any("\ufffd" in part for part in found)
        for split in (1, 2, 5):  # nor does it matter how the text is cut into tokens
            cut = StopText(stop)
            assert "".join(cut.push(text[i : i + split]) for i in range(0, len(text), split)) + cut.finish() == wanted
        stopped += word is not None
    assert cases / 10 < stopped < cases


def test_a_thousand_stop_strings():
    words = [f"word{number}." for number in range(1000)]
    cut = StopText(words)
    assert "".join(cut.push(character) for character in "It ends with word777. and not here") == "It ends with "
    assert cut.stopped == "word777."


@pytest.mark.parametrize("stop", ["stop", [""], [3]])
def test_stop_must_be_a_list_of_strings(stop):
    with pytest.raises(UsageError, match="stop="):
        TextStream(TOY.decode, stop)


def test_cost_per_token_does_not_grow():
    ids = TOY.encode("你好 the cat 世界😀 " * 300)
    toy = ByteFallback(TOY.pieces)
    stream = TextStream(toy.decode)
    costs = []
    for token in ids:
        before = toy.decoded
        stream.push(token)
        costs.append(toy.decoded - before)
    assert len(ids) > 3000
    assert max(costs) < 64


@pytest.mark.parametrize("generation", [2, 3])
def test_the_official_tokenizer(shared, generation):
    tokenizers = pytest.importorskip("glmkit.tokenizers.chatglm2")
    file = shared / "tokenizers" / "chatglm2-chatglm3.tokenizer.model"
    tokenizer = tokenizers.ChatGLMTokenizer(file, generation=generation)
    dice = random.Random(0)
    for _ in range(100):
        ids = list(tokenizer.encode_text(random_text(dice)))
        assert "".join(pieces(ids, tokenizer.decode)[0]) == tokenizer.decode(ids)
    kinds = [(3, 259), (3, 64789), (64789, tokenizer.vocab_size), (30910, 30911)]  # bytes, all, specials, a space
    for _ in range(200):
        ids = [dice.randrange(*dice.choice(kinds)) for _ in range(60)]
        assert "".join(pieces(ids, tokenizer.decode)[0]) == tokenizer.decode(ids)
