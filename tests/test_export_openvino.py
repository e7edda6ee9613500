"""OpenVINO: the exported graph says what the engine says, token for token, with no torch in its process."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import glmkit
import tiny
import tiny_families
from glmkit.engine.decode import stream
from glmkit.engine.layout import layout_for
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import UsageError
from glmkit.export.constants import Packed, open_weights
from glmkit.export.graph import Exported, inputs_at, inputs_of
from glmkit.quant.linear import dequantize, pack_nibbles

pytest.importorskip("openvino")
pytest.importorskip("openvino_tokenizers")

from glmkit.export import openvino as exporter
from glmkit.runtime.session import OpenVINOSession, load_openvino

GREEDY = SamplingOptions(temperature=0)
PREFIX = 6


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ChatGLM3 with a P-Tuning prefix that changes what it says; every layer can be quantised to int4."""
    place = tmp_path_factory.mktemp("tuned")
    file = tiny.train_tokenizer(place / "tokenizer.model")
    return tiny.write_model(place / "model", file, ffn_hidden_size=64, pre_seq_len=PREFIX)


@pytest.fixture(scope="module")
def exported(tuned: Path) -> Exported:
    return exporter.export(tuned, tuned.parent / "openvino")


def compare(model: object, session: OpenVINOSession, prompt: int, lengths: list[int]) -> float:
    """The largest difference of logits, over a prompt and steps of several widths, rows padded on the left."""
    width = max(lengths)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 300, (len(lengths), width), generator=generator)
    pads = torch.tensor([width - length for length in lengths])
    with torch.inference_mode():
        given = layout_for(model, ids, pads).prompt(0, width)
        expected = model(input_ids=ids, **given).logits.float()  # type: ignore[operator]
    session.start(len(lengths))
    worst, borders = 0.0, [0, prompt, prompt + 1, prompt + 3, width]
    for start, end in pairwise(borders):
        if start < end:
            fed = inputs_at(model, ids, pads, start, end)
            found = session.run(*(one.numpy() for one in fed.values()))
            assert (found.argmax(-1) == expected[:, end - 1].argmax(-1).numpy()).all()
            worst = max(worst, float(np.abs(found - expected[:, end - 1].numpy()).max()))
    return worst


def test_logits_with_padding_prefix_and_other_sizes_than_the_samples(exported: Exported, tuned: Path) -> None:
    assert exported.difference is not None
    assert exported.difference < 1e-5
    model = glmkit.load(tuned, dtype="float32").model
    session = OpenVINOSession(Path(exported.path) / exporter.MODEL)
    for prompt, lengths in ((1, [5]), (9, [13, 10, 7]), (40, [48, 48, 9, 21])):
        assert compare(model, session, prompt, lengths) < 1e-5


def test_prefix_is_in_the_state_and_changes_answers(tuned: Path, exported: Exported) -> None:
    with open_weights(tuned) as weights:
        prefix, form = weights.prefix(), inputs_of(weights.config)
    assert prefix is not None
    assert form.prefix_tokens == PREFIX
    assert [tuple(one.shape) for one in prefix] == [(1, form.heads, PREFIX, form.width)] * 2 * form.layers
    model = glmkit.load(tuned, dtype="float32").model
    with torch.inference_mode():
        model.transformer.prefix_encoder.embedding.weight.zero_()
    session = OpenVINOSession(Path(exported.path) / exporter.MODEL)
    ids = torch.arange(20, 30)[None]
    fed = inputs_at(model, ids, torch.tensor([0]), 0, 10)
    session.start(1)
    found = session.run(*(one.numpy() for one in fed.values()))
    with torch.inference_mode():
        other = model(input_ids=ids).logits[0, -1].numpy()
    assert np.abs(found[0] - other).max() > 1e-3


