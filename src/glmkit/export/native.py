"""Folders of ChatGLM2, ChatGLM3 and GLM-4 in transformers' own layout, `glm`, and back.

    official                                        transformers' `glm`
    transformer.embedding.word_embeddings           model.embed_tokens
    transformer.encoder.layers.N                    model.layers.N
      .input_layernorm .post_attention_layernorm      the same
      .self_attention.query_key_value  rows q|k|v     .self_attn.q_proj .k_proj .v_proj   (a draft had .qkv_proj)
      .self_attention.dense                           .self_attn.o_proj
      .mlp.dense_h_to_4h  rows gate|up                .mlp.gate_up_proj
      .mlp.dense_4h_to_h                              .mlp.down_proj
    transformer.encoder.final_layernorm             model.norm
    transformer.output_layer                        lm_head

No number is changed. The base of the rotary frequencies is 10,000 times `rope_ratio`; a `rope_ratio` that divides the
position (ChatGLM2-6B-32K) is transformers' linear scaling, exactly so where it is a power of two, as in the release.

Tensors go from file to file one at a time. Before the new folder gets its name its bytes are read again, and a new
process compares the logits of transformers' class with ours.

Source: convert_glm_weights_to_hf.py of transformers, config.json of glm-4-9b-chat and glm-4-9b-chat-hf.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glmkit import hf
from glmkit.checkpoint import Folder, check_tensors, open_folder, shown_path
from glmkit.errors import CheckpointError, ConfigError
from glmkit.export.folders import Converted, complete_folder
from glmkit.export.numbers import chosen_dtype, recast
from glmkit.export.official import SHARD_BYTES, Result
from glmkit.export.sources import open_source
from glmkit.export.state_file import StateFile
from glmkit.loading import choose_family, read_config
from glmkit.models.architectures import is_native_layout
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.checked_config import is_positive, unreadable
from glmkit.quant.schemes import scheme_of
from glmkit.registration import register
from glmkit.tokenizers import ChatGLM4Tokenizer, ChatGLMTokenizer, has_tokenizer, load_tokenizer
from glmkit.weights import check_model, own_names
from glmkit.writing import write_folder, write_text_atomic

logger = logging.getLogger("glmkit")

# GLM-4 reads control tokens in a text, as its official tokenizer does, so that a template can write its prompts. Those
# of ChatGLM2 and ChatGLM3 read none, and no template could.
_GLM4_TEMPLATE = (
    "{{ '[gMASK]<sop>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + (message['metadata'] or '') + '\\n' + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_BASE = 10_000.0  # of the rotary frequencies, where rope_ratio is 1
_CONSTANT = "transformer.rotary_pos_emb.inv_freq"  # stored by the official code, used by nobody
_FIELDS = {  # of ChatGLM2Config -> of GlmConfig
    "padded_vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "multi_query_group_num": "num_key_value_heads",
    "kv_channels": "head_dim",
    "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "attention_dropout": "attention_dropout",
    "add_qkv_bias": "attention_bias",
    "use_cache": "use_cache",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
_NAMES = (  # official -> native, for tensors that are the same in both
    ("transformer.embedding.word_embeddings.", "model.embed_tokens."),
    ("transformer.encoder.final_layernorm.", "model.norm."),
    ("transformer.output_layer.", "lm_head."),
    ("transformer.encoder.layers.", "model.layers."),
    (".self_attention.dense.", ".self_attn.o_proj."),
    (".mlp.dense_h_to_4h.", ".mlp.gate_up_proj."),
    (".mlp.dense_4h_to_h.", ".mlp.down_proj."),
)
_PACKED = re.compile(r"(.*)\.self_attention\.query_key_value\.(weight|bias)")


@dataclass(frozen=True)
class _Planned:
    """A tensor of the new folder: its shape and dtype, and the rows of old ones it is made of, in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[tuple[str, int, int], ...]


