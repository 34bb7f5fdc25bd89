#!/usr/bin/env bash
# Train experiments, one after the other (the stages of a recipe, say). Each resumes where it was stopped.
#   bash exps/train.sh exps/sphinx/sphinx_stage1.yaml exps/sphinx/sphinx_stage2.yaml
#   bash exps/train.sh exps/text/alpaca_lora.yaml [a.b=value ...]     overrides go to every experiment that is named
# What one would be, without weights, data or a GPU: python -m accessory train exps/text/alpaca_lora.yaml --outline
# Several processes: NPROC=8 bash exps/train.sh ...; several machines: NNODES, NODE_RANK and MASTER_ADDR on each of them
set -euo pipefail
cd "$(dirname "$0")/.."
ASSETS=0 . exps/launch.sh
experiments=() overrides=()
for word in "$@"; do
    case $word in *.yaml) experiments+=("$word") ;; *) overrides+=("$word") ;; esac
done
[ "${#experiments[@]}" -gt 0 ] || { echo "usage: bash exps/train.sh EXPERIMENT.yaml ... [a.b=value ...]" >&2; exit 2; }
for experiment in "${experiments[@]}"; do
    "${launch[@]}" train "$experiment" --resume auto ${overrides[@]+"${overrides[@]}"}
done
