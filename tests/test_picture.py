"""Pictures of masks and positions: the numbers by hand for each family, and the pixels that they become."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import official
import official_families
import tiny_families
from glmkit import cli
from glmkit.errors import MissingDependencyError, UsageError
from glmkit.families import FAMILIES
from glmkit.picture import drawing
from glmkit.picture.drawing import draw
from glmkit.picture.scene import MOST_TOKENS, Scene, as_text, describe


@pytest.fixture(autouse=True)
def no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No released model is on this machine."""
    import huggingface_hub.constants as constants

    monkeypatch.delenv("GLMKIT_MODELS", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def seen(scene: Scene) -> list[str]:
    return ["".join(".#"[visible] for visible in row) for row in scene.visible]


def glm(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


# --- prompts, by hand ---


def test_chatglm_6b_reads_the_question_in_both_directions() -> None:
    scene = describe("chatglm-6b", "你好", answer_tokens=2)
    assert scene.tokens == ("你", "好", "[gMASK]", "<sop>", "y1", "y2")
    assert scene.ids == (None, None, 130_001, 130_004, None, None)
    assert scene.parts == ("A", "A", "A", "B", "B", "B")
    assert scene.spans == (0, 0, 1, 1, 1, 1)
    assert scene.positions == ((0, 1, 2, 2, 2, 2), (0, 0, 0, 1, 2, 3))
    assert seen(scene) == ["###...", "###...", "###...", "####..", "#####.", "######"]


def test_glm_fills_its_first_blank_at_the_position_of_the_mask() -> None:
    scene = describe("glm-10b", "a[MASK]b[sMASK]", answer_tokens=2)
    assert scene.tokens == ("[CLS]", "a", "[MASK]", "b", "[sMASK]", "<eos>", "<sop>", "y1", "y2")
    assert scene.positions == ((0, 1, 2, 3, 4, 5, 2, 2, 2), (0, 0, 0, 0, 0, 0, 1, 2, 3))
    assert scene.spans == (0, 0, 1, 0, 0, 0, 1, 1, 1)
    assert seen(scene) == ["######..."] * 6 + ["#######..", "########.", "#########"]


def test_glm_ends_a_text_unless_it_goes_on() -> None:
    assert describe("glm-10b", "a[gMASK]", answer_tokens=1).tokens == ("[CLS]", "a", "[gMASK]", "<sop>", "y1")
    assert describe("glm-10b", "a[MASK]", answer_tokens=1).tokens == ("[CLS]", "a", "[MASK]", "<eos>", "<sop>", "y1")


@pytest.mark.parametrize(
    ("text", "tokens", "positions"),
    [
        ("a[MASK]b", ("a", "[MASK]", "b", "<eos>", "<sop>", "y1", "y2"), (0, 1, 2, 3, 1, 1, 1)),
        ("ab", ("a", "b", "[gMASK]", "<sop>", "y1", "y2"), (0, 1, 2, 3, 4, 5)),
        ("a[sMASK]", ("a", "[sMASK]", "<sop>", "y1", "y2"), (0, 1, 1, 1, 1)),
    ],
)
def test_glm_130b_has_one_row_that_counts_on_behind_gmask_only(
    text: str, tokens: tuple[str, ...], positions: tuple[int, ...]
) -> None:
    scene = describe("glm-130b", text, answer_tokens=2)
    assert scene.tokens == tokens
    assert scene.positions == (positions,)
    start, size = tokens.index("<sop>"), len(tokens)
    assert scene.parts == ("A",) * start + ("B",) * (size - start)
    assert seen(scene) == ["#" * max(start, row + 1) + "." * (size - max(start, row + 1)) for row in range(size)]


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("glm-4-9b-chat", ["[gMASK]", "<sop>", "<|user|>", "\\n", "h", "i", "<|assistant|>"]),
        ("glm-4-9b", ["[gMASK]", "<sop>", "h", "i"]),
        ("chatglm3-6b", ["[gMASK]", "<sop>", "<|user|>", "\\n", "h", "i", "<|assistant|>"]),
        ("chatglm2-6b", ["[gMASK]", "<sop>", *"[Round·1]", "\\n", "\\n", *"问：hi", "\\n", "\\n", *"答："]),
        ("codegeex2-6b", ["[gMASK]", "<sop>", "h", "i"]),
    ],
)
def test_later_models_see_only_what_came_before(name: str, prompt: list[str]) -> None:
    scene = describe(name, "hi", answer_tokens=2)
    size = len(prompt) + 2
    assert scene.tokens == (*prompt, "y1", "y2")
    assert scene.parts == ("prompt",) * len(prompt) + ("answer",) * 2
    assert scene.positions == (tuple(range(size)),)
    assert seen(scene) == ["#" * row + "." * (size - row) for row in range(1, size + 1)]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_has_a_picture(family: object) -> None:
    scene = describe(family.name, "ab[MASK]cd")  # type: ignore[attr-defined]
    size = len(scene.tokens)
    assert {len(scene.ids), len(scene.parts), len(scene.spans), len(scene.visible)} == {size}
    assert all(len(row) == size for row in (*scene.positions, *scene.visible))
    assert scene.tokens[-4:] == ("y1", "y2", "y3", "y4")
    assert len(scene.positions) == (2 if family.architecture in ("chatglm", "glm") else 1)  # type: ignore[attr-defined]


