#!/bin/sh
# The tests. Sets up .venv on the first run. Arguments go to pytest; `./test.sh -m ""` includes the slow ones.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
. "$here/scripts/environment.sh"
prepare train evaluate dev
cd "$here"
# A worker for each core, each with one thread; a file's tests stay together, because they share what they build.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$venv/bin/python" -m pytest -n auto --dist loadfile "$@"
