"""What the plugin leaves alone, on a package in vLLM's place."""

import logging
import sys

import pytest
import torch

import merge_attn_states_vllm
from in_vllm import standin
from in_vllm.standin import PATHS
from merge_attn_states.integrations import vllm as plugin

UNKNOWN = {
    "too few": "output, prefix_output, prefix_lse, suffix_output, suffix_lse",
    "too many": standin.parameters(9),
    "another order": "output, output_lse, prefix_output, prefix_lse, suffix_output, suffix_lse",
    "other names": standin.parameters(8).replace("prefix_lse", "prefix_softmax_lse"),
    "by keyword only": standin.parameters(8).replace("output_lse", "*, output_lse"),
    "another default": standin.parameters(8).replace("context=None", "context=0"),
}


def assert_left_alone(stand_in, log, reason):
    before = stand_in.early_backend.merge_attn_states, stand_in._custom_ops.merge_attn_states
    for _ in range(2):
        merge_attn_states_vllm.register()
    assert before[0] is stand_in.early_backend.merge_attn_states
    assert before[1] is stand_in._custom_ops.merge_attn_states
    (said,) = log(logging.WARNING)
    assert said.startswith("merge_attn_states is not used, vLLM merges as before: ")
    assert reason in said
    assert log(logging.INFO) == []
    state = plugin.status()
    assert not state.active
    assert reason in state.reason


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_shape_is_left_alone(kind, vllm, log):
    assert_left_alone(vllm(signature=UNKNOWN[kind]), log, "is called otherwise: output, ")


def test_an_unknown_place_is_left_alone(vllm, log):
    assert_left_alone(vllm(path="vllm.somewhere.else_"), log, "this vLLM has neither vllm.v1.")


def test_a_missing_name_is_left_alone(vllm, log):
    stand_in = vllm()
    del stand_in._custom_ops.merge_attn_states
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_in._custom_ops, "merge_attn_states", None, raising=False)
        assert_left_alone(stand_in, log, "TypeError: None is not a callable object")


def test_without_the_ops_module_it_is_left_alone(vllm, log, monkeypatch):
    stand_in = vllm()
    before = stand_in.early_backend.merge_attn_states
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", None)
    merge_attn_states_vllm.register()
    (said,) = log(logging.WARNING)
    assert "vllm._custom_ops" in said
    assert stand_in.early_backend.merge_attn_states is before


def test_a_broken_vllm_is_left_alone(vllm, log, tmp_path):
    stand_in = vllm()
    path = tmp_path / PATHS[0].replace(".", "/") / "merge_attn_states.py"
    path.write_text("import a_module_that_vllm_needs\n")
    merge_attn_states_vllm.register()
    assert "No module named 'a_module_that_vllm_needs'" in log(logging.WARNING)[0]
    assert "merge_attn_states" in dir(stand_in._custom_ops)


def test_rocm_is_left_alone(vllm, log, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0", raising=False)
    assert_left_alone(vllm(), log, "is a ROCm build")


def test_another_platform_is_left_alone(vllm, log):
    class Platform:
        device_type = "xpu"

    stand_in = vllm()
    stand_in.dispatcher.current_platform = Platform()
    assert_left_alone(stand_in, log, "vLLM's platform here is xpu")


def test_a_build_without_kernels_is_left_alone(vllm, log, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(plugin, "build_info", lambda: {"cuda": None})
    assert_left_alone(vllm(), log, "has no CUDA kernels")


def test_without_vllm_nothing_happens(monkeypatch, log):
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(plugin, "_version", lambda: None)
    merge_attn_states_vllm.register()
    assert "vLLM is not installed" in log(logging.WARNING)[0]
