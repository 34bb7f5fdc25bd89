#!/usr/bin/env bash
# Set up and run the whole suite; arguments go to pytest: bash tests/run.sh -k tiling
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash exps/setup.sh dev
python=${ACCESSORY_VENV:-$PWD/.venv}/bin/python

# More threads than a test needs make it slower: tests are small, and two of them on two busy cores cost 20x.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

if ! "$python" -m accessory fetch --quiet >/dev/null; then
    echo "note: not all default assets could be fetched (see above); tests that need them are skipped and counted"
fi
exec "$python" -m pytest "$@"
