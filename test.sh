#!/bin/sh
# The tests. Sets up .venv on the first run. Arguments go to pytest; `./test.sh -m ""` includes the slow ones.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
. "$here/scripts/environment.sh"
prepare train evaluate dev
cd "$here"
exec "$venv/bin/python" -m pytest "$@"
