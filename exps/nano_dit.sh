#!/usr/bin/env bash
# Train the nano generator: pictures of 64 x 64 from "STYLE emoji of LABEL". Resumes where it was stopped.
#   bash exps/nano_dit.sh [a.b=value ...]     train.max_seconds=3600 train.schedule_by=time fits it into an hour
# Half the size, to hand on: python -m accessory convert runs/nano_dit/final weights/nano-dit --dtype float16
# Several processes: NPROC=2 bash exps/nano_dit.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. exps/launch.sh
exec "${launch[@]}" train exps/nano_dit.yaml --resume auto "$@"
