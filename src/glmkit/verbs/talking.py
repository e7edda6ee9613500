"""Verbs that answer: chat, serve, web, run, quickstart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from glmkit.verbs.app import (
    Adapters,
    Device,
    Dtype,
    FamilyName,
    Json,
    Model,
    Quantize,
    Yes,
    named_adapters,
    verb,
)


@verb("Talk to a model; with --prompt ask one question.")
def chat(
    model: Model = "",
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="One question; '-' is standard input, other piped input follows the text."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")] = None,
    adapter: Adapters = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Longest answer in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 always takes the likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="1 is off.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="0 is off.")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", help="0 is off.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option("--repetition-penalty", help="1 is off.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes answers repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Text that ends an answer; repeatable.")
    ] = None,
    lookup: Annotated[
        int | None,
        typer.Option("--lookup", metavar="N", help="Draft up to N tokens from the text: same answer, often faster."),
    ] = None,
    continue_: Annotated[bool, typer.Option("--continue", "-c", help="Continue the last conversation.")] = False,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="ID", help="Continue another one, see glm logs list.")
    ] = None,
    json_: Json = False,
    plain: Annotated[bool, typer.Option("--plain", help="No line editor and no colours.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Speed and tokens after each answer.")] = False,
    family: FamilyName = None,
    yes: Yes = False,
) -> int:
    """Chats with a model, once or in a loop."""
    from glmkit.terminal import ChatRequest, run

    sampling = {
        "max_new_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
        "lookup_tokens": lookup,
    }
    loading = {"adapter": named_adapters(adapter), "dtype": dtype, "device": device}
    loading |= {"quantize": quantize, "family": family}
    return run(
        ChatRequest(
            model=model or None,
            prompt=prompt,
            system=system,
            loading=loading | {"download": yes},
            sampling={name: value for name, value in sampling.items() if value is not None},
            json=json_,
            continued="" if continue_ and resume is None else resume,
            plain=plain,
            verbose=verbose,
        )
    )


@verb("Serve a model: the API of OpenAI clients, many requests at once.")
def serve(
    model: Annotated[str, typer.Argument(help="Folder, model name or hub id.", metavar="MODEL")],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", metavar="[NAME=]DIR", help="Served beside the base by its name; repeatable."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="What clients call the model.")] = None,
    host: Annotated[str, typer.Option("--host", help="Address; others than loopback need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        str | None, typer.Option("--api-key-file", metavar="FILE", help="A key a line; or GLMKIT_API_KEY is one.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", metavar="KEY", help="One key; others on this machine can see it.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", metavar="NAME", help="Host name to answer for, beside localhost; repeatable."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option("--cors-origin", metavar="ORIGIN", help="Web page that may use it; repeatable."),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    max_running: Annotated[int, typer.Option("--max-running", help="Answers computed at once.")] = 16,
    max_waiting: Annotated[int, typer.Option("--max-waiting", help="Requests that wait; more get 429.")] = 64,
    max_body_bytes: Annotated[int, typer.Option("--max-body-bytes", help="Longest request.")] = 8 * 2**20,
    waiting_timeout_seconds: Annotated[
        float, typer.Option("--waiting-timeout-seconds", help="For an answer to begin; then 503.")
    ] = 120.0,
    request_timeout_seconds: Annotated[
        float, typer.Option("--request-timeout-seconds", help="For a whole answer; then 504.")
    ] = 600.0,
    drain_seconds: Annotated[
        float, typer.Option("--drain-seconds", help="What runs may go on so long after SIGTERM.")
    ] = 30.0,
    requests_per_minute: Annotated[
        int | None, typer.Option("--requests-per-minute", metavar="N", help="Of each key; more get 429.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option("--tokens-per-minute", metavar="N", help="Read and written for each key; then 429.")
    ] = None,
    store: Annotated[
        str | None, typer.Option("--store", metavar="FOLDER", help="Keeps answers that clients ask to store.")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write requests to the log, texts too.")] = False,
    family: FamilyName = None,
    yes: Yes = False,
) -> int:
    """Serves until SIGTERM or Ctrl-C."""
    from glmkit.serve.launch import launch, read_keys
    from glmkit.serve.settings import Settings

    settings = Settings(
        host=host,
        port=port,
        api_keys=read_keys(api_key_file, api_key),
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        max_body_bytes=max_body_bytes,
        waiting_seconds=waiting_timeout_seconds,
        request_seconds=request_timeout_seconds,
        drain_seconds=drain_seconds,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        log_prompts=log_prompts,
        store=None if store is None else Path(store),
    )
    adapters = named_adapters(adapter)
    named = {Path(adapters).name: adapters} if isinstance(adapters, str) else adapters
    loading = {"adapter": named, "dtype": dtype, "device": device, "quantize": quantize, "family": family}
    engine = {"max_running": max_running, "max_waiting": max_waiting}
    launch(model, settings, name=name, loading=loading | {"download": yes}, engine=engine)


@verb("Talk to models in the browser: chat, tools, code interpreter.")
def web(
    models: Annotated[
        list[str], typer.Argument(help="Folders, names or hub ids; the page switches between them.", metavar="MODEL...")
    ],
    adapter: Adapters = None,
    host: Annotated[str, typer.Option("--host", help="Address; others than loopback need a password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.")] = 7860,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", metavar="NAME", help="Host name to answer for, beside localhost; repeatable."),
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="A public address, through gradio's tunnel.")] = False,
    password_file: Annotated[
        str | None,
        typer.Option("--password-file", metavar="FILE", help="Lines name:password; or GLMKIT_WEB_PASSWORD is one."),
    ] = None,
    lang: Annotated[str, typer.Option("--lang", help="zh or en, for browsers that ask for neither.")] = "zh",
    tools: Annotated[
        str | None, typer.Option("--tools", metavar="FILE.py", help="Functions the model may call, each with consent.")
    ] = None,
    code_interpreter_minimum: Annotated[
        str, typer.Option("--code-interpreter-minimum", help="Isolation that code needs to run: full or reduced.")
    ] = "full",
    unsafe_code_interpreter: Annotated[
        bool, typer.Option("--unsafe-code-interpreter", help="Run code also where nothing isolates it.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    family: FamilyName = None,
    yes: Yes = False,
) -> int:
    """Serves the page until SIGTERM or Ctrl-C."""
    from glmkit.web.launch import Request, launch

    loading: dict[str, Any] = {"adapter": named_adapters(adapter), "dtype": dtype, "device": device}
    loading |= {"quantize": quantize, "family": family, "download": yes}
    return launch(
        Request(
            models=tuple(models),
            loading=loading,
            host=host,
            port=port,
            allowed_hosts=tuple(allowed_host or ()),
            share=share,
            password_file=None if password_file is None else Path(password_file),
            language=lang,
            minimum=code_interpreter_minimum,
            unsafe=unsafe_code_interpreter,
            tools=None if tools is None else Path(tools),
        )
    )


@verb("Answer from an exported folder, without PyTorch.")
def run(
    folder: Annotated[str, typer.Argument(help="What glm export wrote for openvino or onnx.", metavar="DIR")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="One question, or a text with [MASK]; '-' is standard input.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Longest answer in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 always takes the likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="1 is off.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="0 is off.")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", help="0 is off.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option("--repetition-penalty", help="1 is off.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes answers repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Text that ends an answer; repeatable.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="How many threads compute.")] = None,
    json_: Json = False,
) -> int:
    """Runs what was exported; needs numpy, tokenizers, and onnxruntime or openvino."""
    from glmkit.runtime.terminal import run as answer

    return answer(
        folder,
        prompt,
        system=system,
        threads=threads,
        as_json=json_,
        stop=tuple(stop or ()),
        max_new_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )


@verb("See it all in three minutes, offline.")
def quickstart(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for curve and report.")] = "quickstart",
) -> int:
    """Runs the tour with the model that comes with the package."""
    from glmkit import quickstart as tour

    return tour.main(output=output) or 0
