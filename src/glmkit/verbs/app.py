"""The parser of the command: its classes, and the flags that several verbs share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from glmkit.cli import unknown_verb
from glmkit.errors import UsageError
from glmkit.verbs.help import in_readers_language

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


# What there is, as the help lists it.
SECTIONS = {
    "Talk": ("chat", "logs", "web", "serve", "run", "quickstart"),
    "Models": ("pull", "list", "where", "rm", "inspect", "convert", "quantize", "merge", "export"),
    "Train": ("finetune", "pretrain", "recipe", "plan", "watch", "data", "checkpoint"),
    "Measure": ("evaluate", "predict", "bench"),
    "This machine": ("doctor", "completion", "version", "cluster"),
}


class Verb(TyperCommand):
    """A verb; flags as other tools call them work too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {flag for parameter in self.params for flag in parameter.opts}
        return super().parse_args(ctx, [_canonical_flag(argument, own) for argument in args])

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, in_readers_language(formatter))


class RecipeVerb(Verb):
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


class Verbs(TyperGroup):
    """Verbs behind a word; one that does not exist is answered with the one that was probably meant."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)  # as they are written, not by the alphabet

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, in_readers_language(formatter))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            raise unknown_verb(args[0], known, ctx.command_path)
        return super().resolve_command(ctx, args)


class _AllVerbs(Verbs):
    """The command itself, whose help lists the verbs in sections."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for names in SECTIONS.values() for name in names if name in self.commands]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, self.commands))
        for section, names in SECTIONS.items():
            rows = [(name.ljust(width), self.commands[name].get_short_help_str(64)) for name in names]
            with formatter.section(section):
                formatter.write_dl(rows)


def _canonical_flag(argument: str, own: set[str]) -> str:
    flag, equals, value = argument.partition("=")
    meant = _FLAG_SYNONYMS.get(flag, flag)
    return meant + equals + value if flag not in own and meant in own else argument


app = typer.Typer(
    cls=_AllVerbs,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Load, chat with, tune and evaluate GLM models.",
)


def verb(summary: str, cls: type[TyperCommand] = Verb) -> Callable[..., Any]:
    """Makes a function a verb of the command; `SECTIONS` says where the help lists it.

    Args:
        summary: One line for the help.
        cls: Its parser.
    """
    return app.command(cls=cls, help=summary, context_settings={"help_option_names": ["-h", "--help"]})


def group(name: str, summary: str) -> typer.Typer:
    """Makes a verb that has verbs of its own."""
    group = typer.Typer(
        cls=Verbs,
        rich_markup_mode=None,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        help=summary,
    )
    app.add_typer(group, name=name)
    return group


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    # Both are taken from the arguments before they are parsed; here they are for the help.
    pass


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


def named_adapters(given: Sequence[str] | None) -> str | dict[str, str] | None:
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
