"""Speed of prefill and decode of a checkpoint: our loop, and transformers' `generate` on the same model as baseline.

python bench/decode.py FOLDER [--prompt 512] [--tokens 32] [--dtype bfloat16] [--quantize official-int4]
        [--baseline]
"""

from __future__ import annotations

import argparse
import time

import torch

import glmkit  # noqa: F401 - registers the classes
from glmkit.checkpoint import open_folder
from glmkit.engine.decode import stream
from glmkit.engine.sampling import SamplingOptions
from glmkit.loading import choose_device, read_config
from glmkit.registration import LANGUAGE_MODELS
from glmkit.weights import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", choices=["official-int8", "official-int4"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--baseline", action="store_true", help="also transformers' generate on the same model")
    arguments = parser.parse_args()
    bits = {"official-int8": 8, "official-int4": 4, None: None}[arguments.quantize]
    device = choose_device(arguments.device)
    started = time.monotonic()
    with open_folder(arguments.folder) as folder:
        dtype = getattr(torch, arguments.dtype)
        config = read_config(folder)
        model = load_model(folder, LANGUAGE_MODELS[type(config)], config, dtype, device, quantize=bits)
    print(f"load      {time.monotonic() - started:8.1f} s")
    prompt = torch.randint(3, 60_000, (arguments.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    if hasattr(config, "gmask_token_id"):  # ChatGLM-6B and GLM-130B read a prompt up to its mask and the start
        prompt[-2:] = [config.gmask_token_id, config.bos_token_id]
    greedy = SamplingOptions(temperature=0.0)
    steps = list(stream(model, prompt, greedy, stop_ids=(), max_new_tokens=arguments.tokens))
    usage = steps[-1].usage
    assert usage is not None
    print(f"prefill   {usage.prefill_tokens_per_second:8.2f} tok/s ({arguments.prompt} tokens)")
    print(f"decode    {usage.decode_tokens_per_second:8.2f} tok/s ({arguments.tokens} tokens)")
    if arguments.baseline:
        ids = torch.tensor([prompt], device=device)
        times = []
        for new in (1, arguments.tokens):
            started = time.monotonic()
            model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            times.append(time.monotonic() - started)
        print(f"generate  {arguments.prompt / times[0]:8.2f} tok/s prefill")
        print(f"generate  {(arguments.tokens - 1) / (times[1] - times[0]):8.2f} tok/s decode")


if __name__ == "__main__":
    main()
