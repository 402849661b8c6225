#!/usr/bin/env bash
# Writes a checkpoint as a verified Hugging Face folder:  scripts/export_hub.sh CHECKPOINT OUT [--shard-size 5GB] [--dtype fp32|bf16] [--push org/name]
source "$(dirname "$(realpath "$0")")/common.sh" || exit
[ $# -ge 2 ] || { usage >&2; exit 2; }
if [ -z "${NO_SETUP:-}" ]; then setup_venv eval; fi # NO_SETUP=1: use the Python that is on the path
root="$PWD"
cd "$here" # the folders are those of whoever calls, from wherever
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 python -m scripts.export "$@"
