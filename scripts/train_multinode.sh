#!/usr/bin/env bash
# train.py on several machines. HOSTFILE: a line "name slots=GPUS" for each machine (this one first).
#   scripts/train_multinode.sh HOSTFILE experiment=NAME run_dir=/shared/run ...        the deepspeed launcher reaches the others by ssh (needs pdsh)
#   NODE_RANK=0 MASTER_ADDR=10.0.0.1 scripts/train_multinode.sh HOSTFILE ...           no ssh: run it on every machine, with its NODE_RANK
#   LAUNCHER=torchrun NODE_RANK=0 MASTER_ADDR=10.0.0.1 scripts/train_multinode.sh HOSTFILE ...      the same by torchrun
# MASTER_PORT (29500); RESTARTS=N restarts a failed job from its last checkpoint up to N times; PYTHON (python). Paths of settings count
# from the project's folder, as that is where every machine has it. See docs/many_machines.md.
set -euo pipefail
script="$(realpath "$0")"
usage() { sed -n '2,/^[^#]/{/^#/!q; s/^# \{0,1\}//; p}' "$script"; } # not that of common.sh, which would make an environment
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
[ $# -ge 2 ] || { usage >&2; exit 2; }
[ -f "$1" ] && [ -r "$1" ] || { echo "error: there is no host file $1; write one with a line 'name slots=GPUS' for each machine." >&2; exit 2; }
hostfile="$(realpath "$1")"
shift
python="${PYTHON:-python}"
command -v "$python" >/dev/null || { echo "error: there is no program $python; activate the environment, or set PYTHON to its Python." >&2; exit 2; }
[ "${python#*/}" = "$python" ] || python="$(realpath -s "$python")"
cd "$(dirname "$script")/.."
port="${MASTER_PORT:-29500}"
lines="$(tr -d '\r\000' <"$hostfile" | sed -E 's/#.*//; s/^[[:space:]]+//; s/[[:space:]]+$//' | grep -av '^$' || true)"
if LC_ALL=C grep -aq '[^[:space:]!-~]' <<<"$lines"; then # a byte-order mark would be taken for a part of the first name
  echo "error: the lines of $hostfile hold a byte-order mark or letters beyond ASCII; save it as plain ASCII text." >&2; exit 2
fi
[ -n "$lines" ] || { echo "error: $hostfile names no machine; write a line 'name slots=GPUS' for each." >&2; exit 2; }
while read -r line; do # what MPI's host files may hold besides, max_slots=, is passed over
  [[ "$line" =~ ^[^[:space:]=:]+([[:space:]]+[a-z_-]+=[0-9]+)*$ && " $line" =~ [[:space:]]slots=[1-9] ]] || {
    echo "error: $hostfile says '$line'; write 'name slots=GPUS', for instance 'node-a slots=8'." >&2; exit 2; }
done <<<"$lines"
double="$(awk '{print $1}' <<<"$lines" | sort | uniq -d | head -n 1)"
[ -z "$double" ] || { echo "error: $hostfile names $double twice; write one line a machine." >&2; exit 2; }
nodes="$(wc -l <<<"$lines")"
[ "$nodes" -gt 1 ] || { NODE_RANK="${NODE_RANK:-0}"; MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"; } # a machine alone needs no ssh
[[ "$port" =~ ^[0-9]{1,5}$ && "10#$port" -le 65535 ]] || { echo "error: MASTER_PORT is '$port'; it must be a port, a whole number up to 65535." >&2; exit 2; }
if [ -n "${NODE_RANK:-}" ]; then
  [ -n "${MASTER_ADDR:-}" ] || { echo "error: NODE_RANK needs MASTER_ADDR, the address of the first machine." >&2; exit 2; }
  [[ "$NODE_RANK" =~ ^[0-9]{1,6}$ ]] || { echo "error: NODE_RANK is '$NODE_RANK'; it must be the number of this machine, from 0." >&2; exit 2; }
  NODE_RANK=$((10#$NODE_RANK)) # 08 is no octal number
  [ "$NODE_RANK" -lt "$nodes" ] || { echo "error: NODE_RANK is $NODE_RANK, but $hostfile names $nodes machine(s), counted from 0." >&2; exit 2; }
fi
case "${LAUNCHER:-deepspeed}" in
  deepspeed)
    if grep -qvE '^[^[:space:]]+[[:space:]]+slots=' <<<"$lines"; then
      echo "error: the deepspeed launcher reads 'name slots=GPUS' in this order; change $hostfile or set LAUNCHER=torchrun." >&2; exit 2
    fi
    if [ -z "${NODE_RANK:-}" ]; then # what the launcher would say in a traceback
      first="${lines%%[[:space:]]*}" otherwise="or start on each machine with its NODE_RANK and MASTER_ADDR."
      command -v pdsh >/dev/null || { echo "error: the deepspeed launcher reaches other machines by pdsh, which is not installed; install it, $otherwise" >&2; exit 2; }
      reason="$(ssh -o BatchMode=yes "$first" hostname 2>&1 </dev/null)" || {
        echo "error: ssh does not reach $first without a password (${reason##*$'\n'}); give it a key, $otherwise" >&2; exit 2; }
    fi
    command=("$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --master_port "$port" --no_local_rank)
    [ -z "${NODE_RANK:-}" ] || command+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
    ;;
  torchrun)
    [ -n "${NODE_RANK:-}" ] || { echo "error: LAUNCHER=torchrun runs on every machine; set NODE_RANK and MASTER_ADDR." >&2; exit 2; }
    slots="$(sed -nE "$((NODE_RANK + 1))s/.*[[:space:]]slots=([0-9]+).*/\1/p" <<<"$lines")"
    if [ "$NODE_RANK" = 0 ] && (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "error: port $port of this machine is in use, by another job perhaps; set MASTER_PORT to a free one." >&2; exit 2
    fi
    command=("$python" -m torch.distributed.run --nnodes "$nodes" --node_rank "$NODE_RANK" --nproc_per_node "$slots"
      --master_addr "$MASTER_ADDR" --master_port "$port")
    ;;
  *) echo "error: LAUNCHER is $LAUNCHER; choose deepspeed or torchrun." >&2; exit 2 ;;
esac
[ -z "${RESTARTS:-}" ] || command=("$python" -m training.supervisor "restarts=$RESTARTS" "timeout=${TIMEOUT:-1800}" -- "${command[@]}")
exec "${command[@]}" train.py "$@"
