#!/usr/bin/env bash
# The whole CPU test suite, linters and types included. Arguments go to pytest: scripts/test.sh tests/data -k order; WORKERS=0: one process
source "$(dirname "$0")/common.sh"
setup_venv dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" WANDB_MODE="${WANDB_MODE:-disabled}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
ruff check .
mypy
python -m pytest -n "${WORKERS:-2}" --dist worksteal "$@"
