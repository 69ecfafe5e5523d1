# Sourced by the scripts beside it: makes .venv in the repository, or finds it ready, and puts it on PATH.
#
# Sets ROOT (the repository), GPU_COUNT, and, without a GPU, DS_ACCELERATOR=cpu.
# Reads  PYTHON      interpreter to make .venv with (default: the first fitting one on PATH)
#        LORDO_VENV  another place for the environment (default: ROOT/.venv)
#        LORDO_EXTRAS  pip extras to install (default: megatron,train; launchers/test.sh adds test, .ci/run dev too)
#        CUDA_VISIBLE_DEVICES  GPUs that are not in it do not count
#        DS_ACCELERATOR=cpu    no GPU counts
#
# The environment is brought up to date when pyproject.toml or constraints.txt change; otherwise a call takes no time.
# One that was made without a GPU is made anew on a machine with GPUs; one that was made with them serves on others as it
# is. Scripts started together wait for the one that builds.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${LORDO_VENV:-$ROOT/.venv}
EXTRAS=${LORDO_EXTRAS:-megatron,train}

die() { echo "$(basename "$0"): error: $*" >&2; exit 1; }
say() { echo "[env] $*"; }

GPU_COUNT=0
if [ "${DS_ACCELERATOR:-}" != cpu ] && command -v nvidia-smi >/dev/null; then
  GPU_COUNT=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    visible=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^ ]' || true)
    GPU_COUNT=$((visible < GPU_COUNT ? visible : GPU_COUNT))
  fi
fi
if [ "$GPU_COUNT" -eq 0 ]; then export DS_ACCELERATOR=cpu; fi

# An interpreter fits if it is 3.10 to 3.13 and can make environments.
_fits() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' >/dev/null 2>&1
}

# Where this interpreter's torch lies, if that torch can use the GPU here; else nothing.
_site_of_gpu_torch() {
  "$1" -c '
import os, torch
if torch.cuda.is_available():
    print(os.path.dirname(os.path.dirname(os.path.abspath(torch.__file__))))' 2>/dev/null || true
}

_choose_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    _fits "$PYTHON" || die "PYTHON=$PYTHON is no Python 3.10 to 3.13 with venv and ensurepip"
    return
  fi
  # With a GPU the interpreter that already has a torch for it comes first.
  if [ "$GPU_COUNT" -gt 0 ]; then
    for candidate in python3 python; do
      if _fits "$candidate" && [ -n "$(_site_of_gpu_torch "$candidate")" ]; then PYTHON=$candidate; return; fi
    done
  fi
  for candidate in python3.11 python3.12 python3 python3.13 python3.10; do
    if _fits "$candidate"; then PYTHON=$candidate; return; fi
  done
  die "no Python 3.10 to 3.13 with venv on PATH (Debian and Ubuntu: apt install python3-venv), or set PYTHON=/path/to/python"
}

# Whether the environment's torch was built for GPUs.
_has_gpu_torch() {
  "$VENV/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' >/dev/null 2>&1
}

