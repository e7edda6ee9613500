"""The snippets of the official READMEs of ChatGLM2-6B and ChatGLM3-6B, word for word but for the paths.

They are run as text. Where a graphics card is named, `.cuda()` does nothing here; each tiny folder's generation_config
ends answers after a few tokens, because its weights are random.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch

import glmkit
import official
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.quant.linear import QuantizedLinear


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("snippets")
    tokenizer = official.train_tokenizer(root / "tokenizer.model")
    made = {
        f"THUDM/chatglm{number}-6b": official.write_folder(root / f"{number}", number, tokenizer=tokenizer)
        for number in (2, 3)
    }
    model = ChatGLM2ForCausalLM.from_pretrained(made["THUDM/chatglm2-6b"]).quantize(4)
    folder = official.write_folder(root / "int4", 2, tokenizer=tokenizer, quantization_bit=4)
    for file in folder.glob("model*"):
        file.unlink()
    official.write_weights(folder, {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, "bin")
    made["THUDM/chatglm2-6b-int4"] = folder
    return made


@pytest.fixture(autouse=True)
def no_graphics_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)


def run(snippet: str, folders: dict[str, Path], **names: Any) -> dict[str, Any]:
    """Runs a snippet with the folders in place of the hub ids; returns its variables."""
    for name in sorted(folders, key=len, reverse=True):
        snippet = snippet.replace(f'"{name}"', f'"{folders[name]}"')
    torch.manual_seed(0)
    exec(dedent(snippet), names)
    assert not any((folder / official.CANARY).exists() for folder in folders.values())
    return names


CHATGLM2 = """
    from transformers import AutoTokenizer, AutoModel
    tokenizer = AutoTokenizer.from_pretrained("THUDM/chatglm2-6b", trust_remote_code=True)
    model = {load}
    model = model.eval()
    response, history = model.chat(tokenizer, "你好", history=[])
    print(response)
    response, history = model.chat(tokenizer, "晚上睡不着应该怎么办", history=history)
    print(response)
