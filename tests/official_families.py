"""A tiny folder of every family, laid out as its official repository, with python files that must not run.

Each row of FAMILIES is one layout: the official config.json with small sizes, the weights as the release stores them
(names, dtypes, files, constants and second copies), and tokenizer files trained on the spot.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import official
from glm_words import bert_files, byte_files, chinese_files
from glmkit.models.chatglm import ChatGLMForCausalLM
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.models.glm import GLMForConditionalGeneration
from glmkit.models.glm130b import GLM130BForCausalLM
from glmkit.models.partition import Partition, split
from glmkit.tokenizers.chatglm import ChatGLM1Tokenizer
from glmkit.tokenizers.glm import glm_tokenizer_class
from glmkit.tokenizers.glm130b import GLM130BTokenizer
from tiny_families import train_ice_text

CANARY = official.CANARY
Fields = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One layout.

    Args:
        name: For the tests' names.
        network: The class that writes text.
        config: Its config.json, but for what follows from the vocabulary.
        write_tokenizer: Writes the tokenizer's files; returns the fields of config.json that follow from them.
        texts: What the tests ask; of different lengths.
        row: Its row in `glmkit.families`, if the folder says its name.
        architectures: What config.json must name when the class that writes text is saved.
        form: How the weights are stored, see `official.write_weights`; "ranks-2" are the shards of two ranks.
        dtype: Of the weights.
        autos: Auto classes of its README that give logits, without "AutoModel".
        code: Word in the names of its python files.
        code_says: What stands in them, as a sign of what the folder is; they are read, not run.
    """

    name: str
    network: Any
    config: Fields
    write_tokenizer: Callable[[Path], Fields]
    texts: tuple[str, ...]
    row: str | None
    architectures: str
    form: str = "bin-shards"
    dtype: torch.dtype = torch.float16
    autos: tuple[str, ...] = ("", "ForSeq2SeqLM", "ForCausalLM")
    code: str = "chatglm"
    code_says: str = "sop"

    @property
    def is_folder(self) -> bool:
        """Whether there is a config.json, so that transformers can open it."""
        return not self.form.startswith("ranks")

    @property
    def fills(self) -> bool:
        """Whether it fills blanks instead of chatting."""
        return "[MASK]" in self.texts[0]


# Configs, as officially but small -------------------------------------------------------------------------------------

CHATGLM: Fields = {
    "_name_or_path": "THUDM/chatglm-6b",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "hidden_size": 32,
    "inner_hidden_size": 64,
    "layernorm_epsilon": 1e-05,
    "max_sequence_length": 128,
    "model_type": "chatglm",
    "num_attention_heads": 4,
    "num_layers": 2,
    "position_encoding_2d": True,
    "torch_dtype": "float16",
    "transformers_version": "4.23.1",
    "use_cache": True,
}
GLM4: Fields = {key: value for key, value in official.CONFIG.items() if key not in ("eos_token_id", "pad_token_id")} | {
    "layernorm_epsilon": 1.5625e-07,
    "rope_ratio": 500,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
}
GLM: Fields = {
    "architectures": ["GLMModel"],
    "attention_dropout_prob": 0.1,
    "attention_scale": 1.0,
    "auto_map": {
        "AutoConfig": "configuration_glm.GLMConfig",
        "AutoModel": "modeling_glm.GLMModel",
        "AutoModelForSeq2SeqLM": "modeling_glm.GLMForConditionalGeneration",
        "AutoModelForMultipleChoice": "modeling_glm.GLMForMultipleChoice",
    },
    "block_position_encoding": True,
    "checkpoint_activations": False,
    "checkpoint_num_layers": 1,
    "embedding_dropout_prob": 0.1,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "max_sequence_length": 64,
    "model_type": "glm",
    "num_attention_heads": 4,
    "num_layers": 2,
    "output_dropout_prob": 0.1,
    "output_predict": True,
    "parallel_output": True,
    "pool_token": "cls",
    "relative_encoding": False,
    "spell_func": "lstm",
    "spell_length": None,
    "torch_dtype": "float16",
    "transformers_version": "4.25.0",
}
GLM130B: Fields = {
    "architectures": ["GLM130BForCausalLM"],
    "hidden_size": 32,
    "inner_hidden_size": 40,
    "max_sequence_length": 2048,
    "model_type": "glm-130b",
    "num_attention_heads": 4,
    "num_layers": 2,
    "torch_dtype": "float16",
}


# Tokenizers -----------------------------------------------------------------------------------------------------------


