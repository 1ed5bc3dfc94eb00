"""The plugin's own logic, on a package in vLLM's place."""

import importlib
import importlib.metadata
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
from support import BF16, F32, check, make_call

import merge_attn_states_vllm
from in_vllm import standin
from in_vllm.standin import NAMES, PATHS, refused
from merge_attn_states import UnavailableError
from merge_attn_states.integrations import vllm as plugin

OLD, NEW = PATHS[1], PATHS[0]
SHAPES = [(6, OLD), (7, OLD), (7, NEW), (8, OLD), (8, NEW)]


@pytest.mark.parametrize(("count", "path"), SHAPES)
def test_every_caller_merges_through_this_package(count, path, vllm, log):
    stand_in = vllm(count, path)
    early = stand_in.early_backend  # bound the function before the plugin ran
    merge_attn_states_vllm.register()
    late = stand_in.late_backend
    callers = [
        early.by_position,
        late.by_position,
        early.under_another_name,
        stand_in.dispatcher.merge_attn_states,
        stand_in._custom_ops.merge_attn_states,
    ]
    for call in callers:
        for given in range(6, count + 1):
            operands = make_call((5, 3, 64), BF16, count=4 if given > 6 else None)
            check(operands, lambda *args, call=call, given=given: call(*args[:given]))
    for backend in (early, late):
        operands = make_call((5, 3, 64), BF16)
        named = dict(zip(NAMES[:count], operands, strict=False))
        check(operands, lambda *_, backend=backend, named=named: backend.by_keyword(**named))
    assert stand_in.calls == (0, 0)
    state = plugin.status()
    assert state.active
    assert state.vllm == standin.VERSION
    assert state.replaced == sorted(
        [f"vllm.{name}_backend.{attribute}" for name in ("early", "late")
         for attribute in ("merge_attn_states", "under_another_name")]
        + [f"{path}.merge_attn_states.merge_attn_states", "vllm._custom_ops.merge_attn_states"]
    )  # fmt: skip
    assert state.fallbacks == {}
    assert log(logging.WARNING) == []
    (said,) = log(logging.INFO)
    assert f"vLLM {standin.VERSION}: replaced " in said
    assert "vllm.early_backend.merge_attn_states" in said


def test_restore_gives_everything_back(vllm):
    stand_in = vllm()
    originals = stand_in.early_backend.merge_attn_states, stand_in._custom_ops.merge_attn_states
    plugin.register()
    assert stand_in.late_backend.merge_attn_states is stand_in.early_backend.merge_attn_states
    assert stand_in.late_backend.merge_attn_states is not originals[0]
    plugin.restore()
    dispatcher = stand_in.dispatcher.merge_attn_states
    for holder in (stand_in.early_backend, stand_in.late_backend):  # one bound it after the plugin
        assert holder.merge_attn_states is originals[0] is dispatcher
        assert holder.under_another_name is originals[0]
    assert stand_in._custom_ops.merge_attn_states is originals[1]
    why = "restore() was called"
    assert plugin.status() == (False, why, standin.VERSION, [], {}, why, [])
    plugin.register()
    check(make_call((5, 3, 64), F32), stand_in.late_backend.by_position)


def test_a_second_time_changes_nothing(vllm, log):
    stand_in = vllm()
    plugin.register()
    first = stand_in.dispatcher.merge_attn_states
    merge_attn_states_vllm.register()
    assert stand_in.dispatcher.merge_attn_states is first
    assert len(log(logging.INFO)) == 1
    importlib.reload(stand_in.dispatcher)  # vLLM's own again
    assert stand_in.dispatcher.merge_attn_states is not first
    plugin.register()
    check(make_call((5, 3, 64), F32), stand_in.dispatcher.merge_attn_states)
    assert stand_in.calls == (0, 0)


@pytest.mark.parametrize("count", [6, 7, 8])
def test_what_is_refused_goes_to_vllms_own(count, vllm, log):
    stand_in = vllm(count)
    plugin.register()
    for tokens in (5, 6, 5):
        operands = refused(tokens, count)
        stand_in.early_backend.by_position(*operands)
        assert (operands[0] == 7).all()
        seen = stand_in.dispatcher.calls[-1]
        assert len(seen) == count
        assert all(one is other for one, other in zip(seen, operands, strict=True))
    assert stand_in.calls == (3, 3)
    (said,) = log(logging.WARNING)  # once for the reason, whatever the sizes
    assert "prefix_lse: expected float32" in said
    assert "vLLM's own vllm.v1.attention.ops.merge_attn_states" in said
    assert list(plugin.status().fallbacks.values()) == [3]
    for other in (
        make_call((5, 4, 64), F32)._replace(suffix_lse=torch.zeros(3, 3)),
        make_call((5, 4, 64), F32)._replace(prefix_lse=torch.zeros(4, 5, dtype=torch.float64)),
    ):  # another shape, another dtype: other reasons
        stand_in.early_backend.by_position(*other[:count])
    assert len(log(logging.WARNING)) == 3


