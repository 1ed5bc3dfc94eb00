#!/bin/sh
# Runs the whole suite on this machine's GPU with the interpreter $1, without installing anything.
# SHARD=k/n runs a part; JOBS=n runs n parts at once, with their logs in the folder LOGS (build/).
# MERGE_ATTN_STATES_OP_LIBRARY=path tests that op library, and only _C is built.
set -eu
cd "$(dirname "$0")/.."
python=$1
"$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())" || {
  echo "merge_attn_states: $python sees no GPU, so there is nothing to test here." >&2
  exit 1
}
scripts/build.sh "$python"
export PYTHONPATH="python:scripts${PYTHONPATH:+:$PYTHONPATH}"
jobs=${JOBS:-1} logs=${LOGS:-build}
[ "$jobs" -gt 1 ] || exec "$python" -m pytest -p shard -p no:cacheprovider ${PYTEST:-}

# Otherwise the PyTorch of every part would use all cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + jobs - 1) / jobs))}"
part() {
  log=$logs/test_gpu-$1.log status=0
  SHARD=$1/$jobs "$python" -m pytest -p shard -p no:cacheprovider ${PYTEST:-} > "$log" 2>&1 ||
    status=$?
  grep -E "^(FAILED|ERROR) " "$log" || true
  echo "part $1/$jobs: $(grep . "$log" | tail -n 1)"
  return $status
}
parts=
for number in $(seq "$jobs"); do
  part "$number" &
  parts="$parts $!"
done
status=0
for each in $parts; do wait "$each" || status=1; done
exit $status
