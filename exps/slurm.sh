#!/usr/bin/env bash
# Train experiments on a SLURM cluster, one after the other, on all GPUs of every node; submit it from the checkout:
#   sbatch --nodes 4 --time 12:00:00 exps/slurm.sh exps/sphinx/sphinx_stage1.yaml [...] [a.b=value ...]
# What stands below is said otherwise on that line too (--partition, --account, ...). Before the time is over, or at a
# preemption, SLURM tells this shell (with PreemptParameters=send_user_signal, else the steps alone, and it requeues the
# job itself): every rank saves, and the job goes back into the queue, to continue where it was. It ends when the
# experiments do, or with the code of the one that failed.
#SBATCH --job-name=accessory
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit it: sbatch exps/slurm.sh EXPERIMENT.yaml ...}"
[ -f exps/train.sh ] || { echo "error: $PWD is not the checkout; submit exps/slurm.sh from there" >&2; exit 2; }
bash exps/setup.sh  # once: every node finds it done
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} RDZV_ID=$SLURM_JOB_ID
export NNODES=$SLURM_JOB_NUM_NODES NPROC=${NPROC:-all}
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take it over itself

experiments=() overrides=()
for word in "$@"; do
    case $word in *=*) overrides+=("$word") ;; *.yaml | *.yml) experiments+=("$word") ;; *) overrides+=("$word") ;; esac
done
[ "${#experiments[@]}" -gt 0 ] || { echo "usage: sbatch exps/slurm.sh EXPERIMENT.yaml ... [a.b=value ...]" >&2; exit 2; }

again() {
    echo "stopped in $1: the job is queued again (so far: ${SLURM_RESTART_COUNT:-0} times)"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "error: job $SLURM_JOB_ID cannot be queued again; submit it once more to continue" >&2
    exit 143
}

# scancel with a signal tells the steps and not this shell. srun itself would end the step at once.
stopped=
trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID" || true' TERM
for experiment in "${experiments[@]}"; do
    [ -z "$stopped" ] || again "$experiment"
    srun --kill-on-bad-exit=1 bash exps/train.sh "$experiment" ${overrides[@]+"${overrides[@]}"} &
    step=$! code=0
    wait "$step" || code=$?
    while kill -0 "$step" 2>/dev/null; do  # the trap has ended the wait, not the step
        code=0
        wait "$step" || code=$?
    done
    [ -z "$stopped" ] || again "$experiment"
    [ "$code" = 0 ] || { echo "error: $experiment ended with $code" >&2; exit "$code"; }
done
