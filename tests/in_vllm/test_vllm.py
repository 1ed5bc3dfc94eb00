"""The plugin in the real vLLM: its own loader, its backends' modules, its dispatcher.

`make test-vllm` runs this once for each release that it knows. Elsewhere it is skipped unless vLLM
can be imported.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from support import BF16, F32, INF, NAN, Call, assert_bits, cloned, compare, make_call

import merge_attn_states_vllm
from benchmarks.operands import Operands
from benchmarks.vllm import DISPATCHER
from in_vllm.dispatcher import OPS, patched, unpatched
from in_vllm.memory import copied
from in_vllm.patterns import PATTERNS
from merge_attn_states.integrations import vllm as plugin
from merge_attn_states.reference import merge_attn_states_reference

if importlib.util.find_spec("vllm") is None:
    pytest.skip("no vLLM here: make test-vllm fetches it", allow_module_level=True)
try:
    VERSION = importlib.metadata.version("vllm")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("vllm is no installed package", allow_module_level=True)

BEFORE = "vllm.v1.attention.backends.flash_attn"  # imported before the plugin runs
AFTER = "vllm.model_executor.layers.attention.mla_attention"
STRANGER = "a_module_of_somebody_else"
TOKENS = (5, 130)  # fewer than a tile's, and several tiles
READS_LSE_STRIDES = VERSION != "0.26.0"  # it takes a row-strided LSE for a contiguous one
IS_CPU = importlib.import_module("vllm.platforms").current_platform.is_cpu()
# What vLLM gets wrong is asserted for the releases that it was seen in: another one may be right.
KNOWN = VERSION in ("0.26.0", "0.33.0")


def backend(name):
    """A backend's module, or why it cannot be had: on CUDA some want libraries of their own."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return str(error)


@pytest.fixture(scope="module")
def modules():
    """Modules that hold the dispatcher, vLLM having loaded its plugins; at the end they go again.

    One bound it before that by `from ... import`, as backends do, and one after.
    """
    made = {"before": backend(BEFORE)}
    stranger = sys.modules[STRANGER] = ModuleType(STRANGER)
    exec(f"from {DISPATCHER} import merge_attn_states as merge", stranger.__dict__)
    if installed():
        plugins = importlib.import_module("vllm.plugins")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_PLUGINS", "merge_attn_states")
            plugins.plugins_loaded = False
            plugins.load_general_plugins()
    else:
        merge_attn_states_vllm.register()
    yield made | {"stranger": stranger, "after": backend(AFTER)}
    plugin.restore()
    del sys.modules[STRANGER]


def installed():
    """Whether vLLM finds the plugin: this package may have been built in place."""
    found = importlib.metadata.entry_points(group="vllm.general_plugins")
    return "merge_attn_states" in found.names


needs_installation = pytest.mark.skipif(
    not installed(), reason="built in place, not installed: there is no metadata"
)


@pytest.fixture
def merge(modules):
    """What a module calls that bound the dispatcher before the plugin ran."""
    return modules["stranger"].merge


def without_plugin(*args):
    """Let vLLM's own functions answer a call."""
    with unpatched() as merge:
        merge(*args)


