"""What every exported folder carries so that `glmkit.runtime` can run it: vocabulary, chat format, layout, settings.

    folder/runtime/runtime.json                    what is said here
    folder/runtime/tokenizer.json | pieces.model   the vocabulary
    folder/runtime/prefix.npy                      P-Tuning's prefix, for ONNX

The chat format is not written here a second time. Its words are taken from `glmkit.chat.templates`, by asking for
prompts of messages that are easily found again; then prompts of many conversations are made both ways and compared
before anything is written into its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor

from glmkit.chat.blocks import Blocks
from glmkit.chat.choices import choose, official_sampling
from glmkit.chat.messages import ROLES, Message
from glmkit.chat.reply import reply_form
from glmkit.chat.rounds import Rounds
from glmkit.chat.templates import chat_format, prompt_ids
from glmkit.errors import OutputError
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.chatglm_config import ChatGLMConfig
from glmkit.models.checked_config import CheckedConfig
from glmkit.models.glm130b_config import GLM130BConfig
from glmkit.runtime.folder import FILE, FOLDER, SCHEMA
from glmkit.runtime.prompts import Blanks, Said, prompts_of
from glmkit.runtime.session import PREFIX_FILE
from glmkit.runtime.tokens import Tokens
from glmkit.tokenizers.chatglm import ChatGLM1Tokenizer
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer
from glmkit.tokenizers.glm4 import ChatGLM4Tokenizer
from glmkit.tokenizers.glm130b import MASKS, GLM130BTokenizer
from glmkit.tokenizers.glm_vocabularies import BytePieces, SentencePieces, WordPieces

TOKENIZER_FILE, PIECES_FILE = "tokenizer.json", "pieces.model"
_COMPARED = 60  # conversations


def write_runtime_data(
    folder: Path,
    config: CheckedConfig,
    tokenizer: Any,
    graph: Mapping[str, str],
    *,
    generation_config: Mapping[str, Any] | None = None,
    prefix: Sequence[Tensor] | None = None,
) -> None:
    """Writes what `glmkit.runtime` reads beside a graph, and shows that it makes the same prompts.

    Args:
        folder: The folder that is being written.
        config: The model's config.
        tokenizer: Its tokenizer.
        graph: `engine`, "onnx" or "openvino", and `file`, its name in the folder.
        generation_config: The content of its generation_config.json, or None.
        prefix: Of P-Tuning, (1, K, P, D) for each tensor of the past; None where there is none, or the graph has it.

    Raises:
        OutputError: Prompts or texts come out differently; the message shows one.
    """
    place = folder / FOLDER
    place.mkdir()
    tokens, content = _tokens(tokenizer)
    (place / tokens["file"]).write_bytes(content)
    described = {
        "schema": SCHEMA,
        "glmkit": version("glmkit"),
        "family": _name(tokenizer),
        "graph": dict(graph),
        "context_tokens": config.max_position_embeddings,
        "tokens": tokens,
        "prompt": _prompt(tokenizer),
        "reply": _reply(tokenizer),
        "layout": _layout(config),
        "sampling": _sampling(config, tokenizer, generation_config),
    }
    (place / FILE).write_text(json.dumps(described, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if prefix is not None:
        np.save(place / PREFIX_FILE, np.stack([one[0].float().numpy(force=True) for one in prefix]))
    _compare(place, described, tokenizer)


def _name(tokenizer: Any) -> str:
    return chat_format(tokenizer).name if tokenizer.generation else "GLM"


# --- vocabulary ---


def _tokens(tokenizer: Any) -> tuple[dict[str, Any], bytes]:
    """What runtime.json says about the vocabulary, and the file's content."""
    if isinstance(tokenizer, ChatGLMTokenizer):
        control = {index: tokenizer.decode_ids([index]) for index in tokenizer.tokenizer.special_tokens.values()}
        pieces = tokenizer.pieces
        said = {
            "kind": "pieces",
            "size": len(tokenizer),
            "silent": [0, 1, 2],
            "first_byte": 3,
            "drops_blank": pieces.normalizer.add_dummy_prefix,
            "texts": control,
        }
        return {**said, "file": TOKENIZER_FILE}, tokenizer.plain.to_str().encode()
    if isinstance(tokenizer, ChatGLM4Tokenizer):
        control = {index: name for name, index in tokenizer.special_tokens.items()}
        said = {"kind": "letters", "size": tokenizer.vocab_size + len(control), "texts": control}
        return {**said, "file": TOKENIZER_FILE}, tokenizer.plain.to_str().encode()
    if isinstance(tokenizer, (ChatGLM1Tokenizer, GLM130BTokenizer)):
        text = tokenizer.text
        said = {"kind": "ice", "size": len(text), "first": text.image_tokens}
        if isinstance(tokenizer, GLM130BTokenizer):
            said["marks"] = [_mark(name, name, tokenizer.get_command(name)) for name in MASKS]
        else:
            said["silent"] = [tokenizer.pad_token_id]
        return {**said, "file": PIECES_FILE}, text.processor.serialized_model_proto()
    return _glm_tokens(tokenizer)