def _described(folder: Path, name: str, tokenizer_class: str, code: str, **more: Any) -> None:
    described = {
        "name_or_path": name,
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": tokenizer_class,
        "auto_map": {"AutoTokenizer": [f"{code}.{tokenizer_class}", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described | more))


def _ice_text(image_tokens: int) -> Callable[[Path], Fields]:
    def write(folder: Path) -> Fields:
        tokenizer = ChatGLM1Tokenizer(train_ice_text(folder / "ice_text.model"), num_image_tokens=image_tokens)
        said = {} if image_tokens else {"num_image_tokens": 0}  # the first release did not say it
        tokens = {"bos_token": "<sop>", "eos_token": "<eop>", "gmask_token": "[gMASK]", "mask_token": "[MASK]"}
        _described(folder, "THUDM/chatglm-6b", "ChatGLMTokenizer", "tokenization_chatglm", **tokens, **said)
        names = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")
        return {"vocab_size": tokenizer.vocab_size + 20} | {name: getattr(tokenizer, name) for name in names}

    return write


def _bpe(name: str) -> Callable[[Path], Fields]:
    def write(folder: Path) -> Fields:
        official.train_tokenizer(folder / "tokenizer.model")
        _described(folder, name, "ChatGLMTokenizer", "tokenization_chatglm")
        return {}

    return write


def _byte_ranks(folder: Path) -> Fields:
    """The file of GLM-4: a line for each token, base64 and rank; control tokens stand behind it."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"hell", b"hello", "你".encode(), "好".encode()]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    _described(
        folder,
        "THUDM/glm-4-9b-chat",
        "ChatGLM4Tokenizer",
        "tokenization_chatglm",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=128_000,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    first = len(tokens)
    return {
        "eos_token_id": [first, first + 7, first + 9],
        "pad_token_id": first,
        "padded_vocab_size": first + 34,
        "vocab_size": first + 34,
    }


def _words(write_files: Callable[[Path], Path]) -> Callable[[Path], Fields]:
    def write(folder: Path) -> Fields:
        write_files(folder)
        kind = glm_tokenizer_class(folder)
        tokenizer: Any = kind.from_pretrained(folder)
        _described(folder, "", kind.__name__, "tokenization_glm")
        return {"vocab_size": tokenizer.vocab_size + 9}

    return write


def _ice_text_of_130b(folder: Path) -> Fields:
    tokenizer = GLM130BTokenizer(train_ice_text(folder / "ice_text.model"))
    commands = {"mask": "[MASK]", "gmask": "[gMASK]", "smask": "[sMASK]", "bos": "sop", "pad": "pad"}
    ids = {f"{name}_token_id": tokenizer.get_command(command) for name, command in commands.items()}
    return {
        "vocab_size": (tokenizer.vocab_size + 21) // 2 * 2,  # an even number, for two ranks
        "eos_token_id": [tokenizer.get_command("eop"), tokenizer.get_command("eos")],
        **ids,
    }


# The table ------------------------------------------------------------------------------------------------------------

_QUESTIONS = ("你好", "hello world, how are you?", "1 + 2 = 3")
_BLANKS = ("hello [MASK].", "hello world, hello [MASK] world.", "hello, [MASK] world.")
_CHINESE_BLANKS = ("清华大学位于[MASK]。", "晚上睡不着怎么办？可以听音乐，[MASK]", "标题：足球，类别：[MASK]")


def _chatglm(name: str, image_tokens: int = 0, **changes: Any) -> Family:
    return Family(
        name,
        ChatGLMForCausalLM,
        config=CHATGLM | changes,
        write_tokenizer=_ice_text(image_tokens),
        texts=_QUESTIONS,
        row="chatglm-6b",
        architectures="ChatGLMModel",
        code_says="ice_text.model",
    )


def _chatglm2(name: str, tokenizer: str = "", form: str = "bin-shards", code_says: str = "sop", **more: Any) -> Family:
    """`tokenizer` is what tokenizer_config.json calls it, if not by the model's own name."""
    return Family(
        name,
        ChatGLM2ForCausalLM,
        config={"_name_or_path": f"THUDM/{name}", **official.CONFIG, **more},
        write_tokenizer=_bpe(f"THUDM/{tokenizer or name}"),
        texts=_QUESTIONS,
        row=name,
        architectures="ChatGLMModel",
        form=form,
        code_says=code_says,
    )


def _glm4(name: str, row: str | None = None, **changes: Any) -> Family:
    named = {"_name_or_path": f"THUDM/{row}"} if row else {}
    return Family(
        name,
        ChatGLM2ForCausalLM,
        config=GLM4 | named | changes,
        write_tokenizer=_byte_ranks,
        texts=_QUESTIONS,
        row=row,
        architectures="ChatGLMModel",
        form="shards",
        dtype=torch.bfloat16,
        autos=("", "ForCausalLM"),
        code_says="<|system|>",
    )


def _glm(name: str, write_files: Callable[[Path], Path], texts: tuple[str, ...]) -> Family:
    return Family(
        name,
        GLMForConditionalGeneration,
        config=GLM,
        write_tokenizer=_words(write_files),
        texts=texts,
        row=None,
        architectures="GLMForConditionalGeneration",
        form="bin",
        autos=("", "ForSeq2SeqLM"),
        code="glm",
        code_says="GLM",
    )


def _glm130b(name: str, form: str) -> Family:
    return Family(
        name,
        GLM130BForCausalLM,
        config=GLM130B,
        write_tokenizer=_ice_text_of_130b,
        texts=_BLANKS,
        row=None,
        architectures="GLM130BForCausalLM",
        form=form,
    )


FAMILIES: tuple[Family, ...] = (
    _chatglm("chatglm-6b"),
    _chatglm("chatglm-6b with image tokens", 20_000, hidden_size=16),
    _chatglm("chatglm-6b 1-D", position_encoding_2d=False),
    _chatglm2("chatglm2-6b"),
    _chatglm2("chatglm2-6b-32k", tokenizer="chatglm2-6b", rope_ratio=16),  # divides the position
    _chatglm2("codegeex2-6b"),
    _chatglm2("chatglm3-6b", form="shards", code_says="<|system|>", transformers_version="4.30.2"),
    _glm4("glm-4-9b-chat", row="glm-4-9b-chat"),
    _glm4("glm-4 with 4 groups", rope_ratio=10_000, multi_query_group_num=4),
    _glm("glm with BERT's words", bert_files, _BLANKS),
    _glm("glm with RoBERTa's words", lambda folder: byte_files(folder, roberta=True), _BLANKS),
    _glm("glm with GPT-2's words", byte_files, _BLANKS),
    _glm("glm with Chinese pieces", chinese_files, _CHINESE_BLANKS),
    _glm130b("glm-130b", "shards"),
    _glm130b("glm-130b, 1 rank", "ranks-1"),
    _glm130b("glm-130b, 2 ranks", "ranks-2"),
)


# Writing --------------------------------------------------------------------------------------------------------------


def write_family(folder: Path, family: Family) -> Fields:
    """Writes the whole folder of a family.

    Args:
        folder: The folder to make.
        family: A row of FAMILIES.

    Returns:
        The config, whether or not the layout has a file for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = family.config | family.write_tokenizer(folder)
    if family.is_folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    says = repr([family.code_says])
    for part in ("configuration", "modeling", "tokenization") if "auto_map" in config else ():
        text = f"open({str(folder / CANARY)!r}, 'w').close()\n\nclass ChatGLMTokenizer:\n    specials = {says}\n"
        (folder / f"{part}_{family.code}.py").write_text(text)
    write_weights(folder, family, stored_weights(family, config))
    return config


def stored_weights(family: Family, config: Fields) -> dict[str, Tensor]:
    """Random weights as the release stores them: its names and dtypes, its constants, its second copies."""
    made = family.network.config_class.from_dict(config)
    torch.manual_seed(0)
    state = {name: _random(name, tensor) for name, tensor in family.network(made).state_dict().items()}
    state = {name: tensor.to(family.dtype) for name, tensor in state.items()}
    if family.network is ChatGLMForCausalLM:
        state["lm_head.weight"] = state["transformer.word_embeddings.weight"].clone()
        state |= {name: tensor.float() for name, tensor in state.items() if "layernorm" in name}  # as released
    if family.network is GLMForConditionalGeneration:
        state = {name.removeprefix("glm."): tensor for name, tensor in state.items()}
    if family.network is ChatGLM2ForCausalLM:
        state["transformer.rotary_pos_emb.inv_freq"] = torch.ones(2, dtype=family.dtype)
    elif family.network is not GLMForConditionalGeneration:
        for layer in range(made.num_layers):
            name = f"transformer.layers.{layer}.attention.rotary_emb.inv_freq"
            state[name] = torch.ones(made.head_dim // 2, dtype=family.dtype)
    return state


def _random(name: str, tensor: Tensor) -> Tensor:
    """Weights with which an answer does not repeat itself: what a block adds weighs as much as what it gets."""
    if tensor.ndim == 1:
        return tensor + torch.randn(tensor.shape) * 0.1
    adds = name.endswith((".dense.weight", ".dense_4h_to_h.weight"))
    return torch.randn(tensor.shape) * (1.5 if adds else 0.3)


def write_weights(folder: Path, family: Family, state: dict[str, Tensor]) -> None:
    """Writes weights in the family's form; of ranks, each gets its part.

    Args:
        folder: An existing folder.
        family: The row.
        state: Whole tensors.
    """
    if family.is_folder:
        official.write_weights(folder, state, family.form)
        return
    degree = int(family.form.removeprefix("ranks-"))
    partition = Partition("glm-130b", family.config["num_attention_heads"])
    place = folder / "49300"
    place.mkdir(exist_ok=True)
    for rank in range(degree):
        module = {name: split(tensor, partition.rule(name), rank, degree, name) for name, tensor in state.items()}
        torch.save({"module": module}, place / f"mp_rank_{rank:02d}_model_states.pt")
    (folder / "latest").write_text("49300")
