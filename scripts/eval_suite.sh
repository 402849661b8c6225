#!/usr/bin/env bash
# Evaluates one or more models side by side:  scripts/eval_suite.sh DIR [DIR ...] [key=value ...]
# DIR: a run, a checkpoint, or a Hugging Face causal language model. Keys are those of `python -m evals.run` (suite=quick out=runs/evals ...).
source "$(dirname "$0")/common.sh"
[ $# -gt 0 ] || { sed -n '2,3p' "$0" | cut -c3-; exit 2; }
if [ -z "${NO_SETUP:-}" ]; then setup_venv eval; fi # NO_SETUP=1: use the Python that is on the path
models=() keys=()
for argument in "$@"; do case "$argument" in [a-z_]*=*) keys+=("$argument") ;; *) models+=("$argument") ;; esac; done
[ ${#models[@]} -gt 0 ] || { echo "error: say which folders to evaluate." >&2; exit 2; }
case " ${keys[*]-} " in *" suite="*) ;; *) keys+=("suite=all") ;; esac
python -m evals.run "checkpoint=$(IFS=,; echo "${models[*]}")" "${keys[@]}"