def test_the_op_alone_falls_back_too(vllm, log):
    stand_in = vllm()
    plugin.register()
    stand_in._custom_ops.merge_attn_states(*refused())
    assert stand_in.calls == (0, 1)
    assert "vLLM's own vllm._custom_ops" in log(logging.WARNING)[0]


def test_what_both_refuse_raises_both_reasons(vllm):
    stand_in = vllm()
    plugin.register()
    for _ in range(2):  # the state of the first failure is gone
        with pytest.raises(RuntimeError, match="vLLM's own refuses this too") as caught:
            stand_in.early_backend.by_position(*refused(13))
        assert "prefix_lse: expected float32" in str(caught.value.__context__)
    assert list(plugin.status().fallbacks.values()) == [2]


def test_threads_count_every_fallback(vllm, log, monkeypatch):
    stand_in = vllm()
    plugin.register()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: stand_in.early_backend.by_position(*refused()), range(2000)))
    finally:
        sys.setswitchinterval(interval)
    assert list(plugin.status().fallbacks.values()) == [2000]
    assert len(log(logging.WARNING)) == 1


@pytest.mark.parametrize(("count", "option", "named"), [
    (6, {"prefill_tokens_with_context": 2}, "prefix_lse"),
    (7, {"output_scale": torch.ones(1)}, "output_scale"),
])  # fmt: skip
def test_an_option_that_vllms_own_lacks_is_not_dropped(count, option, named, vllm):
    stand_in = vllm(count)
    plugin.register()
    with pytest.raises(ValueError, match=rf"^{named}: expected "):
        stand_in.early_backend.by_keyword(**dict(zip(NAMES, refused(), strict=True)) | option)
    assert stand_in.calls == (0, 0)


def test_a_module_that_refuses_changes_is_changed_too(vllm):
    class Closed(ModuleType):
        def __setattr__(self, name, value):
            raise AttributeError(f"no {name} here")

    stand_in = vllm()
    closed = Closed("a_closed_one")
    for name in ("merge", "with.a.dot"):
        closed.__dict__[name] = stand_in.early_backend.merge_attn_states
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "a_closed_one", closed)
        plugin.register()
        assert (
            closed.merge is closed.__dict__["with.a.dot"] is stand_in.dispatcher.merge_attn_states
        )
        plugin.restore()
        assert (
            closed.merge is closed.__dict__["with.a.dot"] is stand_in.dispatcher.merge_attn_states
        )


def test_threads_replace_it_once(vllm, log):
    stand_in = vllm()
    stand_in.early_backend  # noqa: B018  loads it
    stand_in._custom_ops  # noqa: B018
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: merge_attn_states_vllm.register(), range(8)))
    assert len(log(logging.INFO)) == 1
    assert len(plugin._replacements) == 2


def test_vllm_gets_all_back_where_no_kernel_runs(vllm, log, monkeypatch):
    """A GPU that this build has no code for is seen at the first call, not at the start."""
    stand_in = vllm()
    originals = stand_in.early_backend.merge_attn_states, stand_in._custom_ops.merge_attn_states
    plugin.register()

    def unavailable(*_):
        raise UnavailableError("cuda:0 has 7.5, and this build of merge_attn_states holds 8.0")

    monkeypatch.setattr(plugin, "_merge", unavailable)
    operands = make_call((5, 3, 64), F32)
    held = stand_in.early_backend.merge_attn_states  # by an object, which nobody looks through
    stand_in.early_backend.by_position(*operands)
    assert (operands.output == 7).all()  # vLLM's own answer
    operands.output.zero_()
    held(*operands)
    assert (operands.output == 7).all()
    assert stand_in.early_backend.merge_attn_states is originals[0]
    assert stand_in._custom_ops.merge_attn_states is originals[1]
    stand_in.early_backend.by_position(*operands)
    (said,) = log(logging.WARNING)
    assert "cannot run here, vLLM merges as before: cuda:0 has 7.5, and this build" in said
    state = plugin.status()
    assert not state.active
    assert state.reason.startswith("UnavailableError: cuda:0 has 7.5")
    plugin.register()  # for good
    assert plugin.status() == state
    assert len(log(logging.WARNING)) == 1