# --- prompts with tokenizers of small folders ---


def test_a_folder_of_chatglm_6b(tmp_path: Path) -> None:
    folder = tiny_families.write_chatglm(tmp_path / "model")
    scene = describe(str(folder), "rice", answer_tokens=1)
    assert scene.tokens[-3:] == ("[gMASK]", "<sop>", "y1")
    config = json.loads((folder / "config.json").read_text())
    assert scene.ids[-3:] == (config["gmask_token_id"], config["bos_token_id"], None)
    context = len(scene.tokens) - 2
    assert scene.positions[0] == (*range(context), context - 1, context - 1)
    assert scene.positions[1] == (*[0] * context, 1, 2)


def test_a_folder_of_glm_4_shows_parts_of_characters_by_their_ids(tmp_path: Path) -> None:
    scene = describe(str(tiny_families.write_glm4(tmp_path / "model")), "a 你", answer_tokens=0)
    head = ("[gMASK]", "<sop>", "<|user|>", "\\n")
    assert scene.tokens == (*head, "a", "·", "#228", "#189", "#160", "<|assistant|>")
    assert scene.ids == (258, 260, 263, 10, 97, 32, 228, 189, 160, 264)


def test_a_folder_of_glm(tmp_path: Path) -> None:
    folder = str(tiny_families.write_glm(tmp_path / "model"))
    scene = describe(folder, "beijing is the [MASK] of china", answer_tokens=1)
    words = ("[CLS]", "beijing", "is", "the", "[MASK]", "of", "china", "[PAD]", "<|startofpiece|>", "y1")
    assert scene.tokens == words
    assert scene.positions == ((0, 1, 2, 3, 4, 5, 6, 7, 4, 4), (0, 0, 0, 0, 0, 0, 0, 0, 1, 2))


@pytest.mark.parametrize("form", ["glm-130b", "glm-130b, 2 ranks"])
def test_a_folder_of_glm_130b(form: str, tmp_path: Path) -> None:
    family = next(one for one in official_families.FAMILIES if one.name == form)
    official_families.write_family(tmp_path / "model", family)
    scene = describe(str(tmp_path / "model"), "hello [MASK]", answer_tokens=1)
    context = len(scene.tokens) - 2
    assert scene.tokens[context - 1 :] == ("[MASK]", "sop", "y1")
    assert scene.positions == ((*range(context), context - 1, context - 1),)


def test_a_folder_of_chatglm2_names_its_control_tokens(tmp_path: Path) -> None:
    tokenizer = official.train_tokenizer(tmp_path / "tokenizer.model")
    folder = official.write_folder(tmp_path / "model", 2, tokenizer=tokenizer)
    scene = describe(str(folder), "hi", answer_tokens=1)
    assert scene.tokens[:2] == ("[gMASK]", "sop")


