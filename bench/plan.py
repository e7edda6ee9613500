"""Compares what `glm plan` expects of training steps with what they take, and writes the tables of docs/memory.md.

    python bench/plan.py              measures every case in a process of its own: peak resident memory above the start
    python bench/plan.py --models     counts the table of the 6B models; nothing is measured
    python bench/plan.py --write      also puts the table into docs/memory.md

The cases are glm-nano and slices of ChatGLM-6B and ChatGLM2-6B at their real width, with random weights.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "memory.md"
STEPS = 2


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        model: Name in the table of families, or "nano".
        method: Which parameters learn.
        rows: Rows of a batch.
        tokens: Tokens of each row.
        targets: Positions with a target, of each row.
        sizes: Changes to the released sizes.
        train: Settings of the recipe's block of this name.
        quantize: Setting of the model.
    """

    model: str
    method: str
    rows: int
    tokens: int
    targets: int
    sizes: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    quantize: str | None = None

    def __str__(self) -> str:
        more = [f"{name} {value}" for name, value in (self.sizes | self.train).items()]
        more += [self.quantize] if self.quantize else []
        return f"{self.model} {self.method}, {self.rows} x {self.tokens}" + (f" ({', '.join(more)})" if more else "")


FOUR = {"num_layers": 4}
CASES = (  # of which the slow test takes the first two
    Case("nano", "lora", 16, 512, 256),
    Case("nano", "full", 16, 512, 256),
    Case("chatglm2-6b", "lora", 4, 193, 128, FOUR),
    Case("chatglm2-6b", "lora", 8, 193, 128, FOUR, {"gradient_checkpointing": True, "loss_chunk_tokens": 256}),
    Case("chatglm2-6b", "lora", 4, 193, 128, FOUR, quantize="official-int4"),
    Case("chatglm2-6b", "full", 4, 193, 128, {"num_layers": 2, "padded_vocab_size": 8192}),
    Case("chatglm-6b", "lora", 4, 193, 128, FOUR),
    Case("chatglm-6b", "ptuning_v2", 4, 193, 128, FOUR),
    Case("chatglm-6b", "full", 4, 193, 128, {"num_layers": 2, "vocab_size": 16384}),
)


def subject_and_recipe(case: Case) -> tuple[Any, Any]:
    """The model and the recipe of a case."""
    import torch

    from glmkit.families import find_family
    from glmkit.models.architectures import CONFIGS
    from glmkit.train.arguments import Recipe
    from glmkit.train.plan import Subject, subject_of

    recipe = Recipe(
        model={"path": "glm-nano" if case.model == "nano" else case.model, "device": "cpu", "quantize": case.quantize},
        data={"train_file": "none", "max_length": case.tokens},
        method={"name": case.method},
        train={"per_device_train_batch_size": case.rows, **case.train},
        output={"dir": "none"},
    )
    if case.model == "nano":
        return subject_of(recipe.base), recipe
    family = find_family(case.model)
    assert family is not None
    sizes = {**family.sizes, **case.sizes}
    if "vocab_size" in case.sizes:  # the control ids of ChatGLM-6B lie at the end
        sizes |= {"bos_token_id": 16004, "eos_token_id": 16005, "mask_token_id": 16000, "gmask_token_id": 16001}
    bits = {"official-int8": 8, "official-int4": 4}.get(case.quantize or "", 0)
    return Subject(case.model, CONFIGS[family.architecture](**sizes), torch.bfloat16, bits), recipe


def expected(case: Case) -> int:
    """What the plan says, in bytes."""
    from glmkit.train.plan import plan_training

    subject, recipe = subject_and_recipe(case)
    return plan_training(recipe, subject=subject, longest=(case.tokens, case.targets)).peak


