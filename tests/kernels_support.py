"""What the tests of many parts' kernels stand on: their names, and calls that differ in the kernel.

Kernels are named as a GPU's, of some parts and with the rows, threads or elements that tuning
chose; on the CPU one takes everything.
"""

import torch
from states_support import States, make_states, operator_args
from support import BF16, INF, assert_bits

from merge_attn_states import build_info

ROWS, HEAD_SIZE = (7, 5), 136  # of 16 bits: 17 packs a row, one more than merge_many has at a time
SINK = torch.tensor([0.5, -INF, 40.0, -3.0, INF], dtype=BF16)
COUNTS = [1, 3, 4, 5, 8, 9, 16, 17, 200, 1024]  # both sides of what each kernel holds


def pair(rows, threads):
    return "vectorized", f"{rows} in a block of {threads} threads, by rows"


def few(count, rows=7, threads=128 + 32):
    """Threads of values, and a warp or more that merges the LSEs."""
    return "vectorized", f"{count} parts, {rows} rows in a block of {threads} threads"


def alike(count, rows=7, threads=128 + 32):
    """Of parts that differ in their addresses alone: beyond 16 of them a block has one row."""
    return few(count, rows, threads) if count <= 16 else few(count, 1, 256)


def each(count, head_size=HEAD_SIZE, selects=False):
    """Of up to eight parts, each with a layout of its own; or with an index or a mask."""
    lanes = -(-head_size // (16 if selects and count <= 4 else 8))
    rows = 256 // lanes
    return "vectorized", f"{count} parts, each apart, {rows} rows in a block of 256 threads"


def selecting(count, head_size=HEAD_SIZE, rows=1):
    """Of parts that have an index or a mask."""
    return each(count, head_size, selects=True) if count <= 8 else any_kind(count, rows)


def any_kind(count, rows=1, elements=8):
    kernel = "vectorized" if elements > 1 else "generic"
    return kernel, f"{count} parts, {rows} rows a block, {elements} elements at a time"


def assert_runs(states: States, kernel) -> None:
    given = (states.out_dtype, states.out_scale, states.return_lse)
    inspect = torch.ops.merge_attn_states.inspect_merge_states
    chosen = inspect(states.out, states.out_lse, *operator_args(states), *given)
    assert_is(chosen, kernel, states.parts[0][0])


def assert_is(chosen, kernel, operand) -> None:
    assert chosen == (0, "", *(kernel if operand.is_cuda else ("cpu", build_info()["cpu"])))


def assert_same(results, others) -> None:
    for one, other in zip(results, others, strict=True):
        if one is None:
            assert other is None
        else:
            assert_bits(one, other)


def make(count, device, dtype=BF16, sink=None, **options) -> States:
    sink = None if sink is None else sink.to(device)
    return make_states(ROWS, HEAD_SIZE, count, dtype, device, sink=sink, **options)


def stack(states: States, dim: int) -> States:
    outputs, lses = (torch.stack(x, dim) for x in states[:2])
    return states._replace(outputs=outputs, lses=lses, dim=dim)


def nowhere(states: States) -> list[torch.Tensor | None]:
    """Masks that declare no row empty: what they change is the kernel."""
    return [torch.zeros_like(states.lses[0], dtype=torch.bool), *[None] * (len(states.lses) - 1)]