# What pip is told about torch, as arguments in TORCH_ARGS.
_choose_torch() {
  local site cuda
  TORCH_ARGS=()
  if [ "$GPU_COUNT" -eq 0 ] && _has_gpu_torch; then
    say "no NVIDIA GPU here; keeping the torch for GPUs in $VENV"
    return
  elif [ "$GPU_COUNT" -eq 0 ]; then
    say "no NVIDIA GPU: $(grep '^torch' "$ROOT/constraints.txt") for the CPU, from constraints.txt"
    TORCH_ARGS=(-c "$ROOT/constraints.txt")
    return
  fi
  site=$(_site_of_gpu_torch "$PYTHON")
  if [ -n "$site" ]; then
    say "$GPU_COUNT NVIDIA GPU(s): using the torch that is installed in $site"
    # Behind the environment's own packages on the path, so that those win.
    echo "$site" >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_installed_torch.pth"
    return
  fi
  cuda=$(nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p' | head -n 1)
  if [ "${cuda:-0}" -ge 13 ]; then
    say "$GPU_COUNT NVIDIA GPU(s), driver for CUDA $cuda: installing the newest torch"
    TORCH_ARGS=("torch>=2.8")
  else
    say "$GPU_COUNT NVIDIA GPU(s), driver for CUDA ${cuda:-unknown}: installing the newest torch built for CUDA 12"
    TORCH_ARGS=("torch>=2.8,<2.11")
  fi
}

# What the installed environment depends on, for EXTRAS and with (1) or without (0) a torch for GPUs; equal stamps mean
# that nothing is to be done.
_stamp() {
  (
    cd "$ROOT" || exit 1
    cat pyproject.toml constraints.txt
    echo "$ROOT $1 gpu=$2"
    ls -d lordo_ds megatron_patches 2>/dev/null  # an editable install maps the packages it finds
  ) | sha256sum | cut -d ' ' -f 1
}

# An environment with the packages for tests and development, or a torch for GPUs, serves those who do not need them.
_is_ready() {
  local extras gpu
  [ -x "$VENV/bin/python" ] && [ -f "$VENV/lordo.stamp" ] || return 1
  for extras in "$EXTRAS" "$EXTRAS,test" "$EXTRAS,dev" "$EXTRAS,test,dev"; do
    for ((gpu = GPU_COUNT > 0; gpu <= 1; gpu++)); do
      if [ "$(_stamp "$extras" "$gpu")" = "$(cat "$VENV/lordo.stamp")" ]; then return; fi
    done
  done
  return 1
}

_build() {
  local start=$SECONDS log="$VENV/install.log" gpu=0
  _choose_python
  # The stamp says that the environment is ours to delete.
  if [ "$GPU_COUNT" -gt 0 ] && [ -f "$VENV/lordo.stamp" ] && ! _has_gpu_torch; then
    say "$VENV was made for the CPU; with $GPU_COUNT NVIDIA GPU(s) it is made anew"
    rm -rf "$VENV"
  fi
  if ! "$VENV/bin/python" -c 'import pip' >/dev/null 2>&1; then
    # A build that was cut short has left a word in the lock, and may be made anew; what was there before may not.
    if [ ! -s "$VENV.lock" ] && [ -n "$(ls -A "$VENV" 2>/dev/null)" ]; then
      die "$VENV holds something else than an environment with pip: name another place in LORDO_VENV"
    fi
    echo "building" >"$VENV.lock"
    say "creating $VENV with $("$PYTHON" --version) ($(command -v "$PYTHON"))"
    "$PYTHON" -m venv --clear "$VENV" || die "could not create $VENV"
  fi
  rm -f "$VENV/lordo.stamp"
  _choose_torch
  say "installing lordo_ds[$EXTRAS] (the first time takes about two minutes); log: $log"
  "$VENV/bin/python" -m pip install --disable-pip-version-check "${TORCH_ARGS[@]}" -e "$ROOT[$EXTRAS]" \
    >"$log" 2>&1 || { tail -n 15 "$log" >&2; die "pip could not install the environment; the whole log is $log"; }
  if [ "$GPU_COUNT" -gt 0 ] && [ -z "$(_site_of_gpu_torch "$VENV/bin/python")" ]; then
    die "nvidia-smi lists $GPU_COUNT GPU(s), but the torch in $VENV cannot use them: set PYTHON to an interpreter whose" \
      "torch can and delete $VENV, or train on the CPU with DS_ACCELERATOR=cpu"
  fi
  if _has_gpu_torch; then gpu=1; fi
  _stamp "$EXTRAS" "$gpu" >"$VENV/lordo.stamp"
  say "ready after $((SECONDS - start)) s"
}

if ! _is_ready; then
  mkdir -p "$(dirname "$VENV")" && touch "$VENV.lock" 2>/dev/null || die "cannot write beside $VENV"
  exec 9>>"$VENV.lock"
  if command -v flock >/dev/null && ! flock -n 9; then
    say "another run is building $VENV: waiting for it"
    flock 9
  fi
  _is_ready || _build
  exec 9>&-  # closing it gives the lock back
fi
export PATH="$VENV/bin:$PATH"
