#!/usr/bin/env bash
# Trains on N processes of this machine, with any DeepSpeed settings:
#
#     bash launchers/local.sh 4 configs/ds/lordo.json --model configs/model/tiny.yaml --output-dir runs/four
#
# Everything after the JSON goes to launchers/pretrain_gpt.py (--help lists it). With LoRDO's replica_size 1
# each data-parallel rank is a replica: each process, without tensor and pipeline parallelism. Processes run on
# the GPUs if there are at least N, else on the CPU.
set -euo pipefail
if [ $# -lt 2 ] || [[ ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: bash launchers/local.sh PROCESSES DEEPSPEED_JSON --model YAML --output-dir DIR [options]" >&2
  exit 2
fi
processes=$1 config=$2
shift 2
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
[ -f "$config" ] || die "no DeepSpeed settings at $config; configs/ds/ has some"

devices=(--num_accelerators "$processes")
if [ "$GPU_COUNT" -ge "$processes" ]; then
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then  # which the launcher ignores where it is told a number
    CUDA_VISIBLE_DEVICES=$(cut -d , -f "1-$processes" <<<"${CUDA_VISIBLE_DEVICES// /}")
    devices=()
  fi
  echo "[launch] $processes processes, one GPU each${CUDA_VISIBLE_DEVICES:+ of $CUDA_VISIBLE_DEVICES}"
else
  export DS_ACCELERATOR=cpu
  threads=$(($(nproc) / processes))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
  echo "[launch] $processes processes on the CPU, $OMP_NUM_THREADS thread(s) each ($GPU_COUNT NVIDIA GPUs here)"
fi
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
# DeepSpeed's launcher, called as a module: its script is missing where DeepSpeed came with an installed torch.
exec python -m deepspeed.launcher.runner "${devices[@]}" \
  --master_addr 127.0.0.1 --master_port "$port" --log_level warning \
  "$ROOT/launchers/pretrain_gpt.py" --deepspeed_config "$config" "$@"
