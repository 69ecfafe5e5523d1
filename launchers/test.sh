#!/usr/bin/env bash
# Makes the environment and runs the tests; arguments go to pytest, run from the repository's root:
#
#     bash launchers/test.sh
#     bash launchers/test.sh -k harness tests/unit
#     bash launchers/test.sh --slow
set -euo pipefail
export LORDO_EXTRAS=${LORDO_EXTRAS:-megatron,train,test}
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
export OMP_NUM_THREADS=1
cd "$ROOT"
exec python -m pytest "$@"
