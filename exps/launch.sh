# Sourced by the scripts that train, from the checkout: sets up, fetches (not with ASSETS=0), and leaves the command in
# "${launch[@]}". Variables, the same for every script and with every YAML:
#   NPROC=8       processes on this machine; `all`: one a GPU, and a single one where there is none
#   NNODES=4      machines. The same command starts on each of them, in any order, with the same
#   MASTER_ADDR   one of them, by a name that all can reach, and where they are not free
#   MASTER_PORT   (29500) and RDZV_ID (accessory). What is written goes to a folder that all of them share.
#   RESTARTS=3    times that all begin again at the newest checkpoint when a process of theirs has died
# shellcheck shell=bash disable=SC2034
set -euo pipefail
bash exps/setup.sh
PATH="${ACCESSORY_VENV:-$PWD/.venv}/bin:$PATH"
[ "${ASSETS:-1}" = 0 ] || python -m accessory fetch
[ "${NPROC:-1}" != all ] || NPROC=$(python -c 'import torch; print(torch.cuda.device_count() or 1)')
launch=(python -m accessory)
if [ "${NNODES:-1}" -gt 1 ] || [ "${NPROC:-1}" -gt 1 ]; then
    meeting=(--standalone)
    if [ "${NNODES:-1}" -gt 1 ]; then
        where=${MASTER_ADDR:?NNODES is $NNODES: MASTER_ADDR names the machine where they meet}:${MASTER_PORT:-29500}
        meeting=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$where" --rdzv-id "${RDZV_ID:-accessory}")
    fi
    launch=(torchrun "${meeting[@]}" --nproc-per-node "${NPROC:-1}" --max-restarts "${RESTARTS:-0}" -m accessory)
    share=$(($(nproc) / ${NPROC:-1}))  # of the processors; torchrun would leave each process one
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}
fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}  # seconds to save in after a SIGTERM
# Each start meets in a store of its own: in one that is shared the addresses of processes that died are still there.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
