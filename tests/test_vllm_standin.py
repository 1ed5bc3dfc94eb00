"""The plugin's own logic, on a package in vLLM's place."""

import importlib
import importlib.metadata
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
import vllm_standin
from support import BF16, F32, check, compare, make_call
from vllm_standin import NAMES, PATHS

import merge_attn_states
import merge_attn_states_vllm
from merge_attn_states import _info
from merge_attn_states.integrations import vllm as plugin

OLD, NEW = PATHS[1], PATHS[0]
SHAPES = [(6, OLD), (7, OLD), (7, NEW), (8, OLD), (8, NEW)]


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "vllm.merge_attn_states")

    def texts(level):
        return [record.message for record in caplog.records if record.levelno == level]

    return texts


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
    assert state.vllm == vllm_standin.VERSION
    assert state.replaced == sorted(
        [f"vllm.{name}_backend.{attribute}" for name in ("early", "late")
         for attribute in ("merge_attn_states", "under_another_name")]
        + [f"{path}.merge_attn_states.merge_attn_states", "vllm._custom_ops.merge_attn_states"]
    )  # fmt: skip
    assert state.fallbacks == {}
    assert log(logging.WARNING) == []
    (said,) = log(logging.INFO)
    assert f"vLLM {vllm_standin.VERSION}: replaced " in said
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
    assert plugin.status() == (False, "restore() was called", vllm_standin.VERSION, [], {})
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


def refused(tokens=5, count=8):
    """Operands that this package refuses and vLLM's own function may take."""
    operands = make_call((tokens, 3, 64), F32)
    return operands._replace(prefix_lse=operands.prefix_lse.to(BF16))[:count]


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


@pytest.mark.parametrize(("count", "option"), [(6, {"prefill_tokens_with_context": 2}),
                                               (7, {"output_scale": torch.ones(1)})])  # fmt: skip
def test_an_option_that_vllms_own_lacks_is_not_dropped(count, option, vllm):
    stand_in = vllm(count)
    plugin.register()
    with pytest.raises(ValueError, match=r"^(prefix_lse|output_scale): "):
        stand_in.early_backend.by_keyword(**dict(zip(NAMES, refused(), strict=True)) | option)
    assert stand_in.calls == (0, 0)


UNKNOWN = {
    "too few": "output, prefix_output, prefix_lse, suffix_output, suffix_lse",
    "too many": vllm_standin.parameters(9),
    "another order": "output, output_lse, prefix_output, prefix_lse, suffix_output, suffix_lse",
    "other names": vllm_standin.parameters(8).replace("prefix_lse", "prefix_softmax_lse"),
    "by keyword only": vllm_standin.parameters(8).replace("output_lse", "*, output_lse"),
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
    assert_left_alone(vllm(signature=UNKNOWN[kind]), log, "has other parameters: output, ")


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
    path = tmp_path / NEW.replace(".", "/") / "merge_attn_states.py"
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


def test_vllm_gets_all_back_where_no_kernel_runs(vllm, log, monkeypatch):
    """A GPU that this build has no code for is seen at the first call, not at the start."""
    stand_in = vllm()
    originals = stand_in.early_backend.merge_attn_states, stand_in._custom_ops.merge_attn_states
    plugin.register()

    def unavailable(*_):
        raise RuntimeError("merge_attn_states: no kernel for this GPU")

    monkeypatch.setattr(plugin, "_merge", unavailable)
    operands = make_call((5, 3, 64), F32)
    stand_in.early_backend.by_position(*operands)
    assert (operands.output == 7).all()  # vLLM's own answer
    assert stand_in.early_backend.merge_attn_states is originals[0]
    assert stand_in._custom_ops.merge_attn_states is originals[1]
    stand_in.early_backend.by_position(*operands)
    (said,) = log(logging.WARNING)
    assert "cannot run here, vLLM merges as before: merge_attn_states: no kernel" in said
    state = plugin.status()
    assert not state.active
    assert state.reason == "RuntimeError: merge_attn_states: no kernel for this GPU"


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


# A process of its own: what a plugin must not do.

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


def process(folder, environment, before="", **variables):
    vllm_standin.write(folder)
    return subprocess.run(
        [sys.executable, "-c", PROCESS.format(folder=str(folder), before=before)],
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
assert plugin._merge is torch.ops.merge_attn_states.merge_attn_states
check(make_call((5, 3, 64), F32), early_backend.by_position)
wrong = make_call((5, 3, 64), F32)._replace(prefix_lse=torch.zeros(3, 3))
early_backend.by_position(*wrong)
print(plugin.status().active, *plugin.status().fallbacks)
"""


def test_without_the_fast_path_it_goes_straight_to_the_op(tmp_path, child_environment):
    vllm_standin.write(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", NO_FAST_PATH.format(folder=str(tmp_path))],
        env=child_environment | {"MERGE_ATTN_STATES_FAST_PATH": "0"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("True ValueError: prefix_lse: expected shape ")


def test_an_old_pytorch_gets_one_warning(tmp_path, child_environment):
    said = process(tmp_path, child_environment, "torch.__version__ = '2.10.1+cu130'")
    (warning,) = (line for line in said if line.startswith("LOG"))
    assert warning == (
        "LOG merge_attn_states is not used, vLLM merges as before: merge_attn_states needs PyTorch "
        "2.11 or newer, and this is 2.10.1+cu130: upgrade torch."
    )


# Under torch.compile, and what users see.


def test_compiled_code_traces_it_whole(vllm):
    stand_in = vllm()
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
    with pytest.raises(Exception, match="prefix_lse: expected float32"):
        merge(*refused())
    assert stand_in.calls == (0, 0)


def test_info_says_what_is_replaced(vllm, monkeypatch):
    vllm()
    monkeypatch.setattr(_info, "_why_not_in_vllm", lambda: "")
    (line,) = (line for line in _info.lines() if line.startswith("vllm "))
    assert f"yes, {vllm_standin.VERSION}: replaces vllm._custom_ops.merge_attn_states, " in line


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
