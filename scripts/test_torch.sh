#!/bin/sh
# Runs the suite with the interpreter $1, which has PyTorch $2, against the op library $3, which was
# built for another release: only _C is built. Options behind them go to pytest_parts.sh.
#
# The build has a copy of the sources: in the checkout it would replace the binaries that lie there.
set -eu
cd "$(dirname "$0")/.."
python=$1 release=$2 op_library=$(realpath "$3")
shift 3
"$python" - << CHECK
import torch
found = torch.__version__.partition("+")[0]
if found != "$release":
    raise SystemExit(f"merge_attn_states: $python has PyTorch {found}, not $release.")
CHECK
copy=$PWD/build/torch-$release
rm -rf "$copy"
mkdir -p "$copy"
cp -R csrc include python scripts setup.py pyproject.toml README.md LICENSE "$copy"
rm -f "$copy"/python/merge_attn_states/*.so
MERGE_ATTN_STATES_OP_LIBRARY=$op_library "$copy/scripts/build.sh" "$python"
PYTHONPATH=$copy/python exec scripts/pytest_parts.sh "$python" "$@"