"""
_LOAD = 'AutoModel.from_pretrained("THUDM/chatglm2-6b", trust_remote_code=True)'


@pytest.mark.parametrize(
    ("load", "dtype", "bits"),
    [
        ('AutoModel.from_pretrained("THUDM/chatglm2-6b", trust_remote_code=True, device="cpu")', torch.float16, 0),
        (f"{_LOAD}.half().cuda()", torch.float16, 0),
        (f"{_LOAD}.float()", torch.float32, 0),
        (f"{_LOAD}.quantize(8).cuda()", torch.float16, 8),
        (f"{_LOAD}.quantize(4).cuda()", torch.float16, 4),
        (f"{_LOAD}.quantize(4).float()", torch.float32, 4),
        ('AutoModel.from_pretrained("THUDM/chatglm2-6b-int4",trust_remote_code=True).cuda()', torch.float16, 4),
        ('AutoModel.from_pretrained("THUDM/chatglm2-6b-int4",trust_remote_code=True).float()', torch.float32, 4),
        ('AutoModel.from_pretrained("THUDM/chatglm2-6b", trust_remote_code=True, empty_init=False)', torch.float16, 0),
    ],
)
def test_chatglm2(folders: dict[str, Path], load: str, dtype: torch.dtype, bits: int) -> None:
    names = run(CHATGLM2.format(load=load), folders)
    model, tokenizer, history = names["model"], names["tokenizer"], names["history"]
    assert type(model) is ChatGLM2ForCausalLM
    assert not model.training
    assert model.transformer.embedding.word_embeddings.weight.dtype == dtype
    layers = {type(module) for name, module in model.named_modules() if name.endswith("mlp.dense_4h_to_h")}
    assert layers == {QuantizedLinear if bits else torch.nn.Linear}
    assert model.config.quantization_bit == bits
    assert [query for query, _ in history] == ["你好", "晚上睡不着应该怎么办"]
    assert history[1][1] == names["response"]
    prompt = tokenizer.build_prompt("晚上睡不着应该怎么办", history=history[:1])
    assert prompt == f"[Round 1]\n\n问：你好\n\n答：{history[0][1]}\n\n[Round 2]\n\n问：晚上睡不着应该怎么办\n\n答："


def test_chatglm2_stream(folders: dict[str, Path]) -> None:
    names = run(
        """
        from transformers import AutoTokenizer, AutoModel
        tokenizer = AutoTokenizer.from_pretrained("THUDM/chatglm2-6b", trust_remote_code=True)
        model = AutoModel.from_pretrained("THUDM/chatglm2-6b", trust_remote_code=True).float()
        model = model.eval()
        seen = []
        past_key_values, history = None, []
        for query in ("你好", "hello"):
            current_length = 0
            for response, history, past_key_values in model.stream_chat(tokenizer, query, history=history,
                                                                        past_key_values=past_key_values,
                                                                        return_past_key_values=True):
                print(response[current_length:], end="", flush=True)
                current_length = len(response)
                seen.append(response)
        for response, once in model.stream_chat(tokenizer, "你好", history=[], do_sample=False):
            pass
        whole, _ = model.chat(tokenizer, "你好", history=[], do_sample=False)
        """,
        folders,
    )
    assert len(names["history"]) == 2
    assert names["history"][1][1] == names["seen"][-1]
    assert names["past_key_values"].get_seq_length() > 0
    assert names["response"] == names["whole"]
    assert names["once"] == [("你好", names["whole"])]


def test_chatglm2_p_tuning(folders: dict[str, Path], tmp_path: Path) -> None:
    """The recipe of ptuning/README.md; the comments say what the official text says there."""
    row = 2 * 2 * 2 * 8
    torch.manual_seed(0)
    prefix = {"transformer.prefix_encoder.embedding.weight": torch.randn(128, row).half().float()}
    torch.save(prefix, tmp_path / "pytorch_model.bin")
    names = run(
        """
        import os
        import torch
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        # Load model and tokenizer of the original checkpoint
        tokenizer = AutoTokenizer.from_pretrained("THUDM/chatglm2-6b", trust_remote_code=True)
        config = AutoConfig.from_pretrained("THUDM/chatglm2-6b", trust_remote_code=True, pre_seq_len=128)
        model = AutoModel.from_pretrained("THUDM/chatglm2-6b", config=config, trust_remote_code=True)
        prefix_state_dict = torch.load(os.path.join(CHECKPOINT_PATH, "pytorch_model.bin"))
        new_prefix_state_dict = {}
        for k, v in prefix_state_dict.items():
            if k.startswith("transformer.prefix_encoder."):
                new_prefix_state_dict[k[len("transformer.prefix_encoder."):]] = v
        model.transformer.prefix_encoder.load_state_dict(new_prefix_state_dict)
        # Comment out the following line if you don't use quantization
        model = model.quantize(4)
        model = model.half().cuda()
        model.transformer.prefix_encoder.float()
        model = model.eval()
        response, history = model.chat(tokenizer, "你好", history=[])
        """,
        folders,
        CHECKPOINT_PATH=str(tmp_path),
    )
    model = names["model"]
    assert torch.equal(model.transformer.prefix_encoder.embedding.weight, next(iter(prefix.values())))
    (tmp_path / "config.json").write_text(json.dumps(official.CONFIG | {"pre_seq_len": 128}))
    loaded = glmkit.load(folders["THUDM/chatglm2-6b"], adapter=tmp_path, dtype="float32", quantize="official-int4")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, model.float()(ids).logits, atol=1e-5, rtol=1e-5)


def test_chatglm3(folders: dict[str, Path]) -> None:
    names = run(
        """
        from transformers import AutoTokenizer, AutoModel
        tokenizer = AutoTokenizer.from_pretrained("THUDM/chatglm3-6b", trust_remote_code=True)
        model = AutoModel.from_pretrained("THUDM/chatglm3-6b", trust_remote_code=True, device='cpu')
        model = model.eval()
        response, history = model.chat(tokenizer, "你好", history=[])
        print(response)
        response, history = model.chat(tokenizer, "晚上睡不着应该怎么办", history=history)
        print(response)
        """,
        folders,
    )
    assert [message["role"] for message in names["history"][::2]] == ["user", "user"]
    assert names["history"][0] == {"role": "user", "content": "你好"}
    assert {message["role"] for message in names["history"][1::2]} == {"assistant"}


@pytest.mark.parametrize("ending", [".half().cuda()", ".float()", ".quantize(4).cuda()", ".quantize(8).float()"])
def test_chatglm3_stream(folders: dict[str, Path], ending: str) -> None:
    names = run(
        f"""
        from transformers import AutoTokenizer, AutoModel
        tokenizer = AutoTokenizer.from_pretrained("THUDM/chatglm3-6b", trust_remote_code=True)
        model = AutoModel.from_pretrained("THUDM/chatglm3-6b", trust_remote_code=True){ending}
        model = model.eval()
        past_key_values, history = None, []
        current_length = 0
        for response, history, past_key_values in model.stream_chat(tokenizer, "你好", history=history, top_p=1,
                                                                    temperature=0.01,
                                                                    past_key_values=past_key_values,
                                                                    return_past_key_values=True):
            print(response[current_length:], end="", flush=True)
            current_length = len(response)
        """,
        folders,
    )
    assert names["history"][0] == {"role": "user", "content": "你好"}
    assert names["past_key_values"].get_seq_length() > 0


TOOLS = [
    {
        "name": "track",
        "description": "追踪指定股票的实时价格",
        "parameters": {
            "type": "object",
            "properties": {"symbol": {"description": "需要追踪的股票代码"}},
            "required": ["symbol"],
        },
    }
]


def test_chatglm3_tools(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of tools_using_demo: a call, its result as an observation, the answer."""
    tokenizer = glmkit.load(folders["THUDM/chatglm3-6b"]).tokenizer
    call = "```python\ntool_call(symbol='10111')\n```"
    answers = [
        [*tokenizer.encode_text("track\n"), *tokenizer.encode_text(call), tokenizer.get_command("<|observation|>")],
        [*tokenizer.encode_text("\n"), *tokenizer.encode_text("股票的价格是 12412"), tokenizer.get_command("<|user|>")],
    ]
    prompts, options = [], []

    def generate(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        prompts.append(input_ids[0].tolist())
        options.append(kwargs)
        return torch.cat((input_ids, torch.tensor([answers.pop(0)])), dim=1)

    monkeypatch.setattr(ChatGLM2ForCausalLM, "generate", generate)
    names = run(
        """
        import json
        from transformers import AutoTokenizer, AutoModel
        tokenizer = AutoTokenizer.from_pretrained("THUDM/chatglm3-6b", trust_remote_code=True)
        model = AutoModel.from_pretrained("THUDM/chatglm3-6b", trust_remote_code=True).half().cuda()
        model = model.eval()
        system_info = {"role": "system",
                       "content": "Answer the following questions as best as you can. You have access to the following "
                                  "tools:",
                       "tools": tools}
        history = [system_info]
        query = "帮我查询股票10111的价格"
        response, history = model.chat(tokenizer, query, history=history)
        print(response)
        first, between = response, list(history)
        result = json.dumps({"price": 12412}, ensure_ascii=False)
        response, history = model.chat(tokenizer, result, history=history, role="observation")
        print(response)
        """,
        folders,
        tools=copy.deepcopy(TOOLS),
    )
    assert names["first"] == {"name": "track", "parameters": {"symbol": "10111"}}
    assert names["response"] == "股票的价格是 12412"
    turns = [(message["role"], message.get("metadata"), message["content"]) for message in names["history"][1:]]
    assert turns == [
        ("user", None, "帮我查询股票10111的价格"),
        ("assistant", "track", f" {call}"),
        ("observation", None, '{"price": 12412}'),
        ("assistant", "", "股票的价格是 12412"),
    ]
    assert names["between"] == names["history"][:3]

    def block(role: str, text: str, metadata: str = "") -> list[int]:
        header = tokenizer.encode_text(f"{metadata}\n")
        return [tokenizer.get_command(f"<|{role}|>"), *header, *tokenizer.encode_text(text)]

    listed = json.dumps(TOOLS, indent=4, ensure_ascii=False)
    system = f"{names['system_info']['content']}\n{listed}"
    expected = [*tokenizer.prefix_ids, *block("system", system), *block("user", "帮我查询股票10111的价格")]
    assistant = tokenizer.get_command("<|assistant|>")
    assert prompts[0] == [*expected, assistant]
    expected += block("assistant", f" {call}", "track") + block("observation", '{"price": 12412}')
    assert prompts[1] == [*expected, assistant]
    stops = {2, tokenizer.get_command("<|user|>"), tokenizer.get_command("<|observation|>")}
    for given in options:
        assert set(given["eos_token_id"]) == stops
        assert (given["max_length"], given["num_beams"], given["do_sample"]) == (8192, 1, True)
        assert (given["top_p"], given["temperature"]) == (0.8, 0.8)


@pytest.mark.parametrize("generation", [2, 3])
def test_conformance_folder_with_the_official_tokenizer(shared: Path, tmp_path: Path, generation: int) -> None:
    """Ids of a greedy chat through the snippet are what the plain network says."""
    source = shared / "conformance" / f"chatglm{generation}" / "model"
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    vocabulary = shared / "tokenizers" / "chatglm2-chatglm3.tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    name = f"THUDM/chatglm{generation}-6b"
    names = run(
        f"""
        from transformers import AutoTokenizer, AutoModel
        tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
        model = AutoModel.from_pretrained("{name}", trust_remote_code=True).float()
        model = model.eval()
        response, history = model.chat(tokenizer, "你好", history=[], do_sample=False, max_length=40)
        """,
        {name: tmp_path},
    )
    model, tokenizer = names["model"], names["tokenizer"]
    if generation == 2:
        ids = tokenizer("[Round 1]\n\n问：你好\n\n答：")["input_ids"]
        assert ids[:2] == [64790, 64792]
    else:
        ids = [64790, 64792, 64795, 30910, 13, *tokenizer.encode_text("你好"), 64796]
    start, stops = len(ids), {2, 64795, 64797} if generation == 3 else {2}
    while len(ids) < 40:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].argmax()))
        if ids[-1] in stops:
            break
    answer = [token for token in ids[start:] if token not in stops]
    if generation == 2:
        assert names["response"] == tokenizer.decode(answer).strip()
    else:
        text = tokenizer.decode(answer)
        parts = text.split("\n", maxsplit=1)
        assert names["response"] == parts[1].strip() if len(parts) == 2 and not parts[0].strip() else text
