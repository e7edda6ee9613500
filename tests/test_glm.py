"""GLM (2021) against stored results of the official classes, and against itself in its other forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from glmkit import hf
from glmkit.engine import SamplingOptions, generate_batch, stream
from glmkit.engine.cache import new_cache
from glmkit.errors import ConfigError, UsageError
from glmkit.families import FAMILIES
from glmkit.models.glm import (
    GLMForConditionalGeneration,
    GLMForMultipleChoice,
    GLMForSequenceClassification,
    GLMModel,
    GLMPreTrainedModel,
    official_name,
)
from glmkit.models.glm_config import GLMConfig, config_from_tensors

RELEASED = {row.name: row.sizes for row in FAMILIES if row.architecture == "glm"}
FIXTURES = Path(__file__).parent / "fixtures" / "glm_base"
REPOSITORY = FIXTURES / "hf_repo"
ATOL = 5e-5  # the two forms of the GELU are 2e-3 apart
PAD, MASK, SOP, EOP, SMASK, GMASK = 118, 120, 123, 124, 125, 126
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])
Stored = Callable[[str], dict[str, Tensor]]


@pytest.fixture
def stored(request: pytest.FixtureRequest) -> Stored:
    """The tensors of a case by its name; those that are not in the fixtures lie in shared/."""

    def load(name: str) -> dict[str, Tensor]:
        file = FIXTURES / f"{name}.safetensors"
        if not file.exists():
            file = request.getfixturevalue("shared") / "conformance" / "glm_base" / file.name
        return load_file(file)

    return load


def build(cls: type[Any], attention: str = "sdpa", weights: dict[str, Tensor] | None = None, **changes: Any) -> Any:
    """A model of the stored checkpoint, in eval mode."""
    values = json.loads((REPOSITORY / "config.json").read_text())
    config = GLMConfig.from_dict({**values, **changes})
    config._attn_implementation = attention
    model = cls(config).eval()
    names = model.state_dict().keys()
    read = load_file(REPOSITORY / "model.safetensors") | (weights or {})
    missing, unexpected = model.load_state_dict(
        {official_name(name, names): tensor for name, tensor in read.items()}, strict=False
    )
    assert not unexpected
    assert not [name for name in missing if name.startswith("glm.")]
    return model


def close(mine: Tensor, theirs: Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(mine, theirs, atol=atol, rtol=0)


# The network against the official one --------------------------------------------------------------------------------


@ATTENTION
@torch.no_grad()
def test_lengths_of_part_a(stored: Stored, attention: str) -> None:
    case = stored("sep_mask")
    output = build(GLMModel, attention)(case["input_ids"], case["position_ids"], case["sep"])
    close(output.logits, case["logits"])
    close(output.last_hidden_states, case["last_hidden_states"])
    assert isinstance(output.mems, list)
    assert len(output.mems) == 3
    for number, memory in enumerate(output.mems):
        close(memory, case[f"mems.{number}"])


@torch.no_grad()
def test_the_gelu_that_the_weights_were_trained_with(stored: Stored) -> None:
    case = stored("sep_mask")
    output = build(GLMModel, gelu="tanh")(case["input_ids"], case["position_ids"], case["sep"])
    close(output.logits, case["logits_tanh_gelu"])
    assert (case["logits"] - case["logits_tanh_gelu"]).abs().max() > 10 * ATOL


@ATTENTION
@torch.no_grad()
def test_one_length_for_all_rows(stored: Stored, attention: str) -> None:
    case = stored("sep_scalar")
    model = build(GLMModel, attention)
    length = int(case["sep"])
    for given in (case["sep"], torch.tensor(length), length, case["sep"].view(1, 1, 1, 1), case["sep"].float()):
        close(model(case["input_ids"], case["position_ids"], given).logits, case["logits"])


@ATTENTION
@torch.no_grad()
def test_nothing_but_ids(stored: Stored, attention: str) -> None:
    case = stored("defaults")
    close(build(GLMModel, attention)(case["input_ids"]).logits, case["logits"])


@torch.no_grad()
def test_a_chunk_behind_mems(stored: Stored) -> None:
    case, model = stored("mems_chunk"), build(GLMModel)
    ids, positions = case["input_ids"], case["position_ids"]
    first = model(ids[:, :10], positions[..., :10], torch.tensor([9]))
    close(first.logits, case["logits_chunk1"])
    second = model(ids[:, 10:], positions[..., 10:], torch.tensor([0]), first.mems)
    close(second.logits, case["logits_chunk2"])
    assert [memory.shape[1] for memory in second.mems] == [20, 20, 20]
    close(second.mems[0][:, :10], first.mems[0], atol=0)


@ATTENTION
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_builders_rows_and_their_loss(stored: Stored, side: str, attention: str) -> None:
    """All rows are compared, also those that see nothing: there the official softmax is uniform."""
    case = stored(f"seq2seq_{side}pad")
    model = build(GLMForConditionalGeneration, attention)
    names = ("input_ids", "position_ids", "attention_mask", "labels")
    output = model(**{name: case[name] for name in names})
    close(output.logits, case["logits"])
    close(output.loss[None], case["loss"])
    loss, targets = model.label_loss(case["input_ids"], case["labels"], case["attention_mask"], case["position_ids"])
    assert targets == int((case["labels"] != -100).sum())
    close(loss[None] / targets, case["loss"])
    assert output.to_tuple()[1] is output.logits


@ATTENTION
@torch.no_grad()
def test_multiple_choice(stored: Stored, attention: str) -> None:
    case = stored("multiple_choice")
    ids, columns = (
        [[case[f"{name}.{row}.{choice}"] for choice in range(3)] for row in range(2)]
        for name in ("choice_ids", "choice_indices")
    )
    output = build(GLMForMultipleChoice, attention)(
        case["input_ids"],
        position_ids=case["position_ids"],
        attention_mask=case["attention_mask"],
        choice_ids=ids,
        choice_indices=columns,
        labels=case["labels"],
    )
    close(output.logits, case["logits"])
    close(output.lm_logits, case["lm_logits"])
    close(output.loss[None], case["loss"])


@torch.no_grad()
def test_sequence_classification(stored: Stored) -> None:
    case = stored("sequence_classification")
    head = {name.removeprefix("head."): tensor for name, tensor in case.items() if name.startswith("head.")}
    for weights in (head, _as_the_training_code_names_them(head)):
        model = build(GLMForSequenceClassification, weights=weights, output_predict=False)
        output = model(case["input_ids"], case["position_ids"], case["sep"], labels=case["labels"])
        close(output.logits, case["logits"])
        close(output.loss[None], case["loss"])
    # The first score alone, of rows that are two choices of one text.
    first = {name: tensor[:1] if name.startswith("out_proj") else tensor for name, tensor in head.items()}
    names = {"id2label": {"0": "right"}, "label2id": {"right": 0}}
    model = build(GLMForSequenceClassification, weights=first, output_predict=False, **names)
    scores = model(*(case[name][None] for name in ("input_ids", "position_ids", "sep"))).logits
    close(scores, case["logits"][:, 0][None])


def _as_the_training_code_names_them(head: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"dense": "pool_layer", "out_proj": "multichoice_head"}
    renamed = {f"{names[name.split('.')[0]]}.{name.split('.')[1]}": tensor for name, tensor in head.items()}
    network = load_file(REPOSITORY / "model.safetensors")
    return renamed | {f"model.{name}": tensor for name, tensor in network.items()}


# generate ------------------------------------------------------------------------------------------------------------


def prompt(case: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: case[name] for name in ("input_ids", "position_ids", "generation_attention_mask")}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_greedily(stored: Stored, side: str, use_cache: bool) -> None:
    case, model = stored(f"generate_{side}pad"), build(GLMForConditionalGeneration)
    ends = {"greedy": EOP, "greedy_no_eos": None, "greedy_eos_probe": int(case["eos_probe_id"])}
    for name, end in ends.items():
        found = model.generate(
            **prompt(case), do_sample=False, max_length=21, eos_token_id=end, pad_token_id=PAD, use_cache=use_cache
        )
        assert torch.equal(found, case[name]), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_with_a_static_cache(stored: Stored, side: str) -> None:
    case, model = stored(f"generate_{side}pad"), build(GLMForConditionalGeneration)
    found = model.generate(
        **prompt(case),
        do_sample=False,
        max_length=21,
        eos_token_id=EOP,
        pad_token_id=PAD,
        cache_implementation="static",
        disable_compile=True,
    )
    assert torch.equal(found, case["greedy"])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_with_beams(stored: Stored, side: str, use_cache: bool) -> None:
    """transformers 5 divides by the length of the answer alone; where it ends elsewhere, it must score better so."""
    case, model = stored(f"generate_{side}pad"), build(GLMForConditionalGeneration)
    options = {"do_sample": False, "num_beams": 3, "length_penalty": 0.7, "max_length": 21, "pad_token_id": PAD}
    found = model.generate(**prompt(case), **options, eos_token_id=None, use_cache=use_cache)
    assert torch.equal(found, case["beam3_no_eos"])
    for name, end in (("beam3", EOP), ("beam3_eos_probe", int(case["eos_probe_id"]))):
        found = model.generate(
            **prompt(case),
            **options,
            eos_token_id=end,
            no_repeat_ngram_size=3,
            early_stopping=True,
            use_cache=use_cache,
        )
        for mine, theirs in zip(_scores(model, case, found, end), _scores(model, case, case[name], end)):
            assert mine >= theirs - 1e-4, name
        if name == "beam3":
            assert torch.equal(found, case[name])


def _scores(model: Any, case: dict[str, Tensor], sequences: Tensor, end: int) -> list[float]:
    """Log-probability of each row's answer, up to its end, divided by its length to the power 0.7."""
    columns, first = sequences.shape[1], case["input_ids"].shape[1]
    mask = case["generation_attention_mask"][:, :, :columns, :columns]
    with torch.no_grad():
        logs = model(sequences, case["position_ids"][..., :columns], mask).logits.log_softmax(-1)
    scores = []
    for row, ids in enumerate(sequences.tolist()):
        last = ids.index(end, first) if end in ids[first:] else columns - 1
        total = sum(float(logs[row, column - 1, ids[column]]) for column in range(first, last + 1))
        scores.append(total / (last + 1 - first) ** 0.7)
    return scores


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_of_every_step(stored: Stored, side: str) -> None:
    """Written at once, with mems, and with a cache: the official logits of one token after the other."""
    case, model = stored(f"generate_{side}pad"), build(GLMForConditionalGeneration)
    ids, positions, mask = case["greedy"], case["position_ids"], case["generation_attention_mask"]
    close(model(ids, positions, mask).logits, case["full_logits_on_greedy"])
    first = case["input_ids"].shape[1]
    for memory in ("mems", "past_key_values"):
        logits, kept, start = [], None, 0
        for end in range(first, 22):
            output = model(
                ids[:, start:end],
                positions[..., start:end],
                mask[:, :, start:end, :end],
                use_cache=memory == "past_key_values" or None,
                **{memory: kept},
            )
            logits.append(output.logits[:, -1])
            kept, start = output[memory], end
        close(torch.stack(logits, dim=1), case["incremental_logits"])
        close(torch.stack(logits, dim=1), case["full_logits_on_greedy"][:, first - 1 :], atol=1e-5)