def test_the_built_in_model() -> None:
    scene = describe("glm-nano", "hi", answer_tokens=1)
    assert scene.tokens[:3] == ("[gMASK]", "sop", "<|user|>")
    assert scene.tokens[-2:] == ("<|assistant|>", "y1")
    assert None not in scene.ids[:-1]


# --- pre-training, GLM alone ---


def test_a_text_with_one_place_for_a_span() -> None:
    scene = describe("glm-2b", "a")
    assert scene.original == (("[CLS]", 0), ("a", 1), ("<eos>", 0))
    assert scene.tokens == ("[CLS]", "[MASK]", "<eos>", "<sop>", "a")
    assert scene.parts == ("A", "A", "A", "B", "B")
    assert scene.spans == (0, 1, 0, 1, 1)
    assert scene.positions == ((0, 1, 2, 1, 1), (0, 0, 0, 1, 2))
    assert seen(scene) == ["###..", "###..", "###..", "####.", "#####"]


@pytest.mark.parametrize("seed", range(20))
def test_spans_are_cut_out_of_a_text_and_written_behind_it(seed: int) -> None:
    text = "the quick brown fox jumps over"
    scene = describe("glm-large", text, seed=seed)
    letters = [token.replace("·", " ") for token, _ in scene.original]
    assert "".join(letters[1:-1]) == text
    # Part A, the rows of positions and part B once more, from the spans of the original alone.
    part_a: list[str] = []
    blanks: dict[int, int] = {}
    filled: dict[int, list[str]] = {}
    for token, span in scene.original:
        if span and span not in blanks:
            blanks[span] = len(part_a)
            part_a.append("[MASK]")
        if span:
            filled.setdefault(span, []).append(token)
        else:
            part_a.append(token)
    tokens, first, second, spans = list(part_a), list(range(len(part_a))), [0] * len(part_a), [0] * len(part_a)
    for span, column in blanks.items():
        spans[column] = span
    for span in sorted(filled):
        tokens += ["<sop>", *filled[span]]
        first += [blanks[span]] * (len(filled[span]) + 1)
        second += range(1, len(filled[span]) + 2)
        spans += [span] * (len(filled[span]) + 1)
    assert scene.tokens == tuple(tokens)
    assert scene.positions == (tuple(first), tuple(second))
    assert scene.spans == tuple(spans)
    size, a = len(tokens), len(part_a)
    assert seen(scene) == ["#" * max(a, row + 1) + "." * (size - max(a, row + 1)) for row in range(size)]
    assert sum(map(len, filled.values())) >= int(0.15 * len(scene.original))


def test_the_seed_chooses_the_spans() -> None:
    text = "the quick brown fox jumps over"
    assert describe("glm-large", text, seed=1) == describe("glm-large", text, seed=1)
    assert len({describe("glm-large", text, seed=seed).tokens for seed in range(5)}) > 1


# --- limits ---


def test_at_most_64_tokens() -> None:
    assert len(describe("codegeex2-6b", "x" * 58).tokens) == MOST_TOKENS == 64
    with pytest.raises(UsageError, match=r"65 tokens.*at most 64"):
        describe("codegeex2-6b", "x" * 59)
    with pytest.raises(UsageError, match=r"65 tokens.*at most 64"):
        describe("glm-2b", "x" * 65)
    with pytest.raises(UsageError, match="both parts together"):
        describe("glm-2b", "x" * 64)


def test_unknown_names_and_empty_texts() -> None:
    with pytest.raises(UsageError, match="nonsense"):
        describe("nonsense", "hi")
    with pytest.raises(UsageError, match="empty"):
        describe("glm-nano", " \n")


# --- the picture ---


def colour(pixel: tuple[int, ...]) -> str:
    return "#" + "".join(f"{channel:02x}" for channel in pixel[:3])


