#!/usr/bin/env bash
# Types what people type: each line of the table at the end is a command, the status it must end with and a word of what it must say.
#   scripts/check/inputs.sh [PART-OF-A-COMMAND-OR-LABEL]        only the lines that hold it; exit status 1 where one does not do as it should
# Lines:  label | status | expected word (extended regular expression) | command       A command that ends in a Python traceback always fails.
# In commands: $T a folder of small things that is removed afterwards ($T/shards, $T/run a trained run, $T/one.txt one text), $TRAIN a tiny training run.
# The commands run two at a time (JOBS=N for another number), five minutes on two cores.
source "$(dirname "$(realpath "$0")")/../common.sh" || exit
setup_venv dev core
export OMP_NUM_THREADS=1 WANDB_MODE=disabled HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false only="${1:-}"
export T; T="$(mktemp -d)"
trap 'rm -rf "$T"' EXIT
export TRAIN="python train.py experiment=smoke train.device=cpu data.path=$T/shards logging.wandb=disabled"

python -c "import json, lzma; [open(f'$T/{n}.txt', 'w').write(json.loads(line)['text'][:60000]) for n, line in zip(('one', 'two', 'three'), lzma.open('data/demo/demo_corpus.jsonl.xz'))]"
python -m data.prepare input="$T/one.txt,$T/two.txt,$T/three.txt" out="$T/shards" tokenizer=bpe:512 valid_fraction=0.3 >/dev/null
$TRAIN run_dir="$T/run" train.steps=2 >/dev/null 2>"$T/error" || { cat "$T/error" >&2; exit 1; }
python - "$T" <<'END' # a run whose weights are NaN, as a checkpoint of it would be: with the right sizes and checksums
import glob, hashlib, json, shutil, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
shutil.copytree(sys.argv[1] + "/run", sys.argv[1] + "/nan")
weights = Path(glob.glob(sys.argv[1] + "/nan/checkpoints/*/model.safetensors")[0])
marker = weights.with_name("COMPLETE.json")
tensors, complete = load_file(weights), json.loads(marker.read_text())
tensors["norm.weight"].fill_(float("nan"))
save_file(tensors, weights)
complete["files"][weights.name] = {"bytes": weights.stat().st_size, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
marker.write_text(json.dumps(complete))
END
: >"$T/empty.txt"
mkdir -p "$T/configs/experiment" && printf '# @package _global_\na: [1\nb: 2\n' >"$T/configs/experiment/bad.yaml"
printf 'node-a slots=8 max_slots=16\n' >"$T/max_slots"; printf 'node-a:8\n' >"$T/colon"; : >"$T/empty"; printf 'node-a slots=1\nnode-a slots=1\n' >"$T/twice"
printf '#!/bin/sh\necho "would run: $*"\n' >"$T/python"; chmod +x "$T/python"

one() { # a line of the table, in the background
  local label status word command out
  IFS='|' read -r label status word command <<<"$1"
  label="$(xargs <<<"$label")" status="${status// /}" word="$(sed 's/^ *//; s/ *$//' <<<"$word")" command="${command# }"
  out="$(timeout 100 bash -c "$command" 2>&1 </dev/null)"
  local got=$? why=""
  [ "$got" = "$status" ] || why="status $got instead of $status"
  grep -qE -- "$word" <<<"$out" || why="${why:+$why, }does not say '$word'"
  ! grep -q '^Traceback' <<<"$out" || why="${why:+$why, }a traceback"
  [ -z "$why" ] || { printf 'WRONG  %s: %s\n       %s\n%s\n' "$label" "$why" "$command" "$(tail -n 4 <<<"$out" | sed 's/^/       > /')"; return 1; }
}
export -f one

lines="$(sed '1,/^exit # the table/d' "${BASH_SOURCE[0]}" | grep -v '^ *#' | grep '|' | { grep -F -- "$only" || true; })"
[ -n "$lines" ] || { echo "error: no line holds '$only'." >&2; exit 2; }
started=$SECONDS failed=0
tr '\n' '\0' <<<"$lines" | sed 's/\x0$//' | xargs -0 -P "${JOBS:-2}" -I{} bash -c 'one "$1"' one {} || failed=1
echo "$(wc -l <<<"$lines") inputs in $((SECONDS - started)) s: $([ "$failed" = 0 ] && echo "all as they should be" || echo "see above")"
exit "$failed"
exit # the table

# -- settings (1)
1 experiment in a folder | 2 | synthetic/parity | python train.py experiment=parity
1 name with a hash | 2 | name=.*run#1 | python train.py name=run#1
1 a name in any language | 0 | läuft-💡: .*parameters | python train.py dry_run=true name=läuft-💡
head that does not divide | 2 | is not divisible by head_size 12 | $TRAIN model=dense_lstm model.mixers.dense_lstm.head_size=12
1 too large a model | 0 | parameters | python train.py model=transformer size=7b dry_run=true
1 states of no dense heads | 2 | no mixer of this model has dense heads | python train.py dry_run=true model=transformer train.activation_checkpointing=states
1 states over ranks | 2 | use mixer | python train.py dry_run=true model=dense_lstm train.activation_checkpointing=states parallel.sequence=2
1 negative clip | 2 | train.grad_clip must be zero or more, not -1 | python train.py dry_run=true train.grad_clip=-1
1 clip not a number | 2 | train.grad_clip must be a finite number | python train.py dry_run=true train.grad_clip=nan
1 warm-up too long | 2 | schedule.warmup .*longer than the 300 steps | python train.py dry_run=true schedule.warmup=1000
1 negative eval.every | 2 | eval.every must be zero or more, not -1 | python train.py dry_run=true eval.every=-1
1 no eval tokens | 2 | eval.tokens must be above zero, not 0 | python train.py dry_run=true eval.tokens=0
1 infinite rate | 2 | optim.lr must be a finite number | python train.py dry_run=true optim.lr=inf
1 Muon under ZeRO-2 | 2 | set deepspeed.stage to 0 or 1, not 2 | python train.py dry_run=true optim=muon deepspeed=zero2
1 Muon without its rate | 2 | optim.muon_lr=0.02 | python train.py dry_run=true optim=muon optim.update_scale=spectral
1 rate beside its group | 2 | did you mean 'optim.lr' | python train.py lr=1e-3
1 rate in the wrong group | 2 | did you mean 'optim.lr' | python train.py train.lr=1e-3
1 steps beside their group | 2 | did you mean 'train.steps' | python train.py steps=10
1 list of folders | 2 | 'data.path=\{a: 0.5, b: 0.5\}' | python train.py 'data.path=[a,b]'
1 one folder twice | 2 | names one folder twice | $TRAIN run_dir=$T/x "data.path={$T/shards: 1, $T/./shards: 1}"
1 a name that leads away | 2 | leads out of the folder of runs | python train.py dry_run=true name=../x
1 a sequence of one token | 0 | step 1/1 | $TRAIN run_dir=$T/one_token train.seq_len=1 train.steps=1
1 an odd sequence | 0 | step 1/1 | $TRAIN run_dir=$T/odd train.seq_len=7 train.steps=1
1 a sequence longer than the text | 2 | shorten it | $TRAIN run_dir=$T/x train.seq_len=999999
1 quotes and blanks in a path | 0 | saved .*mit leer | $TRAIN 'run_dir="'$T'/mit leer ü\"x"' train.steps=1
1 too large a seed | 2 | from 0 to 4,294,967,295 | python train.py dry_run=true seed=99999999999999999999
1 a group taken away | 0 | parameters | python train.py dry_run=true '~optim'
1 a group that is null | 2 | there is no configs/optim/null.yaml | python train.py dry_run=true optim=null
1 a vocabulary too small | 2 | smaller than the 512 tokens | $TRAIN run_dir=$T/x model.vocab_size=100
1 a vocabulary with room | 0 | step 1/1 | $TRAIN run_dir=$T/room train.steps=1 model.vocab_size=1024
1 no layers | 2 | model.n_layers must be above zero | python train.py dry_run=true model.n_layers=0
1 no rotation at all | 2 | rope_theta must be above zero, not 0 | python train.py dry_run=true model=transformer model.mixers.attention.rope_theta=0
1 an odd width | 2 | not divisible by n_heads | python train.py dry_run=true size.d_model=33
1 an empty pattern | 2 | name at least one mixer | python train.py dry_run=true model.pattern=[]
1 no checkpoint kept | 2 | checkpoint.keep must be above zero | python train.py dry_run=true checkpoint.keep=0
1 steps in hexadecimal | 2 | must be a whole number or null | python train.py dry_run=true train.steps=0x2
1 a rate as a fraction | 2 | must be a number or null | python train.py dry_run=true optim.lr=1/3

# -- resuming, sweeps, comparison (2)
2 another batch | 0 | resuming from .*step 2 | cp -r $T/run $T/batch && $TRAIN run_dir=$T/batch train.steps=3 train.global_batch=8
2 sweep | 0 | ^2 +optim.lr=0.00[13] .*finished | $TRAIN run_dir=$T/sweep train.steps=1 eval.tokens=64 -m optim.lr=1e-3,3e-3
2 sweep, a job fails | 1 | failed with status 2 | $TRAIN run_dir=$T/sweep2 train.steps=1 eval.tokens=64 -m data.path=$T/nosuch,$T/shards
2 sweep, unknown model | 2 | there is no configs/model/nosuch.yaml | $TRAIN run_dir=$T/x -m model=paragru,nosuch
2 sweep, unknown key | 2 | did you mean 'lr' | $TRAIN run_dir=$T/x -m optim.lrr=1e-3,3e-3
2 sweep, wrong kind | 2 | optim.lr must be | $TRAIN run_dir=$T/x -m optim.lr=1e-3,fast
2 sweep, twice the same | 2 | share the run folder | $TRAIN run_dir=$T/x -m seed=1,1
2 sweep without -m | 2 | several runs take -m | $TRAIN run_dir=$T/x seed=1,2
2 sweep, no such launcher | 2 | pip install hydra-nosuch-launcher | $TRAIN run_dir=$T/x -m hydra/launcher=nosuch seed=1,2
2 sweep over ranks | 2 | SWEEP_COMMAND | WORLD_SIZE=2 RANK=0 $TRAIN run_dir=$T/x -m seed=1,2
2 sweep, a range | 2 | hydra/sweeper=optuna | $TRAIN run_dir=$T/x -m 'optim.lr=interval(1e-4,1e-2)'
2 compare | 0 | written: .*png | python -m training.compare $T/run out=$T/compare.png
2 compare nothing | 2 | Say which | python -m training.compare
2 compare what is not there | 2 | There is no folder | python -m training.compare $T/nosuch
2 compare, wrong picture | 2 | ends in .png | python -m training.compare $T/run out=x.txt
2 the log is kept | 0 | step 2/2 | cat $T/run/log.txt
2 another length | 2 | sequences of 32 tokens.*train.start_from= | cp -r $T/run $T/length && $TRAIN run_dir=$T/length train.steps=3 train.seq_len=64
2 another optimizer | 2 | holds the moments of optim=adamw | cp -r $T/run $T/other_optim && $TRAIN run_dir=$T/other_optim train.steps=3 optim=muon
2 another cell | 2 | holds another model | cp -r $T/run $T/other_cell && $TRAIN run_dir=$T/other_cell train.steps=3 model.mixers.paragru.cell=lstm
2 every checkpoint damaged | 2 | Every checkpoint of .* is damaged | cp -r $T/run $T/damaged && truncate -s -9 $T/damaged/checkpoints/*/model.safetensors && $TRAIN run_dir=$T/damaged train.steps=3
2 no resuming | 0 | starting at step 0 of 3 | cp -r $T/run $T/anew && $TRAIN run_dir=$T/anew train.steps=3 train.resume=none
2 a hook that fails | 0 | ended with status 3 | $TRAIN run_dir=$T/hook train.steps=1 'checkpoint.hook="exit 3; echo {folder}"'
2 weights that are NaN | 2 | Step 1 was not taken: loss is not finite | $TRAIN run_dir=$T/from_nan train.start_from=$T/nan train.steps=2
2 a disk that is full | 2 | could not be written .*File too large | ulimit -f 100; $TRAIN run_dir=$T/full train.steps=1
2 a trace after the end | 2 | lower profile_start | $TRAIN run_dir=$T/x train.steps=2 profile=true profile_start=9
2 finished run | 0 | this run is finished.*raise train.steps | $TRAIN run_dir=$T/run train.steps=2
2 phase | 0 | a new run from .*run | $TRAIN run_dir=$T/phase train.steps=2 train.start_from=$T/run
2 no such start | 2 | There is no .*nosuch to begin from | $TRAIN run_dir=$T/x train.start_from=$T/nosuch

# -- data (3)
3 nothing to read | 2 | nothing to read | mkdir $T/none && python -m data.prepare input=$T/none out=$T/p6 tokenizer=bytes
3 no input | 2 | input | python -m data.prepare out=$T/p7 tokenizer=bytes
3 misspelt key | 2 | tokenizer | python -m data.prepare input=demo out=$T/p8 tokeniser=bytes
3 read-only output | 2 | cannot be written | python -m data.prepare input=demo out=/proc/nowhere tokenizer=bytes
3 a small vocabulary | 2 | 257 | python -m data.prepare input=demo out=$T/p9 tokenizer=bpe:10
3 a tokenizer on the Hub | 2 | cannot be loaded: .* not in the cache | HF_HUB_OFFLINE=0 HF_ENDPOINT=http://127.0.0.1:9 python -m data.prepare input=demo out=$T/p10 tokenizer=someone/tokenizer
3 a huge vocabulary | 2 | at most 4,000,000 tokens | python -m data.prepare input=demo out=$T/p14 tokenizer=bpe:99999999999
3 no tokenizer file | 2 | no such file | python -m data.prepare input=demo out=$T/p11 tokenizer=$T/nosuch.json
3 one text file | 0 | valid: 1 documents | python -m data.prepare input=$T/one.txt out=$T/p1 tokenizer=bytes
3 upper case ending | 0 | train: 1 documents | mkdir $T/up && cp $T/one.txt $T/up/A.TXT && python -m data.prepare input=$T/up out=$T/p2 tokenizer=bytes
3 csv | 0 | train: 1 documents | printf 'text,n\nhello there,1\nmore of it,2\n' >$T/a.csv && python -m data.prepare input=$T/a.csv out=$T/p3 tokenizer=bytes
3 bz2 | 0 | train: 1 documents | bzip2 -k <$T/one.txt >$T/b.txt.bz2 && python -m data.prepare input=$T/b.txt.bz2 out=$T/p4 tokenizer=bytes
3 an input twice | 2 | names .*one.txt twice | python -m data.prepare input=$T/one.txt,$T/one.txt out=$T/p12 tokenizer=bytes
3 a file of two inputs | 0 | read already by an earlier input | mkdir $T/both && cp $T/one.txt $T/both/a.txt && python -m data.prepare input=$T/both,$T/both/a.txt out=$T/p13 tokenizer=bytes
3 missing field | 2 | the fields there are body; set text_field | printf '{"body": "hello"}\n' >$T/f.jsonl && python -m data.prepare input=$T/f.jsonl out=$T/p5 tokenizer=bytes
3 a word without end | 0 | trained a BPE of 512 | head -c 3000000 /dev/urandom | base64 -w 0 >$T/dna.txt && timeout 60 python -m data.prepare input=$T/dna.txt out=$T/dna tokenizer=bpe:512
3 a token beyond the vocabulary | 2 | beyond the 512 of its vocabulary | cp -r $T/shards $T/beyond && truncate -s 0 $T/beyond/train-00000.bin && head -c $(stat -c %s $T/shards/train-00000.bin) /dev/zero | tr '\0' '\377' >$T/beyond/train-00000.bin && $TRAIN data.path=$T/beyond run_dir=$T/x
3 a column twice | 2 | table with 2 columns of the name text | printf 'text,text\na,b\n' >$T/twice.csv && python -m data.prepare input=$T/twice.csv out=$T/p15 tokenizer=bytes
3 a key twice | 2 | input is given twice | python -m data.prepare input=$T/one.txt input=$T/two.txt out=$T/p16 tokenizer=bytes
3 a tilde that the shell left | 0 | /home/shards train | mkdir -p $T/home && HOME=$T/home python -m data.prepare input=$T/one.txt 'out=~/shards' tokenizer=bytes
3 output inside of the input | 0 | left out, token shards | mkdir $T/within && cp $T/one.txt $T/within && python -m data.prepare input=$T/within out=$T/within/a tokenizer=bytes && python -m data.prepare input=$T/within out=$T/within/b tokenizer=bytes
3 several packed parts | 0 | 19 tokens | printf 'one more\n' | gzip >$T/parts.txt.gz; printf 'two more\n' | gzip >>$T/parts.txt.gz; python -m data.prepare input=$T/parts.txt.gz out=$T/p17 tokenizer=bytes
3 zero bytes | 2 | holds zero bytes | printf 'a \0 b' >$T/zero.txt && python -m data.prepare input=$T/zero.txt out=$T/p18 tokenizer=bytes
3 text without tokens | 0 | lost, .* tokens .* are '\[UNK\]' | python -c "from tokenizers import *; t = Tokenizer(models.WordLevel({'[UNK]': 0, '</s>': 1, 'the': 2}, unk_token='[UNK]')); t.pre_tokenizer = pre_tokenizers.Whitespace(); t.save('$T/unknown.json')" && python -m data.prepare input=$T/one.txt out=$T/p25 tokenizer=$T/unknown.json
3 a surrogate and nothing | 0 | 1 not UTF-8 | printf '{"text": ""}\n{"text": "a"}\n{"text": "\\ud800x"}\n' >$T/odd.jsonl && python -m data.prepare input=$T/odd.jsonl out=$T/p19 tokenizer=bytes
3 quotes that do not match | 2 | quotes do not match | printf 'text,n\n"a\nb,1\n' >$T/open.csv && python -m data.prepare input=$T/open.csv out=$T/p20 tokenizer=bytes
3 a name several times in a record | 0 | field .text. is there several times | printf '{"text": "a", "text": "b"}\n{"text": "whole", "n": 1, "n": 2}\n' >$T/several.jsonl && python -m data.prepare input=$T/several.jsonl out=$T/several tokenizer=bytes
3 a comma in a name | 0 | train: 1 documents | cp $T/one.txt "$T/a,b.txt" && python -m data.prepare input="$T/a,b.txt" out=$T/p21 tokenizer=bytes
3 a bracket in a name | 0 | train: 1 documents | cp $T/one.txt "$T/a[1].txt" && python -m data.prepare input="$T/a[1].txt" out=$T/p22 tokenizer=bytes
3 all held out | 2 | valid_fraction must be from 0 up to 1 | python -m data.prepare input=demo out=$T/p23 tokenizer=bytes valid_fraction=1
3 a document that is not there | 2 | names document 99 | python -m data.prepare input=$T/one.txt out=$T/p24 tokenizer=bytes 'valid_docs=[0,99]'

# -- evaluation (4)
4 perplexity | 0 | bits per byte | python -m evals.run checkpoint=$T/run length=64 max_tokens=256 data=$T/shards
4 no checkpoint | 2 | There is no | python -m evals.run checkpoint=$T/nosuch
4 a file for a checkpoint | 2 | is a file; give the folder | python -m scripts.generate checkpoint=$T/one.txt prompt=a
4 the folder of checkpoints | 2 | give the run folder | python -m scripts.generate checkpoint=$T/run/checkpoints prompt=a
4 a device of another kind | 2 | ^error: device is 'tpu' | python -m scripts.generate checkpoint=$T/run prompt=a device=tpu
4 nothing said | 2 | checkpoint= | python -m evals.run
4 unknown suite | 2 | suite | python -m evals.run checkpoint=$T/run suite=nosuch
4 unknown item, two models | 2 | No item of suite quick | python -m evals.run checkpoint=$T/run,$T/run suite=quick only=nosuch out=$T/evals4
4 report of nothing | 2 | no folder of measurements | python -m evals.report $T/nosuch
4 suite, read-only output | 2 | /proc/nowhere | python -m evals.run checkpoint=$T/run suite=quick out=/proc/nowhere
4 not a task | 2 | generated task | python -m evals.state_tracking checkpoint=$T/run
4 compressed text | 0 | nats per token over | gzip -k $T/three.txt && python -m evals.run checkpoint=$T/run suite=quick only=position out=$T/evals text=$T/three.txt.gz rows=2 max_length=128
4 perplexity of packed text, two models | 0 | bits per byte .* over | gzip -c $T/three.txt >$T/four.txt.gz && python -m evals.run checkpoint=$T/run,$T/run/checkpoints/step-00000002 out=$T/evals3 text=$T/four.txt.gz rows=2 length=128
4 a picture as text | 2 | of a kind that is not read | head -c 4000 /dev/urandom >$T/x.png && python -m evals.run checkpoint=$T/run suite=quick only=position out=$T/evals2 text=$T/x.png
4 weights that are NaN | 2 | The logits are not finite | python -m evals.run checkpoint=$T/nan length=64 max_tokens=64 data=$T/shards
4 NaN in a suite | 1 | NOT MEASURED: The logits are not finite | python -m evals.run checkpoint=$T/nan suite=quick only=position out=$T/evals5 text=$T/three.txt rows=2 max_length=64
4 dynamics of NaN | 2 | The logits are not finite | python -m evals.dynamics checkpoint=$T/nan
4 a text as output | 2 | is not written over | python -m evals.run checkpoint=$T/run length=64 max_tokens=64 data=$T/shards out=$T/one.txt
4 text from NaN | 2 | The logits are not finite | python -m scripts.generate checkpoint=$T/nan prompt=a max_new_tokens=4 temperature=0
4 rows of one token | 0 | over 16 tokens | python -m evals.run checkpoint=$T/run length=1 max_tokens=16 data=$T/shards
4 a text of one letter | 0 | over 1 tokens | printf x >$T/letter.txt && python -m evals.run checkpoint=$T/run suite=quick only=position out=$T/evals6 text=$T/letter.txt max_length=64
4 an empty text | 2 | holds no document | python -m evals.run checkpoint=$T/run suite=quick only=position out=$T/evals7 text=$T/empty.txt
4 shards of another tokenizer | 2 | made with another tokenizer | python -m data.prepare input=$T/one.txt out=$T/bytes tokenizer=bytes && python -m evals.run checkpoint=$T/run data=$T/bytes
4 a tokenizer with more tokens than the model | 2 | is beyond the 512 tokens of the model | cp -r $T/run/checkpoints/step-00000002 $T/more && python -c "from tokenizers import Tokenizer; t = Tokenizer.from_file('$T/more/tokenizer.json'); t.add_tokens(['was']); t.save('$T/more/tokenizer.json')" && python -m scripts.generate checkpoint=$T/more prompt='It was' max_new_tokens=2
4 a report of token shards | 2 | is no folder of measurements | python -m evals.report $T/shards
4 no such cure | 2 | There is no cure 'nosuch' | python -m evals.run checkpoint=$T/run suite=quick cures=nosuch out=$T/evals8

# -- Hub (5)
5 export | 0 | agree | python -m scripts.export $T/run $T/hub
5 export, no checkpoint | 2 | There is no | python -m scripts.export $T/nosuch $T/y
5 export, read-only output | 2 | /proc/nowhere | python -m scripts.export $T/run /proc/nowhere
5 export, a setting without dashes | 2 | write --dtype=bf16 | python -m scripts.export $T/run $T/y dtype=bf16
5 export, no output | 2 | required: out | python -m scripts.export $T/run
5 export of NaN | 2 | would hold values that are not finite | python -m scripts.export $T/nan $T/hubnan
5 export over the run | 2 | exists already | python -m scripts.export $T/run $T/run
5 import, a text | 2 | holds no config.json | python -m scripts.import_checkpoint $T/one.txt $T/y
5 push, no model | 2 | export the checkpoint first | python -m scripts.push $T/run org/name
5 conversion of NaN | 2 | would hold values that are not finite | python -m scripts.convert checkpoint=$T/nan out=$T/convertednan layers=all
5 import of NaN | 2 | would hold values that are not finite | python -m scripts.export $T/run $T/nanhub && python -c "from safetensors.torch import load_file, save_file; t = load_file('$T/nanhub/model.safetensors'); next(iter(t.values())).fill_(float('inf')); save_file(t, '$T/nanhub/model.safetensors', {'format': 'pt'})" && python -m scripts.import_checkpoint $T/nanhub $T/y verify=false
5 import, no folder | 2 | config.json | python -m scripts.import_checkpoint $T/nosuch $T/y
5 push, wrong name | 2 | org/name | python -m scripts.push $T/run nosuch
5 train from no folder | 2 | nosuch | python train.py model=hf:$T/nosuch data=shards data.path=$T/shards

# -- messages (6)
6 help | 0 | seq_len: 256 +# tokens per sequence | python train.py --help
6 help of a config | 0 | steps: 7 | python train.py train.steps=7 --help
6 a config that is no YAML | 2 | bad.yaml is not YAML: line 3 | python train.py --config-dir $T/configs experiment=bad
6 no such folder of configs | 2 | --config-dir | python train.py --config-dir $T/nosuch
6 settings with dashes | 2 | without dashes: model=paragru | python train.py --model=paragru
6 unknown flag | 2 | did you mean --help | python train.py --hlp
6 read-only run folder | 2 | cannot be written | $TRAIN run_dir=/proc/nowhere
6 a checkpoint for a run folder | 2 | is a checkpoint; give the run a folder of its own | $TRAIN run_dir=$T/run/checkpoints/step-00000002
6 token shards for a run folder | 2 | is a folder of token shards | $TRAIN run_dir=$T/shards
6 a file for a run folder | 2 | one.txt | $TRAIN run_dir=$T/one.txt
6 bytes in a setting | 2 | no UTF-8 text | python train.py name=$'a\xffb'
6 bytes in a prompt | 2 | no UTF-8 text | python -m scripts.generate checkpoint=$T/run prompt=$'a\xffb'
6 WORLD_SIZE empty | 2 | WORLD_SIZE='' | WORLD_SIZE= $TRAIN run_dir=$T/x
6 WORLD_SIZE alone | 2 | no RANK | WORLD_SIZE=2 $TRAIN run_dir=$T/x
6 rank too high | 2 | RANK=3 of WORLD_SIZE=2 | WORLD_SIZE=2 RANK=3 $TRAIN run_dir=$T/x
6 local rank empty | 2 | LOCAL_RANK='' | LOCAL_RANK= $TRAIN run_dir=$T/x
6 port that is none | 2 | MASTER_PORT='abc' | MASTER_PORT=abc $TRAIN run_dir=$T/x
6 port in use | 2 | Port [0-9]+ of this machine is in use | python -c "import os, socket, subprocess, sys; s = socket.socket(); s.bind(('0.0.0.0', 0)); s.listen(); sys.exit(subprocess.run('$TRAIN run_dir=$T/x train.micro_batch=2', shell=True, env=dict(os.environ, WORLD_SIZE='2', RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(s.getsockname()[1]))).returncode)"
6 no such cell | 2 | there is no cell 'nosuch' | python -m scripts.print_kernels nosuch
6 help of the kernel printer | 0 | Prints the Triton source | python -m scripts.print_kernels --help
6 kernel of the decoding step | 0 | def project_and_step | python -m scripts.print_kernels paragru decode
6 no such kernels | 2 | choose solve or decode | python -m scripts.print_kernels paragru walk
6 generation where it used to be | 2 | run python -m scripts.generate with the same | python -m models.generate checkpoint=$T/run
6 export where it used to be | 2 | run python -m scripts.export with the same | python -m models.hub.export $T/run $T/y
6 printing where it used to be | 2 | run python -m scripts.print_kernels | python -m kernels.parallel_rnn.codegen paragru
6 no such command | 2 | nosuchcommand | python -m training.supervisor -- nosuchcommand
6 supervisor, read-only folder | 2 | /proc/nowhere | python -m training.supervisor folder=/proc/nowhere -- true
6 Ctrl-C while libraries load | 130 | interrupted | python -c "import signal, subprocess, sys, time; p = subprocess.Popen([sys.executable, 'train.py']); time.sleep(0.4); p.send_signal(signal.SIGINT); sys.exit(p.wait())"
6 host file, max_slots | 0 | nproc_per_node 8 | PYTHON=$T/python LAUNCHER=torchrun NODE_RANK=0 MASTER_ADDR=127.0.0.1 scripts/train_multinode.sh $T/max_slots a=b
6 host file, colon | 2 | says 'node-a:8' | LAUNCHER=torchrun NODE_RANK=0 MASTER_ADDR=127.0.0.1 scripts/train_multinode.sh $T/colon a=b
6 host file, empty | 2 | names no machine | LAUNCHER=torchrun NODE_RANK=0 MASTER_ADDR=127.0.0.1 scripts/train_multinode.sh $T/empty a=b
6 host file, a machine twice | 2 | twice | scripts/train_multinode.sh $T/twice a=b
6 host file, none | 2 | no host file | scripts/train_multinode.sh $T/nosuch a=b
6 a shell that allows few files | 2 | open 20 files at once | ulimit -n 20 && $TRAIN run_dir=$T/few
6 a shell that allows few files, text | 2 | open 20 files at once | ulimit -n 20 && python -m scripts.generate checkpoint=$T/run prompt=a
6 help of a script | 0 | HOSTFILE | scripts/train_multinode.sh --help
6 export without arguments | 2 | CHECKPOINT OUT | NO_SETUP=1 scripts/export_hub.sh

# -- twenty ways to mistype
t group with a typo | 2 | paragru | python train.py model=paragur
t key with a typo | 2 | did you mean 'train' | python train.py trian.steps=3
t value of another kind | 2 | train.steps must be | python train.py train.steps=many
t half a step | 2 | train.steps must be | python train.py train.steps=1.5
t both lengths of a run | 2 | length of the run once | python train.py train.tokens=1e6
t blanks around the sign | 2 | key=value | python train.py train.steps =3
t a key alone | 2 | key=value | python train.py train.steps
t an open bracket | 2 | a list is written 'key=\[a,b\]' | python train.py 'model.pattern=[mamba2'
t a mixer that is not there | 2 | pattern names 'mamba' | python train.py 'model.pattern=[mamba]'
t norms behind a mixer that is not there | 2 | norm_after names 'mamba' | python train.py 'model.norm_after=[mamba]'
t precision | 2 | choose one of fp32, bf16 | python train.py train.precision=fp16
t fp8 | 2 | it needs train.precision=bf16 | python train.py train.fp8=true
t a device | 2 | choose one of auto, cpu, cuda | $TRAIN run_dir=$T/x train.device=gpu
t a ZeRO stage | 2 | deepspeed | python train.py deepspeed=zero4
t batches that do not divide | 2 | not a multiple | python train.py train.micro_batch=3
t every 99th of four layers | 2 | the first one alone | $TRAIN run_dir=$T/x train.activation_checkpointing=99
t a window beyond the sequences | 0 | window=100,000 is longer than train.seq_len | $TRAIN run_dir=$T/wide train.steps=1 model=transformer model.mixers.attention.window=100000
t true with a capital | 0 | parameters | python train.py dry_run=True
t yes for true | 2 | dry_run must be | python train.py dry_run=yes
t a path with a blank | 2 | holds no token shards | python train.py data=shards "data.path='$T/no such'"
t output of a bench where nobody may write | 2 | cannot be written to | python -m scripts.bench.step out=/proc/nowhere/step.json
t a bench, no output | 2 | Give out=FILE | python -m scripts.bench.memory
t pictures take no argument | 2 | takes none | python -m scripts.draw out=$T/x
t a report of no folder | 2 | Give one folder of measurements | python -m evals.report
t an empty value | 2 | model | python train.py model=
t generation, wrong key | 2 | did you mean 'max_new_tokens' | python -m scripts.generate checkpoint=$T/run prompt=a max_tokens=3
t generation, negative length | 2 | max_new_tokens must be | python -m scripts.generate checkpoint=$T/run prompt=a max_new_tokens=-3
t generation, no temperature | 2 | a finite number from 1e-06 on, not nan | python -m scripts.generate checkpoint=$T/run prompt=a temperature=nan
t generation, too large a seed | 2 | from 0 up to 2\^63 | python -m scripts.generate checkpoint=$T/run prompt=a seed=99999999999999999999
t generation, an empty document | 2 | is empty | python -m scripts.generate checkpoint=$T/run document=$T/empty.txt prompt=a
t generation, a folder to save to | 2 | is a folder | python -m scripts.generate checkpoint=$T/run prompt=a save=$T
t generation, a text to save to | 2 | is not written over | python -m scripts.generate checkpoint=$T/run prompt=a save=$T/one.txt
t generation, half a session | 2 | cannot be read | head -c 100 $T/one.txt >$T/half && python -m scripts.generate checkpoint=$T/run prompt=a resume=$T/half
t generation, an unknown id | 2 | token ids below 512 | python -m scripts.generate checkpoint=$T/run prompt=a stop_ids=5,9999
t generation, two prompts | 0 | note: prompt=a does not hold, as prompt=b comes behind it | python -m scripts.generate checkpoint=$T/run prompt=a prompt=b max_new_tokens=2
t conversion, nothing said | 2 | Say what to convert | python -m scripts.convert
t generation, no such prompts | 2 | nosuch.* cannot be read | python -m scripts.generate checkpoint=$T/run prompts=$T/nosuch
t golden losses, no such commit | 2 | There is no commit and no file 'nosuch' | python -m scripts.check.golden against=nosuch
t golden losses, no such model | 2 | There is no model nosuch; there are | python -m scripts.check.golden against=stored only=nosuch
t golden losses, a part renewed | 2 | leave out only= | python -m scripts.check.golden renew=why only=hybrid
t faults, no such one | 2 | There is no fault 'nosuch'; there are kernels | python -m scripts.check.faults only=nosuch
t tests of a change, no such commit | 2 | git knows no commit 'nosuch' | python -m scripts.check.changed nosuch
t the board, no such action | 2 | Say first what is to be done | python -m scripts.board rum
t the board, no such row | 2 | did you mean 'gdn' | python -m scripts.board plan rows=gnd
t the board, no shards | 2 | holds no token shards | python -m scripts.board plan data=$T/nosuch
t the board, nothing to draw | 2 | has a finished cell | python -m scripts.board draw out=$T/nosuch page=$T/nosuch
