#!/usr/bin/env bash
# Train the nano model from the published SmolLM2-135M and EfficientNet-Lite0: stage 1 aligns tower and projector with
# words, stage 2 trains everything jointly. Both stages resume where they were stopped.
#   bash exps/nano_sphinx.sh [a.b=value ...]     overrides go to stage 2
# Several processes: NPROC=2 bash exps/nano_sphinx.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. exps/launch.sh

align=runs/nano_align/final
[ -d "$align" ] || "${launch[@]}" train exps/nano_align.yaml --resume auto
out=runs/nano_sphinx
for word in "$@"; do case $word in train.output_dir=*) out=${word#*=} ;; esac; done
"${launch[@]}" train exps/nano_sphinx.yaml --resume auto "$@"
python -m accessory evaluate --model "$out/final" --controls none shuffled blind --retrieval
