#!/usr/bin/env bash
# Train the dream bridge of the nano model, after exps/nano_dit.sh. Resumes where it was stopped.
#   bash exps/nano_dream.sh [a.b=value ...]     train.max_seconds=3600 train.schedule_by=time fits it into an hour
# Several processes: NPROC=2 bash exps/nano_dream.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. exps/launch.sh
"${launch[@]}" train exps/nano_dream.yaml --resume auto "$@"
