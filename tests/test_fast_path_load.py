"""The eager fast path under load: a million calls, many threads, a full queue of launches."""

import contextlib
import gc
import sys
import threading
import time

import pytest
import torch
from support import (
    F32,
    Recording,
    assert_bits,
    check,
    cloned,
    make_call,
    needs_bounds,
    plain,
    resident_bytes,
    run_command,
)

from merge_attn_states import merge_attn_states as merge
from merge_attn_states._library import fast_path

OP = torch.ops.merge_attn_states.merge_attn_states


def test_a_million_calls_leave_nothing_behind(device):
    path, why = fast_path()
    if path is None:
        pytest.skip(why)
    call = make_call((1, 1, 8), F32, device, count=1)
    refused = call._replace(prefix_lse=call.prefix_lse.new_zeros(2, 2))
    aside = call._replace(suffix_lse=torch.nn.Parameter(call.suffix_lse, requires_grad=False))
    objects = [*call, *refused, *aside, True, False, None, 1]
    assert path(*call) is True
    assert path(*aside) is False
    with pytest.raises(ValueError, match=r"^prefix_lse: expected shape "):
        path(*refused)

    def many(times):
        for _ in range(times):
            path(*call)
        for _ in range(times // 50):
            path(*aside)
            with contextlib.suppress(ValueError):
                path(*refused)

    many(1000)
    gc.collect()
    references = [sys.getrefcount(x) for x in objects]
    memory = resident_bytes()
    many(1_000_000)
    gc.collect()
    # The rarest way is taken 20,000 times. None, True, False and 1 belong to everyone: what other
    # tests left behind may let go of them meanwhile (from 3.12 on they never change).
    grown = [sys.getrefcount(x) - old for x, old in zip(objects, references, strict=True)]
    assert all(abs(change) < 10_000 for change in grown), grown
    slack = 2**22
    if device == "cuda":
        torch.cuda.synchronize()
        slack = 2**24  # the driver's queues grow too; an object a call would be 2^25 and more
    assert resident_bytes() - memory < slack


def test_threads_have_states_of_their_own(taken):
    """One thread is traced, the others are not; and what they share is not mixed up."""
    inside, done = threading.Event(), threading.Event()
    mode = Recording()

    def traced():
        with mode:
            inside.set()
            done.wait(60)
            merge(*plain())

    watcher = threading.Thread(target=traced)
    watcher.start()
    assert inside.wait(60)
    calls = [plain(seed=seed) for seed in range(16)]
    workers = [threading.Thread(target=merge, args=call) for call in calls]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert taken == [True] * 16
    done.set()
    watcher.join()
    assert taken[16:] == [False]
    assert OP.default in mode.seen
    for seed, call in enumerate(calls):
        assert_bits(call.output, check(plain(seed=seed)).output)


def test_threads_with_a_stream_each(cuda, taken):
    """Every thread's chain of merges runs in its own stream, in the thread's order."""
    count, merges = 8, 1000
    calls = [plain(cuda, seed=seed, empty=False) for seed in range(count)]
    alone = [cloned(call) for call in calls]
    torch.cuda.synchronize()

    def chain(call):
        for _ in range(merges):
            state, lse = call.prefix_output, call.prefix_lse
            merge(state, state, lse, call.suffix_output, call.suffix_lse, lse)

    def in_a_stream_of_its_own(call):
        with torch.cuda.stream(torch.cuda.Stream()):
            chain(call)

    workers = [threading.Thread(target=in_a_stream_of_its_own, args=[call]) for call in calls]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.cuda.synchronize()
    assert taken == [True] * (count * merges)
    for call, expected in zip(calls, alone, strict=True):
        chain(expected)
        assert_bits(call.prefix_output, expected.prefix_output)
        assert_bits(call.prefix_lse, expected.prefix_lse)


def test_other_threads_run_while_a_launch_waits(cuda, taken):
    """A full queue of launches holds the caller up, but not the interpreter."""
    call = plain(cuda)
    merge(*call)
    torch.cuda.synchronize()
    begun, gaps, done = threading.Event(), [], threading.Event()

    def watch():
        last = time.monotonic()
        while not done.is_set():
            begun.set()
            time.sleep(0.001)
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun.wait(60)
    torch.cuda._sleep(4_000_000_000)  # two seconds
    begin = time.monotonic()
    for _ in range(5000):  # a queue takes a thousand
        merge(*call)
    waited = time.monotonic() - begin
    done.set()
    watcher.join()
    torch.cuda.synchronize()
    assert waited > 1, "the queue was not full"
    assert max(gaps) < waited / 2


SWAP = """
import threading
import torch
from merge_attn_states import merge_attn_states as merge

torch.set_num_threads(1)
part, lse = torch.ones(1, 1, 128).expand(32768, 16, 128), torch.zeros(1, 1).expand(16, 32768)
output, other, refused = torch.empty(32768, 16, 128), torch.empty(0), 0
thread = threading.Thread(target=merge, args=(output, part, lse, part, lse))
thread.start()
while thread.is_alive():
    try:
        torch.utils.swap_tensors(output, other)
        torch.utils.swap_tensors(output, other)
    except RuntimeError:
        refused += 1
assert refused, "nobody tried while it merged"
"""


def test_a_tensor_is_not_swapped_while_it_is_merged(child_environment):
    """By another thread, once the interpreter's lock is given back: it would free the memory."""
    needs_bounds(merge)
    run_command(sys.executable, "-c", SWAP, **child_environment)
