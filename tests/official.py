"""Tiny folders laid out as the official repositories: their config.json, shards, and python files that must not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.models.chatglm2_config import ChatGLM2Config
from tiny import train_tokenizer

CODE = ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py", "quantization.py")
CANARY = "the_code_of_the_checkpoint_was_run"

# The official config.json of ChatGLM2-6B and ChatGLM3-6B, with small sizes; `_name_or_path` differs.
CONFIG: dict[str, Any] = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 48,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 32,
    "kv_channels": 8,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "original_rope": True,
    "padded_vocab_size": 448,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 256,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def weights(dtype: torch.dtype = torch.float16, seed: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    """Random weights under their official names, the constant that old checkpoints store among them."""
    torch.manual_seed(seed)
    model = ChatGLM2ForCausalLM(ChatGLM2Config.from_dict(CONFIG | changes))
    state = {
        name: (torch.randn(tensor.shape) * 0.3 if tensor.ndim > 1 else tensor + torch.randn(tensor.shape) * 0.1)
        for name, tensor in model.state_dict().items()
    }
    state["transformer.rotary_pos_emb.inv_freq"] = torch.ones(2)
    return {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}


def write_weights(folder: Path, state: dict[str, torch.Tensor], form: str = "shards") -> None:
    """Writes weights as "shards" (of safetensors), "bin-shards", "safetensors" or "bin"."""
    suffix = "bin" if "bin" in form else "safetensors"
    stem = "pytorch_model" if suffix == "bin" else "model"
    if "shards" not in form:
        _write(folder / f"{stem}.{suffix}", state)
        return
    names, half = list(state), len(state) // 2
    files = [f"{stem}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    weight_map = {}
    for file, part in zip(files, (names[:half], names[half:])):
        _write(folder / file, {name: state[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 13_744_473_856}, "weight_map": weight_map}  # stale, as in released ones
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def _write(path: Path, state: dict[str, torch.Tensor]) -> None:
    if path.suffix == ".bin":
        torch.save(state, path)
    else:
        save_file(state, path, metadata={"format": "pt"})


def write_folder(
    folder: Path,
    generation: int = 3,
    *,
    form: str = "shards",
    dtype: torch.dtype = torch.float16,
    tokenizer: Path | None = None,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Writes a whole official folder; answers of its model end after a few tokens.

    Its python files leave the file CANARY in the folder if anybody runs them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"THUDM/chatglm{generation}-6b"
    config = {"_name_or_path": name} | CONFIG | changes
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    plain = {key: value for key, value in changes.items() if key in CONFIG}
    write_weights(folder, weights(dtype, seed, **plain), form)
    for code in CODE:
        roles = '"<|system|>"' if generation == 3 else '"sop"'
        text = f"open({str(folder / CANARY)!r}, 'w').close()\n\nclass ChatGLMTokenizer:\n    specials = [{roles}]\n"
        (folder / code).write_text(text)
    generation_config = {"eos_token_id": 2, "pad_token_id": 0, "max_new_tokens": 6}
    (folder / "generation_config.json").write_text(json.dumps(generation_config))
    if tokenizer is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    described = {
        "name_or_path": name,
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


__all__ = ["CANARY", "CODE", "CONFIG", "train_tokenizer", "weights", "write_folder", "write_weights"]
