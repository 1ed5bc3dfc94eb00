#!/bin/sh
# Runs the plugin's tests in the real vLLM, a process for each release, with the interpreter $1:
# on its GPU, or on the CPU, which 0.33.0 then takes for its platform.
# tests/in_vllm/packages.py fetches the releases.
set -eu
cd "$(dirname "$0")/.."
python=$1
PYTHONPATH=tests "$python" -m in_vllm.packages
"$python" -c "import merge_attn_states" 2> /dev/null || {
  scripts/build.sh "$python"
  export PYTHONPATH="python${PYTHONPATH:+:$PYTHONPATH}"
}
"$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())" || {
  echo "merge_attn_states: no GPU here, so the CPU's part is tested"
  export VLLM_TARGET_DEVICE=cpu
}
for release in 0.33.0 0.26.0; do
  echo "== vLLM $release"
  PYTHONPATH=".cache/vllm/$release:.cache/vllm/needs${PYTHONPATH:+:$PYTHONPATH}" \
    "$python" -m pytest -p no:cacheprovider -q ${PYTEST:-} tests/in_vllm/test_vllm.py \
    tests/in_vllm/test_vllm_ranks.py
done
