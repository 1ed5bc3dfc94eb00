#!/bin/sh
# Builds the CPU path under AddressSanitizer and UBSan, beside the normal build,
# and runs the layout, alias and error tests on it, and the planted errors that it must see.
set -eu
cd "$(dirname "$0")/.."
python=$1
export MERGE_ATTN_STATES_SANITIZE=1
scripts/build.sh "$python" build --build-lib build/sanitize
compiler=${CXX:-c++}
# Both: with libasan alone the process aborts at the first C++ exception. No leak check: Python
# and PyTorch keep what they allocate at start.
LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libstdc++.so)"
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0
export PYTHONPATH=build/sanitize
# --capture=sys: a report ends the process and is written past Python, where pytest would swallow it.
exec "$python" -m pytest -p no:cacheprovider --capture=sys -k "not cuda" \
  tests/test_layout.py tests/test_large.py tests/test_aliasing.py tests/test_overlap.py \
  tests/test_errors.py tests/test_sanitizer.py tests/test_unusual_tensors.py \
  tests/test_fast_path_aside.py
