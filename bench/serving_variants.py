"""Ways to answer many requests, and the models that are asked; see serving.py, which measures them."""

from __future__ import annotations

import argparse
import json
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import glmkit
from checkpoint_of_random_weights import write_checkpoint
from glmkit.chat.conversation import stream_reply
from glmkit.chat.messages import to_messages
from glmkit.chat.templates import prompt_ids
from glmkit.data.records import read_records
from glmkit.engine.decode import WAITING
from glmkit.engine.sampling import SamplingOptions
from glmkit.engine.scheduler import BatchEngine
from glmkit.export import convert
from glmkit.location import builtin

HERE = Path(__file__).resolve().parent
NAME = "measured"
NEVER = -100.0  # added to the logit of what would end an answer
_PAGE_TOKENS = 32  # of transformers' cache; its own choice, half of the memory there is, takes a minute to be filled


@dataclass(frozen=True)
class Answer:
    """When an answer's tokens (or pieces of text) came, in seconds after the start, and how many tokens it has."""

    arrivals: list[float]
    tokens: int

    @property
    def gaps(self) -> list[float]:
        """Seconds between one and the next."""
        return [after - before for before, after in pairwise(self.arrivals)]


@dataclass
class Load:
    """What is asked: conversations, and how long each answer may be."""

    loaded: Any
    native: Path
    dtype: torch.dtype
    conversations: list[list[dict[str, str]]]
    tokens: int
    endless: bool  # answers never end by themselves

    def __post_init__(self) -> None:
        tokenizer = self.loaded.tokenizer
        self.prompts = [prompt_ids(tokenizer, to_messages(one)) for one in self.conversations]
        bias = dict.fromkeys(tokenizer.stop_ids, NEVER) if self.endless else {}
        self.options = SamplingOptions(temperature=0.0, logit_bias=bias)


Variant = Callable[[Sequence[int]], list[Answer]]


def by_engine(load: Load, engine: BatchEngine, *, owners: bool = False) -> Variant:
    """All requests at once; with `owners` none may use what another has read."""

    def run(places: Sequence[int]) -> list[Answer]:
        there: queue.SimpleQueue[int] = queue.SimpleQueue()
        start = time.perf_counter()
        streams = []
        for which, place in enumerate(places):
            stream = engine.stream(
                load.prompts[place],
                load.options,
                stop_ids=load.loaded.tokenizer.stop_ids,
                max_new_tokens=load.tokens,
                owner=f"{which} {start}" if owners else "",
            )
            streams.append(stream)
            stream.do_not_wait(lambda which=which: there.put(which))  # type: ignore[misc]
            there.put(which)
        arrivals: list[list[float]] = [[] for _ in streams]
        tokens = [0] * len(streams)
        left = set(range(len(streams)))
        while left:
            which = there.get()
            while which in left and (step := next(streams[which])) is not WAITING:
                arrivals[which].append(time.perf_counter() - start)
                tokens[which] += step.is_text
                if step.finish_reason is not None:
                    left.discard(which)
        return [Answer(times, count) for times, count in zip(arrivals, tokens)]

    return run


def by_turns(load: Load) -> Variant:
    """One request after the other."""

    def run(places: Sequence[int]) -> list[Answer]:
        start, answers = time.perf_counter(), []
        options = {"max_new_tokens": load.tokens, "temperature": 0.0, "logit_bias": load.options.logit_bias}
        for place in places:
            stream = stream_reply(load.loaded.model, load.loaded.tokenizer, load.conversations[place], **options)
            times = [time.perf_counter() - start for _ in stream]
            answers.append(Answer(times, stream.reply.usage.completion_tokens))
        return answers

    return run


def by_api(load: Load, url: str, seconds: list[float]) -> Variant:
    """All at once, from a client in a process of its own; its start is not counted."""

    def run(places: Sequence[int]) -> list[Answer]:
        body = {
            "model": NAME,
            "max_tokens": load.tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logit_bias": {str(token): bias for token, bias in load.options.logit_bias.items()},
        }
        requests = [body | {"messages": load.conversations[place]} for place in places]
        done = subprocess.run(
            [sys.executable, str(HERE / "serving_client.py")],
            input=json.dumps({"url": url, "requests": requests}),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found = json.loads(done.stdout)
        seconds.append(found["seconds"])
        return [Answer(one["pieces"], one["tokens"]) for one in found["answers"]]

    return run


def by_transformers(load: Load, seconds: list[float]) -> Variant:
    """Continuous batching of the same weights in transformers' own class; making its cache is not counted."""
    from transformers import ContinuousBatchingConfig, GenerationConfig, GlmForCausalLM

    model = GlmForCausalLM.from_pretrained(load.native, dtype=load.dtype).eval()
    stops = [-1] if load.endless else sorted(load.loaded.tokenizer.stop_ids)
    generation = GenerationConfig(max_new_tokens=load.tokens, do_sample=False, eos_token_id=stops, pad_token_id=0)

    def run(places: Sequence[int]) -> list[Answer]:
        prompts = [load.prompts[place] for place in places]
        pages = sum(-(-(len(prompt) + load.tokens) // _PAGE_TOKENS) for prompt in prompts) + 8
        sizes = ContinuousBatchingConfig(
            page_size=_PAGE_TOKENS, num_blocks=pages, max_batch_tokens=512, use_cuda_graph=False
        )
        outputs = model.generate_batch(
            prompts, generation, continuous_batching_config=sizes, record_timestamps=True, warmup=False
        )
        failed = [output.error for output in outputs.values() if output.error]
        if failed or len(outputs) != len(prompts):
            raise RuntimeError(f"{len(outputs)} of {len(prompts)} answers: {failed[:1]}")
        start = min(output.created_time for output in outputs.values())
        seconds.append(max(output.timestamps[-1] for output in outputs.values()) - start)
        return [
            Answer([at - start for at in one.timestamps], sum(token not in stops for token in one.generated_tokens))
            for one in outputs.values()
        ]

    return run


# --- models ---


def nano(arguments: argparse.Namespace) -> Load:
    """glm-nano with attribute lists to write advertising copy for."""
    loaded = glmkit.load("glm-nano", dtype=torch.float32)
    records = [*read_records(builtin("data") / "style_dev.jsonl"), *read_records(builtin("data") / "style_train.jsonl")]
    conversations = [[{"role": "user", "content": record.messages[0].content}] for record in records[:64]]
    native = arguments.work / "nano-native"
    if not native.exists():
        convert(builtin("glm-nano"), native, to="native")
    return Load(loaded, native, torch.float32, conversations, 16 if arguments.quick else 128, endless=False)


def wide(arguments: argparse.Namespace) -> Load:
    """Four blocks (--quick: one) of a 6B model with glm-nano's tokenizer."""
    layers = 1 if arguments.quick else 4
    folder = arguments.work / f"wide-{layers}"
    if not folder.exists():
        tokenizer = builtin("glm-nano")
        vocabulary = json.loads((tokenizer / "config.json").read_text())["padded_vocab_size"]
        write_checkpoint(folder, "chatglm3-6b", layers, torch.bfloat16, vocabulary=vocabulary)
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(tokenizer / name, folder / name)
    native = arguments.work / f"wide-{layers}-native"
    if not native.exists():
        convert(folder, native, to="native")
    loaded = glmkit.load(folder, dtype=torch.bfloat16)
    base = nano(arguments)
    tokens = 4 if arguments.quick else arguments.tokens
    return Load(loaded, native, torch.bfloat16, base.conversations, tokens, endless=True)


MODELS: dict[str, Callable[[argparse.Namespace], Load]] = {"nano": nano, "wide": wide}
