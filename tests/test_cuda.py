"""Streams, graphs and devices: what only a GPU shows."""

import json
import sys

import pytest
import torch
from conftest import ENTRIES
from support import (
    BF16,
    F32,
    assert_within,
    blank,
    check,
    cloned,
    compare,
    half_ulp,
    make_call,
    run_command,
)

from merge_attn_states import merge_attn_states as merge

HEAD_SIZES = [128, 99]  # vectorized, generic


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_a_graph_replays_with_new_contents(head_size, cuda, entry):
    call = check(make_call((33, 4, head_size), BF16, cuda, count=30), entry)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        entry(*call)
    for seed in (1, 2, 3):
        fresh = make_call((33, 4, head_size), BF16, cuda, count=30, seed=seed)
        for name in ("prefix_output", "prefix_lse", "suffix_output", "suffix_lse"):
            getattr(call, name).copy_(getattr(fresh, name))
        call.output.fill_(float("nan")), call.output_lse.fill_(float("nan"))
        graph.replay()
        compare(fresh, call.output, call.output_lse)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("magnitude", [0.5, 3, 12, 24, 50, 1000])
def test_the_lse_is_next_to_the_exact_one(magnitude, head_size, cuda):
    """Half a unit in the last place, and 5e-8: merges follow one another, and errors add up."""
    call = make_call((4096, 4, head_size), BF16, cuda, empty=False)
    call.prefix_lse.uniform_(magnitude / 2, magnitude)
    call.suffix_lse.copy_(call.prefix_lse + 3 * torch.randn_like(call.suffix_lse))
    call.suffix_lse[:, ::50] = call.prefix_lse[:, ::50] - 100 * torch.rand_like(
        call.suffix_lse[:, ::50]
    )
    near = call.prefix_lse[:, 1::3]  # the largest error is where the two are nearly equal
    call.suffix_lse[:, 1::3] = near - 0.05 * torch.rand_like(near)
    call.suffix_lse[:, 2::300] = call.prefix_lse[:, 2::300]
    for lse in (call.prefix_lse, call.suffix_lse):
        lse[:, ::2] *= -1
    merge(*call)
    exact = torch.logaddexp(call.prefix_lse.double(), call.suffix_lse.double())
    assert_within(call.output_lse, exact, half_ulp(exact.abs(), F32) + 5e-8)


