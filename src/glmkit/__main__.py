"""`python -m glmkit` is the command `glm`."""

from glmkit.cli import main

main()
