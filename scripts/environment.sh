# Makes the virtual environment that demo.sh and test.sh share. Sourced, not run; POSIX sh.
#
# Before sourcing, `here` is the folder of the checkout. `prepare EXTRA...` then leaves `venv` set to an environment in
# which glmkit is installed (editable) with these extras. It installs only when pyproject.toml changed since the last
# time, keeps packages that are there already (a torch you chose yourself, for instance), and leaves to pip's own
# configuration where packages come from.
#
#   PYTHON        the interpreter to make the environment with (python3)
#   GLMKIT_VENV   the folder of the environment (.venv in the checkout)

fail() {
    printf 'error: %s\n' "$1" >&2
    printf 'hint: %s\n' "$2" >&2
    exit 1
}

check_python() {
    command -v "$python" >/dev/null 2>&1 ||
        fail "there is no command $python" "install Python 3.10 or later, or name one: PYTHON=/path/to/python3 $0"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$python" --version 2>&1) is too old, 3.10 or later is needed" \
            "name a later one: PYTHON=python3.12 $0"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python cannot make virtual environments: the module venv or ensurepip is missing" \
            "on Debian and Ubuntu: apt install python3-venv"
}

# Runs pip with a line that shows it is alive, and its whole output only if it fails.
install() {
    log="$venv/install.log"
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --editable "$1" >"$log" 2>&1 &
    pip=$!
    trap 'kill "$pip" 2>/dev/null; exit 130' INT TERM
    seconds=0
    while kill -0 "$pip" 2>/dev/null; do
        if [ -t 2 ]; then
            printf '\rInstalling into %s, the first time about 1 GB … %d s ' "$venv" "$seconds" >&2
        elif [ "$seconds" = 0 ]; then
            printf 'Installing into %s, the first time about 1 GB …\n' "$venv" >&2
        fi
        sleep 1
        seconds=$((seconds + 1))
    done
    [ ! -t 2 ] || printf '\n' >&2
    trap - INT TERM
    wait "$pip" || {
        tail -n 25 "$log" >&2
        fail "pip could not install glmkit (the whole log: $log)" \
            "check the network and pip's settings (pip config list), then run $0 again"
    }
}

prepare() {
    python=${PYTHON:-python3}
    venv=${GLMKIT_VENV:-$here/.venv}
    case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        [ ! -e "$venv" ] || [ -f "$venv/pyvenv.cfg" ] ||
            fail "$venv is there and is no virtual environment" "name another place: GLMKIT_VENV=FOLDER $0"
        check_python
        "$python" -m venv --clear "$venv" || fail "$python could not make $venv" "see the message above"
    fi
    stamp="$here $(cksum <"$here/pyproject.toml")"
    wanted= missing=
    for extra in "$@"; do
        wanted=$wanted${wanted:+,}$extra
        [ "$(cat "$venv/.glmkit-$extra" 2>/dev/null)" = "$stamp" ] || missing=yes
    done
    [ -z "$missing" ] || {
        install "${here}[$wanted]"
        for extra in "$@"; do
            printf '%s\n' "$stamp" >"$venv/.glmkit-$extra"
        done
    }
}
