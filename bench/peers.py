"""llama.cpp against glmkit on the same shapes, by turns in one run. See bench/peers.md for how to build llama.cpp.

    python bench/peers.py --llama-bench llama.cpp/build/bin/llama-bench --folder WORK [--model chatglm2-6b] [--layers 4]
        [--formats q4_0,q8_0] [--rounds 3] [--context 512] [--prompt 512] [--tokens 32] [--json FILE]

Files of the chatglm architecture with random weights are made in the folder if they are not there: 3.6 GB in Q4_0 and
6.6 GB in Q8_0 for 28 layers, written block by block, so no float model is needed. Needs the package gguf. Formats:

    q4_0        as llama-quantize makes it: the output layer in Q6_K    against int4, output layer in int8
    q4_0-pure   the output layer in Q4_0 too                            against int4, output layer in int8
    q8_0                                                                against int8, output layer in int8

A round is: glmkit decodes, llama.cpp decodes, glmkit reads a prompt, llama.cpp reads one. The ratios are medians over
the rounds that no other process disturbed. llama.cpp says its own seconds; loading its file does not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glmkit.bench import machine
from glmkit.bench.measure import Timing, interleaved, paired_ratio
from glmkit.bench.models import preset, random_model
from glmkit.bench.report import Journal, markdown, number
from glmkit.bench.subjects import Ours
from glmkit.bench.work import cache_bytes, weight_bytes

# Format -> (blocks' matrices and embedding, output layer, glmkit's scheme)
FORMATS = {
    "q4_0": ("Q4_0", "Q6_K", "int4"),
    "q4_0-pure": ("Q4_0", "Q4_0", "int4"),
    "q8_0": ("Q8_0", "Q8_0", "int8"),
}
# Kind of block -> bytes, and where its 16-bit scale lies; everything else in it may be any bits.
BLOCKS = {"Q4_0": (18, 0), "Q8_0": (34, 0), "Q6_K": (210, 208)}
_SCALE = 0.005
_POOL_BLOCKS = 4093


def main() -> None:
    arguments = _parser().parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(arguments.json)
    found, best = machine.description(), machine.limits()
    journal.add({"what": "machine", "command": " ".join(sys.argv), **found, "limits": asdict(best)})
    print(f"{found['cpu']}, {found['threads']} threads, reads {best.read_bytes / 1e9:.1f} GB/s", file=sys.stderr)
    lines = [["", "glmkit tok/s", "llama.cpp tok/s", "glmkit / llama.cpp", "clean rounds"]]
    for name in arguments.formats.split(","):
        lines += compare(name, arguments, journal, best)
    print(markdown(lines))


def compare(name: str, arguments: argparse.Namespace, journal: Journal, best: machine.Limits) -> Iterator[list[str]]:
    """Measures one format against its counterpart; yields lines of the table."""
    config = preset(arguments.model, arguments.layers)
    path = arguments.folder / f"{arguments.model}-{config.num_layers}-{name}.gguf"
    if not path.exists():
        print(f"writing {path}", file=sys.stderr)
        write_gguf(path, config, *FORMATS[name][:2])
    scheme = FORMATS[name][2]
    ours = Ours(random_model(config, scheme, output_layer="int8"), f"glmkit {scheme}")
    theirs = f"llama.cpp {name}"
    decode, prompt = ("-p", "0", "-n", str(arguments.tokens), "-d", str(arguments.context)), ("-n", "0", "-p")
    works = {
        ("decode", ours.name): ours.decode(1, arguments.context, arguments.tokens),
        ("decode", theirs): llama(arguments.llama_bench, path, *decode),
        ("prefill", ours.name): ours.prefill(arguments.prompt),
        ("prefill", theirs): llama(arguments.llama_bench, path, *prompt, str(arguments.prompt)),
    }
    named: dict[str, Callable[[], float]] = {" ".join(key): work for key, work in works.items()}
    for work in (ours.decode(1, arguments.context, 1), ours.prefill(arguments.prompt)):
        work()  # llama-bench warms up by itself
    timings = interleaved(named, arguments.rounds, warm=False, patience=2)
    for what, tokens in (("decode", arguments.tokens), ("prefill", arguments.prompt)):
        mine, other = timings[f"{what} {ours.name}"], timings[f"{what} {theirs}"]
        ratio, mark = paired_ratio(mine, other)
        record = {"what": what, "subject": ours.name, "peer": theirs, "layers": config.num_layers, "ratio": ratio}
        if what == "decode":
            columns = arguments.context + (tokens + 1) / 2
            read = weight_bytes(ours.model) + cache_bytes(config, 1, columns, ours.model.dtype.itemsize)
            record["read_share"] = read * tokens / mine.seconds / best.read_bytes
        speeds = {"tokens_per_second": tokens / mine.seconds, "peer_tokens_per_second": tokens / other.seconds}
        journal.add(record | speeds | {"ratio_mark": mark, "context": arguments.context, "prompt": arguments.prompt})
        yield [
            f"{what}, {ours.name} against {theirs}",
            *(f"{one.mark}{number(tokens / one.seconds)}" for one in (mine, other)),
            f"{mark}{ratio:.2f}",
            str(_clean_rounds(mine, other)),
        ]


def llama(command: str, path: Path, *flags: str) -> Callable[[], float]:
    """One run of llama-bench; it returns the seconds that it measured itself."""

    def work() -> float:
        threads = ("-t", str(torch.get_num_threads()))
        call = [command, "-m", str(path), *flags, *threads, "-r", "1", "-o", "json"]
        done = subprocess.run(call, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(call)} failed:\n{done.stderr[-2000:]}")
        return float(json.loads(done.stdout)[0]["avg_ns"]) / 1e9

    return work


def _clean_rounds(mine: Timing, other: Timing) -> int:
    return sum(a.clean and b.clean for a, b in zip(mine.repetitions, other.repetitions))


# --- files of llama.cpp ---


def write_gguf(path: Path, config: Any, kind: str, output: str) -> None:
    """Writes a model of the chatglm architecture with random weights.

    Args:
        path: The file; it appears when it is complete.
        config: Sizes, of ChatGLM2 and later.
        kind: Kind of the blocks' matrices and of the embedding, one of `BLOCKS`.
        output: Kind of the output layer.
    """
    import gguf

    new = path.with_suffix(".part")
    writer = gguf.GGUFWriter(new, "chatglm")
    writer.add_context_length(config.seq_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.multi_query_group_num)
    writer.add_layer_norm_rms_eps(config.layernorm_epsilon)
    writer.add_rope_dimension_count(config.kv_channels // 2)
    writer.add_rope_freq_base(config.rotary_base_and_scale()[0])
    writer.add_vocab_size(config.padded_vocab_size)
    writer.add_tokenizer_model("none")  # llama-bench feeds ids
    tensors = list(_tensors(config, kind, output))
    for name, shape, kind_of_it in tensors:
        if kind_of_it == "F32":
            writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) * 4)
        else:
            rows, columns = shape
            size = BLOCKS[kind_of_it][0]
            numbers = 256 if kind_of_it == "Q6_K" else 32
            width = columns // numbers * size
            writer.add_tensor_info(
                name, (rows, width), np.dtype(np.uint8), rows * width, gguf.GGMLQuantizationType[kind_of_it]
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, kind_of_it in tensors:
        writer.write_tensor_data(_random(shape, kind_of_it))
    writer.close()
    new.rename(path)


def _tensors(config: Any, kind: str, output: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape (rows, columns) and kind of every tensor, as llama.cpp reads them for this architecture."""
    hidden, inner, width = config.hidden_size, config.ffn_hidden_size, config.kv_channels
    queries = config.num_attention_heads * width
    packed = queries + 2 * config.multi_query_group_num * width
    yield "token_embd.weight", (config.padded_vocab_size, hidden), kind
    for layer in range(config.num_layers):
        start = f"blk.{layer}."
        yield f"{start}attn_norm.weight", (hidden,), "F32"
        yield f"{start}attn_qkv.weight", (packed, hidden), kind
        yield f"{start}attn_qkv.bias", (packed,), "F32"
        yield f"{start}attn_output.weight", (hidden, queries), kind
        yield f"{start}ffn_norm.weight", (hidden,), "F32"
        yield f"{start}ffn_up.weight", (2 * inner, hidden), kind
        yield f"{start}ffn_down.weight", (hidden, inner), kind
    yield "output_norm.weight", (hidden,), "F32"
    yield "output.weight", (config.padded_vocab_size, hidden), output


def _random(shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Random numbers around one for norms and biases; blocks of random bits with scales of a usual size."""
    random = np.random.default_rng(0)
    if kind == "F32":
        return random.normal(1.0, 0.1, shape).astype(np.float32)
    size, place = BLOCKS[kind]
    pool = random.integers(0, 256, (_POOL_BLOCKS, size), dtype=np.uint8)
    scale = np.full(_POOL_BLOCKS, _SCALE / (32 if kind == "Q6_K" else 16 if kind == "Q8_0" else 1), np.float16)
    pool[:, place : place + 2] = scale.view(np.uint8).reshape(-1, 2)
    rows, columns = shape
    blocks = rows * columns // (256 if kind == "Q6_K" else 32)
    return np.resize(pool, (blocks, size)).reshape(rows, -1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bench", required=True, help="the program, built as bench/peers.md says")
    parser.add_argument("--folder", type=Path, required=True, help="for llama.cpp's files, some GB")
    parser.add_argument("--model", default="chatglm2-6b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--formats", default="q4_0,q8_0", help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    main()
