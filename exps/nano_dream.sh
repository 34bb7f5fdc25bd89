#!/usr/bin/env bash
# Train the dream bridge of the nano model, after exps/nano_dit.sh. Resumes where it was stopped.
#   bash exps/nano_dream.sh [a.b=value ...]     train.max_seconds=3600 train.schedule_by=time fits it into an hour
# Several processes: NPROC=2 bash exps/nano_dream.sh
set -euo pipefail
cd "$(dirname "$0")/.."
bash exps/setup.sh
PATH="${ACCESSORY_VENV:-$PWD/.venv}/bin:$PATH"
python -m accessory fetch
launch=(python -m accessory)
if [ "${NPROC:-1}" -gt 1 ]; then launch=(torchrun --standalone --nproc-per-node "$NPROC" -m accessory); fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}  # seconds to save in after a SIGTERM
"${launch[@]}" train exps/nano_dream.yaml --resume auto "$@"
