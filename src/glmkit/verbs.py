"""The verbs of the command `glm` and their flags. Each imports its work when it is called, so that help stays fast."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from glmkit.cli import unknown_verb
from glmkit.errors import UsageError

# Flags as other tools call them; they work and do not clutter the help.
_FLAG_SYNONYMS = {
    "--temp": "--temperature",
    "--repeat-penalty": "--repetition-penalty",
    "--system-prompt": "--system",
    "--adapter-path": "--adapter",
    "--lora": "--adapter",
    "--lora-path": "--adapter",
    "--max-new-tokens": "--max-tokens",
    "--torch-dtype": "--dtype",
    "--quantization": "--quantize",
    "--out-dir": "--output",
    "--output-dir": "--output",
}


_RUNTIMES = ("openvino", "onnx", "gguf")  # glm export --to


class _Verb(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {flag for parameter in self.params for flag in parameter.opts}
        return super().parse_args(ctx, [_canonical_flag(argument, own) for argument in args])


class _RecipeVerb(_Verb):
    """A verb that takes a recipe: every setting is a flag too, and stands in the help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {flag: not getattr(one, "is_flag", False) for one in self.params for flag in one.opts}
        args = [_canonical_flag(argument, set(own)) for argument in args]
        if any(argument.partition("=")[0] not in own for argument in args if argument.startswith("--")):
            from glmkit.train.flags import settings_from_flags

            own |= dict.fromkeys(("--help", "-h"), False)
            args, settings = settings_from_flags(args, own, self._kind())
            end = args.index("--") if "--" in args else len(args)
            args[end:end] = [part for setting in settings for part in ("--set", setting)]
        return super().parse_args(ctx, args)

    def get_help(self, ctx: Any) -> str:
        from glmkit.train.flags import settings_help

        return f"{super().get_help(ctx)}\n\n{settings_help(self._kind())}"

    def _kind(self) -> Any:
        from glmkit.train.arguments import VERBS

        return next(kind for kind, verb in VERBS.items() if verb == self.name)


class _Verbs(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)  # as they are written here, not by the alphabet

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            raise unknown_verb(args[0], known, ctx.command_path)
        return super().resolve_command(ctx, args)


def _canonical_flag(argument: str, own: set[str]) -> str:
    flag, equals, value = argument.partition("=")
    meant = _FLAG_SYNONYMS.get(flag, flag)
    return meant + equals + value if flag not in own and meant in own else argument


app = typer.Typer(
    cls=_Verbs,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Load, chat with, tune and evaluate GLM models.",
)


def command() -> Any:
    """Builds the parser of the whole command."""
    return typer.main.get_command(app)


def _verb(summary: str, cls: type[TyperCommand] = _Verb) -> Callable[..., Any]:
    return app.command(cls=cls, help=summary, context_settings={"help_option_names": ["-h", "--help"]})


def _group(name: str, summary: str) -> typer.Typer:
    """Makes a verb that has verbs of its own."""
    group = typer.Typer(
        cls=_Verbs,
        rich_markup_mode=None,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        help=summary,
    )
    app.add_typer(group, name=name)
    return group


_data = _group("data", "Work on data files.")
_checkpoints = _group("checkpoint", "Work on checkpoints of runs with several processes.")
_cluster = _group("cluster", "Write and check the rank tables of Ascend clusters.")
_recipes = _group("recipe", "Show the recipes of the package, copy them, and explain their settings.")


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    # Both are taken from the arguments before they are parsed; here they are for the help.
    pass


# --- flags that several verbs share ---

Model = Annotated[str, typer.Argument(help="Folder, model name such as chatglm3-6b, or hub id.", metavar="MODEL")]
Adapter = Annotated[str | None, typer.Option("--adapter", "-a", help="Folder of a LoRA or P-Tuning adapter.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", "-a", metavar="[NAME=]DIR", help="LoRA or P-Tuning folder; repeatable, /adapter NAME changes it."
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, npu, ...")]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", "-q", help="int8 or int4, official-int8 or -int4, bnb-int8 or bnb-nf4; while loading."),
]
FamilyName = Annotated[str | None, typer.Option("--family", help="What the folder is, if it does not say it itself.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A change; repeatable.")]
Force = Annotated[bool, typer.Option("--force", help="Begin also if the memory will not be enough.")]
Schema = Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors, and leave.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Fetch the model if it is not on this machine.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
AllowChange = Annotated[
    bool, typer.Option("--allow-change", help="--resume also with other settings, where the effect can be told.")
]


# --- verbs ---


@_verb("Talk to a model; with --prompt ask one question.")
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
    loading = {"adapter": _named_adapters(adapter), "dtype": dtype, "device": device}
    loading |= {"quantize": quantize, "family": family}
    return run(
        ChatRequest(
            model=model or None,
            prompt=prompt,
            system=system,
            loading=loading | {"download": yes},
            sampling={name: value for name, value in sampling.items() if value is not None},
            json=json_,
            continued=continue_,
            plain=plain,
            verbose=verbose,
        )
    )


@_verb("Serve a model: the API of OpenAI clients, many requests at once.")
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
        log_prompts=log_prompts,
        store=None if store is None else Path(store),
    )
    adapters = _named_adapters(adapter)
    named = {Path(adapters).name: adapters} if isinstance(adapters, str) else adapters
    loading = {"adapter": named, "dtype": dtype, "device": device, "quantize": quantize, "family": family}
    engine = {"max_running": max_running, "max_waiting": max_waiting}
    launch(model, settings, name=name, loading=loading | {"download": yes}, engine=engine)


@_verb("Talk to models in the browser: chat, tools, code interpreter.")
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

    loading: dict[str, Any] = {"adapter": _named_adapters(adapter), "dtype": dtype, "device": device}
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


