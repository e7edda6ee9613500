"""What int4 and int8 lose: errors of weights, and perplexity of glm-nano on text it has not seen.

python bench/quantisation.py [--seeds 3] [--records 100] [--tokens 16384] [--json FILE]

Weights: squared error over squared norm on Gaussian, Laplace and Student's t (4 degrees of freedom) numbers and on
glm-nano's linears, with the processor time of the search for a weight on one thread.

Perplexity: of the answers in dialogues that `nano/corpus.py` holds out (prompts that never occur in training), float32,
plain torch. Each seed has its own dialogues to measure on, none of which another seed has, and its own calibration
dialogues, drawn as the training data are. There is one trained model; a second takes an hour. Intervals are of a
bootstrap over dialogues (95 %), on differences to the unquantised model at the same tokens. KL is the mean divergence
of the distribution at each token from that of the unquantised model: the same loss with less noise, because it does
not depend on which token the text happens to have.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glmkit.data.calibration import calibration_batches
from glmkit.data.examples import IGNORED, Examples, make_examples
from glmkit.data.records import read_records
from glmkit.loading import load
from glmkit.quant.gptq import quantize_model_gptq
from glmkit.quant.linear import QuantizedLinear, dequantize
from glmkit.quant.official import is_quantised_layer
from glmkit.quant.search import DIVISORS, quantize_groups, quantize_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nano"))
import corpus

SEARCHES: dict[str, tuple[float, ...]] = {
    "nearest, max/7": (),
    "code -8 (Q4_0)": (-8.0,),
    "2 candidates": DIVISORS[:2],
    "4 candidates": DIVISORS[:4],
    "6 candidates (ours)": DIVISORS,
    "33 candidates": tuple(np.linspace(-9, -5, 33)),
}
_ADVERTS = 6  # times as many as dialogues of the other kinds: most of the answers' tokens are theirs
_BATCH_TOKENS = 4096
_DRAWS = 1000


def main() -> None:
    arguments = _parser().parse_args()
    torch.set_grad_enabled(False)
    found: dict[str, Any] = {"errors": errors()}
    found["perplexity"] = perplexities(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


# Weights -------------------------------------------------------------------------------------------------------------


def errors() -> dict[str, dict[str, float]]:
    """Relative squared errors, and nanoseconds of one thread for each weight."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (1024, 1024)
    model = load("glm-nano", dtype="float32").model
    weights = {
        "Gaussian": [torch.randn(shape) * 0.02],
        "Laplace": [torch.distributions.Laplace(0.0, 0.02).sample(shape)],
        "t, 4 degrees": [torch.distributions.StudentT(4.0, scale=0.02).sample(shape)],
        "glm-nano": [linear.weight for linear in _linears(model).values()],
    }
    methods: dict[str, tuple[int, Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
        name: (4, lambda weight, chosen=chosen: quantize_groups(weight, divisors=chosen))
        for name, chosen in SEARCHES.items()
    }
    methods["int8 rows, max/127"] = (8, quantize_rows)
    found: dict[str, dict[str, float]] = {}
    print(f"{'relative squared error, 1e-3':24s}", *(f"{name:>13s}" for name in weights), " ns/weight")
    for method, (bits, quantize) in methods.items():
        found[method] = {name: _relative(group, quantize, bits) for name, group in weights.items()}
        found[method]["ns"] = _nanoseconds(weights["Gaussian"][0], quantize)
        row = (f"{1e3 * found[method][name]:13.4f}" for name in weights)
        print(f"{method:28s}", *row, f"{found[method]['ns']:9.1f}", flush=True)
    torch.set_num_threads(threads)
    return found


def _relative(weights: list[Tensor], quantize: Callable[[Tensor], tuple[Tensor, Tensor]], bits: int) -> float:
    lost = norm = 0.0
    for weight in weights:
        codes, scale = quantize(weight)
        lost += float((weight - dequantize(codes, scale.float(), bits)).double().square().sum())
        norm += float(weight.double().square().sum())
    return lost / norm


def _nanoseconds(weight: Tensor, quantize: Callable[[Tensor], tuple[Tensor, Tensor]]) -> float:
    times = []
    for _ in range(5):
        start = time.process_time()
        quantize(weight)
        times.append(time.process_time() - start)
    return 1e9 * min(times) / weight.numel()


# Perplexity ----------------------------------------------------------------------------------------------------------


def perplexities(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures every way of quantising for each seed, and all seeds together."""
    base, tokenizer = load("glm-nano", dtype="float32", kernels="torch")
    base.eval()
    taken: set[str] = set()
    rows: dict[str, list[np.ndarray[Any, Any]]] = {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, arguments.seeds + 1):
            examples = _examples(tokenizer, _held_out(seed, arguments.records, taken), Path(folder) / f"{seed}.jsonl")
            calibration = Path(folder) / f"calibration-{seed}.jsonl"
            _write(calibration, corpus.train_records(1000 + seed, arguments.tokens // 30))
            models = _models(base, calibration_batches(tokenizer, calibration, tokens=arguments.tokens))
            measured = _measure(base, models, examples)
            found[f"seed {seed}"] = _print(f"seed {seed}", measured)
            for name, values in measured.items():
                rows.setdefault(name, []).append(values)
    found["all"] = _print("all seeds", {name: np.concatenate(parts) for name, parts in rows.items()})
    return found


def _models(base: nn.Module, batches: list[Tensor]) -> dict[str, nn.Module]:
    def made(quantize: Callable[[Tensor], tuple[Tensor, Tensor]], bits: int) -> nn.Module:
        model = copy.deepcopy(base)
        for name, linear in _linears(model).items():
            model.set_submodule(name, QuantizedLinear(*quantize(linear.weight), linear.bias, bits))
        return model

    return {
        "int8 rows": made(quantize_rows, 8),
        "int4 nearest, max/7": made(lambda weight: quantize_groups(weight, divisors=()), 4),
        "int4 code -8 (Q4_0)": made(lambda weight: quantize_groups(weight, divisors=(-8.0,)), 4),
        "int4 search (default)": made(quantize_groups, 4),
        "int4 GPTQ and search": quantize_model_gptq(copy.deepcopy(base), batches),
    }


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, nn.Linear) and is_quantised_layer(name)}


def _held_out(seed: int, records: int, taken: set[str]) -> Iterator[dict[str, Any]]:
    """Dialogues whose prompts no other seed has, most of them advertising copy."""
    left = {kind: records * (_ADVERTS if kind == "adgen" else 1) for kind in corpus.KINDS}
    for record in corpus.heldout_records(seed, 2 * _ADVERTS * records):
        prompt = corpus.prompt_of(record)
        if left[record["kind"]] and prompt not in taken:
            left[record["kind"]] -= 1
            taken.add(prompt)
            yield record


def _examples(tokenizer: Any, records: Iterator[dict[str, Any]], path: Path) -> Examples:
    _write(path, records)
    return make_examples(tokenizer, read_records(path))[0]


def _write(path: Path, records: Iterator[dict[str, Any]]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


def _measure(base: Any, models: dict[str, Any], examples: Examples) -> dict[str, np.ndarray[Any, Any]]:
    """For each model and dialogue: sum of losses, sum of divergences, number of tokens; (dialogues, 3)."""
    found = {name: np.zeros((len(examples), 3)) for name in ("unquantised", *models)}
    for part in _batches(examples):
        width = max(len(examples[index].input_ids) for index in part)
        ids = torch.zeros(len(part), width, dtype=torch.int64)
        labels = torch.full((len(part), width), IGNORED)
        for row, index in enumerate(part):
            ids[row, : len(examples[index].input_ids)] = examples[index].input_ids
            labels[row, : len(examples[index].labels)] = examples[index].labels
        chosen = labels[:, 1:] != IGNORED
        targets, owners = labels[:, 1:][chosen], np.array(part)[chosen.nonzero()[:, 0].numpy()]
        exact = _log_probabilities(base, ids, chosen)
        for name, values in found.items():
            got = exact if name == "unquantised" else _log_probabilities(models[name], ids, chosen)
            losses = -got.gather(1, targets[:, None])[:, 0]
            divergences = (exact.exp() * (exact - got)).sum(1)
            sums = torch.stack((losses, divergences, torch.ones_like(losses)), dim=1).double().numpy()
            np.add.at(values, owners, sums)
    return found


def _batches(examples: Examples) -> Iterator[list[int]]:
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    while order:
        count = max(1, _BATCH_TOKENS // len(examples[order[-1]].input_ids))
        yield order[-count:]
        del order[-count:]


def _log_probabilities(model: Any, ids: Tensor, chosen: Tensor) -> Tensor:
    hidden = model.transformer(ids, use_cache=False).last_hidden_state[:, :-1][chosen]
    return model.logits(hidden).log_softmax(-1)


def _print(title: str, measured: dict[str, np.ndarray[Any, Any]]) -> dict[str, dict[str, Any]]:
    base = measured["unquantised"]
    nearest = measured["int4 nearest, max/7"]
    print(f"\n{title}: {len(base)} dialogues, {int(base[:, 2].sum())} tokens of answers")
    print(f"{'':24s} perplexity  increase, % (95 %)              KL, 1e-3 (95 %)            KL against nearest")
    found: dict[str, dict[str, Any]] = {}
    for name, values in measured.items():
        more = np.column_stack((values[:, 0] - base[:, 0], values[:, 1], nearest[:, 1], base[:, 2]))
        increase, divergence, ratio = (_interval(more, figure) for figure in (_increase, _divergence, _ratio))
        value = float(np.exp(values[:, 0].sum() / values[:, 2].sum()))
        found[name] = {"perplexity": value, "increase": increase, "kl": divergence, "kl_to_nearest": ratio}
        print(
            f"{name:24s} {value:10.4f} {100 * increase[0]:7.3f} [{100 * increase[1]:6.3f}, {100 * increase[2]:6.3f}]",
            f"{1e3 * divergence[0]:15.3f} [{1e3 * divergence[1]:6.3f}, {1e3 * divergence[2]:6.3f}]",
            f"{ratio[0]:12.3f} [{ratio[1]:5.3f}, {ratio[2]:5.3f}]",
            flush=True,
        )
    return found


def _increase(rows: np.ndarray[Any, Any]) -> float:
    return float(np.expm1(rows[:, 0].sum() / rows[:, 3].sum()))


def _divergence(rows: np.ndarray[Any, Any]) -> float:
    return float(rows[:, 1].sum() / rows[:, 3].sum())


def _ratio(rows: np.ndarray[Any, Any]) -> float:
    return float(rows[:, 1].sum() / rows[:, 2].sum())


def _interval(rows: np.ndarray[Any, Any], figure: Callable[[np.ndarray[Any, Any]], float]) -> tuple[float, ...]:
    """A figure of all dialogues, and its 95 % interval over dialogues drawn again."""
    draw = np.random.default_rng(0)
    drawn = [figure(rows[draw.integers(0, len(rows), len(rows))]) for _ in range(_DRAWS)]
    return (figure(rows), *(float(bound) for bound in np.quantile(drawn, (0.025, 0.975))))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--records", type=int, default=100, help="dialogues of each kind; of copy six times as many")
    parser.add_argument("--tokens", type=int, default=16_384, help="of calibration")
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    main()
