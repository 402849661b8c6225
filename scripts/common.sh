# Sourced by the other scripts: makes .venv with what the project needs, once, and goes to the project's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"

setup_venv() { # $1: extras, as in pip install .[extras]
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed; set PYTHON=/path/to/python." >&2; exit 2; }
  [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
  local stamp="$VENV/.installed-$1"
  if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    echo "installing into $VENV (some minutes, once)"
    "$VENV/bin/python" -m pip install -q --upgrade pip 2>/dev/null || true
    # Without a GPU the CPU build of torch is enough; this release has one on the package index, newer ones bring CUDA along.
    if ! command -v nvidia-smi >/dev/null 2>&1 && ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
      "$VENV/bin/python" -m pip install -q 'torch==2.13.0' 2>&1 | grep -v '^WARNING' || true
    fi
    "$VENV/bin/python" -m pip install -q -e ".[$1]" 2>&1 | { grep -v '^WARNING' || true; }
    "$VENV/bin/python" -c 'import torch, deepspeed, hydra, transformers' >/dev/null || { echo "error: the installation is not complete; see pip's message above." >&2; exit 1; }
    touch "$stamp"
  fi
  export PATH="$PWD/$VENV/bin:$PATH" TOKENIZERS_PARALLELISM=true
}