@_verb("See it all in three minutes, offline.")
def quickstart(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for curve and report.")] = "quickstart",
) -> int:
    """Runs the tour with the model that comes with the package."""
    from glmkit import quickstart as tour

    return tour.main(output=output) or 0


@_verb("Show what a model is and what memory it needs.")
def inspect(
    model: Annotated[str, typer.Argument(help="Folder, model name or hub id.", metavar="MODEL")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    context: Annotated[
        int | None, typer.Option("--context", help="Context in tokens for the memory estimate; 8192, or the model's.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Conversations at once, for the memory estimate.")] = 1,
    devices: Annotated[
        list[int] | None, typer.Option("--devices", help="Memory of each of so many devices; repeatable.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="Show instead who sees whom in this text.")] = None,
    picture: Annotated[str | None, typer.Option("--picture", metavar="FILE", help="Draw that as a PNG.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="GLM, a text without [MASK]: other spans are cut out.")] = 0,
    json_: Json = False,
) -> int:
    """Prints a description of a checkpoint, family or exported model, or shows masks and positions for a text."""
    if text is not None or picture is not None:
        return _show_text(model, text, picture, seed, json_)
    from glmkit.runtime.exported import FORMATS
    from glmkit.runtime.exported import describe as describe_exported

    if (exported := describe_exported(model)) is not None:
        if tensors or devices or context is not None or batch != 1:
            raise UsageError(
                f"{model} is an exported model ({FORMATS[exported['exported']]}): nothing can be chosen for it",
                hint="leave out --tensors, --context, --batch and --devices",
            )
        print(json.dumps(exported, ensure_ascii=False, indent=2) if json_ else _described_export(exported))
        return 0
    from glmkit.inspection import inspect as describe

    given = [] if context is None else [("--context", context)]
    for name, value in (*given, ("--batch", batch), *(("--devices", one) for one in devices or ())):
        if value < 1:
            raise UsageError(f"{name} {value}: expected 1 or more")
    found = describe(model, context_tokens=context, batch=batch, devices=devices or None)
    if not tensors:
        del found["tensors"]
    print(json.dumps(found, ensure_ascii=False, indent=2) if json_ else describe_model(found))
    return 0


@_verb("Write a checkpoint in another form: layout, dtype, shards, one file; merged, quantised.")
def convert(
    source: Annotated[str, typer.Argument(help="Folder, model name or hub id; or a file of weights.", metavar="SRC")],
    target: Annotated[str, typer.Argument(help="Folder, or file, to make.", metavar="DST")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="official: safetensors; native: transformers' glm; shards: mp_rank files; file: one .pth, .bin or"
            " .safetensors; mindformers: one .ckpt or .npz; merged: with --adapter; int8, int4.",
        ),
    ],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; else each its own.")
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option("--shard-size", metavar="SIZE", help="Most tensor data in one file: 2GB, 500MB. 5GB.")
    ] = None,
    like: Annotated[
        str | None, typer.Option("--like", metavar="DIR", help="A file's config.json and tokenizer are those of DIR.")
    ] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", "-a", help="merged: folder of the adapter.")] = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="merged: write a quantised base in 16 bit.")] = False,
    degree: Annotated[int | None, typer.Option("--degree", help="shards: number of tensor-parallel ranks.")] = None,
    bits: Annotated[int | None, typer.Option("--bits", help="shards: 8 or 4, quantise each rank's linears.")] = None,
    heads: Annotated[
        int | None, typer.Option("--heads", help="official: attention heads, where shards do not say it.")
    ] = None,
    family: FamilyName = None,
    keep_code: Annotated[
        bool, typer.Option("--keep-code", help="Carry the source's python files, unchanged and never run.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
    json_: Json = False,
) -> int:
    """Converts; the result appears only when it is complete, opened again and compared."""
    from glmkit.export import convert as run
    from glmkit.export.numbers import to_bytes

    size = None if shard_size is None else to_bytes(shard_size)
    made = run(source, target, to, dtype=dtype, shard_bytes=size, like=like, adapter=adapter, dequantize=dequantize,
               degree=degree, bits=bits, heads=heads, family=family, keep_code=keep_code,
               overwrite=overwrite)  # fmt: skip
    _show_made(made, json_)
    if not json_:
        print(target)
    return 0


@_verb("Write a model for another runtime: OpenVINO, ONNX or GGUF, in float, int8 or int4.")
def export(
    source: Annotated[str, typer.Argument(help="Folder, model name or hub id.", metavar="SRC")],
    target: Annotated[str, typer.Argument(help="Folder, for gguf a file, to make.", metavar="DST")],
    to: Annotated[str, typer.Option("--to", help="openvino, onnx or gguf.")],
    weights: Annotated[
        str | None, typer.Option("--weights", help="int8 or int4; gguf: f16, q8_0 or q4_0. Else as they are.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", help="Folder of an adapter: LoRA is merged, a prefix carried.")
    ] = None,
    family: FamilyName = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", "--force", help="Replace DST if it exists.")] = False,
    yes: Yes = False,
    json_: Json = False,
) -> int:
    """Exports; the result appears only when it was opened again by the runtime that it is for."""
    import importlib

    from glmkit.location import locate

    if to not in _RUNTIMES:
        raise UsageError(f"--to {to}", hint=", ".join(_RUNTIMES))
    run = importlib.import_module(f"glmkit.export.{to}").export
    locate(source, download=yes)
    made = run(source, target, weights=weights, adapter=adapter, family=family, overwrite=overwrite)
    _show_made(made, json_)
    if json_:
        return 0
    logits = "" if made.difference is None else f", logits differ by {made.difference:.2g} of their size"
    print(f"{made.path}: {in_units(made.bytes)}{logits}")
    if to != "gguf":
        print(f"next: glm run {made.path}")
    return 0


@_verb("Answer from an exported folder, without torch; with --prompt one question.")
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
) -> int:
    """Runs what was exported; needs numpy, tokenizers, and onnxruntime or openvino."""
    from glmkit.runtime.terminal import run as answer

    return answer(
        folder,
        prompt,
        system=system,
        threads=threads,
        stop=tuple(stop or ()),
        max_new_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )


@_verb("Tune a model as a recipe says.", cls=_RecipeVerb)
def finetune(
    recipe: Annotated[str, typer.Argument(help="YAML file, or the name of a recipe of this package.")] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it, such as train.learning_rate=1e-4.", metavar="[KEY=VALUE]..."),
    ] = None,
    set_: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    allow_change: AllowChange = False,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe, print it whole, and leave.")] = False,
    preview: Annotated[
        int, typer.Option("--preview", min=0, metavar="N", help="Show the first N records as the model sees them.")
    ] = 0,
    schema: Schema = False,
    yes: Yes = False,
) -> int:
    """Trains, or shows what would be trained."""
    from glmkit.train.arguments import Recipe

    if schema:
        return _show_schema(Recipe)
    checked = _read_recipe(recipe, overrides, set_, Recipe)
    if dry_run:
        return _show_recipe(checked)
    if checked.model.path is not None:
        from glmkit.location import locate

        locate(checked.model.path, download=yes)
    if preview:
        return _show_preview(checked, preview)
    from glmkit.train.run import finetune as train

    return _end_of_training(train(checked, resume=resume, allow_change=allow_change, force=force))


@_verb("Train a new GLM on texts, by blank infilling.", cls=_RecipeVerb)
def pretrain(
    recipe: Annotated[str, typer.Argument(help="YAML file, or the name of a recipe of this package.")] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it, such as corpus.files=[texts/*.jsonl].", metavar="[KEY=VALUE]..."),
    ] = None,
    set_: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    allow_change: AllowChange = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe, print it whole, and leave.")] = False,
    schema: Schema = False,
    yes: Yes = False,
) -> int:
    """Pre-trains, or shows what would be trained."""
    from glmkit.train.arguments import PretrainRecipe

    if schema:
        return _show_schema(PretrainRecipe)
    checked = _read_recipe(recipe, overrides, set_, PretrainRecipe)
    if dry_run:
        return _show_recipe(checked)
    named = checked.model.tokenizer or checked.model.path
    if named is not None:
        from glmkit.location import locate

        locate(named, download=yes)
    from glmkit.train.pretrain import pretrain as train

    return _end_of_training(train(checked, resume=resume, allow_change=allow_change).training)


@_verb("Measure a model on a task, or as a recipe says.", cls=_RecipeVerb)
def evaluate(
    task: Annotated[
        str,
        typer.Argument(
            help="adgen, tools, ceval, cmmlu, mmlu, gsm8k, perplexity, lambada or cloze; a task file of GLM-130B's "
            "form; a recipe, as a YAML file or by its name; or compare, with result folders.",
            metavar="TASK|RECIPE|compare",
        ),
    ] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it, such as data.file=dev.json; folders to compare.", metavar="[KEY=VALUE]..."),
    ] = None,
    set_: Set = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder, model name or hub id; a task alone asks glm-nano.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="What the task reads, a file or folder: docs/evaluation.md.")
    ] = None,
    adapter: Adapter = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first records or questions.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Answers written together.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Longest answer in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 always takes the likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="1 is off.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampled answers repeatable.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for predictions and results.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1, npu, ...")] = None,
    quantize: Quantize = None,
    family: FamilyName = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe, print it whole, and leave.")] = False,
    schema: Schema = False,
    json_: Json = False,
    yes: Yes = False,
) -> int:
    """Evaluates and prints the results; the flags and a recipe are two ways to say the same."""
    if task == "compare":
        from glmkit.evaluate.comparison import compare

        return _show_comparison(compare, [*(overrides or ())], output)
    from glmkit.evaluate.catalogue import TASKS, is_task, is_task_file
    from glmkit.train.arguments import EvaluationRecipe, one_line

    if schema:
        return _show_schema(EvaluationRecipe)
    flags = {
        "model.path": model, "model.adapter": adapter, "model.dtype": dtype, "model.device": device,
        "model.quantize": quantize, "model.family": family, "data.file": data, "data.max_samples": limit,
        "evaluate.per_device_eval_batch_size": batch_size, "evaluate.max_target_length": max_tokens,
        "evaluate.temperature": temperature, "evaluate.top_p": top_p, "evaluate.seed": seed,
        "evaluate.output_dir": output,
    }  # fmt: skip
    changes = [*(set_ or ()), *(f"{key}={one_line(value)}" for key, value in flags.items() if value is not None)]
    if is_task(task):
        if data is None and not overrides and not set_ and not is_task_file(task):
            hint = f"glm evaluate {task} --data PATH --model MODEL"
            raise UsageError(f"--data is missing: {TASKS[task].data}", hint=hint)
        changes = ["model.path=glm-nano", f"evaluate.task={task}", *(overrides or ()), *changes]
        checked = _read_recipe("", changes, None, EvaluationRecipe)
    else:
        _check_task(task)
        checked = _read_recipe(task, overrides, changes, EvaluationRecipe)
    if dry_run:
        return _show_recipe(checked)
    return _show_evaluation(checked, json_, yes)


def _show_evaluation(recipe: Any, as_json: bool, download: bool) -> int:
    from glmkit.train.evaluation import evaluate as run

    found = run(recipe, download=download)
    if os.environ.get("RANK", "0") != "0":  # of several processes one prints
        return 0
    if as_json:
        described = {**dataclasses.asdict(found.measured), "output": str(found.output_dir)}
        print(json.dumps(described | {"results": found.results}, ensure_ascii=False, indent=2))
        return 0
    figures = [(name, *_shown_figure(one)) for name, one in found.measured.figures.items()]
    print(table([*figures, *((name, _shown_note(value), "") for name, value in found.measured.notes.items())]))
    pace = f"{found.measured.items_per_second:.3g} a second"
    print(f"{found.measured.items} items in {found.measured.seconds:.1f} s, {pace}", file=sys.stderr)
    if found.shortened:
        limit = recipe.data.max_source_length or "what preset=paper has"
        print(f"prompts shortened to data.max_source_length={limit}: {found.shortened}", file=sys.stderr)
    print(f"predictions and results in {found.output_dir}", file=sys.stderr)
    return 0


def _shown_figure(figure: Any) -> tuple[str, str]:
    """A figure and its interval of 95 %, for a table."""
    if figure.value is None:
        return "-", "nothing counted"
    return f"{figure.value:.4g}", f"{figure.low:.4g} to {figure.high:.4g} (95 %)"


def _shown_note(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _show_comparison(compare: Any, folders: list[str], output: str | None) -> int:
    print(compare(folders, output))
    return 0


@_verb("Answer every row of a file, in batches.")
def predict(
    input_: Annotated[str, typer.Option("--input", "-i", help="Questions: JSON Lines, a JSON array, CSV or Parquet.")],
    output: Annotated[str, typer.Option("--output", "-o", help="File of JSON Lines for rows and answers.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Folder, model name or hub id.")] = "glm-nano",
    adapter: Adapter = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first rows.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Answers written together.")] = 32,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Longest answer; 512.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 always takes the likeliest.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0, max=1, help="1 is off.")] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Makes sampled answers repeatable.")] = None,
    format_: Annotated[str, typer.Option("--format", help="What a row looks like; auto looks at it.")] = "auto",
    prompt_column: Annotated[
        str | None, typer.Option("--prompt-column", help="Field with the question, of rows that have named columns.")
    ] = None,
    history_column: Annotated[
        str | None, typer.Option("--history-column", help="Field with earlier [question, answer] pairs.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, or a device such as cpu.")] = "auto",
    quantize: Quantize = None,
    family: FamilyName = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    json_: Json = False,
    yes: Yes = False,
) -> int:
    """Answers a file; the same call goes on where one was cut."""
    from glmkit.evaluate.predict import predict as answer
    from glmkit.evaluate.tasks import Settings
    from glmkit.train.arguments import ModelBlock
    from glmkit.train.evaluation import load_shared
    from glmkit.train.progress import Progress

    columns = {"prompt": prompt_column, "history": history_column}
    how = Settings(
        batch_size, max_tokens, temperature, top_p, seed, limit, format=format_,
        columns={key: name for key, name in columns.items() if name is not None},
    )  # fmt: skip
    block = ModelBlock(path=model, adapter=adapter, dtype=dtype, device=device, quantize=quantize, family=family)
    loaded, ranks = load_shared(block, download=yes)
    with Progress("answering", 0, enabled=ranks.rank == 0) as bar:
        found = answer(
            loaded, input_, output, how, ranks=ranks, overwrite=overwrite,
            progress=lambda done, total: bar.update(done, total=total),
        )  # fmt: skip
    if ranks.rank:  # of several processes one prints
        return 0
    if json_:
        print(json.dumps({"schema": 1, "output": output, **dataclasses.asdict(found)}, ensure_ascii=False, indent=2))
        return 0
    pace = f"{found.answered / found.seconds:.3g} a second" if found.answered and found.seconds else "nothing was left"
    print(f"{found.rows} rows in {output}; {found.answered} answered in {found.seconds:.1f} s, {pace}")
    if found.problems:
        print(f"{found.problems} rows are longer than the model's context: `problem` says so", file=sys.stderr)
    return 0


@_verb("Print versions, also of what it stands on.")
def version(json_: Json = False) -> int:
    """Prints versions without importing anything heavy."""
    import platform
    from importlib import metadata

    from glmkit import __version__

    versions = {"glmkit": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "safetensors", "peft"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    print(json.dumps({"schema": 1} | versions, indent=2) if json_ else table(list(versions.items())))
    return 0


@_verb("Say what this machine computes with, and what would make it faster.")
def doctor(json_: Json = False) -> int:
    """Looks at the machine; the first time it also compiles the native kernels."""
    import logging

    from glmkit.doctor import describe, diagnose

    told, logger = logging.StreamHandler(), logging.getLogger("glmkit")
    before = logger.level
    logger.addHandler(told)
    logger.setLevel(logging.INFO)  # compiling takes a while, and says so
    try:
        found = diagnose()
    finally:
        logger.removeHandler(told)
        logger.setLevel(before)
    print(json.dumps(found, ensure_ascii=False, indent=2) if json_ else describe(found))
    return 0


# --- what verbs print and check ---


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lays out rows in columns, the first to the left, the others to the right.

    Args:
        rows: All of the same length.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )


def describe_model(found: dict[str, Any]) -> str:
    """Turns what `glmkit.inspection.inspect` found into lines to read.

    Args:
        found: Its result, with or without the tensors.
    """
    config = found["config"]
    names = ("num_layers", "hidden_size", "num_attention_heads", "multi_query_group_num", "padded_vocab_size",
             "vocab_size")  # fmt: skip
    kind = f"generation {found['generation']}" if found["generation"] else f"the network of {found['network']}"
    lines = [
        f"{found['name']}: {found['family'] or 'no known family'}, {kind}",
        f"  source      {found['source']}",
        f"  licence     {found['licence'] or 'unknown'}",
        f"  parameters  {found['parameters']:,} in {', '.join(found['dtypes'])}",
        f"  stored      {in_units(found['stored_bytes'])}",
        *([f"  quantised   {_described_format(found['quantised'])}"] if found["quantised"] else []),
        "  sizes       " + ", ".join(f"{name} {config[name]}" for name in names if name in config),
        "",
        f"memory for {found['context_tokens']:,} tokens x {found['batch']}:",
    ]
    lines.append(_memory_table(found["memory_bytes"]))
    for number, costs in found.get("memory_per_device_bytes", {}).items():
        lines += ["", f"memory of each of {number} devices, tensor-parallel:", _memory_table(costs)]
    if "tensors" in found:
        listed = [(one["name"], " x ".join(map(str, one["shape"])), one["dtype"]) for one in found["tensors"]]
        lines += ["", table([("tensor", "shape", "dtype"), *listed])]
    return "\n".join(lines)


def _described_export(found: dict[str, Any]) -> str:
    from glmkit.runtime.exported import FORMATS

    context = f"{found['context_tokens']:,} tokens" if found["context_tokens"] else "unknown"
    weights = ", ".join(f"{kind} {in_units(size)}" for kind, size in found["weights_bytes"].items())
    return "\n".join(
        [
            f"{found['name']}: exported to {FORMATS[found['exported']]}, {found['family'] or 'no known family'}",
            f"  source      {found['source']}",
            f"  stored      {in_units(found['stored_bytes'])}",
            f"  weights     {weights}",
            f"  context     {context}",
            "  use         " + "\n              ".join(found["uses"]),
        ]
    )


def _described_format(found: dict[str, Any]) -> str:
    one_for = f"{found['group_size']} columns" if found.get("group_size") else "row"
    output = f"; output layer {found['output_layer']}" if found.get("output_layer") else ""
    return f"{found['scheme']}: {found['bits']} bits, a scale for each {one_for}{output}"


def _memory_table(costs: dict[str, dict[str, int]]) -> str:
    rows: list[Sequence[str]] = [("", "weights", "KV cache", "total")]
    for label, cost in costs.items():
        rows.append((f"  {label}", *(in_units(cost[part]) for part in ("weights", "kv_cache", "total"))))
    return table(rows)


def in_units(size: int) -> str:
    """Writes a number of bytes for people.

    Args:
        size: Bytes.
    """
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def _show_text(model: str, text: str | None, picture: str | None, seed: int, json_: bool) -> int:
    """Draws a text, or prints what would be drawn."""
    if text is None:
        raise UsageError("--picture needs a text to draw", hint='add --text "What is the capital of France?"')
    from dataclasses import asdict

    from glmkit.picture import scene as scenes

    scene = scenes.describe(model, text, seed=seed)
    if picture is not None:
        from glmkit.picture.drawing import draw

        unwritten = draw(scene, picture)
        if unwritten:
            listed = " ".join(unwritten)
            print(f"no font on this machine can write {listed}; the picture has ids in their place", file=sys.stderr)
        print(f"written to {picture}", file=sys.stderr)
    if json_:
        print(json.dumps({"schema": 1} | asdict(scene), ensure_ascii=False, indent=2))
    elif picture is None:
        print(scenes.as_text(scene))
    return 0


def _read_recipe(recipe: str, overrides: list[str] | None, more: list[str] | None, kind: Any) -> Any:
    """Reads a recipe with its changes; without a recipe the changes must say everything."""
    from glmkit.train.arguments import load_recipe

    changes = [*(overrides or ()), *(more or ())]
    if "=" in recipe and not os.path.isfile(recipe):
        recipe, changes = "", [recipe, *changes]
    if recipe or not changes:
        _check_recipe_name(recipe, kind)
    return load_recipe(recipe or None, changes, kind)


def _show_recipe(recipe: Any) -> int:
    """Prints a checked recipe whole, as `--dry-run` asks, and where each value comes from."""
    from glmkit.train.arguments import as_resolved

    print(as_resolved(recipe), end="")
    return 0


def _show_schema(kind: Any) -> int:
    from glmkit.train.flags import schema

    print(json.dumps(schema(kind), ensure_ascii=False, indent=2))
    return 0


def _end_of_training(result: Any) -> int:
    """Says how a run ended: the folder with the result on standard output, all else beside it."""
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
        return 130 if result.interrupted else 0
    if result.interrupted:
        print(f"stopped after step {result.steps}; --resume goes on from there", file=sys.stderr)
        return 130
    validation = "" if result.eval_loss is None else f", validation loss {result.eval_loss:.4f}"
    print(
        f"{result.steps} steps in {result.seconds:.0f} s, loss {result.loss:.4f}{validation}; "
        f"report in {result.output_dir}",
        file=sys.stderr,
    )
    print(result.result_dir)
    return 0


def _show_made(made: Any, as_json: bool) -> None:
    """Notes on what was written, to stderr, and all that is known of it as JSON, if that was asked for."""
    from dataclasses import asdict

    for note in made.notes:
        print(note, file=sys.stderr)
    if as_json:
        print(json.dumps({"schema": 1} | asdict(made), indent=2))


def _check_task(task: str) -> None:
    """Refuses a word that is neither a task nor a recipe of any kind; a recipe for another verb is refused later."""
    from glmkit.evaluate.catalogue import TASKS
    from glmkit.train.arguments import VERBS, EvaluationRecipe, recipe_names

    if not task:
        raise UsageError("missing argument 'TASK'", hint=f"{', '.join(TASKS)}, or a recipe: glm recipe list")
    if "=" in task or os.path.isfile(task) or any(task in recipe_names(kind) for kind in VERBS):
        return
    names = [*TASKS, *recipe_names(EvaluationRecipe)]
    close = difflib.get_close_matches(task, names, n=1, cutoff=0.4)
    hint = f"did you mean glm evaluate {close[0]}?" if close else f"tasks and recipes are {', '.join(names)}"
    raise UsageError(f"there is no task {task!r}, and no recipe of that name", hint=hint)


def _check_recipe_name(recipe: str, kind: Any) -> None:
    """Refuses a recipe that is neither a file nor in the package, with the name that was probably meant."""
    from glmkit.train.arguments import VERBS, recipe_names

    names = recipe_names(kind)
    for verb in (verb for other, verb in VERBS.items() if other is not kind and recipe in recipe_names(other)):
        raise UsageError(f"the recipe {recipe} is not for this verb", hint=f"glm {verb} {recipe}")
    if recipe in names or os.path.isfile(recipe):
        return
    if not recipe:
        raise UsageError("which recipe?", hint=f"a YAML file or one of: {', '.join(names)}")
    from difflib import get_close_matches

    close = get_close_matches(Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe, names, n=1)
    raise UsageError(
        f"there is no recipe {recipe!r}: neither a file nor a recipe of this package",
        hint=f"did you mean {close[0]}?" if close else f"recipes of this package: {', '.join(names)}",
    )


@_data.command("convert", cls=_Verb, help="Write a data file again as ChatGLM3 conversations, one per line.")
def data_convert(
    format: Annotated[str, typer.Argument(help="What its rows look like, as toolalpaca; auto looks at the first.")],
    source: Annotated[str, typer.Argument(help="JSON, JSON Lines, CSV or Parquet.")],
    target: Annotated[str, typer.Argument(help="The JSON Lines file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> int:
    """Converts, and says what was left out."""
    from glmkit.data.records import convert

    print(convert(format, source, target, overwrite=overwrite))
    return 0


@_data.command("prepare", cls=_Verb, help="Write the token ids of training data, so that no start makes them again.")
def data_prepare(
    recipe: Annotated[str, typer.Argument(help="Recipe whose data it is; or --model and --data.")] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it, such as data.max_length=200.", metavar="[KEY=VALUE]..."),
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write; data.train_file can be it.")] = "",
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model whose tokenizer it is for.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Data file.")] = None,
    skip_overlength: Annotated[
        bool, typer.Option("--skip-overlength", help="Leave out records that are too long instead of cutting them.")
    ] = False,
    shards: Annotated[int, typer.Option("--shards", min=1, help="Arrow files to write.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> int:
    """Prepares, and says how long the records are."""
    if not output:
        raise UsageError("--output is missing: the folder to write")
    changes = [f"output.dir={output}"]  # a recipe has one; nothing else is written into it
    changes += [f"model.path={model}"] if model is not None else []
    changes += [f"data.train_file={data}"] if data is not None else []
    changes += ["data.skip_overlength=true"] if skip_overlength else []
    from glmkit.train.arguments import Recipe
    from glmkit.train.data_files import prepare_data

    checked = _read_recipe(recipe, overrides, changes, Recipe)
    print(prepare_data(checked, output, shards=shards, overwrite=overwrite).page(checked.data.train_file))
    return 0


def _show_preview(recipe: Any, count: int) -> int:
    """Prints records as a model sees them, in colours where there is a terminal."""
    from glmkit.cli import paint
    from glmkit.train.data_files import preview_data

    coloured = paint("x", "1", sys.stdout) != "x"
    print(preview_data(recipe, count, paint=(lambda text, code: paint(text, code, sys.stdout)) if coloured else None))
    return 0


def _named_adapters(given: Sequence[str] | None) -> str | dict[str, str] | None:
    """What followed each `--adapter`, as `glmkit.load` takes it: one folder, or names and folders."""
    if not given:
        return None
    if len(given) == 1 and ("=" not in given[0] or os.path.isdir(given[0])):
        return given[0]
    named: dict[str, str] = {}
    for one in given:
        name, equals, folder = one.partition("=")
        if not equals or os.path.isdir(one):
            name, folder = Path(one).absolute().name, one
        if name in named:
            raise UsageError(f"two adapters are called {name!r}", hint=f"--adapter NAME={folder}")
        named[name] = folder
    return named


@_verb("Write a base and an adapter as one plain checkpoint.")
def merge(
    base: Annotated[str, typer.Argument(help="Folder, model name or hub id of the base.", metavar="BASE")],
    adapter: Annotated[str, typer.Argument(help="Folder of a LoRA or P-Tuning adapter.", metavar="ADAPTER")],
    target: Annotated[str, typer.Argument(help="Folder to make.", metavar="DST")],
    dtype: Annotated[str, typer.Option("--dtype", help="auto (as the base), float32, bfloat16 or float16.")] = "auto",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write a quantised base in 16 bit, which a LoRA needs.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare the result with base and adapter before it is kept.")
    ] = True,
    family: FamilyName = None,
    keep_code: Annotated[
        bool, typer.Option("--keep-code", help="Carry the base's python files, unchanged and never run.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
    json_: Json = False,
) -> int:
    """Merges; the result appears only when it is complete and checked."""
    from glmkit.export.merge import merge as run

    merged = run(base, adapter, target, dtype=dtype, dequantize=dequantize, check=check, family=family,
                 keep_code=keep_code, overwrite=overwrite)  # fmt: skip
    _show_made(merged, json_)
    if not json_:
        print(target)
    return 0


@_verb("Write a checkpoint with int8 or int4 weights, in a folder that loads in a fraction of the memory.")
def quantize(
    source: Annotated[str, typer.Argument(help="Folder, model name or hub id.", metavar="SRC")],
    target: Annotated[str, typer.Argument(help="Folder to make.", metavar="DST")],
    scheme: Annotated[str, typer.Option("--scheme", "-s", help="int8, or the smaller int4.")],
    output_layer: Annotated[str, typer.Option("--output-layer", help="keep its numbers, or int8.")] = "keep",
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="int4: a text by which weights are chosen (GPTQ). Slower.")
    ] = None,
    family: FamilyName = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", "--force", help="Replace DST if it exists.")] = False,
    yes: Yes = False,
    json_: Json = False,
) -> int:
    """Quantises; the result appears only when it is complete and read again."""
    from glmkit.export.quantized import quantize as run
    from glmkit.location import locate

    def show(done: int, of: int) -> None:
        print(f"\r{done} of {of} layers", end="\n" if done == of else "", file=sys.stderr, flush=True)

    locate(source, download=yes)
    made = run(source, target, scheme, output_layer=None if output_layer == "keep" else output_layer,
               calibration=calibration, family=family, overwrite=overwrite,
               progress=show if sys.stderr.isatty() else None)  # fmt: skip
    _show_made(made, json_)
    if json_:
        return 0
    sizes = f"{in_units(made.bytes_before)} -> {in_units(made.bytes_after)}"
    logits = f", logits of a test prompt by {made.logits_error:.1%}"
    print(f"{target}: {sizes}, {made.layers} layers in {made.scheme}, {made.seconds:.0f} s")
    kept = "" if calibration is None else " (GPTQ keeps what layers compute, not the weights)"
    print(f"weights differ by {made.weight_error:.1%} of their size{kept}{logits}")
    print(f"next: glm chat {target}")
    return 0


@_cluster.command("rank-table", cls=_Verb, help="Write the rank table (RANK_TABLE_FILE) of this machine.")
def cluster_rank_table(
    devices: Annotated[str, typer.Argument(help="First device, and the one behind the last.", metavar="[0,8)")],
    server_ip: Annotated[
        str | None, typer.Option("--server-ip", "--server_ip", help="Address of this machine.")
    ] = None,
    device_ip: Annotated[
        list[str] | None,
        typer.Option("--device-ip", help="Once for each device; by default as /etc/hccn.conf says."),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="File or folder; by default here.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> int:
    """Makes a table and prints where it is."""
    from glmkit.cluster import make_table, write_table

    table = make_table(devices, server_ip=server_ip, device_ips=device_ip)
    print(write_table(table, output, overwrite=overwrite))
    return 0


@_cluster.command("merge", cls=_Verb, help="Write one rank table of several machines; all of them use it.")
def cluster_merge(
    tables: Annotated[list[str], typer.Argument(help="The machines' tables, in the order of their ranks.")],
    output: Annotated[str | None, typer.Option("--output", "-o", help="File or folder; by default here.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> int:
    """Merges tables and prints where the result is."""
    from glmkit.cluster import merge_tables, read_table, write_table

    print(write_table(merge_tables([read_table(path) for path in tables]), output, overwrite=overwrite))
    return 0


@_cluster.command("check", cls=_Verb, help="Say whether a rank table is whole.")
def cluster_check(table: Annotated[str, typer.Argument(help="The file.")]) -> int:
    """Checks a table and says what it has."""
    from glmkit.cluster import read_table

    servers = read_table(table)["server_list"]
    devices = sum(len(server["device"]) for server in servers)
    print(f"{table}: {len(servers)} servers, {devices} devices, ranks 0 to {devices - 1}")
    return 0


@_recipes.command("list", cls=_Verb, help="List the recipes of the package, with what they need.")
def recipe_list(
    long: Annotated[bool, typer.Option("--long", "-l", help="Hardware, memory and time of each too.")] = False,
    json_: Json = False,
) -> int:
    """Lists recipes."""
    from glmkit.train.packaged import head_of, packaged_names, recipe_text

    names = packaged_names()
    heads = {name: head_of(recipe_text(name)) for name in names}
    if json_:
        listed = [{"name": name, "title": head.title} | head.facts for name, head in heads.items()]
        print(json.dumps({"schema": 1, "recipes": listed}, ensure_ascii=False, indent=2))
        return 0
    width = max(map(len, names))
    for name, head in heads.items():
        print(f"{name.ljust(width)}  {head.title or 'configuration for distributed.deepspeed'}")
        if long:
            for fact in ("hardware", "memory", "time"):
                if fact in head.facts:
                    print(f"{' ' * width}    {fact}: {head.facts[fact]}")
    return 0


Packaged = Annotated[str, typer.Argument(help="Name of a recipe of the package, see glm recipe list.", metavar="NAME")]


@_recipes.command("show", cls=_Verb, help="Print a recipe of the package.")
def recipe_show(name: Packaged) -> int:
    """Prints the file as it is."""
    from glmkit.train.packaged import recipe_text

    print(recipe_text(name), end="")
    return 0


@_recipes.command("copy", cls=_Verb, help="Copy a recipe of the package, to be changed.")
def recipe_copy(
    name: Packaged,
    target: Annotated[
        str | None, typer.Argument(help="File or folder; the current folder by default.", metavar="[DST]")
    ] = None,
) -> int:
    """Copies the file; an existing one is kept."""
    from glmkit.train.packaged import copy_recipe

    print(copy_recipe(name, target))
    return 0


@_recipes.command("explain", cls=_Verb, help="Explain a setting: meaning, default, limits, other names, who sets it.")
def recipe_explain(
    key: Annotated[str, typer.Argument(help="Such as learning_rate or data.packing.", metavar="KEY")],
) -> int:
    """Explains a setting in some lines."""
    from glmkit.train.packaged import explain

    print(explain(key))
    return 0


@_verb("Look at a run of tuning or pre-training from a second terminal.")
def watch(
    folder: Annotated[str, typer.Argument(help="The run's output folder.", metavar="RUN")],
    once: Annotated[bool, typer.Option("--once", help="Print once and leave.")] = False,
) -> int:
    """Prints the whole curve and the time left until the run ends."""
    from glmkit.train.watch import watch as look

    look(folder, once=once)
    return 0


@_checkpoints.command(
    "transform", cls=_Verb, help="Merge a checkpoint in parts, or of DeepSpeed, into a model; or divide it anew."
)
def checkpoint_transform(
    source: Annotated[str, typer.Argument(help="A run's step-N, or a folder that DeepSpeed wrote.", metavar="SRC")],
    target: Annotated[str, typer.Argument(help="Folder to write.", metavar="DST")],
    ranks: Annotated[int | None, typer.Option(help="Write a checkpoint in so many parts, not a model.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder with config and tokenizer, if SRC has none.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> int:
    """Writes weights of several processes as one folder."""
    from glmkit.train.transform import transform

    done = transform(source, target, ranks=ranks, model=model, overwrite=overwrite)
    print(f"{done.target}: {done.source}, {done.tensors} tensors, {done.parameters:,} numbers")
    return 0


@_verb("Say what memory and disk a recipe or a model needs, before anything is loaded.")
def plan(
    name: Annotated[str, typer.Argument(help="A recipe (file or name), or a model (folder or name).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it.", metavar="[KEY=VALUE]...")] = None,
    memory: Annotated[str | None, typer.Option("--memory", help="Of one device, as 24GB; else what is free.")] = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="Processes that share a recipe's work.")] = 1,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens of a model's context.")] = 2048,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows at a time, of a model.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Do not refuse what does not fit.")] = False,
    json_: Json = False,
) -> int:
    """Prints the plan; a recipe that does not fit is an error that names the nearest settings that do."""
    from glmkit.devices import free_bytes
    from glmkit.train.arguments import Recipe, load_recipe, recipe_names
    from glmkit.train.fitting import as_json, check_fits, memory_bytes, model_plans
    from glmkit.train.plan import place_of, plan_training

    if name not in recipe_names(Recipe) and not name.endswith((".yaml", ".yml")):
        plans = model_plans(name, tokens=context, rows=batch)
        if json_:
            print(json.dumps({"schema": 1, "plans": {key: as_json(one) for key, one in plans.items()}}, indent=2))
        else:
            print(table([(key, f"{one.peak / 1e9:.1f} GB") for key, one in plans.items()]))
        return 0
    recipe = load_recipe(name, overrides or ())
    planned = plan_training(recipe, world=devices)
    free = memory_bytes(memory) if memory else free_bytes(place_of(recipe.model))
    if json_:
        print(json.dumps({"schema": 1, "free_bytes": free, **as_json(planned)}, ensure_ascii=False, indent=2))
    else:
        print(planned if free is None else f"{planned}\n  {'free':<22}{free / 1e9:9.2f} GB")
    if not force:
        check_fits(planned, free, recipe, world=devices)
    return 0


@_verb("Measure speed and memory of models at their real shapes, with random weights.")
def bench(
    presets: Annotated[
        list[str] | None,
        typer.Argument(help="chatglm3-6b (if none is named), glm-nano ...: measured by turns.", metavar="[MODEL]..."),
    ] = None,
    checkpoint: Annotated[str | None, typer.Option("--checkpoint", help="A folder instead of random weights.")] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="A slice of so many blocks; all by default.")] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme", help="int4 by default; or bf16, float32, int8, official-int8, -int4; several with commas."
        ),
    ] = None,
    output_layer: Annotated[str, typer.Option("--output-layer", help="keep, or int8.")] = "keep",
    batch: Annotated[str, typer.Option("--batch", help="Rows of decoding.")] = "1",
    context: Annotated[str, typer.Option("--context", help="Tokens in the cache while decoding; '' for none.")] = "512",
    prompt: Annotated[str, typer.Option("--prompt", help="Tokens of prompts to read; '' for none.")] = "512",
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of one repetition of decoding.")] = 16,
    repeats: Annotated[int, typer.Option("--repeats", help="Repetitions that no other process disturbed.")] = 3,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="The official way in bf16, official-int8 or -int4; or transformers' generate."),
    ] = None,
    json_: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Add the records to a file, a line each.")
    ] = None,
) -> int:
    """Measures; the table goes to standard output, what happens to standard error."""
    from glmkit.bench.run import Request
    from glmkit.bench.run import bench as run

    def numbers(flag: str, text: str) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in text.split(",") if part.strip())
        except ValueError:
            raise UsageError(f"{flag} {text}: expected whole numbers with commas, such as 1,4,16") from None

    if checkpoint is not None and presets:
        raise UsageError("--checkpoint and a model name: expected one of them")
    run(
        Request(
            presets=tuple(presets or ("chatglm3-6b",)),
            checkpoint=None if checkpoint is None else Path(checkpoint),
            layers=layers,
            schemes=tuple(part.strip() for part in (scheme or "").split(",") if part.strip()),
            output_layer=output_layer,
            batch=numbers("--batch", batch),
            context=numbers("--context", context),
            prompt=numbers("--prompt", prompt),
            tokens=tokens,
            repeats=repeats,
            baseline=baseline,
            json=None if json_ is None else Path(json_),
            command="glm " + " ".join(sys.argv[1:]),
        )
    )
    return 0
