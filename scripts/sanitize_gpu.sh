#!/bin/sh
# Runs the alias, layout and variant tests on the GPU under compute-sanitizer with the interpreter
# $1: memcheck (reads and writes outside an allocation), then racecheck (races through shared
# memory). SHARD=k/n runs a part; SANITIZER_TOOLS="memcheck" runs one tool.
#
# Without SHARD, twelve parts run one after the other, each in a process of its own: in longer parts
# a process runs out of GPU memory after several of the largest cases.
set -eu
cd "$(dirname "$0")/.."
python=$1
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
[ -x "$sanitizer" ] || {
  echo "merge_attn_states: compute-sanitizer is missing: it comes with the CUDA toolkit." >&2
  exit 1
}
scripts/build.sh "$python"
export PYTHONPATH="python:scripts${PYTHONPATH:+:$PYTHONPATH}"
# One allocation a tensor: the caching allocator would hide a read past the end of one.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
# Only this package's kernels are watched: PyTorch's fill and compare operands, and are not tested.
check() {
  tool=$1
  shift
  "$sanitizer" --tool "$tool" --error-exitcode 99 --kernel-name kns=merge_attn_states "$python" "$@"
}

# A planted error first: a filter that matches no kernel would report nothing.
status=0 planted=build/planted_gpu.$$.log
check memcheck tests/sanitizer/planted_gpu.py > "$planted" 2>&1 || status=$?
if [ "$status" -ne 99 ] || ! grep -q "Invalid __global__" "$planted"; then
  cat "$planted"
  echo "merge_attn_states: compute-sanitizer did not see the planted overread." >&2
  exit 1
fi
echo "== the planted overread was seen"

part() {
  echo "== compute-sanitizer --tool $1, part $2"
  SHARD=$2 check "$1" -m pytest -p shard -p no:cacheprovider -k cuda \
    tests/test_aliasing.py tests/test_overlap.py tests/test_layout.py tests/test_large.py \
    tests/test_cuda_variants.py tests/test_states.py tests/test_states_aliasing.py \
    tests/test_states_gradients.py tests/test_states_kernels.py tests/test_states_bits.py \
    tests/test_states_update_kernels.py
}
# Every n-th part, n being the jobs.
job() {
  number=$1 turn=0 failed=0
  gpus=$(scripts/gpus_from.sh "$number")
  export CUDA_VISIBLE_DEVICES="$gpus"
  for tool in $tools; do
    for shard in $shards; do
      turn=$((turn + 1))
      [ $((turn % jobs)) -eq "$number" ] || continue
      log=build/$tool-${shard%/*}.log said=clean
      part "$tool" "$shard" > "$log" 2>&1 || said=FAILED failed=1
      echo "$said: $tool $shard: $(grep -E " (passed|failed)" "$log" | tail -n 1 | tr -d '=')" \
        "$(grep SUMMARY "$log" | tail -n 1 | tr -d '=')"
    done
  done
  return $failed
}
tools=${SANITIZER_TOOLS:-memcheck racecheck} shards=${SHARD:-$(seq -s ' ' -f '%g/12' 12)}
jobs=${JOBS:-1}
if [ "$jobs" -eq 1 ]; then
  for tool in $tools; do
    for shard in $shards; do part "$tool" "$shard"; done
  done
  exit 0
fi
running=
for number in $(seq 0 $((jobs - 1))); do
  job "$number" &
  running="$running $!"
done
status=0
for each in $running; do wait "$each" || status=1; done
exit $status
