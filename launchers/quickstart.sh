#!/usr/bin/env bash
# From a bare clone to a trained model: makes the environment and trains the tiny GPT with LoRDO on 2 replicas,
# on two GPUs if there are two, else on the CPU.
#
#     bash launchers/quickstart.sh                      # 2 to 4 minutes on 2 cores, installation included
#     bash launchers/quickstart.sh --train-steps 2000   # options go to launchers/pretrain_gpt.py; yours win
#     REPLICAS=8 bash launchers/quickstart.sh           # on 8 GPUs, say
set -euo pipefail
start=$SECONDS
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

# A run that is there is left alone: runs/quickstart, runs/quickstart-2, ... unless the caller names a folder.
output="$ROOT/runs/quickstart"
number=1
while [ -e "$output" ]; do
  number=$((number + 1))
  output="$ROOT/runs/quickstart-$number"
done
previous=""
for argument in "$@"; do
  case $argument in --output-dir=*) output=${argument#*=} ;; esac
  if [ "$previous" = --output-dir ]; then output=$argument; fi
  previous=$argument
done

bash "$ROOT/launchers/local.sh" "${REPLICAS:-2}" "$ROOT/configs/ds/lordo.json" \
  --model "$ROOT/configs/model/tiny.yaml" --output-dir "$output" "$@" ||
  die "training failed; its own message stands above"

latest="$output/checkpoints/latest"
board=$(find "$output" -name 'events.out.tfevents.*' -print -quit)
[ -n "$board" ] || die "training ended without a TensorBoard run in $output"
[ -s "$output/loss.png" ] || die "training ended without a loss plot in $output"
[ -s "$latest" ] || die "training ended without a checkpoint in $output"
echo
echo "Done in $((SECONDS - start)) s. What it left:"
echo "  loss plot    $output/loss.png"
echo "  TensorBoard  $VENV/bin/python -m tensorboard.main --logdir $(dirname "$board")"
echo "  checkpoint   $output/checkpoints/$(cat "$latest")"
echo "  metrics      $output/metrics.jsonl"