def _glm_tokens(tokenizer: Any) -> tuple[dict[str, Any], bytes]:
    """The same of the four tokenizers of GLM."""
    vocabulary = tokenizer.vocabulary
    own = dict(enumerate(vocabulary.tokens))
    said = {
        "size": len(tokenizer),
        "apart": True,
        "texts": {index: token for index, token in tokenizer.control.token_of.items() if own.get(index) != token},
        "marks": [_mark(one.name, one.token, one.index, one.parsed, one.eats) for one in tokenizer.control],
        "aliases": tokenizer.control.aliases,
        "blank_is_empty": tokenizer.style == "original",
    }
    missing = set(range(len(tokenizer))) - set(own) - set(tokenizer.control.token_of)
    said["silent"] = sorted(missing)
    if isinstance(vocabulary, SentencePieces):
        return {**said, "kind": "sentencepiece", "file": PIECES_FILE}, vocabulary.files["cog-pretrain.model"]
    said["file"] = TOKENIZER_FILE
    content = vocabulary.backend({}).to_str().encode()
    if isinstance(vocabulary, WordPieces):
        return {**said, "kind": "words", "whole_words": tokenizer.style == "original"}, content
    assert isinstance(vocabulary, BytePieces)
    return {**said, "kind": "letters"}, content


def _mark(name: str, token: str, index: int, parsed: bool = True, eats: str = "") -> dict[str, Any]:
    return {"name": name, "token": token, "index": index, "parsed": parsed, "eats": eats}


# --- prompts and replies ---


def _prompt(tokenizer: Any) -> dict[str, Any]:
    """The words and ids of the chat format."""
    if not tokenizer.generation:
        return _blanks(tokenizer)
    form = chat_format(tokenizer)
    if isinstance(form, Rounds):
        around = tokenizer.build_inputs_with_special_tokens([-1])  # no id is negative, so it is found again
        at = around.index(-1)
        first, last = form.text("{question}", [("{question}", "{answer}")]).split(f"[Round {form.first + 1}]")
        return {
            "kind": "rounds",
            "name": form.name,
            "first": form.first,
            "bare": form.bare,
            "round": first.replace(f"[Round {form.first}]", "[Round {number}]"),
            "ask": "[Round {number}]" + last,
            "before": around[:at],
            "after": around[at + 1 :],
        }
    assert isinstance(form, Blocks)
    return {
        "kind": "blocks",
        "roles": {role: form.message_ids(tokenizer, [Message(role, "x")])[0] for role in ROLES},
        "header": "{metadata}\n",
        "skips_empty": not form.message_ids(tokenizer, [Message("user", "")]),
        "before": tokenizer.prefix_ids,
        "after": form.prompt_ids(tokenizer, [])[len(tokenizer.prefix_ids) :],
    }


def _blanks(tokenizer: Any) -> dict[str, Any]:
    said = {"kind": "blanks", "before": tokenizer.prefix_ids, "end": [tokenizer.eos_token_id]}
    if isinstance(tokenizer, GLM130BTokenizer):
        said |= {"signs": MASKS, "added": "[gMASK]", "open_ends": MASKS}
    else:
        added = " [gMASK]" if "gMASK" in tokenizer.control else " [MASK]"
        said |= {"signs": ["MASK]"], "added": added, "open_ends": ["[gMASK]"]}
    return {**said, "mask_ids": list(tokenizer.mask_token_ids)}


def _reply(tokenizer: Any) -> dict[str, Any]:
    """What the ids of a reply mean."""
    said: dict[str, Any] = {"stop_ids": sorted(tokenizer.stop_ids), "vocabulary_size": tokenizer.vocab_size}
    if not tokenizer.generation:
        return {**said, "sop_id": tokenizer.get_command("sop")}
    form = reply_form(tokenizer)
    said |= {"divider": form.divider, "full_width": form.full_width, "drops_blank": form.drops_blank}
    return {**said, "text_tools": sorted(chat_format(tokenizer).text_tools)}


