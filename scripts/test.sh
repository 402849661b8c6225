#!/usr/bin/env bash
# The whole CPU test suite, linters and types included. Arguments go to pytest: scripts/test.sh tests/data -k order
source "$(dirname "$0")/common.sh"
setup_venv dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" WANDB_MODE="${WANDB_MODE:-disabled}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
ruff check .
mypy
python -m pytest "$@"
