#!/bin/sh
# Builds the binaries in place with the interpreter $1 and prints a line for each file; the whole
# log is build/build.log. Arguments after $1 replace setup.py's command, "build_ext --inplace".
set -u
cd "$(dirname "$0")/.."
python=$1
shift
[ $# -gt 0 ] || set -- build_ext --inplace
mkdir -p build
log=build/build.log
{ PYTHONUNBUFFERED=1 "$python" setup.py "$@" 2>&1; echo "exit status $?"; } | tee "$log" |
  sed -unE 's|^(\[[0-9]+/[0-9]+\]).* -c [^ ]*/((csrc\|tests)/[^ ]+) .*|\1 \2|p; /^merge_attn_states:/p'
if [ "$(tail -n 1 "$log")" != "exit status 0" ]; then
  grep -nE "error|Error" "$log" | cut -c 1-400 | head -n 20
  echo "merge_attn_states: the build failed; the whole log is in $log" >&2
  exit 1
fi
