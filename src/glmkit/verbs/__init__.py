"""The verbs of the command `glm`, a module for each kind.

Each verb imports its work when it is called, so that help stays fast.
"""

from __future__ import annotations

from typing import Any

import typer

from glmkit.verbs import evaluating, logs, machine, models, recipes, storage, talking, tuning
from glmkit.verbs.app import app

__all__ = ["command", "evaluating", "logs", "machine", "models", "recipes", "storage", "talking", "tuning"]


def command() -> Any:
    """Builds the parser of the whole command."""
    return typer.main.get_command(app)
