"""What torch's own quantised operators give inside the whole model, beside glmkit in the same run.

    python bench/stock_torch.py [--model chatglm2-6b] [--layers 4] [--rows 1,4,16] [--prompt 512] [--context 512]
        [--variants bf16,int8-weight-only,int4-weight-only,dynamic-int8,glmkit-int8,glmkit-int4] [--json FILE]

    bf16                torch.nn.Linear, the network of glmkit without native code
    bf16-compiled       the same; every part that is not attention compiled by inductor, with freezing and max-autotune
    int8-weight-only    torch._weight_int8pack_mm
    int4-weight-only    torch.ops.aten._weight_int4pack_mm_for_cpu, groups of 32
    dynamic-int8        each token rounded to int8, torch.ops.onednn.qlinear_pointwise
    torchao-int8        torchao's weight-only int8, compiled as above (torchao 0.18; takes minutes a number of rows)
    torchao-int4        torchao's weight-only int4 in groups of 32, likewise
    glmkit-int8, -int4  the native code, output layer in int8 as in all quantised variants but torchao's int4

All have the same shapes and random weights. Every operator is first compared with the product of its dequantised
weight; the error is printed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glmkit.bench import machine
from glmkit.bench.measure import interleaved, paired_ratio
from glmkit.bench.models import preset, random_model
from glmkit.bench.report import Journal, markdown, number
from glmkit.bench.subjects import Ours, random_cache, random_prompts
from glmkit.engine.cache import new_cache
from glmkit.quant.linear import GROUP, QuantizedLinear, unpack_nibbles

DEFAULT = "bf16,int8-weight-only,int4-weight-only,dynamic-int8,glmkit-int8,glmkit-int4"
COMPILED = ("bf16-compiled", "torchao-int8", "torchao-int4")


def main() -> None:
    arguments = _parser().parse_args()
    names = arguments.variants.split(",")
    journal = Journal(arguments.json)
    found = machine.description()
    best = machine.limits()
    journal.add({"what": "machine", "command": " ".join(sys.argv), **found, "limits": asdict(best)})
    subjects = {}
    for name in names:
        print(f"making {name}", file=sys.stderr)
        subjects[name] = make(name, arguments.model, arguments.layers)
    lines = [["", *names]]
    for rows in _numbers(arguments.rows):
        works = {name: one.decode(rows, arguments.context, arguments.tokens) for name, one in subjects.items()}
        lines.append(measured(f"decode, batch {rows}", works, rows * arguments.tokens, arguments, journal))
    for tokens in _numbers(arguments.prompt):
        works = {name: one.prefill(tokens) for name, one in subjects.items()}
        lines.append(measured(f"prefill {tokens}", works, tokens, arguments, journal))
    print(f"\n{arguments.model}, {arguments.layers or 'all'} blocks, tok/s of all rows; ratios to {names[-1]}\n")
    print(markdown(lines))


def measured(
    label: str, works: dict[str, Callable[[], float]], tokens: int, arguments: argparse.Namespace, journal: Journal
) -> list[str]:
    """Times all variants by turns; returns a line of the table."""
    print(label, file=sys.stderr)
    timings = interleaved(works, arguments.repeats)
    last = timings[list(works)[-1]]
    cells = [label]
    for name, timing in timings.items():
        ratio, mark = paired_ratio(last, timing)
        speed = tokens / timing.seconds
        record = {"what": label, "subject": name, "layers": arguments.layers, "tokens_per_second": speed}
        repetitions = [asdict(one) for one in timing.repetitions]
        journal.add(record | {"mark": timing.mark, "ratio_of_last": ratio, "repetitions": repetitions})
        cells.append(f"{timing.mark}{number(speed)} ({mark}{ratio:.2f} x)")
    return cells


# --- variants ---


def make(name: str, model: str, layers: int | None) -> Any:
    """A subject for one variant."""
    config = preset(model, layers)
    if name.startswith("glmkit-"):
        return Ours(random_model(config, name.removeprefix("glmkit-"), output_layer="int8"), name)
    if name.startswith("bf16"):
        network = random_model(config, "bf16")
    elif name.startswith("torchao"):
        network = _torchao(random_model(config, "bf16"), name.removeprefix("torchao-"))
    else:
        scheme, kind = _STOCK[name]
        network = random_model(config, scheme, output_layer="int8", packed=False)
        _replace(network, name, kind)
    if name in COMPILED:
        _compile(network)
    return Plain(network, name)


class Plain:
    """The network called as it is, without the engine: stock operators know nothing of it."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    def decode(self, rows: int, context: int, tokens: int) -> Callable[[], float]:
        cache = random_cache(self.model, rows, context, tokens)
        first = random_prompts(self.model, rows, 4)[:, :1]

        @torch.no_grad()
        def work() -> float:
            cache.truncate(context)
            started, ids = time.perf_counter(), first
            for _ in range(tokens):
                logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                ids = logits[:, -1].argmax(-1, keepdim=True)
            return time.perf_counter() - started

        return work

    def prefill(self, tokens: int) -> Callable[[], float]:
        ids = random_prompts(self.model, 1, tokens)

        @torch.no_grad()
        def work() -> float:
            cache = new_cache(self.model, 1, tokens + 1)
            started = time.perf_counter()
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
            return time.perf_counter() - started

        return work


