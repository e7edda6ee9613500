"""Records that share a row learn what they learn alone: the same losses, the same gradients, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glmkit import hf
from glmkit.data.examples import IGNORED, Example, Examples, collate
from glmkit.data.packing import collate_packed, plan_rows
from glmkit.data.seq2seq import Seq2SeqTask, encode_seq2seq
from glmkit.models.chatglm import ChatGLMForCausalLM
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.chatglm_config import ChatGLMConfig
from glmkit.models.glm import GLMForConditionalGeneration
from glmkit.models.glm_config import GLMConfig
from glmkit.train.blocks import TrainBlock
from glmkit.train.sources import Records
from tiny_families import glm_tokenizer

GMASK, SOP = 90, 91
LENGTHS = [5, 11, 3, 8, 14, 6]
FAMILIES = ["chatglm", "chatglm2", "glm4", "glm"]


def model_of(family: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    if family == "chatglm":
        sizes = {"num_layers": 2, "vocab_size": 100, "hidden_size": 32, "inner_hidden_size": 64}
        ids = {"mask_token_id": 89, "gmask_token_id": GMASK, "bos_token_id": SOP, "eos_token_id": 92, "pad_token_id": 3}
        model = ChatGLMForCausalLM(
            ChatGLMConfig(**sizes, num_attention_heads=4, max_sequence_length=64, **ids, **changes)
        )
    elif family == "glm":
        config = {"num_layers": 2, "vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4}
        none = {f"{name}_dropout_prob": 0.0 for name in ("attention", "output", "embedding")}
        model = GLMForConditionalGeneration(GLMConfig(**config, max_sequence_length=24, **none, **changes))
    else:
        sizes = {"num_layers": 2, "padded_vocab_size": 100, "hidden_size": 32, "ffn_hidden_size": 48, "kv_channels": 8}
        heads = {"num_attention_heads": 4, "multi_query_group_num": 2, "multi_query_attention": True}
        rope = {"rope_ratio": 500, "rope_ratio_applies_to": "base"} if family == "glm4" else {}
        model = ChatGLM2ForCausalLM(ChatGLM2Config(**sizes, **heads, **rope, seq_length=64, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model


def examples_of(family: str, tmp_path: Any) -> list[Example]:
    if family == "glm":
        tokenizer = glm_tokenizer(tmp_path)
        texts = [
            ("i like", "tea and rice"),
            ("beijing is the capital", "of china"),
            ("world", "tea , rice !"),
            ("and", "i"),
        ]
        made = []
        for number, (source, target) in enumerate(texts * 2):
            words = len(source.split())
            task = Seq2SeqTask("any", words + 3, 9, 1, 0.0, 0, 0, 1, 1e-5)
            one = encode_seq2seq(tokenizer, task, source, target)
            learnt = int((one.labels != IGNORED).sum())
            made.append(
                Example(one.input_ids.int(), one.labels.int(), learnt, f"x:{number}", one.sep, one.position_ids.int())
            )
        return made
    generator = torch.Generator().manual_seed(1)
    made = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(5, 80, (length,), generator=generator, dtype=torch.int32)
        sep = 0
        if family == "chatglm":
            sep = length // 2
            ids[sep - 1], ids[sep] = GMASK, SOP
        start = max(sep + 1, length // 2)
        labels = torch.where(torch.arange(length) >= start, ids, IGNORED)
        made.append(Example(ids, labels, int((labels[1:] != IGNORED).sum()), f"x:{number}", sep))
    return made


def loss_and_gradients(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[float, int, list[Tensor]]:
    model.zero_grad()
    total, targets = 0.0, 0
    for batch in batches:
        loss, number = model.label_loss(**batch)
        loss.backward()
        total, targets = total + loss.item(), targets + number
    return total, targets, [one.grad.clone() for one in model.parameters() if one.grad is not None]


def differ(packed: list[Tensor], alone: list[Tensor]) -> float:
    assert len(packed) == len(alone) > 0
    norm = torch.stack([one.norm() for one in alone]).norm()
    return float(torch.stack([(one - other).norm() for one, other in zip(packed, alone)]).norm() / norm)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["plain", "eager", "prefix", "prefix_checkpointing"])
def test_packed_records_learn_what_they_learn_alone(family: str, kind: str, tmp_path: Any) -> None:
    changes: dict[str, Any] = {"pre_seq_len": 3} if kind.startswith("prefix") else {}
    model = model_of(family, **changes, **({"attn_implementation": "eager"} if kind == "eager" else {}))
    model.train()
    for name, module in model.named_modules():
        if name.endswith("prefix_encoder"):
            module.eval()  # without its dropout
    if kind == "prefix_checkpointing":
        hf.checkpoint_activations(model)
    examples = examples_of(family, tmp_path)
    rows = [[examples[0], examples[1], examples[2]], [examples[3]], [examples[5], examples[4]]]
    chosen = [example for row in rows for example in row]
    loss, targets, gradients = loss_and_gradients(model, [collate_packed(rows, 3)])
    loss_alone, targets_alone, alone = loss_and_gradients(model, [collate([one], 3) for one in chosen])
    assert targets == targets_alone == sum(one.label_tokens for one in chosen)
    assert loss == pytest.approx(loss_alone, rel=1e-5)
    assert differ(gradients, alone) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_mask_records_would_see_each_other(family: str, tmp_path: Any) -> None:
    """The comparison above can fail: a mask that separates nothing gives another loss."""
    model = model_of(family).eval()
    examples = examples_of(family, tmp_path)
    batch = collate_packed([examples[:3]], 3)
    right, _ = model.label_loss(**batch)
    T = batch["input_ids"].shape[1]
    causal = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    wrong, _ = model.label_loss(**{**batch, "attention_mask": ~causal if family == "chatglm" else causal})
    assert abs(right.item() - wrong.item()) > 1e-3 * right.item()


def test_no_label_predicts_across_a_border() -> None:
    """A record that is learnt from its first token on loses that one target, which nothing in it could predict."""
    whole = Example(torch.tensor([7, 8, 9], dtype=torch.int32), torch.tensor([7, 8, 9], dtype=torch.int32), 2, "x")
    batch = collate_packed([[whole, whole]], 0)
    assert batch["labels"].tolist() == [[IGNORED, 8, 9, IGNORED, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    seen = batch["attention_mask"][0, 0]
    assert not seen[3:, :3].any()
    assert not seen[:3, 3:].any()
    assert seen.diagonal().all()


@pytest.mark.parametrize("room", [40, 300])
def test_every_record_is_in_one_row_and_rows_are_full(room: int) -> None:
    lengths = [int(one) for one in torch.randint(3, 60, (900,), generator=torch.Generator().manual_seed(0))]
    rows = plan_rows(lengths, room, seed=3, epoch=0)
    assert sorted(number for row in rows for number in row) == list(range(900))
    sums = [sum(lengths[number] for number in row) for row in rows]
    assert all(total <= room or len(row) == 1 for total, row in zip(sums, rows))
    fitting = [min(total, room) for total in sums]
    assert sum(fitting) / (room * len(rows)) > (0.75 if room == 40 else 0.95)
    assert rows == plan_rows(lengths, room, seed=3, epoch=0)
    assert rows != plan_rows(lengths, room, seed=3, epoch=1)
    assert rows != plan_rows(lengths, room, seed=4, epoch=0)


def source(pack_to: int | None = None, **options: Any) -> Records:
    lengths = torch.randint(3, 30, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    made = [
        Example(torch.full((length,), number, dtype=torch.int32), torch.full((length,), 1), length - 1, f"own:{number}")
        for number, length in enumerate(lengths)
    ]
    block = TrainBlock(per_device_train_batch_size=2, seed=5)
    return Records(made, 0, block, pack_to=pack_to, **options)


def wheres(records: Records, epochs: int, batches: int = 3) -> list[list[str]]:
    """Per pass, the records of all windows."""
    found: list[list[str]] = [[] for _ in range(epochs)]
    for window in records.windows({}, batches):
        if window.epoch == epochs:
            return found
        found[window.epoch] += [where for batch in window.batches for where in batch.where]
    raise AssertionError


def test_a_packed_pass_holds_every_record_once_and_goes_on_where_it_stopped() -> None:
    records = source(pack_to=64)
    first, second = wheres(records, 2)
    assert sorted(first) == sorted(second) == sorted(f"own:{number}" for number in range(120))
    assert first != second
    windows = []
    for window in records.windows({}, 3):
        windows.append(window)
        if len(windows) == 8:
            break
    later = next(iter(source(pack_to=64).windows(windows[5].place, 3)))
    assert torch.equal(later.batches[0].inputs["input_ids"], windows[6].batches[0].inputs["input_ids"])
    assert windows[0].batches[0].inputs["input_ids"].shape[0] == 2  # rows, not records
    passes = [window.epoch for window, _ in zip(records.windows({}, 3), range(records.steps(2, 3) + 1))]
    assert passes == [0] * records.steps(1, 3) + [1] * (records.steps(2, 3) - records.steps(1, 3)) + [2]
    assert records.filled() > 0.9


def test_general_records_are_mixed_in_the_next_ones_in_every_pass() -> None:
    mixed = Examples(
        Example(torch.full((4,), 7, dtype=torch.int32), torch.full((4,), 1), 3, f"general:{number}")
        for number in range(20)
    )
    records = source(mixed=mixed, mix_ratio=0.1)
    general = [[one for one in found if one.startswith("general")] for found in wheres(records, 3)]
    assert [len(one) for one in general] == [12, 12, 12]
    every = [*general[0], *general[1], *general[2]]
    counts = {name: every.count(name) for name in every}
    assert len(counts) == 20
    assert max(counts.values()) - min(counts.values()) <= 1
    assert wheres(records, 2) == wheres(source(mixed=mixed, mix_ratio=0.1), 2)
    assert records.fingerprint() != source().fingerprint()
    assert source(mixed=mixed, mix_ratio=0.0).fingerprint() == source().fingerprint()