def test_generate_says_when_the_room_is_used_up(stored: Stored) -> None:
    case, model = stored("generate_leftpad"), build(GLMForConditionalGeneration)
    with pytest.raises(UsageError, match="made for 21 tokens, and there are 22"):
        model.generate(**prompt(case), do_sample=False, max_length=30, eos_token_id=None, pad_token_id=PAD)


def test_generate_without_positions_is_causal(stored: Stored) -> None:
    """As in the official class: a mask of transformers' own, for padding, has no meaning there."""
    model, ids = build(GLMForConditionalGeneration), torch.tensor([[5, 9, 2]])
    found = model.generate(ids, do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=PAD)
    for column in range(3, 9):
        assert int(model(found[:, :column]).logits[0, -1].argmax()) == int(found[0, column])


# Forms of the same ---------------------------------------------------------------------------------------------------


def some_rows(rows: int = 2, tokens: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Random ids with positions and lengths of part A."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 118, (rows, tokens), generator=generator)
    positions = torch.randint(0, 64, (rows, 2, tokens), generator=generator)
    return ids, positions, torch.tensor([7, 5, 12, 1][:rows])


@ATTENTION
@torch.no_grad()
def test_lengths_are_short_for_a_mask(attention: str) -> None:
    ids, positions, lengths = some_rows()
    model, columns = build(GLMModel, attention), torch.arange(12)
    seen = (columns <= columns[:, None]) | (columns < lengths[:, None, None])
    expected = model(ids, positions, lengths).logits
    for mask in (seen[:, None], seen[:, None].long(), nn.functional.pad(seen[:, None].float(), (3, 0), value=1.0)):
        close(model(ids, positions, mask).logits, expected, atol=1e-5)
    assert (model(ids, positions).logits - expected).abs().max() > 0.01


@ATTENTION
@torch.no_grad()
def test_a_padding_mask_is_not_causal(attention: str) -> None:
    ids, positions, _ = some_rows()
    model = build(GLMModel, attention)
    mask = (torch.arange(12) < torch.tensor([[12], [8]])).long()
    output = model(ids, positions, mask).logits
    alone = model(ids[1:, :8], positions[1:, :, :8], torch.ones(1, 8)).logits
    close(output[1:, :8], alone, atol=1e-5)
    ids[0, 11] += 1
    assert (model(ids, positions, mask).logits[0, 0] - output[0, 0]).abs().max() > 1e-3


@ATTENTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_row_that_sees_nothing_takes_the_average(attention: str, dtype: torch.dtype) -> None:
    ids, positions, _ = some_rows()
    model = build(GLMModel, attention).to(dtype)
    mask = torch.ones(2, 1, 12, 12)
    mask[:, :, 4] = 0
    attended: list[Tensor] = []
    layer = model.transformer.layers[0].attention
    layer.dense.register_forward_pre_hook(lambda _, inputs: attended.append(inputs[0]))
    values: list[Tensor] = []
    layer.query_key_value.register_forward_hook(lambda *hook: values.append(hook[2][..., -32:]))
    logits = model(ids, positions, mask).logits
    assert torch.isfinite(logits).all()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    close(attended[0][:, 4].float(), values[0].float().mean(1), atol=tolerance)


@torch.no_grad()
@ATTENTION
def test_cache_and_mems_and_neither(attention: str) -> None:
    """Chunks of several tokens behind a prefix, with lengths and without, give what one call gives."""
    ids, positions, _ = some_rows()
    model, columns = build(GLMModel, attention), torch.arange(12)
    prefix = 7
    whole = model(ids, positions, torch.tensor([prefix, prefix])).logits
    for make in (lambda: None, lambda: hf.DynamicCache(), lambda: new_cache(model, 2, 4)):
        cache = make()
        first = model(ids[:, :prefix], positions[..., :prefix], torch.tensor([prefix] * 2), past_key_values=cache)
        assert (first.mems is None) == (cache is not None)
        close(first.logits, whole[:, :prefix], atol=1e-5)
        mems = first.mems
        for start, end, mask in ((7, 10, None), (10, 11, torch.tensor([0, 0])), (11, 12, (columns < 12).expand(2, 12))):
            output = model(ids[:, start:end], positions[..., start:end], mask, mems, cache)
            close(output.logits, whole[:, start:end], atol=1e-5)
            mems = output.mems
    counted = model(ids, use_cache=True).logits
    cache = hf.DynamicCache()
    halves = [model(part, past_key_values=cache).logits for part in ids.split(6, dim=1)]
    close(torch.cat(halves, dim=1), counted, atol=1e-5)


@torch.no_grad()
def test_what_is_kept_is_what_was_asked_for() -> None:
    ids, positions, lengths = some_rows()
    model = build(GLMForConditionalGeneration)
    whole = model(ids, positions, lengths)
    assert len(whole.mems) == 3
    assert whole.past_key_values is None
    nothing = model(ids, positions, lengths, use_cache=False)
    assert nothing.mems is None
    assert nothing.past_key_values is None
    close(model(ids, positions, lengths, logits_to_keep=3).logits, whole.logits[:, -3:], atol=1e-5)
    chosen = torch.tensor([1, 4])
    close(model(ids, positions, lengths, logits_to_keep=chosen).logits, whole.logits[:, chosen], atol=1e-5)
    states = model(ids, positions, lengths, output_hidden_states=True).hidden_states
    for state, memory in zip(states, whole.mems, strict=True):
        close(state, memory, atol=0)
    bare = build(GLMModel, output_predict=False)(ids, positions, lengths)
    assert bare.logits is None
    assert bare.to_tuple()[0] is bare.last_hidden_states
    with pytest.raises(UsageError, match="both mems and past_key_values"):
        model(ids, positions, lengths, mems=whole.mems, past_key_values=hf.DynamicCache())


@torch.no_grad()
def test_attention_scale_changes_nothing() -> None:
    ids, positions, lengths = some_rows()
    scaled = build(GLMModel, attention_scale=8.0)(ids, positions, lengths).logits
    close(scaled, build(GLMModel)(ids, positions, lengths).logits, atol=0)


def test_wrong_masks_and_positions_are_named() -> None:
    ids, positions, lengths = some_rows()
    model = build(GLMModel)
    with pytest.raises(UsageError, match=r"attention_mask has the shape \(2, 5\): expected .* \(2, 12\)"):
        model(ids, positions, torch.ones(2, 5))
    with pytest.raises(UsageError, match=r"attention_mask has the shape \(2, 12, 12\)"):
        model(ids, positions, torch.ones(2, 12, 12))
    with pytest.raises(UsageError, match=r"position_ids has the shape \(2, 12\): expected \(2, 2, 12\)"):
        model(ids, positions[:, 0], lengths)
    positions[1, 1, 3] = 65
    with pytest.raises(UsageError, match="at position 65: expected at most 64"):
        model(ids, positions, lengths)
    positions[1, 1, 3] = -1
    with pytest.raises(UsageError, match="position_ids has -1: expected positions from 0"):
        model(ids, positions, lengths)


@pytest.mark.parametrize(
    ("choice_ids", "choice_indices", "message"),
    [
        ([], [], "no choices in choice_ids"),
        ([[], []], [[], []], "no choices in choice_ids"),
        ([[[5], [6]]], [[[3], [3]]], r"choice_ids has \[2\] choices, choice_indices \[2\]: .* each of 2 rows"),
        ([[[5], [6]]] * 2, [[[3], [3]]], r"choice_ids has \[2, 2\] choices, choice_indices \[2\]"),
        ([[[5], [6]]] * 2, [[[3], [3]], [[3]]], r"choice_indices \[2, 1\]"),
        ([[[5], [6]], [[5]]], [[[3], [3]], [[3]]], r"choice_ids has \[2, 1\] choices"),
        ([[[5], [6, 7]]] * 2, [[[3], [3]]] * 2, "row 0, choice 1: choice_ids has 2 ids, choice_indices 1 columns"),
    ],
)
def test_choices_that_do_not_fit_are_named(choice_ids: Any, choice_indices: Any, message: str) -> None:
    ids, positions, lengths = some_rows()
    with pytest.raises(UsageError, match=message):
        build(GLMForMultipleChoice)(ids, positions, lengths, choice_ids=choice_ids, choice_indices=choice_indices)


# In the decode loop --------------------------------------------------------------------------------------------------

PROMPTS = [[119, 5, 9, MASK, 30, 7, PAD, SOP], [119, 44, SMASK, SOP], [119, 8, GMASK, 17, 60, 61, 62, 63, 64, PAD, SOP]]


def decode(model: Any, prompts: list[list[int]], steps: int) -> tuple[list[list[int]], Tensor]:
    """Greedy ids of every row and the logits of every step, as the decode loop gets them."""
    width = max(map(len, prompts))
    pads = torch.tensor([width - len(row) for row in prompts])
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    layout = model.input_layout(ids, pads)
    assert layout.whole_prompt
    cache, inputs, logits, answers = new_cache(model, len(prompts), 4), layout.prompt(0, width), [], []
    for _ in range(steps):
        output = model(input_ids=ids, **inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits.append(output.logits[:, -1])
        ids = output.logits[:, -1].argmax(-1, keepdim=True)
        answers.append(ids[:, 0])
        inputs = layout.step()
    return torch.stack(answers, dim=1).tolist(), torch.stack(logits, dim=1)


@pytest.fixture
def filler() -> Any:
    return build(GLMForConditionalGeneration, sop_token_id=SOP, mask_token_ids=[MASK, SMASK, GMASK])


@torch.no_grad()
def test_a_padded_batch_is_its_rows_alone(filler: Any) -> None:
    answers, logits = decode(filler, PROMPTS, 6)
    for row, one in enumerate(PROMPTS):
        alone, alone_logits = decode(filler, [one], 6)
        assert alone[0] == answers[row]
        close(alone_logits[0], logits[row], atol=1e-5)


@torch.no_grad()
def test_the_decode_loop_is_generate(filler: Any) -> None:
    """One row without padding, laid out by the official builder's rule."""
    for row in PROMPTS:
        context, steps = len(row) - 1, 6
        blank = next(place for place, token in enumerate(row) if token in (MASK, SMASK, GMASK))
        where = [*range(context), *[blank] * steps]
        how_far = [0] * context + [*range(1, steps + 1)]
        seen = torch.ones(context + steps, context + steps).tril()
        seen[:, :context] = 1
        found = filler.generate(
            input_ids=torch.tensor([row]),
            position_ids=torch.tensor([[where, how_far]]),
            generation_attention_mask=seen[None, None],
            do_sample=False,
            max_new_tokens=steps,
            eos_token_id=None,
            pad_token_id=PAD,
        )
        assert found[0, len(row) :].tolist() == decode(filler, [row], steps)[0][0]


def test_the_engine_decodes_the_same(filler: Any) -> None:
    options = SamplingOptions(temperature=0)
    answers, _ = decode(filler, PROMPTS, 6)
    together = generate_batch(filler, PROMPTS, options, stop_ids={EOP}, max_new_tokens=6, batch_size=3)
    for row, one in enumerate(PROMPTS):
        expected = answers[row][: answers[row].index(EOP)] if EOP in answers[row] else answers[row]
        assert together[row] == expected
        steps = stream(filler, one, options, stop_ids={EOP}, max_new_tokens=6, prefill_chunk_tokens=2)
        assert [step.token_id for step in steps if step.is_text] == expected


def test_the_decode_loop_needs_to_know_the_blanks() -> None:
    model = build(GLMForConditionalGeneration)
    with pytest.raises(UsageError, match="ids of sop and of the mask tokens are not known"):
        model.input_layout(torch.tensor([PROMPTS[0]]), torch.tensor([0]))


# Training ------------------------------------------------------------------------------------------------------------


def gradients(model: Any, case: dict[str, Tensor]) -> dict[str, Tensor]:
    loss, targets = model.label_loss(case["input_ids"], case["labels"], case["attention_mask"], case["position_ids"])
    (loss / targets).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradients_are_the_same_in_every_form(stored: Stored) -> None:
    case = stored("seq2seq_rightpad")
    no_dropout = {"embedding_dropout_prob": 0.0, "attention_dropout_prob": 0.0, "output_dropout_prob": 0.0}
    plain = gradients(build(GLMForConditionalGeneration), case)
    assert all(gradient is not None for gradient in plain.values())
    eager = gradients(build(GLMForConditionalGeneration, "eager"), case)
    checkpointed = build(GLMForConditionalGeneration, **no_dropout).train()
    checkpointed.gradient_checkpointing_enable()
    for other in (eager, gradients(checkpointed, case)):
        for name, gradient in plain.items():
            close(other[name], gradient, atol=1e-5)


def test_the_embedding_learns_from_both_ends() -> None:
    """The gradient of one entry of the tied table, against a difference quotient."""
    ids, positions, lengths = some_rows()
    model = build(GLMForConditionalGeneration).double()
    labels = torch.full_like(ids, -100)
    labels[0, 9] = int(ids[0, 2])

    def loss() -> Tensor:
        return model.label_loss(ids, labels, lengths, positions)[0]

    loss().backward()
    table = model.glm.word_embeddings.weight
    place = (int(ids[0, 2]), 5)
    with torch.no_grad():
        table[place] += 1e-3
        above = float(loss())
        table[place] -= 2e-3
        below = float(loss())
    assert float(table.grad[place]) == pytest.approx((above - below) / 2e-3, rel=1e-3)


@pytest.mark.parametrize("field", ["embedding_dropout_prob", "attention_dropout_prob", "output_dropout_prob"])
@ATTENTION
@torch.no_grad()
def test_each_dropout_acts_while_training(field: str, attention: str) -> None:
    ids, positions, lengths = some_rows()
    names = ("embedding_dropout_prob", "attention_dropout_prob", "output_dropout_prob")
    off = dict.fromkeys(names, 0.0)
    expected = build(GLMModel, attention)(ids, positions, lengths).logits
    close(build(GLMModel, attention, **off).train()(ids, positions, lengths).logits, expected, atol=1e-6)
    torch.manual_seed(0)
    model = build(GLMModel, attention, **{**off, field: 0.3}).train()
    first, second = (model(ids, positions, lengths).logits for _ in range(2))
    assert (first - expected).abs().max() > 1e-3
    assert (first - second).abs().max() > 1e-3
    close(model.eval()(ids, positions, lengths).logits, expected, atol=1e-6)


def test_dropout_leaves_the_mean() -> None:
    """The four places each leave what they drop out unchanged on average: 4000 draws in one batch."""
    torch.manual_seed(0)
    model = build(GLMModel, embedding_dropout_prob=0.0, output_dropout_prob=0.0, attention_dropout_prob=0.2)
    attention = model.transformer.layers[0].attention
    x = torch.randn(1, 6, 32).expand(4000, -1, -1)
    with torch.no_grad():
        expected = attention(x[:1], 6, (None, None), None)[0]
        drawn = attention.train()(x, 6, (None, None), None)
    standard_error = drawn.std(0) / 4000**0.5
    assert ((drawn.mean(0) - expected).abs() <= 5 * standard_error + 1e-6).all()


def test_new_weights() -> None:
    config = GLMConfig(num_layers=8, hidden_size=256, num_attention_heads=4, vocab_size=512, max_sequence_length=255)
    torch.manual_seed(0)
    model = GLMForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            assert bool((parameter == (1 if name.endswith("weight") else 0)).all()), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            residual = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
            expected = 0.02 / 4 if residual else 0.02  # 4 is the root of 2 * 8 layers
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.02), name


# Files ---------------------------------------------------------------------------------------------------------------


def test_the_official_config_and_back(tmp_path: Path) -> None:
    config = GLMConfig.from_pretrained(str(REPOSITORY))
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (2, 4, 4)
    assert (config.head_dim, config.intermediate_size, config.max_position_embeddings) == (8, 128, 64)
    assert config.gelu == "erf"
    assert config.output_predict
    config.save_pretrained(str(tmp_path))
    official = json.loads((REPOSITORY / "config.json").read_text())
    written = json.loads((tmp_path / "config.json").read_text())
    for field in ("num_layers", "hidden_size", "vocab_size", "max_sequence_length", "model_type", "output_predict"):
        assert written[field] == official[field], field
    assert "auto_map" not in written
    assert GLMConfig.from_pretrained(str(tmp_path)).to_dict() == config.to_dict()
    assert GLMConfig.from_dict({"model_type": "glm"}).output_predict is False  # what the official class assumes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("relative_encoding", True),
        ("block_position_encoding", False),
        ("spell_length", 4),
        ("pool_token", "start"),
        ("tie_word_embeddings", False),
        ("gelu", "relu"),
        ("attention_scale", 0),
        ("hidden_size", 30),
        ("output_dropout_prob", 1.5),
        ("num_layers", 0),
        ("performer", True),
        ("mask_token_ids", "abc"),
        ("mask_token_ids", [4, "5"]),
        ("mask_token_ids", [4, 10**7]),
        ("sop_token_id", -5),
        ("sop_token_id", 10**7),
        ("sop_token_id", [5]),
        ("sop_token_id", True),
        ("quantization_bit", 4.0),
    ],
)
def test_configs_that_are_refused(field: str, value: object) -> None:
    values = json.loads((REPOSITORY / "config.json").read_text())
    with pytest.raises(ConfigError, match=field):
        GLMConfig.from_dict({**values, field: value})


