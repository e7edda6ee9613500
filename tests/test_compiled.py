"""`model.compile()` of torch on our models: the same answers, and no compilation at every token."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from glmkit.engine import SamplingOptions, stream
from glmkit.engine.native import why_not
from glmkit.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM


@pytest.fixture(scope="module")
def model() -> ChatGLM2ForCausalLM:
    torch.manual_seed(0)
    config = ChatGLM2Config(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        kv_channels=8,
        multi_query_attention=True,
        multi_query_group_num=2,
        ffn_hidden_size=48,
        padded_vocab_size=90,
        seq_length=256,
        add_qkv_bias=True,
    )
    return ChatGLM2ForCausalLM(config).eval()


def test_a_compiled_model_answers_alike_and_is_compiled_a_few_times(model: ChatGLM2ForCausalLM) -> None:
    compiled, counter = copy.deepcopy(model), CompileCounter()
    compiled.compile(backend=counter, dynamic=True)
    assert why_not(compiled) is not None, "native code leaves it alone"
    counts = []
    for length, tokens in ((9, 4), (9, 40), (30, 40), (30, 60)):
        ids = torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        answers = [
            [step.token_id for step in stream(one, ids, SamplingOptions(seed=1), stop_ids=(), max_new_tokens=tokens)]
            for one in (model, compiled)
        ]
        assert answers[0] == answers[1]
        counts.append(counter.frame_count)
    assert 0 < counts[0] <= counts[-1] <= 4, f"compilations so far after each answer: {counts}"
    assert counts[-2] == counts[-1]
