"""Entry point of the command `glm`.

A module of its own beside the package: `import glmkit` registers the models with transformers, which imports torch
and takes seconds. The package sees that this module is loaded and leaves registration to the verbs that need it, so
`glm --help` stays fast.
"""


def main() -> None:
    from glmkit.cli import main as run

    run()
