#!/usr/bin/env bash
# From a bare clone to a model that sees: install, fetch, score, fine-tune for two minutes, report, chat page.
#   bash exps/quickstart.sh [--no-demo] [--port N] [--again]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case " $* " in
    *" --help "* | *" -h "*) sed -n '2,3s/^# *//p' exps/quickstart.sh; exit 0 ;;
esac
bash exps/setup.sh
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 GRADIO_ANALYTICS_ENABLED=False
exec "${ACCESSORY_VENV:-$PWD/.venv}/bin/python" tools/quickstart.py "$@"