def to_native(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    like: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    family: str | None = None,
    overwrite: bool = False,
) -> Converted:
    """Writes an official folder in transformers' own layout; `GlmForCausalLM` reads it without glmkit.

    A tokenizer goes along as its official file and as tokenizer.json, which transformers reads by itself. No chat
    template does: prompts are built from ids by glmkit.

    Args:
        source: A folder of ChatGLM2, ChatGLM3 or GLM-4, or a bare file of its weights.
        target: The folder to make.
        like: For a bare file: the folder whose config.json and tokenizer belong to it.
        dtype: "auto" keeps each tensor's; "float32", "bfloat16" or "float16" is that of all.
        shard_bytes: The most tensor data in one file.
        family: What the model is, where the folder does not say what its rope_ratio means.
        overwrite: Whether an existing folder may be replaced.

    Returns:
        What was done.

    Raises:
        CheckpointError: The source is damaged, or is no whole model.
        ConfigError: Its config cannot be read, or has no counterpart.
        OutputError: The target cannot be written.
    """
    register()
    wanted = chosen_dtype(dtype)
    with open_source(Path(source), like=None if like is None else Path(like)) as folder:
        row = choose_family(folder.path if isinstance(folder, StateFile) else Path(source), family)
        config = read_config(folder, row, overrule=family is not None)
        if not isinstance(config, ChatGLM2Config):
            raise ConfigError(
                f"{folder.path} holds a {type(config).__name__}: only ChatGLM2, ChatGLM3 and GLM-4 are `glm`"
            )
        refused = [
            f"{name}={getattr(config, name)!r}"
            for name in ("add_bias_linear", "quantization_bit", "pre_seq_len")
            if getattr(config, name)
        ]
        if scheme_of(config) is not None:
            refused.append("quantization_config")
        if refused:
            raise ConfigError(
                f"{folder.path} has {', '.join(refused)}, which transformers' `glm` does not have",
                hint="convert the checkpoint that it was quantised from" if "quantization" in str(refused) else None,
            )
        check_model(folder, model := _meta_model(config))
        stored = {official: info for info, official in own_names(folder, model).items()}
        plan = {
            native: _Planned((last - first, *info.shape[1:]), info.dtype, ((info.name, first, last),))
            for official in model.state_dict()
            for info in [folder.tensors[stored[official]]]
            for native, first, last in _counterparts(official, info.shape[0], config)
        }
        side = {"path": os.fspath(source), "like": None if like is None else os.fspath(like), "family": family}
        tokenizer = _tokenizer(folder, config)
        tensors, fetch = recast(plan, lambda name: _join_rows(folder, plan[name]), wanted)
        values = _native_config(config, folder.config) | ({} if wanted is None else {"torch_dtype": dtype})
        with write_folder(target, overwrite) as new:

            def beside() -> list[str]:
                notes = complete_folder(new, folder, values, tokenizer, made_by="in transformers' `glm` layout")
                if tokenizer is not None:
                    _save_for_transformers(new, tokenizer)
                return notes

            result = Result(target, "native", shard_bytes, before=plan)
            return result.write(new, folder, tensors, fetch, beside, side)


