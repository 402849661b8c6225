#!/usr/bin/env bash
# Every figure of docs/results that needs a GPU, part by part, the GPU tests first:
#   scripts/bench/all_gpu.sh OUT [tests solve mixer ssd delta dense sets large automata m2rnn step decode memory million study tasks] [sweep] [hosts zero]     # hosts, zero: several GPUs of one
# A part that fails, or takes more than PART_SECONDS (600), does not stop the next; its log is OUT/PART.log. The long ones go on where they were
# when the same command is given again. STUDY_DATA: shards for the study of state collapse (default: made from the bundled books).
set -uo pipefail
script="$(realpath "$0")"
case "${1:-}" in -h | --help) sed -n '2,5p' "$0" | cut -c3-; exit 0 ;; esac
[ $# -ge 1 ] || { sed -n '2,5p' "$0" | cut -c3- >&2; exit 2; }
mkdir -p "$1" || exit 2
out="$(cd "$1" && pwd)"; shift
cd "$(dirname "$script")/../.."
python="${PYTHON:-$([ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}" # an active environment comes first
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "error: $python sees no GPU; set PYTHON to one whose torch does." >&2; exit 2; }
seconds="${PART_SECONDS:-600}" budget=$(( ${PART_SECONDS:-600} * 19 / 20 )) failed=()
data="${STUDY_DATA:-$out/shards}"
shards() { [ -e "$data/meta.json" ] || "$python" -m data.prepare input=demo out="$data" tokenizer=bpe:4096 valid_fraction=0.05; }

part() {
  case "$1" in
    tests) "$python" -m pytest -q -m gpu tests ;;
    solve) "$python" -m scripts.bench.parallel_rnn --out "$out/parallel_rnn.json" --total "$budget" ;;
    sweep) "$python" -m scripts.bench.parallel_rnn --out "$out/sweep.json" --sweep ;;
    mixer) "$python" -m scripts.bench.mixer --out "$out/mixer.json" ;;
    ssd) "$python" -m scripts.bench.ssd --out "$out/ssd.json" ;;
    delta) "$python" -m scripts.bench.delta_rule --out "$out/delta_rule.json" --parts accuracy,kernels,split,peers,training ;;
    m2rnn) "$python" -m scripts.bench.m2rnn --out "$out/m2rnn.json" ;;
    dense) "$python" -m scripts.bench.dense_rnn --out "$out/dense_rnn.json" ;;
    sets) "$python" -m scripts.bench.dense_sets --out "$out/dense_sets.json" --train 60 --seconds "$budget" ;;
    flashrnn) "$python" -m scripts.bench.dense_peers --out "$out/flashrnn.json" ;;
    large) "$python" -m scripts.bench.large_rnn --out "$out/large_rnn.json" ;;
    automata) "$python" -m scripts.bench.automata --out "$out/automata.json" ;;
    step) "$python" -m scripts.bench.step out="$out/step.json" ;;
    decode) "$python" -m scripts.bench.decode out="$out/decode.json" seconds="$budget" ;;
    memory) shards && "$python" -m scripts.bench.memory out="$out/memory.json" data="$data" set=all budget="$budget" ;;
    million) "$python" -m scripts.bench.long_context out="$out/million.json" ;;
    study) shards && "$python" -m scripts.studies.collapse data="$data" out="$out/study" size=gpu seconds="$budget" ;;
    tasks) "$python" -m scripts.studies.tracking out="$out/tasks" minutes=$(( budget / 60 )) ;;
    hosts) "$python" -m scripts.bench.multi_gpu out="$out/multi_gpu" --seconds "$budget" ;;
    zero) "$python" -m scripts.bench.zero out="$out/zero.json" seconds="$budget" ;;
    *) echo "There is no part $1; the parts are in the first lines of scripts/bench/all_gpu.sh."; return 2 ;;
  esac
}

export -f part shards
export out python budget data
[ $# -ge 1 ] || set -- tests solve mixer ssd delta dense sets large automata m2rnn step decode memory million study tasks
for name in "$@"; do
  began=$SECONDS
  timeout --kill-after=20 "$seconds" bash -c 'part "$1"' part "$name" 2>&1 | tee -a "$out/$name.log"
  status=${PIPESTATUS[0]}
  echo "== $name: status $status, $(( SECONDS - began )) s"
  [ "$status" = 0 ] || failed+=("$name")
done
[ ${#failed[@]} = 0 ] || { echo "Not finished: ${failed[*]}. Give the same command with these parts again." >&2; exit 1; }
