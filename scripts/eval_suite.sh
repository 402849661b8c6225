#!/usr/bin/env bash
# Evaluates one or more models side by side:  scripts/eval_suite.sh DIR [DIR ...] [key=value ...]
# DIR: a run, a checkpoint, or a Hugging Face causal language model; all are measured on one text. Keys are those of `python -m evals.run` (suite=quick text=FILE ...).
# Status 1: no item of any model could be measured; 0: some were, and the report says which were not; 2: a mistake in what was asked for.
source "$(dirname "$(realpath "$0")")/common.sh" || exit
[ $# -gt 0 ] || { usage >&2; exit 2; }
from_here() { # a path as it was written, by somebody who may stand in another folder; what is not there may be a folder of the project
  if [ "$here" != "$PWD" ] && [ -n "$1" ] && [ "${1#/}" = "$1" ] && { [ -e "$here/$1" ] || [ "${2-}" = new ]; }; then echo "$here/$1"; else echo "$1"; fi
}
models=() keys=()
for argument in "$@"; do
  if [ -e "$here/$argument" ] || [ -e "$argument" ] || ! [[ "$argument" =~ ^[a-z_]+= ]]; then models+=("$(from_here "$argument")"); continue; fi
  case "$argument" in
    out=*) keys+=("out=$(from_here "${argument#*=}" new)") ;;
    text=* | data=* | checkpoint=*) keys+=("${argument%%=*}=$(from_here "${argument#*=}")") ;;
    *) keys+=("$argument") ;;
  esac
done
[ ${#models[@]} -gt 0 ] || { echo "error: say which folders to evaluate." >&2; exit 2; }
case " ${keys[*]-} " in *" suite="*) ;; *) keys+=("suite=all") ;; esac
if [ -z "${NO_SETUP:-}" ]; then # NO_SETUP=1: use the Python that is on the path
  setup_venv eval
  case " ${keys[*]} " in *" suite=all "* | *" suite=harness "*)
    python -c 'import lm_eval, accelerate' 2>/dev/null || python -m pip install -q -e '.[harness]' || echo "lm-evaluation-harness could not be installed; its items will say so." >&2 ;;
  esac
fi
python -m evals.run "checkpoint=$(IFS=,; echo "${models[*]}")" "${keys[@]}"
