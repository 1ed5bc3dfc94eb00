#!/bin/sh
# Builds the CPU path with AddressSanitizer and UBSan, beside the normal build, and runs on it the
# tests of layouts, aliases and errors, and those that plant an error which must be reported.
set -eu
cd "$(dirname "$0")/.."
python=$1
export MERGE_ATTN_STATES_SANITIZE=1
scripts/build.sh "$python" build --build-lib build/sanitize
compiler=${CXX:-c++}
# libstdc++ too: with libasan alone the process aborts at the first C++ exception. Leaks are not
# checked: Python and PyTorch keep what they allocate at their start.
LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libstdc++.so)"
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0
export PYTHONPATH=build/sanitize
# --capture=sys: a sanitizer writes to the process's stderr and ends it, and pytest's usual capture
# of that file would lose the report.
exec "$python" -m pytest -p no:cacheprovider --capture=sys -k "not cuda" \
  tests/test_layout.py tests/test_large.py tests/test_aliasing.py tests/test_overlap.py \
  tests/test_errors.py tests/test_sanitizer.py tests/test_unusual_tensors.py \
  tests/test_fast_path_aside.py tests/test_states.py tests/test_states_aliasing.py \
  tests/test_states_overlap.py tests/test_states_errors.py tests/test_states_unusual_tensors.py \
  tests/test_states_update.py tests/test_states_update_index.py tests/test_states_gradients.py
