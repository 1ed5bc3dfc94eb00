#!/bin/sh
# Runs the whole suite on this machine's GPU with the interpreter $1, without installing anything.
# SHARD=k/n runs a part. MERGE_ATTN_STATES_OP_LIBRARY=path tests that op library: _C alone is built.
set -eu
cd "$(dirname "$0")/.."
python=$1
"$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())" || {
  echo "merge_attn_states: $python sees no GPU, so there is nothing to test here." >&2
  exit 1
}
scripts/build.sh "$python"
export PYTHONPATH="python:scripts${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m pytest -p shard -p no:cacheprovider
