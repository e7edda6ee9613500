"""The pages on the networks and on migration: what they name exists, figures are those of the code, examples run."""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch

import tiny_families
from glmkit import cli
from glmkit.families import find_family
from glmkit.inspection import released_config
from glmkit.models.prefix_lm import two_row_positions
from glmkit.registration import LANGUAGE_MODELS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path for path in (ROOT / "docs" / "models").glob("*.md") if not path.name.endswith(".zh.md"))
PACKAGE = ROOT / "src" / "glmkit"
NUMBER = r"(\d[\d,]*(?:\.\d+)?)"

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@cache
def names(path: Path) -> set[str]:
    """Names at the top of a module, and `Class.name` of what its classes hold."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            inner = [child for child in node.body if isinstance(child, (ast.FunctionDef, ast.AnnAssign))]
            found |= {f"{node.name}.{getattr(child, 'name', None) or child.target.id}" for child in inner}  # type: ignore[union-attr]
    return found


def number(text: str) -> float:
    return float(text.replace(",", ""))


# --- what is named exists ---


@pages
def test_references_into_the_code_hold(page: Path) -> None:
    references = re.findall(r"`([\w/]+\.py): ([\w.]+)`", page.read_text(encoding="utf-8"))
    assert [f"{file}: {name}" for file, name in references if name not in names(PACKAGE / file)] == []
    files = re.findall(r"`([\w/]+\.py)`", page.read_text(encoding="utf-8"))
    assert [file for file in files if not (PACKAGE / file).is_file()] == []
    assert references or page.stem == "README"


@pages
def test_every_step_of_a_page_says_where_it_stands(page: Path) -> None:
    rows, where = 0, None
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            where = None
        elif "where" in cells:
            where = cells.index("where")
        elif where is not None and not set(cells[0]) <= {"-"}:
            rows += 1
            assert re.match(r"`[\w/]+\.py: ", cells[where]), line
    assert rows or page.stem == "README"


@pages
def test_links_and_pictures_hold(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        target = page.parent / link
        assert target.is_file(), link
        if target.suffix == ".png":
            assert target.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
            assert target.stat().st_size < 40_000


@pages
def test_commands_of_a_page_work(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.delenv("GLMKIT_MODELS", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    commands = re.findall(r"`(glm inspect [^`\n]+)`", text)
    commands += [line for line in text.splitlines() if line.startswith("glm inspect")]
    for command in commands:
        if "MODEL" in command:
            continue
        assert cli.run(shlex.split(command, comments=True)[1:]) == 0, command
        printed = capsys.readouterr()
        drawn = re.search(r"--picture (\S+)", command)
        assert (tmp_path / drawn[1]).is_file() if drawn else printed.out


# --- figures ---


def sizes_of(name: str) -> tuple[int, int, int]:
    """Parameters, context in tokens, and bytes of 1,000 tokens in a float16 cache: from tensors and config."""
    family = find_family(name)
    assert family is not None, name
    config = released_config(family)
    with torch.device("meta"):
        model = LANGUAGE_MODELS[type(config)](config)
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    parameters = sum(prod(tensor.shape) for key, tensor in model.state_dict().items() if key not in tied)
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return parameters, family.context_tokens, 1_000 * 2 * row


def test_the_table_of_sizes() -> None:
    text = (ROOT / "docs" / "models" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| `([\w-]+)` \| {NUMBER} (\w+) \| {NUMBER} \| {NUMBER} MB \|$", text, re.MULTILINE)
    assert len(rows) == 15
    for name, parameters, unit, context, megabytes in rows:
        wanted, tokens, cache_bytes = sizes_of(name)
        factor, digits = {"million": (10**6, 0), "billion": (10**9, 2)}[unit]
        assert (number(parameters), name) == (round(wanted / factor, digits), name)
        assert (number(context), name) == (tokens, name)
        assert (number(megabytes), name) == (round(cache_bytes / 10**6, 1), name)


@pytest.mark.parametrize("name", ["glm-130b", "chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"])
def test_the_sizes_on_a_page(name: str) -> None:
    page = ROOT / "docs" / "models" / f"{name.removesuffix('-chat')}.md"
    head = page.read_text(encoding="utf-8").split("\n## ")[0].replace("\n", " ")
    family = find_family(name)
    assert family is not None
    config = released_config(family)
    said = {
        pattern: [number(value) for value in re.findall(pattern, head)]
        for pattern in (
            rf"{NUMBER} layers",
            rf"hidden size {NUMBER}(?=[,. ])",
            rf"vocabulary {NUMBER}",
            rf"context {NUMBER}",
            rf"{NUMBER} billion",
        )
    }
    wanted = [
        config.num_hidden_layers,
        config.hidden_size,
        config.vocab_size,
        family.context_tokens,
        round(sizes_of(name)[0] / 10**9, 2),
    ]
    assert list(said.values()) == [[value] for value in wanted]
    for heads, width in re.findall(rf"{NUMBER} (?:query )?heads of {NUMBER}", head):
        assert (number(heads), number(width)) == (config.num_attention_heads, config.head_dim)
    for inner in re.findall(rf"inner width {NUMBER}(?=[,. ])", head):
        assert number(inner) == config.intermediate_size


def test_groups_rotary_bases_and_epsilons() -> None:
    config, long = (released_config(find_family(name)) for name in ("glm-4-9b-chat", "glm-4-9b-chat-1m"))  # type: ignore[arg-type]
    assert config.rotary_base_and_scale() == (5_000_000, 1)
    assert long.rotary_base_and_scale() == (100_000_000, 1)
    assert (config.multi_query_group_num, long.multi_query_group_num) == (2, 4)
    assert config.layernorm_epsilon == long.layernorm_epsilon == 1.5625e-7
    short = released_config(find_family("chatglm2-6b-32k"))  # type: ignore[arg-type]
    assert short.rotary_base_and_scale() == (10_000, 16)
    assert round(released_config(find_family("glm-130b")).residual_scale, 2) == 11.83  # type: ignore[arg-type]


# --- worked examples ---


def example(page: str) -> tuple[list[str], list[int], list[int]]:
    text = (ROOT / "docs" / "models" / page).read_text(encoding="utf-8")
    found = re.search(r"^    tokens +(.+)\n    row 0 +(.+)\n    row 1 +(.+)$", text, re.MULTILINE)
    assert found is not None
    tokens, first, second = (line.replace("|", " ").split() for line in found.groups())
    return tokens, list(map(int, first)), list(map(int, second))


def test_the_positions_of_the_prompt_of_chatglm_6b() -> None:
    tokens, first, second = example("chatglm-6b.md")
    columns, at = torch.arange(len(tokens)), torch.tensor
    context, mask = tokens.index("<sop>"), tokens.index("[gMASK]")
    assert two_row_positions(columns, at([context]), at([mask]), at([0]))[0].tolist() == [first, second]


def test_the_positions_of_the_text_of_glm() -> None:
    tokens, first, second = example("glm.md")
    text = "the quick brown fox jumps over the lazy dog".split()
    start = tokens.index("<sop>")
    part_a, spans = tokens[:start], " ".join(tokens[start:]).split("<sop> ")[1:]
    masks = [column for column, token in enumerate(part_a) if token == "[MASK]"]
    fillings = dict(zip(reversed(masks), (span.split() for span in spans)))  # the last blank is written first
    assert [word for column, token in enumerate(part_a) for word in fillings.get(column, [token])] == text
    expected = [(column, 0) for column in range(start)]
    for column, filling in fillings.items():
        expected += [(column, number) for number in range(1, len(filling) + 2)]
    assert list(zip(first, second)) == expected


# --- moving from the official repositories ---


def test_the_python_examples_of_the_migration_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_families.write_chatglm(tmp_path / "chatglm-6b")
    tiny_families.write_glm(tmp_path / "glm-10b")
    monkeypatch.setenv("GLMKIT_MODELS", str(tmp_path))
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self.float())
    text = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    for code in blocks:
        exec(re.sub(r'"THUDM/([\w-]+)"', rf'"{tmp_path}/\1"', code), {})
