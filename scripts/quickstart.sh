#!/usr/bin/env bash
# From a clone to a trained, evaluated, resumable hybrid language model. Extra arguments go to train.py, e.g. train.steps=50.
source "$(dirname "$(realpath "$0")")/common.sh" || exit
setup_venv dev core
started=$(date +%s)
data=runs/data/demo run=runs/quickstart

echo "== 1/4 corpus and tokenizer: the bundled public-domain books into token shards (one novel, Northanger Abbey, is held out)"
python -m data.prepare input=demo out=$data tokenizer=bpe:2048 valid_docs=[2]

echo "== 2/4 training the hybrid (parallel GRU, Mamba-2, attention) with DeepSpeed"
python train.py experiment=quickstart "$@"

echo "== 3/4 held-out perplexity by position"
python -m evals.run checkpoint=$run suite=perplexity length=1024 max_tokens=32768

echo "== 4/4 text from the checkpoint"
python -m scripts.generate checkpoint=$run prompt="It is a truth universally acknowledged, that" max_new_tokens=60 seed=1

cat <<EOT

Done in $(($(date +%s) - started)) s.
  $data                   token shards and tokenizer
  $run/config.yaml      everything this run was made of
  $run/metrics.jsonl    loss, gradient norm, speed of every step
  $run/samples.txt      text at intervals
  $run/checkpoints/     the same command again resumes from the newest
Go on:  python train.py experiment=quickstart train.steps=1000 name=longer        (activate first: source $VENV/bin/activate)
EOT
