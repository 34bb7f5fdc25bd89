# Sourced by the scripts that train, from the checkout: sets up, fetches, and leaves the command in "${launch[@]}".
set -euo pipefail
bash exps/setup.sh
PATH="${ACCESSORY_VENV:-$PWD/.venv}/bin:$PATH"
python -m accessory fetch
launch=(python -m accessory)
if [ "${NPROC:-1}" -gt 1 ]; then launch=(torchrun --standalone --nproc-per-node "$NPROC" -m accessory); fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}  # seconds to save in after a SIGTERM