# Of the BERT sizes the paper's figures; the larger vocabularies of the others add to theirs (335 M, 2 B, 10 B).
MILLIONS = {
    "glm-base": 110,
    "glm-large": 335,
    "glm-doc": 335,
    "glm-410m": 410,
    "glm-515m": 515,
    "glm-roberta-large": 355,
    "glm-2b": 1_920,
    "glm-10b": 9_880,
    "glm-large-chinese": 355,
    "glm-10b-chinese": 9_880,
}


@pytest.mark.parametrize("name", RELEASED)
def test_published_sizes_are_read_off_their_tensors(name: str) -> None:
    with torch.device("meta"):
        model = GLMModel(GLMConfig(**RELEASED[name]))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(MILLIONS[name], rel=0.01)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for prefix in ("", "glm.", "model."):
        found = config_from_tensors({prefix + key: shape for key, shape in shapes.items()})
        assert {field: getattr(found, field) for field in RELEASED[name]} == RELEASED[name]
        assert (found.gelu, found.output_predict) == ("tanh", True)
    assert config_from_tensors(shapes, num_attention_heads=4, gelu="erf").num_attention_heads == 4


def test_tensors_of_something_else() -> None:
    with pytest.raises(ConfigError, match=r"position_embeddings.weight: expected a matrix, found nothing"):
        config_from_tensors({"word_embeddings.weight": (10, 64)})
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(REPOSITORY / "model.safetensors").items()}
    with pytest.raises(ConfigError, match="hidden_size is 32: expected a multiple of 64"):
        config_from_tensors(shapes)
    assert config_from_tensors(shapes, num_attention_heads=4).max_sequence_length == 64