def measure(case: Case, *, warm: bool = False) -> int:
    """What steps take, in bytes: the most resident memory above that before the model is made."""
    import torch

    from glmkit import hf
    from glmkit.quant.official import quantize_model
    from glmkit.registration import LANGUAGE_MODELS
    from glmkit.train.methods import make_method
    from glmkit.train.optimizer import make_optimizer
    from glmkit.train.processes import OneProcess

    subject, recipe = subject_and_recipe(case)
    if not warm:  # what is imported and set up by a first step is not the model's
        small = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 32, "num_attention_heads": 2, "kv_channels": 16}
        measure(Case("chatglm2-6b", case.method, 1, 8, 4, {**small, "multi_query_group_num": 2}), warm=True)
    start = resident("VmRSS")
    with torch.device("meta"):
        model = LANGUAGE_MODELS[type(subject.config)](subject.config)
        model = model.to(torch.float32 if case.method == "full" else subject.dtype)
        if subject.bits:
            quantize_model(model, subject.bits)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.is_floating_point() else parameter.random_(-100, 100)
    model.loss_chunk_tokens = recipe.train.loss_chunk_tokens
    prepared = make_method(recipe.method).prepare(model).train()
    if recipe.train.gradient_checkpointing:
        hf.checkpoint_activations(prepared)
    processes = OneProcess(torch.device("cpu"))
    processes.prepare(prepared, lambda module: make_optimizer(module, recipe.train))
    for _ in range(STEPS):
        loss, targets = processes.loss(batch_of(case, subject.config))
        processes.backward(loss / targets, last=True)
        processes.step(1e-4, 1.0, 1.0)
    return resident("VmHWM") - start


def batch_of(case: Case, config: Any) -> dict[str, Any]:
    """Random ids, with the control ids that ChatGLM-6B looks for."""
    import torch

    ids = torch.randint(10, 1000, (case.rows, case.tokens))
    labels = torch.full_like(ids, -100)
    labels[:, -case.targets :] = ids[:, -case.targets :]
    if case.model == "chatglm-6b":
        begin = case.tokens - case.targets
        ids[:, begin - 2], ids[:, begin - 1] = config.gmask_token_id, config.bos_token_id
    return {"input_ids": ids, "labels": labels}


def resident(name: str) -> int:
    """A figure of this process's memory, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def compared(numbers: Sequence[int]) -> Iterator[str]:
    """The rows of the table of measurements."""
    yield "| step | expected | measured | difference |"
    yield "|---|---|---|---|"
    for number in numbers:
        run = subprocess.run([sys.executable, __file__, "--case", str(number)], capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"{CASES[number]}: {run.stderr}")
        measured, wanted = json.loads(run.stdout)["measured"], expected(CASES[number])
        row = f"| {CASES[number]} | {wanted / 1e9:.2f} GB | {measured / 1e9:.2f} GB | {wanted / measured - 1:+.0%} |"
        print(row, file=sys.stderr)
        yield row


def models() -> Iterator[str]:
    """The rows of the table of models, beside what their makers published, in GB: float16, int8, int4."""
    from glmkit.train.fitting import model_plans

    published = {
        ("chatglm-6b", "answer"): "13 / 8 / 6",
        ("chatglm-6b", "ptuning_v2"): "14 / 9 / 7",
        ("chatglm2-6b", "answer"): "13.1 / 8.2 / 5.5",
    }
    names = {
        "answer": "answers, context 2,048",
        "ptuning_v2": "P-Tuning v2, 128 columns",
        "lora": "LoRA, rank 8",
        "full": "full",
    }
    yield "| model | what | float16 | int8 | int4 | published |"
    yield "|---|---|---|---|---|---|"
    for model in ("chatglm-6b", "chatglm2-6b"):
        plans = model_plans(model)
        for kind, name in names.items():
            cells = [plans.get(f"{kind}, {form}") for form in ("float16", "int8", "int4")]
            row = " | ".join("-" if plan is None else f"{plan.peak / 1e9:.1f}" for plan in cells)
            yield f"| {model} | {name} | {row} | {published.get((model, kind), '-')} |"


def write(name: str, rows: Sequence[str]) -> None:
    """Puts a table between its marks in the page."""
    page = PAGE.read_text(encoding="utf-8")
    table = "".join(f"{row}\n" for row in rows)
    changed = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m: m[1] + table + m[2], page, flags=re.DOTALL)
    PAGE.write_text(changed, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, help="measure this one case here and print its bytes")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases")
    parser.add_argument("--models", action="store_true", help="count the table of models")
    parser.add_argument("--write", action="store_true", help="put the table into docs/memory.md")
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps({"measured": measure(CASES[arguments.case])}))
        return
    rows = list(models() if arguments.models else compared(arguments.only or range(len(CASES))))
    print("\n".join(rows))
    if arguments.write:
        write("models" if arguments.models else "measured", rows)


if __name__ == "__main__":
    main()
