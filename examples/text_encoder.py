"""ChatGLM3 as the text encoder of a picture model: shapes, equality with the full model, and what int4 changes.

    python examples/text_encoder.py                                       glm-nano, which is in the package
    python examples/text_encoder.py models/chatglm3-6b --quantize int4 "一只在月球上的猫"

Kolors conditions its pictures on two tensors: the states after the last block but one, of 256 places with the text at
their end, and what the last block gives at the last token. diffusers takes them as they are:

    pipe = KolorsPipeline.from_pretrained(KOLORS, text_encoder=None, tokenizer=None)
    pipe(prompt_embeds=words.states[-2], pooled_prompt_embeds=words.pooled,
         negative_prompt_embeds=nothing.states[-2], negative_pooled_prompt_embeds=nothing.pooled)
"""

from __future__ import annotations

import argparse

import torch

import glmkit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="glm-nano")
    parser.add_argument("prompts", nargs="*", default=["一张猫的照片，微距，变焦，高质量，电影", "a photo of a cat"])
    parser.add_argument("--quantize", choices=["int8", "int4"], default="int8")
    arguments = parser.parse_args()
    encoder = glmkit.load_encoder(arguments.model, dtype="float32", kernels="torch")
    words = glmkit.encode(encoder, arguments.prompts)
    nothing = glmkit.encode(encoder, "")
    say("states[-2]", f"{tuple(words.states[-2].shape)}  (texts, places, hidden size)")
    say("pooled", f"{tuple(words.pooled.shape)}")
    say("of the empty text", f"{tuple(nothing.states[-2].shape)}, {tuple(nothing.pooled.shape)}")
    say("tokens of each text", f"{words.attention_mask.sum(1).tolist()}")

    full = glmkit.load(arguments.model, dtype="float32", kernels="torch")
    padding = {"padding": "max_length", "max_length": 256, "truncation": True}
    inputs = full.tokenizer(arguments.prompts, **padding, return_tensors="pt").to(full.device)
    with torch.no_grad():
        states = full.model(**inputs, output_hidden_states=True).hidden_states
    away = distance(words.states[-2], states[-2]), distance(words.pooled, states[-1][:, -1])
    say("from the full model", f"{away[0]:.1e}, {away[1]:.1e}")
    say("bytes", f"{size(encoder.model):,}; of the full model {size(full.model):,}")

    smaller = glmkit.load_encoder(arguments.model, dtype="float32", kernels="torch", quantize=arguments.quantize)
    found = glmkit.encode(smaller, arguments.prompts)
    away = distance(found.states[-2], words.states[-2]), distance(found.pooled, words.pooled)
    say(f"{arguments.quantize}", f"{away[0]:.1e}, {away[1]:.1e}; {size(smaller.model):,} bytes")


def say(what: str, text: str) -> None:
    print(f"{what:<22}{text}")


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far two tensors are apart, relative to the size of the second."""
    return float((found - expected).norm() / expected.norm())


def size(model: torch.nn.Module) -> int:
    """Bytes of a model's weights."""
    return sum(parameter.nbytes for parameter in model.parameters())


if __name__ == "__main__":
    main()