HEADS = (GLMModel, GLMForConditionalGeneration, GLMForMultipleChoice, GLMForSequenceClassification)


def test_parameters_have_the_official_names() -> None:
    official = {name: tuple(tensor.shape) for name, tensor in load_file(REPOSITORY / "model.safetensors").items()}
    mine = {name: tuple(tensor.shape) for name, tensor in build(GLMModel).state_dict().items()}
    assert mine == official
    for head in HEADS[1:]:
        names = set(build(head).state_dict())
        assert {f"glm.{name}" for name in official} <= names
        assert names - {f"glm.{name}" for name in official} <= {
            f"{linear}.{leaf}" for linear in ("dense", "out_proj") for leaf in ("weight", "bias")
        }


def through_transformers(cls: type[Any], folder: Path) -> Any:
    return hf.PreTrainedModel.from_pretrained.__func__(cls, str(folder), dtype=torch.float32).eval()


@pytest.mark.parametrize("reader", HEADS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("writer", HEADS, ids=lambda cls: cls.__name__)
@torch.no_grad()
def test_saved_and_loaded_with_and_without_the_prefix(tmp_path: Path, writer: type[Any], reader: type[Any]) -> None:
    ids, positions, lengths = some_rows()
    source = through_transformers(writer, REPOSITORY)
    source.save_pretrained(str(tmp_path))
    written = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith("glm.") for name in written if "word_embeddings" in name) == (writer is not GLMModel)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [writer.__name__]
    loaded = through_transformers(reader, tmp_path)
    network = loaded if reader is GLMModel else loaded.glm
    expected = build(GLMModel)(ids, positions, lengths).logits
    close(network(ids, positions, lengths).logits, expected, atol=1e-6)
    names = set(build(reader).state_dict())
    known = {official_name(name, names) for name in written} & names
    assert known >= {name for name in names if not name.startswith(("dense.", "out_proj."))}
    if writer is reader is GLMForSequenceClassification:
        close(loaded.out_proj.weight, source.out_proj.weight, atol=0)


