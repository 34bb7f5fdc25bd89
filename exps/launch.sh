# Sourced by the scripts that train, from the checkout: sets up, fetches (not with ASSETS=0), and leaves the command in
# "${launch[@]}".
set -euo pipefail
bash exps/setup.sh
PATH="${ACCESSORY_VENV:-$PWD/.venv}/bin:$PATH"
[ "${ASSETS:-1}" = 0 ] || python -m accessory fetch
launch=(python -m accessory)
if [ "${NNODES:-1}" -gt 1 ]; then
    launch=(torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR"
        --master-port "${MASTER_PORT:-29500}" --nproc-per-node "${NPROC:-1}" -m accessory)
elif [ "${NPROC:-1}" -gt 1 ]; then
    launch=(torchrun --standalone --nproc-per-node "$NPROC" -m accessory)
fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}  # seconds to save in after a SIGTERM
