#!/usr/bin/env bash
# train.py on several machines. HOSTFILE: a line "name slots=GPUS" for each machine (this one first).
#   scripts/train_multinode.sh HOSTFILE experiment=NAME run_dir=/shared/run ...        the deepspeed launcher reaches the others by ssh (needs pdsh)
#   NODE_RANK=0 MASTER_ADDR=10.0.0.1 scripts/train_multinode.sh HOSTFILE ...           no ssh: run it on every machine, with its NODE_RANK
#   LAUNCHER=torchrun NODE_RANK=0 MASTER_ADDR=10.0.0.1 scripts/train_multinode.sh HOSTFILE ...      the same by torchrun
# MASTER_PORT (29500); RESTARTS=N restarts a failed job from its last checkpoint up to N times; PYTHON (python). See docs/many_machines.md.
set -euo pipefail
[ $# -ge 2 ] && [ -f "$1" ] || { sed -n '2,6p' "$0" | cut -c3- >&2; exit 2; }
hostfile="$(realpath "$1")"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python}" port="${MASTER_PORT:-29500}"
nodes="$(grep -cE '^[[:space:]]*[^#[:space:]]+' "$hostfile")"
if [ -n "${NODE_RANK:-}" ]; then
  [ -n "${MASTER_ADDR:-}" ] || { echo "error: NODE_RANK needs MASTER_ADDR, the address of the first machine." >&2; exit 2; }
  [ "$NODE_RANK" -lt "$nodes" ] || { echo "error: NODE_RANK is $NODE_RANK, but $hostfile names $nodes machine(s), counted from 0." >&2; exit 2; }
fi
case "${LAUNCHER:-deepspeed}" in
  deepspeed)
    command=("$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --master_port "$port" --no_local_rank)
    [ -z "${NODE_RANK:-}" ] || command+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
    ;;
  torchrun)
    [ -n "${NODE_RANK:-}" ] || { echo "error: LAUNCHER=torchrun runs on every machine; set NODE_RANK and MASTER_ADDR." >&2; exit 2; }
    slots="$(grep -E '^[[:space:]]*[^#[:space:]]+' "$hostfile" | sed -n "$((NODE_RANK + 1))s/.*slots=\([0-9]*\).*/\1/p")"
    command=("$python" -m torch.distributed.run --nnodes "$nodes" --node_rank "$NODE_RANK" --nproc_per_node "${slots:-1}"
      --master_addr "$MASTER_ADDR" --master_port "$port")
    ;;
  *) echo "error: LAUNCHER is $LAUNCHER; choose deepspeed or torchrun." >&2; exit 2 ;;
esac
[ -z "${RESTARTS:-}" ] || command=("$python" -m training.supervisor "restarts=$RESTARTS" "timeout=${TIMEOUT:-1800}" -- "${command[@]}")
exec "${command[@]}" train.py "$@"
