"""Every error a user can cause: what was found, what was expected, and the cure.

The command prints them as `error: …` and `hint: …` without a traceback and leaves with `exit_code`.
"""

from __future__ import annotations

from collections.abc import Sequence

_WHOLE_FOLDER_HINT = "get these files again, or compare the folder with the official one; glm inspect FOLDER checks it"


class GlmkitError(Exception):
    """An error the user can cure.

    Args:
        message: What was found and what was expected, one or a few lines.
        hint: What to do about it, best a command to copy. None if the message says it all.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class UsageError(GlmkitError, ValueError):
    """An argument, flag or name that does not exist or does not fit."""

    exit_code = 2


class ContextLengthError(UsageError):
    """A prompt that leaves no room for an answer in the model's context."""


class ConfigError(GlmkitError, ValueError):
    """A config.json that asks for something this code does not compute."""


class CheckpointError(GlmkitError, ValueError):
    """A checkpoint folder that cannot be loaded as it is.

    Args:
        folder: The folder in question.
        problems: Everything wrong with it, one sentence each.
        hint: What to do; else to get the files again.
    """

    def __init__(self, folder: str, problems: Sequence[str], *, hint: str | None = None) -> None:
        self.folder = folder
        self.problems = list(problems)
        shown = self.problems[:20]
        more = [f"… and {len(self.problems) - 20} more"] if len(self.problems) > 20 else []
        text = "\n".join(f"  - {problem}" for problem in [*shown, *more])
        super().__init__(f"cannot load {folder}:\n{text}", hint=hint or _WHOLE_FOLDER_HINT)


class TokenizerError(GlmkitError, ValueError):
    """Text or a tokenizer file that the tokenizer cannot work with."""


class GenerationError(GlmkitError, RuntimeError):
    """Decoding that cannot go on, for instance logits that are not a number."""


class QueueFullError(GlmkitError, RuntimeError):
    """More requests than may wait; nothing of this one was kept."""


class DataError(GlmkitError, ValueError):
    """A data file or record that cannot be used; the message names file and line."""


class TrainingError(GlmkitError, RuntimeError):
    """A training run that cannot start or go on."""


class RunRefusedError(TrainingError):
    """The output folder is another run's, or this run was begun with other settings; what it holds stays as it is."""


class MissingDependencyError(GlmkitError, ImportError):
    """An optional package that is not installed.

    Args:
        package: The package that is missing.
        extra: The extra of glmkit that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs the package {package}, which is not installed",
            hint=f'pip install "glmkit[{extra}]"',
        )


class KernelsError(GlmkitError, RuntimeError):
    """Native code that cannot be built, trusted or loaded here."""


class OutputError(GlmkitError, RuntimeError):
    """A file or folder that cannot be written where it was asked for."""


class SandboxError(GlmkitError, RuntimeError):
    """Code of the model cannot be run here as safely as was asked for."""