def test_the_plain_release_is_written_again(tmp_path: Path) -> None:
    build(GLMForConditionalGeneration).glm.save_pretrained(str(tmp_path))
    official, written = load_file(REPOSITORY / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert written.keys() == official.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in official.items())


def test_names_that_fit_nowhere_stay() -> None:
    names = build(GLMForSequenceClassification).state_dict().keys()
    assert official_name("word_embeddings.weight", names) == "glm.word_embeddings.weight"
    assert official_name("model.transformer.final_layernorm.bias", names) == "glm.transformer.final_layernorm.bias"
    assert official_name("pool_layer.bias", names) == "dense.bias"
    assert official_name("glm.something.weight", names) == "glm.something.weight"


@torch.no_grad()
def test_the_training_codes_own_file(shared: Path) -> None:
    """Half precision of the same weights, under the same names as the Hugging Face file."""
    folder = shared / "conformance" / "glm_base" / "megatron_mp1"
    file = folder / (folder / "latest").read_text().strip() / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=True)["module"]
    official = load_file(REPOSITORY / "model.safetensors")
    assert state.keys() == official.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, official[name].half()), name
    config = config_from_tensors({name: tensor.shape for name, tensor in state.items()}, num_attention_heads=4)
    model = GLMForConditionalGeneration(config).eval()
    names = model.state_dict().keys()
    model.load_state_dict({official_name(name, names): tensor.float() for name, tensor in state.items()})
    case = load_file(FIXTURES / "sep_mask.safetensors")
    logits = model(case["input_ids"], case["position_ids"], case["sep"]).logits
    # float16 rounds weights by 2^-11 of their size, which moves these logits by 0.006.
    close(logits, case["logits_tanh_gelu"], atol=0.01)
    assert issubclass(type(model), GLMPreTrainedModel)
