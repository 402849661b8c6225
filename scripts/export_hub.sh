#!/usr/bin/env bash
# Writes a checkpoint as a verified Hugging Face folder:  scripts/export_hub.sh CHECKPOINT OUT [--shard-size 5GB] [--dtype fp32|bf16] [--push org/name]
source "$(dirname "$0")/common.sh"
[ $# -ge 2 ] || { sed -n '2p' "$0" | cut -c3-; exit 2; }
if [ -z "${NO_SETUP:-}" ]; then setup_venv eval; fi # NO_SETUP=1: use the Python that is on the path
python -m scripts.export "$@"
