"""Merges across ranks in the real vLLM: its own group of processes, its functions as bound."""

import importlib.util
import os
import sys

import pytest
import ranks_support
import torch

from in_vllm import rank_programs

if importlib.util.find_spec("vllm") is None:
    pytest.skip("no vLLM here: make test-vllm fetches it", allow_module_level=True)


# On GPUs as NCCL has it, or directly.
@pytest.mark.parametrize("where", ["cpu", "cuda", "direct"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_merges(ranks, where, tmp_path, child_environment):
    if where != "cpu" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    paths = filter(None, [child_environment["PYTHONPATH"], *sys.path])
    environment = child_environment | {"PYTHONPATH": os.pathsep.join(paths)}
    environment |= {"MERGE_ATTN_STATES_DIRECT": str(int(where == "direct"))}
    if where == "cpu":
        environment |= {"VLLM_TARGET_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    device = "cpu" if where == "cpu" else "cuda"
    ranks_support.run(rank_programs.merges, ranks, tmp_path, environment, device)
