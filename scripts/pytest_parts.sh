#!/bin/sh
# Runs the suite with the interpreter $1; options behind it go to pytest. SHARD=k/n runs a part;
# JOBS=n runs n parts at once, on all GPUs there are, with their logs in the folder LOGS (build/);
# then, where there is a GPU, the tests that want it for themselves.
set -eu
cd "$(dirname "$0")/.."
python=$1
shift
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}scripts"
jobs=${JOBS:-1} logs=${LOGS:-build}
[ "$jobs" -gt 1 ] || exec "$python" -m pytest -p shard -p no:cacheprovider "$@"

# Otherwise the PyTorch of every part would use all cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + jobs - 1) / jobs))}"
mkdir -p "$logs"
part() {
  number=$1 status=0
  shift
  log=$logs/pytest-$number.log gpus=$(scripts/gpus_from.sh "$number")
  [ -z "$gpus" ] || export CUDA_VISIBLE_DEVICES="$gpus"
  SHARD=$number/$jobs "$python" -m pytest -p shard -p no:cacheprovider -m "not alone" "$@" \
    > "$log" 2>&1 || status=$?
  report "part $number/$jobs" $status "$log"
}
report() {
  [ "$2" -eq 0 ] || sed -n '/^=* \(ERRORS\|FAILURES\)/,$p' "$3"
  echo "$1: $(grep . "$3" | tail -n 1)"
  return "$2"
}
parts=
for number in $(seq "$jobs"); do
  part "$number" "$@" &
  parts="$parts $!"
done
status=0
for each in $parts; do wait "$each" || status=1; done
[ -n "$(scripts/gpus_from.sh 0)" ] || exit $status
alone=0
"$python" -m pytest -p no:cacheprovider -m alone "$@" > "$logs/pytest-alone.log" 2>&1 || alone=$?
[ $alone -ne 5 ] || exit $status  # the options leave none of them
report alone $alone "$logs/pytest-alone.log" || status=1
exit $status