def test_llm_pipeline_goes_on_as_the_engine_does(exported: Exported, tuned: Path) -> None:
    """OpenVINO's own program, with no torch in its process, from the ids of a prompt; the prefix is in the state."""
    pytest.importorskip("openvino_genai")
    ids = list(range(20, 33))
    code = """
import json, sys
sys.modules["openvino_telemetry"] = sys.modules["torch"] = sys.modules["transformers"] = None
import numpy, openvino, openvino_genai
exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "ATTENTION_BACKEND": "SDPA"}
pipe = openvino_genai.LLMPipeline(sys.argv[1], "CPU", **exact)
config = openvino_genai.GenerationConfig(max_new_tokens=12, do_sample=False, ignore_eos=True)
print(pipe.generate(openvino.Tensor(numpy.array([json.loads(sys.argv[2])])), config).tokens[0])
"""
    command = [sys.executable, "-c", code, exported.path, str(ids)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    steps = stream(glmkit.load(tuned, dtype="float32").model, ids, GREEDY, stop_ids=(), max_new_tokens=12)
    assert json.loads(said) == [step.token_id for step in steps]


def test_attention_is_fused_with_the_cache(exported: Exported) -> None:
    compiled = load_openvino().Core().compile_model(Path(exported.path) / exporter.MODEL, "CPU")
    nodes = [
        one
        for one in compiled.get_runtime_model().get_ordered_ops()
        if str(one.get_rt_info()["layerType"].astype(str)).startswith("ScaledDotProductAttention")
    ]
    # query, key, value, mask, beam_idx and the two states; besides the result it gives the new states
    assert [(len(one.inputs()), len(one.outputs())) for one in nodes] == [(7, 3)] * 2


def test_codes_are_those_of_our_formats() -> None:
    """Odd and even columns of int4 stand in other halves of a byte in OpenVINO."""
    ov = load_openvino()
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 4)
    scale = torch.tensor([[0.5, 2.0], [1.0, -3.0]], dtype=torch.float16)
    packed = Packed(pack_nibbles(codes), scale, 4)
    for one in (packed, Packed(codes, torch.tensor([0.25, 3.0], dtype=torch.bfloat16), 8)):
        graph = ov.Model([exporter._constant(one, "w")], [])
        found = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])[0]
        assert (found == dequantize(one.weight, one.scale, one.bits).float().numpy()).all()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_weights_are_read_as_the_loader_makes_them(tuned: Path, scheme: str) -> None:
    with open_weights(tuned) as weights:
        found = dict(weights.read(scheme))
        assert weights.error is not None
        assert 0.001 < weights.error < (0.02 if scheme == "int8" else 0.2)
    model = glmkit.load(tuned, quantize=scheme, kernels="torch").model
    for name, layer in model.named_modules():
        if hasattr(layer, "weight_scale"):
            one = found[f"{name}.weight"]
            assert isinstance(one, Packed)
            assert one.bits == layer.bits
            assert torch.equal(one.weight, layer.weight)
            assert torch.equal(one.scale, layer.weight_scale)
    table = found["transformer.embedding.word_embeddings.weight"]
    assert isinstance(table, Packed)
    assert table.bits == 8


def test_a_quantised_source_is_not_quantised_again(tuned: Path, tmp_path: Path) -> None:
    from glmkit.export.quantized import quantize

    quantize(tuned, tmp_path / "int8", "int8")
    with open_weights(tmp_path / "int8") as weights:
        assert sum(isinstance(one, Packed) for _, one in weights.read()) == 2 * 4
        with pytest.raises(UsageError, match="quantised already, to int8"):
            weights.forms("int4")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["chatglm", "glm", "glm4"])
def test_other_families(family: str, tmp_path: Path) -> None:
    write = getattr(tiny_families, f"write_{family}")
    write(tmp_path / "model")
    made = exporter.export(tmp_path / "model", tmp_path / "openvino")  # compares a padded batch by itself
    assert made.difference is not None
    assert made.difference < 1e-5
    assert (tmp_path / "openvino" / "openvino_tokenizer.xml").is_file() == (family == "glm4")


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "most"), [(None, 1e-5), ("int8", 0.05), ("int4", 0.3)])
def test_llm_pipeline_says_what_the_engine_says(scheme: str | None, most: float, tmp_path: Path) -> None:
    pytest.importorskip("openvino_genai")
    made = exporter.export("glm-nano", tmp_path / "nano", weights=scheme)
    assert made.difference is not None
    assert made.difference < most
    code = """
import sys
sys.modules["openvino_telemetry"] = None
import openvino_genai
pipe = openvino_genai.LLMPipeline(sys.argv[1], "CPU", INFERENCE_PRECISION_HINT="f32")
config = pipe.get_generation_config()
config.max_new_tokens, config.do_sample = 40, False
print(pipe.generate("你好", config).strip())
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    said = subprocess.run([sys.executable, "-c", code, made.path], capture_output=True, text=True, check=True).stdout
    reply = glmkit.load("glm-nano", dtype="float32").chat("你好", do_sample=False, max_new_tokens=40)
    assert said.strip() == reply.text