@pytest.mark.parametrize(("name", "text"), [("chatglm-6b", "ab"), ("glm-130b", "a[MASK]b"), ("glm-4-9b", "ab")])
def test_the_cells_of_the_matrix_have_the_colours_of_what_is_seen(name: str, text: str, tmp_path: Path) -> None:
    scene = describe(name, text)
    assert draw(scene, tmp_path / "mask.png") == ()
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = Image.open(tmp_path / "mask.png").convert("RGB")
    size, rows = len(scene.tokens), len(scene.positions)
    first, answer, unseen = "#9ecae8", "#f4b678", "#f5f5f5"
    coloured = [
        (x, y) for y in range(picture.height) for x in range(picture.width) if colour(picture.getpixel((x, y))) == first
    ]
    left, top = min(x for x, _ in coloured), min(y for _, y in coloured)

    def cell(row: float, column: int) -> str:
        return colour(picture.getpixel((left + 25 * column + 4, int(top + 25 * row) + 4)))

    for row in range(size):
        for column in range(size):
            wanted = answer if scene.parts[column] in ("B", "answer") else first
            assert cell(row, column) == (wanted if scene.visible[row][column] else unseen), (row, column)
    for row in range(rows):
        assert [cell(size + 0.5 + row, column) for column in range(size)] == [
            answer if span else first for span in scene.spans
        ]
    dark = sum(sum(picture.getpixel((x, y))) < 200 for y in range(top) for x in range(left, picture.width))
    assert dark > 20 * size  # the tokens stand above their columns


def test_spans_of_pre_training_have_colours_of_their_own(tmp_path: Path) -> None:
    scene = describe("glm-large", "the quick brown fox jumps over", seed=0)
    assert max(scene.spans) >= 2
    draw(scene, tmp_path / "spans.png")
    picture = Image.open(tmp_path / "spans.png").convert("RGB")
    found = {colour(pixel) for _, pixel in picture.getcolors(1 << 24)}
    assert {"#9ecae8", "#f4b678", "#a5d68f", "#e4e4e4", "#f5f5f5"} <= found


def test_what_no_font_can_write_is_shown_by_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drawing, "_FONTS", "")
    assert draw(describe("chatglm-6b", "a你$b"), tmp_path / "a.png") == ("你",)
    code, out, err = glm(capsys, "inspect", "chatglm-6b", "--text", "你", "--picture", str(tmp_path / "b.png"))
    assert (code, out) == (0, "")
    assert err == (
        f"no font on this machine can write 你; the picture has ids in their place\nwritten to {tmp_path / 'b.png'}\n"
    )


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="matplotlib") as caught:
        draw(describe("glm-nano", "hi"), tmp_path / "a.png")
    assert caught.value.hint == 'pip install "glmkit[train]"'
    assert list(tmp_path.glob("*.png")) == []


# --- lines and JSON ---


def test_in_lines() -> None:
    assert as_text(describe("glm-130b", "a[MASK]", answer_tokens=1)).splitlines() == [
        "glm-130b (not on this machine: every character is a token)",
        "       id  part  row 0  sees  token",
        "0       -     A      0  ##..  a",
        "1  150000   A 1      1  ##..  [MASK]",
        "2  150004   B 1      1  ###.  <sop>",
        "3       -   B 1      1  ####  y1",
    ]
    assert as_text(describe("glm-2b", "a")).splitlines()[1] == "text: [CLS] [1:a] <eos>"


def test_the_command_prints_what_it_would_draw(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = glm(capsys, "inspect", "glm-large", "--text", "hello world", "--seed", "3")
    assert (code, err) == (0, "")
    assert out == as_text(describe("glm-large", "hello world", seed=3)) + "\n"
    code, out, _ = glm(capsys, "inspect", "chatglm-6b", "--text", "a", "--json")
    found = json.loads(out)
    assert (code, found["schema"], found["tokens"][:3]) == (0, 1, ["a", "[gMASK]", "<sop>"])
    assert found["positions"] == [[0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 2, 3, 4, 5]]


def test_a_picture_needs_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = glm(capsys, "inspect", "glm-nano", "--picture", "mask.png")
    assert (code, out) == (2, "")
    assert "--text" in err
    assert not Path("mask.png").exists()
