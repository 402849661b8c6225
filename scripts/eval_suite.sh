#!/usr/bin/env bash
# Evaluates one or more models side by side:  scripts/eval_suite.sh DIR [DIR ...] [key=value ...]
# DIR: a run, a checkpoint, or a Hugging Face causal language model; all are measured on one text. Keys are those of `python -m evals.run` (suite=quick text=FILE ...).
# Status 1: no item of any model could be measured; 0: some were, and the report says which were not; 2: a mistake in what was asked for.
source "$(dirname "$0")/common.sh"
case "${1-}" in -h | --help | help) sed -n '2,4p' "scripts/eval_suite.sh" | cut -c3-; exit 0 ;; esac
[ $# -gt 0 ] || { sed -n '2,4p' "scripts/eval_suite.sh" | cut -c3-; exit 2; }
models=() keys=()
for argument in "$@"; do case "$argument" in [a-z_]*=*) keys+=("$argument") ;; *) models+=("$argument") ;; esac; done
[ ${#models[@]} -gt 0 ] || { echo "error: say which folders to evaluate." >&2; exit 2; }
case " ${keys[*]-} " in *" suite="*) ;; *) keys+=("suite=all") ;; esac
if [ -z "${NO_SETUP:-}" ]; then # NO_SETUP=1: use the Python that is on the path
  setup_venv eval
  case " ${keys[*]} " in *" suite=all "* | *" suite=harness "*)
    python -c 'import lm_eval, accelerate' 2>/dev/null || python -m pip install -q -e '.[harness]' || echo "lm-evaluation-harness could not be installed; its items will say so." >&2 ;;
  esac
fi
python -m evals.run "checkpoint=$(IFS=,; echo "${models[*]}")" "${keys[@]}"
