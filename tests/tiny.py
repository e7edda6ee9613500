"""Small stand-ins for tests: a tokenizer trained on the spot, a model with a script, a real folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sentencepiece
import torch

from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer

_CORPUS = [
    "你好，今天天气很好。",
    "hello world, how are you?",
    "上衣 材质 棉 显瘦",
    "1 + 2 = 3",
    "I like tea and rice",
] * 20


def train_tokenizer(path: Path) -> Path:
    """Writes a SentencePiece file with the properties of the official one: byte fallback, dummy prefix, BPE."""
    with path.open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_CORPUS),
            model_writer=writer,
            model_type="bpe",
            vocab_size=400,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


def sizes(tokenizer: ChatGLMTokenizer, **changes: Any) -> dict[str, Any]:
    """The config of a tiny ChatGLM3."""
    return {
        "num_layers": 2,
        "padded_vocab_size": tokenizer.vocab_size + 20,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "kv_channels": 8,
        "num_attention_heads": 4,
        "multi_query_group_num": 2,
        "seq_length": 256,
        "multi_query_attention": True,
        "add_qkv_bias": True,
        "generation": tokenizer.generation,
        **changes,
    }


def write_model(
    folder: Path, tokenizer_file: Path, *, generation: int = 3, endless: bool = False, **changes: Any
) -> Path:
    """Writes a whole checkpoint folder with random weights that is greedy; `endless` never ends an answer."""
    tokenizer = ChatGLMTokenizer(tokenizer_file, generation=generation)
    torch.manual_seed(0)
    config = ChatGLM2Config(**sizes(tokenizer, **changes))
    model = ChatGLM2ForCausalLM(config)
    if endless:
        model.transformer.output_layer.weight.data[sorted(tokenizer.stop_ids)] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    return folder


class ScriptedModel:
    """A language model that answers with given ids, whatever it is asked; it keeps what it was given.

    Args:
        tokenizer: Tells the size of the vocabulary.
        ids: What it says, one id for each call.
        context_tokens: Its context.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer, ids: Sequence[int] = (), context_tokens: int = 2048) -> None:
        self.config = SimpleNamespace(
            num_hidden_layers=1, vocab_size=len(tokenizer) + 20, max_position_embeddings=context_tokens
        )
        self.device = torch.device("cpu")
        self.generation_config = None
        self.script = list(ids)
        self.given: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, past_key_values: Any, **_: Any) -> Any:
        self.given.append(input_ids[0].tolist())
        state = torch.zeros(1, 1, input_ids.shape[1], 4)
        past_key_values.update(state, state, 0)
        logits = torch.zeros(1, 1, self.config.vocab_size)
        logits[0, 0, self.script.pop(0)] = 20.0
        return SimpleNamespace(logits=logits)


def say(tokenizer: ChatGLMTokenizer, text: str, metadata: str = "", end: str | None = "</s>") -> list[int]:
    """The ids of a reply as the model would generate it."""
    header = tokenizer.encode_text(f"{metadata}\n") if tokenizer.generation == 3 else []
    last = [] if end is None else [2 if end == "</s>" else tokenizer.get_command(end)]
    return [*header, *tokenizer.encode_text(text), *last]
