#!/usr/bin/env bash
# Train the dream bridge of the nano model, after exps/nano_dit.sh, in two stages. Resumes where it was stopped.
#   bash exps/nano_dream.sh words [a.b=value ...]     what is said before a picture, into runs/nano_words
#   bash exps/nano_dream.sh [a.b=value ...]           and the bridge: init=runs/nano_words/final
# train.max_seconds=3600 train.schedule_by=time fits a stage into an hour.
# Half the size, to hand on, on the generator as it was handed on:
#   python -m accessory convert runs/nano_dream/final weights/nano-dream --dtype float16 --base weights/nano-dit
# Several processes: NPROC=2 bash exps/nano_dream.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. exps/launch.sh
if [ "${1:-}" = words ]; then
  shift
  set -- train.output_dir=runs/nano_words data.sources=data_configs/nano_words.yaml \
    'generator.tuning=[conditioner.dream.net.*.delta.*, conditioner.dream.start, conditioner.dream.start_output]' \
    'objective.loss={language: 1.0, picture: 0.0}' objective.norms_every=0 objective.diffusion.drop.all=0 \
    train.lr=2.0e-3 train.warmup_steps=50 "$@"
fi
exec "${launch[@]}" train exps/nano_dream.yaml --resume auto "$@"
