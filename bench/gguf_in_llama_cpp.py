"""Loads a GGUF file of ours in llama.cpp, and compares ids, prompts, logits and answers with glmkit.

    python bench/gguf_in_llama_cpp.py FOLDER [--weights int8] [--texts FILE] [--tokens 32] [--json OUT]

FOLDER is a checkpoint of ChatGLM2, ChatGLM3 or GLM-4; it is exported to a temporary folder. Needs llama-cpp-python,
which is built from source and therefore not in CI (pip install llama-cpp-python; LLAMA_CPP_LIB_PATH names a library
that was built elsewhere). Both sides compute in float32 with a float32 cache on one thread each. The exit code is 1 if
ids, prompts or ends differ.

    ids        every line of FILE, or of a list of difficult ones: text that no control id may come from
    prompts    conversations, by the chat template in the file, rendered by jinja2
    logits     of a prompt of 64 ids, distance relative to their size
    tokens     greedy answers to the prompts, up to the first difference
    ends       the ids that end an answer
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment
from llama_cpp import GGML_TYPE_F32, Llama, llama_vocab_is_eog

import glmkit
from glmkit.chat.messages import Message
from glmkit.chat.templates import prompt_ids
from glmkit.export.gguf import export

TEXTS = [
    "philosophy, soprano, Aesop: s op so p sop eop people",
    "xsop xeop sop\neop [gMASK]sop<sop><|user|> hi </s><s><unk> [MASK] <0x41> <|endoftext|>",
    "你好，世界！ 参考资料  而且 者 王\n\n\t \n 12345 1234 ３．１４",
    "  two blanks,   three   \r\n and a tab\tand é ü ß ñ Ω я العربية हिन्दी 日本語 한국어",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 \ufeff \u00a0 \u3000x",
    "def f(x):\n    return x ** 2  # don't, I'll, WE'RE\n",
    "类型#上衣*材质#牛仔布*颜色#白色*风格#简约",
]
CHATS = [
    [("user", "你好")],
    [
        ("system", "You are kind."),
        ("user", "Is philosophy hard? sop"),
        ("assistant", "No."),
        ("user", "两件上衣多少钱？"),
    ],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        done = export(arguments.folder, Path(work) / "out", weights=arguments.weights)
        file = Path(done.path)
        found = compare(arguments.folder, file, arguments.texts, arguments.tokens)
    found |= {"model": arguments.folder.name, "weights": arguments.weights, "bytes": done.bytes, "file": file.name}
    text = json.dumps(found, indent=2, ensure_ascii=False)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    exact = not (found["ids"]["different"] or found["prompts"]["different"] or found["ends"]["different"])
    sys.exit(0 if exact else 1)


def compare(folder: Path, file: Path, texts: Path | None, tokens: int) -> dict[str, Any]:
    """Everything that is compared, by name."""
    model, tokenizer = glmkit.load(folder, dtype="float32", device="cpu", kernels="torch")
    theirs = Llama(
        str(file), n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32, flash_attn=False,
    )  # fmt: skip
    lines = TEXTS if texts is None else [line for line in texts.read_text("utf-8").split("\n") if line]
    wrong = [line for line in lines if list(tokenizer.encode_text(line)) != tokenize(theirs, line, special=False)]
    prompts = [prompt_ids(tokenizer, [Message(*one) for one in chat]) for chat in CHATS]
    rendered = [render(theirs, chat) for chat in CHATS]
    different = [text for ids, text in zip(prompts, rendered) if list(ids) != tokenize(theirs, text, special=True)]
    ends = {index for index in range(theirs.n_vocab()) if llama_vocab_is_eog(theirs._model.vocab, index)}
    probe = [5 + 31 * place**2 % (tokenizer.vocab_size - 6) for place in range(64)]
    return {
        "ids": {"texts": len(lines), "different": len(wrong), "examples": wrong[:5]},
        "prompts": {"texts": len(prompts), "different": len(different), "examples": different},
        "ends": {"ids": sorted(ends), "different": sorted(ends ^ set(tokenizer.stop_ids))},
        "logits": distance(model, theirs, probe),
        "tokens": [agreement(model, theirs, list(ids), tokens) for ids in prompts],
    }


def tokenize(theirs: Llama, text: str, *, special: bool) -> list[int]:
    return list(theirs.tokenize(text.encode(), add_bos=False, special=special))


def render(theirs: Llama, chat: list[tuple[str, str]]) -> str:
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(theirs.metadata["tokenizer.chat_template"])
    return template.render(messages=[{"role": r, "content": c} for r, c in chat], add_generation_prompt=True)


def distance(model: Any, theirs: Llama, ids: list[int]) -> dict[str, float]:
    """Of all logits relative to their size, and the largest."""
    theirs.reset()
    theirs.eval(ids)
    found = np.array(theirs.scores[: len(ids)])
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0].float().numpy()
    away = found - expected
    size = np.linalg.norm(expected - expected.mean())
    return {"relative": float(np.linalg.norm(away) / size), "largest": float(np.abs(away).max())}


def agreement(model: Any, theirs: Llama, ids: list[int], tokens: int) -> str:
    """How many greedy tokens are the same, from the front; the ends are ignored, so that there are many."""
    theirs.reset()
    theirs.eval(ids)
    mine, other = list(ids), list(ids)
    for _ in range(tokens):
        other.append(int(np.argmax(theirs.scores[len(other) - 1])))
        theirs.eval(other[-1:])
        with torch.inference_mode():
            mine.append(int(model(input_ids=torch.tensor([mine])).logits[0, -1].argmax()))
    same = next((place for place, (a, b) in enumerate(zip(mine[len(ids) :], other[len(ids) :])) if a != b), tokens)
    return f"{same} of {tokens}"


if __name__ == "__main__":
    main()
