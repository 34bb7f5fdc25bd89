#!/usr/bin/env bash
# Train the dream bridge of the nano model, after exps/nano_dit.sh. Resumes where it was stopped.
#   bash exps/nano_dream.sh [a.b=value ...]     train.max_seconds=3600 train.schedule_by=time fits it into an hour
# Half the size, to hand on, on the generator as it was handed on:
#   python -m accessory convert runs/nano_dream/final weights/nano-dream --dtype float16 --base weights/nano-dit
# Several processes: NPROC=2 bash exps/nano_dream.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. exps/launch.sh
exec "${launch[@]}" train exps/nano_dream.yaml --resume auto "$@"