def run_python(code, environment, *arguments, **variables):
    """A process that finds what this one does."""
    paths = filter(None, [environment["PYTHONPATH"], *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment | variables | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def outcome(merge, operands):
    """What a call raises; None where it is answered."""
    try:
        merge(*operands)
    except Exception as error:
        return error
    return None


# The plugin, as vLLM starts it.


@needs_installation
def test_the_plugin_is_an_entry_point():
    found = importlib.metadata.entry_points(group="vllm.general_plugins")
    assert found["merge_attn_states"].load() is merge_attn_states_vllm.register


def test_the_plugin_is_in_use(modules):
    state = plugin.status()
    assert state.active, state.reason
    assert state.vllm == VERSION
    assert {f"{DISPATCHER}.merge_attn_states", f"{OPS}.merge_attn_states", f"{STRANGER}.merge"} <= (
        set(state.replaced)
    )
    for name in (DISPATCHER, OPS):  # what is behind it is vLLM's own
        original = inspect.unwrap(sys.modules[name].merge_attn_states)
        assert original.__code__.co_filename == sys.modules[name].__file__


@pytest.mark.parametrize(("when", "name"), [("before", BEFORE), ("after", AFTER)])
def test_a_backend_that_was_imported(when, name, modules):
    module = modules[when]
    if isinstance(module, str):
        pytest.skip(module)
    assert f"{name}.merge_attn_states" in plugin.status().replaced
    assert module.merge_attn_states is patched()


def test_restore_and_register_again(modules):
    before = plugin.status().replaced
    ours = patched()
    plugin.restore()
    try:
        holders = [
            m for m in list(sys.modules.values()) if getattr(m, "merge_attn_states", 0) is ours
        ]
        assert holders == []
        assert modules["stranger"].merge is patched() is inspect.unwrap(ours)
    finally:
        merge_attn_states_vllm.register()
    assert plugin.status().replaced == before


PROCESS = """
import logging, sys, torch, vllm.engine.arg_utils, vllm.plugins  # as where vLLM loads plugins
logging.basicConfig(level=logging.INFO)  # 0.33 sets its own up when an engine starts
known = set(sys.modules)
vllm.plugins.load_general_plugins()
new = {name.partition(".")[0] for name in set(sys.modules) - known} - sys.stdlib_module_names
new -= {"vllm", "merge_attn_states", "merge_attn_states_vllm"}
print("NEW", sorted(new - {"torch"}))  # of which 0.33's merges across ranks import more
from merge_attn_states.integrations.vllm import status
print("ACTIVE", status().active, status().reason)
print("CUDA", torch.cuda.is_initialized())
"""


@needs_installation
@pytest.mark.parametrize(("switch", "answer"), [("1", "ACTIVE True "), ("0", "ACTIVE False ")])
def test_a_process_that_vllm_starts(switch, answer, child_environment):
    variables = {"MERGE_ATTN_STATES_VLLM": switch, "VLLM_PLUGINS": "merge_attn_states"}
    ran = run_python(PROCESS, child_environment, **variables)
    assert ran.returncode == 0, ran.stderr
    assert answer in ran.stdout
    assert "CUDA False" in ran.stdout
    assert "NEW []" in ran.stdout  # nothing heavier than vLLM's own modules
    said = f"merges attention states in vLLM {VERSION}: replaced " in ran.stdout + ran.stderr
    assert said == (switch == "1")


# Every way in which a backend calls it.


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_pattern_is_right(pattern, tokens, device, merge, taken):
    operands = pattern.make(tokens, torch.device(device))
    before = cloned(operands)
    pattern.call(merge, operands)
    compare(before, operands.output, operands.output_lse)
    assert taken == [True]  # it merged here: nothing went back to vLLM
    assert plugin.status().fallbacks == {}


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
@pytest.mark.parametrize("tokens", TOKENS)
def test_vllm_gives_the_same_where_it_is_right(pattern, tokens, cuda, merge):
    ours = pattern.make(tokens, torch.device(cuda))
    theirs = copied(ours)
    strided = not ours.prefix_lse.is_contiguous() or not ours.suffix_lse.is_contiguous()
    pattern.call(merge, ours)
    with unpatched() as own:
        pattern.call(own, theirs)
    if strided and not READS_LSE_STRIDES:
        assert not torch.allclose(ours.output.float(), theirs.output.float(), atol=0.1)
        return
    tolerance = torch.finfo(ours.output.dtype).eps  # two roundings of one number
    torch.testing.assert_close(
        theirs.output.float(), ours.output.float(), rtol=tolerance, atol=tolerance / 16
    )
    if ours.output_lse is not None:
        torch.testing.assert_close(theirs.output_lse, ours.output_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_a_graph_of_the_plugins_path(pattern, cuda, merge):
    """Captured once, replayed with new contents."""
    operands = pattern.make(130, torch.device(cuda))
    pattern.call(merge, copied(operands))  # whatever happens once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pattern.call(merge, operands)
    for _ in range(2):
        fresh = pattern.make(130, torch.device(cuda))
        for old, new in zip(operands, fresh, strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(new)
        graph.replay()
        compare(cloned(fresh), operands.output, operands.output_lse)


# The dispatcher's branch for a CPU.


@pytest.mark.skipif(not IS_CPU, reason=f"vLLM {VERSION} takes this machine for no CPU platform")
def test_the_cpu_branch_runs_this_packages_kernel(merge, taken):
    call = make_call((9, 4, 64), BF16)
    before = cloned(call)
    merge(*call)
    compare(before, call.output, call.output_lse)
    assert taken == [True]
    ours = make_call((9, 4, 64), BF16, empty=False)
    ours.prefix_lse[:, 4], ours.suffix_lse[:, 4] = -INF, -INF
    theirs = cloned(ours)
    without_plugin(*theirs)
    merge(*ours)
    torch.testing.assert_close(theirs.output, ours.output, rtol=2**-7, atol=2**-9)
    assert (theirs.output[4] == 0).all()


@pytest.mark.skipif(not IS_CPU or VERSION == "0.26.0", reason="no version for a CPU here")
def test_what_the_cpu_version_does_otherwise(merge):
    call = make_call((9, 4, 64), BF16, count=6, empty=False)
    call.suffix_lse[:, 7], call.suffix_lse[:, 8] = INF, -INF
    call.suffix_lse[:, 2] = -INF
    call.suffix_output[2] = NAN
    before, theirs = cloned(call), copied(Operands(*call))
    merge(*call)
    compare(before, call.output, call.output_lse)
    assert (call.output_lse[:, 7] == INF).all()  # raw
    without_plugin(*theirs)
    if KNOWN:
        assert (theirs.output_lse[:, 7] == -INF).all()
        assert theirs.output[2].isnan().all()

    call = make_call((9, 4, 64), BF16)
    call = call._replace(prefix_output=padded(call.prefix_output, 96))
    before = cloned(call)
    merge(*call)
    compare(before, call.output, call.output_lse)
    fp8 = make_call((9, 4, 64), BF16, output_dtype=torch.float8_e4m3fn, scale=0.5)
    before = cloned(fp8)
    merge(*fp8)
    compare(before, fp8.output, fp8.output_lse)
    if KNOWN:
        assert isinstance(outcome(without_plugin, call), AssertionError)
        assert isinstance(outcome(without_plugin, fp8), AssertionError)


@pytest.mark.skipif(VERSION != "0.26.0", reason="of 0.26.0 alone")
def test_without_a_cpu_branch_there_is_an_error_there(merge):
    call = make_call((9, 4, 64), BF16)
    assert isinstance(outcome(without_plugin, call), Exception)  # Triton's or the CUDA op's


# What vLLM's own kernel gets wrong, and this one right.


def both_answers(call):
    """The plugin's output and vLLM's own for one call, and the operands as they were."""
    before, theirs = cloned(call), copied(Operands(*call))
    patched()(*call)
    compare(before, call.output, call.output_lse)
    without_plugin(*theirs)
    return call, theirs


@pytest.mark.parametrize("empty", [-INF, INF])
@pytest.mark.parametrize("side", ["prefix", "suffix"])
def test_an_empty_side_leaks_nan_there(side, empty, modules, cuda):
    call = make_call((33, 4, 128), BF16, cuda, empty=False)
    getattr(call, f"{side}_lse")[:, 7] = empty
    getattr(call, f"{side}_output")[7] = NAN
    _, theirs = both_answers(call)
    if KNOWN:
        assert theirs.output[7].isnan().all()


def test_both_empty_copies_the_prefix_there(modules, cuda):
    call = make_call((33, 4, 128), BF16, cuda, empty=False)
    call.prefix_lse[:, 7], call.suffix_lse[:, 7] = -INF, -INF
    ours, theirs = both_answers(call)
    assert (ours.output[7] == 0).all()
    assert (ours.output_lse[:, 7] == -INF).all()
    if KNOWN:
        assert_bits(theirs.output[7], call.prefix_output[7])


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_what_goes_to_triton_there(pattern, modules, cuda, monkeypatch):
    """And there zeros come of two empty parts."""

    def refuse(*_):
        raise NotImplementedError("the CUDA op")

    operands = pattern.make(9, torch.device(cuda))
    if pattern.goes_to_triton:
        for part in (operands.prefix_lse, operands.suffix_lse):
            part[:, 4] = -INF
    with unpatched() as own:
        monkeypatch.setattr(sys.modules[OPS], "merge_attn_states", refuse)
        if pattern.goes_to_triton:
            pattern.call(own, operands)
            assert (operands.output[4].float() == 0).all()
        else:
            with pytest.raises(NotImplementedError, match="the CUDA op"):
                pattern.call(own, operands)


def test_the_raw_lse_past_the_count_is_the_same(modules, cuda):
    call = make_call((33, 4, 128), BF16, cuda, count=20, empty=False)
    call.suffix_lse[:, 25], call.suffix_lse[:, 26] = INF, -INF
    ours, theirs = both_answers(call)
    assert_bits(ours.output_lse[:, 20:], call.suffix_lse[:, 20:])
    assert_bits(theirs.output_lse[:, 20:], ours.output_lse[:, 20:])
    assert_bits(theirs.output[20:], ours.output[20:])


def padded(values, width):
    wide = torch.full((*values.shape[:2], width), NAN, dtype=values.dtype, device=values.device)
    wide[..., : values.shape[2]] = values
    return wide[..., : values.shape[2]]


def test_different_head_strides_are_refused_there(modules, cuda):
    call = make_call((33, 4, 128), BF16, cuda)
    call = call._replace(prefix_output=padded(call.prefix_output, 192))
    before = cloned(call)
    patched()(*call)
    compare(before, call.output, call.output_lse)
    if KNOWN:
        with pytest.raises(AssertionError, match="matching head strides"):
            without_plugin(*call)


@pytest.mark.parametrize("layout", ["row-strided", "transposed"])
def test_a_strided_lse_is_read_as_contiguous_there(layout, modules, cuda):
    strides = {"row-strided": (100, 1), "transposed": (1, 4)}[layout]
    names = ("prefix_lse", "suffix_lse", "output_lse")
    call = make_call((33, 4, 128), BF16, cuda, empty=False, strides=dict.fromkeys(names, strides))
    ours, theirs = both_answers(call)
    same = torch.allclose(theirs.output.float(), ours.output.float(), rtol=2**-7, atol=2**-10)
    if KNOWN:
        assert same == READS_LSE_STRIDES


def test_the_running_buffer_races_with_itself_there(modules, cuda):
    """Values padded to 192, as 0.33's MLA merges them where its attention kernel wants that: the 24
    threads of a head lie in two blocks, and one replaces the LSE that the other has yet to read.
    """
    tokens, heads, width = 8192, 128, 192
    random = torch.Generator(cuda).manual_seed(0)

    def rows():
        made = torch.empty(tokens, heads, width, dtype=BF16, device=cuda)
        return made.normal_(generator=random)

    def lse():
        return 3 * torch.randn(heads, tokens, device=cuda, generator=random)

    running, running_lse, chunk, chunk_lse = rows(), lse(), rows(), lse()
    outputs = torch.empty_like(running), torch.empty_like(running_lse)

    def wrong_rows(merge):
        """In place, next to the same merge into outputs of its own."""
        merge(outputs[0], running, running_lse, chunk, chunk_lse, outputs[1])
        here, here_lse = running.clone(), running_lse.clone()
        merge(here, here, here_lse, chunk, chunk_lse, here_lse)
        return int((here != outputs[0]).any(-1).sum()) + int((here_lse != outputs[1]).sum())

    assert [wrong_rows(patched()) for _ in range(5)] == [0] * 5
    some = slice(0, 64)  # of what both were compared with
    parts = running[some], running_lse[:, some], chunk[some], chunk_lse[:, some]
    compare(Call(outputs[0], *parts), outputs[0][some], outputs[1][:, some])
    if KNOWN:  # about 300 rows of a million in each call on an H100
        assert any(wrong_rows(without_plugin) for _ in range(20))


MISALIGNED = """
import sys, torch
from support import BF16, check, make_call
from in_vllm.dispatcher import patched, unpatched
import merge_attn_states_vllm
merge_attn_states_vllm.register()
call = make_call((33, 4, 128), BF16, "cuda", offsets={"prefix_output": 1})
if sys.argv[1] == "ours":
    check(call, patched())
else:
    with unpatched() as merge:
        merge(*call)
torch.cuda.synchronize()
print("ALIVE")
"""


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_a_misaligned_pointer_kills_the_context_there(whose, cuda, child_environment):
    """In a process of its own, which vLLM's own kernel takes down."""
    ran = run_python(MISALIGNED, child_environment, whose)
    if whose == "ours":
        assert "ALIVE" in ran.stdout, ran.stderr
    elif KNOWN:
        assert "ALIVE" not in ran.stdout
        assert "misaligned address" in ran.stderr


def test_what_is_refused_goes_to_vllm(device, merge):
    """An LSE of another dtype: what vLLM's own makes of it, and on a CPU that is right."""
    call = make_call((33, 4, 128), F32, device, empty=False)
    refused = call._replace(prefix_lse=call.prefix_lse.double())
    theirs = copied(Operands(*refused))
    expected = outcome(without_plugin, theirs)
    try:
        found = outcome(merge, refused)
        (reason,) = plugin.status().fallbacks
        assert "prefix_lse: expected float32" in reason
    finally:
        plugin.restore()  # forgets the refusal
        plugin.register()
    if isinstance(expected, Exception):
        assert (type(found), str(found)) == (type(expected), str(expected))
        assert "prefix_lse: expected float32" in str(found.__context__)
    else:
        assert_bits(refused.output, theirs.output)
    right, _ = merge_attn_states_reference(*refused[1:5])
    output, right = refused.output.cpu(), right.float().cpu()
    if device == "cpu" and IS_CPU:
        torch.testing.assert_close(output, right)
    elif KNOWN and device == "cuda" and expected is None:  # its bytes, read as float32
        assert not torch.allclose(output, right, atol=0.01)
