"""The plugin in a process of its own, under torch.compile and CUDA graphs, and what `info` says."""

import importlib
import importlib.metadata
import logging
import subprocess
import sys

import pytest
import torch
from support import BF16, F32, OPERATOR_ERROR, check, compare, make_call

import merge_attn_states
import merge_attn_states_vllm
from in_vllm import standin
from in_vllm.standin import refused
from merge_attn_states import _info
from merge_attn_states.integrations import vllm as plugin

PROCESS = """
import logging, sys
sys.path.insert(0, {folder!r})
logging.basicConfig(format="LOG %(message)s", level=logging.INFO, stream=sys.stdout)
import torch, vllm
{before}
known = set(sys.modules)
import merge_attn_states_vllm
merge_attn_states_vllm.register()
merge_attn_states_vllm.register()
new = {{name.partition(".")[0] for name in set(sys.modules) - known}}
print(sorted(new - set(sys.stdlib_module_names) - {{"vllm"}}))
print(torch.cuda.is_initialized())
"""


def process(folder, environment, before="", code=PROCESS, **variables):
    standin.write(folder)
    return subprocess.run(
        [sys.executable, "-c", code.format(folder=str(folder), before=before)],
        env=environment | variables, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip


def test_it_imports_little_and_does_not_initialise_cuda(tmp_path, child_environment):
    said, new, initialised = process(tmp_path, child_environment)
    assert said.startswith("LOG merge_attn_states ")
    assert new == "['merge_attn_states', 'merge_attn_states_vllm']"
    assert initialised == "False"


@pytest.mark.parametrize("off", ["0", "false", "OFF", "no"])
def test_it_is_taken_off_by_one_variable(off, tmp_path, child_environment):
    new, _ = process(tmp_path, child_environment, MERGE_ATTN_STATES_VLLM=off)
    assert new == "['merge_attn_states_vllm']"


def test_the_switch_is_what_status_tells(vllm, log, monkeypatch):
    vllm()
    monkeypatch.setenv("MERGE_ATTN_STATES_VLLM", "0")
    monkeypatch.setattr(plugin, "_reason", None)
    for call in (merge_attn_states_vllm.register, plugin.register):
        call()
        assert plugin.status().reason == "MERGE_ATTN_STATES_VLLM takes it off"
    assert log(logging.WARNING) == []  # who sets it knows


NO_FAST_PATH = """
import sys
sys.path.insert(0, {folder!r})
import torch, merge_attn_states_vllm
from support import F32, check, make_call
from vllm import early_backend
merge_attn_states_vllm.register()
from merge_attn_states.integrations import vllm as plugin
assert plugin._merge is plugin._merge_by_operator
check(make_call((5, 3, 64), F32), early_backend.by_position)
wrong = make_call((5, 3, 64), F32)._replace(prefix_lse=torch.zeros(3, 3))
early_backend.by_position(*wrong)
print(plugin.status().active, *plugin.status().fallbacks)
"""


def test_without_the_fast_path_it_goes_straight_to_the_op(tmp_path, child_environment):
    (said,) = process(
        tmp_path, child_environment, code=NO_FAST_PATH, MERGE_ATTN_STATES_FAST_PATH="0"
    )
    assert said.startswith("True ValueError: prefix_lse: expected shape ")


def test_an_old_pytorch_gets_one_warning(tmp_path, child_environment):
    said = process(tmp_path, child_environment, "torch.__version__ = '2.10.1+cu130'")
    (warning,) = (line for line in said if line.startswith("LOG"))
    assert warning == (
        "LOG merge_attn_states is not used, vLLM merges as before: merge_attn_states needs PyTorch "
        "2.11 or newer, and this is 2.10.1+cu130: upgrade torch."
    )


# Under torch.compile, and what users see.


@pytest.mark.parametrize("way", ["merge_attn_states", "_merge_by_operator"])
def test_compiled_code_traces_it_whole(way, vllm, monkeypatch):
    stand_in = vllm()
    monkeypatch.setattr(plugin, "_merge", getattr(plugin, way))
    plugin.register()
    merge = torch.compile(stand_in.early_backend.by_position, fullgraph=True, backend="eager")
    check(make_call((5, 3, 64), F32, empty=False), merge)
    assert stand_in.calls == (0, 0)


def test_a_cuda_graph_around_a_backend(vllm, cuda):
    """Captured as vLLM captures a whole step, and replayed with new contents, in place too."""
    stand_in = vllm()
    plugin.register()
    operands = check(make_call((33, 4, 128), BF16, cuda), stand_in.early_backend.by_position)
    in_place = operands._replace(output=operands.suffix_output, output_lse=operands.suffix_lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stand_in.early_backend.by_position(*in_place)
    for seed in (1, 2):
        fresh = make_call((33, 4, 128), BF16, cuda, seed=seed)
        for old, new in zip(in_place[1:5], fresh[1:5], strict=True):
            old.copy_(new)
        graph.replay()
        compare(fresh, in_place.output, in_place.output_lse)
    assert stand_in.calls == (0, 0)


def test_compiled_code_has_no_fallback(vllm):
    stand_in = vllm()
    plugin.register()
    merge = torch.compile(stand_in.early_backend.by_position, backend="eager")
    with pytest.raises(OPERATOR_ERROR, match="prefix_lse: expected float32"):
        merge(*refused())
    assert stand_in.calls == (0, 0)


def test_info_says_what_is_replaced(vllm, monkeypatch):
    vllm()
    monkeypatch.setattr(_info, "_why_not_in_vllm", lambda: "")
    (line,) = (line for line in _info.lines() if line.startswith("vllm "))
    assert f"yes, {standin.VERSION}: replaces vllm._custom_ops.merge_attn_states, " in line


def test_info_knows_where_no_kernel_would_run(vllm, monkeypatch):
    """The plugin itself learns it from the first merge."""
    vllm()
    no_code = "no: cuda:0 has compute capability 7.5, for which this build holds no code"
    for name, value in {
        "_why_not_in_vllm": lambda: "", "_why_no_cuda": lambda *_: no_code,
        "_device_count": lambda: 1, "_describe_gpu": str,
    }.items():  # fmt: skip
        monkeypatch.setattr(_info, name, value)
    said = {line[:22].strip(): line[22:] for line in _info.lines()}
    assert said["cuda kernels"] == said["vllm"] == no_code
    assert not plugin.status().active


def test_info_says_why_vllm_does_not_find_it(vllm, monkeypatch):
    vllm()

    class EntryPoints:
        names = frozenset({"merge_attn_states"})

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: EntryPoints)
    assert _info._why_not_in_vllm() == ""
    monkeypatch.setenv("MERGE_ATTN_STATES_VLLM", "0")
    assert _info._why_not_in_vllm() == "no: MERGE_ATTN_STATES_VLLM takes it off"
    monkeypatch.delenv("MERGE_ATTN_STATES_VLLM")
    monkeypatch.setenv("VLLM_PLUGINS", "another,yet_another")
    assert "VLLM_PLUGINS=another,yet_another leaves merge_attn_states out" in (
        _info._why_not_in_vllm()
    )
    monkeypatch.setattr(EntryPoints, "names", frozenset())
    assert "was not installed by pip" in _info._why_not_in_vllm()


def test_the_entry_point_is_installed():
    try:
        importlib.metadata.version("merge-attn-states")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("built in place, not installed: there is no metadata")
    (found,) = (
        point
        for point in importlib.metadata.entry_points(group="vllm.general_plugins")
        if point.name == "merge_attn_states"
    )
    assert found.load() is merge_attn_states_vllm.register
    assert merge_attn_states.__version__ == found.dist.version
