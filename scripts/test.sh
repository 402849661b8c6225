#!/usr/bin/env bash
# The whole CPU test suite, linters and types included. Arguments go to pytest: scripts/test.sh tests/data -k order; WORKERS=0: one process
#   scripts/test.sh --changed [REV]     only the tests near to what differs from REV (HEAD), by imports, within two minutes on two cores
#   RECORD_DURATIONS=1 scripts/test.sh  on an idle machine: also writes tests/durations.json, by which slow files start first
source "$(dirname "$(realpath "$0")")/common.sh" || exit
setup_venv dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" WANDB_MODE="${WANDB_MODE:-disabled}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
unset PYTHONDONTWRITEBYTECODE  # else each program that a test starts compiles the project anew
ruff check .
ruff format --check .
mypy
if [ "${1:-}" = --changed ]; then
  shift
  chosen="$(python -m scripts.check.changed "$@")"
  [ -n "$chosen" ] || { echo "no test imports what was changed"; exit; }
  set -- $chosen
fi
python -m pytest -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
