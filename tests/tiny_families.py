"""Small stand-ins of the families beside ChatGLM2 and ChatGLM3, for tests: tokenizers, and real folders."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from glmkit.models.chatglm import ChatGLMForCausalLM
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.chatglm_config import ChatGLMConfig
from glmkit.models.glm import GLMForConditionalGeneration
from glmkit.models.glm_config import GLMConfig
from glmkit.tokenizers.chatglm import ChatGLM1Tokenizer
from glmkit.tokenizers.glm import GLMBertTokenizer, GLMTokenizer
from glmkit.tokenizers.glm4 import ChatGLM4Tokenizer

_CORPUS = [
    "你好，今天天气很好。",
    "hello world, how are you?",
    "上衣 材质 棉 显瘦",
    "1 + 2 = 3",
    "I like tea and rice",
    "[Round 1]问：答：",
] * 20
_WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] i like tea and rice beijing is the capital of china world . , !".split()


def train_ice_text(path: Path) -> Path:
    """Writes a SentencePiece file with the properties of ice_text.model, as icetk has it."""
    with path.open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_CORPUS),
            model_writer=writer,
            model_type="unigram",
            vocab_size=120,
            pad_id=3,
            user_defined_symbols=["<n>"],
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


def write_chatglm(folder: Path, *, endless: bool = False, **changes: Any) -> Path:
    """Writes a ChatGLM-6B folder with random weights that is greedy; `endless` never ends an answer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = ChatGLM1Tokenizer(train_ice_text(folder / "ice_text.model"))
    sizes = {
        "num_layers": 2,
        "vocab_size": tokenizer.vocab_size + 20,
        "hidden_size": 32,
        "inner_hidden_size": 64,
        "num_attention_heads": 4,
        "max_sequence_length": 256,
        "mask_token_id": tokenizer.mask_token_id,
        "gmask_token_id": tokenizer.gmask_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    model = ChatGLMForCausalLM(ChatGLMConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
        silent = [token for token in range(model.config.vocab_size) if not _is_text(tokenizer, token)]
        if endless:  # logits are 0 for what is no text, and a text's best logit is above
            model.get_input_embeddings().weight[silent] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    return folder


def _is_text(tokenizer: ChatGLM1Tokenizer, token: int) -> bool:
    return token < tokenizer.vocab_size and bool(tokenizer.decode_ids([token]).strip(" \ufffd"))


def glm4_tokenizer(path: Path) -> ChatGLM4Tokenizer:
    """A tokenizer of GLM-4 whose words are single bytes; the file is written to `path`."""
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
    path.write_text("".join(lines))
    return ChatGLM4Tokenizer(path)


def write_glm4(folder: Path, *, endless: bool = False, **changes: Any) -> Path:
    """Writes a GLM-4 folder with random weights that is greedy; `endless` never ends an answer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = glm4_tokenizer(folder / "tokenizer.model")
    sizes = {
        "num_layers": 2,
        "padded_vocab_size": 300,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "kv_channels": 8,
        "num_attention_heads": 4,
        "multi_query_group_num": 2,
        "seq_length": 1024,
        "multi_query_attention": True,
        "add_qkv_bias": True,
        "rope_ratio": 500,
        "rope_ratio_applies_to": "base",
        "generation": 4,
        "eos_token_id": sorted(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    model = ChatGLM2ForCausalLM(ChatGLM2Config(**{**sizes, **changes}))
    if endless:
        model.transformer.output_layer.weight.data[sorted(tokenizer.stop_ids)] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    return folder


def glm_tokenizer(folder: Path) -> GLMTokenizer:
    """A tokenizer of the original GLM with BERT's kind of vocabulary, of whole words."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(_WORDS) + "\n", encoding="utf-8")
    return GLMBertTokenizer(folder / "vocab.txt")


def write_glm(folder: Path, **changes: Any) -> Path:
    """Writes a folder of the original GLM with random weights that is greedy."""
    tokenizer = glm_tokenizer(folder)
    sizes = {
        "num_layers": 2,
        "vocab_size": tokenizer.vocab_size + 5,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "max_sequence_length": 64,
        "output_predict": True,
        "sop_token_id": tokenizer.sop_token_id,
        "mask_token_ids": tokenizer.mask_token_ids,
    }
    torch.manual_seed(0)
    model = GLMForConditionalGeneration(GLMConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
        # What is no word and no end gets a logit of 0, which is hardly ever the best.
        model.get_input_embeddings().weight[[*tokenizer.mask_token_ids, tokenizer.sop_token_id, 1]] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    return folder
