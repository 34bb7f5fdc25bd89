#!/usr/bin/env bash
# Make or refresh .venv at the repository root: `bash exps/setup.sh` for use, `bash exps/setup.sh dev` for tests too.
# Quick when nothing changed. PYTHON names another interpreter, ACCESSORY_VENV another folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
kind=${1:-main}
venv=${ACCESSORY_VENV:-$root/.venv}

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" && echo "$PYTHON" && return
        echo "error: PYTHON=$PYTHON is not a Python of version 3.11 or newer" >&2
        return 1
    fi
    for name in python3 python3.13 python3.12 python3.11 python; do
        usable "$name" && echo "$name" && return
    done
    echo "error: Python 3.11 or newer is needed, found $(python3 --version 2>&1 || true)." >&2
    echo "       Install one, or name it: PYTHON=/path/to/python3.11 bash $0" >&2
    return 1
}

case $kind in
    main) files=(requirements.txt) ;;
    dev) files=(requirements.txt requirements-dev.txt) ;;
    *) echo "usage: bash exps/setup.sh [main|dev]" >&2; exit 2 ;;
esac

# One checksum over the files of both kinds, so that the stamps of both can be compared with it.
wanted=$(cat pyproject.toml requirements.txt requirements-dev.txt | cksum | cut -d' ' -f1)-$root
# What serves the tests serves the user too, so a dev set-up need not be repeated for main.
for stamp in "$venv/.ready-$kind" "$venv/.ready-dev"; do
    if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
done

python=$(find_python)
# Two installations into one folder spoil each other. The lock is on a file that is there anyway, and ends with us.
if command -v flock >/dev/null; then
    exec 9<pyproject.toml
    flock -n 9 || { echo "error: another set-up is running in $root; wait for it, then try again" >&2; exit 1; }
fi
if ! usable "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
        echo "error: $venv is there and is no virtual environment, so it is not replaced; remove it, or name another" >&2
        echo "       folder: ACCESSORY_VENV=/path/to/venv bash $0" >&2
        exit 1
    fi
    echo "setting up $venv with $("$python" --version)"
    rm -rf "$venv"
    if ! "$python" -m venv "$venv"; then
        echo "error: $python cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2
        exit 1
    fi
fi
arguments=(-e .)
[ "$kind" = dev ] && arguments+=(-r requirements-dev.txt)
# Not compiling spares half a minute: most of what comes along is never imported.
echo "installing ${files[*]} (some gigabytes; 1 to 4 minutes the first time)"
"$venv/bin/python" -m pip install -qq --no-compile --disable-pip-version-check "${arguments[@]}"
echo "$wanted" >"$venv/.ready-$kind"
