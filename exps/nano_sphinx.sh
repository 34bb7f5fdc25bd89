#!/usr/bin/env bash
# Train the nano model from the published SmolLM2-135M and EfficientNet-Lite0: stage 1 aligns tower and projector with
# words, stage 2 trains everything jointly. Both stages resume where they were stopped.
#   bash exps/nano_sphinx.sh [a.b=value ...]     overrides go to stage 2
# Several processes: NPROC=2 bash exps/nano_sphinx.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. exps/launch.sh

# A stage that was told to stop has saved and ended well, but without the model that the next one needs.
finished() {
    if [ ! -d "$1" ]; then
        echo "error: $1 is not there: its stage was stopped; run this script again to continue it" >&2
        exit 1
    fi
}

align=runs/nano_align/final
[ -d "$align" ] || "${launch[@]}" train exps/nano_align.yaml --resume auto
finished "$align"
out=runs/nano_sphinx
for word in "$@"; do case $word in train.output_dir=*) out=${word#*=} ;; esac; done
"${launch[@]}" train exps/nano_sphinx.yaml --resume auto "$@"
finished "$out/final"
python -m accessory evaluate --model "$out/final" --controls none shuffled blind --retrieval
