# Sourced by the other scripts: goes to the project's root and answers --help with the script's own first lines. The Python is that of the
# environment that is active (venv or conda); without one .venv is made, once, with what the project needs. VENV=DIR names another.
set -euo pipefail
script="$(realpath "$0")" here="$PWD"
usage() { sed -n '2,/^[^#]/{/^#/!q; s/^# \{0,1\}//; p}' "$script"; }
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."
PYTHON="${PYTHON:-python3}"
active="${VIRTUAL_ENV:-}"
[ -n "$active" ] || [ -z "${CONDA_PREFIX:-}" ] || [ "${CONDA_DEFAULT_ENV:-base}" = base ] || active="$CONDA_PREFIX"
if [ -z "${VENV:-}" ] && [ -n "$active" ] && [ "$(realpath -m "$active")" != "$(realpath -m .venv)" ]; then VENV="$active"; else active=""; fi
VENV="${VENV:-.venv}"

wanted() { # modules of the extras
  case "$1" in dev) echo pytest xdist ruff mypy matplotlib ;; eval) echo matplotlib ;; esac
}

pip_install() { # what pip says is shown where it fails; -I: a folder everywhen.egg-info of this clone is no installation
  "$VENV/bin/python" -I -m pip install -q "$@" >"$VENV/pip.log" 2>&1 || grep -v '^WARNING' "$VENV/pip.log" >&2 || true
}

setup_venv() { # $1: extras, as in pip install .[extras]; $2: those that an active environment has to have
  if [ -n "$active" ]; then # it belongs to a person, who says what is installed there
    export PATH="$VENV/bin:$PATH" TOKENIZERS_PARALLELISM=true
    local missing
    missing="$(python -c '
import importlib.util, sys
print(" ".join(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))' torch deepspeed hydra transformers datasets $(wanted "${2:-$1}"))"
    [ -z "$missing" ] || { echo "error: the active environment $VENV lacks $missing; run: pip install -e '.[$1]' (or deactivate it, and .venv is made)." >&2; exit 2; }
    return
  fi
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed; set PYTHON=/path/to/python." >&2; exit 2; }
  [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
  local extras="$1"
  [ ! -f "$VENV/.installed-dev" ] || extras=dev # which has all that the others have
  local stamp="$VENV/.installed-$extras"
  if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    echo "installing into $VENV (some minutes, once)"
    "$VENV/bin/python" -I -m pip install -q --upgrade pip >/dev/null 2>&1 || true
    # Without a GPU the CPU build of torch is enough; this release has one on the package index, newer ones bring CUDA along.
    if ! command -v nvidia-smi >/dev/null 2>&1 && ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
      pip_install 'torch==2.13.0'
    fi
    pip_install -e ".[$extras]"
    "$VENV/bin/python" -c 'import torch, deepspeed, hydra, transformers' >/dev/null || { echo "error: the installation is not complete; see pip's message above." >&2; exit 1; }
    touch "$stamp"
  fi
  export PATH="$(realpath -s "$VENV")/bin:$PATH" TOKENIZERS_PARALLELISM=true
}
