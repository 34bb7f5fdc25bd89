#!/usr/bin/env bash
# Train the nano model from the published SmolLM2-135M and EfficientNet-Lite0: stage 1 aligns tower and projector with
# words, stage 2 trains everything jointly. Both stages resume where they were stopped.
#   bash exps/nano_sphinx.sh [a.b=value ...]     overrides go to stage 2
# Several processes: NPROC=2 bash exps/nano_sphinx.sh
set -euo pipefail
cd "$(dirname "$0")/.."
bash exps/setup.sh
PATH="${ACCESSORY_VENV:-$PWD/.venv}/bin:$PATH"
python -m accessory fetch
launch=(python -m accessory)
if [ "${NPROC:-1}" -gt 1 ]; then launch=(torchrun --nproc-per-node "$NPROC" -m accessory); fi
[ -d runs/nano_align/final ] || "${launch[@]}" train exps/nano_align.yaml --resume auto
"${launch[@]}" train exps/nano_sphinx.yaml --resume auto "$@"
python -m accessory evaluate --model runs/nano_sphinx/final --controls none shuffled blind --retrieval
