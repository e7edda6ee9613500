"""Speed and memory of training steps: ours, and the official scripts' way on the same model as baseline.

python bench/training.py [--method lora|full|ptuning_v2] [--lengths adgen|long|2048] [--layers 4] [--rounds 3]
        [--quantize official-int4] [--dtype float32] [--packing] [--checkpointing]

The model is a slice of ChatGLM2-6B's width with random weights. Both variants learn the same records:

    official    every record padded to the maximum, a dense mask, logits of all positions in float32
    ours        batches of near-equal length (or packed rows), no mask where none is needed, logits where a label is

Records are made up, with the lengths of ADGEN (prompt 52 +- 13 tokens with its template, answer 76 +- 18, cut at 64 and
128, padded to 193), with long ones (256 to 2,048 tokens, padded to 2,048), or all of 2,048 tokens (nothing to gain from
padding). Every variant runs in a process of its own, by turns; counted are tokens of records a second (padding is none)
and the peak of memory above what was there before the first step. One variant alone, for instance P-Tuning on a whole
model in int4, with the memory it needs in all:

    python bench/checkpoint_of_random_weights.py FOLDER --family chatglm2-6b --dtype float16
    python bench/training.py --checkpoint FOLDER --quantize official-int4 --method ptuning_v2 --dtype bfloat16 \
        --checkpointing --batch 1 --accumulation 1 --steps 1 --variant ours
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glmkit import hf
from glmkit.bench.measure import PeakMemory, memory_bytes
from glmkit.data.examples import IGNORED, Example
from glmkit.loading import load
from glmkit.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM
from glmkit.quant.official import quantize_model
from glmkit.train.arguments import MethodBlock, TrainBlock
from glmkit.train.methods import make_method
from glmkit.train.processes import OneProcess, learning
from glmkit.train.sources import Records

MAXIMUM = {"adgen": 193, "long": 2048, "2048": 2048}


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.variant:
        print(json.dumps(measure(arguments)))
        return
    command = [sys.executable, __file__, *sys.argv[1:]]
    found: dict[str, list[dict[str, float]]] = {"official": [], "ours": []}
    for _ in range(arguments.rounds):
        for variant, rows in found.items():
            done = subprocess.run([*command, "--variant", variant], check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(variant, json.dumps(rows[-1]), file=sys.stderr)
    speed = {name: statistics.median(row["tokens_per_second"] for row in rows) for name, rows in found.items()}
    memory = {name: statistics.median(row["peak_above_start_mb"] for row in rows) for name, rows in found.items()}
    print(f"{arguments.method}, {arguments.lengths}, {arguments.layers} layers, {arguments.dtype}")
    print(f"official  {speed['official']:8.1f} tok/s  {memory['official']:8.0f} MB above the weights")
    print(f"ours      {speed['ours']:8.1f} tok/s  {memory['ours']:8.0f} MB above the weights")
    print(f"ratio     {speed['ours'] / speed['official']:8.2f} x      {memory['ours'] / memory['official']:8.2f} x")


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Runs one variant.

    Args:
        arguments: What the command was given.

    Returns:
        tokens_per_second, peak_above_start_mb, loss.
    """
    torch.manual_seed(0)
    model = make_model(arguments)
    block = MethodBlock(name=arguments.method, lora_dropout=0.0)
    prepared = make_method(block).prepare(model)
    if arguments.checkpointing:
        hf.checkpoint_activations(model)
    prepared.train()
    examples = make_examples(arguments.lengths, arguments.records, model.config.padded_vocab_size)
    step = _ours if arguments.variant == "ours" else _official
    do_step = step(prepared, examples, arguments)
    before = memory_bytes("RssAnon")
    seconds, tokens, loss = [], 0.0, 0.0
    with PeakMemory() as peak:
        if arguments.steps > 1:
            do_step(0)  # the optimizer makes its state, buffers grow
        for number in range(1, arguments.steps + 1):
            started = time.perf_counter()
            count, loss = do_step(number)
            seconds.append(time.perf_counter() - started)
            tokens += count
    return {
        "tokens_per_second": tokens / sum(seconds),
        "seconds_per_step": statistics.median(seconds),
        "peak_above_start_mb": peak.bytes / 1e6,
        "peak_in_all_mb": (before + peak.bytes) / 1e6,
        "loss": loss,
    }


def make_model(arguments: argparse.Namespace) -> Any:
    """Loads the checkpoint, or builds the slice with random weights."""
    if arguments.checkpoint:
        return load(arguments.checkpoint, dtype=arguments.dtype, quantize=arguments.quantize).model
    config = ChatGLM2Config(num_layers=arguments.layers, generation=2)
    dtype = getattr(torch, arguments.dtype)
    torch.set_default_dtype(dtype)
    model = ChatGLM2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return (
        quantize_model(model, {"official-int4": 4, "official-int8": 8}[arguments.quantize])
        if arguments.quantize
        else model
    )


