#!/usr/bin/env bash
# What to run with one GPU, in order of value, within 30 minutes:
#     scripts/gpu_session.sh FOLDER [OUT]             FOLDER has train/<class>/ and val/<class>/ of photos; OUT: gpu-out
#     scripts/gpu_session.sh --study FOLDER [OUT]     then RedNet-50 and ResNet-50, 130 epochs each of the paper's recipe
# Started again it goes on: steps that have succeeded are passed over. Every step leaves OUT/<step>.txt and .json, and
# after each one docs/benchmarks/gpu.md is made anew. MINUTES=30 is the limit, which --study does not have. A signal
# (Ctrl-C) ends the step under way, a run of train.py with its state saved. Exit status: 0 all steps have succeeded,
# 1 some are left, 2 no GPU here, no such folder, or OUT is another GPU's, 75 stopped by a signal.
set -uo pipefail
STUDY=; if [ "${1:-}" = --study ]; then STUDY=yes; shift; fi
if [ $# -lt 1 ] || [ ! -d "$1/train" ] || [ ! -d "$1/val" ]; then
  echo "usage: scripts/gpu_session.sh [--study] FOLDER [OUT]; FOLDER has train/<class>/ and val/<class>/ of photos" >&2
  exit 2
fi
mkdir -p "${2:-gpu-out}" || exit 2
FOLDER=$(realpath "$1") OUT=$(realpath "${2:-gpu-out}") DEADLINE=$((SECONDS + 60 * ${MINUTES:-30})) LEFT= CHILD= STOPPED=
cd "$(dirname "$0")/.." || exit 2
python -c 'import torch' 2> /dev/null || { echo "python has no torch here: source .venv/bin/activate first" >&2; exit 2; }
python scripts/gpu/checks.py machine --out "$OUT/machine.json" || exit 2
COMMIT=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["commit"])' "$OUT/machine.json")

# timeout is a process group of its own, which Ctrl-C does not reach; it passes signals on
trap 'STOPPED=yes; [ -n "$CHILD" ] && kill "$CHILD" 2> /dev/null || exit 75' INT TERM HUP

# step NAME SECONDS COMMAND...: run it unless it has succeeded before, for as long as there is time
step() {
  local name=$1 limit=$2 begin=$SECONDS status command; shift 2
  [ -e "$OUT/$name.done" ] && { echo "$name: done before"; return 0; }
  [ -z "$STUDY" ] && [ $((DEADLINE - begin)) -lt "$limit" ] && limit=$((DEADLINE - begin))
  [ "$limit" -lt 20 ] && { echo "$name: no time left"; LEFT+=" $name"; return 1; }
  echo "$name: $*"
  timeout -k 60 "$limit" "$@" > "$OUT/$name.txt" 2>&1 & CHILD=$!
  while kill -0 "$CHILD" 2> /dev/null; do wait "$CHILD"; done # a signal ends `wait` early, with the signal's number
  wait "$CHILD"; status=$?
  CHILD=
  [ $status = 0 ] && touch "$OUT/$name.done" || { echo "$name: exit $status"; tail -n 5 "$OUT/$name.txt"; LEFT+=" $name"; }
  command="${*//"$FOLDER"/FOLDER}"
  printf '%s\t%s\t%s\t%s\t%s\n' "$name" $status $((SECONDS - begin)) "$COMMIT" "${command//"$OUT"/OUT}" >> "$OUT/steps.tsv"
  python scripts/gpu/page.py "$OUT" > "$OUT/page.txt" 2>&1 || cat "$OUT/page.txt"
  [ -n "$STOPPED" ] && { echo "stopped; start again to go on" >&2; exit 75; }
  return $status
}
check() { local name=$1 limit=$2; shift 2; step "$name" "$limit" python scripts/gpu/checks.py "$name" --out "$OUT/$name.json" "$@"; }
bench() { local name=$1 limit=$2; shift 2; step "$name" "$limit" python scripts/benchmark.py "$@" --device cuda --out "$OUT/$name"; }
train() { local name=$1 limit=$2; shift 2; step "$name" "$limit" python train.py data=folder "data.root=$FOLDER" "output_root=$OUT/runs" "$@"; }
bits() { # a run of rednet26 to the last bit: bits STEP NAME max_steps
  train "$1" 240 model=rednet26 deterministic=true train.precision=bf16 train.batch_size=64 train.global_batch_size=64 \
    train.epochs=1 train.checkpoint_every_steps=10 data.decoder=cpu "name=$2" "train.max_steps=$3"
}

step tests 480 python -m pytest -q -m gpu tests/test_triton_gpu.py          # results, bits, graphs, synchronisations
check synchronisations 120 --batch 128
check step 240 --batch 8 16 32 128 256                  # RedNet-50 and ResNet-50; 8 to 32: docs/cluster.md's r
step step-graphs 120 python scripts/gpu/checks.py step --batch 8 16 32 128 256 --cuda-graphs --out "$OUT/step-graphs.json"
step step-ghost 120 python scripts/gpu/checks.py step --batch 256 --batchnorm-size 32 --out "$OUT/step-ghost.json"
bench training 180 model --dtype bf16 --train-batch 128 --only training --repeats 9   # the two of them interleaved
check profile 90 --batch 128
bits whole whole 20 && bits half resumed 10 && bits resumed resumed 20 &&   # stopped or not, the same weights
  check same-bits 30 --runs "$OUT/runs/whole" "$OUT/runs/resumed"
check loader 150 --root "$FOLDER" --batch 64 256
check tiles 200 --batch 128
bench op 240 op --dtype bf16 --batch 128 --all-shapes --skip-compile --only operator
bench training-32 120 model --dtype bf16 --train-batch 32 --only training --repeats 9
bench training-fp32 180 model --dtype fp32 --train-batch 128 --only training --repeats 5
bench training-compiled 300 model --dtype bf16 --train-batch 128 --only training --compile-training --repeats 5
bench loop 120 loop --setup rednet50:224:128
bench op-attention 180 op --dtype bf16 --batch 32 --skip-compile --only attention
bench data 180 data "$FOLDER" --batch 256 --workers 8 --loading-only --repeats 3
train first 240 model=rednet50 train.precision=bf16 train.batch_size=128 train.global_batch_size=256 train.epochs=2 \
  train.max_steps=40 name=first                                             # the whole program, as a user starts it

if [ -n "$STUDY" ]; then # the paper's recipe with a batch for ten thousand photos: lr 0.8 for 2048 is 0.1 for 256
  for model in rednet50 resnet50; do
    train "study-$model" 7200 "model=$model" train.precision=bf16 train.batch_size=256 train.batchnorm_size=32 \
      train.global_batch_size=256 optimizer.lr=0.1 seed=0 "name=study-$model" &&
      step "scores-$model" 300 python eval.py "checkpoint=$OUT/runs/study-$model/checkpoints/last.pt" precision=bf16 \
        "results=$OUT/scores-$model.csv"
  done
fi
python scripts/cluster_table.py > "$OUT/cluster.txt" 2>&1 || { cat "$OUT/cluster.txt"; LEFT+=" cluster_table.py"; }
echo "docs/benchmarks/gpu.md is the result, and docs/cluster.md's r"
[ -z "$LEFT" ] || { echo "left:$LEFT; start again to go on" >&2; exit 1; }
