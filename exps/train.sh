#!/usr/bin/env bash
# Train experiments, one after the other (the stages of a recipe, say). Each resumes where it was stopped.
#   bash exps/train.sh exps/sphinx/sphinx_stage1.yaml exps/sphinx/sphinx_stage2.yaml
#   bash exps/train.sh exps/text/alpaca_lora.yaml [a.b=value ...]     overrides go to every experiment that is named
# What one would be, without weights, data or a GPU: python -m accessory train exps/text/alpaca_lora.yaml --outline
# All GPUs of this machine: NPROC=all bash exps/train.sh ...; of several: NNODES=4 NPROC=all MASTER_ADDR=node0 on each
# (see exps/launch.sh); of a SLURM cluster: sbatch --nodes 4 exps/slurm.sh ...
# To stop several stages early, send SIGTERM to the process group: this shell alone would wait for the one that runs.
set -euo pipefail
cd "$(dirname "$0")/.."
ASSETS=0 . exps/launch.sh
experiments=() overrides=()
for word in "$@"; do
    case $word in *=*) overrides+=("$word") ;; *.yaml | *.yml) experiments+=("$word") ;; *) overrides+=("$word") ;; esac
done
[ "${#experiments[@]}" -gt 0 ] || { echo "usage: bash exps/train.sh EXPERIMENT.yaml ... [a.b=value ...]" >&2; exit 2; }
for experiment in "${experiments[@]}"; do  # all of them before the first begins
    [ -f "$experiment" ] || { echo "error: there is no experiment $experiment" >&2; exit 2; }
done
last=$((${#experiments[@]} - 1)) stopped=
trap 'stopped=1' TERM  # a stage that it reached as well saves and ends; the next one must not begin
for experiment in "${experiments[@]:0:last}"; do
    code=0
    "${launch[@]}" train "$experiment" --resume auto ${overrides[@]+"${overrides[@]}"} || code=$?
    [ -z "$stopped" ] || { echo "stopped; the same command goes on with $experiment" >&2; exit 143; }
    [ "$code" = 0 ] || exit "$code"
done
trap - TERM
# In place of this shell, so that a signal reaches it once: torchrun ends at a second one, saved or not.
exec "${launch[@]}" train "${experiments[last]}" --resume auto ${overrides[@]+"${overrides[@]}"}
