"""Programmatic dependent launch: off unless asked for, and safe between kernels that never wait."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from support import run_command

FOLDER = Path(__file__).with_name("dependent_launch")
SHAPES = {
    "by rows": (16, 16, 128),
    "by tiles": (1024, 16, 128),
    "beyond the L2": (16384, 16, 128),
    "generic": (64, 16, 126),
}


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory):
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if nvcc is None:
        pytest.skip("no nvcc, which makes the neighbours")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("dependent launch needs compute capability 9.0")
    library = tmp_path_factory.mktemp("neighbours") / "neighbours.so"
    run_command(
        *(nvcc, "-O3", "-std=c++17", "-arch=native", "-shared", "-Xcompiler", "-fPIC"),
        *("-o", library, FOLDER / "neighbours.cu"),
    )
    return library


@pytest.mark.parametrize("wish", ["0", "1"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_neighbours_that_never_wait(shape, wish, neighbours, child_environment):
    """The one before has not written yet when the merge begins; the one behind writes at once."""
    seen = json.loads(
        run_command(
            *(sys.executable, FOLDER / "chain.py", neighbours, *shape),
            **child_environment | {"MERGE_ATTN_STATES_PDL": wish},
        )
    )
    # The producer comes first; behind it the merge, where it is asked for, and the overwriting.
    assert seen["dependent"] == {"0": 1, "1": 2}[wish]
    assert seen["kernel"] == ("generic" if shape[2] == 126 else "vectorized")
    assert (seen["stream"], seen["graph"]) == (0, 0)