def test_a_graph_of_a_chain_in_place(cuda):
    """Each link reads what the last one wrote: the order of the launches is kept."""
    parts = [make_call((64, 4, 128), F32, cuda, empty=False, seed=i) for i in range(4)]
    state = blank((64, 4, 128), F32, cuda).copy_(parts[0].prefix_output)
    lse = blank((4, 64), F32, cuda).copy_(parts[0].prefix_lse)
    start, start_lse = state.clone(), lse.clone()

    def chain():
        for part in parts:
            merge(state, state, lse, part.suffix_output, part.suffix_lse, lse)

    chain()
    eager, eager_lse = state.clone(), lse.clone()
    state.copy_(start), lse.copy_(start_lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    state.copy_(start), lse.copy_(start_lse)
    graph.replay()
    assert torch.equal(state, eager)
    assert torch.equal(lse, eager_lse)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_the_current_stream_is_used(head_size, cuda, entry):
    """The inputs arrive late on a side stream: a launch on any other one reads them too early."""
    call = make_call((65, 4, head_size), BF16, cuda)
    source = cloned(call)
    call.prefix_output.fill_(float("nan")), call.suffix_output.fill_(float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(500_000_000)  # a quarter of a second: a busy host is late by tens of ms
        call.prefix_output.copy_(source.prefix_output)
        call.suffix_output.copy_(source.suffix_output)
        entry(*call)
    assert not side.query(), "the host did not wait"
    side.synchronize()
    compare(source, call.output, call.output_lse)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_no_synchronisation_and_no_allocation(head_size, cuda, entry):
    call = check(make_call((65, 4, head_size), BF16, cuda, count=60), entry)
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        entry(*call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_another_device_than_the_current_one(head_size, cuda, entry):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    check(make_call((17, 3, head_size), BF16, f"{cuda}:1"), entry)
    assert torch.cuda.current_device() == 0


# Device 1 alone is used, by a thread whose own current device is 0. Prints what the runtime and
# PyTorch take for current and whether device 0 has a context, before the call and behind it.
ON_DEVICE_1 = """
import ctypes, json, sys, threading
import torch
from conftest import ENTRIES
from support import BF16, cloned, compare, make_call

driver = ctypes.CDLL("libcuda.so.1")

def runtime():  # PyTorch's own: another copy of it may have another current device
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "libcudart.so" in line}
    return ctypes.CDLL(paths.pop()) if paths else None

def state():
    flags, active, device = ctypes.c_uint(), ctypes.c_int(), ctypes.c_int(-1)
    assert driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)) == 0
    current = torch.cuda.current_device()
    if (library := runtime()) is not None:
        assert library.cudaGetDevice(ctypes.byref(device)) == 0
    else:
        device.value = current
    return {"current": current, "of the runtime": device.value, "context": bool(active.value)}

torch.cuda.set_device(1)
call = make_call((17, 3, int(sys.argv[2])), BF16, "cuda:1")
inputs = cloned(call)
torch.cuda.synchronize(1)
states, failures = [], []

def work():
    try:
        states.append(state())
        ENTRIES[sys.argv[1]](*call)
        states.append(state())
    except BaseException as error:
        failures.append(repr(error))

thread = threading.Thread(target=work)
thread.start(), thread.join()
assert not failures, failures
torch.cuda.synchronize(1)
compare(inputs, call.output, call.output_lse)
print(json.dumps(states))
"""


@pytest.mark.parametrize("way", ENTRIES)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_a_thread_whose_device_has_no_context_keeps_it_so(head_size, way, cuda, child_environment):
    """A context takes hundreds of megabytes of a GPU that nobody uses, and a device that stays
    current is where the thread's next tensor goes.
    """
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    said = run_command(sys.executable, "-c", ON_DEVICE_1, way, head_size, **child_environment)
    before, after = json.loads(said.splitlines()[-1])
    if before["context"]:
        pytest.skip("PyTorch itself made a context on the device that is not used")
    assert before == {"current": 0, "of the runtime": 0, "context": False}
    assert after == before


OWN_CONTEXT = """
import ctypes, sys
import torch
from conftest import ENTRIES
from support import BF16, cloned, compare, make_call

call = make_call((17, 3, int(sys.argv[2])), BF16, "cuda:1")
inputs = cloned(call)
torch.zeros(1, device="cuda:0")
torch.cuda.synchronize(1)
driver = ctypes.CDLL("libcuda.so.1")
own, current = ctypes.c_void_p(), ctypes.c_void_p()
assert driver.cuCtxCreate_v2(ctypes.byref(own), 0, 0) == 0  # on device 0, and current
ENTRIES[sys.argv[1]](*call)
assert driver.cuCtxGetCurrent(ctypes.byref(current)) == 0
assert current.value == own.value
assert driver.cuCtxPopCurrent_v2(ctypes.byref(own)) == 0
torch.cuda.synchronize(1)
compare(inputs, call.output, call.output_lse)
"""


@pytest.mark.parametrize("way", ENTRIES)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_a_context_that_the_caller_made_stays_current(head_size, way, cuda, child_environment):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    run_command(sys.executable, "-c", OWN_CONTEXT, way, head_size, **child_environment)


FIRST_IN_A_CAPTURE = """
import sys
import torch
from conftest import ENTRIES
from support import BF16, cloned, compare, make_call

call = make_call((17, 3, int(sys.argv[2])), BF16, "cuda")
inputs = cloned(call)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    ENTRIES[sys.argv[1]](*call)
graph.replay()
torch.cuda.synchronize()
compare(inputs, call.output, call.output_lse)
"""


@pytest.mark.parametrize("way", ENTRIES)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_the_first_call_of_a_process_may_be_captured(head_size, way, cuda, child_environment):
    """Where the kernels are not loaded yet, and the device was never asked what it is."""
    run_command(sys.executable, "-c", FIRST_IN_A_CAPTURE, way, head_size, **child_environment)


@pytest.mark.parametrize("tokens", [65_535, 65_536, 200_000])  # a grid's y and z limit, and past it
@pytest.mark.parametrize("head_size", [8, 7])  # vectorized, generic
def test_many_tokens(tokens, head_size, cuda):
    check(make_call((tokens, 1, head_size), BF16, cuda))


@pytest.mark.parametrize("heads", [65_535, 65_536, 70_001])  # the same limits on the other axis
@pytest.mark.parametrize("head_size", [8, 7])  # vectorized, generic
def test_many_heads(heads, head_size, cuda):
    check(make_call((2, heads, head_size), BF16, cuda))