def _replace(model: nn.Module, name: str, kind: type[nn.Module]) -> None:
    """Gives every quantised layer its stock operator, and says how exact the first one is."""
    told = False
    paths = [path for path, layer in model.named_modules() if isinstance(layer, QuantizedLinear)]
    for path in paths:  # a layer's memory goes before the next is made
        layer = model.get_submodule(path)
        assert isinstance(layer, QuantizedLinear)
        stock = (Int8WeightOnly if layer.bits == 8 and kind is Int4WeightOnly else kind)(layer)
        if not told:
            x = torch.randn(4, layer.in_features).to(torch.bfloat16)
            wanted = layer.exact_product(x.float())
            error = ((stock(x).float() - wanted).norm() / wanted.norm()).item()
            print(f"{name}: relative error of a product {error:.4f}", file=sys.stderr)
            told = True
        model.set_submodule(path, stock)


class Int8WeightOnly(nn.Module):
    """Rows of int8 with a scale each."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        weight, scale = layer.stored()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.scale = nn.Parameter(weight, requires_grad=False), scale.to(torch.bfloat16)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class Int4WeightOnly(nn.Module):
    """Groups of 32 with scale and zero point, in the layout that torch's operator packs."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        weight, scale = layer.stored()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        codes = (unpack_nibbles(weight).int() + 8).contiguous()  # 0 to 15; torch's zero point is the middle, 8
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        self.weight = nn.Parameter(packed, requires_grad=False)
        groups = scale.t().to(torch.bfloat16)  # (K / 32, N)
        self.scales = torch.stack((groups, torch.zeros_like(groups)), dim=-1).contiguous()
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.weight, GROUP, self.scales)
        y = y.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class DynamicInt8(nn.Module):
    """Rows of int8 with a scale each; every vector is rounded to int8 with a scale of its own.

    Whether a signed vector or one with zero point 128 is fast depends on the CPU (without AMX the first is computed by
    oneDNN's reference code), so both are tried.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        weight, scale = layer.stored()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
        self.scale, self.zero = scale.float(), torch.zeros(len(scale), dtype=torch.int64)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        scale = flat.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
        middle = _middle()
        rounded = (flat / scale).round().clamp_(-127, 127).add_(middle).to(torch.uint8 if middle else torch.int8)
        y = (_qlinear(rounded, middle, self.weight, self.scale, self.zero) * scale).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def _qlinear(x: Tensor, middle: int, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, middle, weight, scale, zero, None, 1.0, 0, torch.bfloat16, "none", [], ""
    )
    return product


@lru_cache(maxsize=1)
def _middle() -> int:
    """The zero point of vectors that this CPU multiplies faster: 0 or 128."""
    size = 512
    weight = torch.ops.onednn.qlinear_prepack(torch.ones(size, size, dtype=torch.int8), None)
    scale, zero = torch.ones(size), torch.zeros(size, dtype=torch.int64)
    seconds = {}
    for middle, dtype in ((0, torch.int8), (128, torch.uint8)):
        x = torch.ones(4, size, dtype=dtype)
        _qlinear(x, middle, weight, scale, zero)
        started = time.perf_counter()
        _qlinear(x, middle, weight, scale, zero)
        seconds[middle] = time.perf_counter() - started
    return min(seconds, key=lambda middle: seconds[middle])


_STOCK: dict[str, tuple[str, type[nn.Module]]] = {
    "int8-weight-only": ("int8", Int8WeightOnly),
    "int4-weight-only": ("int4", Int4WeightOnly),
    "dynamic-int8": ("int8", DynamicInt8),
}


def _torchao(model: nn.Module, kind: str) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    if kind == "int8":
        settings: Any = Int8WeightOnlyConfig()
    else:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        settings = PrototypeInt4WeightOnlyConfig(group_size=GROUP)
    quantize_(model, settings)
    return model


def _compile(model: Any) -> None:
    """Compiles what surrounds attention, part by part, so that a growing cache compiles nothing anew."""
    import torch._dynamo.config as tracing
    import torch._inductor.config as settings

    tracing.automatic_dynamic_shapes = False  # layers of several sizes share their code, and each wants its own kernel
    tracing.recompile_limit = 256
    settings.freezing = True
    settings.max_autotune = True
    settings.max_autotune_gemm_backends = "CPP,ATEN"
    os.environ.setdefault("TORCHINDUCTOR_FREEZING", "1")
    for block in model.transformer.encoder.layers:
        for part in (block.self_attention.query_key_value, block.self_attention.dense, block.mlp):
            part.compile()
    model.transformer.output_layer.compile()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="chatglm2-6b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--variants", default=DEFAULT)
    parser.add_argument("--rows", default="1,4,16", help="rows of decoding")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompt", default="512", help="tokens of prompts")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    main()
