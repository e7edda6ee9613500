#!/bin/sh
# The main job on the model that comes with the package: chat, evaluate, tune, evaluate again. No GPU, no downloaded model.
# Sets up .venv on the first run. Arguments go to `glm quickstart` (see ./demo.sh --help).
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
. "$here/scripts/environment.sh"
prepare train evaluate
exec "$venv/bin/glm" quickstart "$@"