def from_native(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Converted:
    """Writes a folder of transformers' own layout as an official one.

    Args:
        source: A folder with model_type "glm"; its attention may have three matrices or the one of a draft, qkv_proj.
        target: The folder to make. It has no Python files, which glmkit does not need and the official code does.
        dtype: See `to_native`.
        shard_bytes: See `to_native`.
        overwrite: Whether an existing folder may be replaced.

    Returns:
        What was done.

    Raises:
        CheckpointError: The source is damaged, or its tensors are not those of its config.
        ConfigError: It is no such folder, or its config has no counterpart.
        OutputError: The target cannot be written.
    """
    register()
    wanted = chosen_dtype(dtype)
    with open_folder(source) as folder:
        values = _official_config(folder.config, folder.path)
        config = ChatGLM2Config.from_dict(values)
        config.check()
        state = _meta_model(config).state_dict()
        sources = {official: _stored(official, tensor.shape[0], config, folder) for official, tensor in state.items()}
        expected = {
            native: (last - first, *state[official].shape[1:])
            for official, parts in sources.items()
            for native, first, last in parts
        }
        copies = {"lm_head.weight"} - set(expected)  # of the embedding, where config.json says that both are one
        check_tensors(folder, expected, ignore=lambda name: name in copies or name.endswith("rotary_emb.inv_freq"))
        plan = {official: _join(state[official].shape, parts, folder) for official, parts in sources.items()}
        constant = _inv_freq(config, plan["transformer.output_layer.weight"].dtype)
        plan[_CONSTANT] = _Planned(tuple(constant.shape), constant.dtype, ())
        tokenizer = _tokenizer(folder, config)
        values |= {} if wanted is None else {"torch_dtype": dtype}
        tensors, fetch = recast(
            plan, lambda name: constant if name == _CONSTANT else _join_rows(folder, plan[name]), wanted
        )
        # No version of transformers reads the draft, so that its folder is only opened, and its bytes compared.
        is_draft = any(".qkv_proj." in name for name in folder.tensors)
        with write_folder(target, overwrite) as new:

            def beside() -> list[str]:
                notes = complete_folder(new, folder, values, tokenizer, made_by="converted to the official layout")
                draft = ["logits were not compared: transformers does not read the draft with qkv_proj"]
                return [*notes, *(draft if is_draft else [])]

            result = Result(target, "official", shard_bytes, before=plan)
            side = {"path": str(new) if is_draft else os.fspath(source)}
            return result.write(new, folder, tensors, fetch, beside, side)


def is_native_folder(source: str | os.PathLike[str]) -> bool:
    """Whether a folder is in transformers' own layout.

    Args:
        source: The folder, or what may be the name of a model.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return False
    with open_folder(folder, weights=()) as opened:
        return is_native_layout(opened.config)


# Tensors -------------------------------------------------------------------------------------------------------------


def _meta_model(config: ChatGLM2Config) -> ChatGLM2ForCausalLM:
    with torch.device("meta"):
        return ChatGLM2ForCausalLM(config)


def _counterparts(official: str, rows: int, config: ChatGLM2Config) -> list[tuple[str, int, int]]:
    """Native names of an official tensor, and which of its rows each has."""
    packed = _PACKED.fullmatch(official)
    if packed is None:
        name = official
        for ours, theirs in _NAMES:
            name = name.replace(ours, theirs)
        return [(name, 0, rows)]
    layer = packed.group(1).replace("transformer.encoder.layers.", "model.layers.")
    queries = config.num_attention_heads * config.kv_channels
    keys = config.multi_query_group_num * config.kv_channels
    ends = {"q_proj": (0, queries), "k_proj": (queries, queries + keys), "v_proj": (queries + keys, rows)}
    return [(f"{layer}.self_attn.{name}.{packed.group(2)}", *ends[name]) for name in ends]


def _stored(official: str, rows: int, config: ChatGLM2Config, folder: Folder) -> list[tuple[str, int, int]]:
    """The same as `_counterparts`, as this folder has it: in the draft's form, or with a tied output layer."""
    parts = _counterparts(official, rows, config)
    fused = parts[0][0].replace(".q_proj.", ".qkv_proj.")
    if len(parts) > 1 and fused in folder.tensors:
        return [(fused, 0, rows)]
    if parts[0][0] == "lm_head.weight" and folder.config.get("tie_word_embeddings"):
        return [("model.embed_tokens.weight", 0, rows)]
    return parts


def _join(shape: Iterable[int], parts: list[tuple[str, int, int]], folder: Folder) -> _Planned:
    dtypes = {folder.tensors[name].dtype for name, _, _ in parts}
    if len(dtypes) > 1:
        listed = ", ".join(name for name, _, _ in parts)
        raise CheckpointError(shown_path(folder.path), [f"{listed} have different dtypes, and become one tensor"])
    return _Planned(tuple(shape), dtypes.pop(), tuple((name, 0, last - first) for name, first, last in parts))


def _inv_freq(config: ChatGLM2Config, dtype: torch.dtype) -> torch.Tensor:
    """The constant of the official folders, as their code computes it."""
    rotated = config.kv_channels // 2
    return 1.0 / (_BASE ** (torch.arange(0, rotated, 2).to(dtype) / rotated))


def _join_rows(folder: Folder, planned: _Planned) -> torch.Tensor:
    parts = [folder.read_part(stored, 0, [(first, last)]) for stored, first, last in planned.sources]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


# Configs -------------------------------------------------------------------------------------------------------------


def _native_config(config: ChatGLM2Config, stored: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the native folder, with the names that transformers 4.46 to 5 read."""
    base, divisor = config.rotary_base_and_scale()
    values: dict[str, Any] = {"architectures": ["GlmForCausalLM"], "model_type": "glm"}
    values |= {native: getattr(config, official) for official, native in _FIELDS.items()}
    values |= {"hidden_act": "silu", "tie_word_embeddings": False, "partial_rotary_factor": 0.5, "rope_theta": base}
    if divisor != 1:
        values["rope_scaling"] = {"rope_type": "linear", "factor": divisor}
    if config.generation is not None:
        values["generation"] = config.generation
    dtype = stored.get("torch_dtype") or stored.get("dtype")
    return values | ({"torch_dtype": dtype} if dtype else {})


def _official_config(stored: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """config.json of the official folder, every field written out: the defaults of the official class differ."""
    if not is_native_layout(stored):
        raise ConfigError(
            f"{shown_path(path)} is no folder of transformers' own layout: model_type is {stored.get('model_type')!r}",
            hint="to_native makes one of an official folder",
        )
    native, rope = _read_native(stored, path)
    kind, factor = rope.get("rope_type", "default"), rope["factor"]
    ratio = rope["rope_theta"] / _BASE
    problems = [
        f"{name}={value!r} (expected {wanted!r})"
        for name, value, wanted in (
            ("hidden_act", native.hidden_act, "silu"),
            ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 0.5),
            ("quantization_config", stored.get("quantization_config"), None),
        )
        if value != wanted
    ]
    if kind not in ("default", "linear") or (kind == "linear" and factor != 1 and ratio != 1):
        problems.append(f"rope_type={kind!r} with factor={factor} and rope_theta={rope['rope_theta']}")
    if problems:
        raise ConfigError(f"{shown_path(path)} has no official counterpart: {', '.join(problems)}")
    values: dict[str, Any] = {"architectures": ["ChatGLMModel"], "model_type": "chatglm"}
    values |= {official: getattr(native, name) for official, name in _FIELDS.items()}
    values |= {"rmsnorm": True, "post_layer_norm": True, "multi_query_attention": True, "original_rope": True}
    values |= {"add_bias_linear": False, "apply_residual_connection_post_layernorm": False, "hidden_dropout": 0.0}
    values |= {"fp32_residual_connection": False, "apply_query_key_layer_scaling": True, "bias_dropout_fusion": True}
    values |= {"attention_softmax_in_fp32": True, "tie_word_embeddings": False}
    if factor != 1 or ratio != 1:
        used = factor if factor != 1 else ratio
        values["rope_ratio"] = int(used) if used == int(used) else used
        values["rope_ratio_applies_to"] = "position" if factor != 1 else "base"
    if stored.get("generation") is not None:
        values["generation"] = stored["generation"]
    dtype = stored.get("torch_dtype") or stored.get("dtype")
    return {name: value for name, value in values.items() if value is not None} | (
        {"torch_dtype": dtype} if dtype else {}
    )


def _read_native(stored: Mapping[str, Any], path: Path) -> tuple[Any, dict[str, Any]]:
    """The config as transformers reads it, and its rotation, with numbers for `rope_theta` and `factor`."""
    problems = unreadable(stored)
    if not problems:
        try:
            native = hf.GlmConfig.from_dict(dict(stored))
        except Exception as error:  # of many kinds; what transformers checks it names
            problems.append(" ".join(str(error).split())[:400])
    if not problems:
        rope = {"factor": 1.0} | {name: value for name, value in native.rope_parameters.items() if value is not None}
        problems = [
            f"{name}={rope.get(name)!r:.80}: expected a positive number"
            for name in ("rope_theta", "factor")
            if not is_positive(rope.get(name))
        ]
    if problems:
        raise ConfigError(
            f"config.json of {shown_path(path)} is damaged:\n" + "\n".join(f"  - {problem}" for problem in problems),
            hint="copy it again",
        )
    return native, rope


# Tokenizer -----------------------------------------------------------------------------------------------------------


def _tokenizer(folder: Folder, config: ChatGLM2Config) -> Any:
    """The source's tokenizer; None, and a warning, if it has none that is read here."""
    if not has_tokenizer(folder.path):
        logger.warning(
            "%s has no tokenizer file that glmkit reads, so the new folder gets none: copy tokenizer.model from the"
            " official repository",
            shown_path(folder.path),
        )
        return None
    tokenizer = load_tokenizer(folder.path, config)
    if not isinstance(tokenizer, (ChatGLMTokenizer, ChatGLM4Tokenizer)):
        raise ConfigError(f"{shown_path(folder.path)} has a {type(tokenizer).__name__}, which these models do not use")
    return tokenizer


def _save_for_transformers(new: Path, tokenizer: Any) -> None:
    """Adds tokenizer.json, which transformers reads alone; `generation` tells glmkit that the class is its own."""
    tokenizer.backend_tokenizer.save(os.fspath(new / "tokenizer.json"))
    path = new / "tokenizer_config.json"
    described = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if tokenizer.generation == 4 and not (new / "chat_template.jinja").exists():
        described.setdefault("chat_template", _GLM4_TEMPLATE)
    write_text_atomic(path, json.dumps(described, indent=2, ensure_ascii=False) + "\n")
