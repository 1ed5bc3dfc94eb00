#!/bin/sh
# Runs the whole suite on this machine's GPU with the interpreter $1, without installing anything.
# SHARD, JOBS and LOGS are pytest_parts.sh's.
# MERGE_ATTN_STATES_OP_LIBRARY=path tests that op library, and only _C is built.
set -eu
cd "$(dirname "$0")/.."
python=$1
"$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())" || {
  echo "merge_attn_states: $python sees no GPU, so there is nothing to test here." >&2
  exit 1
}
scripts/build.sh "$python"
export PYTHONPATH="python${PYTHONPATH:+:$PYTHONPATH}"
exec scripts/pytest_parts.sh "$python" ${PYTEST:-}
