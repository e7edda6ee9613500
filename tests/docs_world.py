"""What the documentation's commands find where they are run: small models and data under the names that pages give."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import official_families
import tiny
import tiny_families
from glmkit.models.glm import GLMForConditionalGeneration
from glmkit.models.glm_config import GLMConfig
from glmkit.tokenizers.glm import GLMBertTokenizer

_TURNS = [
    {"role": "user", "content": "上衣 棉 tea"},
    {"role": "assistant", "content": "1 + 2"},
    {"role": "tool", "name": "add", "parameters": {"a": 1}, "observation": "3"},
    {"role": "assistant", "content": "rice"},
]
_STEP = [["getRain", '{"city": "Oslo"}', 'Rain.\nAction: getRain\nAction Input: {"city": "Oslo"}'], "Response: 0 mm"]
_DONE = {"input": "Rain?", "intermediate_steps": [_STEP], "Final Thought": "known", "output": "No."}
_TOOLALPACA = [{"NLDocumentation": "getRain", "Instances": [_DONE]}]
_ADGEN = [{"content": f"上衣 棉 {n}", "summary": f"hello {n} world"} for n in range(8)]
_DIALOGUES = [{"tools": [{"name": "add"}], "conversations": _TURNS}] * 8
_CLOZE = [{"premise": "i like tea", "hypothesis": "i like rice", "label": "entailment"}] * 8
_COPA = [{"premise": "i like tea", "choice1": "yes", "choice2": "no", "question": "effect", "label": 0}] * 8
_TNEWS = [{"sentence": "i like tea", "keywords": "tea", "label": "104", "label_desc": "news_finance"}] * 8
_EXAM = [
    {"id": n, "inputs_pretokenized": "tea?\nA. 1\nB. 2\nC. 3\nD. 4", "choices_pretokenized": [" A", " B", " C", " D"],
     "label": n % 4, "targets_pretokenized": ["ABCD"[n % 4]]} for n in range(3)
]  # fmt: skip
# Files in JSON Lines, by the names that pages give them.
ROWS: dict[str, list[dict[str, Any]]] = {
    **dict.fromkeys(("AdvertiseGen/train.json", "AdvertiseGen/dev.json"), _ADGEN),
    **dict.fromkeys(("dev.json", "train.jsonl", "dev.jsonl"), _ADGEN),
    **dict.fromkeys(("data/train.json", "data/dev.json", "train_5001.json", "in.jsonl", "questions.jsonl"), _ADGEN),
    "general.jsonl": _ADGEN,
    "train.json": [{"prompt": "tea", "response": "rice", "history": [["hello", "world"]] * (n % 2)} for n in range(8)],
    "tool_alpaca.jsonl": _DIALOGUES,
    "tool_alpaca_dev.jsonl": _DIALOGUES,
    "tools_dev.jsonl": _DIALOGUES,
    "RTE/train.jsonl": _CLOZE,
    "RTE/val.jsonl": _CLOZE,
    "COPA/train.jsonl": _COPA,
    "COPA/val.jsonl": _COPA,
    "tnews/train.json": _TNEWS,
    "tnews/dev.json": _TNEWS,
    "ceval/val/STEM/college_physics.jsonl": _EXAM,
    "gsm8k/test.jsonl": [{"question": "1 + 2 = ?", "answer": "1 + 2\n#### 3"}] * 3,
    "lambada_test.jsonl": [{"text": "i like tea and rice"}] * 3,
    "texts/some.jsonl": [{"text": "i like tea and rice . " * 20}] * 8,
    "cnn_dm/train.jsonl": [{"source": "i like tea and rice", "target": "tea"}] * 8,
    "data/afqmc/dev.json": [
        {"inputs_pretokenized": "i like tea [MASK]", "choices_pretokenized": ["yes", "no"], "label": 0}
    ] * 3,
}  # fmt: skip
# Files in one JSON array.
ARRAYS: dict[str, list[dict[str, Any]]] = {
    "alpaca_data.json": [{"instruction": "1 + 2", "input": "tea" * (n % 2), "output": "3"} for n in range(8)],
    "train_data.json": _TOOLALPACA,
    "ToolAlpaca/data/train_data.json": _TOOLALPACA,
}
TEXTS = {
    "notes.txt": "tea and rice\n",
    "text.txt": "i like tea and rice . " * 30,
    "texts.txt": "i like tea\n",
    **dict.fromkeys(("train.source", "val.source", "customization/train.source"), "i like tea and rice\n" * 8),
    **dict.fromkeys(("train.target", "val.target", "customization/train.target"), "tea and rice\n" * 8),
    **dict.fromkeys(("customization/val.source", "customization/val.target"), "tea and rice\n" * 8),
    "afqmc.yaml": 'name: afqmc\ntype: mul\npath: afqmc\nfile-pattern: {dev: "dev.json"}\n',
    "recipe.yaml": "model: {path: chatglm3-6b}\ndata: {train_file: AdvertiseGen/train.json}\noutput: {dir: own}\n",
    "deepspeed.json": '{"zero_optimization": {"stage": 2}}\n',
    "keys.txt": "0123456789abcdef0123456789abcdef\n",
}


def write_models(folder: Path) -> None:
    """Writes a small folder for every model that a page names.

    Args:
        folder: What GLMKIT_MODELS shall be.
    """
    folder.mkdir(parents=True)
    vocabulary = tiny.train_tokenizer(folder / "tokenizer.model")
    even = {"ffn_hidden_size": 64}  # int4 has groups of 32
    for name in ("chatglm2-6b", "chatglm2-6b-32k", "chatglm3-6b", "chatglm3-6b-base"):
        generation = 3 if "3-" in name else 2
        context = 2_048 if "base" in name else 512  # evaluation.md has windows of 1,024
        tiny.write_model(folder / name, vocabulary, generation=generation, num_layers=4, seq_length=context, **even)
    vocabulary.unlink()
    tiny_families.write_chatglm(folder / "chatglm-6b")
    tiny_families.write_glm4(folder / "glm-4-9b-chat")
    _write_glm(folder / "glm-10b")
    for name in ("glm-10b-chinese", "glm-large", "glm-large-chinese", "glm-roberta-large", "glm-2b"):
        shutil.copytree(folder / "glm-10b", folder / name)
    ranks = {family.name: family for family in official_families.FAMILIES}
    row = ranks["glm-130b, 2 ranks"]
    official_families.write_family(folder / "glm-130b", replace(row, write_tokenizer=lambda at: _rounded(row, at)))


def _rounded(row: official_families.Family, folder: Path) -> dict[str, Any]:
    """Vocabularies are padded, so that they can be divided."""
    fields = row.write_tokenizer(folder)
    return fields | {"vocab_size": -(-fields["vocab_size"] // 64) * 64}


def _write_glm(folder: Path) -> None:
    folder.mkdir()
    words = '[PAD] [UNK] [CLS] [SEP] [MASK] i like tea and rice yes no beijing is the capital of , . ? "'.split()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = GLMBertTokenizer(folder / "vocab.txt")
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_sequence_length": 256}
    ids = {"sop_token_id": tokenizer.sop_token_id, "mask_token_ids": tokenizer.mask_token_ids}
    config = GLMConfig(**shape, **ids, vocab_size=-(-tokenizer.vocab_size // 8) * 8, output_predict=True)
    GLMForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_files(folder: Path) -> None:
    """Writes the data files that pages name.

    Args:
        folder: An existing folder.
    """
    texts = dict(TEXTS)
    for name, rows in ROWS.items():
        texts[name] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    texts |= {name: json.dumps(rows, ensure_ascii=False) for name, rows in ARRAYS.items()}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    with zipfile.ZipFile(folder / "mmlu.zip", "w") as archive:
        for split in ("dev", "test"):
            for subject in ("professional_law", "college_physics"):
                archive.writestr(f"data/{split}/{subject}_{split}.csv", "tea?,1,2,3,4,A\n" * 5)


def write_adapter(folder: Path, base: Path) -> None:
    """Writes a LoRA that changes something, as a run would leave it.

    Args:
        folder: Where it shall be.
        base: Folder of its model.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    import glmkit

    model = get_peft_model(glmkit.load(base, dtype="float32").model, LoraConfig(task_type="CAUSAL_LM", r=2))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    model.save_pretrained(folder)
