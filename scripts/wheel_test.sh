#!/bin/sh
# Builds the sdist and from it the wheel with the interpreter $1, installs the wheel into a fresh
# environment of the interpreter $2, outside the checkout, and tests it there. Unlike a release, the
# wheel has the GPU code that TORCH_CUDA_ARCH_LIST asks for.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$1" scripts/release_wheel.py --trial --outdir "$work/dist"
"$2" scripts/environment.py "$work/venv" --extra test ${TORCH:+--torch "$TORCH"}
"$work/venv/bin/python" -m pip install -qq --no-index --no-deps --force-reinstall "$work"/dist/*.whl
cd "$work"
"$work/venv/bin/python" - << CHECK
import merge_attn_states
assert merge_attn_states.__file__.startswith("$work"), merge_attn_states.__file__
CHECK
"$work/venv/bin/python" -m merge_attn_states info
"$work/venv/bin/python" -m pytest -p no:cacheprovider --rootdir "$root" -c "$root/pyproject.toml" \
  "$root/tests/test_binary.py" "$root/tests/test_library.py" "$root/tests/test_errors.py"