def _layout(config: CheckedConfig) -> dict[str, Any]:
    """The masks and positions that the models' `input_layout` makes."""
    if isinstance(config, ChatGLM2Config):
        return {"kind": "causal"}
    values: Any = config
    if isinstance(config, ChatGLMConfig):
        groups = [[values.gmask_token_id], [values.mask_token_id]]
        counting = [] if values.position_encoding_2d else [values.gmask_token_id]
        two_rows, sop = values.position_encoding_2d, values.bos_token_id
    elif isinstance(config, GLM130BConfig):
        groups = [[values.mask_token_id, values.smask_token_id, values.gmask_token_id]]
        counting, two_rows, sop = [values.gmask_token_id], False, values.bos_token_id
    else:
        groups, counting, two_rows, sop = [list(values.mask_token_ids)], [], True, values.sop_token_id
    return {"kind": "prefix", "sop_id": sop, "mask_ids": groups, "counting_ids": counting, "two_rows": two_rows}


def _sampling(config: CheckedConfig, tokenizer: Any, said_by_model: Mapping[str, Any] | None) -> dict[str, Any]:
    model = SimpleNamespace(config=config, generation_config=SimpleNamespace(**(said_by_model or {})))
    choices = choose(model, official=official_sampling(model, tokenizer))
    options = choices.options
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    said = {name: getattr(options, name) for name in names}
    return said if choices.max_new_tokens is None else {**said, "max_new_tokens": choices.max_new_tokens}


# --- the comparison ---

_TEXTS = (
    *("你好", "Hello, world!", "  two  blanks ", "a\nb\r\n\n\tc", "", " ", "３＋５＝？（全角）", "，。！？：；", "…—"),
    *("🙂👩‍👩‍👧‍👦é", "<|user|>", "<|assistant|>\n", "[gMASK]sop", "[MASK] [sMASK] </s> <sop> <eop>", "<|endoftext|>"),
    *(
        "<n><|tab|><|blank_3|>",
        "[Round 1]\n\n问：x\n\n答：",
        "▁<0x0A>",
        "{question}{number}",
        "ﬁ ǅ İ ß Σ ς",
        "\u200b\ufeff\u0000",
    ),
)


def random_text(random: Random) -> str:
    """A text of words, marks, control tokens written out, and characters of any kind.

    Args:
        random: Where chance comes from.
    """
    return "".join(
        random.choice(_TEXTS) if random.random() < 0.6 else chr(random.choice((random.randrange(32, 0x250), 0x4E00)))
        for _ in range(random.randrange(6))
    )


def _compare(place: Path, described: Mapping[str, Any], tokenizer: Any) -> None:
    """Makes prompts and texts both ways."""
    tokens = Tokens(place, described["tokens"])
    prompts = prompts_of(tokens, described["prompt"])
    random = Random(0)
    for number in range(_COMPARED):
        if isinstance(prompts, Blanks):
            text = random_text(random) + "[MASK]" + random_text(random)
            asked, expected = [Said("user", text)], tokenizer.fill_prompt(text)
        else:
            asked = random_conversation(random, tools=described["prompt"]["kind"] == "blocks")
            expected = prompt_ids(tokenizer, [Message(*one) for one in asked])
        found = prompts.ids(asked)
        if found != expected:
            raise OutputError(
                f"the exported vocabulary makes another prompt of {asked!r:.300}", hint="nothing was kept"
            )
        ids = [*expected, *(random.randrange(described["reply"]["vocabulary_size"]) for _ in range(number))]
        if tokens.decode(ids) != tokenizer.decode_ids(ids):
            raise OutputError(f"the exported vocabulary gives another text for {ids!r:.300}", hint="nothing was kept")


def random_conversation(random: Random, *, tools: bool) -> list[Said]:
    """Messages in an order that a chat format takes.

    Args:
        random: Where chance comes from.
        tools: Whether there are observations and header lines.
    """
    system = [Said("system", random_text(random))] if random.random() < 0.4 else []
    turns: list[Said] = []
    for _ in range(random.randrange(4)):
        turns.append(Said("user", random_text(random)))
        if tools and random.random() < 0.3:
            turns += [Said("assistant", random_text(random), "get_weather"), Said("observation", random_text(random))]
        turns.append(Said("assistant", random_text(random)))
    return [*system, *turns, Said("user", random_text(random))]