def test_the_operators_errors_get_their_type_from_the_function(monkeypatch):
    def failing(*_):
        raise RuntimeError("the operator has no other type")

    def unavailable(*_):
        raise UnavailableError("no kernel")

    monkeypatch.setattr(torch.ops.merge_attn_states, "merge_attn_states", failing)
    monkeypatch.setattr(plugin, "merge_attn_states", unavailable)
    with pytest.raises(UnavailableError, match="no kernel"):
        plugin._merge_by_operator(*make_call((5, 3, 64), F32))


def test_an_error_that_cuda_has_at_the_moment_is_of_one_call(vllm, log, monkeypatch):
    stand_in = vllm()
    plugin.register()
    merge = plugin._merge

    def failing(*_):
        raise RuntimeError("cuda:0: operation failed in this build of merge_attn_states")

    monkeypatch.setattr(plugin, "_merge", failing)
    stand_in.early_backend.by_position(*make_call((5, 3, 64), F32))
    monkeypatch.setattr(plugin, "_merge", merge)
    assert stand_in.calls == (1, 1)
    check(make_call((5, 3, 64), F32), stand_in.early_backend.by_position)
    assert plugin.status().active
    assert len(log(logging.WARNING)) == 1


def test_what_is_replaced_stays_so_where_vllm_changes_underneath(vllm, log, monkeypatch):
    stand_in = vllm()
    plugin.register()
    ours = stand_in.early_backend.merge_attn_states
    monkeypatch.setattr(stand_in._custom_ops, "merge_attn_states", lambda output: None)
    for _ in range(2):
        plugin.register()
    (said,) = log(logging.WARNING)
    assert said.startswith("merge_attn_states replaces nothing that is new in vLLM: LookupError")
    state = plugin.status()
    assert (state.active, state.reason) == (True, "")
    assert stand_in.early_backend.merge_attn_states is ours
    check(make_call((5, 3, 64), F32), stand_in.early_backend.by_position)


def test_taken_off_later_it_touches_nothing_more(vllm, monkeypatch):
    stand_in = vllm()
    plugin.register()
    original = stand_in.early_backend.merge_attn_states.__wrapped__
    monkeypatch.setattr(stand_in.late_backend, "under_another_name", original)
    monkeypatch.setenv("MERGE_ATTN_STATES_VLLM", "0")
    plugin.register()
    assert stand_in.late_backend.under_another_name is original


def test_a_swap_that_fails_can_be_taken_back(vllm, log, monkeypatch):
    stand_in = vllm()
    original = stand_in.early_backend.merge_attn_states
    stand_in._custom_ops  # noqa: B018  loads it
    swap = plugin._swap

    def failing(*how):
        swap(*how)
        raise OSError("halfway")

    monkeypatch.setattr(plugin, "_swap", failing)
    plugin.register()
    assert len(log(logging.WARNING)) == 1
    monkeypatch.setattr(plugin, "_swap", swap)
    plugin.restore()
    assert stand_in.early_backend.merge_attn_states is original


def test_modules_that_are_none_are_passed_over(vllm, monkeypatch):
    """Some programs put other things than modules into sys.modules, or modules that load late."""

    class LoadsWhenLookedAt(ModuleType):
        def __getattribute__(self, name):
            raise AssertionError(f"looked at {name}")

    class SaysItIsOne:
        @property
        def __class__(self):
            raise RuntimeError("no class")

    monkeypatch.setitem(sys.modules, "a_stranger", object())
    monkeypatch.setitem(sys.modules, "a_mock", MagicMock(spec=ModuleType))
    monkeypatch.setitem(sys.modules, "a_proxy", SaysItIsOne())
    monkeypatch.setitem(sys.modules, "a_lazy_one", LoadsWhenLookedAt("a_lazy_one"))
    stand_in = vllm()
    plugin.register()
    check(make_call((5, 3, 64), F32), stand_in.early_backend.by_position)
    assert plugin.status().active
    plugin.restore()
    assert len(plugin._replacements) == 0