def make_examples(lengths: str, number: int, vocabulary: int) -> list[Example]:
    """Makes records of random ids.

    Args:
        lengths: "adgen", "long" or "2048".
        number: How many.
        vocabulary: Ids are below it.
    """
    generator = random.Random(1)
    made = []
    for index in range(number):
        if lengths == "adgen":
            prompt = min(64, max(20, round(generator.gauss(52, 13))))
            answer = min(128, max(20, round(generator.gauss(76, 18)))) + 1
        else:
            whole = 2048 if lengths == "2048" else generator.randint(256, 2048)
            prompt = whole // 3
            answer = whole - prompt
        ids = torch.tensor([generator.randrange(3, vocabulary) for _ in range(prompt + answer)], dtype=torch.int32)
        labels = ids.clone()
        labels[:prompt] = IGNORED
        made.append(Example(ids, labels, answer, f"made {index}"))
    return made


Step = Callable[[int], tuple[int, float]]  # number -> tokens of records, loss


def _official(model: Any, examples: list[Example], arguments: argparse.Namespace) -> Step:
    """Fixed shapes, a dense mask, float32 logits of all positions; plain AdamW (SGD if everything learns)."""
    optimizer = _optimizer(model, arguments.method, fused=False)
    columns = MAXIMUM[arguments.lengths]
    causal = torch.ones(columns, columns, dtype=torch.bool).tril()

    def step(number: int) -> tuple[int, float]:
        members = _members(examples, number, arguments)
        total = 0.0
        for first in range(0, len(members), arguments.batch):
            chosen = members[first : first + arguments.batch]
            ids = torch.zeros(len(chosen), columns, dtype=torch.int64)
            labels = torch.full_like(ids, IGNORED)
            for row, example in enumerate(chosen):
                ids[row, : len(example.input_ids)] = example.input_ids
                labels[row, : len(example.labels)] = example.labels
            mask = causal & (ids != 0)[:, None, None, :]
            logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
            (loss / (len(members) // arguments.batch)).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(learning(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return sum(len(example.input_ids) for example in members), total * arguments.batch / len(members)

    return step


def _ours(model: Any, examples: list[Example], arguments: argparse.Namespace) -> Step:
    """What the loop does with the same records, a window of them for each step."""
    block = TrainBlock(per_device_train_batch_size=arguments.batch)
    pack_to = MAXIMUM["2048"] if arguments.packing else None
    alone = OneProcess(torch.device("cpu"))
    alone.prepare(model, lambda module: _optimizer(module, arguments.method, fused=True))

    def step(number: int) -> tuple[int, float]:
        members = _members(examples, number, arguments)
        windows = Records(members, 0, block, pack_to=pack_to).windows({}, arguments.accumulation)
        window = next(windows)
        label_tokens = sum(batch.label_tokens for batch in window.batches)
        total = 0.0
        for place, batch in enumerate(window.batches, start=1):
            loss, _ = alone.loss(batch.inputs)
            alone.backward(loss / label_tokens, last=place == len(window.batches))
            total += loss.item()
        alone.step(1e-4, 1.0, 1.0)
        return sum(batch.tokens for batch in window.batches), total / label_tokens

    return step


def _members(examples: list[Example], number: int, arguments: argparse.Namespace) -> list[Example]:
    size = arguments.batch * arguments.accumulation
    start = number * size % len(examples)
    return examples[start : start + size]


def _optimizer(model: Any, method: str, *, fused: bool) -> torch.optim.Optimizer:
    if method == "full":  # AdamW's two moments of a slice this wide do not fit beside it
        return torch.optim.SGD(learning(model), lr=1e-4)
    return torch.optim.AdamW(learning(model), lr=1e-4, fused=fused)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["lora", "full", "ptuning_v2"], default="lora")
    parser.add_argument("--lengths", choices=list(MAXIMUM), default="adgen")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="records at once")
    parser.add_argument("--accumulation", type=int, default=4, help="batches of a step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--records", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--quantize", choices=["official-int8", "official-int4"])
    parser.add_argument("--checkpoint", help="a folder of ChatGLM2/3's layout instead of the slice")
    parser.add_argument("--packing", action="store_true", help="ours: rows of 2,048 columns filled with records")
    parser.add_argument("--checkpointing", action="store_true", help="both: activations are computed again")
    parser.add_argument("--variant", choices=["official", "ours"], help="one of them, in this process")
    return parser


if __name__ == "__main__":
    main()
